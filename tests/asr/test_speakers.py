"""Words get the speaker whose turns cover most of them, by an RTTM file."""

from pathlib import Path

import pytest

from hubert_lightning.asr.speakers import SpeakerTurn, read_rttm, turns_of, with_speakers
from hubert_lightning.asr.transcript_formats import Transcript
from hubert_lightning.asr.word_times import Word
from hubert_lightning.errors import UserError

RTTM = """\
;; a comment
SPKR-INFO call 1 <NA> <NA> <NA> unknown ann <NA> <NA>
SPEAKER call 1 2.00 1.50 <NA> <NA> bob <NA> <NA>
SPEAKER call 1 0.00 2.20 <NA> <NA> ann <NA> <NA>
SPEAKER other_talk 1 0 1e1 <NA> <NA> eve <NA> <NA>
"""


def test_turns_are_those_of_each_recording_in_the_order_of_time(tmp_path: Path) -> None:
    (tmp_path / "a.rttm").write_text(RTTM)
    turns = read_rttm(tmp_path / "a.rttm")
    assert turns == {
        "call": [SpeakerTurn(0, 2.2, "ann"), SpeakerTurn(2, 3.5, "bob")],
        "other_talk": [SpeakerTurn(0, 10, "eve")],
    }
    assert turns_of(turns, Path("folder/call.m4a")) == turns["call"]
    assert turns_of(turns, Path("other talk.wav")) == turns["other_talk"]
    assert turns_of(turns, Path("else.wav")) == ()


def speakers_of(words: list[tuple[float, float]], *turns: tuple[float, float, str]) -> list[str | None]:
    timed = [Word("word", start, end, 1.0) for start, end in words]
    transcript = with_speakers(Transcript("a", 9, "", timed), sorted(SpeakerTurn(*turn) for turn in turns))
    return [word.speaker for word in transcript.words]


def test_a_word_has_the_speaker_who_covers_most_of_it() -> None:
    turns = [(0.0, 1.0, "ann"), (0.9, 2.0, "bob")]
    assert speakers_of([(0.1, 0.5), (0.6, 1.1), (0.85, 1.3)], *turns) == ["ann", "ann", "bob"]


def test_overlapping_turns_of_a_speaker_count_once() -> None:
    assert speakers_of([(0.0, 1.0)], (0.0, 0.4, "ann"), (0.1, 0.4, "ann"), (0.4, 1.0, "bob")) == ["bob"]
    assert speakers_of([(0.0, 1.0)], (0.0, 0.3, "ann"), (0.3, 0.7, "bob"), (0.7, 1.0, "ann")) == ["ann"]


def test_a_word_outside_all_turns_has_the_nearest_speaker_within_half_a_second() -> None:
    turns = [(1.0, 2.0, "ann"), (5.0, 6.0, "bob")]
    assert speakers_of([(0.2, 0.6), (2.1, 2.4), (3.0, 3.2), (4.7, 4.9)], *turns) == ["ann", "ann", None, "bob"]
    assert speakers_of([(0.0, 1.0)]) == [None]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("no rttm", "no line begins with SPEAKER"),
        ("", "no line begins with SPEAKER"),
        ("SPEAKER call 1 0.0", "line 1: 4 columns instead of ten"),
        ("SPEAKER call 1 zero 1.0 <NA> <NA> ann", "line 1: start and duration are 'zero' and '1.0', not seconds"),
        ("SPEAKER call 1 0.0 nan <NA> <NA> ann", "line 1: start and duration are '0.0' and 'nan', not seconds"),
        (None, "no such file"),
    ],
)
def test_a_file_that_is_no_rttm_is_refused(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "a.rttm").write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_rttm(tmp_path / "a.rttm")
