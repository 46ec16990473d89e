from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hubert_lightning.interrupts import Interrupted
from hubert_lightning.training.callbacks.alerts import AVERAGED, RunAlerts
from hubert_lightning.training.callbacks.best_checkpoints import BestCheckpoints


class Run:
    """Alerts that a run sends to W&B."""

    def __init__(self) -> None:
        self.alerts: list[tuple[str, str, str]] = []
        self.preempted = False

    def alert(self, title: str, text: str, level: str) -> None:
        self.alerts.append((title, text, level))

    def mark_preempting(self) -> None:
        self.preempted = True


def trainer_of(run: Run, **metrics: float) -> Any:
    return SimpleNamespace(
        is_global_zero=True,
        global_step=0,
        log_every_n_steps=10,
        sanity_checking=False,
        default_root_dir="run",
        state=SimpleNamespace(fn="fit"),
        callback_metrics={name: torch.tensor(value) for name, value in metrics.items()},
        loggers=[SimpleNamespace(log_table=None, experiment=run)],
        checkpoint_callbacks=[],
    )


def train(watch: RunAlerts, trainer: Any, logs: int) -> None:
    for _ in range(logs):
        trainer.global_step += 10
        watch.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]


def test_skipped_steps_are_told_at_the_first_and_each_tenfold() -> None:
    run, watch = Run(), RunAlerts()
    trainer = trainer_of(run)
    watch.on_train_start(trainer, None)  # type: ignore[arg-type]
    for skipped in (0, 1, 2, 9, 10, 11, 120):
        trainer.callback_metrics["train/skipped_steps"] = torch.tensor(float(skipped))
        train(watch, trainer, 1)
    assert [text.split(" steps have")[0] for _, text, _ in run.alerts] == ["step 20: 1", "step 50: 10", "step 70: 120"]
    resumed = RunAlerts()
    resumed.load_state_dict(watch.state_dict())
    resumed.on_train_start(trainer, None)  # type: ignore[arg-type]
    train(resumed, trainer, 1)
    assert len(run.alerts) == 3


def test_training_that_waits_for_data_is_told_once() -> None:
    run, watch = Run(), RunAlerts()
    trainer = trainer_of(run, **{"speed/data_wait": 0.6})
    watch.on_train_start(trainer, None)  # type: ignore[arg-type]
    train(watch, trainer, AVERAGED - 1)
    assert not run.alerts
    train(watch, trainer, 30)
    [(title, text, _)] = run.alerts
    assert title == "training waits for data"
    assert "60% of the time" in text


def test_a_risen_word_error_rate_is_told() -> None:
    run, watch = Run(), RunAlerts()
    for wer in (0.5, 0.2, 0.25, 0.31, 0.4):
        watch.on_validation_end(trainer_of(run, **{"val/wer": wer}), None)  # type: ignore[arg-type]
    [(title, text, _)] = run.alerts
    assert title == "WER has risen"
    assert "from 0.200 to 0.310" in text
    assert "best.ckpt" not in text  # which this run does not have


def test_the_rate_that_chooses_the_best_checkpoint_is_watched() -> None:
    run, watch = Run(), RunAlerts()
    for mean, wer in ((2.0, 0.2), (1.5, 0.5), (1.4, 0.9), (1.6, 0.2)):
        trainer = trainer_of(run, **{"val/cer/mean_of_languages": mean, "val/wer": wer})
        trainer.checkpoint_callbacks = [BestCheckpoints(monitor="val/cer/mean_of_languages")]
        watch.on_validation_end(trainer, None)  # type: ignore[arg-type]
    [(title, text, _)] = run.alerts
    assert title == "CER has risen"
    assert "val/cer/mean_of_languages has risen from 1.400 to 1.600; best.ckpt is kept" in text


def test_a_validation_that_is_not_finite_is_told() -> None:
    run, watch = Run(), RunAlerts()
    watch.on_validation_end(trainer_of(run, **{"val/loss": float("nan")}), None)  # type: ignore[arg-type]
    assert [title for title, _, _ in run.alerts] == ["validation not finite"]


@pytest.mark.parametrize(
    ("error", "title", "level", "preempted"),
    [
        (Interrupted(15), "run interrupted", "WARN", True),
        (ValueError("the disk is full"), "run failed", "ERROR", False),
    ],
)
def test_the_end_of_a_run_is_told(error: BaseException, title: str, level: str, preempted: bool) -> None:
    run, watch = Run(), RunAlerts()
    watch.on_exception(trainer_of(run), None, error)  # type: ignore[arg-type]
    assert not run.alerts  # the logger itself may have failed
    watch.setup(trainer_of(run), None, "fit")  # type: ignore[arg-type]
    watch.on_exception(trainer_of(run), None, error)  # type: ignore[arg-type]
    [(told, text, importance)] = run.alerts
    assert (told, importance, run.preempted) == (title, level, preempted)
    assert ("the same command resumes" in text) == preempted


def test_a_finished_run_states_its_results() -> None:
    run = Run()
    trainer = trainer_of(run, **{"val/wer": 0.125, "val/loss": 1.5})
    trainer.global_step = 300
    RunAlerts().on_fit_end(trainer, None)  # type: ignore[arg-type]
    assert run.alerts == [("run finished", "run: 300 steps, val/wer 0.125, val/loss 1.5", "INFO")]
