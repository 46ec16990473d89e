"""Errors by length and by word, and recordings of utterances."""

from pathlib import Path

import pytest
from helpers import cut_of
from run_folders import recording, result_rows, write_results
from torch import zeros

from hubert_lightning.asr.scoring import Result, score
from hubert_lightning.data.manifest import write_manifest
from hubert_lightning.report.breakdown import (
    DELETED,
    INSERTED,
    Evaluation,
    by_length,
    confusions,
    read_evaluation,
    worst_utterances,
)
from hubert_lightning.report.clips import Place

PAIRS = [("A B C", "A B C"), ("A B", "A X"), ("A B C", "A C"), ("A", "A Y"), ("B B", "X B"), ("D E F", "D E F")]
SCORES = score([Result(str(number), said, heard) for number, (said, heard) in enumerate(PAIRS)])


def test_words_become_others_vanish_and_appear() -> None:
    counted = confusions(SCORES.utterances)
    assert counted.unit == "word"
    assert counted.substitutions == {("B", "X"): 2}
    assert counted.deletions == {"B": 1}
    assert counted.insertions == {"Y": 1}
    assert counted.totals["B"] == 5


def test_a_matrix_counts_what_each_word_became() -> None:
    rows, columns, counts = confusions(SCORES.utterances).matrix(5)
    assert (rows, columns, counts) == (["B"], ["X", DELETED], [[2, 1]])


def test_a_matrix_has_a_row_of_insertions_that_also_replace() -> None:
    scores = score([Result("1", "A B", "X B X"), Result("2", "A", "A")])
    rows, columns, counts = confusions(scores.utterances).matrix(5)
    assert (rows, columns, counts) == (["A", INSERTED], ["X"], [[1], [1]])


def test_letters_are_counted_where_sentences_have_no_spaces() -> None:
    sentences = ["一二三四五", "二三四五六", "三四五六七"] * 10
    results = [Result(str(number), text + chr(0x5000 + number), text) for number, text in enumerate(sentences)]
    counted = confusions(score(results).utterances)
    assert counted.unit == "letter"
    assert sum(counted.deletions.values()) == len(sentences)


def test_lengths_in_words_hold_every_utterance_once() -> None:
    unit, groups = by_length(Evaluation(SCORES, {}))
    assert unit == "words"
    assert sum(len(scores.utterances) for _, scores in groups) == len(PAIRS)
    assert sum(scores.words.errors for _, scores in groups) == SCORES.words.errors


def test_lengths_in_seconds_if_all_are_known() -> None:
    places = {str(number): Place("a.wav", 0, 0.0, 1.0 if number < 3 else 5.0) for number in range(len(PAIRS))}
    unit, groups = by_length(Evaluation(SCORES, places))
    assert unit == "seconds"
    assert [(name, len(scores.utterances)) for name, scores in groups] == [("0 to 2 s", 3), ("4 to 6 s", 3)]
    del places["0"]
    assert by_length(Evaluation(SCORES, places))[0] == "words"


def test_the_worst_utterances_have_most_errors_and_correct_ones_are_left_out() -> None:
    assert len(worst_utterances(SCORES, 99)) == 4
    assert len(worst_utterances(SCORES, 2)) == 2
    first = worst_utterances(SCORES, 1)[0]
    assert first.utterance.words.errors == max(row.words.errors for row in SCORES.utterances)


def test_rows_state_where_their_recordings_are(tmp_path: Path) -> None:
    path = write_results(tmp_path / "test.jsonl", result_rows(tmp_path / "a.wav"))
    evaluation = read_evaluation(path, {})
    assert evaluation.places["0001"] == Place(str(tmp_path / "a.wav"), 0, 0.1, 1.5)
    assert evaluation.hours == pytest.approx(12 * 1.5 / 3600)


def test_rows_of_an_earlier_version_find_them_in_the_manifest(tmp_path: Path) -> None:
    cut = cut_of(tmp_path / "a.wav", zeros(32_000)).truncate(offset=0.5, duration=1.0)
    cut.id = "0001"
    write_manifest([cut], tmp_path / "test.jsonl.gz")
    path = write_results(tmp_path / "test.jsonl", result_rows(None))
    evaluation = read_evaluation(path, {"manifest": str(tmp_path / "test.jsonl.gz")})
    assert evaluation.places == {"0001": Place(str(tmp_path / "a.wav"), 0, 0.5, 1.0)}
    assert evaluation.hours is None
    assert read_evaluation(path, {"manifest": str(tmp_path / "moved.jsonl.gz")}).places == {}


def test_hostile_places_are_no_places(tmp_path: Path) -> None:
    rows = result_rows(recording(tmp_path / "a.wav", 1))
    rows[1]["duration"], rows[2]["source"], rows[3]["start"] = "long", 7, None
    evaluation = read_evaluation(write_results(tmp_path / "test.jsonl", rows), {})
    assert {"0001", "0002"} & evaluation.places.keys() == set()
    assert evaluation.places["0003"].start == 0.0
