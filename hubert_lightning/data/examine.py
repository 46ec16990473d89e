"""Cuts of audio files: every file is decoded once to its end, and cut into pieces or refused with a reason."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from math import ceil
from pathlib import Path

import soundfile
from lhotse import Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning import console
from hubert_lightning.characters import has_words
from hubert_lightning.data.audio_folder import AudioFile
from hubert_lightning.data.probe import Sound, probe
from hubert_lightning.data.refusals import RefusedFile
from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE, WINDOW, seconds_to_samples
from hubert_lightning.interrupts import thread_pool


def examine(paths: Sequence[Path], progress: bool = True) -> tuple[list[Cut], list[RefusedFile], dict[str, Sound]]:
    """Make a cut of each audio file.

    Args:
        paths: Audio files.
        progress: Whether a progress bar is shown.

    Returns:
        Cuts, whose ids are their paths; the files that cannot be used; and the `Sound` of each usable path.
    """
    files = [AudioFile(path, str(path), None, None) for path in paths]
    sounds = decode_all(sorted(set(paths)), "checking audio" if progress else None)
    cuts, refusals = cuts_of(files, sounds, None)
    return cuts, refusals, {str(path): sound for path, sound in sounds.items() if isinstance(sound, Sound)}


def cut_in_memory(name: str, samples: Tensor) -> Cut:
    """Make a cut of audio in memory.

    Args:
        name: Id of the cut.
        samples: (samples,) float32, 16 kHz.

    Raises:
        UserError: There are too few samples for a frame.
    """
    if len(samples) < WINDOW:
        raise UserError(f"{len(samples)} samples at 16 kHz are too short: one frame takes {WINDOW}; leave it out")
    content = BytesIO()
    soundfile.write(content, samples.numpy(), SAMPLE_RATE, format="WAV", subtype="FLOAT")
    return Recording(
        id=name,
        sources=[AudioSource(type="memory", channels=[0], source=content.getvalue())],
        sampling_rate=SAMPLE_RATE,
        num_samples=len(samples),
        duration=len(samples) / SAMPLE_RATE,
    ).to_cut()


def decode_all(paths: list[Path], description: str | None = "checking audio") -> dict[Path, Sound | str]:
    """Decode each file to its end, several at once.

    Args:
        paths: Audio files.
        description: Label of the progress bar; no bar if None.

    Returns:
        For each path its `Sound`, or the reason why it cannot be used.
    """
    sizes = [os.path.getsize(path) if os.path.isfile(path) else 0 for path in paths]
    sounds: dict[Path, Sound | str] = {}
    hours = 0.0
    # Threads suffice: the decoders hold no interpreter lock while they read and decode.
    with console.progress(description, sum(sizes)) as advance, thread_pool() as pool:
        for path, size, sound in zip(paths, sizes, pool.map(probe, paths), strict=True):
            sounds[path] = sound
            if isinstance(sound, Sound):
                hours += sound.num_samples / sound.sampling_rate / 3600
            advance(size, f"{hours:.2f} h")
    return sounds


def cuts_of(
    files: Sequence[AudioFile], sounds: Mapping[Path, Sound | str], max_duration: float | None
) -> tuple[list[Cut], list[RefusedFile]]:
    """Make cuts of audio files.

    Args:
        files: Audio files with their ids, speakers and transcripts.
        sounds: Results of `decode_all`.
        max_duration: Longest cut in seconds; longer recordings are cut into equal pieces.

    Returns:
        Cuts by id, and the files that cannot be used.
    """
    cuts: list[Cut] = []
    refusals: list[RefusedFile] = []
    by_id: dict[str, AudioFile] = {}
    for file in sorted(files, key=lambda file: (file.id, file.path)):
        sound = sounds[file.path]
        if reason := file.refused or (sound if isinstance(sound, str) else _wordless(file.text)):
            refusals.append(RefusedFile(file.path, reason))
            continue
        assert isinstance(sound, Sound)
        recording = _recording(file, sound)
        if recording.num_samples < WINDOW:
            reason = f"too short: {recording.num_samples} samples at 16 kHz, and one frame takes {WINDOW}"
            refusals.append(RefusedFile(file.path, reason))
        elif file.id in by_id:
            refusals.append(RefusedFile(file.path, f"repeated: has the same id as {by_id[file.id].path}"))
        else:
            by_id[file.id] = file
            cuts += _pieces(recording, file, max_duration)
    return cuts, refusals


def _wordless(text: str | None) -> str | None:
    if not text or has_words(text):
        return None
    return f"its transcript, {text[:40]!r}, has no words: write down what is said, or remove the transcript"


def _recording(file: AudioFile, sound: Sound) -> Recording:
    path = os.path.abspath(file.path)
    return Recording(
        id=file.id,
        sources=[AudioSource(type="file", channels=list(range(sound.num_channels)), source=path)],
        sampling_rate=sound.sampling_rate,
        num_samples=sound.num_samples,
        duration=sound.num_samples / sound.sampling_rate,
    ).resample(SAMPLE_RATE)


def _pieces(recording: Recording, file: AudioFile, max_duration: float | None) -> list[Cut]:
    """One cut, or as few equal ones (but for one sample) as keep each within `max_duration`."""
    whole = recording.to_cut()
    longest = seconds_to_samples(max_duration) if max_duration else recording.num_samples
    count = ceil(recording.num_samples / longest)
    bounds = [k * recording.num_samples // count for k in range(count + 1)]
    pieces = []
    for k, (begin, end) in enumerate(pairwise(bounds)):
        piece_id = file.id if count == 1 else f"{file.id}-{k:03d}"
        text = file.text if count == 1 else None
        duration = (end - begin) / SAMPLE_RATE
        supervision = SupervisionSegment(
            id=piece_id,
            recording_id=recording.id,
            start=0.0,
            duration=duration,
            channel=whole.channel,
            text=text,
            speaker=file.speaker,
        )
        piece = replace(
            whole,
            id=piece_id,
            start=begin / SAMPLE_RATE,
            duration=duration,
            supervisions=[supervision] if text or file.speaker else [],
            custom={"bytes": file.path.stat().st_size},
        )
        pieces.append(piece)
    return pieces
