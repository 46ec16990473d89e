"""Draw docs/figures/loop.svg, the HuBERT loop: `python docs/figures/loop.py`."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, GREY, CARD, EDGE = "#22303c", "#6b7883", "#ffffff", "#cfd6dc"
BLUE, ORANGE, GREEN, PURPLE = "#2a6f97", "#e07a3f", "#5a9e6f", "#8b6bb1"
CLUSTERS = (BLUE, ORANGE, GREEN, PURPLE)
LABELS = (0, 0, 2, 2, 2, 1, 3, 3, 0, 1)
WIDTH, HEIGHT = 1.76, 1.35
SIZE = (13.2, 6.0)


def box(axes: Axes, x: float, y: float, title: str, note: str, edge: str = EDGE) -> None:
    """A stage, centred on (x, y), with its title above the drawing and a note below it."""
    corner = (x - WIDTH / 2, y - HEIGHT / 2)
    style = "round,pad=0.0,rounding_size=0.14"
    axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, style, facecolor=CARD, edgecolor=edge, linewidth=1.6))
    axes.text(x, y + 0.49, title, ha="center", va="center", fontsize=11, fontweight="bold", color=INK)
    axes.text(x, y - 0.51, note, ha="center", va="center", fontsize=8.5, color=GREY)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK, bend: float = 0) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=17, linewidth=2, color=color,
            connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0, zorder=1,
        )
    )  # fmt: skip


def label(
    axes: Axes, x: float, y: float, action: str, verb: str, color: str = INK, gap: float = 0.13, align: str = "center"
) -> None:
    """The action of an arrow, and below it the verb of `hubert` that does it."""
    axes.text(x, y + gap, action, ha=align, va="bottom", fontsize=10, color=color)
    axes.text(x, y - gap, verb, ha=align, va="top", fontsize=8.8, color=GREY, family="monospace")


def waveform(axes: Axes, x: float, y: float) -> None:
    time = np.linspace(-1, 1, 60)
    loudness = 0.3 * np.abs(np.sin(5 * time) * np.cos(1.3 * time)) * (0.6 + 0.4 * np.cos(37 * time)) + 0.02
    axes.vlines(x + 0.66 * time, y - loudness, y + loudness, color=BLUE, linewidth=1.7, capstyle="round")


def spectrum(axes: Axes, x: float, y: float) -> None:
    rows, columns = np.mgrid[0:7, 0:22]
    values = np.sin(columns / 3.1 + rows / 2) + np.cos(rows * 1.3 - columns / 5)
    axes.imshow(values, extent=(x - 0.66, x + 0.66, y - 0.3, y + 0.3), cmap="Blues", aspect="auto", vmin=-3, zorder=2)


def scatter(axes: Axes, x: float, y: float) -> None:
    points = np.random.default_rng(3)
    for color, (right, up) in zip(CLUSTERS, ((-0.42, 0.12), (0.05, -0.14), (0.42, 0.1), (-0.1, 0.2)), strict=True):
        cloud = points.normal((x + right, y + up), (0.09, 0.06), size=(13, 2))
        axes.scatter(*cloud.T, s=9, color=color, alpha=0.65, linewidths=0, zorder=2)
        axes.scatter(x + right, y + up, s=60, marker="X", color=color, edgecolors=CARD, linewidths=1, zorder=3)


def row(
    axes: Axes, x: float, y: float, numbers: tuple[int, ...], hidden: range = range(0), size: float = 0.135
) -> None:
    """Cluster ids of successive frames as coloured squares; those of hidden frames are hatched grey."""
    left = x - size * len(numbers) / 2
    for index, number in enumerate(numbers):
        color = "#e3e7ea" if index in hidden else CLUSTERS[number]
        axes.add_patch(
            Rectangle(
                (left + size * index, y - size / 2), size, size * 1.25, facecolor=color, edgecolor=CARD,
                linewidth=1.2, zorder=3, hatch="////" if index in hidden else None,
            )
        )  # fmt: skip


def network(axes: Axes, x: float, y: float) -> None:
    """Masked frames below, Transformer layers above, layer L in colour."""
    row(axes, x, y - 0.29, LABELS, hidden=range(4, 8))
    for index in range(4):
        color = ORANGE if index == 2 else "#b9c9d6"
        axes.add_patch(Rectangle((x - 0.66, y - 0.13 + 0.115 * index), 1.32, 0.085, facecolor=color, zorder=2))
    axes.text(x, y - 0.13 + 0.115 * 2 + 0.038, "layer L", ha="center", va="center", fontsize=6.5, color=CARD, zorder=4)


def draw() -> Figure:
    figure = Figure(figsize=SIZE)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, SIZE[0]), ylim=(0, SIZE[1]))
    axes.axis("off")
    corner, width, height = (0.08, 0.08), SIZE[0] - 0.16, SIZE[1] - 0.16
    style = "round,pad=0,rounding_size=0.25"
    axes.add_patch(FancyBboxPatch(corner, width, height, style, facecolor="#f6f8fa", edgecolor=EDGE))

    y, (audio, features, kmeans, labels, model) = 3.75, (1.25, 3.93, 6.61, 9.29, 11.95)
    box(axes, audio, y, "audio", "16 kHz, untranscribed")
    box(axes, features, y, "features", "MFCC, then layer L")
    box(axes, kmeans, y, "K-means", "100, then 500 clusters")
    box(axes, labels, y, "labels", "one cluster per 20 ms")
    box(axes, model, y, "masked prediction", "HuBERT encoder", edge=ORANGE)
    for drawing, x in ((waveform, audio), (spectrum, features), (scatter, kmeans), (network, model)):
        drawing(axes, x, y)
    row(axes, labels, y - 0.02, LABELS)

    half = WIDTH / 2 + 0.06
    steps = (("extract", "prepare"), ("cluster", "kmeans fit"), ("assign", "fit"), ("predict", "fit"))
    stages = (audio, features, kmeans, labels, model)
    for start, end, (action, verb) in zip(stages[:-1], stages[1:], steps, strict=True):
        arrow(axes, (start + half, y), (end - half, y))
        label(axes, (start + end) / 2, y, action, verb)

    top = y + HEIGHT / 2 + 0.06
    arrow(axes, (model, top), (features, top), ORANGE, bend=0.17)
    label(axes, (features + model) / 2, y + 1.41, "re-cluster layer L, train again", "fit", ORANGE)

    below, bottom = 1.2, y - HEIGHT / 2 - 0.06
    box(axes, model, below, "CTC head", "fine-tuned on transcripts")
    axes.text(model, below, "H–EE–L–LL–O", ha="center", va="center", fontsize=10, family="monospace", color=BLUE)
    box(axes, labels, below, "words", "text, subtitles, times")
    axes.text(labels, below, "hello world", ha="center", va="center", fontsize=11, style="italic", color=INK)
    box(axes, kmeans, below, "units", "discrete speech")
    axes.text(kmeans, below, "17 17 4 4 52 9", ha="center", va="center", fontsize=10, family="monospace", color=PURPLE)
    arrow(axes, (model, bottom), (model, below + HEIGHT / 2 + 0.06))
    label(axes, model - 0.14, (bottom + below + HEIGHT / 2) / 2, "fine-tune", "fit", gap=0.03, align="right")
    arrow(axes, (model - half, below), (labels + half, below))
    label(axes, (model + labels) / 2, below, "decode", "transcribe")
    arrow(axes, (kmeans, bottom), (kmeans, below + HEIGHT / 2 + 0.06))
    label(axes, kmeans + 0.14, (bottom + below + HEIGHT / 2) / 2, "encode, assign", "units", gap=0.03, align="left")

    axes.text(0.42, 1.72, "HuBERT", fontsize=12, fontweight="bold", color=INK)
    axes.text(0.42, 1.38, "Learn speech from audio alone:", fontsize=10, color=INK)
    axes.text(0.42, 1.12, "predict the clusters of masked frames,", fontsize=10, color=INK)
    axes.text(0.42, 0.86, "then cluster a layer of the encoder.", fontsize=10, color=INK)
    axes.text(0.42, 0.5, "grey: verb of the command hubert", fontsize=8.5, color=GREY)
    return figure


if __name__ == "__main__":
    matplotlib.rcParams |= {"svg.hashsalt": "hubert", "hatch.linewidth": 0.6, "hatch.color": "#9aa5ad"}
    draw().savefig(Path(__file__).with_suffix(".svg"), transparent=True, metadata={"Date": None})
