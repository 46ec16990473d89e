"""The hand-over between iterations: features → K-means → labels, made before a fit takes its first step.

Labels are pulled: a fit states what its labels are clusters of, and `Relabel` makes them unless the run's folder holds
exactly those. No feature is ever written: a bounded sample of frames fits K-means, then every utterance is encoded,
assigned and forgotten. All ranks of the run share both passes.
"""

import json
import logging
from collections.abc import Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lhotse.cut import Cut
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from hubert_lightning import console
from hubert_lightning.data.alignments import check_alignment, phones_of
from hubert_lightning.data.corpora import Corpora
from hubert_lightning.errors import UserError, within
from hubert_lightning.features.extractors import Extractor, layer_extractor, mfcc_extractor
from hubert_lightning.features.mfcc import Part
from hubert_lightning.features.sample import sample_frames
from hubert_lightning.pretrained.formats.own import read_checkpoint
from hubert_lightning.pretrained.load import is_hub_name, located
from hubert_lightning.training.datamodules import PretrainingData
from hubert_lightning.training.distributed import on_rank_zero, together
from hubert_lightning.units.kmeans import KMeans, ScikitKMeans
from hubert_lightning.units.kmeans_file import kmeans_fingerprint, load_kmeans, load_quantizer, save_kmeans
from hubert_lightning.units.label_recipe import Stream, assign_clusters, check_features
from hubert_lightning.units.label_store import (
    LabelSource,
    LabelStore,
    begin_store,
    finish_store,
    finished_shards,
    is_of_source,
    shard_size,
    stated_source,
    write_shard,
)
from hubert_lightning.units.layer_quality import best_layer, phone_quality

log = logging.getLogger(__name__)


class Relabel(Callback):
    """Makes the labels that a pre-training run asks for, before its first step.

    Args:
        features: "mfcc", or a model, of ours or of another system, whose hidden layer is clustered.
        layer: Which Transformer layer of the checkpoint, counted from 1, or "best": the one whose clusters tell the
            phones of the validation utterances apart best; none for "mfcc".
        clusters: Number of K-means clusters; several numbers make an ensemble, a label stream of each.
        parts: Parts of MFCCs spliced over three frames, 39 dimensions each, with a K-means of their own each (product
            codes): cepstra, delta, delta_delta.
        max_frames: Frames, drawn evenly from the training utterances, that K-means is fitted on.
        kmeans: How it is fitted.
        seed: Of the sample and of K-means.
        quantizer: A K-means that somebody fitted on these features, used instead of fitting one: ours, or a file of
            scikit-learn such as the released ones, a .npy of centroids, or a torch file.
    """

    def __init__(
        self,
        features: str = "mfcc",
        layer: int | Literal["best"] | None = None,
        clusters: int | list[int] = 100,
        parts: list[Part] | None = None,
        max_frames: int = 17_280_000,
        kmeans: KMeans | ScikitKMeans | None = None,
        seed: int = 0,
        quantizer: Path | None = None,
    ) -> None:
        self.features, self.layer = features, layer
        self.clusters = [clusters] if isinstance(clusters, int) else clusters
        self.parts, self.max_frames, self.seed = parts, max_frames, seed
        self.kmeans = kmeans or KMeans()
        if not self.clusters or not all(2 <= number <= 2**16 for number in self.clusters):
            raise UserError(f"clusters {self.clusters}: each K-means has from 2 to 65536; change clusters")
        within(max(self.clusters), max_frames=max_frames)
        within(0, 2**32 - 1, seed=seed)
        if (features == "mfcc") != (layer is None):
            raise UserError(f"features {features!r} with layer {layer}: MFCCs have no layers, a checkpoint needs one")
        if parts and features != "mfcc":
            raise UserError(f"parts {', '.join(parts)} of {features}: only MFCCs have parts; leave them out")
        if features != "mfcc" and not is_hub_name(features):  # which is downloaded when it is needed
            located(features)
        self.quantizer, self.given = quantizer, None
        if quantizer:
            if layer == "best":
                raise UserError(f"{quantizer}: fitted on one layer, where layer is 'best'; say which it was")
            self.given = load_quantizer(quantizer, [stream.clusters for stream in self.streams])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PretrainingData):
            raise UserError("Relabel makes labels for PretrainingData; remove it from trainer.callbacks")
        folder, model = Path(trainer.default_root_dir), Path(self.features)
        if model.parent.name.startswith("iteration") and model.parent.resolve().parent == folder.resolve().parent:
            data.check_same(read_checkpoint(model).get(type(data).__name__), model)  # of the iteration before
        for cut in _judged(data):
            check_alignment(cut)
        extractor = self._extractor(trainer, data)
        centroids = self._centroids(trainer, data, folder / "kmeans.safetensors", extractor)
        # Sorted, so that a shard holds the same utterances in whatever order the manifests are named
        cuts = Corpora([*data.train_cuts.parts, *data.validation_cuts.parts]).by_id()
        clusters = tuple(stream.clusters for stream in self.streams)
        source = LabelSource(extractor.name, kmeans_fingerprint(centroids), cuts.fingerprint, clusters)
        data.labels = self._labels(trainer, data, folder / "labels", extractor, centroids, source, cuts)

    @property
    def streams(self) -> list[Stream]:
        parts: Sequence[Part | None] = self.parts or [None]
        return [Stream(part, clusters) for part, clusters in product(parts, self.clusters)]

    def _extractor(self, trainer: Trainer, data: PretrainingData) -> Extractor:
        if self.features == "mfcc":
            return mfcc_extractor(in_parts=bool(self.parts))
        assert self.layer is not None
        device, precision = trainer.strategy.root_device, trainer.precision_plugin.forward_context
        best = self.layer == "best"
        layer = on_rank_zero(trainer, lambda: self._best_layer(trainer, data)) if best else int(self.layer)
        return together(lambda: layer_extractor(self.features, layer, device, precision))

    def _best_layer(self, trainer: Trainer, data: PretrainingData) -> int:
        console.note("making labels (choosing the layer)")
        return best_layer(
            self.features,
            [*data.validation_cuts] or _some(data.train_cuts),
            self.clusters[0],
            Path(trainer.default_root_dir) / "layers.json",
            device=trainer.strategy.root_device,
            precision=trainer.precision_plugin.forward_context,
            seed=self.seed,
        )

    @property
    def recipe(self) -> dict[str, Any]:
        """How the labels are made, as given."""
        return {
            "features": self.features,
            "layer": self.layer,
            "clusters": self.clusters,
            "parts": self.parts,
            "max_frames": self.max_frames,
            "kmeans": {"class": type(self.kmeans).__name__, **vars(self.kmeans)},
            "seed": self.seed,
            "quantizer": self.quantizer,
        }

    def source(self, extractor: Extractor, cuts: Corpora) -> dict[str, str]:
        """Where the centroids come from: all that they depend on."""
        asked = {
            "features": extractor.name,
            "manifest": cuts.fingerprint,
            "clusters": json.dumps(self.clusters),
            "parts": json.dumps(self.parts),
        }
        if self.given:
            return asked | {"quantizer": kmeans_fingerprint(self.given[0])}  # wherever its file lies
        return asked | {
            "max_frames": str(self.max_frames),
            "seed": str(self.seed),
            "kmeans": type(self.kmeans).__name__ + json.dumps(vars(self.kmeans), sort_keys=True),
        }

    def _centroids(self, trainer: Trainer, data: PretrainingData, path: Path, extractor: Extractor) -> list[Tensor]:
        provenance = self.source(extractor, data.train_cuts)

        def there() -> bool:
            if not path.exists():
                return False
            try:
                if load_kmeans(path)[1] == provenance:
                    return True
            except ValueError:
                log.warning("%s: damaged; K-means is fitted again, and must come out the same", path)
                return False
            if _has_checkpoints(path.parent):
                raise UserError(
                    f"{path.parent}: its checkpoints were trained on labels of other features, settings or utterances "
                    f"({path.name} says which); choose another --output, or remove that folder"
                )
            return False

        if not on_rank_zero(trainer, there):
            if self.quantizer and self.given:
                fitted, source = self.given
                columns = [stream.columns for stream in self.streams]
                check_features(self.quantizer, fitted, source, extractor, columns, self.parts)
            else:
                fitted = self._fitted(trainer, data, extractor)
            on_rank_zero(trainer, lambda: _keep_kmeans(path, fitted, provenance))
        return load_kmeans(path)[0]

    def _fitted(self, trainer: Trainer, data: PretrainingData, extractor: Extractor) -> list[Tensor]:
        rows, index = together(
            lambda: sample_frames(
                extractor,
                data.train_cuts,
                self.max_frames,
                self.seed,
                batch_frames=data.max_frames,
                num_workers=data.num_workers,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                local_ranks=trainer.num_devices,
            )
        )
        device, group = trainer.strategy.root_device, dist.group.WORLD if trainer.world_size > 1 else None
        fitted = []
        if device.type == "cuda" and 2 * rows.nbytes < torch.cuda.mem_get_info(device)[0]:
            rows = rows.to(device)  # otherwise they go there in chunks, each round
        for stream in self.streams:
            frames, features = len(rows) * trainer.world_size, stream.part or extractor.name
            log.info("K-means: %d clusters of about %d frames of %s", stream.clusters, frames, features)
            sample, clusters = rows[:, stream.columns], stream.clusters
            console.note(f"making labels (K-means, {clusters} clusters)")
            fitted.append(self.kmeans.fit(sample, clusters, self.seed, index=index, group=group, device=device))
        return fitted

    def _labels(
        self,
        trainer: Trainer,
        data: PretrainingData,
        folder: Path,
        extractor: Extractor,
        centroids: list[Tensor],
        source: LabelSource,
        cuts: Sequence[Cut],
    ) -> LabelStore:
        size = shard_size(len(cuts))
        shards = [cuts[start : start + size] for start in range(0, len(cuts), size)]
        done, finished = on_rank_zero(trainer, lambda: _begun(folder, source))
        missing = [shard for shard in range(len(shards)) if shard not in done]
        mine = missing[trainer.global_rank :: trainer.world_size]
        streams = [(stream.columns, of) for stream, of in zip(self.streams, centroids, strict=True)]

        def write() -> None:
            groups = [shards[shard] for shard in mine]
            labels = assign_clusters(extractor, streams, groups, data.max_frames, data.num_workers)
            for shard, clusters in zip(mine, labels, strict=True):
                write_shard(folder, shard, clusters)

        together(write)
        if missing or not finished:
            on_rank_zero(trainer, lambda: self._report(finish_store(folder, source, len(shards)), _judged(data)))
        return LabelStore(folder)

    def _report(self, store: LabelStore, judged: Sequence[Cut]) -> None:
        """Say what the new labels are worth, where phones tell."""
        for number, stream in enumerate(self.streams if judged else []):
            numbers = "PNMI %.3f, phone purity %.3f, cluster purity %.3f, perplexity %.1f, %d dead clusters"
            quality = phone_quality(judged, store, stream.clusters, number)
            of = stream.part or store.source.features
            log.info(f"labels of {of}, {stream.clusters} clusters: {numbers}", *quality)


def _judged(data: PretrainingData) -> list[Cut]:
    """Utterances whose phones tell what labels are worth: those to validate on, or some to train on."""
    judged = [cut for cut in data.validation_cuts if phones_of(cut)]
    return judged or list(islice((cut for cut in _some(data.train_cuts) if phones_of(cut)), 1000))


def _some(cuts: Corpora) -> list[Cut]:
    """All cuts, but for a corpus on disk, whose cuts have no phones."""
    return [cut for part in cuts.parts if isinstance(part, list) for cut in part]


def _keep_kmeans(path: Path, fitted: list[Tensor], provenance: dict[str, str]) -> None:
    """Save a K-means, unless that of a run which has checkpoints was another.

    Raises:
        UserError: It was another; or the disk is full.
    """
    before = (stated_source(path.parent / "labels") or {}).get("kmeans", kmeans_fingerprint(fitted))
    if before != kmeans_fingerprint(fitted) and _has_checkpoints(path.parent):
        raise UserError(
            f"{path}: damaged or missing, and another one when fitted again, where checkpoints were trained on labels "
            "of the first; restore the file from a backup, or choose another --output"
        )
    save_kmeans(path, fitted, provenance)


def _has_checkpoints(folder: Path) -> bool:
    return any(folder.glob("*.ckpt"))


def _begun(folder: Path, source: LabelSource) -> tuple[set[int], bool]:
    """Which shards are there, and whether the store is finished.

    Raises:
        UserError: Checkpoints of the run were trained on labels of another source; or the disk is full.
    """
    if _has_checkpoints(folder.parent) and not is_of_source(folder, source):
        raise UserError(
            f"{folder.parent}: its checkpoints were trained on labels of other utterances or another K-means "
            f"({folder.name}/source.json says which); restore the manifests and files of the run, or choose another "
            "--output"
        )
    begin_store(folder, source)
    return finished_shards(folder, source), (folder / "store.json").exists()
