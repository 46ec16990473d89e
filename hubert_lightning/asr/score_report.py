"""Scores of speech recognition as tables and aligned utterances."""

import math
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import jiwer
from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hubert_lightning.asr.results import origin_columns
from hubert_lightning.asr.scoring import (
    Comparison,
    Result,
    Scores,
    Utterance,
    compare,
    read_results,
    score,
    write_scores,
)
from hubert_lightning.errors import UserError

MARKS = {"equal": "", "substitute": "S", "insert": "I", "delete": "D"}


STYLES = {"": "", "S": "yellow", "I": "green", "D": "red"}


SPEAKERS_SHOWN = 20


def report(scores: Scores, console: Console, worst: int = 5) -> None:
    """Print the rates, those of each speaker, and the utterances with most errors, aligned."""
    table = _table("", "", "%", "95 % interval", "sub", "ins", "del", "of", "utterances")
    for name, part in [("all", scores), *list(scores.speakers.items())[:SPEAKERS_SHOWN]]:
        for rate, of in (("WER", part.words), ("CER", part.letters)):
            counts = (of.substitutions, of.insertions, of.deletions, of.total, len(part.utterances))
            table.add_row(Text(name), rate, _percent(of.rate), _range(of.low, of.high), *map(str, counts))
    console.print(table)
    if len(scores.speakers) > SPEAKERS_SHOWN:
        console.print(f"and {len(scores.speakers) - SPEAKERS_SHOWN} speakers with fewer errors\n")
    most_errors = sorted(scores.utterances, key=lambda of: (-of.words.errors, -of.letters.errors))
    for utterance in most_errors[:worst]:
        if utterance.letters.errors:
            _show(utterance, console)


def report_comparison(comparison: Comparison, console: Console) -> None:
    """Print by how much the first system differs from the second, and how likely chance does that."""
    table = _table("", "first %", "second %", "difference", "95 % interval", "p")
    for rate, of in (("WER", comparison.words), ("CER", comparison.letters)):
        numbers = (_percent(of.first), _percent(of.second), _percent(of.difference), _range(of.low, of.high))
        table.add_row(rate, *numbers, f"{of.p_value:.4f}")
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
    for line in _aligned(result, console.width):
        console.print(line, soft_wrap=True)
    console.print()


def _aligned(result: Result, width: int) -> Iterator[Text]:
    """Reference above hypothesis, stars for what one lacks, and S, I or D below, as sclite shows it.

    A single word, or a sentence of a language that is written without spaces, is aligned by letters.
    """
    by_words = len(result.reference.split()) != 1
    align = jiwer.process_words if by_words else jiwer.process_characters
    for columns in _lines(align(result.reference, result.hypothesis), width - len("REF: "), int(by_words)):
        for label, row in (("REF: ", 0), ("HYP: ", 1), ("     ", 2)):
            line = Text(label)
            for column in columns:
                size = max(map(cell_len, column))
                text = column[row] or ("*" * size if row < 2 else "")
                line.append(set_cell_size(text, size + by_words), STYLES[column[2]])
            line.rstrip()
            yield line


def _lines(
    alignment: jiwer.WordOutput | jiwer.CharacterOutput, width: int, gap: int
) -> Iterator[list[tuple[str, str, str]]]:
    """Columns of what was said, what was heard and the kind of error, as many as a line of `width` cells holds."""
    line: list[tuple[str, str, str]] = []
    used = 0
    [said], [heard], [chunks] = alignment.references, alignment.hypotheses, alignment.alignments
    for chunk in chunks:
        pairs = zip_longest(
            said[chunk.ref_start_idx : chunk.ref_end_idx], heard[chunk.hyp_start_idx : chunk.hyp_end_idx], fillvalue=""
        )
        for pair in pairs:
            column = (*pair, MARKS[chunk.type])
            size = max(map(cell_len, column)) + gap
            if line and used + size > width:
                yield line
                line, used = [], 0
            line.append(column)
            used += size
    yield line


def score_file(results: Path, against: Path | None = None, output: Path | None = None, worst: int = 5) -> None:
    """Word and character error rates with 95 % confidence intervals, by speaker, and the worst utterances.

    Args:
        results: JSON lines with id, reference, hypothesis and, where known, speaker: the test.jsonl of `hubert test`.
        against: Results of another system for the same utterances, to tell whether the difference may be chance.
        output: JSON file for all numbers, also those of every utterance.
        worst: How many of the utterances with most errors are shown.
    """
    if worst < 0:
        raise UserError(f"worst {worst}: a number of utterances to show; 0 shows none")
    if output and output in (results, against):
        raise UserError(f"{output}: holds results, which the scores would replace; choose another output")
    scores = score(read_results(results))
    comparison = compare(scores, score(read_results(against))) if against else None
    console = Console()
    report(scores, console, worst)
    if comparison:
        console.print(f"first: {results}, second: {against}", markup=False, highlight=False, soft_wrap=True)
        report_comparison(comparison, console)
    if output:
        write_scores(output, scores, comparison, {"results": str(results), **origin_columns(results)})
        console.print(f"numbers in {output}", markup=False, highlight=False, soft_wrap=True)
