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
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import overload

import numpy as np
from lhotse import MonoCut, MultiCut, Recording
from lhotse.audio import AudioSource
from lhotse.cut import Cut
from lhotse.serialization import load_jsonl
from rich.progress import track

from hubert_lightning.files import replacing_all
from hubert_lightning.frames import SAMPLE_RATE, WINDOW
from hubert_lightning.interrupts import thread_pool

SUFFIX = ".shar"
VERSION = 1


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
        raise ValueError(f"{missing[0]}: not there, but belongs to a cuts.*.jsonl.gz; export both again")
    with thread_pool() as pool:
        read = list(track(pool.map(_rows, *zip(*pairs, strict=True)), description="archives", total=len(pairs)))
    rows = [(*row[:3], number, *row[3:]) for number, of in enumerate(read) for row in of if row[1] >= WINDOW]
    if not rows:
        raise ValueError(f"{shar}: no cut with audio in it; export it again, with recordings")
    table = np.array(rows, _layout(max(len(cut_id) for cut_id, *_ in rows)))
    ids = np.sort(table["id"])
    if len(same := ids[1:][ids[1:] == ids[:-1]]):
        raise ValueError(f"{shar}: {same[0].decode()} is there twice; give each cut its own id and export it again")
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
        ValueError: The folder is no such table, or an archive is not as long as it was.
    """

    def __init__(self, path: Path, places: np.ndarray | None = None) -> None:
        self.path, self.places = Path(path), places
        try:
            about = json.loads((self.path / "corpus.json").read_text())
            if about["version"] != VERSION:
                raise ValueError(f"{path}: a table of version {about['version']}, not {VERSION}; prepare it again")
            self.archives, self._bytes = about["archives"], about["bytes"]
            self._fingerprint = about["fingerprint"]
            self._table = np.load(self.path / "table.npy", mmap_mode="r")
        except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: no table of a Shar corpus; make it with `hubert prepare shar`") from error
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); mend that, and try again") from error

    def __reduce__(self) -> tuple[type, tuple[Path, np.ndarray | None]]:
        return SharCuts, (self.path, self.places)  # another process maps the table itself

    def check(self) -> None:
        """Raise `ValueError` if an archive is gone, or not as long as it was when `hubert prepare` read it."""
        for archive, expected in zip(self.archives, self._bytes, strict=True):
            if not Path(archive).is_file():
                raise ValueError(
                    f"{archive}: not there; mount or restore it, or `hubert prepare shar` again into the same folder"
                )
            if (found := Path(archive).stat().st_size) != expected:
                raise ValueError(
                    f"{archive}: {found} bytes, {expected} when it was prepared; mount or restore it, or run `hubert "
                    "prepare shar` again"
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
            yield from (cut_id.decode() for cut_id in ids.tolist())

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
        raise ValueError(f"{shar}: no cuts.000000.jsonl.gz in it; make a Shar corpus with `lhotse shar export`")
    return found


def _layout(longest: int) -> np.dtype:
    numbers = {"samples": "i8", "channels": "i2", "archive": "i4", "offset": "i8", "size": "i8"}
    return np.dtype([("id", f"S{longest}"), *numbers.items()])


def _rows(cuts: Path, archive: Path) -> list[tuple[bytes, int, int, int, int]]:
    """id, samples at 16 kHz, channels, and where its file is, of each cut of an archive; 0 samples if it has none."""
    try:
        with tarfile.open(archive, "r:") as members:
            found = list(_recordings(members))
            by_id = dict(found)
    except (tarfile.TarError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{archive}: not an archive of recordings ({error}); export it again, uncompressed") from error
    ids = [line["id"] for line in load_jsonl(cuts)]
    if len(ids) != len(found):
        raise ValueError(f"{cuts}: {len(ids)} cuts, but {len(found)} recordings in {archive.name}; export both again")
    if strangers := [cut_id for cut_id in ids if cut_id not in by_id]:
        raise ValueError(
            f"{cuts}: {strangers[0]} is not in {archive.name}, whose files are named for their cuts, the first "
            f"{found[0][0]}; export both again"
        )
    rows = []
    for cut_id in ids:
        rate, samples, channels, offset, size = by_id[cut_id]
        rows.append((cut_id.encode(), samples * SAMPLE_RATE // rate, channels, offset, size))
    return rows


def _recordings(members: tarfile.TarFile) -> Iterable[tuple[str, tuple[int, int, int, int, int]]]:
    """Id of each cut → rate, samples and channels of its recording, where its file begins and how long it is."""
    data = None
    for member in members:
        if data is None:
            data = member
            continue
        cut_id = str(PurePosixPath(member.name).with_suffix(""))  # as lhotse names them
        if member.name.endswith(".json"):
            file = members.extractfile(member)
            assert file is not None
            about = json.load(file)
            channels = about.get("channel_ids") or about["sources"][0]["channels"]
            yield cut_id, (about["sampling_rate"], about["num_samples"], len(channels), data.offset_data, data.size)
        else:
            yield cut_id, (SAMPLE_RATE, 0, 1, 0, 0)  # a cut without a recording
        data = None
