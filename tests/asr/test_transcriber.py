"""Recognition in Python: files, waveforms and lists become transcripts; nothing is printed and no setting changes."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import read_samples, run_verb, save_ctc

import hubert_lightning
from hubert_lightning import SpeakerTurn, Transcriber, Transcript, align, score
from hubert_lightning.data.refusals import RefusedFile
from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "best.ckpt"
    save_ctc(path, spread=3.0)
    return path


@pytest.fixture(scope="module")
def transcriber(model: Path) -> Transcriber:
    return Transcriber.from_pretrained(model, device="cpu")


def test_a_file_and_its_samples_have_the_transcript_of_the_verb(
    model: Path, transcriber: Transcriber, speech: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb("transcribe", model, speech[0], "--format", "json") == 0
    content = json.loads(capsys.readouterr().out)
    waveform = read_samples(speech[0])
    transcript = transcriber(speech[0])
    assert transcript.to_dict() == content
    assert transcriber(str(speech[0])) == transcript
    assert transcript.duration == pytest.approx(len(waveform) / SAMPLE_RATE)
    for samples in (waveform, waveform.numpy(), np.stack([waveform.numpy()] * 2).astype(np.float64)):
        in_memory = transcriber(samples, SAMPLE_RATE)
        assert in_memory.file == ""
        assert in_memory.words == transcript.words


def test_a_list_has_its_transcripts_in_order(transcriber: Transcriber, speech: list[Path]) -> None:
    waveform = read_samples(speech[1])
    mixed = transcriber([speech[2], waveform, str(speech[0]), speech[2]], SAMPLE_RATE)
    assert [transcript.file for transcript in mixed] == [str(speech[2]), "", str(speech[0]), str(speech[2])]
    assert [transcript.words for transcript in mixed] == [
        transcriber(path).words for path in (speech[2], speech[1], speech[0], speech[2])
    ]
    assert transcriber([]) == []


def test_a_path_may_be_written_in_any_way(
    transcriber: Transcriber, speech: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(speech[0].parent)
    name = speech[0].name
    expected = transcriber(name)
    assert transcriber([f"./{name}", f".//{name}", name]) == [expected] * 3
    assert transcriber.align(f"./{name}", expected.text).file == name


def test_a_file_may_have_the_name_of_a_waveform(
    transcriber: Transcriber, speech: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(speech[0], tmp_path / "waveform 0")
    monkeypatch.chdir(tmp_path)
    waveform = np.zeros(SAMPLE_RATE, np.float32)
    silence, spoken = transcriber([waveform, "waveform 0"], SAMPLE_RATE)
    assert (silence.file, spoken.file) == ("", "waveform 0")
    assert (silence.duration, spoken.text) == (1.0, transcriber(speech[0]).text)


def test_a_waveform_of_another_rate_is_resampled_as_its_file(
    transcriber: Transcriber, speech: list[Path], tmp_path: Path
) -> None:
    samples = read_samples(speech[0])[::2].numpy()
    soundfile.write(tmp_path / "low.wav", samples, SAMPLE_RATE // 2, subtype="FLOAT")
    of_file = transcriber(tmp_path / "low.wav")
    assert of_file.remarks
    assert of_file.remarks[0].startswith("low rate: recorded at 8000 Hz")
    assert transcriber(samples, SAMPLE_RATE // 2).text == of_file.text


def test_nothing_is_printed_and_no_setting_changes(
    model: Path, speech: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    def settings() -> list[object]:
        loggers = logging.getLogger("hubert_lightning"), logging.getLogger()
        return [
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32,
            torch.get_default_dtype(),
            *((logger.level, tuple(logger.handlers)) for logger in loggers),
            torch.random.get_rng_state().tolist(),
            {name: value for name, value in os.environ.items() if name != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"},
        ]

    torch.backends.cudnn.allow_tf32 = True
    before = settings()
    (speech[0].parent / "notes.docx").write_text("no audio")
    (speech[0].parent / "broken.wav").write_text("no audio")
    transcriber = Transcriber.from_pretrained(model, device="cpu")
    transcriber(speech[0])
    assert len(list(transcriber.each([speech[0].parent]))) == 4
    assert settings() == before
    assert capfd.readouterr() == ("", "")


def test_each_goes_on_after_a_recording_that_cannot_be_used(
    transcriber: Transcriber, speech: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp3").write_text("no audio")
    results = list(transcriber.each([tmp_path / "empty", tmp_path / "text.mp3", *speech]))
    refused = {result.path.name: result.reason for result in results if isinstance(result, RefusedFile)}
    assert refused["empty"].startswith("no audio in this folder")
    assert refused["text.mp3"].startswith("unreadable")
    assert [result.file for result in results if isinstance(result, Transcript)] == [str(path) for path in speech]
    with pytest.raises(UserError, match=r"text\.mp3: unreadable"):
        transcriber([speech[0], tmp_path / "text.mp3"])


def test_words_are_aligned_and_scored_in_python(model: Path, transcriber: Transcriber, speech: list[Path]) -> None:
    recognised = transcriber(speech[:2])
    aligned = align(transcriber, speech[0], recognised[0].text.lower())
    assert [word[:3] for word in aligned.words] == [word[:3] for word in recognised[0].words]
    assert align(model, read_samples(speech[0]), recognised[0].text, SAMPLE_RATE).words == aligned.words
    assert [one.text for one in align(transcriber, speech[:2], [one.text for one in recognised])] == [
        one.text for one in recognised
    ]
    wrong = " ".join(recognised[0].text.split()[1:])
    scores = score([recognised[0].text, recognised[1].text], [wrong, recognised[1]], speakers=["ann", "bob"])
    assert scores.words.deletions == scores.words.errors == 1
    assert list(scores.speakers) == ["ann", "bob"]
    assert score("one two", "one too").words.rate == 0.5
    with pytest.raises(UserError, match="no words in its text"):
        align(transcriber, speech[0], "")
    with pytest.raises(UserError, match="2 recordings and 1 texts"):
        align(transcriber, speech[:2], ["one"])


def test_a_file_of_results_is_scored(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"id": "a", "reference": "one two", "hypothesis": "one"}\n')
    assert score(path).words.rate == 0.5
    with pytest.raises(UserError, match="holds the hypotheses too"):
        score(path, "one")
    with pytest.raises(UserError, match="1 reference and 2 hypotheses; give one of each"):
        score("one", ["one", "two"])
    with pytest.raises(UserError, match="references without hypotheses"):
        score(str(path))


def test_speakers_come_from_an_rttm_or_from_turns(transcriber: Transcriber, speech: list[Path], tmp_path: Path) -> None:
    plain = transcriber(speech[0])
    middle = plain.words[len(plain.words) // 2].start
    (tmp_path / "talk.rttm").write_text(
        f"SPEAKER a 1 0 {middle} <NA> <NA> ann <NA> <NA>\nSPEAKER a 1 {middle} 99 <NA> <NA> bob <NA> <NA>\n"
    )
    transcript = transcriber(speech[0], speakers=tmp_path / "talk.rttm")
    assert [turn.speaker for turn in transcript.turns] == ["ann", "bob"]
    assert " ".join(turn.text for turn in transcript.turns) == plain.text
    turns = [SpeakerTurn(middle, 99, "bob"), SpeakerTurn(0, middle, "ann")]
    assert transcriber(read_samples(speech[0]), SAMPLE_RATE, speakers=turns).words == transcript.words
    with pytest.raises(UserError, match="has turns of a, and none of the recordings is called so"):
        transcriber(speech[1], speakers=tmp_path / "talk.rttm")
    remarks: list[tuple[str, str]] = []
    results = transcriber.each(
        speech, speakers=tmp_path / "talk.rttm", on_remark=lambda path, remark: remarks.append((path, remark))
    )
    assert sum(isinstance(result, Transcript) for result in results) == 3
    assert [path for path, remark in remarks if remark.startswith("no speakers")] == [str(path) for path in speech[1:]]


@pytest.mark.parametrize(
    ("audio", "rate", "sentence"),
    [
        ("absent.wav", None, "absent.wav: not there"),
        (np.zeros(16_000, np.float32), None, "without its sample_rate"),
        (np.zeros(16_000, np.int16), 16_000, "give floats from -1 to 1"),
        (np.full(16_000, np.nan), 16_000, "NaN or infinite"),
        (np.zeros(100, np.float32), 16_000, "too short"),
        ([np.zeros((8_000, 2))], 16_000, "transpose it"),
        (3, None, "a recording is a int"),
        (".", None, "a folder; give its files"),
    ],
)
def test_audio_that_cannot_be_used_is_refused_in_a_sentence(
    transcriber: Transcriber, audio: object, rate: int | None, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        transcriber(audio, rate)


def test_public_names_of_recognition_are_imported_from_the_package() -> None:
    for name in ("Transcriber", "Transcript", "Word", "SubtitleStyle", "SpeakerTurn", "align", "score"):
        assert name in dir(hubert_lightning)
        assert callable(getattr(hubert_lightning, name))
