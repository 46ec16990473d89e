from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from lhotse import CutSet
from lightning import Trainer
from test_pretraining import a_model, a_trainer, some_data

from hubert_lightning import relabelling
from hubert_lightning.clustering.kmeans import assign, load_kmeans
from hubert_lightning.clustering.mfcc import mfcc
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.datamodule import TranscribedData
from hubert_lightning.data.labels import LabelStore
from hubert_lightning.data.manifest import write_manifest
from hubert_lightning.finetuning import CTCFinetuning
from hubert_lightning.frames import num_frames
from hubert_lightning.model.pretrained import load_encoder
from hubert_lightning.relabelling import Relabel, extractor, phone_quality, sample_frames


@pytest.fixture(scope="module")
def run(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training run of one step on MFCC labels, with its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    trainer = a_trainer(folder, 1)
    trainer.fit(a_model(), datamodule=some_data(manifests, num_workers=0))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder


def test_mfcc_labels_are_the_nearest_centroids_of_every_other_mfcc_frame(run: Path, train_cuts: CutSet) -> None:
    store, (centroids, _) = LabelStore(run / "labels"), load_kmeans(run / "kmeans.safetensors")
    for cut in train_cuts:
        expected = assign(mfcc(read_waveform(cut))[::2], centroids)
        np.testing.assert_array_equal(store[cut.id], expected.numpy())
        assert len(store[cut.id]) == num_frames(cut.num_samples)


def test_validation_is_labelled_by_the_same_kmeans(run: Path, dev_cuts: CutSet) -> None:
    store, (centroids, _) = LabelStore(run / "labels"), load_kmeans(run / "kmeans.safetensors")
    for cut in dev_cuts:
        np.testing.assert_array_equal(store[cut.id], assign(mfcc(read_waveform(cut))[::2], centroids).numpy())


def relabelled(run: Path, manifests: Path, folder: Path, relabel: Relabel, **options: object) -> LabelStore:
    data = some_data(manifests, num_workers=0, **options)
    trainer = Trainer(default_root_dir=folder, max_steps=0, accelerator="cpu", logger=False, callbacks=[relabel])
    trainer.fit(a_model(), datamodule=data)
    assert data.labels is not None
    return data.labels


def test_labels_of_a_hidden_layer_are_the_clusters_of_that_layer(
    run: Path, manifests: Path, tmp_path: Path, dev_cuts: CutSet
) -> None:
    relabel = Relabel(features=str(run / "last.ckpt"), layer=2, clusters=20, max_frames=2000)
    store = relabelled(run, manifests, tmp_path, relabel)
    encoder = load_encoder(run / "last.ckpt")
    centroids, source = load_kmeans(tmp_path / "kmeans.safetensors")
    assert source["features"].startswith("layer 2 of encoder ")
    for cut in dev_cuts:
        with torch.no_grad():
            features = encoder.features(read_waveform(cut)[None], layer=2)[0]
        np.testing.assert_array_equal(store[cut.id], assign(features, centroids).numpy())


def test_labels_that_are_there_are_not_made_again(run: Path, manifests: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.suffix in (".npy", ".safetensors")}
    relabelled(run, manifests, run, Relabel(clusters=20, max_frames=3000))
    assert before
    assert {path: path.stat().st_mtime_ns for path in before} == before


def interrupted(labels: Path, shard: int) -> tuple[LabelStore, dict[Path, int]]:
    """As if the power failed before this shard was closed: what was there, and when the other shards were written."""
    whole = LabelStore(labels)
    (labels / "store.json").unlink()
    (labels / f"{shard:05d}.json").unlink()
    written = {path: path.stat().st_mtime_ns for path in labels.glob("[0-9]*") if int(path.stem) != shard}
    return whole, written


def test_an_interrupted_relabelling_makes_only_what_is_missing_and_ends_with_the_same_labels(
    run: Path, manifests: Path, tmp_path: Path, train_cuts: CutSet, dev_cuts: CutSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relabelling, "SHARD", 5)
    relabel = Relabel(clusters=20, max_frames=3000)
    relabelled(run, manifests, tmp_path, relabel)
    whole, written = interrupted(tmp_path / "labels", shard=1)
    assert len(written) == 2 * (-(-len(whole) // 5) - 1)  # an array and an index for each of the other shards
    lost = tmp_path / "labels" / "00001.npy"
    before = lost.stat().st_mtime_ns
    again = relabelled(run, manifests, tmp_path, relabel)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert lost.stat().st_mtime_ns > before
    assert again.source == whole.source
    np.testing.assert_array_equal(again.histogram, whole.histogram)
    assert len(again) == len(whole) == len(train_cuts) + len(dev_cuts)
    for cut in (*train_cuts, *dev_cuts):
        np.testing.assert_array_equal(again[cut.id], whole[cut.id])


def test_an_interrupted_relabelling_may_go_on_with_the_manifests_in_another_order(
    run: Path, manifests: Path, tmp_path: Path, train_cuts: CutSet, dev_cuts: CutSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relabelling, "SHARD", 5)
    parts = [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"]
    for path, cuts in zip(parts, (list(train_cuts)[:8], list(train_cuts)[8:]), strict=True):
        write_manifest(cuts, path)
    relabel = Relabel(clusters=20, max_frames=3000)
    relabelled(run, manifests, tmp_path, relabel, train=parts)
    whole, written = interrupted(tmp_path / "labels", shard=1)
    again = relabelled(run, manifests, tmp_path, relabel, train=parts[::-1])
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert len(again) == len(whole) == len(train_cuts) + len(dev_cuts)
    for cut in (*train_cuts, *dev_cuts):
        np.testing.assert_array_equal(again[cut.id], whole[cut.id])


def test_other_settings_make_other_labels(run: Path, manifests: Path, tmp_path: Path) -> None:
    first = relabelled(run, manifests, tmp_path, Relabel(clusters=20, max_frames=3000))
    second = relabelled(run, manifests, tmp_path, Relabel(clusters=20, max_frames=3000, seed=1))
    assert first.source.kmeans != second.source.kmeans


def test_labels_under_a_checkpoint_are_not_replaced(run: Path, manifests: Path) -> None:
    before = (run / "kmeans.safetensors").read_bytes()
    with pytest.raises(ValueError, match="its checkpoints were trained on labels of other features"):
        relabelled(run, manifests, run, Relabel(clusters=30, max_frames=3000))
    assert (run / "kmeans.safetensors").read_bytes() == before


def test_the_sample_is_uniform_and_of_the_size_asked_for(train_cuts: CutSet) -> None:
    features, _ = extractor("mfcc", None, torch.device("cpu"))
    total = sum(num_frames(cut.num_samples) for cut in train_cuts)
    sample = sample_frames(features, list(train_cuts), total // 2, seed=0)
    assert abs(len(sample) - total // 2) < 4 * (total / 4) ** 0.5  # four standard deviations of a binomial
    assert len(sample_frames(features, list(train_cuts), 10 * total, seed=0)) == total


def test_phones_as_clusters_know_everything_and_one_cluster_nothing(dev_cuts: CutSet) -> None:
    phones: dict[str, int] = {}
    perfect, nothing = {}, {}
    for cut in dev_cuts:
        spans = cut.supervisions[0].alignment["phone"]
        centres = np.arange(num_frames(cut.num_samples)) * 0.02 + 0.0125
        names = [next((p.symbol for p in spans if p.start <= t < p.end), "") for t in centres]
        perfect[cut.id] = np.array([phones.setdefault(name, len(phones)) for name in names])
        nothing[cut.id] = np.zeros(len(names), dtype=int)
    assert phone_quality(dev_cuts, perfect, 100).pnmi == pytest.approx(1, abs=1e-3)
    assert phone_quality(dev_cuts, nothing, 100).pnmi == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("features", "layer", "sentence"),
    [
        ("mfcc", 6, "MFCCs have no layers"),
        ("nowhere.ckpt", 6, "nowhere.ckpt: no such checkpoint"),
        ("nowhere.ckpt", None, "a checkpoint needs one"),
    ],
)
def test_features_that_cannot_be_are_refused(features: str, layer: int | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Relabel(features=features, layer=layer)


def test_relabel_is_refused_in_a_fine_tuning_run(manifests: Path, tmp_path: Path) -> None:
    trainer = Trainer(default_root_dir=tmp_path, max_steps=1, accelerator="cpu", logger=False, callbacks=[Relabel()])
    data = TranscribedData(train=[manifests / "finetune.jsonl.gz"])
    with pytest.raises(ValueError, match="Relabel makes labels for PretrainingData"):
        trainer.fit(CTCFinetuning(encoder=TINY), datamodule=data)
