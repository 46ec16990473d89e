"""Two processes on the CPU share the work, with the results of one process."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from helpers import HUBERT, ROOT, on_two, two_processes
from lhotse import CutSet
from lhotse.cut import Cut
from teacher_models import random_teacher

from hubert_lightning.cli import main
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import read_manifest, transcript, write_manifest
from hubert_lightning.features.extractors import layer_extractor, mfcc_extractor
from hubert_lightning.frames import SAMPLE_RATE, num_frames, seconds_to_samples
from hubert_lightning.pretrained.load import encoder_fingerprint, load_encoder
from hubert_lightning.training.sampler import PlannedBatches
from hubert_lightning.training.watched import read_units
from hubert_lightning.units.kmeans import assign
from hubert_lightning.units.kmeans_file import load_kmeans
from hubert_lightning.units.label_recipe import assign_clusters
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.vocabulary import Vocabulary

pytestmark = pytest.mark.distributed

SHARD = 4
# `hubert`, with shards so small that a corpus of two minutes has several, and a note of who wrote each
SMALL_SHARDS = f"""
import os

from hubert_lightning.units import label_writer
from hubert_lightning.cli import main

write_shard = label_writer.write_shard


def write_and_note(folder, shard, clusters):
    write_shard(folder, shard, clusters)
    (folder / f"{{shard:05d}}.rank").write_text(os.environ["LOCAL_RANK"])


label_writer.shard_size, label_writer.write_shard = lambda cuts: {SHARD}, write_and_note
main()
"""


FUSED = "--model.init_args.optimizer={class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3, fused: true}}"


@pytest.fixture(scope="module")
def pretraining(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations by one command."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "small_shards.py").write_text(SMALL_SHARDS)
    two_processes(
        folder,
        str(folder / "small_shards.py"),
        "fit",
        *("--config", str(ROOT / "configs/pretrain/small.yaml")),
        *("--config", str(ROOT / "tests/smoke.yaml")),
        f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
        f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
        "--iterations=[{features: mfcc, clusters: 20, max_frames: 2000, max_steps: 2},"
        "{features: previous, layer: 1, clusters: 10, max_frames: 2000, max_steps: 2}]",
        *on_two("ddp"),
        "--trainer.accumulate_grad_batches=2",
        f"--output={folder / 'pretraining'}",
    )
    return folder / "pretraining"


@pytest.fixture(scope="module")
def tested(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of an odd number of cuts, of which one process has a batch more than the other."""
    cuts = list(read_manifest([manifests / name for name in ("test.jsonl.gz", "dev.jsonl.gz", "finetune.jsonl.gz")]))
    path = tmp_path_factory.mktemp("tested") / "tested.jsonl.gz"
    write_manifest(cuts[: len(cuts) - 1 + len(cuts) % 2], path)
    return path


@pytest.fixture(scope="module")
def finetuning(pretraining: Path, manifests: Path, tested: Path) -> Path:
    """Fine-tuned and tested, each by one command."""
    output = pretraining.parent / "finetuning"
    two_processes(
        pretraining.parent,
        *HUBERT,
        "fit",
        *("--config", str(ROOT / "configs/finetune/small.yaml")),
        *("--config", str(ROOT / "tests/smoke-finetune.yaml")),
        f"--model.init_args.pretrained={pretraining / 'iteration2' / 'last.ckpt'}",
        f"--data.init_args.train=[{manifests / 'finetune.jsonl.gz'}]",
        f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
        f"--data.init_args.test=[{tested}]",
        *on_two("ddp_find_unused_parameters_true"),
        f"--output={output}",
    )
    one_cut_a_batch = "--data.init_args.max_duration=1"
    two_processes(pretraining.parent, *HUBERT, "test", "--config", str(output / "config.yaml"), one_cut_a_batch)
    return output


def train(pretraining: Path, manifests: Path, name: str, *more: str) -> dict[str, torch.Tensor]:
    """Weights after some steps on the labels of the first iteration, with dropout and layer drop."""
    output = pretraining.parent / name
    two_processes(
        pretraining.parent,
        *HUBERT,
        "fit",
        *("--config", str(ROOT / "configs/pretrain/small.yaml")),
        *("--config", str(ROOT / "tests/smoke.yaml")),
        f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
        f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
        f"--data.init_args.labels={pretraining / 'iteration1' / 'labels'}",
        "--data.init_args.max_duration=6",
        "--data.init_args.min_duration=0.5",
        "--iterations=[]",
        "--model.init_args.num_clusters=20",
        "--model.init_args.encoder.dropout=0.1",
        "--model.init_args.encoder.attention_dropout=0.1",
        "--model.init_args.encoder.layer_drop=0.3",
        # Adam divides a gradient that is 0 but for rounding (a key's bias) by itself
        "--model.init_args.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.1, fused: false}}",
        "--trainer.max_steps=20",
        f"--output={output}",
        *more,
    )
    return torch.load(output / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def accumulated(pretraining: Path, manifests: Path) -> dict[str, torch.Tensor]:
    seventh = "{class_path: ModelCheckpoint, init_args: {filename: seventh, every_n_train_steps: 7, save_top_k: -1}}"
    more = f"--trainer.callbacks=[{seventh}]"
    return train(pretraining, manifests, "accumulated", "--trainer.accumulate_grad_batches=2", more)


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one_that_accumulates_two_batches(
    pretraining: Path, manifests: Path, accumulated: dict[str, torch.Tensor]
) -> None:
    dealt = train(pretraining, manifests, "dealt", *on_two("ddp"))
    for name, value in accumulated.items():
        torch.testing.assert_close(dealt[name], value, msg=name)  # sums in another order, over 20 steps


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_ranks(
    pretraining: Path, manifests: Path, accumulated: dict[str, torch.Tensor]
) -> None:
    seventh = pretraining.parent / "accumulated" / "seventh.ckpt"
    assert torch.load(seventh, weights_only=True)["ranks"] == 1
    regrouped = train(pretraining, manifests, "regrouped", *on_two("ddp"), f"--ckpt_path={seventh}")
    for name, value in accumulated.items():
        torch.testing.assert_close(regrouped[name], value, msg=name)


@pytest.mark.slow
def test_sharding_the_model_changes_no_weight(
    pretraining: Path, manifests: Path, dev_cuts: CutSet, accumulated: dict[str, torch.Tensor]
) -> None:
    frames = [num_frames(cut.num_samples) for cut in dev_cuts]
    assert len(PlannedBatches(frames, num_frames(seconds_to_samples(6)), shuffle=False)) % 2  # to validate on
    more = ["--trainer.gradient_clip_val=0.5", "--trainer.limit_val_batches=1.0"]
    sharded = train(pretraining, manifests, "sharded", *on_two("{class_path: hubert_lightning.LayerwiseFSDP}"), *more)
    for name, value in accumulated.items():
        torch.testing.assert_close(sharded[name], value, msg=name)
    shown, expected = (read_units(pretraining.parent / name) for name in ("sharded", "accumulated"))
    assert shown is not None
    assert shown == expected  # all ranks predict together, rank 0 writes


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "{class_path: hubert_lightning.LayerwiseFSDP}"])
def test_both_ranks_find_the_same_largest_batch(pretraining: Path, manifests: Path, strategy: str) -> None:
    name = f"auto-{len(strategy)}"
    few = ["--data.init_args.max_duration=auto", "--trainer.max_steps=2", FUSED]
    weights = train(pretraining, manifests, name, *on_two(strategy), *few)
    assert all(value.isfinite().all() for value in weights.values())
    checkpoint = torch.load(pretraining.parent / name / "last.ckpt", weights_only=True)
    record = json.loads((pretraining.parent / name / "record.json").read_text())
    kept = checkpoint["PretrainingData"]["max_duration"]
    assert 6 < kept == record["batch/seconds"] <= 87.5  # on a CPU, no more than the recipe


@pytest.mark.slow
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_both(
    pretraining: Path, manifests: Path, train_cuts: CutSet, tmp_path: Path
) -> None:
    cuts = copy.deepcopy(list(train_cuts))
    broken = max(cuts, key=lambda cut: cut.num_samples)
    soundfile.write(tmp_path / "nan.wav", np.full(broken.num_samples, np.nan), SAMPLE_RATE, subtype="FLOAT")
    [source] = broken.recording.sources
    broken.recording.sources = [replace(source, source=str(tmp_path / "nan.wav"))]
    broken.custom = None  # how many bytes its file has
    write_manifest(cuts, tmp_path / "train.jsonl.gz")
    manifest = f"--data.init_args.train=[{tmp_path / 'train.jsonl.gz'}]"
    weights = train(pretraining, manifests, "broken", *on_two("ddp"), manifest)
    assert all(value.isfinite().all() for value in weights.values())
    skipped = json.loads((pretraining.parent / "broken" / "metrics.json").read_text())["train/skipped_steps"]
    assert 1 <= skipped < 20
    with pytest.raises(
        AssertionError, match=rf"skipped 1 steps in a row because the loss was not finite \(last on rank .*{broken.id}"
    ) as ended:
        train(pretraining, manifests, "refused", *on_two("ddp"), manifest, "--model.init_args.max_skipped=1")
    assert "Traceback" not in str(ended.value)


def labelled(train_cuts: CutSet, dev_cuts: CutSet) -> list[Cut]:
    return [*train_cuts, *dev_cuts]


def test_both_iterations_take_their_steps(pretraining: Path) -> None:
    for folder in (pretraining / "iteration1", pretraining / "iteration2"):
        assert json.loads((folder / "metrics.json").read_text())["steps"] == 2
        checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 2
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
        assert progress == 4  # batches on this rank: two for each step


@pytest.mark.parametrize("iteration", [1, 2])
def test_a_store_has_every_cut_and_a_label_for_every_frame(
    pretraining: Path, train_cuts: CutSet, dev_cuts: CutSet, iteration: int
) -> None:
    store = LabelStore(pretraining / f"iteration{iteration}" / "labels")
    cuts = labelled(train_cuts, dev_cuts)
    assert len(store) == len(cuts)
    assert {cut.id: store[cut.id].shape[1] for cut in cuts} == {cut.id: num_frames(cut.num_samples) for cut in cuts}
    assert store.histogram[0].sum() == sum(num_frames(cut.num_samples) for cut in cuts)


@pytest.mark.parametrize("iteration", [1, 2])
def test_the_ranks_take_turns_at_the_shards(
    pretraining: Path, train_cuts: CutSet, dev_cuts: CutSet, iteration: int
) -> None:
    writers = sorted((pretraining / f"iteration{iteration}" / "labels").glob("*.rank"))
    shards = -(-len(labelled(train_cuts, dev_cuts)) // SHARD)
    assert shards > 2
    assert [(path.stem, path.read_text()) for path in writers] == [(f"{i:05d}", str(i % 2)) for i in range(shards)]


@pytest.mark.parametrize("iteration", [1, 2])
def test_the_labels_are_those_that_one_process_makes(
    pretraining: Path, train_cuts: CutSet, dev_cuts: CutSet, iteration: int
) -> None:
    torch.set_num_threads(1)  # as there: with more, sums are rounded otherwise
    folder = pretraining / f"iteration{iteration}"
    store, ([centroids], _) = LabelStore(folder / "labels"), load_kmeans(folder / "kmeans.safetensors")
    extractor = mfcc_extractor()
    if iteration == 2:
        extractor = layer_extractor(pretraining / "iteration1" / "last.ckpt", 1, torch.device("cpu"))
    cuts = sorted(labelled(train_cuts, dev_cuts), key=lambda cut: cut.id)
    shards = [cuts[start : start + SHARD] for start in range(0, len(cuts), SHARD)]
    max_frames = num_frames(seconds_to_samples(10))
    for labels in assign_clusters(extractor, [(slice(None), centroids)], shards, max_frames):
        for cut_id, expected in labels.items():
            np.testing.assert_array_equal(store[cut_id], expected)


@pytest.mark.slow
def test_an_error_on_one_rank_ends_both_with_its_sentence(manifests: Path, train_cuts: CutSet, tmp_path: Path) -> None:
    cuts = sorted(copy.deepcopy(list(train_cuts)), key=lambda cut: cut.id)
    [source] = cuts[SHARD].recording.sources  # of the second shard, which the second process labels
    damaged = tmp_path / Path(source.source).name
    content = Path(source.source).read_bytes()
    damaged.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    cuts[SHARD].recording.sources = [replace(source, source=str(damaged))]
    write_manifest(cuts, tmp_path / "train.jsonl.gz")
    (tmp_path / "small_shards.py").write_text(SMALL_SHARDS)
    with pytest.raises(AssertionError, match=rf"hubert: {cuts[SHARD].id}: .*(cannot be read|ends at)") as ended:
        two_processes(
            tmp_path,
            str(tmp_path / "small_shards.py"),
            "fit",
            *("--config", str(ROOT / "configs/pretrain/small.yaml")),
            *("--config", str(ROOT / "tests/smoke.yaml")),
            f"--data.init_args.train=[{tmp_path / 'train.jsonl.gz'}]",
            "--data.init_args.validation=null",
            "--data.init_args.num_workers=1",
            "--iterations=[{features: mfcc, clusters: 20, max_frames: 100, max_steps: 2}]",
            *on_two("ddp"),
            f"--output={tmp_path / 'run'}",
        )
    assert "Traceback" not in str(ended.value)


def test_fine_tuning_takes_its_steps(finetuning: Path) -> None:
    assert json.loads((finetuning / "metrics.json").read_text())["steps"] == 2
    [kept] = finetuning.glob("best-*.ckpt")
    assert kept.samefile(finetuning / "best.ckpt")
    mean, best = (torch.load(finetuning / f"{name}.ckpt", weights_only=True) for name in ("average", "best"))
    torch.testing.assert_close(mean["state_dict"], best["state_dict"], rtol=0, atol=0)


def test_a_test_writes_and_counts_every_cut_once(finetuning: Path, tested: Path) -> None:
    rows = [json.loads(line) for line in (finetuning / "test.jsonl").read_text().splitlines()]
    cuts = read_manifest(tested)
    assert len(cuts) % 2  # so one process has a batch more than the other
    assert sorted(row["id"] for row in rows) == sorted(cut.id for cut in cuts)
    assert {row["id"]: row["reference"] for row in rows} == {cut.id: transcript(cut, Vocabulary()) for cut in cuts}
    measured = json.loads((finetuning / "test-metrics.json").read_text())
    references, hypotheses = [row["reference"] for row in rows], [row["hypothesis"] for row in rows]
    assert measured["test/wer"] == pytest.approx(jiwer.wer(references, hypotheses))
    assert measured["test/cer"] == pytest.approx(jiwer.cer(references, hypotheses))


@pytest.mark.slow
def test_labels_of_another_encoder_are_the_same_on_one_rank_and_on_two(manifests: Path, tmp_path: Path) -> None:
    random_teacher("UniSpeech-SAT", tmp_path / "model")
    command = [
        "fit",
        *("--config", str(ROOT / "configs/pretrain/small.yaml")),
        *("--config", str(ROOT / "tests/smoke.yaml")),
        f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
        f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
        f"--iterations=[{{features: {tmp_path / 'model'}, layer: 2, clusters: 20, max_frames: 2000, max_steps: 2}}]",
    ]
    main([*command, f"--output={tmp_path / 'one'}"])
    two_processes(tmp_path, *HUBERT, *command, *on_two("ddp"), f"--output={tmp_path / 'two'}")
    one, two = (LabelStore(tmp_path / name / "iteration1" / "labels") for name in ("one", "two"))
    encoder = load_encoder(tmp_path / "model")
    assert one.source.features == two.source.features == f"layer 2 of encoder {encoder_fingerprint(encoder)}"
    [centroids], _ = load_kmeans(tmp_path / "one" / "iteration1" / "kmeans.safetensors")
    for cut in read_manifest([manifests / "dev.jsonl.gz"]):
        with torch.no_grad():
            features = encoder.features(read_waveform(cut)[None], layer=2)[0]
        np.testing.assert_array_equal(one[cut.id][0], assign(features, centroids).numpy())
        np.testing.assert_array_equal(two[cut.id], one[cut.id])
    for name in ("one", "two"):
        assert torch.load(tmp_path / name / "iteration1" / "last.ckpt", weights_only=True)["global_step"] == 2
