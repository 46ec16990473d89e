"""A table of paths and sentences → manifests."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Literal
from zlib import crc32

from hubert_lightning.data.audio_folder import AUDIO_SUFFIXES, AudioFile, file_identity
from hubert_lightning.data.prepare import prepare
from hubert_lightning.errors import UserError
from hubert_lightning.files import composed
from hubert_lightning.untrusted.text_file import open_text

PATH, TEXT, SPEAKER = (
    ("path", "audio", "file", "wav", "filename", "audio_filepath"),
    ("text", "sentence", "transcript", "transcription"),
    ("speaker", "client_id", "speaker_id"),
)
"""What columns are called in the tables that people have, Common Voice's among them."""
MANY_SPEAKERS = 10
"""With so many, those held out can be others than those trained on."""

LARGEST = 2**28
"""Characters of a table: two million rows."""


def prepare_csv(
    table: Path,
    out: Path,
    path_column: str | None = None,
    text_column: str | None = None,
    speaker_column: str | None = None,
    heldout: float = 0.1,
    audio: Path | None = None,
    spell_numbers: str | None = None,
) -> list[Path]:
    """A CSV or TSV file of paths and sentences → `OUT/train.jsonl.gz` and `OUT/dev.jsonl.gz`.

    Args:
        table: CSV or TSV with column names in its first line, separated by tabs, commas, semicolons or bars; UTF-8 or
            UTF-16; may be compressed
        out: folder of the manifests
        path_column: column of the audio paths; default: path, audio, file, wav, filename or audio_filepath
        text_column: column of the transcripts; default: text, sentence, transcript or transcription
        speaker_column: column of the speakers; default: speaker, client_id or speaker_id, if there
        heldout: share of the utterances that go to dev: all of some speakers, if there are ten or more; chosen by their
            names, not by the order of the rows
        audio: folder that relative paths start from; default: the table's
        spell_numbers: language of the transcripts, such as en or pt_BR, in which numbers are spelled out; default: they
            stay as they are
    """
    if not 0 <= heldout < 1:
        raise UserError(f"heldout is {heldout}; it is a share of the utterances, from 0 to below 1")
    names, rows = _read(Path(table))
    path_of = _column(table, names, path_column, PATH, "path")
    text_of = _column(table, names, text_column, TEXT, "text")
    speaker_of = _column(table, names, speaker_column, SPEAKER, "speaker", needed=speaker_column is not None)
    assert path_of is not None
    assert text_of is not None
    root = Path(audio) if audio else Path(table).parent
    listings: dict[Path, dict[str, str]] = {}
    files = []
    for row in rows:
        cells = dict(enumerate(row))
        speaker = cells.get(speaker_of, "") if speaker_of is not None else ""
        refused = _wrong(row, names, path_of, root)
        file = _file(root, cells.get(path_of, ""), cells.get(text_of, ""), speaker or None, refused)
        files.append(file._replace(path=_on_disk(file.path, listings)))
    if not files:
        raise UserError(f"{table}: no rows below its first line, which names the columns; fill it in")
    files = list(_named_once(files))
    dev = _heldout(files, heldout)
    parts = {"train": [file for file in files if file not in dev], "dev": [file for file in files if file in dev]}
    return prepare({name: part for name, part in parts.items() if part}, Path(out), number_language=spell_numbers)


def _read(table: Path) -> tuple[list[str], list[list[str]]]:
    """The names of a table's columns, and its rows that are not empty."""
    with open_text(table, newline="") as file:
        text, of_excel = file.read(LARGEST + 1).lstrip("\r\n"), file.encoding == "utf-16"
    if len(text) > LARGEST:
        raise UserError(f"{table}: more than {LARGEST} characters; give a table of fewer rows, or several")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{table}: bytes of value 0 in line {line}, so no text; export it again as UTF-8")
    if stated := re.match(r"sep=([\t;,|])(\r\n|\r|\n)", text):  # a line of Excel's
        delimiter, text = stated[1], text[stated.end() :]
    else:
        first = re.split(r"\r\n|\r|\n", text, maxsplit=1)[0]
        # Sentences have commas and semicolons too, so that the first line alone tells which parts columns
        delimiter = max("\t;,|", key=lambda each: (_num_known(first, each), first.count(each)))
    lines = list(_rows(table, text, delimiter, csv.QUOTE_MINIMAL))
    if delimiter == "\t" and not of_excel:
        # Quotes are letters like others between tabs, as in Common Voice's tables, unless columns come out right only
        # with quotes around their cells
        plain = list(_rows(table, text, delimiter, csv.QUOTE_NONE))
        lines = lines if _is_right(lines) and (not _is_right(plain) or _is_quoted(plain)) else plain
    rows = (row[: max((index + 1 for index, cell in enumerate(row) if cell.strip()), default=0)] for row in lines[1:])
    return [name.strip() for name in lines[0]] if lines else [], [row for row in rows if row]


def _num_known(first: str, delimiter: str) -> int:
    """How many columns have usual names if this parts them."""
    return sum(name.strip(' "').lower() in (*PATH, *TEXT, *SPEAKER) for name in first.split(delimiter))


def _rows(table: Path, text: str, delimiter: str, quoting: Literal[0, 3]) -> Iterator[list[str]]:
    limit = csv.field_size_limit(len(text) + 1)  # an unclosed quote may hold all the rest
    try:
        lines = csv.reader(StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, quoting=quoting)
        yield from (line for line in lines if line)
    except csv.Error as error:
        raise UserError(f"{table}: no CSV file ({error}); export it again") from error
    finally:
        csv.field_size_limit(limit)


def _is_quoted(rows: Sequence[list[str]]) -> bool:
    """Whether a program put quotes around cells with quotes in them: it doubles those, in every such cell."""
    cells = [cell for row in rows for cell in row if cell.startswith('"')]
    inner = [cell[1:-1] for cell in cells if len(cell) > 1 and cell.endswith('"')]
    closed = len(inner) == len(cells) and not any('"' in cell.replace('""', "") for cell in inner)
    return closed and any('""' in cell for cell in inner)


def _is_right(rows: Sequence[list[str]]) -> bool:
    """Whether all rows have as many columns, whose names have no quotes around them."""
    quoted = rows and any(len(name) > 1 and name[0] == name[-1] == '"' for name in rows[0])
    return not quoted and len({len(row) for row in rows}) <= 1


def _column(
    table: Path, there: Sequence[str], given: str | None, usual: Sequence[str], what: str, needed: bool = True
) -> int | None:
    """The index of the column that is given, or has a usual name."""
    for wanted in [given] if given else usual:
        columns = [index for index, name in enumerate(there) if name.lower() == wanted.lower()]
        if len(columns) > 1:
            numbers = " and ".join(str(index + 1) for index in columns[:3])
            raise UserError(f"{table}: columns {numbers} are both called {wanted}; rename one")
        if not columns:
            continue
        others = [name for name in there if name.lower() in usual and name.lower() != wanted]
        if what == "text" and not given and others:
            both = " and ".join(others[:3])
            raise UserError(
                f"{table}: the columns {there[columns[0]]} and {both} may both be the transcript; name "
                "one with --text_column"
            )
        return columns[0]
    if needed and there and Path(there[0]).suffix.lower() in AUDIO_SUFFIXES:
        raise UserError(
            f"{table}: its first line, {', '.join(there)[:60]!r}, is no names of columns but a recording; put names "
            "above it, such as path and text"
        )
    if needed:
        found = " ".join(", ".join(there)[:200].split()) or "an empty first line"
        raise UserError(f"{table}: no column {given or ' or '.join(usual)}, only {found}; name it with --{what}_column")
    return None


def _wrong(row: Sequence[str], names: Sequence[str], path_of: int, root: Path) -> str | None:
    """What is wrong with the columns of a row, if something is."""
    if len(row) > len(names):
        return "its row has more columns than the first line: put a sentence with commas in quotes"
    # A sentence of several lines is one, unless its lines are rows: then the quotes before them are not closed
    lines = [line for cell in row for line in cell.splitlines()[1:]]
    if swallowed := [line for line in lines if _is_row(line, path_of, root)]:
        return (
            f"several lines in its row of the table, such as {swallowed[0][:40]!r}, which is a row of its own: close "
            "the quotes of the sentence before"
        )
    return None


def _is_row(line: str, path_of: int, root: Path) -> bool:
    """Whether a line of a sentence has an audio file where a row has its path."""
    cells = [cell.strip(' "') for cell in re.split("[\t;,|]", line)]
    if not path_of < len(cells) > 1 or not cells[path_of]:
        return False
    path = Path(cells[path_of])
    return path.suffix.lower() in AUDIO_SUFFIXES or os.path.isfile(root / path)


def _file(root: Path, path: str, text: str, speaker: str | None, refused: str | None) -> AudioFile:
    words = " ".join(text.split())
    if not path.strip():
        refused = "no path in its row of the table"
    elif refused is None and not words:
        refused = "no sentence in its row of the table"
    return AudioFile(root / path.strip(), Path(path.strip()).as_posix(), speaker, words or None, refused)


def _on_disk(path: Path, listings: dict[Path, dict[str, str]]) -> Path:
    """A path as its folders and its file are called on the disk, in whichever normal form of Unicode (macOS: NFD).

    Args:
        path: Path as a table has it.
        listings: Contents of folders that were looked at before: the name of each entry by its name in NFC.
    """
    if path.parent == path or os.path.lexists(path):
        return path
    folder = _on_disk(path.parent, listings)
    if folder not in listings:
        names = os.listdir(folder) if folder.is_dir() else []
        listings[folder] = {composed(name): name for name in names}
    return folder / listings[folder].get(composed(path.name), path.name)


def _named_once(files: Sequence[AudioFile]) -> Iterator[AudioFile]:
    """A file counts in its first row alone, however its path is written: else it might be held out and trained on."""
    seen: set[object] = set()
    for file in files:
        if file.refused is None:
            key = file_identity(file.path) if os.path.isfile(file.path) else file.id
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
