"""The data of pre-training: manifests and labels in, batches out.

`setup` and the loaders check the manifests before the first step.
"""

import logging
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning import LightningDataModule

from hubert_lightning.data.balance import Balance
from hubert_lightning.data.corpora import Corpora, ids_and_samples, read_corpora
from hubert_lightning.data.shar import SharCuts
from hubert_lightning.errors import UserError, within
from hubert_lightning.frames import Clock, num_frames, num_samples, seconds_to_samples
from hubert_lightning.training.balanced import (
    balance_state,
    check_balance,
    check_same_balance,
    check_weights,
    groups_and_shares,
    shares_record,
)
from hubert_lightning.training.batch_size import MemoryMeter, Trial, find_duration, given_duration, kept_duration
from hubert_lightning.training.batches import PretrainingBatch, PretrainingBatches
from hubert_lightning.training.data_checks import (
    check_durations,
    check_masks,
    check_order,
    kept_plan,
)
from hubert_lightning.training.loaders import (
    MAX_WORKERS,
    Loader,
    clock_of_model,
    planned_loader,
    resuming_trainer,
    trainer_and_model,
)
from hubert_lightning.training.mixing import MixedAudio, Mixer, Mixing
from hubert_lightning.training.provenance import (
    ManifestRecord,
    audio_counts,
    describe_part,
    match_manifests,
    ordered_fingerprint,
    plain_records,
)
from hubert_lightning.training.sampler import BatchPlan
from hubert_lightning.units.label_store import LabelStore

log = logging.getLogger(__name__)

SHAR_BLOCK = 100_000
"""Cuts that are shuffled together if a corpus stays on disk: some hundred archives."""
PLAN = 2
"""Version of the plan of training batches. Version 1 dealt fewer rows into a batch: it counted what is cropped away."""
MAX_DURATION = 87.5
"""Default seconds of a batch: that of HuBERT Base."""
DEV_RUN_CUTS = 100
"""Utterances of each manifest that `fast_dev_run` clusters and trains on."""


class PretrainingData(LightningDataModule):
    """Untranscribed audio with a cluster label for each frame. Defaults: HuBERT Base on LibriSpeech.

    Args:
        train: Training manifests, written by `hubert prepare`.
        weights: Relative share of each training manifest in an epoch, which has as many seconds as all manifests
            together. Utterances of a small manifest are repeated; a large manifest contributes different utterances in
            each epoch. If not given, an epoch has every utterance once.
        validation: Validation manifests; their crops and masks are fixed.
        labels: Folder of a finished label store; leave it out if the Relabel callback makes the labels.
        max_duration: Seconds of audio in a batch, on each GPU; `auto` tries a few training steps and takes the largest
            that fits, which a resumed run keeps.
        max_crop: Maximum seconds of an utterance; the crop moves from epoch to epoch.
        min_duration: Minimum seconds of a training utterance; shorter ones are left out.
        mask_prob: Fraction of frames that the mask spans would cover if they did not overlap.
        mask_length: Frames in a mask span: 10 of 20 ms in the paper, 5 for a model of 25 Hz.
        num_workers: Number of processes that read audio, for each GPU.
        seed: Seed of the order, crops and masks of training; those of validation are the same for every seed.
        mixing: Other speech, noise and rooms in the training audio, as in WavLM; validation stays clean.
        balance_languages: Exponent of the amounts of audio of the languages, from 0, which gives each the same share of
            an epoch and of the sample of K-means, to 1, which changes nothing; mHuBERT-147 has 0.7. Or the relative
            share of each language, such as {en: 2, sw: 1}.
        balance_corpora: The same for corpora, within each language if languages are balanced too; mHuBERT-147 has 0.9.
    """

    continued_labels: str | None = None
    """Fingerprint of the labels of the run that this one continues."""
    meter: MemoryMeter | None = None
    """Measures the steps that `auto` tries; the device's memory if not set."""

    def __init__(
        self,
        train: list[Path],
        weights: list[float] | None = None,
        validation: list[Path] | None = None,
        labels: Path | None = None,
        max_duration: float | Literal["auto"] = MAX_DURATION,
        max_crop: float = 15.625,
        min_duration: float = 2.0,
        mask_prob: float = 0.8,
        mask_length: int = 10,
        num_workers: int = 4,
        seed: int = 0,
        mixing: Mixing = Mixing(),
        balance_languages: float | dict[str, float] | None = None,
        balance_corpora: float | dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self._audio: dict[str, float] | None = None
        self._balance: dict[str, Any] | None = None
        within(0, 2**40, min_duration=min_duration)
        within(0, MAX_WORKERS, num_workers=num_workers)
        within(0, 2**32 - 1, seed=seed)
        check_durations(max_crop=max_crop)
        check_masks(mask_prob, mask_length)
        if weights is not None and (len(weights) != len(train) or not all(0 < weight < math.inf for weight in weights)):
            raise UserError(f"data.weights {weights} for {len(train)} manifests in data.train; give each one above 0")
        self.balance = Balance(balance_languages, balance_corpora)
        check_weights(self.balance, weights)
        self.manifests, self.weights = {"train": train, "validation": validation or []}, weights
        self.labels = LabelStore(labels) if labels else None
        self.max_duration, self.max_crop = given_duration(max_duration), max_crop
        self.min_duration = min_duration
        self.mask_prob, self.mask_length = mask_prob, mask_length
        self.num_workers, self.seed, self.mixed = num_workers, seed, MixedAudio(mixing)
        self.plan = PLAN
        self.train_cuts = self.validation_cuts = Corpora()
        self._recorded: dict[str, list[ManifestRecord]] = {}

    @property
    def clock(self) -> Clock:
        """Clock of the model's encoder."""
        return clock_of_model(self)

    @property
    def max_frames(self) -> int:
        """Frames of a batch; those of the default until `auto` is found."""
        return num_frames(seconds_to_samples(self.max_duration or MAX_DURATION), self.clock)

    @property
    def max_crop_frames(self) -> int:
        """Maximum number of frames of an utterance."""
        return num_frames(seconds_to_samples(self.max_crop), self.clock)

    def record(self, *parts: str) -> dict[str, Any]:
        """Describe the manifests, their audio, the crops and the masks, for the loggers."""
        cuts = {"train": self.train_cuts, "validation": self.validation_cuts}
        described = {part: describe_part(self.manifests[part], cuts[part], cuts[part].fingerprint) for part in parts}
        if "train" in parts:
            described["train"] |= shares_record(self.train_cuts, self.balance, self._frames(self.train_cuts))
        return described | {
            "weights": self.weights,
            "plan": self.plan,
            "max_crop": self.max_crop,
            "min_duration": self.min_duration,
            "mask_prob": self.mask_prob,
            "mask_length": self.mask_length,
            "num_workers": self.num_workers,
            "seed": self.seed,
            "mixing": self.mixed.record() if "train" in parts else None,
        }

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.mixed.read()
        if not len(self.train_cuts):
            self._read(stage)

    def _read(self, stage: str) -> None:
        if self.labels is not None:
            self.labels.verify()
        train = read_corpora(self.manifests["train"])
        if self.manifests["validation"]:
            self.validation_cuts = read_corpora(self.manifests["validation"])
        validation_ids = set(self.validation_cuts.ids())
        if common := next((cut_id for cut_id in train.ids() if cut_id in validation_ids), None):
            raise UserError(f"{common}: among the training and the validation utterances; keep them apart")
        clock = self.clock
        check_durations(clock, max_crop=self.max_crop)
        for cut_id, samples in ids_and_samples(self.validation_cuts):
            if num_frames(samples, clock) < 2:
                raise UserError(
                    f"{cut_id}: too short to validate on, less than two frames; remove it from data.validation"
                )
        long_enough = train.num_samples >= max(seconds_to_samples(self.min_duration), num_samples(2, clock))
        check_balance(self.balance, train, long_enough, f"min_duration {self.min_duration} s or more; lower it")
        self.train_cuts = train.chosen(long_enough)
        if stage == "fit" and self.trainer is not None and self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # undeclared
            self.train_cuts, self.validation_cuts = _first_cuts(self.train_cuts), _first_cuts(self.validation_cuts)
        if not len(self.train_cuts) or (self.weights and not all(self.train_cuts.sizes)):
            empty = [str(path) for path, size in zip(self.manifests["train"], self.train_cuts.sizes) if not size]
            raise UserError(
                f"{', '.join(empty)}: no utterance lasts min_duration {self.min_duration} s or more; lower it"
            )
        if num_short := int((~long_enough).sum()):
            log.warning("left out %d of %d utterances shorter than %s s", num_short, len(train), self.min_duration)
        if stage == "fit":
            self.mixed.mixer(self.train_cuts)  # refuses a corpus that has nothing to mix

    def state_dict(self) -> dict[str, Any]:
        """Return the records of the manifests, the fingerprint of the labels and the amount of audio."""
        if self._audio is None:
            self._audio = audio_counts(self.train_cuts)
        labels = self.labels.fingerprint if self.labels is not None else None
        facts: dict[str, Any] = {"labels": labels, "audio": dict(self._audio), "plan": self.plan}
        facts |= {"max_duration": self.max_duration} | self.mixed.state()
        if self._balance is None:
            self._balance = balance_state(self.balance, self.train_cuts)
        return plain_records(self._records) | facts | self._balance

    def check_same(self, state_dict: object, checkpoint: Path) -> None:
        """Refuse to train on other utterances than the previous iteration.

        Args:
            state_dict: State of that iteration's data, in its checkpoint.
            checkpoint: Path of the checkpoint.

        Raises:
            UserError: The training manifests differ.
        """
        if isinstance(state_dict, dict):  # checkpoints of earlier versions have no such state
            recorded, paths = state_dict.get("train"), self.manifests["train"]
            match_manifests(recorded, paths, self._records("train"), "train", checkpoint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the manifests into the order of the checkpoint that training resumes from, and plan batches as it does.

        Raises:
            UserError: The manifests or the labels differ, or other batches are planned already.
        """
        if self.max_duration is None:
            self.max_duration = kept_duration(state_dict)
        if (trainer := resuming_trainer(self)) is None:
            return
        checkpoint = str(trainer.ckpt_path)
        orders = {
            part: match_manifests(state_dict.get(part), self.manifests[part], self._records(part), part, checkpoint)
            for part in ("train", "validation")
        }
        check_order(trainer, orders["train"], self.manifests["train"])
        check_same_balance(self.balance, self.train_cuts, state_dict, checkpoint)
        self.plan = kept_plan(trainer, state_dict, PLAN)
        known_labels = (self.labels.fingerprint, self.continued_labels) if self.labels is not None else ()
        if self.labels is not None and state_dict.get("labels") not in known_labels:
            raise UserError(
                f"{self.labels.path}: these labels are not those that {checkpoint} was trained with; restore them from "
                "a backup, or start another run with another --output"
            )
        self.mixed.check_same(state_dict, checkpoint)
        for part, order in orders.items():
            self.manifests[part] = [self.manifests[part][number] for number in order]
            self._recorded[part] = [self._recorded[part][number] for number in order]
        self.train_cuts = self.train_cuts.ordered(orders["train"])
        self.validation_cuts = self.validation_cuts.ordered(orders["validation"])
        if self.weights is not None:
            self.weights = [self.weights[number] for number in orders["train"]]

    def _records(self, part: str) -> list[ManifestRecord]:
        if part not in self._recorded:
            parts = (self.train_cuts if part == "train" else self.validation_cuts).parts
            weights = self.weights if part == "train" and self.weights else [None] * len(parts)
            prints = [cuts.fingerprint if isinstance(cuts, SharCuts) else ordered_fingerprint(cuts) for cuts in parts]
            names = [Path(path).name for path in self.manifests[part]]
            self._recorded[part] = [*map(ManifestRecord, names, prints, weights)]
        return self._recorded[part]

    def train_dataloader(self) -> Loader:
        return self._loader(self.train_cuts, shuffle=True)

    def val_dataloader(self) -> Loader | list[Loader]:
        return self._loader(self.validation_cuts, shuffle=False) if len(self.validation_cuts) else []

    def predict_dataloader(self) -> Loader:
        raise UserError(
            "a pre-trained model has no transcripts to predict; fine-tune it, or use load_encoder().features"
        )

    def find_duration(self) -> float:
        """Return the seconds of a batch; `auto` finds the most that fit, once, and takes the default to evaluate."""
        if self.max_duration is None:
            self.max_duration = find_duration(self, MAX_DURATION, self._trial, self.meter)
        return self.max_duration or MAX_DURATION

    def _trial(self) -> Trial:
        batches, frames = self._batches(self.train_cuts), self._frames(self.train_cuts)
        longest = int(frames.argmax())

        def row(seed: int) -> PretrainingBatch:
            return batches[BatchPlan((longest,), seed, seed)]

        return Trial(row, int(frames[longest]), int(frames.sum()))

    def _frames(self, cuts: Corpora) -> np.ndarray:
        frames: np.ndarray = np.minimum(num_frames(cuts.num_samples, self.clock), self.max_crop_frames)
        return frames

    def _batches(self, cuts: Corpora, max_frames: int | None = None, mixer: Mixer | None = None) -> PretrainingBatches:
        if self.labels is None:
            raise UserError(
                "there are no labels to train on; add an entry to iterations, the Relabel callback, or data.labels"
            )
        self.labels.check(cuts, trainer_and_model(self)[1].num_clusters, self.clock)
        return PretrainingBatches(
            cuts,
            self.labels,
            max_crop_frames=self.max_crop_frames,
            mask_prob=self.mask_prob,
            mask_length=self.mask_length,
            max_frames=max_frames,
            mixer=mixer,
            clock=self.clock,
        )

    def _loader(self, cuts: Corpora, shuffle: bool) -> Loader:
        trainer, _ = trainer_and_model(self)
        self.find_duration()
        fills = shuffle and self.plan >= 2
        groups, shares = groups_and_shares(self.balance if shuffle else Balance(), cuts, self._frames(cuts))
        blocks: dict[str, Any] = {"block_cuts": SHAR_BLOCK} if cuts.on_disk else {}
        return planned_loader(
            trainer,
            self._batches(cuts, self.max_frames if fills else None, self.mixed.mixer(cuts) if shuffle else None),
            self._frames(cuts),
            self.max_frames,
            num_workers=self.num_workers,
            seed=self.seed,
            shuffle=shuffle,
            corpora=cuts.sizes,
            weights=self.weights if shuffle else None,
            groups=groups,
            shares=shares,
            crop=self.max_crop_frames if fills else None,
            **blocks,
        )


def _first_cuts(cuts: Corpora) -> Corpora:
    """Keep the first utterances of each corpus."""
    return cuts.chosen(np.concatenate([np.arange(size) < DEV_RUN_CUTS for size in cuts.sizes] or [np.zeros(0, bool)]))
