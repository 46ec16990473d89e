"""The requests that wait for the model: a bounded queue, from which one thread computes batches.

Requests that arrive while a batch is computed form the next batches, in the order of their arrival. No request waits
for others to come.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from fastapi import HTTPException
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.serving.limits import Limits
from hubert_lightning.serving.metrics import Metrics

log = logging.getLogger(__name__)

Encode = Callable[[Sequence[Cut]], Sequence[Tensor]]
"""A function from recordings to their rows, (frames, …) each."""
FAILED = "the service has failed; read its log, and restart it"
LONGEST_RETRY = 600
"""Seconds of `Retry-After` at most."""


@dataclass
class Job:
    """A recording that waits for its answer.

    Args:
        kind: Name of the function that encodes it.
        cut: The recording.
        finish: Function from its rows to the answer, computed in the model's thread.
        answer: The answer, or why there is none.
    """

    kind: str
    cut: Cut
    finish: Callable[[Tensor], bytes]
    answer: "asyncio.Future[bytes]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class JobQueue:
    """Jobs that wait, and the thread that computes them.

    Args:
        encoders: Function that encodes recordings, by the kind of their jobs.
        batch_duration: Seconds of recordings that are computed together; a longer one is computed alone.
        limits: Limits of what may wait.
        metrics: Metrics of the service.
    """

    def __init__(self, encoders: Mapping[str, Encode], batch_duration: float, limits: Limits, metrics: Metrics) -> None:
        self._encoders, self._batch_duration = encoders, batch_duration
        self._limits, self._metrics = limits, metrics
        self._waiting = deque[Job]()
        self._arrived = asyncio.Event()
        self._requests, self._seconds = 0, 0.0
        self._speed = 1.0  # seconds of audio that are computed in a second
        self._task: asyncio.Task[None] | None = None
        self._computed_now: Sequence[Job] = ()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request from its beginning to its end.

        Raises:
            HTTPException: There are too many, or none is computed any more (503).
        """
        if self._task is not None and self._task.done():
            raise HTTPException(503, FAILED)
        if self._requests >= self._limits.max_requests:
            raise self._busy(f"{self._requests} requests are in progress")
        self._requests += 1
        self._metrics.open_requests.set(self._requests)
        try:
            yield
        finally:
            self._requests -= 1
            self._metrics.open_requests.set(self._requests)

    @contextmanager
    def reserved(self, seconds: float) -> Iterator[None]:
        """Reserve room for a recording, before it is in memory, until it is answered.

        Args:
            seconds: Duration of the recording.

        Raises:
            HTTPException: Too much audio waits (503).
        """
        if self._seconds + seconds > self._limits.max_waiting:
            raise self._busy(f"{self._seconds:.0f} s of audio are waiting")
        self._seconds += seconds
        self._metrics.waiting_seconds.set(self._seconds)
        try:
            yield
        finally:
            self._seconds -= seconds
            self._metrics.waiting_seconds.set(max(self._seconds, 0.0))

    def _busy(self, fact: str) -> HTTPException:
        seconds = min(max(math.ceil(self._seconds / self._speed), 1), LONGEST_RETRY)
        return HTTPException(
            503, f"the service is busy: {fact}; send the request again in {seconds} s", {"Retry-After": str(seconds)}
        )

    def put(self, job: Job) -> None:
        """Let a job wait for its turn; cancel its answer to take it away."""
        self._waiting.append(job)
        self._arrived.set()

    @asynccontextmanager
    async def running(self, thread: ThreadPoolExecutor) -> AsyncIterator[None]:
        """Compute jobs until the block ends.

        Args:
            thread: Executor of one thread.
        """
        self._task = task = asyncio.create_task(self._run(thread))
        task.add_done_callback(self._ended)
        try:
            yield
        finally:
            self._task = None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @property
    def ready(self) -> bool:
        """Whether jobs are computed."""
        return self._task is not None and not self._task.done()

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """Log why no more jobs are computed, and fail those that wait."""
        if task.cancelled() or self._task is None:
            return
        log.critical("the service has stopped computing; restart it", exc_info=task.exception())
        for job in [*self._computed_now, *self._waiting]:
            if not job.answer.done():
                job.answer.set_exception(HTTPException(503, FAILED))

    async def _run(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            jobs = self._next_batch()
            if not jobs:
                self._arrived.clear()
                continue
            self._computed_now = jobs
            answers = await loop.run_in_executor(thread, self._computed, jobs)
            for job, answer in zip(jobs, answers, strict=True):
                if job.answer.done():  # its client has gone
                    continue
                if isinstance(answer, Exception):
                    job.answer.set_exception(answer)
                else:
                    job.answer.set_result(answer)

    def _next_batch(self) -> list[Job]:
        """Take the first job, and those of its kind that follow as far as they fit; others keep their places."""
        batch, others = list[Job](), deque[Job]()
        seconds = 0.0
        while self._waiting:
            job = self._waiting.popleft()
            if job.answer.done():
                continue
            if batch and job.kind == batch[0].kind and seconds + job.cut.duration > self._batch_duration:
                others.append(job)
                break
            if batch and job.kind != batch[0].kind:
                others.append(job)
                continue
            batch.append(job)
            seconds += job.cut.duration
        self._waiting.extendleft(reversed(others))
        return batch

    def _computed(self, jobs: Sequence[Job]) -> list[bytes | Exception]:
        """Compute a batch; runs in the model's thread."""
        began = perf_counter()
        answers = self._answers(jobs)
        took = perf_counter() - began
        self._speed = 0.8 * self._speed + 0.2 * sum(job.cut.duration for job in jobs) / max(took, 1e-3)
        self._metrics.batch_requests.observe(len(jobs))
        self._metrics.batch_seconds.observe(took)
        return answers

    def _answers(self, jobs: Sequence[Job]) -> list[bytes | Exception]:
        try:
            rows = list(self._encoders[jobs[0].kind]([job.cut for job in jobs]))
            assert len(rows) == len(jobs), f"{len(rows)} results of {len(jobs)} recordings"
        except Exception as error:
            if len(jobs) > 1:  # one recording must not fail the others
                return [answer for job in jobs for answer in self._answers([job])]
            return [_logged(error)]
        return [_finished(job, row) for job, row in zip(jobs, rows, strict=True)]


def _finished(job: Job, rows: Tensor) -> bytes | Exception:
    try:
        return job.finish(rows)
    except Exception as error:
        return _logged(error)


def _logged(error: Exception) -> Exception:
    """Log an error that is no mistake of a client with its traceback; returns it."""
    if not isinstance(error, UserError):
        log.error("a recording could not be computed", exc_info=error)
    return error
