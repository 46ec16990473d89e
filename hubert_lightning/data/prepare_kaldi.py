"""Manifests of Kaldi's data directories.

lhotse's `load_kaldi_data_dir` runs the commands of a wav.scp and takes every recording for one channel, so the tables
are read here; tests compare the result with lhotse's.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hubert_lightning.data.audio_folder import AudioFile, Segment
from hubert_lightning.data.languages import language_named
from hubert_lightning.data.prepare import prepare
from hubert_lightning.data.sources import check_pieces, named_once
from hubert_lightning.errors import UserError
from hubert_lightning.untrusted.text_file import lines_of

Table = dict[str, str]
"""Rest of each line of a table by its first word."""


def prepare_kaldi(
    folders: Sequence[Path],
    out: Path,
    audio: Path | None = None,
    max_duration: float = 30.0,
    heldout: float = 0.0,
    spell_numbers: str | None = None,
    language: str | None = None,
    corpus_name: str | None = None,
) -> list[Path]:
    """Make a manifest of each Kaldi data directory: `OUT/<name of the directory>.jsonl.gz`.

    A directory has a `wav.scp`, and, if there are any, `segments`, `text`, `utt2spk`, `utt2lang` and
    `reco2file_and_channel`. Paths of audio files may have any format. Commands in wav.scp are not run.

    Args:
        folders: Data directories, such as data/train and data/dev.
        out: Folder of the manifests.
        audio: Folder that relative paths start from; default: the working directory, the data directory or the folder
            two above it, whichever has the file.
        max_duration: Longest cut in seconds of a recording without transcript, which is cut into equal pieces;
            transcribed utterances stay whole.
        heldout: Share of the audio of each manifest that goes into another one, <name>-dev, by whole recordings, or by
            whole speakers where ten or more are known.
        spell_numbers: Language of the transcripts, such as en or pt_BR, in which numbers are written as words; default:
            numbers stay as they are.
        language: Language of the utterances that utt2lang does not list, such as en.
        corpus_name: Name of the corpus, by which it can be balanced and scored beside others.

    Returns:
        Paths of the manifests.
    """
    check_pieces(max_duration, heldout)
    files_of = {name: _files(folder, audio) for name, folder in named_once(folders).items()}
    return prepare(
        files_of, out, max_duration, number_language=spell_numbers, transcribed_whole=True, heldout=heldout,
        language=language, corpus=corpus_name,
    )  # fmt: skip


def _files(folder: Path, audio: Path | None) -> list[AudioFile]:
    if not (folder / "wav.scp").is_file():
        raise UserError(
            f"{folder}: no wav.scp in it; give a Kaldi data directory, or use `hubert prepare folder` for audio files"
        )
    recordings = {recording: _located(path, folder, audio) for recording, path in _audio_of(folder / "wav.scp").items()}
    segments = [*_segments(folder, recordings)]
    texts = _table(folder / "text", may_be_empty=True) if (folder / "text").is_file() else None
    speakers = _table(folder / "utt2spk") if (folder / "utt2spk").is_file() else {}
    languages = _table(folder / "utt2lang") if (folder / "utt2lang").is_file() else {}
    files = []
    for file in segments:
        text = None if texts is None else " ".join(texts.get(file.id, "").split())
        refused = file.refused or (None if text is None or text else f"no words for it in {folder / 'text'}")
        spoken = language_named(languages.get(file.id))
        files.append(file._replace(speaker=speakers.get(file.id), text=text, refused=refused, language=spoken))
    return files


def _audio_of(scp: Path) -> Table:
    """Paths of the recordings in a wav.scp.

    Raises:
        UserError: It has commands or archives, or no lines.
    """
    recordings = {recording: rest.strip() for recording, rest in _table(scp).items()}
    if commands := [(recording, path) for recording, path in recordings.items() if path.endswith("|")]:
        recording, command = commands[0]
        raise UserError(
            f"{scp}: {len(commands)} of its {len(recordings)} recordings are commands, such as {recording} "
            f"({command[:80]}), which are not run; put the path of the audio file, of any format, in place of each"
        )
    archives = [path for path in recordings.values() if ".ark:" in path]
    if archives:
        raise UserError(
            f"{scp}: recordings in archives of Kaldi, such as {archives[0][:80]}, are not read; write them to files "
            "with Kaldi's `wav-copy`, and list these"
        )
    if not recordings:
        raise UserError(f"{scp}: no recordings in it; list them, each with its id and path")
    return recordings


def _located(path: str, folder: Path, audio: Path | None) -> Path:
    """Path of a recording; a relative one of a recipe starts two folders above its data directory."""
    starts = [audio] if audio else [Path(), folder, folder.resolve().parent.parent]
    return next((start / path for start in starts if os.path.isfile(start / path)), starts[0] / path)


def _segments(folder: Path, recordings: Mapping[str, Path]) -> Iterator[AudioFile]:
    """The utterances of a data directory, without their speakers and transcripts."""
    table = folder / "segments"
    channels = _channels(folder, recordings)
    if not table.is_file():
        for recording, path in recordings.items():
            segment = Segment(recording, channels=channels[recording]) if recording in channels else None
            yield AudioFile(path, recording, None, None, segment=segment)
        return
    used = set()
    for utterance, rest in _table(table).items():
        recording, *numbers = rest.split()
        used.add(recording)
        if recording not in recordings:
            reason = f"its recording, {recording[:200]}, is not in {folder / 'wav.scp'}"
            yield AudioFile(table, utterance, None, None, reason, Segment(recording))
            continue
        segment = _segment(recording, numbers, channels.get(recording))
        refused = None if segment else f"its line in {table} is not: utterance, recording, start, end; correct it"
        yield AudioFile(recordings[recording], utterance, None, None, refused, segment or Segment(recording))
    for recording in recordings.keys() - used:
        yield AudioFile(recordings[recording], recording, None, None, f"no segments of it in {table}")


def _segment(recording: str, numbers: Sequence[str], channels: tuple[int, ...] | None) -> Segment | None:
    """The segment that start, end and perhaps channel state, or None."""
    try:
        start, end = (float(number) for number in numbers[:2])
        channels = (int(numbers[2]),) if len(numbers) > 2 else channels
    except ValueError:
        return None
    if len(numbers) > 3 or not math.isfinite(start) or not math.isfinite(end):
        return None
    # An end of -1 is that of the recording, as in Kaldi's extract-segments
    return Segment(recording, start, None if end == -1 else end - start, channels)


def _channels(folder: Path, recordings: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """Channels of the recordings that share their file with others, A and B of telephone calls."""
    table = folder / "reco2file_and_channel"
    if not table.is_file():
        return {}
    shared = Counter(recordings.values())
    letters = {recording: rest.split()[-1] for recording, rest in _table(table).items()}
    return {
        recording: ("AB".index(letter),)
        for recording, letter in letters.items()
        if letter in ("A", "B") and shared[recordings.get(recording, Path())] > 1
    }


def _table(path: Path, may_be_empty: bool = False) -> Table:
    """Read a table of Kaldi.

    Args:
        path: File of lines that begin with an id.
        may_be_empty: Whether a line may have nothing but its id.

    Raises:
        UserError: The file cannot be read, or a line has no value or repeats an id.
    """
    rows: Table = {}
    for number, line in enumerate(lines_of(path), start=1):
        words = line.strip().split(maxsplit=1)
        if not words:
            continue
        if len(words) < 2 and not may_be_empty:
            raise UserError(f"{path}: line {number} has nothing after {words[0][:80]!r}; complete it or remove it")
        if words[0] in rows:
            raise UserError(f"{path}: line {number} has the id {words[0][:80]!r} of an earlier line; remove one")
        rows[words[0]] = words[1] if len(words) > 1 else ""
    return rows
