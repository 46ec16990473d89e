"""Parts of a page on recognition errors, and on the tuning of a decoder."""

import math
from collections.abc import Mapping, Sequence
from itertools import islice

from hubert_lightning.asr.language_scores import MacroAverage, by_kind, macro_average
from hubert_lightning.asr.score_report import SINGULAR
from hubert_lightning.asr.scoring import Comparison, Scores, compare
from hubert_lightning.errors import UserError
from hubert_lightning.report import words
from hubert_lightning.report.breakdown import Confusions, by_length, confusions, worst_utterances
from hubert_lightning.report.charts import (
    MAX_WORDS,
    SERIES,
    Chart,
    Interval,
    confusion_chart,
    interval_chart,
    scatter_chart,
)
from hubert_lightning.report.clips import Clips
from hubert_lightning.report.json_files import is_number
from hubert_lightning.report.parts import Detail, Page, Table, Worst
from hubert_lightning.report.run_files import Tuning
from hubert_lightning.report.summary import Scored

SPEAKERS_DRAWN = 40
"""Speakers of a chart; the table has all."""
PAIRS_SHOWN = 12
"""Most frequent errors of each kind that are listed."""


def add_rates(page: Page, scored: Sequence[Scored], colours: Mapping[str, str]) -> None:
    """Add the error rates of all tests, and the differences between tests of the same utterances, to a page.

    Args:
        page: Page.
        scored: Scored results of each test.
        colours: Colour of each run by its name.
    """
    if not scored:
        return
    rows, intervals = [], []
    for number, item in enumerate(scored):
        scores = item.evaluation.scores
        one, letters = scores.words, scores.letters
        rows.append(
            [
                item.title,
                words.percent(one.rate),
                words.interval(one.low, one.high),
                words.percent(letters.rate),
                words.interval(letters.low, letters.high),
                *map(
                    words.number, (one.substitutions, one.insertions, one.deletions, one.total, len(scores.utterances))
                ),
            ]
        )
        colour = colours[item.run.name] if item.run else SERIES[number % len(SERIES)]
        note = f"{words.counted(one.errors, 'error')} in {words.counted(one.total, 'word')}"
        intervals.append(Interval(item.title, one.rate, one.low, one.high, note, colour))
    headings = [
        "",
        "WER",
        "95 % interval",
        "CER",
        "95 % interval",
        "substituted",
        "inserted",
        "deleted",
        "words",
        "utterances",
    ]
    page.rates_table = Table(headings, rows, numeric=1)
    if len(scored) > 1:
        page.rates = interval_chart("Word error rate", intervals, "word error rate, 95 % interval")
        page.comparisons = _comparisons(scored)


def _comparisons(scored: Sequence[Scored]) -> Table | None:
    """Compare the best results of each test set with the others of the same utterances."""
    sets: dict[frozenset[str], list[Scored]] = {}
    for item in scored:
        sets.setdefault(frozenset(row.result.id for row in item.evaluation.scores.utterances), []).append(item)
    rows = []
    for items in sets.values():
        first, *others = sorted(items, key=lambda item: item.evaluation.scores.words.rate)
        for other in others:
            try:
                comparison: Comparison = compare(first.evaluation.scores, other.evaluation.scores)
            except UserError:
                continue
            difference = comparison.words
            rows.append(
                [
                    f"{first.title} against {other.title}",
                    f"{100 * difference.difference:+.1f} points".replace("-", "−"),
                    words.interval(difference.low, difference.high),
                    f"{difference.p_value:.4f}" if difference.p_value >= 0.0001 else "< 0.0001",
                ]
            )
    return Table(["", "difference in WER", "95 % interval", "p"], rows, numeric=1) if rows else None


def detail_of(item: Scored, number: int, clips: Clips, most: int) -> Detail:
    """Break the errors of one test down.

    Args:
        item: Scored results.
        number: Number of the test on the page.
        clips: Recordings of the page.
        most: Number of utterances to show, those with most errors first.
    """
    scores = item.evaluation.scores
    counted = confusions(scores.utterances)
    several_speakers = len(scores.speakers) > 1
    parts = [
        (kind.capitalize(), _parts(SINGULAR[kind], members, macro_average(members)))
        for kind, members in by_kind(scores).items()
    ]
    unit, groups = by_length(item.evaluation)
    lengths = None
    if len(groups) > 1:
        lengths = interval_chart(
            f"By length in {unit}", [_interval(name, row) for name, row in groups], "word error rate"
        )
    matrix = counted.matrix(MAX_WORDS)
    confusion = None
    if counted.substitutions and len(matrix[0]) > 1:
        confusion = confusion_chart(f"Which {counted.unit} became which", *matrix)
    shown = [
        Worst(aligned, clips.add(item.evaluation.places.get(aligned.utterance.result.id)))
        for aligned in worst_utterances(scores, most)
    ]
    return Detail(
        title=item.title,
        anchor=f"test-{number}",
        numbers=_kinds(scores),
        speakers=_speaker_chart(scores.speakers) if several_speakers else None,
        speaker_table=_speaker_table(scores.speakers) if several_speakers else None,
        parts=parts,
        lengths=lengths,
        confusion=confusion,
        pairs=_pairs(counted),
        unit=counted.unit,
        worst=shown,
    )


def _speaker_chart(speakers: Mapping[str, Scores]) -> Chart:
    """Word error rates of the speakers with most errors."""
    drawn = [_interval(name, row) for name, row in islice(speakers.items(), SPEAKERS_DRAWN)]
    others = len(speakers) - len(drawn)
    note = f"{words.counted(others, 'speaker')} with fewer errors are in the table." if others else ""
    return interval_chart("By speaker", drawn, "word error rate", note)


def _speaker_table(speakers: Mapping[str, Scores]) -> Table:
    """Rates of each speaker."""
    rows = [
        [
            name,
            words.percent(row.words.rate),
            words.interval(row.words.low, row.words.high),
            words.percent(row.letters.rate),
            words.number(row.words.total),
            words.number(len(row.utterances)),
        ]
        for name, row in speakers.items()
    ]
    return Table(["speaker", "WER", "95 % interval", "CER", "words", "utterances"], rows, numeric=1)


def _parts(thing: str, members: Mapping[str, Scores], mean: MacroAverage) -> Table:
    """Rates of each language or corpus, and their mean."""
    rows = [
        [
            name,
            words.percent(row.words.rate) if row.parts_words else "–",
            words.interval(row.words.low, row.words.high) if row.parts_words else "–",
            words.percent(row.letters.rate),
            words.interval(row.letters.low, row.letters.high),
            words.number(row.words.total),
            words.number(len(row.utterances)),
        ]
        for name, row in members.items()
    ]
    of_words = "–" if math.isnan(mean.words) else words.percent(mean.words)
    rows.append(["mean", of_words, "", words.percent(mean.letters), "", "", ""])
    headings = [thing, "WER", "95 % interval", "CER", "95 % interval", "words", "utterances"]
    return Table(headings, rows, numeric=1)


def _interval(name: str, scores: Scores) -> Interval:
    row = scores.words
    utterances = words.counted(len(scores.utterances), "utterance")
    note = f"{words.counted(row.errors, 'error')} in {words.counted(row.total, 'word')}, {utterances}"
    return Interval(name, row.rate, row.low, row.high, note)


def _kinds(scores: Scores) -> Table:
    rows = [
        [
            name,
            words.percent(rate.rate, 2),
            words.interval(rate.low, rate.high, 2),
            *map(words.number, (rate.substitutions, rate.insertions, rate.deletions, rate.total)),
        ]
        for name, rate in (("words", scores.words), ("characters", scores.letters))
    ]
    return Table(["", "error rate", "95 % interval", "substituted", "inserted", "deleted", "of"], rows, numeric=1)


def _pairs(counted: Confusions) -> list[tuple[str, Table]]:
    tables = []
    substitutions = [
        [said, heard, words.number(count), words.percent(count / max(counted.totals[said], 1), 0)]
        for (said, heard), count in counted.substitutions.most_common(PAIRS_SHOWN)
    ]
    if substitutions:
        tables.append(("Substituted", Table(["said", "recognised", "times", "share"], substitutions, numeric=2)))
    for title, counts in (("Missing", counted.deletions), ("Added", counted.insertions)):
        rows = [[word, words.number(count)] for word, count in counts.most_common(PAIRS_SHOWN)]
        if rows:
            tables.append((title, Table([counted.unit, "times"], rows, numeric=1)))
    return tables


def tuning_charts(run: str, tuning: Tuning) -> tuple[str, str, list[Chart]]:
    """Draw the trials of a decoder: WER over time and over each weight.

    Args:
        run: Name of the run.
        tuning: Trials.

    Returns:
        Heading, rates to compare, and charts.
    """
    content = tuning.content
    trials = [trial for trial in content["trials"] if isinstance(trial, dict) and is_number(trial.get("wer"))]
    references = {
        name: float(content[key])
        for name, key in (("greedy", "greedy_wer"), ("default weights", "default_wer"))
        if is_number(content.get(key))
    }
    best_index = min(range(len(trials)), key=lambda index: trials[index]["wer"], default=None)
    charts = []
    if best_index is not None:
        points = [(number + 1, float(trial["wer"])) for number, trial in enumerate(trials)]
        charts.append(scatter_chart("Trials", points, "trial", points[best_index], references))
        for name in [key for key, value in trials[best_index].items() if key != "wer" and is_number(value)]:
            weights = [(float(trial[name]), float(trial["wer"])) for trial in trials if is_number(trial.get(name))]
            best = (float(trials[best_index][name]), float(trials[best_index]["wer"]))
            charts.append(scatter_chart(name.replace("_", " "), weights, name, best, references))
    best_rate = content.get("best_wer")
    parts = [f"{name} {words.percent(rate)}" for name, rate in references.items()]
    if is_number(best_rate):
        parts.append(f"best weights {words.percent(best_rate)}")
    return f"{run}, {tuning.path.name.removesuffix('.trials.json')}", words.listing(parts) if parts else "", charts
