"""A layer and a number of clusters, proposed without phones, with the reason in one sentence."""

from collections.abc import Sequence
from typing import NamedTuple

from hubert_lightning.errors import UserError
from hubert_lightning.units.label_recipe import CLUSTERS_GRID
from hubert_lightning.units.survey import Measures

FRAMES_A_CLUSTER = 10
"""Frames of a half for each cluster, at least, of a number of clusters that is chosen automatically."""


class Proposal(NamedTuple):
    """What to cluster.

    Args:
        layer: Layer, counted from 1; None for MFCCs.
        clusters: Number of clusters.
        reason: Why, in one sentence.
        doubt: Why these clusters should not be trained on, and what to do; empty where they may.
    """

    layer: int | None
    clusters: int
    reason: str
    doubt: str = ""


def propose(measures: Sequence[Measures], frames: int | None = None) -> Proposal:
    """Propose a layer and a number of clusters.

    Both have the most content: bits that a unit reveals of the speech around it, beyond what it reveals of the
    recording. The layer has the most over all numbers of clusters; then the number of clusters has the most in that
    layer. In the paper's terms, the best number of clusters is the one with the highest PNMI beyond chance on unseen
    speakers; PNMI itself grows with any number of clusters (docs/results.md has the comparison).

    Args:
        measures: Measures of layers and numbers of clusters. Layer 0 is no candidate, since labels come from layers.
        frames: Frames of the smaller half of the sample. Numbers of clusters that have fewer than ten frames each are
            no candidates where others have more.

    Returns:
        The proposal.
    """
    measured = [row for row in measures if row.layer is None or row.layer > 0]
    layers = [row for row in measured if not is_too_many(row.clusters, frames)] or measured
    total: dict[int | None, float] = {}
    for row in layers:
        total[row.layer] = total.get(row.layer, 0.0) + row.content
    layer = max(total, key=lambda name: total[name])
    best = max((row for row in layers if row.layer == layer), key=lambda row: row.content)
    reason = _reason(best, len(total), len({row.clusters for row in layers}))
    return Proposal(layer, best.clusters, reason, _doubt(best, frames))


def is_too_many(clusters: int, frames: int | None) -> bool:
    """Whether clusters have fewer than ten frames each.

    Args:
        clusters: Number of clusters.
        frames: Frames of the smaller half of the sample; None if they are not known.
    """
    return frames is not None and clusters * FRAMES_A_CLUSTER > frames


def _doubt(best: Measures, frames: int | None) -> str:
    if is_too_many(best.clusters, frames):
        return (
            f"half of the sample has {frames} frames, and {best.clusters} clusters need {FRAMES_A_CLUSTER} frames each;"
            " give more recordings, or fewer clusters"
        )
    if best.content <= 0:
        return (
            f"a unit of the best, {best.clusters} clusters of {best.name}, reveals nothing of the speech 40 ms later "
            f"({best.content:.2f} bits); give more recordings, or fewer clusters"
        )
    return ""


def _reason(best: Measures, layers: int, numbers: int) -> str:
    compared = [f"{layers} layers"] * (layers > 1) + [f"{numbers} numbers of clusters"] * (numbers > 1)
    content = (
        f"a unit reveals {best.content:.2f} bits of the speech 40 ms later beyond what it reveals of the recording"
    )
    most = f", the most of {' and '.join(compared)}" if compared else ""
    return f"{content}{most}; NMI with the K-means of the other half is {best.half_agreement:.2f}"


def grid_for(frames: int, grid: Sequence[int] = CLUSTERS_GRID) -> list[int]:
    """Return the numbers of clusters that a sample is large enough for.

    Args:
        frames: Frames of the smaller half of the sample.
        grid: Numbers of clusters to choose from.

    Raises:
        UserError: It is too small for all of them.
    """
    possible = [number for number in grid if number * FRAMES_A_CLUSTER <= frames]
    if not possible:
        raise UserError(
            f"clusters: auto chooses from {', '.join(map(str, grid))} clusters, of {FRAMES_A_CLUSTER} frames each in "
            f"half of the sample, but that has {frames} frames; give more audio, or name a number of clusters"
        )
    return possible
