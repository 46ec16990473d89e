"""What labels are clusters of: features, layer, clusters, parts."""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.features.extract import extract
from hubert_lightning.features.extractors import Extractor
from hubert_lightning.features.mfcc import PARTS, Part
from hubert_lightning.frames import num_frames
from hubert_lightning.units.kmeans import assign


class Stream(NamedTuple):
    """One labelling of every frame: K-means with so many clusters of some columns of the features."""

    part: Part | None
    clusters: int

    @property
    def columns(self) -> slice:
        return PARTS[self.part] if self.part else slice(None)


def check_features(
    path: Path,
    centroids: Sequence[Tensor],
    source: dict[str, str],
    extractor: Extractor,
    columns: Sequence[slice],
    parts: Sequence[Part] | None,
) -> None:
    """Whether a K-means that somebody fitted is one of these features.

    Args:
        path: File of the K-means.
        centroids: (clusters, dim) of each stream.
        source: What the file says of itself.
        extractor: Features that are to be clustered.
        columns: Columns of the features that each stream sees.
        parts: Parts of MFCCs that are to be clustered.

    Raises:
        UserError: It says that it is of others, or has another dimension.
    """
    theirs = source.get("features", extractor.name)
    if theirs != extractor.name:
        raise UserError(
            f"{path}: fitted on {theirs}, where the features are {extractor.name}; give both of one model and layer"
        )
    asked = json.dumps(parts)
    if (fitted := source.get("parts", asked)) != asked:
        raise UserError(f"{path}: fitted on parts {fitted}, where parts are {asked}; give the same parts in this order")
    for means, seen in zip(centroids, columns, strict=True):
        dim = len(range(extractor.shape[-1])[seen])
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
) -> Iterator[dict[str, np.ndarray]]:
    """The cluster of every frame, group of cuts by group: id → (streams, frames) uint16.

    streams: the columns of the features that a stream sees, and its centroids (clusters, dim)
    """
    streams = [(columns, centroids.to(extractor.device)) for columns, centroids in streams]
    for number, pieces in groupby(extract(extractor, groups, max_frames, "labels", num_workers), key=itemgetter(0)):
        cuts = groups[number]
        labels = {cut.id: np.empty((len(streams), num_frames(cut.num_samples)), np.uint16) for cut in cuts}
        for _, piece, features in pieces:
            for stream, (columns, centroids) in enumerate(streams):
                clusters = assign(features[:, columns], centroids)
                labels[cuts[piece.place].id][stream, piece.window.start : piece.window.end] = clusters.cpu().numpy()
        yield labels
