"""Measures of features and clusters that need no transcripts and no phones.

They show how well a K-means describes a layer, whether its clusters are the same for other speakers and other seeds,
and how much they reveal of the speakers. `units/survey.py` computes them for every layer and number of clusters.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubert_lightning.frames import CLOCK, SAMPLE_RATE, Clock
from hubert_lightning.units.quality import entropy

LAG = 2
"""Frames of 20 ms, 40 ms, from a unit to the one that it should predict: about half a phone."""


def effective_rank(features: Tensor) -> float:
    """Compute the number of dimensions that features make use of: RankMe (arXiv 2210.02885, eq. 1) of centred features.

    Args:
        features: (frames, dim).

    Returns:
        Exponential of the entropy of the normalised singular values, from 1 to dim; 0 where all frames are the same.
    """
    rows = features.double()
    rows = rows - rows.mean(dim=0)
    # Singular values of the rows, from the small matrix: dim × dim, however many frames there are
    singular = torch.linalg.eigvalsh(rows.T @ rows).clamp(min=0).sqrt()
    # Rounding leaves values of about sqrt(epsilon) where there are none
    singular = singular * (singular > 1e-7 * singular.max())
    return float(entropy(singular).exp()) if singular.any() else 0.0


def counts_of(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Count how often two labels of a frame occur together.

    Args:
        first: (frames,), labels of any kind.
        second: (frames,), other labels of the same frames.

    Returns:
        (different first labels, different second labels) int64.
    """
    rows, row = np.unique(first, return_inverse=True)
    columns, column = np.unique(second, return_inverse=True)
    cells = np.bincount(row * len(columns) + column, minlength=len(rows) * len(columns))
    return cells.reshape(len(rows), len(columns))


def information(counts: np.ndarray) -> float:
    """Compute the mutual information of rows and columns.

    Args:
        counts: (rows, columns), frames.

    Returns:
        In nats, 0 or more.
    """
    rows, columns = float(entropy(counts.sum(axis=1))), float(entropy(counts.sum(axis=0)))
    return max(rows + columns - float(entropy(counts.ravel())), 0.0)


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the normalised mutual information (NMI) of two clusterings of the same frames.

    Args:
        first: (frames,), cluster of each frame.
        second: (frames,), cluster of each frame in the other clustering.

    Returns:
        2 I / (H + H), from 0 to 1; 1 where both have a single cluster.
    """
    counts = counts_of(first, second)
    both = float(entropy(counts.sum(axis=1))) + float(entropy(counts.sum(axis=0)))
    return 2 * information(counts) / both if both else 1.0


def beyond_chance(first: np.ndarray, second: np.ndarray, seed: int = 0) -> float:
    """Compute the mutual information of two labels of the same frames, without what chance adds to it.

    Mutual information is overestimated where cells hold few frames. The information of the same labels, one of them
    shuffled over the frames, is subtracted: a draw of the expected value of N. X. Vinh et al., JMLR 2010.

    Args:
        first: (frames,), labels of any kind.
        second: (frames,), other labels of the same frames.
        seed: Seed of the shuffle.

    Returns:
        In nats; about 0 where the labels are independent.
    """
    if not len(first):
        return 0.0
    shuffled = np.random.default_rng(seed).permutation(second)
    return information(counts_of(first, second)) - information(counts_of(first, shuffled))


def explained(label: np.ndarray, cluster: np.ndarray, seed: int = 0) -> float:
    """Compute the share of the uncertainty about a label that clusters remove, beyond chance.

    Args:
        label: (frames,), such as the speaker or the phone.
        cluster: (frames,), cluster.
        seed: Seed of the shuffle.

    Returns:
        A share of at most 1, about 0 where clusters reveal nothing; NaN where all frames have the same label.
    """
    total = float(entropy(np.unique(label, return_counts=True)[1]))
    return beyond_chance(label, cluster, seed) / total if total else math.nan


def content(units: np.ndarray, stretch: np.ndarray, lag: int = LAG, seed: int = 0) -> float:
    """Compute what a unit reveals of speech around it, beyond what it reveals of the recording.

    Sounds last several frames and depend on each other, so that a unit which names them predicts a later unit. So does
    a unit that names the speaker, the room or the microphone; but that is the same in the whole stretch, and what units
    reveal of the stretch is subtracted.

    Args:
        units: (frames,), unit of each frame.
        stretch: (frames,), number of the stretch of consecutive frames that a frame is in.
        lag: Frames from a unit to the one that it predicts.
        seed: Seed of the shuffles.

    Returns:
        I(unit; unit after `lag`) - I(unit; stretch), each beyond chance, in bits.
    """
    together = stretch[lag:] == stretch[:-lag]
    near = beyond_chance(units[:-lag][together], units[lag:][together], seed)
    return (near - beyond_chance(stretch, units, seed)) / math.log(2)


class Runs(NamedTuple):
    """Runs of equal units, as they are written without repetitions.

    Args:
        length: Mean frames of a run.
        per_second: Runs per second.
        bit_rate: Bits per second: runs per second times the entropy of their units (T. A. Nguyen et al., "The Zero
            Resource Speech Benchmark 2021", §3.4).
    """

    length: float
    per_second: float
    bit_rate: float


def runs_of(units: np.ndarray, stretch: np.ndarray, clock: Clock = CLOCK) -> Runs:
    """Measure the runs of equal units in stretches of speech.

    Args:
        units: (frames,), unit of each frame, at least one.
        stretch: (frames,), number of the stretch of consecutive frames that a frame is in.
        clock: Clock of the frames.

    Returns:
        The measures; no run crosses from one stretch to the next.
    """
    starts = np.r_[True, (units[1:] != units[:-1]) | (stretch[1:] != stretch[:-1])]
    deduplicated = np.unique(units[starts], return_counts=True)[1]
    length = len(units) / int(starts.sum())
    per_second = SAMPLE_RATE / clock.hop / length
    return Runs(length, per_second, per_second * float(entropy(deduplicated)) / math.log(2))


def spread(features: Tensor, centroids: Tensor, clusters: Tensor) -> float:
    """Compute the inertia of frames relative to their total variance.

    Args:
        features: (frames, dim).
        centroids: (clusters, dim).
        clusters: (frames,) int64, cluster of each frame.

    Returns:
        Mean squared distance from a frame to its centroid, divided by that to the mean of all frames: 0 where centroids
        say everything, 1 where they say no more than the mean; NaN where all frames are the same.
    """
    rows = features.float()
    total = float((rows - rows.mean(dim=0)).square().sum(dim=1).mean())
    inner = float((rows - centroids[clusters]).square().sum(dim=1).mean())
    return inner / total if total else math.nan
