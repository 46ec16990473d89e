"""Kaldi's data directories become manifests of the same utterances, and their commands are never run."""

from pathlib import Path

import pytest
from helpers import refused
from lhotse import Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.kaldi import export_to_kaldi, load_kaldi_data_dir
from listed_audio import rows, samples_of, write_noise
from numpy.testing import assert_allclose

from hubert_lightning.cli import main
from hubert_lightning.data.prepare_kaldi import prepare_kaldi
from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE


def table(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("wav_scp", "wav.scp")).write_text(content, "utf-8")
    return folder


def test_a_directory_that_lhotse_exports_becomes_the_utterances_that_lhotse_loads(tmp_path: Path) -> None:
    recordings, supervisions = [], []
    for number in range(3):
        write_noise(tmp_path / f"wav/r{number}.wav", 2.0, number)
        recordings.append(Recording.from_file(tmp_path / f"wav/r{number}.wav", recording_id=f"r{number}"))
        for start, duration in ((0.0, 0.75), (0.75, 1.25)):
            name = f"s{number}-{int(100 * start):03d}"
            supervisions.append(
                SupervisionSegment(name, f"r{number}", start, duration, text=f"word {name}", speaker=f"s{number}")
            )
    folder = tmp_path / "data/train"
    export_to_kaldi(RecordingSet.from_recordings(recordings), SupervisionSet.from_segments(supervisions), folder)
    _, expected, _ = load_kaldi_data_dir(folder, SAMPLE_RATE)
    assert expected is not None
    [manifest] = prepare_kaldi([folder], tmp_path / "out")
    assert manifest.name == "train.jsonl.gz"
    listed = rows(manifest)
    assert listed == {s.id: (s.start, s.duration, s.text, s.speaker) for s in expected}
    for supervision in expected:
        cut = samples_of(manifest, supervision.id)
        whole = RecordingSet.from_recordings(recordings)[supervision.recording_id].load_audio()[0]
        first = int(supervision.start * SAMPLE_RATE)
        assert_allclose(cut, whole[first : first + len(cut)])


def test_without_segments_recordings_are_utterances(tmp_path: Path) -> None:
    write_noise(tmp_path / "a.wav", 1.0, 0)
    write_noise(tmp_path / "b.flac", 1.5, 1, rate=8000)
    folder = table(
        tmp_path / "dev", wav_scp="a a.wav\nb b.flac\n", text="a hello  there\nb two words\n", utt2spk="a x\nb y\n"
    )
    [manifest] = prepare_kaldi([folder], tmp_path / "out", audio=tmp_path)
    assert rows(manifest) == {"a": (0.0, 1.0, "hello there", "x"), "b": (0.0, 1.5, "two words", "y")}


def test_without_text_recordings_are_cut_into_pieces_for_pre_training(tmp_path: Path) -> None:
    write_noise(tmp_path / "a.wav", 3.0, 0)
    folder = table(tmp_path / "all", wav_scp=f"a {tmp_path / 'a.wav'}\n")
    [manifest] = prepare_kaldi([folder], tmp_path / "out", max_duration=1.5)
    assert rows(manifest) == {"a-000": (0.0, 1.5, None, None), "a-001": (1.5, 1.5, None, None)}
    table(folder, text="a a transcript of all of it\n")
    [manifest] = prepare_kaldi([folder], tmp_path / "whole", max_duration=1.5)
    assert rows(manifest) == {"a": (0.0, 3.0, "a transcript of all of it", None)}


def test_a_segment_names_its_channel_and_other_recordings_are_the_mean_of_theirs(tmp_path: Path) -> None:
    stereo = write_noise(tmp_path / "call.wav", 2.0, 0, channels=2)
    folder = table(tmp_path / "call", wav_scp="call call.wav\n", segments="left call 0 1 0\nright call 1 -1 1\n")
    [manifest] = prepare_kaldi([folder], tmp_path / "out", audio=tmp_path)
    assert_allclose(samples_of(manifest, "left"), stereo[:SAMPLE_RATE, 0])
    assert_allclose(samples_of(manifest, "right"), stereo[SAMPLE_RATE:, 1])
    (folder / "segments").unlink()
    [manifest] = prepare_kaldi([folder], tmp_path / "mean", audio=tmp_path)
    assert_allclose(samples_of(manifest, "call"), stereo.mean(axis=1), atol=1e-7)


def test_the_sides_of_a_call_are_its_channels(tmp_path: Path) -> None:
    stereo = write_noise(tmp_path / "sw02001.wav", 1.0, 0, channels=2)
    folder = table(
        tmp_path / "swbd",
        wav_scp="sw02001-A sw02001.wav\nsw02001-B sw02001.wav\n",
        reco2file_and_channel="sw02001-A sw02001 A\nsw02001-B sw02001 B\n",
    )
    [manifest] = prepare_kaldi([folder], tmp_path / "out", audio=tmp_path)
    for column, side in enumerate("AB"):
        assert_allclose(samples_of(manifest, f"sw02001-{side}"), stereo[:, column])


def test_a_relative_path_of_a_recipe_starts_two_folders_above_its_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_noise(tmp_path / "s5/wav/a.wav", 1.0, 0)
    folder = table(tmp_path / "s5/data/train", wav_scp="a wav/a.wav\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    [manifest] = prepare_kaldi([folder], tmp_path / "out")
    assert list(rows(manifest)) == ["a"]


def test_a_command_is_refused_and_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_noise(tmp_path / "a.wav", 1.0, 0)
    folder = table(tmp_path / "train", wav_scp=f"a {tmp_path}/a.wav\nb touch {tmp_path}/ran; cat {tmp_path}/a.wav |\n")
    sentence = refused(capsys, "prepare", "kaldi", str(folder), str(tmp_path / "out"))
    assert f"{folder / 'wav.scp'}: 1 of its 2 recordings are commands, such as b (touch" in sentence
    assert "put the path of the audio file" in sentence
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_what_is_passed_over_is_listed_with_its_reason(tmp_path: Path) -> None:
    for number, name in enumerate("abc"):
        write_noise(tmp_path / f"{name}.wav", 1.0, number)
    write_noise(tmp_path / "low.wav", 1.0, 3, rate=8000)
    segments = [
        *("good a 0 0.5", "over b 0.5 1.3", "late b 0.5 2", "after b 1.5 2", "short b 0 0.01", "odd b zero 1"),
        *("gone d 0 1", "again a 0 0.5", "silent a 0.5 1", "third c 0 1 1", "tel low 0 1"),
    ]
    names = [line.split()[0] for line in segments]
    text = "".join(f"{name} words of {name}\n" for name in names if name != "silent")
    folder = table(
        tmp_path / "data",
        wav_scp="a a.wav\nb b.wav\nc c.wav\nlow low.wav\nunused c.wav\n",
        segments="\n".join(segments),
        text=text,
    )
    [manifest] = prepare_kaldi([folder], tmp_path / "out", audio=tmp_path)
    listed = {name: row[:2] for name, row in rows(manifest).items()}
    assert listed == {"again": (0.0, 0.5), "over": (0.5, 0.5), "tel": (0.0, 1.0)}
    listing = (tmp_path / "out/data.refused.tsv").read_text()
    for name, reason in {
        "late": "it ends at 2.00 s, and its recording has 1.00 s",
        "after": "it starts at 1.50 s, and its recording has 1.00 s",
        "short": "too short: 160 samples",
        "odd": "is not: utterance, recording, start, end",
        "gone": "its recording, d, is not in",
        "silent": "no words for it in",
        "third": "no channel 1, counted from 0: its recording has 1",
    }.items():
        assert any(f"\t{name}: " in line and reason in line for line in listing.splitlines()), (name, listing)
    assert "the same segment as again in" in listing
    assert "no segments of it in" in listing
    assert len(listing.splitlines()) == 9
    assert "recorded at 8000 Hz" in (tmp_path / "out/data.remarks.tsv").read_text()


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "no wav.scp in it"),
        ({"wav_scp": ""}, "no recordings in it"),
        ({"wav_scp": "a\n"}, "line 1 has nothing after 'a'"),
        ({"wav_scp": "a x.wav\na y.wav\n"}, "line 2 has the id 'a' of an earlier line"),
        ({"wav_scp": "a /data/raw_wav.1.ark:17\n"}, "recordings in archives of Kaldi"),
    ],
)
def test_an_unusable_directory_is_refused_in_a_sentence(tmp_path: Path, files: dict[str, str], sentence: str) -> None:
    folder = table(tmp_path / "data", **files)
    with pytest.raises(UserError, match=sentence):
        prepare_kaldi([folder], tmp_path / "out")


def test_two_directories_of_one_name_are_refused(tmp_path: Path) -> None:
    folders = [table(tmp_path / corpus / "train", wav_scp="a a.wav\n") for corpus in ("one", "two")]
    with pytest.raises(UserError, match=r"the name of that of .*one/train, train"):
        prepare_kaldi(folders, tmp_path / "out")


def test_several_directories_are_prepared_at_once(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "dev")):
        write_noise(tmp_path / f"{name}.wav", 1.0, number)
        table(tmp_path / "data" / name, wav_scp=f"{name} {name}.wav\n", text=f"{name} the words\n")
    folders = [str(tmp_path / "data" / name) for name in ("train", "dev")]
    main(["prepare", "kaldi", *folders, str(tmp_path / "out"), "--audio", str(tmp_path)])
    assert [*rows(tmp_path / "out/train.jsonl.gz")] == ["train"]
    assert [*rows(tmp_path / "out/dev.jsonl.gz")] == ["dev"]
