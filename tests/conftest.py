"""A tiny corpus made on the spot and a tiny encoder: everything that trains in these tests trains on them."""

from pathlib import Path

import pytest
import soundfile
import torch
from hypothesis import settings
from lhotse import CutSet

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.data.synthesis import synthesise_corpus
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.model.hubert import EncoderConfig

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

TINY = EncoderConfig(
    conv_channels=16,
    dim=32,
    num_layers=2,
    num_heads=2,
    ffn_dim=64,
    pos_kernel=16,
    pos_groups=4,
    dropout=0.0,
    attention_dropout=0.0,
    input_dropout=0.0,
    layer_drop=0.0,
    feature_grad_mult=1.0,
)

ROOT = Path(__file__).parent.parent
RECORDINGS = ROOT.parent / "shared" / "data"

needs_recordings = pytest.mark.skipif(
    not RECORDINGS.is_dir(), reason="the real recordings are not beside this checkout (../shared/data)"
)


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the manifests of about two minutes of synthetic speech: train, finetune, dev and test."""
    corpus = tmp_path_factory.mktemp("corpus")
    synthesise_corpus(
        corpus,
        train_minutes=1.5,
        finetuning_minutes=0.5,
        dev_minutes=0.3,
        test_minutes=0.3,
        train_speakers=3,
        heldout_speakers=1,
    )
    return corpus / "manifests"


@pytest.fixture(scope="session")
def train_cuts(manifests: Path) -> CutSet:
    return read_manifest(manifests / "train.jsonl.gz")


@pytest.fixture(scope="session")
def dev_cuts(manifests: Path) -> CutSet:
    return read_manifest(manifests / "dev.jsonl.gz")


@pytest.fixture
def speech(tmp_path: Path, train_cuts: CutSet) -> list[Path]:
    """Three short recordings: a.wav, b.flac and c.ogg."""
    paths = [tmp_path / name for name in ("a.wav", "b.flac", "c.ogg")]
    for path, cut in zip(paths, train_cuts, strict=False):
        soundfile.write(path, read_waveform(cut).numpy(), SAMPLE_RATE)
    return paths


@pytest.fixture(scope="module")
def run(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training run of one step on MFCC labels, 20 clusters of 3000 frames, with its checkpoint."""
    from test_pretraining import a_model, a_trainer, some_data

    folder = tmp_path_factory.mktemp("run")
    trainer = a_trainer(folder, 1)
    trainer.fit(a_model(), datamodule=some_data(manifests, num_workers=0))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder
