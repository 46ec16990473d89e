"""What was said, as text, JSON, subtitles or CTM."""

import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.cells import cell_len

from hubert_lightning.asr.word_times import Word
from hubert_lightning.data.refusals import RefusedFile
from hubert_lightning.errors import UserError
from hubert_lightning.features.journal import Journal
from hubert_lightning.files import write_whole

Format = Literal["text", "json", "srt", "ctm"]
JOINERS = "\u200c\u200d"  # they join a character to the one before, and that after
SUFFIX = {"text": ".txt", "json": ".json", "srt": ".srt", "ctm": ".ctm"}


class Transcript(NamedTuple):
    """What was said in a recording; with the times of its words where they were asked for."""

    file: str
    duration: float  # seconds
    text: str
    words: list[Word]


def journal_of(
    output: Path | None, format: Format, settings: Mapping[str, Any], texts: Mapping[str, str] | None = None
) -> Journal | None:
    """What was made in a folder before; none of standard output."""
    if output is None or (Path(output).exists() and not Path(output).is_dir()):
        return None
    return Journal(Path(output) / f".made-{format}.jsonl", settings, texts)


def remaining(paths: Sequence[Path], format: Format, output: Path | None, journal: Journal | None) -> list[Path]:
    """The recordings whose output is not there yet, or was made of something else.

    Raises:
        UserError: Two of the files would have one name, or a file that is there already would be lost.
    """
    _check_names(paths, format, output, journal)
    if output is None or journal is None:
        return list(paths)
    left = [path for path in paths if path not in journal or not _is_made(_output(path, format, output), journal, path)]
    if done := len(paths) - len(left):
        print(
            f"hubert: {done} of {len(paths)} files were done before, with the same model and settings: skipped",
            file=sys.stderr,
        )
    return left


def _output(path: Path, format: Format, output: Path) -> Path:
    return output / path.with_suffix(SUFFIX[format]).name


def _is_made(output: Path, journal: Journal, recording: Path) -> bool:
    """Whether an output is there, and not the one that was there before the recording's was made."""
    there = _status(output)
    return there is not None and there != journal.row(recording).get("before")


def _status(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_ino, status.st_mtime_ns]


def _check_names(paths: Sequence[Path], format: Format, output: Path | None, journal: Journal | None) -> None:
    number = len(paths)
    if format == "ctm" and (twice := _same(paths, [_recording(path) for path in paths])):
        raise UserError(
            f"{twice[0]} and {twice[1]}: both are called {_recording(twice[1])} in ctm, which takes them for one "
            "recording; transcribe them one after the other, or rename one"
        )
    if output is not None:
        output = Path(output)
        if output.exists() and not output.is_dir():
            raise UserError(f"{output}: a file, not a folder; choose another --output")
        # Disks of Windows and macOS take names for one that differ in case or in the composition of letters
        names = [path.with_suffix(SUFFIX[format]).name for path in paths]
        if twice := _same(paths, [unicodedata.normalize("NFC", name).casefold() for name in names]):
            raise UserError(
                f"{twice[0]} and {twice[1]}: both would be one file in {output}, as on any disk that does not tell "
                "capitals apart; transcribe them one after the other into folders of their own"
            )
        folders = {path.parent for path in paths} if format == "text" and output.exists() else set()
        here = {folder for folder in folders if folder.exists() and folder.samefile(output)}
        beside = [path for path in paths if path.parent in here]
        ours = journal.row if journal is not None else lambda path: {}
        if lost := next((path for path in beside if path.with_suffix(".txt").is_file() and not ours(path)), None):
            raise UserError(
                f"{lost.with_suffix('.txt')}: lies beside its audio, and may be its transcript, which would be "
                "replaced; choose another --output"
            )
    elif format == "srt" and number > 1:
        raise UserError(f"srt for {number} files needs a folder, one file each; name it with --output")


def write_all(
    results: Iterator[Transcript | RefusedFile],
    format: Format,
    output: Path | None,
    number: int,
    journal: Journal | None = None,
) -> int:
    """Write each result where it belongs, tell what failed, and return how many of a number of files did."""
    failed = 0
    for result in results:
        if isinstance(result, RefusedFile):
            failed += 1
            print(f"hubert: {result.path}: {result.reason}", file=sys.stderr, flush=True)
            continue
        content = FORMATS[format](result)
        if output is not None:
            path = _output(Path(result.file), format, Path(output))
            if journal is not None:  # first, so that an output that is there is known to be ours
                journal.add(Path(result.file), before=_status(path))
            write_whole(path, content.encode())
        elif format == "text" and number > 1:
            print(f"{result.file}\t{content}", end="", flush=True)
        else:
            print(content, end="", flush=True)
    if failed:
        print(f"hubert: {failed} of {number} files failed", file=sys.stderr)
    if journal is not None:
        journal.finish()
    return failed


def _text(result: Transcript) -> str:
    return result.text + "\n"


def _json(result: Transcript) -> str:
    words = [
        {
            "word": word.text,
            "start": _rounded(word.start),
            "end": _rounded(word.end),
            "confidence": round(word.confidence, 4),
        }
        for word in result.words
    ]
    content = {"file": result.file, "duration": _rounded(result.duration), "text": result.text, "words": words}
    return json.dumps(content, ensure_ascii=False) + "\n"


def _same(paths: Sequence[Path], names: Sequence[str]) -> tuple[Path, Path] | None:
    """The first two files that have one name."""
    seen: dict[str, Path] = {}
    for path, name in zip(paths, names, strict=True):
        if name in seen:
            return seen[name], path
        seen[name] = path
    return None


def _recording(path: Path) -> str:
    """What a recording is called in a ctm, whose columns are parted by spaces."""
    return re.sub(r"\s", "_", path.stem)


def _ctm(result: Transcript) -> str:
    """recording, channel, start, duration, word, confidence (NIST)"""
    recording = _recording(Path(result.file))
    words = [part for word in result.words for part in _without_spaces(word)]
    return "".join(
        f"{recording} 1 {word.start:.2f} {word.end - word.start:.2f} {word.text} {word.confidence:.2f}\n"
        for word in words
    )


def _without_spaces(word: Word) -> list[Word]:
    """The parts of a word of several, such as a lexicon may hold, each with its share of the time."""
    if len(word.text.split()) == 1:
        return [word]
    characters = _characters(word)
    groups = groupby(characters, lambda character: character.text.isspace())
    return [_joined(list(group)) for space, group in groups if not space]


LINE = 42
"""Columns of a line of a subtitle, of which a wide character (Chinese, Japanese, Korean) takes two."""
LONGEST, SHORTEST, PAUSE = 6_000, 1_000, 800
"""Milliseconds: of a subtitle at most; of a subtitle at least, unless another follows; without a word, after which
another begins."""


UNSPACED = ("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")  # scripts without spaces between words, besides wide ones


class Piece(NamedTuple):
    """A word, or a part of one that is too long for a line or a subtitle; times are milliseconds.

    before: what the transcript has between it and the piece before
    """

    text: str
    start: int
    end: int
    before: str


def _srt(result: Transcript) -> str:
    """Subtitles of at most two lines of 42 columns and six seconds; a pause begins another."""
    captions: list[list[list[Piece]]] = []  # of lines of pieces
    separators = _separators(result)
    for piece in (
        piece for word, before in zip(result.words, separators, strict=True) for piece in _pieces(word, before)
    ):
        lines = captions[-1] if captions else []
        if (
            not lines
            or piece.end - lines[0][0].start > LONGEST
            or piece.start - lines[-1][-1].end > PAUSE
            or (len(lines) == 2 and _columns([*lines[-1], piece]) > LINE)
        ):
            captions.append([[piece]])
        elif _columns([*lines[-1], piece]) > LINE:
            lines.append([piece])
        else:
            lines[-1].append(piece)
    starts = [lines[0][0].start for lines in captions]
    blocks = []
    for number, (lines, following) in enumerate(zip_longest(captions, starts[1:]), start=1):
        start, said = starts[number - 1], lines[-1][-1].end
        end = max(min(said, start + LONGEST), start + SHORTEST)
        end = min(end, max(_milliseconds(result.duration), said) if following is None else following)
        text = "\n".join(_text_of(line) for line in lines)
        blocks.append(f"{number}\n{_clock(start)} --> {_clock(end)}\n{text}\n\n")
    return "".join(blocks)


def _separators(result: Transcript) -> list[str]:
    """What the text has before each word: nothing in Chinese, "_" if a model prints that; a space for other words."""
    separators, end = [], 0
    for word in result.words:
        start = result.text.find(word.text, end)
        before = result.text[end:start] if start >= 0 else " "
        if any(map(str.isalnum, before)):  # a word that the text does not have here
            before = " "
        else:
            end = start + len(word.text) if start >= 0 else end
        separators.append(" " if before.isspace() else before)
    return separators


def _pieces(word: Word, before: str) -> Iterator[Piece]:
    """The word, or its characters if it is too long for a line, or is a sentence too long for a subtitle."""
    for part in _without_spaces(word):
        in_time = _milliseconds(part.end) - _milliseconds(part.start) <= LONGEST
        whole = cell_len(part.text) <= LINE and (in_time or _is_one_word(part.text))
        for index, piece in enumerate([part] if whole else _characters(part)):
            between = "" if index else before
            yield Piece(piece.text, _milliseconds(piece.start), _milliseconds(piece.end), between)
            before = " "


def _is_one_word(text: str) -> bool:
    """Whether a text without spaces is one word rather than a sentence of a script without them, or words run together.

    Such a word is shown as long as a subtitle may last, not letter by letter.
    """
    wide = any(unicodedata.east_asian_width(character) in "WF" for character in text)
    return (
        len(text) <= LINE // 2 and not wide and not any(unicodedata.name(one, "").startswith(UNSPACED) for one in text)
    )


def _characters(word: Word) -> list[Word]:
    """The characters of a word with their times, marks and closing punctuation with their letters.

    A token's characters have equal shares of its time, and so have a word's whose tokens are not known.
    """
    characters: list[Word] = []
    for part in word.letters or (word,):
        written = _written(part.text)
        share = (part.end - part.start) / max(len(written), 1)
        for index, text in enumerate(written):
            end = part.start + (index + 1) * share
            if characters and _stays_with(characters[-1].text[-1], text[0]):
                before = characters.pop()
                characters.append(before._replace(text=before.text + text, end=end))
            else:
                characters.append(Word(text, part.start + index * share, end, part.confidence))
    return characters


def _written(text: str) -> list[str]:
    """The characters of a text, marks and closing punctuation with their letters."""
    written: list[str] = []
    for character in text:
        if written and _stays_with(written[-1][-1], character):
            written[-1] += character
        else:
            written.append(character)
    return written


def _stays_with(before: str, character: str) -> bool:
    """Whether no line may begin with a character after another."""
    if unicodedata.category(character)[0] == "M" or character in JOINERS or before in JOINERS:
        return True
    return unicodedata.category(character) in ("Pe", "Pf", "Po") and unicodedata.category(before)[0] != "P"


def _joined(words: Sequence[Word]) -> Word:
    return words[0]._replace(text="".join(word.text for word in words), end=words[-1].end)


def _columns(line: Sequence[Piece]) -> int:
    return cell_len(_text_of(line))


def _text_of(line: Sequence[Piece]) -> str:
    return "".join(piece.before + piece.text for piece in line).removeprefix(" ")


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)


def _clock(milliseconds: int) -> str:
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d},{rest % 1000:03d}"


def _rounded(seconds: float) -> float:
    return round(seconds, 3)


FORMATS: dict[str, Callable[[Transcript], str]] = {"text": _text, "json": _json, "srt": _srt, "ctm": _ctm}
