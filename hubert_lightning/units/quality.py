"""Measures of how well clusters match phones (HuBERT §IV-E), computed from frame counts."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.data.alignments import phones_of
from hubert_lightning.errors import UserError
from hubert_lightning.frames import CLOCK, Clock, frame_centres, num_frames


def entropy(counts: Tensor | np.ndarray) -> Tensor:
    """Compute the entropy of frequencies; its exponential is their perplexity.

    Args:
        counts: (..., clusters), how often each cluster occurs.

    Returns:
        (...), in nats: float64 for an array or float64 counts, float32 for a tensor of integers; 0 where nothing was
        counted.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64) if isinstance(counts, np.ndarray) else counts
    share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    nats: Tensor = torch.special.entr(share).sum(dim=-1)
    return nats


def perplexity(counts: Tensor | np.ndarray) -> Tensor:
    """Compute the number of equally frequent clusters that would be as uncertain as these.

    Args:
        counts: (..., clusters), how often each cluster occurs.

    Returns:
        (...), from 1 to the number of clusters.
    """
    return entropy(counts).exp()


def phone_purity(counts: np.ndarray) -> float:
    """Compute how often a frame has the phone that is most common in its cluster; rises with the number of clusters.

    Args:
        counts: (phones, clusters), frames.

    Returns:
        A share from 0 to 1.
    """
    return float(counts.max(axis=0).sum() / counts.sum())


def cluster_purity(counts: np.ndarray) -> float:
    """Compute how often a frame has the cluster that is most common for its phone; falls with the number of clusters.

    Args:
        counts: (phones, clusters), frames.

    Returns:
        A share from 0 to 1.
    """
    return float(counts.max(axis=1).sum() / counts.sum())


def pnmi(counts: np.ndarray) -> float:
    """Compute the share of the uncertainty about a phone that its cluster removes: I(phone; cluster) / H(phone).

    Args:
        counts: (phones, clusters), frames.

    Returns:
        A share from 0 to 1; NaN where all frames have the same phone.
    """
    phones, clusters = float(entropy(counts.sum(axis=1))), float(entropy(counts.sum(axis=0)))
    return (phones + clusters - float(entropy(counts.ravel()))) / phones if phones else math.nan


def dead_clusters(counts: np.ndarray) -> int:
    """Count the clusters without a frame.

    Args:
        counts: (phones, clusters), frames.

    Returns:
        Number of clusters.
    """
    return int((counts.sum(axis=0) == 0).sum())


class Quality(NamedTuple):
    """Measures of one labelling, each computed by the function of its name."""

    pnmi: float
    phone_purity: float
    cluster_purity: float
    perplexity: float
    dead_clusters: int

    @classmethod
    def of(cls, counts: np.ndarray) -> Self:
        """Compute all measures.

        Args:
            counts: (phones, clusters), frames.

        Returns:
            The measures.

        Raises:
            UserError: All counts are 0.
        """
        if not counts.sum():
            raise UserError("no frame has both a phone and a cluster; cluster quality needs utterances with phones")
        return cls(
            pnmi=pnmi(counts),
            phone_purity=phone_purity(counts),
            cluster_purity=cluster_purity(counts),
            perplexity=float(perplexity(counts.sum(axis=0))),
            dead_clusters=dead_clusters(counts),
        )


def joint_counts(
    phones: Sequence[str] | np.ndarray, clusters: Sequence[int] | np.ndarray, num_clusters: int
) -> np.ndarray:
    """Count the frames of each phone in each cluster.

    Args:
        phones: (frames,), of one utterance or of several in a row.
        clusters: (frames,), from 0 to num_clusters - 1.
        num_clusters: Number of clusters that K-means was fitted with.

    Returns:
        (phones, clusters) int64, one row per phone that occurs, in sorted order.

    Raises:
        UserError: The numbers of phones and clusters differ, or a cluster is out of range.
    """
    clusters = np.asarray(clusters, dtype=np.int64)
    if len(phones) != len(clusters):
        raise UserError(f"{len(phones)} frames have a phone and {len(clusters)} a cluster; count the same frames")
    if not len(clusters):
        return np.zeros((0, num_clusters), dtype=np.int64)
    if clusters.min() < 0 or clusters.max() >= num_clusters:
        raise UserError(
            f"clusters range from {clusters.min()} to {clusters.max()}, but there are {num_clusters}; "
            "count with the number of clusters that K-means was fitted with"
        )
    symbols, phone = np.unique(phones, return_inverse=True)
    cells = np.bincount(phone * num_clusters + clusters, minlength=len(symbols) * num_clusters)
    return cells.reshape(len(symbols), num_clusters)


def frame_phones(alignment: Sequence[tuple[float, float, str]], count: int, clock: Clock = CLOCK) -> list[str]:
    """Find the phone at the centre of every frame.

    Args:
        alignment: Start and duration (seconds) and symbol of every phone; phones do not overlap.
        count: Number of frames of the utterance.
        clock: Clock of the frames.

    Returns:
        (frames,) symbols; "" where no phone covers the centre.
    """
    # A phone without duration sorts before the one that starts with it, which so covers it
    phones = sorted((start, start + duration, symbol) for start, duration, symbol in alignment)
    starts = np.array([start for start, _, _ in phones])
    centres = frame_centres(count, clock).tolist()
    latest = np.searchsorted(starts, centres, side="right") - 1  # the last phone that starts before the centre
    return [
        phones[index][2] if index >= 0 and centre < phones[index][1] else ""
        for index, centre in zip(latest.tolist(), centres, strict=True)
    ]


def phones_by_frame(cut: Cut, clock: Clock) -> np.ndarray:
    """Return the phone of every frame of an utterance: (frames,) symbols, as `frame_phones`.

    Args:
        cut: Utterance.
        clock: Clock of the frames.
    """
    return np.array(frame_phones(phones_of(cut), num_frames(cut.num_samples, clock), clock))
