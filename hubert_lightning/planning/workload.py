"""What a run trains: the model, its heads, and how many frames it predicts."""

import math
from dataclasses import dataclass

from hubert_lightning.model.config import EncoderConfig


@dataclass(frozen=True)
class Workload:
    """A model in training.

    Args:
        encoder: Size and regularisation of the encoder.
        clusters: Clusters of each head of pre-training; empty for fine-tuning.
        final_dim: Width in which frames and codewords are compared.
        tokens: Letters of a CTC head, with the blank; 0 for pre-training.
        predicted: Fraction of the frames that the loss is computed on; 0.55 are masked in pre-training (§II-B).
        activation_checkpointing: Whether the backward pass computes each layer again.
    """

    encoder: EncoderConfig
    clusters: tuple[int, ...] = (500,)
    final_dim: int = 256
    tokens: int = 0
    predicted: float = 0.55
    activation_checkpointing: bool = False

    @property
    def frozen_convolutions(self) -> bool:
        """Whether the convolutions are not trained, so that the backward pass needs nothing of them."""
        return self.encoder.feature_grad_mult == 0


def masked_fraction(mask_prob: float) -> float:
    """Fraction of frames that spans cover.

    Args:
        mask_prob: Number of spans times their length, as a fraction of the frames; spans overlap.
    """
    return 1 - math.exp(-mask_prob)


def layer_parameters(config: EncoderConfig) -> int:
    """Count the parameters of a Transformer layer: attention, feed-forward, and a norm for each."""
    dim, ffn = config.dim, config.ffn_dim
    gate = (gate_weights(config) + 8 + config.num_heads) if config.position_buckets else 0
    return 4 * (dim**2 + dim) + 2 * dim * ffn + ffn + dim + 4 * dim + gate


def gate_weights(config: EncoderConfig) -> int:
    """Count the weights of the matrix that gates the relative positions of a layer."""
    return 8 * (config.dim // config.num_heads) if config.position_buckets else 0


def _convolution_weights(config: EncoderConfig) -> int:
    first, *others = config.conv_kernels
    return (first + sum(others) * config.conv_channels) * config.conv_channels


def matrix_parameters(config: EncoderConfig) -> int:
    """Count the weights that autocast casts to the precision of the products: matrices and convolutions."""
    dim, channels = config.dim, config.conv_channels
    convolutions = _convolution_weights(config)
    positions = dim * dim // config.pos_groups * config.pos_kernel
    layer = 4 * dim**2 + 2 * dim * config.ffn_dim + gate_weights(config)
    return convolutions + channels * dim + positions + config.num_layers * layer


def num_parameters(workload: Workload) -> int:
    """Count the parameters of the encoder and its heads."""
    config = workload.encoder
    dim, channels = config.dim, config.conv_channels
    layers = len(config.conv_kernels)
    convolutions = _convolution_weights(config) + config.conv_bias * layers * channels
    norms = 2 * channels * (layers if config.conv_norm == "layer" else 1)
    front = 2 * channels + channels * dim + dim + dim  # norm, projection, mask embedding
    positions = dim * dim // config.pos_groups * config.pos_kernel + dim
    positions += 2 * dim if config.pos_batch_norm else config.pos_kernel  # gains
    positions += config.position_buckets * config.num_heads
    heads = sum(dim * workload.final_dim + workload.final_dim + n * workload.final_dim for n in workload.clusters)
    heads += workload.tokens * (dim + 1)
    return convolutions + norms + front + positions + 2 * dim + config.num_layers * layer_parameters(config) + heads
