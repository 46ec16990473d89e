"""Early warnings of pre-training runs that do not learn, or have stopped learning."""

from collections import deque
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from hubert_lightning.training.task import Task, logs_step
from hubert_lightning.training.wandb_runs import warn
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.quality import entropy

FIRST_STEP = 500
"""Steps without a warning at the start, at least."""
AVERAGED = 20
"""Logged values that a warning takes the mean of, and logged batches whose clusters are counted together."""
COVERED = 1 / 3
"""Share of the clusters of the labels that predictions should cover at least, like the codebook coverage of NEST."""
TITLES = {
    "guessing": "predictions at chance level",
    "trivial": "trivial labels",
    "upside down": "input ignored",
    "few": "predictions collapsed",
    "unused": "most clusters never predicted",
    "risen": "loss diverges",
}
"""Kind of failure → title of its alert."""
METRICS = ("masked_loss", "masked_accuracy", "unmasked_accuracy", "label_clusters", "predicted_clusters")


class CollapseWatch(Callback):
    """Warn, in the log and by a W&B alert, of the known failures of pre-training.

    After warm-up, the last 20 logged batches show one of six failures: masked frames are predicted no better than by
    the frequency of the clusters; nearly all predictions are right, so the labels are trivial; masked frames are
    predicted better than unmasked ones; hardly any clusters are predicted in a batch; the predictions of all 20 cover
    less than a third of the clusters of their labels; or the loss is half a nat above its minimum. Each warning comes
    once. Checkpoints store the values and the warnings, so a resumed run continues them.
    """

    def __init__(self) -> None:
        self._values: dict[str, deque[float]] = {name: deque(maxlen=AVERAGED) for name in METRICS}
        self._used = {name: deque[Tensor](maxlen=AVERAGED) for name in ("label_clusters", "predicted_clusters")}
        self._lowest_loss, self._warned = float("inf"), set[str]()

    def state_dict(self) -> dict[str, Any]:
        values = {name: list(values) for name, values in self._values.items()}
        used = {name: list(masks) for name, masks in self._used.items()}
        return {"values": values, "used": used, "lowest": self._lowest_loss, "told": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, values in self._values.items():  # another version may have watched other metrics
            values.extend(state_dict["values"].get(name, []))
        for name, masks in self._used.items():
            masks.extend(state_dict.get("used", {}).get(name, []))
        self._lowest_loss, self._warned = state_dict["lowest"], set(state_dict["told"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        labels = getattr(trainer.datamodule, "labels", None)  # type: ignore[attr-defined]  # undeclared in Lightning
        histograms = labels.histogram if isinstance(labels, LabelStore) else []
        self._watching = bool(histograms) and trainer.is_global_zero
        self._entropy = sum(float(entropy(counts)) for counts in histograms)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not self._watching or step == self._step or not logs_step(trainer, step):
            return
        self._step = step
        logged = trainer.callback_metrics  # those of the previous log
        first_step = max(cast(Task, pl_module).warmup_steps, FIRST_STEP)
        if step <= first_step or not all(f"train/{name}" in logged for name in METRICS):
            return
        for name, values in self._values.items():
            values.append(float(logged[f"train/{name}"]))
        for name, used in getattr(pl_module, "used_clusters", {}).items():
            self._used[name].append(used.cpu())
        if len(self._values["masked_loss"]) == AVERAGED:
            means = {name: float(np.mean(values)) for name, values in self._values.items()}
            for kind, sentence in self._failures(means):
                if kind not in self._warned:
                    self._warned.add(kind)
                    warn(trainer, TITLES[kind], f"step {step}: {sentence}")

    def _coverage(self, name: str) -> int:
        """Count the clusters that occur in any of the last logged batches."""
        masks = self._used[name]
        return int(torch.stack([*masks]).any(dim=0).sum()) if masks else 0

    def _failures(self, means: dict[str, float]) -> Iterator[tuple[str, str]]:
        """Yield the kind and the description of each failure that the means show."""
        loss, masked, unmasked = means["masked_loss"], means["masked_accuracy"], means["unmasked_accuracy"]
        self._lowest_loss = min(self._lowest_loss, loss)
        if loss > 0.99 * self._entropy:
            yield (
                "guessing",
                f"the masked loss is {loss:.2f}, and guessing by the frequency of clusters gives {self._entropy:.2f}: "
                "the model does not learn; raise the learning rate, shorten warm-up, check that labels fit the audio",
            )
        if masked > 0.95:
            yield (
                "trivial",
                f"{masked:.0%} of masked frames are predicted right: labels this easy teach nothing; check "
                "units/label_perplexity and the masked fraction",
            )
        if masked > unmasked + 0.02:
            yield (
                "upside down",
                f"masked frames are predicted better ({masked:.3f}) than unmasked frames ({unmasked:.3f}): the "
                "encoder ignores its input; start again with a lower learning rate or fresh weights",
            )
        if means["predicted_clusters"] < 0.1 * means["label_clusters"]:
            yield (
                "few",
                f"{means['predicted_clusters']:.0f} clusters are predicted, but the labels have "
                f"{means['label_clusters']:.0f}: predictions have collapsed; resume from an earlier checkpoint with a "
                "lower learning rate",
            )
        labels, predicted = (self._coverage(name) for name in ("label_clusters", "predicted_clusters"))
        if len(self._used["label_clusters"]) == AVERAGED and predicted < COVERED * labels:
            yield (
                "unused",
                f"the predictions of {AVERAGED} batches cover {predicted} clusters, their labels {labels}: most "
                "clusters are never predicted; check units/label_perplexity, take fewer clusters or a lower learning "
                "rate",
            )
        if loss > self._lowest_loss + 0.5:
            yield (
                "risen",
                f"the masked loss has risen from {self._lowest_loss:.2f} to {loss:.2f}; resume from an earlier "
                "checkpoint with a lower learning rate or a lower gradient_clip_val",
            )
