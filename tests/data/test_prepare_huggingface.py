"""Hugging Face datasets on disk become manifests, with the bytes of their audio as they are."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from helpers import refused
from listed_audio import noise, rows

from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.data.prepare_huggingface import prepare_huggingface
from hubert_lightning.errors import UserError

datasets = pytest.importorskip("datasets", reason="datasets is not installed")


def encoded(seconds: float, seed: int, format: str = "WAV", rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, noise(seconds, seed, rate=rate), rate, format=format)
    return file.getvalue()


def table(count: int, first: int = 0, **columns: list[Any]) -> Any:
    """A dataset with a column of audio, as the hub has it."""
    numbers = range(first, first + count)
    audio = [{"bytes": encoded(1.0, number), "path": f"{number}.wav"} for number in numbers]
    return datasets.Dataset.from_dict({"audio": audio, **columns}).cast_column("audio", datasets.Audio(24_000))


def audio_files(manifest: Path) -> list[Path]:
    return [Path(cut.recording.sources[0].source) for cut in read_manifest(manifest)]


def test_splits_of_parquet_become_manifests_with_the_bytes_of_the_audio(tmp_path: Path) -> None:
    flac = encoded(1.5, 7, "FLAC", rate=22_050)
    audio = [{"bytes": flac, "path": "x/../../y.flac"}, {"bytes": encoded(1.0, 8, rate=48_000), "path": None}]
    columns = {"sentence": ["hello  there", "two words"], "speaker_id": [17, 18]}
    train = datasets.Dataset.from_dict({"audio": audio, **columns}).cast_column("audio", datasets.Audio(16_000))
    (tmp_path / "hub/data").mkdir(parents=True)
    train.to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    table(1, sentence=["held out"]).to_parquet(tmp_path / "hub/data/validation-00000-of-00001.parquet")
    train_manifest, validation = prepare_huggingface(tmp_path / "hub", tmp_path / "out")
    assert rows(train_manifest) == {
        "train/0000000-y": (0.0, 1.5, "hello there", "17"),
        "train/0000001": (0.0, 1.0, "two words", "18"),
    }
    first, second = audio_files(train_manifest)
    assert first.read_bytes() == flac
    assert first.suffix == ".flac"
    assert second.suffix == ".wav"
    assert first.is_relative_to(tmp_path / "out/audio")
    assert [cut.recording.sampling_rate for cut in read_manifest(train_manifest)] == [16_000, 16_000]
    assert soundfile.info(second).samplerate == 48_000
    assert rows(validation) == {"validation/0000000-0": (0.0, 1.0, "held out", None)}


def test_a_data_set_that_was_saved_to_disk_becomes_manifests(tmp_path: Path) -> None:
    parts = {"train": table(2, text=["one", "two"]), "test": table(1, first=5, text=["three"])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    manifests = prepare_huggingface(tmp_path / "saved", tmp_path / "out", splits=["test"])
    assert [path.name for path in manifests] == ["test.jsonl.gz"]
    manifests = prepare_huggingface(tmp_path / "saved", tmp_path / "out")
    assert [path.name for path in manifests] == ["train.jsonl.gz", "test.jsonl.gz"]
    parts["train"].save_to_disk(tmp_path / "one")
    [manifest] = prepare_huggingface(tmp_path / "one", tmp_path / "alone")
    assert [row[2] for row in rows(manifest).values()] == ["one", "two"]
    assert manifest.name == "one.jsonl.gz"


def test_audio_outside_of_the_tables_is_read_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(encoded(1.0, 0))
    audio = [{"bytes": None, "path": str(tmp_path / "a.wav")}, {"bytes": None, "path": "gone.wav"}]
    features = datasets.Features({"audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    datasets.Dataset.from_dict({"audio": audio}, features).save_to_disk(tmp_path / "saved")
    [manifest] = prepare_huggingface(tmp_path / "saved", tmp_path / "out")
    assert audio_files(manifest) == [tmp_path / "a.wav"]
    assert "gone.wav\tnot there" in (tmp_path / "out/saved.refused.tsv").read_text()


def test_a_column_is_guessed_if_there_is_only_one_and_otherwise_named(tmp_path: Path) -> None:
    other = [{"bytes": encoded(0.5, 9), "path": "other.wav"}]
    both = table(1, text=["first"], transcription=["second"], noisy=other)
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=r"2 columns of audio, audio, noisy; name one of audio, .* with --audio_column"):
        prepare_huggingface(tmp_path / "both", tmp_path / "out")
    with pytest.raises(UserError, match=r"text and transcription may both be the transcript; name one"):
        prepare_huggingface(tmp_path / "both", tmp_path / "out", audio_column="noisy")
    with pytest.raises(UserError, match=r"no column words, only .*; correct --text_column"):
        prepare_huggingface(tmp_path / "both", tmp_path / "out", audio_column="noisy", text_column="words")
    [manifest] = prepare_huggingface(
        tmp_path / "both", tmp_path / "out", audio_column="noisy", text_column="transcription"
    )
    assert [row[1:3] for row in rows(manifest).values()] == [(0.5, "second")]


def test_a_speaker_of_a_class_has_its_name(tmp_path: Path) -> None:
    named = table(2, text=["one", "two"], speaker=[1, 0])
    named = named.cast_column("speaker", datasets.ClassLabel(names=["anna", "ben"]))
    named.save_to_disk(tmp_path / "saved")
    [manifest] = prepare_huggingface(tmp_path / "saved", tmp_path / "out")
    assert [row[3] for row in rows(manifest).values()] == ["ben", "anna"]


def test_what_is_passed_over_is_listed_with_its_reason(tmp_path: Path) -> None:
    audio = [{"bytes": encoded(1.0, 0), "path": "a.wav"}, {"bytes": b"no audio", "path": "b.mp3"}, None]
    audio += [{"bytes": encoded(1.0, 1), "path": "c.wav"}]
    data = datasets.Dataset.from_dict({"audio": audio, "text": ["fine", "broken", "missing", " "]})
    data.save_to_disk(tmp_path / "saved")
    [manifest] = prepare_huggingface(tmp_path / "saved", tmp_path / "out")
    assert [row[2] for row in rows(manifest).values()] == ["fine"]
    listing = (tmp_path / "out/saved.refused.tsv").read_text()
    assert "0000001-b.mp3\tunreadable" in listing
    assert "no audio in row 3" in listing
    assert "0000003-c.wav\tno words in its row" in listing


def test_an_unusable_folder_is_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert "hf download NAME" in refused(capsys, "prepare", "huggingface", "mozilla/common_voice", out)
    (tmp_path / "empty").mkdir()
    assert "no dataset of save_to_disk, and no parquet or arrow tables" in refused(
        capsys, "prepare", "huggingface", str(tmp_path / "empty"), out
    )
    (tmp_path / "empty/metadata.csv").write_text("file_name,text\n")
    assert "use `hubert prepare csv" in refused(capsys, "prepare", "huggingface", str(tmp_path / "empty"), out)
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt/train.parquet").write_bytes(b"PAR1 and nothing else")
    assert "datasets cannot read it" in refused(capsys, "prepare", "huggingface", str(tmp_path / "corrupt"), out)
    table(1, text=["one"]).save_to_disk(tmp_path / "saved")
    assert "no split dev, only saved" in refused(
        capsys, "prepare", "huggingface", str(tmp_path / "saved"), out, "--splits", "dev"
    )
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "texts")
    assert "no column of audio; name one of text" in refused(
        capsys, "prepare", "huggingface", str(tmp_path / "texts"), out
    )


def test_a_split_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(1)}).save_to_disk(tmp_path / "saved/inner")
    (tmp_path / "saved/inner/dataset_dict.json").write_text('{"splits": ["../inner/train"]}')
    with pytest.raises(UserError, match="which names no file"):
        prepare_huggingface(tmp_path / "saved/inner", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_second_start_writes_no_audio_again(tmp_path: Path) -> None:
    table(1).save_to_disk(tmp_path / "saved")
    [manifest] = prepare_huggingface(tmp_path / "saved", tmp_path / "out")
    [file] = audio_files(manifest)
    before = file.stat().st_ino
    prepare_huggingface(tmp_path / "saved", tmp_path / "out")
    assert file.stat().st_ino == before
    assert np.isclose(soundfile.info(file).duration, 1.0)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("metadata.csv", "use `hubert prepare csv {}/metadata.csv OUT --path_column file_name`"),
        ("metadata.jsonl", "to_csv('{}/metadata.csv', index=False)"),
        ("train-00000.tar", "unpack them into one folder, `tar -xf`, and use `hubert prepare folder`"),
    ],
)
def test_other_layouts_of_data_sets_are_refused_with_another_way(name: str, way: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=re.escape(way.format(tmp_path))):
        prepare_huggingface(tmp_path, tmp_path / "out")
