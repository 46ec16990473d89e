"""A service: its models, its queue, and the way of a request through both."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastapi import HTTPException, Request
from torch import Tensor

from hubert_lightning.data.resources import usable_cores
from hubert_lightning.errors import UserError
from hubert_lightning.serving.jobs import Job, JobQueue
from hubert_lightning.serving.limits import Limits
from hubert_lightning.serving.metrics import Metrics
from hubert_lightning.serving.models import Models
from hubert_lightning.serving.recordings import CheckedUpload, checked, in_memory, received

Result = TypeVar("Result")
CLIENT_GONE = 499
"""Status, as of nginx, of a request whose client closed the connection; nobody receives it."""


class Service:
    """What all requests share.

    Args:
        models: Models that compute.
        limits: Limits of requests.
        name: Name of the model, for clients.

    Attributes:
        metrics: Metrics of the service.
        queue: Requests that wait for the model.
        num_streams: Number of streams that are open.
        stream_thread: Thread that computes streams, so that they do not wait for long recordings.
    """

    def __init__(self, models: Models, limits: Limits, name: str) -> None:
        self.models, self.limits, self.name = models, limits, name
        self.metrics = Metrics()
        self.num_streams = 0
        self._threads = torch.get_num_threads()  # of the thread that loaded the models
        self.queue: JobQueue
        self.stream_thread: ThreadPoolExecutor
        self._readers: ThreadPoolExecutor
        self._folder: Path

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve until the block ends; then no thread and no temporary file is left."""
        queue = JobQueue(self.models.encoders, self.models.seconds_at_once, self.limits, self.metrics)
        with (
            tempfile.TemporaryDirectory(prefix="hubert-serve-", ignore_cleanup_errors=True) as folder,
            ThreadPoolExecutor(1, "model", _use_threads, (self._threads,)) as model_thread,
            ThreadPoolExecutor(1, "streams", _use_threads, (self._threads,)) as self.stream_thread,
            # Each upload is decoded and resampled in one thread: the model needs the others
            ThreadPoolExecutor(usable_cores(), "uploads", _use_threads, (1,)) as self._readers,
        ):
            os.chmod(folder, 0o700)
            self._folder, self.queue = Path(folder), queue
            async with queue.running(model_thread):
                yield

    async def answer(
        self, request: Request, kind: str, finish: Callable[[CheckedUpload], Callable[[Tensor], bytes]]
    ) -> bytes:
        """Receive a recording, wait for the model, and return the answer.

        Args:
            request: Request with a recording.
            kind: "transcribe" or "units".
            finish: Function from the recording to the function that makes the answer of its rows.

        Raises:
            HTTPException: The recording or the request cannot be used, or the service is busy.
        """
        with self.queue.admitted(), ExitStack() as stack:
            async with received(request, self.limits, self._folder) as path:
                upload = await self._read(checked, path, self.limits.max_duration)
                stack.enter_context(self.queue.reserved(upload.cut.duration))
                upload = upload._replace(cut=await self._read(in_memory, upload.cut))
            job = Job(kind, upload.cut, finish(upload))
            self.queue.put(job)
            content = await _unless_gone(request, job.answer)
        self.metrics.audio_seconds.labels(kind).inc(upload.cut.duration)
        return content

    async def _read(self, function: Callable[..., Result], *args: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *args)

    @contextmanager
    def stream_admitted(self) -> Iterator[None]:
        """Count a stream from its beginning to its end.

        Raises:
            UserError: There are too many.
        """
        if self.num_streams >= self.limits.max_streams:
            raise UserError(f"the service is busy: {self.num_streams} streams are open; try again later")
        self.num_streams += 1
        self.metrics.streams.set(self.num_streams)
        try:
            yield
        finally:
            self.num_streams -= 1
            self.metrics.streams.set(self.num_streams)


async def _unless_gone(request: Request, answer: "asyncio.Future[bytes]") -> bytes:
    """Wait for an answer; if the client closes the connection before, the recording leaves the queue."""
    gone = asyncio.create_task(_gone(request))
    try:
        waited: set[asyncio.Future[Any]] = {answer, gone}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise HTTPException(CLIENT_GONE, "the client closed the connection")
    finally:
        gone.cancel()
        answer.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _use_threads(number: int) -> None:
    """Let torch compute in so many threads in this thread; torch reads its own default at the first call."""
    torch.get_num_threads()
    torch.set_num_threads(number)
