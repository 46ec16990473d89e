"""The data of fine-tuning: manifests with transcripts in, batches out.

`setup` and the loaders check the manifests before the first step.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lhotse import CutSet
from lhotse.cut import Cut
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from hubert_lightning.data.balance import Balance
from hubert_lightning.data.corpora import Corpora, manifest_name
from hubert_lightning.data.manifest import check_audio, fingerprint, read_manifests, transcript
from hubert_lightning.errors import UserError, within
from hubert_lightning.frames import Clock, num_frames, seconds_to_samples
from hubert_lightning.training.balanced import (
    balance_state,
    check_balance,
    check_same_balance,
    groups_and_shares,
    shares_record,
)
from hubert_lightning.training.batch_size import MemoryMeter, Trial, find_duration, given_duration, kept_duration
from hubert_lightning.training.batches import TranscribedBatch, TranscribedBatches
from hubert_lightning.training.data_checks import (
    check_masks,
    check_order,
    check_transcripts,
    warn_of_common,
)
from hubert_lightning.training.loaders import (
    MAX_WORKERS,
    Loader,
    clock_of_model,
    planned_loader,
    resuming_trainer,
    trainer_and_model,
)
from hubert_lightning.training.mixing import MixedAudio, Mixing
from hubert_lightning.training.provenance import (
    ManifestRecord,
    audio_counts,
    describe_part,
    match_manifests,
    ordered_fingerprint,
    plain_records,
)
from hubert_lightning.training.sampler import BatchPlan, padded_frames

MAX_TRANSCRIBED = 200.0
"""Default seconds of a batch: that of HuBERT Base."""


class TranscribedData(LightningDataModule):
    """Transcribed audio for fine-tuning with CTC. Defaults: HuBERT Base on 10 hours, as wav2vec 2.0.

    Args:
        train: Training manifests, with transcripts.
        validation: Validation manifests, always read in one order.
        test: Manifests for `hubert test` and `hubert predict`.
        max_duration: Seconds of audio in a batch with its padding, on each GPU; `auto` tries a few training steps and
            takes the largest that fits, which a resumed run keeps.
        mask_prob: Fraction of frames that the mask spans would cover if they did not overlap.
        mask_length: Frames in a mask span: 10 of 20 ms in the paper, 5 for a model of 25 Hz.
        channel_mask_prob: Fraction of the channels of the projected convolution output that the mask spans would cover
            if they did not overlap.
        channel_mask_length: Channels in a mask span.
        num_workers: Number of processes that read audio, for each GPU.
        seed: Seed of the order, masks and mixtures of training.
        mixing: Other speech, noise and rooms in the training audio; transcripts stay those of the utterance, and
            validation stays clean.
        balance_languages: Exponent of the amounts of audio of the languages, from 0, which gives each the same share of
            an epoch, to 1, which changes nothing; or the relative share of each language, such as {en: 2, sw: 1}.
        balance_corpora: The same for corpora, within each language if languages are balanced too.
    """

    meter: MemoryMeter | None = None
    """Measures the steps that `auto` tries; the device's memory if not set."""

    def __init__(
        self,
        train: list[Path] | None = None,
        validation: list[Path] | None = None,
        test: list[Path] | None = None,
        max_duration: float | Literal["auto"] = MAX_TRANSCRIBED,
        mask_prob: float = 0.65,
        mask_length: int = 10,
        channel_mask_prob: float = 0.5,
        channel_mask_length: int = 64,
        num_workers: int = 4,
        seed: int = 0,
        mixing: Mixing = Mixing(),
        balance_languages: float | dict[str, float] | None = None,
        balance_corpora: float | dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self._audio: dict[str, float] | None = None
        self._balance: dict[str, Any] | None = None
        within(0, MAX_WORKERS, num_workers=num_workers)
        within(0, 2**32 - 1, seed=seed)
        self.max_duration = given_duration(max_duration)
        check_masks(mask_prob, mask_length)
        check_masks(channel_mask_prob, channel_mask_length, "channel_")
        self.balance = Balance(balance_languages, balance_corpora)
        self.manifests = {"train": train, "validation": validation, "test": test}
        self.masking: dict[str, Any] = {
            "mask_prob": mask_prob,
            "mask_length": mask_length,
            "channel_mask_prob": channel_mask_prob,
            "channel_mask_length": channel_mask_length,
        }
        self.num_workers, self.seed, self.mixed = num_workers, seed, MixedAudio(mixing)
        self.cuts: dict[str, CutSet] = {}
        self._parts: dict[str, list[list[Cut]]] = {}  # the cuts of each manifest
        self._recorded: dict[str, list[ManifestRecord]] = {}

    @property
    def clock(self) -> Clock:
        """Clock of the model's encoder."""
        return clock_of_model(self)

    def record(self, *parts: str) -> dict[str, Any]:
        """Describe the manifests, their audio and the masks, for the loggers."""
        described = {
            part: describe_part(self.manifests[part], self.cuts[part], fingerprint(self.cuts[part]))
            for part in parts
            if part in self.cuts
        }
        if "train" in described:
            described["train"] |= shares_record(self._corpora("train"), self.balance, self._padded("train"))
        mixing = self.mixed.record() if "train" in parts else None
        return described | self.masking | {"num_workers": self.num_workers, "seed": self.seed, "mixing": mixing}

    def setup(self, stage: str) -> None:
        parts = {"fit": ["train", "validation"], "validate": ["validation"]}.get(stage, ["test"])
        if stage == "fit":
            self.mixed.read()
        for part in parts:
            paths = self.manifests[part]
            if paths is None and part == "validation" and stage == "fit":
                continue
            if paths is None:
                raise UserError(f"data.{part} names no manifest; `hubert {TrainerFn(stage).value}` needs one")
            if not paths:
                raise UserError(f"data.{part} names no manifest; make one with `hubert prepare` and give its path")
            self._parts[part] = read_manifests(paths)
            self.cuts[part] = _joined(self._parts[part])
            check_audio(self.cuts[part])
            if part == "train":
                corpora = self._corpora(part)
                check_balance(self.balance, corpora, np.ones(len(corpora), bool), "")
                self.mixed.mixer(corpora)  # refuses a corpus that has nothing to mix
            if stage != "predict":
                check_transcripts(self.cuts[part], trainer_and_model(self)[1].vocabulary, part == "train", self.clock)
            else:
                self.cuts[part] = self.cuts[part].drop_supervisions().to_eager()  # transcripts do not matter
        if stage == "fit" and "validation" in self.cuts:
            warn_of_common({cut.id for cut in self.cuts["train"]}, {cut.id for cut in self.cuts["validation"]})

    def state_dict(self) -> dict[str, Any]:
        """Return the records of the manifests and the amount of audio."""
        if self._audio is None:
            self._audio = audio_counts(self.cuts.get("train", ()))
        facts = {"audio": dict(self._audio), "max_duration": self.max_duration} | self.mixed.state()
        if self._balance is None:
            self._balance = balance_state(self.balance, self._corpora("train"))
        return plain_records(self._records) | facts | self._balance

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the manifests into the order of the checkpoint that training resumes from.

        Raises:
            UserError: The manifests differ, or the batches of another order are planned already.
        """
        if self.max_duration is None:
            self.max_duration = kept_duration(state_dict)
        if (trainer := resuming_trainer(self)) is None:
            return
        checkpoint = str(trainer.ckpt_path)
        check_same_balance(self.balance, self._corpora("train"), state_dict, checkpoint)
        self.mixed.check_same(state_dict, checkpoint)
        for part in ("train", "validation"):
            paths = self.manifests[part] or []
            order = match_manifests(state_dict.get(part), paths, self._records(part), part, checkpoint)
            if part == "train":
                check_order(trainer, order, paths)
            if order:
                self._parts[part] = [self._parts[part][number] for number in order]
                self.cuts[part] = _joined(self._parts[part])
                self.manifests[part] = [paths[number] for number in order]
                self._recorded[part] = [self._recorded[part][number] for number in order]

    def _records(self, part: str) -> list[ManifestRecord]:
        if part not in self._recorded:
            vocabulary, paths = trainer_and_model(self)[1].vocabulary, self.manifests[part] or []
            prints = [
                ordered_fingerprint(cuts, lambda cut: transcript(cut, vocabulary)) for cuts in self._parts.get(part, [])
            ]
            names = [Path(path).name for path in paths]
            self._recorded[part] = [ManifestRecord(name, print_) for name, print_ in zip(names, prints, strict=True)]
        return self._recorded[part]

    def train_dataloader(self) -> Loader:
        return self._loader("train", training=True)

    def val_dataloader(self) -> Loader | list[Loader]:
        return self._loader("validation") if "validation" in self.cuts else []

    def test_dataloader(self) -> Loader:
        return self._loader("test")

    def predict_dataloader(self) -> Loader:
        return self._loader("test")

    def find_duration(self) -> float:
        """Return the seconds of a batch; `auto` finds the most that fit, once, and takes the default to evaluate."""
        if self.max_duration is None:
            self.max_duration = find_duration(self, MAX_TRANSCRIBED, self._trial, self.meter)
        return self.max_duration or MAX_TRANSCRIBED

    def _trial(self) -> Trial:
        batches, frames = self._batches("train", training=True), self._frames("train", training=True)
        longest = frames.index(max(frames))

        def row(seed: int) -> TranscribedBatch:
            return batches[BatchPlan((longest,), seed, seed)]

        return Trial(row, frames[longest], sum(frames))

    def _frames(self, part: str, training: bool) -> list[int]:
        frames = [num_frames(cut.num_samples, self.clock) for cut in self.cuts[part]]
        if not all(frames):
            short = next(cut for cut, count in zip(self.cuts[part], frames, strict=True) if not count)
            raise UserError(
                f"{short.id}: {short.num_samples} samples are shorter than one frame of {self.clock.window}; remove it "
                f"from data.{part}"
            )
        return [padded_frames(count) for count in frames] if training else frames

    def _batches(self, part: str, training: bool) -> TranscribedBatches:
        model = trainer_and_model(self)[1]
        options: dict[str, Any] = {}
        if training:
            mixer = self.mixed.mixer(self._corpora(part))
            options = {"channels": model.encoder.config.dim, "mixer": mixer, **self.masking}
        return TranscribedBatches(self.cuts[part], model.vocabulary, training=training, clock=self.clock, **options)

    def _loader(self, part: str, training: bool = False) -> Loader:
        trainer, _ = trainer_and_model(self)
        balance = self.balance if training else Balance()
        groups, shares = groups_and_shares(balance, self._corpora(part), self._padded(part))
        return planned_loader(
            trainer,
            self._batches(part, training),
            self._frames(part, training),
            num_frames(seconds_to_samples(self.find_duration()), self.clock),
            num_workers=self.num_workers,
            seed=self.seed,
            shuffle=training,
            groups=groups,
            shares=shares,
        )

    def _corpora(self, part: str) -> Corpora:
        """The cuts of a part, with the names of its manifests."""
        return Corpora(self._parts.get(part, []), [manifest_name(path) for path in self.manifests[part] or []])

    def spoken(self, part: str) -> dict[str, dict[str, str]]:
        """Language and corpus of each utterance by its id, where they are known.

        Args:
            part: "test" or another part that is set up. If it has several manifests, each is a corpus of its own name
                for the utterances that name none.
        """
        corpora = self._corpora(part)
        names = corpora.names if len(corpora.names) > 1 else [""] * len(corpora.names)
        pairs, index = Corpora(corpora.parts, names).named()
        named = [{key: name for key, name in zip(("language", "corpus"), pair) if name} for pair in pairs]
        return {cut_id: named[number] for cut_id, number in zip(corpora.ids(), index.tolist(), strict=True)}

    def _padded(self, part: str) -> np.ndarray:
        return np.array(self._frames(part, training=True), np.int64)


def _joined(parts: Sequence[Sequence[Cut]]) -> CutSet:
    return CutSet([cut for cuts in parts for cut in cuts])
