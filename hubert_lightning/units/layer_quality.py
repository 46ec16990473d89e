"""Quality of every layer's clusters, measured against phones (HuBERT §IV-E).

One pass over the audio judges all layers: each K-means is fitted on every other sampled utterance and judged on the
rest. `layer: best` chooses by the measures, and the `LayerQuality` callback logs them. `hubert quality` has more
(units/survey.py).
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut
from rich.console import Console
from rich.table import Table

from hubert_lightning.data.alignments import check_alignment, phones_of
from hubert_lightning.errors import UserError, within
from hubert_lightning.features.extractors import Extractor, Precision, all_layers_extractor
from hubert_lightning.features.sample import choose_frames, chosen_features
from hubert_lightning.features.windows import WINDOW_FRAMES
from hubert_lightning.files import write_whole
from hubert_lightning.frames import CLOCK, Clock
from hubert_lightning.pretrained.load import encoder_fingerprint, load_encoder
from hubert_lightning.progress_bar import progress
from hubert_lightning.units.kmeans import KMeans, assign
from hubert_lightning.units.label_shards import check_clusters
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.quality import Quality, joint_counts, phones_by_frame

log = logging.getLogger(__name__)


def phone_quality(
    cuts: Sequence[Cut],
    labels: Mapping[str, np.ndarray] | LabelStore,
    num_clusters: int,
    stream: int = 0,
    clock: Clock = CLOCK,
) -> Quality:
    """Measure one stream of labels over the cuts that have phones.

    Args:
        cuts: Utterances.
        labels: (streams, frames) by cut id.
        num_clusters: Number of clusters of the stream.
        stream: Number of the stream.
        clock: Clock of the labels; a store states its own.

    Returns:
        The measures.

    Raises:
        UserError: No cut has phones, or phones extend beyond their audio.
    """
    aligned = [cut for cut in cuts if phones_of(cut)]
    if not aligned:
        raise UserError("no utterance has phones to judge clusters by; add them with `hubert prepare alignments`")
    for cut in aligned:
        check_alignment(cut)
    clock = labels.source.clock if isinstance(labels, LabelStore) else clock
    phone = np.concatenate([phones_by_frame(cut, clock) for cut in aligned])
    cluster = np.concatenate([labels[cut.id][stream] for cut in aligned])
    return Quality.of(joint_counts(phone[phone != ""], cluster[phone != ""], num_clusters))


def layer_quality(
    extractor: Extractor,
    cuts: Sequence[Cut],
    clusters: int,
    max_frames: int = 100_000,
    seed: int = 0,
    num_workers: int = 0,
) -> list[Quality]:
    """Measure the clusters of each layer, encoding every utterance once.

    Args:
        extractor: Function that computes features of one or all layers.
        cuts: Utterances; if some have phones, the others are left out.
        clusters: Number of K-means clusters.
        max_frames: Number of frames, half to fit K-means and half to judge it.
        seed: Seed of the sample and of K-means.
        num_workers: Number of processes that read audio.

    Returns:
        The measures of each layer; those that need phones are NaN if no utterance has any.

    Raises:
        UserError: There are fewer than two utterances, or fewer frames than clusters; or phones extend beyond their
            audio.
    """
    sample = draw_sample(cuts, clusters, max_frames, seed, extractor.clock)
    return _judged(extractor, sample, clusters, seed, num_workers)


def _judged(extractor: Extractor, sample: "QualitySample", clusters: int, seed: int, num_workers: int) -> list[Quality]:
    rows = chosen_features(extractor, sample.cuts, sample.frames, WINDOW_FRAMES, num_workers, torch.float16)
    rows = rows[:, None] if rows.ndim == 2 else rows  # (rows, layers, dim)
    fitted, judged = torch.from_numpy(sample.fit), torch.from_numpy(~sample.fit)
    results = []
    with progress("quality of layers", rows.shape[1], "layers") as advance:
        for layer in range(rows.shape[1]):
            centroids = KMeans().fit(rows[fitted, layer].float(), clusters, seed, device=extractor.device)
            assigned = assign(rows[judged, layer].to(centroids.device), centroids).cpu().numpy()
            results.append(_measured(sample.phone[~sample.fit], assigned, clusters))
            advance()
    return results


class QualitySample(NamedTuple):
    """Frames by which layers are judged.

    Args:
        cuts: Utterances.
        frames: Frames of each utterance.
        phone: (frames of all utterances,), phone of each frame, "" if none is known.
        fit: (frames of all utterances,) bool, whether K-means is fitted on the frame; otherwise it is judged by it.
    """

    cuts: list[Cut]
    frames: list[np.ndarray]
    phone: np.ndarray
    fit: np.ndarray


def draw_sample(cuts: Sequence[Cut], clusters: int, max_frames: int, seed: int, clock: Clock = CLOCK) -> QualitySample:
    """Draw the frames by which layers are judged.

    Args:
        cuts: Utterances; if some have phones, the others are left out.
        clusters: Number of K-means clusters.
        max_frames: Number of frames to draw.
        seed: Seed of the draw.
        clock: Clock of the features.

    Returns:
        The sample.

    Raises:
        UserError: There are too few utterances or frames; or phones extend beyond their audio.
    """
    check_clusters([clusters])
    within(clusters, max_frames=max_frames)
    aligned = [cut for cut in cuts if phones_of(cut)]
    for cut in aligned:
        check_alignment(cut)
    cuts, chosen = choose_frames(aligned or list(cuts), max_frames, seed, clock=clock)
    phones = [phones_by_frame(cut, clock)[frames] for cut, frames in zip(cuts, chosen, strict=True)]
    if aligned:  # frames of pauses that no phone covers do not count
        chosen = [frames[symbols != ""] for frames, symbols in zip(chosen, phones, strict=True)]
    phone = np.concatenate([symbols[symbols != ""] if aligned else symbols for symbols in phones])
    fit = np.concatenate([np.full(len(frames), number % 2 == 0) for number, frames in enumerate(chosen)])
    if fit.sum() < clusters or fit.all():
        raise UserError(
            f"layers cannot be judged by {len(cuts)} of the utterances: {fit.sum()} frames to fit {clusters} clusters, "
            f"{(~fit).sum()} to judge them; give more utterances (or max_frames), or ask for fewer clusters"
        )
    return QualitySample(cuts, chosen, phone, fit)


def best_layer(
    path: Path | str,
    cuts: Sequence[Cut],
    clusters: int,
    record: Path,
    *,
    device: torch.device,
    precision: Precision = nullcontext,
    seed: int = 0,
    num_workers: int = 0,
    clock: Clock | None = None,
) -> int:
    """Find the layer whose clusters have the highest PNMI.

    Args:
        path: Model in any format.
        cuts: Utterances, some of them with phones.
        clusters: Number of K-means clusters.
        record: File that keeps the measures; with the same settings, it is read instead of the audio.
        device: Device that computes.
        precision: Context in which the encoder computes.
        seed: Seed of the sample and of K-means.
        num_workers: Number of processes that read audio.
        clock: Clock of the encoder that learns the clusters; the model's own if not given.

    Returns:
        The layer, counted from 1.

    Raises:
        UserError: No cut has phones, or all have the same one.
    """
    check_phones(cuts)
    encoder = load_encoder(path).to(device)
    phones = hashlib.sha256(json.dumps([(cut.id, phones_of(cut)) for cut in cuts]).encode()).hexdigest()[:16]
    settings = {"encoder": encoder_fingerprint(encoder), "phones": phones, "clusters": clusters, "seed": seed}
    extractor = all_layers_extractor(encoder, precision, clock=clock)
    if extractor.clock != CLOCK:  # earlier versions had no other
        settings["clock"] = list(extractor.clock)
    if record.exists():
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            known = json.loads(record.read_bytes())
            if known["settings"] == settings and known["best_layer"] in range(1, encoder.config.num_layers + 1):
                return int(known["best_layer"])
        log.warning("%s: has other settings, or is corrupt; layers are measured again", record)
    layers = layer_quality(extractor, cuts, clusters, seed=seed, num_workers=num_workers)
    results = _by_layer(layers)
    Console().print(_table(results, str(path)))
    best = _best(layers)
    if best is None:
        raise UserError("layer: best needs utterances with different phones, and these have only one; name a layer")
    numbers = {name: as_numbers(measures) for name, measures in results.items()}
    write_whole(record, json.dumps({"settings": settings, "best_layer": best} | numbers, indent=2).encode())
    return best


def check_phones(cuts: Iterable[Cut]) -> None:
    """Check that there are phones, by which the best layer is chosen.

    Args:
        cuts: Utterances.

    Raises:
        UserError: No cut has phones.
    """
    if not any(phones_of(cut) for cut in cuts):
        raise UserError(
            "layer: best compares clusters with phones, but no utterance to validate on has any; add them "
            "(`hubert phones` for English transcripts, `hubert prepare alignments` for TextGrids), give layer 'auto', "
            "which needs none, or name a layer"
        )


def _by_layer(layers: Sequence[Quality]) -> dict[str, Quality]:
    return {f"layer {number}": measures for number, measures in enumerate(layers, start=1)}


def _measured(phones: np.ndarray, clusters: np.ndarray, num_clusters: int) -> Quality:
    whole = Quality.of(joint_counts(phones, clusters, num_clusters))
    if (phones != "").any():
        return whole
    return whole._replace(pnmi=math.nan, phone_purity=math.nan, cluster_purity=math.nan)


def as_numbers(quality: Quality) -> dict[str, float | None]:
    """Return the measures by name; None for those that are not known."""
    return {name: None if math.isnan(value) else value for name, value in quality._asdict().items()}


def _best(layers: Sequence[Quality]) -> int | None:
    values = [measures.pnmi for measures in layers]
    return None if math.isnan(values[0]) else int(np.argmax(values)) + 1


def _table(results: dict[str, Quality], title: str) -> Table:
    table = Table("clusters of", "PNMI", "phone purity", "cluster purity", "perplexity", "dead", title=title)
    for name, measures in results.items():
        shares = ["–" if math.isnan(measures.pnmi) else f"{value:.3f}" for value in measures[:3]]
        table.add_row(name, *shares, f"{measures.perplexity:.1f}", str(measures.dead_clusters))
    return table
