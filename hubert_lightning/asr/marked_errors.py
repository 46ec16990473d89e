"""Errors of a hypothesis marked in its text: for terminals, pages and loggers."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import zip_longest
from typing import Any, NamedTuple

import jiwer

ERROR_MARKS = {"equal": "", "substitute": "S", "insert": "I", "delete": "D"}
"""Mark of a column, by jiwer's type of an alignment."""
DELETED = "color:#b3261e;text-decoration:line-through"
INSERTED = "color:#00629b;font-weight:bold"
PAGE_STYLE = "font:14px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;margin:4px"
CELL = "padding:2px 8px;text-align:left;vertical-align:top;border-bottom:1px solid #ddd"


class Column(NamedTuple):
    """Words or letters that an alignment puts below each other.

    Args:
        reference: Of the reference; empty if inserted.
        hypothesis: Of the hypothesis; empty if deleted.
        mark: "" if both are equal, else S, I or D: substituted, inserted, deleted.
    """

    reference: str
    hypothesis: str
    mark: str


def aligned_words(reference: str, hypothesis: str) -> list[Column]:
    """Align a hypothesis with its reference by words."""
    return [*columns(jiwer.process_words(reference, hypothesis))]


def columns(alignment: jiwer.WordOutput | jiwer.CharacterOutput) -> Iterator[Column]:
    """Return the words or letters of an alignment of one utterance, in order."""
    [reference], [hypothesis], [chunks] = alignment.references, alignment.hypotheses, alignment.alignments
    for chunk in chunks:
        before = reference[chunk.ref_start_idx : chunk.ref_end_idx]
        after = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
        for pair in zip_longest(before, after, fillvalue=""):
            yield Column(*pair, ERROR_MARKS[chunk.type])


def errors_as_html(reference: str, hypothesis: str) -> str:
    """Write a hypothesis as HTML with its errors: what is missing struck out, what is wrong or added in bold.

    Args:
        reference: Transcript.
        hypothesis: Output of a model.

    Returns:
        An element that needs no style sheet.
    """
    words = []
    for before, after, mark in aligned_words(reference, hypothesis):
        deleted = f'<del style="{DELETED}">{escape(before)}</del>' if mark in ("S", "D") else ""
        inserted = f'<ins style="{INSERTED};text-decoration:none">{escape(after)}</ins>' if mark in ("S", "I") else ""
        words.append(" ".join(filter(None, (deleted, inserted))) or escape(after))
    return f'<div style="{PAGE_STYLE}">{" ".join(words)}</div>'


def errors_page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a page with a table of utterances; its last column is the hypothesis with its errors marked.

    Args:
        rows: Cells by the names of the columns, the same in every row; with "reference" and "hypothesis".

    Returns:
        HTML that needs no style sheet.
    """
    names = [name for name in rows[0] if name not in ("reference", "hypothesis")]
    head = "".join(f"<th style='{CELL}'>{escape(name)}</th>" for name in (*names, "errors"))
    lines = []
    for row in rows:
        cells = [*(escape(str(row[name])) for name in names), errors_as_html(row["reference"], row["hypothesis"])]
        lines.append("<tr>" + "".join(f"<td style='{CELL}'>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table style='{PAGE_STYLE};border-collapse:collapse'><tr>{head}</tr>{''.join(lines)}</table>"


def errors_as_text(reference: str, hypothesis: str) -> str:
    """Write a hypothesis with its errors as text: [-missing-] and {+added+}, as wdiff does.

    Args:
        reference: Transcript.
        hypothesis: Output of a model.

    Returns:
        One line.
    """
    words = []
    for before, after, mark in aligned_words(reference, hypothesis):
        deleted = f"[-{before}-]" if mark in ("S", "D") else ""
        inserted = f"{{+{after}+}}" if mark in ("S", "I") else ""
        words.append(" ".join(filter(None, (deleted, inserted))) or after)
    return " ".join(words)
