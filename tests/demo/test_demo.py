import json
import math
from pathlib import Path

import pytest
import soundfile

from hubert_lightning.cli import main
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.demo.demo import STAGES

QUICK = ("--minutes=1", "--steps=3")


@pytest.mark.slow
def test_a_short_demo_leaves_numbers_a_figure_subtitles_and_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["demo", f"--output={tmp_path}", *QUICK])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"pnmi", "wer", "cer", "seconds"}
    assert list(results["pnmi"]) == ["mfcc", "iteration1", "iteration2"]
    assert all(0 < value < 1 for value in results["pnmi"].values())
    for rate in ("wer", "cer"):
        assert list(results[rate]) == ["scratch", "pretrained", "scratch_lm", "pretrained_lm"]
        assert all(math.isfinite(value) for value in results[rate].values())
    for suffix, start in {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}.items():
        assert (tmp_path / "results").with_suffix(suffix).read_bytes().startswith(start)

    for name in ("pretrained", "scratch"):  # each number is that of the test in the run's folder
        run = tmp_path / {"pretrained": "finetuning", "scratch": "scratch"}[name]
        tests = {path.parent.name: json.loads(path.read_text()) for path in run.glob("test/*/test-metrics.json")}
        assert tests.keys() == {"test", "test-lm"}
        assert tests["test"]["test/wer"] == results["wer"][name]
        assert tests["test-lm"]["test/cer"] == results["cer"][f"{name}_lm"]
    report = (tmp_path / "report.html").read_text()
    assert all(name in report for name in ("finetuning", "scratch", "iteration1", "iteration2"))

    cuts = list(read_manifest(tmp_path / "manifests/test.jsonl.gz"))
    spoken = [cut for cut in cuts if cut.supervisions[0].speaker == cuts[0].supervisions[0].speaker]
    assert soundfile.info(tmp_path / "recording.flac").frames == sum(cut.num_samples for cut in spoken)
    assert (tmp_path / "recording.srt").exists()

    printed = capsys.readouterr()
    assert "PNMI, unknown speakers" in printed.out
    assert f"{tmp_path / 'report.html'}" in printed.out.replace("\n", "")
    for number, name in enumerate(STAGES, start=1):
        assert f"stage {number} of {len(STAGES)}: {name}, about " in printed.err
    for noise in ("Seed set to", "v_num", "Epoch 0", "GPU available", "litlogger"):
        assert noise not in printed.err + printed.out

    with pytest.raises(SystemExit):
        main(["demo", f"--output={tmp_path}"])
    assert "holds a finished demo" in capsys.readouterr().err
    (tmp_path / "results.json").unlink()  # as if it had been interrupted at the end
    main(["demo", f"--output={tmp_path}", *QUICK])
    again = json.loads((tmp_path / "results.json").read_text())
    assert {**again, "seconds": 0} == {**results, "seconds": 0}
