"""Where K-means starts: rows that seeds are chosen from, their principal axes, and k-means++."""

import math

import torch
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.units.kmeans_sample import Sample

MIN_SEEDING_ROWS, SEEDING_ROWS_PER_CLUSTER = 8192, 16
"""Rows that seeds are chosen from: the larger of the two numbers."""
GROWTH = 4
"""Each level of a fit uses this many times the rows of the level before."""
AXES_VARIANCE, MIN_AXES, AXES_SHARE = 0.95, 16, 12
"""Axes hold this much of the variance, but are no more than the larger of a number and a share of the dimensions."""
SEEDING_DISTANCES = 2**24
"""Distances of rows to candidates for seeds that are kept at once."""


def seeding_rows(sample: Sample, num_clusters: int) -> Tensor:
    """Gather rows from which seeds are chosen.

    Args:
        sample: Rows of all ranks.
        num_clusters: Number of clusters.

    Returns:
        (rows, dim) float32, the same on every rank, at least as many different ones as clusters.

    Raises:
        UserError: All rows together have fewer different ones.
    """
    size = max(MIN_SEEDING_ROWS, SEEDING_ROWS_PER_CLUSTER * num_clusters)
    while True:
        rows = sample.gather(size)
        different = len(torch.unique(rows, dim=0))
        if different >= num_clusters:
            return rows
        if size >= sample.total:
            raise UserError(too_few(different, num_clusters, sample.total))
        size *= GROWTH


def too_few(different: int, num_clusters: int, total: int) -> str:
    """Return the sentence about too few different frames."""
    return (
        f"only {different} different frames among {total} for {num_clusters} clusters; ask for fewer clusters, or look "
        "for silence"
    )


def principal_axes(rows: Tensor) -> Tensor | None:
    """Find the few directions in which rows differ most.

    Args:
        rows: (n, dim) float32, relative to their centre.

    Returns:
        (dim, axes), orthonormal; None if more than half of the dimensions would be needed.
    """
    dim = rows.shape[1]
    variances, directions = torch.linalg.eigh(rows.T @ rows)  # ascending
    share = variances.flip(0).cumsum(dim=0) / variances.sum()
    needed = int((share < AXES_VARIANCE).sum()) + 1
    number = min(8 * math.ceil(needed / 8), max(MIN_AXES, dim // AXES_SHARE))
    return directions[:, -number:].contiguous() if number <= dim // 2 else None


def plus_plus(rows: Tensor, num_clusters: int, seeds: list[int]) -> list[Tensor]:
    """Choose seeds by k-means++ (Arthur and Vassilvitskii 2007), each the best of several candidates.

    All seedings are chosen side by side, and nothing is fetched from the device.

    Args:
        rows: (n, dim) float32, at least as many different ones as clusters.
        num_clusters: Number of clusters.
        seeds: Seed of the draws of each seeding.

    Returns:
        (clusters, dim) float32 of each seeding.
    """
    together = max(SEEDING_DISTANCES // (len(rows) * _candidates(num_clusters)), 1)
    return [
        chosen
        for first in range(0, len(seeds), together)
        for chosen in _plus_plus(rows, num_clusters, seeds[first : first + together])
    ]


def _candidates(num_clusters: int) -> int:
    return 2 + int(math.log(num_clusters))  # as scikit-learn


def _plus_plus(rows: Tensor, num_clusters: int, seeds: list[int]) -> list[Tensor]:
    count, candidates, device = len(rows), _candidates(num_clusters), rows.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draws = [torch.rand(num_clusters, candidates, generator=one, dtype=torch.float64) for one in generators]
    uniform = torch.stack(draws, dim=1).to(device)  # (clusters, seedings, candidates)
    chosen = torch.empty(num_clusters, len(seeds), dtype=torch.long, device=device)
    chosen[0] = torch.stack([torch.randint(count, (), generator=one) for one in generators]).to(device)
    x = rows - rows.mean(dim=0)  # small norms: less rounding
    norms = x.square().sum(dim=1)
    smallest = _distances(x, norms, chosen[0])  # (seedings, n)
    for number in range(1, num_clusters):
        ladder = _ladder(smallest)
        height = (uniform[number] * ladder[:, -1:]).long()
        drawn = torch.searchsorted(ladder, height, right=True).clamp_(max=count - 1)  # (seedings, candidates)
        distances = _distances(x, norms, drawn.flatten()).view(len(seeds), candidates, count)
        smaller = torch.minimum(smallest[:, None], distances, out=distances)
        best = smaller.sum(dim=2).argmin(dim=1)
        chosen[number] = drawn.gather(1, best[:, None])[:, 0]
        smallest = smaller.gather(1, best[:, None, None].expand(-1, 1, count))[:, 0]
    return [rows.index_select(0, seeding) for seeding in chosen.T]


def _distances(x: Tensor, norms: Tensor, drawn: Tensor) -> Tensor:
    """Squared distances (drawn, n) of rows to some of them; 0 to themselves."""
    distances = torch.addmm(norms, x.index_select(0, drawn), x.T, alpha=-2)
    distances += norms.index_select(0, drawn)[:, None]
    return distances.clamp_(min=0).scatter_(1, drawn[:, None], 0)


def _ladder(weights: Tensor) -> Tensor:
    """Cumulative sums of weights (seedings, n), as integers: the same from run to run, however a GPU adds them up."""
    bits = 62 - math.ceil(math.log2(weights.shape[1] + 1))
    scale = 2.0**bits / weights.amax(dim=1, keepdim=True).double().clamp(min=1e-300)
    return (weights.double() * scale).long().cumsum(dim=1)
