"""A tiny corpus made on the spot and a tiny encoder: everything that trains in these tests trains on them."""

from pathlib import Path

import pytest
import soundfile
import torch
from helpers import NUM_FRAMES, SMALL, Encoder
from hypothesis import settings
from lhotse import CutSet

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.demo.synthesis import synthesise_corpus
from hubert_lightning.frames import SAMPLE_RATE, num_samples

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count campaigns among the slow tests."""
    for item in items:
        if item.get_closest_marker("campaign"):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Compute with two threads, also in the fixtures of a module: other numbers of threads round sums otherwise."""
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
    from helpers import logging_trainer, pretraining_data, pretraining_model

    folder = tmp_path_factory.mktemp("run")
    trainer = logging_trainer(folder, 1)
    trainer.fit(pretraining_model(), datamodule=pretraining_data(manifests, num_workers=0))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    import transformers

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    soundfile.write(folder / "said.wav", 0.1 * torch.randn(num_samples(NUM_FRAMES)).numpy(), SAMPLE_RATE)
    waveform = torch.from_numpy(soundfile.read(folder / "said.wav", dtype="float32")[0])
    model = transformers.HubertForCTC(transformers.HubertConfig(**SMALL, vocab_size=2)).eval()
    torch.nn.init.normal_(model.hubert.feature_projection.projection.weight)  # so that frames differ
    with torch.no_grad():
        frames = model.hubert(waveform[None]).last_hidden_state[0]
    state = {name: value for name, value in model.state_dict().items() if name.startswith("hubert.")}
    inputs = torch.cat([frames.double(), torch.ones(NUM_FRAMES, 1, dtype=torch.float64)], dim=1)
    return Encoder(state, folder / "said.wav", frames, torch.linalg.pinv(inputs))


@pytest.fixture(scope="session")
def digit_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of n-grams of digits: digits.arpa with digits.lexicon, and letters.arpa."""
    from foreign_models import save_digit_models

    folder = tmp_path_factory.mktemp("digits")
    save_digit_models(folder)
    return folder


@pytest.fixture(scope="session")
def causal_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small causal language model of digits."""
    from foreign_models import save_causal_lm

    folder = tmp_path_factory.mktemp("gpt")
    save_causal_lm(folder)
    return folder
