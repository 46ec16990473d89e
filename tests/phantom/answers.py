"""Operations whose result the host reads, or whose shape depends on values: a GPU must be waited for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from phantom.costs import argument

if TYPE_CHECKING:
    from phantom.recorder import Recorder

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
Compute = Callable[[Call], Any]


@dataclass
class Answers:
    """What the host reads from a GPU that holds no values.

    Tensors that were copied there and not changed are read as they are.

    Args:
        boolean: Every other bool.
        integer: Every other integer.
        real: Every other floating-point number.
        share: Fraction of elements that are not zero, or true.
    """

    boolean: bool = False
    integer: int = 0
    real: float = 1.0
    share: float = 0.5
    _known: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def remember(self, copied: Tensor, source: Tensor) -> None:
        """Remember that a tensor of the GPU is a copy of one of the CPU."""
        self._known[copied.untyped_storage()._cdata] = copied, source

    def forget(self, tensor: Tensor) -> None:
        """Forget the values of a tensor that an operation returned or changed."""
        self._known.pop(tensor.untyped_storage()._cdata, None)

    def read(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Read a tensor of the GPU into one of the CPU."""
        copied, source = self._known.get(tensor.untyped_storage()._cdata, (None, None))
        if source is not None and copied is not None and copied.shape == tensor.shape:
            return source.to(dtype, copy=True)
        return torch.full(tensor.shape, self._value(tensor.dtype), dtype=dtype)

    def _value(self, dtype: torch.dtype) -> bool | int | float:
        if dtype == torch.bool:
            return self.boolean
        return self.real if dtype.is_floating_point else self.integer

    def count(self, tensor: Tensor) -> int:
        """Return how many elements of a tensor are not zero."""
        return max(round(tensor.numel() * self.share), 1)


def _item(recorder: "Recorder", call: Call, compute: Compute) -> Any:
    tensor = call[1][0]
    recorder.wait(f"item of {tensor.dtype}")
    return recorder.answers.read(tensor, tensor.dtype).item()


def _truth(recorder: "Recorder", call: Call, compute: Compute) -> bool:
    recorder.wait(f"{call[0].overloadpacket.__name__} of {tuple(call[1][0].shape)}")
    return True


def _counted(recorder: "Recorder", call: Call, shape_of: Callable[[int, Tensor], tuple[int, ...]]) -> Tensor:
    """A result with as many rows as elements are not zero."""
    tensor = call[1][0]
    recorder.wait(f"{call[0].overloadpacket.__name__} of {tuple(tensor.shape)}")
    rows = shape_of(recorder.answers.count(tensor), tensor)
    name = call[0].overloadpacket.__name__
    with recorder.fake:
        out = torch.empty(rows, dtype=torch.int64 if name == "nonzero" else tensor.dtype, device=tensor.device)
    recorder.log(call, out)
    return out


def _nonzero(recorder: "Recorder", call: Call, compute: Compute) -> Tensor:
    return _counted(recorder, call, lambda count, tensor: (count, tensor.dim()))


def _masked_select(recorder: "Recorder", call: Call, compute: Compute) -> Tensor:
    return _counted(recorder, call, lambda count, tensor: (count,))


def _unique(recorder: "Recorder", call: Call, compute: Compute) -> tuple[Tensor, ...]:
    func, tensor = call[0], call[1][0]
    recorder.wait(f"{func.overloadpacket.__name__} of {tuple(tensor.shape)}")
    with recorder.fake:
        values = torch.empty_like(tensor)
        others = [torch.empty(len(tensor), dtype=torch.int64, device=tensor.device) for _ in range(2)]
    out = (values, *others[: len(func._schema.returns) - 1])
    recorder.log(call, out)
    return out


def _bincount(recorder: "Recorder", call: Call, compute: Compute) -> Tensor:
    func, args, kwargs = call
    for what in ("the smallest", "the largest"):
        recorder.wait(f"{what} value of bincount")
    length = argument(func, "minlength", args, kwargs) or 1
    with recorder.fake:
        out = torch.empty(length, dtype=torch.int64, device=args[0].device)
    recorder.log(call, out)
    return out


def _repeated(recorder: "Recorder", call: Call, compute: Compute) -> Tensor:
    func, args, kwargs = call
    if argument(func, "output_size", args, kwargs) is None:
        recorder.wait("size of repeat_interleave")
    with recorder.fake:
        size = argument(func, "output_size", args, kwargs) or len(args[0])
        out = torch.empty(size, dtype=torch.int64, device=args[0].device)
    recorder.log(call, out)
    return out


def _indexed(recorder: "Recorder", call: Call, compute: Compute) -> Any:
    """Masks become indices, which their count must be known for; indices on the CPU are copied."""
    func, args, kwargs = call
    indices = []
    for index in args[1]:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            recorder.wait(f"{func.overloadpacket.__name__} by a mask of {tuple(index.shape)}")
            with recorder.fake:
                count = recorder.answers.count(index)
                indices += [torch.empty(count, dtype=torch.int64, device=args[0].device) for _ in index.shape]
        elif index is not None and index.device.type == "cpu" and index.dim():
            recorder.wait(f"copy of an index of {tuple(index.shape)} to the GPU, pageable memory")
            with recorder.fake:
                indices.append(torch.empty(index.shape, dtype=index.dtype, device=args[0].device))
        else:
            indices.append(index)
    return compute((func, (args[0], indices, *args[2:]), kwargs))


def _ctc(recorder: "Recorder", call: Call, compute: Compute) -> tuple[Tensor, Tensor]:
    """aten/src/ATen/native/cuda/LossCTC.cu: lengths are read, and offsets and lengths are copied back, blocking."""
    log_probs, targets, input_lengths, target_lengths = call[1][:4]
    for name, length in (("frames", input_lengths), ("tokens", target_lengths)):
        if isinstance(length, Tensor) and length.device.type == "cuda":
            recorder.wait(f"numbers of {name}, which ctc_loss reads")
    _wait_for_copies(recorder)
    frames, batch, _ = log_probs.shape
    longest = targets.shape[1] if targets.dim() == 2 else targets.shape[0] // batch
    with recorder.fake:
        out = log_probs.new_empty(batch), log_probs.new_empty(batch, frames, 2 * longest + 1)
    recorder.log(call, out)
    return out


def _ctc_backward(recorder: "Recorder", call: Call, compute: Compute) -> Tensor:
    # With values, torch has read the lengths before, and takes them from there
    _wait_for_copies(recorder)
    with recorder.fake:
        out = torch.empty_like(call[1][1])
    recorder.log(call, out)
    return out


def _wait_for_copies(recorder: "Recorder") -> None:
    for name in ("numbers of tokens", "numbers of frames", "offsets of targets"):
        recorder.wait(f"copy of the {name} to the GPU inside ctc_loss")


ANSWERS: dict[str, Callable[["Recorder", Call, Compute], Any]] = {
    "_local_scalar_dense": _item,
    **dict.fromkeys(("equal", "is_nonzero", "allclose"), _truth),
    "nonzero": _nonzero,
    "masked_select": _masked_select,
    **dict.fromkeys(("_unique", "_unique2", "unique_dim", "unique_consecutive"), _unique),
    "bincount": _bincount,
    "repeat_interleave": _repeated,
    **dict.fromkeys(("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put"), _indexed),
    "_ctc_loss": _ctc,
    "_ctc_loss_backward": _ctc_backward,
}
"""Functions by the name of the operator."""
