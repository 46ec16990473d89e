"""NeMo's manifests become manifests of the same utterances."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import refused
from listed_audio import rows, samples_of, write_noise
from numpy.testing import assert_allclose

from hubert_lightning.data.prepare_nemo import prepare_nemo
from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE


def manifest_of(path: Path, *lines: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def test_rows_become_utterances(tmp_path: Path) -> None:
    write_noise(tmp_path / "nemo/wav/a.wav", 1.0, 0)
    write_noise(tmp_path / "b.flac", 1.5, 1)
    table = manifest_of(
        tmp_path / "nemo/train_manifest.json",
        {"audio_filepath": "wav/a.wav", "duration": 1.0, "text": "hello  there", "speaker": 17},
        {"audio_filepath": str(tmp_path / "b.flac"), "duration": 1.5, "text": "zwei Wörter", "lang": "de"},
    )
    [manifest] = prepare_nemo([table], tmp_path / "out")
    assert manifest.name == "train_manifest.jsonl.gz"
    assert rows(manifest) == {
        "wav/a.wav": (0.0, 1.0, "hello there", "17"),
        str(tmp_path / "b.flac"): (0.0, 1.5, "zwei Wörter", None),
    }


def test_an_offset_and_a_duration_choose_a_segment(tmp_path: Path) -> None:
    whole = write_noise(tmp_path / "long.wav", 3.0, 0)[:, 0]
    table = manifest_of(
        tmp_path / "train.json",
        {"audio_filepath": "long.wav", "offset": 0.0, "duration": 1.25, "text": "one"},
        {"audio_filepath": "long.wav", "offset": 1.25, "duration": 1.0, "text": "two"},
        {"audio_filepath": "long.wav", "offset": 2.5, "duration": None, "text": "three"},
    )
    [manifest] = prepare_nemo([table], tmp_path / "out")
    bounds = {
        "long.wav-000000000-000001250": (0.0, 1.25, "one"),
        "long.wav-000001250-000002250": (1.25, 1.0, "two"),
        "long.wav-000002500-end": (2.5, 0.5, "three"),
    }
    assert {name: row[:3] for name, row in rows(manifest).items()} == bounds
    for name, (start, duration, _) in bounds.items():
        first = int(start * SAMPLE_RATE)
        assert_allclose(samples_of(manifest, name), whole[first : first + int(duration * SAMPLE_RATE)])


def test_manifests_for_pre_training_have_no_transcripts(tmp_path: Path) -> None:
    write_noise(tmp_path / "a.wav", 3.0, 0)
    table = manifest_of(tmp_path / "ssl.json", {"audio_filepath": "a.wav", "duration": 3.0, "text": "-"})
    [manifest] = prepare_nemo([table], tmp_path / "out", max_duration=1.5)
    assert [row[1:3] for row in rows(manifest).values()] == [(1.5, None), (1.5, None)]


def test_what_is_passed_over_is_listed_with_its_reason(tmp_path: Path) -> None:
    write_noise(tmp_path / "a.wav", 1.0, 0)
    (tmp_path / "b.wav").write_bytes(b"no audio")
    table = manifest_of(
        tmp_path / "data.json",
        {"audio_filepath": "a.wav", "duration": 1.0, "text": "fine"},
        {"audio_filepath": "b.wav", "duration": 1.0, "text": "broken"},
        {"audio_filepath": "gone.wav", "duration": 1.0, "text": "gone"},
        {"audio_filepath": "c.wav", "duration": "1.0", "text": "times"},
        {"audio_filepath": "d.wav", "offset": -1, "text": "negative"},
        {"audio_filepath": "e.wav", "text": ["a", "list"]},
        {"audio_filepath": "f.wav", "text": " "},
    )
    [manifest] = prepare_nemo([table], tmp_path / "out")
    assert list(rows(manifest)) == ["a.wav"]
    lines = (tmp_path / "out/data.refused.tsv").read_text().splitlines()
    reasons = {Path(path).stem: reason for path, reason in (line.split("\t") for line in lines)}
    assert reasons.keys() == {"b", "gone", "c", "d", "e", "f"}
    assert "not there" in reasons["gone"]
    assert reasons["c"].startswith("its duration is '1.0', not a number of seconds")
    assert reasons["d"].startswith("its offset is -1, not a number of seconds")
    assert reasons["e"].startswith("its text is ")
    assert reasons["f"].startswith("no words in its row")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no rows in it"),
        ('{"text": "words"}\n', r"line 1: .* has no audio_filepath"),
        ('{"audio_filepath": 3}\n', r"line 1: .* has no audio_filepath"),
        ("path,text\na.wav,words\n", "not a manifest of NeMo"),
        ('[{"audio_filepath": "a.wav"}]\n', r"line 1: .* has no audio_filepath"),
    ],
)
def test_another_file_is_refused_in_a_sentence(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(UserError, match=reason):
        prepare_nemo([tmp_path / "table.json"], tmp_path / "out")


def test_a_missing_manifest_is_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file or folder" in refused(capsys, "prepare", "nemo", str(tmp_path / "x.json"), str(tmp_path / "o"))


@pytest.mark.parametrize("longest", ["0", "-1", "0.00001"])
def test_a_longest_cut_that_cuts_nothing_is_refused(
    tmp_path: Path, longest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = manifest_of(tmp_path / "ssl.json", {"audio_filepath": "a.wav"})
    command = ["prepare", "nemo", str(table), str(tmp_path / "out"), f"--max_duration={longest}"]
    assert "max_duration is" in refused(capsys, *command)


def test_whole_recordings_are_held_out_if_asked(tmp_path: Path) -> None:
    for number in range(8):
        write_noise(tmp_path / f"{number}.wav", 2.0, number)
    segments = [
        {"audio_filepath": f"{number}.wav", "offset": float(half), "duration": 1.0, "text": "word"}
        for number in range(8)
        for half in range(2)
    ]
    train, dev = prepare_nemo([manifest_of(tmp_path / "all.json", *segments)], tmp_path / "out", heldout=0.25)
    assert [path.name for path in (train, dev)] == ["all.jsonl.gz", "all-dev.jsonl.gz"]
    recordings = [{name.partition(".wav")[0] for name in rows(manifest)} for manifest in (train, dev)]
    assert not recordings[0] & recordings[1]
    assert (len(rows(train)), len(rows(dev))) == (12, 4)
    with pytest.raises(UserError, match=r"heldout is 1\.0; it is a number from 0 to 0\.99"):
        prepare_nemo([tmp_path / "all.json"], tmp_path / "out", heldout=1.0)
