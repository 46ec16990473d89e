"""Scores by language and by corpus: macro averages, metrics for the loggers, and the file of all numbers."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from hubert_lightning.asr.scoring import Comparison, Difference, ErrorRate, Scores, Utterance
from hubert_lightning.files import write_whole


class MacroAverage(NamedTuple):
    """Mean of the error rates of several languages or corpora, each with the same weight.

    Args:
        words: Mean word error rate of those that write spaces between words; NaN if there is none.
        letters: Mean character error rate of all.
    """

    words: float
    letters: float


def macro_average(scores: Mapping[str, Scores]) -> MacroAverage:
    """Average the error rates of several languages or corpora.

    Args:
        scores: Scores of each.
    """
    of_words = [part.words.rate for part in scores.values() if part.parts_words]
    of_letters = [part.letters.rate for part in scores.values()]
    words = math.fsum(of_words) / len(of_words) if of_words else math.nan
    return MacroAverage(words, math.fsum(of_letters) / len(of_letters))


def by_kind(scores: Scores) -> dict[str, dict[str, Scores]]:
    """Scores of several languages under "languages", of several corpora under "corpora"."""
    kinds = {"languages": scores.languages, "corpora": scores.corpora}
    return {kind: parts for kind, parts in kinds.items() if parts}


def metrics_by_name(scores: Scores, part: str = "test") -> dict[str, float]:
    """Error rates of each language and corpus and their macro averages, for the loggers: `test/wer/languages/en`.

    The word error rate of a language that writes no spaces between words is left out.

    Args:
        scores: Error rates.
        part: First part of the names, "test" or "val".
    """
    metrics: dict[str, float] = {}
    for kind, parts in by_kind(scores).items():
        for name, of_name in parts.items():
            words = of_name.words.rate if of_name.parts_words else math.nan
            metrics |= {f"{part}/wer/{kind}/{name}": words, f"{part}/cer/{kind}/{name}": of_name.letters.rate}
        mean = macro_average(parts)
        metrics |= {f"{part}/wer/mean_of_{kind}": mean.words, f"{part}/cer/mean_of_{kind}": mean.letters}
    return {name: rate for name, rate in metrics.items() if not math.isnan(rate)}


def is_metric_by_name(metric: str, part: str) -> bool:
    """Whether a metric is named like those of `metrics_by_name`.

    Args:
        metric: Name of a metric.
        part: First part of the names, "test" or "val".
    """
    return re.fullmatch(rf"{part}/(wer|cer)/((languages|corpora)/.+|mean_of_(languages|corpora))", metric) is not None


def write_scores(
    path: Path, scores: Scores, comparison: Comparison | None = None, made_by: dict[str, Any] | None = None
) -> None:
    """Write all numbers as JSON; null for the interval of a single utterance.

    Args:
        path: File to write.
        scores: Error rates.
        comparison: Difference from another system.
        made_by: Checkpoint, manifest, decoder and version behind the hypotheses.

    Raises:
        UserError: The disk is full, or cannot be written to.
    """
    content: dict[str, Any] = {  # JSON values
        "made_by": made_by or {},
        **_rates(scores),
        "speakers": {
            name: {**_rates(speaker), "num_utterances": len(speaker.utterances)}
            for name, speaker in scores.speakers.items()
        },
        **{
            kind: {
                name: {**_rates(part), "num_utterances": len(part.utterances), "parts_words": part.parts_words}
                for name, part in parts.items()
            }
            for kind, parts in by_kind(scores).items()
        },
        **_macro_averages(scores),
        "utterances": [{**utterance.result._asdict(), **_rates(utterance)} for utterance in scores.utterances],
    }
    if comparison:
        content["comparison"] = _rates(comparison)
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False).encode())


def _rates(scores: Scores | Utterance | Comparison) -> dict[str, dict[str, float | None]]:
    return {"words": _numbers(scores.words), "letters": _numbers(scores.letters)}


def _numbers(row: ErrorRate | Difference) -> dict[str, float | None]:
    derived = {"errors": row.errors, "rate": row.rate} if isinstance(row, ErrorRate) else {"difference": row.difference}
    return {name: None if math.isnan(number) else number for name, number in {**asdict(row), **derived}.items()}


def _macro_averages(scores: Scores) -> dict[str, dict[str, dict[str, float | None]]]:
    averages = {kind: macro_average(parts) for kind, parts in by_kind(scores).items()}
    if not averages:
        return {}
    return {
        "macro_average": {
            kind: {"words": None if math.isnan(mean.words) else mean.words, "letters": mean.letters}
            for kind, mean in averages.items()
        }
    }
