"""Ranks that stop, hang or end: named by the others, which would wait for them.

Every rank has two threads. One writes a sign of life (what this rank does, how far it is, where its main thread waits)
to the store by which the ranks met, and reads those of the others. The other thread judges them, because the first one
waits, too, when the process that holds the store is stopped.
"""

import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.distributed_c10d import _get_default_store

from hubert_lightning import console, interrupts
from hubert_lightning.data.garbage import without_collection
from hubert_lightning.data.workers import killed_worker
from hubert_lightning.errors import UserError

FROM_A_COLLECTIVE = re.compile(
    r"gloo|Connection (closed|reset|refused)|Broken pipe|NCCL|ncclRemoteError|recvValue failed|Failed to recv"
)
"""What the errors of collective operations say when a peer is gone."""
ENDED = 1
"""Exit status of ranks that end because of another one."""
OTHERS, DATA, BACKWARD = "waits for other ranks", "waits for data", "is in the backward pass"
PLACES = {
    "torch/utils/data/dataloader.py": DATA,
    "torch/distributed/": OTHERS,
    "lightning/fabric/utilities/distributed.py": OTHERS,
    "torch/autograd/graph.py": BACKWARD,  # where gradients of all ranks are added up
}


@dataclass
class Sign:
    """What one rank says of itself."""

    host: str
    pid: int
    beat: int
    what: str
    count: int
    in_steps: bool
    place: str
    end: str | None = None
    """None while it works, empty after a clean end, otherwise the error."""


class StalledRanks(Callback):
    """Ends a run of several ranks if one of them stops, hangs or is gone, with a sentence that names it.

    The same command resumes; torchrun and SLURM start it again. A run of one process is only warned of.

    Args:
        timeout: Minutes without a sign of life after which a rank counts as stopped or gone. Other threads give it
            while a rank computes or waits.
        step_timeout: Minutes in which some rank must finish a batch of training, validation or test.
        labelling_timeout: Minutes in which some rank must finish a part of the work before training: reading manifests,
            a batch of features, K-means, the choice of a layer. Also the time-out of collective operations, unless
            trainer.strategy sets one.
    """

    def __init__(self, timeout: float = 5, step_timeout: float = 30, labelling_timeout: float = 1440) -> None:
        minutes = {"timeout": timeout, "step_timeout": step_timeout, "labelling_timeout": labelling_timeout}
        for name, value in minutes.items():
            if not 0 < value < math.inf:
                raise UserError(f"stalls.{name} is {value}; it is a number of minutes above 0")
        self.timeout, self.step_timeout, self.labelling_timeout = (60 * value for value in minutes.values())

    def attach(self, trainer: Trainer) -> None:
        """Watch from the moment when the ranks have met, which no hook of a callback is called at."""
        strategy: Any = trainer.strategy
        given = getattr(strategy, "timeout_minutes", None)  # to LayerwiseFSDP
        if given is None and getattr(strategy, "_timeout", None) == default_pg_timeout:
            strategy._timeout = timedelta(seconds=self.labelling_timeout + self.step_timeout)
        setup_environment = strategy.setup_environment

        def meet() -> None:
            setup_environment()
            console.note("setting up")
            _watch(trainer, self)

        strategy.setup_environment = meet

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        console.note(f"training (step {trainer.global_step + 1})", in_steps=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        console.note(f"training (after step {trainer.global_step})", in_steps=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        console.note(f"ending the training (step {trainer.global_step})")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        fits = trainer.state.fn == TrainerFn.FITTING
        at = " before training" if trainer.sanity_checking else f" at step {trainer.global_step}" if fits else ""
        console.note(f"validating{at} (batch {batch_idx + 1})", in_steps=True)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        console.note(f"testing (batch {batch_idx + 1})", in_steps=True)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        console.note(f"predicting (batch {batch_idx + 1})", in_steps=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SystemExit) or _of_collective(exception):
            end("")
        else:
            end(killed_worker(exception) or " ".join(str(exception).split())[:300] or type(exception).__name__)


class Watch:
    """The threads of one rank, and what they know of the others.

    Args:
        limits: The callback, whose time-outs hold.
        rank: This rank.
        ranks: Number of ranks.
        launched: Processes of further ranks that this one started, by rank.
        name: Name in the store, another one for each start of a Trainer.
    """

    def __init__(
        self, limits: StalledRanks, rank: int, ranks: int, launched: dict[int, subprocess.Popen], name: str
    ) -> None:
        self.limits, self.rank, self.ranks, self.launched, self.name = limits, rank, ranks, launched, name
        self.interval = min(2.0 * max(1, ranks / 64), limits.timeout / 5)
        """Seconds between two signs; less often the more ranks one store serves."""
        self.signs: dict[int, Sign] = {}
        self.lost: str | None = None
        """Why the store cannot be reached at the moment."""
        self._seen: dict[int, float] = {}
        self._moved: dict[int, float] = {}
        self._exchanged = self._looked = time.monotonic()
        self._beat, self._warned = 0, -1
        self._failed: float | None = None
        self._ended = threading.Event()
        self._main = threading.main_thread().ident
        self._store = _get_default_store().clone() if ranks > 1 else None  # type: ignore[attr-defined]
        self._lock = threading.Lock()
        for work in (self._exchange, self._judge):
            threading.Thread(target=work, name="stalls", daemon=True).start()

    def end(self, reason: str) -> None:
        """Tell the others that this rank ends, and why, and watch no longer."""
        if self._ended.is_set():
            return
        self._ended.set()
        telling = threading.Thread(target=self._tell_last, args=[reason], daemon=True)
        telling.start()
        telling.join(2)

    def culprit(self, seconds: float) -> str | None:
        """Which rank ended, after an error of a collective operation; waits until it is known, or so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if sentence := self._gone() or self._failure() or self._silent(3.5 * self.interval):
                return sentence
            time.sleep(0.1)
        return None

    def _exchange(self) -> None:
        keys = [f"{self.name}/{rank}" for rank in range(self.ranks)]
        complete = False
        while not self._ended.wait(self.interval if self._beat else 0):
            self._beat += 1
            if self._store is None:
                self.signs = {0: self._sign()}
                self._exchanged = time.monotonic()
                continue
            try:
                self._tell(None)
                complete = complete or self._store.check(keys)
                if complete:
                    read = self._store.multi_get(keys)
                    self.signs = {rank: Sign(**json.loads(sign)) for rank, sign in enumerate(read)}
            except (RuntimeError, dist.DistError) as error:
                if "timeout" not in str(error).lower() or isinstance(error, dist.DistNetworkError):
                    self.lost = self.lost or str(error)
                    self._connect_again()
                continue
            self._exchanged, self.lost = time.monotonic(), None

    def _connect_again(self) -> None:
        """Reach the store anew: a connection may break while its process is well. Waits for that long at most."""
        with suppress(RuntimeError, dist.DistError):
            self._store = _get_default_store().clone()  # type: ignore[attr-defined]

    def _tell(self, end: str | None) -> None:
        if self._store is None:
            return
        with self._lock:
            if end is not None or not self._ended.is_set():
                self._store.set(f"{self.name}/{self.rank}", json.dumps(asdict(self._sign(end))))

    def _tell_last(self, reason: str) -> None:
        with suppress(dist.DistError):  # the process that held the store is gone
            self._tell(reason)

    def _sign(self, end: str | None = None) -> Sign:
        now = console.now
        place = place_of(frame_of(self._main or 0))
        return Sign(socket.gethostname(), os.getpid(), self._beat, now.what, now.count, now.in_steps, place, end)

    def _judge(self) -> None:
        beats: dict[int, int] = {}
        counts: dict[int, int] = {}
        while not self._ended.wait(self.interval / 2):
            now = time.monotonic()
            if now - self._looked > self.interval + 2:  # this process was stopped itself, or the machine slept
                self._seen, self._moved, self._exchanged = dict.fromkeys(self._seen, now), {}, now
            self._looked = now
            for rank, sign in self.signs.items():
                if beats.get(rank) != sign.beat or rank not in self._seen:
                    beats[rank], self._seen[rank] = sign.beat, now
                if counts.get(rank) != sign.count or rank not in self._moved:
                    counts[rank], self._moved[rank] = sign.count, now
            if sentence := self._gone() or self._failure():
                self._failed = self._failed or now
                # The main thread finds out by itself, if it waits for that rank in an operation that notices
                if now - self._failed > min(10.0 if self.lost is None else math.inf, self.limits.timeout):
                    self._leave(sentence)
                continue
            self._failed = None
            if sentence := self._silent(self.limits.timeout) or self._stall():
                self._leave(sentence)

    def _gone(self) -> str | None:
        """A rank whose process ended, as far as this one can see."""
        for rank, process in self.launched.items():
            if (code := process.poll()) and not self._said_why(rank):
                how = f"by signal {-code}" if code < 0 else f"with exit status {code}"
                return f"rank {rank} (pid {process.pid}) was ended {how}; look at its own output"
        if self.lost is not None and self.rank != 0 and not self._said_why(0):
            return f"{self._called(0)} ended; look at its own output"
        return None

    def _said_why(self, rank: int) -> bool:
        return rank in self.signs and self.signs[rank].end is not None

    def _failure(self) -> str | None:
        for rank, sign in self.signs.items():
            if rank != self.rank and sign.end:
                return f"{self._called(rank)} ended: {sign.end}"
        return None

    def _silent(self, seconds: float) -> str | None:
        """A rank that gives no sign of life."""
        now = time.monotonic()
        silent = [
            rank
            for rank, seen in self._seen.items()
            if rank != self.rank and self.signs[rank].end is None and now - seen > seconds
        ]
        since = max((self._seen[rank] for rank in silent), default=0.0)
        if self.ranks > 1 and self.rank != 0 and now - self._exchanged > seconds:
            silent, since = [0], self._exchanged  # whose process holds the store
        if not silent:
            return None
        ranks = " and ".join(map(self._called, silent))
        pids = " ".join(str(self.signs[rank].pid) for rank in silent if rank in self.signs)
        return (
            f"no sign of life of {ranks} since {_clock(since)} ({_minutes(now - since)}): the process is stopped or "
            f"was killed, or its host is down; wake it (kill -CONT {pids}) or end it (kill -KILL {pids})"
        )

    def _stall(self) -> str | None:
        """The ranks that all others wait for, if nothing has moved for too long."""
        working = [rank for rank, sign in self.signs.items() if sign.end is None]
        if not working or not set(working) <= self._moved.keys():
            return None
        slow = [rank for rank in working if self.signs[rank].place not in (OTHERS, BACKWARD)] or working
        fewest = min(self.signs[rank].count for rank in slow)
        slow = [rank for rank in slow if self.signs[rank].count == fewest] if len(slow) > 1 else slow
        steps = all(self.signs[rank].in_steps for rank in slow)
        limit = self.limits.step_timeout if steps else self.limits.labelling_timeout
        since = max(self._moved[rank] for rank in working)
        now = time.monotonic()
        if now - since <= limit:
            return None
        what = " and ".join(
            f"{self._called(rank)} {self.signs[rank].place}, while {self.signs[rank].what}" for rank in slow
        )
        key = "step_timeout" if steps else "labelling_timeout"
        data = any(self.signs[rank].place == DATA for rank in slow)
        hint = "look at the file system that it reads from" if data else "look at that process and its device"
        return f"nothing is finished since {_clock(since)} ({_minutes(now - since)}, stalls.{key}): {what}; {hint}"

    def _called(self, rank: int) -> str:
        sign = self.signs.get(rank)
        return f"rank {rank} (host {sign.host}, pid {sign.pid})" if sign else f"rank {rank}"

    def _leave(self, sentence: str) -> None:
        """Say it, once for all ranks, and end the process; one that is alone is warned."""
        if self.ranks == 1:
            if self._warned != console.now.count:
                self._warned = console.now.count
                print(f"hubert: warning: {sentence}", file=sys.stderr, flush=True)
            return
        now = time.monotonic()
        ended = {rank for rank, process in self.launched.items() if process.poll() is not None}
        ended |= {rank for rank, sign in self.signs.items() if sign.end is not None}
        if self.lost is not None:
            ended.add(0)
        alive = [rank for rank, seen in self._seen.items() if now - seen < 3.5 * self.interval and rank not in ended]
        if self.rank == min([*alive, self.rank]):
            print(f"hubert: {sentence}. This run ends; the same command resumes", file=sys.stderr, flush=True)
        time.sleep(min(2 * self.interval, 3))  # so that all have judged before the first one is gone
        interrupts.end_process(ENDED, list(self.launched.values()))


_starts = 0
_launched: dict[int, subprocess.Popen] = {}
_current: Watch | None = None


def _watch(trainer: Trainer, limits: StalledRanks) -> None:
    """Watch the ranks of a Trainer, which have met."""
    global _starts, _current
    end("")
    _starts += 1
    signals = interrupts.current()
    if processes := getattr(trainer.strategy.launcher, "procs", None):
        _launched.update(enumerate(processes, start=trainer.global_rank + 1))
        processes.clear()  # Lightning's own observer would kill this process before it can say why
    if signals:
        signals.speaks = trainer.is_global_zero
        signals.launched = list(_launched.values())
    _current = Watch(limits, trainer.global_rank, trainer.world_size, _launched, f"stalls{_starts}")


def end(reason: str) -> None:
    """Tell other ranks that this one ends, and why if that is an error; nothing is watched any longer."""
    if _current is not None:
        _current.end(reason)


def ended_rank(error: BaseException) -> str | None:
    """The sentence of an error of a collective operation: which rank ended. None for another error."""
    if _current is None or _current.ranks == 1 or not _of_collective(error):
        return None
    sentence = _current.culprit(6 * _current.interval + 2)
    sentence = sentence or "another rank ended; look at the output of the others"
    return f"{sentence}. This run ends; the same command resumes"


def _of_collective(error: BaseException) -> bool:
    return isinstance(error, (RuntimeError, dist.DistError)) and bool(FROM_A_COLLECTIVE.search(str(error)))


def frame_of(thread: int) -> FrameType | None:
    """What a thread is in the middle of."""
    # Python 3.11 waits for itself for ever if it collects garbage in `_current_frames`, holding its list of threads
    with without_collection():
        return sys._current_frames().get(thread)


def place_of(frame: FrameType | None) -> str:
    """What a thread waits for, by the files of the functions that it is in, innermost first."""
    while frame is not None:
        for file, place in PLACES.items():
            if file in frame.f_code.co_filename:
                return place
        frame = frame.f_back
    return "computes"


def _clock(moment: float) -> str:
    return (datetime.now() - timedelta(seconds=time.monotonic() - moment)).strftime("%H:%M:%S")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"
