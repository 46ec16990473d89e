"""Scores by language and corpus are jiwer's on the utterances of each."""

import json
from pathlib import Path

import jiwer
import pytest
from lhotse import CutSet
from rich.console import Console

from hubert_lightning.asr.language_scores import macro_average, metrics_by_name, write_scores
from hubert_lightning.asr.score import score as score_texts
from hubert_lightning.asr.score_report import report
from hubert_lightning.asr.scoring import Result, read_results, score
from hubert_lightning.characters import parts_words
from hubert_lightning.cli import main
from hubert_lightning.data.manifest import write_manifest

RESULTS = [
    Result("e1", "the red house", "the read house", "a", "en", "cv"),
    Result("e2", "one two three four", "one two four", "a", "en", "mls"),
    Result("s1", "habari ya asubuhi", "habari za asubuhi leo", "b", "sw", "cv"),
    Result("z1", "今天天气很好", "今天天汽很好", "c", "zh", "cv"),
    Result("z2", "谢谢", "谢谢", "c", "zh", "mls"),
]


def jiwer_rates(name: str, value: str) -> tuple[float, float]:
    rows = [row for row in RESULTS if getattr(row, name) == value]
    texts = [row.reference for row in rows], [row.hypothesis for row in rows]
    return jiwer.wer(*texts), jiwer.cer(*texts)


def test_rates_by_language_and_corpus_are_those_of_jiwer() -> None:
    scores = score(RESULTS)
    assert list(scores.languages) == ["en", "sw", "zh"]
    assert list(scores.corpora) == ["cv", "mls"]
    for name, parts in (("language", scores.languages), ("corpus", scores.corpora)):
        for value, part in parts.items():
            assert (part.words.rate, part.letters.rate) == pytest.approx(jiwer_rates(name, value), abs=1e-12)
    assert score(RESULTS[:2]).languages == {}


def test_the_macro_average_weighs_languages_alike_and_leaves_wer_out_without_spaces_between_words() -> None:
    scores = score(RESULTS)
    mean = macro_average(scores.languages)
    english, swahili, chinese = (jiwer_rates("language", name) for name in ("en", "sw", "zh"))
    assert mean.words == pytest.approx((english[0] + swahili[0]) / 2)
    assert mean.letters == pytest.approx((english[1] + swahili[1] + chinese[1]) / 3)
    metrics = metrics_by_name(scores)
    assert metrics["test/cer/languages/zh"] == pytest.approx(chinese[1])
    assert "test/wer/languages/zh" not in metrics
    assert metrics["test/wer/mean_of_languages"] == pytest.approx(mean.words)
    assert metrics_by_name(score(RESULTS[:1])) == {}
    quick = metrics_by_name(score(RESULTS, intervals=False), "val")
    assert quick == {name.replace("test/", "val/"): rate for name, rate in metrics.items()}


@pytest.mark.parametrize(
    ("text", "spaces"),
    [
        ("the", True),
        ("今天", False),
        ("スピーチ", False),
        ("สวัสดี", False),
        ("안녕 하세요", True),
        ("", True),
        ("OK 今天天气", False),
    ],
)
def test_scripts_tell_whether_words_have_spaces_between_them(text: str, spaces: bool) -> None:
    assert parts_words(text) == spaces


def test_scores_go_to_the_terminal_and_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    console = Console(width=80, record=True)
    report(score(RESULTS), console, worst=0)
    rows = {line.split()[0]: line.split() for line in console.export_text().splitlines() if line.strip()}
    english = jiwer_rates("language", "en")
    assert (rows["en"][1], rows["en"][5]) == tuple(f"{100 * rate:.2f}" for rate in english)
    assert rows["zh"][1:4] == ["–", "–", "12.50"]
    assert "mean" in rows
    write_scores(tmp_path / "scores.json", score(RESULTS))
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["languages"]["en"]["words"]["rate"] == pytest.approx(jiwer_rates("language", "en")[0])
    assert content["languages"]["zh"]["parts_words"] is False
    assert content["corpora"]["mls"]["num_utterances"] == 2
    mean = macro_average(score(RESULTS).corpora)
    assert content["macro_average"]["corpora"] == {"words": mean.words, "letters": mean.letters}


def test_the_verb_reads_languages_and_corpora_of_results(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = [json.dumps(row._asdict()) for row in RESULTS]
    (tmp_path / "test.jsonl").write_text("\n".join(lines), "utf-8")
    assert read_results(tmp_path / "test.jsonl") == RESULTS
    main(["score", str(tmp_path / "test.jsonl"), "--worst=0", f"--output={tmp_path / 'scores.json'}"])
    printed = capsys.readouterr().out
    assert "language" in printed
    assert "corpus" in printed
    assert json.loads((tmp_path / "scores.json").read_text())["languages"].keys() == {"en", "sw", "zh"}


def test_python_takes_a_language_for_each_text() -> None:
    references, hypotheses = [row.reference for row in RESULTS], [row.hypothesis for row in RESULTS]
    scores = score_texts(references, hypotheses, languages=[row.language for row in RESULTS])
    assert scores.languages["sw"].words.rate == pytest.approx(jiwer_rates("language", "sw")[0])
    assert scores.corpora == {}
    with pytest.raises(ValueError, match="5 references and 1 languages; give one of each"):
        score_texts(references, hypotheses, languages=["en"])


def test_the_vocabulary_states_the_characters_of_each_language(
    train_cuts: CutSet, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cuts = [cut.drop_alignments() for cut in list(train_cuts)[:4]]
    for cut, text, language in zip(
        cuts, ("für das", "das", "for a day", "habari"), ("de", "de", "en", "sw"), strict=True
    ):
        cut.supervisions[0].text, cut.supervisions[0].language = text, language
    write_manifest(CutSet(cuts[:2]), tmp_path / "de.jsonl.gz")
    write_manifest(CutSet(cuts[2:]), tmp_path / "others.jsonl.gz")
    main(["vocabulary", str(tmp_path / "de.jsonl.gz"), str(tmp_path / "others.jsonl.gz"), str(tmp_path / "v.json")])
    printed = capsys.readouterr().out.splitlines()
    assert "de: 6 characters, sü only here, lacks bhioy" in printed
    assert "en: 6 characters, oy only here, lacks bhisü" in printed
    assert "sw: 5 characters, bhi only here, lacks dfosyü" in printed
    main(["vocabulary", str(tmp_path / "de.jsonl.gz"), str(tmp_path / "one.json")])
    assert "lacks" not in capsys.readouterr().out
