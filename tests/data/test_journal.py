"""What was made before is not made again, unless it was made of or with something else; real outputs, real models."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import run_verb, save_ctc
from lhotse import CutSet

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.journal import Journal
from hubert_lightning.features.mfcc import mfcc
from hubert_lightning.files import unfinished_name
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.units.kmeans_file import save_kmeans


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_ctc(tmp_path / "best.ckpt", spread=3.0)
    return tmp_path / "best.ckpt"


@pytest.fixture
def kmeans(tmp_path: Path, train_cuts: CutSet) -> Path:
    rows = torch.cat([mfcc(read_waveform(cut)) for cut in list(train_cuts)[:4]])
    save_kmeans(tmp_path / "kmeans.safetensors", [rows[:: len(rows) // 20][:20]], {"features": "mfcc"})
    return tmp_path / "kmeans.safetensors"


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file has each name, and since when: of one that was written again, another."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def changed(before: dict[str, tuple[int, int]], folder: Path) -> set[str]:
    return {name for name, one in state(folder).items() if before.get(name) != one and not name.startswith(".")}


def skipped(captured: str) -> int:
    found = re.search(r"hubert: skipped (\d+) of \d+ files, finished before with the same model and settings", captured)
    return int(found[1]) if found else 0


def test_transcripts_are_made_of_what_is_new_and_no_more(
    model: Path, speech: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_verb("transcribe", model, *speech[:2], "--output", out) == 0
    before = state(out)
    assert run_verb("transcribe", model, *speech, "--output", out) == 0
    assert changed(before, out) == {"c.txt"}
    assert skipped(capfd.readouterr().err) == 2
    before = state(out)
    assert run_verb("transcribe", model, *speech, "--output", out) == 0
    assert state(out) == before
    assert skipped(capfd.readouterr().err) == 3


def test_a_transcript_that_is_gone_is_made_again_and_one_that_was_edited_stays(
    model: Path, speech: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_verb("transcribe", model, *speech, "--output", out)
    first = (out / "a.txt").read_text()
    (out / "a.txt").unlink()
    (out / "b.txt").write_text("corrected by hand\n")
    run_verb("transcribe", model, *speech, "--output", out)
    assert (out / "a.txt").read_text() == first
    assert (out / "b.txt").read_text() == "corrected by hand\n"


def test_a_recording_that_changed_is_transcribed_again(model: Path, speech: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_verb("transcribe", model, *speech, "--output", out)
    before = state(out)
    soundfile.write(speech[0], soundfile.read(speech[0])[0][::-1], SAMPLE_RATE)
    run_verb("transcribe", model, *speech, "--output", out)
    assert changed(before, out) == {"a.txt"}


@pytest.mark.parametrize("other", ["model", "precision", "decoder"])
def test_transcripts_of_another_model_or_other_settings_are_made_again(
    other: str, model: Path, speech: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given: list[object] = ["transcribe", model, *speech, "--output", out]
    run_verb(*given)
    before, words = state(out), (out / "a.txt").read_text()
    if other == "model":
        save_ctc(model, seed=1, spread=3.0)  # under the same name
    (tmp_path / "decoder.json").write_text(json.dumps({"beam_size": 5, "num_workers": 0}))
    more = {"precision": ["--precision", "bfloat16"], "decoder": ["--decoder", tmp_path / "decoder.json"]}
    run_verb(*given, *more.get(other, []))
    assert changed(before, out) == {"a.txt", "b.txt", "c.txt"}
    assert other != "model" or (out / "a.txt").read_text() != words


def test_words_are_aligned_again_where_the_text_is_another(model: Path, speech: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for path in speech:
        path.with_suffix(".txt").write_text("one two")
    run_verb("align", model, *speech, "--output", out)
    before = state(out)
    speech[1].with_suffix(".txt").write_text("one three")
    run_verb("align", model, *speech, "--output", out)
    assert changed(before, out) == {"b.ctm"}


def test_transcripts_beside_the_audio_go_on_although_those_of_the_user_are_refused(
    model: Path, speech: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_verb("transcribe", model, *speech[:2], "--output", tmp_path) == 0
    assert run_verb("transcribe", model, *speech, "--output", tmp_path) == 0
    assert skipped(capfd.readouterr().err) == 2
    soundfile.write(tmp_path / "d.wav", np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    (tmp_path / "d.txt").write_text("theirs")
    assert run_verb("transcribe", model, *speech, tmp_path / "d.wav", "--output", tmp_path) == 2
    assert "d.txt: lies beside its audio" in capfd.readouterr().err
    assert (tmp_path / "d.txt").read_text() == "theirs"


FORMATS = [("jsonl", False), ("jsonl", True), ("kaldi", False), ("kaldi", True), ("npz", False), ("npz", True)]


def content(path: Path) -> dict[str, object]:
    """An output and what lies beside it: bytes, but of npz, which has the time in it, the arrays."""
    if path.suffix == ".npz":
        return {name: array.tolist() for name, array in np.load(path).items()}
    beside = path.with_name(path.name + ".durations")
    return {one.suffix: one.read_bytes() for one in (path, beside) if one.exists()}


@pytest.mark.parametrize(("format", "deduplicate"), FORMATS)
def test_units_are_made_of_what_is_new_and_no_more(
    format: str,
    deduplicate: bool,
    kmeans: Path,
    speech: list[Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    suffix = {"jsonl": "jsonl", "kaldi": "txt", "npz": "npz"}[format]
    once, out = tmp_path / f"once.{suffix}", tmp_path / f"out.{suffix}"
    given = ["--kmeans", kmeans, "--format", format, *(["--deduplicate"] if deduplicate else [])]
    assert run_verb("units", "mfcc", *speech, *given, "--output", once) == 0
    capfd.readouterr()
    assert run_verb("units", "mfcc", speech[2], speech[0], *given, "--output", out) == 0
    assert run_verb("units", "mfcc", *speech, *given, "--output", out) == 0
    assert skipped(capfd.readouterr().err) == 2
    assert content(out) == content(once)
    before = state(tmp_path)
    assert run_verb("units", "mfcc", *speech, *given, "--output", out) == 0
    said = capfd.readouterr().err
    assert skipped(said) == 3
    assert "real time" not in said
    assert state(tmp_path) == before
    soundfile.write(speech[1], soundfile.read(speech[1])[0][::-1], SAMPLE_RATE, format="FLAC")
    assert run_verb("units", "mfcc", *speech, *given, "--output", out) == 0
    assert skipped(capfd.readouterr().err) == 2
    assert content(out) != content(once)
    assert (
        run_verb("units", "mfcc", *speech[:2], *given, "--output", out) == 0
    )  # no others than those that are asked for
    assert run_verb("units", "mfcc", *speech[:2], *given, "--output", once) == 0
    assert content(out) == content(once)


def test_units_of_other_settings_or_an_output_that_changed_are_made_again(
    kmeans: Path, speech: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    given: list[object] = ["units", "mfcc", *speech, "--kmeans", kmeans, "--output", out]
    run_verb(*given)
    whole = out.read_bytes()
    out.write_bytes(whole[:100])
    capfd.readouterr()
    run_verb(*given)
    assert skipped(capfd.readouterr().err) == 0
    assert out.read_bytes() == whole
    run_verb(*given, "--window", 20)
    assert skipped(capfd.readouterr().err) == 0


def test_a_journal_that_was_cut_short_or_damaged_loses_no_more_than_that(tmp_path: Path) -> None:
    recordings = [tmp_path / name for name in "abc"]
    for recording in recordings:
        recording.write_text(recording.name)
    with Journal(tmp_path / "journal", {"model": 1}) as journal:
        for recording in recordings:
            journal.add(recording, number=1)
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    damages = [b"", b"\0" * 50 + b"\n", b'{"recording": 3}\n', b"[" * 100_000 + b"\n", b"[]\n", b"\xff\xfe\n"]
    damages += [lines[2][:cut] for cut in range(1, len(lines[2]) - 1, 7)]
    for damage in damages:
        (tmp_path / "journal").write_bytes(b"".join([*lines[:2], damage]))
        with Journal(tmp_path / "journal", {"model": 1}) as journal:
            assert [one in journal for one in recordings] == [True, False, False]
            journal.add(recordings[1], number=2)
        with Journal(tmp_path / "journal", {"model": 1}) as journal:
            assert [journal.row(one).get("number") for one in recordings] == [1, 2, None]
    for damage in (b"", b"\0", b"{}\n", b"[]\n", lines[0][:-2]):
        (tmp_path / "journal").write_bytes(damage)
        with Journal(tmp_path / "journal", {"model": 1}) as journal:
            assert len(journal) == 0


def test_a_link_at_the_name_of_a_journal_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "a").touch()
    (tmp_path / "journal").symlink_to(tmp_path / "theirs")
    with Journal(tmp_path / "journal", {}) as journal:
        journal.add(tmp_path / "a")
        journal.finish()
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert not (tmp_path / "journal").is_symlink()


def test_two_that_write_one_journal_take_nothing_of_one_another(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    with Journal(tmp_path / "journal", {"model": 1}) as first, Journal(tmp_path / "journal", {"model": 2}) as second:
        first.add(tmp_path / "a", units=[1])
        second.add(tmp_path / "a", units=[2])
        first.add(tmp_path / "b", units=[1])
        assert [first.row(tmp_path / name)["units"] for name in "ab"] == [[1], [1]]
        assert second.row(tmp_path / "a")["units"] == [2]


def test_a_journal_with_an_output_for_each_recording_keeps_the_lines_of_other_settings(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for recording in (a, b):
        recording.write_text(recording.name)
    with Journal(tmp_path / "journal", {"model": 1}, name_output=str) as journal:
        journal.add(a, output="a.txt", digest="1")
        journal.add(b, output="b.txt", digest="1")
        journal.finish()
    with Journal(tmp_path / "journal", {"model": 2}, name_output=str) as journal:
        assert journal.owner("b.txt") == str(b)
        journal.add(a, output="a.txt", digest="2")
    with Journal(tmp_path / "journal", {"model": 2}, name_output=str) as journal:  # after an interruption
        assert [one in journal for one in (a, b)] == [True, False]
        assert [journal.row_of_any_settings(one)["digest"] for one in (a, b)] == ["2", "1"]
        assert journal.owner("b.txt") == str(b)
        assert journal.add(a, output="b.txt") == str(b)
        journal.free("b.txt")
        assert journal.add(a, output="b.txt") is None
        assert (journal.owner("a.txt"), journal.owner("b.txt")) == (None, str(a))


ADD = """
import sys
from pathlib import Path
from hubert_lightning.data.journal import Journal
folder, first = Path(sys.argv[1]), int(sys.argv[2])
with Journal(folder / "journal", {"model": 1}) as journal:
    for number in range(first, 300, 3):
        journal.add(folder / f"{number}.wav", number=number)
        if number % 100 == first:
            journal.finish()
    if first:  # the other one is killed before its end
        journal.finish()
"""


def test_jobs_that_add_to_one_journal_at_once_lose_no_line(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number}.wav").write_text(str(number))
    jobs = [subprocess.Popen([sys.executable, "-c", ADD, tmp_path, str(first)]) for first in range(3)]
    assert [job.wait(60) for job in jobs] == [0, 0, 0]
    with Journal(tmp_path / "journal", {"model": 1}) as journal:
        assert len(journal) == 300
        assert all(journal.row(tmp_path / f"{number}.wav")["number"] == number for number in range(300))


def test_a_job_keeps_what_another_that_ended_meanwhile_added(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name).write_text(name)
    with Journal(tmp_path / "journal", {}) as first, Journal(tmp_path / "journal", {}) as second:
        first.add(tmp_path / "d", number=1)
        second.add(tmp_path / "c", number=2)
        first.finish()
        with (tmp_path / "journal").open("ab") as file:
            file.write(b'{"recording": "cut short')
        second.add(tmp_path / "b", number=2)
        first.add(tmp_path / "a", number=1)
        first.finish()
    with Journal(tmp_path / "journal", {}) as journal:
        assert [journal.row(tmp_path / name).get("number") for name in "abcd"] == [1, 2, 2, 1]
    assert len((tmp_path / "journal").read_bytes().splitlines()) == 5


def test_a_journal_is_read_once_and_not_once_a_recording(tmp_path: Path) -> None:
    """Questions of 100 000 recordings take as long as reading does, not the square."""
    (tmp_path / "a").touch()
    status = os.stat(tmp_path / "a")
    identity = {"bytes": 0, "modified": status.st_mtime_ns}
    with Journal(tmp_path / "journal", {}) as journal:
        journal.add(tmp_path / "a")
    with (tmp_path / "journal").open("a") as file:
        for number in range(100_000):
            file.write(json.dumps({"recording": f"/nowhere/{number}", **identity}) + "\n")
    with Journal(tmp_path / "journal", {}) as journal:
        assert len(journal) == 100_001
        assert sum(Path(f"/nowhere/{number}") in journal for number in range(1_000)) == 0
        assert tmp_path / "a" in journal


def test_what_a_kill_left_is_removed_although_all_is_done(model: Path, speech: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_verb("transcribe", model, *speech, "--output", out)
    left = unfinished_name(out / ".made-text.jsonl")
    left.write_bytes(b"half")
    run_verb("transcribe", model, *speech, "--output", out)
    assert not left.exists()
