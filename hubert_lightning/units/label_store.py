"""The cluster of every frame of every cut, memory-mapped, with what a reader must know kept beside it.

A store is a folder. A shard is an array of clusters (`00000.npy`: streams × frames) and its index (`00000.index.npy`:
digests of the cuts' ids, frames, and a checksum). Each file is written under another name and then renamed, the index
last, so a shard that has an index is whole. `index.npy` joins the indexes, sorted by digest, so that a store opens at
once whatever its size, and `store.json` comes last: hop, clusters, source, fingerprints, sizes and checksums. No file
tells which process wrote it, or when: an interrupted store ends as the same bytes.
"""

import json
import logging
import mmap
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from lhotse.cut import Cut

from hubert_lightning.data.corpora import ids_and_samples
from hubert_lightning.errors import UserError
from hubert_lightning.files import is_unfinished, read_regular, write_whole
from hubert_lightning.frames import HOP, num_frames
from hubert_lightning.untrusted.array_file import mapped

log = logging.getLogger(__name__)

VERSION = 1
MAX_CLUSTERS = 2**16
"""Clusters that a label, of 16 bits, can name."""
LARGEST_SHARE = (
    0.9  # of all frames, that one cluster may have: fairseq issue 4521 is of a run whose labels were all one
)
SHARD_FILE = re.compile(r"\d{5}(\.index)?\.npy")
MOST_SHARDS = 512  # each that is read keeps a file open


@dataclass(frozen=True)
class LabelSource:
    """What the labels are clusters of. Two stores with equal sources hold equal labels.

    Args:
        features: "mfcc", or the layer and the fingerprint of the encoder it belongs to.
        kmeans: Fingerprint of the centroids.
        manifest: Fingerprint of the labelled cuts.
        clusters: Number of K-means clusters of each stream.
        hop: Samples from one label to the next.
    """

    features: str
    kmeans: str
    manifest: str
    clusters: tuple[int, ...]
    hop: int = HOP


def check_clusters(clusters: Sequence[int]) -> None:
    """Check that labels can name the clusters of every stream.

    Args:
        clusters: Number of clusters of each stream.

    Raises:
        UserError: There is no stream, or one has fewer than 2 or more than 65536 clusters.
    """
    if not clusters or not all(2 <= number <= MAX_CLUSTERS for number in clusters):
        raise UserError(
            f"clusters {list(clusters)}: each K-means has from 2 to {MAX_CLUSTERS} clusters; change clusters"
        )


def shard_size(num_cuts: int) -> int:
    """Cuts whose labels are written together: what an interruption costs each process at most."""
    return max(100, ceil(num_cuts / MOST_SHARDS))


def begin_store(folder: Path, source: LabelSource) -> None:
    """Make room for a store; labels of another source that lie in the folder are removed.

    Raises:
        UserError: The folder holds something else, more clusters than 16 bits can name, or a disk that is full.
    """
    check_clusters(source.clusters)
    if stated_source(folder) == _described(source):
        return
    if folder.exists():
        there = list(folder.iterdir()) if folder.is_dir() else [folder]
        if not (folder / "source.json").exists() and not all(map(is_unfinished, there)):
            raise UserError(f"{folder}: holds something else than labels; choose another folder")
        shards = [file for file in there if SHARD_FILE.fullmatch(file.name)]
        for old in [folder / "store.json", folder / "index.npy", *shards]:
            old.unlink(missing_ok=True)
    write_whole(folder / "source.json", json.dumps(_described(source)).encode())


def stated_source(folder: Path) -> dict[str, Any] | None:
    """What a store, finished or not, says that its labels are clusters of.

    A damaged `source.json` is restored from `store.json`.

    Args:
        folder: Folder of the store.

    Returns:
        Content of `source.json`; none if there is no such file, empty if nothing tells what was in it.

    Raises:
        UserError: The disk is full, or cannot be written to.
    """
    try:
        return _read_json(folder / "source.json")
    except ValueError as error:
        try:
            source = LabelStore(folder).source
        except ValueError:
            log.warning("%s; the labels are made again", error)
            return {}
    _restore_source(folder, source)
    return _described(source)


def _restore_source(folder: Path, source: LabelSource) -> None:
    write_whole(folder / "source.json", json.dumps(_described(source)).encode())
    log.warning("%s: damaged; restored from store.json", folder / "source.json")


def is_of_source(folder: Path, source: LabelSource) -> bool:
    """Whether a store is one of these labels, or nothing says that it is not; raises as `stated_source` does."""
    stated = stated_source(folder)
    if not stated or stated == _described(source):
        return True
    with suppress(ValueError):
        if LabelStore(folder).source == source:  # what differs is damage
            _restore_source(folder, source)
            return True
    return False


def finished_shards(folder: Path, source: LabelSource) -> set[int]:
    """The shards of an interrupted store that need not be made again: whole ones, of the same source."""
    if stated_source(folder) != _described(source):
        return set()
    finished = set()
    for index in sorted(folder.glob("[0-9]*.index.npy")):
        shard = int(index.name.split(".")[0])
        try:
            _check_shard(folder, shard)
            finished.add(shard)
        except ValueError as error:
            log.warning("%s; it is made again", error)
            index.unlink()
            (folder / "store.json").unlink(missing_ok=True)
    if (folder / "store.json").exists():
        try:
            store = LabelStore(folder)
            store.verify_index()
            if store.source != source or store.checksums != [_checksum(folder, shard) for shard in sorted(finished)]:
                raise UserError(f"{folder / 'store.json'}: damaged")
        except ValueError as error:
            log.warning("%s; it is closed again", error)
            (folder / "store.json").unlink()
    return finished


def write_shard(folder: Path, shard: int, clusters: Mapping[str, np.ndarray]) -> None:
    """Write the labels of some cuts: id → (streams, frames) integers below 65536.

    Raises:
        UserError: The disk is full, or cannot be written to; what was finished stays.
    """
    labels = np.concatenate([np.asarray(of) for of in clusters.values()], axis=1).astype(np.uint16)
    index = np.zeros((4, len(clusters) + 1), dtype=np.uint64)
    index[:2, :-1] = np.array([_digest(cut_id) for cut_id in clusters], dtype=np.uint64).T
    index[2, :-1] = [of.shape[1] for of in clusters.values()]
    index[:2, -1] = crc32(labels.tobytes()), crc32(index[:, :-1].tobytes())
    name = f"{shard:05d}"
    write_whole(folder / f"{name}.npy", _npy(labels))
    write_whole(folder / f"{name}.index.npy", _npy(index))


def finish_store(folder: Path, source: LabelSource, num_shards: int) -> "LabelStore":
    """Close a store of which every shard is written, and open it."""
    histogram = [np.zeros(clusters, dtype=np.int64) for clusters in source.clusters]
    parts, sizes, checksums = [], [], []
    for shard in range(num_shards):
        labels, index = _shard(folder, shard), _mapped(_index_of(folder, shard), _index_of(folder, shard)).copy()
        for stream, counts in enumerate(histogram):
            counts += np.bincount(labels[stream], minlength=len(counts))
        lengths = index[2, :-1].copy()
        index[2, :-1] = np.cumsum(lengths) - lengths
        index[3, :-1] = (np.uint64(shard) << np.uint64(32)) | lengths
        parts.append(index[:, :-1])
        sizes.append((folder / f"{shard:05d}.npy").stat().st_size)
        checksums.append(int(index[0, -1]))
    joined = np.concatenate(parts, axis=1)
    joined = np.ascontiguousarray(joined[:, np.lexsort((joined[1], joined[0]))])
    if same := int((joined[:2, 1:] == joined[:2, :-1]).all(axis=0).sum()):
        raise UserError(f"{folder}: {same} utterances have the id of another; give each an id of its own and relabel")
    write_whole(folder / "index.npy", _npy(joined))
    about = _described(source) | {
        "bytes": sizes,
        "checksums": checksums,
        "index_checksum": crc32(joined.tobytes()),
        "histogram": [counts.tolist() for counts in histogram],
    }
    write_whole(folder / "store.json", json.dumps(about).encode())
    return LabelStore(folder)


class LabelStore:
    """Labels by cut id: `store["1272-128104-0000"]` is (streams, frames) uint16, read from a memory map.

    `source` says what they are, `histogram` how often each stream has each cluster.

    Args:
        path: The folder of a finished store.

    Raises:
        UserError: The folder is no store, was not finished, or a shard is not as long as it was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not (self.path / "store.json").is_file():
            raise UserError(
                f"{path}: no finished label store (no store.json); let the Relabel callback make the labels"
            )
        try:
            about = _read_json(self.path / "store.json")
            assert about is not None
            version, sizes, self.checksums = about.pop("version"), about.pop("bytes"), about.pop("checksums")
            self._index_checksum = about.pop("index_checksum")
            histogram = about.pop("histogram")
            if about.keys() != {field.name for field in fields(LabelSource)}:
                raise UserError("store.json lacks what its labels are of")
            self.source = LabelSource(**about | {"clusters": tuple(about["clusters"])})
            if not isinstance(version, int) or isinstance(version, bool):
                raise UserError("store.json holds other types")
            if version == VERSION:
                _check_numbers(self.source, sizes, self.checksums, self._index_checksum, histogram)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{path}: its store.json is damaged, or of another version; remove that folder and relabel"
            ) from error
        if version != VERSION:
            raise UserError(f"{path}: a store of version {version}, not {VERSION}; remove that folder and relabel")
        self.histogram = [np.array(counts) for counts in histogram]
        self._index = _mapped(self.path / "index.npy", self.path / "store.json", at_random=True)
        if self._index.dtype != np.uint64 or self._index.ndim != 2 or len(self._index) != 4:
            raise UserError(f"{self.path / 'index.npy'}: damaged; remove {self.path / 'store.json'} and relabel")
        self._keys = self._index[0]
        for shard, size in enumerate(sizes):
            file = self.path / f"{shard:05d}.npy"
            if not file.exists() or file.stat().st_size != size:
                raise UserError(
                    f"{file}: cut short or missing ({size} bytes were written); relabel: only that shard is made again"
                )
        self._shards: list[np.ndarray | None] = [None] * len(sizes)

    @property
    def fingerprint(self) -> str:
        """A short name that only stores of the same labels share."""
        about = [_described(self.source), self.checksums, self._index_checksum]
        return blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return LabelStore, (self.path,)  # another process maps the files itself

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, cut_id: str) -> bool:
        return self._find(cut_id) >= 0

    def num_frames(self, cut_id: str) -> int:
        """How many frames of a cut are labelled."""
        return int(self._index[3, self._found(cut_id)]) & 0xFFFFFFFF

    def __getitem__(self, cut_id: str) -> np.ndarray:
        place = self._found(cut_id)
        start, packed = int(self._index[2, place]), int(self._index[3, place])
        shard, frames = packed >> 32, packed & 0xFFFFFFFF
        labels = self._shards[shard]
        if labels is None:
            labels = self._shards[shard] = self._checked(shard)
        return labels[:, start : start + frames]

    def _checked(self, shard: int) -> np.ndarray:
        labels = _shard(self.path, shard, at_random=True)
        if labels.dtype != np.uint16 or labels.ndim != 2 or len(labels) != len(self.source.clusters):
            raise UserError(f"{self.path / f'{shard:05d}.npy'}: no labels of this store; remove it and relabel")
        return labels

    def _found(self, cut_id: str) -> int:
        place = self._find(cut_id)
        if place < 0:
            raise KeyError(cut_id)
        return place

    def _find(self, cut_id: str) -> int:
        first, second = _digest(cut_id)
        # uint64 as the keys are: another type would make numpy convert them all
        place = int(self._keys.searchsorted(np.uint64(first)))
        while place < len(self._keys) and int(self._keys[place]) == first:
            if int(self._index[1, place]) == second:
                return place
            place += 1
        return -1

    def verify(self) -> None:
        """Read every label.

        Raises:
            UserError: A file is not as it was written; the first is named.
        """
        for shard in range(len(self._shards)):
            _check_shard(self.path, shard, self.checksums[shard])
            for labels, clusters in zip(self._checked(shard), self.source.clusters, strict=True):
                if labels.size and labels.max() >= clusters:
                    raise UserError(
                        f"{self.path / f'{shard:05d}.npy'}: a label of {labels.max()} for {clusters} clusters; remove "
                        f"{self.path} and relabel"
                    )
        self.verify_index()

    def verify_index(self) -> None:
        """Read where every utterance's labels are; raises as `verify` does."""
        if crc32(np.ascontiguousarray(self._index).tobytes()) != self._index_checksum:
            raise UserError(f"{self.path / 'index.npy'}: damaged; remove {self.path / 'store.json'} and relabel")
        shard, frames = self._index[3] >> np.uint64(32), self._index[3] & np.uint64(0xFFFFFFFF)
        lengths = np.array([self._checked(number).shape[1] for number in range(len(self._shards))], np.uint64)
        inside = shard < len(lengths)
        room = lengths[np.where(inside, shard, 0).astype(np.int64)] if len(lengths) else np.zeros_like(frames)
        if not (inside & (frames <= room) & (self._index[2] <= room - np.minimum(frames, room))).all():
            raise UserError(f"{self.path / 'index.npy'}: points outside of the labels; remove {self.path} and relabel")

    def check(self, cuts: Iterable[Cut], num_clusters: Sequence[int]) -> None:
        """Refuse to train on labels that do not belong to these cuts and this model.

        Raises:
            UserError: Another hop, number of streams or of clusters, a cut without labels or with a label count that
                is not its frame count (the first such cut is named), or labels that are nearly all the same.
        """
        if self.source.hop != HOP:
            raise UserError(
                f"{self.path}: labels have a hop of {self.source.hop} samples, the encoder {HOP}; relabel at {HOP}"
            )
        if self.source.clusters != tuple(num_clusters):
            there, asked = (" + ".join(map(str, counts)) for counts in (self.source.clusters, num_clusters))
            raise UserError(
                f"{self.path}: labels of {there} clusters for a model of {asked}; "
                f"set model.init_args.num_clusters to {list(self.source.clusters)} or relabel"
            )
        for counts in self.histogram:
            if (largest := counts.max() / counts.sum()) > LARGEST_SHARE:
                raise UserError(
                    f"{self.path}: {largest:.0%} of all frames have the same cluster ({counts.argmax()}), which "
                    "teaches nothing; leave silent recordings out, or relabel with other features or more clusters"
                )
        for cut_id, samples in ids_and_samples(cuts):
            if cut_id not in self:
                raise UserError(
                    f"{cut_id}: no labels in {self.path}, which was made for another manifest; relabel this one"
                )
            if self.num_frames(cut_id) != num_frames(samples):
                raise UserError(
                    f"{cut_id}: {self.num_frames(cut_id)} labels for {num_frames(samples)} frames; "
                    f"{self.path} was made for other audio, relabel it"
                )


def _digest(cut_id: str) -> tuple[int, int]:
    digest = blake2b(cut_id.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8]), int.from_bytes(digest[8:])


def _index_of(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.index.npy"


def _shard(folder: Path, shard: int, at_random: bool = False) -> np.ndarray:
    file = folder / f"{shard:05d}.npy"
    labels = _mapped(file, file, at_random)
    if labels.dtype != np.uint16 or labels.ndim != 2 or not labels.flags.c_contiguous:
        raise UserError(f"{file}: damaged; remove {file} and relabel")
    return labels


def _mapped(file: Path, remove: Path, at_random: bool = False) -> np.ndarray:
    try:
        array = mapped(file)
    except ValueError as error:
        raise UserError(f"{file}: damaged or missing; remove {remove} and relabel") from error
    if at_random and hasattr(mmap, "MADV_RANDOM") and isinstance(array.base, mmap.mmap):
        # what lies around an utterance is another's: read no more
        array.base.madvise(mmap.MADV_RANDOM)
    return np.asarray(array)  # a plain array: np.memmap is slow to slice


def _checksum(folder: Path, shard: int) -> int:
    return int(_mapped(_index_of(folder, shard), _index_of(folder, shard))[0, -1])


def _check_shard(folder: Path, shard: int, checksum: int | None = None) -> None:
    labels, index = _shard(folder, shard), _mapped(_index_of(folder, shard), _index_of(folder, shard))
    if index.dtype != np.uint64 or index.ndim != 2 or len(index) != 4 or not index.shape[1]:
        raise UserError(f"{_index_of(folder, shard)}: damaged; remove {_index_of(folder, shard)} and relabel")
    if int(index[1, -1]) != crc32(np.ascontiguousarray(index[:, :-1]).tobytes()):
        raise UserError(f"{_index_of(folder, shard)}: damaged; remove {_index_of(folder, shard)} and relabel")
    expected = int(index[0, -1]) if checksum is None else checksum
    if int(index[0, -1]) != expected or crc32(labels.data) != expected:
        config, metrics = folder.parent / "config.yaml", folder.parent / "metrics.json"
        way = f"also {metrics}, if the run is finished, and `hubert fit --config {config}` makes only that shard again"
        raise UserError(
            f"{folder / f'{shard:05d}.npy'}: damaged (its checksum is another); remove it, "
            + (way if config.exists() else "and make the labels again")
        )


def _described(source: LabelSource) -> dict[str, Any]:
    return {"version": VERSION} | asdict(source) | {"clusters": list(source.clusters)}


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; none if there is no file.

    Raises:
        UserError: The file is damaged.
    """
    try:
        content = json.loads(read_regular(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct that, and run again") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UserError(f"{path}: damaged; restore it from a backup, or remove it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged; restore it from a backup, or remove it")
    return content


def _check_numbers(source: LabelSource, sizes: Any, checksums: Any, index_checksum: Any, histogram: Any) -> None:
    """Raise `UserError` if what `store.json` says is of types or in ranges that no store has."""
    texts = [source.features, source.kmeans, source.manifest]
    lists = [list(source.clusters), [source.hop, index_checksum], sizes, checksums, *histogram]
    if not all(isinstance(text, str) for text in texts) or not all(map(_are_counts, lists)) or not source.clusters:
        raise UserError("store.json holds other types")
    if not all(2 <= clusters <= 2**16 for clusters in source.clusters) or not 0 < source.hop <= 2**16 or not sizes:
        raise UserError("store.json holds numbers that no store has")
    if len(sizes) != len(checksums) or [*map(len, histogram)] != [*source.clusters] or not all(map(sum, histogram)):
        raise UserError("store.json holds lists that do not belong together")


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _npy(array: np.ndarray) -> memoryview:
    file = BytesIO()  # np.save into a file does not say why it failed
    np.save(file, array)
    return file.getbuffer()
