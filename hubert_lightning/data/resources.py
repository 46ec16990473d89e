"""The processors and the memory that this process may use: those of its affinity, and of its control group."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux mounts the control groups."""
OWN_GROUPS = Path("/proc/self/cgroup")
"""Which control groups this process is in, one a line: number, controllers, path."""
MEMORY = Path("/proc/meminfo")


def usable_cores() -> int:
    """Return the number of processors that this process may use, at least 1.

    It is the smallest of three: those that its affinity allows, as a batch system sets it; and the processor time that
    its control groups get, of version 1 or 2, rounded up.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min([cores, *_processor_limits()]))


def available_memory() -> int:
    """Return the bytes that this process and others of its control groups can still take."""
    sizes = list(_memory_limits())
    if (free := _field(MEMORY, "MemAvailable:")) is not None:
        sizes.append(1024 * free)
    if not sizes:
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    return max(0, min(sizes))


def _processor_limits() -> Iterator[int]:
    for folder in _groups("cpu"):
        # Version 2 has both numbers in one file, "max 100000" without a limit; version 1 has -1
        quota, period = [*_words(folder / "cpu.max"), *_words(folder / "cpu.cfs_quota_us")][:1], _period(folder)
        if quota and quota[0].isdecimal() and period:
            yield -(-int(quota[0]) // period)


def _period(folder: Path) -> int:
    words = _words(folder / "cpu.max")[1:2] or _words(folder / "cpu.cfs_period_us")[:1]
    return int(words[0]) if words and words[0].isdecimal() else 0


def _memory_limits() -> Iterator[int]:
    for folder in _groups("memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, taken = _words(folder / limit), _words(folder / used)
            if most and taken and most[0].isdecimal() and taken[0].isdecimal():
                yield int(most[0]) - int(taken[0]) + (_field(folder / "memory.stat", cache) or 0)


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups with a controller, and of the groups around them."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root = CGROUPS  # version 2
        elif controller in controllers.split(","):
            root = CGROUPS / controller
        else:
            continue
        inside = Path(path.lstrip("/"))
        # A container sees its own group as the root, whatever path the line has
        yield from (root / part for part in (inside, *inside.parents) if (root / part).is_dir())


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _field(file: Path, name: str) -> int | None:
    words = _words(file)
    return int(words[words.index(name) + 1]) if name in words else None
