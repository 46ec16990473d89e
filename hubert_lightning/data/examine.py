"""Cuts of audio files: every file is decoded once to its end, and cut into pieces or refused with a reason."""

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from math import ceil
from pathlib import Path

import soundfile
from lhotse import Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.cut import Cut, MonoCut, MultiCut
from torch import Tensor

from hubert_lightning.characters import has_words
from hubert_lightning.data.audio_folder import AudioFile, Segment
from hubert_lightning.data.languages import CORPUS
from hubert_lightning.data.probe import Sound, probe
from hubert_lightning.data.refusals import RefusedFile
from hubert_lightning.errors import UserError
from hubert_lightning.files import printable
from hubert_lightning.frames import SAMPLE_RATE, WINDOW, seconds_to_samples
from hubert_lightning.interrupts import thread_pool
from hubert_lightning.progress_bar import progress

MAX_OVERSHOOT = 0.5
"""Seconds by which a segment may end after its recording and is cut off there, as in Kaldi's extract-segments."""


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
    with progress(description, sum(sizes)) as advance, thread_pool() as pool:
        for path, size, sound in zip(paths, sizes, pool.map(probe, paths), strict=True):
            sounds[path] = sound
            if isinstance(sound, Sound):
                hours += sound.num_samples / sound.sampling_rate / 3600
            advance(size, f"{hours:.2f} h")
    return sounds


def cuts_of(
    files: Sequence[AudioFile],
    sounds: Mapping[Path, Sound | str],
    max_duration: float | None,
    transcribed_whole: bool = False,
) -> tuple[list[Cut], list[RefusedFile]]:
    """Make cuts of audio files.

    Args:
        files: Audio files with their ids, speakers, transcripts and segments.
        sounds: Results of `decode_all`.
        max_duration: Longest cut in seconds; longer recordings are cut into equal pieces.
        transcribed_whole: Whether utterances with a transcript stay whole, however long they are.

    Returns:
        Cuts by id, and the files that cannot be used.
    """
    cuts: list[Cut] = []
    refusals: list[RefusedFile] = []
    by_id: dict[str, AudioFile] = {}
    for file in sorted(files, key=lambda file: (file.id, file.path)):
        sound = sounds[file.path]
        if reason := file.refused or (sound if isinstance(sound, str) else _wordless(file.text)):
            refusals.append(RefusedFile(file.path, _of_segment(file, reason)))
            continue
        assert isinstance(sound, Sound)
        recording = _recording(file, sound)
        bounds = _bounds(file.segment, recording, sound)
        if isinstance(bounds, str):
            refusals.append(RefusedFile(file.path, _of_segment(file, bounds)))
        elif file.id in by_id:
            reason = f"repeated: has the same id as {by_id[file.id].path}"
            refusals.append(RefusedFile(file.path, _of_segment(file, reason)))
        else:
            by_id[file.id] = file
            longest = None if file.text and transcribed_whole else max_duration
            cuts += _pieces(recording, file, bounds, longest)
    return cuts, refusals


def _of_segment(file: AudioFile, reason: str) -> str:
    """The reason why a file is refused, with the id of the utterance if the file may have several."""
    return reason if file.segment is None else f"{printable(Path(file.id))[:200]}: {reason}"


def _wordless(text: str | None) -> str | None:
    if not text or has_words(text):
        return None
    return f"its transcript, {text[:40]!r}, has no words: write down what is said, or remove the transcript"


def _recording(file: AudioFile, sound: Sound) -> Recording:
    path = os.path.abspath(file.path)
    return Recording(
        id=file.segment.recording if file.segment else file.id,
        sources=[AudioSource(type="file", channels=list(range(sound.num_channels)), source=path)],
        sampling_rate=sound.sampling_rate,
        num_samples=sound.num_samples,
        duration=sound.num_samples / sound.sampling_rate,
    ).resample(SAMPLE_RATE)


def _bounds(segment: Segment | None, recording: Recording, sound: Sound) -> tuple[int, int] | str:
    """First and last sample of an utterance at 16 kHz, or the reason why it cannot be used."""
    begin, end = 0, recording.num_samples
    if segment is not None:
        seconds = f"its recording has {end / SAMPLE_RATE:.2f} s"
        if missing := sorted(set(segment.channels or ()) - set(range(sound.num_channels))):
            return f"no channel {missing[0]}, counted from 0: its recording has {sound.num_channels}; correct its row"
        if not 0 <= segment.start * SAMPLE_RATE < end:
            return f"it starts at {segment.start:.2f} s, and {seconds}; correct its row"
        begin = seconds_to_samples(segment.start)
        if segment.duration is not None:
            last = begin + seconds_to_samples(segment.duration)
            if last - end > seconds_to_samples(MAX_OVERSHOOT):
                return f"it ends at {last / SAMPLE_RATE:.2f} s, and {seconds}; correct its row"
            end = min(last, end)
    if end - begin < WINDOW:
        return f"too short: {end - begin} samples at 16 kHz, and one frame takes {WINDOW}"
    return begin, end


def _pieces(recording: Recording, file: AudioFile, whole: tuple[int, int], max_duration: float | None) -> list[Cut]:
    """One cut, or as few equal ones (but for one sample) as keep each within `max_duration`."""
    first, length = whole[0], whole[1] - whole[0]
    channels = (file.segment and file.segment.channels) or tuple(range(recording.num_channels))
    longest = seconds_to_samples(max_duration) if max_duration else length
    count = ceil(length / longest)
    bounds = [first + k * length // count for k in range(count + 1)]
    pieces: list[Cut] = []
    for k, (begin, end) in enumerate(pairwise(bounds)):
        piece_id = file.id if count == 1 else f"{file.id}-{k:03d}"
        text = file.text if count == 1 else None
        channel: int | list[int] = channels[0] if len(channels) == 1 else list(channels)
        supervision = SupervisionSegment(
            id=piece_id,
            recording_id=recording.id,
            start=0.0,
            duration=(end - begin) / SAMPLE_RATE,
            channel=channel,
            text=text,
            speaker=file.speaker,
            language=file.language,
        )
        piece = (MonoCut if len(channels) == 1 else MultiCut)(
            id=piece_id,
            start=begin / SAMPLE_RATE,
            duration=(end - begin) / SAMPLE_RATE,
            channel=channel,
            supervisions=[supervision] if text or file.speaker or file.language else [],
            recording=recording,
            custom={"bytes": file.path.stat().st_size} | ({CORPUS: file.corpus} if file.corpus else {}),
        )
        pieces.append(piece)
    return pieces
