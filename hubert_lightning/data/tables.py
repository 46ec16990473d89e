"""A table of paths and sentences → manifests."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from hubert_lightning.data.preparation import AudioFile, identity, prepare

PATH, TEXT, SPEAKER = (
    ("path", "audio", "file", "wav", "filename", "audio_filepath"),
    ("text", "sentence", "transcript", "transcription"),
    ("speaker", "client_id", "speaker_id"),
)
"""What columns are called in the tables that people have, Common Voice's among them."""
TOO_LONG = "has more columns than the first line"
MANY_SPEAKERS = 10
"""With so many, those held out can be others than those trained on."""


def prepare_csv(
    table: Path,
    out: Path,
    path_column: str | None = None,
    text_column: str | None = None,
    speaker_column: str | None = None,
    heldout: float = 0.1,
    audio: Path | None = None,
) -> list[Path]:
    """A CSV or TSV file of paths and sentences → `OUT/train.jsonl.gz` and `OUT/dev.jsonl.gz`.

    Args:
        table: its first line names the columns
        out: where the manifests go
        path_column: of the audio files; path, audio, file, wav or filename if not given
        text_column: of what is said in them; text, sentence, transcript or transcription if not given
        speaker_column: of who says it; speaker, client_id or speaker_id if not given and there
        heldout: share of the utterances that go to dev: all of some speakers, if there are ten or more; which ones is a
            matter of their names, not of the order of the rows
        audio: folder that paths begin from; the table's if not given
    """
    if not 0 <= heldout < 1:
        raise ValueError(f"heldout is {heldout}; it is a share of the utterances, from 0 to below 1")
    rows, columns = _read(Path(table))
    path_of = _column(table, columns, path_column, PATH, "path")
    text_of = _column(table, columns, text_column, TEXT, "text")
    speaker_of = _column(table, columns, speaker_column, SPEAKER, "speaker", needed=speaker_column is not None)
    root = Path(audio) if audio else Path(table).parent
    files = [
        _file(root, row.get(path_of, ""), row.get(text_of, ""), row.get(speaker_of) or None, row[TOO_LONG])
        for row in rows
    ]
    if not files:
        raise ValueError(f"{table}: no rows below its first line, which names the columns; fill it in")
    files = list(_named_once(files))
    dev = _heldout(files, heldout)
    found = {"train": [file for file in files if file not in dev], "dev": [file for file in files if file in dev]}
    return prepare({name: of for name, of in found.items() if of}, Path(out))


def _read(table: Path) -> tuple[list[dict[str, Any]], list[str]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            # Sentences have commas and semicolons too, so that the first line alone tells which parts columns
            delimiter = max("\t;,", key=first.count)
            # Quotes are letters like others between tabs, as in Common Voice's tables
            how = {"quoting": csv.QUOTE_NONE} if delimiter == "\t" else {}
            lines = csv.reader(file, delimiter=delimiter, skipinitialspace=True, **how)  # type: ignore[arg-type]
            names = [name.strip() for name in next(lines, [])]
            rows = [dict(zip(names, line, strict=False)) | {TOO_LONG: len(line) > len(names)} for line in lines if line]
            return rows, names
    except OSError as error:
        raise ValueError(f"{table}: cannot be read ({error.strerror}); give a CSV or TSV file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}: is not UTF-8; save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{table}: no CSV file ({error}); export it again") from error


def _column(
    table: Path, there: Sequence[str], given: str | None, usual: Sequence[str], what: str, needed: bool = True
) -> str:
    wanted = [given] if given else usual
    name = next((name for want in wanted for name in there if name.lower() == want.lower()), "")
    if not name and needed:
        raise ValueError(
            f"{table}: no column {given or ' or '.join(usual)}, only {', '.join(there) or 'an empty first line'}; name "
            f"it with --{what}_column"
        )
    return name


def _file(root: Path, path: str, text: str, speaker: str | None, too_long: bool) -> AudioFile:
    place = root / path.strip()
    words = " ".join(text.split())
    refused = None
    if not path.strip():
        refused = "no path in its row of the table"
    elif too_long:
        refused = "its row has more columns than the first line: put a sentence with commas in quotes"
    elif "\n" in text.strip():
        refused = "several lines in its row of the table: close the quotes of the sentence before"
    elif not words:
        refused = "no sentence in its row of the table"
    return AudioFile(place, Path(path.strip()).as_posix(), speaker, words or None, refused)


def _named_once(files: Sequence[AudioFile]) -> Iterator[AudioFile]:
    """A file counts in its first row alone, however its path is written: else it might be held out and trained on."""
    seen: set[object] = set()
    for file in files:
        if file.refused is None:
            key = identity(file.path) if file.path.is_file() else file.id
            if key in seen:
                file = file._replace(refused="named as another file: an earlier row of the table has the same file")
            seen.add(key)
        yield file


def _heldout(files: Sequence[AudioFile], share: float) -> set[AudioFile]:
    """About so many of them, all of a speaker if there are many; which, is a matter of their names."""
    together = len({file.speaker for file in files if file.speaker}) >= MANY_SPEAKERS
    groups: dict[str, list[AudioFile]] = {}
    for file in files:
        groups.setdefault((file.speaker if together else None) or file.id, []).append(file)
    chosen: set[AudioFile] = set()
    wanted = round(share * len(files))
    for name in sorted(groups, key=lambda name: (crc32(name.encode()), name)):
        if len(chosen) + len(groups[name]) <= wanted:  # a speaker who says a lot is rather trained on
            chosen.update(groups[name])
    if share and not chosen and len(groups) > 1:
        chosen.update(groups[min(groups, key=lambda name: len(groups[name]))])
    return chosen
