"""Words of live audio: none is lost, doubled or changed, and they come as soon as they are stable."""

import json
import sys
from dataclasses import replace
from io import BytesIO, TextIOWrapper
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import read_samples, run_verb, save_ctc
from torch import Tensor

from hubert_lightning import Transcriber
from hubert_lightning.asr.live import LONGEST_WAIT, LiveWords
from hubert_lightning.asr.recognition import words_in
from hubert_lightning.errors import UserError
from hubert_lightning.frames import CLOCK, HOP, SAMPLE_RATE
from hubert_lightning.vocabulary import LETTERS, Vocabulary

VOCABULARIES = {
    "letters": Vocabulary(),
    "no delimiter": replace(Vocabulary(), tokens=("-", *LETTERS[2:]), delimiter=None),
}


@pytest.fixture(scope="module", params=VOCABULARIES)
def transcriber(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Transcriber:
    path = tmp_path_factory.mktemp("model") / "best.ckpt"
    save_ctc(path, VOCABULARIES[request.param], spread=3.0)
    return Transcriber.from_pretrained(path, device="cpu")


def streamed(live: LiveWords, waveform: Tensor, chunk: int) -> list[list[str]]:
    """Words after each chunk, and at the end."""
    words = [live.push(part) for part in torch.split(waveform, chunk)] + [live.finish()]
    times = [(word.start, word.end) for part in words for word in part]
    assert all(a[0] < a[1] <= b[0] + 1e-9 for a, b in pairwise(times))
    return [[word.text for word in part] for part in words]


def test_live_words_are_those_of_their_log_probabilities_whatever_the_chunks(
    transcriber: Transcriber, speech: list[Path]
) -> None:
    waveform = read_samples(speech[0])
    live = transcriber.live(step=0.6, lookahead=0.2, history=1.0)
    rows = [live.stream.push(waveform), live.stream.finish()]
    expected = words_in(torch.cat(rows), transcriber.vocabulary)[0]
    for chunk in (4_000, 30_000):
        parts = streamed(transcriber.live(step=0.6, lookahead=0.2, history=1.0), waveform, chunk)
        joined = [word for part in parts for word in part]
        if transcriber.vocabulary.boundary is None:
            assert "".join(joined) == expected
        else:
            assert " ".join(joined) == expected
        assert sum(map(bool, parts)) > 1


def test_with_all_audio_ahead_live_words_are_those_of_the_recording(
    transcriber: Transcriber, speech: list[Path]
) -> None:
    waveform = read_samples(speech[0])
    duration = len(waveform) / SAMPLE_RATE
    live = transcriber.live(step=duration + 1, lookahead=1.0)
    words = [*live.push(waveform), *live.finish()]
    expected = transcriber(waveform, SAMPLE_RATE)
    assert "".join(word.text for word in words) == expected.text.replace(" ", "")


@pytest.mark.parametrize("name", VOCABULARIES)
def test_memory_of_words_without_an_end_is_bounded(name: str) -> None:
    """Letters for two minutes, between which neither a boundary nor silence is predicted."""
    vocabulary = VOCABULARIES[name]
    letters = [vocabulary.tokens.index(letter) for letter in "AB"]
    rows = torch.full((1000, len(vocabulary)), -20.0)
    rows[torch.arange(1000), torch.tensor(letters).repeat(500)] = 0.0
    live = LiveWords.__new__(LiveWords)
    live.stream = FakeStream([])  # type: ignore[assignment]
    live.vocabulary, live._rows, live._first = vocabulary, torch.zeros(0, len(vocabulary)), 0
    words = []
    for _ in range(6):
        words += live._stable(rows, is_end=False)
        assert len(live._rows) <= LONGEST_WAIT
    words += live._stable(torch.zeros(0, len(vocabulary)), is_end=True)
    assert "".join(word.text for word in words) == "AB" * 3000
    assert all(first.end <= second.start + 1e-9 for first, second in pairwise(words))


class FakeStream:
    """Rows that arrive as given."""

    clock = CLOCK

    def __init__(self, rows: list[Tensor]) -> None:
        self.rows = iter(rows)

    def push(self, samples: Tensor) -> Tensor:
        return next(self.rows)

    def finish(self) -> Tensor:
        return torch.zeros(0, len(LETTERS))


def rows_of(path: str) -> Tensor:
    """Log-probabilities of one letter per frame."""
    return torch.eye(len(LETTERS))[[LETTERS.index(letter) for letter in path]].add(1e-4).log_softmax(dim=-1)


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["HH-I|--", "YO", "U--|"], [["HI"], [], ["YOU"], []]),  # a word ends at its delimiter
        (["HI---", "-" * 30, "YOU"], [[], ["HI"], [], ["YOU"]]),  # or after half a second of silence
        (["HI-", "-" * 10, "|YOU|"], [[], [], ["HI", "YOU"], []]),
        (["A" + "-" * 26 + "B", "|"], [["A"], ["B"], []]),  # a pause between two letters
        (["---", "|||", "|A"], [[], [], [], ["A"]]),
    ],
)
def test_a_word_is_given_once_its_end_is_heard(paths: list[str], words: list[list[str]], tmp_path: Path) -> None:
    save_ctc(tmp_path / "best.ckpt")
    live = Transcriber.from_pretrained(tmp_path / "best.ckpt", device="cpu").live()
    live.stream = FakeStream([rows_of(path) for path in paths])  # type: ignore[assignment]
    given = [live.push(torch.zeros(HOP)) for _ in paths] + [live.finish()]
    assert [[word.text for word in part] for part in given] == words
    every = "".join(paths)
    for word in (word for part in given for word in part):
        assert every[round(word.start * SAMPLE_RATE / HOP)] == word.text[0]
        assert every[round(word.end * SAMPLE_RATE / HOP) - 1] == word.text[-1]


def test_the_verb_prints_words_of_standard_input_and_writes_the_transcript_of_the_whole(
    speech: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "best.ckpt"
    save_ctc(model, spread=3.0)
    waveform = (read_samples(speech[0]) * 2**15).round().clamp(-(2**15), 2**15 - 1)
    content = waveform.short().numpy().tobytes()

    def transcribe(*options: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(content)))
        assert run_verb("transcribe", model, "-", "--step", "0.5", *options) == 0
        return capsys.readouterr()

    printed, notes = transcribe("--format", "json", "--output", tmp_path / "out")
    rows = [json.loads(line) for line in printed.splitlines()]
    assert len(rows) > 3
    assert all(set(row) == {"word", "start", "end", "confidence"} for row in rows)
    assert "words come, once their end is heard, " in notes
    final = json.loads((tmp_path / "out" / "live.json").read_text())
    expected = Transcriber.from_pretrained(model, device="cpu")(waveform / 2**15, SAMPLE_RATE)
    assert final == expected.to_dict()
    assert transcribe()[0].split() == [row["word"] for row in rows]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["-", "a.wav"], "standard input and files: give - alone"),
        (["-", "--format", "srt"], "srt of standard input is written at its end; name a folder"),
        (["-", "--decoder", "d.json"], "a decoder works on whole sentences"),
        (["-", "--speakers", "d.rttm"], "the turns of audio that is still to come are not known"),
        (["-", "--output", "done"], "live.txt: exists, and would be replaced"),
        (["-", "--output", "done/live.txt/out"], "out: cannot be created or written to"),
        (["a.wav", "--step", "1"], "options for standard input, not for files"),
        (["-", "--step", "0"], "choose a step of at least one frame"),
    ],
)
def test_options_that_standard_input_cannot_meet_are_refused(
    args: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_ctc(tmp_path / "best.ckpt")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "live.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert run_verb("transcribe", "best.ckpt", *args) == 2
    assert sentence in capsys.readouterr().err


def test_a_finished_stream_takes_no_more_audio(transcriber: Transcriber) -> None:
    live = transcriber.live()
    assert live.finish() == []
    assert live.latency == pytest.approx(2.0)
    with pytest.raises(UserError, match="this stream is finished"):
        live.push(torch.zeros(10))
