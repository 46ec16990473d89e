"""K-means: from a sample of features to centroids, and from features to the nearest centroid.

`KMeans` uses matrix products, on any device, over the rows of all ranks (docs/benchmarks.md has times and inertias).
`ScikitKMeans` is the reference's, on one CPU.
"""

import math
import os
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hubert_lightning.errors import UserError, within
from hubert_lightning.progress_bar import Bar, progress
from hubert_lightning.units.kmeans_sample import Sample
from hubert_lightning.units.kmeans_seeds import GROWTH, plus_plus, principal_axes, seeding_rows, too_few
from hubert_lightning.units.nearest import float32_products, nearest

Report = Callable[[float], None]
"""Function that gets the inertia of a round, per row."""


class KMeans:
    """Lloyd's algorithm from k-means++ seeds: first on few rows and dimensions, then on more, at last on all.

    The same seed gives the same centroids up to rounding, however the rows are dealt to ranks. Most rounds use a part
    of the rows, and the projections of the rows on the directions in which they differ most (as in C. Ding and X. He,
    "K-means clustering via principal component analysis", ICML 2004), since early rounds hardly depend on the rest.
    The last rounds use all rows and dimensions. Distances are computed in float32, whatever a GPU may do elsewhere.

    Args:
        restarts: Number of seedings; the one with the lowest inertia is used.
        max_rounds: Largest number of rounds over the same rows and dimensions.
        tolerance: Relative decrease of the inertia below which rounds end.
        batch_frames: Rows of a mini-batch; all rows if not given.
    """

    def __init__(
        self, restarts: int = 3, max_rounds: int = 20, tolerance: float = 5e-4, batch_frames: int | None = None
    ) -> None:
        within(1, 10_000, restarts=restarts)
        within(1, 10**6, max_rounds=max_rounds)
        within(0, 1, tolerance=tolerance)
        within(1, batch_frames=batch_frames)
        self.restarts, self.max_rounds, self.tolerance = restarts, max_rounds, tolerance
        self.batch_frames = batch_frames

    def fit(
        self,
        rows: Tensor,
        num_clusters: int,
        seed: int,
        *,
        index: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        report: Report | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Fit centroids to the rows of all ranks.

        Args:
            rows: (n, dim), this rank's rows, on any device.
            num_clusters: Number of clusters.
            seed: Seed of the algorithm.
            index: (n,) int64, index of each row among those of all ranks; needed with a group.
            group: Ranks that fit together; None if this process is alone.
            device: Device that computes, to which rows move in chunks; that of the rows if not given.
            report: Function that gets the inertia of each round, per row: first of the best seeding, then of more and
                more rows.
            start: (clusters, dim), centroids that the first round starts from, in place of k-means++ seeds; clusters
                keep their numbers. One that is NaN starts from a row that is far from the others.

        Returns:
            (clusters, dim) float32, the same on every rank.

        Raises:
            UserError: There are fewer different rows than clusters, or a row is not finite; on every rank.
        """
        sample = Sample(rows, index, seed, group, device)
        sample.check(num_clusters)
        with float32_products():
            seeding = seeding_rows(sample, num_clusters)
            # Distances are differences of norms, which lose their digits in float32 if a dimension is far from 0
            sample.centre = sample.of_first_rank(_centre(seeding))
            seeding = seeding - sample.centre
            with progress(f"K-means, {num_clusters} clusters", None, at_most=True) as bar:
                fit = _Fit(self, sample, num_clusters, seed, bar, report or _ignored)
                in_batches = self.batch_frames is not None and self.batch_frames < sample.total
                if start is not None:
                    start = sample.of_first_rank(_started(start, seeding, sample.centre))
                centroids = fit.in_batches(seeding, start) if in_batches else fit.in_levels(seeding, start)
            return (centroids + sample.centre).float()


class _Fit:
    """A fit; rows and centroids (clusters, dim) are relative to the sample's centre."""

    def __init__(
        self, settings: KMeans, sample: Sample, num_clusters: int, seed: int, bar: Bar, report: Report
    ) -> None:
        self.settings, self.sample, self.num_clusters, self.seed = settings, sample, num_clusters, seed
        self.bar, self.report = bar, report

    def in_levels(self, seeding: Tensor, start: Tensor | None = None) -> Tensor:
        """Run Lloyd's algorithm on more and more rows, projected if that is worth it, then on all rows as they are."""
        sample, total = self.sample, self.sample.total
        sizes = _sizes(len(seeding), total)
        axes = self._axes(seeding) if sizes else None
        if axes is None:
            sizes = sizes or ([] if start is None else [total])  # seeds have had rounds on all rows
            self.bar.total = self.settings.max_rounds * sum(sizes) or None
            return self._levels(sample, seeding, seeding[:0], sizes, start=start)
        share = axes.shape[1] / len(axes)
        self.bar.total = self.settings.max_rounds * (total + sum(int(share * size) for size in sizes))
        self.bar(0, f"finding the {axes.shape[1]} main directions of {total} frames")
        projected, near = sample.projected(axes), seeding @ axes
        beyond = seeding.square().sum(dim=1) - near.square().sum(dim=1)
        self._levels(projected, near, beyond, sizes, share, None if start is None else start @ axes)
        means, _, inertia = sample.means(projected, self.num_clusters)
        del projected
        return self._lloyd(sample, seeding, means, _Rounds(self, total), float(inertia))

    def _axes(self, seeding: Tensor) -> Tensor | None:
        """Find the principal axes on the first rank: on other hardware, their number might be another."""
        if self.sample.group is None:
            return principal_axes(seeding)
        axes = principal_axes(seeding) if dist.get_rank(self.sample.group) == 0 else None
        number = int(self.sample.of_first_rank(seeding.new_tensor(0 if axes is None else axes.shape[1])))
        if not number:
            return None
        return self.sample.of_first_rank(seeding.new_empty(seeding.shape[1], number) if axes is None else axes)

    def _levels(
        self,
        sample: Sample,
        seeding: Tensor,
        beyond: Tensor,
        sizes: list[int],
        share: float = 1.0,
        start: Tensor | None = None,
    ) -> Tensor:
        """Choose seeds among the seeding rows, and move them by rounds on numbers of rows; `beyond` as in `Sample`."""
        centroids = self.seeded(seeding, beyond) if start is None else start
        for size in sizes:
            centroids = self._lloyd(sample, seeding, centroids, _Rounds(self, size, share))
        return centroids

    def seeded(self, seeding: Tensor, beyond: Tensor) -> Tensor:
        """Return the best of several seedings, after Lloyd's algorithm on the seeding rows alone."""
        self.bar(0, "choosing seeds")
        seeds = list(range(self.seed, self.seed + self.settings.restarts))
        alone = Sample(seeding, None, self.seed, None, None)
        results = []
        for centroids in plus_plus(seeding, self.num_clusters, seeds):
            rounds: list[float] = []
            centroids = self._lloyd(alone, seeding, centroids, _Quiet(len(seeding), rounds))
            results.append((rounds[-1], centroids, rounds))
        _, best, rounds = min(results, key=lambda result: result[0])
        left_out = float(beyond.sum(dtype=torch.float64)) / len(seeding)
        for inertia in rounds:
            self.report(inertia + left_out)
        return self.sample.of_first_rank(best)

    def _lloyd(
        self, sample: Sample, seeding: Tensor, centroids: Tensor, rounds: "_Rounds | _Quiet", before: float = math.inf
    ) -> Tensor:
        for _ in range(self.settings.max_rounds):
            centroids, counts, inertia = sample.round(centroids, rounds.size)
            # The only wait of a round
            now, empty = torch.stack([inertia, (counts == 0).sum(dtype=torch.float64)]).tolist()
            if empty:
                centroids = _filled(centroids, counts, seeding, int(empty))
            rounds(now / rounds.size)
            if before - now < self.settings.tolerance * now:
                break
            before = now
        rounds.end()
        return centroids

    def in_batches(self, seeding: Tensor, start: Tensor | None = None) -> Tensor:
        """Web-scale K-means (Sculley 2010): a centroid is the mean of all rows that were ever assigned to it."""
        total, size = self.sample.total, self.settings.batch_frames
        assert size is not None
        self.bar.total = self.settings.max_rounds * total
        centroids = (self.seeded(seeding, seeding[:0]) if start is None else start).double()
        rounds = _Rounds(self, total)
        seen = torch.zeros(self.num_clusters, dtype=torch.float64, device=centroids.device)
        best = math.inf
        for _ in range(self.settings.max_rounds):
            inertias = []
            for first in range(0, total, size):
                means, counts, inertia = self.sample.round(centroids, size, first)
                seen += counts
                centroids = centroids + (means - centroids) * (counts / seen.clamp(min=1))[:, None]
                inertias.append(inertia)
            now, empty = torch.stack([torch.stack(inertias).sum(), (seen == 0).sum(dtype=torch.float64)]).tolist()
            if empty:
                centroids = _filled(centroids, seen, seeding, int(empty))
            rounds(now / total)
            if best - now < self.settings.tolerance * now:
                break
            best = now
        rounds.end()
        return centroids


class _Rounds:
    """Reports the rounds over a number of rows, and shows them beside a progress bar.

    Args:
        fit: The fit.
        size: Number of rows.
        share: Work of a projected row, as a share of that of a row.
    """

    def __init__(self, fit: _Fit, size: int, share: float = 1.0) -> None:
        self.size, self._fit, self._number, self._work = size, fit, 0, int(share * size)
        total = fit.sample.total
        self._rows = f"{size} frames" if size == total else f"{size} of {total} frames"

    def __call__(self, inertia: float) -> None:
        self._number += 1
        self._fit.report(inertia)
        self._fit.bar(self._work, f"round {self._number} on {self._rows}, inertia {inertia:.4g}")

    def end(self) -> None:
        """Take the rounds that were not needed off the bar."""
        if self._fit.bar.total is not None:
            self._fit.bar.total -= (self._fit.settings.max_rounds - self._number) * self._work


class _Quiet:
    """Keeps the inertia of rounds over the seeding rows."""

    def __init__(self, size: int, inertias: list[float]) -> None:
        self.size, self._inertias = size, inertias

    def __call__(self, inertia: float) -> None:
        self._inertias.append(inertia)

    def end(self) -> None:
        pass


class ScikitKMeans:
    """`MiniBatchKMeans` of scikit-learn with the settings of the reference, on the processor of the first rank."""

    def fit(
        self,
        rows: Tensor,
        num_clusters: int,
        seed: int,
        *,
        index: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        report: Report | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Fit centroids, as `KMeans.fit`; each rank gathers the rows of all ranks, which must fit in its memory.

        The inertia that is reported is that of the result.
        """
        sample = Sample(rows, index, seed, group, device)
        sample.check(num_clusters)
        _check_memory(sample, rows.shape[1])
        # float64: scikit-learn converts float32 blocks for every distance, and takes twice as long
        gathered = sample.gather(sample.total)
        centroids = gathered.new_zeros(num_clusters, gathered.shape[1])
        if start is not None:
            centre = _centre(gathered)
            start = _started(start, gathered - centre, centre) + centre
        if group is None or dist.get_rank(group) == 0:
            with progress(f"K-means of scikit-learn, {num_clusters} clusters", None):
                centroids.copy_(self._fitted(gathered.cpu().double().numpy(), num_clusters, seed, start))
        sample.of_first_rank(centroids)
        if (different := len(torch.unique(centroids, dim=0))) < num_clusters:
            raise UserError(too_few(different, num_clusters, sample.total))
        if report:
            with float32_products():
                report(float(sample.round(centroids, sample.total).inertia) / sample.total)
        return centroids

    def _fitted(self, rows: np.ndarray, num_clusters: int, seed: int, start: Tensor | None) -> Tensor:
        from sklearn.cluster import MiniBatchKMeans

        kmeans = MiniBatchKMeans(  # fairseq learn_kmeans
            num_clusters,
            init="k-means++" if start is None else start.cpu().double().numpy(),
            max_iter=100,
            batch_size=10_000,
            tol=0.0,
            max_no_improvement=100,
            n_init=20 if start is None else 1,
            reassignment_ratio=0.0,
            compute_labels=False,
            random_state=seed,
        )
        return torch.from_numpy(kmeans.fit(rows).cluster_centers_)


def _sizes(first: int, total: int) -> list[int]:
    """Numbers of rows of the levels after the first one."""
    sizes = []
    while first < total:
        first = min(GROWTH * first, total)
        sizes.append(first)
    return sizes


def _started(start: Tensor, seeding: Tensor, centre: Tensor) -> Tensor:
    """Return the first centroids, relative to the centre; those that are NaN from seeding rows, relative to it too."""
    start = start.to(seeding.device, seeding.dtype) - centre
    missing = start.isnan().any(dim=1)
    if not (number := int(missing.sum())):
        return start
    return _filled(start.nan_to_num(), (~missing).to(start.dtype), seeding, number)


def _ignored(inertia: float) -> None:
    pass


def _filled(centroids: Tensor, counts: Tensor, seeding: Tensor, number: int) -> Tensor:
    """Move the centroids of a number of empty clusters to the seeding rows that are farthest from every centroid."""
    empty = counts == 0
    number = min(number, len(seeding))
    distances = torch.cdist(seeding, centroids.to(seeding.dtype)).masked_fill_(empty, math.inf)
    farthest = distances.min(dim=1).values.topk(number).indices
    places = empty.to(torch.uint8).argsort(descending=True, stable=True)[:number]
    return centroids.index_copy(0, places, seeding.index_select(0, farthest).to(centroids.dtype))


def _check_memory(sample: Sample, dim: int) -> None:
    """Check that rows in float64, and in float32 as they are gathered, fit in the memory of each rank's machine."""
    needed = (8 + 4) * sample.total * dim
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if int(sample.sum(torch.tensor(int(needed > 0.9 * memory), device=sample.device))):
        raise UserError(
            f"ScikitKMeans copies all {sample.total} frames, which takes {needed / 1e9:.0f} GB of memory, more than a "
            "machine has; lower max_frames, or use hubert_lightning.KMeans"
        )


def assign(features: Tensor, centroids: Tensor) -> Tensor:
    """Assign every frame to its nearest centroid.

    Args:
        features: (frames, dim).
        centroids: (clusters, dim), on the same device.

    Returns:
        (frames,) int64.
    """
    with float32_products():  # half precision confuses near neighbours
        # Relative to a centre: norms of a dimension that is far from 0 leave float32 no digits for differences
        centre = _centre(centroids.float())
        x, c = (features - centre).float(), (centroids - centre).float()
        return nearest(x, c)[1]


def _centre(rows: Tensor) -> Tensor:
    """Return the mean (dim,) of most rows (n, dim); a few rows far from the others, such as noise, do not move it."""
    far = (rows - rows.mean(dim=0)).square().sum(dim=1)
    most = (far <= 4 * far.median()).to(rows.dtype)
    return most @ rows / most.sum()
