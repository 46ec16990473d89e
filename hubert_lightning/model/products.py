"""Matrix products in float32 by the faster of the two libraries that torch has on a CPU.

torch computes them by MKL, which uses half of the vector width of AMD's processors: 105 of 230 GFLOP/s of a core with
AVX-512. oneDNN uses all of it. Reduced precision, GPUs and other processors are left to torch.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula


class Linear(nn.Linear):
    """`torch.nn.Linear` with faster products."""

    def forward(self, x: Tensor) -> Tensor:
        """Map the last dimension.

        Args:
            x: (…, in_features).

        Returns:
            (…, out_features).
        """
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `x @ weight.T + bias`.

    Args:
        x: (…, inner).
        weight: (columns, inner).
        bias: (columns,).

    Returns:
        (…, columns).
    """
    if not uses_onednn(x, weight) or x.numel() == 0:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        output: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call, unused-ignore]
        return output
    return _linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply two matrices, without a gradient in float32 on the processors that this module is for.

    Args:
        a: (rows, inner).
        b: (inner, columns).

    Returns:
        (rows, columns).
    """
    return _linear(a, b.T, None) if uses_onednn(a, b) and a.numel() else a @ b


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a product of matrices to another one in place, without a gradient.

    Args:
        total: (rows, columns).
        a: (rows, inner).
        b: (inner, columns).
    """
    if uses_onednn(a, b):
        total += product(a, b)
    else:
        total.addmm_(a, b)


def strided_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 2) -> Tensor:
    """Convolve with a stride by matrix products.

    `stride` frames lie side by side in a row of a product. A kernel longer than its stride takes the following row too.
    Under autocast, it computes in the lower precision.

    Args:
        x: (batch, frames, channels), a multiple of `stride` frames.
        weight: (channels out, channels, kernel), a kernel of at least `stride`.
        bias: (channels out,).
        stride: Frames from one kernel to the next.

    Returns:
        (batch, frames / stride, channels out). The last frames of each utterance, whose kernels reach beyond it, have
        no meaning.
    """
    if torch.compiler.is_exporting():
        return F.conv1d(x.transpose(1, 2), weight, bias, stride=stride).transpose(1, 2)
    dtype = torch.get_autocast_dtype(x.device.type) if in_autocast(x) else x.dtype
    output: Tensor = _StridedConvolution.apply(x.to(dtype), weight, bias, stride)  # type: ignore[no-untyped-call, unused-ignore]
    return output


def in_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor; `meta` has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def uses_onednn(*matrices: Tensor) -> bool:
    """Whether the product of matrices is left to oneDNN: in float32, on AMD's processors with AVX-512."""
    in_float32 = all(matrix.device.type == "cpu" and matrix.dtype == torch.float32 for matrix in matrices)
    if not in_float32 or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False  # a compiler chooses its products itself
    return onednn_is_faster()


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies in float32 faster than MKL on this processor."""
    information = Path("/proc/cpuinfo")
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call, unused-ignore]
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call, unused-ignore]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and information.exists()
        and "AuthenticAMD" in information.read_text()
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not (weight.is_contiguous() or weight.T.is_contiguous()):  # oneDNN multiplies parts of rows far more slowly
        weight = weight.T.contiguous().T if weight.stride(0) == 1 else weight.contiguous()
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return output


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # torch has no public type for ctx
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_x = _linear(gradient, weight.T, None) if ctx.needs_input_grad[0] else None
        of_weight = _linear(rows.T, x.flatten(0, -2).T, None) if ctx.needs_input_grad[1] else None
        of_bias = rows.sum(dim=0) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias


class _StridedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        channels_out, channels, kernel = weight.shape
        matrix = weight.transpose(1, 2).to(x.dtype, memory_format=torch.contiguous_format).flatten(1)
        first, *others = torch.split(matrix, stride * channels, dim=1)
        rows = x.reshape(-1, stride * channels)
        output = linear(rows, first, bias if bias is None else bias.to(x.dtype))
        for later, part in enumerate(others, start=1):
            add_product(output[:-later], rows[later:, : part.shape[1]], part.T)
        ctx.save_for_backward(x, matrix)
        ctx.kernel, ctx.stride, ctx.dtype = kernel, stride, weight.dtype
        return output.view(len(x), -1, channels_out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, matrix = ctx.saved_tensors
        kernel, channels = ctx.kernel, x.shape[-1]
        first, *others = torch.split(matrix, ctx.stride * channels, dim=1)
        rows, gradient = x.reshape(-1, ctx.stride * channels), gradient.flatten(0, 1)
        of_x, of_weight, of_bias = None, None, None
        if ctx.needs_input_grad[0]:
            of_x = product(gradient, first)
            for later, part in enumerate(others, start=1):
                add_product(of_x[later:, : part.shape[1]], gradient[:-later], part)
            of_x = of_x.view(x.shape)
        if ctx.needs_input_grad[1]:
            columns = gradient.T.contiguous() if uses_onednn(gradient) else gradient.T  # which oneDNN copies otherwise
            parts = [product(columns, rows)]
            for later, part in enumerate(others, start=1):
                parts.append(product(columns[:, :-later], rows[later:, : part.shape[1]]))
            of_matrix = torch.cat(parts, dim=1).view(-1, kernel, channels)
            of_weight = of_matrix.transpose(1, 2).to(ctx.dtype, memory_format=torch.contiguous_format)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(dim=0).to(ctx.dtype)
        return of_x, of_weight, of_bias, None


def _operations_of_linear(x: tuple[int, ...], weight: tuple[int, ...], *rest: object, **named: object) -> int:
    return 2 * math.prod(x) * weight[0]


def _operations_of_sum(total: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], **named: object) -> int:
    return 2 * math.prod(a) * b[1]


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_operations_of_linear)
if torch.ops.aten.addmm_ not in flop_registry:
    register_flop_formula(torch.ops.aten.addmm_)(_operations_of_sum)
