"""Private parts of torch for reading its files; a test explains what to correct if a new torch moves them."""

from contextlib import AbstractContextManager

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def tensors_without_memory() -> AbstractContextManager[object]:
    """Let `torch.load` make tensors with shapes and sizes, and without memory; torch documents this use."""
    return FakeTensorMode()


def storage_id(tensor: Tensor) -> int:
    """Return a number that tensors share only if they share memory; `data_ptr` has none for tensors without memory."""
    return int(tensor.untyped_storage()._cdata)
