from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet, MonoCut
from lhotse.testing.dummies import dummy_cut, dummy_recording

from hubert_lightning.data.labels import (
    LabelSource,
    LabelStore,
    begin_store,
    finish_store,
    finished_shards,
    write_shard,
)
from hubert_lightning.frames import num_frames

SOURCE = LabelSource(features="mfcc", kmeans="k", manifest="m", clusters=50)


def a_cut(number: int, duration: float) -> MonoCut:
    return dummy_cut(number, duration=duration, recording=dummy_recording(number, duration=duration))


CUTS = CutSet.from_cuts(a_cut(number, duration) for number, duration in enumerate([0.5, 1.0, 2.25, 0.1]))


def some_labels(cuts: CutSet = CUTS, clusters: int = 50) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {cut.id: rng.integers(clusters, size=num_frames(cut.num_samples)) for cut in cuts}


def a_store(folder: Path, source: LabelSource = SOURCE, labels: dict[str, np.ndarray] | None = None) -> LabelStore:
    labels = labels or some_labels()
    names = list(labels)
    begin_store(folder, source)
    write_shard(folder, 0, {name: labels[name] for name in names[:3]})
    write_shard(folder, 1, {name: labels[name] for name in names[3:]})
    return finish_store(folder, source, num_shards=2)


def test_a_store_gives_back_what_was_written(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    for cut_id, labels in some_labels().items():
        np.testing.assert_array_equal(store[cut_id], labels)
        assert store[cut_id].dtype == np.uint16
    assert len(store) == len(CUTS)
    assert store.source == SOURCE
    assert store.histogram.sum() == sum(map(len, some_labels().values()))
    store.check(CUTS, num_clusters=50)


def test_an_interrupted_store_keeps_its_finished_shards(tmp_path: Path) -> None:
    begin_store(tmp_path, SOURCE)
    write_shard(tmp_path, 4, some_labels())
    (tmp_path / "00005.npy.part").write_bytes(b"half")
    begin_store(tmp_path, SOURCE)
    assert finished_shards(tmp_path, SOURCE) == {4}


def test_labels_of_another_source_are_not_kept(tmp_path: Path) -> None:
    other = LabelSource(features="mfcc", kmeans="another", manifest="m", clusters=50)
    a_store(tmp_path)
    assert finished_shards(tmp_path, other) == set()
    begin_store(tmp_path, other)
    assert not (tmp_path / "store.json").exists()


def test_a_store_that_was_not_finished_is_refused(tmp_path: Path) -> None:
    begin_store(tmp_path, SOURCE)
    with pytest.raises(ValueError, match="no finished label store"):
        LabelStore(tmp_path)


@pytest.mark.parametrize("loss", ["half", "all", "index"])
def test_a_store_cut_short_is_refused(tmp_path: Path, loss: str) -> None:
    a_store(tmp_path)
    shard = tmp_path / "00001.npy"
    if loss == "half":
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size - 2])
    elif loss == "all":
        shard.unlink()
    else:
        shard.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"00001.npy: cut short or missing .* relabel"):
        LabelStore(tmp_path)


def test_labels_for_another_manifest_name_the_first_cut_without_any(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    with pytest.raises(ValueError, match=r"dummy-mono-cut-0009: no labels .* another manifest; relabel"):
        store.check([*CUTS, a_cut(9, 1.0)], num_clusters=50)


def test_labels_for_other_audio_name_the_first_cut_that_disagrees(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    with pytest.raises(ValueError, match=r"dummy-mono-cut-0001: 49 labels for 99 frames; .* relabel"):
        store.check([a_cut(1, 2.0)], num_clusters=50)


def test_another_number_of_clusters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"labels of 50 clusters for a model of 100"):
        a_store(tmp_path).check(CUTS, num_clusters=100)


def test_another_hop_is_refused(tmp_path: Path) -> None:
    mfcc_rate = LabelSource(features="mfcc", kmeans="k", manifest="m", clusters=50, hop=160)
    with pytest.raises(ValueError, match=r"hop of 160 samples, the encoder 320"):
        a_store(tmp_path, mfcc_rate).check(CUTS, num_clusters=50)


def test_labels_that_are_all_the_same_are_refused(tmp_path: Path) -> None:
    nothing = {cut_id: np.zeros_like(labels) for cut_id, labels in some_labels().items()}
    with pytest.raises(ValueError, match="every frame has the same cluster"):
        a_store(tmp_path, labels=nothing).check(CUTS, num_clusters=50)


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"clusters": 3')
    with pytest.raises(ValueError, match=r"its store\.json is damaged; remove that folder"):
        LabelStore(tmp_path)
