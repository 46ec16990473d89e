"""Speakers of words, from the turns of an RTTM file, which diarisation tools write."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hubert_lightning.asr.transcript_formats import Transcript, ctm_recording
from hubert_lightning.asr.word_times import Word
from hubert_lightning.errors import UserError
from hubert_lightning.untrusted.text_file import lines_of

NEAR = 0.5
"""Seconds from a turn within which a word outside all turns belongs to its speaker."""
WAY_OUT = "give the RTTM file of a diarisation: SPEAKER RECORDING 1 START DURATION <NA> <NA> NAME <NA> <NA>"


class SpeakerTurn(NamedTuple):
    """A time in which a speaker speaks.

    Attributes:
        start: Start in seconds.
        end: End in seconds.
        speaker: Name of the speaker.
    """

    start: float
    end: float
    speaker: str


SpeakerTurns = Mapping[str, Sequence[SpeakerTurn]]
"""Turns in the order of time, by the name of their recording."""


def read_rttm(path: Path) -> SpeakerTurns:
    """Read the turns of an RTTM file.

    Args:
        path: Lines of ten columns, of which the first is SPEAKER; other lines, such as comments, are left out.

    Raises:
        UserError: The file cannot be read, has a line with other columns, or has no turns.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; {WAY_OUT}")
    turns: dict[str, list[SpeakerTurn]] = {}
    for number, line in enumerate(lines_of(path), start=1):
        columns = line.split()
        if not columns or columns[0] != "SPEAKER":
            continue
        if len(columns) < 8:
            raise UserError(f"{path}, line {number}: {len(columns)} columns instead of ten; {WAY_OUT}")
        try:
            start, duration = float(columns[3]), float(columns[4])
        except ValueError:
            start = duration = math.nan
        if not (math.isfinite(start) and math.isfinite(duration) and duration >= 0):
            times = f"{columns[3][:20]!r} and {columns[4][:20]!r}"
            raise UserError(f"{path}, line {number}: start and duration are {times}, not seconds; {WAY_OUT}")
        turns.setdefault(columns[1], []).append(SpeakerTurn(start, start + duration, columns[7]))
    if not turns:
        raise UserError(f"{path}: no line begins with SPEAKER; {WAY_OUT}")
    return {recording: sorted(of_recording) for recording, of_recording in turns.items()}


def turns_of(turns: SpeakerTurns, recording: Path) -> Sequence[SpeakerTurn]:
    """Find the turns of a recording by its file name, with or without the suffix, or "_" for spaces; none if missing.

    Args:
        turns: Turns by recording.
        recording: Path of the recording.
    """
    names = (recording.stem, recording.name, ctm_recording(recording), str(recording))
    return next((turns[name] for name in names if name in turns), ())


def turns_by_id(
    speakers: Path | str | Sequence[SpeakerTurn] | None, paths: Mapping[str, Path | None]
) -> SpeakerTurns | None:
    """Find the turns of each recording.

    Args:
        speakers: RTTM file, or the turns of the only recording.
        paths: Path of each recording by its id; None for a waveform.

    Returns:
        Turns by the id of the recording; None without speakers.

    Raises:
        UserError: There are turns of other recordings only.
    """
    if speakers is None:
        return None
    if not isinstance(speakers, (str, Path)):
        if len(paths) != 1:
            raise UserError(f"one list of turns for {len(paths)} recordings; give an RTTM file, or one recording")
        return dict.fromkeys(paths, sorted(speakers))
    turns = read_rttm(Path(speakers))
    turns_of_recordings = {name: turns_of(turns, path) for name, path in paths.items() if path is not None}
    if paths and not any(turns_of_recordings.values()):
        names = ", ".join(list(turns)[:3]) + (", …" if len(turns) > 3 else "")
        raise UserError(
            f"{speakers}: has turns of {names}, and none of the recordings is called so; give the RTTM file of these "
            "recordings"
        )
    return turns_of_recordings


def with_speakers(transcript: Transcript, turns: Sequence[SpeakerTurn]) -> Transcript:
    """Give each word the speaker whose turns cover most of it.

    A word outside all turns gets the speaker of the nearest turn, if this is at most half a second away.

    Args:
        transcript: Transcript with words.
        turns: Turns of the recording.
    """
    words = tuple(word._replace(speaker=_speaker_of(word, turns)) for word in transcript.words)
    return Transcript(transcript.file, transcript.duration, transcript.text, words, transcript.remarks)


def _speaker_of(word: Word, turns: Sequence[SpeakerTurn]) -> str | None:
    covered: dict[str, float] = {}
    ends: dict[str, float] = {}
    for turn in turns:  # turns of one speaker may overlap
        start = max(turn.start, word.start, ends.get(turn.speaker, 0.0))
        end = min(turn.end, word.end)
        if end > start:
            covered[turn.speaker] = covered.get(turn.speaker, 0.0) + end - start
            ends[turn.speaker] = end
    if covered:
        return max(covered, key=lambda speaker: covered[speaker])
    distance, nearest = min(
        ((max(turn.start - word.end, word.start - turn.end), turn.speaker) for turn in turns), default=(math.inf, "")
    )
    return nearest if distance <= NEAR else None
