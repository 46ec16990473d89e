"""Floating-point operations of a training step, from which model FLOPs utilisation is computed.

Matrix products and convolutions count, a multiplication and an addition as two operations; norms, activations, softmax
and dropout do not. With frames T and the lengths L_i after each convolution, one utterance takes

    convolution i            2 · L_i · kernel · channels in · channels out
    projection               2 · T · channels · dim
    positional convolution   2 · (T + 1) · kernel · dim · dim / groups
    each layer               2 · T · (4 · dim² + 2 · dim · ffn) + 4 · T² · dim
    its gates, in WavLM      2 · T · dim · 8
    each head                2 · predicted frames · (dim · final dim + final dim · clusters)

A backward pass takes twice as much (gradients of inputs and of weights), without the gradient of the audio. Layers that
activation checkpointing computes again do not count; layers that layer drop skips do.

torch's `FlopCounterMode` and Lightning's `measure_flops` give the same numbers in tests. They do not replace these
formulas: they run the model, once for each length of a batch, and ignore groups in the gradient of a convolution.
"""

from hubert_lightning.frames import num_frames
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.relative_positions import GATES, PARTS


def encoder_operations(config: EncoderConfig, samples: int) -> int:
    """Count the operations of a forward and backward pass of the encoder over one utterance.

    Args:
        config: Size of the encoder.
        samples: Samples of the utterance.

    Returns:
        Floating-point operations.
    """
    first, others = _convolutions(config, samples)
    frames, dim = num_frames(samples, config.clock), config.dim
    projection = 2 * frames * config.conv_channels * dim
    positions = 2 * (frames + 1 - config.pos_kernel % 2) * config.pos_kernel * dim * dim // config.pos_groups
    layer = 2 * frames * (4 * dim**2 + 2 * dim * config.ffn_dim) + 4 * frames**2 * dim
    if config.position_buckets:
        layer += 2 * frames * dim * GATES * PARTS
    convolutions = first + others if config.feature_grad_mult == 0 else 2 * first + 3 * others  # frozen: forward alone
    return convolutions + 3 * (projection + positions + config.num_layers * layer)


def head_operations(dim: int, final_dim: int, clusters: list[int], frames: int) -> int:
    """Count the operations of a forward and backward pass of the heads of pre-training.

    Args:
        dim: Width of the encoder.
        final_dim: Width of the projection.
        clusters: Clusters of each head.
        frames: Predicted frames.

    Returns:
        Floating-point operations.
    """
    return 3 * sum(2 * frames * (dim * final_dim + final_dim * number) for number in clusters)


def _convolutions(config: EncoderConfig, samples: int) -> tuple[int, int]:
    operations, length, channels = [], samples, 1
    for kernel, stride in zip(config.conv_kernels, config.conv_strides, strict=True):
        length = (length - kernel) // stride + 1
        operations.append(2 * length * kernel * channels * config.conv_channels)
        channels = config.conv_channels
    return operations[0], sum(operations[1:])
