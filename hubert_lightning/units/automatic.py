"""`layer: auto` and `clusters: auto`: chosen without phones before labels are made, and kept in the run's folder."""

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut

from hubert_lightning.errors import UserError
from hubert_lightning.features.extractors import (
    MFCC,
    Extractor,
    Precision,
    all_layers_extractor,
    layer_extractor,
    mfcc_extractor,
)
from hubert_lightning.files import write_whole
from hubert_lightning.frames import CLOCK, Clock
from hubert_lightning.pretrained.load import encoder_fingerprint, load_encoder
from hubert_lightning.units.label_recipe import LabelRecipe
from hubert_lightning.units.proposal import Proposal, grid_for, propose
from hubert_lightning.units.stretches import draw_speech
from hubert_lightning.units.survey import Measures, survey
from hubert_lightning.untrusted.json_file import read_json_object

log = logging.getLogger(__name__)

LAYERS = "layers.json"
"""File in the folder of a run that says how its layer and its number of clusters were chosen."""
MAX_FRAMES = 100_000
"""Frames that layers and numbers of clusters are judged by, at most."""
MAX_CUTS = 4_000
"""Utterances that these frames are drawn from, at most."""


class Choice(NamedTuple):
    """The layer and the numbers of clusters of a recipe.

    Args:
        layer: Layer, counted from 1; None for MFCCs.
        clusters: Number of clusters, or several of an ensemble.
    """

    layer: int | None
    clusters: int | list[int]


def choose(
    recipe: LabelRecipe,
    cuts: Sequence[Cut],
    manifest: str,
    record: Path,
    *,
    device: torch.device,
    precision: Precision = nullcontext,
    num_workers: int = 0,
    clock: Clock | None = None,
) -> Choice:
    """Choose what a recipe leaves to `auto`.

    Args:
        recipe: Recipe with `layer: auto`, `clusters: auto`, or both.
        cuts: Training utterances.
        manifest: Fingerprint of these utterances.
        record: File that keeps the measures; with the same settings, it is read instead of the audio.
        device: Device that computes.
        precision: Context in which the encoder computes.
        num_workers: Number of processes that read audio.
        clock: Clock of the encoder that learns the clusters; the model's own if not given.

    Returns:
        The choice.

    Raises:
        UserError: There are too few frames, or a file cannot be read.
    """
    [(features, layer)] = recipe.sources
    known_layer = None if recipe.is_auto_layer or layer is None else int(layer)
    extractor, name = _extractor(features, known_layer, device, precision, clock)
    settings: dict[str, Any] = {
        "features": name,
        "layer": layer,
        "clusters": recipe.clusters,
        "manifest": manifest,
        "max_frames": min(MAX_FRAMES, recipe.max_frames),
        "seed": recipe.seed,
    }
    if extractor.clock != CLOCK:
        settings["clock"] = list(extractor.clock)
    kept = _read(record)
    if kept.get("settings") == settings and isinstance(clusters := kept.get("clusters"), int):
        chosen_layer = kept.get("best_layer")
    else:
        if kept:
            log.warning("%s: has other settings, or is corrupt; layers are measured again", record)
        measures = _measured(recipe, extractor, cuts, num_workers)
        if known_layer is not None:
            measures = [replace(row, layer=known_layer) for row in measures]
        proposal = propose(measures)
        chosen_layer, clusters = proposal.layer, proposal.clusters
        log.info("chosen: %s, %d clusters: %s", _named(chosen_layer), clusters, proposal.reason)
        if proposal.doubt:
            log.warning("%s", proposal.doubt)
        _keep(record, settings, measures, proposal)
    return Choice(chosen_layer, clusters if isinstance(recipe.clusters, str) else recipe.clusters)


def recorded_clusters(folder: Path) -> int | None:
    """Read the number of clusters that was chosen for the run in a folder; None if none is kept there."""
    clusters = _read(folder / LAYERS).get("clusters")
    return clusters if isinstance(clusters, int) else None


def _extractor(
    features: str, layer: int | None, device: torch.device, precision: Precision, clock: Clock | None
) -> tuple[Extractor, str]:
    """Function that computes the features of all layers or of the known one, and the name of their model."""
    if features == MFCC:
        return mfcc_extractor(clock=clock or CLOCK), MFCC
    if layer is not None:
        extractor = layer_extractor(features, layer, device, precision, clock)
        return extractor, extractor.name
    encoder = load_encoder(features).to(device)
    return all_layers_extractor(encoder, precision, True, clock), encoder_fingerprint(encoder)


def _measured(recipe: LabelRecipe, extractor: Extractor, cuts: Sequence[Cut], num_workers: int) -> list[Measures]:
    """Measure layers with each number of clusters that the recipe allows, on a sample of the utterances."""
    drawn = _drawn(cuts, recipe.seed)
    drawing: dict[str, Any] = {"with_phones": False, "clock": extractor.clock}
    max_frames = min(MAX_FRAMES, recipe.max_frames)
    grid = recipe.ensemble
    if recipe.is_auto_clusters:
        grid = grid_for(draw_speech(drawn, [2], max_frames, recipe.seed, **drawing).least)
    sample = draw_speech(drawn, sorted(set(grid)), max_frames, recipe.seed, **drawing)
    return survey(extractor, sample, sorted(set(grid)), recipe.seed, num_workers)


def _drawn(cuts: Sequence[Cut], seed: int) -> list[Cut]:
    order = np.random.default_rng(seed).permutation(len(cuts))[:MAX_CUTS]
    return [cuts[number] for number in order.tolist()]


def _named(layer: int | None) -> str:
    return "MFCCs" if layer is None else f"layer {layer}"


def _keep(record: Path, settings: dict[str, Any], measures: Sequence[Measures], proposal: Proposal) -> None:
    surveys: dict[str, dict[str, Any]] = {}
    for row in measures:
        surveys.setdefault(str(row.clusters), {})[row.name] = row.as_numbers()
    chosen = {name: numbers for name, numbers in surveys[str(proposal.clusters)].items() if name != "layer 0"}
    content = {
        "settings": settings,
        "best_layer": proposal.layer,
        "clusters": proposal.clusters,
        "reason": proposal.reason,
        **chosen,
        "surveys": surveys,
    }
    write_whole(record, (json.dumps(content, indent=2) + "\n").encode())


def _read(record: Path) -> dict[str, Any]:
    if not record.is_file():
        return {}
    try:
        return dict(read_json_object(record))
    except UserError:
        return {"corrupt": True}
