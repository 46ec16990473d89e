"""Manifests of NeMo's manifests."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hubert_lightning.characters import has_words
from hubert_lightning.data.audio_folder import AudioFile, Segment
from hubert_lightning.data.cut_rows import MAX_SECONDS, rows_of
from hubert_lightning.data.languages import language_named
from hubert_lightning.data.prepare import prepare
from hubert_lightning.data.sources import check_pieces, named_once
from hubert_lightning.errors import UserError
from hubert_lightning.untrusted.json_file import shown

PATH_KEYS = ("audio_filepath", "audio_filename")
"""Keys of the path in a row, as NeMo's collections accept them."""
LANGUAGE_KEYS = ("lang", "source_lang", "language")
"""Keys of the language in a row, of recognition and of Canary's manifests among them."""
WORDLESS = "no words in its row, and other rows have some: write them down, or remove the row"


def prepare_nemo(
    tables: Sequence[Path],
    out: Path,
    audio: Path | None = None,
    max_duration: float = 30.0,
    heldout: float = 0.0,
    spell_numbers: str | None = None,
    language: str | None = None,
    corpus_name: str | None = None,
) -> list[Path]:
    """Make a manifest of each manifest of NeMo: `OUT/<name of the file>.jsonl.gz`.

    A row is a JSON object with `audio_filepath`, and, if there are any, `offset` and `duration` in seconds, `text`,
    `speaker` and `lang`.

    Args:
        tables: Manifests of NeMo, such as train_manifest.json.
        out: Folder of the manifests.
        audio: Folder that relative paths start from; default: the folder of the manifest.
        max_duration: Longest cut in seconds of a recording without transcript, which is cut into equal pieces;
            transcribed utterances stay whole.
        heldout: Share of the audio of each manifest that goes into another one, <name>-dev, by whole recordings, or by
            whole speakers where ten or more are known.
        spell_numbers: Language of the transcripts, such as en or pt_BR, in which numbers are written as words; default:
            numbers stay as they are.
        language: Language of the rows without one, such as en.
        corpus_name: Name of the corpus, by which it can be balanced and scored beside others.

    Returns:
        Paths of the manifests.
    """
    check_pieces(max_duration, heldout)
    files_of = {name: _files(table, audio or table.parent) for name, table in named_once(tables).items()}
    return prepare(
        files_of, out, max_duration, number_language=spell_numbers, transcribed_whole=True, heldout=heldout,
        language=language, corpus=corpus_name,
    )  # fmt: skip


def _files(table: Path, root: Path) -> list[AudioFile]:
    rows: list[tuple[Mapping[str, Any], str]] = []
    try:
        for number, row in rows_of(table):
            path = next((row[key] for key in PATH_KEYS if key in row), None) if isinstance(row, dict) else None
            if not isinstance(path, str) or not path:
                raise UserError(f"line {number}: {shown(row)} has no audio_filepath")
            rows.append((row, path))
    except UserError as error:
        reason = str(error).removeprefix(f"{table}: ").split("; ")[0]
        raise UserError(
            f"{table}: not a manifest of NeMo ({reason}); give a file with one JSON object a line, each with an "
            "audio_filepath"
        ) from error
    if not rows:
        raise UserError(f"{table}: no rows in it; give a manifest of NeMo that lists audio files")
    counts = Counter(path for _, path in rows)
    files = [_file(root, path, row, counts[path] > 1) for row, path in rows]
    if any(file.text and has_words(file.text) for file in files):
        return [file if file.refused or file.text else file._replace(refused=WORDLESS) for file in files]
    return [file._replace(text=None) for file in files]  # manifests for pre-training have empty texts, or "-"


def _file(root: Path, path: str, row: Mapping[str, Any], is_shared: bool) -> AudioFile:
    """An utterance; its id is its path, with its times if several share the file."""
    name = Path(path).as_posix()
    speaker = row.get("speaker")
    spoken = language_named(next((row[key] for key in LANGUAGE_KEYS if row.get(key)), None))
    file = AudioFile(root / path, name, None if speaker is None else str(speaker), None, language=spoken)
    offset, duration = (row.get("offset") or 0.0), row.get("duration")
    for key, value in (("offset", offset), ("duration", duration)):
        if value is not None and not _is_time(value):
            return file._replace(refused=f"its {key} is {shown(value)}, not a number of seconds; correct its row")
    text = row.get("text")
    if text is not None and not isinstance(text, str):
        return file._replace(refused=f"its text is {shown(text)}; correct its row")
    words = None if text is None else " ".join(text.split())
    if is_shared:
        end = "end" if duration is None else f"{round(1000 * (offset + duration)):09d}"
        file = file._replace(id=f"{name}-{round(1000 * offset):09d}-{end}")
    segment = Segment(name, float(offset), duration) if offset or duration is not None else None
    return file._replace(text=words, segment=segment)


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= MAX_SECONDS  # also false for NaN
