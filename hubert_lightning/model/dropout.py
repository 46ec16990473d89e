"""Dropout of elements and attention weights, and skipped layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` with a faster draw on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements in training.

        Args:
            x: (…).

        Returns:
            (…).
        """
        return _dropout(x, self.p) if self.training else x


def _dropout(x: Tensor, p: float) -> Tensor:
    if torch.compiler.is_exporting():  # exported graphs are for inference
        return x
    if p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    # On a CPU, torch draws one element after the other: a tenth of a step in bfloat16. One 64-bit word gives four
    # draws of 16 bits in a quarter of the time; p is rounded to a multiple of 2⁻¹⁶.
    dropped = round(p * 2**16)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return x * kept.to(x.dtype).mul_(1 / (1 - dropped / 2**16))


def attention_bias(padding: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what all layers add to their attention scores, so that no frame attends to padding.

    Args:
        padding: (batch, frames) bool, true for padding.
        dtype: Precision of the queries; torch would convert another one in every layer.

    Returns:
        (batch, 1, 1, frames), 0 and, for padding, -inf.
    """
    rows, frames = padding.shape
    # Rows of whole 16 bytes, as the kernels of GPUs require; torch would copy others in every layer
    width = frames if padding.device.type == "cpu" else -(-frames // 8) * 8
    bias = torch.zeros(rows, 1, 1, width, dtype=dtype, device=padding.device)[..., :frames]
    return bias.masked_fill_(padding[:, None, None], -torch.inf)


def attend_to(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention with dropout of its weights.

    Args:
        query: (batch, heads, frames, head dim).
        key: (batch, heads, frames, head dim).
        value: (batch, heads, frames, head dim).
        bias: (batch, 1 or heads, 1 or frames, frames), added to the scores; None to attend to all frames.
        dropout: Probability that an attention weight is dropped.

    Returns:
        (batch, heads, frames, head dim).
    """
    if dropout == 0 or query.device.type != "cpu" or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(query, key, value, bias, dropout)
    # On a CPU, torch has no fused kernel for attention with dropout, and its fallback draws slowly
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return _dropout(scores.softmax(dim=-1).type_as(value), dropout) @ value


def without_effect(x: Tensor, module: nn.Module) -> Tensor:
    """Skip a module, and give its parameters gradients of 0, which other ranks and the optimiser expect.

    Args:
        x: (…), input of the module.
        module: Skipped module.

    Returns:
        (…), x itself.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not torch.is_grad_enabled() or not parameters:
        return x
    output: Tensor = _Identity.apply(x, *parameters)  # type: ignore[no-untyped-call, unused-ignore]
    return output


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:  # torch has no public type for ctx
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return (*gradients, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors))
