"""Errors of speech recognition broken down: by speaker, by length, by word, and the worst utterances."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import numpy as np

from hubert_lightning.asr.marked_errors import Column
from hubert_lightning.asr.score_report import aligned
from hubert_lightning.asr.scoring import Scores, Utterance, pooled, read_results, score
from hubert_lightning.data.manifest import place_of, read_manifest
from hubert_lightning.errors import UserError
from hubert_lightning.report.clips import Place
from hubert_lightning.report.json_files import Json, is_number, json_lines

SECONDS = (0, 2, 4, 6, 8, 10, 15, 20, 30)
WORDS = (1, 2, 4, 6, 9, 13, 18, 25, 40)
"""Bounds of the groups of utterances of similar length, in seconds or in words."""
MIN_GROUP = 3
"""Utterances in a group of similar length; smaller groups join their neighbour."""
DELETED, INSERTED = "(deleted)", "(inserted)"


@dataclass(frozen=True)
class Confusions:
    """Which words became which.

    Args:
        unit: "word" or "letter".
        substitutions: Count of each pair of a word of the references and the word in its place.
        deletions: Count of each word that is missing.
        insertions: Count of each word that was added.
        totals: Count of each word in the references.
    """

    unit: str
    substitutions: Counter[tuple[str, str]]
    deletions: Counter[str]
    insertions: Counter[str]
    totals: Counter[str]

    def matrix(self, most: int) -> tuple[list[str], list[str], list[list[int]]]:
        """Return the rows, columns and counts of the words that are most often substituted.

        Args:
            most: Number of rows, and of columns.
        """
        errors: Counter[str] = Counter()
        becomes: Counter[str] = Counter()
        for (said, _), count in self.substitutions.items():
            errors[said] += count
        rows = [word for word, _ in errors.most_common(most)]
        for (said, heard), count in self.substitutions.items():
            becomes[heard] += count * (said in rows)
        columns = [word for word, count in becomes.most_common(most - 1) if count]
        counts = [[self.substitutions[row, column] for column in columns] + [self.deletions[row]] for row in rows]
        if any(row[-1] for row in counts):
            columns = [*columns, DELETED]
        else:
            counts = [row[:-1] for row in counts]
        inserted = [self.insertions[column] for column in columns]
        if any(inserted):
            rows, counts = [*rows, INSERTED], [*counts, inserted]
        return rows, columns, counts


@dataclass(frozen=True)
class Evaluation:
    """Scores of the results of one test, with the place of each utterance in its audio file.

    Args:
        scores: Scores of all utterances.
        places: Place of the utterances whose recording is known.
    """

    scores: Scores
    places: Mapping[str, Place]

    @property
    def hours(self) -> float | None:
        """Hours of audio, if the length of every utterance is known."""
        durations = [
            self.places[row.result.id].duration for row in self.scores.utterances if row.result.id in self.places
        ]
        return sum(durations) / 3600 if len(durations) == len(self.scores.utterances) else None


def read_evaluation(path: Path, origin: Mapping[str, Json]) -> Evaluation:
    """Score results, and find their recordings: in their rows, or else in the manifest that they name.

    Args:
        path: JSON lines of `hubert test`.
        origin: What produced the results.

    Raises:
        UserError: The results cannot be read.
    """
    scores = score(read_results(path))
    places = {}
    for row in json_lines(path):
        if place := _place(row):
            places[str(row.get("id"))] = place
    if not places:
        places = _places_of_manifest(str(origin.get("manifest") or ""))
    return Evaluation(scores, places)


def _place(row: Mapping[str, Any]) -> Place | None:
    """Return where the recording of a row is, None if it does not state that."""
    source, start, duration, channel = (row.get(name) for name in ("source", "start", "duration", "channel"))
    if not isinstance(source, str) or not is_number(duration) or not duration or duration <= 0:
        return None
    return Place(
        source,
        channel if isinstance(channel, int) else None,
        float(start) if is_number(start) else 0.0,
        float(duration),
    )


def _places_of_manifest(manifests: str) -> dict[str, Place]:
    paths = [Path(path) for path in manifests.split(", ") if path]
    if not paths or not all(path.is_file() for path in paths):
        return {}
    try:
        cuts = [*read_manifest(paths)]
    except UserError:
        return {}
    return {cut.id: place for cut in cuts if (place := _place(place_of(cut)))}


def by_length(evaluation: Evaluation) -> tuple[str, list[tuple[str, Scores]]]:
    """Group utterances of similar length.

    Args:
        evaluation: Scores and places.

    Returns:
        Unit of the length, "seconds" or "words", and the range and the scores of each group.
    """
    utterances = evaluation.scores.utterances
    timed = evaluation.hours is not None
    bounds = SECONDS if timed else WORDS
    groups: list[list[Utterance]] = [[] for _ in bounds]
    for row in utterances:
        length = evaluation.places[row.result.id].duration if timed else row.words.total
        groups[max(int(np.searchsorted(bounds, length, side="right")) - 1, 0)].append(row)
    merged: list[tuple[int, int, list[Utterance]]] = []
    for number, group in enumerate(groups):
        if not group:
            continue
        if merged and min(len(group), len(merged[-1][2])) < MIN_GROUP:
            first, _, before = merged.pop()
            merged.append((first, number, before + group))
        else:
            merged.append((number, number, group))
    named = []
    for first, last, group in merged:
        end = bounds[last + 1] - (0 if timed else 1) if last + 1 < len(bounds) else None
        start = bounds[first]
        name = f"{start} and more" if end is None else f"{start}" if end == start else f"{start} to {end}"
        named.append((f"{name} {'s' if timed else 'words'}", pooled(group)))
    return "seconds" if timed else "words", named


def confusions(utterances: Sequence[Utterance]) -> Confusions:
    """Count which words became which.

    Args:
        utterances: References and hypotheses. Letters count where sentences are written without spaces.
    """
    references = [row.result.reference for row in utterances]
    spaces = any(len(reference.split()) > 1 for reference in references)
    by_words = spaces or len(set(references)) <= max(20, len(references) // 2)
    align = jiwer.process_words if by_words else jiwer.process_characters
    counted = Confusions("word" if by_words else "letter", Counter(), Counter(), Counter(), Counter())
    for row in utterances:
        output = align(row.result.reference, row.result.hypothesis)
        [reference], [hypothesis], [chunks] = output.references, output.hypotheses, output.alignments
        counted.totals.update(reference)
        for chunk in chunks:
            said = reference[chunk.ref_start_idx : chunk.ref_end_idx]
            heard = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
            if chunk.type == "substitute":
                counted.substitutions.update(zip(said, heard, strict=True))
            elif chunk.type == "delete":
                counted.deletions.update(said)
            elif chunk.type == "insert":
                counted.insertions.update(heard)
    return counted


@dataclass(frozen=True)
class Aligned:
    """An utterance with its errors marked.

    Args:
        utterance: The utterance with its errors.
        by_words: Whether words are aligned, not letters.
        columns: Words or letters below each other, with the marks of errors.
    """

    utterance: Utterance
    by_words: bool
    columns: list[Column]


def worst_utterances(scores: Scores, most: int) -> list[Aligned]:
    """Return the utterances with most errors.

    Args:
        scores: Scores of all utterances.
        most: Number of utterances.
    """
    ordered = sorted(scores.utterances, key=lambda row: (-row.words.errors, -row.letters.errors, row.result.id))
    return [Aligned(row, *aligned(row.result)) for row in ordered[:most] if row.letters.errors]
