"""Iterations of pre-training: a fit that lists several is split into fits of one iteration each.

Each iteration has a folder of its own (`iteration1`, `iteration2`, …) with the config that runs it alone, its labels,
and its checkpoint, from which the next iteration takes its labels.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.errors import UserError
from hubert_lightning.features.mfcc import MfccPart
from hubert_lightning.frames import Clock
from hubert_lightning.model.config import clock_of
from hubert_lightning.pretrained.formats.own import read_checkpoint
from hubert_lightning.pretrained.load import encoder_config
from hubert_lightning.training.checkpoints import newest_checkpoint
from hubert_lightning.training.run_config import listed, loggers_of
from hubert_lightning.units.automatic import recorded_clusters
from hubert_lightning.units.kmeans import KMeans, ScikitKMeans
from hubert_lightning.units.label_recipe import (
    CONTINUED,
    LabelRecipe,
    is_auto,
    is_best,
    is_continued,
    is_fresh,
    is_previous,
)
from hubert_lightning.units.layer_quality import check_phones


@dataclass(frozen=True)
class Iteration:
    """One iteration of pre-training: the recipe of its labels, and its length.

    Args:
        features: Features that are clustered: "mfcc", "previous" (the model of the iteration before), or a checkpoint;
            several make a label stream each.
        layer: Transformer layer of that model, counted from 1, "best" (by PNMI, if the validation utterances have
            phones), or "auto" (chosen without phones). Several layers make a label stream each, of one model or of as
            many models.
        clusters: Number of K-means clusters; several numbers make an ensemble; "auto" chooses from 50, 100, 200 and 500
            without phones.
        parts: Parts of MFCCs spliced over three frames, 39 dimensions each, clustered separately (product codes):
            cepstra, delta, delta_delta.
        max_frames: Frames that K-means is fitted on: a tenth of 960 hours, as in the paper's iteration 2.
        kmeans: Algorithm of K-means; hubert_lightning.KMeans if not given.
        quantizer: K-means that was fitted on these features before, used instead of fitting one.
        weights: Initial weights: "fresh" weights, the "previous" iteration's model, or a checkpoint. "continued"
            continues the training of the iteration before: its weights and heads, its optimizer, the order of the data,
            and one learning-rate schedule over all steps. Clusters keep their numbers, because K-means starts from the
            means of the new features over the old clusters.
        max_steps: Optimizer steps.
        residual: Number of stages of residual K-means, one label stream each: every stage clusters the features minus
            their nearest centroids of the stages before.
        relabel_every: Number of steps after which the current model makes new labels; training then continues as with
            "continued" weights, in a new folder. The features must be "previous".
    """

    features: str | list[str] = "mfcc"
    layer: int | Literal["best", "auto"] | list[int | None] | None = None
    clusters: int | list[int] | Literal["auto"] = 100
    parts: list[MfccPart] | None = None
    max_frames: int = 17_280_000
    kmeans: KMeans | ScikitKMeans | None = None
    quantizer: Path | None = None
    weights: str = "fresh"
    max_steps: int = 250_000
    residual: int = 1
    relabel_every: int | None = None


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
        encoder = config.model.init_args.encoder
        clock = clock_of(encoder.conv_kernels, encoder.conv_strides)
        check_iteration(iteration, number, encoder.num_layers, clock)
    check_clusters_before(config.iterations)
    parts = list(parts_of(config.iterations))
    ends = list(accumulate(part.max_steps for part in parts))
    for number, iteration in enumerate(parts, start=1):
        run = copy.deepcopy(config)
        run.pop("config", None)
        run.iterations = []
        run.output = str(Path(config.output) / f"iteration{number}")
        previous = str(Path(config.output) / f"iteration{number - 1}" / "last.ckpt")
        recipe = _recipe(iteration, config.seed_everything).after(previous)
        relabel = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
        first, last = _training(parts, number - 1)
        if first != number - 1:
            relabel["continues"] = str(Path(previous).parent)
        if first != last:
            begin = ends[first] - parts[first].max_steps  # of the training that this one is a part of
            run.model.init_args.schedule_steps = ends[last] - begin
            steps = ends[number - 1] - begin
            if config.trainer.fast_dev_run:  # so many steps of each part
                run.trainer.fast_dev_run = int(config.trainer.fast_dev_run) * (number - first)
        else:
            steps = iteration.max_steps
        callback = Namespace(class_path="hubert_lightning.Relabel", init_args=Namespace(**relabel))  # type: ignore[no-untyped-call]  # jsonargparse
        run.trainer.callbacks = [*listed(run.trainer.callbacks), callback]
        run.trainer.max_steps = steps
        clusters = recipe.num_clusters
        run.model.init_args.num_clusters = clusters[0] if len(clusters) == 1 else clusters
        if not is_fresh(iteration.weights) and not is_continued(iteration.weights):
            run.model.init_args.pretrained = previous if is_previous(iteration.weights) else iteration.weights
        for logger in loggers_of(run):
            for key in ("name", "id"):
                if logger.init_args.get(key):
                    logger.init_args[key] += f"-iteration{number}"
        yield run


def check_iteration(iteration: Iteration, number: int, num_layers: int, clock: Clock | None = None) -> None:
    """Find mistakes in an iteration before any iteration is trained.

    Args:
        iteration: Iteration to check.
        number: Its number, counted from 1.
        num_layers: Transformer layers of the model to train.
        clock: Clock of its encoder, if it is known.

    Raises:
        UserError: The iteration cannot be run.
    """
    name = f"iterations.{number}"
    for key in ("features", "weights"):
        given = listed(getattr(iteration, key))
        if number == 1 and (relative := next((one for one in given if is_previous(one) or is_continued(one)), None)):
            other = "mfcc" if key == "features" else "fresh"
            raise UserError(f"{name}.{key} is {relative!r}, but no iteration precedes it; give {other!r} or a path")
    if iteration.max_steps < 1:
        raise UserError(f"{name}.max_steps is {iteration.max_steps}; give at least one step, or drop the iteration")
    _check_continued(iteration, name)
    try:
        recipe = _recipe(iteration)
        recipe.check_layer(num_layers, clock)
        _ = recipe.given  # reads the quantizer
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if not any(is_kind(iteration.weights) for is_kind in (is_fresh, is_previous, is_continued)):
        try:
            encoder_config(iteration.weights)
        except UserError as error:
            raise UserError(f"{name}.weights: {error}") from error


def settle_clusters(run: Namespace) -> None:
    """Build the model of a run with the number of clusters that `clusters: auto` has chosen for it, if it has.

    Args:
        run: Config of a run, whose output is known.
    """
    for callback in listed(run.trainer.callbacks):
        if is_auto(callback.get("init_args", {}).get("clusters")) and (
            clusters := recorded_clusters(Path(run.output)) or _trained_clusters(Path(run.output))
        ):
            run.model.init_args.num_clusters = clusters


def _trained_clusters(folder: Path) -> int | None:
    """Number of clusters of the newest checkpoint in a folder, if there is one."""
    newest = newest_checkpoint(folder)
    clusters = read_checkpoint(newest).get("hyper_parameters", {}).get("num_clusters") if newest else None
    return clusters if isinstance(clusters, int) else None


def _check_continued(iteration: Iteration, name: str) -> None:
    every = iteration.relabel_every
    if is_auto(iteration.clusters) and (every is not None or is_continued(iteration.weights)):
        raise UserError(
            f"{name}.clusters is 'auto', but a continued training keeps its heads; name a number of clusters, or give "
            "weights 'previous' without relabel_every"
        )
    if every is not None and every < 1:
        raise UserError(f"{name}.relabel_every is {every}; give a number of steps, or leave it out")
    if every is not None and not any(map(is_previous, listed(iteration.features))):
        raise UserError(
            f"{name}.relabel_every is {every}, but labels of {iteration.features} would be the same again; give "
            "features 'previous', or leave relabel_every out"
        )
    if iteration.quantizer and (every is not None or is_continued(iteration.weights)):
        raise UserError(
            f"{name}.quantizer is {iteration.quantizer}, but K-means of a continued training starts from the labels "
            "before; leave the quantizer out, or give weights 'previous'"
        )


def check_clusters_before(iterations: Sequence[Iteration]) -> None:
    """Check that an iteration which continues the one before has as many clusters.

    Args:
        iterations: Iterations in order.

    Raises:
        UserError: It has others, so that its heads do not fit.
    """
    for number, (before, iteration) in enumerate(pairwise(iterations), start=2):
        clusters = [_recipe(one).num_clusters for one in (before, iteration)]
        if is_continued(iteration.weights) and is_auto(before.clusters):
            raise UserError(
                f"iterations.{number} continues an iteration with clusters 'auto'; name the number of both, or give "
                "weights 'previous'"
            )
        if is_continued(iteration.weights) and clusters[0] != clusters[1]:
            raise UserError(
                f"iterations.{number} continues an iteration with {clusters[0]} clusters, but has {clusters[1]}; give "
                "both the same, or weights 'previous'"
            )


def parts_of(iterations: Sequence[Iteration]) -> Iterator[Iteration]:
    """Split each iteration that is labelled several times into iterations that continue each other.

    Args:
        iterations: Iterations of a config, in order.
    """
    for iteration in iterations:
        every = iteration.relabel_every or iteration.max_steps
        for start in range(0, iteration.max_steps, every):
            weights = iteration.weights if start == 0 else CONTINUED
            steps = min(every, iteration.max_steps - start)
            settings = {field.name: getattr(iteration, field.name) for field in fields(Iteration)}  # of a Namespace
            yield Iteration(**settings | {"weights": weights, "max_steps": steps, "relabel_every": None})


def _training(parts: Sequence[Iteration], number: int) -> tuple[int, int]:
    """Indices of the first and the last part of the training that a part belongs to."""
    first = last = number
    while is_continued(parts[first].weights):
        first -= 1
    while last + 1 < len(parts) and is_continued(parts[last + 1].weights):
        last += 1
    return first, last


def _recipe(iteration: Iteration, seed: int = 0) -> LabelRecipe:
    """The recipe of an iteration's labels, which may name the iteration before."""
    shared = {field.name for field in fields(LabelRecipe)} & {field.name for field in fields(Iteration)}
    return LabelRecipe(**{name: getattr(iteration, name) for name in shared}, seed=seed)
