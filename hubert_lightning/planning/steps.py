"""A training step as work that `pricing` knows, from the size of the model and of its batch; no step is recorded.

Products and attention follow from their shapes. The bytes of everything else are those of recorded steps in bf16-mixed,
for each frame and dimension: `LAYER` and `OUTSIDE`. tests/gpu/test_planning.py compares whole steps with recorded ones;
where the code of a step changes by more than a tenth, the test fails and the table needs its new bytes.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.positions import BLOCK, is_multiplied
from hubert_lightning.model.windows import WindowLayout
from hubert_lightning.planning.devices import Device
from hubert_lightning.planning.pricing import Convolution, FusedAttention, Moved, Product, Work
from hubert_lightning.planning.recorded import StepCost
from hubert_lightning.planning.workload import Workload, gate_weights, matrix_parameters, num_parameters

Part = tuple[str, str, Work]
"""Kind of work, "forward", "backward" or "optimizer", and the work."""


class Batch(NamedTuple):
    """Shape of a batch.

    Args:
        rows: Utterances.
        frames: Frames of each.
        padded: Whether they have padding, so that attention has a mask.
    """

    rows: int
    frames: int
    padded: bool = False


class Traffic(NamedTuple):
    """Bytes and kernels of pointwise work, forward and backward.

    Args:
        forward: Bytes for each frame and dimension (a layer) or channel (outside the layers) of a forward pass.
        backward: The same of a backward pass.
        forward_launches: Kernels of a forward pass.
        backward_launches: Kernels of a backward pass.
    """

    forward: float
    backward: float
    forward_launches: int
    backward_launches: int


LAYER = {
    # pre_norm, compiled
    (False, False): Traffic(58, 116, 17, 27),
    (True, False): Traffic(52, 94, 17, 25),
    (False, True): Traffic(34, 56, 4, 11),
    (True, True): Traffic(24, 42, 4, 11),
}
"""Of a Transformer layer; the feed-forward's width is in `FFN`, the dropout's bytes are in those of Base."""
FFN = Traffic(4, 8, 0, 0)
"""Bytes for each frame and dimension of the feed-forward: GELU, its gradient, and the sum for the bias."""
OUTSIDE = {
    # conv_norm, compiled
    ("group", False): Traffic(1060, 1362, 99, 127),
    ("layer", False): Traffic(4075, 5178, 97, 132),
    ("group", True): Traffic(837, 1178, 23, 32),
    ("layer", True): Traffic(1836, 1954, 19, 34),
}
"""Of everything but the layers, for each frame and channel of the convolutions."""
POSITIONS, POSITIONS_COMPILED = Traffic(10, 16, 0, 0), Traffic(2, 6, 0, 0)
"""Bytes for each score of relative positions: their product with the gate in float32, its copy in bfloat16, and the
sums of the gradients. Counted from the tensors, not recorded."""
CAST = 6
"""Bytes for each weight of a cast to bfloat16, and of its gradient's back to float32."""
OUTSIDE_WEIGHTS = 13
"""Bytes for each weight outside the layers: casts, the weight norm of the positional convolution, layouts."""
OPTIMIZER = 28 + 4 + 8
"""Bytes for each parameter of the fused AdamW, of the gradient's norm, and of its scaling."""
OPTIMIZER_LAUNCHES, OPTIMIZER_CALLS = 40, 8


def step_cost(
    workload: Workload, batch: Batch, device: Device, *, compiled: bool = False, batches: int = 1
) -> StepCost:
    """Predict an optimizer step.

    Args:
        workload: Model in training.
        batch: Shape of each batch.
        device: GPU that computes it.
        compiled: Whether torch.compile fuses pointwise work.
        batches: Accumulated batches of a step.
    """
    parts: dict[str, float] = defaultdict(float)
    launches, host = 0.0, batches * device.host.loop
    for kind, phase, work in step_work(workload, batch, compiled=compiled):
        times = 1 if phase == "optimizer" else batches
        count = work.launches if isinstance(work, Moved) else 1
        parts[kind] += times * work.seconds(device)
        launches += times * count
        if phase == "optimizer":
            host += OPTIMIZER_CALLS * device.host.optimizer
        elif compiled and isinstance(work, Moved):
            host += times * count * device.host.compiled
        else:
            host += times * count * (device.host.backward if phase == "backward" else device.host.forward)
    return StepCost(sum(parts.values()), host, round(launches), 0, device.host.wait, dict(parts))


def step_work(workload: Workload, batch: Batch, *, compiled: bool = False) -> Iterator[Part]:
    """List the work of a batch and of the optimizer after it.

    Args:
        workload: Model in training.
        batch: Shape of the batch.
        compiled: Whether pointwise work is fused.
    """
    config = workload.encoder
    for kind, work in encoder_work(config, batch, config.num_layers, compiled=compiled):
        yield kind, "forward", work
    for kind, work in _gradients(workload, batch, compiled):
        yield kind, "backward", work
    frames = batch.rows * batch.frames
    predicted = round(workload.predicted * frames) if workload.clusters else frames
    for columns, inner, dtype in _head_products(workload):
        yield "products", "forward", Product(predicted, columns, inner, dtype=dtype)
        yield "products", "backward", Product(predicted, inner, columns, dtype=dtype)
        yield "products", "backward", Product(inner, columns, predicted, dtype=dtype)
    yield "optimizer", "optimizer", Moved(OPTIMIZER * num_parameters(workload), OPTIMIZER_LAUNCHES)


def encoder_work(
    config: EncoderConfig, batch: Batch, layers: int, *, compiled: bool = False
) -> Iterator[tuple[str, Work]]:
    """List the work of a forward pass of the encoder.

    Args:
        config: Size of the encoder.
        batch: Shape of the batch.
        layers: Layers that are computed.
        compiled: Whether pointwise work is fused.
    """
    frames = batch.rows * batch.frames
    outside = OUTSIDE[config.conv_norm, compiled]
    yield from (("products", product) for product in _convolution_products(config, frames))
    yield "products", Product(frames, config.dim, config.conv_channels)
    yield from _positions(config, batch, gradients=0, compiled=compiled)
    weights = _weights_outside(config)
    moved = outside.forward * config.conv_channels * frames + OUTSIDE_WEIGHTS * weights
    yield "pointwise", Moved(moved, outside.forward_launches)
    for _ in range(layers):
        yield from _layer(config, batch, compiled)


def _layer(config: EncoderConfig, batch: Batch, compiled: bool) -> Iterator[tuple[str, Work]]:
    frames, traffic = batch.rows * batch.frames, LAYER[config.pre_norm, compiled]
    for columns, inner in _layer_products(config):
        yield "products", Product(frames, columns, inner)
    yield "attention", _attention(config, batch, backward=False)
    moved = (traffic.forward * config.dim + FFN.forward * config.ffn_dim) * frames + CAST * _layer_weights(config)
    moved += (POSITIONS_COMPILED if compiled else POSITIONS).forward * _pairs(config, batch)
    yield "pointwise", Moved(moved, traffic.forward_launches)


def _gradients(workload: Workload, batch: Batch, compiled: bool) -> Iterator[tuple[str, Work]]:
    config = workload.encoder
    frames, traffic = batch.rows * batch.frames, LAYER[config.pre_norm, compiled]
    for _ in range(config.num_layers):
        if workload.activation_checkpointing:
            yield from _layer(config, batch, compiled)
        for columns, inner in _layer_products(config):
            yield from _product_gradients(frames, columns, inner)
        yield "attention", _attention(config, batch, backward=True)
        moved = (traffic.backward * config.dim + FFN.backward * config.ffn_dim) * frames + CAST * _layer_weights(config)
        moved += (POSITIONS_COMPILED if compiled else POSITIONS).backward * _pairs(config, batch)
        yield "pointwise", Moved(moved, traffic.backward_launches)
    yield from _positions(config, batch, gradients=2, compiled=compiled)
    yield from _product_gradients(frames, config.dim, config.conv_channels)
    outside = OUTSIDE[config.conv_norm, compiled]
    if workload.frozen_convolutions:
        yield "pointwise", Moved(0.1 * outside.backward * config.conv_channels * frames, outside.backward_launches // 3)
        return
    first = WindowLayout(config.conv_kernels[0]).columns
    for product in _convolution_products(config, frames):
        yield from _product_gradients(product.rows, product.columns, product.inner, product.inner > first)
    moved = outside.backward * config.conv_channels * frames + OUTSIDE_WEIGHTS * _weights_outside(config)
    yield "pointwise", Moved(moved, outside.backward_launches)


def _product_gradients(rows: int, columns: int, inner: int, of_input: bool = True) -> Iterator[tuple[str, Work]]:
    if of_input:
        yield "products", Product(rows, inner, columns)
    yield "products", Product(inner, columns, rows)


def _convolution_products(config: EncoderConfig, frames: int) -> Iterator[Product]:
    """Convolutions are products over channels that lie side by side: a stride at once, and the rest of a kernel."""
    length, channels = frames * config.clock.hop, config.conv_channels
    for index, (kernel, stride) in enumerate(zip(config.conv_kernels, config.conv_strides, strict=True)):
        length //= stride
        if index == 0:
            yield Product(length, channels, WindowLayout(kernel, stride).columns)
            continue
        yield Product(length, channels, stride * channels)
        for columns in range(stride, kernel, stride):
            yield Product(length, channels, min(stride, kernel - columns) * channels)


def _layer_products(config: EncoderConfig) -> tuple[tuple[int, int], ...]:
    """Columns and inner dimension of the products of a layer."""
    dim, ffn = config.dim, config.ffn_dim
    return (3 * dim, dim), (dim, dim), (ffn, dim), (dim, ffn)


def _head_products(workload: Workload) -> Iterator[tuple[int, int, str]]:
    dim = workload.encoder.dim
    for clusters in workload.clusters:
        yield workload.final_dim, dim, "bfloat16"
        yield clusters, workload.final_dim, "float32"  # cosines
    if workload.tokens:
        yield workload.tokens, dim, "bfloat16"


def _attention(config: EncoderConfig, batch: Batch, backward: bool) -> FusedAttention:
    operations = 4.0 * batch.rows * batch.frames**2 * config.dim
    positions = 2 * _pairs(config, batch)  # in bfloat16, read; and their gradient, written
    moved = 4 * 2 * batch.rows * batch.frames * config.dim + positions
    if backward:
        operations, moved = 2.5 * operations, 2 * moved
    masked = batch.padded or config.position_buckets > 0
    return FusedAttention(operations, moved, backward, not masked, config.attention_dropout > 0)


def _pairs(config: EncoderConfig, batch: Batch) -> int:
    """Scores of attention that relative positions are added to; 0 without them."""
    return batch.rows * config.num_heads * batch.frames**2 if config.position_buckets else 0


def _positions(config: EncoderConfig, batch: Batch, gradients: int, compiled: bool) -> Iterator[tuple[str, Work]]:
    """The positional convolution, or its gradients: products of blocks, or what cuDNN computes."""
    channels, kernel, groups = config.dim // config.pos_groups, config.pos_kernel, config.pos_groups
    size = 2 * batch.rows * batch.frames * config.dim
    if not is_multiplied(channels, kernel, batch.rows * batch.frames):
        operations = 2.0 * batch.rows * batch.frames * kernel * config.dim * channels
        yield "convolutions", Convolution(operations, 2 * size, gradients, grouped=True, transposed=2 * 2 * size)
        return
    rows, columns, inner = (
        batch.rows * math.ceil(batch.frames / BLOCK),
        channels * BLOCK,
        channels * (kernel + BLOCK - 1),
    )
    yield "products", Product(rows, columns, inner, groups)
    windows, matrix = 2 * groups * rows * inner, 2 * groups * columns * inner
    moved = (1 if compiled else 2) * max(gradients, 1) * (windows + matrix + 2 * size)
    if gradients:
        yield "products", Product(columns, inner, rows, groups)
        moved += matrix
    yield "pointwise", Moved(moved, (2 if compiled else 9) * max(gradients, 1))


def _layer_weights(config: EncoderConfig) -> int:
    return 4 * config.dim**2 + 2 * config.dim * config.ffn_dim + gate_weights(config)


def _weights_outside(config: EncoderConfig) -> int:
    return matrix_parameters(config) - config.num_layers * _layer_weights(config)
