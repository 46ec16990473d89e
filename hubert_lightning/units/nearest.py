"""Nearest centroids of rows, and sums of the rows of each cluster: what all of K-means is made of."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

CACHED_PRODUCTS = 2**18
"""Products of a block of rows with all centroids, which stay in a processor's cache: 1 MiB."""
WIDE = 128
"""Dimensions above which a processor adds rows in float32."""
GPU_PRODUCTS = 2**27
"""Products of rows with all centroids that a GPU keeps at once: 512 MiB."""


@contextmanager
def float32_products() -> Iterator[None]:
    """Compute matrix products of float32 in float32, whatever a user allows elsewhere (TF32, bfloat16).

    Half of the digits confuse near neighbours, and the inertia of a K-means is a difference of large numbers.
    """
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        try:
            allowed = torch.get_float32_matmul_precision()
        except RuntimeError:  # set for a backend alone, by names that torch does not mix with the older ones
            backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
            kept = [backend.fp32_precision for backend in backends]
            try:
                for backend in backends:
                    backend.fp32_precision = "ieee"
                yield
            finally:
                for backend, precision in zip(backends, kept, strict=True):
                    backend.fp32_precision = precision
            return
        if allowed == "highest":
            yield
            return
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)


@torch.no_grad()
def nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest centroid of each row.

    Args:
        x: (rows, dim) float32.
        centroids: (clusters, dim) float32.

    Returns:
        (rows,) float32, (‖x - c‖² - ‖x‖²) / 2 of the nearest centroid, and (rows,) int64, its cluster.
    """
    half_norm = centroids.square().sum(dim=1) / 2
    if x.device.type == "cpu":
        return _nearest_on_cpu(x, centroids, half_norm)
    if len(x) > 1 and len(x) * len(centroids) > GPU_PRODUCTS:
        parts = [nearest(part, centroids) for part in torch.split(x, max(GPU_PRODUCTS // len(centroids), 1))]
        return torch.cat([best for best, _ in parts]), torch.cat([cluster for _, cluster in parts])
    best, cluster = torch.addmm(half_norm, x, centroids.T, alpha=-1).min(dim=1)  # ‖x - c‖² - ‖x‖² = ‖c‖² - 2xc
    return best, cluster


def _nearest_on_cpu(x: Tensor, centroids: Tensor, half_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Block by block, one block a thread.

    Pooling finds the largest of each column with vector instructions, seven times as fast as `min` along rows.
    """
    (rows, dim), clusters = x.shape, len(centroids)
    best, cluster = x.new_empty(rows), torch.empty(rows, dtype=torch.long)
    block, threads, start = max(CACHED_PRODUCTS // clusters, 16), torch.get_num_threads(), 0
    while start < rows:
        size = min(block, math.ceil((rows - start) / threads))
        blocks = min(threads, (rows - start) // size)
        part = slice(start, start + blocks * size)
        columns = x[part].view(blocks, size, dim).mT
        products = torch.baddbmm(-half_norm[:, None], centroids.expand(blocks, -1, -1), columns)
        image = products.view(blocks, clusters, 1, size).permute(0, 3, 1, 2)  # rows are channels, last in memory
        largest, index = F.max_pool2d(image, (clusters, 1), return_indices=True)
        best[part], cluster[part] = -largest.flatten(), index.flatten()
        start = part.stop
    return best, cluster


def cluster_sums(x: Tensor, cluster: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Sum and count the rows of each cluster, without waiting for a GPU.

    Sums are added in float64, so that they hardly depend on the order, which differs between runs on a GPU and with the
    ranks; but wide rows on a processor, where it would take long, in float32 and always in the same order.

    Args:
        x: (rows, dim) float32.
        cluster: (rows,) int64.
        clusters: Number of clusters.

    Returns:
        Sums (clusters, dim) float64 or float32, and counts (clusters,) float64.
    """
    dim = x.shape[1]
    if x.device.type != "cpu":
        counts = torch.zeros(clusters, dtype=torch.float64, device=x.device)
        counts.index_add_(0, cluster, counts.new_ones(()).expand(len(x)))
        return torch.zeros(clusters, dim, dtype=torch.float64, device=x.device).index_add_(
            0, cluster, x.double()
        ), counts
    counts = torch.bincount(cluster, minlength=clusters)
    weights = x.double() if dim <= WIDE else x
    # index_add_ takes three times as long there
    sums = F.embedding_bag(cluster.argsort(stable=True), weights, counts.cumsum(dim=0) - counts, mode="sum")
    return sums, counts.double()
