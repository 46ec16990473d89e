"""How good are the units, and which layer makes the best? Clusters against phones (HuBERT §IV-E).

Every layer is judged in one pass over the audio: its K-means is fitted on every other sampled utterance and judged on
those between. `hubert quality` shows it, `layer: best` acts on it, and the `LayerQuality` callback logs it while a
model is trained.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from hubert_lightning.data.alignments import check_alignment, phones_of
from hubert_lightning.data.manifest import check_audio, read_manifest
from hubert_lightning.errors import UserError
from hubert_lightning.features.extractors import Extractor, all_layers_extractor, mfcc_extractor
from hubert_lightning.features.sample import choose_frames, chosen_features
from hubert_lightning.files import replacing_all, write_whole
from hubert_lightning.frames import num_frames
from hubert_lightning.pretrained.load import encoder_fingerprint, load_encoder
from hubert_lightning.units.kmeans import KMeans, assign
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.quality import Quality, frame_phones, joint_counts

log = logging.getLogger(__name__)

BATCH_FRAMES = 5_000  # 100 s of audio at once


def quality(
    checkpoint: Path,
    manifests: list[Path],
    output: Path = Path("quality"),
    clusters: int = 100,
    max_frames: int = 100_000,
    seed: int = 0,
) -> None:
    """Judge the clusters of every layer of an encoder, and of MFCCs, by the phones they tell apart.

    Args:
        checkpoint: Of pre-training or fine-tuning, or a directory saved by transformers.
        manifests: Utterances, with phone alignments where there are any (`hubert prepare alignments`).
        output: Folder for quality.json and quality.png.
        clusters: Number of K-means clusters.
        max_frames: Frames that K-means is fitted on and judged by, half each.
        seed: Of the sample and of K-means.
    """
    cuts = list(read_manifest(manifests))
    check_audio(cuts)
    sample = _sample(cuts, clusters, max_frames, seed)
    encoder = load_encoder(checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
    layers = _judged(all_layers_extractor(encoder), sample, clusters, seed)
    [of_mfcc] = _judged(mfcc_extractor(), sample, clusters, seed)
    results = {"mfcc": of_mfcc} | {f"layer {number}": of for number, of in enumerate(layers, start=1)}
    best = _best(layers)
    numbers = {name: as_numbers(of) for name, of in results.items()}
    kept = json.dumps(numbers | {"clusters": clusters, "best_layer": best}, indent=2)
    console = Console()
    console.print(_table(results, f"{clusters} clusters of {checkpoint}"))
    if best is None:
        console.print("no utterance has phones, so nothing tells which layer is best; `hubert prepare alignments`")
    else:
        console.print(f"best: layer {best}; in YAML: layer: {best}, or layer: best")
    with replacing_all(output / "quality.png", output / "quality.json") as (figure, file):
        figure.write(_drawn(results, clusters))
        file.write(kept.encode())
    console.print(f"numbers in {output / 'quality.json'}, figure in {output / 'quality.png'}")


def phone_quality(
    cuts: Sequence[Cut], labels: Mapping[str, np.ndarray] | LabelStore, num_clusters: int, stream: int = 0
) -> Quality:
    """What one stream of labels, id → (streams, frames), is worth, over the cuts that have phones.

    Raises:
        UserError: No cut has phones, or some run past their audio.
    """
    aligned = [cut for cut in cuts if phones_of(cut)]
    if not aligned:
        raise UserError("no utterance has phones to judge clusters by; add them with `hubert prepare alignments`")
    for cut in aligned:
        check_alignment(cut)
    phone = np.concatenate([_frame_phones(cut) for cut in aligned])
    cluster = np.concatenate([labels[cut.id][stream] for cut in aligned])
    return Quality.of(joint_counts(phone[phone != ""], cluster[phone != ""], num_clusters))


def layer_quality(
    extractor: Extractor,
    cuts: Sequence[Cut],
    clusters: int,
    max_frames: int = 100_000,
    seed: int = 0,
) -> list[Quality]:
    """What clusters of each layer are worth, encoding every utterance once.

    Of a manifest in which some cuts have phones, the others are left out; where none has, what needs phones is NaN.

    Raises:
        UserError: Fewer than two utterances, or fewer frames than clusters; phones that run past their audio.
    """
    return _judged(extractor, _sample(cuts, clusters, max_frames, seed), clusters, seed)


def _judged(extractor: Extractor, sample: "_Sample", clusters: int, seed: int) -> list[Quality]:
    rows = chosen_features(extractor, sample.cuts, sample.frames, BATCH_FRAMES, dtype=torch.float16)
    rows = rows[:, None] if rows.ndim == 2 else rows  # (rows, layers, dim)
    fitted, judged = torch.from_numpy(sample.fit), torch.from_numpy(~sample.fit)
    results = []
    for layer in range(rows.shape[1]):
        centroids = KMeans().fit(rows[fitted, layer].float(), clusters, seed, device=extractor.device)
        found = assign(rows[judged, layer].to(centroids.device), centroids).cpu().numpy()
        results.append(_of(sample.phone[~sample.fit], found, clusters))
    return results


class _Sample(NamedTuple):
    """What layers are judged by.

    cuts, frames: the utterances, and which frames of each
    phone, fit:   of all these frames, in one row, the phone and whether K-means sees the frame
    """

    cuts: list[Cut]
    frames: list[np.ndarray]
    phone: np.ndarray
    fit: np.ndarray


def _sample(cuts: Sequence[Cut], clusters: int, max_frames: int, seed: int) -> _Sample:
    if not 2 <= clusters <= max_frames:
        raise UserError(f"{clusters} clusters of {max_frames} frames: it takes at least 2, and no more than frames")
    aligned = [cut for cut in cuts if phones_of(cut)]
    for cut in aligned:
        check_alignment(cut)
    cuts, chosen = choose_frames(aligned or list(cuts), max_frames, seed)
    phones = [_frame_phones(cut)[of] for cut, of in zip(cuts, chosen, strict=True)]
    if aligned:  # pauses that no phone covers say nothing
        chosen = [of[named != ""] for of, named in zip(chosen, phones, strict=True)]
    phone = np.concatenate([named[named != ""] if aligned else named for named in phones])
    fit = np.concatenate([np.full(len(of), place % 2 == 0) for place, of in enumerate(chosen)])
    if fit.sum() < clusters or fit.all():
        raise UserError(
            f"layers cannot be judged by {len(cuts)} of the utterances: {fit.sum()} frames to fit {clusters} clusters "
            f"on, {(~fit).sum()} to judge them by; give more utterances (or max_frames), or ask for fewer clusters"
        )
    return _Sample(cuts, chosen, phone, fit)


def best_layer(
    path: Path | str,
    cuts: Sequence[Cut],
    clusters: int,
    record: Path,
    *,
    device: torch.device,
    precision: Callable[[], AbstractContextManager] = nullcontext,
    seed: int = 0,
) -> int:
    """The layer whose clusters have the highest PNMI; the numbers are kept in `record`, and asked before the audio.

    Raises:
        UserError: No cut has phones, or all have the same one.
    """
    check_phones(cuts)
    encoder = load_encoder(path).to(device)
    phones = hashlib.sha256(json.dumps([(cut.id, phones_of(cut)) for cut in cuts]).encode()).hexdigest()[:16]
    settings = {"encoder": encoder_fingerprint(encoder), "phones": phones, "clusters": clusters, "seed": seed}
    if record.exists():
        # Damaged, in whatever way: judged again
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            known = json.loads(record.read_bytes())
            if known["settings"] == settings and known["best_layer"] in range(1, encoder.config.num_layers + 1):
                return int(known["best_layer"])
        log.warning("%s: of other settings, or damaged; layers are judged again", record)
    layers = layer_quality(all_layers_extractor(encoder, precision), cuts, clusters, seed=seed)
    Console().print(_table({f"layer {number}": of for number, of in enumerate(layers, start=1)}, str(path)))
    best = _best(layers)
    if best is None:
        raise UserError("layer: best needs utterances in which phones differ, and these have but one; name a layer")
    numbers = {f"layer {number}": as_numbers(of) for number, of in enumerate(layers, start=1)}
    write_whole(record, json.dumps({"settings": settings, "best_layer": best} | numbers, indent=2).encode())
    return best


def check_phones(cuts: Iterable[Cut]) -> None:
    """Refuse to choose the best layer where nothing tells which it is.

    Raises:
        UserError: No cut has phones.
    """
    if not any(phones_of(cut) for cut in cuts):
        raise UserError(
            "layer: best compares clusters with phones, but no utterance to validate on has any; add them "
            "(`hubert prepare alignments`), or name a layer"
        )


def _frame_phones(cut: Cut) -> np.ndarray:
    return np.array(frame_phones(phones_of(cut), num_frames(cut.num_samples)))


def _of(phones: np.ndarray, clusters: np.ndarray, num_clusters: int) -> Quality:
    whole = Quality.of(joint_counts(phones, clusters, num_clusters))
    if (phones != "").any():
        return whole
    return whole._replace(pnmi=math.nan, phone_purity=math.nan, cluster_purity=math.nan)


def as_numbers(quality: Quality) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in quality._asdict().items()}


def _best(layers: Sequence[Quality]) -> int | None:
    values = [of.pnmi for of in layers]
    return None if math.isnan(values[0]) else int(np.argmax(values)) + 1


def _table(results: dict[str, Quality], title: str) -> Table:
    table = Table("clusters of", "PNMI", "phone purity", "cluster purity", "perplexity", "dead", title=title)
    for name, of in results.items():
        shares = ["–" if math.isnan(of.pnmi) else f"{value:.3f}" for value in of[:3]]
        table.add_row(name, *shares, f"{of.perplexity:.1f}", str(of.dead_clusters))
    return table


def _drawn(results: dict[str, Quality], clusters: int) -> bytes:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    shares, usage = figure.subplots(1, 2)
    names = [name.removeprefix("layer ") for name in results]
    for value, label, colour in (
        ("pnmi", "PNMI", "#2a6f97"),
        ("phone_purity", "phone purity", "#e07a3f"),
        ("cluster_purity", "cluster purity", "#9aa5ad"),
    ):
        shares.plot(names, [getattr(of, value) for of in results.values()], marker=".", color=colour, label=label)
    shares.set(title="What clusters know of phones", xlabel="layer", ylim=(0, None))
    shares.legend(frameon=False)
    usage.plot(names, [of.perplexity for of in results.values()], marker=".", color="#2a6f97")
    usage.set(title=f"Clusters in use, as if alike, of {clusters}", xlabel="layer", ylim=(0, clusters))
    for axes in (shares, usage):
        axes.spines[["top", "right"]].set_visible(False)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=160)
    return content.getvalue()
