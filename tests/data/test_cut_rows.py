"""Manifests, Shar corpora and label stores of others: a sentence for each, before the first step, at no cost."""

import gzip
import io
import json
import os
import re
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, export_shar, write_store
from lhotse import CutSet, serialization

from hubert_lightning.cli import main
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.corpora import read_corpora
from hubert_lightning.data.manifest import check_audio, read_manifest, write_manifest
from hubert_lightning.data.shar import SharCuts, prepare_shar
from hubert_lightning.units.label_shards import LabelSource
from hubert_lightning.units.label_store import LabelStore

HUGE = 10**30


def row_of(cuts: CutSet) -> dict[str, Any]:
    [first, *_] = cuts
    return json.loads(json.dumps(first.to_dict()))


def put(content: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    """The same row with another value at a place such as recording.sources.0.type."""
    inner: Any = content
    *parts, last = [int(part) if part.isdigit() else part for part in where.split(".")]
    for part in parts:
        inner = inner[part]
    inner[last] = value
    return content


@pytest.mark.parametrize("place", ["id", "recording.id", "supervisions.0.id", "recording.sources.0.source"])
@pytest.mark.parametrize("value", [None, 3, "", [], {}, "a\0b", "\ud800", "x" * 10_000])
def test_a_name_is_a_text(train_cuts: CutSet, tmp_path: Path, place: str, value: Any) -> None:
    assert place.rpartition(".")[2] in refused(tmp_path, put(row_of(train_cuts), place, value))


@pytest.mark.parametrize(
    "place", ["start", "duration", "recording.duration", "recording.num_samples", "recording.sampling_rate"]
)
@pytest.mark.parametrize("value", [None, "1", [], True, -1, HUGE, 1e12, float("nan"), float("inf")])
def test_impossible_numbers_of_a_recording_are_refused(
    train_cuts: CutSet, tmp_path: Path, place: str, value: Any
) -> None:
    sentence = refused(tmp_path, put(row_of(train_cuts), place, value))
    assert place.rpartition(".")[2] in sentence or "is not a JSON number" in sentence


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ("duration", 0, "duration 0.0 s"),
        ("recording.sampling_rate", 0, "sampling_rate is 0"),
        ("recording.num_samples", 5, "has 5 samples at 16000 Hz"),
        ("start", 3600, "of a recording of"),
        ("channel", None, "has channel None"),
        ("channel", 7, "has channel 7 of a recording with"),
        ("channel", [], "has channel"),
        ("recording", None, "has no recording"),
        ("recording.sources", None, "sources are None"),
        ("recording.sources", [], "sources are"),
        ("recording.sources", [[]], "a source is"),
        ("recording.sources.0.channels", None, "channels are None"),
        ("recording.sources.0.channels", [0] * 2000, "channels are"),
        ("recording.sources.0.channels", [[0]], "channels are"),
        ("recording.transforms", [{"name": "Speed", "kwargs": {"factor": 2}}], "'Speed' is not applied"),
        ("recording.transforms", [3], "transforms are"),
        ("recording.sources.0.type", "command", "audio of type 'command' is not read here"),
        ("recording.sources.0.type", "url", "audio of type 'url' is not read here"),
        ("recording.sources.0.type", "memory", "audio of type 'memory' is not read here"),
        ("recording.sources.0.type", ["file"], "audio of type"),
        ("recording.sources.0.type", "shar", "is not a part of a Shar archive"),
        ("supervisions", 3, "supervisions are 3"),
        ("supervisions", [3], "a supervision is 3"),
        ("supervisions.0.text", 3, "text is 3"),
        ("supervisions.0.speaker", {}, "speaker is"),
        ("supervisions.0.text", "A" * 10**6, "text is 'AAA"),
        ("supervisions.0.text", "e" + "\u0301\u0323" * 10**4, "more than 100 marks on one letter"),
        ("supervisions.0.alignment", {"phone": [3]}, "an alignment has 3"),
        ("supervisions.0.alignment", {"phone": [["a", float("nan"), 1]]}, "NaN"),
        ("custom", 3, "custom is 3"),
        ("custom", {"bytes": -1}, "custom has bytes -1"),
        ("custom", {"bytes": "a"}, "custom has bytes 'a'"),
        ("type", "MixedCut", "lhotse makes nothing of it|no cuts"),
        ("more", {"a": 1}, "lhotse makes nothing of it"),
    ],
)
def test_impossible_values_of_a_cut_are_refused(
    train_cuts: CutSet, tmp_path: Path, place: str, value: Any, reason: str
) -> None:
    assert re.search(reason, refused(tmp_path, put(row_of(train_cuts), place, value)))


def refused(folder: Path, row: Any) -> str:
    """The sentence that a manifest with this row is refused with."""
    path = folder / "others.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"; ") as refusal:
        check_audio(read_manifest(path))
    sentence = str(refusal.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    assert len(sentence) < 500
    return sentence


@pytest.mark.parametrize("line", ["", "3", "null", "[]", '"x"', "{}", "[" * 100_000, '{"a":1,"a":2}', "\x00", "{"])
def test_a_line_that_is_no_cut_is_refused(train_cuts: CutSet, tmp_path: Path, line: str) -> None:
    path = tmp_path / "others.jsonl"
    path.write_text(json.dumps(row_of(train_cuts)) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"others\.jsonl: (not a cut manifest \(line 2: |holds a )"):
        read_manifest(path)


@pytest.mark.parametrize("bomb", ["one line", "lines", "distinct lines"])
def test_a_manifest_that_unpacks_without_end_is_refused(train_cuts: CutSet, tmp_path: Path, bomb: str) -> None:
    path = tmp_path / "others.jsonl.gz"
    row = row_of(train_cuts)
    with gzip.open(path, "wt") as file:
        if bomb == "one line":
            for _ in range(40):
                file.write(" " * 2**20)
        for number in range(5_000 if bomb != "one line" else 0):
            file.write(
                json.dumps(row | ({"id": str(number)} if bomb == "distinct lines" else {}))
                + " " * 20_000
                + "\n"  # the window of gzip reaches the row before
            )
    with pytest.raises(ValueError, match=r"not a cut manifest|again in|times as large as its file"):
        read_manifest(path)


@pytest.fixture
def odd(tmp_path: Path) -> dict[str, Path]:
    """What is no file of audio, by its name in sentences."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # the address of a socket is short
        server.bind("socket")
    (tmp_path / "folder").mkdir()
    names = {"a pipe": "pipe", "a socket": "socket", "a folder": "folder"}
    return {kind: tmp_path / name for kind, name in names.items()} | {"a device": Path("/dev/zero")}


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a folder", "a device"])
@pytest.mark.parametrize("way", ["file", "shar", "link"])
def test_a_source_that_is_no_file_is_refused(
    train_cuts: CutSet, tmp_path: Path, odd: dict[str, Path], kind: str, way: str
) -> None:
    path = odd[kind]
    if way == "link":
        path = tmp_path / "link.wav"
        path.symlink_to(odd[kind])
    source = {"type": "shar", "source": f"{path}:0:100"} if way == "shar" else {"type": "file", "source": str(path)}
    row = put(row_of(train_cuts), "recording.sources.0", source | {"channels": [0]})
    (tmp_path / "others.jsonl").write_text(json.dumps(row) + "\n")
    cuts = read_manifest(tmp_path / "others.jsonl")
    with pytest.raises(ValueError, match=rf"{path} is {kind}, not an audio file; run `hubert prepare` again"):
        check_audio(cuts)
    with pytest.raises(ValueError, match=f"cannot be read .it is {kind}"):
        read_waveform(next(iter(cuts)))


@pytest.mark.parametrize(
    "source", ["/dev/zero:0:-1", "{}:0:1000000000000", "{}:-5:10", "{}:1000000000:1", "{}:a:b", "{}:0"]
)
def test_a_recording_outside_its_archive_is_refused(train_cuts: CutSet, tmp_path: Path, source: str) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(1000))
    row = put(row_of(train_cuts), "recording.sources.0.type", "shar")
    row = put(row, "recording.sources.0.source", source.format(tmp_path / "a.tar"))
    (tmp_path / "others.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"is not a part of a Shar archive|1000 bytes, and its audio ends at byte"):
        check_audio(read_manifest(tmp_path / "others.jsonl"))


@pytest.mark.parametrize("kind", ["command", "url"])
@pytest.mark.parametrize("config", ["pretrain", "finetune"])
def test_no_fit_runs_a_command_or_fetches_a_url(
    train_cuts: CutSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, config: str
) -> None:
    place = f"touch {tmp_path / 'ran'}" if kind == "command" else "http://127.0.0.1:9/a.wav"
    row = put(row_of(train_cuts), "recording.sources.0", {"type": kind, "source": place, "channels": [0]})
    (tmp_path / "others.jsonl").write_text(json.dumps(row) + "\n")
    manifest = f"[{tmp_path / 'others.jsonl'}]"
    pretrain, finetune = ("demo.yaml", "smoke.yaml"), ("finetune/small.yaml", "smoke-finetune.yaml")
    files = pretrain if config == "pretrain" else finetune
    command = ["fit", "--config", str(ROOT / "configs" / files[0]), "--config", str(ROOT / "tests" / files[1])]
    data = [f"--data.init_args.{part}={manifest}" for part in ("train", "validation")]
    with pytest.raises(SystemExit) as end:
        main([*command, *data, f"--output={tmp_path / 'run'}"])
    assert end.value.code == 2
    assert f"audio of type '{kind}' is not read here" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def retarred(archive: Path, change: Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes]]) -> None:
    """An archive whose members are written anew."""
    with tarfile.open(archive) as before:
        members = [(member, before.extractfile(member).read()) for member in before]  # type: ignore[union-attr]
    with tarfile.open(archive, "w") as after:
        for member, content in members:
            changed, new = change(member, content)
            changed.size = len(new)
            after.addfile(changed, io.BytesIO(new))


ODD_DESCRIPTIONS = [
    ({"sampling_rate": 0}, "sampling_rate 0"),
    ({"sampling_rate": None}, "sampling_rate None"),
    ({"num_samples": -1}, "num_samples -1"),
    ({"num_samples": 10**18}, "num_samples 1000000000000000000"),
    ({"channel_ids": None, "sources": None}, "channels None"),
    ({"channel_ids": None, "sources": [3]}, "channels None"),
    ({"channel_ids": list(range(5000))}, "5000 channels"),
]


@pytest.mark.parametrize(("change", "reason"), ODD_DESCRIPTIONS)
def test_a_description_in_an_archive_has_usual_numbers(
    train_cuts: CutSet, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    shar = export_shar(train_cuts.subset(first=3), tmp_path / "shar")

    def changed(member: tarfile.TarInfo, content: bytes) -> tuple[tarfile.TarInfo, bytes]:
        if member.name.endswith(".json"):
            content = json.dumps(json.loads(content) | change).encode()
        return member, content

    retarred(shar / "recording.000000.tar", changed)
    with pytest.raises(ValueError, match=rf"recording\.000000\.tar: not an archive of recordings \(.*{reason}"):
        prepare_shar(shar, tmp_path / "out")


@pytest.mark.parametrize("way", ["description", "long name", "truncated"])
def test_an_archive_that_claims_gigabytes_costs_nothing(train_cuts: CutSet, tmp_path: Path, way: str) -> None:
    shar = export_shar(train_cuts.subset(first=3), tmp_path / "shar")
    archive = shar / "recording.000000.tar"
    with tarfile.open(archive) as members:
        first, described = members.getmembers()[:2]
    at = described.offset if way == "description" else first.offset
    member = tarfile.TarInfo(described.name if way == "description" else "././@LongLink")
    member.type, member.size = (tarfile.REGTYPE if way == "description" else tarfile.GNUTYPE_LONGNAME), 6 * 2**30
    with archive.open("r+b") as file:
        file.seek(at)
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(7 * 2**30 if way != "truncated" else archive.stat().st_size)
    with pytest.raises(ValueError, match=r"recording\.000000\.tar: not an archive|cuts, but \d+ recordings"):
        prepare_shar(shar, tmp_path / "out")


@pytest.mark.parametrize("content", ["[]", "3\n", '{"id": 3}', '{"id": null}', "{", '{"id": "\\ud800"}', "[" * 10**5])
def test_a_listing_of_no_cuts_is_refused(train_cuts: CutSet, tmp_path: Path, content: str) -> None:
    shar = export_shar(train_cuts.subset(first=3), tmp_path / "shar")
    with gzip.open(shar / "cuts.000000.jsonl.gz", "wt") as file:
        file.write(content)
    with pytest.raises(ValueError, match=r"cuts\.000000\.jsonl\.gz: no cuts of a Shar corpus \(.*; export it again"):
        prepare_shar(shar, tmp_path / "out")


@pytest.fixture(scope="module")
def table(train_cuts: CutSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shar")
    return prepare_shar(export_shar(train_cuts, folder / "train"), folder / "manifests")


def copied(table: Path, folder: Path) -> Path:
    new = folder / table.name
    new.mkdir()
    for file in table.iterdir():
        (new / file.name).write_bytes(file.read_bytes())
    return new


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("samples", -1),
        ("samples", 0),
        ("samples", 2**62),
        ("channels", 0),
        ("channels", -1),
        ("archive", -1),
        ("archive", 1000),
        ("offset", -1),
        ("offset", 2**62),
        ("size", -1),
        ("size", 0),
        ("size", 2**40),
        ("id", b"\xff"),
        ("id", b""),
    ],
)
def test_a_row_of_a_table_points_into_its_archive(table: Path, tmp_path: Path, name: str, value: Any) -> None:
    new = copied(table, tmp_path)
    rows = np.load(new / "table.npy")
    rows[name][3] = value
    np.save(new / "table.npy", rows)
    with pytest.raises(
        ValueError, match=r"table\.npy: (row 3 points outside of its archive|the id of row 3 is not text)"
    ):
        list(read_corpora([new]).ids())


def save_objects(path: Path) -> None:
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    "write",
    [
        save_objects,
        lambda path: np.save(path, np.zeros(3)),
        lambda path: np.save(path, np.zeros((3, 3), dtype=[("id", "S3")])),
        lambda path: np.savez(path.open("wb"), np.zeros(3)),
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x80\x04K\x01."),
        lambda path: path.write_bytes(path.read_bytes().replace(b"'<i8'", b"'|O8'")),
        lambda path: path.unlink(),
    ],
)
def test_a_corrupt_table_is_refused(table: Path, tmp_path: Path, write: Callable[[Path], object]) -> None:
    new = copied(table, tmp_path)
    write(new / "table.npy")
    with pytest.raises(ValueError, match="make it with `hubert prepare shar`"):
        SharCuts(new)


@pytest.mark.parametrize(
    "change",
    [
        {"archives": None},
        {"archives": []},
        {"archives": [3]},
        {"archives": ["a\0"]},
        {"bytes": None},
        {"bytes": ["a"]},
        {"bytes": [1]},
        {"bytes": [-1]},
        {"fingerprint": 3},
        {"version": "1"},
        {"version": None},
    ],
)
def test_a_listing_of_a_table_has_its_types(table: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    new = copied(table, tmp_path)
    about = json.loads((new / "corpus.json").read_text())
    (new / "corpus.json").write_text(json.dumps(about | change))
    with pytest.raises(ValueError, match=r"no table of a Shar corpus|a table of version"):
        SharCuts(new)


def a_store(cuts: CutSet, folder: Path) -> Path:
    from hubert_lightning.frames import num_frames

    source = LabelSource("mfcc", "k", "m", (10,))
    rng = np.random.default_rng(0)
    labels = {cut.id: rng.integers(0, 10, (1, num_frames(cut.num_samples))) for cut in cuts}
    return write_store(folder, source, labels).path


@pytest.mark.parametrize(
    "change",
    [
        {"bytes": None},
        {"bytes": ["a"]},
        {"bytes": []},
        {"checksums": [None]},
        {"checksums": []},
        {"histogram": 3},
        {"histogram": [[0] * 10]},
        {"histogram": [["a"] * 10]},
        {"histogram": [[1]]},
        {"clusters": []},
        {"clusters": [0]},
        {"clusters": ["10"]},
        {"clusters": [10**9]},
        {"hop": 0},
        {"hop": "320"},
        {"hop": -1},
        {"features": None},
        {"index_checksum": "a"},
    ],
)
def test_a_store_of_labels_has_its_types(train_cuts: CutSet, tmp_path: Path, change: dict[str, Any]) -> None:
    store = a_store(train_cuts, tmp_path / "store")
    about = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps(about | change))
    with pytest.raises(ValueError, match=r"store\.json is corrupt, or of another version; remove that folder"):
        LabelStore(store)


@pytest.mark.parametrize("place", [(2, 0), (3, 1)])
@pytest.mark.parametrize("value", [2**64 - 1, 2**40, 2**32 - 1])
def test_an_index_points_into_its_labels(
    train_cuts: CutSet, tmp_path: Path, place: tuple[int, int], value: int
) -> None:
    from zlib import crc32

    store = a_store(train_cuts, tmp_path / "store")
    index = np.load(store / "index.npy")
    index[place] = value
    np.save(store / "index.npy", index)
    about = json.loads((store / "store.json").read_text()) | {"index_checksum": crc32(index.tobytes())}
    (store / "store.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"index\.npy: points outside of the labels; remove .*store and relabel"):
        LabelStore(store).verify()


def test_a_label_beyond_the_clusters_is_refused(train_cuts: CutSet, tmp_path: Path) -> None:
    store = a_store(train_cuts, tmp_path / "store")
    about = json.loads((store / "store.json").read_text())
    about |= {"clusters": [5], "histogram": [about["histogram"][0][:5]]}
    (store / "store.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"00000\.npy: a label of 9 for 5 clusters; remove .*store and relabel"):
        LabelStore(store).verify()


def test_a_manifest_of_hubert_prepare_passes_the_checks(train_cuts: CutSet, tmp_path: Path) -> None:
    write_manifest(train_cuts, tmp_path / "ours.jsonl.gz")
    assert list(read_manifest(tmp_path / "ours.jsonl.gz")) == list(train_cuts)


def test_lhotse_has_its_undocumented_reader_of_rows() -> None:
    assert hasattr(serialization, "deserialize_item"), (
        "lhotse has moved serialization.deserialize_item, which is in no documentation; data/cut_rows.py makes cuts of "
        "rows with it, so call its new name there"
    )
