"""Floating-point operations of a training step, counted: what model FLOPs utilisation is a share of.

Counted are the products of matrices and the convolutions, a multiplication and an addition as two; norms, activations,
softmax and dropout are not. With frames T and the lengths L_i after each convolution, one utterance takes

    convolution i            2 · L_i · kernel · channels in · channels out
    projection               2 · T · channels · dim
    positional convolution   2 · (T + 1) · kernel · dim · dim / groups
    each layer               2 · T · (4 · dim² + 2 · dim · ffn) + 4 · T² · dim
    each head                2 · predicted frames · (dim · final dim + final dim · clusters)

A backward pass takes twice as much (gradients of inputs and of weights), but nobody needs the gradient of the audio.
What activation checkpointing computes again is not counted, and dropped layers are counted as if they were there.
`tests/model/test_flops.py` compares this with torch's own counter.
"""

from hubert_lightning.frames import num_frames
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.convolutions import KERNELS, STRIDES


def encoder_operations(config: EncoderConfig, samples: int) -> int:
    """Of a forward and backward pass of the encoder over one utterance of so many samples."""
    first, others = _convolutions(config, samples)
    frames, dim = num_frames(samples), config.dim
    projection = 2 * frames * config.conv_channels * dim
    positions = 2 * (frames + 1 - config.pos_kernel % 2) * config.pos_kernel * dim * dim // config.pos_groups
    layer = 2 * frames * (4 * dim**2 + 2 * dim * config.ffn_dim) + 4 * frames**2 * dim
    convolutions = first + others if config.feature_grad_mult == 0 else 2 * first + 3 * others  # frozen: forward alone
    return convolutions + 3 * (projection + positions + config.num_layers * layer)


def head_operations(dim: int, final_dim: int, clusters: list[int], frames: int) -> int:
    """Of a forward and backward pass of the heads at so many frames."""
    return 3 * sum(2 * frames * (dim * final_dim + final_dim * number) for number in clusters)


def _convolutions(config: EncoderConfig, samples: int) -> tuple[int, int]:
    operations, length, channels = [], samples, 1
    for kernel, stride in zip(KERNELS, STRIDES, strict=True):
        length = (length - kernel) // stride + 1
        operations.append(2 * length * kernel * channels * config.conv_channels)
        channels = config.conv_channels
    return operations[0], sum(operations[1:])
