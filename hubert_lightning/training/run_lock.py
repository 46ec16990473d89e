"""A lock file, so that only one command uses a folder; locks of dead processes are taken over.

The file names the process that holds the lock: host, process number, start time, job. On the same host, the process
table shows whether this process still runs, even if it is stopped. On another host, the modification time of the file
shows it, because the holder renews it.
"""

import fcntl
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubert_lightning.errors import UserError
from hubert_lightning.files import read_regular, remove_unfinished, unfinished_file, unfinished_name
from hubert_lightning.first_process import is_first_process

log = logging.getLogger(__name__)

RUN_LOCK = "run.lock"
CHOOSE_OUTPUT = "choose another --output"
RENEW_EVERY = 20.0
"""Seconds after which a holder renews the modification time of its file."""
STALE_AFTER = 90.0
"""Seconds without a renewal after which the holder counts as dead, if this host's process table does not list it."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Args:
        host: Name of its machine.
        process: Process number.
        started: Start time in the machine's own unit, empty if unknown.
        machine: Identity of the machine's boot and of the namespace of process numbers.
        job: SLURM job, empty outside of SLURM.
        restart: Number of times that the job was put back into the queue.
    """

    host: str
    process: int
    started: str
    machine: str
    job: str
    restart: str

    @classmethod
    def this(cls) -> "Holder":
        """Describe this process."""
        job = os.environ.get("SLURM_JOB_ID", "")
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        return cls(socket.gethostname(), os.getpid(), _started(os.getpid()), _machine(), job, restart)

    def is_dead(self) -> bool | None:
        """Return whether the process has ended, None if that is unknown from here."""
        here = Holder.this()
        if (self.host, self.machine) == (here.host, here.machine):
            return _started(self.process) != self.started if self.started else None
        if self.job and self.job == here.job and self.restart != here.restart:
            return True  # SLURM puts a job back into the queue when its processes have ended
        return None


@contextmanager
def locked(folder: Path, name: str = RUN_LOCK, instead: str = CHOOSE_OUTPUT) -> Iterator[None]:
    """Create a folder and hold its lock, on rank 0 alone; within one process, locks may be nested.

    A lock that a dead process left is taken over. For a process on another host this takes up to a minute and a half.

    Args:
        folder: Folder that is written to.
        name: Name of the lock file; commands that exclude one another use the same name.
        instead: Advice to the user if another process holds the lock.

    Raises:
        UserError: Another process holds the lock, the file cannot be read, or the folder cannot be written to.
    """
    path = folder.resolve() / name
    if not is_first_process() or _held.get(path) == os.getpid():
        yield
        return
    content = _take(path, instead)
    _held[path] = os.getpid()
    ended = threading.Event()
    threading.Thread(target=_renew, args=(path, content, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        _held.pop(path, None)
        with suppress(OSError):
            if path.read_bytes() == content:
                path.unlink()


def holder_of(folder: Path, name: str = RUN_LOCK) -> Holder | None:
    """Find the other process that holds the lock of a folder.

    Args:
        folder: Folder.
        name: Name of the lock file.

    Returns:
        The process, None if the lock is free or its process is known to be dead.

    Raises:
        UserError: The lock file cannot be read.
    """
    path = folder.resolve() / name
    if _held.get(path) == os.getpid() or (content := _content(path)) is None:
        return None
    holder = _holder(content)
    if holder is None:
        return None
    dead = holder.is_dead()
    if dead is None:
        # The age is counted by the clock of the same disk, from a file created now; if none can be created, the process
        # counts as alive
        with suppress(OSError), unfinished_file(path) as now:
            dead = _age(path, now) > STALE_AFTER
    return None if dead else holder


def refuse(folder: Path, holder: Holder, instead: str = CHOOSE_OUTPUT) -> UserError:
    """Create the error that names the holder of a folder's lock and gives advice."""
    return UserError(
        f"{folder}: process {holder.process} on {holder.host} is using it"
        f"{f' (job {holder.job})' if holder.job else ''}; wait until it ends, end it, or {instead}"
    )


_held: dict[Path, int] = {}  # locks of this process, with its number: a forked process holds none


def _take(path: Path, instead: str) -> bytes:
    """Put a lock file of this process in place, and return its content."""
    content = json.dumps(asdict(Holder.this()) | {"token": secrets.token_hex(8)}).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path.parent)
        with unfinished_file(path) as own:
            with own.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            while not _link(own, path):
                _wait_for_end(path, own, instead)
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot be created or written to ({error.strerror}); correct that, or choose another "
            "--output"
        ) from error
    return content


def _wait_for_end(path: Path, own: Path, instead: str) -> None:
    """Return when the holder is known to be dead and its file is removed; raise `UserError` if it is alive."""
    with _alone(path.parent):
        before, renewed = _content(path), _time(path)
        if before is None:
            return
        holder = _holder(before)
        dead = None if holder is None else holder.is_dead()
        if dead or (dead is None and _age(path, own) > STALE_AFTER):
            _remove(path, before)
            return
    if dead is False:
        assert holder is not None
        raise refuse(path.parent, holder, instead)
    name = f"process {holder.process} on {holder.host}" if holder else "its holder, whose name is corrupt,"
    log.warning("%s: waiting up to %.0f s to see whether %s is alive", path, STALE_AFTER, name)
    while _content(path) == before:
        time.sleep(0.5)
        os.utime(own)
        if _time(path) != renewed and holder is not None:
            raise refuse(path.parent, holder, instead)
        if _age(path, own) > STALE_AFTER:
            return  # the next call removes the file, under the folder's lock


def _remove(path: Path, content: bytes | None) -> None:
    """Remove the file of a dead process, unless another process has just put its own there."""
    aside = unfinished_name(path)
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if aside.read_bytes() != content:
            _link(aside, path)
        aside.unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Exclude other processes of this machine (on some file systems, of all machines) while a lock is examined."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _link(own: Path, path: Path) -> bool:
    """Give a file a name that must be free, and return whether it was; without links, copy the file."""
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError:
        try:
            with path.open("xb") as file:
                file.write(own.read_bytes())
        except FileExistsError:
            return False
    return True


def _renew(path: Path, own_content: bytes, ended: threading.Event) -> None:
    """Renew the time of a file; end this process if another one took over, which happens only while it was stopped."""
    while not ended.wait(RENEW_EVERY):
        try:
            content = path.read_bytes()
        except OSError:  # such as while a file server restarts
            continue
        if content == own_content:
            with suppress(OSError):
                os.utime(path)
        elif holder := _holder(content):
            reason = f"process {holder.process} on {holder.host} took over while this one was stopped"
            print(f"hubert: {path.parent}: {reason}, so this one ends", file=sys.stderr, flush=True)
            os._exit(2)


def _content(path: Path) -> bytes | None:
    """Content of a lock file, None if there is none; raises `UserError` if it cannot be read."""
    try:
        return read_regular(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be read ({error.strerror}), so a process may be using the folder; correct that, or "
        "remove the file if none is"
    )


def _holder(content: bytes | None) -> Holder | None:
    """The process that a lock file names, None if it is corrupt."""
    try:
        entries: Any = json.loads(content or b"")
        entries.pop("token")
        holder = Holder(**entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    texts = (holder.host, holder.started, holder.machine, holder.job, holder.restart)
    return holder if isinstance(holder.process, int) and all(isinstance(text, str) for text in texts) else None


def _time(path: Path) -> float:
    """Modification time of a file, long ago if there is none; raises `UserError` if it cannot be read."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("-inf")
    except OSError as error:
        raise _unreadable(path, error) from error


def _age(path: Path, now: Path) -> float:
    """Seconds since a file was renewed, by the clock of its disk: `now` is a file beside it that was renewed now."""
    return _time(now) - _time(path)


def _machine() -> str:
    """Identity of this machine's boot and process namespace: the same for all processes that see one another."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    with suppress(OSError):
        return f"{boot.read_text().strip()} {os.readlink(namespace)}"
    return ""


def _started(process: int) -> str:
    """Start time of a process, empty if there is none that still runs."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] in "ZX" else fields[19]  # proc_pid_stat(5): state, starttime
    return _listed_start(process)


def _listed_start(process: int) -> str:
    """Start time of a process by `ps`, the same in every language and time zone; empty if there is none."""
    command = ["ps", "-o", "stat=", "-o", "lstart=", "-p", str(process)]
    fixed = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}
    state, _, start = subprocess.run(command, capture_output=True, text=True, env=fixed).stdout.strip().partition(" ")
    return "" if state.startswith("Z") else start.strip()
