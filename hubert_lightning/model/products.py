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
from torch.utils.flop_counter import register_flop_formula


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


def _operations(x: tuple[int, ...], weight: tuple[int, ...], *rest: object, **named: object) -> int:
    return 2 * math.prod(x) * weight[0]


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_operations)
