"""Formats of transcripts: text, JSON, subtitles, CTM."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from hubert_lightning.asr.subtitles import srt
from hubert_lightning.asr.word_parts import parts_between_spaces
from hubert_lightning.asr.word_times import Word

TranscriptFormat = Literal["text", "json", "srt", "ctm"]
SUFFIXES_OF_FORMATS: dict[TranscriptFormat, str] = {"text": ".txt", "json": ".json", "srt": ".srt", "ctm": ".ctm"}


class Transcript(NamedTuple):
    """The words of a recording.

    Attributes:
        file: Path of the recording.
        duration: Seconds.
        text: Text of the recording.
        words: Words with their times, if these were asked for.
    """

    file: str
    duration: float
    text: str
    words: Sequence[Word]


def _text(transcript: Transcript) -> str:
    return transcript.text + "\n"


def _json(transcript: Transcript) -> str:
    words = [
        {
            "word": word.text,
            "start": round(word.start, 3),
            "end": round(word.end, 3),
            "confidence": round(word.confidence, 4),
        }
        for word in transcript.words
    ]
    content = {
        "file": transcript.file,
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
        "words": words,
    }
    return json.dumps(content, ensure_ascii=False) + "\n"


def ctm_recording(path: Path) -> str:
    """Name of a recording in CTM, whose columns are separated by spaces."""
    return re.sub(r"\s", "_", path.stem)


def _ctm(transcript: Transcript) -> str:
    """Columns: recording, channel, start, duration, word, confidence (NIST)."""
    recording = ctm_recording(Path(transcript.file))
    words = [part for word in transcript.words for part in parts_between_spaces(word)]
    return "".join(
        f"{recording} 1 {word.start:.2f} {word.end - word.start:.2f} {word.text} {word.confidence:.2f}\n"
        for word in words
    )


def _srt(transcript: Transcript) -> str:
    return srt(transcript.words, transcript.text, transcript.duration)


FORMATS: dict[TranscriptFormat, Callable[[Transcript], str]] = {"text": _text, "json": _json, "srt": _srt, "ctm": _ctm}
"""Function from a transcript to the content of its file."""
