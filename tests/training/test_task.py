"""What both training tasks share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, bare_trainer, pretraining_batch, pretraining_model
from torch.utils.data import DataLoader

from hubert_lightning.training.batches import TranscribedBatch
from hubert_lightning.training.finetuning import CTCFinetuning
from hubert_lightning.training.task import Task


def transcribed_batch() -> TranscribedBatch:
    return TranscribedBatch(
        waveform=torch.randn(2, 8000),
        length=torch.tensor([8000, 7000]),
        token=torch.randint(4, 9, (2, 3)),
        num_frames=(24, 21),
        num_tokens=(3, 2),
        mask=None,
        channel_mask=None,
        text=("ABC", "AB"),
        id=("a", "b"),
        speaker=("", ""),
    )


@pytest.mark.slow
@pytest.mark.parametrize("pretrains", [True, False])
def test_a_task_logs_only_in_steps_that_the_trainer_writes(
    pretrains: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Task = pretraining_model() if pretrains else CTCFinetuning(encoder=TINY, freeze_steps=0)
    batch = pretraining_batch() if pretrains else transcribed_batch()
    logged: dict[str, list[int]] = {}

    def log(name: str, value: Any, **options: Any) -> None:
        logged.setdefault(name, []).append(model.global_step + 1)

    monkeypatch.setattr(model, "log", log)
    monkeypatch.setattr(model, "log_dict", lambda metrics, **options: [log(name, None) for name in metrics])
    loader = DataLoader([batch] * 6, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type, var-annotated]
    bare_trainer(tmp_path, max_steps=6, log_every_n_steps=3).fit(model, loader)
    assert {"train/loss", "train/gradient_norm", "train/learning_rate", "train/skipped_steps"} <= logged.keys()
    assert set(map(tuple, logged.values())) == {(3, 6)}
