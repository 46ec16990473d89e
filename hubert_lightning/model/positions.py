"""The positional convolution: relative positions from the frames around each frame (wav2vec 2.0 §2)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_lightning.frames import padding_mask
from hubert_lightning.model.compilation import compilable
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.devices import without_waiting
from hubert_lightning.model.products import in_autocast

BLOCK = 8
"""Frames that one row of a product of `convolved_blocks` has: more take more operations, fewer take more copies."""
LEAST_KERNEL = 4 * BLOCK
"""Smallest kernel that is computed in blocks: its products take at most a quarter more operations."""
LEAST_FRAMES = 2048
"""Fewest frames of a batch that are computed in blocks: below, the matrix of kernels takes longer than it saves."""


class FixedBatchNorm(nn.Module):
    """A batch norm whose statistics never change: no frame depends on other rows, on padding or on ranks.

    Args:
        dim: Channels.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the channels by the statistics: (batch, frames, dim) to (batch, frames, dim)."""
        scale = self.weight * (self.variance + 1e-5).rsqrt()
        return ((x - self.mean) * scale + self.bias).type_as(x)


class PositionalConvolution(nn.Module):
    """Relative positions as a grouped convolution over the frames around each frame (wav2vec 2.0 §2)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        conv = nn.Conv1d(
            config.dim, config.dim, config.pos_kernel, padding=config.pos_kernel // 2, groups=config.pos_groups
        )
        self.batch_norm = FixedBatchNorm(config.dim) if config.pos_batch_norm else None
        self.conv: Any = conv  # torch gives a weight norm no type
        if not config.pos_batch_norm:
            self.conv = nn.utils.parametrizations.weight_norm(conv, dim=2)  # one gain for each position

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the class that torch makes for a weight norm, which cannot be pickled."""
        if self.batch_norm is not None:
            return self.__dict__.copy()
        conv, parameters = self.conv, dict(self.conv.named_parameters())
        sizes = {name: getattr(conv, name) for name in ("in_channels", "kernel_size", "padding", "groups")}
        attributes = {name: value for name, value in self.__dict__.items() if name != "_modules"}
        return {"attributes": attributes, "sizes": sizes, "parameters": parameters, "training": conv.training}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "sizes" not in state:
            self.__dict__.update(state)
            return
        self.__dict__.update(state["attributes"], _modules={})
        channels = state["sizes"].pop("in_channels")
        conv = nn.utils.skip_init(nn.Conv1d, channels, channels, **state["sizes"])  # type: ignore[no-untyped-call, unused-ignore]
        self.conv = nn.utils.parametrizations.weight_norm(conv, dim=2).train(state["training"])
        for name, value in state["parameters"].items():
            owner, _, last = name.rpartition(".")
            setattr(self.conv.get_submodule(owner), last, value)

    def forward(self, x: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Compute what is added to each frame, before its GELU, which is compiled with the sum.

        Args:
            x: (batch, frames, dim), zeros where there is padding.
            num_frames: (batch,), frames before padding, whose output then does not depend on the padding. A batch norm
                shifts the zeros; in the reference, the convolution sees them shifted.

        Returns:
            (batch, frames, dim).
        """
        frames = x.shape[1]
        if self.batch_norm is not None:
            x = self.batch_norm(x)
            if num_frames is not None:
                padding = padding_mask(without_waiting(num_frames, x.device), frames)
                x = x.masked_fill(padding[..., None], 0)
        if self._uses_products(x):
            assert self.conv.bias is not None
            blocks = self._multiplied(in_blocks(x), self.conv.weight, self.conv.bias)
            return blocks.flatten(1, 2)[:, :frames].contiguous()  # one layout, for which `_positioned` is compiled
        # An even kernel gives one frame too many, the last
        return self._convolved(x.transpose(1, 2))[..., :frames].transpose(1, 2)

    def _uses_products(self, x: Tensor) -> bool:
        """Whether products are used: on GPUs in reduced precision, whose grouped convolutions are slow."""
        if x.device.type != "cuda" or torch.compiler.is_exporting():
            return False
        dtype = torch.get_autocast_dtype("cuda") if in_autocast(x) else x.dtype
        conv = self.conv
        return dtype.itemsize == 2 and is_multiplied(
            conv.in_channels // conv.groups, conv.kernel_size[0], x.shape[0] * x.shape[1]
        )

    @compilable((0, 1), (), ())
    def _multiplied(self, blocks: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return convolved_blocks(blocks, weight, bias)

    def _convolved(self, x: Tensor) -> Tensor:
        conv = self.conv
        if x.device.type != "cpu":
            convolved: Tensor = conv(x)
            return convolved
        reduced = torch.is_autocast_enabled("cpu") or x.dtype == torch.bfloat16
        if not reduced or conv.in_channels // conv.groups >= 16:
            # As an image of height 1, with channels side by side in memory, the convolution takes half of the time
            weight = conv.weight[:, :, None].contiguous(memory_format=torch.channels_last)
            padding = (0, *conv.padding)
            return F.conv2d(x[:, :, None], weight, conv.bias, padding=padding, groups=conv.groups)[:, :, 0]
        # torch 2.13 on processors with AMX computes narrower groups wrongly in bfloat16
        with torch.autocast("cpu", enabled=False):
            weight, bias = conv.weight.float(), conv.bias.float()
            return F.conv1d(x.float(), weight, bias, padding=conv.padding, groups=conv.groups).type_as(x)


def is_multiplied(channels: int, kernel: int, frames: int) -> bool:
    """Whether a grouped convolution is computed in blocks on a GPU, in reduced precision.

    Args:
        channels: Channels of a group; matrix units multiply multiples of eight.
        kernel: Frames under the kernel.
        frames: Frames of the batch.
    """
    return channels % 8 == 0 and kernel >= LEAST_KERNEL and frames >= LEAST_FRAMES


def in_blocks(x: Tensor) -> Tensor:
    """Cut utterances into blocks.

    Args:
        x: (batch, frames, channels).

    Returns:
        (batch, blocks, BLOCK, channels), with zeros after the last frame.
    """
    rest = -x.shape[1] % BLOCK
    return torch.unflatten(F.pad(x, (0, 0, 0, rest)) if rest else x, 1, (-1, BLOCK))


def convolved_blocks(blocks: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve with stride 1 and any number of groups by matrix products.

    A row of a product has all the frames that a block depends on; the matrix has the kernel once for each frame of the
    block, shifted by a frame each. The zeros around the kernels take 1 + (BLOCK - 1) / kernel times the operations of
    the convolution. Under autocast, it computes in the lower precision.

    Args:
        blocks: (batch, blocks, BLOCK, channels), from `in_blocks`.
        weight: (channels out, channels / groups, kernel).
        bias: (channels out,).

    Returns:
        (batch, blocks, BLOCK, channels out), as of a convolution with padding kernel // 2, without its last frame where
        the kernel is even.
    """
    dtype = torch.get_autocast_dtype(blocks.device.type) if in_autocast(blocks) else blocks.dtype
    output: Tensor = _GroupedConvolution.apply(blocks.to(dtype), weight)  # type: ignore[no-untyped-call, unused-ignore]
    return output + bias.to(dtype)


class _GroupedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Tensor, weight: Tensor) -> Tensor:  # torch has no public type for ctx
        ctx.save_for_backward(blocks, weight)
        return _convolved(*_in_groups(blocks, weight), weight.shape[2] // 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        blocks, weight = ctx.saved_tensors
        x, kernels = _in_groups(blocks, weight)
        groups, channels_out, kernel, _ = kernels.shape
        gradient = torch.unflatten(gradient, 3, (groups, channels_out))
        of_blocks, of_weight = None, None
        if ctx.needs_input_grad[0]:
            # The gradient of a convolution is one with the kernel in reverse
            of_blocks = _convolved(gradient, kernels.flip(2).transpose(1, 3), kernel - 1 - kernel // 2)
        if ctx.needs_input_grad[1]:
            columns = gradient.permute(3, 4, 2, 0, 1).reshape(groups, channels_out * BLOCK, -1)
            of_matrix = columns @ _windows(x, kernel, kernel // 2)
            of_weight = _sum_of_shifted(of_matrix, kernels.shape, weight.dtype).transpose(2, 3).reshape(weight.shape)
        return of_blocks, of_weight


def _in_groups(blocks: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (batch, blocks, BLOCK, groups, channels), and weights as (groups, channels out, kernel, channels)."""
    groups = blocks.shape[3] // weight.shape[1]
    kernels = torch.unflatten(weight.to(blocks.dtype), 0, (groups, -1)).transpose(2, 3)
    return torch.unflatten(blocks, 3, (groups, -1)), kernels


def _convolved(x: Tensor, kernels: Tensor, before: int) -> Tensor:
    """Convolve (batch, blocks, BLOCK, groups, channels), with zeros before it, to (batch, blocks, BLOCK, channels)."""
    batch, blocks = x.shape[:2]
    groups, channels_out, kernel, _ = kernels.shape
    rows = _windows(x, kernel, before) @ _shifted(kernels).transpose(1, 2)
    return rows.view(groups, batch, blocks, channels_out, BLOCK).permute(1, 2, 4, 0, 3).flatten(3)


def _windows(x: Tensor, kernel: int, before: int) -> Tensor:
    """Frames that each block depends on: (groups, batch · blocks, (kernel + BLOCK - 1) · channels)."""
    batch, blocks, _, groups, channels = x.shape
    width = kernel + BLOCK - 1
    padded = F.pad(x.flatten(1, 2), (0, 0, 0, 0, before, kernel - 1 - before))
    windows = padded.unfold(1, width, BLOCK)  # (batch, blocks, groups, channels, width)
    return windows.permute(2, 0, 1, 4, 3).reshape(groups, batch * blocks, width * channels)


def _shifted(kernels: Tensor) -> Tensor:
    """Matrix of kernels, each shifted by a frame more: (groups, channels out · BLOCK, (kernel + BLOCK - 1) · channels).

    A row that is longer than those of the matrix by a frame shifts what follows it by a frame.
    """
    groups, channels_out, kernel, channels = kernels.shape
    last = kernels.reshape(groups, channels_out, kernel * channels)
    longer = F.pad(last, (0, BLOCK * channels))
    matrix = torch.cat([longer] * (BLOCK - 1) + [last], dim=2)
    return matrix.view(groups, channels_out * BLOCK, (kernel + BLOCK - 1) * channels)


def _sum_of_shifted(of_matrix: Tensor, sizes: torch.Size, dtype: torch.dtype) -> Tensor:
    """Add up the parts of a matrix's gradient that belong to the same kernel; `sizes` are those of the kernels."""
    groups, channels_out, kernel, channels = sizes
    width = (kernel + BLOCK - 1) * channels
    parts = of_matrix.contiguous().as_strided(
        (groups, channels_out, BLOCK, kernel * channels),
        (channels_out * BLOCK * width, BLOCK * width, width + channels, 1),
    )
    return parts.sum(dim=2, dtype=dtype).view(sizes)
