"""Shards of a label store: the labels of some utterances, an index of them, and checksums of both.

A shard is an array of clusters (`00000.npy`: streams × frames) and its index (`00000.index.npy`): digests of the
utterances' ids and their numbers of frames, one column each, and a last column of checksums. Each file appears whole or
not at all, the index last, so a shard that has an index is whole.
"""

import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from hubert_lightning.errors import UserError
from hubert_lightning.features.extractors import BESIDE
from hubert_lightning.files import write_whole
from hubert_lightning.frames import CLOCK, Clock
from hubert_lightning.untrusted.array_file import mapped

VERSION = 1
MAX_CLUSTERS = 2**16
"""Clusters that a label of 16 bits can name."""
SHARD_FILE = re.compile(r"\d{5}(\.index)?\.npy")
LAYER_OF_ENCODER = re.compile(
    r"layer (?P<layer>\d+) of encoder (?P<encoder>[^\s,]+)"
    r"(?P<brought>, mean over (?P<window>\d+) samples every (?P<hop>\d+))?"
)
"""Name of the features of a hidden layer (features/extractors.py)."""


def check_clusters(clusters: Sequence[int]) -> None:
    """Check that labels can name the clusters of every stream.

    Args:
        clusters: Number of clusters of each stream.

    Raises:
        UserError: There is no stream, or one has fewer than 2 or more than 65536 clusters.
    """
    if not clusters or not all(2 <= number <= MAX_CLUSTERS for number in clusters):
        raise UserError(f"clusters {list(clusters)}: each K-means has from 2 to {MAX_CLUSTERS}; change clusters")


@dataclass(frozen=True)
class LabelSource:
    """Origin of labels: features, K-means and utterances. Stores with equal sources hold equal labels.

    Args:
        features: "mfcc", or the layer and the fingerprint of the encoder it belongs to.
        kmeans: Fingerprint of the centroids.
        manifest: Fingerprint of the labelled cuts.
        clusters: Number of K-means clusters of each stream.
        hop: Samples from one label to the next.
        window: Samples of the frame of a label.

    Raises:
        UserError: A number of clusters is out of range.
    """

    features: str
    kmeans: str
    manifest: str
    clusters: tuple[int, ...]
    hop: int = CLOCK.hop
    window: int = CLOCK.window

    def __post_init__(self) -> None:
        check_clusters(self.clusters)

    @property
    def clock(self) -> Clock:
        """Clock of the labels."""
        return Clock(self.hop, self.window)

    def described(self) -> dict[str, Any]:
        """Return the fields and the version of the format, as a store states them in JSON."""
        described = {"version": VERSION} | asdict(self) | {"clusters": list(self.clusters)}
        if self.window == CLOCK.window:  # earlier versions had no other
            del described["window"]
        return described

    def origin(self) -> dict[str, Any]:
        """Return features, layer, clusters and fingerprints by the names that a run records them under.

        Layer and fingerprint of the teacher are lists, one item for each of several features.
        """
        models = [LAYER_OF_ENCODER.fullmatch(name) for name in self.features.split(BESIDE)]
        layers = [int(model["layer"]) if model else None for model in models]
        encoders = [model["encoder"] if model else None for model in models]
        return {
            "features": self.features,
            "layer": layers if len(layers) > 1 else layers[0],
            "teacher_fingerprint": encoders if len(encoders) > 1 else encoders[0],
            "clusters": list(self.clusters),
            "kmeans_fingerprint": self.kmeans,
            "manifest_fingerprint": self.manifest,
        }


def id_digest(cut_id: str) -> tuple[int, int]:
    """Return the 128 bits by which an index names an utterance, in two halves."""
    digest = blake2b(cut_id.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8]), int.from_bytes(digest[8:])


def labels_path(folder: Path, shard: int) -> Path:
    """Return the path of a shard's labels."""
    return folder / f"{shard:05d}.npy"


def index_path(folder: Path, shard: int) -> Path:
    """Return the path of a shard's index."""
    return folder / f"{shard:05d}.index.npy"


def write_shard(folder: Path, shard: int, labels: Mapping[str, np.ndarray]) -> None:
    """Write the labels of some cuts.

    Args:
        folder: Folder of the store.
        shard: Number of the shard.
        labels: (streams, frames) integers below 65536 by cut id.

    Raises:
        UserError: The disk is full or cannot be written to; earlier shards stay.
    """
    clusters = np.concatenate([np.asarray(streams) for streams in labels.values()], axis=1).astype(np.uint16)
    index = np.zeros((4, len(labels) + 1), dtype=np.uint64)
    index[:2, :-1] = np.array([id_digest(cut_id) for cut_id in labels], dtype=np.uint64).T
    index[2, :-1] = [streams.shape[1] for streams in labels.values()]
    index[:2, -1] = crc32(clusters.tobytes()), crc32(index[:, :-1].tobytes())
    write_whole(labels_path(folder, shard), npy_bytes(clusters))
    write_whole(index_path(folder, shard), npy_bytes(index))


def read_labels(folder: Path, shard: int, at_random: bool = False) -> np.ndarray:
    """Map the labels of a shard.

    Args:
        folder: Folder of the store.
        shard: Number of the shard.
        at_random: Whether utterances are read in random order, so that reading ahead does not pay.

    Returns:
        (streams, frames) uint16.

    Raises:
        UserError: The file is missing or corrupt.
    """
    file = labels_path(folder, shard)
    labels = mapped_array(file, file, at_random)
    if labels.dtype != np.uint16 or labels.ndim != 2 or not labels.flags.c_contiguous:
        raise UserError(f"{file}: corrupt; remove {file} and relabel")
    return labels


def read_index(folder: Path, shard: int) -> np.ndarray:
    """Map the index of a shard.

    Args:
        folder: Folder of the store.
        shard: Number of the shard.

    Returns:
        (4, utterances + 1) uint64.

    Raises:
        UserError: The file is missing or corrupt.
    """
    file = index_path(folder, shard)
    index = mapped_array(file, file)
    if index.dtype != np.uint64 or index.ndim != 2 or len(index) != 4 or not index.shape[1]:
        raise UserError(f"{file}: corrupt; remove {file} and relabel")
    return index


def shard_checksum(folder: Path, shard: int) -> int:
    """Return the checksum of a shard's labels that its index holds; raises as `read_index`."""
    return int(read_index(folder, shard)[0, -1])


def check_shard(folder: Path, shard: int, checksum: int | None = None) -> None:
    """Compare a shard with its checksums.

    Args:
        folder: Folder of the store.
        shard: Number of the shard.
        checksum: Checksum of the labels; the one in the shard's index if not given.

    Raises:
        UserError: A file is missing or corrupt.
    """
    labels, index = read_labels(folder, shard), read_index(folder, shard)
    if int(index[1, -1]) != crc32(np.ascontiguousarray(index[:, :-1]).tobytes()):
        raise UserError(f"{index_path(folder, shard)}: corrupt; remove {index_path(folder, shard)} and relabel")
    expected = int(index[0, -1]) if checksum is None else checksum
    if int(index[0, -1]) != expected or crc32(labels.data) != expected:
        config, metrics = folder.parent / "config.yaml", folder.parent / "metrics.json"
        command = f"`hubert fit --config {config}` makes only that shard again"
        raise UserError(
            f"{labels_path(folder, shard)}: corrupt (its checksum differs); remove it, "
            + (f"and {metrics} if the run is finished; {command}" if config.exists() else "and make the labels again")
        )


def mapped_array(file: Path, remove: Path, at_random: bool = False) -> np.ndarray:
    """Map an array of a store.

    Args:
        file: File of the array.
        remove: File to remove so that the array is made again, if it cannot be read.
        at_random: Whether its parts are read in random order.

    Returns:
        The array, read-only.

    Raises:
        UserError: The file is missing or corrupt.
    """
    try:
        array = mapped(file)
    except UserError as error:
        raise UserError(f"{file}: corrupt or missing; remove {remove} and relabel") from error
    if at_random and hasattr(mmap, "MADV_RANDOM") and isinstance(array.base, mmap.mmap):
        array.base.madvise(mmap.MADV_RANDOM)  # neighbours of an utterance belong to others: read no more than it
    return np.asarray(array)  # a plain array: np.memmap is slow to slice


def npy_bytes(array: np.ndarray) -> memoryview:
    """Return the content of a `.npy` file: np.save into a file does not say why it failed."""
    file = BytesIO()
    np.save(file, array)
    return file.getbuffer()
