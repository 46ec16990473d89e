"""Loader workers: the training process knows which cuts a worker read when it was killed."""

import gc
import logging
import os
import re
import signal
import traceback
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from hubert_lightning.data.resources import usable_cores
from hubert_lightning.errors import BROKEN_CONNECTIONS, counted, explains_errors
from hubert_lightning.interrupts import ignore_interrupts

log = logging.getLogger(__name__)

GONE = re.compile(r"DataLoader worker \(pid\(s\) (?P<pid>\d+)[\d, ]*\) exited unexpectedly")
"""Message of torch when it waits for a batch, at most 5 s after a worker's end."""
# Torch would also raise from a signal handler, anywhere in the main thread: while that holds a lock, it would then wait
# for ever, and in a finalizer the error would be lost
signal_handling._SIGCHLD_handler_set = True

_all: "weakref.WeakSet[WatchedReads]" = weakref.WeakSet()
_killed: dict[int, list[str]] = {}
"""Ids of the cuts that killed workers read, kept after their dataset is gone."""


def default_workers(most: int = 4) -> int:
    """Number of workers where none is given: one for each core that this process may use, since torch warns of more.

    Args:
        most: Largest number.

    Returns:
        Number of workers, at least 1.
    """
    return min(most, usable_cores())


def share_threads(ranks: int = 1) -> int:
    """Divide the cores that this process may use among the ranks of its host, unless OMP_NUM_THREADS is set.

    Torch counts the cores of the machine that its affinity allows; it knows neither the limits of a container nor the
    other ranks. Ranks that start more threads than cores wait for one another.

    Args:
        ranks: Number of processes on this host that compute at the same time.

    Returns:
        Number of threads in which torch computes.
    """
    cores = usable_cores()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), max(1, cores // ranks)))
    return _stated(torch.get_num_threads(), cores)


@cache
def _stated(threads: int, cores: int) -> int:
    """Log the number of threads, once in a process; returns it."""
    sentence = "processor: %s on the %s that this process may use (set OMP_NUM_THREADS to change it)"
    log.info(sentence, counted(threads, "thread"), counted(cores, "core"))
    return threads


class WatchedReads(Dataset[Any]):  # batches of either task
    """A dataset whose workers record the cuts that they read, in memory that outlives them.

    Args:
        dataset: Dataset of batches.
        index_of: Function from the sampler's index of a batch to the indices of its cuts.
        id_of: Function from the index of a cut to its id.
        num_workers: Number of workers.
    """

    MOST = 16
    """Number of cuts of a batch that are recorded."""

    def __init__(
        self,
        dataset: Dataset[Any],
        index_of: Callable[[Any], Sequence[int]],
        id_of: Callable[[int], str],
        num_workers: int,
    ) -> None:
        self.dataset, self.index_of, self.id_of = dataset, index_of, id_of
        # Of each worker: its process, the number of cuts in its batch, and the first of them
        reads: Any = torch.full((num_workers, 2 + self.MOST), -1)  # torch does not type share_memory_
        self._reads: Tensor | None = reads.share_memory_() if num_workers else None
        _all.add(self)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch's Dataset has no __len__, ours does

    def __getitem__(self, index: Any) -> Any:
        worker = get_worker_info()
        if worker is not None and self._reads is not None:
            cuts = self.index_of(index)
            first = list(cuts[: self.MOST])
            self._reads[worker.id] = torch.tensor([os.getpid(), len(cuts), *first] + [-1] * (self.MOST - len(first)))
        return self.dataset[index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"id_of": None}  # workers that are not forked do not need it

    def of_process(self, pid: int) -> list[str] | None:
        """Ids of the cuts that a worker read last; None if it is no worker of this dataset."""
        if self._reads is None:
            return None
        for process, number, *cuts in self._reads.tolist():
            if process == pid:
                ids = [self.id_of(cut) for cut in cuts[:number]]
                return [*ids, f"{number - len(ids)} others"] if number > len(ids) else ids
        return None


def quiet_worker(worker: int) -> None:
    """Start a worker: compute in one thread, and leave signals to the training process."""
    gc.freeze()  # garbage collection would copy the memory of all cuts into this process
    torch.set_num_threads(1)
    ignore_interrupts()


@explains_errors
def killed_worker(error: BaseException) -> str | None:
    """Explain an error that a killed worker caused; None for another error."""
    match = GONE.search(str(error))
    worker = _worker_of(error, int(match["pid"]) if match else None)
    if worker is None:
        return None
    pid, ended_by = worker
    if pid not in _killed:
        _killed[pid] = next((ids for reads in list(_all) if (ids := reads.of_process(pid))), [])
    cuts = _killed[pid]
    activity = f"while it read {', '.join(cuts)}" if cuts else "before it read its first batch"
    if ended_by == -signal.SIGBUS:
        return (
            f"a process that reads audio (pid {pid}) found no room in shared memory {activity}; enlarge /dev/shm "
            "(docker: --shm-size), or lower data.num_workers or data.max_duration"
        )
    if ended_by == -signal.SIGKILL:
        return (
            f"a process that reads audio (pid {pid}) was killed {activity}, as the system does when memory runs out; "
            "lower data.num_workers, data.max_duration or data.max_crop, or give the job more memory"
        )
    reason = signal.strsignal(-ended_by) if ended_by < 0 else "see its output"
    return (
        f"a process that reads audio (pid {pid}) ended ({reason}) {activity}; look at "
        "these recordings, and run with --data.init_args.num_workers=0 to see the error itself"
    )


def _worker_of(error: BaseException, pid: int | None) -> tuple[int, int] | None:
    """The worker whose end caused an error: its process and exit status; None for another error.

    Args:
        error: Error that passed through a DataLoader.
        pid: Process that torch's message names. Without one, the error is a connection that broke while it handed over
            a batch, before torch could see that it ended.
    """
    if pid is None and not isinstance(error, BROKEN_CONNECTIONS):
        return None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for worker in getattr(frame.f_locals.get("self"), "_workers", ()):  # of torch's iterator
            if pid is None:
                worker.join(0.2)
            if worker.pid == pid or (pid is None and worker.exitcode):
                return worker.pid, worker.exitcode or 0
    return None if pid is None else (pid, 0)
