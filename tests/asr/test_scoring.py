import io
import json
import math
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from hubert_lightning.asr.language_scores import write_scores
from hubert_lightning.asr.score_report import report, report_comparison
from hubert_lightning.asr.scoring import ErrorRate, Result, Scores, compare, read_results, score
from hubert_lightning.cli import main

texts = st.lists(st.sampled_from(["A", "AN", "BEE", "SEES", "THE", "SEA"]), max_size=8).map(" ".join)
corpora = st.lists(st.tuples(texts, texts, st.sampled_from(["ann", "bob", "eve"])), min_size=1, max_size=12).map(
    lambda rows: [Result(str(place), *row) for place, row in enumerate(rows)]
)


def written(path: Path, results: Sequence[Result]) -> Path:
    path.write_text("".join(json.dumps(result._asdict()) + "\n" for result in results))
    return path


def random_results(error_rate: float, seed: int, num_utterances: int = 300) -> list[Result]:
    """Results of a system that gets each word wrong with the same probability; the seed does not change utterances."""
    lengths = np.random.default_rng(0).integers(1, 30, num_utterances)
    wrong = np.random.default_rng(seed)
    return [
        Result(
            f"utterance {place:03}",
            " ".join(["RIGHT"] * length),
            " ".join(np.where(wrong.random(length) < error_rate, "WRONG", "RIGHT")),
        )
        for place, length in enumerate(lengths)
    ]


def printed(scores: Scores, worst: int = 5, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    report(scores, console, worst)
    return console.file.getvalue()  # type: ignore[attr-defined]


@given(results=corpora)
@settings(max_examples=50, deadline=None)
def test_rates_and_kinds_of_errors_are_jiwers_over_the_whole_corpus(results: list[Result]) -> None:
    references, hypotheses = [row.reference for row in results], [row.hypothesis for row in results]
    scores = score(results)
    words, letters = (
        jiwer.process_words(references, hypotheses),
        jiwer.process_characters(references, hypotheses),
    )
    for ours, theirs, rate in ((scores.words, words, words.wer), (scores.letters, letters, letters.cer)):
        assert ours.rate == rate
        assert (ours.substitutions, ours.insertions, ours.deletions) == (
            theirs.substitutions,
            theirs.insertions,
            theirs.deletions,
        )
        assert ours.total == sum(map(len, theirs.references))


@given(results=corpora)
@settings(max_examples=50, deadline=None)
def test_errors_add_up_over_speakers_and_over_utterances(results: list[Result]) -> None:
    scores = score(results)
    for parts in (scores.speakers.values(), scores.utterances):
        for whole, rates in ((scores.words, [p.words for p in parts]), (scores.letters, [p.letters for p in parts])):
            assert whole.errors == sum(rate.errors for rate in rates)
            assert whole.total == sum(rate.total for rate in rates)
    rates = [speaker.words.rate for speaker in scores.speakers.values()]
    assert rates == sorted(rates, reverse=True)


@given(results=corpora)
@settings(max_examples=50, deadline=None)
def test_an_interval_contains_its_rate_and_a_single_utterance_has_none(results: list[Result]) -> None:
    scores = score(results)
    for part in (scores, *scores.speakers.values()):
        for rate in (part.words, part.letters):
            if len(part.utterances) == 1:
                assert math.isnan(rate.low)
                assert math.isnan(rate.high)
            else:
                assert rate.low <= rate.rate <= rate.high


def test_intervals_are_those_of_the_normal_approximation_where_it_holds() -> None:
    results = random_results(0.1, seed=1, num_utterances=1000)
    words = score(results).words
    errors = np.array([row.hypothesis.split().count("WRONG") for row in results])
    total = np.array([len(row.reference.split()) for row in results])
    # The variance of a ratio of sums, to first order
    deviation = np.sqrt(((errors - words.rate * total) ** 2).sum()) / total.sum()
    # 9999 resamples know a bound to 3 % of a deviation, and the ratio is not quite normal
    assert words.low == pytest.approx(words.rate - 1.96 * deviation, abs=0.1 * deviation)
    assert words.high == pytest.approx(words.rate + 1.96 * deviation, abs=0.1 * deviation)


def test_nineteen_of_twenty_intervals_hold_the_true_rate() -> None:
    intervals = [score(random_results(0.2, seed, num_utterances=60)).words for seed in range(1, 101)]
    # Two and a half deviations of a binomial with 100 draws
    assert 89 <= sum(words.low <= 0.2 <= words.high for words in intervals) <= 100


def test_insertions_into_silence_count_and_add_no_words() -> None:
    words = score([Result("1", "", "UH HUH"), Result("2", "YES I DO", "YES I DO")]).words
    assert (words.insertions, words.total, words.rate) == (2, 3, 2 / 3)
    assert score([Result("1", "", "")]).words.rate == 0


def test_without_spaces_an_utterance_is_one_word_of_many_letters() -> None:
    scores = score([Result("1", "今日は天気がいい", "今日わ天気いい")])
    assert (scores.words.errors, scores.words.total) == (1, 1)
    assert (scores.letters.substitutions, scores.letters.deletions, scores.letters.total) == (1, 1, 8)


def test_utterances_without_a_speaker_are_in_the_whole_alone() -> None:
    scores = score([Result("1", "A", "A", "ann"), Result("2", "A", "B")])
    assert list(scores.speakers) == ["ann"]
    assert (scores.words.errors, scores.words.total) == (1, 2)


def test_a_clearly_better_system_is_distinguished_from_an_equal_one() -> None:
    good, equal, bad = (score(random_results(rate, seed)) for rate, seed in ((0.1, 1), (0.1, 2), (0.15, 3)))
    better, same = compare(good, bad).words, compare(good, equal).words
    assert better.p_value < 0.001
    assert better.low < better.difference < better.high < 0
    assert same.p_value > 0.05
    assert same.low < 0 < same.high
    assert compare(good, good).words.p_value == 1


@pytest.mark.slow
def test_p_values_of_equal_systems_are_uniform() -> None:
    first, second = (
        [score(random_results(0.2, seed, num_utterances=20)) for seed in seeds]
        for seeds in (range(100), range(100, 200))
    )
    p_values = np.array([compare(a, b).words.p_value for a, b in zip(first, second, strict=True)])
    # Uniform: two and a half deviations of a binomial with 100 draws
    assert abs((p_values < 0.5).mean() - 0.5) < 0.125
    assert (p_values < 0.05).mean() < 0.11


@given(results=corpora, others=st.lists(texts, min_size=12, max_size=12))
@settings(max_examples=30, deadline=None)
def test_systems_swapped_differ_by_the_sign_alone(results: list[Result], others: list[str]) -> None:
    first = score(results)
    second = score([row._replace(hypothesis=text) for row, text in zip(results, others, strict=False)][::-1])
    there, back = compare(first, second), compare(second, first)
    for a, b in ((there.words, back.words), (there.letters, back.letters)):
        assert a.p_value == b.p_value
        assert a.difference == -b.difference
        np.testing.assert_allclose([a.low, a.high], [-b.high, -b.low], atol=1e-12)


def test_the_difference_is_that_of_the_two_rates() -> None:
    first, second = score(random_results(0.1, 1)), score(random_results(0.15, 3))
    difference = compare(first, second).letters
    assert (difference.first, difference.second) == (first.letters.rate, second.letters.rate)


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        ([Result("1", "A", "A")], "2: the second results have no such utterance"),
        ([Result(name, "A", "A") for name in "123"], "3: the first results have no such utterance"),
        ([Result("1", "A", "A"), Result("2", "a", "A")], "2: its reference is 'A' in the first results, 'a' in the"),
        ([Result("1", "A", "A"), Result("1", "A", "A")], "1: twice in one system's results; keep one"),
    ],
)
def test_systems_are_compared_on_the_same_utterances_only(second: list[Result], sentence: str) -> None:
    first = score([Result("1", "A", "A"), Result("2", "A", "B")])
    with pytest.raises(ValueError, match=sentence):
        compare(first, score(second))


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = [Result("1", "ONE Ω", "ONE", "ann"), Result("2", "", "TWO")]
    assert read_results(written(tmp_path / "test.jsonl", results)) == results
    (tmp_path / "test.jsonl").write_text('{"id": "1", "reference": "A", "hypothesis": "", "seconds": 3}\n')
    assert read_results(tmp_path / "test.jsonl") == [Result("1", "A", "")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_results_may_come_from_an_editor(tmp_path: Path, encoding: str) -> None:
    results = [Result("1", "ONE Ω", "ONE", "ann"), Result("2", "É", "TWO")]
    content = "\r\n".join(json.dumps(result._asdict(), ensure_ascii=False) for result in results)
    (tmp_path / "test.jsonl").write_bytes((content + "\r\n\r\n").encode(encoding))
    assert read_results(tmp_path / "test.jsonl") == results


GOOD = '{"id": "1", "reference": "A", "hypothesis": "A"}\n'


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", r"test\.jsonl: empty; run `hubert test` again"),
        (GOOD + "no json\n", r"test\.jsonl, line 2: not JSON \(.*\); give the test\.jsonl"),
        (GOOD + "\nno json\n", r"test\.jsonl, line 3: not JSON"),
        ("\n \n", r"test\.jsonl: empty; run `hubert test` again"),
        ("[1]\n", r"test\.jsonl, line 1: no JSON object; give the test\.jsonl"),
        ('{"id": "1", "hypothesis": "A"}\n', r'line 1: has no "reference"; .* \(predict\.jsonl has no references\)'),
        ('{"id": "1", "reference": "A"}\n', 'line 1: has no "hypothesis"; give the'),
        ('{"reference": "A", "hypothesis": "A"}\n', 'line 1: has no "id"; give the'),
        (GOOD.replace('"1"', "1"), 'line 1: "id" is 1, which is not text; put it in quotes'),
        (GOOD.replace('"A"}', "null}"), 'line 1: "hypothesis" is null, which is not text'),
        (GOOD * 2, "line 2: 1 is here twice; keep one result per utterance"),
        (GOOD.replace('"A", ', '" ", '), "every reference is empty, 1 is the first of 1; give results of utterances"),
    ],
)
def test_a_line_without_a_result_is_refused_by_its_number(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_results(tmp_path / "test.jsonl")


def test_bytes_that_are_no_text_are_refused_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_results(tmp_path / "test.jsonl")


def test_no_results_have_no_score() -> None:
    with pytest.raises(ValueError, match="no results to score; give results of one utterance or more"):
        score([])


def test_the_report_has_rates_by_speaker_and_the_worst_utterances_aligned() -> None:
    results = [
        Result("1", "SHORT ONE HERE", "SHOE ORDER ONE", "ann"),
        Result("2", "ALL RIGHT", "ALL RIGHT", "bob"),
        Result("3", "A SINGLE WRONG", "A SINGLE SONG", "bob"),
    ]
    report = printed(score(results))
    rows = [" ".join(line.split()) for line in report.splitlines()]
    whole, worse, better = (
        rows.index("all WER 50.00 0.00 … 100.00 2 1 1 8 3"),
        rows.index("ann WER 100.00 – 1 1 1 3 1"),
        rows.index("bob WER 20.00 0.00 … 33.33 1 0 0 5 2"),
    )
    assert whole < worse < better
    assert (
        "1 (ann): word errors 3 of 3, letter errors 8 of 14\n"
        "REF: **** SHORT ONE HERE\n"
        "HYP: SHOE ORDER ONE ****\n"
        "     I    S         D\n\n"
        "3 (bob): word errors 1 of 3, letter errors 2 of 14\n"
    ) in report
    assert "2 (bob)" not in report  # nothing is wrong with it
    assert "3 (bob)" not in printed(score(results), worst=1)


def test_transcripts_and_speakers_are_printed_as_they_are() -> None:
    scores = score([Result("[b]1", "[bold]NO[/bold] :smile: [/]", "YES", "[red]ann")])
    report = printed(scores)
    for text in ("[b]1 ([red]ann):", "[bold]NO[/bold] :smile: [/]", "  [red]ann   WER"):
        assert text in report


def test_an_alignment_fits_the_terminal_and_counts_wide_letters_as_two() -> None:
    results = [
        Result("1", "SEVERAL WORDS THAT DO NOT FIT", "SEVERAL WORDS WHICH DO FIT"),
        Result("2", "今日は天気", "今日天気Aね"),
    ]
    report = printed(score(results), width=30)
    assert "REF: SEVERAL WORDS THAT  DO\nHYP: SEVERAL WORDS WHICH DO\n                   S\nREF: NOT FIT\n" in report
    assert "REF: 今日は天気***\nHYP: 今日**天気Aね\n         D     II\n" in report


def test_everything_comes_back_from_json(tmp_path: Path) -> None:
    results = [Result("1", "A BEE", "BEE", "ann"), Result("2", "THE SEA", "THE SEE Ω", "bob")]
    scores = score(results)
    comparison = compare(scores, score([row._replace(hypothesis="") for row in results]))
    write_scores(tmp_path / "scores.json", scores, comparison)
    kept = json.loads((tmp_path / "scores.json").read_text())

    def again(row: dict[str, float | None]) -> ErrorRate:
        numbers = {name: math.nan if number is None else number for name, number in row.items()}
        rate = ErrorRate(**{name: numbers.pop(name) for name in ErrorRate.__dataclass_fields__})
        assert numbers == {"errors": rate.errors, "rate": rate.rate}
        return rate

    assert again(kept["words"]) == scores.words
    assert again(kept["letters"]) == scores.letters
    assert repr(again(kept["speakers"]["ann"]["words"])) == repr(scores.speakers["ann"].words)  # NaN is not NaN
    assert kept["speakers"]["bob"]["num_utterances"] == 1
    assert kept["speakers"]["bob"]["words"]["low"] is None
    assert [Result(*(row[name] for name in Result._fields)) for row in kept["utterances"]] == results
    assert [row["letters"]["errors"] for row in kept["utterances"]] == [row.letters.errors for row in scores.utterances]
    difference = kept["comparison"]["words"]
    assert difference["difference"] == comparison.words.difference
    assert (difference["low"], difference["p_value"]) == (comparison.words.low, comparison.words.p_value)


def test_hubert_score_prints_the_reports_of_its_functions(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first, second = (
        written(tmp_path / f"{rate}.jsonl", random_results(rate, seed, num_utterances=50))
        for rate, seed in ((0.1, 1), (0.3, 2))
    )
    output = tmp_path / "scores.json"
    main(["score", str(first), "--against", str(second), "--worst", "2", "--output", str(output)])
    out = capsys.readouterr().out
    scores, others = score(read_results(first)), score(read_results(second))
    console = Console(file=io.StringIO(), width=80)
    report_comparison(compare(scores, others), console)
    assert out.startswith(printed(scores, worst=2))
    assert console.file.getvalue() in out  # type: ignore[attr-defined]
    assert f"first: {first}, second: {second}\n" in out
    assert out.endswith(f"numbers in {output}\n")
    assert json.loads(output.read_text())["words"]["rate"] == scores.words.rate


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl: no such file; give the test.jsonl that `hubert test` wrote"),
        (["test.jsonl", "--against", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["test.jsonl", "--worst", "-1"], "worst -1: a number of utterances to show; 0 shows none"),
        (["test.jsonl", "--output", "test.jsonl"], "test.jsonl: holds results, which the scores would replace"),
        (["test.jsonl", "--output", "test.jsonl/scores.json"], "test.jsonl/scores.json: cannot be written"),
    ],
)
def test_hubert_score_refuses_in_one_sentence(
    args: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("test.jsonl").write_text(GOOD)
    with pytest.raises(SystemExit) as stopped:
        main(["score", *args])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hubert: {sentence}")
    assert error.count("\n") == 1


def test_hubert_score_needs_neither_torch_nor_lightning(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(GOOD)
    code = (
        "import sys, hubert_lightning.cli\n"
        f"hubert_lightning.cli.main(['score', {str(tmp_path / 'test.jsonl')!r}])\n"
        "print([name for name in ('torch', 'lightning', 'lhotse', 'sklearn', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("reference", "hypothesis"),
    [
        ("\u09df \u09dc", "\u09af\u09bc \u09a1\u09bc"),
        ("café", "cafe\u0301"),
        ("한국어", "\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165"),
        ("c’est l'un", "c'est lʼun"),
        ("a\u00a0b\u3000c\nd\te\u2028f", "a b c d e f"),
        (" a  b ", "a b"),
        ("a\u200bb\ufeff ma\u00adchen", "ab machen"),
    ],
)
def test_forms_of_one_text_are_no_errors(reference: str, hypothesis: str) -> None:
    scores = score([Result("a", reference, hypothesis)])
    assert scores.words.errors == scores.letters.errors == 0
    assert scores.words.total == len(hypothesis.split())
    other = score([Result("a", hypothesis, hypothesis)])
    assert compare(scores, other).words.difference == 0


def test_other_texts_are_scored_as_jiwer_scores_what_they_have_in_common() -> None:
    pairs = [("über die straße", "ueber die strasse"), ("é è", "e\u0301 e"), ("İ i", "I i")]
    scores = score([Result(str(place), *pair) for place, pair in enumerate(pairs)])
    composed = [[unicodedata.normalize("NFC", text) for text in texts] for texts in zip(*pairs, strict=True)]
    assert scores.words.rate == pytest.approx(jiwer.wer(*composed))
    assert scores.letters.rate == pytest.approx(jiwer.cer(*composed))
