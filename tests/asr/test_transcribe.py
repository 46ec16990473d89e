"""Recordings of any format and length become transcripts, even if some of them are broken."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import read_samples, run_verb, save_ctc
from lhotse import CutSet
from torch import Tensor

from hubert_lightning.asr.ctc_model import WINDOW_FRAMES, CTCModel, load_ctc
from hubert_lightning.asr.decoding import greedy
from hubert_lightning.asr.transcript_files import check_names, journal_of, transcript_paths, write_all
from hubert_lightning.asr.transcript_formats import FORMATS, Transcript
from hubert_lightning.asr.word_times import Word, word_times
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.examine import examine
from hubert_lightning.features.windows import quiet_windows
from hubert_lightning.frames import HOP, SAMPLE_RATE, num_samples
from hubert_lightning.vocabulary import LETTERS, Vocabulary


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with another token at almost every frame, so that a lost or doubled frame changes the text."""
    path = tmp_path_factory.mktemp("model") / "best.ckpt"
    save_ctc(path, spread=3.0)
    return path


def greedy_text(model: Path | CTCModel, waveform: Tensor) -> str:
    loaded = load_ctc(model) if isinstance(model, Path) else model
    log_probs = loaded(waveform[None])
    [text] = greedy(log_probs, torch.tensor([log_probs.shape[1]]), loaded.vocabulary)
    return text


def test_each_file_has_the_text_that_it_has_alone(
    model: Path, speech: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb("transcribe", model, *speech) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines == [[str(path), greedy_text(model, read_samples(path))] for path in speech]
    assert all(len(text) > 20 for _, text in lines)
    assert run_verb("transcribe", model, speech[0]) == 0
    assert capsys.readouterr().out == greedy_text(model, read_samples(speech[0])) + "\n"


def test_a_folder_is_the_audio_in_it(model: Path, speech: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (speech[0].parent / "notes.txt").write_text("no audio")
    assert run_verb("transcribe", model, speech[0].parent, speech[1]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == [str(path) for path in speech]


def test_finished_recordings_are_skipped_unless_resume_is_false(
    model: Path, speech: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("transcribe", model, speech[0], "--format", "vtt", "--output", tmp_path / "out")
    written = tmp_path / "out" / "a.vtt"
    assert run_verb(*command) == 0
    content, before = written.read_text(), written.stat().st_ino
    assert content.startswith("WEBVTT\n\n00:00:0")
    assert run_verb(*command) == 0
    assert "hubert: skipped 1 of 1 file, finished before" in capsys.readouterr().err
    assert written.stat().st_ino == before
    assert run_verb(*command, "--resume", "false") == 0
    assert "skipped" not in capsys.readouterr().err
    assert written.stat().st_ino != before
    assert written.read_text() == content
    assert run_verb(*command, "--subtitles.columns", "20") == 0  # other settings
    assert "skipped" not in capsys.readouterr().err
    assert all(len(line) <= 20 for line in written.read_text().splitlines() if "-->" not in line)


def test_broken_files_do_not_stop_the_others(
    model: Path, speech: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = speech[0].read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.mp3").write_text("no audio")
    soundfile.write(tmp_path / "blink.wav", np.zeros(100), SAMPLE_RATE)
    soundfile.write(tmp_path / "silent.wav", np.zeros(2 * SAMPLE_RATE), SAMPLE_RATE)
    bad = [tmp_path / name for name in ("cut.wav", "empty.wav", "text.mp3", "blink.wav", "absent.wav")]
    out = tmp_path / "out"
    assert run_verb("transcribe", model, speech[0], *bad, *speech[1:], tmp_path / "silent.wav", "--output", out) == 1
    assert {path.name for path in out.glob("[!.]*")} == {"a.txt", "b.txt", "c.txt", "silent.txt"}
    assert [(out / f"{path.stem}.txt").read_text() for path in speech] == [
        greedy_text(model, read_samples(path)) + "\n" for path in speech
    ]
    captured = capfd.readouterr().err
    for name, reason in (
        ("cut.wav", "truncated: its header promises"),
        ("empty.wav", "empty: it has no bytes; copy it again"),
        ("text.mp3", "unreadable: it is no audio, or a part of it is lost; copy it again, or convert it"),
        ("blink.wav", "too short: 100 samples"),
        ("absent.wav", "not there: correct its path"),
    ):
        assert re.search(rf"^hubert: {tmp_path / name}: {reason}", captured, re.MULTILINE)
    assert f"hubert: {tmp_path / 'silent.wav'}: silent: every sample is 0" in captured
    assert "hubert: 5 of 9 files failed" in captured
    assert "Traceback" not in captured


def test_a_file_that_breaks_after_it_was_examined_fails_alone(
    model: Path, speech: list[Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubert_lightning.asr import transcriber

    examine = transcriber.examine

    def then_remove(paths, progress):  # type: ignore[no-untyped-def]
        result = examine(paths, progress)
        speech[1].unlink()
        return result

    monkeypatch.setattr(transcriber, "examine", then_remove)
    assert run_verb("transcribe", model, *speech) == 1
    captured = capfd.readouterr()
    assert [line.split("\t")[0] for line in captured.out.splitlines()] == [str(speech[0]), str(speech[2])]
    assert "hubert: 1 of 3 files failed" in captured.err


def test_a_telephone_recording_in_stereo_is_transcribed_with_a_remark(
    model: Path, speech: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    left = read_samples(speech[0])[::2].numpy()
    soundfile.write(tmp_path / "call.wav", np.stack([left, 0.5 * left], axis=1), 8_000)
    assert run_verb("transcribe", model, tmp_path / "call.wav") == 0
    captured = capfd.readouterr()
    assert len(captured.out) > 20
    assert (
        "call.wav: low rate: recorded at 8000 Hz; a model of 16 kHz recordings makes more errors on it" in captured.err
    )


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_a_format_unknown_to_libsndfile_is_transcribed(
    model: Path, speech: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["ffmpeg", "-v", "error", "-i", speech[0], "-c:a", "alac", tmp_path / "a.m4a"], check=True)
    assert run_verb("transcribe", model, tmp_path / "a.m4a") == 0
    assert capsys.readouterr().out == greedy_text(model, read_samples(speech[0])) + "\n"


def test_a_long_recording_loses_and_doubles_nothing_at_its_seams(
    model: Path, tmp_path: Path, train_cuts: CutSet, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its text is that of the joined log-probabilities of its windows."""
    waveform = torch.cat([read_waveform(cut) for cut in list(train_cuts)[:30]])
    soundfile.write(tmp_path / "long.wav", waveform.numpy(), SAMPLE_RATE, subtype="FLOAT")
    assert run_verb("transcribe", model, tmp_path / "long.wav") == 0
    cuts, _, _ = examine([tmp_path / "long.wav"])
    loaded = load_ctc(model)
    windows = quiet_windows(cuts[0], WINDOW_FRAMES)
    rows = []
    for first, last, start, end in windows:
        samples_of = None if last == windows[-1].last else num_samples(last - first)
        rows.append(loaded(read_waveform(cuts[0], first * HOP, samples_of)[None])[0, start - first : end - first])
    log_probs = torch.cat(rows)
    assert len(windows) > 2
    [expected] = greedy(log_probs[None], torch.tensor([len(log_probs)]), loaded.vocabulary)
    assert capsys.readouterr().out.split() == expected.split()


def test_every_format_has_the_same_words_and_times(
    model: Path, speech: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for format in FORMATS:
        assert run_verb("transcribe", model, *speech, "--format", format, "--output", tmp_path / "out") == 0
    for path in speech:
        text = (tmp_path / "out" / f"{path.stem}.txt").read_text().strip()
        content = json.loads((tmp_path / "out" / f"{path.stem}.json").read_text())
        ctm = [line.split() for line in (tmp_path / "out" / f"{path.stem}.ctm").read_text().splitlines()]
        srt = (tmp_path / "out" / f"{path.stem}.srt").read_text()
        assert content["text"] == text
        assert content["file"] == str(path)
        words = content["words"]
        assert [word["word"] for word in words] == text.split()
        assert all(a["start"] < a["end"] <= b["start"] for a, b in pairwise(words))
        assert 0 <= words[0]["start"] < words[-1]["end"] <= content["duration"] + 0.02
        assert all(0 < word["confidence"] <= 1 for word in words)
        assert [(w, float(s), float(s) + float(d)) for _, _, s, d, w, _ in ctm] == [
            (word["word"], pytest.approx(word["start"]), pytest.approx(word["end"])) for word in words
        ]
        captions = [block.split("\n") for block in srt.strip().split("\n\n")]
        assert [caption[0] for caption in captions] == [str(n + 1) for n in range(len(captions))]
        shown = [word for caption in captions for line in caption[2:] for word in line.split()]
        assert "".join(shown) == "".join(text.split())  # longer words are parted
        assert {word for word in text.split() if len(word) <= 20} <= set(shown)
        assert all(len(line) <= 42 for caption in captions for line in caption[2:])


def test_a_known_text_is_aligned_to_the_words_of_its_recording(
    model: Path, speech: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_verb("transcribe", model, *speech, "--format", "ctm")
    expected = capsys.readouterr().out
    for path in speech:
        path.with_suffix(".txt").write_text(greedy_text(model, read_samples(path)).lower())
    assert run_verb("align", model, *speech) == 0
    assert capsys.readouterr().out == expected
    speech[1].with_suffix(".txt").unlink()
    speech[2].with_suffix(".txt").write_text("5 words")
    speech[0].with_suffix(".txt").write_bytes("où".encode("latin-1"))
    assert run_verb("align", model, speech[0]) == 1
    reason = f"{speech[0]}: its transcript, {speech[0].stem}.txt, is not UTF-8: convert it"
    assert reason in capsys.readouterr().err
    speech[0].with_suffix(".txt").write_text(greedy_text(model, read_samples(speech[0])))
    assert run_verb("align", model, *speech) == 1
    captured = capsys.readouterr()
    assert f"{speech[1]}: no words: put them, in letters, beside it in a .txt file" in captured.err
    assert f"{speech[2]}: its text has ['5'], which are not tokens of the model" in captured.err
    assert captured.out
    assert expected.startswith(captured.out)
    assert run_verb("align", model, speech[0], "--text", "A B " * 500) == 1
    assert "too few for them; give the text of this recording" in capsys.readouterr().err


def test_subtitles_are_short_and_begin_anew_after_a_pause() -> None:
    words = [Word("WORD", 0.5 * n, 0.5 * n + 0.4, 1.0) for n in range(20)] + [Word("LATE", 3599.9996, 3600.5, 1.0)]
    captions = [block.split("\n") for block in FORMATS["srt"](Transcript("a", 3601, "", words)).strip().split("\n\n")]
    assert captions[0] == ["1", "00:00:00,000 --> 00:00:04,900", *[" ".join(["WORD"] * 5)] * 2]  # of similar length
    assert captions[1][1] == "00:00:05,000 --> 00:00:09,900"
    assert captions[2] == ["3", "01:00:00,000 --> 01:00:01,000", "LATE"]  # long enough to be read


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["other/a.flac", "other/A.flac", "--output", "out"], "other/a.flac and other/A.flac: both would be one file"),
        (["a.wav", "other/a.flac", "--format", "ctm"], "a.wav and other/a.flac: both are called a in ctm"),
        (["a b.wav", "other/a_b.flac", "--format", "ctm"], "a b.wav and other/a_b.flac: both are called a_b in ctm"),
        (["a.wav", "--output", "."], "a.txt: lies beside its audio, and may be its transcript, which would be repl"),
        (["a.wav", "--output", ".", "--format", "srt"], "a.srt: lies beside its audio, and may be its transcript"),
        (["a.wav", "b.flac", "--format", "srt"], "srt for 2 files needs a folder"),
        (["empty"], "empty: no audio in this folder"),
        (["a.wav", "--decoder", "no.json"], "no.json: no such decoder settings file"),
        (["a.wav", "--format", "docx"], "docx"),
    ],
)
def test_an_impossible_request_is_refused_before_work_starts(
    model: Path,
    speech: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    sentence: str,
) -> None:
    folder = speech[0].parent
    monkeypatch.chdir(folder)
    (folder / "other").mkdir()
    (folder / "empty").mkdir()
    for name in ("a", "A", "a_b"):
        shutil.copy("b.flac", f"other/{name}.flac")
    shutil.copy("a.wav", "a b.wav")
    for suffix in (".txt", ".srt"):
        (folder / "a").with_suffix(suffix).write_text("WHAT WAS SAID")
    assert run_verb("transcribe", model, *args) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.out == ""
    for suffix in (".txt", ".srt"):
        assert (folder / "a").with_suffix(suffix).read_text() == "WHAT WAS SAID"
    assert run_verb("align", model, "a.wav", "b.flac", "--text", "A") == 2


def test_transcripts_beside_their_audio_are_made_again_with_other_settings(
    model: Path, speech: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("transcribe", model, speech[0], "--format", "srt", "--output", speech[0].parent)
    assert run_verb(*command) == 0
    before = speech[0].with_suffix(".srt").read_text()
    assert run_verb(*command, "--subtitles.columns", "20") == 0
    assert max(map(len, speech[0].with_suffix(".srt").read_text().splitlines())) < max(map(len, before.splitlines()))
    speech[1].with_suffix(".srt").write_text("of a person")
    assert run_verb(*command[:3], speech[1], *command[3:]) == 2
    assert "lies beside its audio" in capsys.readouterr().err
    assert speech[1].with_suffix(".srt").read_text() == "of a person"


def test_recordings_of_the_same_name_have_transcripts_of_their_own(
    model: Path, speech: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sessions of a talk, one in two formats, as people keep them."""
    copies = ["talks/intro.wav", "talks/1/talk.wav", "talks/1/talk.flac", "talks/2/talk.wav", "other/talk.wav"]
    for name, path in zip(copies, [*speech, *speech], strict=False):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, *soundfile.read(path))
    options = ["--output", tmp_path / "out"]
    assert run_verb("transcribe", model, tmp_path / "talks", *options) == 0
    expected = {"intro.txt", "1/talk.wav.txt", "1/talk.flac.txt", "2/talk.wav.txt"}
    written = {str(path.relative_to(tmp_path / "out")): path.read_text() for path in (tmp_path / "out").rglob("*.txt")}
    assert set(written) == expected
    for name, path in zip(["intro.txt", *(f"{copy}.txt"[6:] for copy in copies[1:4])], speech, strict=False):
        assert written[name].strip() == greedy_text(model, read_samples(path))
    capsys.readouterr()
    assert run_verb("transcribe", model, tmp_path / "talks", *options) == 0
    assert "skipped 4 of 4 files" in capsys.readouterr().err
    assert run_verb("transcribe", model, tmp_path / "talks/2", tmp_path / "other", *options) == 0
    assert (tmp_path / "out/talks/2/talk.wav.txt").read_text() == written["2/talk.wav.txt"]
    assert (tmp_path / "out/other/talk.wav.txt").is_file()


def copied(source: Path, name: str, folder: Path) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(source, folder / name))


def without_new_entries(journal: Path) -> None:
    """Write the lines as earlier versions did."""
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    journal.write_text(
        "".join(json.dumps({k: row[k] for k in row if k not in ("output", "digest")}) + "\n" for row in rows)
    )


@pytest.mark.parametrize("is_earlier", [False, True])
def test_a_transcript_does_not_replace_that_of_a_recording_of_another_command(
    is_earlier: bool, model: Path, speech: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monday, tuesday = (copied(path, f"{day}/talk.wav", tmp_path) for path, day in zip(speech, "mt", strict=False))
    out = tmp_path / "out"
    options = ["--output", out]
    assert run_verb("transcribe", model, monday, *options) == 0
    if is_earlier:
        without_new_entries(out / ".made-text.jsonl")
    text = (out / "talk.txt").read_text()
    capsys.readouterr()
    assert run_verb("transcribe", model, tuesday, *options) == 2
    assert (
        f"talk.txt: the transcript of {monday}, which that of {tuesday} would replace; give" in capsys.readouterr().err
    )
    assert run_verb("transcribe", model, tuesday, *options, "--precision", "bfloat16") == 2
    assert (out / "talk.txt").read_text() == text
    capsys.readouterr()
    assert run_verb("transcribe", model, monday, *options) == 0
    assert "skipped 1 of 1 file" in capsys.readouterr().err
    (out / "talk.txt").unlink()
    assert run_verb("transcribe", model, tuesday, *options) == 0
    assert (out / "talk.txt").read_text().strip() == greedy_text(model, read_samples(tuesday))
    assert run_verb("transcribe", model, monday, *options) == 2  # not finished: its transcript was replaced
    assert run_verb("transcribe", model, monday, tuesday, *options) == 0
    assert (out / "m/talk.wav.txt").read_text() == text


def test_a_recording_whose_folder_was_renamed_keeps_its_transcript(
    model: Path, speech: list[Path], tmp_path: Path
) -> None:
    copied(speech[0], "monday/talk.wav", tmp_path)
    options = ["--output", tmp_path / "out"]
    assert run_verb("transcribe", model, tmp_path / "monday", *options) == 0
    (tmp_path / "monday").rename(tmp_path / "1")
    assert run_verb("transcribe", model, tmp_path / "1", *options) == 0
    copied(speech[1], "2/talk.wav", tmp_path)
    assert run_verb("transcribe", model, tmp_path / "2", *options) == 2


def test_jobs_at_once_do_not_write_one_transcript_of_two_recordings(
    speech: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talks = [copied(path, f"{day}/talk.wav", tmp_path) for path, day in zip(speech, "mt", strict=False)]
    journals = [journal_of(tmp_path / "out", "text", {"model": 1}) for _ in talks]  # both begin before any ends
    failed = []
    for talk, journal in zip(talks, journals, strict=True):
        names = transcript_paths([talk], [talk], "text", tmp_path / "out")
        result = Transcript(str(talk), 1.0, talk.parent.name, [])
        failed.append(write_all([], iter([result]), "text", names, 1, journal))
    assert failed == [0, 1]
    assert (tmp_path / "out/talk.txt").read_text() == "m\n"
    assert f"{talks[1]}: {tmp_path / 'out/talk.txt'} is the transcript of {talks[0]}" in capsys.readouterr().err


def test_transcripts_beside_their_audio_are_made_on_with_other_settings_after_an_interruption(
    model: Path, speech: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--format", "srt", "--output", speech[0].parent]
    assert run_verb("transcribe", model, *speech, *options) == 0
    before = [path.with_suffix(".srt").read_text() for path in speech]
    other = [*options, "--subtitles.columns", "20"]
    assert run_verb("transcribe", model, speech[0], *other) == 0  # as far as an interrupted command came
    capsys.readouterr()
    assert run_verb("transcribe", model, *speech, *other) == 0
    assert "skipped 1 of 3 files" in capsys.readouterr().err
    assert all(path.with_suffix(".srt").read_text() != old for path, old in zip(speech, before, strict=True))
    assert run_verb("transcribe", model, *speech, *options) == 0  # the first settings again
    assert "skipped" not in capsys.readouterr().err
    assert [path.with_suffix(".srt").read_text() for path in speech] == before


@pytest.mark.parametrize("is_beside", [True, False])
def test_a_transcript_that_a_person_corrected_is_not_replaced(
    is_beside: bool, model: Path, speech: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = speech[0].parent if is_beside else tmp_path / "out"
    command: list[object] = ["transcribe", model, *speech, "--output", out]
    assert run_verb(*command) == 0
    corrected = (out / "b.txt").read_text() + "CORRECTED"
    (out / "b.txt").write_text(corrected)
    first = (out / "a.txt").read_text()
    assert run_verb(*command) == 0
    for changed in (["--resume", "false"], ["--precision", "bfloat16"]):
        capsys.readouterr()
        assert run_verb(*command, *changed) == 2
        assert (
            f"{out / 'b.txt'}: was changed after it was written, and would be replaced; move" in capsys.readouterr().err
        )
    assert [(out / name).read_text() for name in ("a.txt", "b.txt")] == [first, corrected]
    (out / "b.txt").rename(out / "b.corrected")
    assert run_verb(*command, "--resume", "false") == 0
    assert (out / "b.txt").read_text() != corrected
    without_new_entries(out / ".made-text.jsonl")  # which do not tell whether a transcript was corrected
    capsys.readouterr()
    assert run_verb(*command) == 0
    assert "skipped 3 of 3 files" in capsys.readouterr().err
    assert run_verb(*command, "--resume", "false") == (2 if is_beside else 0)


def test_names_with_two_suffixes_are_no_names_of_others(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("talk.wav", "talk.mp3", "talk.wav.flac", "other.wav")]
    names = transcript_paths(paths, paths, "text", tmp_path / "out")
    expected = ["talk.wav.txt", "talk.mp3.txt", "talk.wav.flac.txt", "other.txt"]
    assert [str(names[str(path)].relative_to(tmp_path / "out")) for path in paths] == expected
    check_names(paths, names, "text", tmp_path / "out")


@pytest.mark.slow
def test_transcripts_go_to_a_file_although_the_bar_is_on_a_terminal(model: Path, speech: list[Path]) -> None:
    folder = speech[0].parent
    command = [sys.executable, "-m", "hubert_lightning", "transcribe", model, *speech]
    master, terminal = pty.openpty()
    with (folder / "out.txt").open("w") as out:
        subprocess.run(command, stdout=out, stderr=terminal, check=True)
    os.close(terminal)
    os.close(master)
    lines = [line.split("\t") for line in (folder / "out.txt").read_text().splitlines()]
    assert lines == [[str(path), greedy_text(model, read_samples(path))] for path in speech]


def test_words_that_a_lexicon_writes_otherwise_have_times() -> None:
    log_probs = torch.randn(30, len(LETTERS)).log_softmax(dim=-1)
    words = word_times(log_probs, "two well-known", replace(Vocabulary(), punctuation="space"))
    assert [word.text for word in words] == ["two", "well-known"]


@pytest.mark.slow
def test_a_closed_pipe_ends_it_without_a_traceback(model: Path, speech: list[Path]) -> None:
    command = f"{sys.executable} -m hubert_lightning transcribe {model} {' '.join(map(str, speech))} | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert len(done.stdout) == 1
    assert "Traceback" not in done.stderr
