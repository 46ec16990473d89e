"""What was said, as text, JSON, subtitles or CTM."""

import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from hubert_lightning.data.preparation import Refusal
from hubert_lightning.files import write_whole
from hubert_lightning.word_times import Word

Format = Literal["text", "json", "srt", "ctm"]
SUFFIX = {"text": ".txt", "json": ".json", "srt": ".srt", "ctm": ".ctm"}


class Transcript(NamedTuple):
    """What was said in a recording; with the times of its words where they were asked for."""

    file: str
    duration: float  # seconds
    text: str
    words: list[Word]


def write_all(
    results: Iterator[Transcript | Refusal], format: Format, output: Path | None, paths: Sequence[Path]
) -> int:
    """Write each result where it belongs, tell what failed, and return how many did."""
    number = len(paths)
    names = [path.stem for path in paths]
    if format == "ctm" and (twice := next((path for path in paths if names.count(path.stem) > 1), None)):
        raise ValueError(
            f"{twice}: another of the files has this name, too, and ctm would take both for one recording; transcribe "
            "them one after the other, or rename one"
        )
    if output is not None:
        output = Path(output)
        if output.exists() and not output.is_dir():
            raise ValueError(f"{output}: a file, not a folder; choose another --output")
        names = [path.with_suffix(SUFFIX[format]).name for path in paths]
        if twice := next((path for path in paths if names.count(path.with_suffix(SUFFIX[format]).name) > 1), None):
            raise ValueError(
                f"{twice}: another of the files has this name, too, and both would be one file in {output}; transcribe "
                "them one after the other into folders of their own"
            )
    elif format == "srt" and number > 1:
        raise ValueError(f"srt for {number} files needs a folder, one file each; name it with --output")
    failed = 0
    for result in results:
        if isinstance(result, Refusal):
            failed += 1
            print(f"hubert: {result.path}: {result.reason}", file=sys.stderr, flush=True)
            continue
        content = FORMATS[format](result)
        if output is not None:
            write_whole(output / Path(result.file).with_suffix(SUFFIX[format]).name, content.encode())
        elif format == "text" and number > 1:
            print(f"{result.file}\t{content}", end="", flush=True)
        else:
            print(content, end="", flush=True)
    if failed:
        print(f"hubert: {failed} of {number} files failed", file=sys.stderr)
    return failed


def _text(result: Transcript) -> str:
    return result.text + "\n"


def _json(result: Transcript) -> str:
    words = [
        {"word": word.text, "start": _ms(word.start), "end": _ms(word.end), "confidence": round(word.confidence, 4)}
        for word in result.words
    ]
    content = {"file": result.file, "duration": _ms(result.duration), "text": result.text, "words": words}
    return json.dumps(content, ensure_ascii=False) + "\n"


def _ctm(result: Transcript) -> str:
    """recording, channel, start, duration, word, confidence (NIST)"""
    name = Path(result.file).stem.replace(" ", "_")
    return "".join(
        f"{name} 1 {word.start:.2f} {word.end - word.start:.2f} {word.text} {word.confidence:.2f}\n"
        for word in result.words
    )


def _srt(result: Transcript, longest: float = 6.0, letters: int = 84, pause: float = 0.8) -> str:
    """Subtitles of at most two lines of 42 letters and six seconds; a pause begins another."""
    captions: list[list[Word]] = []
    for word in result.words:
        current = captions[-1] if captions else []
        length = sum(len(one.text) + 1 for one in current) + len(word.text)
        if (
            not current
            or length > letters
            or word.end - current[0].start > longest
            or word.start - current[-1].end > pause
        ):
            captions.append([])
        captions[-1].append(word)
    return "".join(
        f"{number}\n{_clock(words[0].start)} --> {_clock(words[-1].end)}\n{_in_lines(words)}\n\n"
        for number, words in enumerate(captions, start=1)
    )


def _in_lines(words: Sequence[Word]) -> str:
    return textwrap.fill(" ".join(word.text for word in words), 42, break_long_words=False, break_on_hyphens=False)


def _clock(seconds: float) -> str:
    milliseconds = round(1000 * seconds)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d},{rest % 1000:03d}"


def _ms(seconds: float) -> float:
    return round(seconds, 3)


FORMATS: dict[str, Callable[[Transcript], str]] = {"text": _text, "json": _json, "srt": _srt, "ctm": _ctm}
