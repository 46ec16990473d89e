import gzip
import json
import lzma
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import write_store
from lhotse import CutSet

from hubert_lightning.data.manifest import write_manifest
from hubert_lightning.frames import num_frames
from hubert_lightning.units.label_shards import LabelSource
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.label_text import export_labels, import_labels


@pytest.fixture(scope="module")
def labels(dev_cuts: CutSet) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {cut.id: rng.integers([[50], [7]], size=(2, num_frames(cut.num_samples))) for cut in dev_cuts}


@pytest.fixture
def store(labels: dict[str, np.ndarray], tmp_path: Path) -> Path:
    source = LabelSource("mfcc", "k", "m", (50, 7))
    return write_store(tmp_path / "store", source, dict(sorted(labels.items()))).path


@pytest.mark.parametrize("name", ["units.km", "units.txt", "units.jsonl"])
def test_labels_come_back_from_every_format(
    name: str, store: Path, manifests: Path, labels: dict[str, np.ndarray], tmp_path: Path
) -> None:
    manifest = [manifests / "dev.jsonl.gz"]
    files = export_labels(store, manifest, tmp_path / name)
    assert len(files) == (1 if name.endswith("jsonl") else 2)
    again = import_labels(files, manifest, tmp_path / "again", [50, 7])
    again.verify()
    for cut_id, expected in labels.items():
        np.testing.assert_array_equal(again[cut_id], expected)
    assert again.source.features == "imported"


def test_km_is_what_fairseq_reads(
    store: Path, manifests: Path, labels: dict[str, np.ndarray], dev_cuts: CutSet, tmp_path: Path
) -> None:
    first, second = export_labels(store, [manifests / "dev.jsonl.gz"], tmp_path / "dev.km")
    assert (first.name, second.name) == ("dev.0.km", "dev.1.km")
    root, *rows = (tmp_path / "dev.tsv").read_text().splitlines()
    for cut, row, line in zip(dev_cuts, rows, first.read_text().splitlines(), strict=True):
        path, samples = row.split("\t")
        assert (Path(root) / path).samefile(cut.recording.sources[0].source)
        assert int(samples) == cut.num_samples
        assert [int(word) for word in line.split()] == labels[cut.id][0].tolist()


def test_pieces_of_a_recording_have_no_place_in_a_tsv(
    store: Path, dev_cuts: CutSet, labels: dict[str, np.ndarray], tmp_path: Path
) -> None:
    first = next(iter(dev_cuts))
    piece = first.truncate(offset=0.5, preserve_id=True)
    write_manifest([piece], tmp_path / "pieces.jsonl.gz")
    source = LabelSource("mfcc", "k", "m", (7,))
    write_store(tmp_path / "pieces", source, {piece.id: np.arange(num_frames(piece.num_samples))[None] % 7})
    with pytest.raises(ValueError, match=r"a piece of a longer recording, .* export to \.jsonl"):
        export_labels(tmp_path / "pieces", [tmp_path / "pieces.jsonl.gz"], tmp_path / "pieces.km")


def test_of_labels_at_100_a_second_every_other_is_kept(
    manifests: Path, labels: dict[str, np.ndarray], tmp_path: Path
) -> None:
    lines = [" ".join([cut_id, *(f"{label} 49" for label in of[0])]) for cut_id, of in labels.items()]
    (tmp_path / "mfcc.txt").write_text("\n".join(lines) + "\n")
    store = import_labels([tmp_path / "mfcc.txt"], [manifests / "dev.jsonl.gz"], tmp_path / "store", [50], hop=160)
    for cut_id, of in labels.items():
        np.testing.assert_array_equal(store[cut_id][0], of[0])


def shortened(lines: list[str]) -> list[str]:
    return [lines[0].rsplit(" ", 1)[0], *lines[1:]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (shortened, r"labels in 1 streams for \d+ frames in 1; .*units.txt was made for other audio"),
        (lambda lines: lines[1:], "no labels in"),
        (lambda lines: [*lines, "somebody 1 2"], "somebody is not in the manifest, or is repeated"),
        (lambda lines: [*lines, lines[0]], "is not in the manifest, or is repeated"),
        (lambda lines: [lines[0] + "x", *lines[1:]], "line 1: a word is not a cluster"),
        (lambda lines: [lines[0] + "9" * 30, *lines[1:]], "line 1: a word is not a cluster"),
        (lambda lines: [lines[0].rsplit(" ", 1)[0] + " 50", *lines[1:]], "labels from .* to 50 for 50 clusters"),
    ],
)
def test_labels_that_do_not_fit_are_refused_by_name(
    change: Callable[[list[str]], list[str]],
    sentence: str,
    manifests: Path,
    labels: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    lines = [" ".join([cut_id, *map(str, of[0])]) for cut_id, of in labels.items()]
    (tmp_path / "units.txt").write_text("\n".join(change(lines)) + "\n")
    with pytest.raises(ValueError, match=sentence):
        import_labels([tmp_path / "units.txt"], [manifests / "dev.jsonl.gz"], tmp_path / "store", [50])
    with pytest.raises(ValueError, match="no finished label store"):
        LabelStore(tmp_path / "store")


def test_km_of_another_number_of_lines_is_refused(store: Path, manifests: Path, tmp_path: Path) -> None:
    files = export_labels(store, [manifests / "dev.jsonl.gz"], tmp_path / "dev.km")
    for file in files:
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"dev\.0\.km: not as many lines as the manifest.s utterances"):
        import_labels(files, [manifests / "dev.jsonl.gz"], tmp_path / "again", [50, 7])


@pytest.mark.parametrize("clusters", [[1, 2], [[1.5, 2.0]], [["a"]], 3])
def test_json_that_lists_no_streams_of_integers_is_named(clusters: object, manifests: Path, tmp_path: Path) -> None:
    (tmp_path / "units.jsonl").write_text(json.dumps({"id": "x", "clusters": clusters}) + "\n")
    with pytest.raises(ValueError, match=r'units\.jsonl, line 1: "clusters" is not a list of integers for each stream'):
        import_labels([tmp_path / "units.jsonl"], [manifests / "dev.jsonl.gz"], tmp_path / "store", [50])


def test_import_leaves_a_folder_alone_that_holds_something_else(manifests: Path, tmp_path: Path) -> None:
    (tmp_path / "units.km").write_text("1\n")
    (tmp_path / "10h.jsonl.gz").write_text("mine")
    with pytest.raises(ValueError, match="holds files that are not labels; choose another folder"):
        import_labels([tmp_path / "units.km"], [manifests / "dev.jsonl.gz"], tmp_path, [50])
    assert (tmp_path / "10h.jsonl.gz").read_text() == "mine"


def test_more_clusters_than_16_bits_name_are_refused(manifests: Path, tmp_path: Path) -> None:
    (tmp_path / "units.km").write_text("1\n")
    with pytest.raises(ValueError, match=r"clusters \[70000\]: each K-means has from 2 to 65536"):
        import_labels([tmp_path / "units.km"], [manifests / "dev.jsonl.gz"], tmp_path / "store", [70_000])


def test_damaged_labels_are_not_exported(store: Path, manifests: Path, tmp_path: Path) -> None:
    shard = store / "00000.npy"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\xff\xff")
    with pytest.raises(ValueError, match=r"00000\.npy: corrupt"):
        export_labels(store, [manifests / "dev.jsonl.gz"], tmp_path / "units.jsonl")
    assert not (tmp_path / "units.jsonl").exists()


def test_utterances_without_labels_are_left_out_and_counted(
    store: Path, manifests: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = [manifests / "train.jsonl.gz", manifests / "dev.jsonl.gz"]
    export_labels(store, both, tmp_path / "units.km")
    export_labels(store, both[1:], tmp_path / "dev.km")
    for stream in range(2):
        assert (tmp_path / f"units.{stream}.km").read_text() == (tmp_path / f"dev.{stream}.km").read_text()
    assert (tmp_path / "units.tsv").read_text() == (tmp_path / "dev.tsv").read_text()
    assert "utterances have no labels in" in caplog.text
    with pytest.raises(ValueError, match="made for another manifest"):
        export_labels(store, both[:1], tmp_path / "train.km")


def test_kaldi_has_no_ids_with_spaces(labels: dict[str, np.ndarray], dev_cuts: CutSet, tmp_path: Path) -> None:
    [cut, *_] = dev_cuts
    source = LabelSource("mfcc", "k", "m", (50, 7))
    write_store(tmp_path / "store", source, {"my talk.wav": labels[cut.id]})
    write_manifest([cut.with_id("my talk.wav")], tmp_path / "talks.jsonl.gz")
    with pytest.raises(
        ValueError, match=r"my talk\.wav: Kaldi's text cannot hold an id with spaces; export to \.jsonl"
    ):
        export_labels(tmp_path / "store", [tmp_path / "talks.jsonl.gz"], tmp_path / "units.txt")


def test_a_damaged_line_of_json_is_named(manifests: Path, tmp_path: Path) -> None:
    (tmp_path / "units.jsonl").write_text(json.dumps({"id": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"units\.jsonl, line 1: no .id. that is a string, or no .clusters.; correct"):
        import_labels([tmp_path / "units.jsonl"], [manifests / "dev.jsonl.gz"], tmp_path / "store", [50])


@pytest.mark.parametrize(
    ("name", "hop", "sentence"),
    [("a.csv", 320, "no format"), ("a.km", 320, "a.km: no such file; correct the path"), ("b.km", 441, "hop 441")],
)
def test_what_cannot_be_imported_is_refused(
    name: str, hop: int, sentence: str, manifests: Path, tmp_path: Path
) -> None:
    (tmp_path / "b.km").write_text("1\n")
    with pytest.raises(ValueError, match=sentence):
        import_labels([tmp_path / name], [manifests / "dev.jsonl.gz"], tmp_path / "store", [50], hop)


# A .km has no names; the .tsv beside it has


def reordered(files: list[Path], tsv: Path, order: list[int]) -> None:
    """The utterances of fairseq's files in another order, each line with its row."""
    for file in [*files, tsv]:
        head, lines = ([], file.read_text().splitlines()) if file.suffix == ".km" else ([], [])
        if file.suffix == ".tsv":
            first, *lines = file.read_text().splitlines()
            head = [first]
        file.write_text("\n".join([*head, *(lines[place] for place in order)]) + "\n")


@pytest.fixture
def of_fairseq(store: Path, manifests: Path, tmp_path: Path, labels: dict[str, np.ndarray]) -> list[Path]:
    """dev.0.km, dev.1.km and dev.tsv in an order that is not the manifest's."""
    files = export_labels(store, [manifests / "dev.jsonl.gz"], tmp_path / "dev.km")
    order = np.random.default_rng(1).permutation(len(labels)).tolist()
    assert order != sorted(order)
    reordered(files, tmp_path / "dev.tsv", order)
    return files


def assert_same(store: LabelStore, labels: dict[str, np.ndarray]) -> None:
    for cut_id, expected in labels.items():
        np.testing.assert_array_equal(store[cut_id], expected)


def test_lines_of_km_belong_to_the_rows_of_the_tsv_beside_it(
    of_fairseq: list[Path],
    manifests: Path,
    tmp_path: Path,
    labels: dict[str, np.ndarray],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert_same(import_labels(of_fairseq, [manifests / "dev.jsonl.gz"], tmp_path / "again", [50, 7]), labels)
    assert "in the order of the manifest" not in caplog.text


def test_utterances_of_one_length_get_their_own_labels(
    dev_cuts: CutSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing but the names tells them apart."""
    [first, *_] = dev_cuts
    frames = num_frames(first.num_samples)
    cuts = []
    for name in ("a", "b", "c"):
        [source] = first.recording.sources
        recording = replace(first.recording, id=name, sources=[replace(source, source=f"/corpus/{name}.flac")])
        cuts.append(replace(first, id=name, recording=recording, supervisions=[]))
    write_manifest(cuts, tmp_path / "three.jsonl.gz")
    lines = {name: " ".join([str(label)] * frames) for label, name in enumerate("abc")}
    (tmp_path / "three.km").write_text("".join(lines[name] + "\n" for name in "cab"))
    rows = [f"somewhere/{name}.wav\t{first.num_samples}" for name in "cab"]
    (tmp_path / "three.tsv").write_text("\n".join(["/moved", *rows]) + "\n")
    by_name = import_labels([tmp_path / "three.km"], [tmp_path / "three.jsonl.gz"], tmp_path / "by name", [50])
    assert [by_name[name][0, 0] for name in "abc"] == [0, 1, 2]
    (tmp_path / "three.tsv").unlink()
    assert not caplog.text
    in_order = import_labels([tmp_path / "three.km"], [tmp_path / "three.jsonl.gz"], tmp_path / "in order", [50])
    assert [in_order[name][0, 0] for name in "abc"] == [2, 0, 1]
    assert "no three.tsv beside it names the utterance of each line" in caplog.text
    assert in_order.source.kmeans != by_name.source.kmeans  # they are not the same labels


@pytest.mark.parametrize(("of_manifest", "of_tsv"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_the_same_in_any_normal_form(dev_cuts: CutSet, tmp_path: Path, of_manifest: str, of_tsv: str) -> None:
    """macOS has decomposed ones."""
    [first, *_] = dev_cuts
    [source] = first.recording.sources
    cuts = []
    for name in ("é/ü", "e/u"):
        written = unicodedata.normalize(of_manifest, name)
        recording = replace(first.recording, id=written, sources=[replace(source, source=f"/corpus/{written}.flac")])
        cuts.append(replace(first, id=written, recording=recording, supervisions=[]))
    write_manifest(cuts, tmp_path / "two.jsonl.gz")
    frames = num_frames(first.num_samples)
    (tmp_path / "two.km").write_text("".join(" ".join([label] * frames) + "\n" for label in "01"))
    rows = [unicodedata.normalize(of_tsv, f"{name}.flac\t{first.num_samples}") for name in ("e/u", "é/ü")]
    (tmp_path / "two.tsv").write_text("\n".join(["/corpus", *rows]) + "\n")
    store = import_labels([tmp_path / "two.km"], [tmp_path / "two.jsonl.gz"], tmp_path / "store", [50])
    assert [store[cut.id][0, 0] for cut in cuts] == [1, 0]


def test_names_in_both_normal_forms_are_told_apart(dev_cuts: CutSet, tmp_path: Path) -> None:
    [first, *_] = dev_cuts
    [source] = first.recording.sources
    names = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    recordings = [replace(first.recording, id=of, sources=[replace(source, source=f"/{of}.flac")]) for of in names]
    pairs = zip(names, recordings, strict=True)
    write_manifest(
        [replace(first, id=of, recording=it, supervisions=[]) for of, it in pairs], tmp_path / "two.jsonl.gz"
    )
    frames = num_frames(first.num_samples)
    (tmp_path / "two.km").write_text("".join(" ".join([label] * frames) + "\n" for label in "01"))
    (tmp_path / "two.tsv").write_text("".join(["/\n", *(f"{of}.flac\t{first.num_samples}\n" for of in names)]))
    store = import_labels([tmp_path / "two.km"], [tmp_path / "two.jsonl.gz"], tmp_path / "store", [50])
    assert [store[of][0, 0] for of in names] == [0, 1]


def changed_row(line: int, change: Callable[[str], str]) -> Callable[[list[str]], list[str]]:
    return lambda rows: [change(row) if number == line else row for number, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: rows[:-1], r"dev\.0\.km: not as many lines as the manifest's utterances in dev.tsv"),
        (changed_row(2, lambda row: "other/" + "x" + row.split("/")[-1]), "line 3: .* is not in the manifest"),
        (lambda rows: [*rows[:-1], rows[1]], "is .*, as line 2 is; keep one row per utterance"),
        (
            changed_row(1, lambda row: row.split("\t")[0] + "\t77777"),
            "line 2: .* has 77777 samples, and .* at 16000 Hz",
        ),
        (changed_row(1, lambda row: row.split("\t")[0]), "line 2: no path, tab and number of samples"),
        (lambda rows: [], "not as many lines as the manifest's utterances in dev.tsv"),
    ],
)
def test_a_tsv_of_something_else_is_refused_before_labels_are_taken(
    change: Callable[[list[str]], list[str]], sentence: str, of_fairseq: list[Path], manifests: Path, tmp_path: Path
) -> None:
    tsv = tmp_path / "dev.tsv"
    tsv.write_text("\n".join(change(tsv.read_text().splitlines())) + "\n")
    with pytest.raises(ValueError, match=sentence):
        import_labels(of_fairseq, [manifests / "dev.jsonl.gz"], tmp_path / "again", [50, 7])
    with pytest.raises(ValueError, match="no finished label store"):
        LabelStore(tmp_path / "again")


def test_a_row_that_could_be_two_utterances_is_refused(dev_cuts: CutSet, tmp_path: Path) -> None:
    [first, *_] = dev_cuts
    pieces = [replace(first, id=f"{first.id}-{number}", supervisions=[]) for number in range(2)]
    write_manifest(pieces, tmp_path / "pieces.jsonl.gz")
    source = first.recording.sources[0].source
    (tmp_path / "pieces.km").write_text("1\n1\n")
    (tmp_path / "pieces.tsv").write_text(f"/\n{source}\t{first.num_samples}\n")
    with pytest.raises(ValueError, match=r"-0 and .*-1 could both be .*; give labels and a manifest of one corpus"):
        import_labels([tmp_path / "pieces.km"], [tmp_path / "pieces.jsonl.gz"], tmp_path / "store", [50])


@pytest.mark.parametrize("suffix", [".km", ".txt", ".jsonl"])
@pytest.mark.parametrize(
    "encoded",
    [
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
        lambda text: text.replace("\n", "\r\n").encode("utf-16"),
        lambda text: (text + "\n").encode(),
        lambda text: (text + " \r\n\r\n").encode(),
        lambda text: text.removesuffix("\n").encode(),
        lambda text: gzip.compress(text.encode(), mtime=0),
        lambda text: lzma.compress(text.encode("utf-16")),
    ],
    ids=["BOM", "UTF-16", "BOM and CRLF", "UTF-16 and CRLF", "an empty line", "empty lines", "no last line break"]
    + ["gzip", "xz and UTF-16"],
)
def test_labels_that_other_programs_saved_again_come_in(
    suffix: str,
    encoded: Callable[[str], bytes],
    store: Path,
    manifests: Path,
    labels: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    files = export_labels(store, [manifests / "dev.jsonl.gz"], tmp_path / f"dev{suffix}")
    for file in [*files, *tmp_path.glob("*.tsv")]:
        file.write_bytes(encoded(file.read_text()))
    assert_same(import_labels(files, [manifests / "dev.jsonl.gz"], tmp_path / "again", [50, 7]), labels)


NO_TEXT = r"units\.km: is not UTF-8, nor UTF-16 with its mark; convert it"
ZEROS = r"units\.km, line 1: has zero bytes, as UTF-16 without its mark; save it as UTF-8"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("1 2\n".encode("utf-16-le"), ZEROS), (b"\x00\n1\n", ZEROS), (b"\xff\xfe1", NO_TEXT), (b"1 \xe4\n", NO_TEXT)],
)
def test_labels_that_are_no_text_are_refused_in_one_sentence(
    content: bytes, sentence: str, manifests: Path, tmp_path: Path
) -> None:
    (tmp_path / "units.km").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        import_labels([tmp_path / "units.km"], [manifests / "dev.jsonl.gz"], tmp_path / "store", [50])


def test_an_empty_line_among_names_is_named(manifests: Path, tmp_path: Path) -> None:
    (tmp_path / "units.txt").write_text("\nsomebody 1 2\n")
    with pytest.raises(ValueError, match=r"units\.txt, line 1: empty; remove it"):
        import_labels([tmp_path / "units.txt"], [manifests / "dev.jsonl.gz"], tmp_path / "store", [50])
