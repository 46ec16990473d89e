"""Live audio over a websocket: whatever the pieces in which it arrives, its units are those of the whole."""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from helpers import read_samples
from served import ServedFiles, finished, served_with
from starlette.websockets import WebSocketDisconnect

from hubert_lightning.asr.transcriber import Transcriber
from hubert_lightning.serving.limits import Limits
from hubert_lightning.serving.models import Models, load_models
from hubert_lightning.serving.service import Service
from hubert_lightning.serving.streams import serve_stream
from hubert_lightning.units.unit_extractor import Units

OPTIONS = "step=0.5&lookahead=0.5&history=2"


def until_end(socket: Any) -> list[dict[str, Any]]:
    """Messages up to the end or an error, which the connection's end follows."""
    messages = [socket.receive_json()]
    while messages[-1]["type"] not in ("end", "error"):
        messages.append(socket.receive_json())
    with pytest.raises(WebSocketDisconnect):
        socket.receive_json()
    return messages


def refusal(client: TestClient, query: str, *messages: bytes | str) -> str:
    """The sentence with which a stream ends."""
    with client.websocket_connect(f"/stream?{query}") as socket:
        for message in messages:
            socket.send_text(message) if isinstance(message, str) else socket.send_bytes(message)
        sentence: str = until_end(socket)[-1]["detail"]
        return sentence


@pytest.mark.parametrize(("samples", "size"), [("s16", 12_345), ("f32", 50_001), ("s16", 2**20)])
def test_units_of_a_stream_are_those_of_the_same_stream_without_a_service(
    client: TestClient, served: ServedFiles, samples: str, size: int
) -> None:
    waveform = read_samples(served.recordings[3])
    stream = Units.from_pretrained(served.model, served.kmeans, device="cpu").stream(0.5, 0.5, 2)
    expected = torch.cat([stream.push(waveform), stream.finish()]).tolist()
    content = waveform.numpy().astype("<f4") if samples == "f32" else (waveform.numpy() * 2**15).astype("<i2")
    with client.websocket_connect(f"/stream?output=units&samples={samples}&{OPTIONS}") as socket:
        for first in range(0, content.nbytes, size):
            socket.send_bytes(content.tobytes()[first : first + size])
        socket.send_text("end")
        ready, *steps, end = until_end(socket)
    assert ready == {"type": "ready", "output": "units", "rate": 16_000, "samples": samples, "latency": 1.0}
    assert [unit for step in steps for unit in step["units"]] == expected
    assert [step["start"] for step in steps] == [0.0, *(step["end"] for step in steps[:-1])]
    assert steps[-1]["end"] == pytest.approx(0.02 * len(expected))
    assert end == {"type": "end", "duration": 4.0}


def test_words_of_a_stream_are_those_of_the_same_audio_without_a_service(
    client: TestClient, served: ServedFiles
) -> None:
    waveform = read_samples(served.recordings[3])
    live = Transcriber.from_pretrained(served.model, device="cpu").live(0.5, 0.5, 2)
    expected = [(word.text, round(word.end, 2)) for word in [*live.push(waveform), *live.finish()]]
    content = (waveform.numpy() * 2**15).astype("<i2").tobytes()
    with client.websocket_connect(f"/stream?output=words&{OPTIONS}") as socket:
        for first in range(0, len(content), 10_001):
            socket.send_bytes(content[first : first + 10_001])
        socket.send_text("end")
        ready, *messages, end = until_end(socket)
    assert ready["output"] == "words"
    words = [(word["word"], word["end"]) for message in messages for word in message["words"]]
    assert words == expected
    assert len(words) > 3
    assert end["duration"] == 4.0


def test_a_stream_gives_what_the_service_has(served: ServedFiles) -> None:
    with served_with(load_models(served.model)) as client:
        assert refusal(client, "output=units") == "this service has no units: start it with --kmeans"
        with client.websocket_connect("/stream") as socket:
            assert socket.receive_json()["output"] == "words"


def test_units_come_while_the_stream_goes_on(client: TestClient, served: ServedFiles) -> None:
    samples = read_samples(served.recordings[3]).numpy().astype("<f4")
    with client.websocket_connect(f"/stream?samples=f32&{OPTIONS}") as socket:
        assert socket.receive_json()["type"] == "ready"
        socket.send_bytes(samples[:32_000].tobytes())
        assert [socket.receive_json()["end"] for _ in range(2)] == [0.5, 1.0]


def test_a_stream_of_nothing_ends_without_units(client: TestClient) -> None:
    with client.websocket_connect("/stream") as socket:
        socket.send_text('{"type": "end"}')
        ready, end = until_end(socket)
    assert ready["output"] == "units"
    assert end == {"type": "end", "duration": 0.0}


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("output=noise", "output is 'noise': input should be"),
        ("samples=mp3", "samples is 'mp3': input should be 's16' or 'f32'"),
        ("step=many", "step is 'many': input should be a valid number"),
        ("step=0.01", "step is 0.01; it is a number of seconds from 0.1 on"),
        ("step=nan", "step is nan; it is a number"),
        ("history=100", "step 1, lookahead 1, history 100: their sum is encoded at once; keep it to 30 s"),
        ("history=-1", "step 1.0, lookahead 1.0, history -1.0: choose a step"),
        ("rate=8000", "'rate' is no option of a stream; there are output, samples, step, lookahead, history"),
    ],
)
def test_options_that_cannot_be_used_are_refused(client: TestClient, query: str, sentence: str) -> None:
    assert refusal(client, query).startswith(sentence)


def test_messages_that_are_no_samples_are_refused(client: TestClient) -> None:
    assert refusal(client, "", "hello") == (
        "a message is the text 'hello'; send samples as bytes, and the text end after them"
    )
    numbers = np.full(100, np.nan, "<f4").tobytes()
    assert refusal(client, "samples=f32", numbers) == "samples are NaN or infinite; correct the audio"


def test_more_streams_than_allowed_and_silent_ones_are_refused(models: Models) -> None:
    with served_with(models, Limits(max_streams=1)) as client, client.websocket_connect("/stream") as socket:
        assert socket.receive_json()["type"] == "ready"
        assert refusal(client, "") == "the service is busy: 1 streams are open; try again later"
        assert "hubert_streams 1.0" in client.get("/metrics").text
    with served_with(models, Limits(patience=0.1)) as client:
        assert refusal(client, "") == "no message for 0.1 s; connect again"
        assert "hubert_streams 0.0" in client.get("/metrics").text


class GoneClient:
    """A connection that its client has left without a word."""

    query_params: ClassVar[dict[str, str]] = {"step": "0"}

    def __init__(self, error: Exception, before_accepted: bool) -> None:
        self.error, self.before_accepted = error, before_accepted

    async def accept(self) -> None:
        if self.before_accepted:
            raise self.error

    async def send_json(self, message: object) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "before_accepted"),
    [
        (WebSocketDisconnect(1006), True),
        (WebSocketDisconnect(1006), False),
        (RuntimeError("a close message has been sent"), False),
    ],
)
def test_a_client_that_has_gone_needs_no_reason(models: Models, error: Exception, before_accepted: bool) -> None:
    service = Service(models, Limits(), "best.ckpt")
    finished(serve_stream(GoneClient(error, before_accepted), service))  # type: ignore[arg-type]
    assert service.num_streams == 0


def test_pages_of_other_sites_cannot_open_a_stream(models: Models) -> None:
    with (
        served_with(models, hosts=("testserver",)) as client,
        pytest.raises(WebSocketDisconnect),
        client.websocket_connect("/stream", headers={"Origin": "https://evil.example"}),
    ):
        pass
