"""Runs that have stopped learning, or never began: told early, not after a week."""

import logging
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.quality import entropy

log = logging.getLogger(__name__)

EARLIEST = 500
"""Steps after which something is said at all."""
WINDOW = 20
"""So many logged values are averaged before anything is said."""
METRICS = ("masked_loss", "masked_accuracy", "unmasked_accuracy", "label_clusters", "predicted_clusters")


class CollapseWatch(Callback):
    """Warns, in the log and as an alert in W&B, when a pre-training run shows one of the known ways to fail.

    After warm-up, of the mean of the last 20 logged values: masked frames are predicted no better than by how frequent
    clusters are; nearly always right (the labels say nothing); better than frames that are not masked; all as one or
    very few clusters; or the loss is half a nat above what it has been. Each is told once; a run that goes on after a
    restart remembers what was logged and told.
    """

    def __init__(self) -> None:
        self._values: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in METRICS}
        self._lowest, self._told = float("inf"), set[str]()

    def state_dict(self) -> dict[str, Any]:
        values = {name: list(values) for name, values in self._values.items()}
        return {"values": values, "lowest": self._lowest, "told": sorted(self._told)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, values in self._values.items():  # the checkpoint may know others
            values.extend(state_dict["values"].get(name, []))
        self._lowest, self._told = state_dict["lowest"], set(state_dict["told"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        labels = getattr(trainer.datamodule, "labels", None)  # type: ignore[attr-defined]
        histogram = labels.histogram if isinstance(labels, LabelStore) else []
        self._watching = bool(histogram) and trainer.is_global_zero
        self._entropy = sum(float(entropy(torch.from_numpy(counts).double())) for counts in histogram)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not self._watching or step == self._step or every < 1 or step % every:
            return
        self._step = step
        logged = trainer.callback_metrics  # those of the time before
        if step <= max(int(pl_module.warmup_steps), EARLIEST) or not all(  # type: ignore[arg-type]
            f"train/{name}" in logged for name in METRICS
        ):
            return
        for name, values in self._values.items():
            values.append(float(logged[f"train/{name}"]))
        if len(self._values["masked_loss"]) == WINDOW:
            for kind, sentence in self._failures({name: float(np.mean(of)) for name, of in self._values.items()}):
                if kind not in self._told:
                    self._told.add(kind)
                    _tell(trainer, f"step {step}: {sentence}")

    def _failures(self, mean: dict[str, float]) -> Iterator[tuple[str, str]]:
        loss, masked, unmasked = mean["masked_loss"], mean["masked_accuracy"], mean["unmasked_accuracy"]
        self._lowest = min(self._lowest, loss)
        if loss > 0.99 * self._entropy:
            yield (
                "guessing",
                f"the masked loss is {loss:.2f}, and {self._entropy:.2f} is what guessing by the frequency of clusters "
                "gives: nothing is learnt; raise the learning rate, shorten warm-up, see whether labels fit the audio",
            )
        if masked > 0.95:
            yield (
                "trivial",
                f"the cluster of {masked:.0%} of masked frames is predicted: labels this easy teach nothing; look at "
                "val/label_perplexity, and at how much the masks hide",
            )
        if masked > unmasked + 0.02:
            yield (
                "upside down",
                f"masked frames are predicted better ({masked:.3f}) than frames that can be seen ({unmasked:.3f}): the "
                "encoder does not hear its input; start again with a lower learning rate or fresh weights",
            )
        if mean["predicted_clusters"] < 0.1 * mean["label_clusters"]:
            yield (
                "few",
                f"{mean['predicted_clusters']:.0f} clusters are predicted where {mean['label_clusters']:.0f} occur: "
                "predictions have collapsed; go on from an earlier checkpoint with a lower learning rate",
            )
        if loss > self._lowest + 0.5:
            yield (
                "risen",
                f"the masked loss has risen from {self._lowest:.2f} to {loss:.2f}; go on from an earlier checkpoint "
                "with a lower learning rate, or a lower gradient_clip_val",
            )


def _tell(trainer: Trainer, sentence: str) -> None:
    log.warning(sentence)
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):  # W&B, which can write to whoever watches the run
            logger.experiment.alert(title="HuBERT pre-training", text=sentence)  # type: ignore[attr-defined]
