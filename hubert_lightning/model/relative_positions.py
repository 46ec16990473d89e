"""Gated relative position bias: what WavLM adds to the scores of attention (Chen et al. 2022, §III-B)."""

import math

import torch
from torch import Tensor, nn

from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.products import Linear

GATES = 2
"""Gates of each head and frame, as of a gated recurrent unit: update and reset."""
PARTS = 4
"""Outputs of the linear map that add up to a gate."""


class RelativePositions(nn.Module):
    """A learned score of each head for each distance between two frames, which all layers share.

    Half of the buckets is for frames that follow, half for others. In each half, the first half of the buckets has one
    distance each, and the others grow logarithmically to the largest distance, beyond which all share the last one.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.max_distance = config.position_distance
        self.embedding = nn.Embedding(config.position_buckets, config.num_heads)

    def forward(self, frames: int) -> Tensor:
        """Compute the score of each pair of frames.

        Args:
            frames: Frames of the batch.

        Returns:
            (heads, frames, frames or more): the frame that attends, the frame that is attended to. On a GPU the last
            dimension is rounded up to a multiple of 8, as its kernels require.
        """
        weight = self.embedding.weight
        width = frames if weight.device.type == "cpu" else -(-frames // 8) * 8
        distance = torch.arange(1 - frames, width, device=weight.device)
        scores: Tensor = self.embedding(self.bucket(distance)).T  # (heads, distances)
        if torch.compiler.is_exporting():
            index = torch.arange(width, device=weight.device) - torch.arange(frames, device=weight.device)[:, None]
            gathered: Tensor = scores[:, index + frames - 1]
            return gathered
        # The gradient of an unfolded view is a sum in a fixed order, also on a GPU
        pairs: Tensor = scores.contiguous().unfold(1, width, 1).flip(1)
        return pairs

    def bucket(self, distance: Tensor) -> Tensor:
        """Find the bucket of each distance.

        Args:
            distance: (…) int64, frame that is attended to minus frame that attends.

        Returns:
            (…) int64.
        """
        half = self.embedding.num_embeddings // 2
        exact, absolute = half // 2, distance.abs()
        octaves = torch.log(absolute.float() / exact) / math.log(self.max_distance / exact)
        distant = (exact + octaves.clamp(min=0) * (half - exact)).long().clamp(max=half - 1)
        return (distance > 0).long() * half + torch.where(absolute < exact, absolute, distant)


class PositionGate(nn.Module):
    """How much the relative positions weigh for each head and each frame that attends, by the input of a layer."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.linear = Linear(config.dim // config.num_heads, GATES * PARTS)
        self.scale = nn.Parameter(torch.ones(config.num_heads))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Compute what is added to the scores of attention.

        Args:
            x: (batch, frames, dim), input of attention.
            positions: (heads, frames, frames or more) of `RelativePositions`.

        Returns:
            (batch, heads, frames, frames) in the precision of `x` or higher.
        """
        heads = torch.unflatten(x, -1, (len(self.scale), -1)).transpose(1, 2)  # (batch, heads, frames, head dim)
        parts = torch.unflatten(self.linear(heads), -1, (GATES, PARTS))
        update, reset = parts.sum(-1, keepdim=True).sigmoid().unbind(-2)  # each (batch, heads, frames, 1)
        gate = update * (reset * self.scale[:, None, None] - 1) + 2
        bias: Tensor = gate * positions
        return bias[..., : x.shape[1]]
