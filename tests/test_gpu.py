"""On a GPU everything comes to what it comes to on a processor; needs one."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from lhotse import CutSet
from torch import Tensor, nn
from torch.testing import assert_close

from hubert_lightning.asr.ctc_model import CTCModel, log_probabilities
from hubert_lightning.cli import main
from hubert_lightning.frames import num_frames
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.devices import choose_device
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.training.batches import PretrainingBatch
from hubert_lightning.training.masking import span_mask
from hubert_lightning.training.pretraining import HubertPretraining
from hubert_lightning.units.kmeans import KMeans
from hubert_lightning.vocabulary import Vocabulary

GPU = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

WITHOUT_DROPOUT = EncoderConfig(
    dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, input_dropout=0.0, layer_drop=0.0
)
LENGTH = torch.tensor([32_000, 21_003, 26_000])


@pytest.fixture(autouse=True)
def _as_the_product_computes() -> Iterator[None]:
    with torch.backends.cudnn.flags(allow_tf32=True):  # torch's default, which rounds to 10 bits
        assert choose_device().type == "cuda"
        yield


def waveforms() -> Tensor:
    waveform = 0.1 * torch.randn(3, 32_000, generator=torch.Generator().manual_seed(0))
    for row, samples in zip(waveform, LENGTH.tolist(), strict=True):
        row[samples:] = 0
    return waveform


def base_with_letters() -> CTCModel:
    torch.manual_seed(0)
    vocabulary = Vocabulary()
    return CTCModel(HubertEncoder(EncoderConfig()), nn.Linear(768, len(vocabulary)), vocabulary).eval()


@pytest.mark.parametrize("ignore_padding", [True, False])
@torch.no_grad()
def test_base_has_the_features_and_the_letters_that_it_has_on_a_processor(ignore_padding: bool) -> None:
    model, waveform = base_with_letters(), waveforms()
    expected = model.encoder.all_layers(waveform, LENGTH, ignore_padding=ignore_padding)
    letters = model(waveform, LENGTH, ignore_padding=ignore_padding)
    model.to(GPU)
    found = model.encoder.all_layers(waveform.to(GPU), LENGTH.to(GPU), ignore_padding=ignore_padding)
    there = model(waveform.to(GPU), LENGTH.to(GPU), ignore_padding=ignore_padding)
    for row, frames in enumerate(num_frames(LENGTH).tolist()):
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours[row, :frames].cpu(), theirs[row, :frames], atol=1e-4, rtol=0)
        assert_close(there[row, :frames].cpu(), letters[row, :frames], atol=1e-4, rtol=0)


@torch.no_grad()
def test_bfloat16_is_near() -> None:
    encoder, waveform = base_with_letters().encoder, waveforms()
    expected = encoder(waveform)
    with torch.autocast("cuda", torch.bfloat16):
        found = encoder.to(GPU)(waveform.to(GPU)).float().cpu()
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_a_step_of_base_has_the_loss_and_the_gradients_that_it_has_on_a_processor() -> None:
    torch.manual_seed(0)
    model, frames = HubertPretraining(WITHOUT_DROPOUT, 500), num_frames(32_000)
    generator = torch.Generator().manual_seed(0)
    mask = span_mask([frames] * 3, 0.8, 10, generator, same_count=True)
    cluster = torch.randint(500, (3, 1, frames), generator=generator)
    batch = PretrainingBatch(waveforms(), cluster, mask, num_masked=int(mask[0].sum()))
    steps = []
    for device in (torch.device("cpu"), GPU):
        model.to(device).zero_grad()
        there = batch._replace(waveform=batch.waveform.to(device), cluster=cluster.to(device), mask=mask.to(device))
        loss, _ = model._step(there, every_frame=False)
        loss.backward()
        gradients = {name: of.grad.cpu() for name, of in model.named_parameters() if of.grad is not None}
        steps.append((loss.detach().cpu(), gradients))
    (expected, theirs), (found, ours) = steps
    assert_close(found, expected, atol=0, rtol=1e-5)
    assert ours.keys() == theirs.keys()
    whole = torch.cat([of.flatten() for of in theirs.values()]).norm()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() < 1e-3 * gradient.norm() + 1e-5 * whole, name


def test_recordings_together_have_the_letters_that_each_has_alone_on_a_processor(dev_cuts: CutSet) -> None:
    model, cuts = base_with_letters(), list(dev_cuts)[:6]
    [expected] = log_probabilities(model, [cuts], progress="processor")
    [found] = log_probabilities(model.to(GPU), [cuts], progress="GPU")
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_kmeans_is_as_good_as_on_a_processor() -> None:
    rows = torch.randn(20_000, 24, generator=torch.Generator().manual_seed(0))
    inertias: list[list[float]] = [[], []]
    for device, found in zip((torch.device("cpu"), GPU), inertias, strict=True):
        KMeans().fit(rows.to(device), 50, 0, report=found.append)
    assert inertias[1][-1] == pytest.approx(inertias[0][-1], rel=0.01)


@pytest.mark.parametrize("options", [[], ["--model.init_args.compile=true"]], ids=["plain", "compiled"])
def test_both_iterations_and_fine_tuning_run(manifests: Path, tmp_path: Path, options: list[str]) -> None:
    mfcc = {"features": "mfcc", "clusters": 20, "max_frames": 2000, "max_steps": 2}
    hidden = mfcc | {"features": "previous", "layer": 2}
    on_gpu = ["--trainer.accelerator=gpu", "--trainer.precision=bf16-mixed", *options]

    def fit(config: str, layer: str, data: str, *more: str) -> None:
        paths = [f"--config={ROOT / 'configs' / config}", f"--config={ROOT / 'tests' / layer}"]
        train = f"--data.init_args.train=[{manifests / data}.jsonl.gz]"
        main(["fit", *paths, train, f"--data.init_args.validation=[{manifests}/dev.jsonl.gz]", *on_gpu, *more])

    iterations = f"--iterations={json.dumps([mfcc, hidden])}"
    fit("demo.yaml", "smoke.yaml", "train", iterations, "--trainer.strategy=ddp", f"--output={tmp_path / 'run'}")
    unused = "--trainer.strategy=ddp_find_unused_parameters_true"  # while the encoder is frozen
    fit("demo-finetune.yaml", "smoke-finetune.yaml", "finetune", unused, f"--output={tmp_path / 'tuned'}")
    for folder in ("run/iteration1", "run/iteration2", "tuned"):
        metrics = json.loads((tmp_path / folder / "metrics.json").read_text())
        assert metrics["steps"] == 2
        assert math.isfinite(metrics["val/loss"])
