"""A run that stopped early is finished: it resumes only if it is given more steps."""

import json
from pathlib import Path

import pytest
import torch
from helpers import SMALL_FINETUNING, finetuning_options

from hubert_lightning.cli import main


def command(manifests: Path, output: Path, patience: int, max_steps: int) -> list[str]:
    # Nothing is as good as this asks for, so every validation but the first is one too many
    stopping = (
        "{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: "
        f"{{monitor: val/loss, min_delta: 1000000.0, patience: {patience}}}}}"
    )
    best = "{class_path: hubert_lightning.BestCheckpoints}"
    return [
        *(
            "fit",
            *SMALL_FINETUNING,
            *finetuning_options(manifests),
            f"--output={output}",
            f"--trainer.max_steps={max_steps}",
        ),
        f"--trainer.callbacks=[{best}, {stopping}]",
    ]


def metrics(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture
def stopped(manifests: Path, tmp_path: Path) -> Path:
    """A run of 20 steps at most, whose second validation, after step 4, ends it."""
    main(command(manifests, tmp_path / "run", patience=1, max_steps=20))
    return tmp_path / "run"


def test_a_run_that_stopped_early_is_finished_and_says_why(
    stopped: Path, manifests: Path, capsys: pytest.CaptureFixture
) -> None:
    found = metrics(stopped)
    assert (found["steps"], found["max_steps"]) == (4, 20)
    assert found["stopped_early"].startswith("Monitored metric val/loss did not improve in the last 1 records.")
    assert torch.load(stopped / "last.ckpt", weights_only=True)["global_step"] == 4
    assert (stopped / "average.ckpt").exists()
    before = {path.name: path.stat().st_mtime_ns for path in stopped.glob("*.ckpt")}
    for max_steps in (20, 10):
        capsys.readouterr()
        main(command(manifests, stopped, patience=1, max_steps=max_steps))
        assert "finished already, stopped early (Monitored metric val/loss did not" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in stopped.glob("*.ckpt")} == before


@pytest.mark.slow
def test_with_more_steps_it_resumes_until_it_stops_again_or_is_done(stopped: Path, manifests: Path) -> None:
    main(command(manifests, stopped, patience=2, max_steps=24))  # one more validation than it had
    assert (metrics(stopped)["steps"], metrics(stopped)["max_steps"]) == (6, 24)
    main(command(manifests, stopped, patience=100, max_steps=26))
    assert metrics(stopped)["steps"] == 26
    assert "stopped_early" not in metrics(stopped)


@pytest.mark.slow
def test_a_run_whose_time_is_up_is_not_finished(stopped: Path, manifests: Path) -> None:
    more = [*command(manifests, stopped, patience=100, max_steps=26), "--trainer.max_time=00:00:00:00"]
    main(more)  # what had stopped it before does not count
    assert metrics(stopped)["steps"] < 26
    assert "stopped_early" not in metrics(stopped)
    main(command(manifests, stopped, patience=100, max_steps=26))
    assert metrics(stopped)["steps"] == 26
