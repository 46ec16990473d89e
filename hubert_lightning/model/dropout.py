"""What a training step leaves out: elements, attention weights, layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """torch's, but for how it is drawn on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(…) → (…)"""
        return _dropout(x, self.p) if self.training else x


def _dropout(x: Tensor, p: float) -> Tensor:
    if torch.compiler.is_exporting():  # a graph is one of evaluation, in which nothing is drawn
        return x
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    # On a CPU, torch draws one element after the other: a tenth of a step in bfloat16. Four of 16 bits come from one
    # word, which takes a quarter of the time; p is rounded to a multiple of 2⁻¹⁶.
    dropped = round(p * 2**16)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return x * kept.to(x.dtype).mul_(1 / (1 - dropped / 2**16))


def attend_to(query: Tensor, key: Tensor, value: Tensor, attend: Tensor | None, dropout: float) -> Tensor:
    """(batch, heads, frames, head dim) of each → (batch, heads, frames, head dim)"""
    if dropout == 0 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attend, dropout)
    # On a CPU, torch has no kernel of its own for attention with dropout, and what it does instead draws slowly
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if attend is not None:
        scores = scores.masked_fill(~attend, -torch.inf)
    return _dropout(scores.softmax(dim=-1).type_as(value), dropout) @ value


def without_effect(x: Tensor, module: nn.Module) -> Tensor:
    """x itself, as if the module had added 0: it gets a gradient, as other ranks and the optimiser expect of it."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return _Identity.apply(x, *parameters) if torch.is_grad_enabled() and parameters else x


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *without_effect: Tensor) -> Tensor:
        ctx.save_for_backward(*without_effect)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return (*gradients, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors))
