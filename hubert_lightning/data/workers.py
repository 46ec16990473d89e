"""Processes that read audio: what each of them reads, known to the training process when one is killed."""

import gc
import os
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from hubert_lightning.interrupts import ignore_interrupts

# What torch says when a worker ends: in an error that may come up anywhere in the main thread
KILLED = re.compile(r"DataLoader worker \(pid (?P<pid>\d+)\) is killed by signal: (?P<signal>[\w ]+)")
GONE = re.compile(r"DataLoader worker \(pid\(s\) (?P<pid>\d+)[\d, ]*\) exited unexpectedly")

_all: "weakref.WeakSet[WatchedReads]" = weakref.WeakSet()
_killed: dict[int, list[str]] = {}
"""What workers that were killed read, for when their dataset is gone."""


class WatchedReads(Dataset):
    """A dataset whose workers write down, in memory that outlives them, what they read.

    Args:
        dataset: Batches.
        index_of: Function from what the sampler gives to a number for each cut of that batch.
        id_of: Function from such a number to the id of the cut.
        num_workers: Processes that read.
    """

    MOST = 16
    """Cuts of a batch that are written down."""

    def __init__(
        self,
        dataset: Dataset,
        index_of: Callable[[Any], Sequence[int]],
        id_of: Callable[[int], str],
        num_workers: int,
    ) -> None:
        self.dataset, self.index_of, self.id_of = dataset, index_of, id_of
        # Of each worker: its process, how many cuts its batch has, and the first of them
        self._reads = torch.full((num_workers, 2 + self.MOST), -1).share_memory_() if num_workers else None
        _all.add(self)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        worker = get_worker_info()
        if worker is not None and self._reads is not None:
            cuts = self.index_of(index)
            few = list(cuts[: self.MOST])
            self._reads[worker.id] = torch.tensor([os.getpid(), len(cuts), *few] + [-1] * (self.MOST - len(few)))
        return self.dataset[index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"id_of": None}  # which a worker that is not forked does without

    def of_process(self, pid: int) -> list[str] | None:
        """Ids of the cuts that a worker read last, none if it is no worker of this dataset."""
        if self._reads is None:
            return None
        for process, number, *cuts in self._reads.tolist():
            if process == pid:
                ids = [self.id_of(cut) for cut in cuts[:number]]
                return [*ids, f"{number - len(ids)} others"] if number > len(ids) else ids
        return None


def quiet_worker(worker: int) -> None:
    """A worker's start: it computes in one thread, and leaves signals to the training process."""
    gc.freeze()  # looking for cycles among the cuts would copy all of them for this process
    torch.set_num_threads(1)
    ignore_interrupts()


def killed_worker(error: BaseException) -> str | None:
    """The sentence of an error that a worker which was killed has caused, none for another error."""
    match = KILLED.search(str(error)) or GONE.search(str(error))
    if not match:
        return None
    pid = int(match["pid"])
    if pid not in _killed:
        _killed[pid] = next((ids for of in list(_all) if (ids := of.of_process(pid))), [])
    cuts = _killed[pid]
    what = f"while it read {', '.join(cuts)}" if cuts else "before it read its first batch"
    by = match.groupdict().get("signal")
    if by and by.startswith("Bus error"):
        return (
            f"a process that reads audio (pid {pid}) found no room in shared memory {what}; enlarge /dev/shm "
            "(docker: --shm-size), or lower data.num_workers or data.max_duration"
        )
    if by and by.startswith("Killed"):
        return (
            f"a process that reads audio (pid {pid}) was killed {what}, as the system does when memory runs out; lower "
            "data.num_workers, data.max_duration or data.max_crop, or give the job more memory"
        )
    return (
        f"a process that reads audio (pid {pid}) ended ({by or 'its own output says why'}) {what}; look at these "
        "recordings, and run with --data.init_args.num_workers=0 to see the error itself"
    )
