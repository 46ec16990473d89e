"""Labels of a run, made before its first step: features → K-means → labels.

A fit states the features and clusters of its labels, and `Relabel` makes the labels unless the run's folder already
holds them. Features are never written to disk: K-means is fitted on a bounded sample of frames, then every utterance is
encoded and assigned to clusters. All ranks of the run share both passes.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from lhotse.cut import Cut
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from hubert_lightning import current_work
from hubert_lightning.data.alignments import check_alignment, phones_of
from hubert_lightning.data.corpora import Corpora
from hubert_lightning.errors import UserError
from hubert_lightning.features.extract import frames_at_once
from hubert_lightning.features.extractors import Extractor, combined_extractor, mfcc_extractor
from hubert_lightning.features.mfcc import MfccPart
from hubert_lightning.features.sample import choose_frames, sample_frames
from hubert_lightning.files import write_whole
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.pretrained.formats.own import read_checkpoint
from hubert_lightning.pretrained.load import is_hub_name, located
from hubert_lightning.training.distributed import on_rank_zero, together
from hubert_lightning.training.pretraining import HubertPretraining
from hubert_lightning.training.pretraining_data import PretrainingData
from hubert_lightning.units.automatic import LAYERS, Choice, choose
from hubert_lightning.units.kmeans import KMeans, ScikitKMeans
from hubert_lightning.units.kmeans_file import kmeans_fingerprint, load_kmeans, save_kmeans
from hubert_lightning.units.kmeans_sample import Sample
from hubert_lightning.units.label_recipe import LabelRecipe, Stream, assign_clusters, check_features
from hubert_lightning.units.label_shards import LabelSource
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.label_writer import LabelWriter, is_of_source, shards_of, stated_source
from hubert_lightning.units.layer_quality import best_layer, phone_quality
from hubert_lightning.units.residual import fit_streams
from hubert_lightning.untrusted.json_file import read_json_object

log = logging.getLogger(__name__)

LABELLING = "labelling.json"
"""File in a run's folder that says how its labels were made."""

T = TypeVar("T")


class Relabel(Callback):
    """Make the labels of a pre-training run before its first step.

    Args:
        features: "mfcc", or a model in any format, whose hidden layer is clustered; several make a label stream each.
        layer: Transformer layer of the model, counted from 1; "best", by the PNMI with the phones of the validation
            utterances; "auto", chosen without phones; None for "mfcc". Several layers make a label stream each, of one
            model or of as many models.
        clusters: Number of K-means clusters, or "auto", which chooses from 50, 100, 200 and 500 without phones; several
            numbers make an ensemble, one label stream each.
        parts: Parts of MFCCs spliced over three frames, 39 dimensions each, each with its own K-means (product codes):
            cepstra, delta, delta_delta.
        max_frames: Frames that K-means is fitted on, a uniform sample of the training utterances.
        kmeans: K-means algorithm; hubert_lightning.KMeans if not given.
        seed: Seed of the sample and of K-means.
        quantizer: File of a K-means that was fitted on these features, used instead of fitting one: ours, one of
            scikit-learn such as the released quantizers, a .npy of centroids, or a torch file.
        residual: Number of stages of residual K-means, one label stream each: every stage clusters the features minus
            their nearest centroids of the stages before.
        continues: Folder of a run that this one continues: training starts from its checkpoint, with the optimizer, the
            order of the data and the schedule, and K-means from its labels, so that clusters keep their numbers.

    Raises:
        UserError: The arguments contradict each other, or a file cannot be used.
    """

    def __init__(
        self,
        features: str | list[str] = LabelRecipe.features,
        layer: int | Literal["best", "auto"] | list[int | None] | None = None,
        clusters: int | list[int] | Literal["auto"] = LabelRecipe.clusters,
        parts: list[MfccPart] | None = None,
        max_frames: int = LabelRecipe.max_frames,
        kmeans: KMeans | ScikitKMeans | None = None,
        seed: int = 0,
        quantizer: Path | None = None,
        residual: int = LabelRecipe.residual,
        continues: Path | None = None,
    ) -> None:
        self.continues = continues
        self.recipe = LabelRecipe(features, layer, clusters, parts, max_frames, kmeans, seed, quantizer, residual)
        for model in self.recipe.models:
            if not is_hub_name(model):  # which is downloaded when it is needed
                located(model)
        _ = self.recipe.given  # refuses a quantizer that cannot be used

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PretrainingData):
            raise UserError("Relabel makes labels for PretrainingData; remove it from trainer.callbacks")
        self._made: dict[str, Any] = {}
        self._before = self._labels_before(data)
        start = time.perf_counter()
        self._settle(trainer, pl_module, data)
        folder = Path(trainer.default_root_dir)
        for model in map(Path, self.recipe.models):
            if model.parent.name.startswith("iteration") and model.parent.resolve().parent == folder.resolve().parent:
                data.check_same(read_checkpoint(model).get(type(data).__name__), model)  # of the iteration before
        for cut in _judged(data):
            check_alignment(cut)
        extractor = self._extractor(trainer, data)
        centroids = self._centroids(trainer, data, folder / "kmeans.safetensors", extractor)
        # Sorted, so that a shard holds the same utterances in whatever order the manifests are named
        cuts = Corpora([*data.train_cuts.parts, *data.validation_cuts.parts]).by_id()
        clusters = tuple(self.recipe.num_clusters)
        kmeans = kmeans_fingerprint(centroids)
        source = LabelSource(extractor.name, kmeans, cuts.fingerprint, clusters, *extractor.clock)
        data.labels = self._labels(trainer, data, folder / "labels", extractor, centroids, source, cuts)
        if self._made:
            made = self._made | {"seconds": round(time.perf_counter() - start, 3)}
            on_rank_zero(trainer, lambda: _keep_labelling(folder, source.kmeans, made))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Forget best scores and patience of the run that this one continues, which are those of other labels."""
        kept = Path(str(trainer.ckpt_path)).resolve().parent == Path(trainer.default_root_dir).resolve()
        if self.continues is not None and not kept:
            checkpoint["callbacks"] = {}

    def _labels_before(self, data: PretrainingData) -> LabelStore | None:
        """Open the labels of the run that this one continues.

        Raises:
            UserError: They are not there, or have other clusters.
        """
        if self.continues is None:
            return None
        store = LabelStore(self.continues / "labels")
        if (clusters := self.recipe.num_clusters) != list(store.source.clusters):
            raise UserError(
                f"{self.continues}: its labels have {list(store.source.clusters)} clusters, those to make {clusters}; "
                "give as many, or do not continue that run"
            )
        data.continued_labels = store.fingerprint
        return store

    def record(self, labels: LabelStore) -> dict[str, Any]:
        """Describe the labels of a run and how they were made, for the loggers.

        Args:
            labels: The labels.

        Returns:
            Settings of the recipe, fingerprints, and the inertia and the quality that labelling found.
        """
        origin, made = labels.source.origin(), labelling(labels.path.parent, labels.source.kmeans)
        recipe = {name: value for name, value in self.recipe.as_record().items() if value is not None}
        recipe |= {} if self.continues is None else {"continues": str(self.continues)}
        streams = made.get("streams") or []
        # Four digits, since sums of float32 differ in the last ones from run to run
        inertias = [float(f"{stream['inertia'][-1]:.4g}") for stream in streams if stream.get("inertia")]
        quality = [
            {name: float(f"{value:.4g}") for name, value in stream["quality"].items()}
            for stream in streams
            if stream.get("quality")
        ]
        return {
            **recipe,
            **{name: value for name, value in origin.items() if name != "features"},
            "clusters": recipe["clusters"],
            "fingerprint": labels.fingerprint,
            "kmeans_inertia": inertias or None,
            **{name: [measures[name] for measures in quality] for name in (quality[0] if quality else ())},
        }

    def _extractor(self, trainer: Trainer, data: PretrainingData) -> Extractor:
        recipe = self.recipe
        if recipe.parts:
            return mfcc_extractor(True, data.clock)
        device, precision = trainer.strategy.root_device, trainer.precision_plugin.forward_context
        known = recipe.known_sources
        layer = None if known is not None else on_rank_zero(trainer, lambda: self._best_layer(trainer, data))
        sources = [(recipe.models[0], layer)] if known is None else known
        return together(lambda: combined_extractor(sources, device, precision, data.clock))

    def _settle(self, trainer: Trainer, pl_module: LightningModule, data: PretrainingData) -> None:
        """Choose what the recipe leaves to `auto`, and give the model heads of as many clusters."""
        if not (recipe := self.recipe).is_auto_layer and not recipe.is_auto_clusters:
            return
        if recipe.is_auto_clusters and getattr(pl_module, "keep_head", False):
            raise UserError("clusters is 'auto', but keep_head keeps the clusters of another model; name their number")

        def chosen() -> Choice:
            current_work.note("making labels (choosing layer and clusters)")
            return choose(
                recipe,
                data.train_cuts,
                data.train_cuts.fingerprint,
                Path(trainer.default_root_dir) / LAYERS,
                device=trainer.strategy.root_device,
                precision=trainer.precision_plugin.forward_context,
                num_workers=data.num_workers,
                clock=data.clock,
            )

        choice = on_rank_zero(trainer, chosen)
        self.recipe = replace(recipe, layer=choice.layer, clusters=choice.clusters)
        if recipe.is_auto_clusters and pl_module.num_clusters != self.recipe.num_clusters:
            assert isinstance(pl_module, HubertPretraining)
            pl_module.replace_heads(self.recipe.num_clusters, recipe.seed)

    def _best_layer(self, trainer: Trainer, data: PretrainingData) -> int:
        current_work.note("making labels (choosing the layer)")
        return best_layer(
            self.recipe.models[0],
            [*data.validation_cuts] or _listed(data.train_cuts),
            self.recipe.num_clusters[0],
            Path(trainer.default_root_dir) / LAYERS,
            device=trainer.strategy.root_device,
            precision=trainer.precision_plugin.forward_context,
            seed=self.recipe.seed,
            num_workers=data.num_workers,
            clock=data.clock,
        )

    def _centroids(self, trainer: Trainer, data: PretrainingData, path: Path, extractor: Extractor) -> list[Tensor]:
        source = self.recipe.source(extractor, data.train_cuts.fingerprint)
        if self._before is not None:
            source["start"] = self._before.fingerprint
        source |= {} if self.recipe.quantizer else data.balance.source(data.train_cuts)
        if not on_rank_zero(trainer, lambda: _is_fitted(path, source)):
            if self.recipe.quantizer and self.recipe.given:
                fitted, stated = self.recipe.given
                columns = [stream.columns(extractor) for stream in self.recipe.streams]
                check_features(self.recipe.quantizer, fitted, stated, extractor, columns, self.recipe.parts)
            else:
                fitted = self._fitted(trainer, data, extractor)
            made = {"streams": self._made.get("streams", [])}

            def keep() -> None:
                _keep_kmeans(path, fitted, source)
                _keep_labelling(path.parent, kmeans_fingerprint(fitted), made)

            on_rank_zero(trainer, keep)
        return load_kmeans(path)[0]

    def _fitted(self, trainer: Trainer, data: PretrainingData, extractor: Extractor) -> list[Tensor]:
        rows, index = together(
            lambda: sample_frames(
                extractor,
                data.train_cuts,
                self.recipe.max_frames,
                self.recipe.seed,
                batch_frames=max(data.max_frames, frames_at_once(extractor.device, extractor.clock)),
                num_workers=data.num_workers,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                local_ranks=trainer.num_devices,
                balance=data.balance,
            )
        )
        device, group = trainer.strategy.root_device, dist.group.WORLD if trainer.world_size > 1 else None
        kmeans = self.recipe.kmeans or KMeans()
        self._made["streams"] = []
        if rows.device != device and device.type == "cuda" and 2 * rows.nbytes < torch.cuda.mem_get_info(device)[0]:
            rows = rows.to(device)  # otherwise each round moves them in chunks

        before = self._clusters_before(trainer, data)

        def fit(stream: Stream, sample: Tensor) -> Tensor:
            frames, features = len(rows) * trainer.world_size, stream.name_in(extractor.name)
            log.info("K-means: %d clusters of about %d frames of %s", stream.clusters, frames, features)
            clusters = stream.clusters
            current_work.note(f"making labels (K-means, {clusters} clusters)")
            inertia: list[float] = []
            settings: dict[str, Any] = {"index": index, "group": group, "device": device, "report": inertia.append}
            if before is not None:
                number = len(self._made["streams"])
                means = Sample(sample, index, self.recipe.seed, group, device).means_of(before[:, number], clusters)
                settings["start"] = means.means.masked_fill(means.counts[:, None] == 0, math.nan).float()
            centroids = kmeans.fit(sample, clusters, self.recipe.seed, **settings)
            several = {"features": features} if len(self.recipe.sources) > 1 or self.recipe.residual > 1 else {}
            self._made["streams"].append({"clusters": clusters, "part": stream.part, "inertia": inertia} | several)
            return centroids

        streams = [(stream.columns(extractor), stream) for stream in self.recipe.streams]
        return fit_streams(rows, streams, self.recipe.residual, fit, device)

    def _clusters_before(self, trainer: Trainer, data: PretrainingData) -> Tensor | None:
        """Clusters (rows, streams) of the frames of this rank's sample in the run that this one continues."""
        if self._before is None:
            return None
        cuts, chosen = choose_frames(
            data.train_cuts, self.recipe.max_frames, self.recipe.seed, data.balance, data.clock
        )
        own = range(trainer.global_rank, len(cuts), trainer.world_size)
        clusters = [self._before[cuts[number].id][:, chosen[number]] for number in own]
        streams = len(self.recipe.num_clusters)
        joined = np.concatenate([np.empty((streams, 0), np.uint16), *clusters], axis=1)
        return torch.from_numpy(joined.astype(np.int32).T)

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
        shards = shards_of(cuts)
        columns = [stream.columns(extractor) for stream in self.recipe.streams]
        streams = list(zip(columns, centroids, strict=True))

        def once(work: Callable[[], T]) -> T:
            return on_rank_zero(trainer, work)

        def write() -> None:
            own_shards = writer.missing[trainer.global_rank :: trainer.world_size]
            groups = [shards[shard] for shard in own_shards]
            batch_frames = max(data.max_frames, frames_at_once(extractor.device, extractor.clock))
            settings = {"ranks": trainer.world_size, "residual": self.recipe.residual}
            labels = assign_clusters(extractor, streams, groups, batch_frames, data.num_workers, **settings)
            for shard, clusters in zip(own_shards, labels, strict=True):
                writer.write(shard, clusters)

        once(lambda: _check_trained(folder, source))
        start = time.perf_counter()
        with LabelWriter(folder, source, len(shards), once) as writer:
            together(write)
        if not writer.was_complete:
            samples = sum(cut.num_samples for shard in writer.missing for cut in shards[shard])
            self._made["hours"] = samples / SAMPLE_RATE / 3600
            self._made["hours_per_hour"] = samples / SAMPLE_RATE / (time.perf_counter() - start)
            self._made["quality"] = once(lambda: self._report(LabelStore(folder), _judged(data)))
        return LabelStore(folder)

    def _report(self, store: LabelStore, judged: Sequence[Cut]) -> list[dict[str, float]]:
        """Log the quality of the new labels, if there are utterances with phones.

        Returns:
            Measures of each stream by name.
        """
        measured = []
        for number, stream in enumerate(self.recipe.streams if judged else []):
            numbers = "PNMI %.3f, phone purity %.3f, cluster purity %.3f, perplexity %.1f, %d dead clusters"
            quality = phone_quality(judged, store, stream.clusters, number)
            features = stream.name_in(store.source.features)
            log.info(f"labels of {features}, {stream.clusters} clusters: {numbers}", *quality)
            measured.append({name: float(value) for name, value in quality._asdict().items()})
        return measured


def labelling(folder: Path, kmeans: str) -> dict[str, Any]:
    """Read how the labels of a run were made.

    Args:
        folder: Folder of the run.
        kmeans: Fingerprint of its K-means.

    Returns:
        "seconds" of the whole, "hours" of audio that were labelled and "hours_per_hour", their speed; and for each of
        the "streams" its clusters, part, "inertia" of each K-means round per frame, and "quality". Empty if labels of
        this K-means were made by an earlier version, or brought along.
    """
    if not (folder / LABELLING).is_file():
        return {}
    try:
        content = read_json_object(folder / LABELLING)
    except UserError:  # corrupt: the run does not depend on it
        return {}
    return content if content.get("kmeans") == kmeans else {}


def _keep_labelling(folder: Path, kmeans: str, made: dict[str, Any]) -> None:
    """Write how labels were made; what an interrupted start has found stays, if this one has not made it again."""
    quality = made.pop("quality", [])
    content = labelling(folder, kmeans) | {"kmeans": kmeans} | made
    streams = content.setdefault("streams", [{} for _ in quality])
    for stream, measures in zip(streams, quality):
        stream["quality"] = measures
    write_whole(folder / LABELLING, (json.dumps(content, indent=2) + "\n").encode())


def _judged(data: PretrainingData) -> list[Cut]:
    """Utterances with phones for the quality of labels: those of validation, or up to 1000 of training."""
    judged = [cut for cut in data.validation_cuts if phones_of(cut)]
    return judged or list(islice((cut for cut in _listed(data.train_cuts) if phones_of(cut)), 1000))


def _listed(cuts: Corpora) -> list[Cut]:
    """All cuts, except those of a corpus on disk, which have no phones."""
    return [cut for part in cuts.parts if isinstance(part, list) for cut in part]


def _is_fitted(path: Path, source: dict[str, str]) -> bool:
    """Whether the K-means of a run is on disk.

    Raises:
        UserError: Checkpoints of the run were trained with another K-means.
    """
    if not path.exists():
        return False
    try:
        if load_kmeans(path)[1] == source:
            return True
    except UserError:
        log.warning("%s: corrupt; K-means is fitted again, and must give the same centroids", path)
        return False
    if _has_checkpoints(path.parent):
        raise UserError(
            f"{path.parent}: its checkpoints were trained on labels of other features, settings or utterances "
            f"(see {path.name}); choose another --output, or remove that folder"
        )
    return False


def _keep_kmeans(path: Path, fitted: list[Tensor], source: dict[str, str]) -> None:
    """Save a K-means.

    Raises:
        UserError: Checkpoints of the run were trained with another K-means; or the disk is full.
    """
    before = (stated_source(path.parent / "labels") or {}).get("kmeans", kmeans_fingerprint(fitted))
    if before != kmeans_fingerprint(fitted) and _has_checkpoints(path.parent):
        raise UserError(
            f"{path}: corrupt or missing, and a new fit gives other centroids than those that the checkpoints were "
            "trained with; restore the file from a backup, or choose another --output"
        )
    save_kmeans(path, fitted, source)


def _has_checkpoints(folder: Path) -> bool:
    return any(folder.glob("*.ckpt"))


def _check_trained(folder: Path, source: LabelSource) -> None:
    """Check that the checkpoints of the run, if any, were trained on labels of this source.

    Raises:
        UserError: They were trained on others; or the disk is full.
    """
    if _has_checkpoints(folder.parent) and not is_of_source(folder, source):
        raise UserError(
            f"{folder.parent}: its checkpoints were trained on labels of other utterances or another K-means "
            f"(see {folder.name}/source.json); restore the manifests and files of the run, or choose another --output"
        )
