"""Recipe of labels: the features that are clustered, and the K-means that clusters them.

`Relabel`, an entry of `iterations` and `hubert kmeans fit` all build a `LabelRecipe`, which checks its arguments. Only
this module compares the special words for features, layers, clusters and weights ("mfcc", "previous", "best", "auto",
"fresh").
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.errors import UserError, check_installed, within
from hubert_lightning.features.extract import extract
from hubert_lightning.features.extractors import BESIDE, MFCC, Extractor, check_clock
from hubert_lightning.features.mfcc import MFCC_PARTS, MfccPart
from hubert_lightning.frames import CLOCK, Clock, num_frames
from hubert_lightning.pretrained.load import encoder_size
from hubert_lightning.units.kmeans import KMeans, ScikitKMeans
from hubert_lightning.units.kmeans_file import kmeans_fingerprint, load_kmeans
from hubert_lightning.units.label_shards import check_clusters
from hubert_lightning.units.residual import assign_streams

PREVIOUS, FRESH, CONTINUED, BEST, AUTO = "previous", "fresh", "continued", "best", "auto"
CLUSTERS_GRID = (50, 100, 200, 500)
"""Numbers of clusters that `clusters: auto` chooses from: those of the paper's tables, and one in between."""
RESIDUAL = "residual"
"""Entry of the source of a K-means that says how many of its streams follow each other, if more than one."""


def is_mfcc(features: Path | str) -> bool:
    """Whether features are MFCCs, and not a layer of a model."""
    return str(features) == MFCC


def is_previous(model: str) -> bool:
    """Whether a model, or the weights that training starts from, are those of the iteration before."""
    return model == PREVIOUS


def is_fresh(weights: str) -> bool:
    """Whether training starts from random weights."""
    return weights == FRESH


def is_continued(weights: str) -> bool:
    """Whether the training of the iteration before continues, with its optimizer, order of the data and schedule."""
    return weights == CONTINUED


def is_best(layer: object) -> bool:
    """Whether the layer is the one whose clusters have the highest PNMI."""
    return layer == BEST


def is_auto(choice: object) -> bool:
    """Whether the layer, or the number of clusters, is chosen without phones."""
    return choice == AUTO


class Stream(NamedTuple):
    """One labelling of every frame: K-means of some columns of the features.

    Args:
        part: Part of the MFCCs that is clustered; None for all columns.
        clusters: Number of clusters.
        source: Index of the features among those of the recipe.
        stage: 1 for K-means of the features, 2 for K-means of what the centroids of stage 1 leave of them, and so on.
    """

    part: MfccPart | None
    clusters: int
    source: int = 0
    stage: int = 1

    def columns(self, extractor: Extractor) -> slice:
        """Columns of the features that are clustered."""
        return MFCC_PARTS[self.part] if self.part else extractor.columns[self.source]

    def name_in(self, features: str) -> str:
        """Name of what is clustered, of features of this name."""
        own = self.part or features.split(BESIDE)[self.source]
        return own if self.stage == 1 else f"residual {self.stage - 1} of {own}"


@dataclass(frozen=True)
class LabelRecipe:
    """Features and K-means of labels.

    Args:
        features: "mfcc", "previous" (the model of the iteration before), or a model in any format; several make a label
            stream each.
        layer: Transformer layer of the model, counted from 1, "best" (by PNMI) or "auto" (without phones); None for
            MFCCs. Several layers make a label stream each, of one model or of as many models.
        clusters: Number of K-means clusters, or "auto"; several numbers make an ensemble, one label stream each.
        parts: Parts of MFCCs spliced over three frames, 39 dimensions each, each with its own K-means (product codes).
        max_frames: Frames that K-means is fitted on: a tenth of 960 hours, as in the paper's iteration 2.
        kmeans: K-means algorithm; `KMeans()` if not given.
        seed: Seed of the sample and of K-means.
        quantizer: File of a K-means that was fitted on these features; used instead of fitting one.
        residual: Number of stages of residual K-means, one label stream each: every stage clusters the features minus
            their nearest centroids of the stages before.

    Raises:
        UserError: The arguments contradict each other, a number is out of range, or scikit-learn is not installed but
            needed.
    """

    features: str | list[str] = MFCC
    layer: int | Literal["best", "auto"] | list[int | None] | None = None
    clusters: int | list[int] | Literal["auto"] = 100
    parts: list[MfccPart] | None = None
    max_frames: int = 17_280_000
    kmeans: KMeans | ScikitKMeans | None = None
    seed: int = 0
    quantizer: Path | None = None
    residual: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.kmeans, ScikitKMeans):
            check_installed("sklearn")
        if self.is_auto_layer or self.is_auto_clusters:
            check_installed("sklearn", "or name the layer and the number of clusters")
        check_clusters(self.ensemble)
        within(max(self.ensemble), max_frames=self.max_frames)
        within(0, 2**32 - 1, seed=self.seed)
        within(1, 16, residual=self.residual)
        for features, layer in self.sources:
            if is_mfcc(features) != (layer is None):
                raise UserError(
                    f"features {features!r} with layer {layer}: MFCCs have no layers, and a model needs one"
                )
        if self.parts and not self.is_mfcc:
            raise UserError(f"parts {', '.join(self.parts)} of {self.features}: only MFCCs have parts; leave them out")
        if self.parts and self.residual > 1:
            raise UserError(
                f"residual {self.residual} with parts {', '.join(self.parts)}: product codes have no residual; leave "
                "one of the two out"
            )
        if self.is_open_layer and len(self.sources) > 1:
            raise UserError(f"layer {self.layer!r} of {len(self.sources)} features: name a layer of each")
        if self.quantizer and self.is_open_layer:
            raise UserError(
                f"quantizer {self.quantizer} was fitted on one layer, but layer is {self.layer!r}; name that layer"
            )
        if self.is_auto_clusters:
            self._check_auto_clusters()

    def _check_auto_clusters(self) -> None:
        if self.quantizer:
            raise UserError(
                f"quantizer {self.quantizer} has its own number of clusters, but clusters is {AUTO!r}; name that number"
            )
        if self.parts or len(self.sources) > 1:
            several = f"parts {', '.join(self.parts)}" if self.parts else f"{len(self.sources)} features"
            raise UserError(f"clusters {AUTO!r} of {several}: it is chosen for one K-means; name the numbers")
        if self.is_best_layer:
            raise UserError(
                f"layer {BEST!r} with clusters {AUTO!r}: PNMI compares layers at a known number of clusters; name that "
                f"number, or give layer: {AUTO}"
            )

    @property
    def sources(self) -> list[tuple[str, int | str | None]]:
        """Features and layer of each labelling.

        Raises:
            UserError: The numbers of features and of layers differ, or a layer is named twice.
        """
        features = self.features if isinstance(self.features, list) else [self.features]
        layers = self.layer if isinstance(self.layer, list) else None
        if layers is None:  # one for all models
            layer = None if isinstance(self.layer, list) else self.layer
            alone = len(features) == 1
            return _different([(name, layer if alone or not is_mfcc(name) else None) for name in features])
        if not isinstance(self.features, list):
            features = features * len(layers)
        if len(features) != len(layers):
            raise UserError(
                f"{len(features)} features and {len(layers)} layers: name a layer of each, null for mfcc, or one layer "
                "for all"
            )
        return _different(list(zip(features, layers, strict=True)))

    @property
    def known_sources(self) -> list[tuple[str, int | None]] | None:
        """Features and layer of each labelling; None if the layer is still to be chosen."""
        if self.is_open_layer:
            return None
        return [(features, None if layer is None else int(layer)) for features, layer in self.sources]

    @property
    def models(self) -> list[str]:
        """Models whose layers are clustered, each once."""
        return list(dict.fromkeys(features for features, _ in self.sources if not is_mfcc(features)))

    @property
    def is_mfcc(self) -> bool:
        """Whether MFCCs alone are clustered."""
        return not self.models

    @property
    def is_best_layer(self) -> bool:
        """Whether the layer is chosen by its clusters' PNMI."""
        return is_best(self.layer)

    @property
    def is_auto_layer(self) -> bool:
        """Whether the layer is chosen without phones."""
        return is_auto(self.layer)

    @property
    def is_open_layer(self) -> bool:
        """Whether the layer is still to be chosen."""
        return self.is_best_layer or self.is_auto_layer

    @property
    def is_auto_clusters(self) -> bool:
        """Whether the number of clusters is chosen without phones."""
        return is_auto(self.clusters)

    @property
    def ensemble(self) -> list[int]:
        """Number of clusters of each K-means of the ensemble; the largest of the grid until one is chosen."""
        if isinstance(self.clusters, str):
            return [max(CLUSTERS_GRID)]
        return [self.clusters] if isinstance(self.clusters, int) else list(self.clusters)

    @property
    def streams(self) -> list[Stream]:
        """Label streams: the K-means ensemble of each part."""
        parts: Sequence[MfccPart | None] = self.parts or [None]
        sources, stages = range(len(self.sources)), range(1, self.residual + 1)
        chosen = product(sources, parts, self.ensemble, stages)
        return [Stream(part, clusters, source, stage) for source, part, clusters, stage in chosen]

    @property
    def num_clusters(self) -> list[int]:
        """Number of clusters of each label stream."""
        return [stream.clusters for stream in self.streams]

    @cached_property
    def given(self) -> tuple[list[Tensor], dict[str, str]] | None:
        """Centroids (clusters, dim) of each stream of the quantizer and their source; None without a quantizer.

        Raises:
            UserError: The quantizer cannot be read, or has another number of clusters.
        """
        if not self.quantizer:
            return None
        centroids, source = load_kmeans(self.quantizer)
        if (counts := [len(stream) for stream in centroids]) != self.num_clusters:
            raise UserError(
                f"{self.quantizer}: a K-means with {counts} clusters, but {self.num_clusters} are requested; change "
                "clusters"
            )
        if "features" in source and (stages := source.get(RESIDUAL, "1")) != str(self.residual):
            raise UserError(
                f"{self.quantizer}: a K-means with residual {stages}, but residual is {self.residual}; change residual"
            )
        return centroids, source

    def after(self, previous: str) -> "LabelRecipe":
        """This recipe, with the path of a checkpoint in place of "previous"."""
        if isinstance(self.features, list):
            return replace(self, features=[previous if is_previous(name) else name for name in self.features])
        return replace(self, features=previous) if is_previous(self.features) else self

    def check_layer(self, previous_layers: int | None = None, clock: Clock | None = None) -> None:
        """Check that the model has the layer.

        Args:
            previous_layers: Number of layers of the model of the iteration before, which may not exist yet.
            clock: Clock of the encoder that learns the clusters, if it is known.

        Raises:
            UserError: The model cannot be read, has no such layer, or has longer frames than the encoder.
        """
        for model in self.models:
            layers = previous_layers if is_previous(model) else None
            if not layers:
                config = encoder_size(model)
                layers = config.num_layers
                if clock is not None:
                    check_clock(model, config.clock, clock)
            for features, layer in self.sources:
                is_open = is_best(layer) or is_auto(layer)
                if features == model and not is_open and layer not in range(1, layers + 1):
                    raise UserError(f"{model} has layers 1 to {layers}, not layer {layer}; name one of those")

    def as_record(self) -> dict[str, Any]:
        """Arguments of this recipe, as a run records them."""
        kmeans = self.kmeans or KMeans()
        settings = {
            "clusters": self.ensemble,
            "kmeans": {"class": type(kmeans).__name__, **vars(kmeans)},
            "residual": self.residual if self.residual > 1 else None,
        }
        return {field.name: settings.get(field.name, getattr(self, field.name)) for field in fields(self)}

    def source(self, extractor: Extractor, manifest: str) -> dict[str, str]:
        """Return everything that the centroids depend on.

        Args:
            extractor: Function that computes the features.
            manifest: Fingerprint of the utterances that frames are drawn from.

        Returns:
            Entries of the source that is kept with the centroids.
        """
        source = {
            "features": extractor.name,
            "manifest": manifest,
            "clusters": json.dumps(self.ensemble),
            "parts": json.dumps(self.parts),
        }
        if self.residual > 1:
            source[RESIDUAL] = str(self.residual)
        if extractor.clock != CLOCK:  # earlier versions had no other
            source |= {"clock": json.dumps(extractor.clock)}
        if self.given:
            return source | {"quantizer": kmeans_fingerprint(self.given[0])}  # wherever its file lies
        kmeans = self.kmeans or KMeans()
        return source | {
            "max_frames": str(self.max_frames),
            "seed": str(self.seed),
            "kmeans": type(kmeans).__name__ + json.dumps(vars(kmeans), sort_keys=True),
        }


def _different(sources: list[tuple[str, int | str | None]]) -> list[tuple[str, int | str | None]]:
    """Return the sources.

    Raises:
        UserError: There is none, or one is named twice.
    """
    if not sources:
        raise UserError("features or layer is an empty list; name features, and a layer of each model")
    for number, (features, layer) in enumerate(sources):
        if (features, layer) in sources[:number]:
            named = features if layer is None else f"layer {layer} of {features}"
            raise UserError(f"{named} is named twice; name it once, or give several numbers of clusters")
    return sources


def check_features(
    path: Path,
    centroids: Sequence[Tensor],
    source: dict[str, str],
    extractor: Extractor,
    columns: Sequence[slice],
    parts: Sequence[MfccPart] | None,
) -> None:
    """Check that a K-means was fitted on these features.

    Args:
        path: File of the K-means.
        centroids: (clusters, dim) of each stream.
        source: Entries that the file holds about its centroids.
        extractor: Function that computes the features.
        columns: Columns of the features that each stream clusters.
        parts: Parts of MFCCs that the streams cluster.

    Raises:
        UserError: The file names other features, or its centroids have another dimension.
    """
    fitted = source.get("features", extractor.name)
    if fitted != extractor.name:
        raise UserError(
            f"{path}: fitted on {fitted}, but the features are {extractor.name}; give both of the same model and layer"
        )
    requested = json.dumps(parts)
    if (fitted := source.get("parts", requested)) != requested:
        raise UserError(f"{path}: fitted on parts {fitted}, but parts are {requested}; give the same parts")
    for means, stream_columns in zip(centroids, columns, strict=True):
        dim = len(range(extractor.shape[-1])[stream_columns])
        if means.shape[1] != dim:
            raise UserError(
                f"{path}: centroids of {means.shape[1]} dimensions, where {extractor.name} has {dim}; give both of one "
                "model and layer"
            )


def assign_clusters(
    extractor: Extractor,
    streams: Sequence[tuple[slice, Tensor]],
    groups: Sequence[Sequence[Cut]],
    max_frames: int,
    num_workers: int = 0,
    ranks: int = 1,
    residual: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Assign every frame to its nearest centroid, one group of cuts after the other.

    Args:
        extractor: Function that computes the features.
        streams: Columns of the features and centroids (clusters, dim) of each stream.
        groups: Cuts that are labelled together.
        max_frames: Number of frames of a batch at most, padding included.
        num_workers: Number of processes that read audio.
        ranks: Number of ranks that share the work, as of `extract`.
        residual: Number of streams that follow each other, as of `assign_streams`.

    Yields:
        (streams, frames) uint16 by cut id, for each group.
    """
    streams = [(columns, centroids.to(extractor.device)) for columns, centroids in streams]

    def clusters_of(rows: Tensor) -> Tensor:  # (rows, streams)
        return assign_streams(rows, streams, residual)

    work = extract(extractor, groups, max_frames, "labelling", num_workers, ranks=ranks, then=clusters_of)
    labels: dict[str, np.ndarray] = {}
    missing = 0  # frames
    for number, piece, clusters in work:
        cuts = groups[number]
        if not labels:
            frames = {cut.id: num_frames(cut.num_samples, extractor.clock) for cut in cuts}
            labels = {cut_id: np.empty((len(streams), count), np.uint16) for cut_id, count in frames.items()}
            missing = sum(frames.values())
        labels[cuts[piece.cut_index].id][:, piece.window.start : piece.window.end] = clusters.numpy().T
        missing -= len(clusters)
        if not missing:  # before the next group is read, which may fail
            yield labels
            labels = {}
