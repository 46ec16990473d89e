"""Sentences of the summary, and what the numbers suggest to try."""

from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import finetuning_run, pretraining_run, result_rows, write_results, write_table

from hubert_lightning.report import words
from hubert_lightning.report.breakdown import read_evaluation
from hubert_lightning.report.run_files import Results, read_run
from hubert_lightning.report.summary import BestLayer, Scored, advice, speed_of, summarise, training_seconds


def scored(path: Path, pairs: list[tuple[str, str]], decoder: str = "greedy") -> Scored:
    """Results of references and hypotheses."""
    rows = [
        {"id": str(number), "reference": said, "hypothesis": heard, "decoder": decoder, "checkpoint": "best.ckpt"}
        for number, (said, heard) in enumerate(pairs)
    ]
    results = Results.of(write_results(path / "test.jsonl", rows))
    return Scored("test", None, results, read_evaluation(results.path, results.origin))


def test_a_pre_training_is_described_with_its_numbers(tmp_path: Path) -> None:
    run = read_run(pretraining_run(tmp_path / "iteration1"), "iteration1")
    [sentence, speed] = summarise([run], [], {}, []).sentences
    assert sentence == (
        "iteration1: pre-training of an encoder (3 layers of 128, 4 heads, 1.5 million parameters) on 1.25 h of speech "
        "by 24 speakers, to predict 20 clusters of MFCCs. After 400 steps, it predicts 50.0 % of the masked validation "
        "frames."
    )
    assert speed.startswith("Training processes 250 seconds of audio per second")


def test_the_time_of_training_follows_from_speed_and_batches(tmp_path: Path) -> None:
    run = read_run(pretraining_run(tmp_path / "run"), "run")
    assert speed_of(run) == 250
    assert training_seconds(run) == (pytest.approx(400 * 40 / 250), True)


def test_a_fine_tuning_without_a_test_states_its_validation(tmp_path: Path) -> None:
    run = read_run(finetuning_run(tmp_path / "run", finished=False), "run")
    [sentence, _] = summarise([run], [], {}, []).sentences
    assert sentence == (
        "run: fine-tuning of a recogniser on 12 min of speech, from pre-trained weights. Its lowest validation WER is "
        "20.0 %, at step 400 (not finished). It is not tested yet."
    )


def test_the_first_cards_are_the_lowest_rate_and_its_interval(tmp_path: Path) -> None:
    good = scored(tmp_path / "good", [("A B", "A B"), ("C D", "C X"), ("E F", "E F"), ("G H", "G H")])
    bad = scored(tmp_path / "bad", [("A B", "X"), ("C D", "X"), ("E F", "E F"), ("G H", "Y Z")])
    cards = summarise([], [bad, good], {}, []).cards
    assert (cards[0].value, cards[0].note) == ("12.5 %", "test")
    rate = good.evaluation.scores.words
    assert cards[1].value == f"{100 * rate.low:.1f} to {100 * rate.high:.1f} %"
    assert cards[1].note == "1 error in 8 words"


def curves_of(folder: Path, wer: list[float]) -> Path:
    finetuning_run(folder)
    write_table(folder, {"val/wer": {100 * (number + 1): rate for number, rate in enumerate(wer)}})
    return folder


@pytest.mark.parametrize(
    ("wer", "expected"),
    [
        ([0.9, 0.7, 0.5, 0.4, 0.3], "still falling at the end (0.4 to 0.3 in the last quarter); train for more steps"),
        ([0.9, 0.3, 0.35, 0.4, 0.4], "rises again (0.3 at step 200, 0.4 at the end): overfitting"),
    ],
)
def test_the_end_of_a_curve_suggests_what_to_change(tmp_path: Path, wer: list[float], expected: str) -> None:
    run = read_run(curves_of(tmp_path / "run", wer), "run")
    [sentence] = [sentence for sentence in advice([run], [], []) if "validation WER" in sentence]
    assert expected in sentence


def test_a_curve_at_rest_suggests_nothing(tmp_path: Path) -> None:
    run = read_run(curves_of(tmp_path / "run", [0.9, 0.5, 0.31, 0.3, 0.3]), "run")
    assert advice([run], [], []) == []


def test_waiting_for_data_and_another_best_layer_are_named(tmp_path: Path) -> None:
    runs = [read_run(pretraining_run(tmp_path / f"iteration{n}", number=n), f"iteration{n}") for n in (1, 2)]
    best = BestLayer("iteration1", runs[0].folder, 3, 0.5)
    sentences = advice(runs, [], [best])
    assert "iteration1: 40 % of the time is spent waiting for data; raise data.init_args.num_workers." in sentences
    assert (
        "iteration1: layer 3 agrees best with phones (PNMI 0.500), and iteration2 used layer 1; try layer 3."
        in sentences
    )


def test_guessing_is_named(tmp_path: Path) -> None:
    folder = pretraining_run(tmp_path / "run", finished=False)
    write_table(folder, {"val/masked_accuracy": {100: 0.06}})
    assert any(
        "6.0 % of the masked frames are predicted right, hardly more than by a uniform guess (5.0 %)" in one
        for one in advice([read_run(folder, "run")], [], [])
    )


SPELT = [("KITCHEN LAMP ON", "KITCHEM LAMP ON")] * 5 + [("WINDOW UP NOW", "WINDOV UP NOW")] * 5


def test_spelling_errors_suggest_a_language_model_unless_there_is_one(tmp_path: Path) -> None:
    assert any("decode with a language model" in one for one in advice([], [scored(tmp_path / "a", SPELT)], []))
    with_model = scored(tmp_path / "b", SPELT, decoder="lm.json")
    assert not any("language model" in one for one in advice([], [with_model], []))
    run = read_run(finetuning_run(tmp_path / "run"), "run")
    both = [replace(item, run=run) for item in (scored(tmp_path / "c", SPELT), with_model)]
    assert not any("language model" in one for one in advice([], both, []))


def test_word_score_is_named_where_a_beam_search_used_it(tmp_path: Path) -> None:
    missing = [("A B C D", "A")] * 10
    for decoder, named in (("greedy", False), ("lm.json", True)):
        sentences = advice([], [scored(tmp_path / decoder, missing, decoder)], [])
        assert any("raise word_score" in one for one in sentences) == named


def test_an_interval_of_a_difference_has_minus_signs() -> None:
    assert words.interval(-0.095, -0.011) == "−9.5 to −1.1 %"


def test_a_frequent_confusion_and_missing_words_are_named(tmp_path: Path) -> None:
    sentences = advice([], [scored(tmp_path / "a", SPELT)], [])
    assert any("“KITCHEN” became “KITCHEM” 5 times" in one for one in sentences)
    missing = advice([], [scored(tmp_path / "b", [("A B C D", "A")] * 10)], [])
    assert any("100 % of the errors are missing words" in one for one in missing)


def test_a_speaker_who_stands_out_is_named(tmp_path: Path) -> None:
    rows = result_rows(None, count=60, errors=99)[1:]
    for row in rows:
        if row["speaker"] == "dede":
            row["hypothesis"] = "NOTHING"
    results = Results.of(write_results(tmp_path / "test.jsonl", rows))
    item = Scored("test", None, results, read_evaluation(results.path, results.origin))
    assert any("speaker dede has a WER of 100.0 %" in one for one in advice([], [item], []))
