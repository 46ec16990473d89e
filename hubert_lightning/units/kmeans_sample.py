"""The rows that a K-means is fitted on: dealt to ranks, read in pieces, projected to fewer dimensions."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hubert_lightning.errors import UserError, counted
from hubert_lightning.units.nearest import GPU_PRODUCTS, cluster_sums, nearest

CPU_PIECE, GPU_PIECE = 2**13, 2**16
"""Rows of a piece: those of a processor stay in its cache until they are added up, those of a GPU fill it."""


class Round(NamedTuple):
    """Result of a pass over rows, of all ranks; all float64.

    Args:
        means: (clusters, dim), mean of the rows of each cluster; 0 if it has none.
        counts: (clusters,), rows of each cluster.
        inertia: (), sum of the squared distances of rows to the centroids by which they were assigned.
    """

    means: Tensor
    counts: Tensor
    inertia: Tensor


class Sample:
    """The rows of all ranks, in a random order that does not depend on the rank of each row.

    Args:
        rows: (n, dim), this rank's rows, on any device.
        index: (n,) int64, index of each row among those of all ranks; needed with a group.
        seed: Seed of the order.
        group: Ranks that hold rows; None if this process is alone.
        device: Device that computes; that of the rows if not given.

    Attributes:
        total: Number of rows of all ranks.
        device: Device that computes.
        centre: (dim,), which is subtracted from every row.
        cluster: (n,) int32, cluster of each row in the last round over it, if the sample is projected.
    """

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
        self.centre: Tensor | None = None
        self.cluster: Tensor | None = None
        self._beyond: Tensor | None = None
        self._in_order = False  # whether the rows lie in their order
        self.total = len(rows) if group is None else int(self.sum(torch.tensor(len(rows), device=self.device)))
        order = torch.randperm(self.total, generator=torch.Generator().manual_seed(seed))
        if index is None:
            self._positions, self._order = torch.arange(self.total), order
        else:
            # positions of this rank's rows in the order of all, ascending, and the row at each
            self._positions, self._order = _inverse(order)[index.cpu()].sort()

    def check(self, num_clusters: int) -> None:
        """Check that all rows are finite, and enough for the clusters.

        Raises:
            UserError: They are not; on every rank.
        """
        if self.total < num_clusters:
            raise UserError(
                f"{counted(self.total, 'frame')} cannot make {num_clusters} clusters; give more frames or ask for "
                "fewer clusters"
            )
        # A sum is finite if all of its terms are, and takes a single pass
        sums = [part.sum(dtype=torch.float32) for part in torch.split(self.rows, 2**20)]
        broken = 0
        if sums and not torch.stack(sums).isfinite().all():
            broken = sum(int((~part.isfinite()).any(dim=1).sum()) for part in torch.split(self.rows, 2**16))
        if count := int(self.sum(torch.tensor(broken, device=self.device))):
            raise UserError(
                f"NaN or infinite features in {count} of {counted(self.total, 'frame')}; "
                "look for broken audio, or for an encoder whose training diverged"
            )

    def gather(self, size: int) -> Tensor:
        """Return the first rows of the order on every rank: (min(size, total), dim) float32."""
        mine = slice(0, int(torch.searchsorted(self._positions, size)))
        rows = torch.zeros(min(size, self.total), self.rows.shape[1], device=self.device)
        own = self.rows[self._order[mine].to(self.rows.device)].float()
        rows[self._positions[mine].to(self.device)] = own.to(self.device)
        return self.sum(rows)

    def projected(self, axes: Tensor) -> "Sample":
        """Project all rows, relative to the centre, to fewer dimensions.

        The new sample lies on the device that computes if a quarter of its memory is enough, in the order of this one.
        The inertia of its rounds counts what the projection leaves out: it is that of the centroids in the space of
        this sample.

        Args:
            axes: (dim, fewer), orthonormal.

        Returns:
            A sample of rows (n, fewer).
        """
        count, dim = len(self.rows), axes.shape[1]
        reduced = Sample.__new__(Sample)
        reduced.group, reduced.total, reduced.device, reduced.centre = self.group, self.total, self.device, None
        kept_on = self.device if _fits(4 * count * (dim + 4), self.device) else self.rows.device
        reduced.rows = torch.empty(count, dim, device=kept_on)
        reduced._beyond = torch.empty(count, device=kept_on)
        reduced.cluster = torch.empty(count, dtype=torch.int32, device=kept_on)
        reduced._positions, reduced._order, reduced._in_order = self._positions, torch.arange(count), True
        places, start = _inverse(self._order).to(kept_on), 0
        for x in self._pieces(0, self.total, len(axes)):
            y = x @ axes
            place = places[start : start + len(x)]
            reduced.rows[place] = y.to(kept_on)
            reduced._beyond[place] = (x.square().sum(dim=1) - y.square().sum(dim=1)).to(kept_on)
            start += len(x)
        return reduced

    def means(self, projected: "Sample", clusters: int) -> Round:
        """Compute the means of the clusters that the last round on all rows of a projected sample has found.

        The inertia is that of the rows with these means.
        """
        assert projected.cluster is not None
        cluster = projected.cluster[_inverse(self._order).to(projected.cluster.device)]
        return self.means_of(cluster, clusters)

    def means_of(self, cluster: Tensor, clusters: int) -> Round:
        """Compute the means of given clusters, and the inertia of the rows with these means.

        Args:
            cluster: (n,) integers, cluster of each of this rank's rows.
            clusters: Number of clusters.
        """
        totals, start = _Totals(clusters, self.rows.shape[1], self.device), 0
        cluster = cluster.to(self.device)
        for x in self._pieces(0, self.total, clusters):
            totals.add(x, cluster[start : start + len(x)].long())
            start += len(x)
        result = totals.round(self)
        between = (result.counts * result.means.square().sum(dim=1)).sum()
        return result._replace(inertia=result.inertia - between)

    def round(self, centroids: Tensor, size: int, first: int = 0) -> Round:
        """Assign rows `first` to `first + size` of the order to centroids (clusters, dim)."""
        centroids = centroids.float()
        clusters, dim = centroids.shape
        totals = _Totals(clusters, dim, self.device)
        own = start = 0 if size >= self.total else int(torch.searchsorted(self._positions, first))
        for x in self._pieces(first, size, clusters):
            half, cluster = nearest(x, centroids)
            totals.inertia += 2 * half.sum(dtype=torch.float64)
            totals.add(x, cluster)
            if self.cluster is not None:
                self.cluster[start : start + len(x)] = cluster
            start += len(x)
        if self._beyond is not None:
            totals.inertia += self._beyond[own:start].sum(dtype=torch.float64).to(self.device)
        return totals.round(self)

    def _pieces(self, first: int, size: int, clusters: int) -> Iterator[Tensor]:
        """Rows `first` to `first + size` of the order, relative to the centre; all rows come in their own order."""
        length = CPU_PIECE if self.device.type == "cpu" else max(min(GPU_PIECE, GPU_PRODUCTS // clusters), 1)
        start, end = torch.searchsorted(self._positions, torch.tensor([first, first + size])).tolist()
        if size >= self.total:
            parts: Iterator[Tensor] = iter(torch.split(self.rows, length))
        elif self._in_order:
            parts = iter(torch.split(self.rows[start:end], length))
        else:
            parts = (self.rows[part] for part in torch.split(self._order[start:end].to(self.rows.device), length))
        for part in moved(parts, self.device):
            x = part.float()
            yield x if self.centre is None else x - self.centre

    def of_first_rank(self, values: Tensor) -> Tensor:
        """Return the first rank's values on every rank: GPUs may round sums in another order."""
        if self.group is not None:
            values = values.contiguous()
            dist.broadcast(values, group=self.group, group_src=0)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of all ranks' values."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values


class _Totals:
    """Sums and counts of clusters and squared norms of rows, in float64, as one vector that ranks add up."""

    def __init__(self, clusters: int, dim: int, device: torch.device) -> None:
        self._values = torch.zeros(clusters * (dim + 1) + 1, dtype=torch.float64, device=device)
        self._table = self._values[:-1].view(clusters, dim + 1)
        self.inertia = self._values[-1]

    def add(self, x: Tensor, cluster: Tensor) -> None:
        sums, counts = cluster_sums(x, cluster, len(self._table))
        self._table[:, :-1] += sums
        self._table[:, -1] += counts
        self.inertia += torch.linalg.vector_norm(x, dim=1).square().sum(dtype=torch.float64)

    def round(self, sample: Sample) -> Round:
        sample.sum(self._values)
        counts = self._table[:, -1]
        return Round(self._table[:, :-1] / counts.clamp(min=1)[:, None], counts, self.inertia)


class _Slot:
    """A pinned buffer and its copy on a GPU.

    The copy lies in memory of the stream that computes, which may have been given back by work that is still under way:
    until then, it is in use.
    """

    def __init__(self, rows: Tensor, device: torch.device) -> None:
        self.pinned = None if rows.is_pinned() else torch.empty_like(rows, pin_memory=True)
        self.copy = torch.empty_like(rows, device=device)
        self.copied, self.used = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.used.record(torch.cuda.current_stream(device))


def moved(parts: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Move parts (rows, dim) to a device, each while the device works on the part before.

    The host waits for no computation, only until a part of two before has left its pinned buffer.

    Args:
        parts: Tensors of one device, type and width, of which the first is the longest.
        device: Where they go.

    Yields:
        Each part, valid until the next is asked for.
    """
    slots: list[_Slot] = []
    for number, part in enumerate(parts):
        if device.type != "cuda" or part.device.type != "cpu":
            yield part.to(device)
            continue
        if number == 0:
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            compute = torch.cuda.current_stream(device)
        if len(slots) < 2:
            slots.append(_Slot(part, device))
        slot = slots[number % 2]
        source = part
        if slot.pinned is not None:
            slot.copied.synchronize()
            source = slot.pinned[: len(part)].copy_(part)
        with torch.cuda.stream(stream):
            stream.wait_event(slot.used)
            slot.copy[: len(part)].copy_(source, non_blocking=True)
            slot.copied.record(stream)
        compute.wait_event(slot.copied)
        yield slot.copy[: len(part)]
        slot.used.record(compute)


def _inverse(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation))
    return inverse


def _fits(size: int, device: torch.device) -> bool:
    return device.type != "cuda" or 4 * size < torch.cuda.mem_get_info(device)[0]
