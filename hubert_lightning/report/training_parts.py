"""Parts of a page on training: curves, units, layers, and speed."""

from collections.abc import Mapping, Sequence
from typing import Any

from hubert_lightning.errors import UserError
from hubert_lightning.report import words
from hubert_lightning.report.charts import (
    SERIES,
    Chart,
    Line,
    bar_chart,
    layer_chart,
    line_chart,
)
from hubert_lightning.report.clips import Clips, Place, data_uri, spectrogram
from hubert_lightning.report.json_files import is_number, json_object
from hubert_lightning.report.parts import Page, Table, WatchedUnits
from hubert_lightning.report.run_files import BEHIND_LABELS, MEASURED, OF_RUN, Run
from hubert_lightning.report.summary import BestLayer, speed_of, training_seconds
from hubert_lightning.report.unit_charts import Units, phone_cluster_chart, units_chart
from hubert_lightning.training.watched import (
    WatchedUtterance,
    read_phone_clusters,
    read_units,
)

PRETRAINING_CURVES = (
    ("Masked loss", "masked_loss", "nats", False),
    ("Masked accuracy", "masked_accuracy", "", True),
    ("Unmasked accuracy", "unmasked_accuracy", "", True),
)
OF_LAYER = "val/masked_accuracy_layer"
"""Start of the names of the accuracies of intermediate layers."""
FINETUNING_CURVES = (("Loss (CTC)", "loss", "nats per utterance", False),)
"""Title, metric, unit, and whether the metric is a fraction, of the curves of each task."""


def curve_charts(runs: Sequence[Run], colours: Mapping[str, str]) -> list[Chart]:
    """Draw the curves of runs of one task.

    Args:
        runs: Runs of the task.
        colours: Colour of each run by its name.
    """
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
    metrics = sorted({metric for run in runs for metric in run.curves if metric.startswith(OF_LAYER)})
    of_layers = [(metric, f"layer {metric.removeprefix(OF_LAYER)}", "solid") for metric in metrics]
    add("Masked accuracy of intermediate layers, validation", lines(*of_layers), percent=True)
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


def add_units(page: Page, runs: Sequence[Run], clips: Clips) -> None:
    """Add the watched utterances, and the phones in each cluster, to a page.

    Args:
        page: Page.
        runs: Runs.
        clips: Recordings of the page.
    """
    for run in runs:
        try:
            units = read_units(run.folder)
        except (UserError, OSError) as error:
            page.remarks.append(f"{error}.")
            units = None
        if units and units.utterances:
            drawn = [_watched(utterance, units.hop, clips) for utterance in units.utterances]
            page.units.append(WatchedUnits(run.name, units.step, drawn))
        try:
            phones = read_phone_clusters(run.folder)
        except (UserError, OSError) as error:
            page.remarks.append(f"{error}.")
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


def layer_charts(
    runs: Sequence[Run], colours: Mapping[str, str], pnmi: Mapping[str, float]
) -> tuple[list[Chart], list[BestLayer]]:
    """Draw the quality of layers of all runs together.

    Args:
        runs: Runs.
        colours: Colour of each run by its name.
        pnmi: PNMI of clusters by their name.

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


def add_speed(page: Page, runs: Sequence[Run], colours: Mapping[str, str]) -> None:
    """Add the speed and the cost of runs to a page.

    Args:
        page: Page.
        runs: Runs.
        colours: Colour of each run by its name.
    """
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
