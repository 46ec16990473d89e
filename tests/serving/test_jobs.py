"""Requests wait in a bounded queue, are computed in batches, and get their own answers."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from fastapi import HTTPException
from fastapi.testclient import TestClient
from helpers import cut_of, noise_with_pauses
from lhotse.cut import Cut
from served import ServedFiles, finished
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.serving.application import application
from hubert_lightning.serving.jobs import Encode, Job, JobQueue
from hubert_lightning.serving.limits import Limits
from hubert_lightning.serving.metrics import Metrics
from hubert_lightning.serving.models import Models, load_models
from hubert_lightning.serving.service import Service


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> list[Cut]:
    """Recordings of one second, named by their numbers."""
    folder = tmp_path_factory.mktemp("cuts")
    noise = noise_with_pauses(5)
    return [cut_of(folder / f"{number}.wav", noise[:SAMPLE_RATE]).with_id(str(number)) for number in range(8)]


class Encoder:
    """Rows that are the number of a cut; the first batch waits for `release`, so that others gather."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.release = threading.Event()

    def __call__(self, cuts: Sequence[Cut]) -> list[Tensor]:
        self.batches.append([int(cut.id) for cut in cuts])
        assert self.release.wait(60)
        return [torch.tensor([int(cut.id)]) for cut in cuts]


def named(rows: Tensor) -> bytes:
    return str(int(rows[0])).encode()


def with_queue(encoders: dict[str, Encode], batch_duration: float, use: Callable[[JobQueue], Awaitable[None]]) -> None:
    async def run() -> None:
        queue = JobQueue(encoders, batch_duration, Limits(), Metrics())
        with ThreadPoolExecutor(1) as thread:
            async with queue.running(thread):
                await use(queue)

    finished(run())


async def begun(encoder: Encoder) -> None:
    while not encoder.batches:
        await asyncio.sleep(0.001)


def test_waiting_recordings_are_computed_together_in_their_order(cuts: list[Cut]) -> None:
    words, units = Encoder(), Encoder()
    units.release.set()

    async def use(queue: JobQueue) -> None:
        jobs = [Job("words", cuts[0], named)]
        queue.put(jobs[0])
        await begun(words)
        for number in range(1, 8):
            jobs.append(Job("units" if number in (2, 5) else "words", cuts[number], named))
            queue.put(jobs[-1])
        words.release.set()
        assert await asyncio.gather(*(job.answer for job in jobs)) == [str(number).encode() for number in range(8)]

    with_queue({"words": words, "units": units}, 3.0, use)
    assert words.batches == [[0], [1, 3, 4], [6, 7]]
    assert units.batches == [[2, 5]]


def test_a_recording_that_is_longer_than_a_batch_is_computed_alone(cuts: list[Cut]) -> None:
    encoder = Encoder()
    encoder.release.set()

    async def use(queue: JobQueue) -> None:
        jobs = [Job("words", cut, named) for cut in cuts[:3]]
        for job in jobs:
            queue.put(job)
        assert await asyncio.gather(*(job.answer for job in jobs)) == [b"0", b"1", b"2"]

    with_queue({"words": encoder}, 0.0, use)
    assert encoder.batches == [[0], [1], [2]]


def test_a_recording_that_fails_does_not_fail_the_others_of_its_batch(cuts: list[Cut]) -> None:
    def encode(cuts: Sequence[Cut]) -> list[Tensor]:
        if any(cut.id == "1" for cut in cuts):
            raise UserError("1 is wrong")
        return [torch.tensor([int(cut.id)]) for cut in cuts]

    def broken(rows: Tensor) -> bytes:
        raise RuntimeError("a bug")

    async def use(queue: JobQueue) -> None:
        jobs = [Job("words", cut, broken if cut.id == "2" else named) for cut in cuts[:4]]
        for job in jobs:
            queue.put(job)
        answers = await asyncio.gather(*(job.answer for job in jobs), return_exceptions=True)
        assert [str(answer) for answer in answers] == ["b'0'", "1 is wrong", "a bug", "b'3'"]

    with_queue({"words": encode}, 60.0, use)


def test_a_recording_whose_client_has_gone_is_not_computed(cuts: list[Cut]) -> None:
    encoder = Encoder()

    async def use(queue: JobQueue) -> None:
        jobs = [Job("words", cut, named) for cut in cuts[:3]]
        queue.put(jobs[0])
        await begun(encoder)
        queue.put(jobs[1])
        queue.put(jobs[2])
        jobs[1].answer.cancel()
        encoder.release.set()
        assert await jobs[2].answer == b"2"

    with_queue({"words": encoder}, 0.0, use)
    assert encoder.batches == [[0], [2]]


def test_more_than_may_wait_is_refused_with_the_time_of_the_next_try() -> None:
    queue = JobQueue({}, 0.0, Limits(max_requests=2, max_duration=10, max_waiting=15), Metrics())
    with queue.admitted(), queue.admitted():
        with pytest.raises(HTTPException) as refused, queue.admitted():
            pass
        assert refused.value.status_code == 503
        assert refused.value.detail == (
            "the service is busy: 2 requests are in progress; send the request again in 1 s"
        )
        assert refused.value.headers == {"Retry-After": "1"}
        with queue.reserved(10):
            with pytest.raises(HTTPException, match="10 s of audio are waiting") as refused, queue.reserved(10):
                pass
            assert refused.value.headers == {"Retry-After": "10"}
            with queue.reserved(5):
                pass
    with queue.admitted(), queue.reserved(10):
        pass


def test_a_service_that_has_stopped_computing_says_so(cuts: list[Cut], caplog: pytest.LogCaptureFixture) -> None:
    """A fault of the queue itself: the time of a batch cannot be noted."""

    async def use(queue: JobQueue) -> None:
        assert queue.ready
        queue._metrics = None  # type: ignore[assignment]
        jobs = [Job("words", cut, named) for cut in cuts[:2]]
        for job in jobs:
            queue.put(job)
        for job in jobs:
            with pytest.raises(HTTPException, match="the service has failed; read its log"):
                await job.answer
        assert not queue.ready
        with pytest.raises(HTTPException, match="restart it"), queue.admitted():
            pass

    with_queue({"words": lambda cuts: [torch.tensor([int(cut.id)]) for cut in cuts]}, 0.0, use)
    [record] = [record for record in caplog.records if "the service has stopped computing" in record.message]
    assert record.exc_info


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="the longest recordings would always be refused"):
        Limits(max_duration=100, max_waiting=50)
    with pytest.raises(UserError, match="max_requests is 0"):
        Limits(max_requests=0)


def all_at_once(
    models: Models, uploads: Sequence[tuple[str, bytes]], limits: Limits = Limits()
) -> list[httpx.Response]:
    """The answers to uploads, each to an endpoint, that are sent at the same time."""

    async def run() -> list[httpx.Response]:
        app = application(Service(models, limits, "best.ckpt"))
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as client:
            posts = [client.post(f"http://service{path}", content=content) for path, content in uploads]
            return await asyncio.gather(*posts)

    torch.set_num_threads(2)
    return finished(run())


def test_recordings_of_padded_batches_have_the_words_and_units_that_they_have_alone(
    client: TestClient, served: ServedFiles
) -> None:
    together = load_models(served.model, served.kmeans, batch_duration=60.0)
    uploads = [
        (f"/{kind}", served.recordings[number].read_bytes())
        for number in (3, 0, 2, 1)
        for kind in ("transcribe", "units")
    ]
    for (path, content), answer in zip(uploads, all_at_once(together, uploads), strict=True):
        alone = client.post(path, content=content).json()
        name = "text" if path == "/transcribe" else "units"
        assert answer.json()[name] == alone[name]


def test_fifty_requests_at_once_get_their_own_answers(client: TestClient, served: ServedFiles, models: Models) -> None:
    contents = [path.read_bytes() for path in served.recordings]
    expected = [client.post("/transcribe", content=content).json() for content in contents]
    answers = all_at_once(models, [("/transcribe", contents[number % 4]) for number in range(50)])
    assert [answer.status_code for answer in answers] == [200] * 50
    assert [answer.json() for answer in answers] == [expected[number % 4] for number in range(50)]


def test_what_is_too_much_is_refused_and_the_rest_is_answered(served: ServedFiles, models: Models) -> None:
    content = served.recordings[0].read_bytes()
    answers = all_at_once(models, [("/units", content)] * 20, Limits(max_requests=5))
    assert [answer.status_code for answer in answers] == [200] * 5 + [503] * 15
    assert all(answer.headers["Retry-After"].isdecimal() for answer in answers[5:])
    answers = all_at_once(models, [("/units", content)] * 5, Limits(max_duration=1, max_waiting=3))
    assert sorted(answer.status_code for answer in answers)[:3] == [200] * 3


def test_a_client_that_goes_away_takes_its_recording_with_it(served: ServedFiles, models: Models) -> None:
    """The first request ends while it waits; the second one is answered, and nothing is left in the queue."""

    async def run() -> None:
        service = Service(models, Limits(), "best.ckpt")
        app = application(service)
        async with app.router.lifespan_context(app):
            scope = {"type": "http", "method": "POST", "path": "/units", "query_string": b"", "headers": []}
            body = {"type": "http.request", "body": served.recordings[0].read_bytes(), "more_body": False}
            messages = [body, {"type": "http.disconnect"}]
            sent = []

            async def receive() -> dict[str, object]:
                return messages.pop(0)

            async def send(message: dict[str, object]) -> None:
                sent.append(message)

            await app(scope, receive, send)
            assert sent[0]["status"] in (499, 200)  # it may have been computed before
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport) as client:
                answer = await client.post("http://service/units", content=served.recordings[0].read_bytes())
                metrics = (await client.get("http://service/metrics")).text
            assert answer.status_code == 200
            assert "hubert_open_requests 0.0" in metrics
            assert "hubert_waiting_audio_seconds 0.0" in metrics

    finished(run())
