"""The summary of a page: what was trained, how well, how fast, and what to try next, in plain words with numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from hubert_lightning.report.breakdown import Tested, confusions
from hubert_lightning.report.run_files import Results, Run, is_number
from hubert_lightning.report.words import counted, duration, encoder, hours, interval, listing, number, percent, targets

CHANCE = 2.0
"""Factor above a uniform guess below which a model has learnt nothing."""


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
        tested: Scores.
    """

    title: str
    run: Run | None
    results: Results
    tested: Tested


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
    batch = run.record.get("batch/global_seconds") or run.record.get("batch/max_duration")
    curve = run.curves.get("speed/audio_seconds_per_second")
    if not curve or not is_number(batch) or not batch:
        return None
    seconds, before = 0.0, 0
    for step, speed in curve:
        seconds += (step - before) * batch / max(speed, 1e-9)
        before = step
    return seconds, True


def summarise(
    runs: Sequence[Run], scored: Sequence[Scored], pnmi: Mapping[str, float], layers: Sequence[tuple[str, int, float]]
) -> Summary:
    """Summarise runs and their results.

    Args:
        runs: Runs of the page.
        scored: Scored results.
        pnmi: PNMI of clusters by their name, as a demo measures it.
        layers: Run, best layer and its PNMI, where layers were judged.
    """
    cards, sentences = [], []
    for run in runs:
        if run.task == "pre-training":
            sentences.append(_pretraining(run))
    if pnmi:
        parts = [f"{name} {value:.3f}" for name, value in pnmi.items()]
        sentences.append(f"Agreement of clusters with phones (PNMI, 0 to 1): {listing(parts)}.")
        best = max(pnmi, key=lambda name: pnmi[name])
        cards.append(Card(f"{pnmi[best]:.3f}", "best PNMI", f"clusters of {best}"))
    elif layers:
        title, layer, value = max(layers, key=lambda item: item[2])
        cards.append(Card(f"{value:.3f}", "best PNMI", f"layer {layer}, {title}"))
    for run in runs:
        if run.task == "fine-tuning" and not any(item.run is run for item in scored):
            sentences.append(_finetuning(run))
    for item in scored:
        sentences.append(_recognition(item))
    if scored:
        lowest = min(scored, key=lambda item: item.tested.scores.words.rate)
        words = lowest.tested.scores.words
        cards.insert(0, Card(percent(words.rate), "lowest word error rate", lowest.title))
        cards.insert(1, Card(interval(words.low, words.high), "95 % confidence interval", f"{counted(words.errors, 'error')} in {counted(words.total, 'word')}"))
    speeds = [(run, speed) for run in runs if (speed := speed_of(run))]
    if speeds:
        run, speed = max(speeds, key=lambda pair: pair[1])
        cards.append(Card(f"{number(round(speed))}×", "real time in training", f"audio seconds per second, {run.name}"))
        durations = [spent for run, _ in speeds if (spent := training_seconds(run))]
        total = sum(seconds for seconds, _ in durations)
        if durations:
            about = "about " if any(estimated for _, estimated in durations) else ""
            cards.append(Card(f"{about}{duration(total)}", "training time", "all runs together" if len(durations) > 1 else speeds[0][0].name))
            slowest = min(speeds, key=lambda pair: pair[1])
            speed_text = f"{number(round(slowest[1]))} to {number(round(speed))}" if len(speeds) > 1 else number(round(speed))
            sentences.append(f"Training processed {speed_text} seconds of audio per second and took {about}{duration(total)}, without validation and labelling.")
    return Summary(cards, sentences, advice(runs, scored, layers))


def _data_of(run: Run) -> str:
    amount = run.record.get("data/train/hours")
    speakers = run.record.get("data/train/speakers")
    text = f" on {hours(amount)} of speech" if is_number(amount) else ""
    return text + (f" by {counted(speakers, 'speaker')}" if text and is_number(speakers) and speakers else "")


def _size_of(run: Run) -> str:
    parameters = run.record.get("parameters")
    parts = [encoder(run.record), f"{parameters / 1e6:.3g} million parameters" if is_number(parameters) else ""]
    parts = [part for part in parts if part]
    return f" ({', '.join(parts)})" if parts else ""


def _pretraining(run: Run) -> str:
    aim = targets(run)
    text = f"{run.name} pre-trained an encoder{_size_of(run)}{_data_of(run)}" + (f" to predict {aim}" if aim else "")
    accuracy = run.last("val/masked_accuracy")
    if accuracy is not None:
        text += f"; at step {number(run.step)} it predicts {percent(accuracy)} of the masked frames of the validation set correctly"
    return f"{text}{_unfinished(run)}."


def _finetuning(run: Run) -> str:
    start = " from pre-trained weights" if run.record.get("pretrained") else ""
    text = f"{run.name} fine-tuned a recogniser{_size_of(run)}{_data_of(run)}{start}"
    if best := run.best("val/wer"):
        text += f"; its lowest word error rate on the validation set is {percent(best[1])}, at step {number(best[0])}"
    return f"{text}{_unfinished(run)}; it was not tested yet."


def _unfinished(run: Run) -> str:
    return {"finished": "", "training": " (still training)", "interrupted": " (not finished)"}[run.status]


def _recognition(item: Scored) -> str:
    words, letters = item.tested.scores.words, item.tested.scores.letters
    amount = item.tested.hours
    extent = f"{counted(len(item.tested.scores.utterances), 'utterance')}" + (f", {hours(amount)}" if amount else "")
    start = ""
    if item.run is not None:
        start = ", fine-tuned from pre-trained weights" if item.run.record.get("pretrained") else ", trained from random weights"
        start = f"{start}{_data_of(item.run)}" if item.run.task == "fine-tuning" else ""
    return (
        f"{item.title}{start}: word error rate {percent(words.rate)} (95 % interval {interval(words.low, words.high)}), "
        f"character error rate {percent(letters.rate)}, on {extent}."
    )


def advice(runs: Sequence[Run], scored: Sequence[Scored], layers: Sequence[tuple[str, int, float]]) -> list[str]:
    """Derive what to try next from the numbers.

    Args:
        runs: Runs of the page.
        scored: Scored results.
        layers: Run, best layer and its PNMI.
    """
    found: list[str] = []
    for run in runs:
        found += _of_curves(run)
        found += _of_speed(run)
    found += _of_layers(runs, layers)
    for item in scored:
        found += _of_errors(item)
    return [*dict.fromkeys(found)]


def _of_curves(run: Run) -> list[str]:
    found = []
    for metric, name in (("val/wer", "validation WER"), ("val/masked_loss", "masked loss of the validation set")):
        curve = run.curves.get(metric) or []
        if len(curve) < 4 or run.status == "training":
            continue
        best = min(curve, key=lambda point: point[1])
        last, before = curve[-1][1], curve[-1 - max(len(curve) // 4, 1)][1]
        if best[0] == curve[-1][0] and last < 0.98 * before:
            found.append(f"{run.name}: the {name} was still falling at the end ({before:.3g} → {last:.3g} over the last quarter): train for more steps.")
        elif last > 1.05 * best[1] and best[0] < 0.7 * curve[-1][0]:
            found.append(f"{run.name}: the {name} was best at step {number(best[0])} ({best[1]:.3g}) and rose to {last:.3g}: it overfits; use more data, fewer steps or more dropout.")
    accuracy, clusters = run.last("val/masked_accuracy"), run.record.get("labels/clusters") or run.record.get("num_clusters")
    count = clusters[0] if isinstance(clusters, list) and len(clusters) == 1 else clusters
    if accuracy is not None and is_number(count) and accuracy < CHANCE / count:
        found.append(f"{run.name}: {percent(accuracy)} of masked frames is hardly above chance ({percent(1 / count)}): train for more steps, or raise the learning rate.")
    skipped = run.last("train/skipped_steps")
    if skipped:
        found.append(f"{run.name}: {counted(skipped, 'step')} had no finite gradient and was skipped: lower the learning rate, or compute in bf16 or float32.")
    if run.status == "interrupted" and run.step:
        found.append(f"{run.name}: the run ended at step {number(run.step)} before it was finished: the same `hubert fit` command resumes it.")
    perplexity, labels = run.last("units/predicted_perplexity"), run.last("units/label_perplexity")
    if perplexity is not None and labels and perplexity < 0.25 * labels:
        found.append(f"{run.name}: predictions use few clusters (perplexity {perplexity:.3g}, labels {labels:.3g}): the model is undertrained, or has collapsed.")
    return found


def _of_speed(run: Run) -> list[str]:
    curve = run.curves.get("speed/data_wait")
    if curve and (wait := median(value for _, value in curve)) > 0.15:
        return [f"{run.name}: {percent(wait, 0)} of the time is spent waiting for data: raise data.init_args.num_workers, or put the audio on a faster disk."]
    return []


def _of_layers(runs: Sequence[Run], layers: Sequence[tuple[str, int, float]]) -> list[str]:
    found = []
    for title, layer, value in layers:
        used = [
            run.record.get("labels/layer")
            for run in runs
            if is_number(run.record.get("labels/layer")) and title.rpartition("/")[0] == run.name.rpartition("/")[0] and run.name > title
        ]
        if used and used[0] != layer:
            found.append(f"{title}: layer {layer} agrees best with phones (PNMI {value:.3f}), and the next iteration used layer {used[0]}: try `layer: {layer}`.")
    return found


def _of_errors(item: Scored) -> list[str]:
    scores = item.tested.scores
    words, letters = scores.words, scores.letters
    found = []
    greedy = item.results.decoder == "greedy"
    if greedy and words.rate > 0.03 and letters.rate < 0.5 * words.rate and letters.rate < 0.3:
        found.append(f"{item.title}: {percent(letters.rate)} of the characters are wrong, but {percent(words.rate)} of the words: decode with a language model (`hubert ngram`, `hubert tune-decoder`).")
    if words.errors >= 20 and words.deletions > 0.6 * words.errors:
        found.append(f"{item.title}: {percent(words.deletions / words.errors, 0)} of the errors are missing words: train for longer or on more transcripts; with a decoder, raise word_score.")
    if words.errors >= 20 and words.insertions > 0.4 * words.errors:
        found.append(f"{item.title}: {percent(words.insertions / words.errors, 0)} of the errors are added words: with a decoder, lower word_score; otherwise check the silences of the recordings.")
    if scores.speakers and len(scores.speakers) > 2 and words.rate:
        name, worst = next(iter(scores.speakers.items()))
        if worst.words.low > words.high:
            found.append(f"{item.title}: speaker {name} has {percent(worst.words.rate)} errors, against {percent(words.rate)} of all: listen to the recordings of this speaker, and add similar ones to the training data.")
    width = words.high - words.low
    if width == width and words.rate and width > 0.5 * words.rate:
        found.append(f"{item.title}: the interval of {interval(words.low, words.high)} is wide: differences below {percent(width / 2)} cannot be seen on {counted(words.total, 'word')}; test on more speech.")
    pairs = confusions(scores.utterances).substitutions.most_common(1)
    if pairs and words.errors >= 20 and pairs[0][1] >= max(5, 0.1 * words.errors):
        (said, heard), count = pairs[0]
        found.append(f"{item.title}: “{said}” became “{heard}” {number(count)} times, the most frequent confusion: check how both are written in the transcripts.")
    return found
