"""Subtitles that can be read: short lines, long enough on the screen, split in pauses and between speakers.

A dynamic programme chooses where subtitles end: few subtitles, of similar length, which end in pauses and leave time to
be read.
"""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple

from rich.cells import cell_len

from hubert_lightning.asr.word_parts import characters_of, parts_between_spaces
from hubert_lightning.asr.word_times import Word
from hubert_lightning.errors import UserError

SUBTITLE_PAUSE = 800
"""Milliseconds without a word after which another subtitle begins."""
CLEAR_PAUSE = 500
"""Milliseconds of a pause in which a subtitle may end at no cost."""
UNSPACED_SCRIPTS = ("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""Scripts without spaces between words, besides wide ones, by the beginning of their letters' Unicode names."""
SENTENCE_ENDS = (".", "?", "!", "…", "。", "？", "！", "؟", "।")
COST_OF_SUBTITLE, COST_OF_BREAK, COST_OF_HASTE, COST_OF_EMPTINESS, COST_OF_LONE_NAME = 1.0, 2.0, 10.0, 0.5, 100.0
"""Costs of a subtitle, of an end without any pause, of a second that a reader lacks, of a subtitle without any text,
and of a speaker's name without text after it."""


@dataclass(frozen=True)
class SubtitleStyle:
    """Limits of subtitles, as broadcasters set them.

    Args:
        columns: Columns of a line; a wide character (Chinese, Japanese, Korean) takes two.
        lines: Lines of a subtitle.
        reading_speed: Columns that a viewer reads in a second.
        min_duration: Seconds that a subtitle is shown at least, unless another follows earlier.
        max_duration: Seconds that a subtitle is shown at most.
        gap: Seconds between two subtitles.

    Raises:
        UserError: A limit is out of range.
    """

    columns: int = 42
    lines: int = 2
    reading_speed: float = 20.0
    min_duration: float = 1.0
    max_duration: float = 6.0
    gap: float = 0.08

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0 or (value == 0 and field.name not in ("gap", "min_duration")):
                raise UserError(f"subtitles: {field.name} is {value}; give a number above 0")
        if self.columns < 4 or self.min_duration > self.max_duration or self.gap > self.min_duration:
            raise UserError(
                f"subtitles of {self.columns} columns, from {self.min_duration} to {self.max_duration} s, with gaps of "
                f"{self.gap} s; give 4 columns or more, and durations that grow from the gap to the longest"
            )


class SubtitlePart(NamedTuple):
    """A word, or a part of a word that is too long for a line or a subtitle.

    Attributes:
        text: The piece.
        start: Start in milliseconds.
        end: End in milliseconds.
        before: Text between the previous part and this one.
        speaker: Speaker, if known.
        is_name: Whether this is the name of the speaker, not a word.
    """

    text: str
    start: int
    end: int
    before: str
    speaker: str | None = None
    is_name: bool = False

    @property
    def columns(self) -> int:
        """Columns with the text before it."""
        return cell_len(self.before + self.text)


class Subtitle(NamedTuple):
    """Text on the screen.

    Attributes:
        start: Start in milliseconds.
        end: End in milliseconds.
        lines: Lines of text.
        speaker: Speaker, if known.
    """

    start: int
    end: int
    lines: list[str]
    speaker: str | None = None


def subtitles(
    words: Sequence[Word], text: str, duration: float, style: SubtitleStyle = SubtitleStyle(), names: bool = False
) -> list[Subtitle]:
    """Make subtitles of words with their times.

    No subtitle has more lines or columns, or lasts longer, than the style allows, and none overlaps the next one. It is
    shown longer than it is spoken where the reading speed or the shortest duration require it, but never into the next
    one. A new one begins after a pause of 0.8 s and with another speaker.

    Args:
        words: Words with their times.
        text: Text of the recording, which decides between which words there are spaces.
        duration: Duration of the recording in seconds.
        style: Limits.
        names: Whether the name of a speaker is written before the speaker's first words.
    """
    separators = _separators(words, text)
    parts = [piece for word, before in zip(words, separators, strict=True) for piece in _pieces(word, before, style)]
    if names:
        parts = list(_with_names(parts, style))
    made = []
    for first, last in pairwise(_ends(parts, duration, style)):
        end = _end(parts, first, last, duration, style)
        lines = [_text_of(line) for line in _lines(parts[first:last], style)]
        made.append(Subtitle(parts[first].start, end, lines, parts[first].speaker))
    return made


def srt(words: Sequence[Word], text: str, duration: float, style: SubtitleStyle = SubtitleStyle()) -> str:
    """Make subtitles in SubRip's format, with the name of each new speaker; arguments as of `subtitles`."""
    return "".join(
        f"{number}\n{_clock(start)} --> {_clock(end)}\n{_joined(lines)}\n\n"
        for number, (start, end, lines, _) in enumerate(subtitles(words, text, duration, style, names=True), start=1)
    )


def vtt(words: Sequence[Word], text: str, duration: float, style: SubtitleStyle = SubtitleStyle()) -> str:
    """Make subtitles in WebVTT, with the speaker of each in a voice tag; arguments as of `subtitles`."""
    blocks = ["WEBVTT\n\n"]
    for start, end, lines, speaker in subtitles(words, text, duration, style):
        voice = f"<v {_escaped(speaker)}>" if speaker else ""
        blocks.append(f"{_clock(start, '.')} --> {_clock(end, '.')}\n{voice}{_escaped(_joined(lines))}\n\n")
    return "".join(blocks)


def _ends(parts: Sequence[SubtitlePart], duration: float, style: SubtitleStyle) -> list[int]:
    """Choose the parts at which subtitles begin, at the least cost, and the number of parts."""
    costs, origins = [0.0, *[math.inf] * len(parts)], [0] * (len(parts) + 1)
    widths = [part.columns for part in parts]
    for first, part in enumerate(parts):
        columns, line, num_lines = 0, 0, 1
        for last in range(first, len(parts)):
            if last > first and _must_break(parts[last - 1], parts[last], part.start, style):
                break
            width = widths[last] - (last == first and part.before == " ")
            columns += width
            line += width
            if line > style.columns and last > first:
                line, num_lines = widths[last] - (parts[last].before == " "), num_lines + 1
            if num_lines > style.lines:
                break
            cost = costs[first] + _cost(parts, first, last + 1, columns, duration, style)
            if cost < costs[last + 1]:
                costs[last + 1], origins[last + 1] = cost, first
    ends = [len(parts)]
    while ends[-1]:
        ends.append(origins[ends[-1]])
    return ends[::-1]


def _must_break(before: SubtitlePart, part: SubtitlePart, start: int, style: SubtitleStyle) -> bool:
    return (
        part.end - start > _milliseconds(style.max_duration)
        or part.start - before.end > SUBTITLE_PAUSE
        or part.speaker != before.speaker
    )


def _cost(
    parts: Sequence[SubtitlePart], first: int, last: int, columns: int, duration: float, style: SubtitleStyle
) -> float:
    """Cost of a subtitle of the parts from `first` to before `last`."""
    shown = _end(parts, first, last, duration, style, columns) - parts[first].start
    lacking = max(_readable(columns, style) - shown, 0) / 1000
    emptiness = 1 - min(columns / (style.columns * style.lines), 1)
    cost = COST_OF_SUBTITLE + COST_OF_HASTE * lacking + COST_OF_EMPTINESS * emptiness**2
    if parts[last - 1].is_name:
        cost += COST_OF_LONE_NAME
    if last < len(parts) and not parts[last - 1].text.endswith(SENTENCE_ENDS):
        pause = parts[last].start - parts[last - 1].end
        cost += COST_OF_BREAK * max(1 - pause / CLEAR_PAUSE, 0)
    return cost


def _readable(columns: int, style: SubtitleStyle) -> int:
    """Milliseconds in which a viewer reads so many columns, and the shortest duration at least."""
    return _milliseconds(max(min(columns / style.reading_speed, style.max_duration), style.min_duration))


def _end(
    parts: Sequence[SubtitlePart],
    first: int,
    last: int,
    duration: float,
    style: SubtitleStyle,
    columns: int | None = None,
) -> int:
    """Time in milliseconds at which a subtitle of the parts from `first` to before `last` ends."""
    if columns is None:
        columns = sum(part.columns for part in parts[first:last]) - (parts[first].before == " ")
    start, spoken = parts[first].start, parts[last - 1].end
    if last == len(parts):
        latest = max(_milliseconds(duration), spoken)
    else:
        following, gap = parts[last].start, _milliseconds(style.gap)
        latest = following - gap if following - gap > start else following
    longest = start + _milliseconds(style.max_duration)
    return max(min(max(spoken, start + _readable(columns, style)), latest, longest), start)


def _lines(parts: Sequence[SubtitlePart], style: SubtitleStyle) -> list[Sequence[SubtitlePart]]:
    """Divide a subtitle into as few lines as it needs, of similar length."""
    if _columns(parts) <= style.columns:
        return [parts]
    num_lines = len(_filled(parts, style.columns))
    narrow = next(
        width
        for width in range(min(max(map(_columns, ([part] for part in parts))), style.columns), style.columns + 1)
        if width == style.columns or len(_filled(parts, width)) <= num_lines
    )
    return _filled(parts, narrow)


def _filled(parts: Sequence[SubtitlePart], columns: int) -> list[Sequence[SubtitlePart]]:
    """Fill line after line."""
    lines, first = [], 0
    for last in range(1, len(parts) + 1):
        if last == len(parts) or _columns(parts[first : last + 1]) > columns:
            lines.append(parts[first:last])
            first = last
    return lines


def _with_names(parts: Sequence[SubtitlePart], style: SubtitleStyle) -> Iterator[SubtitlePart]:
    """Put the name of each new speaker before the first words of the turn."""
    speaker = None
    for part in parts:
        if part.speaker and part.speaker != speaker:
            seconds = part.start / 1000
            for name in _pieces(Word(f"{part.speaker}:", seconds, seconds, 1.0, (), part.speaker), " ", style):
                yield name._replace(is_name=True)
            part = part._replace(before=" ")
        speaker = part.speaker or speaker
        yield part


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


def _pieces(word: Word, before: str, style: SubtitleStyle) -> Iterator[SubtitlePart]:
    """Keep a word whole, or split it into characters if it is too long for a line, or a sentence for a subtitle."""
    for part in parts_between_spaces(word):
        is_short = part.end - part.start <= style.max_duration
        is_whole = cell_len(part.text) <= style.columns and (is_short or _is_one_word(part.text, style))
        pieces = [part] if is_whole else [piece for whole in characters_of(part) for piece in _narrow(whole, style)]
        if before != " " and pieces and cell_len(before + pieces[0].text) > style.columns:
            mark = Word(before, part.start, part.start, part.confidence)
            pieces, before = [*_narrow(mark, style), *pieces], ""
        for index, piece in enumerate(pieces):
            separator = "" if index else before
            start, end = _milliseconds(piece.start), _milliseconds(piece.end)
            yield SubtitlePart(piece.text, start, end, separator, word.speaker)
            before = " "


def _narrow(piece: Word, style: SubtitleStyle) -> list[Word]:
    """Split a piece that is wider than a line, such as many brackets, wherever the line ends."""
    if cell_len(piece.text) <= style.columns:
        return [piece]
    texts = [""]
    for character in piece.text:
        if cell_len(texts[-1] + character) > style.columns:
            texts.append("")
        texts[-1] += character
    return [piece._replace(text=text) for text in texts]


def _is_one_word(text: str, style: SubtitleStyle) -> bool:
    """Whether a text without spaces is one word rather than a sentence of an unspaced script or words run together.

    A single word stays on the screen as long as a subtitle may last, instead of appearing letter by letter.
    """
    is_wide = any(unicodedata.east_asian_width(character) in "WF" for character in text)
    is_unspaced = any(unicodedata.name(character, "").startswith(UNSPACED_SCRIPTS) for character in text)
    return len(text) <= style.columns // 2 and not is_wide and not is_unspaced


def _columns(line: Sequence[SubtitlePart]) -> int:
    return cell_len(_text_of(line))


def _text_of(line: Sequence[SubtitlePart]) -> str:
    return "".join(piece.before + piece.text for piece in line).removeprefix(" ")


def _joined(lines: Sequence[str]) -> str:
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)


def _clock(milliseconds: int, point: str = ",") -> str:
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"
