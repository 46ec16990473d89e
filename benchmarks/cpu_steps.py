"""Steps on a processor as lists of operations, and what the processor can do: for `roofline.py --check_cpu`."""

import time
from typing import Any

import torch
import train_step
from phantom.costs import bytes_of, launches_nothing
from phantom.record import Access, Op, Operand
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hubert_lightning.planning.devices import Attention, Convolutions, Device, Host

COPIED = 2**24
"""Float32 numbers of the tensor that is copied, 64 MiB: larger than caches, as activations are."""


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


def measured_processor(precisions: list[str]) -> Device:
    """Measure a plain product in each precision, and a copy into new memory, as operations write their results.

    Convolutions are products at the same rate here; there is no fused attention with dropout, and no wave of tiles.
    """
    rates = {"float32": 1.0, "bf16": 1.0}
    for precision in precisions:
        found = []
        for shape in train_step.PRODUCTS["cpu"]:
            run, operations = train_step.product(shape, precision, "cpu")
            run()
            found.append(operations / train_step.timed(run, "cpu")[0])
        rates[precision] = sum(found) / len(found)
    x = torch.ones(COPIED)
    x.clone()
    start = time.perf_counter()
    for _ in range(4):
        x.clone()
    bandwidth = 4 * 2 * x.nbytes / (time.perf_counter() - start)
    return Device(
        "this processor", matrix=rates["bf16"], float32=rates["float32"], float64=rates["float32"] / 2,
        bandwidth=bandwidth, processors=1, memory=0, link=1, network=1, source="measured",
        convolutions=Convolutions(1, 1, 1, 1, 1, transposes=False), attention=Attention(1, 1, 1, 1, 1),
        host=Host(0, 0, 0, 0, 0, 0), launch=5e-6, product_launch=5e-6, tiles=(),
    )  # fmt: skip
