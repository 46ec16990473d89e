"""What a run on the phantom did: its operations, waits, copies and storages, and their form as JSON."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self


class Operand(NamedTuple):
    """A tensor of an operation.

    Args:
        shape: Its sizes.
        dtype: Its type, such as "bfloat16".
        stride: Distance of neighbours along each dimension, in elements.
        device: "cuda" or "cpu".
    """

    shape: tuple[int, ...]
    dtype: str
    stride: tuple[int, ...]
    device: str = "cuda"


class Access(NamedTuple):
    """Memory that an operation reads or writes.

    Args:
        storage: Number of the storage, counted from 1 in the order of allocation; 0 if it is not the GPU's.
        bytes: Bytes of the tensor; dimensions that are expanded count once.
    """

    storage: int
    bytes: int


@dataclass(slots=True)
class Op:
    """An operation on the GPU: a call of an aten operator that is not a view.

    Args:
        name: Operator, such as "addmm".
        phase: Part of the step: "transfer", "forward", "backward", "optimizer", or as the program names it.
        module: Path of the innermost module, such as "encoder.layers.0.ffn_input"; in the backward pass, that of the
            forward operation.
        line: Line of the program, such as "model/hubert.py:371"; in the backward pass, that of the forward operation.
        flops: Floating-point operations of matrix products, convolutions and attention; 0 for others.
        bytes: Bytes that are read and written.
        dtype: Type of the first result.
        launches: Kernels.
        ins: Tensors that it is given.
        outs: Tensors that it returns.
        reads: Storages that it reads.
        writes: Storages that it writes.
        dropout: Whether attention drops weights.
    """

    name: str
    phase: str
    module: str
    line: str
    flops: int
    bytes: int
    dtype: str
    launches: int
    ins: tuple[Operand, ...]
    outs: tuple[Operand, ...]
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    dropout: bool = False


@dataclass(slots=True)
class Wait:
    """A place where the host waits until the GPU has done all that it was given.

    Args:
        what: Reason, such as "item of float32".
        phase: Part of the step.
        line: Line of the program that waits.
        stack: Lines of the program and of libraries other than torch, innermost first.
    """

    what: str
    phase: str
    line: str
    stack: tuple[str, ...] = ()


@dataclass(slots=True)
class Copy:
    """A copy between host and GPU.

    Args:
        to_gpu: Whether it goes to the GPU.
        bytes: Its size.
        pinned: Whether the host's memory is pinned.
        blocking: Whether the caller asked to wait for it.
        phase: Part of the step.
        line: Line of the program.
    """

    to_gpu: bool
    bytes: int
    pinned: bool
    blocking: bool
    phase: str
    line: str


@dataclass(slots=True)
class Mixture:
    """An operation on tensors of several devices, which fails on a GPU.

    Args:
        name: Operator.
        devices: Devices of its tensors.
        line: Line of the program.
        stack: Lines of the program and of libraries other than torch, innermost first.
    """

    name: str
    devices: tuple[str, ...]
    line: str
    stack: tuple[str, ...] = ()


@dataclass(slots=True)
class Storage:
    """Memory of the GPU, as the caching allocator would hand it out: in units of 512 bytes.

    Args:
        number: Number, from 1 in the order of allocation.
        bytes: Its size.
        line: Line of the program that allocated it.
        phase: Part of the step in which it was allocated.
        born: Tick of the allocation; ticks count allocations and releases.
        died: Tick of the release, 0 if it is held at the end.
    """

    number: int
    bytes: int
    line: str
    phase: str
    born: int
    died: int = 0


@dataclass
class Record:
    """Everything that was recorded, in order.

    Args:
        ops: Operations on the GPU.
        waits: Waits of the host.
        copies: Copies between host and GPU.
        mixtures: Mixtures of devices.
        storages: Storages of the GPU, those from before the recording included.
        since: Tick at which recording began.
        result: What the recorded function returned.
    """

    ops: list[Op] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    mixtures: list[Mixture] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)
    since: int = 0
    result: Any = None  # any value of JSON

    @property
    def launches(self) -> int:
        """Kernels that were launched."""
        return sum(op.launches for op in self.ops)

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        return sum(op.flops for op in self.ops)

    @property
    def peak(self) -> int:
        """Largest number of bytes that were held at once while recording."""
        return self._peak()[1]

    def in_phase(self, phase: str) -> list[Op]:
        """Operations of a part of the step."""
        return [op for op in self.ops if op.phase == phase]

    def named(self, part: str) -> list[Op]:
        """Operations whose name contains a text."""
        return [op for op in self.ops if part in op.name]

    def held_at_peak(self) -> dict[str, int]:
        """Bytes that were held at the peak by the line that allocated them, most first."""
        tick, _ = self._peak()
        held: dict[str, int] = {}
        for storage in self.storages:
            if storage.born <= tick and not 0 < storage.died <= tick:
                held[storage.line] = held.get(storage.line, 0) + storage.bytes
        return dict(sorted(held.items(), key=lambda item: -item[1]))

    def live(self) -> Iterator[tuple[int, int]]:
        """Ticks, and the bytes that are held from then on."""
        changes = [(storage.born, storage.bytes) for storage in self.storages]
        changes += [(storage.died, -storage.bytes) for storage in self.storages if storage.died]
        held = 0
        for tick, change in sorted(changes):
            held += change
            yield tick, held

    def _peak(self) -> tuple[int, int]:
        tick_at_peak, peak, before = self.since, 0, 0
        for tick, held in self.live():
            if tick < self.since:
                before = held
            elif held > peak:
                tick_at_peak, peak = tick, held
        return (tick_at_peak, peak) if peak > before else (self.since, before)

    def to_json(self) -> str:
        """Write the record as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a record that `to_json` wrote."""
        content = json.loads(text)
        return cls(
            ops=[_op(**values) for values in content["ops"]],
            waits=[Wait(**values | {"stack": tuple(values["stack"])}) for values in content["waits"]],
            copies=[Copy(**values) for values in content["copies"]],
            mixtures=_each(Mixture, content["mixtures"], "devices", "stack"),
            storages=[Storage(**values) for values in content["storages"]],
            since=content["since"],
            result=content["result"],
        )


def _each(make: Callable[..., Any], rows: list[dict[str, Any]], *tuples: str) -> list[Any]:
    return [make(**row | {name: tuple(row[name]) for name in tuples}) for row in rows]


def _op(**values: Any) -> Op:
    for name in ("ins", "outs"):
        values[name] = tuple(Operand(tuple(a), b, tuple(c), d) for a, b, c, d in values[name])
    for name in ("reads", "writes"):
        values[name] = tuple(Access(*access) for access in values[name])
    return Op(**values)
