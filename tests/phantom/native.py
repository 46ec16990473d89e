"""How many kernels torch launches for an operation: counted by running its own code against the phantom."""

import ctypes
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

LAUNCHES, WAITS = 0, 1
LIBRARIES = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "addmv", "mv", "dot"), 1),
    "convolution": 2, "convolution_backward": 5, "cudnn_convolution": 2, "_cudnn_ctc_loss": 4,
    "_fft_r2c": 1, "_fft_c2r": 1, "_fft_c2c": 1, "ctc_losses": 1, "ctc_gradient": 1,
}  # fmt: skip
"""Kernels of operations that cuBLAS, cuDNN and cuFFT compute, which start on no phantom, so these are estimates; and
those of ours in Triton."""
DEPENDENT = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "repeat_interleave", "index_put", "index_put_", "_ctc_loss",
    "_ctc_loss_backward",
}  # fmt: skip
"""Operations that read values, which tensors here do not have."""

COMPILED_ON_USE = ("special_", "digamma", "lgamma", "polygamma", "gcd", "lcm", "i0", "sinc")
"""Beginnings of the names of operations whose kernels torch compiles when they are used, for a real driver."""


class NativeLaunches:
    """Counts by operator and arguments; 1 where there is no phantom, or the operation cannot be run on it."""

    def __init__(self) -> None:
        path = os.environ.get("LD_PRELOAD", "")
        self._count: Callable[[int], int] | None = None
        if "libcuda.so.1" in path:
            self._count = ctypes.CDLL(path).phantom_count
            self._count.restype = ctypes.c_long  # type: ignore[attr-defined]
        self._known: dict[Any, tuple[int, int]] = {}

    def counts(self, call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> tuple[int, int]:
        """Count the kernels that an operation launches, and the waits inside it.

        Args:
            call: Operator, arguments and named arguments, with fake tensors.
        """
        func, args, kwargs = call
        name = func.overloadpacket.__name__
        if self._count is None or name in LIBRARIES or name in DEPENDENT or name.startswith(COMPILED_ON_USE):
            return LIBRARIES.get(name, 1), 0
        leaves, structure = tree_flatten((args, kwargs))
        key = func, str(structure), tuple(map(_signature, leaves))
        if key not in self._known:
            self._known[key] = self._run(func, args, kwargs)
        return self._known[key]

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
        assert self._count is not None
        args, kwargs = tree_map_only(Tensor, _without_values, (args, kwargs))
        before = self._count(LAUNCHES), self._count(WAITS)
        try:
            with torch.no_grad():
                func(*args, **kwargs)
        except RuntimeError:
            return 1, 0
        return self._count(LAUNCHES) - before[0], self._count(WAITS) - before[1]


def _without_values(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def _signature(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)
