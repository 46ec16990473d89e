"""Transcripts of standard input: words are printed as they become stable, and a file has the final transcript."""

import json
import sys
from pathlib import Path
from time import perf_counter

import torch

from hubert_lightning.asr.live import LiveWords
from hubert_lightning.asr.subtitles import SubtitleStyle
from hubert_lightning.asr.transcriber import Transcriber
from hubert_lightning.asr.transcript_formats import SUFFIXES_OF_FORMATS, TranscriptFormat, formatted
from hubert_lightning.asr.word_times import Word
from hubert_lightning.errors import UserError
from hubert_lightning.features.stream import print_latency, seconds_for_a_step, standard_input
from hubert_lightning.files import unfinished_file, write_whole
from hubert_lightning.frames import SAMPLE_RATE

LINE_PAUSE = 1.0
"""Seconds without a word after which another line begins."""


def check_listening(format: TranscriptFormat, output: Path | None, decoder: Path | None, speakers: Path | None) -> None:
    """Check the options of `hubert transcribe` for standard input.

    Args:
        format: Format of the transcript.
        output: Folder for the transcript.
        decoder: Settings of a beam search.
        speakers: RTTM file.

    Raises:
        UserError: They cannot be met while audio arrives, the transcript would replace a file, or its
            folder cannot be written to.
    """
    if speakers is not None:
        raise UserError("speakers: the turns of audio that is still to come are not known; transcribe its file instead")
    if output is None and format not in ("text", "json"):
        raise UserError(f"{format} of standard input is written at its end; name a folder for it with --output")
    if output is None and decoder is not None:
        raise UserError(
            "a decoder works on whole sentences, not on live words; name a folder for the final transcript with "
            "--output, or leave the decoder out"
        )
    if output is not None and live_path(output, format).exists():
        raise UserError(f"{live_path(output, format)}: exists, and would be replaced; choose another --output")
    if output is not None:
        _check_writable(output)


def _check_writable(folder: Path) -> None:
    """Create the folder of the final transcript, which is written when the audio cannot be heard again."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with unfinished_file(Path(folder) / "live"):
            pass
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be created or written to ({error.strerror}); correct that, or choose another --output"
        ) from error


def live_path(output: Path, format: TranscriptFormat) -> Path:
    """Path of the final transcript of standard input."""
    return Path(output) / f"live{SUFFIXES_OF_FORMATS[format]}"


def listen(
    transcriber: Transcriber,
    words: LiveWords,
    format: TranscriptFormat,
    output: Path | None,
    style: SubtitleStyle,
) -> None:
    """Print the words of standard input as they become stable, and the latency.

    Args:
        transcriber: Function from audio to transcripts, for the final one.
        words: Words of live audio.
        format: Format: json prints a line for each word, others print text.
        output: Folder for the final transcript, which is that of the whole recording; none is made if not given.
        style: Limits of subtitles.

    Raises:
        UserError: There is too little audio for a frame.
    """
    durations = [seconds_for_a_step(words.stream) for _ in range(3)][1:]  # the first one warms up
    print_latency("words come, once their end is heard,", words.stream, durations)
    durations.clear()
    printer = _Printer(format == "json", " " if words.vocabulary.boundary is not None else "")
    heard: list[torch.Tensor] = []
    num_samples = 0
    for samples in standard_input():
        num_samples += len(samples)
        if output is not None:
            heard.append(torch.from_numpy(samples))
        given, began = words.stream.given, perf_counter()
        printer.add(words.push(samples))
        if num_steps := -(-(words.stream.given - given) // words.stream.step):
            durations.append((perf_counter() - began) / num_steps)
    printer.add(words.finish())
    printer.end()
    if num_samples < words.stream.clock.window:
        raise UserError(f"{num_samples} samples on standard input are too short for a word; pipe in 16 kHz mono s16le")
    print_latency("words came, once their end was heard,", words.stream, durations)
    if output is not None:
        path = live_path(output, format)
        write_whole(path, formatted(transcriber(torch.cat(heard), SAMPLE_RATE), format, style).encode())
        print(f"hubert: {path}: the transcript of the whole recording", file=sys.stderr)


class _Printer:
    """Prints words on standard output: as text with a line for each stretch of speech, or as JSON lines."""

    def __init__(self, as_json: bool, separator: str) -> None:
        self._as_json, self._separator = as_json, separator
        self._last_end: float | None = None

    def add(self, words: list[Word]) -> None:
        for word in words:
            if self._as_json:
                times = {"start": round(word.start, 2), "end": round(word.end, 2)}
                row = {"word": word.text, **times, "confidence": round(word.confidence, 4)}
                print(json.dumps(row, ensure_ascii=False), flush=True)
                continue
            if self._last_end is not None:
                print("\n" if word.start - self._last_end >= LINE_PAUSE else self._separator, end="")
            print(word.text, end="", flush=True)
            self._last_end = word.end

    def end(self) -> None:
        if self._last_end is not None:
            print(flush=True)
