"""Byte-pair encoding of units, bit rates, and units as datasets."""

import json
import re
import sys
from dataclasses import replace
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LABEL_SOURCE, ROOT, read_samples, refused, run_verb, write_store
from hypothesis import given
from hypothesis import strategies as st
from lhotse import CutSet

from hubert_lightning import UnitBPE, Units
from hubert_lightning.data.dataset_writer import COLUMNS, dataset_writer
from hubert_lightning.data.manifest import place_of, read_manifest, speaker_of
from hubert_lightning.errors import UserError
from hubert_lightning.features.mfcc import mfcc
from hubert_lightning.frames import HOP, SAMPLE_RATE, num_frames
from hubert_lightning.units.bit_rates import BitRates
from hubert_lightning.units.kmeans_file import save_kmeans
from hubert_lightning.units.label_text import import_labels
from hubert_lightning.units.unit_bpe import MAX_CLUSTERS, text_of
from hubert_lightning.units.unit_extractor import deduplicated

pytest.importorskip("tokenizers", reason="tokenizers is not installed; install hubert-lightning[bpe]")

CLUSTERS = 20
SEQUENCES = [[1, 2, 3, 1, 2, 3, 4], [1, 2, 3, 5, 1, 2], [0, 1, 2, 3]]


@pytest.fixture(scope="module")
def bpe() -> UnitBPE:
    rng = np.random.default_rng(0)
    words = [rng.integers(0, 9, rng.integers(2, 6)).tolist() for _ in range(30)]
    spoken = [[unit for word in rng.integers(0, 30, 50) for unit in words[word]] for _ in range(20)]
    return UnitBPE.train(spoken, 200, 9, "abc")


@pytest.fixture(scope="module")
def kmeans(tmp_path_factory: pytest.TempPathFactory, train_cuts: CutSet) -> Path:
    """K-means of MFCCs, so that units need no encoder."""
    from hubert_lightning.data.audio import read_waveform

    rows = mfcc(read_waveform(train_cuts[0]))[::2]
    path = tmp_path_factory.mktemp("kmeans") / "kmeans.safetensors"
    save_kmeans(path, [rows[torch.linspace(0, len(rows) - 1, CLUSTERS).long()]], {"features": "mfcc"})
    return path


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@given(frames=st.lists(st.integers(0, 8), min_size=1, max_size=80))
def test_tokens_and_durations_give_the_unit_of_every_frame_again(bpe: UnitBPE, frames: list[int]) -> None:
    runs = deduplicated(torch.tensor(frames))
    tokens = bpe.encode(runs.units)
    assert torch.equal(bpe.decode(tokens), runs.units)
    assert bpe.frames(tokens, runs.durations).tolist() == frames
    assert len(tokens) <= len(runs.units)


@given(units=st.lists(st.integers(0, MAX_CLUSTERS - 1), max_size=20))
def test_every_unit_has_a_private_character_of_its_own(units: list[int]) -> None:
    text = text_of(units)
    assert len(text) == len(units)
    assert len(set(text)) == len(set(units))
    assert all(0xF0000 <= ord(character) <= 0x10FFFD and ord(character) & 0xFFFF < 0xFFFE for character in text)


def test_frequent_sequences_become_tokens(bpe: UnitBPE) -> None:
    trained = UnitBPE.train(SEQUENCES, 8, 6)
    assert trained.clusters == 6
    assert len(trained.encode([1, 2, 3])) == 1
    assert trained.encode([5, 0]).tolist() == [5, 0]  # a unit is the token of its number
    assert len(bpe) == 200


def test_any_number_of_clusters_that_a_label_has_can_be_encoded() -> None:
    last = 2**16 - 1
    trained = UnitBPE.train([[last, 0, 65_533, 65_534]] * 3, last + 3, last + 1)
    assert trained.decode(trained.encode([65_534, last, 0, 7])).tolist() == [65_534, last, 0, 7]
    assert len(trained.encode([last, 0, 65_533, 65_534])) < 4


def test_the_file_is_read_by_tokenizers_and_by_transformers(bpe: UnitBPE, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    bpe.save(tmp_path / "tokenizer.json")
    units = [1, 5, 3, 8, 1, 5, 3]
    tokens = bpe.encode(units).tolist()
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text_of(units)).ids == tokens
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert fast(text_of(units))["input_ids"] == tokens
    assert fast.decode(tokens) == text_of(units)
    again = UnitBPE.load(tmp_path / "tokenizer.json")
    assert (again.kmeans, again.clusters, again.encode(units).tolist()) == ("abc", 9, tokens)


def test_the_python_of_the_documentation_prints_what_it_states(capsys: pytest.CaptureFixture) -> None:
    [block] = [
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/units.md").read_text("utf-8"), re.DOTALL)
        if "UnitBPE" in block
    ]
    stated = [line.split(":")[0] for line in re.findall(r"print\(.*\)  # (.*)", block)]
    exec(block, {})
    assert capsys.readouterr().out.splitlines() == stated


def test_encodings_of_other_things_are_refused(bpe: UnitBPE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="bpe 9: each of the 9 clusters is a token already"):
        UnitBPE.train(SEQUENCES, 9, 9)
    with pytest.raises(UserError, match="unit 9 of 9 clusters"):
        bpe.encode([9])
    with pytest.raises(UserError, match="token 200 of 200"):
        bpe.decode([200])
    with pytest.raises(UserError, match="3 durations of 2 runs"):
        bpe.frames(bpe.encode([8, 0]), [1, 1, 1])
    with pytest.raises(UserError, match="no such file"):
        UnitBPE.load(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer.json"):
        UnitBPE.load(tmp_path / "text.json")
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "letters.json"))
    with pytest.raises(UserError, match="other text than units"):
        UnitBPE.load(tmp_path / "letters.json")
    with pytest.raises(UserError, match="the units of another K-means"):
        bpe.check_units(9, "other", "a.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"hubert-lightning\[bpe\]"):
        UnitBPE.load(tmp_path / "letters.json")


def test_bit_rates_are_symbols_per_second_times_their_entropy() -> None:
    rates = BitRates()
    rates.add(0.08, [0, 1, 0], [2, 1, 1], [7])
    measured = rates.rates()
    entropy = -(3 / 4 * log2(3 / 4) + 1 / 4 * log2(1 / 4))
    assert measured["units"] == pytest.approx((50, 50 * entropy))
    assert measured["runs"] == pytest.approx((37.5, 37.5 * -(2 / 3 * log2(2 / 3) + 1 / 3 * log2(1 / 3))))
    assert measured["tokens"] == pytest.approx((12.5, 0))
    assert (
        rates.sentence()
        == "units 50.0 per s, 41 bit/s; without repetitions 37.5 per s, 34 bit/s; BPE 12.5 per s, 0 bit/s"
    )


@pytest.mark.parametrize("format", ["jsonl", "kaldi", "npz"])
def test_an_encoding_is_trained_on_the_files_saved_beside_them_and_applied(
    format: str, kmeans: Path, speech: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / f"units.{format}"
    command = ["units", "mfcc", *speech, "--kmeans", kmeans, "--format", format, "--output", out]
    assert run_verb(*command, "--bpe", 40) == 0
    assert "BPE" in capsys.readouterr().err
    bpe = UnitBPE.load(tmp_path / f"{out.name}.tokenizer.json")
    units = Units.from_pretrained("mfcc", kmeans)
    assert (bpe.clusters, bpe.kmeans) == (CLUSTERS, units.source["kmeans"])
    tokens: dict[str, Any] = {}
    if format == "jsonl":
        tokens = {Path(row["file"]).stem: (row["bpe"], row["durations"]) for row in rows_of(out.read_text())}
    elif format == "kaldi":
        texts = [out.with_name(f"{out.name}{suffix}").read_text() for suffix in (".bpe", ".durations")]
        pairs = zip(*(text.splitlines() for text in texts), strict=True)
        tokens = {row.split()[0]: ([*map(int, row.split()[1:])], [*map(int, more.split()[1:])]) for row, more in pairs}
    else:
        with np.load(out) as arrays:
            tokens = {path.stem: (arrays[f"{path.stem}.bpe"], arrays[f"{path.stem}.durations"]) for path in speech}
    for path in speech:
        ids, durations = tokens[path.stem]
        assert torch.equal(bpe.frames(ids, durations), units(read_samples(path), SAMPLE_RATE))
        assert len(ids) < len(durations)
    written = out.read_bytes()
    assert run_verb(*command, "--bpe", 40) == 0
    assert "skipped 3 of 3 files" in capsys.readouterr().err
    assert out.read_bytes() == written
    assert run_verb(*command, "--bpe", 30) == 0
    assert "skipped 3 of 3 files" in capsys.readouterr().err
    assert len(UnitBPE.load(tmp_path / f"{out.name}.tokenizer.json")) == 30


def test_an_encoding_is_applied_to_other_files(
    kmeans: Path, speech: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    saved, out = tmp_path / "tokenizer.json", tmp_path / "units.jsonl"
    training = ["units", "mfcc", *speech[:2], "--kmeans", kmeans, "--output", out, "--bpe", 40, "--save_bpe", saved]
    assert run_verb(*training) == 0
    assert not out.with_name("units.jsonl.tokenizer.json").exists()
    capsys.readouterr()
    assert run_verb("units", "mfcc", speech[2], "--kmeans", kmeans, "--bpe", saved) == 0
    printed = capsys.readouterr()
    [row] = rows_of(printed.out)
    assert row["bpe"] == UnitBPE.load(saved).encode(row["units"]).tolist()
    assert "BPE" in printed.err
    other = UnitBPE.train([[0, 1]], 40, CLUSTERS, "abc")
    other.save(tmp_path / "other.json")
    sentence = refused(
        capsys, "units", "mfcc", str(speech[2]), "--kmeans", str(kmeans), "--bpe", f"{tmp_path}/other.json"
    )
    assert f"{tmp_path}/other.json: an encoding of the units of another K-means" in sentence


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--bpe", "30"], "needs a file for them; name it with --output"),
        (["--bpe", "20", "--output", "OUT"], "each of the 20 clusters is a token already"),
        (["--bpe", "none.json"], "none.json: no such file"),
        (["--save_bpe", "x.json"], "give the number of its tokens with --bpe"),
        (["--format", "dataset"], "dataset needs a folder; name it with --output"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_a_sentence(
    options: list[str],
    sentence: str,
    kmeans: Path,
    speech: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    given_options = [str(tmp_path / "out") if option == "OUT" else option for option in options]
    assert sentence in refused(capsys, "units", "mfcc", str(speech[0]), "--kmeans", str(kmeans), *given_options)
    assert "have no tokens" in refused(capsys, "units", "mfcc", "-", "--kmeans", str(kmeans), "--bpe", "30")


def test_units_of_files_become_a_dataset(
    kmeans: Path, speech: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed; install hubert-lightning[datasets]")
    speech[0].with_suffix(".txt").write_text("what  is said\n")
    out = tmp_path / "dataset"
    command = ["units", "mfcc", *speech, "--kmeans", kmeans, "--format", "dataset", "--output", out, "--bpe", "40"]
    assert run_verb(*command) == 0
    table = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert table.column_names == list(COLUMNS)
    assert table["id"] == ["a", "b", "c"]
    units, bpe = Units.from_pretrained("mfcc", kmeans), UnitBPE.load(tmp_path / "dataset.tokenizer.json")
    for row, path in zip(table, speech, strict=True):
        samples = read_samples(path)
        assert torch.equal(bpe.frames(row["bpe"], row["durations"]), units(samples, SAMPLE_RATE))
        assert bpe.decode(row["bpe"]).tolist() == row["units"]
        assert row["audio"] == str(path)
        assert row["duration"] == pytest.approx(len(samples) / SAMPLE_RATE, abs=1e-3)
    assert table["text"] == ["what is said", None, None]
    assert "exists already" in refused(capsys, *map(str, command))


def test_labels_of_a_store_become_a_dataset(manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed; install hubert-lightning[datasets]")
    cuts = list(read_manifest(manifests / "dev.jsonl.gz"))
    rng = np.random.default_rng(0)
    labels = {
        cut.id: np.stack(
            [rng.integers(0, 50, num_frames(cut.num_samples)), np.arange(num_frames(cut.num_samples)) // 9 % 7]
        )
        for cut in cuts
    }
    write_store(tmp_path / "labels", LABEL_SOURCE, labels)
    out = tmp_path / "dataset"
    command = ["labels", "export", tmp_path / "labels", manifests / "dev.jsonl.gz", out, "--format", "dataset"]
    assert run_verb(*command) == 0
    table = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert table["id"] == [cut.id for cut in cuts]
    for row, cut in zip(table, cuts, strict=True):
        for stream in range(2):
            frames = np.repeat(row[f"units_{stream}"], row[f"durations_{stream}"])
            assert frames.tolist() == labels[cut.id][stream].tolist()
        assert row["speaker"] == speaker_of(cut)
        assert row["text"] == cut.supervisions[0].text
        assert row["audio"] == place_of(cut)["source"]
        assert sum(row["durations_0"]) * HOP / SAMPLE_RATE == pytest.approx(row["duration"], abs=0.03)
    assert "exists already" in refused(capsys, *map(str, command))


def test_the_dataset_of_labels_has_tokens_of_one_stream(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed; install hubert-lightning[datasets]")
    cuts = list(read_manifest(manifests / "dev.jsonl.gz"))
    source = replace(LABEL_SOURCE, clusters=(7,))
    labels = {cut.id: np.arange(num_frames(cut.num_samples))[None] // 3 % 7 for cut in cuts}
    write_store(tmp_path / "labels", source, labels)
    command = ["labels", "export", tmp_path / "labels", manifests / "dev.jsonl.gz"]
    assert run_verb(*command, tmp_path / "trained", "--format", "dataset", "--bpe", 20) == 0
    bpe_file = tmp_path / "trained.tokenizer.json"
    bpe = UnitBPE.load(bpe_file)
    assert (bpe.clusters, bpe.kmeans) == (7, source.kmeans)
    assert run_verb(*command, tmp_path / "applied", "--format", "dataset", "--bpe", bpe_file) == 0
    for name in ("trained", "applied"):
        table = datasets.load_dataset(str(tmp_path / name), split="train", cache_dir=str(tmp_path / f"cache-{name}"))
        assert table.column_names == list(COLUMNS)
        for row, cut in zip(table, cuts, strict=True):
            assert bpe.frames(row["bpe"], row["durations"]).tolist() == labels[cut.id][0].tolist()
            assert len(row["bpe"]) < len(row["units"])
    options = [str(part) for part in command] + [str(tmp_path / "x"), "--bpe", str(bpe_file)]
    assert "bpe is a column of a dataset; add --format dataset" in refused(capsys, *options)
    write_store(tmp_path / "other", replace(source, kmeans="other"), labels)
    options = [str(tmp_path / "other") if option == str(tmp_path / "labels") else option for option in options]
    sentence = refused(capsys, *options, "--format", "dataset")
    assert f"{bpe_file}: an encoding of the units of another K-means" in sentence
    streams = {name: np.repeat(rows, 2, axis=0) for name, rows in labels.items()}
    write_store(tmp_path / "streams", replace(source, clusters=(7, 7)), streams)
    options = [str(tmp_path / "streams") if option == str(tmp_path / "other") else option for option in options]
    assert "labels in 2 streams, and bpe encodes one" in refused(capsys, *options, "--format", "dataset")


def test_imported_labels_take_any_encoding_of_as_many_clusters(
    manifests: Path, tmp_path: Path, bpe: UnitBPE, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed; install hubert-lightning[datasets]")
    exports = {}
    for name in ("dev", "test"):
        cuts = read_manifest(manifests / f"{name}.jsonl.gz")
        lines = (" ".join(map(str, [cut.id, *np.arange(num_frames(cut.num_samples)) // 3 % 9])) for cut in cuts)
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
        manifest, store = manifests / f"{name}.jsonl.gz", tmp_path / f"{name}-labels"
        import_labels([tmp_path / f"{name}.txt"], [manifest], store, [9])
        exports[name] = ["labels", "export", str(store), str(manifest)]
    trained, of_kmeans = tmp_path / "trained.json", tmp_path / "of_kmeans.json"
    as_dataset = ("--format", "dataset", "--bpe")
    assert run_verb(*exports["dev"], tmp_path / "dev", *as_dataset, 20, "--save_bpe", trained) == 0
    assert UnitBPE.load(trained).kmeans == ""
    bpe.save(of_kmeans)  # of 9 units of the K-means abc
    for number, encoding in enumerate((trained, of_kmeans)):
        assert run_verb(*exports["test"], tmp_path / f"test{number}", *as_dataset, encoding) == 0
    UnitBPE.train([[0, 1]], 10, 8).save(tmp_path / "eight.json")
    sentence = refused(capsys, *exports["test"], str(tmp_path / "none"), *as_dataset, str(tmp_path / "eight.json"))
    assert "an encoding of 8 units, but this K-means has 9 clusters" in sentence


def test_a_large_dataset_has_several_tables_and_an_interrupted_one_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed; install hubert-lightning[datasets]")
    monkeypatch.setattr("hubert_lightning.data.dataset_writer.ROWS_OF_A_FILE", 500)
    with dataset_writer(tmp_path / "out", {"id": "string", "units": "[int32]"}) as write:
        for number in range(1_200):
            write({"id": str(number), "units": [number] * (number % 3)})
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 3
    table = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert table["id"] == [str(number) for number in range(1_200)]
    assert table[1_199] == {"id": "1199", "units": [1_199] * 2}

    def interrupted() -> None:
        with dataset_writer(tmp_path / "other", {"id": "string"}) as write_row:
            write_row({"id": "a"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "other").exists()
