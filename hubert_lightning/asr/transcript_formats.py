"""Transcripts, and their formats: text, JSON, subtitles, tables, CTM."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from hubert_lightning.asr.subtitles import SubtitleStyle, srt, vtt
from hubert_lightning.asr.word_parts import parts_between_spaces
from hubert_lightning.asr.word_times import Word

TranscriptFormat = Literal["text", "json", "srt", "vtt", "tsv", "ctm"]
SUFFIXES_OF_FORMATS: dict[TranscriptFormat, str] = {
    "text": ".txt",
    "json": ".json",
    "srt": ".srt",
    "vtt": ".vtt",
    "tsv": ".tsv",
    "ctm": ".ctm",
}
SCHEMA = Path(__file__).with_name("transcript.schema.json")
"""JSON Schema of a transcript as JSON."""
TSV_COLUMNS = ("start", "end", "text", "confidence", "speaker")


@dataclass(frozen=True)
class Turn:
    """Words of one speaker, one after the other.

    Attributes:
        speaker: Speaker; None if not known.
        text: Text of the words.
        words: The words with their times.
    """

    speaker: str | None
    text: str
    words: tuple[Word, ...]

    @property
    def start(self) -> float:
        """Start in seconds."""
        return self.words[0].start

    @property
    def end(self) -> float:
        """End in seconds."""
        return self.words[-1].end


@dataclass(frozen=True)
class Transcript:
    """The words of a recording.

    Attributes:
        file: Path of the recording; empty for a waveform.
        duration: Seconds.
        text: Text of the recording.
        words: Words with their times, if these were asked for.
        remarks: Unusual properties of the audio, each as a kind, a colon, and a sentence.
    """

    file: str
    duration: float
    text: str
    words: Sequence[Word]
    remarks: tuple[str, ...] = ()

    @property
    def confidence(self) -> float | None:
        """Mean confidence of the words, each as often as it has letters; None without words.

        It is close to 1 where the model is sure of every letter. It is no calibrated probability of being right.
        """
        num_letters = sum(len(word.text) for word in self.words)
        if not num_letters:
            return None
        return sum(len(word.text) * word.confidence for word in self.words) / num_letters

    @cached_property
    def turns(self) -> tuple[Turn, ...]:
        """Turns of the speakers in the order of time; a single one without a speaker if no speaker is known."""
        turns: list[Turn] = []
        end = 0
        for speaker, group in groupby(self.words, lambda word: word.speaker):
            words = tuple(group)
            text, end = self._text_of(words, end)
            turns.append(Turn(speaker, text, words))
        return tuple(turns)

    @property
    def has_speakers(self) -> bool:
        """Whether the speaker of any word is known."""
        return any(word.speaker for word in self.words)

    def to_text(self) -> str:
        """Return the text; with speakers, a line for each turn, which begins with the name of the speaker."""
        if not self.has_speakers:
            return self.text + "\n"
        return "".join(f"{turn.speaker}: {turn.text}\n" if turn.speaker else turn.text + "\n" for turn in self.turns)

    def to_json(self) -> str:
        """Return one line of JSON, which `transcript.schema.json` in this package describes."""
        return json.dumps(self.to_dict(), ensure_ascii=False) + "\n"

    def to_dict(self) -> dict[str, Any]:  # JSON values
        """Return the content of `to_json`."""
        content: dict[str, Any] = {
            "file": self.file,
            "duration": round(self.duration, 3),
            "text": self.text,
            "confidence": None if self.confidence is None else round(self.confidence, 4),
            "words": [_word_row(word) for word in self.words],
        }
        if self.has_speakers:
            content["turns"] = [
                {
                    "speaker": turn.speaker,
                    "start": round(turn.start, 3),
                    "end": round(turn.end, 3),
                    "text": turn.text,
                }
                for turn in self.turns
            ]
        if self.remarks:
            content["remarks"] = list(self.remarks)
        return content

    def to_srt(self, style: SubtitleStyle = SubtitleStyle()) -> str:
        """Return subtitles in SubRip's format; the name of a speaker precedes the first words of a turn."""
        return srt(self.words, self.text, self.duration, style)

    def to_vtt(self, style: SubtitleStyle = SubtitleStyle()) -> str:
        """Return subtitles in WebVTT, with the speaker of each in a voice tag."""
        return vtt(self.words, self.text, self.duration, style)

    def to_tsv(self) -> str:
        """Return a table with a row for each word: start and end in seconds, text, confidence, speaker."""
        rows = [TSV_COLUMNS] + [
            (
                f"{word.start:.3f}",
                f"{word.end:.3f}",
                " ".join(word.text.split()),
                f"{word.confidence:.4f}",
                " ".join((word.speaker or "").split()),
            )
            for word in self.words
        ]
        return "".join("\t".join(row) + "\n" for row in rows)

    def to_ctm(self) -> str:
        """Return lines for NIST's tools: recording, channel, start, duration, word, confidence."""
        recording = ctm_recording(Path(self.file))
        words = [part for word in self.words for part in parts_between_spaces(word)]
        return "".join(
            f"{recording} 1 {word.start:.2f} {word.end - word.start:.2f} {word.text} {word.confidence:.2f}\n"
            for word in words
        )

    def _text_of(self, words: tuple[Word, ...], end: int) -> tuple[str, int]:
        """Find the text of consecutive words from a character of the text on, and the character after it."""
        first, last = None, end
        for word in words:
            place = self.text.find(word.text, last)
            if place < 0:  # a lexicon may write words otherwise than the model
                return " ".join(word.text for word in words), end
            first, last = place if first is None else first, place + len(word.text)
        return self.text[first:last], last


def _word_row(word: Word) -> dict[str, Any]:  # JSON values
    row: dict[str, Any] = {
        "word": word.text,
        "start": round(word.start, 3),
        "end": round(word.end, 3),
        "confidence": round(word.confidence, 4),
    }
    return row | {"speaker": word.speaker} if word.speaker else row


def ctm_recording(path: Path) -> str:
    """Name of a recording in CTM, whose columns are separated by spaces."""
    return re.sub(r"\s", "_", path.stem) or "waveform"


FORMATS: dict[TranscriptFormat, Callable[[Transcript], str]] = {
    "text": Transcript.to_text,
    "json": Transcript.to_json,
    "srt": Transcript.to_srt,
    "vtt": Transcript.to_vtt,
    "tsv": Transcript.to_tsv,
    "ctm": Transcript.to_ctm,
}
"""Function from a transcript to the content of its file."""


def formatted(transcript: Transcript, format: TranscriptFormat, style: SubtitleStyle) -> str:
    """Return the content of a transcript's file.

    Args:
        transcript: Transcript.
        format: Format of the file.
        style: Limits of subtitles.
    """
    if format in ("srt", "vtt"):
        return transcript.to_srt(style) if format == "srt" else transcript.to_vtt(style)
    return FORMATS[format](transcript)
