"""Scores of speech recognition: error rates with their uncertainty, by speaker, and two systems compared.

What `hubert test` writes to test.jsonl goes in. Alignments are jiwer's; an interval or a p-value takes utterances as
drawn independently of one another.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jiwer
import numpy as np
from scipy.stats import bootstrap, permutation_test

from hubert_lightning.characters import comparable
from hubert_lightning.errors import UserError
from hubert_lightning.files import write_whole
from hubert_lightning.untrusted.json_file import parse_json
from hubert_lightning.untrusted.text_file import LONGEST_LINE, UTF_16_MARKS, lines_of

RESAMPLES = 9_999
SEED = 0


class Result(NamedTuple):
    """What was said in an utterance, and what a system heard; the speaker is empty where unknown."""

    id: str
    reference: str
    hypothesis: str
    speaker: str = ""


@dataclass(frozen=True)
class ErrorRate:
    """Errors per word or per letter of the references; spaces count as letters, as in jiwer.

    total:     words or letters of the references
    low, high: 95 % confidence interval of the rate; NaN for a single utterance, which says nothing of others
    """

    substitutions: int
    insertions: int
    deletions: int
    total: int
    low: float = math.nan
    high: float = math.nan

    @property
    def errors(self) -> int:
        return self.substitutions + self.insertions + self.deletions

    @property
    def rate(self) -> float:
        """Where nothing was said, the number of insertions, as in jiwer."""
        return self.errors / max(self.total, 1)


class Utterance(NamedTuple):
    """A result, and its errors in words and in letters."""

    result: Result
    words: ErrorRate
    letters: ErrorRate


@dataclass(frozen=True)
class Scores:
    """Word and character error rate of some utterances, and of each speaker's, where speakers are known."""

    words: ErrorRate
    letters: ErrorRate
    utterances: list[Utterance]
    speakers: dict[str, "Scores"] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """An error rate of two systems, `first` less `second`: below 0, the first makes fewer errors.

    low, high: 95 % confidence interval of the difference; NaN for a single utterance
    p_value:   how often a difference as large comes about where both systems are equally good
    """

    first: float
    second: float
    low: float
    high: float
    p_value: float

    @property
    def difference(self) -> float:
        return self.first - self.second


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same utterances."""

    words: Difference
    letters: Difference


def read_results(path: Path) -> list[Result]:
    """The utterances of a file as `hubert test` writes it.

    Raises:
        UserError: No such file, or not such lines; an utterance twice; nothing was said in any.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the test.jsonl that `hubert test` wrote into the run's folder")
    found: dict[str, Result] = {}
    for number, line in enumerate(_lines_of_results(path), start=1):
        if not line.strip():
            continue
        result = _result(line, f"{path}, line {number}")
        if result.id in found:
            raise UserError(f"{path}, line {number}: {result.id} is here twice; keep one result per utterance")
        found[result.id] = result
    if not found:
        raise UserError(f"{path}: empty; run `hubert test` again, which writes a line per utterance")
    if not any(result.reference.strip() for result in found.values()):
        raise UserError(
            f"{path}: every reference is empty, {next(iter(found))} is the first of {len(found)}; give results of "
            "utterances in which something was said"
        )
    return list(found.values())


def _lines_of_results(path: Path) -> Iterator[bytes]:
    """The lines of a file in UTF-8 or UTF-16, however they end."""
    with path.open("rb") as file:
        if file.read(2) in UTF_16_MARKS:
            yield from (line.encode() for line in lines_of(path))
            return
        file.seek(0)
        while part := file.readline(LONGEST_LINE + 1):
            if len(part) > LONGEST_LINE:
                raise UserError(
                    f"{path}: a line of more than {LONGEST_LINE} bytes; give the test.jsonl that `hubert test` writes"
                )
            yield from part.splitlines()


def _result(line: bytes, place: str) -> Result:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}); give the test.jsonl that `hubert test` writes") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: no JSON object; give the test.jsonl that `hubert test` writes")
    for name in ("id", "reference", "hypothesis"):
        if name not in row:
            raise UserError(
                f'{place}: has no "{name}"; give the test.jsonl of `hubert test` (predict.jsonl has no references)'
            )
    texts = {name: row[name] for name in Result._fields if name in row}
    if wrong := next((name for name, text in texts.items() if not isinstance(text, str)), None):
        raise UserError(f'{place}: "{wrong}" is {json.dumps(texts[wrong])[:60]}, which is not text; put it in quotes')
    if longest := next((name for name, text in texts.items() if len(text) > LONGEST), None):
        raise UserError(f'{place}: "{longest}" has more than {LONGEST} characters; give results of shorter recordings')
    return Result(**texts)


def score(results: Sequence[Result]) -> Scores:
    """Error rates of all utterances, and of each speaker's; speakers with the highest word error rate come first.

    Texts are compared in canonical composition (NFC), with one kind of apostrophe, any white space between words, and
    without invisible characters.

    Raises:
        UserError: There are no results.
    """
    if not results:
        raise UserError("no results to score; give those of one utterance or more")
    utterances = [_utterance(_comparable(result)) for result in results]
    of_speaker: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        if utterance.result.speaker:
            of_speaker.setdefault(utterance.result.speaker, []).append(utterance)
    speakers = {speaker: _pooled(part) for speaker, part in of_speaker.items()}
    worst_first = sorted(speakers.items(), key=lambda item: (-item[1].words.rate, item[0]))
    return replace(_pooled(utterances), speakers=dict(worst_first))


def _comparable(result: Result) -> Result:
    return result._replace(reference=comparable(result.reference), hypothesis=comparable(result.hypothesis))


def _utterance(result: Result) -> Utterance:
    found = (align(result.reference, result.hypothesis) for align in (jiwer.process_words, jiwer.process_characters))
    words, letters = (
        ErrorRate(of.substitutions, of.insertions, of.deletions, of.hits + of.substitutions + of.deletions)
        for of in found
    )
    return Utterance(result, words, letters)


def _pooled(utterances: list[Utterance]) -> Scores:
    return Scores(_total([of.words for of in utterances]), _total([of.letters for of in utterances]), utterances)


def _total(parts: Sequence[ErrorRate]) -> ErrorRate:
    """The rate of utterances together: the sum of their errors by the sum of their words or letters."""
    counts = np.array([(of.substitutions, of.insertions, of.deletions, of.total) for of in parts])
    substitutions, insertions, deletions, total = counts.sum(axis=0).tolist()
    low, high = _interval(counts[:, :3].sum(axis=1), counts[:, 3])
    return ErrorRate(substitutions, insertions, deletions, total, low, high)


def _interval(errors: np.ndarray, total: np.ndarray) -> tuple[float, float]:
    """Bounds of 95 % of the rates of resampled utterances (Bisani & Ney 2004).

    errors, total: (utterances,)
    """
    if len(errors) < 2:
        return math.nan, math.nan
    interval = bootstrap(
        (errors, total),
        lambda errors, total, axis: errors.sum(axis) / np.maximum(total.sum(axis), 1),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=_batch(len(errors)),
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _batch(num_utterances: int) -> int:
    """How many resamples to draw at once in some ten megabytes."""
    return max(1, 1_000_000 // num_utterances)


def compare(first: Scores, second: Scores) -> Comparison:
    """Whether one of two systems is better, judged on the same utterances in any order.

    Raises:
        UserError: An utterance is missing in one of them, is there twice, or has another reference.
    """
    ours, theirs = _by_id(first), _by_id(second)
    for name, utterance in ours.items():
        if name not in theirs:
            raise UserError(f"{name}: the second results have no such utterance; compare results of one test set")
        if utterance.result.reference != (other := theirs[name].result.reference):
            raise UserError(
                f"{name}: its reference is {utterance.result.reference!r} in the first results, {other!r} in the "
                "second; compare results of one test set, with one normalisation of text"
            )
    if alone := next((name for name in theirs if name not in ours), None):
        raise UserError(f"{alone}: the first results have no such utterance; compare results of one test set")
    names = sorted(ours)
    return Comparison(
        _difference([ours[name].words for name in names], [theirs[name].words for name in names]),
        _difference([ours[name].letters for name in names], [theirs[name].letters for name in names]),
    )


def _by_id(scores: Scores) -> dict[str, Utterance]:
    found: dict[str, Utterance] = {}
    for utterance in scores.utterances:
        name = utterance.result.id
        if name in found:
            raise UserError(f"{name}: twice in one system's results; keep one result per utterance")
        found[name] = utterance
    return found


def _difference(first: Sequence[ErrorRate], second: Sequence[ErrorRate]) -> Difference:
    errors, others = (np.array([of.errors for of in part]) for part in (first, second))
    total = np.array([of.total for of in first])
    low, high = _interval(errors - others, total)
    every = max(int(total.sum()), 1)
    return Difference(int(errors.sum()) / every, int(others.sum()) / every, low, high, _p_value(errors - others))


def _p_value(differences: np.ndarray) -> float:
    """Approximate randomisation: the results of any utterance may be exchanged, which changes the difference's sign.

    differences: (utterances,), errors of one system less those of the other
    """
    differences = differences[differences != 0]  # an exchange of equal errors changes nothing
    if len(differences) < 2:
        return 1.0
    test = permutation_test(
        (differences,),
        lambda differences, axis: differences.sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=_batch(len(differences)),
        rng=np.random.default_rng(SEED),
    )
    return float(test.pvalue)


def write_scores(
    path: Path, scores: Scores, comparison: Comparison | None = None, made_by: dict[str, Any] | None = None
) -> None:
    """Write all numbers as JSON; an interval that a single utterance does not have is null.

    Args:
        path: The file to write.
        scores: Error rates.
        comparison: Difference to another system.
        made_by: Checkpoint, manifest, decoder and version that the hypotheses come from.

    Raises:
        UserError: The disk is full, or cannot be written to.
    """
    content: dict[str, Any] = {
        "made_by": made_by or {},
        **_rates(scores),
        "speakers": {
            name: {**_rates(of), "num_utterances": len(of.utterances)} for name, of in scores.speakers.items()
        },
        "utterances": [{**of.result._asdict(), **_rates(of)} for of in scores.utterances],
    }
    if comparison:
        content["comparison"] = _rates(comparison)
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False).encode())


def _rates(of: Scores | Utterance | Comparison) -> dict[str, dict[str, float | None]]:
    return {"words": _numbers(of.words), "letters": _numbers(of.letters)}


def _numbers(of: ErrorRate | Difference) -> dict[str, float | None]:
    derived = {"errors": of.errors, "rate": of.rate} if isinstance(of, ErrorRate) else {"difference": of.difference}
    return {name: None if math.isnan(number) else number for name, number in {**asdict(of), **derived}.items()}


LONGEST = 2**17
"""Characters of a text, the alignment of which takes quadratic time."""
