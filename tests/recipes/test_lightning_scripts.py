"""Tasks and data in a plain script of Lightning, as docs/python.md shows them."""

from pathlib import Path

import pytest
import torch
from helpers import TINY, bare_trainer, short_finetuning
from lightning import Trainer
from lightning.pytorch.utilities.model_summary import ModelSummary

from hubert_lightning import CTCFinetuning, HubertPretraining, PretrainingData, Relabel, TranscribedData
from hubert_lightning.cli import main


@pytest.fixture(scope="module")
def words(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning of a few steps from fresh weights."""
    folder = tmp_path_factory.mktemp("words")
    main([*short_finetuning(manifests, folder)])
    return folder


@pytest.mark.slow
def test_a_script_pre_trains_with_labels_that_a_callback_makes(manifests: Path, tmp_path: Path) -> None:
    model = HubertPretraining(TINY, num_clusters=20)
    data = PretrainingData(
        [manifests / "train.jsonl.gz"], validation=[manifests / "dev.jsonl.gz"], max_duration=10, num_workers=0
    )
    labels = Relabel(features="mfcc", clusters=20, max_frames=2000)
    trainer = Trainer(
        max_steps=2, max_epochs=-1, accelerator="cpu", devices=1, logger=False, callbacks=[labels],
        default_root_dir=tmp_path, enable_progress_bar=False, log_every_n_steps=1, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, data)
    assert trainer.global_step == 2
    assert 0 < trainer.callback_metrics["train/loss"] < torch.inf
    trainer.save_checkpoint(tmp_path / "script.ckpt")
    again = HubertPretraining.load_from_checkpoint(tmp_path / "script.ckpt")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
    assert ModelSummary(again).total_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_a_script_transcribes_with_a_checkpoint(words: Path, manifests: Path, tmp_path: Path) -> None:
    checkpoint = words / "last.ckpt"
    model = CTCFinetuning.load_from_checkpoint(checkpoint)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.testing.assert_close(dict(model.state_dict()), saved, rtol=0, atol=0)
    summary = ModelSummary(model)
    assert {"encoder", "head"} <= {name.split(".")[0] for name in summary.layer_names}
    data = TranscribedData(test=[manifests / "test.jsonl.gz"], num_workers=0)
    batches = bare_trainer(tmp_path).predict(model, data)
    assert batches
    assert all(isinstance(text, str) for batch in batches for text in batch)  # type: ignore[union-attr]
    data.setup("predict")
    assert sum(map(len, batches)) == len(data.cuts["test"])
    assert list(tmp_path.rglob("predict.jsonl"))
