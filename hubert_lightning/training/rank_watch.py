"""Signs of life of all ranks: if a rank stops, hangs or ends, the others name it and end instead of waiting.

Every rank has two threads. The first one writes a sign of life (current work, progress, what the main thread waits for)
to the store through which the ranks connected, and reads the signs of the others. The second one evaluates the signs.
It is separate because the first one blocks when the process that holds the store is stopped.
"""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from types import FrameType

import torch.distributed as dist

from hubert_lightning import current_work, interrupts
from hubert_lightning.data.garbage import without_collection
from hubert_lightning.first_process import is_first_process
from hubert_lightning.training.lightning_internals import BACKWARD, DATA, OTHERS, connect_to_store, waiting_in

EXIT_STATUS = 1
"""Exit status of ranks that end because of another one."""


@dataclass(frozen=True)
class Limits:
    """Seconds after which the ranks end.

    Args:
        silence: Seconds without a sign of life of a rank.
        step: Seconds within which at least one rank must finish a batch.
        labelling: Seconds within which at least one rank must finish a part of the work before training.
        start: Seconds within which all ranks must connect, and then each must give its first sign of life.
    """

    silence: float
    step: float
    labelling: float
    start: float


@dataclass
class Sign:
    """Sign of life of one rank.

    Args:
        host: Name of its machine.
        pid: Its process.
        beat: Number of the sign.
        what: Current work.
        count: Pieces of work that it has begun.
        in_steps: Whether the work is batches.
        activity: "computes", or what its main thread waits for.
        end: None while it works, empty after a clean end, otherwise its error.
    """

    host: str
    pid: int
    beat: int
    what: str
    count: int
    in_steps: bool
    activity: str
    end: str | None = None


class RankWatch:
    """The threads of one rank, and the signs of the others.

    Args:
        limits: Seconds after which the ranks end.
        rank: This rank.
        num_ranks: Number of ranks.
        launched: Processes of further ranks that this one started, by rank.
        name: Prefix of the keys in the store, different for each start of a Trainer.
    """

    def __init__(
        self, limits: Limits, rank: int, num_ranks: int, launched: dict[int, subprocess.Popen[bytes]], name: str
    ) -> None:
        self.limits, self.rank, self.num_ranks, self.launched, self.name = limits, rank, num_ranks, launched, name
        self.interval = min(2.0 * max(1, num_ranks / 64), limits.silence / 5)
        """Seconds between two signs; longer if one store serves many ranks."""
        self.signs: dict[int, Sign] = {}
        self.lost: str | None = None
        """Error of the connection to the store, None while it works."""
        self.tell: Callable[[str], None] | None = None
        """Function that gets the sentence about a stall, on rank 0."""
        self._exchanged = self._judged = time.monotonic()
        self._seen = dict.fromkeys(range(num_ranks), self._judged)  # when each rank gave its last sign
        self._moved: dict[int, float] = {}  # when each rank began its last piece of work
        self._beat, self._warned = 0, -1
        self._failed: float | None = None
        self._ended = threading.Event()
        self._main = threading.main_thread().ident
        self._store = connect_to_store() if num_ranks > 1 else None
        self._lock = threading.Lock()
        for work in (self._exchange, self._judge):
            threading.Thread(target=work, name="stalls", daemon=True).start()

    def end(self, reason: str) -> None:
        """Tell the others that this rank ends, and stop watching.

        Args:
            reason: Error, empty after a clean end.
        """
        if self._ended.is_set():
            return
        self._ended.set()
        last = threading.Thread(target=self._write_last, args=[reason], daemon=True)
        last.start()
        last.join(2)

    def culprit(self, seconds: float) -> str | None:
        """Find the rank that ended, after an error of a collective operation.

        Args:
            seconds: Longest time to wait for the answer.

        Returns:
            A sentence that names the rank; None if the rank is not found in this time.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            silence = 3.5 * self.interval
            if sentence := self._gone() or self._failure() or self._silent(silence, silence):
                return sentence
            time.sleep(0.1)
        return None

    def _exchange(self) -> None:
        while not self._ended.wait(self.interval if self._beat else 0):
            self._beat += 1
            if self._store is None:
                self.signs = {0: self._sign()}
                self._exchanged = time.monotonic()
                continue
            try:
                self._write(None)
                # Reading a missing key would block
                ranks = [rank for rank in self._seen if rank in self.signs or self._store.check([self._key(rank)])]
                signs = self._store.multi_get(list(map(self._key, ranks)))
                self.signs = {rank: Sign(**json.loads(sign)) for rank, sign in zip(ranks, signs, strict=True)}
            except (RuntimeError, dist.DistError) as error:
                if "timeout" not in str(error).lower() or isinstance(error, dist.DistNetworkError):
                    self.lost = self.lost or str(error)
                    self._connect_again()
                continue
            self._exchanged, self.lost = time.monotonic(), None

    def _key(self, rank: int) -> str:
        return f"{self.name}/{rank}"

    def _connect_again(self) -> None:
        """Connect to the store again, which may take long; a connection can break while the other process runs."""
        with suppress(RuntimeError, dist.DistError):
            self._store = connect_to_store()

    def _write(self, end: str | None) -> None:
        if self._store is None:
            return
        with self._lock:
            if end is not None or not self._ended.is_set():
                self._store.set(self._key(self.rank), json.dumps(asdict(self._sign(end))))

    def _write_last(self, reason: str) -> None:
        with suppress(dist.DistError):  # the process that held the store has ended
            self._write(reason)

    def _sign(self, end: str | None = None) -> Sign:
        now = current_work.now
        activity = waiting_in(frame_of(self._main or 0)) or "computes"
        return Sign(socket.gethostname(), os.getpid(), self._beat, now.what, now.count, now.in_steps, activity, end)

    def _judge(self) -> None:
        beats: dict[int, int] = {}
        counts: dict[int, int] = {}
        while not self._ended.wait(self.interval / 2):
            now = time.monotonic()
            if now - self._judged > self.interval + 2:  # this process itself was stopped, or the machine slept
                self._seen, self._moved, self._exchanged = dict.fromkeys(self._seen, now), {}, now
            self._judged = now
            for rank, sign in self.signs.items():
                if beats.get(rank) != sign.beat:
                    beats[rank], self._seen[rank] = sign.beat, now
                if counts.get(rank) != sign.count or rank not in self._moved:
                    counts[rank], self._moved[rank] = sign.count, now
            if sentence := self._gone() or self._failure():
                self._failed = self._failed or now
                # The main thread finds out by itself if its operation with that rank fails
                if now - self._failed > min(10.0 if self.lost is None else math.inf, self.limits.silence):
                    self._leave(sentence)
                continue
            self._failed = None
            if sentence := self._silent(self.limits.silence, self.limits.start) or self._stall():
                self._leave(sentence)

    def _gone(self) -> str | None:
        """Sentence about a rank whose process has ended, if this process can tell."""
        for rank, process in self.launched.items():
            if (code := process.poll()) and not self._gave_reason(rank):
                how = f"by signal {-code}" if code < 0 else f"with exit status {code}"
                return f"rank {rank} (pid {process.pid}) was ended {how}; look at its own output"
        if self.lost is not None and self.rank != 0 and not self._gave_reason(0):
            return f"{self._name_of(0)} ended; look at its own output"
        return None

    def _gave_reason(self, rank: int) -> bool:
        return rank in self.signs and self.signs[rank].end is not None

    def _failure(self) -> str | None:
        for rank, sign in self.signs.items():
            if rank != self.rank and sign.end:
                return f"{self._name_of(rank)} ended: {sign.end}"
        return None

    def _silent(self, seconds: float, at_start: float) -> str | None:
        """Sentence about ranks without a sign of life for `seconds`, or `at_start` before their first sign."""
        now = time.monotonic()
        silent = [
            rank
            for rank, seen in self._seen.items()
            if rank != self.rank
            and not self._gave_reason(rank)
            and now - seen > (seconds if rank in self.signs else at_start)
        ]
        since = max((self._seen[rank] for rank in silent), default=0.0)
        if self.num_ranks > 1 and self.rank != 0 and now - self._exchanged > seconds:
            silent, since = [0], self._exchanged  # its process holds the store
        if not silent:
            return None
        ranks = " and ".join(map(self._name_of, silent))
        pids = " ".join(str(self.signs[rank].pid) for rank in silent if rank in self.signs)
        advice = f"wake it (kill -CONT {pids}) or end it (kill -KILL {pids})" if pids else "look at its own output"
        return (
            f"no sign of life of {ranks} since {clock(since)} ({duration(now - since)}): the process is stopped or "
            f"was killed, or its host is down; {advice}"
        )

    def _stall(self) -> str | None:
        """Sentence about the ranks that the others wait for, if no rank has begun new work for too long."""
        working = [rank for rank, sign in self.signs.items() if sign.end is None]
        if not working or not set(working) <= self._moved.keys():
            return None
        slow = [rank for rank in working if self.signs[rank].activity not in (OTHERS, BACKWARD)] or working
        fewest = min(self.signs[rank].count for rank in slow)
        slow = [rank for rank in slow if self.signs[rank].count == fewest] if len(slow) > 1 else slow
        in_steps = all(self.signs[rank].in_steps for rank in slow)
        limit = self.limits.step if in_steps else self.limits.labelling
        since = max(self._moved[rank] for rank in working)
        now = time.monotonic()
        if now - since <= limit:
            return None
        ranks = " and ".join(
            f"{self._name_of(rank)} {self.signs[rank].activity}, while {self.signs[rank].what}" for rank in slow
        )
        key = "step_timeout" if in_steps else "labelling_timeout"
        reads = any(self.signs[rank].activity == DATA for rank in slow)
        advice = "look at the file system that it reads from" if reads else "look at that process and its device"
        return f"no work was finished since {clock(since)} ({duration(now - since)}, stalls.{key}): {ranks}; {advice}"

    def _name_of(self, rank: int) -> str:
        sign = self.signs.get(rank)
        return f"rank {rank} (host {sign.host}, pid {sign.pid})" if sign else f"rank {rank}"

    def _leave(self, sentence: str) -> None:
        """Print a sentence, once for all ranks, and end the process; a run of one process is only warned."""
        if self.num_ranks == 1:
            work = self.signs[self.rank].count  # not the current count: the sign that was evaluated may be older
            if self._warned != work:
                self._warned = work
                self._tell(sentence)
                print(f"hubert: warning: {sentence}", file=sys.stderr, flush=True)
            return
        self._tell(sentence)
        now = time.monotonic()
        ended = {rank for rank, process in self.launched.items() if process.poll() is not None}
        ended |= {rank for rank, sign in self.signs.items() if sign.end is not None}
        if self.lost is not None:
            ended.add(0)
        alive = [rank for rank in self.signs if now - self._seen[rank] < 3.5 * self.interval and rank not in ended]
        if self.rank == min([*alive, self.rank]):
            print(f"hubert: {sentence}. This run ends; the same command resumes", file=sys.stderr, flush=True)
        time.sleep(min(2 * self.interval, 3))  # all ranks evaluate the signs before the first one ends
        interrupts.end_process(EXIT_STATUS, list(self.launched.values()))

    def _tell(self, sentence: str) -> None:
        if self.tell and self.rank == 0:  # in a thread, as the function may wait for what hangs
            threading.Thread(target=self.tell, args=[sentence], name="stall alert", daemon=True).start()


def end_unless_set(started: threading.Event, warn_after: float, end_after: float) -> None:
    """End the process if the other ranks do not start; there are no signs of life before all have met.

    Args:
        started: Event that is set when all ranks have met.
        warn_after: Seconds after which rank 0 prints a warning.
        end_after: Seconds after which the process ends.
    """
    began = time.monotonic()
    waits = f"host {socket.gethostname()}, pid {os.getpid()}) waits for other ranks to start since {clock(began)}"
    if not started.wait(warn_after) and is_first_process():
        print(f"hubert: warning: rank 0 ({waits}; look at their output", file=sys.stderr, flush=True)
    if not started.wait(max(end_after - warn_after, 0)):
        waits = f"a rank ({waits} ({duration(time.monotonic() - began)}); look at their output"
        print(f"hubert: {waits}. This run ends; the same command resumes", file=sys.stderr, flush=True)
        interrupts.end_process(EXIT_STATUS)


def frame_of(thread: int) -> FrameType | None:
    """Return the innermost frame of a thread."""
    # Python 3.11 deadlocks if it collects garbage in `_current_frames`, which holds the lock of its list of threads
    with without_collection():
        return sys._current_frames().get(thread)


def clock(moment: float) -> str:
    """Return the time of day of a moment of `time.monotonic`."""
    return (datetime.now() - timedelta(seconds=time.monotonic() - moment)).strftime("%H:%M:%S")


def duration(seconds: float) -> str:
    """Return a duration in minutes, or in seconds if it is short."""
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"
