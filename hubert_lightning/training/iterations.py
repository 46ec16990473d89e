"""Iterations of pre-training: a fit that lists several is split into fits of one iteration each.

Each iteration has a folder of its own (`iteration1`, `iteration2`, …) with the config that runs it alone, its labels,
and its checkpoint, from which the next iteration takes its labels.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.errors import UserError
from hubert_lightning.features.mfcc import Part
from hubert_lightning.pretrained.load import encoder_config
from hubert_lightning.training.run_config import listed, loggers_of
from hubert_lightning.units.kmeans import KMeans, ScikitKMeans
from hubert_lightning.units.kmeans_file import load_quantizer
from hubert_lightning.units.layer_quality import check_phones


@dataclass(frozen=True)
class Iteration:
    """One iteration of pre-training: the recipe of its labels, and its length.

    Args:
        features: Features that are clustered: "mfcc", "previous" (the model of the iteration before), or a checkpoint.
        layer: Transformer layer of that model, counted from 1, or "best" (by PNMI, if the validation utterances have
            phones).
        clusters: Number of K-means clusters; several numbers make an ensemble.
        parts: Parts of MFCCs spliced over three frames, 39 dimensions each, clustered separately (product codes):
            cepstra, delta, delta_delta.
        max_frames: Frames that K-means is fitted on: a tenth of 960 hours, as in the paper's iteration 2.
        kmeans: Algorithm of K-means; hubert_lightning.KMeans if not given.
        quantizer: K-means that was fitted on these features before, used instead of fitting one.
        weights: Initial weights: "fresh" weights, the "previous" iteration's model, or a checkpoint.
        max_steps: Optimizer steps.
    """

    features: str = "mfcc"
    layer: int | Literal["best"] | None = None
    clusters: int | list[int] = 100
    parts: list[Part] | None = None
    max_frames: int = 17_280_000
    kmeans: KMeans | ScikitKMeans | None = None
    quantizer: Path | None = None
    weights: str = "fresh"
    max_steps: int = 250_000


def single_iterations(config: Namespace) -> Iterator[Namespace]:
    """Split a fit of several iterations.

    Args:
        config: Config whose `iterations` are listed.

    Returns:
        Config of each iteration.

    Raises:
        UserError: An iteration cannot be run.
    """
    if config.trainer.max_steps != -1:
        raise UserError(
            f"trainer.max_steps is {config.trainer.max_steps}, but each entry of iterations has its own; set it there"
        )
    if any(iteration.layer == "best" for iteration in config.iterations):
        data = config.data.init_args
        check_phones(read_manifest(data.validation or data.train))
    for number, iteration in enumerate(config.iterations, start=1):
        check_iteration(iteration, number, config.model.init_args.encoder.num_layers)
        run = copy.deepcopy(config)
        run.pop("config", None)
        run.iterations = []
        run.output = str(Path(config.output) / f"iteration{number}")
        previous = str(Path(config.output) / f"iteration{number - 1}" / "last.ckpt")
        relabel = {
            "features": previous if iteration.features == "previous" else iteration.features,
            "layer": iteration.layer,
            "clusters": iteration.clusters,
            "parts": iteration.parts,
            "max_frames": iteration.max_frames,
            "kmeans": iteration.kmeans,
            "seed": config.seed_everything,
            "quantizer": iteration.quantizer,
        }
        callback = Namespace(class_path="hubert_lightning.Relabel", init_args=Namespace(relabel))
        run.trainer.callbacks = [*listed(run.trainer.callbacks), callback]
        run.trainer.max_steps = iteration.max_steps
        clusters = _stream_clusters(iteration)
        run.model.init_args.num_clusters = clusters[0] if len(clusters) == 1 else clusters
        if iteration.weights != "fresh":
            run.model.init_args.pretrained = previous if iteration.weights == "previous" else iteration.weights
        for logger in loggers_of(run):
            for key in ("name", "id"):
                if logger.init_args.get(key):
                    logger.init_args[key] += f"-iteration{number}"
        yield run


def check_iteration(iteration: Iteration, number: int, num_layers: int) -> None:
    """Find mistakes before the iterations that precede this one are trained.

    Args:
        iteration: Iteration to check.
        number: Its number, counted from 1.
        num_layers: Transformer layers of the model to train.

    Raises:
        UserError: The iteration cannot be run.
    """
    name = f"iterations[{number - 1}]"
    if iteration.features == "previous" and number == 1:
        raise UserError(f"{name}.features is 'previous', but no iteration precedes it; give 'mfcc' or a path")
    if (iteration.features == "mfcc") != (iteration.layer is None):
        raise UserError(f"{name} has layer {iteration.layer}; MFCCs have no layers, and a model needs one")
    if iteration.parts and iteration.features != "mfcc":
        raise UserError(f"{name} has parts {', '.join(iteration.parts)}, which only MFCCs have; leave them out")
    layer = 1 if iteration.layer == "best" else iteration.layer or 0
    if iteration.features == "previous" and not 1 <= layer <= num_layers:
        raise UserError(f"{name} has layer {iteration.layer} of an encoder of {num_layers}; layers count from 1")
    if iteration.features not in ("mfcc", "previous"):
        available = _num_layers(iteration.features, f"{name}.features")
        if not 1 <= layer <= available:
            raise UserError(
                f"{name} has layer {iteration.layer} of {iteration.features}, which has {available}; name one of those"
            )
    if iteration.max_steps < 1:
        raise UserError(f"{name}.max_steps is {iteration.max_steps}; give at least one step, or drop the iteration")
    for clusters in listed(iteration.clusters):
        if not 2 <= clusters <= min(iteration.max_frames, 2**16):
            raise UserError(
                f"{name} asks for {clusters} clusters of {iteration.max_frames} frames; "
                "give at least 2, no more than frames, and no more than 65536"
            )
    if not listed(iteration.clusters):
        raise UserError(f"{name}.clusters is an empty list; give a number of clusters")
    if iteration.quantizer:
        try:
            load_quantizer(iteration.quantizer, _stream_clusters(iteration))
        except UserError as error:
            raise UserError(f"{name}.quantizer: {error}") from error
        if iteration.layer == "best":
            raise UserError(f"{name} has layer best and a quantizer, which was fitted on one layer; give that layer")
    if iteration.weights == "previous" and number == 1:
        raise UserError(f"{name}.weights is 'previous', but no iteration precedes it; give 'fresh' or a path")
    if iteration.weights not in ("fresh", "previous"):
        _num_layers(iteration.weights, f"{name}.weights")


def _num_layers(checkpoint: str, key: str) -> int:
    """Number of Transformer layers of a checkpoint that an iteration names."""
    try:
        return encoder_config(checkpoint).num_layers
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def _stream_clusters(iteration: Iteration) -> list[int]:
    """Number of clusters of each stream of labels."""
    return listed(iteration.clusters) * len(iteration.parts or [None])
