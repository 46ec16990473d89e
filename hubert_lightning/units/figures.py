"""Figures of units: labels and predictions under a spectrogram, phones by cluster, quality by layer.

A cluster has the colour of its most likely phone in every figure, where phones are known.
"""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from hubert_lightning.data.alignments import SILENCE
from hubert_lightning.features.spectrogram import MELS, SPECTROGRAM_HOP, mel_band
from hubert_lightning.figure_style import BLUE, COLOURS, COLUMN, GREY, ORANGE, PAGE, figure_style
from hubert_lightning.frames import CLOCK, SAMPLE_RATE, Clock
from hubert_lightning.units.quality import phone_purity, pnmi

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colour = tuple[float, float, float]
"""Red, green and blue from 0 to 1."""

GOLDEN = (math.sqrt(5) - 1) / 2
"""Step between the hues of neighbours, which keeps any number of them apart."""
SILENT: Colour = (0.86, 0.86, 0.86)
TICKS = (250, 500, 1000, 2000, 4000, 8000)
"""Frequencies in Hz that the axis of a spectrogram names."""
MAX_STREAMS = 3
"""Streams of labels that a figure shows."""
LETTER = 0.065
"""Width of a small letter or digit in inches."""


@dataclass(frozen=True)
class Palette:
    """Colours of clusters and phones.

    Args:
        clusters: (clusters, 3), colour of each cluster.
        phones: Colour of each phone; empty where no phones are known.
    """

    clusters: np.ndarray
    phones: dict[str, Colour] = field(default_factory=dict)


def palette(num_clusters: int, phones: Sequence[str] = (), counts: np.ndarray | None = None) -> Palette:
    """Choose colours: each phone has a hue, and a cluster has that of its most likely phone, lighter or darker.

    Args:
        num_clusters: Number of clusters.
        phones: (phones,), symbols.
        counts: (phones, clusters), frames; where not given, the hues of the clusters mean nothing.

    Returns:
        Colours of the clusters and the phones.
    """
    if counts is None or not len(phones):
        shades = [_shade(number * GOLDEN % 1, number % 3) for number in range(num_clusters)]
        return Palette(np.array(shades).reshape(-1, 3))
    by_frequency = np.argsort(-counts.sum(axis=1), kind="stable")
    heard = [phones[number] for number in by_frequency if phones[number] != SILENCE]
    hues = {symbol: rank * GOLDEN % 1 for rank, symbol in enumerate(heard)}
    colours = {symbol: _shade(hue, 0) for symbol, hue in hues.items()} | {SILENCE: SILENT}
    clusters, taken = np.full((num_clusters, 3), 0.95), dict.fromkeys(phones, 0)
    for cluster in np.argsort(-counts.sum(axis=0), kind="stable"):
        if counts[:, cluster].any():
            symbol = phones[int(counts[:, cluster].argmax())]
            shade = taken[symbol]
            taken[symbol] += 1
            clusters[cluster] = (
                [0.86 - 0.07 * (shade % 4)] * 3 if symbol == SILENCE else _shade(hues[symbol], shade % 3)
            )
    return Palette(clusters, colours)


def _shade(hue: float, number: int) -> Colour:
    saturation, value = ((0.45, 0.95), (0.65, 0.80), (0.28, 0.98))[number]
    return colorsys.hsv_to_rgb(hue, saturation, value)


@dataclass(frozen=True)
class UtteranceUnits:
    """The units of one utterance, as a figure shows them.

    Args:
        title: Names of utterance and speaker, and the like.
        subtitle: Transcript; empty if unknown.
        duration: Seconds.
        spectrogram: (bands, columns), in dB; None to show none.
        phones: Symbol, start and end in seconds of each phone; None if unknown.
        labels: (streams, frames), K-means ids.
        predictions: (streams, frames), most likely clusters.
        mask: First frame and number of frames of each masked span.
        clock: Clock of the frames.
    """

    title: str
    subtitle: str
    duration: float
    spectrogram: np.ndarray | None
    phones: Sequence[tuple[str, float, float]] | None
    labels: Sequence[Sequence[int]]
    predictions: Sequence[Sequence[int]]
    mask: Sequence[tuple[int, int]]
    clock: Clock = CLOCK

    def edge(self, frame: int) -> float:
        """Seconds from the start of the audio to the left edge of a frame's cell, which is centred on the frame."""
        return self.clock.window / 2 / SAMPLE_RATE + (frame - 0.5) * self.clock.seconds


def accuracies(units: UtteranceUnits) -> tuple[float, float]:
    """Compute the share of right predictions at masked and at unmasked frames, over all streams.

    Args:
        units: Units of an utterance.

    Returns:
        Two shares from 0 to 1; NaN where there is no such frame.
    """
    right = np.array(units.labels) == np.array(units.predictions)  # (streams, frames)
    masked = _masked_frames(units)
    shares = [right[:, frames].mean() if frames.any() else math.nan for frames in (masked, ~masked)]
    return float(shares[0]), float(shares[1])


@figure_style()
def utterance_figure(units: UtteranceUnits, palettes: Sequence[Palette]) -> "Figure":
    """Draw the spectrogram of an utterance over its phones, labels and predictions, masked spans marked.

    Args:
        units: Units of the utterance.
        palettes: (streams,), colours of each stream.

    Returns:
        The figure, wider for a longer utterance.
    """
    streams = min(len(units.labels), MAX_STREAMS)
    panels: dict[str, float] = {} if units.spectrogram is None else {"spectrogram": 1.5}
    panels |= {"masked": 0.1} | ({} if units.phones is None else {"phone": 0.24})
    for stream in range(streams):
        panels |= {f"label {stream}": 0.24, f"prediction {stream}": 0.24, f"correct {stream}": 0.1}
    width = min(max(1.6 + 1.5 * units.duration, PAGE), 14.0)
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    narrow = ConstrainedLayoutEngine(h_pad=0.01, hspace=0.02)
    figure = Figure(figsize=(width, sum(panels.values()) + 0.9), layout=narrow)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=[*panels.values()])[:, 0]
    axes: dict[str, Axes] = dict(zip(panels, rows, strict=True))
    inches = (width - 1.0) / units.duration  # of a second
    if units.spectrogram is not None:
        _draw_spectrogram(axes["spectrogram"], units)
    masked = np.where(_masked_frames(units), 1, 0)
    _draw_frames(axes["masked"], units, masked, np.array([_rgb("#f2f2f2"), _rgb(ORANGE)]))
    _name(axes["masked"], "masked")
    if units.phones is not None:
        _draw_phones(axes["phone"], units, palettes[0], inches)
    for stream in range(streams):
        number = f" {stream + 1}" if streams > 1 else ""
        label, predicted = np.array(units.labels[stream]), np.array(units.predictions[stream])
        for name, ids in (("label", label), ("prediction", predicted)):
            _draw_frames(axes[f"{name} {stream}"], units, ids, palettes[stream].clusters)
            _write_ids(axes[f"{name} {stream}"], units, ids, palettes[stream].clusters, inches)
            _name(axes[f"{name} {stream}"], f"{name}{number}")
        colours = np.array([_rgb("#f2f2f2"), _rgb(BLUE)])
        _draw_frames(axes[f"correct {stream}"], units, np.where(label == predicted, 1, 0), colours)
        _name(axes[f"correct {stream}"], "correct")
    for row in rows[:-1]:
        row.tick_params(axis="x", bottom=False, labelbottom=False)
    rows[-1].set(xlabel="time (s)", xlim=(0, units.duration))
    of_masked, unmasked = accuracies(units)
    shares = f"{_percent(of_masked)} of masked frames correct, {_percent(unmasked)} of the others"
    letters = int((width - 1.0) / LETTER)
    text = units.subtitle if len(units.subtitle) <= letters else f"{units.subtitle[: letters - 1]}…"
    lines = [f"{units.title}: {shares}", *([text] if text and _has_glyphs(text) else [])]
    rows[0].set_title("\n".join(lines), loc="left", parse_math=False)
    return figure


@figure_style()
def phone_cluster_figure(phones: Sequence[str], counts: np.ndarray, title: str = "", clock: Clock = CLOCK) -> "Figure":
    """Draw how likely each phone is given the cluster of a frame, P(phone | cluster), as HuBERT's analysis of units.

    Clusters are ordered by their most likely phone, phones by frequency; clusters without a frame are left out.

    Args:
        phones: (phones,), symbols.
        counts: (phones, clusters), frames.
        title: First words of the title, such as the name of the labels.
        clock: Clock of the frames.

    Returns:
        The figure.
    """
    order = np.argsort(-counts.sum(axis=1), kind="stable")
    ordered = counts[order]
    used = np.flatnonzero(ordered.sum(axis=0))
    share = ordered[:, used] / ordered[:, used].sum(axis=0)
    columns = np.lexsort((-share.max(axis=0), share.argmax(axis=0)))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PAGE, 1.1 + 0.115 * max(len(phones), 8)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        share[:, columns], aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest", rasterized=True
    )
    axes.set_yticks(range(len(phones)), [phones[number] for number in order], fontsize=6, parse_math=False)
    axes.tick_params(axis="y", length=0)
    unused = counts.shape[1] - len(used)
    left_out = f"; {unused} of {counts.shape[1]} without a frame left out" if unused else ""
    axes.set(xlabel=f"cluster, ordered by most likely phone{left_out}", ylabel="phone, most frequent first")
    measures = (
        f"PNMI {pnmi(counts):.3f}, phone purity {phone_purity(counts):.3f}, "
        f"{len(used)} clusters, {counts.sum() * clock.seconds / 60:.1f} minutes"
    )
    axes.set_title(f"{title}: {measures}" if title else measures, loc="left", parse_math=False)
    figure.colorbar(image, ax=axes, label="P(phone | cluster)", fraction=0.03, pad=0.01)
    return figure


@dataclass(frozen=True)
class LayerCurve:
    """A measure of the clusters of each layer.

    Args:
        name: Name of the run, such as "iteration 1".
        values: (layers,), at the newest validation.
        earlier: (validations, layers), at the validations before, oldest first.
        labels: The same measure of the labels that the run learns; None if unknown, or of another number of clusters.
    """

    name: str
    values: Sequence[float]
    earlier: Sequence[Sequence[float]] = ()
    labels: float | None = None


@figure_style()
def layer_figure(curves: Sequence[LayerCurve], measure: str, clusters: int) -> "Figure":
    """Draw a measure of the clusters of each layer, with a line for each iteration.

    Args:
        curves: One for each iteration; thin lines show earlier validations, dashed lines the labels.
        measure: Name of the measure, such as "PNMI".
        clusters: Number of clusters that each layer is judged with.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.25 * COLUMN, 2.7), layout="constrained")
    axes = figure.subplots()
    for curve, colour in zip(curves, COLOURS * (1 + len(curves) // len(COLOURS))):
        layers = range(1, len(curve.values) + 1)
        shown = curve.earlier[:: len(curve.earlier) // 6 + 1]
        for number, values in enumerate(shown, start=1):
            axes.plot(layers, values, color=colour, alpha=0.15 + 0.35 * number / len(shown), linewidth=0.6)
        axes.plot(layers, curve.values, color=colour, marker="o", label=curve.name)
        best = int(np.argmax(curve.values))
        axes.annotate(
            f"{curve.values[best]:.3f}" if curve.values[best] < 10 else f"{curve.values[best]:.0f}",
            (best + 1, curve.values[best]),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=colour,
        )
        if curve.labels is not None:
            name = f"labels of {curve.name}"
            axes.axhline(curve.labels, color=colour, linestyle=(0, (4, 2)), linewidth=0.9, label=name)
    if any(curve.earlier for curve in curves):
        axes.plot([], [], color=GREY, linewidth=0.6, label="earlier validations")
    deepest = max((len(curve.values) for curve in curves), default=1)
    axes.set(xlabel="layer", ylabel=f"{measure} of {clusters} clusters", xlim=(0.5, deepest + 0.5))
    axes.set_xticks(range(1, deepest + 1, 1 if deepest <= 24 else 4))
    axes.margins(y=0.15)
    axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.5)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return figure


def _draw_spectrogram(axes: "Axes", units: UtteranceUnits) -> None:
    assert units.spectrogram is not None
    hop, columns = SPECTROGRAM_HOP / SAMPLE_RATE, units.spectrogram.shape[1]
    axes.imshow(
        units.spectrogram,
        origin="lower",
        aspect="auto",
        cmap="gray_r",
        vmin=float(np.percentile(units.spectrogram, 20)),  # noise is white
        extent=(-hop / 2, (columns - 0.5) * hop, -0.5, MELS - 0.5),
        interpolation="nearest",
        rasterized=True,
    )
    axes.set_yticks([mel_band(tick) for tick in TICKS], [_hertz(tick) for tick in TICKS])
    axes.set(ylabel="frequency (Hz, mel)", ylim=(-0.5, MELS))
    for first, length in units.mask:
        axes.axvspan(units.edge(first), units.edge(first + length), color=ORANGE, alpha=0.2, linewidth=0)


def _draw_phones(axes: "Axes", units: UtteranceUnits, colours: Palette, inches: float) -> None:
    phones = units.phones or ()
    axes.broken_barh(
        [(start, end - start) for _, start, end in phones],
        (0, 1),
        facecolors=[colours.phones.get(symbol, SILENT) for symbol, *_ in phones],
        edgecolor="white",
        linewidth=0.6,
    )
    for symbol, start, end in phones:
        if (end - start) * inches > LETTER * len(symbol) and _has_glyphs(symbol):
            _write(axes, (start + end) / 2, symbol)
    _name(axes, "phone")


def _draw_frames(axes: "Axes", units: UtteranceUnits, values: np.ndarray, colours: np.ndarray) -> None:
    """Draw a strip with a cell for each frame, centred where the frame is."""
    extent = (units.edge(0), units.edge(len(values)), 0.0, 1.0)
    axes.imshow(colours[values][None], aspect="auto", extent=extent, interpolation="nearest", rasterized=True)


def _write_ids(axes: "Axes", units: UtteranceUnits, ids: np.ndarray, colours: np.ndarray, inches: float) -> None:
    """Write the id of a cluster on its frames where they are wide enough, and a line where the cluster changes."""
    first, edges = 0, []
    for cluster, group in groupby(ids.tolist()):
        length = len([*group])
        left, width = units.edge(first), length * units.clock.seconds
        edges.append(left)
        if width * inches > LETTER * len(str(cluster)):
            dark = colours[cluster] @ (0.3, 0.59, 0.11) < 0.5
            _write(axes, left + width / 2, str(cluster), "white" if dark else "black")
        first += length
    axes.vlines(edges[1:], 0, 1, colors="white", linewidth=0.4)


def _write(axes: "Axes", seconds: float, text: str, colour: str = "black") -> None:
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6, "color": colour, "parse_math": False}
    # Inside of its strip, so that the layout need not measure it
    axes.text(seconds, 0.46, text, in_layout=False, **style)


def _name(axes: "Axes", name: str) -> None:
    axes.set_yticks([0.5], [name], fontsize=7)
    axes.set_ylim(0, 1)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)


def _masked_frames(units: UtteranceUnits) -> np.ndarray:
    masked = np.zeros(len(units.labels[0]), bool)
    for first, length in units.mask:
        masked[first : first + length] = True
    return masked


def _hertz(tick: int) -> str:
    return f"{tick // 1000} k" if tick >= 1000 else str(tick)


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.0f} %"


def _rgb(code: str) -> Colour:
    red, green, blue = (int(code[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return red, green, blue


def _has_glyphs(text: str) -> bool:
    """Whether matplotlib's own font has the letters: Latin, Greek, Cyrillic and phonetic letters, and the like."""
    return all(character < "\u2e80" for character in text) and text.isprintable()
