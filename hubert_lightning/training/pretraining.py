"""Masked prediction: batch in, loss out, log (HuBERT §II)."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer, ParamsT

from hubert_lightning.errors import UserError, within
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.flops import encoder_operations, head_operations
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.model.prediction import ClusterPredictor
from hubert_lightning.pretrained.load import read_trained
from hubert_lightning.pretrained.weights import Trained, encoder_of, predictors_of
from hubert_lightning.training.batches import PretrainingBatch
from hubert_lightning.training.distributed import shard
from hubert_lightning.training.global_batch import HOW_NOT_WHAT, GlobalBatch, total_steps
from hubert_lightning.training.restoring import load_task
from hubert_lightning.training.schedules import linear_warmup_decay
from hubert_lightning.units.quality import entropy


class HubertPretraining(LightningModule):
    """Predict the cluster of each masked frame from the frames around it. Defaults: HuBERT Base, iteration 1.

    Args:
        encoder: Size and regularisation of the encoder.
        num_clusters: K-means clusters to choose from, of each stream of labels if there are several; set from the
            labels where a fit lists iterations.
        final_dim: Width of the projection that codewords are compared in.
        temperature: Divides the cosine logits.
        normal_codewords: Draw codewords that point everywhere instead of U(0, 1); small models learn sooner.
        masked_weight: α of the paper: weight of the loss at masked frames; the others weigh 1 - α. Between 0 and 1,
            the weighted sum is divided by the number of all frames, as in fairseq.
        feature_penalty: Weight of the mean square of the convolutions' output.
        pretrained: Checkpoint, of ours or of another system, whose encoder training goes on from, under a new head;
            fresh weights if none.
        keep_head: Go on from the head of `pretrained`, too, whose clusters the labels then must be of.
        optimizer: Any torch optimizer; its learning rate is the peak. Base's AdamW if none is named.
        warmup: Fraction of the iteration's steps over which the learning rate rises linearly to its peak; it then falls
            linearly to 0.
        warmup_steps: Number of warm-up steps; overrides `warmup`.
        max_skipped: Steps in a row that may be left out, on all ranks, because a loss or gradient is not finite.
        compile: Let torch compile the encoder: slow to start, then faster.
        activation_checkpointing: Compute each layer again in the backward pass: slower, in much less memory.
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
        keep_head: bool = False,
        optimizer: OptimizerCallable | None = None,
        warmup: float = 0.08,  # §IV-C
        warmup_steps: int | None = None,
        max_skipped: int = 10,
        compile: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        within(1, 2**20, final_dim=final_dim)
        within(1, 2**16, num_clusters=num_clusters)
        within(0, feature_penalty=feature_penalty)
        if isinstance(num_clusters, list) and not num_clusters:
            raise UserError("num_clusters is an empty list; give a number of clusters")
        if not 1e-6 <= temperature <= 1e6:
            raise UserError(f"temperature is {temperature}; logits are divided by it: 0.1 in the paper")
        if not 0 <= masked_weight <= 1:
            raise UserError(f"masked_weight is {masked_weight}; it is a weight between 0 and 1")
        if not 0 <= warmup <= 1:
            raise UserError(f"warmup is {warmup}; it is a fraction from 0 to 1; warmup_steps is a number")
        if warmup_steps is not None and warmup_steps < 0:
            raise UserError(f"warmup_steps is {warmup_steps}; it is a number of steps, 0 or more")
        if isinstance(encoder, dict):  # from a checkpoint
            encoder = EncoderConfig(**encoder)
        streams = [num_clusters] if isinstance(num_clusters, int) else num_clusters
        # RunRecord logs what was built
        self.save_hyperparameters(ignore=["optimizer", "pretrained", "keep_head", *HOW_NOT_WHAT], logger=False)
        self.hparams["encoder"] = asdict(encoder)  # plain numbers: a checkpoint opens without our classes
        self.encoder = HubertEncoder(encoder)
        trained = None if pretrained is None else read_trained(pretrained)
        if pretrained is not None and trained is not None:
            self.encoder.load_state_dict(_weights_of(pretrained, trained, encoder))
        self.predictors = nn.ModuleList(
            ClusterPredictor(encoder.dim, clusters, final_dim, temperature, normal_codewords) for clusters in streams
        )
        if keep_head:
            self._keep_head(pretrained, trained)
        self.masked_weight, self.feature_penalty = masked_weight, feature_penalty
        self.pretrained, self.keep_head = pretrained, keep_head
        self.optimizer = optimizer or base_optimizer
        self.warmup, self.given_warmup_steps = warmup, warmup_steps
        self.global_batch = GlobalBatch(max_skipped)
        self.encoder.checkpointing = activation_checkpointing
        self.compiling = compile

    def _keep_head(self, pretrained: Path | None, trained: Trained | None) -> None:
        if pretrained is None or trained is None or not trained.predictors:
            raise UserError(
                f"keep_head, but {pretrained or 'nothing, which pretrained names,'} has no head of pre-training; name "
                "a model that has one in model.init_args.pretrained, or leave keep_head out"
            )
        theirs, ours = predictors_of(trained, pretrained), list(self.predictors)
        shapes = [[tuple(of.get_parameter("codewords").shape) for of in heads] for heads in (theirs, ours)]
        if shapes[0] != shapes[1] or trained.temperature != self.hparams["temperature"]:
            raise UserError(
                f"{pretrained}: its head has codewords of {shapes[0]} at temperature {trained.temperature}, the one to "
                f"train {shapes[1]} at {self.hparams['temperature']}; change clusters, final_dim or temperature, or "
                "leave keep_head out"
            )
        for mine, their in zip(ours, theirs, strict=True):
            mine.load_state_dict(their.state_dict())

    @property
    def num_clusters(self) -> list[int]:
        """Of each stream of labels."""
        return [predictor.num_clusters for predictor in self.predictors]  # type: ignore[misc]

    load_from_checkpoint = classmethod(load_task)  # type: ignore[assignment, var-annotated]

    def forward(self, waveform: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """Cluster logits of every frame for each stream, and the mean square of the convolutions' output.

        waveform: (batch, samples)
        mask:     (batch, frames) bool
        returns:  (batch, frames, clusters) of each stream, ()
        """
        frames, penalty = self._encode(waveform, mask)
        return [predictor(frames) for predictor in self.predictors], penalty

    def training_step(self, batch: PretrainingBatch) -> Tensor:
        torch.manual_seed(batch.seed)  # dropout's: the batch's own, whichever rank trains on it, also after a restart
        agreed = torch.Generator().manual_seed(batch.step_seed)
        kept = self.encoder.draw_kept(agreed)
        logging = self._logging
        loss, metrics = self._step(batch, kept, every_frame=logging)
        if logging:
            clusters = {"label_clusters": batch.cluster, "predicted_clusters": metrics.pop("predicted")}
            metrics |= {name: self._histogram(ids).count_nonzero().float() for name, ids in clusters.items()}
            metrics["masked_fraction"] = batch.mask.float().mean()
            self._log("train", metrics, batch)
        return self.global_batch.add(loss, self._num_terms(batch), batch.id)

    @property
    def _logging(self) -> bool:
        """Whether the Trainer writes what is logged in this step; if not, logging would be a tenth of a small step."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.global_step + 1) % every == 0

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        norm = self.global_batch.finish(self, optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self._logging:
            self.log("train/gradient_norm", norm)
            self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
            self.log("train/skipped_steps", self.global_batch.skipped)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.global_batch.refuse_unsound(self)
        checkpoint["skipped_steps"] = float(self.global_batch.skipped)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.global_batch.skipped = torch.tensor(checkpoint.get("skipped_steps", 0.0))

    def operations(self, batch: PretrainingBatch) -> int:
        """Floating-point operations of a training step on this batch."""
        rows, frames = batch.mask.shape
        predicted = batch.num_masked if self.masked_weight == 1 else frames
        head = head_operations(self.encoder.config.dim, self.hparams["final_dim"], self.num_clusters, predicted)
        return rows * (encoder_operations(self.encoder.config, batch.waveform.shape[1]) + head)

    def on_validation_epoch_start(self) -> None:
        counts = (2, len(self.num_clusters), max(self.num_clusters))
        self._used = torch.zeros(counts, dtype=torch.int64, device=self.device)  # by labels, by predictions

    def validation_step(self, batch: PretrainingBatch) -> None:
        _, metrics = self._step(batch, every_frame=True)
        self._used += torch.stack([self._histogram(batch.cluster), self._histogram(metrics.pop("predicted"))])
        self._log("val", metrics, batch)

    def on_validation_epoch_end(self) -> None:
        used = self.trainer.strategy.reduce(self._used, reduce_op="sum")
        perplexity = entropy(used).exp().mean(dim=-1)  # a mean over streams
        for number, name in enumerate(("label", "predicted")):
            self.log(f"val/{name}_clusters", used[number].count_nonzero().float(), sync_dist=True)
            self.log(f"val/{name}_perplexity", perplexity[number], sync_dist=True)

    def _encode(self, waveform: Tensor, mask: Tensor, kept: Sequence[bool] | None = None) -> tuple[Tensor, Tensor]:
        local = self.encoder.local_features(waveform)
        return self.encoder.contextual(local, mask=mask, kept=kept), local.float().square().mean()

    def _step(
        self, batch: PretrainingBatch, kept: Sequence[bool] | None = None, *, every_frame: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, and with `every_frame` what there is to tell of it, also of frames that do not count."""
        frames, penalty = self._encode(batch.waveform, batch.mask, kept)
        # Masked frames first; every row has as many, so that nothing has to wait to hear how many there are
        order = (~batch.mask).byte().argsort(dim=1, stable=True)
        parts = {
            "masked": (order[:, : batch.num_masked], self.masked_weight),
            "unmasked": (order[:, batch.num_masked :], 1 - self.masked_weight),
        }
        loss, metrics, predicted = self.feature_penalty * penalty, {"feature_penalty": penalty.detach()}, []
        for name, (places, weight) in parts.items():
            if not weight and not every_frame:
                continue
            with torch.set_grad_enabled(weight > 0 and torch.is_grad_enabled()):
                logits, cluster = self._predict(frames, places), _at(batch.cluster, places)
                # HuBERT §II-C: the losses of an ensemble's streams add up
                losses = sum(_cross_entropy(of, cluster[:, stream]) for stream, of in enumerate(logits))
            assert isinstance(losses, Tensor)
            loss = loss + losses.sum() * (weight / self._num_terms(batch))  # eq. 2
            if every_frame:
                found = torch.stack([of.detach().argmax(dim=-1) for of in logits], dim=1)  # (batch, streams, places)
                metrics[f"{name}_loss"] = losses.detach().mean()
                metrics[f"{name}_accuracy"] = (found == cluster).float().mean()
                predicted.append(found)
        if every_frame:
            metrics |= {"loss": loss.detach(), "predicted": torch.cat(predicted, dim=-1)}
        return loss, metrics

    def _num_terms(self, batch: PretrainingBatch) -> int:
        """Frames that a batch counts for: those of each kind whose weight is not 0, each once, whatever the weight.

        By their number fairseq divides the weighted sum, and multiplies the penalty (criterions/hubert_criterion.py:
        sample_size).
        """
        masked = len(batch.mask) * batch.num_masked
        unmasked = batch.mask.numel() - masked
        return masked * (self.masked_weight > 0) + unmasked * (self.masked_weight < 1)

    def _predict(self, frames: Tensor, places: Tensor) -> list[Tensor]:
        """Logits of each stream at some frames, (batch, places, clusters)."""
        there = frames.gather(1, places[..., None].expand(-1, -1, frames.shape[-1]))
        return [predictor(there) for predictor in self.predictors]

    def _log(self, part: str, metrics: dict[str, Tensor], batch: PretrainingBatch) -> None:
        validating = part == "val"
        named = {f"{part}/{name}": value for name, value in metrics.items()}
        self.log_dict(named, batch_size=batch.mask.numel(), sync_dist=validating)  # a mean over frames, not batches

    def _histogram(self, ids: Tensor) -> Tensor:
        """(batch, streams, frames) → (streams, clusters of the largest stream)"""
        ids = ids.transpose(0, 1).flatten(1)  # (streams, frames)
        counts = torch.zeros(len(ids), max(self.num_clusters), dtype=torch.int64, device=ids.device)
        return counts.scatter_add_(1, ids, torch.ones_like(ids))

    def configure_model(self) -> None:
        if self.compiling:
            self.encoder.compile_parts()
        shard(self, self.encoder, self.predictors)

    @property
    def warmup_steps(self) -> int:
        """Steps of this run up to the peak of the learning rate."""
        if self.given_warmup_steps is not None:
            return self.given_warmup_steps
        return round(self.warmup * total_steps(self.trainer))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.global_batch.made(self, self.optimizer)
        rate = linear_warmup_decay(self.warmup_steps, total_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}}


def base_optimizer(parameters: ParamsT) -> AdamW:
    """That of HuBERT Base: fairseq config/pretrain/hubert_base_librispeech.yaml, whose Adam decouples weight decay."""
    return AdamW(parameters, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True)


def _at(cluster: Tensor, places: Tensor) -> Tensor:
    return cluster.gather(2, places[:, None].expand(-1, cluster.shape[1], -1))


def _cross_entropy(logits: Tensor, cluster: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), cluster.flatten(), reduction="none")


def _weights_of(pretrained: Path, trained: Trained, config: EncoderConfig) -> dict[str, Tensor]:
    loaded = encoder_of(trained, pretrained)
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
            raise UserError(
                f"{pretrained}: its encoder has {name} {theirs[name]}, the one to train {ours[name]}; "
                "change model.init_args.encoder to go on from it"
            )
    return loaded.state_dict()
