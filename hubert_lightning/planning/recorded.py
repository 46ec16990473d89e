"""The price of recorded operations: a step as it was launched, and as a compiler could launch it.

An operation is whatever has the attributes of `Recorded`; tests/phantom records them on a GPU that is not there, and
benchmarks/roofline.py on a CPU.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

from hubert_lightning.planning.devices import Device
from hubert_lightning.planning.pricing import Convolution, FusedAttention, Moved, Product, Work, bytes_of


class Tensor(Protocol):
    """Shape, type and strides (in elements) of an operand."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def stride(self) -> tuple[int, ...]: ...


class Access(Protocol):
    """Bytes that are read or written of a storage, which has a number."""

    @property
    def storage(self) -> int: ...
    @property
    def bytes(self) -> int: ...


class Recorded(Protocol):
    """A call of an aten operator.

    Attributes:
        name: Operator, such as "addmm".
        phase: Part of the step: "forward", "backward", "optimizer" or others.
        ins: Tensors that it is given.
        outs: Tensors that it returns.
        reads: Storages that it reads.
        writes: Storages that it writes.
        launches: Kernels.
        dropout: Whether attention drops weights.
    """

    @property
    def name(self) -> str: ...
    @property
    def phase(self) -> str: ...
    @property
    def ins(self) -> Sequence[Tensor]: ...
    @property
    def outs(self) -> Sequence[Tensor]: ...
    @property
    def reads(self) -> Sequence[Access]: ...
    @property
    def writes(self) -> Sequence[Access]: ...
    @property
    def launches(self) -> int: ...
    @property
    def dropout(self) -> bool: ...


@dataclass(frozen=True)
class StepCost:
    """Predicted cost of a step.

    Args:
        gpu: Seconds of the GPU.
        host: Seconds of the host.
        launches: Kernels.
        waits: Times that the host waits for the GPU.
        wait: Idle time of the GPU after a wait, in seconds.
        parts: Seconds of the GPU by kind of work.
    """

    gpu: float
    host: float
    launches: int
    waits: int
    wait: float
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        """Seconds of a step: the host runs ahead of the GPU, so the slower of the two counts."""
        return max(self.gpu + self.waits * self.wait, self.host)


PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_addmm_activation", "linear", "_linear_pointwise")
CONVOLUTIONS = ("convolution", "cudnn_convolution", "mkldnn_convolution", "convolution_backward")
PARTS = {
    "norms": ("layer_norm", "group_norm", "batch_norm"),
    "dropout": ("dropout", "bernoulli"),
    "gelu": ("gelu",),
    "casts": ("_to_copy",),
    "sums": ("sum", "mean"),
    "optimizer": ("_fused_adam", "_foreach", "multi_tensor"),
}
"""Kind of work → parts of operators' names."""
UNFUSED = ("_fused_adam", "_foreach", "sort", "nonzero", "weight_norm", "index_put", "embedding", "topk")
"""Parts of the names of operators that a compiler launches as they are, as it does products and convolutions."""
SORTS = ("sort", "argsort", "topk")
SORTED_PASSES = 8


def eager_cost(operations: Sequence[Recorded], device: Device, waits: int = 0) -> StepCost:
    """Price a step as it was launched.

    Args:
        operations: Recorded operations of the step.
        device: Device that it would run on.
        waits: Times that the host waits for the GPU.
    """
    parts: defaultdict[str, float] = defaultdict(float)
    host, launches = device.host.loop, 0
    for operation in operations:
        parts[part_of(operation.name)] += work_of(operation).seconds(device)
        host += _host_seconds(operation, device)
        launches += operation.launches
    return StepCost(sum(parts.values()), host, launches, waits, device.host.wait, dict(parts))


def fused_cost(operations: Sequence[Recorded], device: Device, waits: int = 0) -> StepCost:
    """Price a step as if every run of pointwise work were one kernel, the best that a compiler can do.

    A run lies between products, convolutions and attention; its kernel reads what comes from outside and writes what is
    used outside. A sum over rows, as in gradients of biases and norms, takes a kernel more.

    Args:
        operations: Recorded operations of the step.
        device: Device that it would run on.
        waits: Times that the host waits for the GPU.
    """
    last_use: dict[int, int] = {}
    for index, operation in enumerate(operations):
        for access in operation.reads:
            last_use[access.storage] = index
    parts: defaultdict[str, float] = defaultdict(float)
    host, launches = device.host.loop, 0
    for first, last in _runs(operations):
        operation = operations[first]
        if is_barrier(operation.name):
            parts[part_of(operation.name)] += work_of(operation).seconds(device)
            launches += operation.launches
            host += min(_host_seconds(operation, device), operation.launches * device.host.compiled)
            continue
        work = _fused(operations[first:last], last, last_use)
        parts["pointwise"] += work.seconds(device)
        launches += round(work.launches)
        host += work.launches * device.host.compiled
    return StepCost(sum(parts.values()), host, launches, waits, device.host.wait, dict(parts))


def _runs(operations: Sequence[Recorded]) -> Iterable[tuple[int, int]]:
    """First and last + 1 of each barrier and of each run of other operations in one part of the step."""
    first = 0
    while first < len(operations):
        last = first + 1
        if not is_barrier(operations[first].name):
            phase = operations[first].phase
            while last < len(operations) and operations[last].phase == phase and not is_barrier(operations[last].name):
                last += 1
        yield first, last
        first = last


def _fused(run: Sequence[Recorded], end: int, last_use: dict[int, int]) -> Moved:
    outside: dict[int, int] = {}
    written: dict[int, int] = {}
    for operation in run:
        for access in operation.reads:
            if access.storage not in written:
                outside[access.storage] = max(outside.get(access.storage, 0), access.bytes)
        for access in operation.writes:
            written[access.storage] = max(written.get(access.storage, 0), access.bytes)
    # Storages that nothing reads are results of the step, such as gradients
    kept = {
        storage: size
        for storage, size in written.items()
        if storage in outside or storage not in last_use or last_use[storage] >= end
    }
    second_passes = sum(operation.name in ("sum", "native_layer_norm_backward") for operation in run)
    return Moved(sum(outside.values()) + sum(kept.values()), min(len(run), 1 + second_passes))


def work_of(operation: Recorded) -> Work:
    """Return what an operation does, as `pricing` knows it."""
    name, ins, outs = operation.name, operation.ins, operation.outs
    if name in PRODUCTS and len(ins) >= 2:
        transposed = name in ("linear", "_linear_pointwise")
        left, right = (ins[0], ins[1]) if transposed else (ins[-2], ins[-1])
        rows, inner = prod(left.shape[:-1]), left.shape[-1]
        if transposed:
            return Product(rows, right.shape[0], inner, dtype=right.dtype)
        batch = left.shape[0] if len(left.shape) == 3 else 1
        return Product(rows // batch if batch else 0, right.shape[-1], inner, batch, right.dtype)
    if name in CONVOLUTIONS:
        return _convolution(ins, outs, name == "convolution_backward")
    if "attention" in name and "scaled_dot_product" in name:
        return _attention(operation)
    moved = sum(access.bytes for access in (*operation.reads, *operation.writes))
    if name in SORTS:
        return Moved(SORTED_PASSES * moved, operation.launches)
    return Moved(moved, operation.launches)


def _convolution(ins: Sequence[Tensor], outs: Sequence[Tensor], backward: bool) -> Convolution:
    output, source, weight = (ins[0], ins[1], ins[2]) if backward else (outs[0], ins[0], ins[1])
    channels = source.shape[1]
    gradients = sum(len(out.shape) >= 3 for out in outs) if backward else 0
    large, small = bytes_of(source.shape, source.dtype), bytes_of(output.shape, output.dtype)
    transposed = 0
    if not (source.stride[1] == 1 and channels > 1):
        transposed = 2 * (2 * small + gradients * large) if backward else 2 * (large + small)
    return Convolution(
        operations=2.0 * prod(output.shape) * prod(weight.shape[1:]),
        moved=large + small,
        gradients=gradients,
        dtype=weight.dtype,
        grouped=channels > weight.shape[1],
        single_channel=channels == 1,
        transposed=transposed,
    )


def _attention(operation: Recorded) -> FusedAttention:
    backward = "backward" in operation.name
    query, key = operation.ins[backward], operation.ins[backward + 1]
    batch, heads, frames, dim = query.shape
    operations = 4.0 * batch * heads * frames * key.shape[-2] * dim
    return FusedAttention(
        operations=2.5 * operations if backward else operations,
        moved=sum(access.bytes for access in (*operation.reads, *operation.writes)),
        backward=backward,
        flash="efficient" not in operation.name,
        dropout=operation.dropout,
    )


def operations_of(operations: Iterable[Recorded]) -> float:
    """Count the floating-point operations of products, convolutions and attention."""
    total = 0.0
    for operation in operations:
        work = work_of(operation)
        times = max(work.gradients, 1) if isinstance(work, Convolution) else 1
        total += times * work.operations
    return total


def is_barrier(name: str) -> bool:
    """Whether a compiler launches an operator as it is."""
    return name in PRODUCTS or "convolution" in name or "attention" in name or any(part in name for part in UNFUSED)


def part_of(name: str) -> str:
    """Return the kind of work of an operator."""
    if name in PRODUCTS:
        return "products"
    if "attention" in name:
        return "attention"
    if "convolution" in name:
        return "convolutions"
    return next((part for part, names in PARTS.items() if any(text in name for text in names)), "others")


def _host_seconds(operation: Recorded, device: Device) -> float:
    if operation.name.startswith(("_fused_adam", "_foreach")):
        return device.host.optimizer
    return device.host.backward if operation.phase == "backward" else device.host.forward


__all__ = ["Recorded", "StepCost", "eager_cost", "fused_cost", "operations_of", "part_of", "work_of"]
