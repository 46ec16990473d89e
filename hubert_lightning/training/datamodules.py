"""Manifests in, batches out: the two data modules that `hubert fit` builds from YAML.

All that can be wrong with a manifest is found in `setup` and when the loaders are asked for, before the first step.
"""

import logging
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from lhotse import CutSet
from lhotse.cut import Cut
from lightning import LightningDataModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from hubert_lightning.data.corpora import Corpora, ids_and_samples, read_corpora
from hubert_lightning.data.manifest import check_audio, fingerprint, read_manifests, speaker_of, transcript
from hubert_lightning.data.shar import SharCuts
from hubert_lightning.data.workers import WatchedReads, quiet_worker
from hubert_lightning.errors import UserError, within
from hubert_lightning.frames import SAMPLE_RATE, num_frames, num_samples, seconds_to_samples
from hubert_lightning.training.batches import PretrainingBatches, TranscribedBatches
from hubert_lightning.training.lightning_internals import batches_trained
from hubert_lightning.training.provenance import Manifest, compared, ordered_fingerprint
from hubert_lightning.training.sampler import PlannedBatches, padded_frames
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.vocabulary import Vocabulary

log = logging.getLogger(__name__)

SHAR_BLOCK = 100_000
"""Cuts that are shuffled among one another, of a corpus that stays on disk: some hundred archives."""
MOST_WORKERS = 1024
DEV_RUN = 100
"""Utterances of each manifest that `fast_dev_run` clusters and trains on."""


class PretrainingData(LightningDataModule):
    """Untranscribed audio and the cluster of each of its frames. Defaults: HuBERT Base on LibriSpeech.

    Args:
        train: Manifests (of `hubert prepare`) to train on.
        weights: Share of each of these manifests in an epoch, which has as many seconds as all together: smaller ones
            come several times, of larger ones other parts in each epoch. Every utterance comes once if not given.
        validation: Manifests to validate on, with fixed crops and masks.
        labels: Folder of a finished label store; left out where the Relabel callback makes the labels.
        max_duration: Seconds of audio in a batch, on each GPU.
        max_crop: Seconds of an utterance at most; the crop moves from epoch to epoch.
        min_duration: Seconds under which a training utterance is left out.
        mask_prob: Share of frames that mask spans would cover if they did not overlap.
        mask_length: Frames in a mask span.
        num_workers: Processes that read audio, for each GPU.
        seed: Of order, crops and masks; those of validation are the same for every seed.
    """

    def __init__(
        self,
        train: list[Path],
        weights: list[float] | None = None,
        validation: list[Path] | None = None,
        labels: Path | None = None,
        max_duration: float = 87.5,
        max_crop: float = 15.625,
        min_duration: float = 2.0,
        mask_prob: float = 0.8,
        mask_length: int = 10,
        num_workers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._counted: dict[str, Any] | None = None
        within(0, 2**40, min_duration=min_duration)
        within(0, MOST_WORKERS, num_workers=num_workers)
        within(0, 2**32 - 1, seed=seed)
        _check_durations(max_duration=max_duration, max_crop=max_crop)
        _check_masks(mask_prob, mask_length)
        if weights is not None and (len(weights) != len(train) or not all(0 < weight < math.inf for weight in weights)):
            raise UserError(f"data.weights {weights} for {len(train)} manifests in data.train; give each one above 0")
        self.manifests, self.weights = {"train": train, "validation": validation or []}, weights
        self.labels = LabelStore(labels) if labels else None
        self.max_duration, self.max_crop = max_duration, max_crop
        self.max_frames = num_frames(seconds_to_samples(max_duration))
        self.max_crop_frames = num_frames(seconds_to_samples(max_crop))
        self.min_duration = min_duration
        self.mask_prob, self.mask_length = mask_prob, mask_length
        self.num_workers, self.seed = num_workers, seed
        self.train_cuts = self.validation_cuts = Corpora()
        self._recorded: dict[str, list[Manifest]] = {}

    def record(self, *parts: str) -> dict[str, Any]:
        """What tells this data from other data, for the loggers: manifests, their audio, crops and masks."""
        cuts = {"train": self.train_cuts, "validation": self.validation_cuts}
        read = {part: _of_part(self.manifests[part], cuts[part], cuts[part].fingerprint) for part in parts}
        return read | {
            "weights": self.weights,
            "max_crop": self.max_crop,
            "min_duration": self.min_duration,
            "mask_prob": self.mask_prob,
            "mask_length": self.mask_length,
            "num_workers": self.num_workers,
            "seed": self.seed,
        }

    def setup(self, stage: str) -> None:
        if len(self.train_cuts):
            return
        if self.labels is not None:
            self.labels.verify()
        train = read_corpora(self.manifests["train"])
        if self.manifests["validation"]:
            self.validation_cuts = read_corpora(self.manifests["validation"])
        validated = set(self.validation_cuts.ids())
        if both := next((cut_id for cut_id in train.ids() if cut_id in validated), None):
            raise UserError(f"{both}: among the training and the validation utterances; keep them apart")
        for cut_id, samples in ids_and_samples(self.validation_cuts):
            if num_frames(samples) < 2:
                raise UserError(f"{cut_id}: too short to validate on, less than two frames; leave it out")
        shortest = max(seconds_to_samples(self.min_duration), num_samples(2))
        self.train_cuts = train.chosen(train.num_samples >= shortest)
        if stage == "fit" and self.trainer is not None and self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.train_cuts, self.validation_cuts = _first(self.train_cuts), _first(self.validation_cuts)
        if not len(self.train_cuts) or (self.weights and not all(self.train_cuts.sizes)):
            empty = [str(path) for path, size in zip(self.manifests["train"], self.train_cuts.sizes) if not size]
            raise UserError(
                f"{', '.join(empty)}: no utterance lasts min_duration {self.min_duration} s or more; lower it"
            )
        if short := int((train.num_samples < shortest).sum()):
            log.warning(
                "%d of %d training utterances last less than %s s: left out", short, len(train), self.min_duration
            )

    def state_dict(self) -> dict[str, Any]:
        """Which utterances, in which order, and which labels a checkpoint is trained with, and how much audio it is."""
        labels = self.labels.fingerprint if self.labels is not None else None
        return _plain(self._manifests) | {"labels": labels, "audio": _audio(self, self.train_cuts)}

    def check_same(self, state_dict: Any, checkpoint: Path) -> None:
        """Refuse to train on other utterances than the iteration before.

        Args:
            state_dict: State of that iteration's data, in its checkpoint.
            checkpoint: Path of the checkpoint.

        Raises:
            UserError: The training manifests are others.
        """
        if isinstance(state_dict, dict):  # checkpoints of earlier versions do not say
            compared(state_dict.get("train"), self.manifests["train"], self._manifests("train"), "train", checkpoint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the manifests into the order of the checkpoint that training resumes from.

        Raises:
            UserError: Manifests or labels are not those that it was trained with, or the batches of another order are
                planned already.
        """
        if not _fitting(self):
            return
        checkpoint = _resumed(self)
        order = {
            part: compared(state_dict.get(part), self.manifests[part], self._manifests(part), part, checkpoint)
            for part in ("train", "validation")
        }
        _check_order(self, order["train"], self.manifests["train"])
        if self.labels is not None and self.labels.fingerprint != state_dict.get("labels"):
            raise UserError(
                f"{self.labels.path}: these labels are not those that {checkpoint} was trained with; restore them from "
                "a backup, or start another run with another --output"
            )
        for part, places in order.items():
            self.manifests[part] = [self.manifests[part][place] for place in places]
            self._recorded[part] = [self._recorded[part][place] for place in places]
        self.train_cuts = Corpora([self.train_cuts.parts[place] for place in order["train"]])
        self.validation_cuts = Corpora([self.validation_cuts.parts[place] for place in order["validation"]])
        if self.weights is not None:
            self.weights = [self.weights[place] for place in order["train"]]

    def _manifests(self, part: str) -> list[Manifest]:
        if part not in self._recorded:
            cuts = self.train_cuts if part == "train" else self.validation_cuts
            weights = self.weights if part == "train" and self.weights else [None] * len(cuts.parts)
            prints = [of.fingerprint if isinstance(of, SharCuts) else ordered_fingerprint(of) for of in cuts.parts]
            names = [Path(path).name for path in self.manifests[part]]
            self._recorded[part] = [*map(Manifest, names, prints, weights)]
        return self._recorded[part]

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_cuts, shuffle=True)

    def val_dataloader(self) -> DataLoader | list:
        return self._loader(self.validation_cuts, shuffle=False) if len(self.validation_cuts) else []

    def predict_dataloader(self) -> DataLoader:
        raise UserError(
            "a pre-trained model has no transcripts to predict; fine-tune it, or use load_encoder().features"
        )

    def _loader(self, cuts: Corpora, shuffle: bool) -> DataLoader:
        if self.labels is None:
            raise UserError(
                "there are no labels to train on; add an entry to iterations, the Relabel callback, or data.labels"
            )
        self.labels.check(cuts, _model(self).num_clusters)
        batches = PretrainingBatches(
            cuts,
            self.labels,
            max_crop_frames=self.max_crop_frames,
            mask_prob=self.mask_prob,
            mask_length=self.mask_length,
        )
        frames = np.minimum(num_frames(cuts.num_samples), self.max_crop_frames)
        weights = self.weights if shuffle else None
        blocks = {"block_cuts": SHAR_BLOCK} if cuts.on_disk else {}
        return _loader(self, batches, frames, shuffle, corpora=cuts.sizes, weights=weights, **blocks)


class TranscribedData(LightningDataModule):
    """Audio and its transcripts, for fine-tuning with CTC. Defaults: HuBERT Base on 10 hours (as wav2vec 2.0).

    Args:
        train: Manifests to train on.
        validation: Manifests to validate on, always in one order.
        test: Manifests that `hubert test` and `hubert predict` read.
        max_duration: Seconds of audio in a batch, padding counted, on each GPU.
        mask_prob: Share of frames that mask spans would cover if they did not overlap.
        mask_length: Frames in a mask span.
        channel_mask_prob: The same for channels of the projected convolution output.
        channel_mask_length: Channels in a mask span.
        num_workers: Processes that read audio, for each GPU.
        seed: Of order and masks.
    """

    def __init__(
        self,
        train: list[Path] | None = None,
        validation: list[Path] | None = None,
        test: list[Path] | None = None,
        max_duration: float = 200.0,
        mask_prob: float = 0.65,
        mask_length: int = 10,
        channel_mask_prob: float = 0.5,
        channel_mask_length: int = 64,
        num_workers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._counted: dict[str, Any] | None = None
        within(0, MOST_WORKERS, num_workers=num_workers)
        within(0, 2**32 - 1, seed=seed)
        _check_durations(max_duration=max_duration)
        _check_masks(mask_prob, mask_length)
        _check_masks(channel_mask_prob, channel_mask_length, "channel_")
        self.manifests = {"train": train, "validation": validation, "test": test}
        self.max_duration = max_duration
        self.max_frames = num_frames(seconds_to_samples(max_duration))
        self.masking: dict[str, Any] = {
            "mask_prob": mask_prob,
            "mask_length": mask_length,
            "channel_mask_prob": channel_mask_prob,
            "channel_mask_length": channel_mask_length,
        }
        self.num_workers, self.seed = num_workers, seed
        self.cuts: dict[str, CutSet] = {}
        self._parts: dict[str, list[list[Cut]]] = {}  # of each manifest
        self._recorded: dict[str, list[Manifest]] = {}

    def record(self, *parts: str) -> dict[str, Any]:
        """What tells this data from other data, for the loggers: manifests, their audio and masks."""
        given = [part for part in parts if part in self.cuts]
        read = {part: _of_part(self.manifests[part], self.cuts[part], fingerprint(self.cuts[part])) for part in given}
        return read | self.masking | {"num_workers": self.num_workers, "seed": self.seed}

    def setup(self, stage: str) -> None:
        parts = {"fit": ["train", "validation"], "validate": ["validation"]}.get(stage, ["test"])
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
            if stage != "predict":
                check_transcripts(self.cuts[part], _model(self).vocabulary, training=part == "train")
            else:
                self.cuts[part] = self.cuts[part].drop_supervisions().to_eager()  # whatever they say, nobody asked

    def state_dict(self) -> dict[str, Any]:
        """Which utterances and transcripts, in which order, a checkpoint is trained with."""
        return _plain(self._manifests) | {"audio": _audio(self, self.cuts.get("train", ()))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the manifests into the order of the checkpoint that training resumes from.

        Raises:
            UserError: Manifests are not those that it was trained with, or the batches of another order are planned
                already.
        """
        if not _fitting(self):
            return
        checkpoint = _resumed(self)
        for part in ("train", "validation"):
            paths = self.manifests[part] or []
            order = compared(state_dict.get(part), paths, self._manifests(part), part, checkpoint)
            if part == "train":
                _check_order(self, order, paths)
            if order:
                self._parts[part] = [self._parts[part][place] for place in order]
                self.cuts[part] = _joined(self._parts[part])
                self.manifests[part] = [paths[place] for place in order]
                self._recorded[part] = [self._recorded[part][place] for place in order]

    def _manifests(self, part: str) -> list[Manifest]:
        if part not in self._recorded:
            vocabulary, paths = _model(self).vocabulary, self.manifests[part] or []
            prints = [
                ordered_fingerprint(cuts, lambda cut: transcript(cut, vocabulary)) for cuts in self._parts.get(part, [])
            ]
            self._recorded[part] = [Manifest(Path(path).name, of) for path, of in zip(paths, prints, strict=True)]
        return self._recorded[part]

    def train_dataloader(self) -> DataLoader:
        model = _model(self)
        channels = model.encoder.config.dim
        batches = TranscribedBatches(
            self.cuts["train"], model.vocabulary, training=True, channels=channels, **self.masking
        )
        return self._loader("train", batches, shuffle=True)

    def val_dataloader(self) -> DataLoader | list:
        return self._unmasked("validation") if "validation" in self.cuts else []

    def test_dataloader(self) -> DataLoader:
        return self._unmasked("test")

    def predict_dataloader(self) -> DataLoader:
        return self._unmasked("test")

    def _unmasked(self, part: str) -> DataLoader:
        batches = TranscribedBatches(self.cuts[part], _model(self).vocabulary)
        return self._loader(part, batches, shuffle=False)

    def _loader(self, part: str, batches: TranscribedBatches, shuffle: bool) -> DataLoader:
        frames = [num_frames(cut.num_samples) for cut in self.cuts[part]]
        return _loader(self, batches, [padded_frames(count) for count in frames] if shuffle else frames, shuffle)


def _first(cuts: Corpora) -> Corpora:
    """The first utterances of each corpus."""
    return cuts.chosen(np.concatenate([np.arange(size) < DEV_RUN for size in cuts.sizes] or [np.zeros(0, bool)]))


def _plain(manifests: Callable[[str], list[Manifest]]) -> dict[str, Any]:
    """What a checkpoint says of the manifests, readable without our classes."""
    return {part: [list(manifest) for manifest in manifests(part)] for part in ("train", "validation")}


def _joined(parts: Sequence[Sequence[Cut]]) -> CutSet:
    return CutSet([cut for cuts in parts for cut in cuts])


def _fitting(data: LightningDataModule) -> bool:
    """Whether what a checkpoint was trained with matters: not where it is judged."""
    assert data.trainer is not None
    return data.trainer.state.fn == TrainerFn.FITTING


def _resumed(data: LightningDataModule) -> str:
    """Path of the checkpoint that training resumes from, for error messages."""
    assert data.trainer is not None
    return str(data.trainer.ckpt_path)


def _check_order(data: LightningDataModule, order: Sequence[int], paths: Sequence[Path]) -> None:
    """Raise `UserError` if the Trainer has the batches of another order than the checkpoint's.

    It has where a strategy reads checkpoints late, such as LayerwiseFSDP, and steps are counted by `max_epochs`.
    """
    assert data.trainer is not None
    if list(order) != sorted(order) and data.trainer.train_dataloader is not None:
        named = ", ".join(str(paths[place]) for place in order)
        raise UserError(
            f"data.train names the manifests of {_resumed(data)} in another order, and this strategy has planned its "
            f"batches already; give data.train as [{named}]"
        )


def _of_part(manifests: Sequence[Path] | None, cuts: Iterable[Cut], audio: str) -> dict[str, Any]:
    return {"manifests": list(map(str, manifests or [])), **_counts(cuts), "fingerprint": audio}


def _audio(data: Any, cuts: Iterable[Cut]) -> dict[str, Any]:
    """What a checkpoint tells of the training data: how much there is, counted once."""
    if data._counted is None:
        data._counted = _counts(cuts)
    return dict(data._counted)


def _counts(cuts: Iterable[Cut]) -> dict[str, Any]:
    """Utterances, hours and, where all are known, speakers."""
    samples = [count for _, count in ids_and_samples(cuts)]
    counts = {"utterances": len(samples), "hours": round(sum(samples) / SAMPLE_RATE / 3600, 2)}
    if isinstance(cuts, Corpora) and cuts.on_disk:
        return counts
    speakers = {speaker_of(cut) for cut in cuts}
    return counts if "" in speakers else counts | {"speakers": len(speakers)}


def _check_durations(**seconds: float) -> None:
    for name, value in seconds.items():
        if not -math.inf < value <= 2**40:
            raise UserError(f"data.{name} is {value} s; it is a duration in seconds")
        if num_frames(seconds_to_samples(value)) < 2:
            raise UserError(f"data.{name} is {value} s, too short for two frames; it is a duration in seconds")


def _check_masks(prob: float, length: int, of: str = "") -> None:
    if not 0 <= prob <= 1 or not 1 <= length <= 2**30:
        raise UserError(
            f"{of}mask_prob {prob} and {of}mask_length {length}: a probability is from 0 to 1, a length 1 or more"
        )


def check_transcripts(cuts: CutSet, vocabulary: Vocabulary, training: bool = True) -> None:
    """Refuse transcripts that CTC cannot learn.

    Args:
        cuts: Utterances with their transcripts.
        vocabulary: Vocabulary of the model.
        training: Whether the model learns from them; if not, unknown characters are a warning, and count as errors.

    Raises:
        UserError: A cut without words, with characters that are no token, or with more tokens than frames.
    """
    texts = [(cut, transcript(cut, vocabulary)) for cut in cuts]
    if wordless := [(cut.id, text) for cut, words in texts if not words and (text := _as_written(cut))]:
        raise UserError(
            f"{wordless[0][0]}: the transcript {wordless[0][1][:40]!r} contains only punctuation or symbols"
            f"{_and_others(wordless)}; write down what is said, or leave it out"
        )
    if without := [cut.id for cut, text in texts if not text]:
        raise UserError(
            f"{without[0]}: no transcript in the manifest{_and_others(without)}; prepare it with its transcripts or "
            "leave it out"
        )
    having = [(cut.id, text) for cut, text in texts if vocabulary.unknown_characters(text)]
    unknown = set[str]().union(*(vocabulary.unknown_characters(text) for _, text in having))
    if unknown:
        written = Counter(character for _, text in having for character in text)
        counts = ", ".join(f"{character!r} {written[character]} times" for character in sorted(unknown))
        if not training:
            log.warning(
                "%s: the transcript has characters that the model cannot spell%s, in all %s; they count as errors",
                having[0][0],
                _and_others(having),
                counts,
            )
    if unknown and training:
        raise UserError(
            f"{having[0][0]}: the transcript {having[0][1][:40]!r} has characters that are not among the model's "
            f"letters{_and_others(having)}, in all {counts}; spell them out (numbers: `hubert prepare` with "
            "--spell_numbers LANGUAGE) or remove them and prepare the manifest again, or train a model with a "
            "vocabulary of its own (`hubert vocabulary`)"
        )
    for cut, text in texts:
        # A token spells a character or more, and one ends the text: this is as many as CTC can need
        if 2 * len(unicodedata.normalize("NFD", text)) + 1 <= num_frames(cut.num_samples):
            continue
        tokens = vocabulary.targets(text)
        needed = len(tokens) + sum(a == b for a, b in pairwise(tokens))  # a blank parts equal ones
        if needed > num_frames(cut.num_samples):
            raise UserError(
                f"{cut.id}: {len(text)} letters for {num_frames(cut.num_samples)} frames of audio, more than CTC can "
                "align; the transcript belongs to other audio, correct or remove it"
            )


def _as_written(cut: Cut) -> str:
    return " ".join(segment.text or "" for segment in cut.supervisions).strip()


def _and_others(ids: Sequence[Any]) -> str:
    number = len(ids) - 1
    return f" (and {number} other{'s' * (number > 1)})" if number else ""


def _model(data: LightningDataModule) -> Any:
    """The model that the data is for: it knows its own clusters, letters and width.

    Raises:
        UserError: No Trainer has both.
    """
    model = data.trainer.lightning_module if data.trainer is not None else None
    if model is None:
        name = type(data).__name__
        raise UserError(
            f"{name}: its batches depend on the model, which it takes from its Trainer; call trainer.fit(model, "
            f"datamodule=data), or set {name}.trainer to a Trainer that has the model"
        )
    return model


def _loader(
    data: Any,
    batches: PretrainingBatches | TranscribedBatches,
    frames: Sequence[int] | np.ndarray,
    shuffle: bool,
    **how: Any,
) -> DataLoader:
    trainer = data.trainer
    if trainer.overfit_batches:
        raise UserError(
            f"overfit_batches is {trainer.overfit_batches}, which would replace our plan of batches; leave it out, and "
            "give the data a manifest of a few utterances"
        )
    sampler = PlannedBatches(
        frames,
        data.max_frames,
        seed=data.seed if shuffle else 0,
        # restored with the rest of the loop, so a resumed run goes on with the next batch
        position=partial(batches_trained, trainer),
        shuffle=shuffle,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        accumulate=trainer.accumulate_grad_batches,
        even=isinstance(trainer.strategy, ModelParallelStrategy),  # whose ranks compute every layer together
        **how,
    )
    return DataLoader(
        WatchedReads(batches, attrgetter("cuts"), partial(_id_of, batches), data.num_workers),
        sampler=sampler,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=data.num_workers,
        pin_memory=trainer.strategy.root_device.type == "cuda",
        persistent_workers=data.num_workers > 0,
        worker_init_fn=quiet_worker if data.num_workers else None,
    )


def _id_of(batches: PretrainingBatches | TranscribedBatches, place: int) -> str:
    return batches.cuts[place].id


def _as_it_is(batch: Any) -> Any:
    return batch
