"""Storages of the GPU: when each is allocated and released."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phantom.record import Storage

UNIT = 512
"""Bytes in whose multiples the caching allocator hands out memory."""


class Memory:
    """Follows storages from their first tensor to their release."""

    def __init__(self) -> None:
        self.storages: list[Storage] = []
        self.tick = 0
        self._held: dict[int, tuple[Storage, Any]] = {}  # by address, with a weak reference whose callback releases
        self._resize: Callable[..., Any] | None = None

    def number(self, tensor: Tensor) -> int:
        """Return the number of a tensor's storage, 0 if it is not followed."""
        held = self._held.get(tensor.untyped_storage()._cdata)
        return 0 if held is None else held[0].number

    def allocate(self, tensor: Tensor, line: str, phase: str) -> None:
        """Follow the storage of a tensor that an operation returned, unless it is known."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held:
            self._follow(storage, line, phase)

    def _follow(self, storage: torch.UntypedStorage, line: str, phase: str) -> None:
        self.tick += 1
        size = -(-storage.nbytes() // UNIT) * UNIT
        row = Storage(len(self.storages) + 1, size, line, phase, self.tick)
        self.storages.append(row)
        address = storage._cdata
        self._held[address] = row, weakref.ref(storage, lambda _: self._release(address))

    def _release(self, address: int) -> None:
        if held := self._held.pop(address, None):
            self.tick += 1
            held[0].died = self.tick

    def follow_resizing(self) -> None:
        """Also follow storages that are resized, as those of sharded parameters are."""
        original = self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            done = original(storage, size)
            if held := self._held.get(storage._cdata):
                row = held[0]
                self._release(storage._cdata)
                self._follow(storage, row.line, row.phase)
            return done

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    def stop(self) -> None:
        """Undo `follow_resizing`."""
        if self._resize is not None:
            torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
