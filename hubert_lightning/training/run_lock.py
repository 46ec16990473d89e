"""One command at a time on a folder: a lock file that outlives a crash no longer than it must.

The file says which process holds it: host, process and when that started, job. On the same host, the process table
tells whether it still runs, however long it stands still. From another host, the file's time tells, which the holder
renews.
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

from hubert_lightning.console import is_first_process
from hubert_lightning.errors import UserError
from hubert_lightning.files import read_regular, remove_unfinished, unfinished_file, unfinished_name

log = logging.getLogger(__name__)

RUN_LOCK = "run.lock"
ELSEWHERE = "choose another --output"
RENEWED = 20.0
"""Seconds after which a holder renews the time of its file."""
STALE = 90.0
"""Seconds after which a file that was not renewed is a dead process's, where the process table cannot tell."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Args:
        host: Name of its machine.
        process: Its number there.
        started: When it started, as that machine counts; empty if it cannot be told.
        machine: Which start of which machine, and which namespace of processes, the number belongs to.
        job: Job of SLURM, if it is part of one.
        restart: How often that job was put back into the queue.
    """

    host: str
    process: int
    started: str
    machine: str
    job: str
    restart: str

    @classmethod
    def this(cls) -> "Holder":
        job = os.environ.get("SLURM_JOB_ID", "")
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        return cls(socket.gethostname(), os.getpid(), _started(os.getpid()), _machine(), job, restart)

    def is_dead(self) -> bool | None:
        """Whether the process has ended; None if that cannot be told from here."""
        here = Holder.this()
        if (self.host, self.machine) == (here.host, here.machine):
            return _started(self.process) != self.started if self.started else None
        if self.job and self.job == here.job and self.restart != here.restart:
            return True  # SLURM puts a job back when its processes have ended
        return None


@contextmanager
def locked(folder: Path, name: str = RUN_LOCK, instead: str = ELSEWHERE) -> Iterator[None]:
    """Hold the lock of a folder, which is made; within the same process as often as asked, and on rank 0 alone.

    A lock that a dead process left is taken over. Whether a process on another host is dead is known after at most
    a minute and a half.

    Args:
        folder: Folder that is written to.
        name: Name of the lock file, one for each kind of command that may be alone.
        instead: What the user may do instead, if another process holds it.

    Raises:
        UserError: Another process holds it; or the file cannot be read, or the folder written to.
    """
    path = folder.resolve() / name
    if not is_first_process() or _held.get(path) == os.getpid():
        yield
        return
    mine = _taken(path, instead)
    _held[path] = os.getpid()
    ended = threading.Event()
    threading.Thread(target=_renew, args=(path, mine, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        _held.pop(path, None)
        with suppress(OSError):
            if path.read_bytes() == mine:
                path.unlink()


def holder_of(folder: Path, name: str = RUN_LOCK) -> Holder | None:
    """The other process that holds a folder's lock; None if it is free, or held by a process known to be dead.

    Raises:
        UserError: The file cannot be read.
    """
    path = folder.resolve() / name
    if _held.get(path) == os.getpid() or (content := _content(path)) is None:
        return None
    holder = _holder(content)
    if holder is None:
        return None
    dead = holder.is_dead()
    if dead is None:
        with suppress(OSError), unfinished_file(path) as now:  # whose time the same disk gives; else it is alive
            dead = _age(path, now) > STALE
    return None if dead else holder


def refuse(folder: Path, holder: Holder, instead: str = ELSEWHERE) -> UserError:
    """The sentence that names who holds a folder."""
    return UserError(
        f"{folder}: process {holder.process} on {holder.host} is at work in it"
        f"{f' (job {holder.job})' if holder.job else ''}; wait for its end, end it, or {instead}"
    )


_held: dict[Path, int] = {}  # locks of this process, by which it is told from one that it forked


def _taken(path: Path, instead: str) -> bytes:
    """Put a file of this process in place; returns what is in it."""
    mine = json.dumps(asdict(Holder.this()) | {"token": secrets.token_hex(8)}).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path.parent)
        with unfinished_file(path) as own:
            with own.open("wb") as file:
                file.write(mine)
                file.flush()
                os.fsync(file.fileno())
            while not _linked(own, path):
                _wait_for_end(path, own, instead)
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot be made or written to ({error.strerror}); correct that, or choose another --output"
        ) from error
    return mine


def _wait_for_end(path: Path, own: Path, instead: str) -> None:
    """Return when the holder is known to be dead and its file is removed; raises if it is alive."""
    with _alone(path.parent):
        before, renewed = _content(path), _time(path)
        if before is None:
            return
        holder = _holder(before)
        dead = None if holder is None else holder.is_dead()
        if dead or (dead is None and _age(path, own) > STALE):
            _remove(path, before)
            return
    if dead is False:
        assert holder is not None
        raise refuse(path.parent, holder, instead)
    who = f"process {holder.process} on {holder.host}" if holder else "whoever wrote it, which it does not say,"
    log.warning("%s: waiting up to %.0f s to see whether %s is alive", path, STALE, who)
    while _content(path) == before:
        time.sleep(0.5)
        os.utime(own)
        if _time(path) != renewed and holder is not None:
            raise refuse(path.parent, holder, instead)
        if _age(path, own) > STALE:
            return  # to be looked at once more, and removed, alone


def _remove(path: Path, content: bytes | None) -> None:
    """Remove the file of a dead process, unless another process has just put its own there."""
    aside = unfinished_name(path)
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if aside.read_bytes() != content:
            _linked(aside, path)
        aside.unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Be the only process of this machine, and where the disk knows such locks of all, to look at a folder's lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _linked(own: Path, path: Path) -> bool:
    """Whether the file got the name, which no file may have; without links, as a file that is made there."""
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


def _renew(path: Path, mine: bytes, ended: threading.Event) -> None:
    """Renew the time of a file; end the process, which must have stood still, if another has taken over."""
    while not ended.wait(RENEWED):
        try:
            content = path.read_bytes()
        except OSError:  # such as of a server that restarts
            continue
        if content == mine:
            with suppress(OSError):
                os.utime(path)
        elif holder := _holder(content):
            there = f"process {holder.process} on {holder.host} took over while this one stood still"
            print(f"hubert: {path.parent}: {there}, which ends", file=sys.stderr, flush=True)
            os._exit(2)


def _content(path: Path) -> bytes | None:
    """What a file says, None if there is none.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return read_regular(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be read ({error.strerror}), so that nothing tells whether a process is at work there; correct "
        "that, or remove it if none is"
    )


def _holder(content: bytes | None) -> Holder | None:
    """The process that a file names, None if it is damaged."""
    try:
        about: Any = json.loads(content or b"")
        about.pop("token")
        holder = Holder(**about)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    texts = (holder.host, holder.started, holder.machine, holder.job, holder.restart)
    return holder if isinstance(holder.process, int) and all(isinstance(text, str) for text in texts) else None


def _time(path: Path) -> float:
    """When a file was renewed, long ago if there is none; raises as `_content` does."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("-inf")
    except OSError as error:
        raise _unreadable(path, error) from error


def _age(path: Path, now: Path) -> float:
    """Seconds since a file was renewed, by the clock of its disk, which a file beside it that was renewed now tells."""
    return _time(now) - _time(path)


def _machine() -> str:
    """Which start of this machine, and which namespace of its processes; the same for all that see one another."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    with suppress(OSError):
        return f"{boot.read_text().strip()} {os.readlink(namespace)}"
    return ""


def _started(process: int) -> str:
    """When a process started; empty if there is none, or none that still runs."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] in "ZX" else fields[19]  # proc_pid_stat(5): state, starttime
    return _listed_start(process)


def _listed_start(process: int) -> str:
    """When a process started as `ps` says, the same in every language and time zone; empty if there is none."""
    command = ["ps", "-o", "stat=", "-o", "lstart=", "-p", str(process)]
    fixed = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}
    state, _, start = subprocess.run(command, capture_output=True, text=True, env=fixed).stdout.strip().partition(" ")
    return "" if state.startswith("Z") else start.strip()
