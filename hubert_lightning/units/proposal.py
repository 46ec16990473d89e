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
    """

    layer: int | None
    clusters: int
    reason: str


def propose(measures: Sequence[Measures]) -> Proposal:
    """Propose a layer and a number of clusters.

    Both have the most content: bits that a unit reveals of the speech around it, beyond what it reveals of the
    recording. The layer has the most over all numbers of clusters; then the number of clusters has the most in that
    layer. In the paper's terms, the best number of clusters is the one with the highest PNMI beyond chance on unseen
    speakers; PNMI itself grows with any number of clusters (docs/results.md has the comparison).

    Args:
        measures: Measures of layers and numbers of clusters. Layer 0 is no candidate, since labels come from layers.

    Returns:
        The proposal.
    """
    layers = [row for row in measures if row.layer is None or row.layer > 0]
    total: dict[int | None, float] = {}
    for row in layers:
        total[row.layer] = total.get(row.layer, 0.0) + row.content
    layer = max(total, key=lambda name: total[name])
    best = max((row for row in layers if row.layer == layer), key=lambda row: row.content)
    return Proposal(layer, best.clusters, _reason(best, len(total), len({row.clusters for row in layers})))


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
