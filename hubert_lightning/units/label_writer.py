"""Writing of a label store, by one process or by all ranks of a run; finished shards are kept after an interruption.

Files do not record which process wrote them or when, so an interrupted store ends with the same bytes.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar
from zlib import crc32

import numpy as np
from lhotse.cut import Cut

from hubert_lightning.errors import UserError, counted
from hubert_lightning.files import is_unfinished, write_whole
from hubert_lightning.units.label_shards import (
    SHARD_FILE,
    LabelSource,
    check_shard,
    labels_path,
    npy_bytes,
    read_index,
    read_labels,
    shard_checksum,
    write_shard,
)
from hubert_lightning.units.label_store import LabelStore, read_json_object

log = logging.getLogger(__name__)

MAX_SHARDS = 512
"""Shards of a store: each that is read keeps a file open."""

T = TypeVar("T")


def shard_size(num_cuts: int) -> int:
    """Return the number of cuts of a shard: the work that an interruption costs each process at most."""
    return max(100, ceil(num_cuts / MAX_SHARDS))


def shards_of(cuts: Sequence[Cut]) -> list[Sequence[Cut]]:
    """Split cuts into the shards of their store."""
    size = shard_size(len(cuts))
    return [cuts[start : start + size] for start in range(0, len(cuts), size)]


class Once(Protocol):
    """Function that does work once for all processes of a run."""

    def __call__(self, work: Callable[[], T]) -> T:
        """Do the work on one process, and return its result on each."""


def _alone(work: Callable[[], T]) -> T:
    return work()


class LabelWriter:
    """A label store that is being written: a context that closes the store if every shard was written.

    Shards that an interrupted process of the same source has finished are kept. On an error, the store stays open for
    the next start.

        with LabelWriter(folder, source, num_shards) as writer:
            for shard in writer.missing:
                writer.write(shard, labels)

    Args:
        folder: Folder of the store; labels of another source in it are removed.
        source: Source of the labels.
        num_shards: Number of shards of the store.
        once: Function that does work once for all processes that write together; not needed if there is one process.

    Raises:
        UserError: The folder holds something else, or the disk is full.
    """

    def __init__(self, folder: Path, source: LabelSource, num_shards: int, once: Once = _alone) -> None:
        self.folder, self.source, self.num_shards, self._once = folder, source, num_shards, once
        self.missing: list[int] = []
        """Shards to write."""
        self.was_complete = False
        """Whether an earlier process has finished the store, so that no shard is missing."""

    def __enter__(self) -> Self:
        self.missing, self.was_complete = self._once(self._begin)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None and not self.was_complete:
            self._once(self._close)

    def write(self, shard: int, labels: Mapping[str, np.ndarray]) -> None:
        """Write the labels of one shard's cuts.

        Args:
            shard: Number of the shard.
            labels: (streams, frames) integers below 65536 by cut id.

        Raises:
            UserError: The disk is full or cannot be written to; earlier shards stay.
        """
        write_shard(self.folder, shard, labels)

    def _begin(self) -> tuple[list[int], bool]:
        if stated_source(self.folder) != self.source.described():
            self._remove_others()
            write_whole(self.folder / "source.json", json.dumps(self.source.described()).encode())
        finished = self._finished()
        missing = [shard for shard in range(self.num_shards) if shard not in finished]
        return missing, (self.folder / "store.json").exists()

    def _remove_others(self) -> None:
        """Remove labels of another source."""
        if not self.folder.exists():
            return
        files = list(self.folder.iterdir()) if self.folder.is_dir() else [self.folder]
        if not (self.folder / "source.json").exists() and not all(map(is_unfinished, files)):
            raise UserError(f"{self.folder}: holds files that are not labels; choose another folder")
        shards = [file for file in files if SHARD_FILE.fullmatch(file.name)]
        for file in [self.folder / "store.json", self.folder / "index.npy", *shards]:
            file.unlink(missing_ok=True)

    def _finished(self) -> set[int]:
        """Check the shards and the store that an earlier process has left; remove what is corrupt."""
        finished, folder = set(), self.folder
        for index in sorted(folder.glob("[0-9]*.index.npy")):
            shard = int(index.name.split(".")[0])
            try:
                check_shard(folder, shard)
                finished.add(shard)
            except UserError as error:
                log.warning("%s; it is made again", error)
                index.unlink()
                (folder / "store.json").unlink(missing_ok=True)
        if (folder / "store.json").exists():
            try:
                store = LabelStore(folder)
                store.verify_index()
                checksums = [shard_checksum(folder, shard) for shard in sorted(finished)]
                if store.source != self.source or store.checksums != checksums:
                    raise UserError(f"{folder / 'store.json'}: corrupt")
            except UserError as error:
                log.warning("%s; its index is written again", error)
                (folder / "store.json").unlink()
        return finished

    def _close(self) -> None:
        """Join the indexes of all shards, and describe the store."""
        folder, indexes, sizes, checksums = self.folder, [], [], []
        histogram = [np.zeros(clusters, dtype=np.int64) for clusters in self.source.clusters]
        for shard in range(self.num_shards):
            labels, index = read_labels(folder, shard), read_index(folder, shard).copy()
            for stream, counts in enumerate(histogram):
                counts += np.bincount(labels[stream], minlength=len(counts))
            lengths = index[2, :-1].copy()
            index[2, :-1] = np.cumsum(lengths) - lengths
            index[3, :-1] = (np.uint64(shard) << np.uint64(32)) | lengths
            indexes.append(index[:, :-1])
            sizes.append(labels_path(folder, shard).stat().st_size)
            checksums.append(int(index[0, -1]))
        joined = np.concatenate(indexes, axis=1)
        joined = np.ascontiguousarray(joined[:, np.lexsort((joined[1], joined[0]))])
        if same := int((joined[:2, 1:] == joined[:2, :-1]).all(axis=0).sum()):
            raise UserError(
                f"{folder}: {counted(same, 'utterance')} with the id of another; give each its own id and relabel"
            )
        write_whole(folder / "index.npy", npy_bytes(joined))
        content = self.source.described() | {
            "bytes": sizes,
            "checksums": checksums,
            "index_checksum": crc32(joined.tobytes()),
            "histogram": [counts.tolist() for counts in histogram],
        }
        write_whole(folder / "store.json", json.dumps(content).encode())


def stated_source(folder: Path) -> dict[str, Any] | None:
    """Read the source that a store, finished or not, states; restore a corrupt `source.json` from `store.json`.

    Args:
        folder: Folder of the store.

    Returns:
        Content of `source.json`; None if there is no such file, empty if it is lost.

    Raises:
        UserError: The disk is full or cannot be written to.
    """
    try:
        return read_json_object(folder / "source.json")
    except UserError as error:
        try:
            source = LabelStore(folder).source
        except UserError:
            log.warning("%s; the labels are made again", error)
            return {}
    _restore_source(folder, source)
    return source.described()


def _restore_source(folder: Path, source: LabelSource) -> None:
    write_whole(folder / "source.json", json.dumps(source.described()).encode())
    log.warning("%s: corrupt; restored from store.json", folder / "source.json")


def is_of_source(folder: Path, source: LabelSource) -> bool:
    """Return whether a store has this source, or states none; raises as `stated_source`."""
    stated = stated_source(folder)
    if not stated or stated == source.described():
        return True
    with suppress(UserError):
        if LabelStore(folder).source == source:  # a file that differs here is corrupt
            _restore_source(folder, source)
            return True
    return False
