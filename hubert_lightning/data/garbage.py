"""Sections in which Python's garbage collection is off, in all threads."""

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()
_inside: list[int] = []
"""Threads inside sections without collection, once for each section."""
_enabled = False


@contextmanager
def without_collection() -> Iterator[None]:
    """Disable garbage collection in all threads until the last such section ends."""
    global _enabled
    thread = threading.get_ident()
    with _lock:
        if not _inside:
            _enabled = gc.isenabled()
            gc.disable()
        _inside.append(thread)
    try:
        yield
    finally:
        with _lock:
            _leave([thread])


def _leave(threads: list[int]) -> None:
    for thread in threads:
        _inside.remove(thread)
    if threads and not _inside and _enabled:
        gc.enable()


def _leave_in_child() -> None:
    """Leave the sections of other threads, which do not exist in a forked process."""
    _leave([thread for thread in _inside if thread != threading.get_ident()])
    _lock.release()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_leave_in_child)
