import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import write_store
from torch import Tensor

from hubert_lightning.training.callbacks.collapse import AVERAGED, CollapseWatch
from hubert_lightning.units.label_shards import LabelSource
from hubert_lightning.units.label_store import LabelStore

HEALTHY = {
    "masked_loss": 2.0,
    "masked_accuracy": 0.4,
    "unmasked_accuracy": 0.6,
    "label_clusters": 90.0,
    "predicted_clusters": 80.0,
}


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    """A hundred clusters, all as frequent: an entropy of 4.605 nats."""
    folder = tmp_path_factory.mktemp("labels")
    source = LabelSource("mfcc", "k", "m", clusters=(100,))
    return write_store(folder, source, {"a": np.arange(1000)[None] % 100})


def warnings_of(
    labels: LabelStore,
    logged: list[dict[str, float]],
    caplog: pytest.LogCaptureFixture,
    restarts: int = 0,
    used: Callable[[int], dict[str, Tensor]] | None = None,
) -> list[str]:
    """Return the warnings of a run that logs these values, every 60 steps, after 600 steps of warm-up.

    restarts: logged values between two interruptions, each resumed from a checkpoint; 0 for none
    used: function from the number of a logged batch to the clusters in it, as the task keeps them
    """
    alerts: list[str] = []
    experiment = SimpleNamespace(alert=lambda title, text, level: alerts.append(text))
    trainer: Any = SimpleNamespace(
        datamodule=SimpleNamespace(labels=labels),
        is_global_zero=True,
        global_step=0,
        log_every_n_steps=60,
        callback_metrics={},
        loggers=[SimpleNamespace(log_table=None, experiment=experiment)],
    )
    task: Any = SimpleNamespace(warmup_steps=600)
    watch = CollapseWatch()
    watch.on_train_start(trainer, task)
    for number, values in enumerate([HEALTHY | {"masked_loss": 9.0}] * 10 + logged, start=1):
        if restarts and number % restarts == 0:
            watch, before = CollapseWatch(), watch
            watch.load_state_dict(before.state_dict())
            watch.on_train_start(trainer, task)
        trainer.global_step += 60
        if used is not None:
            task.used_clusters = used(number)
        trainer.callback_metrics = {f"train/{name}": value for name, value in values.items()}
        watch.on_train_batch_end(trainer, task, None, None, 0)
    assert [record.getMessage() for record in caplog.records] == alerts
    return alerts


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"masked_loss": 4.6}, "the masked loss is 4.60, and guessing by the frequency of clusters gives 4.61"),
        (
            {"masked_accuracy": 0.99, "unmasked_accuracy": 1.0, "masked_loss": 0.01},
            "99% of masked frames are predicted right",
        ),
        ({"masked_accuracy": 0.7}, r"predicted better \(0.700\) than unmasked frames \(0.600\)"),
        ({"predicted_clusters": 2.0}, "2 clusters are predicted, but the labels have 90"),
    ],
)
def test_each_failure_is_warned_of_once(
    change: dict[str, float], sentence: str, labels: LabelStore, caplog: pytest.LogCaptureFixture
) -> None:
    warnings = warnings_of(labels, [HEALTHY | change] * (3 * AVERAGED), caplog)
    assert len(warnings) == 1
    assert re.search(sentence, warnings[0])


def test_a_rising_loss_is_warned_of(labels: LabelStore, caplog: pytest.LogCaptureFixture) -> None:
    logged = [HEALTHY] * AVERAGED + [HEALTHY | {"masked_loss": 2.8}] * AVERAGED
    [warnings] = warnings_of(labels, logged, caplog)
    assert "risen from 2.00 to 2.5" in warnings


def test_a_run_that_is_interrupted_repeatedly_gets_the_same_warnings(
    labels: LabelStore, caplog: pytest.LogCaptureFixture
) -> None:
    logged = [HEALTHY] * AVERAGED + [HEALTHY | {"masked_loss": 2.8}] * (3 * AVERAGED)
    [warnings] = warnings_of(labels, logged, caplog, restarts=AVERAGED // 2)
    caplog.clear()
    assert warnings_of(labels, logged, caplog) == [warnings]


def test_a_healthy_run_gets_no_warning(labels: LabelStore, caplog: pytest.LogCaptureFixture) -> None:
    falling = [HEALTHY | {"masked_loss": 4.5 - 0.02 * step} for step in range(100)]
    assert warnings_of(labels, falling, caplog) == []


def test_there_is_no_warning_before_enough_values_are_logged(
    labels: LabelStore, caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings_of(labels, [HEALTHY | {"masked_loss": 4.6}] * (AVERAGED - 1), caplog) == []


def test_other_tasks_are_not_watched(caplog: pytest.LogCaptureFixture) -> None:
    watch, task = CollapseWatch(), SimpleNamespace(warmup_steps=0)
    metrics = {f"train/{name}": value for name, value in (HEALTHY | {"masked_accuracy": 0.99}).items()}
    trainer: Any = SimpleNamespace(
        datamodule=None, is_global_zero=True, global_step=0, log_every_n_steps=1, callback_metrics=metrics, loggers=[]
    )
    watch.on_train_start(trainer, task)  # type: ignore[arg-type]
    for trainer.global_step in range(1000):
        watch.on_train_batch_end(trainer, task, None, None, 0)  # type: ignore[arg-type]
    assert caplog.records == []


def test_metrics_of_another_version_in_a_checkpoint_are_ignored() -> None:
    state = CollapseWatch().state_dict()
    del state["values"]["masked_loss"]
    state["values"] |= {"masked_accuracy": [0.5], "once_watched": [1.0]}
    watch = CollapseWatch()
    watch.load_state_dict(state)
    assert watch.state_dict()["values"] == CollapseWatch().state_dict()["values"] | {"masked_accuracy": [0.5]}


@pytest.mark.parametrize("restarts", [0, 7])
@pytest.mark.parametrize(("covered", "warned"), [(30, True), (40, False)])
def test_coverage_over_many_batches_is_watched_also_over_restarts(
    covered: int, warned: bool, restarts: int, labels: LabelStore, caplog: pytest.LogCaptureFixture
) -> None:
    def used(number: int) -> dict[str, Tensor]:
        """Batches of ten clusters each, which differ: labels cover all hundred, predictions the first ones."""
        batch = torch.arange(10 * number, 10 * number + 10)
        names = {"label_clusters": batch % 100, "predicted_clusters": batch % covered}
        return {name: torch.zeros(1, 100, dtype=torch.bool).index_fill(1, ids, True) for name, ids in names.items()}

    warnings = warnings_of(labels, [HEALTHY] * (3 * AVERAGED), caplog, restarts, used)
    expected = [f"predictions of 20 batches cover {covered} clusters, their labels 100"] if warned else []
    assert len(warnings) == len(expected)
    assert all(sentence in warning for sentence, warning in zip(expected, warnings, strict=True))
