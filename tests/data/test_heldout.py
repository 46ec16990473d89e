"""Recordings that `prepare folder` holds out for validation."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import CutSet, Recording
from lhotse.cut import Cut

from hubert_lightning.data.heldout import LONG_ENOUGH, SHORTEST, chosen_groups, split
from hubert_lightning.data.manifest import read_manifest, speaker_of
from hubert_lightning.data.prepare import prepare_folder
from hubert_lightning.data.prepare_split import prepare_split, split_names
from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE


def record(path: Path, seconds: float = 2.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path))).uniform(-0.5, 0.5, round(seconds * SAMPLE_RATE))
    soundfile.write(path, noise, SAMPLE_RATE)
    return path


def cuts_of(manifest: Path) -> list[Cut]:
    return list(read_manifest(manifest))


@given(st.dictionaries(st.text(max_size=5), st.floats(0.1, 100), max_size=30), st.floats(0, 0.99), st.randoms())
@settings(max_examples=40, deadline=None)
def test_groups_are_chosen_by_name_alone_and_fit_into_the_limit(
    sizes: dict[str, float], share: float, random: object
) -> None:
    limit = share * sum(sizes.values())
    chosen = chosen_groups(sizes, limit)
    names = list(sizes)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert chosen == chosen_groups({name: sizes[name] for name in names}, limit)
    assert bool(chosen) == (len(sizes) > 1 and limit > 0)
    if len(chosen) > 1:
        assert sum(sizes[name] for name in chosen) <= limit
    elif chosen and sizes[next(iter(chosen))] > limit:
        assert sizes[next(iter(chosen))] == min(sizes.values())


def test_a_folder_is_divided_into_training_and_validation(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(40):
        record(tmp_path / "talks" / f"{number}.wav")
    train, dev = prepare_folder(tmp_path / "talks", tmp_path / "out")
    assert (train.name, dev.name) == ("talks.jsonl.gz", "talks-dev.jsonl.gz")
    heldout = {cut.id for cut in cuts_of(dev)}
    assert len(heldout) == 2
    assert {cut.id for cut in cuts_of(train)} == {f"{number}.wav" for number in range(40)} - heldout
    printed = capsys.readouterr().out
    assert "talks: held out for validation: 2 recordings, 5.0 % of the audio (--heldout 0 holds out none)" in printed
    again = prepare_folder(tmp_path / "talks", tmp_path / "again")
    assert [path.read_bytes() for path in again] == [train.read_bytes(), dev.read_bytes()]
    assert prepare_folder(tmp_path / "talks", tmp_path / "whole", heldout=0) == [tmp_path / "whole/talks.jsonl.gz"]
    with pytest.raises(UserError, match=r"talks\.jsonl\.gz: exists already and lists other audio"):
        prepare_folder(tmp_path / "talks", tmp_path / "out", heldout=0)


def test_pieces_of_a_recording_stay_together(tmp_path: Path) -> None:
    for number in range(6):
        record(tmp_path / "in" / f"{number}.wav", 3)
    train, dev = prepare_folder(tmp_path / "in", tmp_path / "out", max_duration=1)
    assert len(cuts_of(dev)) == 3
    assert not {cut.recording.id for cut in cuts_of(train)} & {cut.recording.id for cut in cuts_of(dev)}


def test_whole_speakers_are_held_out_if_many_are_known(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for speaker in range(12):
        for number in range(2):
            record(tmp_path / "in" / f"speaker{speaker}" / f"{number}.wav")
    train, dev = prepare_folder(tmp_path / "in", tmp_path / "out", heldout=0.2)
    assert len({speaker_of(cut) for cut in cuts_of(dev)}) == 2
    assert len(cuts_of(dev)) == 4
    assert not {speaker_of(cut) for cut in cuts_of(train)} & {speaker_of(cut) for cut in cuts_of(dev)}
    assert "4 recordings, all of 2 of 12 speakers, 16.7 % of the audio" in capsys.readouterr().out


def test_a_recording_too_short_to_validate_on_is_not_held_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(4):
        record(tmp_path / "in" / f"{number}.wav", 0.03)
    record(tmp_path / "in" / "4.wav", SHORTEST)
    assert len(prepare_folder(tmp_path / "in", tmp_path / "out")) == 1
    assert "in: all recordings but one are shorter than 0.1 s, so none is held out" in capsys.readouterr().out
    record(tmp_path / "in" / "5.wav", LONG_ENOUGH)
    _, dev = prepare_folder(tmp_path / "in", tmp_path / "more")
    assert [cut.id for cut in cuts_of(dev)] == ["4.wav"]
    record(tmp_path / "in" / "6.wav", LONG_ENOUGH)
    _, dev = prepare_folder(tmp_path / "in", tmp_path / "most")
    assert {cut.id for cut in cuts_of(dev)} < {"5.wav", "6.wav"}


def test_one_recording_is_for_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record(tmp_path / "in" / "a.wav")
    (tmp_path / "in" / "b.wav").write_bytes(b"no audio")
    [manifest] = prepare_folder(tmp_path / "in", tmp_path / "out")
    assert len(cuts_of(manifest)) == 1
    assert "in: one recording, so none is held out for validation" in capsys.readouterr().out


def test_recordings_without_a_transcript_can_be_left_out(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        record(tmp_path / "in" / f"{name}.wav", 3)
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.txt").write_text("one two")
    [manifest] = prepare_folder(tmp_path / "in", tmp_path / "out", max_duration=1, heldout=0, transcribed_only=True)
    assert [(cut.id, cut.supervisions[0].text) for cut in cuts_of(manifest)] == [
        ("a.wav", "one two"),
        ("b.wav", "one two"),
    ]
    assert "c.wav\tno transcript beside it" in (tmp_path / "out" / "in.refused.tsv").read_text()


def test_the_share_is_checked_before_any_audio_is_read(tmp_path: Path) -> None:
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match=r"heldout is .*; it is a share of the audio, from 0 to below 1"):
            prepare_folder(tmp_path, tmp_path / "out", heldout=share)


def seconds_held_out(durations: list[float], share: float = 0.05) -> list[float]:
    """Durations of the recordings that are held out of a folder of recordings."""
    cuts = [
        Recording(str(number), [], SAMPLE_RATE, round(seconds * SAMPLE_RATE), seconds).to_cut()
        for number, seconds in enumerate(durations)
    ]
    train, dev, _ = split(cuts, share)
    assert sorted(cut.id for cut in [*train, *dev]) == sorted(cut.id for cut in cuts)
    return [cut.duration for cut in dev]


def test_one_short_recording_is_not_all_that_is_held_out() -> None:
    assert sum(seconds_held_out([3.0, *[600.0] * 9])) == 603.0
    assert seconds_held_out([10.0] * 30) == [10.0, 10.0]
    assert seconds_held_out([10.0] * 100) == [10.0] * 5


def test_no_more_than_a_fifth_is_held_out_to_have_two_recordings() -> None:
    assert seconds_held_out([10.0] * 5) == [10.0]
    assert seconds_held_out([10.0] * 2) == [10.0]
    assert seconds_held_out([600.0, 5.0, 600.0]) == [5.0]


def test_a_manifest_is_divided_without_its_audio(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(10):
        record(tmp_path / "in" / f"{number}.wav")
    [first] = prepare_folder(tmp_path / "in", tmp_path / "first", heldout=0)
    (tmp_path / "second").mkdir()
    second = tmp_path / "second" / first.name
    CutSet([cut.with_id(f"again-{cut.id}") for cut in cuts_of(first)]).to_file(second)
    shutil.rmtree(tmp_path / "in")
    capsys.readouterr()
    made = prepare_split([first, second], tmp_path / "out", heldout=0.2)
    assert [path.name for path in made] == [
        *("in.jsonl.gz", "in-dev.jsonl.gz", "second-in.jsonl.gz", "second-in-dev.jsonl.gz"),
    ]
    train, dev = ({cut.id for cut in cuts_of(path)} for path in made[:2])
    assert (len(train), len(dev), train & dev) == (8, 2, set())
    assert "in: held out for validation: 2 recordings, 20.0 % of the audio" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"in\.jsonl\.gz: would replace the manifest that is divided"):
        prepare_split([first], tmp_path / "first")
    assert prepare_split([first], tmp_path / "out", heldout=0.2) == made[:2]
    with pytest.raises(UserError, match="exists already and lists other audio; remove it, or choose another OUT"):
        prepare_split([first], tmp_path / "out", heldout=0.5)
    assert split_names([Path("a/x.jsonl"), Path("b/x.jsonl.gz"), Path("c/b/x.jsonl")]) == ["x", "b-x", "x-2"]


def test_audio_that_was_held_out_before_is_not_trained_on_beside_its_manifest(tmp_path: Path) -> None:
    for number in range(10):
        record(tmp_path / "in" / f"{number}.wav")
    [whole] = prepare_folder(tmp_path / "in", tmp_path / "whole", heldout=0)
    train, dev = prepare_split([whole], tmp_path / "out", heldout=0.2)
    train.unlink()
    with pytest.raises(UserError, match=r"in-dev\.jsonl\.gz: holds audio out that would be trained on; remove it"):
        prepare_split([whole], tmp_path / "out", heldout=0)
    with pytest.raises(UserError, match=r"in-dev\.jsonl\.gz: holds audio out that would be trained on; remove it"):
        prepare_folder(tmp_path / "in", tmp_path / "out", heldout=0)
    assert not train.exists()
    CutSet([cut.with_id(f"other-{cut.id}") for cut in cuts_of(dev)]).to_file(dev)
    assert prepare_split([whole], tmp_path / "out", heldout=0) == [train]


def test_a_manifest_and_one_that_was_held_out_of_it_do_not_replace_each_other(tmp_path: Path) -> None:
    for number in range(20):
        record(tmp_path / "in" / f"{number}.wav")
    both = prepare_folder(tmp_path / "in", tmp_path / "made", heldout=0.3)
    made = prepare_split(both, tmp_path / "out", heldout=0.3)
    assert len(set(made)) == 4
    before = [{cut.id for cut in cuts_of(path)} for path in both]
    train, dev, train_of_dev, dev_of_dev = ({cut.id for cut in cuts_of(path)} for path in made)
    assert [train | dev, train_of_dev | dev_of_dev] == before
    assert split_names([Path("x-dev.jsonl"), Path("a/x.jsonl")]) == ["x-dev", "a-x"]
