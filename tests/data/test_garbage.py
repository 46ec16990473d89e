"""Garbage is collected again when nobody minds, whichever threads asked that it is not."""

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hubert_lightning.data.garbage import without_collection


@contextmanager
def in_another_thread() -> Iterator[None]:
    """A section of another thread."""
    begun, ending = threading.Event(), threading.Event()

    def work() -> None:
        with without_collection():
            begun.set()
            ending.wait()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    yield
    ending.set()
    thread.join()


def test_sections_of_several_threads_end_in_any_order() -> None:
    assert gc.isenabled()
    other, section = in_another_thread(), without_collection()
    section.__enter__()
    other.__enter__()
    section.__exit__(None, None, None)
    assert not gc.isenabled()
    other.__exit__(None, None, None)
    assert gc.isenabled()
    with in_another_thread():
        with without_collection(), without_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_many_threads_leave_garbage_collection_as_it_was() -> None:
    def work() -> None:
        for _ in range(2000):
            with without_collection():
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_forked_process_collects_garbage_despite_a_section_of_another_thread() -> None:
    with in_another_thread():
        if not (child := os.fork()):
            with without_collection():
                inside = gc.isenabled()
            os._exit(0 if gc.isenabled() and not inside else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert not gc.isenabled()
    assert gc.isenabled()
