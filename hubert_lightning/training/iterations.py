"""Iterations of pre-training: a fit that lists several is split into fits of one iteration each.

Each iteration has a folder of its own (`iteration1`, `iteration2`, …) with the config that runs it alone, its labels,
and its checkpoint, from which the next iteration takes its labels.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.errors import UserError
from hubert_lightning.features.mfcc import MfccPart
from hubert_lightning.pretrained.load import encoder_config
from hubert_lightning.training.run_config import listed, loggers_of
from hubert_lightning.units.kmeans import KMeans, ScikitKMeans
from hubert_lightning.units.label_recipe import LabelRecipe, is_best, is_fresh, is_previous
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
    parts: list[MfccPart] | None = None
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
    if any(is_best(iteration.layer) for iteration in config.iterations):
        data = config.data.init_args
        check_phones(read_manifest(data.validation or data.train))
    for number, iteration in enumerate(config.iterations, start=1):
        check_iteration(iteration, number, config.model.init_args.encoder.num_layers)
        run = copy.deepcopy(config)
        run.pop("config", None)
        run.iterations = []
        run.output = str(Path(config.output) / f"iteration{number}")
        previous = str(Path(config.output) / f"iteration{number - 1}" / "last.ckpt")
        recipe = _recipe(iteration, config.seed_everything).after(previous)
        relabel = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
        callback = Namespace(class_path="hubert_lightning.Relabel", init_args=Namespace(**relabel))  # type: ignore[no-untyped-call]  # jsonargparse
        run.trainer.callbacks = [*listed(run.trainer.callbacks), callback]
        run.trainer.max_steps = iteration.max_steps
        clusters = recipe.num_clusters
        run.model.init_args.num_clusters = clusters[0] if len(clusters) == 1 else clusters
        if not is_fresh(iteration.weights):
            run.model.init_args.pretrained = previous if is_previous(iteration.weights) else iteration.weights
        for logger in loggers_of(run):
            for key in ("name", "id"):
                if logger.init_args.get(key):
                    logger.init_args[key] += f"-iteration{number}"
        yield run


def check_iteration(iteration: Iteration, number: int, num_layers: int) -> None:
    """Find mistakes in an iteration before any iteration is trained.

    Args:
        iteration: Iteration to check.
        number: Its number, counted from 1.
        num_layers: Transformer layers of the model to train.

    Raises:
        UserError: The iteration cannot be run.
    """
    name = f"iterations[{number - 1}]"
    for key in ("features", "weights"):
        if is_previous(getattr(iteration, key)) and number == 1:
            other = "mfcc" if key == "features" else "fresh"
            raise UserError(f"{name}.{key} is 'previous', but no iteration precedes it; give {other!r} or a path")
    if iteration.max_steps < 1:
        raise UserError(f"{name}.max_steps is {iteration.max_steps}; give at least one step, or drop the iteration")
    try:
        recipe = _recipe(iteration)
        recipe.check_layer(previous_layers=num_layers)
        _ = recipe.given  # reads the quantizer
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if not is_fresh(iteration.weights) and not is_previous(iteration.weights):
        try:
            encoder_config(iteration.weights)
        except UserError as error:
            raise UserError(f"{name}.weights: {error}") from error


def _recipe(iteration: Iteration, seed: int = 0) -> LabelRecipe:
    """The recipe of an iteration's labels, which may name the iteration before."""
    shared = {field.name for field in fields(LabelRecipe)} & {field.name for field in fields(Iteration)}
    return LabelRecipe(**{name: getattr(iteration, name) for name in shared}, seed=seed)
