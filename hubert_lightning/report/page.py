"""A page that shows runs and their results: one HTML file with everything in it.

The page asks no other host for anything: plotly.js, pictures and recordings are inside, and its content security policy
forbids requests. Texts of transcripts and files are escaped.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from hubert_lightning import __version__
from hubert_lightning.asr.scoring import Comparison, Scores, compare
from hubert_lightning.console import progress
from hubert_lightning.errors import UserError
from hubert_lightning.files import write_whole
from hubert_lightning.report import words
from hubert_lightning.report.breakdown import Aligned, by_length, confusions, read_evaluation, worst_utterances
from hubert_lightning.report.charts import (
    MAX_WORDS,
    SERIES,
    Chart,
    Interval,
    Line,
    Units,
    bar_chart,
    confusion_chart,
    interval_chart,
    layer_chart,
    line_chart,
    phone_cluster_chart,
    scatter_chart,
    units_chart,
)
from hubert_lightning.report.clips import Clips, Place, data_uri, spectrogram
from hubert_lightning.report.run_files import (
    BEHIND_LABELS,
    MEASURED,
    OF_RUN,
    Results,
    Run,
    Tuning,
    find_runs,
    is_number,
    json_object,
)
from hubert_lightning.report.summary import BestLayer, Scored, Summary, speed_of, summarise, training_seconds
from hubert_lightning.training.watched import (
    PHONE_CLUSTERS,
    TRANSCRIPTS,
    UNITS,
    WATCHED,
    WatchedUtterance,
    read_phone_clusters,
    read_units,
)

SPEAKERS_DRAWN = 40
WORST = 20
"""Worst utterances of each test that a page shows."""
PAIRS_SHOWN = 12

PRETRAINING_CURVES = (
    ("Masked loss", "masked_loss", "nats", False),
    ("Masked accuracy", "masked_accuracy", "", True),
    ("Unmasked accuracy", "unmasked_accuracy", "", True),
)
FINETUNING_CURVES = (("Loss (CTC)", "loss", "nats per utterance", False),)


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        headings: Heading of each column.
        rows: Cells of each row, the first one its name.
        numeric: First column of numbers; None if there is none.
    """

    headings: list[str]
    rows: list[list[str]]
    numeric: int | None = None


@dataclass(frozen=True)
class WatchedUnits:
    """Watched utterances of a run.

    Args:
        run: Name of the run.
        step: Optimizer steps before the validation.
        utterances: Heading, text, and chart of each utterance.
    """

    run: str
    step: int
    utterances: list[tuple[str, str, Chart]]


@dataclass(frozen=True)
class Worst:
    """An utterance with many errors.

    Args:
        aligned: The utterance with its errors marked.
        clip: Key of its recording, if the page has it.
    """

    aligned: Aligned
    clip: str | None

    @property
    def counts(self) -> str:
        """Its errors."""
        row = self.aligned.utterance
        return f"{words.counted(row.words.errors, 'error')} in {words.counted(row.words.total, 'word')}"


@dataclass(frozen=True)
class Detail:
    """Errors of one test, broken down.

    Args:
        title: Run, test set and decoder.
        anchor: Id of the part.
        numbers: Errors by kind.
        speakers: Chart of the speakers, if they are known.
        lengths: Chart of the lengths.
        confusion: Confusion matrix, if there are substitutions.
        pairs: The most frequent errors.
        worst: Utterances with most errors.
    """

    title: str
    anchor: str
    numbers: Table
    speakers: Chart | None
    speaker_table: Table | None
    lengths: Chart | None
    confusion: Chart | None
    pairs: list[tuple[str, Table]]
    unit: str
    worst: list[Worst]


@dataclass
class Page:
    """Content of a page; empty parts are left out.

    Args:
        title: Title.
        subtitle: What the page covers.
        summary: Numbers and sentences.
        legend: Name and colour of each run.
        legend_of_layers: Name and colour of each run whose layers were judged.
        lines_of_layers: Meaning of dotted and dashed lines over layers.
        facts: What was trained on what.
        differences: Settings that differ between runs of a task, by the task.
        settings: All settings of each run.
        curves: Task, colours of its runs, and charts over steps.
        units: Watched utterances.
        phones: Phones in clusters.
        layers: Charts over layers.
        speed: Charts and a table of speed and cost.
        rates: Chart and table of error rates.
        details: Errors of each test, broken down.
        tunings: Charts of each tuning of a decoder.
        remarks: What could not be read or was left out.
    """

    title: str
    subtitle: str
    summary: Summary
    legend: list[tuple[str, str]] = field(default_factory=list)
    legend_of_layers: list[tuple[str, str]] = field(default_factory=list)
    lines_of_layers: str = ""
    facts: Table | None = None
    differences: list[tuple[str, Table]] = field(default_factory=list)
    settings: list[tuple[str, Table]] = field(default_factory=list)
    curves: list[tuple[str, list[tuple[str, str]], list[Chart]]] = field(default_factory=list)
    units: list[WatchedUnits] = field(default_factory=list)
    phones: list[Chart] = field(default_factory=list)
    layers: list[Chart] = field(default_factory=list)
    speed: list[Chart] = field(default_factory=list)
    speed_table: Table | None = None
    rates: Chart | None = None
    rates_table: Table | None = None
    comparisons: Table | None = None
    details: list[Detail] = field(default_factory=list)
    tunings: list[tuple[str, str, list[Chart]]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def write_report(runs: Sequence[Path], output: Path, *, audio: bool = True, title: str | None = None) -> None:
    """Write a page that shows runs: what they trained, how well and how fast.

    Args:
        runs: Folders of runs, or folders that hold such folders.
        output: HTML file to write.
        audio: Whether recordings go into the page.
        title: Title of the page; made from the names of the folders if not given.

    Raises:
        UserError: A folder does not exist or holds no run, or the page cannot be written.
    """
    found = find_runs(runs)
    clips = Clips(audio)
    names = words.listing([Path(folder).resolve().name for folder in runs])
    with progress("reading results", len(found) + 1, "runs") as advance:
        scored, remarks = _scored_runs(found, advance)
        page = _page_of(found, scored, _demo_pnmi(runs) or _pnmi_of(found), clips, title or names, remarks)
        advance()
    _write(output, page, clips)


def write_score_page(
    results: Path, output: Path, *, against: Path | None = None, audio: bool = True, worst: int = WORST
) -> None:
    """Write a page that shows the results of one test, or of two systems.

    Args:
        results: JSON lines of `hubert test`.
        output: HTML file to write.
        against: Results of a second system for the same utterances.
        audio: Whether recordings go into the page.
        worst: Number of utterances to show, those with most errors first.

    Raises:
        UserError: The results cannot be read or the page cannot be written.
    """
    clips = Clips(audio)
    scored = []
    paths = [results] if against is None else [results, against]
    for path, name in zip(paths, words.distinct_names([*map(Path, paths)]), strict=True):
        origin = Results.of(path)
        scored.append(Scored(name, None, origin, read_evaluation(path, origin.origin)))
    page = _page_of([], scored, {}, clips, words.listing([item.title for item in scored]), [], worst)
    _write(output, page, clips)


def _scored_runs(runs: Sequence[Run], advance: Any) -> tuple[list[Scored], list[str]]:
    """Score the results of all runs; of a fine-tuning without a test, the transcripts of its newest validation."""
    scored, remarks = [], []
    for run in runs:
        for results in run.results or _validation_of(run):
            title = f"{run.name}, {results.name}"
            if results.origin:
                title = f"{run.name} on {results.manifest}, {results.decoder}"
            try:
                scored.append(Scored(title, run, results, read_evaluation(results.path, results.origin)))
            except UserError as error:
                remarks.append(f"{error}.")
        advance()
    return scored, remarks


def _validation_of(run: Run) -> list[Results]:
    path = run.folder / WATCHED / TRANSCRIPTS
    return [Results(path, f"validation at step {words.number(run.step)}", {})] if path.is_file() else []


def _demo_pnmi(folders: Sequence[Path]) -> dict[str, float]:
    """PNMI of MFCC and of each iteration, as a demo measures it on held-out speakers."""
    for folder in folders:
        pnmi = json_object(Path(folder) / "results.json", []).get("pnmi")
        if isinstance(pnmi, dict):
            titles = {"mfcc": "MFCC", "iteration1": "iteration 1", "iteration2": "iteration 2"}
            return {titles.get(name, str(name)): float(value) for name, value in pnmi.items() if is_number(value)}
    return {}


def _pnmi_of(runs: Sequence[Run]) -> dict[str, float]:
    """PNMI of the labels of each run, as labelling measured it."""
    values = {run.name: run.record.get("labels/pnmi") for run in runs}
    return {f"labels of {name}": float(value) for name, value in values.items() if is_number(value)}


def _page_of(
    runs: Sequence[Run],
    scored: Sequence[Scored],
    pnmi: Mapping[str, float],
    clips: Clips,
    title: str,
    remarks: list[str],
    worst: int = WORST,
) -> Page:
    colours = {run.name: SERIES[number % len(SERIES)] for number, run in enumerate(runs)}
    layers, best_layers = _layer_charts(runs, colours, pnmi)
    page = Page(title, _subtitle(runs, scored), summarise(runs, scored, pnmi, best_layers))
    page.legend = [*colours.items()] if len(runs) > 1 else []
    page.layers = layers
    kinds = {kind for run in runs for kind in run.layers}
    page.legend_of_layers = [(run.name, colours[run.name]) for run in runs if run.layers]
    lines = {BEHIND_LABELS: "dotted: the model behind the labels of the run", MEASURED: "dashed: hubert quality, MFCC"}
    page.lines_of_layers = " · ".join(text for kind, text in lines.items() if kind in kinds)
    _add_settings(page, runs)
    for task in ("pre-training", "fine-tuning", "run"):
        members = [run for run in runs if run.task == task]
        if charts := _curves(members, colours):
            page.curves.append((task, [(run.name, colours[run.name]) for run in members], charts))
    _add_units(page, runs, clips)
    _add_speed(page, runs, colours)
    _add_rates(page, scored, colours)
    page.details = [_detail(item, number, clips, worst) for number, item in enumerate(scored)]
    page.tunings = [_tuning(run.name, tuning) for run in runs for tuning in run.tunings]
    page.remarks = [*remarks, *(f"{problem}." for run in runs for problem in run.problems)]
    if clips.missing:
        page.remarks.append(
            f"{words.counted(len(clips.missing), 'recording')} could not be read, among them "
            f"{words.short_path(min(clips.missing))}; it may have been moved."
        )
    if clips.left_out:
        page.remarks.append(
            f"{words.counted(clips.left_out, 'recording')} would have made the page too large and were left out."
        )
    if not clips.audio:
        page.remarks.append(
            "Recordings and spectrograms were left out (--no-audio). Transcripts and names of speakers are in the page."
        )
    return page


def _subtitle(runs: Sequence[Run], scored: Sequence[Scored]) -> str:
    counts = [
        words.counted(sum(run.task == task for run in runs), f"{task} run")
        for task in ("pre-training", "fine-tuning")
        if any(run.task == task for run in runs)
    ]
    if scored:
        counts.append(words.counted(len(scored), "set of results", "sets of results"))
    return words.listing(counts) if counts else words.counted(len(runs), "run")


def _add_settings(page: Page, runs: Sequence[Run]) -> None:
    if not runs:
        return
    facts = [words.facts(run) for run in runs]
    names = [*dict.fromkeys(name for row in facts for name in row)]
    order = [name for name in _FACTS_ORDER if name in names] + [name for name in names if name not in _FACTS_ORDER]
    page.facts = Table(
        ["", *(run.name for run in runs)], [[name, *(row.get(name, "–") for row in facts)] for name in order]
    )
    for task, group in groupby(runs, key=lambda run: run.task):
        members = [*group]
        keys = [*dict.fromkeys(key for run in members for key in run.record if not words.is_place(key))]
        values = {key: [words.setting(run.record.get(key)) for run in members] for key in sorted(keys)}
        different = {key: row for key, row in values.items() if len(set(row)) > 1}
        different = dict(sorted(different.items(), key=lambda item: "fingerprint" in item[0]))  # those say least
        same = {key: row for key, row in values.items() if key not in different}
        headings = ["", *(run.name for run in members)]
        if different:
            page.differences.append((task, Table(headings, [[key, *row] for key, row in different.items()])))
        if same:
            label = members[0].name if len(members) == 1 else f"equal in all {task} runs"
            page.settings.append((label, Table(["", "value"], [[key, row[0]] for key, row in same.items()])))


_FACTS_ORDER = (
    "task", "state", "training data", "manifests", "validation data", "targets", "PNMI of the targets",
    "K-means inertia", "initial weights", "encoder", "parameters", "optimizer", "warm-up", "batch", "masks",
    "precision", "devices", "seed", "version",
)  # fmt: skip


def _curves(runs: Sequence[Run], colours: Mapping[str, str]) -> list[Chart]:
    """Draw the curves of runs of one task."""
    if not runs:
        return []
    charts, last = [], max(run.step for run in runs)

    def lines(*metrics: tuple[str, str, str]) -> list[Line]:
        """Lines of all runs, from the name, the title and the dash of each metric."""
        return [
            Line(
                f"{run.name} {label}".strip(),
                curve,
                colours[run.name],
                dash,
                markers=dash == "solid" and len(curve) <= 40,
            )
            for metric, label, dash in metrics
            for run in runs
            if (curve := run.curves.get(metric))
        ]

    def add(title: str, drawn: list[Line], **options: Any) -> None:
        if drawn:
            charts.append(line_chart(title, drawn, last=last, **options))

    for title, metric, unit, percent in PRETRAINING_CURVES if runs[0].task == "pre-training" else FINETUNING_CURVES:
        pair = (f"train/{metric}", "training", "dot"), (f"val/{metric}", "validation", "solid")
        add(title, lines(*pair), unit=unit, percent=percent)
    add("Word error rate", lines(("val/wer", "validation", "solid")), percent=True)
    add("Character error rate", lines(("val/cer", "validation", "solid")), percent=True)
    both = ("label", "labels", "dot"), ("predicted", "predictions", "solid")
    add(
        "Perplexity of the units",
        lines(*((f"units/{kind}_perplexity", label, dash) for kind, label, dash in both)),
        unit="clusters",
    )
    add(
        "Clusters in use", lines(*((f"units/{kind}_coverage", label, dash) for kind, label, dash in both)), percent=True
    )
    add("Learning rate", lines(("train/learning_rate", "", "solid")))
    add("Gradient norm", lines(("train/gradient_norm", "", "solid")), log=True)
    return charts


def _add_units(page: Page, runs: Sequence[Run], clips: Clips) -> None:
    for run in runs:
        try:
            units = read_units(run.folder)
        except (UserError, OSError) as error:
            page.remarks.append(f"{run.folder / WATCHED / UNITS}: {error}.")
            units = None
        if units and units.utterances:
            drawn = [_watched(utterance, units.hop, clips) for utterance in units.utterances]
            page.units.append(WatchedUnits(run.name, units.step, drawn))
        try:
            phones = read_phone_clusters(run.folder)
        except (UserError, OSError) as error:
            page.remarks.append(f"{run.folder / WATCHED / PHONE_CLUSTERS}: {error}.")
            phones = None
        if phones and any(map(any, phones.counts)):
            state = f"step {words.number(phones.step)}" if phones.step else "labels"
            page.phones.append(phone_cluster_chart(f"{run.name}, {state}", phones.phones, phones.counts))


def _watched(utterance: WatchedUtterance, hop: float, clips: Clips) -> tuple[str, str, Chart]:
    place = None
    if utterance.source is not None:
        place = Place(utterance.source, utterance.channel, utterance.start, utterance.duration)
    samples = clips.samples(place) if place else None
    image = None if samples is None else data_uri("image/webp", spectrogram(samples))
    rows = {}
    for kind, streams in (("labels", utterance.labels), ("predicted", utterance.predictions)):
        for number, clusters in enumerate(streams, start=1):
            rows[f"{kind} {number}" if len(streams) > 1 else kind] = clusters
    heading = utterance.id + (f", speaker {utterance.speaker}" if utterance.speaker else "")
    chart = units_chart(
        heading,
        Units(hop, utterance.duration, image, utterance.phones or [], rows, utterance.mask, clips.add(place)),
    )
    return heading, utterance.text or "", chart


def _layer_charts(
    runs: Sequence[Run], colours: Mapping[str, str], pnmi: Mapping[str, float]
) -> tuple[list[Chart], list[BestLayer]]:
    """Draw the quality of layers of all runs together.

    Returns:
        The charts, and the best layer of each run whose layers were judged by phones.
    """
    charts, best = [], []
    if pnmi:
        charts.append(bar_chart("Agreement of clusters with phones", pnmi, "PNMI", [SERIES[-1], SERIES[1], SERIES[0]]))
    titles = {
        "pnmi": ("Agreement with phones", "PNMI"),
        "phone_purity": ("Phone purity", "share of frames"),
        "perplexity": ("Perplexity of each layer's clusters", "clusters"),
    }
    for measure, (title, unit) in titles.items():
        lines, references = [], []
        for run in runs:
            for kind, rows in run.layers.items():
                name = run.name if kind == OF_RUN else f"{run.name}, {kind}"
                points = [(int(row["layer"]), float(row[measure])) for row in rows if is_number(row.get(measure))]
                mfcc = [value for layer, value in points if layer == 0]
                points = [point for point in points if point[0] > 0]
                if not points:
                    continue
                dash = "solid" if kind == OF_RUN else "dash" if kind == MEASURED else "dot"
                lines.append(Line(name, points, colours[run.name], dash))
                if mfcc:
                    references.append(("MFCC", mfcc[0], SERIES[-1]))
                if measure == "pnmi":
                    layer, value = max(points, key=lambda point: point[1])
                    if kind != BEHIND_LABELS:
                        best.append(BestLayer(run.name, run.folder, layer, value))
        if lines:
            charts.append(layer_chart(title, lines, references[:1], unit))
    return charts, best


def _add_speed(page: Page, runs: Sequence[Run], colours: Mapping[str, str]) -> None:
    charts = []
    for title, metric, unit, percent in (
        ("Audio per second", "speed/audio_seconds_per_second", "s of audio per second", False),
        ("Time waiting for data", "speed/data_wait", "", True),
        ("Model FLOPs utilisation (MFU)", "speed/mfu", "", True),
        ("Memory", "speed/memory_gib", "GiB", False),
        ("Audio cropped away or padded", "speed/waste", "", True),
    ):
        lines = [Line(run.name, run.curves[metric], colours[run.name]) for run in runs if run.curves.get(metric)]
        if lines:
            charts.append(line_chart(title, lines, unit=unit, percent=percent))
    page.speed = charts
    rows = []
    for run in runs:
        spent, speed = training_seconds(run), speed_of(run)
        last = {name: run.last(f"speed/{name}") for name in ("data_wait", "mfu", "memory_gib")}
        labelling = json_object(run.folder / "labelling.json", [])
        labelled, labelling_speed = labelling.get("seconds"), labelling.get("hours_per_hour")
        cells = [
            "–" if speed is None else f"{words.number(round(speed))}×",
            "–" if spent is None else f"{'about ' if spent[1] else ''}{words.duration(spent[0])}",
            "–" if spent is None or speed is None else words.hours(spent[0] * speed / 3600),
            *("–" if last[name] is None else words.percent(last[name] or 0, 0) for name in ("data_wait", "mfu")),
            "–" if last["memory_gib"] is None else f"{last['memory_gib']:.2f} GiB",
            words.duration(labelled) if is_number(labelled) else "–",
            f"{words.number(round(labelling_speed))}×" if is_number(labelling_speed) else "–",
            words.setting(run.record.get("world_size")),
        ]
        if any(cell != "–" for cell in cells[:-1]):
            rows.append([run.name, *cells])
    headings = [
        "",
        "speed",
        "training time",
        "audio processed",
        "data wait",
        "MFU",
        "memory",
        "labelling",
        "speed of labelling",
        "devices",
    ]
    used = [0, *(column for column in range(1, len(headings)) if any(row[column] != "–" for row in rows))]
    if rows:
        page.speed_table = Table(
            [headings[column] for column in used], [[row[column] for column in used] for row in rows], numeric=1
        )


def _add_rates(page: Page, scored: Sequence[Scored], colours: Mapping[str, str]) -> None:
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


def _detail(item: Scored, number: int, clips: Clips, most: int) -> Detail:
    scores = item.evaluation.scores
    counted = confusions(scores.utterances)
    speakers = [*scores.speakers.items()]
    speaker_chart = speaker_table = None
    if len(speakers) > 1:
        note = (
            f"{words.counted(len(speakers) - SPEAKERS_DRAWN, 'speaker')} with fewer errors are in the table."
            if len(speakers) > SPEAKERS_DRAWN
            else ""
        )
        speaker_chart = interval_chart(
            "By speaker", [_interval(name, row) for name, row in speakers[:SPEAKERS_DRAWN]], "word error rate", note
        )
        speaker_table = Table(
            ["speaker", "WER", "95 % interval", "CER", "words", "utterances"],
            [
                [
                    name,
                    words.percent(row.words.rate),
                    words.interval(row.words.low, row.words.high),
                    words.percent(row.letters.rate),
                    words.number(row.words.total),
                    words.number(len(row.utterances)),
                ]
                for name, row in speakers
            ],
            numeric=1,
        )
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
        speakers=speaker_chart,
        speaker_table=speaker_table,
        lengths=lengths,
        confusion=confusion,
        pairs=_pairs(counted),
        unit=counted.unit,
        worst=shown,
    )


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


def _pairs(counted: Any) -> list[tuple[str, Table]]:
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


def _tuning(run: str, tuning: Tuning) -> tuple[str, str, list[Chart]]:
    """Draw the trials of a decoder: WER over time and over each weight."""
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


def _write(output: Path, page: Page, clips: Clips) -> None:
    environment = Environment(
        loader=PackageLoader("hubert_lightning.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts: list[dict[str, Any]] = []

    def figure(chart: Chart) -> int:
        """Number of a chart in the page, whose data stand at its end."""
        charts.append({"figure": chart.figure, "clip": chart.clip})
        return len(charts) - 1

    loader = partial(environment.loader.get_source, environment)  # type: ignore[union-attr]
    body = environment.get_template("page.html.j2").render(
        page=page,
        figure=figure,
        version=__version__,
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        style=Markup(loader("page.css")[0]),
        script=Markup(loader("page.js")[0]),
        plotly=Markup(get_plotlyjs()),
        clips=lambda: embedded(clips.uris),
        charts=lambda: embedded(charts),
    )
    write_whole(output, body.encode(errors="replace"))  # names of files may have bytes that are no UTF-8


def embedded(content: Any) -> Markup:
    """Write JSON that may stand inside a script element: no text in it can end the element."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_listed)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else asdict(value)
