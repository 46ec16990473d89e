import json
import math
from pathlib import Path

import pytest

from hubert_lightning.cli import main


@pytest.mark.slow
def test_a_short_demo_leaves_numbers_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["demo", f"--output={tmp_path}", "--minutes=1", "--steps=3"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"pnmi", "wer", "cer", "seconds"}
    assert results["pnmi"].keys() == {"mfcc", "iteration1", "iteration2"}
    assert all(0 < value < 1 for value in results["pnmi"].values())
    for rate in ("wer", "cer"):
        assert results[rate].keys() == {"scratch", "pretrained"}
        assert all(math.isfinite(value) for value in results[rate].values())
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "PNMI, held-out speakers" in printed
    assert "reference" in printed
    with pytest.raises(SystemExit):
        main(["demo", f"--output={tmp_path}"])
    assert "holds a finished demo" in capsys.readouterr().err
    (tmp_path / "results.json").unlink()  # as if it had been interrupted at the end
    main(["demo", f"--output={tmp_path}", "--minutes=1", "--steps=3"])
    again = json.loads((tmp_path / "results.json").read_text())
    assert {**again, "seconds": 0} == {**results, "seconds": 0}
