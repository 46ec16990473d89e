"""Other speech, noise and rooms in the audio of a batch, as in WavLM; labels and transcripts stay those of the speech.

A generator of its own, seeded by the plan of the batch, draws everything. So crops and masks are the same with mixing
and without, and a batch is the same on any rank, from any worker and after a restart. Sums and Fourier transforms are
numpy's: torch rounds them differently with another number of threads, and a worker has one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.corpora import Corpora, read_corpora
from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.training.provenance import ordered_fingerprint

SILENCE = 1e-10
"""Mean square below which audio is silent: -100 dB, the rounding of 16-bit samples."""
MAX_RESPONSE = 4 * SAMPLE_RATE
"""Samples of an impulse response that are read; later echoes are left out."""
PROBE = 30 * SAMPLE_RATE
"""Samples of a recording that are read at once to find out whether it is silent."""
SEED = 0x5DEECE66D
"""What a plan's seed is combined with, so that mixing draws other numbers than crops and masks."""


@dataclass(frozen=True)
class Mixing:
    """Speech, noise and rooms that are added to training utterances; labels and transcripts stay those of the speech.

    WavLM (Chen et al. 2022, algorithm 1) has probability 0.2 and, for Base+ and Large, noises. Nothing is mixed by
    default.

    Args:
        probability: Probability that speech or noise is added to an utterance; 0.2 in WavLM.
        noise_share: Share of noises among what is added, if `noise` is given; all else is speech.
        max_overlap: Largest part of an utterance that other speech or a noise covers.
        speech_ratio: Lowest and highest energy of an utterance over that of the other speech, in dB.
        noise_ratio: Lowest and highest energy of an utterance over that of a noise, in dB.
        noise: Manifests of noises, written by `hubert prepare folder`; short noises are repeated.
        rooms: Manifests of impulse responses, each of one channel, written by `hubert prepare folder`.
        room_probability: Probability that an utterance gets the reverberation of a room, if `rooms` is given.
    """

    probability: float = 0.0
    noise_share: float = 0.1
    max_overlap: float = 0.5
    speech_ratio: tuple[float, float] = (-5.0, 5.0)
    noise_ratio: tuple[float, float] = (-5.0, 20.0)
    noise: list[Path] | None = None
    rooms: list[Path] | None = None
    room_probability: float = 0.2

    def __post_init__(self) -> None:
        for name in ("probability", "noise_share", "room_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.mixing.{name} is {getattr(self, name)}; it is a probability from 0 to 1")
        if not 0 < self.max_overlap <= 1:
            raise UserError(
                f"data.mixing.max_overlap is {self.max_overlap}; give a part of an utterance, above 0 and at most 1"
            )
        for name in ("speech_ratio", "noise_ratio"):
            low, high = getattr(self, name)
            if not -100 <= low <= high <= 100:
                raise UserError(
                    f"data.mixing.{name} is from {low} to {high}; give the lower ratio first, both in dB from -100 to "
                    "100"
                )
        for name, needed in (("noise", "probability"), ("noise", "noise_share"), ("rooms", "room_probability")):
            if getattr(self, name) == []:
                raise UserError(f"data.mixing.{name} names no manifest; name one, or leave it out")
            if getattr(self, name) and not getattr(self, needed):
                raise UserError(
                    f"data.mixing.{name} is given, and data.mixing.{needed} is 0, so it is not used; set both or none"
                )
        for name, needed in (("noise_share", "noise"), ("room_probability", "rooms")):
            value, default = getattr(self, name), getattr(Mixing, name)
            if value not in (0, default) and not getattr(self, needed):
                raise UserError(
                    f"data.mixing.{name} is {value}, and data.mixing.{needed} names no manifest, so it is not used; "
                    "name one, or leave it out"
                )

    @property
    def is_active(self) -> bool:
        """Whether utterances are changed at all."""
        return self.probability > 0 or (self.rooms is not None and self.room_probability > 0)


class Mixer:
    """What changes the rows of a batch.

    Other speech comes from another row of the batch, so nothing more is read; a batch of one row reads another
    utterance of the corpus. Of a noise, as much is read as a row is long.

    Args:
        mixing: Probabilities and energy ratios.
        cuts: Training utterances.
        noises: Recordings of noises.
        rooms: Impulse responses.

    Raises:
        UserError: The corpus has a single utterance, and no noise to add to it.
    """

    def __init__(
        self, mixing: Mixing, cuts: Sequence[Cut], noises: Sequence[Cut] = (), rooms: Sequence[Cut] = ()
    ) -> None:
        self.mixing, self.cuts, self.noises, self.rooms = mixing, cuts, noises, rooms
        self.noise_share = mixing.noise_share if len(noises) else 0.0
        if mixing.probability > 0 and self.noise_share < 1 and len(cuts) < 2:
            raise UserError(
                f"{cuts[0].id}: the only training utterance, so data.mixing has no other speech to add; give more "
                "utterances, or noise with a noise_share of 1"
            )

    def mixed(self, waveforms: Sequence[Tensor], indices: Sequence[int], seed: int) -> list[Tensor]:
        """Add speech, noise and rooms to some rows of a batch.

        Args:
            waveforms: Rows before padding, (samples,) each; they are not changed.
            indices: Index of each row's cut.
            seed: Seed of the batch.

        Returns:
            Rows of the same lengths.
        """
        rng = torch.Generator().manual_seed(seed ^ SEED)
        return [self._mixed_row(row, waveforms, indices, rng) for row in range(len(waveforms))]

    def _mixed_row(self, row: int, waveforms: Sequence[Tensor], indices: Sequence[int], rng: torch.Generator) -> Tensor:
        mixing, waveform = self.mixing, waveforms[row]
        if len(self.rooms) and _uniform(rng) < mixing.room_probability:
            room = self.rooms[_below(len(self.rooms), rng)]
            response = read_waveform(room, 0, min(room.num_samples, MAX_RESPONSE))
            waveform = reverberated(waveform, response)
        if _uniform(rng) >= mixing.probability:
            return waveform
        if _uniform(rng) < self.noise_share:
            added = self._segment(self.noises[_below(len(self.noises), rng)], len(waveform), rng)
            low, high = mixing.noise_ratio
        else:
            added = self._other_speech(row, waveforms, indices, rng)
            low, high = mixing.speech_ratio
        ratio = low + (high - low) * _uniform(rng)
        length = min(1 + _below(max(int(mixing.max_overlap * len(waveform)), 1), rng), len(added))
        start, first = _below(len(waveform) - length + 1, rng), _below(len(added) - length + 1, rng)
        return overlapped(waveform, added, ratio, start, first, length)

    def _other_speech(
        self, row: int, waveforms: Sequence[Tensor], indices: Sequence[int], rng: torch.Generator
    ) -> Tensor:
        """Choose another row; in a batch of a single row, read another utterance of the corpus."""
        if len(waveforms) > 1:
            return waveforms[(row + 1 + _below(len(waveforms) - 1, rng)) % len(waveforms)]
        other = (indices[row] + 1 + _below(len(self.cuts) - 1, rng)) % len(self.cuts)
        return self._segment(self.cuts[other], len(waveforms[row]), rng)

    def _segment(self, cut: Cut, samples: int, rng: torch.Generator) -> Tensor:
        """Read a random segment of a recording, or all of it, repeated, if it is shorter."""
        first = _below(max(cut.num_samples - samples, 0) + 1, rng)
        segment = read_waveform(cut, first, min(samples, cut.num_samples))
        return segment if len(segment) == samples else segment.repeat(-(-samples // len(segment)))[:samples]


class MixedAudio:
    """The recordings that a data module mixes into its training audio.

    Args:
        mixing: Probabilities, energy ratios and manifests.
    """

    def __init__(self, mixing: Mixing) -> None:
        self.mixing = mixing
        self.noises = self.rooms = Corpora()

    def read(self) -> None:
        """Read the manifests of noises and rooms, once.

        Raises:
            UserError: A manifest is missing or empty, its audio is missing, or all of it is silent.
        """
        if not len(self.noises) and not len(self.rooms):
            self.noises = read_recordings(self.mixing.noise, "data.mixing.noise")
            self.rooms = read_recordings(self.mixing.rooms, "data.mixing.rooms")

    def mixer(self, cuts: Sequence[Cut]) -> Mixer | None:
        """Return what changes the batches of these utterances; None if nothing does.

        Raises:
            UserError: There is a single utterance, and no noise to add to it.
        """
        return Mixer(self.mixing, cuts, self.noises, self.rooms) if self.mixing.is_active else None

    def record(self) -> dict[str, Any] | None:
        """Describe the mixing for the loggers; None if nothing is mixed."""
        return asdict(self.mixing) if self.mixing.is_active else None

    def state(self) -> dict[str, dict[str, str]]:
        """Return the fingerprints of the recordings for a checkpoint; empty if nothing is mixed."""
        return {"mixed": self._fingerprints} if self.mixing.is_active else {}

    def check_same(self, state: Mapping[str, Any], checkpoint: str) -> None:
        """Refuse to resume with other noises or rooms.

        Args:
            state: State of the data in the checkpoint.
            checkpoint: Path of the checkpoint.

        Raises:
            UserError: The recordings are not those of the checkpoint.
        """
        if self.mixing.is_active and state.get("mixed", self._fingerprints) != self._fingerprints:
            raise UserError(
                f"the noises or rooms of data.mixing are not those that {checkpoint} was trained with; restore their "
                "manifests, or start another run with another --output"
            )

    @property
    def _fingerprints(self) -> dict[str, str]:
        return {"noise": ordered_fingerprint(self.noises), "rooms": ordered_fingerprint(self.rooms)}


def overlapped(waveform: Tensor, added: Tensor, ratio: float, start: int, first: int, length: int) -> Tensor:
    """Add a segment of one signal to another, at a ratio of the energies of both whole signals (WavLM, algorithm 1).

    Args:
        waveform: (samples,).
        added: (samples,), the signal that a segment is taken of.
        ratio: Energy of `waveform` over that of `added`, in dB.
        start: First sample of `waveform` that is changed.
        first: First sample of the segment in `added`.
        length: Samples of the segment.

    Returns:
        (samples,); a copy of `waveform` if one of the two is silent.
    """
    energy, added_energy = power(waveform), power(added)
    mixture = waveform.clone()
    if energy >= SILENCE and added_energy >= SILENCE:
        scale = (energy / added_energy / 10 ** (ratio / 10)) ** 0.5
        mixture[start : start + length] += scale * added[first : first + length]
    return mixture


def reverberated(waveform: Tensor, response: Tensor) -> Tensor:
    """Convolve speech with the impulse response of a room; the energy stays, and each sample its place.

    The largest sample of the response is its direct path, whose delay is taken back, so that labels stay on their
    frames.

    Args:
        waveform: (samples,).
        response: (response samples,).

    Returns:
        (samples,); the waveform itself if the response is silent.
    """
    size = 1 << (len(waveform) + len(response) - 2).bit_length()
    direct = int(response.abs().argmax())
    spectrum = np.fft.rfft(waveform.double().numpy(), size) * np.fft.rfft(response.double().numpy(), size)
    convolved = torch.from_numpy(np.fft.irfft(spectrum, size)[direct : direct + len(waveform)])
    energy = power(convolved)
    return (convolved * (power(waveform) / energy) ** 0.5).type_as(waveform) if energy > 0 else waveform


def power(waveform: Tensor) -> float:
    """Mean square of a signal, (samples,)."""
    return float(np.square(waveform.double().numpy()).mean())


def read_recordings(paths: Sequence[Path] | None, option: str) -> Corpora:
    """Read the manifests of noises or impulse responses, and check that they can be heard.

    Args:
        paths: Manifests; None reads nothing.
        option: Name of the option that names them.

    Raises:
        UserError: A manifest is missing or empty, its audio is missing, or all of it is silent.
    """
    if not paths:
        return Corpora()
    corpora = read_corpora(paths)
    for path, cuts in zip(paths, corpora.parts, strict=True):
        if not any(_is_audible(cut) for cut in cuts):  # stops at the first recording that is not silent
            raise UserError(
                f"{path}: all its recordings are silent; give other recordings in {option}, or leave it out"
            )
    return corpora


def _is_audible(cut: Cut) -> bool:
    starts = range(0, cut.num_samples, PROBE)
    return any(power(read_waveform(cut, start, min(PROBE, cut.num_samples - start))) >= SILENCE for start in starts)


def _uniform(rng: torch.Generator) -> float:
    return float(torch.rand((), generator=rng, dtype=torch.float64))


def _below(end: int, rng: torch.Generator) -> int:
    return int(torch.randint(end, (), generator=rng))
