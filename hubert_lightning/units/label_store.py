"""Label stores: the cluster of every frame of every cut, memory-mapped, with their origin and checksums.

A store is a folder of shards (units/label_shards.py). `index.npy` joins their indexes, sorted by digest, so that any
store opens at once. `store.json` is written last: hop, clusters, source, fingerprints, sizes and checksums.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from lhotse.cut import Cut

from hubert_lightning.data.corpora import ids_and_samples
from hubert_lightning.errors import UserError
from hubert_lightning.files import read_regular
from hubert_lightning.frames import CLOCK, WINDOW, Clock, num_frames
from hubert_lightning.units.label_shards import (
    VERSION,
    LabelSource,
    check_shard,
    id_digest,
    labels_path,
    mapped_array,
    read_labels,
)

LARGEST_SHARE = 0.9
"""Share of all frames that one cluster may have: the labels of the run in fairseq issue 4521 were all the same."""


class LabelStore:
    """Labels by cut id: `store["1272-128104-0000"]` is (streams, frames) uint16, read from a memory map.

    `source` is the origin of the labels; `histogram` counts each cluster in each stream.

    Args:
        path: Folder of a finished store.

    Raises:
        UserError: The folder holds no finished store, or the size of a shard has changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not (self.path / "store.json").is_file():
            raise UserError(
                f"{path}: no finished label store (no store.json); make the labels with `hubert fit` or `hubert labels "
                "import`"
            )
        try:
            content = read_json_object(self.path / "store.json") or {}
            version, sizes, self.checksums = content.pop("version"), content.pop("bytes"), content.pop("checksums")
            self._index_checksum = content.pop("index_checksum")
            histogram = content.pop("histogram")
            content.setdefault("window", WINDOW)
            if content.keys() != {field.name for field in fields(LabelSource)}:
                raise UserError("store.json lacks the source of its labels")
            self.source = LabelSource(**content | {"clusters": tuple(content["clusters"])})
            if not isinstance(version, int) or isinstance(version, bool):
                raise UserError("store.json has values of other types")
            if version == VERSION:
                _check_numbers(self.source, sizes, self.checksums, self._index_checksum, histogram)
        except (UserError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{path}: its store.json is corrupt, or of another version; remove that folder and relabel"
            ) from error
        if version != VERSION:
            raise UserError(f"{path}: a store of version {version}, not {VERSION}; remove that folder and relabel")
        self.histogram = [np.array(counts) for counts in histogram]
        self._index = mapped_array(self.path / "index.npy", self.path / "store.json", at_random=True)
        if self._index.dtype != np.uint64 or self._index.ndim != 2 or len(self._index) != 4:
            raise UserError(f"{self.path / 'index.npy'}: corrupt; remove {self.path / 'store.json'} and relabel")
        self._keys = self._index[0]
        for shard, size in enumerate(sizes):
            file = labels_path(self.path, shard)
            if not file.exists() or file.stat().st_size != size:
                raise UserError(
                    f"{file}: cut short or missing ({size} bytes were written); relabel: only that shard is made again"
                )
        self._shards: list[np.ndarray | None] = [None] * len(sizes)

    @property
    def fingerprint(self) -> str:
        """Short name that only stores of the same labels share."""
        content = [self.source.described(), self.checksums, self._index_checksum]
        return blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return LabelStore, (self.path,)  # another process maps the files itself

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, cut_id: str) -> bool:
        return self._column(cut_id) is not None

    def num_frames(self, cut_id: str) -> int:
        """Return the number of labels of a cut."""
        return int(self._index[3, self._known_column(cut_id)]) & 0xFFFFFFFF

    def __getitem__(self, cut_id: str) -> np.ndarray:
        column = self._known_column(cut_id)
        start, packed = int(self._index[2, column]), int(self._index[3, column])
        shard, frames = packed >> 32, packed & 0xFFFFFFFF
        labels = self._shards[shard]
        if labels is None:
            labels = self._shards[shard] = self._read(shard)
        return labels[:, start : start + frames]

    def _read(self, shard: int) -> np.ndarray:
        labels = read_labels(self.path, shard, at_random=True)
        if len(labels) != len(self.source.clusters):
            raise UserError(f"{labels_path(self.path, shard)}: not labels of this store; remove it and relabel")
        return labels

    def _known_column(self, cut_id: str) -> int:
        column = self._column(cut_id)
        if column is None:
            raise KeyError(cut_id)
        return column

    def _column(self, cut_id: str) -> int | None:
        """Column of a cut in the index."""
        first, second = id_digest(cut_id)
        # uint64 as the keys are: another type would make numpy convert them all
        column = int(self._keys.searchsorted(np.uint64(first)))
        while column < len(self._keys) and int(self._keys[column]) == first:
            if int(self._index[1, column]) == second:
                return column
            column += 1
        return None

    def verify(self) -> None:
        """Read every label and compare it with its checksum.

        Raises:
            UserError: A file is corrupt; the message names the first.
        """
        for shard in range(len(self._shards)):
            check_shard(self.path, shard, self.checksums[shard])
            for labels, clusters in zip(self._read(shard), self.source.clusters, strict=True):
                if labels.size and labels.max() >= clusters:
                    raise UserError(
                        f"{labels_path(self.path, shard)}: a label of {labels.max()} for {clusters} clusters; remove "
                        f"{self.path} and relabel"
                    )
        self.verify_index()

    def verify_index(self) -> None:
        """Check that the index is whole and that every entry lies inside its shard; raises as `verify`."""
        if crc32(np.ascontiguousarray(self._index).tobytes()) != self._index_checksum:
            raise UserError(f"{self.path / 'index.npy'}: corrupt; remove {self.path / 'store.json'} and relabel")
        shard, frames = self._index[3] >> np.uint64(32), self._index[3] & np.uint64(0xFFFFFFFF)
        lengths = np.array([self._read(number).shape[1] for number in range(len(self._shards))], np.uint64)
        inside = shard < len(lengths)
        room = lengths[np.where(inside, shard, 0).astype(np.int64)] if len(lengths) else np.zeros_like(frames)
        if not (inside & (frames <= room) & (self._index[2] <= room - np.minimum(frames, room))).all():
            raise UserError(f"{self.path / 'index.npy'}: points outside of the labels; remove {self.path} and relabel")

    def check(self, cuts: Iterable[Cut], num_clusters: Sequence[int], clock: Clock = CLOCK) -> None:
        """Check that these labels belong to the cuts and the model that train on them.

        Args:
            cuts: Cuts to train on.
            num_clusters: Number of clusters that the model predicts in each stream.
            clock: Clock of its encoder.

        Raises:
            UserError: The clock, or the number of streams or of clusters, differs; a cut has no labels or another
                number of labels than frames (the message names the first); or nearly all labels are the same.
        """
        if self.source.clock != clock:
            raise UserError(
                f"{self.path}: labels of {self.source.clock.described}, but the encoder has {clock.described}; relabel "
                "for this encoder"
            )
        if self.source.clusters != tuple(num_clusters):
            labelled, predicted = (" + ".join(map(str, counts)) for counts in (self.source.clusters, num_clusters))
            raise UserError(
                f"{self.path}: labels of {labelled} clusters for a model of {predicted}; "
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
            if self.num_frames(cut_id) != num_frames(samples, clock):
                raise UserError(
                    f"{cut_id}: {self.num_frames(cut_id)} labels for {num_frames(samples, clock)} frames; "
                    f"{self.path} was made for other audio, relabel it"
                )


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Read the object in a JSON file of a store.

    Args:
        path: Path of the file.

    Returns:
        The object; None if there is no file.

    Raises:
        UserError: The file is corrupt or cannot be read.
    """
    try:
        content = json.loads(read_regular(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct that, and run again") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UserError(f"{path}: corrupt; restore it from a backup, or remove it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: corrupt; restore it from a backup, or remove it")
    return content


def _check_numbers(source: LabelSource, sizes: Any, checksums: Any, index_checksum: Any, histogram: Any) -> None:
    """Raise `UserError` if `store.json` holds values of types or in ranges that no store has."""
    texts = [source.features, source.kmeans, source.manifest]
    counts = [list(source.clusters), [source.hop, source.window, index_checksum], sizes, checksums, *histogram]
    if not all(isinstance(text, str) for text in texts) or not all(map(_are_counts, counts)):
        raise UserError("store.json has values of other types")
    if not 0 < source.hop <= 2**16 or not 0 < source.window <= 2**16 or not sizes:
        raise UserError("store.json has impossible numbers")
    if len(sizes) != len(checksums) or [*map(len, histogram)] != [*source.clusters] or not all(map(sum, histogram)):
        raise UserError("store.json has lists of different lengths")


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
