"""The summary of a page: what was trained, how well, how fast, and what to try next, in plain words with numbers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from hubert_lightning.report.breakdown import Evaluation, confusions
from hubert_lightning.report.json_files import is_number
from hubert_lightning.report.run_files import Results, Run
from hubert_lightning.report.words import counted, duration, encoder, hours, interval, listing, number, percent, targets

CHANCE = 2.0
"""Factor above a uniform guess below which a model has learnt nothing."""
STILL_FALLING, OVERFITTED = 0.98, 1.05
"""Factors of a validation curve: its end to its last quarter, and its end to its best value."""
FEW_CLUSTERS = 0.25
"""Perplexity of predictions, as a fraction of that of the labels, that shows a collapse."""
LONG_WAIT = 0.15
"""Fraction of the time waiting for data that is worth a remedy."""
GREEDY = "greedy"
FEWEST_ERRORS = 20
"""Errors below which their kinds say little."""


class BestLayer(NamedTuple):
    """The layer whose clusters agree best with phones.

    Args:
        run: Name of the run.
        folder: Folder of the run.
        layer: Number of the layer, counted from 1.
        pnmi: PNMI of its clusters.
    """

    run: str
    folder: Path
    layer: int
    pnmi: float


@dataclass(frozen=True)
class Card:
    """A number that a reader looks for first.

    Args:
        value: The number.
        label: What it is.
        note: Interval, run or unit below it.
    """

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Scored:
    """Scored results of a run.

    Args:
        title: Run, test set and decoder.
        run: The run; None for results that were given as a file.
        results: File and origin of the results.
        evaluation: Scores.
    """

    title: str
    run: Run | None
    results: Results
    evaluation: Evaluation


@dataclass(frozen=True)
class Summary:
    """Summary of a page."""

    cards: list[Card]
    sentences: list[str]
    advice: list[str]


def speed_of(run: Run) -> float | None:
    """Return the median speed of a run in seconds of audio per second."""
    curve = run.curves.get("speed/audio_seconds_per_second")
    return median(value for _, value in curve) if curve else run.last("speed/audio_seconds_per_second")


def training_seconds(run: Run) -> tuple[float, bool] | None:
    """Return the duration of the training steps, and whether it is estimated from the speed and the size of batches."""
    stated = run.record.get("seconds") or run.final.get("speed/seconds")
    if is_number(stated):
        return float(stated), False
    batch = (
        run.record.get("batch/global_seconds")
        or run.record.get("batch/seconds")
        or run.record.get("batch/max_duration")
    )
    curve = run.curves.get("speed/audio_seconds_per_second")
    if not curve or not is_number(batch) or not batch:
        return None
    seconds, before = 0.0, 0
    for step, speed in curve:
        seconds += (step - before) * batch / max(speed, 1e-9)
        before = step
    return seconds, True


def summarise(
    runs: Sequence[Run], scored: Sequence[Scored], pnmi: Mapping[str, float], layers: Sequence[BestLayer]
) -> Summary:
    """Summarise runs and their results.

    Args:
        runs: Runs of the page.
        scored: Scored results.
        pnmi: PNMI of clusters by their name.
        layers: Best layer of each run whose layers were judged.
    """
    sentences = [_pretraining(run) for run in runs if run.task == "pre-training"]
    if pnmi:
        values = listing([f"{name} {value:.3f}" for name, value in pnmi.items()])
        sentences.append(f"Agreement of clusters with phones (PNMI, from 0 to 1): {values}.")
    tested = {id(item.run) for item in scored}
    sentences += [_finetuning(run) for run in runs if run.task == "fine-tuning" and id(run) not in tested]
    sentences += [_recognition(item) for item in scored]
    sentences += _speed(runs)
    cards = [*_error_cards(scored), *_unit_cards(pnmi, layers), *_speed_cards(runs)]
    return Summary(cards, sentences, advice(runs, scored, layers))


def _error_cards(scored: Sequence[Scored]) -> list[Card]:
    if not scored:
        return []
    lowest = min(scored, key=lambda item: item.evaluation.scores.words.rate)
    words = lowest.evaluation.scores.words
    counts = f"{counted(words.errors, 'error')} in {counted(words.total, 'word')}"
    return [
        Card(percent(words.rate), "lowest word error rate", lowest.title),
        Card(interval(words.low, words.high), "its 95 % interval", counts),
    ]


def _unit_cards(pnmi: Mapping[str, float], layers: Sequence[BestLayer]) -> list[Card]:
    if pnmi:
        best = max(pnmi, key=lambda name: pnmi[name])
        return [Card(f"{pnmi[best]:.3f}", "best PNMI", best)]
    if layers:
        top = max(layers, key=lambda item: item.pnmi)
        return [Card(f"{top.pnmi:.3f}", "best PNMI", f"layer {top.layer}, {top.run}")]
    return []


def _speed_cards(runs: Sequence[Run]) -> list[Card]:
    speeds = [(speed, run.name) for run in runs if (speed := speed_of(run))]
    cards = []
    if speeds:
        speed, name = max(speeds)
        cards.append(Card(f"{number(round(speed))} × real time", "speed of training", name))
    spent = [seconds for run in runs if (seconds := training_seconds(run))]
    if spent:
        about = "≈ " if any(estimated for _, estimated in spent) else ""
        whole = "all runs together" if len(spent) > 1 else ""
        cards.append(Card(about + duration(sum(seconds for seconds, _ in spent)), "training time", whole))
    return cards


def _speed(runs: Sequence[Run]) -> list[str]:
    speeds = sorted(round(speed) for run in runs if (speed := speed_of(run)))
    spent = [seconds for run in runs if (seconds := training_seconds(run))]
    if not speeds:
        return []
    text = f"{number(speeds[0])} to {number(speeds[-1])}" if speeds[0] < speeds[-1] else number(speeds[0])
    sentence = f"Training processes {text} seconds of audio per second"
    if spent:
        about = "about " if any(estimated for _, estimated in spent) else ""
        time = duration(sum(seconds for seconds, _ in spent))
        sentence += f" and took {about}{time} in all, without validation and labelling"
    return [f"{sentence}."]


def _data_of(run: Run) -> str:
    amount = run.record.get("data/train/hours")
    speakers = run.record.get("data/train/speakers")
    text = f" on {hours(amount)} of speech" if is_number(amount) and amount else ""
    return text + (f" by {counted(speakers, 'speaker')}" if text and is_number(speakers) and speakers else "")


def _size_of(run: Run) -> str:
    parameters = run.record.get("parameters")
    parts = [encoder(run.record), f"{parameters / 1e6:.3g} million parameters" if is_number(parameters) else ""]
    parts = [part for part in parts if part]
    return f" ({', '.join(parts)})" if parts else ""


def _pretraining(run: Run) -> str:
    aim = targets(run)
    text = f"{run.name}: pre-training of an encoder{_size_of(run)}{_data_of(run)}"
    text += f", to predict {aim}" if aim else ""
    accuracy = run.last("val/masked_accuracy")
    if accuracy is not None:
        text += f". After {counted(run.step, 'step')}, it predicts {percent(accuracy)} of the masked validation frames"
    return f"{text}{_unfinished(run)}."


def _finetuning(run: Run) -> str:
    start = ", from pre-trained weights" if run.record.get("pretrained") else ""
    text = f"{run.name}: fine-tuning of a recogniser{_size_of(run)}{_data_of(run)}{start}"
    if best := run.best("val/wer"):
        text += f". Its lowest validation WER is {percent(best[1])}, at step {number(best[0])}"
    return f"{text}{_unfinished(run)}. It is not tested yet."


def _unfinished(run: Run) -> str:
    return {"finished": "", "training": " (still training)", "interrupted": " (not finished)"}[run.status]


def _recognition(item: Scored) -> str:
    words, letters = item.evaluation.scores.words, item.evaluation.scores.letters
    amount = item.evaluation.hours
    extent = counted(len(item.evaluation.scores.utterances), "utterance") + (f" ({hours(amount)})" if amount else "")
    start = ""
    if item.run is not None and item.run.task == "fine-tuning":
        weights = "pre-trained" if item.run.record.get("pretrained") else "random"
        start = f", trained from {weights} weights{_data_of(item.run)}"
    range_text = "" if math.isnan(words.low) else f" (95 % interval {interval(words.low, words.high)})"
    return (
        f"{item.title}{start}: word error rate {percent(words.rate)}{range_text}, character error rate "
        f"{percent(letters.rate)}, on {extent}."
    )


def advice(runs: Sequence[Run], scored: Sequence[Scored], layers: Sequence[BestLayer]) -> list[str]:
    """Derive what to try next from the numbers.

    Args:
        runs: Runs of the page.
        scored: Scored results.
        layers: Best layer of each run whose layers were judged.
    """
    found: list[str] = []
    for run in runs:
        found += [f"{run.name}: {sentence}" for sentence in (*_of_curves(run), *_of_units(run), *_of_speed(run))]
    found += _of_layers(runs, layers)
    searched = [item.run.folder for item in scored if item.run and item.results.decoder != GREEDY]
    for item in scored:
        tried = item.run is not None and item.run.folder in searched
        found += [f"{item.title}: {sentence}" for sentence in _of_errors(item, tried)]
    return [*dict.fromkeys(found)]


def _of_curves(run: Run) -> Iterator[str]:
    for metric, name in (("val/wer", "validation WER"), ("val/masked_loss", "masked loss of the validation set")):
        curve = run.curves.get(metric) or []
        if len(curve) < 4 or run.status == "training":
            continue
        best_step, best = min(curve, key=lambda point: point[1])
        last_step, last = curve[-1]
        before = curve[-1 - max(len(curve) // 4, 1)][1]
        if best_step == last_step and last < STILL_FALLING * before:
            change = f"{before:.3g} to {last:.3g} in the last quarter"
            yield f"the {name} was still falling at the end ({change}); train for more steps."
        elif last > OVERFITTED * best and best_step < 0.7 * last_step:
            change = f"{best:.3g} at step {number(best_step)}, {last:.3g} at the end"
            yield f"the {name} rises again ({change}): overfitting; use more data, fewer steps or more dropout."
    if skipped := run.last("train/skipped_steps"):
        yield (
            f"{counted(skipped, 'step')} skipped, since a loss or gradient was not finite; lower the learning rate, or "
            "compute in bf16 or float32."
        )
    if run.status == "interrupted" and run.step:
        yield f"it stopped at step {number(run.step)}, before its end; the same command resumes it."


def _of_units(run: Run) -> Iterator[str]:
    accuracy = run.last("val/masked_accuracy")
    clusters = run.record.get("labels/clusters") or run.record.get("num_clusters")
    if isinstance(clusters, list) and len(clusters) == 1:
        [clusters] = clusters
    if accuracy is not None and is_number(clusters) and accuracy < CHANCE / clusters:
        chance = percent(1 / clusters)
        yield (
            f"{percent(accuracy)} of the masked frames are predicted right, hardly more than by a uniform guess "
            f"({chance}); train for more steps, or raise the learning rate."
        )
        return
    predicted, labels = run.last("units/predicted_perplexity"), run.last("units/label_perplexity")
    if predicted is not None and labels and predicted < FEW_CLUSTERS * labels:
        yield (
            f"the predictions use few clusters (perplexity {predicted:.3g}, of the labels {labels:.3g}): the model has "
            "collapsed, or needs more steps."
        )


def _of_speed(run: Run) -> Iterator[str]:
    curve = run.curves.get("speed/data_wait")
    if curve and (wait := median(value for _, value in curve)) > LONG_WAIT:
        yield f"{percent(wait, 0)} of the time is spent waiting for data; raise data.init_args.num_workers."


def _of_layers(runs: Sequence[Run], layers: Sequence[BestLayer]) -> Iterator[str]:
    for best in layers:
        for run in runs:
            used, features = run.record.get("labels/layer"), str(run.record.get("labels/features"))
            if is_number(used) and used != best.layer and Path(features).parent.resolve() == best.folder.resolve():
                yield (
                    f"{best.run}: layer {best.layer} agrees best with phones (PNMI {best.pnmi:.3f}), and {run.name} "
                    f"used layer {used}; try layer {best.layer}."
                )


def _of_errors(item: Scored, tried_search: bool) -> Iterator[str]:
    """What the errors of a test suggest; `tried_search`: whether the run was also tested with a beam search."""
    scores, greedy = item.evaluation.scores, item.results.decoder == GREEDY
    words, letters = scores.words, scores.letters
    if greedy and not tried_search and words.rate > 0.03 and letters.rate < min(0.5 * words.rate, 0.3):
        yield (
            f"only {percent(letters.rate)} of the characters are wrong, but {percent(words.rate)} of the words; decode "
            "with a language model (hubert ngram, hubert tune-decoder)."
        )
    if words.errors >= FEWEST_ERRORS and words.deletions > 0.6 * words.errors:
        yield (
            f"{percent(words.deletions / words.errors, 0)} of the errors are missing words; train for longer or on "
            f"more transcripts{'' if greedy else ', and raise word_score'}."
        )
    if words.errors >= FEWEST_ERRORS and words.insertions > 0.4 * words.errors:
        yield (
            f"{percent(words.insertions / words.errors, 0)} of the errors are added words; check for speech that is "
            f"not transcribed{'' if greedy else ', and lower word_score'}."
        )
    if len(scores.speakers) > 2:
        name, worst = next(iter(scores.speakers.items()))
        if worst.words.low > words.high:
            yield (
                f"speaker {name} has a WER of {percent(worst.words.rate)}, all together {percent(words.rate)}; listen "
                "to the recordings below, and train on more speech of this kind."
            )
    if words.rate and words.high - words.low > 0.5 * words.rate:
        yield (
            f"the interval of {interval(words.low, words.high)} is wide, since {counted(words.total, 'word')} are few; "
            "test on more speech before small differences are believed."
        )
    counts = confusions(scores.utterances).substitutions.most_common(1)
    if counts and counts[0][1] >= max(5, 0.1 * words.errors):
        [((said, heard), count)] = counts
        yield (
            f"“{said}” became “{heard}” {number(count)} times, the most frequent confusion; check how both are spelt "
            "in the transcripts."
        )
