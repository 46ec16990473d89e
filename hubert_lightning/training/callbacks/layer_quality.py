"""Quality of every layer's clusters, logged at each validation."""

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from hubert_lightning.errors import UserError, within
from hubert_lightning.features.extractors import all_layers_extractor
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.training.datamodules import PretrainingData
from hubert_lightning.training.distributed import together
from hubert_lightning.units.label_shards import check_clusters
from hubert_lightning.units.layer_quality import as_numbers, draw_sample, layer_quality


class LayerQuality(Callback):
    """Log the quality of each layer's clusters at each validation of a pre-training run.

    With phones in the validation manifest: PNMI, purities, perplexity, dead clusters; without, the last two.

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
            draw_sample(list(data.validation_cuts), self.clusters, self.max_frames, self.seed)

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
        numbers = {
            f"val/layer{number}_{name}": float(value)
            for number, measures in enumerate(layers, start=1)
            for name, value in as_numbers(measures).items()
            if value is not None
        }
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
