"""Residual K-means: each stage clusters the features minus their nearest centroids of the stages before.

The sum of a frame's centroids approximates its features, better with each stage (residual vector quantisation, B.-H.
Juang and A. Gray, "Multiple stage vector quantization for speech coding", ICASSP 1982).
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from hubert_lightning.units.kmeans import assign

PIECE = 2**16
"""Rows that are assigned at once."""

S = TypeVar("S")


def assign_streams(rows: Tensor, streams: Sequence[tuple[slice, Tensor]], residual: int = 1) -> Tensor:
    """Assign every frame to the nearest centroid of each stream.

    Args:
        rows: (frames, dim).
        streams: Columns of the features and centroids (clusters, columns) of each stream, on the device of the rows.
        residual: Number of streams that follow each other: stages of residual K-means, 1 if each stands alone.

    Returns:
        (frames, streams) int64.
    """
    clusters: list[Tensor] = []
    left = rows
    for number, (columns, centroids) in enumerate(streams):
        left = rows[:, columns] if number % residual == 0 else left - streams[number - 1][1][clusters[-1]]
        clusters.append(assign(left, centroids))
    return torch.stack(clusters, dim=1)


def joint_clusters(rows: Tensor, stages: Sequence[Tensor]) -> Tensor:
    """Number the clusters of all stages of residual K-means together.

    Args:
        rows: (frames, dim).
        stages: Centroids (clusters, dim) of each stage, on the device of the rows.

    Returns:
        (frames,) int64: cluster of stage 1 · clusters of stage 2 + cluster of stage 2, and so on.
    """
    joint = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    clusters = assign_streams(rows, [(slice(None), means) for means in stages], len(stages))
    for cluster, means in zip(clusters.T, stages, strict=True):
        joint = joint * len(means) + cluster
    return joint


def fit_streams(
    rows: Tensor,
    streams: Sequence[tuple[slice, S]],
    residual: int,
    fit: Callable[[S, Tensor], Tensor],
    device: torch.device,
) -> list[Tensor]:
    """Fit K-means of every stream.

    Args:
        rows: (n, dim), on any device. Residuals take the place of columns that no later stream needs.
        streams: Columns of the rows, and description of each stream.
        residual: Number of streams that follow each other.
        fit: Function that fits one K-means to the rows (n, columns) of a stream: (clusters, columns).
        device: Device that assigns rows to centroids.

    Returns:
        (clusters, columns) of each stream.
    """
    centroids: list[Tensor] = []
    for number, (columns, stream) in enumerate(streams):
        if number % residual == 0:
            left = rows[:, columns]
            if residual > 1 and any(later == columns for later, _ in streams[number + residual :]):
                left = left.clone()
        else:
            for part in torch.split(left, PIECE):
                part -= nearest_centroids(part.to(device), centroids[-1].to(device)).to(part.device)
        centroids.append(fit(stream, left))
    return centroids


def nearest_centroids(rows: Tensor, centroids: Tensor) -> Tensor:
    """Return the nearest centroid of each row: (rows, dim)."""
    return centroids[assign(rows, centroids)]
