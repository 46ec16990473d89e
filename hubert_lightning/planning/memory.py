"""Memory of a training step, as a function of its frames.

Memory at the start of a backward pass is linear in the frames of a batch:

    standing                weights, AdamW's two moments, gradients of the batches before, DDP's buckets: float32
    casts                   the matrices in bfloat16, which autocast keeps for the backward pass
    activations · frames    tensors that the backward pass needs

The numbers of bytes are those of the tensors that autograd saves in bf16-mixed. tests/planning/test_memory.py compares
them with the live tensors of recorded steps. What the allocator cannot use, CUDA's own memory and NCCL's buffers are
`RESERVED` and `SLACK`.
"""

from typing import NamedTuple

from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.planning.workload import Workload, layer_parameters, matrix_parameters, num_parameters

GIB = 2**30
RESERVED = 1.5 * GIB
"""CUDA's context, the libraries' workspaces and NCCL's buffers; an assumption."""
SLACK = 0.06
"""Fraction of memory that the allocator loses to fragmentation; an assumption."""


class Memory(NamedTuple):
    """Bytes of a training step on one GPU.

    Args:
        standing: Bytes at the start of a backward pass that do not depend on the batch.
        per_frame: Bytes of each frame at the start of a backward pass.
        standing_late: Bytes at its end that do not depend on the batch: all gradients exist.
        per_frame_late: Bytes of each frame when the first layer's gradients are computed.
    """

    standing: float
    per_frame: float
    standing_late: float
    per_frame_late: float

    def peak(self, frames: int) -> float:
        """Largest memory of tensors in a step.

        Args:
            frames: Frames of a batch, over all its rows.

        Returns:
            Bytes.
        """
        return max(self.standing + self.per_frame * frames, self.standing_late + self.per_frame_late * frames)

    def largest_batch(self, capacity: float) -> int:
        """Frames of the largest batch that fits.

        Args:
            capacity: Memory of the GPU in bytes.

        Returns:
            Frames; 0 if the model does not fit.
        """
        usable = (capacity - RESERVED) * (1 - SLACK)
        early = (usable - self.standing) / self.per_frame
        late = (usable - self.standing_late) / self.per_frame_late
        return max(int(min(early, late)), 0)


def step_memory(
    workload: Workload, *, row_frames: int = 780, gpus: int = 1, sharded: bool = False, accumulates: bool = False
) -> Memory:
    """Predict the memory of a training step in bf16-mixed.

    Args:
        workload: Model in training.
        row_frames: Frames of an utterance, on which relative positions depend.
        gpus: GPUs that train together.
        sharded: Whether they share weights, gradients and optimizer states (LayerwiseFSDP).
        accumulates: Whether a step has several batches, so that gradients stand while the next batch is computed.
    """
    parameters, config = num_parameters(workload), workload.encoder
    outside = convolution_bytes(workload) + front_bytes(config) + head_bytes(workload)
    positions = position_bytes(config, row_frames)
    outside += 2 * positions  # of one layer, in float32
    layer_activations = layer_bytes(config) + positions
    late = outside + layer_activations
    layers = config.num_layers * layer_activations
    if workload.activation_checkpointing:  # the float32 input of each layer, and the layer that is computed again
        layers = config.num_layers * 4 * config.dim + layer_activations
    if sharded and gpus > 1:
        layer = layer_parameters(config)
        rest = parameters - config.num_layers * layer
        # Two layers in bfloat16 with gradients in bfloat16 and float32; the rest whole in float32, with casts
        own = 12 * parameters / gpus + 2 * layer * (2 + 2 + 4) + rest * (4 + 2 + 4)
        gradients = 4 * parameters / gpus
        return Memory(own + gradients * accumulates, outside + layers, own + gradients, late)
    buckets = 4 * parameters if gpus > 1 else 0
    own, casts = 12 * parameters + buckets, 2 * matrix_parameters(config)
    return Memory(own + casts + 4 * parameters * accumulates, outside + layers, own + 4 * parameters, late)


def layer_bytes(config: EncoderConfig) -> float:
    """Of a Transformer layer: inputs of its products, query, key, value and GELU's input in bfloat16, two float32 sums.

    Dropout adds a byte for each element of both outputs, attention a float32 for each head.
    """
    dropout = 2 * config.dim if config.dropout else 0
    statistics = 4 * (config.num_heads + 4)
    return 20 * config.dim + 4 * config.ffn_dim + dropout + statistics


def position_bytes(config: EncoderConfig, row_frames: int) -> float:
    """Of the gated relative positions of a layer, which are added to its scores: a bfloat16 for each pair of frames."""
    return 2 * config.num_heads * row_frames if config.position_buckets else 0


def convolution_bytes(workload: Workload) -> float:
    """Of the convolutions, over all their frames: each output, and each GELU's output.

    With a norm over channels, the norm's input and output are kept in float32 instead.
    """
    if workload.frozen_convolutions:
        return 0
    config, lengths = workload.encoder, 0.0
    length = float(config.clock.hop)
    for stride in config.conv_strides:
        length /= stride
        lengths += length
    return lengths * config.conv_channels * (10 if config.conv_norm == "layer" else 4)


def front_bytes(config: EncoderConfig) -> float:
    """Of the norm and projection of the convolutions' output, and of the positional convolution."""
    dropouts = (bool(config.input_dropout) + bool(config.dropout)) * config.dim
    return 10 * config.conv_channels + 16 * config.dim + dropouts


def head_bytes(workload: Workload) -> float:
    """Of the heads: the predicted frames, their projection, and the logits before and after the softmax."""
    dim = workload.encoder.dim
    if workload.tokens:
        return 2 * dim + 10 * workload.tokens
    return workload.predicted * sum(6 * dim + 10 * workload.final_dim + 12 * n for n in workload.clusters)
