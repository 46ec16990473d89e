"""How well clusters tell phones apart (HuBERT §IV-E): counts of frames in, numbers out.

All measures take `counts`: (phones, clusters), frames that have this phone and this cluster.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.frames import frame_centres


def entropy(counts: Tensor) -> Tensor:
    """Compute the entropy of frequencies; its exponential is their perplexity.

    Args:
        counts: (..., clusters), how often each cluster occurs.

    Returns:
        (...), in nats: float64 for float64 counts, float32 for integers; 0 where nothing was counted.
    """
    share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(dim=-1)


def phone_purity(counts: np.ndarray) -> float:
    """How often a frame has the phone that is most common in its cluster; rises with the number of clusters."""
    return float(counts.max(axis=0).sum() / counts.sum())


def cluster_purity(counts: np.ndarray) -> float:
    """How often a frame has the cluster that is most common for its phone; falls with the number of clusters."""
    return float(counts.max(axis=1).sum() / counts.sum())


def pnmi(counts: np.ndarray) -> float:
    """Share of the uncertainty about a frame's phone that its cluster removes: I(phone; cluster) / H(phone).

    NaN where there is but one phone: nothing to be uncertain about.
    """
    phones, clusters = _entropy(counts.sum(axis=1)), _entropy(counts.sum(axis=0))
    return (phones + clusters - _entropy(counts)) / phones if phones else math.nan


def perplexity(counts: np.ndarray) -> float:
    """The number of equally frequent clusters that would be as uncertain as these."""
    return math.exp(_entropy(counts.sum(axis=0)))


def dead_clusters(counts: np.ndarray) -> int:
    """Clusters that no frame has."""
    return int((counts.sum(axis=0) == 0).sum())


class Quality(NamedTuple):
    """What one labelling is worth; see the functions of the same names."""

    pnmi: float
    phone_purity: float
    cluster_purity: float
    perplexity: float
    dead_clusters: int

    @classmethod
    def of(cls, counts: np.ndarray) -> Self:
        """All measures of the counts: (phones, clusters).

        Raises:
            UserError: Nothing was counted.
        """
        if not counts.sum():
            raise UserError("no frame has both a phone and a cluster; cluster quality needs utterances with phones")
        return cls(
            pnmi=pnmi(counts),
            phone_purity=phone_purity(counts),
            cluster_purity=cluster_purity(counts),
            perplexity=perplexity(counts),
            dead_clusters=dead_clusters(counts),
        )


def joint_counts(
    phones: Sequence[str] | np.ndarray, clusters: Sequence[int] | np.ndarray, num_clusters: int
) -> np.ndarray:
    """Count the frames of each phone in each cluster.

    phones:   (frames,), of one utterance or of many in a row
    clusters: (frames,), from 0 to num_clusters - 1
    returns:  (phones, clusters) int64, a row for every phone that occurs, in sorted order

    Raises:
        UserError: Not as many phones as clusters, or a cluster out of range.
    """
    clusters = np.asarray(clusters, dtype=np.int64)
    if len(phones) != len(clusters):
        raise UserError(f"{len(phones)} frames have a phone and {len(clusters)} a cluster; count the same frames")
    if not len(clusters):
        return np.zeros((0, num_clusters), dtype=np.int64)
    if clusters.min() < 0 or clusters.max() >= num_clusters:
        raise UserError(
            f"clusters go from {clusters.min()} to {clusters.max()}, which {num_clusters} clusters cannot; "
            "count with the number of clusters that K-means was fitted with"
        )
    symbols, phone = np.unique(phones, return_inverse=True)
    cells = np.bincount(phone * num_clusters + clusters, minlength=len(symbols) * num_clusters)
    return cells.reshape(len(symbols), num_clusters)


def frame_phones(alignment: Sequence[tuple[float, float, str]], num_frames: int) -> list[str]:
    """The phone at the centre of every frame; "" where there is none.

    alignment: start and duration (seconds) and symbol of every phone, none on top of another
    """
    # A phone without duration sorts before the one that starts with it, which so covers it
    phones = sorted((start, start + duration, symbol) for start, duration, symbol in alignment)
    starts = np.array([start for start, _, _ in phones])
    centres = frame_centres(num_frames).tolist()
    latest = np.searchsorted(starts, centres, side="right") - 1  # the last phone that starts before the centre
    return [
        phones[place][2] if place >= 0 and centre < phones[place][1] else ""
        for place, centre in zip(latest.tolist(), centres, strict=True)
    ]


def _entropy(counts: np.ndarray) -> float:
    return float(entropy(torch.from_numpy(counts.ravel()).double()))
