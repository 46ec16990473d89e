"""Waits that a program asks for by name, which no operation shows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor

NAMED = ((torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda.Event, "synchronize"))


@contextmanager
def synchronizations(report: Callable[[str], None]) -> Iterator[None]:
    """Report each explicit wait for the device, a stream or an event.

    Args:
        report: Called with what is waited for.
    """

    def reporting(original: Callable[..., Any], what: str) -> Callable[..., Any]:
        @wraps(original)
        def wait(*args: Any, **kwargs: Any) -> Any:
            report(what)
            return original(*args, **kwargs)

        return wait

    patches = [
        patch.object(owner, name, reporting(getattr(owner, name), f"{owner.__name__}.{name}")) for owner, name in NAMED
    ]
    # Otherwise each number would be read by itself
    patches.append(patch.object(FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()))
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in reversed(patches):
            each.stop()
