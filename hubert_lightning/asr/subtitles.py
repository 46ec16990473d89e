"""Readable subtitles in SubRip format: short lines, and neither too long nor too short on the screen."""

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

from rich.cells import cell_len

from hubert_lightning.asr.word_parts import characters_of, parts_between_spaces
from hubert_lightning.asr.word_times import Word

LINE_COLUMNS = 42
"""Columns of a line, of which a wide character (Chinese, Japanese, Korean) takes two."""
LONGEST_SUBTITLE = 6_000
"""Milliseconds."""
SHORTEST_SUBTITLE = 1_000
"""Milliseconds, unless another subtitle follows earlier."""
SUBTITLE_PAUSE = 800
"""Milliseconds without a word after which another subtitle begins."""
UNSPACED_SCRIPTS = ("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""Scripts without spaces between words, besides wide ones, by the beginning of their letters' Unicode names."""


class SubtitlePart(NamedTuple):
    """A word, or a part of a word that is too long for a line or a subtitle.

    Attributes:
        text: The piece.
        start: Start in milliseconds.
        end: End in milliseconds.
        before: Text between the previous part and this one.
    """

    text: str
    start: int
    end: int
    before: str


def srt(words: Sequence[Word], text: str, duration: float) -> str:
    """Make subtitles of at most two lines of 42 columns and six seconds; after a pause, a new one begins.

    Args:
        words: Words with their times.
        text: Text of the recording, which decides between which words there are spaces.
        duration: Duration of the recording in seconds.
    """
    subtitles: list[list[list[SubtitlePart]]] = []  # of lines of pieces
    separators = _separators(words, text)
    pieces = [piece for word, before in zip(words, separators, strict=True) for piece in _pieces(word, before)]
    for piece in pieces:
        lines = subtitles[-1] if subtitles else []
        if (
            not lines
            or piece.end - lines[0][0].start > LONGEST_SUBTITLE
            or piece.start - lines[-1][-1].end > SUBTITLE_PAUSE
            or (len(lines) == 2 and _columns([*lines[-1], piece]) > LINE_COLUMNS)
        ):
            subtitles.append([[piece]])
        elif _columns([*lines[-1], piece]) > LINE_COLUMNS:
            lines.append([piece])
        else:
            lines[-1].append(piece)
    starts = [lines[0][0].start for lines in subtitles]
    blocks = []
    for number, (lines, next_start) in enumerate(zip_longest(subtitles, starts[1:]), start=1):
        start, last_end = starts[number - 1], lines[-1][-1].end
        latest_end = max(_milliseconds(duration), last_end) if next_start is None else next_start
        end = min(max(min(last_end, start + LONGEST_SUBTITLE), start + SHORTEST_SUBTITLE), latest_end)
        shown = "\n".join(_text_of(line) for line in lines)
        blocks.append(f"{number}\n{_clock(start)} --> {_clock(end)}\n{shown}\n\n")
    return "".join(blocks)


def _separators(words: Sequence[Word], text: str) -> list[str]:
    """Find the text before each word: nothing in Chinese, "_" if a model prints that; a space if a word is missing."""
    separators, end = [], 0
    for word in words:
        start = text.find(word.text, end)
        before = text[end:start] if start >= 0 else " "
        if any(map(str.isalnum, before)):  # the text has other words before
            before = " "
        else:
            end = start + len(word.text) if start >= 0 else end
        separators.append(" " if before.isspace() else before)
    return separators


def _pieces(word: Word, before: str) -> Iterator[SubtitlePart]:
    """Keep a word whole, or split it into characters if it is too long for a line, or a sentence for a subtitle."""
    for part in parts_between_spaces(word):
        is_short = _milliseconds(part.end) - _milliseconds(part.start) <= LONGEST_SUBTITLE
        is_whole = cell_len(part.text) <= LINE_COLUMNS and (is_short or _is_one_word(part.text))
        for index, piece in enumerate([part] if is_whole else characters_of(part)):
            separator = "" if index else before
            yield SubtitlePart(piece.text, _milliseconds(piece.start), _milliseconds(piece.end), separator)
            before = " "


def _is_one_word(text: str) -> bool:
    """Whether a text without spaces is one word rather than a sentence of an unspaced script or words run together.

    A single word stays on the screen as long as a subtitle may last, instead of appearing letter by letter.
    """
    is_wide = any(unicodedata.east_asian_width(character) in "WF" for character in text)
    is_unspaced = any(unicodedata.name(character, "").startswith(UNSPACED_SCRIPTS) for character in text)
    return len(text) <= LINE_COLUMNS // 2 and not is_wide and not is_unspaced


def _columns(line: Sequence[SubtitlePart]) -> int:
    return cell_len(_text_of(line))


def _text_of(line: Sequence[SubtitlePart]) -> str:
    return "".join(piece.before + piece.text for piece in line).removeprefix(" ")


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)


def _clock(milliseconds: int) -> str:
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d},{rest % 1000:03d}"
