"""Every layer and several numbers of clusters, measured with and without phones in one pass over the audio.

A sample of stretches of consecutive frames is encoded once. It has two halves, of different speakers where they are
known: each K-means is fitted on one half and judged on the other, and a K-means of the other half tells whether its
clusters are those of these speakers only.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubert_lightning.errors import check_installed
from hubert_lightning.features.extractors import Extractor
from hubert_lightning.features.sample import chosen_features
from hubert_lightning.features.windows import WINDOW_FRAMES
from hubert_lightning.frames import in_frames
from hubert_lightning.progress_bar import progress
from hubert_lightning.units.abx import Errors, Tokens, abx
from hubert_lightning.units.kmeans import KMeans, assign
from hubert_lightning.units.label_free import LAG, agreement, content, effective_rank, explained, runs_of, spread
from hubert_lightning.units.quality import Quality, joint_counts
from hubert_lightning.units.stretches import SpeechSample

log = logging.getLogger(__name__)

SCORED_FRAMES = 5_000
"""Frames of which the Davies–Bouldin index is computed."""
RANKED_FRAMES = 20_000
"""Frames of which the effective rank is computed, at most."""


@dataclass(frozen=True)
class Measures:
    """Measures of the clusters of one layer.

    Args:
        layer: Layer, counted from 1; 0 is what enters the first one. None for MFCCs.
        clusters: Number of clusters.
        inertia: Inertia of frames of other speakers, relative to their variance.
        effective_rank: Dimensions that the features make use of.
        davies_bouldin: Davies–Bouldin index of a sample: lower where clusters lie apart; NaN with one cluster.
        seed_agreement: NMI of two K-means of other seeds.
        half_agreement: NMI of two K-means of different speakers, or recordings.
        content: Bits that a unit reveals of the speech around it, beyond what it reveals of the recording (`content`).
        speaker_information: Share of the uncertainty about the speaker that a unit removes; NaN if they are unknown.
        perplexity: Effective number of clusters in use.
        dead_clusters: Clusters without a frame.
        run_length: Mean frames of a run of equal units.
        bit_rate: Bits per second of the units without repetitions.
        pnmi: Agreement with phones, as `Quality`; NaN without phones.
        adjusted_pnmi: PNMI beyond chance, which does not grow with the number of clusters alone; NaN without phones.
        phone_purity: As `Quality`; NaN without phones.
        cluster_purity: As `Quality`; NaN without phones.
        abx_within: ABX error rate of the features within speakers (`units/abx.py`); NaN if it was not asked for.
        abx_across: ABX error rate across speakers; NaN if it was not asked for.
    """

    layer: int | None
    clusters: int
    inertia: float
    effective_rank: float
    davies_bouldin: float
    seed_agreement: float
    half_agreement: float
    content: float
    speaker_information: float
    perplexity: float
    dead_clusters: int
    run_length: float
    bit_rate: float
    pnmi: float = math.nan
    adjusted_pnmi: float = math.nan
    phone_purity: float = math.nan
    cluster_purity: float = math.nan
    abx_within: float = math.nan
    abx_across: float = math.nan

    @property
    def name(self) -> str:
        """Name of the features: "layer 3" or "mfcc"."""
        return "mfcc" if self.layer is None else f"layer {self.layer}"

    def as_numbers(self) -> dict[str, float | None]:
        """Return the measures by name; None for those that are not known."""
        values: dict[str, Any] = asdict(self)
        return {
            name: None if math.isnan(value) else value
            for name, value in values.items()
            if name not in ("layer", "clusters")
        }


def survey(
    extractor: Extractor,
    sample: SpeechSample,
    clusters: Sequence[int],
    seed: int = 0,
    num_workers: int = 0,
    tokens: Tokens | None = None,
) -> list[Measures]:
    """Measure the clusters of each layer, for several numbers of clusters.

    Args:
        extractor: Function that computes the features of all layers, or of one kind.
        sample: Speech to fit and judge on.
        clusters: Numbers of clusters.
        seed: Seed of K-means; the second seed is the next one.
        num_workers: Number of processes that read audio.
        tokens: Phones whose ABX error rates are computed; none if not given.

    Returns:
        The measures of each layer and number of clusters, layer by layer. The layers count from 0 if the extractor has
        several; one alone has none.

    Raises:
        UserError: Audio cannot be read; or a half has fewer different frames than clusters.
    """
    check_installed("sklearn")
    rows = chosen_features(extractor, sample.cuts, sample.frames, WINDOW_FRAMES, num_workers, torch.float16)
    is_stack = rows.ndim == 3
    rows = rows if is_stack else rows[:, None]  # (rows, layers, dim)
    results = []
    with progress("judging layers", rows.shape[1] * len(clusters), "K-means") as advance:
        for layer in range(rows.shape[1]):
            features = rows[:, layer].to(extractor.device).float()
            rank = effective_rank(features[:: -(-len(features) // RANKED_FRAMES)].cpu())
            errors = abx(features, tokens, seed) if tokens else Errors(math.nan, math.nan)
            for number in clusters:
                measured = _measured(features, sample, layer if is_stack else None, number, seed)
                measured = replace(measured, effective_rank=rank, abx_within=errors.within, abx_across=errors.across)
                results.append(measured)
                advance()
    return results


def _measured(features: Tensor, sample: SpeechSample, layer: int | None, clusters: int, seed: int) -> Measures:
    fitted, judged = torch.from_numpy(sample.fit), torch.from_numpy(~sample.fit)
    halves = [features[half.to(features.device)] for half in (fitted, judged)]
    kmeans = KMeans(restarts=1)
    means = [kmeans.fit(halves[half], clusters, start) for half, start in ((0, seed), (0, seed + 1), (1, seed))]
    units, reseeded, others = [assign(features, centroids).cpu().numpy() for centroids in means]
    unseen = ~sample.fit
    known = unseen & (sample.phone != "")
    phones = known if known.any() else unseen
    quality = Quality.of(joint_counts(sample.phone[phones], units[phones], clusters))
    usage = Quality.of(joint_counts(sample.phone[unseen], units[unseen], clusters))
    runs = runs_of(units[unseen], sample.stretch[unseen], sample.clock)
    by_phones = quality[:3] if known.any() else (math.nan, math.nan, math.nan)
    return Measures(
        layer,
        clusters,
        inertia=spread(halves[1], means[0], torch.from_numpy(units[unseen]).to(features.device)),
        effective_rank=math.nan,  # of the layer, whatever the number of clusters
        davies_bouldin=_davies_bouldin(halves[1], units[unseen], seed),
        seed_agreement=agreement(units[unseen], reseeded[unseen]),
        half_agreement=agreement(units, others),
        content=content(units[unseen], sample.stretch[unseen], in_frames(LAG, sample.clock), seed),
        speaker_information=explained(sample.speaker, units) if sample.num_speakers > 1 else math.nan,
        perplexity=usage.perplexity,
        dead_clusters=usage.dead_clusters,
        run_length=runs.length,
        bit_rate=runs.bit_rate,
        pnmi=by_phones[0],
        adjusted_pnmi=explained(sample.phone[known], units[known]) if known.any() else math.nan,
        phone_purity=by_phones[1],
        cluster_purity=by_phones[2],
    )


def _davies_bouldin(features: Tensor, units: np.ndarray, seed: int) -> float:
    chosen = np.random.default_rng(seed).permutation(len(units))[:SCORED_FRAMES]
    scored = units[chosen]
    if not 2 <= len(np.unique(scored)) < len(scored):
        return math.nan
    from sklearn.metrics import davies_bouldin_score

    return float(davies_bouldin_score(features[torch.from_numpy(chosen).to(features.device)].cpu().numpy(), scored))
