"""Charts of units: labels and predictions below a spectrogram, and phones by cluster."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from hubert_lightning.features.spectrogram import MELS, mel_band
from hubert_lightning.report.charts import SERIES, Chart, chart, plain

MASK_FILL = "rgba(224, 117, 59, 0.24)"
MASK_EDGE = {"color": SERIES[1], "width": 1.4}
TICKS = (0.5, 1, 2, 4)
"""Frequencies beside a spectrogram, in kHz."""
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
HUES = [[number / 12, f"hsl({30 * number}, 42%, {66 if number % 2 else 50}%)"] for number in range(13)]
"""A circle of hues: neighbouring cluster ids are far apart on it."""


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
    return chart(title, [trace], layout, height=110 + 14 * len(names), min_width=560, note=note)


def units_chart(title: str, units: Units) -> Chart:
    """Draw phones, labels and predictions below a spectrogram, with the masked spans."""
    band = 0.42 if units.image else 0.0
    top = 1 - band - (0.03 if band else 0)  # of what is below the spectrogram
    middle = top - (0.12 if units.phones else 0.0)  # of the strips of clusters
    traces = [_strips(units)]
    layout: dict[str, Any] = {
        "hovermode": "closest",
        "showlegend": False,
        "xaxis": {
            "title": {"text": "seconds"},
            "range": [0, units.duration],
            "showgrid": False,
            "zeroline": False,
            "anchor": "y",
        },
        "yaxis": {
            "domain": [0, middle],
            "autorange": "reversed",
            "showgrid": False,
            "fixedrange": True,
            "automargin": False,
        },
        "shapes": [*_phone_ends(units), *_masked_spans(units, middle)],
        "margin": {"l": 92, "r": 12, "t": 8, "b": 40},
    }
    if units.phones:
        traces.append(_phone_names(units))
        layout["yaxis2"] = {
            "domain": [middle, top],
            "range": [0, 1],
            "tickmode": "array",
            "tickvals": [0.5],
            "ticktext": ["phones"],
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        }
    if units.image:  # a trace without a mark, since plotly leaves out axes that no trace has
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
        layout["images"] = [_spectrogram(units)]
    height = 70 + (150 if units.image else 0) + (30 if units.phones else 0) + 34 * len(units.rows)
    return chart(
        title, traces, layout, height=height, min_width=min(1600, int(180 + 130 * units.duration)), clip=units.clip
    )


def _strips(units: Units) -> Any:
    """One row of coloured cells for each stream of clusters."""
    hues = [[(cluster * GOLDEN_RATIO) % 1 for cluster in row] for row in units.rows.values()]
    return go.Heatmap(
        z=[[round(hue, 3) for hue in row] for row in hues],
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


def _phone_names(units: Units) -> Any:
    phones = [phone for phone in units.phones if phone[2] > phone[1]]
    return go.Scatter(
        x=[(start + end) / 2 for _, start, end in phones],
        y=[0.5] * len(phones),
        text=[plain(symbol, 6) for symbol, _, _ in phones],
        customdata=[f"{start:.2f} to {end:.2f} s" for _, start, end in phones],
        mode="text",
        textfont={"size": 10},
        yaxis="y2",
        hovertemplate="%{text}, %{customdata}<extra></extra>",
    )


def _phone_ends(units: Units) -> list[dict[str, Any]]:
    line = {"type": "line", "xref": "x", "yref": "y2 domain", "y0": 0.1, "y1": 0.9}
    return [{**line, "x0": end, "x1": end, "line": {"width": 0.6, "color": SERIES[-1]}} for _, _, end in units.phones]


def _masked_spans(units: Units, middle: float) -> list[dict[str, Any]]:
    """Fill masked spans above the strips of clusters, and outline them on the strips."""
    shapes: list[dict[str, Any]] = []
    for first, length in units.mask:
        span = {
            "type": "rect",
            "xref": "x",
            "yref": "paper",
            "x0": first * units.hop,
            "x1": (first + length) * units.hop,
        }
        shapes.append({**span, "y0": middle, "y1": 1, "fillcolor": MASK_FILL, "line": {"width": 0}})
        shapes.append({**span, "y0": 0, "y1": 1, "line": MASK_EDGE})
    return shapes


def _spectrogram(units: Units) -> dict[str, Any]:
    return {
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
