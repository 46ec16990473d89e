"""Scores of speech recognition: error rates with confidence intervals, by language, corpus and speaker, and two systems
compared.

The input is the test.jsonl of `hubert test`. jiwer aligns the texts. Confidence intervals and p-values assume that
utterances are independent of one another.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jiwer
import numpy as np
from scipy.stats import bootstrap, permutation_test

from hubert_lightning.characters import comparable, parts_words
from hubert_lightning.errors import UserError
from hubert_lightning.untrusted.json_file import parse_json
from hubert_lightning.untrusted.text_file import LONGEST_LINE, UTF_16_MARKS, lines_of

RESAMPLES = 9_999
SEED = 0
MAX_CHARACTERS = 2**17
"""Characters of a text: the time of an alignment grows with their square."""
UNKNOWN = "unknown"
"""Name of the language or corpus of utterances without one."""
WAY_OUT = "give the test.jsonl that `hubert test` writes"


class Result(NamedTuple):
    """Reference and hypothesis of an utterance; speaker, language and corpus are empty where unknown."""

    id: str
    reference: str
    hypothesis: str
    speaker: str = ""
    language: str = ""
    corpus: str = ""


@dataclass(frozen=True)
class ErrorRate:
    """Errors per word or per letter of the references; spaces count as letters, as in jiwer.

    Attributes:
        substitutions: Number of substituted words or letters.
        insertions: Number of inserted words or letters.
        deletions: Number of deleted words or letters.
        total: Number of words or letters in the references.
        low: Lower bound of the 95 % confidence interval of the rate; NaN for a single utterance, or if not computed.
        high: Upper bound of the interval.
    """

    substitutions: int
    insertions: int
    deletions: int
    total: int
    low: float = math.nan
    high: float = math.nan

    @property
    def errors(self) -> int:
        """Number of errors of all kinds."""
        return self.substitutions + self.insertions + self.deletions

    @property
    def rate(self) -> float:
        """Errors per word or letter; the number of insertions where the references are empty, as in jiwer."""
        return self.errors / max(self.total, 1)


class Utterance(NamedTuple):
    """A result with its errors in words and in letters."""

    result: Result
    words: ErrorRate
    letters: ErrorRate


@dataclass(frozen=True)
class Scores:
    """Word and character error rate of utterances.

    Attributes:
        words: Error rate in words.
        letters: Error rate in letters.
        utterances: The utterances with their errors.
        speakers: Scores of each speaker where speakers are known.
        languages: Scores of each language, if there are several.
        corpora: Scores of each corpus, if there are several.
    """

    words: ErrorRate
    letters: ErrorRate
    utterances: list[Utterance]
    speakers: dict[str, "Scores"] = field(default_factory=dict)
    languages: dict[str, "Scores"] = field(default_factory=dict)
    corpora: dict[str, "Scores"] = field(default_factory=dict)

    @property
    def parts_words(self) -> bool:
        """Whether the references have spaces between words; if not, as in Chinese, the WER says little."""
        return parts_words("".join(row.result.reference for row in self.utterances))


@dataclass(frozen=True)
class Difference:
    """Error rates of two systems.

    Attributes:
        first: Error rate of the first system.
        second: Error rate of the second system.
        low: Lower bound of the 95 % confidence interval of the difference; NaN for a single utterance.
        high: Upper bound of the interval.
        p_value: Probability of a difference as large between equally good systems.
    """

    first: float
    second: float
    low: float
    high: float
    p_value: float

    @property
    def difference(self) -> float:
        """First rate minus second rate: below 0, the first system makes fewer errors."""
        return self.first - self.second


@dataclass(frozen=True)
class Comparison:
    """Differences of two systems on the same utterances."""

    words: Difference
    letters: Difference


def read_results(path: Path) -> list[Result]:
    """Read the utterances of a file that `hubert test` wrote.

    Args:
        path: JSON lines.

    Raises:
        UserError: The file does not exist, has other lines or an utterance twice, or has empty references only.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the test.jsonl that `hubert test` wrote into the run's folder")
    results: dict[str, Result] = {}
    for number, line in enumerate(_lines_of_results(path), start=1):
        if not line.strip():
            continue
        result = _result(line, f"{path}, line {number}")
        if result.id in results:
            raise UserError(f"{path}, line {number}: {result.id} is here twice; keep one result per utterance")
        results[result.id] = result
    if not results:
        raise UserError(f"{path}: empty; run `hubert test` again, which writes a line per utterance")
    if not any(result.reference.strip() for result in results.values()):
        raise UserError(
            f"{path}: every reference is empty, {next(iter(results))} is the first of {len(results)}; give results of "
            "utterances with speech"
        )
    return list(results.values())


def _lines_of_results(path: Path) -> Iterator[bytes]:
    """Lines of a file in UTF-8 or UTF-16 with any line ends."""
    with path.open("rb") as file:
        if file.read(2) in UTF_16_MARKS:
            yield from (line.encode() for line in lines_of(path))
            return
        file.seek(0)
        while block := file.readline(LONGEST_LINE + 1):
            if len(block) > LONGEST_LINE:
                raise UserError(f"{path}: a line of more than {LONGEST_LINE} bytes; {WAY_OUT}")
            yield from block.splitlines()


def _result(line: bytes, location: str) -> Result:
    try:
        row = parse_json(line)
    except (UserError, json.JSONDecodeError) as error:
        raise UserError(f"{location}: not JSON ({error}); {WAY_OUT}") from error
    if not isinstance(row, dict):
        raise UserError(f"{location}: no JSON object; {WAY_OUT}")
    for name in ("id", "reference", "hypothesis"):
        if name not in row:
            raise UserError(
                f'{location}: has no "{name}"; give the test.jsonl of `hubert test` (predict.jsonl has no references)'
            )
    texts = {name: row[name] for name in Result._fields if name in row}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f'{location}: "{name}" is {json.dumps(text)[:60]}, which is not text; put it in quotes')
        if len(text) > MAX_CHARACTERS:
            raise UserError(
                f'{location}: "{name}" has more than {MAX_CHARACTERS} characters; give results of shorter recordings'
            )
    return Result(**texts)


def score(results: Sequence[Result], intervals: bool = True) -> Scores:
    """Compute the error rates of all utterances, and of each speaker, language and corpus.

    Before the comparison, texts get canonical composition (NFC), one kind of apostrophe, single spaces in place of any
    white space, and lose invisible characters.

    Args:
        results: References and hypotheses.
        intervals: Whether to compute confidence intervals, which take most of the time.

    Returns:
        The scores; speakers with the highest word error rate come first, languages and corpora by name.

    Raises:
        UserError: There are no results.
    """
    if not results:
        raise UserError("no results to score; give results of one utterance or more")
    utterances = [score_utterance(result) for result in results]
    by_speaker: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        if utterance.result.speaker:
            by_speaker.setdefault(utterance.result.speaker, []).append(utterance)
    speakers = {speaker: pooled(rows, intervals) for speaker, rows in by_speaker.items()}
    worst_first = sorted(speakers.items(), key=lambda item: (-item[1].words.rate, item[0]))
    return replace(
        pooled(utterances, intervals),
        speakers=dict(worst_first),
        languages=_by_name(utterances, "language", intervals),
        corpora=_by_name(utterances, "corpus", intervals),
    )


def _by_name(utterances: Sequence[Utterance], name: str, intervals: bool) -> dict[str, Scores]:
    """Scores of each language or corpus, "unknown" for utterances without one; none if there is one alone."""
    parts: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        parts.setdefault(getattr(utterance.result, name) or UNKNOWN, []).append(utterance)
    return {part: pooled(parts[part], intervals) for part in sorted(parts)} if len(parts) > 1 else {}


def score_utterance(result: Result) -> Utterance:
    """Count the errors of one utterance, as `score` does.

    Args:
        result: Reference and hypothesis.
    """
    return _utterance(_comparable(result))


def _comparable(result: Result) -> Result:
    return result._replace(reference=comparable(result.reference), hypothesis=comparable(result.hypothesis))


def _utterance(result: Result) -> Utterance:
    words = jiwer.process_words(result.reference, result.hypothesis)
    letters = jiwer.process_characters(result.reference, result.hypothesis)
    return Utterance(result, _error_rate(words), _error_rate(letters))


def _error_rate(alignment: jiwer.WordOutput | jiwer.CharacterOutput) -> ErrorRate:
    total = alignment.hits + alignment.substitutions + alignment.deletions
    return ErrorRate(alignment.substitutions, alignment.insertions, alignment.deletions, total)


def pooled(utterances: list[Utterance], intervals: bool = True) -> Scores:
    """Compute the error rates of utterances together.

    Args:
        utterances: At least one utterance with its errors.
        intervals: Whether to compute confidence intervals.

    Returns:
        The scores, without those of speakers.
    """
    words, letters = (
        _total([getattr(utterance, unit) for utterance in utterances], intervals) for unit in ("words", "letters")
    )
    return Scores(words, letters, utterances)


def _total(rates: Sequence[ErrorRate], intervals: bool) -> ErrorRate:
    """Rate over all utterances: the sum of their errors by the sum of their words or letters."""
    counts = np.array([(rate.substitutions, rate.insertions, rate.deletions, rate.total) for rate in rates])
    substitutions, insertions, deletions, total = counts.sum(axis=0).tolist()
    low, high = _interval(counts[:, :3].sum(axis=1), counts[:, 3]) if intervals else (math.nan, math.nan)
    return ErrorRate(substitutions, insertions, deletions, total, low, high)


def _interval(errors: np.ndarray, total: np.ndarray) -> tuple[float, float]:
    """Compute the 95 % confidence interval of an error rate by resampling utterances (Bisani & Ney 2004).

    Args:
        errors: (utterances,)
        total: (utterances,), words or letters.
    """
    if len(errors) < 2:
        return math.nan, math.nan
    interval = bootstrap(
        (errors, total),
        lambda errors, total, axis: errors.sum(axis) / np.maximum(total.sum(axis), 1),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=_batch_size(len(errors)),
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _batch_size(num_utterances: int) -> int:
    """Number of resamples drawn at once, in some ten megabytes."""
    return max(1, 1_000_000 // num_utterances)


def compare(first: Scores, second: Scores) -> Comparison:
    """Compare two systems on the same utterances, in any order.

    Args:
        first: Scores of the first system.
        second: Scores of the second system.

    Raises:
        UserError: An utterance is missing in one of them, is there twice, or has another reference.
    """
    first_by_id, second_by_id = _by_id(first), _by_id(second)
    for name, utterance in first_by_id.items():
        if name not in second_by_id:
            raise UserError(f"{name}: the second results have no such utterance; compare results of one test set")
        reference, other = utterance.result.reference, second_by_id[name].result.reference
        if reference != other:
            raise UserError(
                f"{name}: its reference is {reference!r} in the first results, {other!r} in the second; compare "
                "results of one test set, with one normalisation of text"
            )
    if extra := next((name for name in second_by_id if name not in first_by_id), None):
        raise UserError(f"{extra}: the first results have no such utterance; compare results of one test set")
    pairs = [(first_by_id[name], second_by_id[name]) for name in sorted(first_by_id)]
    return Comparison(
        words=_difference([(one.words, other.words) for one, other in pairs]),
        letters=_difference([(one.letters, other.letters) for one, other in pairs]),
    )


def _by_id(scores: Scores) -> dict[str, Utterance]:
    utterances: dict[str, Utterance] = {}
    for utterance in scores.utterances:
        name = utterance.result.id
        if name in utterances:
            raise UserError(f"{name}: twice in one system's results; keep one result per utterance")
        utterances[name] = utterance
    return utterances


def _difference(pairs: Sequence[tuple[ErrorRate, ErrorRate]]) -> Difference:
    first, second, total = np.array([(one.errors, other.errors, one.total) for one, other in pairs]).T
    low, high = _interval(first - second, total)
    size = max(int(total.sum()), 1)
    return Difference(int(first.sum()) / size, int(second.sum()) / size, low, high, _p_value(first - second))


def _p_value(differences: np.ndarray) -> float:
    """Test by approximate randomisation: an exchange of two results changes the sign of their difference.

    Args:
        differences: (utterances,), errors of the first system minus those of the second.
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
        batch=_batch_size(len(differences)),
        rng=np.random.default_rng(SEED),
    )
    return float(test.pvalue)
