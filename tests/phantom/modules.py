"""Which module an operation belongs to, also in the backward pass."""

import threading
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class Modules:
    """Follows the calls of modules.

    An operation of the backward pass belongs to the module and the line of the forward operation that made its node:
    both have the same sequence number.
    """

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._stack: list[nn.Module] = []
        self._forward: dict[int, tuple[str, str]] = {}
        self._thread = threading.get_ident()
        self._hooks: list[Any] = []

    def name(self, root: nn.Module) -> None:
        """Name the modules of a model by their paths in it."""
        self._names |= {id(module): name for name, module in root.named_modules()}

    @property
    def current(self) -> str:
        """Path of the innermost module that is being called, its class if it has no name."""
        for module in reversed(self._stack):
            if name := self._names.get(id(module)):
                return name
        return type(self._stack[-1]).__name__ if self._stack else ""

    def log_forward(self, line: str) -> None:
        """Remember module and line of an operation, for that of its gradient."""
        if threading.get_ident() == self._thread and torch.is_grad_enabled():
            number = torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
            self._forward[number] = self.current, line

    def of_backward(self) -> tuple[str, str]:
        """Module and line of the forward operation whose gradient is being computed."""
        if self._stack:  # activation checkpointing calls modules again
            return self.current, ""
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        if node is None:
            return "", ""
        return self._forward.get(node._sequence_nr(), ("", node.name()))

    def follow(self) -> None:
        """Begin to follow the calls of all modules."""
        self._hooks = [
            register_module_forward_pre_hook(lambda module, _: self._stack.append(module)),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        """End following them."""
        for hook in self._hooks:
            hook.remove()

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        while self._stack and self._stack.pop() is not module:
            pass
