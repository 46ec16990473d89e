"""The cluster of every frame of every cut, memory-mapped, with what a reader must know kept beside it.

A store is a folder. Each shard is an array of clusters (`00000.npy`) and its index (`00000.json`: ids and frames),
each written under another name and then renamed, the index last, so a shard that has an index is whole.
`store.json` comes after the last shard: hop, number of clusters, source, fingerprints, and the size of every shard.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from lhotse import CutSet

from hubert_lightning.frames import HOP, num_frames


@dataclass(frozen=True)
class LabelSource:
    """What the labels are clusters of. Two stores with equal sources hold equal labels.

    Args:
        features: "mfcc", or the layer and the fingerprint of the encoder it belongs to.
        kmeans: Fingerprint of the centroids.
        manifest: Fingerprint of the labelled cuts.
        clusters: Number of K-means clusters.
        hop: Samples from one label to the next.
    """

    features: str
    kmeans: str
    manifest: str
    clusters: int
    hop: int = HOP


def finished_shards(folder: Path, source: LabelSource) -> set[int]:
    """The shards of an interrupted store that need not be made again: those of the same source."""
    if _read_json(folder / "source.json") != asdict(source):
        return set()
    return {int(index.stem) for index in folder.glob("[0-9]*.json")}


def begin_store(folder: Path, source: LabelSource) -> None:
    """Make room for a store; labels of another source that lie in the folder are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    if _read_json(folder / "source.json") == asdict(source):
        return
    for old in [folder / "store.json", *folder.glob("[0-9]*.json"), *folder.glob("[0-9]*.npy")]:
        old.unlink(missing_ok=True)
    _write_json(folder / "source.json", asdict(source))


def write_shard(folder: Path, shard: int, clusters: Mapping[str, np.ndarray]) -> None:
    """Write the labels of some cuts: id → (frames,) integers below 65536."""
    name = f"{shard:05d}"
    part = folder / f"{name}.npy.part"
    with part.open("wb") as file:
        np.save(file, np.concatenate([np.asarray(c) for c in clusters.values()]).astype(np.uint16))
    os.replace(part, folder / f"{name}.npy")
    _write_json(folder / f"{name}.json", {cut_id: len(c) for cut_id, c in clusters.items()})


def finish_store(folder: Path, source: LabelSource, num_shards: int) -> "LabelStore":
    """Close a store of which every shard is written, and open it."""
    histogram = np.zeros(source.clusters, dtype=np.int64)
    sizes = []
    for shard in range(num_shards):
        labels = np.load(folder / f"{shard:05d}.npy", mmap_mode="r")
        histogram += np.bincount(labels, minlength=source.clusters)
        sizes.append(len(labels))
    _write_json(folder / "store.json", asdict(source) | {"frames": sizes, "histogram": histogram.tolist()})
    return LabelStore(folder)


class LabelStore:
    """Labels by cut id: `store["1272-128104-0000"]` is (frames,) uint16, read from a memory map.

    Args:
        path: The folder of a finished store.

    Raises:
        ValueError: The folder is no store, was not finished, or a shard is not as long as it was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not (self.path / "store.json").exists():
            raise ValueError(
                f"{path}: no finished label store (no store.json); let the Relabel callback make the labels"
            )
        try:
            about = _read_json(self.path / "store.json") or {}
            self.histogram, sizes = np.array(about.pop("histogram")), about.pop("frames")
            self.source = LabelSource(**about)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: its store.json is damaged; remove that folder and relabel") from error
        self._shards, self._place = [], {}
        for shard, size in enumerate(sizes):
            file = self.path / f"{shard:05d}.npy"
            index = _read_json(file.with_suffix(".json")) or {}
            try:
                labels = np.load(file, mmap_mode="r")
            except (OSError, ValueError):
                labels = np.empty(0)
            if len(labels) != size or sum(index.values()) != size:
                raise ValueError(
                    f"{file}: cut short or missing ({size} labels were written); remove {path} and relabel"
                )
            self._shards.append(labels)
            ends = np.cumsum(list(index.values()))
            for cut_id, end, frames in zip(index, ends, index.values(), strict=True):
                self._place[cut_id] = (shard, int(end) - frames, int(end))

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, cut_id: str) -> bool:
        return cut_id in self._place

    def __getitem__(self, cut_id: str) -> np.ndarray:
        shard, start, end = self._place[cut_id]
        return self._shards[shard][start:end]

    def check(self, cuts: CutSet | Iterable, num_clusters: int) -> None:
        """Refuse to train on labels that do not belong to these cuts and this model.

        Raises:
            ValueError: Another hop or number of clusters, a cut without labels or with a label count that is not its
                frame count (the first such cut is named), or labels that are all the same.
        """
        if self.source.hop != HOP:
            raise ValueError(
                f"{self.path}: labels have a hop of {self.source.hop} samples, the encoder {HOP}; relabel at {HOP}"
            )
        if self.source.clusters != num_clusters:
            raise ValueError(
                f"{self.path}: labels of {self.source.clusters} clusters for a model of {num_clusters}; "
                f"set model.init_args.num_clusters to {self.source.clusters} or relabel"
            )
        if (self.histogram > 0).sum() < 2:
            raise ValueError(f"{self.path}: every frame has the same cluster; nothing can be learnt from it, relabel")
        for cut in cuts:
            if cut.id not in self:
                raise ValueError(
                    f"{cut.id}: no labels in {self.path}, which was made for another manifest; relabel this one"
                )
            _, start, end = self._place[cut.id]
            if end - start != num_frames(cut.num_samples):
                raise ValueError(
                    f"{cut.id}: {end - start} labels for {num_frames(cut.num_samples)} frames; "
                    f"{self.path} was made for other audio, relabel it"
                )


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _write_json(path: Path, content: dict) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    os.replace(part, path)
