"""Scores of speech recognition on the terminal: tables, and the worst utterances aligned."""

import math
from collections.abc import Iterator, Mapping, Sequence

import jiwer
from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hubert_lightning.asr.language_scores import by_kind, macro_average
from hubert_lightning.asr.marked_errors import Column, columns
from hubert_lightning.asr.scoring import Comparison, Result, Scores, Utterance

MARK_STYLES = {"": "", "S": "yellow", "I": "green", "D": "red"}
SPEAKERS_SHOWN = 20
SINGULAR = {"languages": "language", "corpora": "corpus"}


def report(scores: Scores, console: Console, worst: int = 5) -> None:
    """Print the error rates, those of each language, corpus and speaker, and the utterances with most errors, aligned.

    Args:
        scores: Error rates.
        console: Console to print on.
        worst: Number of utterances to show.
    """
    table = _table("", "", "%", "95 % interval", "sub", "ins", "del", "of", "utterances")
    for name, row in [("all", scores), *list(scores.speakers.items())[:SPEAKERS_SHOWN]]:
        for title, rate in (("WER", row.words), ("CER", row.letters)):
            counts = (rate.substitutions, rate.insertions, rate.deletions, rate.total, len(row.utterances))
            table.add_row(Text(name), title, _percent(rate.rate), _range(rate.low, rate.high), *map(str, counts))
    console.print(table)
    if len(scores.speakers) > SPEAKERS_SHOWN:
        console.print(f"and {len(scores.speakers) - SPEAKERS_SHOWN} speakers with fewer errors\n")
    for kind, parts in by_kind(scores).items():
        console.print(_table_of_parts(SINGULAR[kind], parts))
    most_errors = sorted(scores.utterances, key=lambda row: (-row.words.errors, -row.letters.errors))
    for utterance in most_errors[:worst]:
        if utterance.letters.errors:
            _show(utterance, console)


def _table_of_parts(thing: str, parts: Mapping[str, Scores]) -> Table:
    """Table of the error rates of languages or corpora, and their mean."""
    table = _table("", "WER %", "95 % interval", "CER %", "95 % interval", "utterances")
    table.columns[0].header = thing
    for name, row in parts.items():
        words = (_percent(row.words.rate), _range(row.words.low, row.words.high)) if row.parts_words else ("–", "–")
        letters = (_percent(row.letters.rate), _range(row.letters.low, row.letters.high))
        table.add_row(Text(name), *words, *letters, str(len(row.utterances)))
    mean = macro_average(parts)
    table.add_row("mean", "–" if math.isnan(mean.words) else _percent(mean.words), "", _percent(mean.letters), "", "")
    return table


def report_comparison(comparison: Comparison, console: Console) -> None:
    """Print the difference of two systems, and the probability that it is chance.

    Args:
        comparison: Difference in words and letters.
        console: Console to print on.
    """
    table = _table("", "first %", "second %", "difference", "95 % interval", "p")
    for title, row in (("WER", comparison.words), ("CER", comparison.letters)):
        numbers = (_percent(row.first), _percent(row.second), _percent(row.difference), _range(row.low, row.high))
        table.add_row(title, *numbers, f"{row.p_value:.4f}")
    console.print(table)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    return table


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f}"


def _range(low: float, high: float) -> str:
    return "–" if math.isnan(low) else f"{_percent(low)} … {_percent(high)}"


def _show(utterance: Utterance, console: Console) -> None:
    result, words, letters = utterance
    speaker = f" ({result.speaker})" if result.speaker else ""
    counts = f"word errors {words.errors} of {words.total}, letter errors {letters.errors} of {letters.total}"
    console.print(Text(f"{result.id}{speaker}: {counts}"), soft_wrap=True)
    for line in _aligned_lines(result, console.width):
        console.print(line, soft_wrap=True)
    console.print()


def aligned(result: Result) -> tuple[bool, list[Column]]:
    """Align the reference and the hypothesis of an utterance.

    Args:
        result: Reference and hypothesis. A single word, or a sentence of a language that is written without spaces, is
            aligned by letters.

    Returns:
        Whether words are aligned, not letters; and the columns of the alignment.
    """
    by_words = len(result.reference.split()) != 1
    align = jiwer.process_words if by_words else jiwer.process_characters
    return by_words, [*columns(align(result.reference, result.hypothesis))]


def _aligned_lines(result: Result, width: int) -> Iterator[Text]:
    """Align reference and hypothesis as sclite shows it: stars for what one lacks, and S, I or D below.

    `jiwer.visualize_alignment` counts a wide character (Chinese, Japanese, Korean) as one column, so that its columns
    do not line up in a terminal, and marks no errors with colours.
    """
    by_words, alignment = aligned(result)
    for columns_of_line in _broken(alignment, width - len("REF: "), gap=int(by_words)):
        for label, row in (("REF: ", 0), ("HYP: ", 1), ("     ", 2)):
            line = Text(label)
            for column in columns_of_line:
                size = max(map(cell_len, column))
                text = column[row] or ("*" * size if row < 2 else "")
                line.append(set_cell_size(text, size + by_words), MARK_STYLES[column[2]])
            line.rstrip()
            yield line


def _broken(aligned: Sequence[Column], width: int, gap: int) -> Iterator[list[Column]]:
    """Break columns into lines of at most `width` cells, with `gap` cells after each column."""
    line: list[Column] = []
    used = 0
    for column in aligned:
        size = max(map(cell_len, column)) + gap
        if line and used + size > width:
            yield line
            line, used = [], 0
        line.append(column)
        used += size
    yield line
