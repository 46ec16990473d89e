"""The hand-over between iterations: features → K-means → labels, made before a fit takes its first step.

Labels are pulled: a fit states what its labels are clusters of, and `Relabel` makes them unless the run's folder holds
exactly those. No feature is ever written: a bounded sample of frames fits K-means, then every utterance is encoded,
assigned and forgotten.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lightning import Callback, LightningModule, Trainer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from hubert_lightning.clustering import kmeans
from hubert_lightning.clustering.mfcc import mfcc
from hubert_lightning.clustering.quality import Quality, frame_phones, joint_counts
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.datamodule import PretrainingData
from hubert_lightning.data.labels import (
    LabelSource,
    LabelStore,
    begin_store,
    finish_store,
    finished_shards,
    write_shard,
)
from hubert_lightning.data.manifest import fingerprint
from hubert_lightning.frames import num_frames
from hubert_lightning.model.pretrained import encoder_fingerprint, load_encoder

log = logging.getLogger(__name__)

SHARD = 1000  # cuts whose labels are written together: what an interruption costs at most

Features = Callable[[Tensor], Tensor]
"""waveform (samples,) → (frames, dim), one row per 20 ms"""


class Relabel(Callback):
    """Makes the labels that a pre-training run asks for, before its first step.

    Args:
        features: "mfcc", or a checkpoint (or transformers directory) whose hidden layer is clustered.
        layer: Which Transformer layer of the checkpoint, counted from 1; none for "mfcc".
        clusters: Number of K-means clusters.
        max_frames: Frames, drawn evenly from the training utterances, that K-means is fitted on.
        seed: Of the sample and of K-means.
    """

    def __init__(
        self,
        features: str = "mfcc",
        layer: int | None = None,
        clusters: int = 100,
        max_frames: int = 300_000,
        seed: int = 0,
    ) -> None:
        self.features, self.layer, self.clusters = features, layer, clusters
        self.max_frames, self.seed = max_frames, seed
        if (features == "mfcc") != (layer is None):
            raise ValueError(f"features {features!r} with layer {layer}: MFCCs have no layers, a checkpoint needs one")
        if features != "mfcc" and not Path(features).exists():
            raise ValueError(f"{features}: no such checkpoint to take features from; correct the path, or say 'mfcc'")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PretrainingData):
            raise ValueError("Relabel makes labels for PretrainingData; remove it from trainer.callbacks")
        folder = Path(trainer.default_root_dir)
        features, name = extractor(self.features, self.layer, trainer.strategy.root_device)
        train = data.train_cuts
        centroids = self._centroids(trainer, folder / "kmeans.safetensors", features, name, train)
        # Sorted, so that a shard holds the same utterances in whatever order the manifests are named
        cuts = CutSet.from_cuts(sorted([*train, *data.validation_cuts], key=lambda cut: cut.id))
        source = LabelSource(name, kmeans.fingerprint(centroids), fingerprint(cuts), self.clusters)
        data.labels = self._labels(trainer, folder / "labels", features, centroids, source, list(cuts))

    def _centroids(self, trainer: Trainer, path: Path, features: Features, name: str, cuts: CutSet) -> Tensor:
        provenance = {
            "features": name,
            "manifest": fingerprint(cuts),
            "clusters": str(self.clusters),
            "max_frames": str(self.max_frames),
            "seed": str(self.seed),
        }
        if trainer.is_global_zero and not (path.exists() and kmeans.load_kmeans(path)[1] == provenance):
            if path.exists() and any(path.parent.glob("*.ckpt")):
                raise ValueError(
                    f"{path.parent}: its checkpoints were trained on labels of other features, settings or utterances "
                    f"({path.name} says which); choose another --output, or remove that folder"
                )
            sample = sample_frames(features, list(cuts), self.max_frames, self.seed)
            log.warning("K-means: %d clusters of %d frames of %s", self.clusters, len(sample), name)
            kmeans.save_kmeans(path, kmeans.fit_kmeans(sample, self.clusters, self.seed), provenance)
        trainer.strategy.barrier("K-means is fitted")
        return kmeans.load_kmeans(path)[0]

    def _labels(
        self,
        trainer: Trainer,
        folder: Path,
        features: Features,
        centroids: Tensor,
        source: LabelSource,
        cuts: Sequence[Cut],
    ) -> LabelStore:
        shards = [cuts[start : start + SHARD] for start in range(0, len(cuts), SHARD)]
        there = trainer.is_global_zero and (folder / "store.json").exists() and LabelStore(folder).source == source
        if trainer.strategy.broadcast(there):
            return LabelStore(folder)
        if trainer.is_global_zero:
            if (folder / "store.json").exists():
                log.warning(
                    "%s: labels of %s, not those that are asked for: made anew", folder, LabelStore(folder).source
                )
            begin_store(folder, source)
        trainer.strategy.barrier("the label store is begun")
        done = finished_shards(folder, source)
        for shard in range(trainer.global_rank, len(shards), trainer.world_size):
            if shard not in done:
                write_shard(folder, shard, assign_clusters(features, centroids, shards[shard]))
        trainer.strategy.barrier("every shard is written")
        if trainer.is_global_zero:
            finish_store(folder, source, len(shards))
        trainer.strategy.barrier("the label store is finished")
        return LabelStore(folder)


def extractor(features: str, layer: int | None, device: torch.device) -> tuple[Features, str]:
    """The function from a waveform to its features, and a name that only equal functions share."""
    if features == "mfcc":
        # K-means sees the 10 ms frames that the encoder has too: every other one, as the reference takes labels
        return lambda waveform: mfcc(waveform)[::2], "mfcc"
    assert layer is not None
    encoder = load_encoder(features).to(device)
    name = f"layer {layer} of encoder {encoder_fingerprint(encoder)}"
    return lambda waveform: encoder.features(waveform[None].to(device), layer=layer)[0], name


@torch.no_grad()
def sample_frames(features: Features, cuts: Sequence[Cut], max_frames: int, seed: int) -> np.ndarray:
    """A uniform sample of the frames of randomly chosen utterances, four times as much audio as is kept.

    Neighbouring frames are alike, so they come from more utterances than would be enough; not from all, since a large
    corpus would then be encoded twice.

    returns: (about max_frames or all there are, dim) float32
    """
    rng = np.random.default_rng(seed)
    cuts = [cuts[place] for place in rng.permutation(len(cuts)).tolist()]
    ends = np.cumsum([num_frames(cut.num_samples) for cut in cuts])
    cuts = cuts[: int(np.searchsorted(ends, 4 * max_frames)) + 1]
    share = max_frames / ends[len(cuts) - 1]
    rows = []
    for cut in _hours_done(cuts, "K-means sample"):
        frames = features(read_waveform(cut)).float().cpu().numpy()
        rows.append(frames[rng.random(len(frames)) < share])
    return np.concatenate(rows)


@torch.no_grad()
def assign_clusters(features: Features, centroids: Tensor, cuts: Sequence[Cut]) -> dict[str, np.ndarray]:
    """The cluster of every frame: id → (frames,)."""
    clusters = {}
    for cut in _hours_done(cuts, "labels"):
        rows = features(read_waveform(cut))
        clusters[cut.id] = kmeans.assign(rows, centroids.to(rows.device)).cpu().numpy()
    return clusters


def phone_quality(cuts: CutSet, clusters: LabelStore | dict[str, np.ndarray], num_clusters: int) -> Quality:
    """How well clusters tell phones apart, over the cuts that carry a phone alignment.

    Raises:
        ValueError: No cut has phones.
    """
    phones, labels = [], []
    for cut in cuts:
        aligned = [phone for segment in cut.supervisions for phone in (segment.alignment or {}).get("phone", [])]
        if aligned:
            spans = [(phone.start, phone.duration, phone.symbol) for phone in aligned]
            named = np.array(frame_phones(spans, num_frames(cut.num_samples)))
            phones.append(named[named != ""])
            labels.append(clusters[cut.id][named != ""])
    if not phones:
        raise ValueError("no cut has a phone alignment; cluster quality needs one")
    return Quality.of(joint_counts(np.concatenate(phones), np.concatenate(labels), num_clusters))


def _hours_done(cuts: Sequence[Cut], what: str) -> Iterator[Cut]:
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.2f} of {task.total:.2f} h, left:"),
    ]
    with Progress(*columns, TimeRemainingColumn(), transient=True) as progress:
        task = progress.add_task(what, total=sum(cut.duration for cut in cuts) / 3600)
        for cut in cuts:
            yield cut
            progress.advance(task, cut.duration / 3600)
