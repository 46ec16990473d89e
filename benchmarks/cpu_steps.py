"""Steps on a processor as lists of operations, and what the processor can do: for `roofline.py --check_cpu`."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import train_step
from phantom.costs import bytes_of, launches_nothing
from phantom.record import Access, Op, Operand
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hubert_lightning.planning.devices import Attention, Convolutions, Device, Host
from hubert_lightning.planning.recorded import CONVOLUTIONS, eager_cost

COPIED = 2**24
"""Float32 numbers of the tensor that is copied, 64 MiB: larger than caches, as activations are."""
DRAWS = {"bernoulli_": lambda x: x.bernoulli_(0.9), "random_": lambda x: x.random_()}
"""Operators that draw random numbers for dropout, the peers' and ours: computed one by one, not limited by bytes."""


class OperationsOfCPU(TorchDispatchMode):
    """Records the operations on a processor, which are computed as well."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Op] = []
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not launches_nothing(func):
            ins = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            phase = "backward" if torch._C._current_autograd_node() is not None else "forward"
            self.operations.append(
                Op(
                    name=func.overloadpacket.__name__, phase=phase, module="", line="", flops=0, bytes=0, launches=1,
                    dtype="", ins=tuple(map(_operand, ins)), outs=tuple(map(_operand, outs)),
                    reads=tuple(map(self._access, ins)), writes=tuple(map(self._access, outs)),
                )
            )  # fmt: skip
        return out

    def _access(self, tensor: Tensor) -> Access:
        return Access(tensor.untyped_storage()._cdata, bytes_of(tensor))


def _operand(tensor: Tensor) -> Operand:
    return Operand(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.stride(), "cpu")


def recorded_on_cpu(contestant: Any, batch: Any, precision: str) -> list[Op]:
    """The operations of a step of train_step.py.

    Args:
        contestant: A contestant of train_step.py.
        batch: Its batch, on the CPU.
        precision: "float32" or "bf16".
    """
    with OperationsOfCPU() as recorder:
        train_step.step(contestant, None, batch, precision)
    return recorder.operations


class Processor(NamedTuple):
    """A processor, with the rate of each library that torch multiplies by.

    In float32, products that `hubert_lightning.model.products` gives to oneDNN and convolutions run at its rate, other
    products at that of torch's own library.

    Args:
        torch: The processor as torch's own library uses it.
        onednn: The processor as oneDNN uses it.
        draws: Seconds of a random number, by operator.
    """

    torch: Device
    onednn: Device
    draws: dict[str, float]

    def seconds(self, operations: list[Op]) -> float:
        """Predict the seconds of a step."""
        return sum(sum(parts.values()) for parts in self.parts(operations).values())

    def parts(self, operations: list[Op]) -> dict[str, dict[str, float]]:
        """Predict the seconds of each kind of work, in torch's own library, in oneDNN and for random numbers."""
        split: dict[str, list[Op]] = {"torch": [], "oneDNN": [], "draws": []}
        for operation in operations:
            in_onednn = operation.name == "_linear_pointwise" or operation.name in CONVOLUTIONS
            split["draws" if operation.name in self.draws else "oneDNN" if in_onednn else "torch"].append(operation)
        drawn = sum(math.prod(of.ins[0].shape) * self.draws[of.name] for of in split["draws"])
        return {
            "torch": eager_cost(split["torch"], self.torch).parts,
            "oneDNN": eager_cost(split["oneDNN"], self.onednn).parts,
            "draws": {"dropout": drawn},
        }


def measured_processor(precisions: list[str]) -> Processor:
    """Measure a product in each precision and library, and a copy into new memory, as operations write their results.

    Convolutions are products at oneDNN's rate; there is no fused attention with dropout, and no wave of tiles.
    """
    rates = {(library, precision): 1.0 for library in ("torch", "oneDNN") for precision in ("float32", "bf16")}
    for precision in precisions:
        for library in train_step.libraries_of(precision, "cpu"):
            rates[library, precision] = statistics.mean(
                _rate(library, precision, shape) for shape in train_step.PRODUCTS["cpu"]
            )
        if len(train_step.libraries_of(precision, "cpu")) == 1:
            rates["oneDNN", precision] = rates["torch", precision]
    x = torch.ones(COPIED)
    x.clone()
    start = time.perf_counter()
    for _ in range(4):
        x.clone()
    bandwidth = 4 * 2 * x.nbytes / (time.perf_counter() - start)
    return Processor(
        *(_device(rates[library, "float32"], rates[library, "bf16"], bandwidth) for library in ("torch", "oneDNN")),
        draws={name: _seconds_a_draw(name) for name in DRAWS},
    )


def median_of(processors: Sequence[Processor]) -> Processor:
    """The medians of what was measured in several rounds."""
    return Processor(
        *(
            _device(
                *(statistics.median(getattr(of, rate) for of in devices) for rate in ("float32", "matrix", "bandwidth"))
            )
            for devices in (
                [processor.torch for processor in processors],
                [processor.onednn for processor in processors],
            )
        ),
        draws={name: statistics.median(processor.draws[name] for processor in processors) for name in DRAWS},
    )


def _seconds_a_draw(name: str) -> float:
    dtype = torch.bool if name == "bernoulli_" else torch.int32
    numbers = torch.empty(2**22, dtype=dtype)
    start = time.perf_counter()
    DRAWS[name](numbers)
    return (time.perf_counter() - start) / numbers.numel()


def _rate(library: str, precision: str, shape: tuple[int, int, int]) -> float:
    run = train_step.multiply(library, shape, precision, "cpu")
    run()
    operations = train_step.repeats_on("cpu") * 2 * math.prod(shape)
    return operations / train_step.timed(run, "cpu")[0]


def _device(float32: float, matrix: float, bandwidth: float) -> Device:
    return Device(
        "this processor", matrix=matrix, float32=float32, float64=float32 / 2,
        bandwidth=bandwidth, processors=1, memory=0, link=1, network=1, source="measured",
        convolutions=Convolutions(1, 1, 1, 1, 1, transposes=False), attention=Attention(1, 1, 1, 1, 1),
        host=Host(0, 0, 0, 0, 0, 0), launch=5e-6, product_launch=5e-6, tiles=(),
    )  # fmt: skip
