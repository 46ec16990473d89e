import copy
import json
import shutil
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, pretraining_data, pretraining_model
from lhotse import CutSet, SupervisionSegment
from lightning import Trainer
from sklearn.cluster import MiniBatchKMeans

from hubert_lightning.cli import main
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import read_manifest, write_manifest
from hubert_lightning.features.mfcc import mfcc, spliced
from hubert_lightning.frames import num_frames
from hubert_lightning.pretrained.formats.own import read_checkpoint
from hubert_lightning.pretrained.load import load_encoder
from hubert_lightning.training.finetuning import CTCFinetuning
from hubert_lightning.training.finetuning_data import TranscribedData
from hubert_lightning.training.relabelling import Relabel
from hubert_lightning.units import label_writer
from hubert_lightning.units.kmeans import assign
from hubert_lightning.units.kmeans_file import kmeans_fingerprint, load_kmeans, save_kmeans
from hubert_lightning.units.label_store import LabelStore


def test_mfcc_labels_are_the_nearest_centroids_of_every_other_mfcc_frame(run: Path, train_cuts: CutSet) -> None:
    store, ([centroids], _) = LabelStore(run / "labels"), load_kmeans(run / "kmeans.safetensors")
    for cut in train_cuts:
        expected = assign(mfcc(read_waveform(cut))[::2], centroids)
        np.testing.assert_array_equal(store[cut.id], expected.numpy()[None])
        assert store[cut.id].shape == (1, num_frames(cut.num_samples))


def test_validation_is_labelled_by_the_same_kmeans(run: Path, dev_cuts: CutSet) -> None:
    store, ([centroids], _) = LabelStore(run / "labels"), load_kmeans(run / "kmeans.safetensors")
    for cut in dev_cuts:
        np.testing.assert_array_equal(store[cut.id][0], assign(mfcc(read_waveform(cut))[::2], centroids).numpy())


def relabelled(
    run: Path, manifests: Path, folder: Path, relabel: Relabel, clusters: int | list[int] = 20, **options: object
) -> LabelStore:
    data = pretraining_data(manifests, num_workers=0, **options)
    trainer = Trainer(default_root_dir=folder, max_steps=0, accelerator="cpu", logger=False, callbacks=[relabel])
    trainer.fit(pretraining_model(num_clusters=clusters), datamodule=data)
    assert data.labels is not None
    return data.labels


@pytest.mark.slow
def test_labels_of_a_hidden_layer_are_the_clusters_of_that_layer(
    run: Path, manifests: Path, tmp_path: Path, dev_cuts: CutSet
) -> None:
    relabel = Relabel(features=str(run / "last.ckpt"), layer=2, clusters=20, max_frames=2000)
    store = relabelled(run, manifests, tmp_path, relabel)
    encoder = load_encoder(run / "last.ckpt")
    [centroids], source = load_kmeans(tmp_path / "kmeans.safetensors")
    assert source["features"].startswith("layer 2 of encoder ")
    for cut in dev_cuts:
        with torch.no_grad():
            features = encoder.features(read_waveform(cut)[None], layer=2)[0]
        np.testing.assert_array_equal(store[cut.id][0], assign(features, centroids).numpy())


def test_labels_that_are_there_are_not_made_again(run: Path, manifests: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.suffix in (".npy", ".safetensors")}
    relabelled(run, manifests, run, Relabel(clusters=20, max_frames=3000))
    assert before
    assert {path: path.stat().st_mtime_ns for path in before} == before


def interrupted(labels: Path, shard: int) -> tuple[LabelStore, dict[Path, int]]:
    """As if the power failed before this shard was closed: what was there, and when the other shards were written."""
    whole = LabelStore(labels)
    (labels / "store.json").unlink()
    (labels / f"{shard:05d}.index.npy").unlink()
    written = {path: path.stat().st_mtime_ns for path in labels.glob("[0-9]*") if int(path.name[:5]) != shard}
    return whole, written


def test_an_interrupted_relabelling_makes_only_what_is_missing_and_ends_with_the_same_labels(
    run: Path, manifests: Path, tmp_path: Path, train_cuts: CutSet, dev_cuts: CutSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_writer, "shard_size", lambda count: 5)
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
    np.testing.assert_array_equal(again.histogram[0], whole.histogram[0])
    assert len(again) == len(whole) == len(train_cuts) + len(dev_cuts)
    for cut in (*train_cuts, *dev_cuts):
        np.testing.assert_array_equal(again[cut.id], whole[cut.id])


def test_an_interrupted_relabelling_may_go_on_with_the_manifests_in_another_order(
    run: Path, manifests: Path, tmp_path: Path, train_cuts: CutSet, dev_cuts: CutSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_writer, "shard_size", lambda count: 5)
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


@pytest.mark.slow
def test_other_settings_make_other_labels(run: Path, manifests: Path, tmp_path: Path) -> None:
    first = relabelled(run, manifests, tmp_path, Relabel(clusters=20, max_frames=3000))
    second = relabelled(run, manifests, tmp_path, Relabel(clusters=20, max_frames=3000, seed=1))
    assert first.source.kmeans != second.source.kmeans


def test_labels_under_a_checkpoint_are_not_replaced(run: Path, manifests: Path) -> None:
    before = (run / "kmeans.safetensors").read_bytes()
    with pytest.raises(ValueError, match="its checkpoints were trained on labels of other features"):
        relabelled(run, manifests, run, Relabel(clusters=30, max_frames=3000))
    assert (run / "kmeans.safetensors").read_bytes() == before


@pytest.mark.slow
def test_an_ensemble_and_a_product_code_are_streams_of_their_own(
    manifests: Path, tmp_path: Path, dev_cuts: CutSet
) -> None:
    relabel = Relabel(clusters=[5, 9], parts=["delta", "cepstra"], max_frames=2000)
    data = pretraining_data(manifests, num_workers=0)
    trainer = Trainer(default_root_dir=tmp_path, max_steps=1, accelerator="cpu", logger=False, callbacks=[relabel])
    trainer.fit(pretraining_model(num_clusters=[5, 9, 5, 9]), datamodule=data)
    store, (centroids, _) = data.labels, load_kmeans(tmp_path / "kmeans.safetensors")
    assert store is not None
    assert store.source.clusters == (5, 9, 5, 9)
    columns = [slice(39, 78)] * 2 + [slice(0, 39)] * 2
    assert [of.shape[1] for of in centroids] == [39] * 4
    for cut in dev_cuts:
        features = spliced(mfcc(read_waveform(cut)))[::2]
        expected = [assign(features[:, part], of).numpy() for part, of in zip(columns, centroids, strict=True)]
        np.testing.assert_array_equal(store[cut.id], np.stack(expected))


def test_the_best_layer_is_that_of_the_highest_pnmi_and_is_remembered(
    run: Path, manifests: Path, tmp_path: Path
) -> None:
    relabel = Relabel(features=str(run / "last.ckpt"), layer="best", clusters=20, max_frames=2000)
    relabelled(run, manifests, tmp_path, relabel)
    kept = json.loads((tmp_path / "layers.json").read_text())
    assert max((1, 2), key=lambda layer: kept[f"layer {layer}"]["pnmi"]) == kept["best_layer"]
    _, source = load_kmeans(tmp_path / "kmeans.safetensors")
    assert source["features"].startswith(f"layer {kept['best_layer']} of encoder ")
    before = (tmp_path / "layers.json").stat().st_mtime_ns
    relabelled(run, manifests, tmp_path, relabel)
    assert (tmp_path / "layers.json").stat().st_mtime_ns == before


def test_a_best_layer_needs_phones(run: Path, manifests: Path, tmp_path: Path, dev_cuts: CutSet) -> None:
    write_manifest([cut.drop_alignments() for cut in dev_cuts], tmp_path / "dev.jsonl.gz")
    relabel = Relabel(features=str(run / "last.ckpt"), layer="best", clusters=20, max_frames=2000)
    with pytest.raises(ValueError, match="layer: best compares clusters with phones, but no utterance"):
        relabelled(run, manifests, tmp_path, relabel, validation=[tmp_path / "dev.jsonl.gz"])


def test_a_damaged_shard_alone_is_made_again(
    run: Path, manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(label_writer, "shard_size", lambda count: 5)
    relabel = Relabel(clusters=20, max_frames=3000)
    relabelled(run, manifests, tmp_path, relabel)
    before = {path: path.read_bytes() for path in (tmp_path / "labels").iterdir()}
    damaged = tmp_path / "labels" / "00001.npy"
    damaged.write_bytes(before[damaged][:-1] + bytes([before[damaged][-1] ^ 1]))
    kept = {path: path.stat().st_mtime_ns for path in before if path.name.startswith("00002")}
    relabelled(run, manifests, tmp_path, relabel)
    assert "00001" in caplog.text
    assert {path: path.read_bytes() for path in (tmp_path / "labels").iterdir()} == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize(
    ("features", "layer", "sentence"),
    [
        ("mfcc", 6, "MFCCs have no layers"),
        ("nowhere.ckpt", 6, "nowhere.ckpt does not exist; give a .ckpt"),
        ("nowhere.ckpt", None, "a model needs one"),
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


def test_a_damaged_index_is_made_again(
    run: Path, manifests: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    relabel = Relabel(clusters=20, max_frames=3000)
    relabelled(run, manifests, tmp_path, relabel)
    index = tmp_path / "labels" / "index.npy"
    before = index.read_bytes()
    index.write_bytes(before[:-60] + bytes([before[-60] ^ 1]) + before[-59:])
    relabelled(run, manifests, tmp_path, relabel)
    assert "its index is written again" in caplog.text
    assert index.read_bytes() == before


def test_labels_that_were_damaged_are_not_trained_on(run: Path, manifests: Path, tmp_path: Path) -> None:
    relabelled(run, manifests, tmp_path, Relabel(clusters=20, max_frames=3000))
    shard = tmp_path / "labels" / "00000.npy"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\xff\xff")
    data = pretraining_data(manifests, num_workers=0, labels=tmp_path / "labels")
    trainer = Trainer(default_root_dir=tmp_path, max_steps=1, accelerator="cpu", logger=False)
    with pytest.raises(ValueError, match=r"00000\.npy: corrupt"):
        trainer.fit(pretraining_model(num_clusters=20), datamodule=data)


def test_phones_past_the_audio_are_refused_before_labels_are_made(
    run: Path, manifests: Path, tmp_path: Path, dev_cuts: CutSet
) -> None:
    def stretched(segment: SupervisionSegment) -> SupervisionSegment:
        phones = (segment.alignment or {})["phone"]
        return segment.with_alignment("phone", [phone._replace(start=phone.start * 2) for phone in phones])

    cuts = copy.deepcopy(list(dev_cuts))  # lhotse changes an alignment in place
    write_manifest([cut.map_supervisions(stretched) for cut in cuts], tmp_path / "dev.jsonl.gz")
    with pytest.raises(ValueError, match="phones end at"):
        relabelled(
            run, manifests, tmp_path, Relabel(clusters=20, max_frames=2000), validation=[tmp_path / "dev.jsonl.gz"]
        )
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize("clusters", [[], 1, [50, 70_000]])
def test_numbers_of_clusters_that_cannot_be_are_refused(clusters: int | list[int]) -> None:
    with pytest.raises(ValueError, match="each K-means has from 2 to 65536"):
        Relabel(clusters=clusters)


def a_quantizer(folder: Path, clusters: int, dim: int) -> Path:
    rows = np.random.default_rng(0).standard_normal((500, dim)).astype(np.float32)
    joblib.dump(MiniBatchKMeans(clusters, n_init=1, random_state=0).fit(rows), folder / "released.bin")
    return folder / "released.bin"


def test_labels_of_a_quantizer_are_those_that_scikit_learn_predicts(
    run: Path, manifests: Path, tmp_path: Path, dev_cuts: CutSet
) -> None:
    path = a_quantizer(tmp_path, 20, 32)
    relabel = Relabel(features=str(run / "last.ckpt"), layer=2, clusters=20, quantizer=path)
    store = relabelled(run, manifests, tmp_path / "run", relabel)
    encoder, theirs = load_encoder(run / "last.ckpt"), joblib.load(path)
    for cut in dev_cuts:
        with torch.no_grad():
            features = encoder.features(read_waveform(cut)[None], layer=2)[0].numpy()
        nearest = np.sort(theirs.transform(features), axis=1)
        clear = nearest[:, 1] - nearest[:, 0] > 1e-4  # of two that are as near, either may be chosen
        assert clear.mean() > 0.95
        np.testing.assert_array_equal(store[cut.id][0][clear], theirs.predict(features)[clear])


def test_labels_of_a_quantizer_that_are_there_are_not_made_again(run: Path, manifests: Path, tmp_path: Path) -> None:
    options = {"features": str(run / "last.ckpt"), "layer": 2, "clusters": 20}
    relabelled(run, manifests, tmp_path / "run", Relabel(**options, quantizer=a_quantizer(tmp_path, 20, 32)))
    folder = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".npy", ".safetensors")}
    same = tmp_path / "the same.safetensors"  # what the run kept, under another name and in another format
    shutil.copy(folder / "kmeans.safetensors", same)
    relabelled(run, manifests, folder, Relabel(**options, quantizer=same))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    fitted = relabelled(run, manifests, folder, Relabel(**options, max_frames=2000))
    assert fitted.source.kmeans != kmeans_fingerprint(load_kmeans(same)[0])


def test_a_quantizer_of_other_features_is_refused(run: Path, manifests: Path, tmp_path: Path) -> None:
    checkpoint = str(run / "last.ckpt")
    with pytest.raises(ValueError, match="centroids of 32 dimensions, where mfcc has 39"):
        relabelled(run, manifests, tmp_path / "a", Relabel(clusters=20, quantizer=a_quantizer(tmp_path, 20, 32)))
    with pytest.raises(ValueError, match="fitted on mfcc, but the features are layer 2 of encoder"):
        relabelled(
            run,
            manifests,
            tmp_path / "b",
            Relabel(checkpoint, layer=2, clusters=20, quantizer=run / "kmeans.safetensors"),
        )
    assert not any((tmp_path / folder / "kmeans.safetensors").exists() for folder in "ab")
    with pytest.raises(ValueError, match=r"a K-means with \[20\] clusters, but \[30\] are requested"):
        Relabel(clusters=30, quantizer=run / "kmeans.safetensors")
    with pytest.raises(ValueError, match="was fitted on one layer, but layer is 'best'"):
        Relabel(checkpoint, layer="best", clusters=20, quantizer=run / "kmeans.safetensors")


@pytest.mark.slow
def test_a_quantizer_of_a_product_code_has_the_dimensions_of_its_parts(
    run: Path, manifests: Path, tmp_path: Path
) -> None:
    relabel = {"clusters": 5, "parts": ["cepstra", "delta"], "max_frames": 2000}
    fitted = relabelled(run, manifests, tmp_path / "fitted", Relabel(**relabel), clusters=[5, 5])
    given = relabelled(
        run,
        manifests,
        tmp_path / "given",
        Relabel(**relabel, quantizer=tmp_path / "fitted" / "kmeans.safetensors"),
        clusters=[5, 5],
    )
    assert given.source == fitted.source


SPLICED = "mfcc spliced over 3 frames"


@pytest.mark.parametrize(
    ("dim", "source", "parts", "sentence"),
    [
        (13, {}, ["cepstra"], "centroids of 13 dimensions, where mfcc spliced over 3 frames has 39"),
        (
            13,
            {"features": "mfcc", "parts": '["cepstra"]'},
            ["cepstra"],
            "fitted on mfcc, but the features are mfcc sp",
        ),
        (39, {"features": "mfcc", "parts": "null"}, ["cepstra"], "fitted on mfcc, but the features are mfcc spliced"),
        (
            39,
            {"features": SPLICED, "parts": '["delta"]'},
            ["cepstra"],
            r'parts \["delta"\], but',
        ),
        (39, {"features": SPLICED, "parts": '["delta"]'}, None, "but the features are mfcc;"),
    ],
)
def test_a_quantizer_of_other_columns_is_refused_though_its_dimensions_may_fit(
    dim: int, source: dict[str, str], parts: Any, sentence: str, run: Path, manifests: Path, tmp_path: Path
) -> None:
    path = tmp_path / "kmeans.safetensors"
    save_kmeans(path, [torch.randn(5, dim)], source)
    with pytest.raises(ValueError, match=sentence):
        relabelled(run, manifests, tmp_path / "run", Relabel(clusters=5, parts=parts, quantizer=path), clusters=5)
    assert not (tmp_path / "run" / "labels").exists()


def test_a_run_on_parts_that_were_not_spliced_is_refused_under_its_checkpoint(
    run: Path, manifests: Path, tmp_path: Path
) -> None:
    relabel: dict[str, Any] = {"clusters": 5, "parts": ["delta"], "max_frames": 2000}
    relabelled(run, manifests, tmp_path, Relabel(**relabel), clusters=5)
    path = tmp_path / "kmeans.safetensors"
    centroids, source = load_kmeans(path)
    assert source["features"] == SPLICED
    save_kmeans(path, [of[:, :13].clone() for of in centroids], source | {"features": "mfcc"})  # as before
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(ValueError, match="its checkpoints were trained on labels of other features"):
        relabelled(run, manifests, tmp_path, Relabel(**relabel), clusters=5)


def flipped(path: Path, place: int) -> bytes:
    """Change one bit of a file; returns what was in it."""
    before = path.read_bytes()
    path.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
    return before


@pytest.fixture
def trained(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "trained"))


@pytest.mark.parametrize("place", [3, 8, 40, 120, 1000, -1])
def test_a_damaged_kmeans_is_said_and_restored_where_it_comes_out_the_same(
    place: int, trained: Path, manifests: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = trained / "kmeans.safetensors"
    before = flipped(path, place if place >= 0 else path.stat().st_size - 1)
    labels = {file: file.stat().st_mtime_ns for file in (trained / "labels").iterdir()}
    relabelled(trained, manifests, trained, Relabel(clusters=20, max_frames=3000))
    assert f"{path}: corrupt; K-means is fitted again, and must give the same centroids" in caplog.text
    assert path.read_bytes() == before
    assert {file: file.stat().st_mtime_ns for file in (trained / "labels").iterdir()} == labels


def test_a_damaged_kmeans_that_comes_out_another_is_refused_where_checkpoints_are(
    trained: Path, manifests: Path
) -> None:
    about = LabelStore(trained / "labels").source
    for name in ("source.json", "store.json"):  # as if it had been fitted on a machine that rounds otherwise
        path = trained / "labels" / name
        path.write_text(path.read_text().replace(about.kmeans, "0123456789abcdef"))
    flipped(trained / "kmeans.safetensors", 1000)
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"kmeans\.safetensors: corrupt or missing, and a new fit gives other"):
        relabelled(trained, manifests, trained, Relabel(clusters=20, max_frames=3000))
    assert {path: path.read_bytes() for path in before} == before


def test_labels_under_a_checkpoint_are_not_those_of_other_validation_utterances(
    trained: Path, manifests: Path, tmp_path: Path, dev_cuts: CutSet
) -> None:
    write_manifest(list(dev_cuts)[1:], tmp_path / "dev.jsonl.gz")
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="its checkpoints were trained on labels of other utterances or another K-m"):
        relabelled(
            trained,
            manifests,
            trained,
            Relabel(clusters=20, max_frames=3000),
            validation=[tmp_path / "dev.jsonl.gz"],
        )
    assert {path: path.read_bytes() for path in before} == before


def gone_on(run: Path, manifests: Path, steps: int = 2, **options: object) -> None:
    data = pretraining_data(manifests, num_workers=0, **options)
    relabel = [] if "labels" in options else [Relabel(clusters=20, max_frames=3000)]
    trainer = Trainer(default_root_dir=run, max_steps=steps, accelerator="cpu", logger=False, callbacks=relabel)
    trainer.fit(pretraining_model(), datamodule=data, ckpt_path=run / "last.ckpt", weights_only=True)


def test_a_pre_training_does_not_go_on_with_other_labels_or_utterances(
    trained: Path, manifests: Path, tmp_path: Path, train_cuts: CutSet
) -> None:
    gone_on(trained, manifests)
    labels = Path(shutil.copytree(trained / "labels", tmp_path / "labels"))
    gone_on(trained, manifests, labels=labels)  # the same, elsewhere
    (trained / "last.ckpt").rename(tmp_path / "last.ckpt")
    relabelled(trained, manifests, tmp_path / "other", Relabel(clusters=20, max_frames=3000, seed=1))
    with pytest.raises(ValueError, match=r"labels: these labels are not those that .*last\.ckpt was trained with"):
        gone_on(tmp_path, manifests, labels=tmp_path / "other" / "labels")
    cuts = list(train_cuts)
    write_manifest([cuts[1], cuts[0], *cuts[2:]], tmp_path / "train.jsonl.gz")
    with pytest.raises(ValueError, match=r"train\.jsonl\.gz: its utterances, their order or their transcripts"):
        gone_on(tmp_path, manifests, labels=labels, train=[tmp_path / "train.jsonl.gz"])


def test_a_damaged_source_of_labels_is_restored(
    trained: Path, manifests: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = trained / "labels" / "source.json"
    whole = path.read_bytes()
    written = {file: file.stat().st_mtime_ns for file in (trained / "labels").iterdir() if file != path}
    for damaged in (b"", b"\xff", b"[1]", b"[" * 100_000, whole.replace(b"mfcc", b"mfcb")):
        path.write_bytes(damaged)
        relabelled(trained, manifests, trained, Relabel(clusters=20, max_frames=3000))
        assert path.read_bytes() == whole
        assert "source.json: corrupt; restored from store.json" in caplog.text
        caplog.clear()
    assert {file: file.stat().st_mtime_ns for file in written} == written


@pytest.mark.slow
def test_an_iteration_is_not_trained_on_other_utterances_than_the_one_before(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    edited = tmp_path / "train.jsonl.gz"
    cuts = list(read_manifest(manifests / "train.jsonl.gz"))
    write_manifest(cuts, edited)
    command = [
        *("fit", "--config", str(ROOT / "configs/demo.yaml"), "--config", str(ROOT / "tests/smoke.yaml")),
        *(f"--data.init_args.train=[{edited}]", "--data.init_args.validation=null", f"--output={tmp_path / 'run'}"),
        "--iterations=[{clusters: 20, max_frames: 2000, max_steps: 1},"
        "{features: previous, layer: 1, clusters: 10, max_frames: 2000, max_steps: 1}]",
    ]
    main(command)
    shutil.rmtree(tmp_path / "run/iteration2")
    write_manifest(cuts[:-1], edited)
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    before = tmp_path / "run/iteration1/last.ckpt"
    said = f"{edited}: its utterances, their order or their transcripts are not those that {before}"
    assert said in capsys.readouterr().err


def test_a_checkpoint_with_a_flipped_bit_is_no_teacher(run: Path, tmp_path: Path) -> None:
    content = bytearray((run / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "last.ckpt").write_bytes(content)
    for read in (load_encoder, read_checkpoint):
        with pytest.raises(ValueError, match="corrupt, some bytes differ from what was written"):
            read(tmp_path / "last.ckpt")
