"""Manifests of a table of paths and transcripts."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Literal

from hubert_lightning.data.audio_folder import AUDIO_SUFFIXES, AudioFile, file_identity
from hubert_lightning.data.heldout import MANY_SPEAKERS, chosen_groups
from hubert_lightning.data.languages import LANGUAGE_COLUMNS, language_named
from hubert_lightning.data.prepare import prepare
from hubert_lightning.errors import UserError
from hubert_lightning.files import composed
from hubert_lightning.untrusted.text_file import open_text

PATH_COLUMNS = ("path", "audio", "file", "wav", "filename", "audio_filepath", "file_name")
TEXT_COLUMNS = ("text", "sentence", "transcript", "transcription")
SPEAKER_COLUMNS = ("speaker", "client_id", "speaker_id")
"""Usual names of columns, those of Common Voice among them."""
MAX_CHARACTERS = 2**28
"""Characters of a table, which two million rows have."""


def prepare_csv(
    table: Path,
    out: Path,
    path_column: str | None = None,
    text_column: str | None = None,
    speaker_column: str | None = None,
    heldout: float = 0.1,
    audio: Path | None = None,
    spell_numbers: str | None = None,
    language_column: str | None = None,
    language: str | None = None,
    corpus_name: str | None = None,
) -> list[Path]:
    """Make manifests of the recordings in a CSV or TSV file: `OUT/train.jsonl.gz` and `OUT/dev.jsonl.gz`.

    Args:
        table: CSV or TSV file in UTF-8 or UTF-16, compressed or not; its first line has the names of the columns,
            separated by tabs, commas, semicolons or bars.
        out: Folder of the manifests.
        path_column: Column of the audio paths; default: path, audio, file, wav, filename, file_name or
            audio_filepath.
        text_column: Column of the transcripts; default: text, sentence, transcript or transcription.
        speaker_column: Column of the speakers; default: speaker, client_id or speaker_id, if there is one.
        heldout: Share of the utterances in dev, from 0 to 1; with ten or more speakers, whole speakers are held out.
            The choice depends on the names of speakers or files, not on the order of the rows.
        audio: Folder that relative paths start from; default: the folder of the table.
        spell_numbers: Language of the transcripts, such as en or pt_BR, in which numbers are written as words; default:
            numbers stay as they are.
        language_column: Column of the languages; default: language, locale or lang, if there is one.
        language: Language of the rows without one, such as en.
        corpus_name: Name of the corpus, by which it can be balanced and scored beside others.

    Returns:
        Paths of the manifests.
    """
    if not 0 <= heldout < 1:
        raise UserError(f"heldout is {heldout}; it is a share of the utterances, from 0 to below 1")
    files = files_of_table(Path(table), path_column, text_column, speaker_column, audio, language_column)
    dev = _heldout(files, heldout)
    parts = {"train": [file for file in files if file not in dev], "dev": [file for file in files if file in dev]}
    files_of = {name: part for name, part in parts.items() if part}
    return prepare(files_of, Path(out), number_language=spell_numbers, language=language, corpus=corpus_name)


def files_of_table(
    table: Path,
    path_column: str | None = None,
    text_column: str | None = None,
    speaker_column: str | None = None,
    audio: Path | None = None,
    language_column: str | None = None,
) -> list[AudioFile]:
    """List the recordings of a CSV or TSV file; the arguments are those of `prepare_csv`.

    Raises:
        UserError: The table cannot be read, has no rows, or lacks a column.
    """
    names, rows = _read(table)
    path_index = _column(table, names, path_column, PATH_COLUMNS, "path")
    text_index = _column(table, names, text_column, TEXT_COLUMNS, "text")
    speaker_index = _column(table, names, speaker_column, SPEAKER_COLUMNS, "speaker", needed=speaker_column is not None)
    language_index = _column(
        table, names, language_column, LANGUAGE_COLUMNS, "language", needed=language_column is not None
    )
    assert path_index is not None
    assert text_index is not None
    root = Path(audio) if audio else table.parent
    listings: dict[Path, dict[str, str]] = {}
    files = []
    for row in rows:
        cells = dict(enumerate(row))
        speaker = cells.get(speaker_index, "") if speaker_index is not None else ""
        refused = _mistake(row, names, path_index, root)
        file = _file(root, cells.get(path_index, ""), cells.get(text_index, ""), speaker or None, refused)
        named = language_named(cells.get(language_index)) if language_index is not None else None
        files.append(file._replace(path=_on_disk(file.path, listings), language=named))
    if not files:
        raise UserError(f"{table}: no rows below its first line, which names the columns; fill it in")
    return list(_named_once(files))


def _read(table: Path) -> tuple[list[str], list[list[str]]]:
    """The names of a table's columns, and its rows that are not empty."""
    with open_text(table, newline="") as file:
        text, of_excel = file.read(MAX_CHARACTERS + 1).lstrip("\r\n"), file.encoding == "utf-16"
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{table}: more than {MAX_CHARACTERS} characters; give a table of fewer rows, or several")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{table}: bytes of value 0 in line {line}, so it is not a text file; export it again as UTF-8")
    if stated := re.match(r"sep=([\t;,|])(\r\n|\r|\n)", text):  # a line that Excel writes
        delimiter, text = stated[1], text[stated.end() :]
    else:
        first = re.split(r"\r\n|\r|\n", text, maxsplit=1)[0]
        # Sentences have commas and semicolons too, so only the first line shows which delimiter separates columns
        delimiter = max("\t;,|", key=lambda each: (_num_known(first, each), first.count(each)))
    lines = list(_rows(table, text, delimiter, csv.QUOTE_MINIMAL))
    if delimiter == "\t" and not of_excel:
        # Between tabs, quotes are ordinary characters, as in Common Voice's tables, unless only quoted cells give every
        # row the same number of columns
        plain = list(_rows(table, text, delimiter, csv.QUOTE_NONE))
        lines = lines if _is_regular(lines) and (not _is_regular(plain) or _is_quoted(plain)) else plain
    rows = (row[: max((index + 1 for index, cell in enumerate(row) if cell.strip()), default=0)] for row in lines[1:])
    return [name.strip() for name in lines[0]] if lines else [], [row for row in rows if row]


def _num_known(first: str, delimiter: str) -> int:
    """Number of columns with usual names for a delimiter."""
    usual = {*PATH_COLUMNS, *TEXT_COLUMNS, *SPEAKER_COLUMNS}
    return sum(name.strip(' "').lower() in usual for name in first.split(delimiter))


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
    """Whether a program quoted cells that contain quotes: it doubles the inner ones in every such cell."""
    cells = [cell for row in rows for cell in row if cell.startswith('"')]
    inner = [cell[1:-1] for cell in cells if len(cell) > 1 and cell.endswith('"')]
    closed = len(inner) == len(cells) and not any('"' in cell.replace('""', "") for cell in inner)
    return closed and any('""' in cell for cell in inner)


def _is_regular(rows: Sequence[list[str]]) -> bool:
    """Whether all rows have the same number of columns, and the names of columns have no quotes."""
    quoted = rows and any(len(name) > 1 and name[0] == name[-1] == '"' for name in rows[0])
    return not quoted and len({len(row) for row in rows}) <= 1


def _column(
    table: Path, names: Sequence[str], given: str | None, usual: Sequence[str], kind: str, needed: bool = True
) -> int | None:
    """Index of the column that is given, or that has a usual name."""
    for wanted in [given] if given else usual:
        columns = [index for index, name in enumerate(names) if name.lower() == wanted.lower()]
        if len(columns) > 1:
            numbers = " and ".join(str(index + 1) for index in columns[:3])
            raise UserError(f"{table}: columns {numbers} are both called {wanted}; rename one")
        if not columns:
            continue
        others = [name for name in names if name.lower() in usual and name.lower() != wanted]
        if kind == "text" and not given and others:
            both = " and ".join(others[:3])
            raise UserError(
                f"{table}: the columns {names[columns[0]]} and {both} may both be the transcript; name "
                "one with --text_column"
            )
        return columns[0]
    if needed and names and Path(names[0]).suffix.lower() in AUDIO_SUFFIXES:
        raise UserError(
            f"{table}: its first line, {', '.join(names)[:60]!r}, lists a recording instead of column names; insert a "
            "line of names above it, such as path and text"
        )
    if needed:
        present = " ".join(", ".join(names)[:200].split()) or "an empty first line"
        raise UserError(
            f"{table}: no column {given or ' or '.join(usual)}, only {present}; name it with --{kind}_column"
        )
    return None


def _mistake(row: Sequence[str], names: Sequence[str], path_index: int, root: Path) -> str | None:
    """The mistake in a row, or None."""
    if len(row) > len(names):
        return "its row has more columns than the first line: put a sentence with commas in quotes"
    # A cell may have several lines; lines that are rows themselves show that a quote before them is not closed
    lines = [line for cell in row for line in cell.splitlines()[1:]]
    if inner_rows := [line for line in lines if _is_row(line, path_index, root)]:
        return (
            f"several lines in its row of the table, such as {inner_rows[0][:40]!r}, which looks like the next row: "
            "close the quotes of the sentence"
        )
    return None


def _is_row(line: str, path_index: int, root: Path) -> bool:
    """Whether a line of a cell has an audio file in the column of paths."""
    cells = [cell.strip(' "') for cell in re.split("[\t;,|]", line)]
    if not path_index < len(cells) > 1 or not cells[path_index]:
        return False
    path = Path(cells[path_index])
    return path.suffix.lower() in AUDIO_SUFFIXES or os.path.isfile(root / path)


def _file(root: Path, path: str, text: str, speaker: str | None, refused: str | None) -> AudioFile:
    words = " ".join(text.split())
    if not path.strip():
        refused = "no path in its row of the table"
    elif refused is None and not words:
        refused = "no sentence in its row of the table"
    return AudioFile(root / path.strip(), Path(path.strip()).as_posix(), speaker, words or None, refused)


def _on_disk(path: Path, listings: dict[Path, dict[str, str]]) -> Path:
    """Path with the names as they are on the disk, in any normal form of Unicode (macOS: NFD).

    Args:
        path: Path in the table.
        listings: Cache of the contents of folders: the name of each entry by its name in NFC.
    """
    if path.parent == path or os.path.lexists(path):
        return path
    folder = _on_disk(path.parent, listings)
    if folder not in listings:
        names = os.listdir(folder) if folder.is_dir() else []
        listings[folder] = {composed(name): name for name in names}
    return folder / listings[folder].get(composed(path.name), path.name)


def _named_once(files: Sequence[AudioFile]) -> Iterator[AudioFile]:
    """Refuse repeated rows of a file, so that no file is in both train and dev; paths may differ in spelling."""
    seen: set[object] = set()
    for file in files:
        if file.refused is None:
            key = file_identity(file.path) if os.path.isfile(file.path) else file.id
            if key in seen:
                file = file._replace(refused="repeated: an earlier row of the table names the same file")
            seen.add(key)
        yield file


def _heldout(files: Sequence[AudioFile], share: float) -> set[AudioFile]:
    """Choose about a share of the files by a hash of their names; with many speakers, whole speakers."""
    whole_speakers = len({file.speaker for file in files if file.speaker}) >= MANY_SPEAKERS
    groups: dict[str, list[AudioFile]] = {}
    for file in files:
        groups.setdefault((file.speaker if whole_speakers else None) or file.id, []).append(file)
    limit = round(share * len(files)) or float(share > 0)  # a speaker with many utterances stays in train
    names = chosen_groups({name: len(group) for name, group in groups.items()}, limit)
    return {file for name in names for file in groups[name]}
