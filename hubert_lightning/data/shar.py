"""Corpora too large for memory: audio in tar archives (lhotse Shar), and a table with the position of each cut.

`hubert prepare shar` reads the headers of the archives once and writes the table, about 40 bytes for each cut. It is
mapped from the disk, so a process holds only the cuts that it reads; the audio of a cut is one read of one archive.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from io import BytesIO, FileIO
from pathlib import Path, PurePosixPath
from typing import Any, overload

import numpy as np
from lhotse import MonoCut, MultiCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.cut import Cut

from hubert_lightning.data.cut_rows import MAX_CHANNELS, MAX_NAME, MAX_SECONDS, SAMPLING_RATES, rows_of
from hubert_lightning.data.languages import CORPUS, MAX_CHARACTERS, check_names, hours_sentence
from hubert_lightning.errors import UserError, counted
from hubert_lightning.files import kind_of, replacing_all
from hubert_lightning.frames import SAMPLE_RATE, WINDOW
from hubert_lightning.interrupts import thread_pool
from hubert_lightning.progress_bar import progress
from hubert_lightning.untrusted.array_file import mapped
from hubert_lightning.untrusted.json_file import is_text, parse_json, read_json, shown

SHAR_SUFFIX = ".shar"
"""Suffix of the folder of a table."""
VERSION, NAMED_VERSION = 1, 2
"""Versions of the format of a table: without and with columns of the language and the corpus."""
NUMBERS = {"samples": "i8", "channels": "i2", "archive": "i4", "offset": "i8", "size": "i8"}
"""Columns of a table besides the id."""
NAMES = {"language": "u2", "corpus": "u2"}
"""Columns of a table that names languages or corpora: numbers of the names in its description."""
MAX_CODES = 2**16
"""Names of languages, or of corpora, of a table."""
WAY_OUT = "make it with `hubert prepare shar`"
MAX_DESCRIPTION = 2**20
"""Bytes of the description of a recording in an archive."""
BLOCK = 2**20
"""Rows that are checked together."""


def prepare_shar(shar: Path, out: Path, language: str | None = None, corpus_name: str | None = None) -> Path:
    """Make a table of a lhotse Shar folder, for streaming: `OUT/<name of the folder>.shar`.

    `lhotse shar export` makes such a folder (cuts.000000.jsonl.gz, recording.000000.tar, …) from any manifest. Audio is
    not decoded here, because lhotse decoded it when it wrote the archives. Transcripts are left out; languages and
    corpora of the cuts are kept.

    Args:
        shar: Folder of the archives; the table refers to it, so do not move it.
        out: Folder of the table, which you name in data.train.
        language: Language of the cuts for which none is known, such as en.
        corpus_name: Name of the corpus, by which it can be balanced beside others.

    Returns:
        Folder of the table.
    """
    check_names(language=language, corpus_name=corpus_name)
    pairs = [
        (cuts, shar / (cuts.name.replace("cuts.", "recording.").split(".jsonl")[0] + ".tar"))
        for cuts in _listings(shar)
    ]
    if missing := [archive for _, archive in pairs if not archive.is_file()]:
        raise UserError(f"{missing[0]}: not there, but belongs to a cuts.*.jsonl.gz; export both again")
    with progress("reading archives", len(pairs), "archives") as advance, thread_pool() as pool:
        rows_by_archive = []
        for archive_rows in pool.map(_rows, *zip(*pairs, strict=True)):
            rows_by_archive.append(archive_rows)
            advance()
    names: dict[str, dict[str, int]] = {"language": {}, "corpus": {}}
    rows = [
        (*row[:3], number, *row[3:5], *_codes(names, row[5] or language, corpus_name or row[6]))
        for number, archive_rows in enumerate(rows_by_archive)
        for row in archive_rows
        if row[1] >= WINDOW
    ]
    if not rows:
        raise UserError(f"{shar}: no cut with audio in it; export it again, with recordings")
    named = any(any(codes) for codes in names.values())
    layout = _layout(max(len(cut_id) for cut_id, *_ in rows), named)
    table = np.array(rows if named else [row[:-2] for row in rows], layout)
    ids = np.sort(table["id"])
    if len(same := ids[1:][ids[1:] == ids[:-1]]):
        raise UserError(f"{shar}: {same[0].decode()} is there twice; give each cut its own id and export it again")
    folder = out / (shar.resolve().name + SHAR_SUFFIX)
    digest = hashlib.sha256(b"".join(b"%s\t%d\n" % (row["id"], row["samples"]) for row in table)).hexdigest()[:16]
    description = {
        "version": NAMED_VERSION if named else VERSION,
        "archives": [str(archive.resolve()) for _, archive in pairs],
        "bytes": [archive.stat().st_size for _, archive in pairs],
        "fingerprint": digest,
    } | ({kind: list(codes) for kind, codes in names.items()} if named else {})
    content = BytesIO()  # np.save into a file hides the reason of a failure
    np.save(content, table)
    with replacing_all(folder / "table.npy", folder / "corpus.json") as (table_file, description_file):
        table_file.write(content.getbuffer())
        description_file.write(json.dumps(description, indent=2).encode())
    hours = table["samples"].sum() / SAMPLE_RATE / 3600
    print(f"{folder}: {counted(len(table), 'utterance')}, {hours:.2f} h, in {counted(len(pairs), 'archive')}")
    for kind, codes in names.items() if named else ():
        samples = np.bincount(table[kind], weights=table["samples"], minlength=len(codes)) / SAMPLE_RATE / 3600
        if sentence := hours_sentence(dict(zip(codes, samples.tolist(), strict=True)), kind):
            print(sentence)
    if short := sum(map(len, rows_by_archive)) - len(table):
        print(f"{short} without audio, or shorter than a frame: left out")
    return folder


class SharCuts(Sequence[Cut]):
    """The cuts of a table of `hubert prepare shar`, each created when it is accessed.

    Args:
        path: Folder of the table.
        rows: (cuts,) indices of rows of the table; default: all.

    Raises:
        UserError: The folder is no such table.
    """

    def __init__(self, path: Path, rows: np.ndarray | None = None) -> None:
        self.path, self.rows = Path(path), rows
        listing, table = self.path / "corpus.json", self.path / "table.npy"
        if not listing.is_file() or not table.is_file():
            raise UserError(f"{path}: no table of a Shar corpus; {WAY_OUT}")
        about = read_json(listing, WAY_OUT)
        if isinstance(about, dict) and about.get("version") not in (VERSION, NAMED_VERSION):
            raise UserError(
                f"{path}: a table of version {shown(about.get('version'))}, not {VERSION} or {NAMED_VERSION}; prepare "
                "it again"
            )
        if not _is_listing(about):
            raise UserError(f"{listing}: no table of a Shar corpus (corrupt, or of another program); {WAY_OUT}")
        self.archives, self._bytes = about["archives"], about["bytes"]
        self._fingerprint: str = about["fingerprint"]
        try:
            self._table = mapped(table)
        except UserError as error:
            raise UserError(f"{table}: cannot be read ({error}); {WAY_OUT}") from error
        named = about["version"] == NAMED_VERSION
        self._names: dict[str, list[str]] = {kind: about[kind] for kind in NAMES} if named else {}
        if self._table.ndim != 1 or not len(self._table) or not _is_layout(self._table.dtype, named):
            raise UserError(f"{table}: {_described(self._table)} is not a table of a Shar corpus; {WAY_OUT}")

    def __reduce__(self) -> tuple[type, tuple[Path, np.ndarray | None]]:
        return SharCuts, (self.path, self.rows)  # another process maps the table itself

    def check(self) -> None:
        """Check that the archives are as `hubert prepare` read them, and that rows point inside them.

        Raises:
            UserError: An archive is missing, no file, or has another size, or a row has impossible numbers.
        """
        for archive, expected in zip(self.archives, self._bytes, strict=True):
            if not Path(archive).is_file():
                fact = kind_of(archive) if Path(archive).exists() else "not there"
                raise UserError(
                    f"{archive}: {fact}; mount or restore it, or `hubert prepare shar` again into the same folder"
                )
            if (size := Path(archive).stat().st_size) != expected:
                raise UserError(
                    f"{archive}: {size} bytes, {expected} when it was prepared; mount or restore it, or run `hubert "
                    "prepare shar` again"
                )
        for start in range(0, len(self._table), BLOCK):
            self._check_rows(start)

    def _check_rows(self, start: int) -> None:
        rows = self._table[start : start + BLOCK]
        archive = rows["archive"].astype(np.int64)
        inside = (archive >= 0) & (archive < len(self.archives))
        ends = np.array(self._bytes, np.int64)[np.where(inside, archive, 0)] - rows["offset"]  # bytes after the offset
        valid = inside & (rows["offset"] >= 0) & (rows["size"] > 0) & (rows["size"] <= ends)
        valid &= (rows["samples"] >= WINDOW) & (rows["samples"] <= MAX_SECONDS * SAMPLE_RATE)
        valid &= (rows["channels"] > 0) & (rows["channels"] <= MAX_CHANNELS)
        for kind, known in self._names.items():
            valid &= rows[kind] < len(known)
        if not valid.all():
            row = rows[int(np.argmin(valid))]
            numbers = ", ".join(f"{name} {row[name]}" for name in (*NUMBERS, *self._names))
            raise UserError(
                f"{self.path / 'table.npy'}: row {start + int(np.argmin(valid))} points outside of its archive, or has "
                f"impossible numbers ({numbers}); {WAY_OUT}"
            )

    @property
    def fingerprint(self) -> str:
        """Identity of the audio."""
        if self.rows is None:
            return self._fingerprint
        return hashlib.sha256(self._fingerprint.encode() + self.rows.tobytes()).hexdigest()[:16]

    @property
    def num_samples(self) -> np.ndarray:
        """Lengths of the cuts at 16 kHz: (cuts,)."""
        samples = self._table["samples"]
        return np.asarray(samples if self.rows is None else samples[self.rows])

    def named(self) -> tuple[list[tuple[str, str]], np.ndarray]:
        """Find the languages and corpora of the cuts.

        Returns:
            Pairs of a language and a corpus, "" where the cuts name none; and (cuts,), the number of each cut's pair.
        """
        if not self._names:
            return [("", "")], np.zeros(len(self), np.int32)
        languages, corpora = (self._names[kind] for kind in NAMES)
        codes = self._table["language"].astype(np.int64) * len(corpora) + self._table["corpus"]
        codes = codes if self.rows is None else codes[self.rows]
        present = np.flatnonzero(np.bincount(codes))
        index = np.searchsorted(present, codes)
        pairs = [(languages[code // len(corpora)], corpora[code % len(corpora)]) for code in present.tolist()]
        return pairs, index.astype(np.int32)

    def ids(self) -> Iterator[str]:
        """Ids of the cuts."""
        for start in range(0, len(self), 100_000):
            part = slice(start, start + 100_000)
            ids = self._table["id"][part if self.rows is None else self.rows[part]]
            for number, cut_id in enumerate(ids.tolist(), start):
                if not (name := cut_id.decode(errors="replace")) or "\ufffd" in name:
                    raise UserError(f"{self.path / 'table.npy'}: the id of row {number} is not text; {WAY_OUT}")
                yield name

    def chosen(self, indices: np.ndarray) -> "SharCuts":
        """Choose some of the cuts by their indices: (cuts,)."""
        chosen = copy(self)  # with the same table, which is mapped once
        chosen.rows = indices if self.rows is None else self.rows[indices]
        return chosen

    def __len__(self) -> int:
        return len(self._table) if self.rows is None else len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Cut: ...
    @overload
    def __getitem__(self, index: slice) -> "SharCuts": ...
    def __getitem__(self, index: int | slice) -> "Cut | SharCuts":
        if isinstance(index, slice):
            return self.chosen(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = self._row(index)
        cut_id, samples, channels = row["id"].decode(), int(row["samples"]), list(range(int(row["channels"])))
        duration = samples / SAMPLE_RATE
        source = AudioSource("shar", channels, f"{self.archives[row['archive']]}:{row['offset']}:{row['size']}")
        recording = Recording(cut_id, [source], SAMPLE_RATE, samples, duration)
        language, corpus = (self._names[kind][row[kind]] if self._names else "" for kind in NAMES)
        channel = 0 if len(channels) == 1 else channels
        spoken = [SupervisionSegment(cut_id, cut_id, 0.0, duration, channel, language=language)] if language else []
        custom = {CORPUS: corpus} if corpus else None
        if len(channels) == 1:
            return MonoCut(cut_id, 0.0, duration, 0, supervisions=spoken, recording=recording, custom=custom)
        return MultiCut(cut_id, 0.0, duration, channels, supervisions=spoken, recording=recording, custom=custom)

    def _row(self, index: int) -> np.void:
        row: np.void = self._table[index if self.rows is None else self.rows[index]]
        return row


def _listings(shar: Path) -> list[Path]:
    listings = sorted(shar.glob("cuts.*.jsonl*"))
    if not listings:
        raise UserError(f"{shar}: no cuts.000000.jsonl.gz in it; make a Shar corpus with `lhotse shar export`")
    return listings


def _codes(names: dict[str, dict[str, int]], language: str | None, corpus: str | None) -> tuple[int, int]:
    """Numbers of a language and a corpus, which are added to the names.

    Raises:
        UserError: There are more names than a table can number.
    """
    values = {"language": language or "", "corpus": corpus or ""}
    for kind, value in values.items():
        if len(names[kind]) >= MAX_CODES and value not in names[kind]:
            raise UserError(f"more than {MAX_CODES} names of a {kind}, such as {shown(value)}; correct the cuts")
    language_code, corpus_code = (names[kind].setdefault(value, len(names[kind])) for kind, value in values.items())
    return language_code, corpus_code


def _layout(longest: int, named: bool) -> np.dtype:
    return np.dtype([("id", f"S{longest}"), *NUMBERS.items(), *(NAMES.items() if named else ())])


def _is_layout(dtype: np.dtype, named: bool) -> bool:
    return (
        bool(dtype.names)
        and dtype["id"].kind == "S"
        and 0 < dtype["id"].itemsize <= MAX_NAME
        and (dtype == _layout(dtype["id"].itemsize, named))
    )


def _described(array: np.ndarray) -> str:
    return shown(f"an array of {array.dtype} of shape {array.shape}")[1:-1]


def _is_listing(about: Any) -> bool:
    """Whether a JSON value is a description that `prepare_shar` writes."""
    archives, sizes = (about.get(name) for name in ("archives", "bytes")) if isinstance(about, dict) else (None, None)
    return (
        isinstance(archives, list)
        and isinstance(sizes, list)
        and len(archives) == len(sizes) > 0
        and all(isinstance(path, str) and 0 < len(path) <= MAX_NAME and "\0" not in path for path in archives)
        and all(type(size) is int and 0 < size < 2**62 for size in sizes)
        and isinstance(about.get("fingerprint"), str)
        and (about.get("version") == VERSION or all(_are_names(about.get(kind)) for kind in NAMES))
    )


def _are_names(names: Any) -> bool:
    return (
        isinstance(names, list)
        and 0 < len(names) <= MAX_CODES
        and all(isinstance(name, str) and len(name) <= MAX_NAME and is_text(name) for name in names)
    )


def _rows(cuts: Path, archive: Path) -> list[tuple[bytes, int, int, int, int, str, str]]:
    """Id, samples at 16 kHz (0 without audio), channels, offset, size, language and corpus of each cut."""
    try:
        with _Archive(archive) as file, tarfile.open(fileobj=file, mode="r:") as members:
            recordings = list(_recordings(members, archive.stat().st_size))
            by_id = dict(recordings)
    except (tarfile.TarError, OSError, RecursionError, ValueError) as error:
        raise UserError(f"{archive}: not an archive of recordings ({error}); export it again, uncompressed") from error
    listed = _listed(cuts)
    ids = [cut_id for cut_id, _, _ in listed]
    if len(ids) != len(recordings):
        raise UserError(
            f"{cuts}: {len(ids)} cuts, but {len(recordings)} recordings in {archive.name}; export both again"
        )
    if missing := [cut_id for cut_id in ids if cut_id not in by_id]:
        raise UserError(
            f"{cuts}: {missing[0]} is not in {archive.name}, whose files are named for their cuts, the first "
            f"{recordings[0][0]}; export both again"
        )
    rows = []
    for cut_id, language, corpus in listed:
        rate, samples, channels, offset, size = by_id[cut_id]
        rows.append((cut_id.encode(), samples * SAMPLE_RATE // rate, channels, offset, size, language, corpus))
    return rows


def _listed(cuts: Path) -> list[tuple[str, str, str]]:
    """Id, language and corpus of the cuts in a listing; "" where a cut names none."""
    listed: list[tuple[str, str, str]] = []
    try:
        for number, row in rows_of(cuts):
            cut_id = row.get("id") if isinstance(row, dict) else None
            if not isinstance(cut_id, str) or not 0 < len(cut_id) <= MAX_NAME or not is_text(cut_id):
                raise UserError(f"line {number}: the id is {shown(cut_id)}")
            listed.append((cut_id, *_names_in(row)))
    except UserError as error:
        reason = str(error).removeprefix(f"{cuts}: ").split("; ")[0]
        raise UserError(f"{cuts}: no cuts of a Shar corpus ({reason}); export it again") from error
    return listed


def _names_in(row: dict[str, Any]) -> tuple[str, str]:
    """The language and the corpus of a cut, as its JSON states them."""
    supervisions, custom = row.get("supervisions"), row.get("custom")
    segments = [one for one in supervisions if isinstance(one, dict)] if isinstance(supervisions, list) else []
    language = next((one["language"] for one in segments if one.get("language")), "")
    corpus = (custom.get(CORPUS) if isinstance(custom, dict) else None) or ""
    for kind, name in (("language", language), ("corpus", corpus)):
        if not isinstance(name, str) or len(name) > MAX_CHARACTERS or not is_text(name):
            raise UserError(f"{row['id']}: its {kind} is {shown(name)}")
    return language, corpus


class _Archive(FileIO):
    """An archive whose reads are limited to the size of a description, whatever its headers state."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_DESCRIPTION:
            raise UserError(f"a header of {size} bytes")
        return super().read(size) or b""


def _recordings(members: tarfile.TarFile, total: int) -> Iterable[tuple[str, tuple[int, int, int, int, int]]]:
    """Id of each cut, and of its recording the rate, samples, channels, offset and size."""
    data = None
    for member in members:
        if data is None:
            data = member
            continue
        cut_id = str(PurePosixPath(member.name).with_suffix(""))  # as lhotse names them
        if member.name.endswith(".json"):
            if member.size > MAX_DESCRIPTION or not member.isreg() or member.issparse():
                raise UserError(f"{shown(member.name)} has {member.size} bytes, and describes one recording")
            if not data.isreg() or data.issparse() or data.offset_data + data.size > total:
                raise UserError(f"{shown(data.name)} is cut short, or no file")
            file = members.extractfile(member)
            assert file is not None
            rate, samples, channels = _counts(parse_json(file.read()), member.name)
            yield cut_id, (rate, samples, channels, data.offset_data, data.size)
        else:
            yield cut_id, (SAMPLE_RATE, 0, 1, 0, 0)  # a cut without a recording
        data = None


def _counts(about: Any, name: str) -> tuple[int, int, int]:
    """Sampling rate, samples and channels in lhotse's description of a recording."""
    about = about if isinstance(about, dict) else {}
    rate, samples, channels = about.get("sampling_rate"), about.get("num_samples"), about.get("channel_ids")
    if not channels and isinstance(about.get("sources"), list) and about["sources"]:
        source = about["sources"][0]
        channels = source.get("channels") if isinstance(source, dict) else None
    valid = type(rate) is int and SAMPLING_RATES[0] <= rate <= SAMPLING_RATES[1] and type(samples) is int
    if not valid or not 0 <= samples <= MAX_SECONDS * rate or not isinstance(channels, list):
        raise UserError(
            f"{shown(name)} has sampling_rate {shown(rate)}, num_samples {shown(samples)}, channels {shown(channels)}"
        )
    if not 0 < len(channels) <= MAX_CHANNELS:
        raise UserError(f"{shown(name)} has {len(channels)} channels")
    return rate, samples, len(channels)
