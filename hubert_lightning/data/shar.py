"""Corpora too large to be listed in memory: lhotse Shar, audio in tar archives, and a table of where each cut lies.

`hubert prepare shar` reads the archives' headers once and writes the table, 40 bytes or so a cut. It is mapped from
the disk, so a process holds the cuts that it is reading and no others, however many there are; the audio of a cut is
one read of one archive.
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
from lhotse import MonoCut, MultiCut, Recording
from lhotse.audio import AudioSource
from lhotse.cut import Cut
from rich.progress import track

from hubert_lightning.data.cut_rows import LONGEST, LONGEST_NAME, MOST_CHANNELS, RATES, rows_of
from hubert_lightning.errors import UserError
from hubert_lightning.files import kind_of, replacing_all
from hubert_lightning.frames import SAMPLE_RATE, WINDOW
from hubert_lightning.interrupts import thread_pool
from hubert_lightning.untrusted.array_file import mapped
from hubert_lightning.untrusted.json_file import is_text, parse_json, read_json, shown

SUFFIX = ".shar"
VERSION = 1
NUMBERS = {"samples": "i8", "channels": "i2", "archive": "i4", "offset": "i8", "size": "i8"}
"""Columns of a table besides the id."""
AGAIN = "make it with `hubert prepare shar`"
LARGEST = 2**20
"""Bytes of what an archive says of one recording."""
BLOCK = 2**20
"""Rows that are checked at once."""


def prepare_shar(shar: Path, out: Path) -> Path:
    """A folder of lhotse Shar (cuts.000000.jsonl.gz, recording.000000.tar, …) → `OUT/<its name>.shar`.

    Make one with `lhotse shar export`, from a manifest of `hubert prepare` or of your own. Audio is not decoded here,
    which lhotse did when it wrote the archives; transcripts are not taken over.

    Args:
        shar: the folder, which stays where it is
        out: where the table goes, which stands for the corpus in data.train
    """
    pairs = [(cuts, shar / cuts.name.replace("cuts.", "recording.").split(".jsonl")[0]) for cuts in _listings(shar)]
    pairs = [(cuts, archive.with_name(archive.name + ".tar")) for cuts, archive in pairs]
    if missing := [archive for _, archive in pairs if not archive.is_file()]:
        raise UserError(f"{missing[0]}: not there, but belongs to a cuts.*.jsonl.gz; export both again")
    with thread_pool() as pool:
        read = list(track(pool.map(_rows, *zip(*pairs, strict=True)), description="archives", total=len(pairs)))
    rows = [(*row[:3], number, *row[3:]) for number, of in enumerate(read) for row in of if row[1] >= WINDOW]
    if not rows:
        raise UserError(f"{shar}: no cut with audio in it; export it again, with recordings")
    table = np.array(rows, _layout(max(len(cut_id) for cut_id, *_ in rows)))
    ids = np.sort(table["id"])
    if len(same := ids[1:][ids[1:] == ids[:-1]]):
        raise UserError(f"{shar}: {same[0].decode()} is there twice; give each cut its own id and export it again")
    folder = out / (shar.resolve().name + SUFFIX)
    digest = hashlib.sha256(b"".join(b"%s\t%d\n" % (row["id"], row["samples"]) for row in table)).hexdigest()[:16]
    about = {
        "version": VERSION,
        "archives": [str(archive.resolve()) for _, archive in pairs],
        "bytes": [archive.stat().st_size for _, archive in pairs],
        "fingerprint": digest,
    }
    content = BytesIO()  # np.save into a file does not say why it failed
    np.save(content, table)
    with replacing_all(folder / "table.npy", folder / "corpus.json") as (rows_file, about_file):
        rows_file.write(content.getbuffer())
        about_file.write(json.dumps(about, indent=2).encode())
    hours = table["samples"].sum() / SAMPLE_RATE / 3600
    print(f"{folder}: {len(table)} utterances, {hours:.2f} h, in {len(pairs)} archives")
    if short := sum(map(len, read)) - len(table):
        print(f"{short} without audio, or shorter than a frame: left out")
    return folder


class SharCuts(Sequence[Cut]):
    """The cuts of a table that `hubert prepare shar` wrote, each made when it is asked for.

    Args:
        path: The table's folder.
        places: Which of its cuts; all if not given.

    Raises:
        UserError: The folder is no such table, or an archive is not as long as it was.
    """

    def __init__(self, path: Path, places: np.ndarray | None = None) -> None:
        self.path, self.places = Path(path), places
        listing, table = self.path / "corpus.json", self.path / "table.npy"
        if not listing.is_file() or not table.is_file():
            raise UserError(f"{path}: no table of a Shar corpus; {AGAIN}")
        about = read_json(listing, AGAIN)
        if isinstance(about, dict) and about.get("version") != VERSION:
            raise UserError(
                f"{path}: a table of version {shown(about.get('version'))}, not {VERSION}; prepare it again"
            )
        if not _is_listing(about):
            raise UserError(f"{listing}: no table of a Shar corpus (damaged, or not of this program); {AGAIN}")
        self.archives, self._bytes = about["archives"], about["bytes"]
        self._fingerprint = about["fingerprint"]
        try:
            self._table = mapped(table)
        except ValueError as error:
            raise UserError(f"{table}: cannot be read ({error}); {AGAIN}") from error
        if self._table.ndim != 1 or not len(self._table) or not _is_layout(self._table.dtype):
            raise UserError(f"{table}: {_described(self._table)} is no table of a Shar corpus; {AGAIN}")

    def __reduce__(self) -> tuple[type, tuple[Path, np.ndarray | None]]:
        return SharCuts, (self.path, self.places)  # another process maps the table itself

    def check(self) -> None:
        """Refuse archives that are not as `hubert prepare` read them, and rows that point outside of them.

        Raises:
            UserError: An archive is gone, no file, or not as long as it was, or a row has numbers that no cut has.
        """
        for archive, expected in zip(self.archives, self._bytes, strict=True):
            if not Path(archive).is_file():
                fact = kind_of(archive) if Path(archive).exists() else "not there"
                raise UserError(
                    f"{archive}: {fact}; mount or restore it, or `hubert prepare shar` again into the same folder"
                )
            if (found := Path(archive).stat().st_size) != expected:
                raise UserError(
                    f"{archive}: {found} bytes, {expected} when it was prepared; mount or restore it, or run `hubert "
                    "prepare shar` again"
                )
        for start in range(0, len(self._table), BLOCK):
            self._check_rows(start)

    def _check_rows(self, start: int) -> None:
        rows = self._table[start : start + BLOCK]
        archive = rows["archive"].astype(np.int64)
        inside = (archive >= 0) & (archive < len(self.archives))
        ends = np.array(self._bytes, np.int64)[np.where(inside, archive, 0)] - rows["offset"]  # bytes that follow
        sound = inside & (rows["offset"] >= 0) & (rows["size"] > 0) & (rows["size"] <= ends)
        sound &= (rows["samples"] >= WINDOW) & (rows["samples"] <= LONGEST * SAMPLE_RATE)
        sound &= (rows["channels"] > 0) & (rows["channels"] <= MOST_CHANNELS)
        if not sound.all():
            row = rows[int(np.argmin(sound))]
            numbers = ", ".join(f"{name} {row[name]}" for name in NUMBERS)
            raise UserError(
                f"{self.path / 'table.npy'}: row {start + int(np.argmin(sound))} points outside of its archive, or has "
                f"numbers that no cut has ({numbers}); {AGAIN}"
            )

    @property
    def fingerprint(self) -> str:
        """Names which audio this is about."""
        if self.places is None:
            return self._fingerprint
        return hashlib.sha256(self._fingerprint.encode() + self.places.tobytes()).hexdigest()[:16]

    @property
    def num_samples(self) -> np.ndarray:
        """Of each cut, at 16 kHz."""
        samples = self._table["samples"]
        return np.asarray(samples if self.places is None else samples[self.places])

    def ids(self) -> Iterator[str]:
        for start in range(0, len(self), 100_000):
            part = slice(start, start + 100_000)
            ids = self._table["id"][part if self.places is None else self.places[part]]
            for number, cut_id in enumerate(ids.tolist(), start):
                if not (name := cut_id.decode(errors="replace")) or "\ufffd" in name:
                    raise UserError(f"{self.path / 'table.npy'}: the id of row {number} is no text; {AGAIN}")
                yield name

    def chosen(self, places: np.ndarray) -> "SharCuts":
        """Some of the cuts, by their places among these."""
        some = copy(self)  # of the same table, which is mapped once
        some.places = places if self.places is None else self.places[places]
        return some

    def __len__(self) -> int:
        return len(self._table) if self.places is None else len(self.places)

    @overload
    def __getitem__(self, place: int) -> Cut: ...
    @overload
    def __getitem__(self, place: slice) -> "SharCuts": ...
    def __getitem__(self, place: int | slice) -> "Cut | SharCuts":
        if isinstance(place, slice):
            return self.chosen(np.arange(len(self))[place])
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        row = self._row(place)
        cut_id, samples, channels = row["id"].decode(), int(row["samples"]), list(range(int(row["channels"])))
        duration = samples / SAMPLE_RATE
        source = AudioSource("shar", channels, f"{self.archives[row['archive']]}:{row['offset']}:{row['size']}")
        recording = Recording(cut_id, [source], SAMPLE_RATE, samples, duration)
        if len(channels) == 1:
            return MonoCut(cut_id, 0.0, duration, 0, recording=recording)
        return MultiCut(cut_id, 0.0, duration, channels, recording=recording)

    def _row(self, place: int) -> np.void:
        return self._table[place if self.places is None else self.places[place]]


def _listings(shar: Path) -> list[Path]:
    found = sorted(shar.glob("cuts.*.jsonl*"))
    if not found:
        raise UserError(f"{shar}: no cuts.000000.jsonl.gz in it; make a Shar corpus with `lhotse shar export`")
    return found


def _layout(longest: int) -> np.dtype:
    return np.dtype([("id", f"S{longest}"), *NUMBERS.items()])


def _is_layout(dtype: np.dtype) -> bool:
    return (
        bool(dtype.names)
        and dtype["id"].kind == "S"
        and 0 < dtype["id"].itemsize <= LONGEST_NAME
        and (dtype == _layout(dtype["id"].itemsize))
    )


def _described(array: np.ndarray) -> str:
    return shown(f"an array of {array.dtype} of shape {array.shape}")[1:-1]


def _is_listing(about: Any) -> bool:
    """Whether JSON is what `prepare_shar` writes."""
    archives, sizes = (about.get(name) for name in ("archives", "bytes")) if isinstance(about, dict) else (None, None)
    return (
        isinstance(archives, list)
        and isinstance(sizes, list)
        and len(archives) == len(sizes) > 0
        and all(isinstance(path, str) and 0 < len(path) <= LONGEST_NAME and "\0" not in path for path in archives)
        and all(type(size) is int and 0 < size < 2**62 for size in sizes)
        and isinstance(about.get("fingerprint"), str)
    )


def _rows(cuts: Path, archive: Path) -> list[tuple[bytes, int, int, int, int]]:
    """id, samples at 16 kHz, channels, and where its file is, of each cut of an archive; 0 samples if it has none."""
    try:
        with _Archive(archive) as file, tarfile.open(fileobj=file, mode="r:") as members:
            found = list(_recordings(members, archive.stat().st_size))
            by_id = dict(found)
    except (tarfile.TarError, OSError, RecursionError, ValueError) as error:
        raise UserError(f"{archive}: not an archive of recordings ({error}); export it again, uncompressed") from error
    ids = _ids(cuts)
    if len(ids) != len(found):
        raise UserError(f"{cuts}: {len(ids)} cuts, but {len(found)} recordings in {archive.name}; export both again")
    if strangers := [cut_id for cut_id in ids if cut_id not in by_id]:
        raise UserError(
            f"{cuts}: {strangers[0]} is not in {archive.name}, whose files are named for their cuts, the first "
            f"{found[0][0]}; export both again"
        )
    rows = []
    for cut_id in ids:
        rate, samples, channels, offset, size = by_id[cut_id]
        rows.append((cut_id.encode(), samples * SAMPLE_RATE // rate, channels, offset, size))
    return rows


def _ids(cuts: Path) -> list[str]:
    """The id of each cut in a listing."""
    ids: list[str] = []
    try:
        for number, row in rows_of(cuts):
            cut_id = row.get("id") if isinstance(row, dict) else None
            if not isinstance(cut_id, str) or not 0 < len(cut_id) <= LONGEST_NAME or not is_text(cut_id):
                raise UserError(f"line {number}: the id is {shown(cut_id)}")
            ids.append(cut_id)
    except ValueError as error:
        said = str(error).removeprefix(f"{cuts}: ").split("; ")[0]
        raise UserError(f"{cuts}: no cuts of a Shar corpus ({said}); export it again") from error
    return ids


class _Archive(FileIO):
    """An archive of which no more is read at once than a recording's description has, whatever its headers say."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= LARGEST:
            raise UserError(f"a header of {size} bytes")
        return super().read(size) or b""


def _recordings(members: tarfile.TarFile, total: int) -> Iterable[tuple[str, tuple[int, int, int, int, int]]]:
    """Id of each cut → rate, samples and channels of its recording, where its file begins and how long it is."""
    data = None
    for member in members:
        if data is None:
            data = member
            continue
        cut_id = str(PurePosixPath(member.name).with_suffix(""))  # as lhotse names them
        if member.name.endswith(".json"):
            if member.size > LARGEST or not member.isreg() or member.issparse():
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
    """Sampling rate, samples and channels of a recording, as lhotse describes it."""
    about = about if isinstance(about, dict) else {}
    rate, samples, channels = about.get("sampling_rate"), about.get("num_samples"), about.get("channel_ids")
    if not channels and isinstance(about.get("sources"), list) and about["sources"]:
        source = about["sources"][0]
        channels = source.get("channels") if isinstance(source, dict) else None
    sound = type(rate) is int and RATES[0] <= rate <= RATES[1] and type(samples) is int
    if not sound or not 0 <= samples <= LONGEST * rate or not isinstance(channels, list):
        raise UserError(
            f"{shown(name)} has sampling_rate {shown(rate)}, num_samples {shown(samples)}, channels {shown(channels)}"
        )
    if not 0 < len(channels) <= MOST_CHANNELS:
        raise UserError(f"{shown(name)} has {len(channels)} channels")
    return rate, samples, len(channels)
