"""Seconds that pieces of work take on a device.

product          launch + max(whole waves of tiles, traffic); a wave gives every processor one tile
convolution      operations at a share of the matrix rate, and the copies of a layout that the kernel does not take
attention        operations at a share of the matrix rate
everything else  launches + bytes at the bandwidth of a copy
"""

import math
from dataclasses import dataclass

from hubert_lightning.planning.devices import SPLITS, Device

SIZES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int16": 2}
"""Bytes of the types; others have one."""
TILE_INNER = 256
"""Least part of the inner dimension that a split product leaves to a tile."""


@dataclass(frozen=True)
class Product:
    """A matrix product, (rows, inner) by (inner, columns), several times.

    Args:
        rows: Rows of the result.
        columns: Columns of the result.
        inner: Terms of each sum.
        batch: Number of products.
        dtype: Precision.
    """

    rows: int
    columns: int
    inner: int
    batch: int = 1
    dtype: str = "bfloat16"

    @property
    def operations(self) -> float:
        return 2.0 * self.batch * self.rows * self.columns * self.inner

    def seconds(self, device: Device) -> float:
        size = SIZES.get(self.dtype, 1)
        moved = self.rows * self.inner + self.inner * self.columns + self.rows * self.columns
        traffic = self.batch * moved * size / device.bandwidth
        return device.product_launch + max(self._computing(device), traffic)

    def _computing(self, device: Device) -> float:
        rate = device.rate(self.dtype)
        if not device.tiles:
            return self.operations / rate
        # A large product is whole waves but for the last: 0.97 of the rate of the tiles
        rate = rate / 0.97 / device.processors
        best = math.inf
        for rows, columns, efficiency in device.tiles:
            for split in SPLITS:
                if split > 1 and self.inner < TILE_INNER * split:
                    break
                tiles = math.ceil(self.rows / rows) * math.ceil(self.columns / columns) * self.batch * split
                inner = math.ceil(self.inner / split)
                seconds = math.ceil(tiles / device.processors) * 2 * rows * columns * inner / (rate * efficiency)
                if split > 1:  # the parts are added up; most of them are in the cache
                    seconds += self.batch * self.rows * self.columns * 8 * split / device.bandwidth / 3 + 1e-6
                best = min(best, seconds)
        return best


@dataclass(frozen=True)
class Convolution:
    """A convolution, or the gradients of one.

    Args:
        operations: Floating-point operations of one of these products.
        moved: Bytes of input and output.
        gradients: Gradients that are computed: 0 for a forward pass, 1 for the weights' alone, 2 with the input's.
        dtype: Precision.
        grouped: Whether channels are in groups.
        single_channel: Whether the input has one channel, so that bytes limit the speed, not products.
        transposed: Bytes that change their layout on the way in and out; 0 if channels are the last dimension.
    """

    operations: float
    moved: float
    gradients: int = 0
    dtype: str = "bfloat16"
    grouped: bool = False
    single_channel: bool = False
    transposed: float = 0

    def seconds(self, device: Device) -> float:
        shares, rate = device.convolutions, device.rate(self.dtype)
        launches = 5 if self.gradients else 2
        if self.single_channel:
            computing = (4 if self.gradients else 3) * self.moved / device.bandwidth
        elif self.grouped:
            share = shares.grouped_gradient if self.gradients else shares.grouped
            computing = max(self.gradients, 1) * self.operations / (rate * share)
        elif self.gradients:
            computing = self.operations / (rate * shares.weight_gradient)
            computing += (self.gradients > 1) * self.operations / (rate * shares.input_gradient)
        else:
            computing = self.operations / (rate * shares.forward)
        traffic = (2 if self.gradients else 1) * self.moved / device.bandwidth
        copies = self.transposed / device.bandwidth if shares.transposes and not self.single_channel else 0
        return 1.5 * launches * device.launch + max(computing, traffic) + copies


@dataclass(frozen=True)
class FusedAttention:
    """Attention whose weights are never in memory.

    Args:
        operations: Floating-point operations.
        moved: Bytes read and written.
        backward: Whether it computes gradients.
        flash: Whether the flash kernel does it, instead of the memory-efficient one.
        dropout: Whether weights are dropped.
    """

    operations: float
    moved: float
    backward: bool = False
    flash: bool = True
    dropout: bool = False

    def seconds(self, device: Device) -> float:
        shares = device.attention
        forward, backward = (
            (shares.flash, shares.flash_backward) if self.flash else (shares.efficient, shares.efficient_backward)
        )
        share = (backward if self.backward else forward) * (shares.dropout if self.dropout else 1)
        launches = (3 if self.backward else 1) * device.product_launch
        return launches + max(self.operations / (device.matrix * share), self.moved / device.bandwidth)


@dataclass(frozen=True)
class Moved:
    """Work that is limited by the bytes that it moves.

    Args:
        moved: Bytes read and written.
        launches: Kernels.
    """

    moved: float
    launches: float = 1

    @property
    def operations(self) -> float:
        return 0

    def seconds(self, device: Device) -> float:
        return self.launches * device.launch + self.moved / device.bandwidth


Work = Product | Convolution | FusedAttention | Moved


def bytes_of(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * SIZES.get(dtype, 1)
