"""Quality of every layer's clusters, logged at each validation."""

import logging
import math
import re
from pathlib import Path

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn

from hubert_lightning.errors import UserError, within
from hubert_lightning.features.extractors import all_layers_extractor
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.training.distributed import together
from hubert_lightning.training.media import Drawn, log_figures, logged_step, pictorial_loggers
from hubert_lightning.training.pretraining_data import PretrainingData
from hubert_lightning.training.watched import (
    LayerRow,
    LayersOfStep,
    PhoneClusters,
    add_layers,
    read_layers,
    read_phone_clusters,
)
from hubert_lightning.units.figures import LayerCurve, layer_figure
from hubert_lightning.units.label_shards import check_clusters
from hubert_lightning.units.layer_quality import draw_sample, layer_quality
from hubert_lightning.units.quality import pnmi

log = logging.getLogger(__name__)


class LayerQuality(Callback):
    """Measure the quality of each layer's clusters at each validation of a pre-training run.

    With phones in the validation manifest: PNMI, purities, perplexity, dead clusters; without, the last two. The
    numbers of all layers are in `watched/layers.jsonl` of the run. Loggers get the best layer and its PNMI, and one
    chart with a line for each iteration of the fit, if they take pictures. `hubert validate` only logs the best layer.

    Args:
        clusters: Number of K-means clusters.
        max_frames: Number of frames, half to fit K-means and half to judge it.
        seed: Seed of the sample and of K-means.

    Raises:
        UserError: A number is out of range.
    """

    def __init__(self, clusters: int = 100, max_frames: int = 50_000, seed: int = 0) -> None:
        check_clusters([clusters])
        within(clusters, max_frames=max_frames)
        within(0, 2**32 - 1, seed=seed)
        self.clusters, self.max_frames, self.seed = clusters, max_frames, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PretrainingData):
            raise UserError("LayerQuality judges a model while it is pre-trained; remove it from trainer.callbacks")
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(
                "LayerQuality encodes on one rank, which has only a part of a sharded model; remove it from "
                "trainer.callbacks, or use strategy ddp"
            )
        if len(data.validation_cuts):  # refuses now what would fail at the first validation
            draw_sample(list(data.validation_cuts), self.clusters, self.max_frames, self.seed, data.clock)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            together(lambda: self._log(trainer, pl_module) if trainer.is_global_zero else None)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cuts = list(trainer.datamodule.validation_cuts)  # type: ignore[attr-defined]
        encoder = pl_module.encoder
        assert isinstance(encoder, HubertEncoder)
        extractor = all_layers_extractor(encoder, trainer.precision_plugin.forward_context)
        training = encoder.training
        encoder.eval()
        layers = layer_quality(extractor, cuts, self.clusters, self.max_frames, self.seed)
        encoder.train(training)
        rows = [
            LayerRow(
                layer=number,
                pnmi=_known(measures.pnmi),
                phone_purity=_known(measures.phone_purity),
                cluster_purity=_known(measures.cluster_purity),
                perplexity=measures.perplexity,
                dead=measures.dead_clusters,
            )
            for number, measures in enumerate(layers, start=1)
        ]
        run, step = Path(trainer.default_root_dir), logged_step(trainer)
        result = LayersOfStep(trainer.global_step, self.clusters, rows)
        if result.best is not None and result.best.pnmi is not None:
            for logger in trainer.loggers:
                best = {"layers/best_pnmi": result.best.pnmi, "layers/best_layer": float(result.best.layer)}
                logger.log_metrics(best, step=step)
        if trainer.state.fn != TrainerFn.FITTING:  # its step is 0, and would replace what the fit has found
            return
        add_layers(run, result)
        measure = "perplexity" if result.best is None else "PNMI"
        log_figures(pictorial_loggers(trainer), f"layers/{measure.lower()}", lambda: _chart(run, measure), step)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _chart(run: Path, measure: str) -> Drawn:
    """Draw a measure by layer, with a line for each iteration up to that of a run."""
    results = {name: (folder, _read(folder)) for name, folder in _iterations(run).items()}
    clusters = results[next(reversed(results))][1][-1].clusters
    curves = [_curve(name, folder, entries, measure, clusters) for name, (folder, entries) in results.items()]
    return {f"{measure} by layer": layer_figure([curve for curve in curves if curve], measure, clusters)}


def _iterations(run: Path) -> dict[str, Path]:
    """Folders of the iterations of a fit up to a run, by their names."""
    number = re.fullmatch(r"iteration(\d+)", run.name)
    if number is None:
        return {"this run": run}
    return {f"iteration {n}": run.with_name(f"iteration{n}") for n in range(1, int(number[1]) + 1)}


def _read(run: Path) -> list[LayersOfStep]:
    try:
        return read_layers(run)
    except UserError as error:  # of an earlier iteration, which no training depends on
        log.warning("%s", error)
        return []


def _read_counts(run: Path) -> PhoneClusters | None:
    try:
        return read_phone_clusters(run)
    except UserError as error:
        log.warning("%s", error)
        return None


def _curve(name: str, run: Path, results: list[LayersOfStep], measure: str, clusters: int) -> LayerCurve | None:
    """Return the measure of each layer at each validation; None if no validation has it with so many clusters."""
    by_step = [
        [row.perplexity if measure == "perplexity" else row.pnmi for row in entry.layers]
        for entry in results
        if entry.clusters == clusters
    ]
    known = [[value for value in values if value is not None] for values in by_step if None not in values]
    if not known:
        return None
    counts = _read_counts(run) if measure == "PNMI" else None
    if counts is None or len(counts.counts[0]) != clusters:  # PNMI rises with the number of clusters
        return LayerCurve(name, known[-1], known[:-1])
    return LayerCurve(name, known[-1], known[:-1], pnmi(np.array(counts.counts)))
