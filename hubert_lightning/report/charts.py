"""Charts of a page: data for plotly.js. The page sets the colours of text and background, in light and dark."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go

from hubert_lightning.features.spectrogram import MELS, mel_band
from hubert_lightning.report.run_files import Curve

SERIES = ("#3a7ebf", "#e0753b", "#3d9a6a", "#8d66cc", "#cf4f63", "#2a9da6", "#b38a24", "#7b8794")
"""Colours of runs, distinct on white and on black."""
MAX_POINTS = 500
"""Points of a curve; of a longer one, means of neighbours are drawn."""
MAX_WORDS = 24
"""Rows and columns of a confusion matrix."""
INVISIBLE = re.compile(r"[\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\x00-\x1f\x7f-\x9f]")
"""Control characters, and those that reverse the order of the text after them."""


@dataclass(frozen=True)
class Chart:
    """A chart.

    Args:
        title: Heading above the chart.
        figure: plotly's JSON.
        height: Height in pixels.
        min_width: Width in pixels below which the chart scrolls sideways.
        note: Sentence below the chart.
        clip: Key of the recording whose position moves through the chart.
    """

    title: str
    figure: dict[str, Any]
    height: int = 260
    min_width: int = 0
    note: str = ""
    clip: str | None = None


@dataclass(frozen=True)
class Line:
    """A curve with its name and colour.

    Args:
        name: Name that the pointer shows.
        points: Steps and values.
        colour: Colour.
        dash: "solid" for validation, "dot" for training.
        markers: Whether points are marked.
    """

    name: str
    points: Curve
    colour: str
    dash: str = "solid"
    markers: bool = False


@dataclass(frozen=True)
class Interval:
    """A rate with its confidence interval.

    Args:
        name: Name beside the rate.
        rate: Rate, as a fraction.
        low: Lower bound, NaN if unknown.
        high: Upper bound.
        note: Text that the pointer shows.
        colour: Colour.
    """

    name: str
    rate: float
    low: float = math.nan
    high: float = math.nan
    note: str = ""
    colour: str = SERIES[0]


def plain(text: str, longest: int = 60) -> str:
    """Escape a text for plotly, which takes some tags as formats, and remove line breaks and reversing characters."""
    text = INVISIBLE.sub(" ", text)
    return html.escape(text if len(text) <= longest else f"{text[: longest - 1]}…", quote=False)


def _distinct(names: Sequence[str]) -> list[str]:
    """Number names that are equal when they are shortened: plotly.js draws equal names in one place."""
    return [
        f"{name} ({names[:place].count(name) + 1})" if name in names[:place] else name
        for place, name in enumerate(names)
    ]


def _chart(
    title: str, traces: Sequence[go.Scatter | go.Heatmap | go.Bar], layout: Mapping[str, Any], **options: Any
) -> Chart:
    figure = go.Figure(data=list(traces), layout={"template": None, **layout})
    return Chart(title, figure.to_plotly_json(), **options)


def thinned(curve: Curve, most: int = MAX_POINTS) -> Curve:
    """Reduce a long curve to means of neighbouring points."""
    if len(curve) <= most:
        return curve
    return [
        (int(part[-1][0]), float(np.mean([value for _, value in part])))
        for part in (curve[start:stop] for start, stop in _bounds(len(curve), most))
    ]


def _bounds(length: int, parts: int) -> list[tuple[int, int]]:
    edges = np.linspace(0, length, parts + 1).round().astype(int).tolist()
    return [*pairwise(edges)]


def line_chart(
    title: str, lines: Sequence[Line], unit: str = "", percent: bool = False, log: bool = False, last: int = 0
) -> Chart:
    """Draw curves over optimizer steps.

    Args:
        title: Heading.
        lines: Curves.
        unit: Unit of the values.
        percent: Whether the values are fractions to show in per cent.
        log: Whether the axis is logarithmic.
        last: Step up to which the axis reaches at least.
    """
    traces = []
    for line in lines:
        points = thinned(line.points)
        traces.append(
            go.Scatter(
                x=[step for step, _ in points],
                y=[value for _, value in points],
                name=plain(line.name),
                mode="lines+markers" if line.markers or len(points) < 3 else "lines",
                line={"color": line.colour, "width": 1.4 if line.dash == "dot" else 2.2, "dash": line.dash},
                marker={"size": 5},
                hovertemplate=f"%{{y{':.1%' if percent else ':.4~g'}}} {unit}<extra>%{{fullData.name}}</extra>",
            )
        )
    last = max([last, *(step for line in lines for step, _ in line.points)])
    axis: dict[str, Any] = {"tickformat": ".0%" if percent else ".3~g"}
    axis |= {"type": "log", "dtick": "D2"} if log else {"rangemode": "tozero"} if percent else {}
    if unit:
        axis["title"] = {"text": unit}
    return _chart(
        title,
        traces,
        {
            "xaxis": {"title": {"text": "optimizer step"}, "hoverformat": ",d", "range": [0, 1.03 * last]},
            "yaxis": axis,
            "hovermode": "x unified",
        },
    )


def layer_chart(
    title: str, lines: Sequence[Line], references: Sequence[tuple[str, float, str]] = (), unit: str = ""
) -> Chart:
    """Draw a measure over layers.

    Args:
        title: Heading.
        lines: Curves over layers, counted from 1.
        references: Values to compare with: name, value, colour.
        unit: Name of the measure on its axis.
    """
    traces = [
        go.Scatter(
            x=[layer for layer, _ in line.points],
            y=[value for _, value in line.points],
            name=plain(line.name),
            mode="lines+markers",
            line={"color": line.colour, "width": 2.2, "dash": line.dash},
            marker={"size": 7},
            hovertemplate="%{y:.3f}<extra>%{fullData.name}</extra>",
        )
        for line in lines
    ]
    layers = [layer for line in lines for layer, _ in line.points] or [1]
    for name, value, colour in references:
        traces.append(
            go.Scatter(
                x=[min(layers) - 0.3, max(layers) + 0.3],
                y=[value, value],
                name=plain(name),
                mode="lines",
                line={"color": colour, "width": 1.4, "dash": "dash"},
                hovertemplate="%{y:.3f}<extra>%{fullData.name}</extra>",
            )
        )
    ticks = {"dtick": 1} if max(layers) <= 24 else {}
    return _chart(
        title,
        traces,
        {
            "xaxis": {"title": {"text": "layer"}, **ticks},
            "yaxis": {"title": {"text": unit}, "rangemode": "tozero"},
            "hovermode": "closest",
        },
        height=300,
    )


def interval_chart(title: str, rows: Sequence[Interval], axis: str, note: str = "") -> Chart:
    """Draw rates with confidence intervals, one below the other.

    Args:
        title: Heading.
        rows: Rates, the first one on top.
        axis: Title of the axis.
        note: Sentence below the chart.
    """
    names = [plain(row.name, 28) for row in rows]
    known = [not math.isnan(row.low) for row in rows]
    trace = go.Scatter(
        x=[row.rate for row in rows],
        y=[*range(len(rows))],
        mode="markers",
        marker={"size": 9, "color": [row.colour for row in rows]},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [row.high - row.rate if ok else 0 for row, ok in zip(rows, known, strict=True)],
            "arrayminus": [row.rate - row.low if ok else 0 for row, ok in zip(rows, known, strict=True)],
            "thickness": 1.4,
            "width": 4,
            "color": SERIES[-1],
        },
        customdata=[[plain(row.name, 80), plain(row.note, 160), _range_text(row)] for row in rows],
        hovertemplate="%{customdata[0]}: %{x:.1%}%{customdata[2]}<br>%{customdata[1]}<extra></extra>",
    )
    return _chart(
        title,
        [trace],
        {
            "xaxis": {"title": {"text": axis}, "tickformat": ".0%", "rangemode": "tozero"},
            "yaxis": {
                "tickmode": "array",
                "tickvals": [*range(len(rows))],
                "ticktext": names,
                "range": [len(rows) - 0.5, -0.5],
                "automargin": True,
                "showgrid": False,
                "zeroline": False,
            },
            "hovermode": "closest",
        },
        height=90 + 24 * len(rows),
        note=note,
    )


def _range_text(row: Interval) -> str:
    return "" if math.isnan(row.low) else f" ({100 * row.low:.1f} to {100 * row.high:.1f} %)"


def bar_chart(title: str, values: Mapping[str, float], axis: str, colours: Sequence[str] = SERIES) -> Chart:
    """Draw a few named values as bars with the numbers on them."""
    trace = go.Bar(
        x=_distinct([plain(name) for name in values]),
        y=[*values.values()],
        marker={"color": [colours[number % len(colours)] for number in range(len(values))]},
        text=[f"{value:.3f}" for value in values.values()],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{x}: %{y:.4f}<extra></extra>",
        width=0.55,
    )
    return _chart(
        title, [trace], {"yaxis": {"title": {"text": axis}, "rangemode": "tozero"}, "hovermode": "closest"}, height=300
    )


def phone_cluster_chart(title: str, phones: Sequence[str], counts: Sequence[Sequence[int]], note: str = "") -> Chart:
    """Draw the share of each phone in each cluster, clusters in the order of their most common phone.

    Args:
        title: Heading.
        phones: (phones,), symbols.
        counts: (phones, clusters), frames.
        note: Sentence below the chart.
    """
    table = np.asarray(counts, dtype=float)
    rows = np.argsort(-table.sum(axis=1), kind="stable")
    rows = rows[table[rows].sum(axis=1) > 0]
    table = table[rows]
    used = np.flatnonzero(table.sum(axis=0) > 0)
    share = table[:, used] / table[:, used].sum(axis=0)
    order = sorted(range(len(used)), key=lambda column: (int(share[:, column].argmax()), -share[:, column].max()))
    names = [plain(phones[row]) for row in rows]
    trace = go.Heatmap(
        z=np.round(share[:, order], 3).tolist(),
        x=[*range(len(order))],
        y=names,
        customdata=[[int(used[column]) for column in order]] * len(names),
        meta="sequential",
        zmin=0,
        zmax=1,
        hovertemplate="cluster %{customdata}: %{z:.0%} of its frames are %{y}<extra></extra>",
        colorbar={"title": {"text": "share"}, "tickformat": ".0%", "thickness": 10, "outlinewidth": 0},
    )
    layout = {
        "xaxis": {
            "title": {"text": f"{len(order)} clusters, ordered by their phone"},
            "showticklabels": False,
            "showgrid": False,
        },
        "yaxis": {"autorange": "reversed", "showgrid": False, "dtick": 1, "tickfont": {"size": 10}},
        "hovermode": "closest",
    }
    return _chart(title, [trace], layout, height=110 + 14 * len(names), min_width=560, note=note)


@dataclass(frozen=True)
class Units:
    """Units of an utterance over its spectrogram.

    Args:
        hop: Seconds between frames.
        duration: Seconds.
        image: Data URI of the spectrogram; None without recordings.
        phones: Symbol, start and end in seconds of each phone.
        rows: Clusters of each frame by the name of their row: labels and predictions of each stream.
        mask: First frame and number of frames of each masked span.
        clip: Key of the recording.
    """

    hop: float
    duration: float
    image: str | None
    phones: Sequence[tuple[str, float, float]]
    rows: Mapping[str, Sequence[int]]
    mask: Sequence[tuple[int, int]]
    clip: str | None = None


MASK_FILL = "rgba(224, 117, 59, 0.24)"
MASK_EDGE = {"color": SERIES[1], "width": 1.4}
TICKS = (0.5, 1, 2, 4)
"""Frequencies beside a spectrogram, in kHz."""
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
HUES = [[number / 12, f"hsl({30 * number}, 42%, {66 if number % 2 else 50}%)"] for number in range(13)]
"""A circle of hues: neighbouring cluster ids are far apart on it."""


def units_chart(title: str, units: Units) -> Chart:
    """Draw phones, labels and predictions below a spectrogram, with the masked spans."""
    num_rows = len(units.rows)
    band = 0.42 if units.image else 0.0
    bottom_top = 1 - band - (0.03 if band else 0)
    phones_height = 0.12 if units.phones else 0.0
    traces: list[Any] = []
    layout: dict[str, Any] = {"hovermode": "closest", "showlegend": False}
    layout["xaxis"] = {
        "title": {"text": "seconds"},
        "range": [0, units.duration],
        "showgrid": False,
        "zeroline": False,
        "anchor": "y",
    }
    heat = [[(cluster * GOLDEN_RATIO) % 1 for cluster in row] for row in units.rows.values()]
    traces.append(
        go.Heatmap(
            z=[[round(value, 3) for value in row] for row in heat],
            x0=units.hop / 2,
            dx=units.hop,
            y=[*units.rows],
            customdata=[list(row) for row in units.rows.values()],
            colorscale=HUES,
            zmin=0,
            zmax=1,
            showscale=False,
            ygap=3,
            hovertemplate="%{y}: cluster %{customdata} at %{x:.2f} s<extra></extra>",
        )
    )
    layout["yaxis"] = {
        "domain": [0, bottom_top - phones_height],
        "autorange": "reversed",
        "showgrid": False,
        "fixedrange": True,
        "automargin": False,
    }
    if units.phones:
        shown = [phone for phone in units.phones if phone[2] > phone[1]]
        traces.append(
            go.Scatter(
                x=[(start + end) / 2 for _, start, end in shown],
                y=[0.5] * len(shown),
                text=[plain(symbol, 6) for symbol, _, _ in shown],
                customdata=[f"{start:.2f} to {end:.2f} s" for _, start, end in shown],
                mode="text",
                textfont={"size": 10},
                yaxis="y2",
                hovertemplate="%{text}, %{customdata}<extra></extra>",
            )
        )
        layout["yaxis2"] = {
            "domain": [bottom_top - phones_height, bottom_top],
            "range": [0, 1],
            "tickmode": "array",
            "tickvals": [0.5],
            "ticktext": ["phones"],
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        }
    shapes: list[dict[str, Any]] = [
        {
            "type": "line",
            "xref": "x",
            "yref": "y2 domain",
            "x0": end,
            "x1": end,
            "y0": 0.1,
            "y1": 0.9,
            "line": {"width": 0.6, "color": SERIES[-1]},
        }
        for _, _, end in units.phones
    ]
    for first, length in units.mask:
        span = {
            "type": "rect",
            "xref": "x",
            "yref": "paper",
            "x0": first * units.hop,
            "x1": (first + length) * units.hop,
        }
        shapes.append({**span, "y0": bottom_top - phones_height, "y1": 1, "fillcolor": MASK_FILL, "line": {"width": 0}})
        shapes.append({**span, "y0": 0, "y1": 1, "line": MASK_EDGE})
    if units.image:
        traces.append(go.Scatter(x=[0], y=[0], mode="markers", marker={"opacity": 0}, yaxis="y3", hoverinfo="skip"))
        layout["yaxis3"] = {
            "domain": [1 - band, 1],
            "range": [0, MELS],
            "title": {"text": "kHz"},
            "tickvals": [mel_band(1000 * kilohertz) for kilohertz in TICKS],
            "ticktext": [*map(str, TICKS)],
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        }
        layout["images"] = [
            {
                "source": units.image,
                "xref": "x",
                "yref": "y3",
                "x": 0,
                "y": MELS,
                "sizex": units.duration,
                "sizey": MELS,
                "sizing": "stretch",
                "layer": "below",
            }
        ]
    layout["shapes"] = shapes
    layout["margin"] = {"l": 92, "r": 12, "t": 8, "b": 40}
    height = 70 + (150 if units.image else 0) + (30 if units.phones else 0) + 34 * num_rows
    return _chart(
        title, traces, layout, height=height, min_width=min(1600, int(180 + 130 * units.duration)), clip=units.clip
    )


def confusion_chart(title: str, rows: Sequence[str], columns: Sequence[str], counts: Sequence[Sequence[int]]) -> Chart:
    """Draw how often each word of the references became each word of the hypotheses."""
    trace = go.Heatmap(
        z=[list(row) for row in counts],
        x=_distinct([plain(name, 18) for name in columns]),
        y=_distinct([plain(name, 18) for name in rows]),
        meta="sequential",
        xgap=1,
        ygap=1,
        text=[[str(count) if count else "" for count in row] for row in counts],
        texttemplate="%{text}",
        hovertemplate="%{y} became %{x}: %{z}<extra></extra>",
        showscale=False,
    )
    layout = {
        "xaxis": {
            "title": {"text": "became"},
            "tickangle": -55,
            "showgrid": False,
            "automargin": True,
            "type": "category",
        },
        "yaxis": {
            "title": {"text": "said"},
            "autorange": "reversed",
            "showgrid": False,
            "automargin": True,
            "type": "category",
        },
        "hovermode": "closest",
    }
    return _chart(title, [trace], layout, height=170 + 22 * len(rows), min_width=200 + 26 * len(columns))


def scatter_chart(
    title: str,
    points: Sequence[tuple[float, float]],
    axis: str,
    best: tuple[float, float] | None,
    references: Mapping[str, float] = {},
) -> Chart:
    """Draw the WER of trials.

    Args:
        title: Heading.
        points: Position on the axis and WER, as a fraction, of each trial.
        axis: Title of the axis.
        best: The best trial.
        references: Rates to compare with, by name.
    """
    traces = [
        go.Scatter(
            x=[x for x, _ in points],
            y=[rate for _, rate in points],
            mode="markers",
            name="trial",
            marker={"color": SERIES[0], "size": 6, "opacity": 0.7},
            hovertemplate="%{x:.4~g}: %{y:.2%}<extra>trial</extra>",
        )
    ]
    if best:
        traces.append(
            go.Scatter(
                x=[best[0]],
                y=[best[1]],
                mode="markers",
                name="best",
                marker={"color": SERIES[1], "size": 11},
                hovertemplate="%{x:.4~g}: %{y:.2%}<extra>best</extra>",
            )
        )
    positions = [x for x, _ in points] or [0.0]
    for name, rate in references.items():
        traces.append(
            go.Scatter(
                x=[min(positions), max(positions)],
                y=[rate, rate],
                mode="lines",
                name=plain(name),
                line={"color": SERIES[-1], "dash": "dash", "width": 1.4},
                hovertemplate="%{y:.2%}<extra>%{fullData.name}</extra>",
            )
        )
    layout = {
        "xaxis": {"title": {"text": plain(axis)}},
        "yaxis": {"title": {"text": "WER"}, "tickformat": ".1%"},
        "hovermode": "closest",
    }
    return _chart(title, traces, layout)
