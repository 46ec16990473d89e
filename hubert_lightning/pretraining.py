"""Masked prediction: batch in, loss out, log (HuBERT §II)."""

import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import ParamsT

from hubert_lightning.data.batches import PretrainingBatch
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.model.hubert import EncoderConfig, HubertEncoder
from hubert_lightning.model.prediction import ClusterPredictor
from hubert_lightning.model.pretrained import load_encoder
from hubert_lightning.schedules import linear_warmup_decay


class HubertPretraining(LightningModule):
    """Predict the cluster of each masked frame from the frames around it. Defaults: HuBERT Base, iteration 1.

    Args:
        encoder: Size and regularisation of the encoder.
        num_clusters: K-means clusters to choose from, of each stream of labels if there are several; set from the
            labels where a fit lists iterations.
        final_dim: Width of the projection that codewords are compared in.
        temperature: Divides the cosine logits.
        normal_codewords: Draw codewords that point everywhere instead of U(0, 1); small models learn sooner.
        masked_weight: α of the paper: weight of the loss at masked frames; the others weigh 1 - α.
        feature_penalty: Weight of the mean square of the convolutions' output.
        pretrained: Checkpoint or transformers directory whose encoder training goes on from, under a new head; fresh
            weights if none.
        optimizer: Any torch optimizer; its learning rate is the peak. Base's AdamW if none is named.
        warmup_steps: Steps up to the peak; from there the rate falls to 0 at the last step.
    """

    def __init__(
        self,
        encoder: EncoderConfig = EncoderConfig(),
        num_clusters: int | list[int] = 100,
        final_dim: int = 256,
        temperature: float = 0.1,
        normal_codewords: bool = False,
        masked_weight: float = 1.0,
        feature_penalty: float = 10.0,
        pretrained: Path | None = None,
        optimizer: OptimizerCallable | None = None,
        warmup_steps: int = 32_000,
    ) -> None:
        super().__init__()
        if not 0 <= masked_weight <= 1:
            raise ValueError(f"masked_weight is {masked_weight}; it is a weight between 0 and 1")
        if isinstance(encoder, dict):  # from a checkpoint
            encoder = EncoderConfig(**encoder)
        streams = [num_clusters] if isinstance(num_clusters, int) else num_clusters
        self.save_hyperparameters(ignore=["optimizer", "pretrained"])
        self.hparams["encoder"] = asdict(encoder)  # plain numbers: a checkpoint opens without our classes
        self.encoder = HubertEncoder(encoder)
        if pretrained is not None:
            self.encoder.load_state_dict(_weights_of(pretrained, encoder))
        self.predictors = nn.ModuleList(
            ClusterPredictor(encoder.dim, clusters, final_dim, temperature, normal_codewords) for clusters in streams
        )
        self.masked_weight, self.feature_penalty = masked_weight, feature_penalty
        self.optimizer, self.warmup_steps = optimizer or base_optimizer, warmup_steps
        self._audio_seconds, self._since = 0.0, 0.0  # read and trained on since the last log

    @property
    def num_clusters(self) -> list[int]:
        """Of each stream of labels."""
        return [predictor.num_clusters for predictor in self.predictors]  # type: ignore[misc]

    def forward(self, waveform: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """Cluster logits of every frame for each stream, and the mean square of the convolutions' output.

        waveform: (batch, samples)
        mask:     (batch, frames) bool
        returns:  (batch, frames, clusters) of each stream, ()
        """
        local = self.encoder.local_features(waveform)
        # All frames, not only masked ones: under 1 % of Base's operations, and its shapes never change.
        frames = self.encoder.contextual(local, mask=mask)
        return [predictor(frames) for predictor in self.predictors], local.float().square().mean()

    def training_step(self, batch: PretrainingBatch) -> Tensor:
        loss, metrics = self._step(batch)
        if self._logging:
            clusters = {"label_clusters": batch.cluster, "predicted_clusters": metrics.pop("predicted")}
            metrics |= {name: self._histogram(ids).count_nonzero().float() for name, ids in clusters.items()}
            metrics["masked_fraction"] = batch.mask.float().mean()
            self._log("train", metrics, batch)
        return loss

    @property
    def _logging(self) -> bool:
        """Whether the Trainer writes what is logged in this step; if not, logging would be a tenth of a small step."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.global_step + 1) % every == 0

    def on_train_start(self) -> None:
        self._start_clock()

    def on_validation_end(self) -> None:
        self._start_clock()

    def _start_clock(self) -> None:
        self._audio_seconds, self._since = 0.0, time.perf_counter()

    def on_train_batch_end(self, outputs: object, batch: PretrainingBatch, batch_idx: int) -> None:
        self._audio_seconds += batch.waveform.numel() / SAMPLE_RATE * self.trainer.world_size
        done, every = self.trainer.fit_loop.total_batch_idx + 1, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and done % every == 0:
            passed = time.perf_counter() - self._since
            self.log("train/audio_hours_per_second", self._audio_seconds / passed / 3600)
            self._start_clock()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._logging:
            gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
            self.log("train/gradient_norm", torch.nn.utils.get_total_norm(gradients))
            self.log("train/learning_rate", optimizer.param_groups[0]["lr"])

    def on_validation_epoch_start(self) -> None:
        counts = (2, len(self.num_clusters), max(self.num_clusters))
        self._used = torch.zeros(counts, dtype=torch.int64, device=self.device)  # by labels, by predictions

    def validation_step(self, batch: PretrainingBatch) -> None:
        _, metrics = self._step(batch)
        self._used += torch.stack([self._histogram(batch.cluster), self._histogram(metrics.pop("predicted"))])
        self._log("val", metrics, batch)

    def on_validation_epoch_end(self) -> None:
        used = self.trainer.strategy.reduce(self._used, reduce_op="sum")
        share = used / used.sum(dim=-1, keepdim=True).clamp(min=1)
        perplexity = torch.special.entr(share).sum(dim=-1).exp().mean(dim=-1)  # a mean over streams
        for number, name in enumerate(("label", "predicted")):
            self.log(f"val/{name}_clusters", used[number].count_nonzero().float(), sync_dist=True)
            self.log(f"val/{name}_perplexity", perplexity[number], sync_dist=True)

    def _step(self, batch: PretrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logits, penalty = self(batch.waveform, batch.mask)
        losses = torch.stack([_losses(of, batch.cluster[:, stream]) for stream, of in enumerate(logits)], dim=1)
        predicted = torch.stack([of.detach().argmax(dim=-1) for of in logits], dim=1)
        correct = (predicted == batch.cluster).float().mean(dim=1)
        masked, unmasked = batch.mask.float(), (~batch.mask).float()
        # HuBERT §II-C: the losses of an ensemble's streams add up
        masked_loss, unmasked_loss = _mean(losses.sum(dim=1), masked), _mean(losses.sum(dim=1), unmasked)
        prediction = self.masked_weight * masked_loss + (1 - self.masked_weight) * unmasked_loss  # eq. 2
        loss = prediction + self.feature_penalty * penalty
        return loss, {
            "loss": loss.detach(),
            "masked_loss": masked_loss.detach(),
            "unmasked_loss": unmasked_loss.detach(),
            "feature_penalty": penalty.detach(),
            "masked_accuracy": _mean(correct, masked),
            "unmasked_accuracy": _mean(correct, unmasked),
            "predicted": predicted,
        }

    def _log(self, part: str, metrics: dict[str, Tensor], batch: PretrainingBatch) -> None:
        validating = part == "val"
        named = {f"{part}/{name}": value for name, value in metrics.items()}
        self.log_dict(named, batch_size=batch.mask.numel(), sync_dist=validating)  # a mean over frames, not batches

    def _histogram(self, ids: Tensor) -> Tensor:
        """(batch, streams, frames) → (streams, clusters of the largest stream)"""
        ids = ids.transpose(0, 1).flatten(1)  # (streams, frames)
        counts = torch.zeros(len(ids), max(self.num_clusters), dtype=torch.int64, device=ids.device)
        return counts.scatter_add_(1, ids, torch.ones_like(ids))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.optimizer(self.parameters())
        rate = linear_warmup_decay(self.warmup_steps, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}}


def base_optimizer(parameters: ParamsT) -> AdamW:
    """That of HuBERT Base: fairseq config/pretrain/hubert_base_librispeech.yaml, whose Adam decouples weight decay."""
    return AdamW(parameters, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)


def _losses(logits: Tensor, cluster: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), cluster.flatten(), reduction="none").view_as(cluster)


def _weights_of(pretrained: Path, config: EncoderConfig) -> dict[str, Tensor]:
    loaded = load_encoder(pretrained)
    theirs, ours = asdict(loaded.config), asdict(config)
    for name in (
        "conv_channels",
        "conv_norm",
        "conv_bias",
        "dim",
        "num_layers",
        "num_heads",
        "ffn_dim",
        "pre_norm",
        "pos_kernel",
        "pos_groups",
        "normalize_waveform",
    ):
        if theirs[name] != ours[name]:
            raise ValueError(
                f"{pretrained}: its encoder has {name} {theirs[name]}, the one to train {ours[name]}; "
                "change model.init_args.encoder to go on from it"
            )
    return loaded.state_dict()


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1)
