"""The pre-training task: predict the clusters of masked frames (HuBERT §II)."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.optimizer import ParamsT

from hubert_lightning.default_optimizers import BASE_ADAM
from hubert_lightning.errors import UserError, counted, within
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.flops import encoder_operations, head_operations
from hubert_lightning.model.prediction import ClusterPredictor
from hubert_lightning.pretrained.load import read_weights
from hubert_lightning.pretrained.weights import PretrainedWeights, build_encoder, build_predictors, load_state
from hubert_lightning.training.batches import PretrainingBatch
from hubert_lightning.training.schedules import Schedule, linear_warmup_decay
from hubert_lightning.training.task import CHANGEABLE_ON_RESUME, Task, encoder_config
from hubert_lightning.units.label_shards import MAX_CLUSTERS
from hubert_lightning.units.quality import perplexity

log = logging.getLogger(__name__)


class HubertPretraining(Task):
    """Predict the cluster of each masked frame from the frames around it. Defaults: HuBERT Base, iteration 1.

    Args:
        encoder: Size and regularisation of the encoder.
        num_clusters: Number of K-means clusters, one for each stream of labels; set from the labels where a fit lists
            iterations.
        final_dim: Width of the projection in which frames and codewords are compared.
        temperature: Divisor of the cosine logits.
        normal_codewords: Draw the initial codewords from a normal distribution instead of U(0, 1); small models learn
            sooner.
        masked_weight: Weight α of the loss at masked frames; unmasked frames have weight 1 - α. Between 0 and 1, the
            weighted sum is divided by the number of all frames, as in fairseq.
        feature_penalty: Weight of the mean square of the convolutions' output.
        pretrained: Checkpoint, from this package or another system, whose encoder is trained further under a new head;
            fresh weights if not given.
        keep_head: Keep the heads of `pretrained` as well, also those that it has of intermediate layers; the labels
            must come from its K-means clusters.
        optimizer: Any torch optimizer; its learning rate is the peak of the schedule. HuBERT Base's AdamW if not given.
        warmup: Fraction of the steps over which the learning rate rises linearly to its peak; it then falls linearly
            to 0.
        warmup_steps: Number of warm-up steps; overrides `warmup`.
        max_skipped: Maximum number of consecutive skipped steps. All ranks skip a step if a loss or gradient is not
            finite.
        compile: Compile the encoder with torch.compile: slow to start, then faster.
        activation_checkpointing: Recompute the activations of each layer in the backward pass: slower, with much less
            memory.
        schedule_steps: Number of steps of the learning-rate schedule, those of the fit if not given; several fits that
            continue each other share one schedule.
        intermediate_layers: Layers below the last, counted from 1, that predict the clusters as well, each with a
            projection and codewords of its own. Their losses are added to that of the last layer, with the same
            weights of masked and unmasked frames (ILS-SSL, arXiv 2112.08778: layer 4 of 12).
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
        intermediate_layers: list[int] | None = None,
        schedule_steps: int | None = None,
    ) -> None:
        within(1, 2**20, final_dim=final_dim)
        within(1, MAX_CLUSTERS, num_clusters=num_clusters)
        within(0, feature_penalty=feature_penalty)
        within(1, schedule_steps=schedule_steps)
        if isinstance(num_clusters, list) and not num_clusters:
            raise UserError("num_clusters is an empty list; give a number of clusters")
        if not 1e-6 <= temperature <= 1e6:
            raise UserError(f"temperature is {temperature}; logits are divided by it: 0.1 in the paper")
        if not 0 <= masked_weight <= 1:
            raise UserError(f"masked_weight is {masked_weight}; it is a fraction from 0 to 1")
        if not 0 <= warmup <= 1:
            raise UserError(f"warmup is {warmup}; it is a fraction from 0 to 1; warmup_steps is a number")
        if warmup_steps is not None and warmup_steps < 0:
            raise UserError(f"warmup_steps is {warmup_steps}; it is a number of steps, 0 or more")
        encoder = encoder_config(encoder)
        _check_intermediate(intermediate_layers or [], encoder.num_layers)
        super().__init__(encoder, optimizer or base_optimizer, max_skipped, compile, activation_checkpointing)
        self.num_clusters = [num_clusters] if isinstance(num_clusters, int) else list(num_clusters)
        """(streams,), clusters of each stream of labels."""
        # RunRecord logs the settings as they were built
        self.save_hyperparameters(ignore=["optimizer", "pretrained", "keep_head", *CHANGEABLE_ON_RESUME], logger=False)
        self.hparams["encoder"] = asdict(encoder)  # plain numbers: a checkpoint opens without our classes
        trained = None if pretrained is None else read_weights(pretrained)
        if pretrained is not None and trained is not None:
            self.encoder.load_state_dict(_encoder_weights(pretrained, trained, encoder))
        self.predictors = self._new_predictors()
        self.intermediate_predictors = nn.ModuleDict(
            {str(layer): self._new_predictors(norm=encoder.pre_norm) for layer in sorted(intermediate_layers or [])}
        )
        if keep_head:
            self._load_head(pretrained, trained)
        self.masked_weight, self.feature_penalty = masked_weight, feature_penalty
        self.pretrained, self.keep_head = pretrained, keep_head
        self.used_clusters: dict[str, Tensor] = {}
        """(streams, clusters) bool each: the clusters in the labels and the predictions of the last logged batch."""
        self.warmup, self.given_warmup_steps, self.schedule_steps = warmup, warmup_steps, schedule_steps

    def _new_predictors(self, norm: bool = False) -> nn.ModuleList:
        """Build a predictor of each stream of labels."""
        names = ("final_dim", "temperature", "normal_codewords")
        settings = {name: self.hparams[name] for name in names}
        dim = self.encoder.config.dim
        return nn.ModuleList(ClusterPredictor(dim, clusters, **settings, norm=norm) for clusters in self.num_clusters)

    def replace_heads(self, num_clusters: list[int], seed: int) -> None:
        """Replace the heads by fresh ones of other numbers of clusters, before a Trainer has configured the model.

        Args:
            num_clusters: Number of clusters of each stream of labels.
            seed: Seed of the fresh weights, the same on all ranks.
        """
        self.num_clusters = list(num_clusters)
        self.hparams["num_clusters"] = num_clusters[0] if len(num_clusters) == 1 else list(num_clusters)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.predictors = self._new_predictors()
            for layer in self.intermediate_predictors:
                self.intermediate_predictors[layer] = self._new_predictors(norm=self.encoder.config.pre_norm)

    def _load_head(self, pretrained: Path | None, trained: PretrainedWeights | None) -> None:
        if pretrained is None or trained is None or not trained.predictors:
            raise UserError(
                f"keep_head, but {pretrained or 'nothing (pretrained is not given)'} has no head of pre-training; "
                "name a checkpoint with one in model.init_args.pretrained, or leave keep_head out"
            )
        heads, own_heads = build_predictors(trained, pretrained), list(self.predictors)
        shapes, own_shapes = _codeword_shapes(heads), _codeword_shapes(own_heads)
        if shapes != own_shapes or trained.temperature != self.hparams["temperature"]:
            raise UserError(
                f"{pretrained}: its head has codewords of {shapes} at temperature {trained.temperature}, the one to "
                f"train {own_shapes} at {self.hparams['temperature']}; change clusters, final_dim or temperature, or "
                "leave keep_head out"
            )
        for head, own_head in zip(heads, own_heads, strict=True):
            own_head.load_state_dict(head.state_dict())
        if missing := [layer for layer in self.intermediate_predictors if layer not in trained.intermediate_predictors]:
            layers = f"layer{'s' * (len(missing) > 1)} {', '.join(missing)}"
            log.warning("%s: has no predictors of %s, which start from random weights", pretrained, layers)
        for layer, states in trained.intermediate_predictors.items():
            if layer not in self.intermediate_predictors:
                continue
            predictors = self.intermediate_predictors[layer]
            assert isinstance(predictors, nn.ModuleList)
            if len(states) != len(predictors):
                raise UserError(
                    f"keep_head, but {pretrained} has {counted(len(states), 'predictor')} of layer {layer}, the model "
                    f"to train {len(predictors)}; leave keep_head out, or leave that layer out of intermediate_layers"
                )
            for state, predictor in zip(states, predictors, strict=True):
                load_state(predictor, state, pretrained, f"predictor of layer {layer}")

    @property
    def heads(self) -> list[nn.Module]:
        return [predictor for predictors in self._predictors_of_layers().values() for predictor in predictors]

    def _predictors_of_layers(self) -> dict[str, nn.ModuleList]:
        """Predictors of the last layer and of intermediate layers, by the end of their metrics' names."""
        predictors = {"": self.predictors}
        for layer, of_layer in self.intermediate_predictors.items():
            assert isinstance(of_layer, nn.ModuleList)
            predictors[f"_layer{layer}"] = of_layer
        return predictors

    def forward(self, waveform: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """Compute the cluster logits of every frame.

        Args:
            waveform: (batch, samples), 16 kHz audio.
            mask: (batch, frames) bool, True where a frame is masked.

        Returns:
            Logits of each stream, (batch, frames, clusters), and the mean square of the convolutions' output, ().
        """
        [*_, frames], penalty = self._encode(waveform, mask)
        return [predictor(frames) for predictor in self.predictors], penalty

    def training_step(self, batch: PretrainingBatch) -> Tensor:
        kept, logging = self.seed_step(batch), self.logs_this_step
        loss, metrics = self._step(batch, kept, every_frame=logging)
        if logging:
            clusters = {"label_clusters": batch.cluster, "predicted_clusters": metrics.pop("predicted")}
            self.used_clusters = {name: self._histogram(ids) > 0 for name, ids in clusters.items()}
            metrics |= {name: used.count_nonzero().float() for name, used in self.used_clusters.items()}
            metrics["masked_fraction"] = batch.mask.float().mean()
            self._log("train", metrics, batch)
        return self.global_batch.add(loss, self._num_terms(batch), batch.id)

    def operations(self, batch: PretrainingBatch) -> int:
        rows, frames = batch.mask.shape
        predicted = batch.num_masked if self.masked_weight == 1 else frames
        clusters = self.num_clusters * (1 + len(self.intermediate_predictors))
        head = head_operations(self.encoder.config.dim, self.hparams["final_dim"], clusters, predicted)
        return rows * (encoder_operations(self.encoder.config, batch.waveform.shape[1]) + head)

    def on_validation_epoch_start(self) -> None:
        counts = (2, len(self.num_clusters), max(self.num_clusters))
        self._cluster_counts = torch.zeros(counts, dtype=torch.int64, device=self.device)  # of labels, of predictions

    def validation_step(self, batch: PretrainingBatch) -> None:
        _, metrics = self._step(batch, every_frame=True)
        self._cluster_counts += torch.stack([self._histogram(batch.cluster), self._histogram(metrics.pop("predicted"))])
        self._log("val", metrics, batch)

    def on_validation_epoch_end(self) -> None:
        counts = self.trainer.strategy.reduce(self._cluster_counts, reduce_op="sum")
        assert isinstance(counts, Tensor)
        perplexities = perplexity(counts).mean(dim=-1)  # over streams
        coverages = counts.count_nonzero(dim=(1, 2)).float() / sum(self.num_clusters)
        for number, name in enumerate(("label", "predicted")):
            self.log(f"units/{name}_perplexity", perplexities[number], sync_dist=True)
            self.log(f"units/{name}_coverage", coverages[number], sync_dist=True)

    def _encode(
        self, waveform: Tensor, mask: Tensor, kept: Sequence[bool] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        local = self.encoder.local_features(waveform)
        layers = [int(layer) for layer in self.intermediate_predictors]
        frames = self.encoder.contextual_layers(local, mask=mask, kept=kept, intermediate=layers)
        return frames, local.float().square().mean()

    def _step(
        self, batch: PretrainingBatch, kept: Sequence[bool] | None = None, *, every_frame: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch.

        Args:
            batch: Batch of the step.
            kept: (layers,), whether each layer is computed; all if not given.
            every_frame: Whether to compute the metrics, also at frames whose weight in the loss is 0.

        Returns:
            Loss, (), and metrics by name; with them "predicted", (batch, streams, frames), the most likely clusters.
            Metrics of an intermediate layer end in "_layer" and its number.
        """
        [*intermediate, last], penalty = self._encode(batch.waveform, batch.mask, kept)
        # Masked frames first. All rows mask the same number, so the shapes are known without waiting for the GPU
        order = (~batch.mask).byte().argsort(dim=1, stable=True)
        parts = {
            "masked": (order[:, : batch.num_masked], self.masked_weight),
            "unmasked": (order[:, batch.num_masked :], 1 - self.masked_weight),
        }
        loss, metrics, predicted = self.feature_penalty * penalty, {"feature_penalty": penalty.detach()}, []
        for name, (index, weight) in parts.items():
            if not weight and not every_frame:
                continue
            cluster = _select(batch.cluster, index)
            of_layers = self._predictors_of_layers().items()
            for (layer, predictors), frames in zip(of_layers, [last, *intermediate], strict=True):
                with torch.set_grad_enabled(weight > 0 and torch.is_grad_enabled()):
                    logits = _predict(predictors, frames, index)
                    # HuBERT §II-C: the losses of an ensemble's streams add up; so do those of layers (ILS-SSL §3)
                    losses = sum(_cross_entropy(scores, cluster[:, stream]) for stream, scores in enumerate(logits))
                assert isinstance(losses, Tensor)
                loss = loss + losses.sum() * (weight / self._num_terms(batch))  # eq. 2
                if every_frame:
                    best = torch.stack([scores.detach().argmax(dim=-1) for scores in logits], dim=1)
                    metrics[f"{name}_loss{layer}"] = losses.detach().mean()
                    metrics[f"{name}_accuracy{layer}"] = (best == cluster).float().mean()
                    if not layer:
                        predicted.append(best)  # (batch, streams, frames of this part)
        if every_frame:
            metrics |= {"loss": loss.detach(), "predicted": torch.cat(predicted, dim=-1)}
        return loss, metrics

    def _num_terms(self, batch: PretrainingBatch) -> int:
        """Count the frames whose weight in the loss is not 0; each counts once, whatever its weight.

        fairseq divides the weighted sum by their number, and multiplies the penalty by it
        (criterions/hubert_criterion.py: sample_size).
        """
        masked = len(batch.mask) * batch.num_masked
        unmasked = batch.mask.numel() - masked
        return masked * (self.masked_weight > 0) + unmasked * (self.masked_weight < 1)

    def _log(self, part: str, metrics: dict[str, Tensor], batch: PretrainingBatch) -> None:
        validating = part == "val"
        named = {f"{part}/{name}": value for name, value in metrics.items()}
        self.log_dict(named, batch_size=batch.mask.numel(), sync_dist=validating)  # a mean over frames, not batches

    def _histogram(self, ids: Tensor) -> Tensor:
        """Count ids, (batch, streams, frames), in each stream: (streams, clusters of the largest stream)."""
        ids = ids.transpose(0, 1).flatten(1)  # (streams, frames)
        counts = torch.zeros(len(ids), max(self.num_clusters), dtype=torch.int64, device=ids.device)
        return counts.scatter_add_(1, ids, torch.ones_like(ids))

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps until the learning rate reaches its peak."""
        if self.given_warmup_steps is not None:
            return self.given_warmup_steps
        return round(self.warmup * self.schedule_steps) if self.schedule_steps else super().warmup_steps

    def schedule(self, total_steps: int) -> Schedule:
        return linear_warmup_decay(self.warmup_steps, self.schedule_steps or total_steps)


def base_optimizer(parameters: ParamsT) -> AdamW:
    """Build the optimizer of HuBERT Base."""
    return AdamW(parameters, **BASE_ADAM)


def _select(cluster: Tensor, index: Tensor) -> Tensor:
    """(batch, streams, frames), (batch, selected) → (batch, streams, selected)"""
    return cluster.gather(2, index[:, None].expand(-1, cluster.shape[1], -1))


def _predict(predictors: nn.ModuleList, frames: Tensor, index: Tensor) -> list[Tensor]:
    """Return the logits of each stream, (batch, selected, clusters), at selected frames, (batch, selected)."""
    selected = frames.gather(1, index[..., None].expand(-1, -1, frames.shape[-1]))
    return [predictor(selected) for predictor in predictors]


def _check_intermediate(layers: Sequence[int], num_layers: int) -> None:
    """Check that layers lie below the last one.

    Raises:
        UserError: One does not, or is named twice.
    """
    for layer in layers:
        if layer == num_layers:
            raise UserError(
                f"intermediate_layers {layers}: layer {layer} is the last of the encoder, which predicts the clusters "
                "anyway; leave it out"
            )
        if not 1 <= layer < num_layers:
            raise UserError(
                f"intermediate_layers {layers}: an encoder of {num_layers} layers has the intermediate layers 1 to "
                f"{num_layers - 1}, not layer {layer}; name one of those"
            )
    if len(set(layers)) < len(layers):
        raise UserError(f"intermediate_layers {layers}: a layer is named twice; name each once")


def _cross_entropy(logits: Tensor, cluster: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), cluster.flatten(), reduction="none")


def _codeword_shapes(heads: Iterable[nn.Module]) -> list[tuple[int, ...]]:
    return [tuple(head.get_parameter("codewords").shape) for head in heads]


ARCHITECTURE = (
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
    "pos_batch_norm",
    "normalize_waveform",
    "position_buckets",
    "position_distance",
    "conv_kernels",
    "conv_strides",
)
"""Settings of an encoder that its weights depend on."""


def _encoder_weights(pretrained: Path, trained: PretrainedWeights, config: EncoderConfig) -> dict[str, Tensor]:
    encoder = build_encoder(trained, pretrained)
    for name in ARCHITECTURE:
        value, own_value = getattr(encoder.config, name), getattr(config, name)
        if value != own_value:
            raise UserError(
                f"{pretrained}: its encoder has {name} {value}, the one to train {own_value}; "
                "set model.init_args.encoder to the same value"
            )
    return encoder.state_dict()
