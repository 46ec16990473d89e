"""Errors of a hypothesis marked in its text: for terminals, pages and loggers."""

from collections.abc import Iterator
from html import escape
from itertools import zip_longest
from typing import NamedTuple

import jiwer

ERROR_MARKS = {"equal": "", "substitute": "S", "insert": "I", "delete": "D"}
"""Mark of a column, by jiwer's type of an alignment."""
DELETED = "color:#b3261e;text-decoration:line-through"
INSERTED = "color:#00629b;font-weight:bold"
PAGE_STYLE = "font:14px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;margin:4px"


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
