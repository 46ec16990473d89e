"""What people look at, at every validation: units under spectrograms, phones by cluster, transcripts with players."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from lhotse.cut import Cut
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from hubert_lightning.asr.marked_errors import errors_as_html, errors_as_text, errors_page
from hubert_lightning.asr.scoring import Result, score_utterance
from hubert_lightning.data.alignments import phones_of
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import place_of, speaker_of
from hubert_lightning.errors import within
from hubert_lightning.features.spectrogram import log_mel
from hubert_lightning.frames import SAMPLE_RATE, Clock, num_frames, num_samples, seconds_to_samples
from hubert_lightning.training.distributed import together
from hubert_lightning.training.finetuning import CTCFinetuning
from hubert_lightning.training.finetuning_data import TranscribedData
from hubert_lightning.training.masking import span_mask
from hubert_lightning.training.media import (
    Drawn,
    Markup,
    Sound,
    log_audio,
    log_figures,
    log_page,
    log_table,
    logged_step,
    pictorial_loggers,
)
from hubert_lightning.training.pretraining import HubertPretraining
from hubert_lightning.training.pretraining_data import PretrainingData
from hubert_lightning.training.watched import (
    PhoneClusters,
    WatchedTranscript,
    WatchedUnits,
    WatchedUtterance,
    masked_spans,
    write_phone_clusters,
    write_transcripts,
    write_units,
)
from hubert_lightning.units.figures import (
    MAX_STREAMS,
    Palette,
    UtteranceUnits,
    palette,
    phone_cluster_figure,
    utterance_figure,
)
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.quality import joint_counts, phones_by_frame

COUNTED_UTTERANCES = 5_000
"""Utterances of which phones and clusters are counted; of a larger validation set, these are spread over it."""
MAX_PLAYED_SECONDS = 15.0
"""Longest utterance of a table of transcripts that gets a player."""


class Pictures(Callback):
    """Show what a model does at each validation, in the run's folder `watched/` and in loggers that take pictures.

    Pre-training: a few fixed utterances with labels, predictions and masked spans under their spectrogram; and phones
    by cluster, where the manifest has phones. Fine-tuning: transcripts with their errors marked. The files in
    `watched/` have the same facts, for `hubert report`. Pictures change nothing in training.

    Args:
        enabled: Whether to show anything.
        num_utterances: Utterances that are drawn in pre-training, and that get a player in fine-tuning.
        max_seconds: Maximum seconds of an utterance that is drawn; a longer one is cropped.
        num_transcripts: Rows of the table of transcripts in loggers; 0 keeps all transcripts out of loggers.
        audio: Whether loggers get audio and spectrograms. With false, no recording leaves the machine: figures show
            phones, labels and predictions alone.

    Raises:
        UserError: A number is out of range.
    """

    def __init__(
        self,
        enabled: bool = True,
        num_utterances: int = 4,
        max_seconds: float = 10.0,
        num_transcripts: int = 20,
        audio: bool = True,
    ) -> None:
        within(0, 1000, num_utterances=num_utterances, num_transcripts=num_transcripts)
        within(0.1, 60, max_seconds=max_seconds)
        self.enabled, self.audio = enabled, audio
        self.num_utterances, self.max_seconds, self.num_transcripts = num_utterances, max_seconds, num_transcripts
        self._excerpts: list[Excerpt] | None = None
        self._palettes: list[Palette] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count phones and clusters, which stay the same during the run."""
        self._excerpts, self._palettes = None, []
        data = _data_of(trainer)
        if self.enabled and isinstance(data, PretrainingData) and isinstance(data.labels, LabelStore):
            labels = data.labels
            together(lambda: self._count_phones(trainer, data, labels) if trainer.is_global_zero else None)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        data = _data_of(trainer)
        if isinstance(data, PretrainingData) and isinstance(pl_module, HubertPretraining):
            self._show_units(trainer, pl_module, data)
        elif isinstance(data, TranscribedData) and isinstance(pl_module, CTCFinetuning):
            rows = _rows_of_ranks(trainer, pl_module)
            together(lambda: self._show_transcripts(trainer, data, rows) if trainer.is_global_zero else None)

    def _count_phones(self, trainer: Trainer, data: PretrainingData, labels: LabelStore) -> None:
        cuts = [cut for cut in _spread(data.validation_cuts, COUNTED_UTTERANCES) if phones_of(cut)]
        clusters = labels.source.clusters
        clock = labels.source.clock
        phones = [phones_by_frame(cut, clock) for cut in cuts]
        phone = np.concatenate([np.empty(0, str), *phones])
        known = phone != ""
        if not known.any():
            self._palettes = [palette(number) for number in clusters]
            return
        cluster = np.concatenate([labels[cut.id] for cut in cuts], axis=1)[:, known]  # (streams, frames)
        symbols = np.unique(phone[known]).tolist()
        counts = [joint_counts(phone[known], ids, number) for ids, number in zip(cluster, clusters, strict=True)]
        self._palettes = [palette(of_stream.shape[1], symbols, of_stream) for of_stream in counts]
        run, step = Path(trainer.default_root_dir), trainer.global_step
        write_phone_clusters(run, PhoneClusters(step, symbols, counts[0].tolist()))

        def draw() -> Drawn:
            title = f"labels of {labels.source.features}"
            names = [title] if len(counts) == 1 else [f"{title}, stream {number + 1}" for number in range(len(counts))]
            return {
                name: phone_cluster_figure(symbols, of_stream, name, clock)
                for name, of_stream in zip(names[:MAX_STREAMS], counts)
            }

        log_figures(pictorial_loggers(trainer), "units/phones_by_cluster", draw, logged_step(trainer))

    def _show_units(self, trainer: Trainer, model: HubertPretraining, data: PretrainingData) -> None:
        # A sharded model needs all ranks to compute
        takes_part = trainer.is_global_zero or isinstance(trainer.strategy, ModelParallelStrategy)
        first = self._excerpts is None
        if first:
            self._excerpts = together(lambda: self._choose(data)) if takes_part else together(list)
        excerpts = self._excerpts or []
        predictions = together(lambda: [_predicted(trainer, model, excerpt) for excerpt in excerpts])
        together(
            lambda: (
                self._log_units(trainer, excerpts, predictions, first, data.clock) if trainer.is_global_zero else None
            )
        )

    def _choose(self, data: PretrainingData) -> list["Excerpt"]:
        assert data.labels is not None
        cuts = fixed_cuts(data.validation_cuts, self.num_utterances)
        return [excerpt_of(cut, data, data.labels, self.max_seconds) for cut in cuts]

    def _log_units(
        self,
        trainer: Trainer,
        excerpts: Sequence["Excerpt"],
        predictions: Sequence[np.ndarray],
        first: bool,
        clock: Clock,
    ) -> None:
        run, step, loggers = Path(trainer.default_root_dir), trainer.global_step, pictorial_loggers(trainer)
        if not excerpts:
            return
        pairs = zip(excerpts, predictions, strict=True)
        watched = [_watched(excerpt, predicted, clock) for excerpt, predicted in pairs]
        write_units(run, WatchedUnits(step, clock.seconds, watched))

        def draw() -> Drawn:
            drawn = {}
            for excerpt, units in zip(excerpts, watched, strict=True):
                picture = self._picture(excerpt, units, step, clock)
                drawn[f"{picture.title}: {picture.subtitle}" if picture.subtitle else picture.title] = utterance_figure(
                    picture, self._palettes
                )
            return drawn

        log_figures(loggers, "units/utterances", draw, logged_step(trainer))
        if first and self.audio:  # it stays the same
            sounds = {units.id: excerpt.waveform.numpy() for excerpt, units in zip(excerpts, watched, strict=True)}
            log_audio(loggers, "units/audio", sounds, logged_step(trainer))

    def _picture(self, excerpt: "Excerpt", units: WatchedUtterance, step: int, clock: Clock) -> UtteranceUnits:
        speaker = f" ({units.speaker})" if units.speaker and units.speaker not in units.id else ""
        return UtteranceUnits(
            title=f"{units.id}{speaker}, step {step}",
            subtitle=(units.text or "") if self.num_transcripts else "",
            duration=units.duration,
            spectrogram=log_mel(excerpt.waveform).numpy() if self.audio else None,
            phones=units.phones,
            labels=units.labels,
            predictions=units.predictions,
            mask=units.mask,
            clock=clock,
        )

    def _show_transcripts(self, trainer: Trainer, data: TranscribedData, rows: Sequence[dict[str, str]]) -> None:
        cuts = {cut.id: cut for cut in data.cuts["validation"]}
        transcripts = sorted(
            (_transcript(trainer.global_step, row, cuts[row["id"]]) for row in rows if row["id"] in cuts),
            key=lambda transcript: transcript.id,
        )
        write_transcripts(Path(trainer.default_root_dir), transcripts)
        loggers = pictorial_loggers(trainer)
        if not loggers or not self.num_transcripts:
            return
        shown = _spread(transcripts, self.num_transcripts)
        first = self._excerpts is None
        if self._excerpts is None:
            self._excerpts = self._choose_played([cuts[transcript.id] for transcript in shown])
        played = {excerpt.cut.id: excerpt.waveform.numpy().view(Sound) for excerpt in self._excerpts}
        table = []
        for transcript in shown:
            texts = transcript.reference, transcript.hypothesis
            row: dict[str, Any] = {  # cells of several kinds
                "id": transcript.id,
                "audio": played.get(transcript.id),
                "speaker": transcript.speaker,
                "seconds": round(transcript.duration, 2),
                "WER": round(transcript.wer, 3),
                "reference": transcript.reference,
                "hypothesis": transcript.hypothesis,
                "errors": Markup(errors_as_html(*texts), errors_as_text(*texts)),
            }
            table.append({name: value for name, value in row.items() if name != "audio" or played})
        step = logged_step(trainer)
        log_table(loggers, "val/transcripts", table, step)
        shown_on_page = ("id", "speaker", "seconds", "WER", "reference", "hypothesis")
        page = [{name: row[name] for name in shown_on_page} for row in table]
        if page:
            log_page(loggers, "val/errors", errors_page(page), step)
        if first and played:
            log_audio(loggers, "val/audio", {name: np.asarray(sound) for name, sound in played.items()}, step)

    def _choose_played(self, cuts: Sequence[Cut]) -> list["Excerpt"]:
        if not self.audio:
            return []
        short = [cut for cut in cuts if cut.duration <= MAX_PLAYED_SECONDS]
        empty = np.zeros((0, 0), np.int64), torch.zeros(0, dtype=torch.bool)
        return [Excerpt(cut, read_waveform(cut), *empty) for cut in fixed_cuts(short, self.num_utterances)]


class Excerpt(NamedTuple):
    """A validation utterance, or its beginning, with what stays the same at every validation.

    Args:
        cut: The utterance.
        waveform: (samples,), 16 kHz audio.
        labels: (streams, frames), K-means ids.
        mask: (frames,) bool, true where masked.
    """

    cut: Cut
    waveform: Tensor
    labels: np.ndarray
    mask: Tensor


def fixed_cuts(cuts: Sequence[Cut], number: int) -> list[Cut]:
    """Choose utterances of different lengths and speakers, the same whatever the order of the utterances.

    Args:
        cuts: Utterances; if some have phones, the others are left out.
        number: Number of utterances to choose.

    Returns:
        At most that number, from the shortest to the longest.
    """
    everything = sorted(cuts, key=lambda cut: (cut.num_samples, cut.id))
    ordered = [cut for cut in everything if phones_of(cut)] or everything
    chosen, speakers = set[int](), set[str]()
    for rank in range(min(number, len(ordered))):
        target = int((rank + 0.5) * len(ordered) / min(number, len(ordered)))
        nearest = sorted((place for place in range(len(ordered)) if place not in chosen), key=lambda p: abs(p - target))
        around = nearest[: max(len(ordered) // number, 1)]  # so that lengths stay different
        place = next((p for p in around if speaker_of(ordered[p]) not in speakers), nearest[0])
        chosen.add(place)
        speakers.add(speaker_of(ordered[place]))
    return [ordered[place] for place in sorted(chosen)]


def excerpt_of(cut: Cut, data: PretrainingData, labels: LabelStore, max_seconds: float) -> Excerpt:
    """Read the beginning of an utterance and its labels, and draw the mask, which depends on nothing but the cut."""
    clock = data.clock
    frames = min(num_frames(cut.num_samples, clock), max(num_frames(seconds_to_samples(max_seconds), clock), 2))
    generator = torch.Generator().manual_seed(zlib.crc32(cut.id.encode()))
    mask = span_mask([frames], data.mask_prob, data.mask_length, generator)[0]
    ids = labels[cut.id][:MAX_STREAMS, :frames].astype(np.int64)
    return Excerpt(cut, read_waveform(cut, 0, num_samples(frames, clock)), ids, mask)


def _predicted(trainer: Trainer, model: HubertPretraining, excerpt: Excerpt) -> np.ndarray:
    """Predict the clusters of an excerpt with its masked frames masked: (streams, frames)."""
    with _evaluating(model), torch.no_grad(), trainer.precision_plugin.forward_context():
        logits, _ = model(excerpt.waveform[None].to(model.device), excerpt.mask[None].to(model.device))
    best = [scores[0].argmax(dim=-1).cpu() for scores in logits[:MAX_STREAMS]]
    return torch.stack(best).numpy()


@contextmanager
def _evaluating(model: LightningModule) -> Iterator[None]:
    """Put a model into evaluation mode, without compiling it for other lengths, and restore the mode of each part."""
    compiled = getattr(model, "compiling", False)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module in training:
            module.training = True


def _watched(excerpt: Excerpt, predictions: np.ndarray, clock: Clock) -> WatchedUtterance:
    cut, duration = excerpt.cut, len(excerpt.waveform) / SAMPLE_RATE
    phones = [(symbol, start, min(start + length, duration)) for start, length, symbol in phones_of(cut)]
    text = " ".join(segment.text for segment in cut.supervisions if segment.text)
    whole = num_frames(cut.num_samples, clock) == len(excerpt.mask)
    return WatchedUtterance(
        **{**_place(cut), "duration": duration},
        text=text if text and whole else None,
        phones=[phone for phone in phones if phone[1] < phone[2]] or None,
        labels=excerpt.labels.tolist(),
        predictions=predictions.tolist(),
        mask=masked_spans(excerpt.mask.tolist()),
    )


def _transcript(step: int, row: dict[str, str], cut: Cut) -> WatchedTranscript:
    reference, hypothesis = row["reference"], row["hypothesis"]
    rate = score_utterance(Result(row["id"], reference, hypothesis)).words.rate
    place = _place(cut) | {"speaker": row["speaker"]}
    return WatchedTranscript(step=step, **place, reference=reference, hypothesis=hypothesis, wer=rate)


def _place(cut: Cut) -> dict[str, Any]:
    """The fields of `watched` that name an utterance and its audio."""
    return {**place_of(cut), "id": cut.id, "speaker": speaker_of(cut)}


def _rows_of_ranks(trainer: Trainer, model: CTCFinetuning) -> list[dict[str, str]]:
    """The rows of all ranks, each utterance once."""
    rows = [model.rows]
    if trainer.world_size > 1:
        rows = [[] for _ in range(trainer.world_size)]
        dist.all_gather_object(rows, model.rows)
    return [*{row["id"]: row for of_rank in rows for row in of_rank}.values()]


def _spread(items: Sequence[Any], number: int) -> list[Any]:
    """Choose a number of items, spread over all."""
    step = max(len(items) / max(number, 1), 1)
    return [items[int(rank * step)] for rank in range(min(number, len(items)))]


def _data_of(trainer: Trainer) -> Any:
    """Return the data module, None if there is none; Lightning sets it without declaring it."""
    return getattr(trainer, "datamodule", None)
