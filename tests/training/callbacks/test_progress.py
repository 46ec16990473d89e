"""What a run shows on a terminal and writes without one: its own numbers, and no noise of libraries."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import ROOT, in_terminal, pretraining_options, transcribed_options
from lightning.pytorch.callbacks import TQDMProgressBar

from hubert_lightning import progress_bar
from hubert_lightning.cli import main
from hubert_lightning.training.callbacks.progress import RunProgress

PRETRAINING = ["--config", str(ROOT / "configs/demo.yaml"), "--config", str(ROOT / "tests/smoke.yaml")]
FINETUNING = ["--config", str(ROOT / "configs/demo-finetune.yaml"), "--config", str(ROOT / "tests/smoke-finetune.yaml")]
SHOWN = "--trainer.enable_progress_bar=null"
NOISE = (
    *("Epoch", "v_num", "Tip:", "litlogger", "weights_only", "GPU available", "TPU available", "Restor", "srun"),
    *("is smaller than", "Initializing distributed", "distributed_backend", "`Trainer.fit` stopped", "DataLoader 0"),
    *("UserWarning", "FutureWarning", "DeprecationWarning", "it/s", "\r"),
)


@pytest.fixture
def every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each piece of work print a line."""
    monkeypatch.setattr(progress_bar, "FIRST_LINE", 0)
    monkeypatch.setattr(progress_bar, "BETWEEN_LINES", 0)
    monkeypatch.setattr(progress_bar, "MOST_LINES", 10_000)


def two_iterations(steps: int = 3) -> str:
    each = f"clusters: 20, max_frames: 2000, max_steps: {steps}"
    return f"--iterations=[{{features: mfcc, {each}}}, {{features: previous, layer: 1, {each}}}]"


@pytest.mark.slow
@pytest.mark.usefixtures("every_line")
def test_a_pre_training_in_a_pipe_prints_its_numbers_and_no_noise(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", *PRETRAINING, *pretraining_options(manifests), SHOWN, two_iterations(), f"--output={tmp_path}"])
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert [noise for noise in NOISE if noise in printed.err + printed.out] == []
    for number in (1, 2):
        numbers = r"loss [\d.]+, masked accuracy [\d.]+ %, [\d.]+ % in validation, \d+ × real time"
        assert any(re.fullmatch(rf"iteration {number} of 2: 3 of 3 steps.*, {numbers}", line) for line in lines)
        ends = [line for line in lines if re.fullmatch(rf"iteration {number} of 2: 3 steps in .*?, {numbers}", line)]
        assert len(ends) == 1
    assert any(re.fullmatch(r"labelling: 0.0\d of 0.0\d h.* × real time", line) for line in lines)
    assert any(re.fullmatch(r"features for K-means: .* × real time", line) for line in lines)


@pytest.mark.slow
@pytest.mark.usefixtures("every_line")
def test_a_fine_tuning_its_test_and_its_resumption_print_their_numbers_and_no_noise(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", *FINETUNING, *transcribed_options(manifests), SHOWN, f"--output={tmp_path}"]
    main(fit)
    said = capsys.readouterr()
    assert re.search(
        r"^training: 2 steps in .*, loss [\d.]+, WER 100.0 % in validation, \d+ × real time$", said.err, re.M
    )
    main([*fit, "--trainer.max_steps=3"])
    resumed = capsys.readouterr()
    assert "training: resumes after step 2\n" in resumed.err
    assert re.search(r"^training: 1 steps in ", resumed.err, re.M)
    for verb, title in (("test", "test"), ("predict", "prediction"), ("validate", "validation")):
        main([verb, "--config", str(tmp_path / "config.yaml")])
        judged = capsys.readouterr()
        assert re.search(rf"^{title}: 1 of \d batches.* × real time$", judged.err, re.M)
        assert [noise for noise in NOISE if noise in judged.err + judged.out] == []
    assert [noise for noise in NOISE if noise in said.err + said.out + resumed.err + resumed.out] == []


@pytest.mark.usefixtures("every_line")
def test_a_run_without_a_bar_prints_no_progress(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silenced = "--trainer.enable_progress_bar=false"
    main(["fit", *FINETUNING, *transcribed_options(manifests), silenced, f"--output={tmp_path}"])
    assert " of 2 steps" not in capsys.readouterr().err


def test_a_bar_of_the_user_takes_the_place_of_ours(
    manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    began: list[Any] = []
    monkeypatch.setattr(TQDMProgressBar, "on_train_start", lambda self, *args: began.append(self))
    monkeypatch.setattr(TQDMProgressBar, "on_train_epoch_start", lambda *args: None)
    monkeypatch.setattr(TQDMProgressBar, "on_train_batch_end", lambda *args: None)
    own = "--trainer.callbacks+=lightning.pytorch.callbacks.TQDMProgressBar"
    main(["fit", *FINETUNING, *transcribed_options(manifests), SHOWN, own, f"--output={tmp_path}"])
    assert len(began) == 1
    assert "training: 2 steps" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_a_terminal_is_one_bar(manifests: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hubert_lightning", "fit", *PRETRAINING, *pretraining_options(manifests)]
    screen = in_terminal(*command, SHOWN, two_iterations(steps=30), f"--output={tmp_path}")
    assert any(re.search(r"^iteration 2 of 2 ━.* \d+ of 30 steps", shown, re.M) for shown in screen.shown)
    assert any(re.search(r"^loss [\d.]+, masked accuracy .* × real time$", shown, re.M) for shown in screen.shown)
    assert all(shown.count("━ ") <= 1 for shown in screen.shown)
    end = screen.shown[-1]
    assert "━" not in end
    assert [noise for noise in NOISE if noise in end] == []
    assert re.search(r"^iteration 1 of 2: 30 steps in ", end, re.M)


@pytest.mark.slow
def test_two_ranks_print_each_message_once(manifests: Path, tmp_path: Path) -> None:
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp_find_unused_parameters_true"]
    for name, more in (("pre", [*PRETRAINING, *pretraining_options(manifests)]), ("fine", FINETUNING)):
        data = [] if name == "pre" else transcribed_options(manifests)
        command = [sys.executable, "-m", "hubert_lightning", "fit", *more, *data, SHOWN, *ranks]
        done = subprocess.run([*command, f"--output={tmp_path / name}"], capture_output=True, text=True, check=True)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line]
        texts = [re.sub(r"^\[rank\d\]:\[\w+ [\d:.]+ \d+ ", "", line) for line in lines]  # torch's prefix
        assert len(set(texts)) == len(texts), lines
        assert [noise for noise in NOISE if noise in done.stdout + done.stderr] == []
        assert sum(" 2 steps in " in line for line in lines) == 1


def test_a_resumed_run_ends_with_numbers_that_it_has_measured_itself() -> None:
    bar = RunProgress()
    shown = SimpleNamespace(note="")
    trainer: Any = SimpleNamespace(global_step=20, log_every_n_steps=20, estimated_stepping_batches=30)
    for step, validates, note in ((25, False, ""), (25, True, "1.0 % in validation"), (45, False, "loss 2.000")):
        bar._bar, trainer.global_step = None, 20
        bar._resources.enter_context = lambda _: shown  # type: ignore[method-assign, assignment]
        bar._open_fit(trainer)
        bar._bar, shown.note = shown, ""  # type: ignore[assignment]
        bar._validated, trainer.global_step = validates, step
        trainer.callback_metrics = {"train/loss": 2.0, "val/masked_accuracy": 0.01}
        bar.on_train_end(trainer, None)  # type: ignore[arg-type]
        assert shown.note == note
