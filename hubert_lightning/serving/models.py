"""The models of a service: a fine-tuned one for words, an encoder and its K-means for units."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.asr.ctc_model import CTCModel, load_ctc, log_probabilities
from hubert_lightning.asr.decoder_settings import read_settings
from hubert_lightning.asr.decoding import BeamSearch
from hubert_lightning.data.resources import usable_cores
from hubert_lightning.errors import UserError
from hubert_lightning.features.extract import frames_at_once
from hubert_lightning.features.recordings import autocast
from hubert_lightning.frames import HOP, SAMPLE_RATE
from hubert_lightning.model.devices import choose_device
from hubert_lightning.pretrained.load import KMEANS_FILE, read_weights
from hubert_lightning.units.label_recipe import is_mfcc
from hubert_lightning.units.unit_extractor import Units

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Recogniser:
    """A fine-tuned model and its beam search.

    Args:
        model: Fine-tuned model, on the device that computes.
        search: Beam search; greedy decoding if None.
        precision: Numeric precision of the encoder.
        batch_duration: Seconds of audio that are encoded at once; chosen for the device if None.
    """

    model: CTCModel
    search: BeamSearch | None
    precision: Precision
    batch_duration: float | None

    def encode(self, cuts: Sequence[Cut]) -> list[Tensor]:
        """Compute the log-probabilities of recordings as `hubert transcribe` does: (frames, tokens) each."""
        [rows] = log_probabilities(
            self.model,
            [cuts],
            batch_duration=self.batch_duration,
            progress="transcribing",
            precision=autocast(self.model.head.weight.device, self.precision),
        )
        return rows


@dataclass(frozen=True)
class Models:
    """Models of a service.

    Args:
        recogniser: Fine-tuned model; None if the service gives no words.
        units: Function from audio to units; None if the service gives none.
        batch_duration: Seconds of audio that are encoded at once; chosen for the device if None.
        device: Device that computes.
    """

    recogniser: Recogniser | None
    units: Units | None
    batch_duration: float | None
    device: torch.device

    @property
    def encoders(self) -> dict[str, Callable[[Sequence[Cut]], Sequence[Tensor]]]:
        """Functions from recordings to their rows, by the endpoint that needs them."""
        functions: dict[str, Callable[[Sequence[Cut]], Sequence[Tensor]]] = {}
        if self.recogniser is not None:
            functions["transcribe"] = self.recogniser.encode
        if self.units is not None:
            functions["units"] = partial(_units_of, self.units, self.batch_duration)
        return functions

    @property
    def seconds_at_once(self) -> float:
        """Seconds of waiting recordings that are computed together."""
        if self.batch_duration is not None:
            return self.batch_duration
        return frames_at_once(self.device) * HOP / SAMPLE_RATE

    def close(self) -> None:
        """End the processes of the beam search."""
        if self.recogniser is not None and self.recogniser.search is not None:
            self.recogniser.search.close()


def _units_of(units: Units, batch_duration: float | None, cuts: Sequence[Cut]) -> list[Tensor]:
    [rows] = units.of_cuts([cuts], batch_duration)
    return rows


def load_models(
    model: Path,
    kmeans: Path | None = None,
    layer: int | None = None,
    units_model: Path | None = None,
    decoder: Path | None = None,
    batch_duration: float | None = None,
    precision: Precision = "float32",
    window: float | None = None,
) -> Models:
    """Load what a service can compute: words if the model is fine-tuned, units if there is a K-means.

    Args:
        model: Model in any format.
        kmeans: K-means of the units.
        layer: Layer of the units.
        units_model: Model of the units, if it is another one.
        decoder: Settings of a beam search.
        batch_duration: Seconds of audio that are encoded at once.
        precision: Numeric precision of the encoders.
        window: Seconds of a recording that are encoded at once for units.

    Raises:
        UserError: A file cannot be opened, the files do not belong together, or there is nothing to compute.
    """
    source = model if units_model is None else units_model
    gives_units = kmeans is not None or units_model is not None or (Path(source) / KMEANS_FILE).is_file()
    gives_words = not is_mfcc(model) and read_weights(model).head is not None
    if not gives_words and not gives_units:
        raise UserError(
            f"{model} has no CTC head, so it cannot transcribe, and there is no K-means for units; give a fine-tuned "
            "model, or --kmeans"
        )
    if decoder is not None and not gives_words:
        raise UserError(f"{model} has no CTC head, so no beam search can be made; leave --decoder out")
    if layer is not None and not gives_units:
        raise UserError("layer is an option for units, which need a K-means; name one with --kmeans")
    device = choose_device()
    recogniser = None
    if gives_words:
        loaded = load_ctc(model)
        search = None if decoder is None else _search_in_processes(decoder, loaded)
        recogniser = Recogniser(loaded.to(device), search, precision, batch_duration)
    units = None
    if gives_units:
        windows = {} if window is None else {"window": window}
        units = Units.from_pretrained(source, kmeans, layer, device, precision, **windows)
    return Models(recogniser, units, batch_duration, device)


def _search_in_processes(decoder: Path, model: CTCModel) -> BeamSearch:
    """Start the processes of a beam search while this process has one thread; the search would hold the interpreter."""
    settings = read_settings(decoder)
    settings = replace(settings, num_workers=max(settings.num_workers or usable_cores(), 2))
    search = BeamSearch(settings, model.vocabulary, clock=model.clock)
    list(search.search([torch.zeros(1, len(model.vocabulary)).log_softmax(dim=-1)]))
    return search
