"""The scripts of docs/examples and the notebook run as they are."""

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from helpers import ROOT, TINY, save_ctc
from lhotse import CutSet

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.pretrained.load import encoder_fingerprint, load_hubert
from hubert_lightning.units.kmeans_file import save_kmeans

EXAMPLES = ROOT / "docs/examples"
NOTEBOOK = ROOT / "docs/notebooks/first-steps.ipynb"
CLUSTERS = 16


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(name: str, *args: object) -> list[str]:
        """The lines that a script prints."""
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def spoken(manifest: Path, folder: Path) -> Path:
    """The table of the utterances of a manifest, whose audio is in a folder beside it."""
    rows = ["path,text"]
    (folder / "talks").mkdir()
    for cut in read_manifest(manifest):
        soundfile.write(folder / f"talks/{cut.id}.flac", read_waveform(cut).numpy(), SAMPLE_RATE)
        rows.append(f"talks/{cut.id}.flac,{cut.supervisions[0].text}")
    table = folder / "table.csv"
    table.write_text("\n".join(rows), "utf-8")
    return table


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_to_run_it(
    script: Path, run_example: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(script.read_text("utf-8").splitlines()) < 40
    with pytest.raises(SystemExit):
        run_example(script.name, "--help")
    shown = capsys.readouterr().out
    assert f"Run: python docs/examples/{script.name} " in shown


@pytest.mark.slow
def test_the_example_pre_trains_on_a_folder_and_fine_tunes_a_table(
    manifests: Path, tmp_path: Path, run_example: Any
) -> None:
    table = spoken(manifests / "train.jsonl.gz", tmp_path)
    printed = run_example("pretrain_and_finetune.py", tmp_path / "talks", table, tmp_path / "mine", "--steps", 2)
    encoder, words = tmp_path / "mine/encoder/iteration2/last.ckpt", tmp_path / "mine/words/best.ckpt"
    assert len(printed) == 2
    assert re.fullmatch(re.escape(f"{encoder}: predicts ") + r"[\d.]+% of the masked clusters", printed[0])
    assert re.fullmatch(re.escape(f"{words}: word error rate ") + r"[\d.]+% on held-out sentences", printed[1])
    frozen, pretrained = (load_hubert(path).convolutions.state_dict() for path in (words, encoder))
    torch.testing.assert_close(frozen, pretrained)


def test_the_example_writes_subtitles_and_scores_them(tmp_path: Path, speech: list[Path], run_example: Any) -> None:
    save_ctc(tmp_path / "best.ckpt", spread=3.0)
    (tmp_path / "said.txt").write_text("Turn on the light, please.\n", "utf-8")
    arguments = (tmp_path / "best.ckpt", speech[0])
    subtitles, rates = run_example(
        "transcribe_and_score.py", *arguments, tmp_path / "a.srt", "--reference", tmp_path / "said.txt"
    )
    assert re.search(r"a\.srt: [1-9]\d* words in [\d.]+ s$", subtitles)
    assert re.fullmatch(r"word error rate [\d.]+%, character error rate [\d.]+%", rates)
    assert (tmp_path / "a.srt").read_text("utf-8").startswith("1\n00:00:")
    run_example("transcribe_and_score.py", *arguments, tmp_path / "a.vtt")
    assert (tmp_path / "a.vtt").read_text("utf-8").startswith("WEBVTT")


def test_the_example_computes_the_bit_rate_of_units(
    tmp_path: Path, train_cuts: CutSet, speech: list[Path], run_example: Any
) -> None:
    save_ctc(tmp_path / "model.ckpt")
    encoder = load_hubert(tmp_path / "model.ckpt")
    with torch.no_grad():
        rows = encoder.features(read_waveform(train_cuts[0])[None], layer=TINY.num_layers)[0]
    source = {"features": f"layer {TINY.num_layers} of encoder {encoder_fingerprint(encoder)}"}
    save_kmeans(tmp_path / "kmeans.safetensors", [rows[:: len(rows) // CLUSTERS][:CLUSTERS]], source)
    (tmp_path / "talks").mkdir()
    for path in speech:
        path.rename(tmp_path / "talks" / path.name)
    (tmp_path / "talks/broken.wav").write_bytes(b"RIFF")
    refused, *rates = run_example(
        "units_bit_rate.py", tmp_path / "model.ckpt", tmp_path / "kmeans.safetensors", tmp_path / "talks"
    )
    assert refused.startswith(f"{tmp_path / 'talks/broken.wav'}: ")
    repeated, merged = ([float(number) for number in re.findall(r"[\d.]+(?= [ub])", line)] for line in rates)
    assert repeated[0] == pytest.approx(50, abs=1)
    assert merged[0] < repeated[0]
    for units_per_second, bits, bits_per_second in (repeated, merged):
        assert 0 < bits <= 4  # 16 clusters
        assert bits_per_second == pytest.approx(units_per_second * bits, rel=0.02)


def test_the_notebook_runs_and_stores_no_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    monkeypatch.chdir(NOTEBOOK.parent)
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert f"layer 1: {tuple(names['layers'][0].shape)}" in printed
    assert int(names["runs"].durations.sum()) == len(names["units"]) == names["layers"][0].shape[1]
    assert names["transcript"].to_vtt() in printed
    assert "of 7 words" in printed
