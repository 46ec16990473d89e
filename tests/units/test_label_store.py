import json
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from helpers import LABEL_SOURCE, write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import CutSet, MonoCut
from lhotse.testing.dummies import dummy_cut, dummy_recording

from hubert_lightning.files import unfinished_name
from hubert_lightning.frames import num_frames
from hubert_lightning.units.label_shards import LabelSource
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.label_writer import LabelWriter, shard_size


def a_cut(number: int, duration: float) -> MonoCut:
    return dummy_cut(number, duration=duration, recording=dummy_recording(number, duration=duration))


CUTS = CutSet.from_cuts(a_cut(number, duration) for number, duration in enumerate([0.5, 1.0, 2.25, 0.1]))


def some_labels(cuts: CutSet = CUTS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {cut.id: rng.integers([[50], [7]], size=(2, num_frames(cut.num_samples))) for cut in cuts}


def a_store(
    folder: Path, source: LabelSource = LABEL_SOURCE, labels: dict[str, np.ndarray] | None = None
) -> LabelStore:
    labels = labels or some_labels()
    names = list(labels)
    return write_store(folder, source, *({name: labels[name] for name in part} for part in (names[:3], names[3:])))


def finished(folder: Path, source: LabelSource = LABEL_SOURCE, num_shards: int = 20) -> set[int]:
    """Shards that the next process finds finished."""
    return set(range(num_shards)) - {*LabelWriter(folder, source, num_shards).__enter__().missing}


def test_a_store_gives_back_what_was_written(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    for cut_id, labels in some_labels().items():
        np.testing.assert_array_equal(store[cut_id], labels)
        assert store[cut_id].dtype == np.uint16
        assert store.num_frames(cut_id) == labels.shape[1]
        assert cut_id in store
    assert "another" not in store
    with pytest.raises(KeyError):
        store["another"]
    assert len(store) == len(CUTS)
    assert store.source == LABEL_SOURCE
    for stream, counts in enumerate(store.histogram):
        written = np.concatenate([labels[stream] for labels in some_labels().values()])
        np.testing.assert_array_equal(counts, np.bincount(written, minlength=len(counts)))
    store.check(CUTS, num_clusters=[50, 7])
    store.verify()


@settings(max_examples=30)
@given(frames=st.lists(st.integers(1, 50), min_size=1, max_size=60), size=st.integers(1, 20), data=st.data())
def test_every_utterance_is_found_whatever_the_shards_and_their_order(
    frames: list[int], size: int, data: st.DataObject
) -> None:
    labels = {f"{number}/é {number}": np.full((1, count), number) for number, count in enumerate(frames)}
    names = list(labels)
    shards = [names[start : start + size] for start in range(0, len(names), size)]
    source = LabelSource("mfcc", "k", "m", (100,))
    with TemporaryDirectory() as folder:
        with LabelWriter(Path(folder), source, len(shards)) as writer:
            for shard in data.draw(st.permutations(range(len(shards)))):
                writer.write(shard, {name: labels[name] for name in shards[shard]})
        store = LabelStore(Path(folder))
        for name, of in labels.items():
            np.testing.assert_array_equal(store[name], of)


def test_a_label_takes_two_bytes_and_an_utterance_32_in_the_index(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    frames = sum(labels.size for labels in some_labels().values())
    header = 128  # of a .npy
    assert sum((tmp_path / f"0000{shard}.npy").stat().st_size - header for shard in range(2)) == 2 * frames
    assert (tmp_path / "index.npy").stat().st_size - header == 32 * len(store)


def test_shards_are_never_more_than_files_can_be_open() -> None:
    for cuts in (1, 100, 101, 28_539, 5_000_000):
        assert -(-cuts // shard_size(cuts)) <= 512


def test_a_worker_maps_the_files_itself(tmp_path: Path) -> None:
    pickled = pickle.dumps(a_store(tmp_path))
    assert len(pickled) < 500
    np.testing.assert_array_equal(pickle.loads(pickled)["dummy-mono-cut-0001"], some_labels()["dummy-mono-cut-0001"])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


WRITE_SLOWLY = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[2], sys.argv[2] + '/..']
from helpers import LABEL_SOURCE
from test_label_store import many_labels, written
written(Path(sys.argv[1]), pause=lambda: time.sleep(0.02))
"""


def many_labels(shard: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(shard)
    return {f"{shard}-{cut}": rng.integers(7, size=(2, 4000)) for cut in range(40)}


def written(folder: Path, pause: Callable[[], None] = lambda: None) -> LabelStore:
    """What a run does, first or again: what is not there yet."""
    with LabelWriter(folder, LABEL_SOURCE, num_shards=20) as writer:
        for shard in writer.missing:
            writer.write(shard, many_labels(shard))
            pause()
    return LabelStore(folder)


@pytest.mark.slow
def test_a_store_that_is_killed_and_run_again_is_the_same_to_the_byte(tmp_path: Path) -> None:
    written(tmp_path / "whole")
    rng = random.Random(0)
    command = [sys.executable, "-c", WRITE_SLOWLY, str(tmp_path / "killed"), str(Path(__file__).parent)]
    kills = 0
    for _ in range(4):
        process = subprocess.Popen(command)
        while not list((tmp_path / "killed").glob("*.npy")) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        kills += process.wait() != 0
    assert kills > 1
    written(tmp_path / "killed").verify()
    (tmp_path / "killed" / "00003.index.npy").unlink()  # as if killed between a shard's labels and its index
    (tmp_path / "killed" / "store.json").unlink()
    written(tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[2], sys.argv[2] + '/..']
from test_label_store import written
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from hubert_lightning.units import label_writer
write_shard = label_writer.write_shard
def full_at_three(folder, shard, clusters):
    if shard == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    write_shard(folder, shard, clusters)
label_writer.write_shard = full_at_three
try:
    written(Path(sys.argv[1]))
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_full_disk_is_told_and_what_was_finished_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "full"), str(Path(__file__).parent)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "00003.npy: cannot be written (File too large); finished files are kept" in said
    assert finished(tmp_path / "full") == {0, 1, 2}
    assert not list((tmp_path / "full").glob(".*"))
    written(tmp_path / "full")
    written(tmp_path / "whole")
    assert files(tmp_path / "full") == files(tmp_path / "whole")


def test_an_interrupted_store_keeps_its_finished_shards(tmp_path: Path) -> None:
    LabelWriter(tmp_path, LABEL_SOURCE, num_shards=20).__enter__().write(4, some_labels())
    unfinished_name(tmp_path / "00005.npy").write_bytes(b"half")
    (tmp_path / "00006.npy").write_bytes(b"no index yet")
    assert finished(tmp_path) == {4}


def test_labels_of_another_source_are_not_kept(tmp_path: Path) -> None:
    other = LabelSource(features="mfcc", kmeans="another", manifest="m", clusters=(50, 7))
    a_store(tmp_path)
    assert finished(tmp_path, other) == set()
    assert [path.name for path in tmp_path.iterdir()] == ["source.json"]


def test_a_changed_byte_is_found_and_only_its_shard_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = a_store(tmp_path)
    before = files(tmp_path)
    damaged = tmp_path / "00001.npy"
    damaged.write_bytes(before["00001.npy"][:-1] + bytes([before["00001.npy"][-1] ^ 1]))
    with pytest.raises(ValueError, match=r"00001\.npy: corrupt .* remove it, and make the labels again"):
        store.verify()
    assert finished(tmp_path) == {0}
    assert "00001.npy: corrupt" in caplog.text
    a_store(tmp_path)
    assert files(tmp_path) == before


def test_two_utterances_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 utterances with the id of another"):
        write_store(tmp_path, LABEL_SOURCE, some_labels(), some_labels())


def test_a_store_that_was_not_finished_is_refused(tmp_path: Path) -> None:
    LabelWriter(tmp_path, LABEL_SOURCE, num_shards=1).__enter__()
    with pytest.raises(
        ValueError, match=r"no finished label store .*; make the labels with `hubert fit` or `hubert lab"
    ):
        LabelStore(tmp_path)


@pytest.mark.parametrize(
    ("lost", "sentence"),
    [
        ("half", r"00001\.npy: cut short or missing .* relabel"),
        ("all", r"00001\.npy: cut short or missing .* relabel"),
        ("index", r"index\.npy: corrupt or missing; remove .*store\.json and relabel"),
    ],
)
def test_a_store_cut_short_is_refused(tmp_path: Path, lost: str, sentence: str) -> None:
    a_store(tmp_path)
    shard = tmp_path / "00001.npy"
    if lost == "half":
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size - 2])
    elif lost == "all":
        shard.unlink()
    else:
        (tmp_path / "index.npy").unlink()
    with pytest.raises(ValueError, match=sentence):
        LabelStore(tmp_path)


def test_labels_for_another_manifest_name_the_first_cut_without_any(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    with pytest.raises(ValueError, match=r"dummy-mono-cut-0009: no labels .* another manifest; relabel"):
        store.check([*CUTS, a_cut(9, 1.0)], num_clusters=[50, 7])


def test_labels_for_other_audio_name_the_first_cut_that_disagrees(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    with pytest.raises(ValueError, match=r"dummy-mono-cut-0001: 49 labels for 99 frames; .* relabel"):
        store.check([a_cut(1, 2.0)], num_clusters=[50, 7])


@pytest.mark.parametrize(("clusters", "words"), [([100, 7], r"100 \+ 7"), ([50], "50")])
def test_other_streams_are_refused(tmp_path: Path, clusters: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=rf"labels of 50 \+ 7 clusters for a model of {words}"):
        a_store(tmp_path).check(CUTS, num_clusters=clusters)


def test_another_hop_is_refused(tmp_path: Path) -> None:
    mfcc_rate = LabelSource(features="mfcc", kmeans="k", manifest="m", clusters=(50, 7), hop=160)
    with pytest.raises(
        ValueError, match="a frame of 25 ms every 10 ms, but the encoder has a frame of 25 ms every 20 ms"
    ):
        a_store(tmp_path, mfcc_rate).check(CUTS, num_clusters=[50, 7])


def test_labels_that_are_all_the_same_are_refused(tmp_path: Path) -> None:
    nothing = {cut_id: np.zeros_like(labels) for cut_id, labels in some_labels().items()}
    with pytest.raises(ValueError, match=r"100% of all frames have the same cluster \(\d+\)"):
        a_store(tmp_path, labels=nothing).check(CUTS, num_clusters=[50, 7])


@pytest.mark.parametrize("content", ['{"clusters": 3', '{"version": 0, "clusters": 50}'])
def test_a_description_that_is_damaged_or_of_another_version_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(ValueError, match=r"its store\.json is corrupt, or of another version; remove that folder"):
        LabelStore(tmp_path)


def sentence(folder: Path) -> str | None:
    try:
        LabelStore(folder).verify()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ["store.json", "index.npy", "00000.npy", "00000.index.npy"])
def test_whatever_is_damaged_in_a_store_is_a_sentence_that_names_it(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = LabelSource("mfcc", "0" * 16, "1" * 16, (9,))
    write_store(tmp_path, source, {str(number): rng.integers(9, size=(1, 7)) for number in range(5)})
    path = tmp_path / name
    whole = path.read_bytes()
    damages = [b"", b"\xff\xfe", b"[" * 100_000, b"[1]", b"null", bytes(len(whole)), whole[: len(whole) // 2]]
    if name == "store.json":
        about = json.loads(whole)
        wrong = [None, -1, 1.5, "x", [], {}, [[]], [None], float("nan"), 2**70, [2**70], True]
        damages += [json.dumps(about | {key: value}).encode() for key in about for value in wrong]
        damages += [
            json.dumps({key: about[key] for key in about if key != left}).encode() for left in about if left != "hop"
        ]
    else:
        places = rng.integers(len(whole), size=100)
        damages += [whole[:of] + bytes([whole[of] ^ 1 << int(rng.integers(8))]) + whole[of + 1 :] for of in places]
        damages += [whole[:of] + bytes([whole[of] ^ 1 << bit]) + whole[of + 1 :] for of in range(80) for bit in (0, 5)]
    for damaged in damages:
        path.write_bytes(damaged)
        said = sentence(tmp_path)
        if said is not None:
            assert str(tmp_path) in said
            assert "relabel" in said or "make the labels again" in said
        else:  # what cannot be told from a store of other labels, or lies between header and array
            assert name != "store.json" or LabelStore(tmp_path).source != source or damaged == whole
