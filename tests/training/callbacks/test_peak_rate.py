"""The found rate is the peak of the schedule, and the search leaves no trace."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, quick_adam, silent_trainer
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from hubert_lightning.training.batches import TranscribedBatch
from hubert_lightning.training.callbacks.peak_rate import PeakRateFinder, steepest_rate
from hubert_lightning.training.finetuning import CTCFinetuning
from hubert_lightning.training.finetuning_data import TranscribedData


class Watch(Callback):
    """Weights and batch before the first step, and every step's rate."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.ids: tuple[str, ...] = ()
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:  # type: ignore[no-untyped-def]
        if not self.weights:
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
            self.ids = batch.id
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class Diverging(CTCFinetuning):
    """Whose loss is not finite once the rate is too high."""

    def training_step(self, batch: TranscribedBatch) -> Tensor:
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        return super().training_step(batch) * (math.nan if rate > 1e-2 else 1)


def fitted(
    manifests: Path,
    folder: Path,
    *finders: Callback,
    steps: int = 10,
    kind: type[CTCFinetuning] = CTCFinetuning,
    freeze_steps: int = 0,
) -> tuple[Trainer, Watch]:
    seed_everything(0, verbose=False)
    model = kind(
        encoder=TINY,
        freeze_steps=freeze_steps,
        freeze_convolutions=False,
        optimizer=quick_adam,
        warmup=0.2,
        decay=0.5,
        max_skipped=1,
    )
    watch = Watch()
    trainer = silent_trainer(folder, steps, callbacks=[*finders, watch], use_distributed_sampler=False)
    trainer.fit(
        model, datamodule=TranscribedData(train=[manifests / "finetune.jsonl.gz"], max_duration=12, num_workers=0)
    )
    return trainer, watch


@pytest.mark.slow
def test_the_found_rate_is_the_peak_and_changes_nothing_else(manifests: Path, tmp_path: Path) -> None:
    finder = PeakRateFinder(lowest=1e-5, highest=1.0, steps=40)
    trainer, watch = fitted(manifests, tmp_path, finder)
    _, without = fitted(manifests, tmp_path)
    assert finder.optimal_lr is not None
    peak = max(watch.rates)
    assert 1e-5 < peak < 1.0
    assert peak == pytest.approx(steepest_rate(finder.optimal_lr.results))
    assert watch.ids == without.ids
    for name, value in without.weights.items():
        torch.testing.assert_close(watch.weights[name], value, rtol=0, atol=0)
    assert trainer.global_step == 10
    assert watch.rates == pytest.approx([rate * peak / 2e-3 for rate in without.rates])
    assert not list(tmp_path.glob(".lr_find*"))


@pytest.mark.slow
def test_rates_are_tried_on_the_whole_model_even_if_it_is_frozen_at_first(manifests: Path, tmp_path: Path) -> None:
    tried = []
    for freeze_steps in (0, 1000):
        finder = PeakRateFinder(lowest=1e-5, highest=1e-1, steps=30)
        fitted(manifests, tmp_path, finder, freeze_steps=freeze_steps)
        assert finder.optimal_lr is not None
        tried.append(finder.optimal_lr.results)
    assert tried[0] == tried[1]


@pytest.mark.slow
def test_rates_that_are_too_high_do_not_end_the_run(manifests: Path, tmp_path: Path) -> None:
    finder = PeakRateFinder(lowest=1e-5, highest=1.0, steps=40)
    trainer, watch = fitted(manifests, tmp_path, finder, kind=Diverging)
    assert finder.optimal_lr is not None
    assert not np.isfinite(finder.optimal_lr.results["loss"]).all()
    assert max(watch.rates) <= 1e-2
    assert trainer.lightning_module.global_batch.skipped == 0


def test_rates_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"PeakRateFinder: lowest 0\.1, highest 0\.01, steps 100; try 20 steps"):
        PeakRateFinder(lowest=0.1, highest=0.01)


def test_the_peak_is_where_the_loss_falls_fastest_by_the_logarithm_of_the_rate() -> None:
    rates = np.logspace(-6, -1, 100)
    losses = 5 - 2 / (1 + np.exp(-4 * np.log10(rates / 1e-3)))  # falls around 1e-3
    assert steepest_rate({"lr": rates, "loss": losses}) == pytest.approx(1e-3, rel=0.2)
    assert steepest_rate({"lr": rates[:12], "loss": losses[:12]}) is None
