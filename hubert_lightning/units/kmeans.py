"""K-means: from a sample of features to centroids, and from features to the nearest centroid.

`KMeans` uses matrix products, on any device, over the rows of all ranks: on two cores it takes a tenth of the
time of scikit-learn and reaches a lower inertia (docs/benchmarks.md). `ScikitKMeans` is the reference's, on one CPU.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from hubert_lightning import console
from hubert_lightning.errors import UserError, within

CHUNK_DISTANCES = 2**22
"""Distances, of a chunk of rows to all centroids, that are computed at once: 16 MiB."""
MIN_SEEDING_ROWS, SEEDING_ROWS_PER_CLUSTER = 8192, 16
"""Rows that seeds are chosen from: the larger of the two numbers."""
GROWTH = 4
"""Each level of a fit uses this many times the rows of the level before."""

Report = Callable[[float], None]
"""Function that gets the inertia of a round, per row."""


class KMeans:
    """Lloyd's algorithm from k-means++ seeds: first on few rows, then on more, at last on all.

    The same seed gives the same centroids up to rounding, however the rows are dealt to ranks. Most rounds use a part
    of the rows, since the first rounds hardly depend on their number.

    Args:
        restarts: Number of seedings; the one with the lowest inertia is used.
        max_rounds: Largest number of passes over all rows.
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

        Returns:
            (clusters, dim) float32, the same on every rank.

        Raises:
            UserError: There are fewer different rows than clusters, or a row is not finite; on every rank.
        """
        sample = _Sample(rows, index, seed, group, device)
        sample.check(num_clusters)
        with torch.autocast(sample.device.type, enabled=False):
            seeding = _seeding_rows(sample, num_clusters)
            # Distances are differences of norms, which lose their digits in float32 if a dimension is far from 0
            sample.centre = sample.of_first_rank(_centre(seeding))
            centroids = self._fit_centred(sample, seeding - sample.centre, num_clusters, seed, report or _ignored)
            return (centroids + sample.centre).float()

    def _fit_centred(self, sample: "_Sample", seeding: Tensor, num_clusters: int, seed: int, report: Report) -> Tensor:
        """Fit centroids (clusters, dim) float64; they and the seeding rows are relative to the sample's centre."""
        in_batches = self.batch_frames is not None and self.batch_frames < sample.total
        sizes = [sample.total] if in_batches else _sizes(len(seeding), sample.total)
        work = self.max_rounds * sum(sizes)
        with console.progress(f"K-means, {num_clusters} clusters", work or None, at_most=True) as bar:
            seeded = []
            for restart in range(self.restarts):
                bar(0, f"choosing seeds, {restart + 1} of {self.restarts}")
                seeded.append(self._seeded(seeding, num_clusters, seed + restart))
            _, best, rounds = min(seeded, key=lambda seeding: seeding[0])
            centroids = sample.of_first_rank(best)
            for inertia in rounds:
                report(inertia)
            for size in sizes:
                shown = _Rounds(bar, size, sample.total, report)
                fit = self._mini_batches if in_batches else partial(self._lloyd, size=size)
                centroids = fit(sample, seeding=seeding, centroids=centroids, report=shown)
                bar.total = work = work - (self.max_rounds - shown.number) * size  # rounds that were not needed
        return centroids

    def _seeded(self, seeding: Tensor, num_clusters: int, seed: int) -> tuple[float, Tensor, list[float]]:
        """Return inertia, centroids and rounds of Lloyd's algorithm on the seeding rows alone."""
        centroids, rounds = _plus_plus(seeding, num_clusters, seed), list[float]()
        alone = _Sample(seeding, None, seed, None, None)
        centroids = self._lloyd(alone, seeding, centroids, rounds.append, len(seeding))
        return float(alone.round(centroids, len(seeding))[2]), centroids, rounds

    def _lloyd(self, sample: "_Sample", seeding: Tensor, centroids: Tensor, report: Report, size: int) -> Tensor:
        before = math.inf
        for _ in range(self.max_rounds):
            sums, counts, inertia = sample.round(centroids, size)
            centroids = _filled(sums / counts.clamp(min=1)[:, None], counts, seeding)
            report(float(inertia) / size)
            if before - inertia < self.tolerance * inertia:
                break
            before = float(inertia)
        return centroids

    def _mini_batches(self, sample: "_Sample", seeding: Tensor, centroids: Tensor, report: Report) -> Tensor:
        """Web-scale K-means (Sculley 2010): a centroid is the mean of all rows that were ever assigned to it."""
        assert self.batch_frames is not None
        seen = torch.zeros(len(centroids), dtype=torch.float64, device=centroids.device)
        batches = math.ceil(sample.total / self.batch_frames)
        best = math.inf
        for _ in range(self.max_rounds):
            inertias = []
            for batch in range(batches):
                sums, counts, inertia = sample.round(centroids, self.batch_frames, batch * self.batch_frames)
                seen += counts
                step = (sums - counts[:, None] * centroids) / seen.clamp(min=1)[:, None]
                centroids = centroids + step
                inertias.append(float(inertia))
            centroids = _filled(centroids, seen, seeding)
            report(sum(inertias) / sample.total)
            if best - sum(inertias) < self.tolerance * sum(inertias):
                break
            best = sum(inertias)
        return centroids


class _Rounds:
    """Reports the rounds over a number of rows, and shows them beside a progress bar.

    Attributes:
        number: Number of rounds so far.
    """

    def __init__(self, bar: console.Bar, size: int, total: int, report: Report) -> None:
        self._bar, self._size, self._report, self.number = bar, size, report, 0
        self._rows = f"{size} frames" if size == total else f"{size} of {total} frames"

    def __call__(self, inertia: float) -> None:
        self.number += 1
        self._report(inertia)
        self._bar(self._size, f"round {self.number} on {self._rows}, inertia {inertia:.4g}")


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
    ) -> Tensor:
        """Fit centroids, as `KMeans.fit`; each rank gathers the rows of all ranks, which must fit in its memory.

        The inertia that is reported is that of the result.
        """
        sample = _Sample(rows, index, seed, group, device)
        sample.check(num_clusters)
        # float64: scikit-learn converts float32 blocks for every distance, and takes twice as long
        gathered = sample.gather(sample.total)
        centroids = gathered.new_zeros(num_clusters, gathered.shape[1])
        if group is None or dist.get_rank(group) == 0:
            with console.progress(f"K-means of scikit-learn, {num_clusters} clusters", None):
                centroids.copy_(self._fitted(gathered.cpu().double().numpy(), num_clusters, seed))
        sample.of_first_rank(centroids)
        if (different := len(torch.unique(centroids, dim=0))) < num_clusters:
            raise UserError(_too_few(different, num_clusters, sample.total))
        if report:
            report(float(sample.round(centroids, sample.total)[2]) / sample.total)
        return centroids

    def _fitted(self, rows: np.ndarray, num_clusters: int, seed: int) -> Tensor:
        kmeans = MiniBatchKMeans(  # fairseq learn_kmeans
            num_clusters,
            init="k-means++",
            max_iter=100,
            batch_size=10_000,
            tol=0.0,
            max_no_improvement=100,
            n_init=20,
            reassignment_ratio=0.0,
            compute_labels=False,
            random_state=seed,
        )
        return torch.from_numpy(kmeans.fit(rows).cluster_centers_)


class _Sample:
    """The rows of all ranks, in a random order that does not depend on the rank of each row."""

    centre: Tensor | None = None
    """(dim,), which `round` subtracts from the rows."""

    def __init__(
        self,
        rows: Tensor,
        index: Tensor | None,
        seed: int,
        group: dist.ProcessGroup | None,
        device: torch.device | None,
    ) -> None:
        self.rows, self.group, self.device = rows.detach(), group, device or rows.device
        if self.device.type == "mps":  # has no float64
            self.rows, self.device = self.rows.cpu(), torch.device("cpu")
        self.total = int(self._sum(torch.tensor(len(rows), device=self.device)))
        index = torch.arange(len(rows)) if index is None else index
        order = torch.randperm(self.total, generator=torch.Generator().manual_seed(seed))
        position = torch.empty_like(order)
        position[order] = torch.arange(self.total)
        self.positions, self.order = position[index.cpu()].sort()  # of this rank's rows, and the row at each

    def check(self, num_clusters: int) -> None:
        if self.total < num_clusters:
            raise UserError(
                f"{self.total} frames cannot make {num_clusters} clusters; give more frames or ask for fewer clusters"
            )
        broken = sum((~chunk.isfinite()).any(dim=1).sum() for chunk in torch.split(self.rows, 2**16))
        if count := int(self._sum(torch.as_tensor(broken, device=self.device))):
            raise UserError(
                f"{count} of {self.total} frames have features that are NaN or infinite; "
                "look for broken audio, or for an encoder whose training diverged"
            )

    def gather(self, size: int) -> Tensor:
        """Return the first rows of the order on every rank: (min(size, total), dim) float32."""
        mine = slice(0, int(torch.searchsorted(self.positions, size)))
        rows = torch.zeros(min(size, self.total), self.rows.shape[1], device=self.device)
        own = self.rows[self.order[mine].to(self.rows.device)].float()
        rows[self.positions[mine].to(self.device)] = own.to(self.device)
        return self._sum(rows)

    def round(self, centroids: Tensor, size: int, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Assign rows `first` to `first + size` of the order to centroids.

        Returns:
            Sums (clusters, dim) and counts (clusters,) of each cluster's rows, and inertia (), all float64.
        """
        centroids = centroids.float()
        clusters, dim = centroids.shape
        totals = torch.zeros(clusters, dim + 1, dtype=torch.float64, device=centroids.device)
        inertia = torch.zeros((), dtype=torch.float64, device=centroids.device)
        half_norm = centroids.square().sum(dim=1) / 2
        for x in self._chunks(first, size, max(CHUNK_DISTANCES // clusters, 1)):
            # ‖x - c‖² / 2 - ‖x‖² / 2 = ‖c‖² / 2 - xc
            nearest, cluster = torch.addmm(half_norm, x, centroids.T, alpha=-1).min(dim=1)
            inertia += 2 * nearest.sum(dtype=torch.float64) + torch.dot(x.flatten(), x.flatten())
            totals[:, :dim] += _sums(x, cluster, clusters)
            totals[:, dim] += torch.bincount(cluster, minlength=clusters)
        totals = self._sum(torch.cat([totals.flatten(), inertia[None]]))
        return totals[:-1].view(clusters, dim + 1)[:, :dim], totals[:-1].view(clusters, dim + 1)[:, dim], totals[-1]

    def _chunks(self, first: int, size: int, rows: int) -> Iterator[Tensor]:
        if size >= self.total:
            parts: Iterator[Tensor] = iter(torch.split(self.rows, rows))
        else:
            bounds = torch.tensor([first, first + size])
            start, end = torch.searchsorted(self.positions, bounds).tolist()
            parts = (self.rows[part] for part in torch.split(self.order[start:end].to(self.rows.device), rows))
        for part in parts:
            x = part.to(self.device, non_blocking=True).float()
            yield x if self.centre is None else x - self.centre

    def of_first_rank(self, values: Tensor) -> Tensor:
        """Return the first rank's values on every rank: GPUs may round sums in another order."""
        if self.group is not None:
            dist.broadcast(values, group=self.group, group_src=0)
        return values

    def _sum(self, values: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values


def _sizes(first: int, total: int) -> list[int]:
    """Numbers of rows of the levels after the first one."""
    sizes = []
    while first < total:
        first = min(GROWTH * first, total)
        sizes.append(first)
    return sizes


def _ignored(inertia: float) -> None:
    pass


def _sums(x: Tensor, cluster: Tensor, clusters: int) -> Tensor:
    return torch.zeros(clusters, x.shape[1], device=x.device).index_add_(0, cluster, x)


def _filled(centroids: Tensor, counts: Tensor, seeding: Tensor) -> Tensor:
    """Move centroids of empty clusters to the seeding rows that are farthest from every centroid."""
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        full = centroids[counts > 0].float()
        farthest = torch.cdist(seeding, full).min(dim=1).values.topk(min(len(empty), len(seeding))).indices
        centroids[empty[: len(farthest)]] = seeding[farthest].to(centroids.dtype)
    return centroids


def _seeding_rows(sample: _Sample, num_clusters: int) -> Tensor:
    """Gather rows from which seeds are chosen: (rows, dim) float32, the same on every rank."""
    size = max(MIN_SEEDING_ROWS, SEEDING_ROWS_PER_CLUSTER * num_clusters)
    while True:
        rows = sample.gather(size)
        different = len(torch.unique(rows, dim=0))
        if different >= num_clusters:
            return rows
        if size >= sample.total:
            raise UserError(_too_few(different, num_clusters, sample.total))
        size *= GROWTH


def _too_few(different: int, num_clusters: int, total: int) -> str:
    return (
        f"only {different} different frames among {total} for {num_clusters} clusters; ask for fewer clusters, or look "
        "for silence"
    )


def _plus_plus(rows: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Choose seeds by k-means++ (Arthur and Vassilvitskii 2007), each the best of several candidates.

    Args:
        rows: (n, dim) float32, at least as many different ones as clusters.
        num_clusters: Number of clusters.
        seed: Seed of the draws.

    Returns:
        (clusters, dim) float32.
    """
    generator = torch.Generator().manual_seed(seed)
    candidates = 2 + int(math.log(num_clusters))  # as scikit-learn
    draws = torch.rand(num_clusters, candidates, generator=generator, dtype=torch.float64)
    x = rows - rows.mean(dim=0)  # small norms: less rounding
    norms = x.square().sum(dim=1)
    chosen = torch.empty(num_clusters, dtype=torch.long, device=rows.device)
    chosen[0] = torch.randint(len(rows), (), generator=generator)
    smallest = (x - x[chosen[0]]).square().sum(dim=1)
    for number in range(1, num_clusters):
        ladder = smallest.cpu().double().cumsum(dim=0)  # on a GPU, rounding differs from run to run
        drawn = torch.searchsorted(ladder, draws[number] * ladder[-1]).clamp(max=len(rows) - 1).to(rows.device)
        distances = (norms + norms[drawn][:, None] - 2 * (x[drawn] @ x.T)).clamp(min=0)  # (candidates, n)
        distances[torch.arange(candidates, device=rows.device), drawn] = 0
        smaller = torch.minimum(smallest, distances)
        best = smaller.sum(dim=1).argmin()
        chosen[number], smallest = drawn[best], smaller[best]
    return rows[chosen]


def assign(features: Tensor, centroids: Tensor) -> Tensor:
    """Assign every frame to its nearest centroid.

    Args:
        features: (frames, dim).
        centroids: (clusters, dim), on the same device.

    Returns:
        (frames,) int64.
    """
    with torch.autocast(features.device.type, enabled=False):  # half precision confuses near neighbours
        # Relative to a centre: norms of a dimension that is far from 0 leave float32 no digits for differences
        centre = _centre(centroids.float())
        x, c = (features - centre).float(), (centroids - centre).float()
        # ‖x - c‖² = ‖x‖² - 2xc + ‖c‖²; ‖x‖² is the same for every centroid
        return torch.addmm(c.square().sum(dim=1), x, c.T, alpha=-2).argmin(dim=1)


def _centre(rows: Tensor) -> Tensor:
    """Return the mean (dim,) of most rows (n, dim); a few rows far from the others, such as noise, do not move it."""
    far = (rows - rows.mean(dim=0)).square().sum(dim=1)
    most = (far <= 4 * far.median()).to(rows.dtype)
    return most @ rows / most.sum()
