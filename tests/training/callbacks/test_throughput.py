import csv
from pathlib import Path

import pytest
import torch
from helpers import pretraining_batch, pretraining_model
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.training.callbacks.throughput import Throughput, measured_speed


class Clock(Callback):
    """Time that passes where we say so: 3 s to wait for a batch, 1 s for its step."""

    def __init__(self) -> None:
        self.now = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self.now += 1


class SlowBatches(list):
    def __init__(self, batches: list, clock: Clock) -> None:
        super().__init__(batches)
        self.clock = clock

    def __getitem__(self, index: int) -> object:  # type: ignore[override]
        self.clock.now += 3
        return super().__getitem__(index)


def test_speed_and_waiting_are_those_of_the_steps_since_the_last_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("hubert_lightning.training.callbacks.throughput.time.perf_counter", lambda: clock.now)
    monkeypatch.setattr("hubert_lightning.training.callbacks.throughput._peak_speed", lambda trainer: 1e9)
    model, batches = (
        pretraining_model(),
        [pretraining_batch(k, frames=40 + k)._replace(waste=k / 100) for k in range(8)],
    )
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(tmp_path, name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        callbacks=[Throughput(), clock],
    )
    trainer.fit(model, DataLoader(SlowBatches(batches, clock), batch_size=None, collate_fn=lambda batch: batch))
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["speed/data_wait"]]
    assert len(rows) == 2
    for row, since in zip(rows, (batches[:4], batches[4:]), strict=True):
        seconds = sum(batch.waveform.numel() for batch in since) / SAMPLE_RATE
        assert float(row["speed/audio_seconds_per_second"]) == pytest.approx(seconds / 16)
        assert float(row["speed/mfu"]) == pytest.approx(sum(map(model.operations, since)) / 16 / 1e9)
        assert float(row["speed/product_tflops"]) == pytest.approx(1e-3)
        assert float(row["speed/data_wait"]) == 0.75
        wasted = sum(batch.waveform.numel() * batch.waste for batch in since) / SAMPLE_RATE
        assert float(row["speed/waste"]) == pytest.approx(wasted / seconds)


def test_the_speed_of_a_product_is_measured_and_leaves_the_random_numbers_of_a_run_alone() -> None:
    state = torch.random.get_rng_state()
    assert 1e8 < measured_speed(torch.device("cpu"), torch.float32, size=256) < 1e14
    assert torch.equal(torch.random.get_rng_state(), state)
