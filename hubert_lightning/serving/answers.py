"""What a service is asked for and answers: parameters, formats of transcripts, and the content of JSON."""

from collections.abc import Sequence
from typing import Literal

from fastapi import HTTPException
from lhotse.cut import Cut
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from hubert_lightning.asr.recognition import words_in
from hubert_lightning.asr.transcript_formats import FORMATS, Transcript
from hubert_lightning.serving.models import Recogniser
from hubert_lightning.units.unit_extractor import deduplicated

AnswerFormat = Literal["json", "text", "srt", "vtt"]
MEDIA_TYPES: dict[AnswerFormat, str] = {
    "json": "application/json",
    "text": "text/plain",
    "srt": "application/x-subrip",
    "vtt": "text/vtt",
}
"""Media type of each format, by which `Accept` asks for it."""


class TranscribeQuery(BaseModel):
    """Parameters of a transcription."""

    model_config = ConfigDict(extra="forbid")
    format: AnswerFormat | None = Field(
        None, description="Format of the answer; that of `Accept`, or JSON, if not given."
    )


class UnitsQuery(BaseModel):
    """Parameters of units."""

    model_config = ConfigDict(extra="forbid")
    deduplicate: bool = Field(False, description="Whether each run of equal units is given once, with its duration.")


class WordAnswer(BaseModel):
    """A word with its times."""

    word: str
    start: float = Field(description="Start in seconds.")
    end: float = Field(description="End in seconds.")
    confidence: float = Field(description="Mean probability of the word's letters, from 0 to 1.")


class TranscriptAnswer(BaseModel):
    """The words of a recording."""

    duration: float = Field(description="Duration of the recording in seconds.")
    text: str = Field(description="Text of the recording.")
    confidence: float | None = Field(description="Mean confidence of the words by their letters; null without words.")
    words: list[WordAnswer] = Field(description="Words with their times, in order.")
    remarks: list[str] = Field([], description="Unusual properties of the recording, such as a low sampling rate.")


class UnitsAnswer(BaseModel):
    """The units of a recording."""

    duration: float = Field(description="Duration of the recording in seconds.")
    units: list[int] = Field(
        description="Unit of every frame (20 ms, or 40 ms of a model of 25 Hz), or of every run of equal units if "
        "`deduplicate`."
    )
    durations: list[int] | None = Field(None, description="Frames of each run, if `deduplicate`.")
    remarks: list[str] = Field(description="Unusual properties of the recording, such as a low sampling rate.")


class ErrorAnswer(BaseModel):
    """Why a request was refused."""

    detail: str = Field(description="One sentence.")


class StatusAnswer(BaseModel):
    """State of the service."""

    status: str


class ServiceAnswer(BaseModel):
    """What the service is."""

    model: str = Field(description="Name of the model.")
    version: str = Field(description="Version of hubert_lightning.")
    device: str = Field(description="Device that computes.")
    endpoints: list[str] = Field(description="What can be computed: transcribe, units, stream.")
    max_upload: float = Field(description="Megabytes of an upload.")
    max_duration: float = Field(description="Seconds of a recording.")


def transcript_content(
    recogniser: Recogniser, cut: Cut, remarks: Sequence[str], format: AnswerFormat, log_probs: Tensor
) -> bytes:
    """Decode a recording as `hubert transcribe` does, and write the answer.

    Args:
        recogniser: Model and search.
        cut: The recording.
        remarks: Unusual properties of the recording.
        format: Format of the answer.
        log_probs: (frames, tokens).
    """
    model, timed = recogniser.model, format != "text"
    text, words = words_in(log_probs, model.vocabulary, recogniser.search, timed, model.clock)
    transcript = Transcript(cut.id, cut.duration, text, tuple(words), tuple(remarks))
    if format == "json":
        return TranscriptAnswer.model_validate(transcript.to_dict()).model_dump_json().encode()
    return FORMATS[format](transcript).encode()


def units_content(cut: Cut, remarks: Sequence[str], deduplicate: bool, units: Tensor) -> bytes:
    """Write the units of a recording.

    Args:
        cut: The recording.
        remarks: Unusual properties of the recording.
        deduplicate: Whether each run of equal units is written once, with its duration.
        units: (frames,).
    """
    runs = deduplicated(units) if deduplicate else None
    answer = UnitsAnswer(
        duration=round(cut.duration, 3),
        units=(units if runs is None else runs.units).tolist(),
        durations=None if runs is None else runs.durations.tolist(),
        remarks=list(remarks),
    )
    return answer.model_dump_json(exclude_none=True).encode()


def chosen_format(asked: AnswerFormat | None, accept: str | None) -> AnswerFormat:
    """Choose the format of a transcript.

    Args:
        asked: Format of the query, which decides.
        accept: Header `Accept`, whose most wanted known media type decides otherwise.

    Raises:
        HTTPException: Nothing that the client accepts can be given (406).
    """
    if asked is not None or not accept:
        return asked or "json"
    for media_type in _accepted(accept):
        main, _, sub = media_type.partition("/")
        for name, own in MEDIA_TYPES.items():
            if media_type in (own, "*/*") or (sub == "*" and own.startswith(f"{main}/")):
                return name
    raise HTTPException(
        406, f"the service has no {accept.strip()[:100]!r}; accept one of {', '.join(MEDIA_TYPES.values())}"
    )


def _accepted(accept: str) -> list[str]:
    """Media types of the header, most wanted first; those of quality 0 are left out."""
    weighted: list[tuple[float, str]] = []
    for part in accept.split(","):
        media_type, *parameters = (word.strip().lower() for word in part.split(";"))
        quality = next((value[2:] for value in parameters if value.startswith("q=")), "1")
        try:
            weighted.append((float(quality), media_type))
        except ValueError:
            weighted.append((1.0, media_type))
    return [media_type for weight, media_type in sorted(weighted, key=lambda pair: -pair[0]) if weight > 0]
