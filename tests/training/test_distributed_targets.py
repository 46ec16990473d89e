"""Streams, residuals, intermediate layers and continued trainings on two ranks, with the results of one rank."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import HUBERT, ROOT, on_two, run_verb, two_processes

from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.pretrained.formats.own import read_checkpoint
from hubert_lightning.training.metrics_table import read_metrics
from hubert_lightning.units.kmeans_file import load_kmeans
from hubert_lightning.units.label_store import LabelStore

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STREAMS = (
    "--iterations=[{features: mfcc, clusters: 12, residual: 2, max_frames: 2000, max_steps: 4},"
    "{features: [previous, mfcc], layer: [1, null], clusters: 10, residual: 2, max_frames: 2000, max_steps: 4},"
    "{features: previous, layer: [1, 2], clusters: 12, max_frames: 2000, max_steps: 4}]"
)
CONTINUED = (
    "--iterations=[{features: mfcc, clusters: 12, max_frames: 2000, max_steps: 4},"
    "{features: previous, layer: 1, clusters: 12, max_frames: 2000, weights: continued, max_steps: 7, "
    "relabel_every: 4}]"
)
FSDP = "{class_path: hubert_lightning.LayerwiseFSDP}"
TWO_BATCHES = "--trainer.accumulate_grad_batches=2"


def command(manifests: Path, output: Path, *more: str) -> list[str]:
    return [
        "fit",
        *("--config", str(ROOT / "configs/pretrain/small.yaml")),
        *("--config", str(ROOT / "tests/smoke.yaml")),
        f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
        f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
        "--data.init_args.max_duration=6",
        "--data.init_args.min_duration=0.5",
        "--model.init_args.intermediate_layers=[1]",
        "--model.init_args.encoder.dropout=0.1",
        "--model.init_args.encoder.layer_drop=0.3",
        # Adam divides a gradient that is 0 but for rounding (a key's bias) by itself
        "--model.init_args.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9, fused: false}}",
        f"--output={output}",
        *more,
    ]


def one(manifests: Path, folder: Path, *more: str) -> Path:
    torch.set_num_threads(1)  # as in the two processes: with more, sums are rounded otherwise
    validated = "--trainer.limit_val_batches=2"  # those of two ranks that take one each: FSDP repeats an odd one
    assert run_verb(*command(manifests, folder / "one", TWO_BATCHES, validated, *more)) == 0
    return folder / "one"


def two(manifests: Path, folder: Path, strategy: str, *more: str) -> Path:
    validated = ("--trainer.limit_val_batches=1", "--trainer.val_check_interval=1")
    two_processes(folder, *HUBERT, *command(manifests, folder / "two", *on_two(strategy), *validated, *more))
    return folder / "two"


@pytest.fixture(scope="module")
def streams(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one(manifests, tmp_path_factory.mktemp("streams"), STREAMS)


@pytest.fixture(scope="module")
def continued(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one(manifests, tmp_path_factory.mktemp("continued"), CONTINUED)


def assert_equal_runs(expected: Path, of_two: Path, manifests: Path, iterations: int) -> None:
    """The first labels to the bit; later ones are of weights that differ by the order of their sums."""
    assert len([*of_two.glob("iteration*")]) == iterations
    cuts = [cut.id for name in ("train", "dev") for cut in read_manifest(manifests / f"{name}.jsonl.gz")]
    for number in range(1, iterations + 1):
        own, other = (folder / f"iteration{number}" for folder in (expected, of_two))
        stores = [LabelStore(folder / "labels") for folder in (own, other)]
        assert stores[0].source.clusters == stores[1].source.clusters
        assert len(stores[0]) == len(stores[1])
        equal = np.concatenate([stores[0][cut] == stores[1][cut] for cut in cuts], axis=1).mean(axis=1)
        assert (equal == 1).all() if number == 1 else (equal > 0.999).all(), (number, equal)
        for centroids, others in zip(
            load_kmeans(own / "kmeans.safetensors")[0], load_kmeans(other / "kmeans.safetensors")[0], strict=True
        ):
            torch.testing.assert_close(centroids, others)
        ends = [read_checkpoint(folder / "last.ckpt") for folder in (own, other)]
        assert ends[0]["global_step"] == ends[1]["global_step"]
        for name, value in ends[0]["state_dict"].items():
            torch.testing.assert_close(ends[1]["state_dict"][name], value, msg=name)
        losses = [json.loads((folder / "metrics.json").read_text()) for folder in (own, other)]
        for name in ("val/masked_loss", "val/masked_loss_layer1"):
            assert losses[1][name] == pytest.approx(losses[0][name], rel=1e-4), name


@pytest.mark.parametrize("strategy", ["ddp", FSDP], ids=["ddp", "fsdp"])
def test_streams_residuals_and_intermediate_layers_are_those_of_one_rank(
    streams: Path, manifests: Path, tmp_path: Path, strategy: str
) -> None:
    of_two = two(manifests, tmp_path, strategy, STREAMS)
    clusters = [LabelStore(of_two / f"iteration{number}" / "labels").source.clusters for number in (1, 2, 3)]
    assert clusters == [(12, 12), (10, 10, 10, 10), (12, 12)]
    assert_equal_runs(streams, of_two, manifests, 3)


@pytest.mark.parametrize("strategy", ["ddp", FSDP], ids=["ddp", "fsdp"])
def test_a_continued_training_takes_the_steps_of_one_rank(
    continued: Path, manifests: Path, tmp_path: Path, strategy: str
) -> None:
    of_two = two(manifests, tmp_path, strategy, CONTINUED)
    assert_equal_runs(continued, of_two, manifests, 3)
    rates = [
        [rate for number in (1, 2, 3) for _, rate in read_metrics(run / f"iteration{number}")["train/learning_rate"]]
        for run in (continued, of_two)
    ]
    assert rates[0] == pytest.approx(rates[1])
    assert len(rates[1]) == 11


def test_a_continued_training_of_two_ranks_resumes_to_the_bit(manifests: Path, tmp_path: Path) -> None:
    whole = two(manifests, tmp_path, "ddp", CONTINUED, "--checkpoint.every_n_train_steps=3")
    wanted = read_checkpoint(whole / "iteration3" / "last.ckpt")["state_dict"]
    wanted = {name: value.clone() for name, value in wanted.items()}
    shutil.rmtree(whole / "iteration3")
    second = whole / "iteration2"
    (second / "metrics.json").unlink()
    (second / "previous.ckpt").replace(second / "last.ckpt")
    assert read_checkpoint(second / "last.ckpt")["global_step"] == 6
    two(manifests, tmp_path, "ddp", CONTINUED, "--checkpoint.every_n_train_steps=3")
    resumed = read_checkpoint(whole / "iteration3" / "last.ckpt")["state_dict"]
    for name, value in wanted.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)
