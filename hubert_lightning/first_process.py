"""Which of the processes of a run prints and writes what is the same in all of them."""

import os

LAUNCHER_RANKS = ("SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Variables by which SLURM, LSF and MPI number the processes that they start, over all nodes."""


_of_ranks = False


def print_on_first_rank(of_ranks: bool) -> None:
    """Set whether the processes that a launcher started are ranks of one run, of which only the first one prints."""
    global _of_ranks
    _of_ranks = of_ranks


def prints() -> bool:
    """Whether this process prints the messages that are the same on all ranks."""
    return not _of_ranks or is_first_process()


def is_first_process() -> bool:
    """Whether this process is rank 0 of its run, or the only process; known before the ranks have connected.

    torchrun sets RANK; rank 0 need not be on the first node. Otherwise the number from SLURM, LSF or MPI counts, unless
    Lightning has started this process: Lightning sets the number of the node and that of the process on the node.
    """
    if rank := os.environ.get("RANK"):
        return rank == "0"
    launcher_rank = next(filter(None, map(os.environ.get, LAUNCHER_RANKS)), None)
    if "LOCAL_RANK" not in os.environ and launcher_rank:
        return launcher_rank == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))
