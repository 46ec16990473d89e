"""The websocket of live audio: samples in, words or units out as they become final."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, Protocol

import numpy as np
import torch
from fastapi import WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from hubert_lightning.asr.live import LiveWords
from hubert_lightning.asr.word_times import Word
from hubert_lightning.errors import UserError
from hubert_lightning.features.recordings import autocast
from hubert_lightning.features.stream import seconds_of
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.serving.models import Recogniser
from hubert_lightning.serving.service import Service
from hubert_lightning.units.unit_extractor import Units

Message = dict[str, Any]  # JSON values
Output = Literal["units", "words"]
SampleFormat = Literal["s16", "f32"]
DTYPES: dict[SampleFormat, str] = {"s16": "<i2", "f32": "<f4"}
MAX_MESSAGE = 2**20
"""Bytes of one message of samples: 32 s of 16 bits."""
SHORTEST_STEP = 0.1
"""Seconds: each step encodes its history again."""
LONGEST_WINDOW = 30.0
"""Seconds that are encoded at once for a step."""
REFUSED, FAILED = 1008, 1011
"""Codes of a closed websocket (RFC 6455)."""


class StreamOptions(BaseModel):
    """Options of a stream, in its query.

    Args:
        output: What is given: words or units; units if not given and the service has any.
        samples: Format of the samples: s16, 16 bits little-endian; f32, floats little-endian.
        step: Seconds from one output to the next.
        lookahead: Seconds after a frame that the encoder sees before it is final.
        history: Seconds before a step that the encoder sees.
    """

    model_config = ConfigDict(extra="forbid")
    output: Output | None = None
    samples: SampleFormat = "s16"
    step: float = 1.0
    lookahead: float = 1.0
    history: float = 5.0

    def check(self) -> None:
        """Check what one step computes.

        Raises:
            UserError: Steps are too short, or a step sees too much.
        """
        if not self.step >= SHORTEST_STEP:
            raise UserError(f"step is {self.step:g}; it is a number of seconds from {SHORTEST_STEP} on")
        if not self.step + self.lookahead + self.history <= LONGEST_WINDOW:
            raise UserError(
                f"step {self.step:g}, lookahead {self.lookahead:g}, history {self.history:g}: their sum is encoded at "
                f"once; keep it to {LONGEST_WINDOW:g} s"
            )


class Session(Protocol):
    """What a stream gives of its audio."""

    latency: float
    """Largest number of seconds from a sample to its output, without computing time."""

    def push(self, samples: np.ndarray) -> list[Message]:
        """Add samples (samples,) at 16 kHz, and return the messages that they complete."""
        ...

    def finish(self) -> list[Message]:
        """End the audio, and return the last messages."""
        ...


class UnitSession:
    """Units of live audio, a message for each step.

    Args:
        units: Function from audio to units.
        options: Options of the stream.
    """

    def __init__(self, units: Units, options: StreamOptions) -> None:
        self._stream = units.stream(options.step, options.lookahead, options.history)
        self.latency = self._stream.latency
        self._given = 0

    def push(self, samples: np.ndarray) -> list[Message]:
        """Add samples (samples,) at 16 kHz, and return the messages that they complete."""
        return self._messages(self._stream.push(samples))

    def finish(self) -> list[Message]:
        """End the audio, and return the last messages."""
        return self._messages(self._stream.finish())

    def _messages(self, units: Tensor) -> list[Message]:
        messages = []
        for step in torch.split(units, self._stream.step):
            if len(step):
                start, self._given = self._given, self._given + len(step)
                clock = self._stream.clock
                times = {"start": seconds_of(start, clock), "end": seconds_of(self._given, clock)}
                messages.append({"type": "units"} | times | {"units": step.tolist()})
        return messages


class WordSession:
    """Words of live audio, by greedy decoding, each as soon as it is stable.

    Args:
        recogniser: Fine-tuned model.
        options: Options of the stream.
    """

    def __init__(self, recogniser: Recogniser, options: StreamOptions) -> None:
        precision = autocast(recogniser.model.head.weight.device, recogniser.precision)
        self._words = LiveWords(recogniser.model, precision, options.step, options.lookahead, options.history)
        self.latency = self._words.latency

    def push(self, samples: np.ndarray) -> list[Message]:
        """Add samples (samples,) at 16 kHz, and return the messages that they complete."""
        return self._messages(self._words.push(samples))

    def finish(self) -> list[Message]:
        """End the audio, and return the last messages."""
        return self._messages(self._words.finish())

    def _messages(self, words: Sequence[Word]) -> list[Message]:
        rows = [
            {
                "word": word.text,
                "start": round(word.start, 2),
                "end": round(word.end, 2),
                "confidence": round(word.confidence, 4),
            }
            for word in words
        ]
        return [{"type": "words", "words": rows}] if rows else []


async def serve_stream(socket: WebSocket, service: Service) -> None:
    """Serve one stream from its connection to its end.

    Args:
        socket: Connection, not accepted yet.
        service: Models and limits.
    """
    try:
        await socket.accept()
        options = _options(socket.query_params)
        with service.stream_admitted():
            await _converse(socket, service, options)
    except WebSocketDisconnect:
        pass
    except UserError as error:
        await _close(socket, str(error), REFUSED)
    except TimeoutError:
        await _close(socket, f"no message for {service.limits.patience:g} s; connect again", REFUSED)
    except Exception:
        await _close(socket, "the service failed on this stream; its log says why", FAILED)
        raise


async def _converse(socket: WebSocket, service: Service, options: StreamOptions) -> None:
    output = options.output or ("units" if service.models.units is not None else "words")
    session = _session(service, output, options)
    loop = asyncio.get_running_loop()
    seconds = service.metrics.stream_seconds.labels(output)
    facts = {"rate": SAMPLE_RATE, "samples": options.samples, "latency": round(session.latency, 3)}
    await socket.send_json({"type": "ready", "output": output} | facts)
    dtype = np.dtype(DTYPES[options.samples])
    rest, num_samples = b"", 0
    while (chunk := await _chunk(socket, service.limits.patience)) is not None:
        content = rest + chunk
        whole = len(content) // dtype.itemsize * dtype.itemsize
        samples, rest = _floats(content[:whole], dtype), content[whole:]
        await _send(socket, await loop.run_in_executor(service.stream_thread, session.push, samples))
        num_samples += len(samples)
        seconds.inc(len(samples) / SAMPLE_RATE)
    await _send(socket, await loop.run_in_executor(service.stream_thread, session.finish))
    await socket.send_json({"type": "end", "duration": round(num_samples / SAMPLE_RATE, 3)})
    await socket.close()


async def _send(socket: WebSocket, messages: Sequence[Message]) -> None:
    for message in messages:
        await socket.send_json(message)
        await asyncio.sleep(0)  # a client that has gone is noticed before the next message is written


def _floats(content: bytes, dtype: np.dtype[Any]) -> np.ndarray:
    values = np.frombuffer(content, dtype=dtype)
    return values.astype(np.float32) / 2**15 if dtype.kind == "i" else values.astype(np.float32)


async def _chunk(socket: WebSocket, patience: float) -> bytes | None:
    """Receive samples; None at the message that ends the audio."""
    async with asyncio.timeout(patience):
        message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005))
    if message.get("bytes") is not None:
        content: bytes = message["bytes"]
        return content
    text = (message.get("text") or "").strip()
    if text in ("end", '{"type": "end"}', '{"type":"end"}'):
        return None
    raise UserError(f"a message is the text {text[:40]!r}; send samples as bytes, and the text end after them")


def _options(query: Mapping[str, str]) -> StreamOptions:
    try:
        options = StreamOptions.model_validate(dict(query))
    except ValidationError as error:
        row = error.errors()[0]
        name = ".".join(map(str, row["loc"]))
        if row["type"] == "extra_forbidden":
            raise UserError(
                f"{name[:40]!r} is no option of a stream; there are {', '.join(StreamOptions.model_fields)}"
            ) from error
        raise UserError(f"{name} is {str(row['input'])[:40]!r}: {row['msg'][:1].lower()}{row['msg'][1:]}") from error
    options.check()
    return options


def _session(service: Service, output: Output, options: StreamOptions) -> Session:
    models = service.models
    if output == "units":
        if models.units is None:
            raise UserError("this service has no units: start it with --kmeans")
        return UnitSession(models.units, options)
    if models.recogniser is None:
        raise UserError("this service has no words: start it with a fine-tuned model")
    return WordSession(models.recogniser, options)


async def _close(socket: WebSocket, sentence: str, code: int) -> None:
    """Tell the client why its stream ends, unless the client has gone."""
    with suppress(WebSocketDisconnect, RuntimeError):  # starlette raises either one where a connection is closed
        await socket.send_json({"type": "error", "detail": sentence})
        await socket.close(code)
