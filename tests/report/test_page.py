"""The page as a file: what it holds for each kind of run, and what it escapes."""

import json
import os
import re
from html import unescape
from pathlib import Path
from typing import Any

import jiwer
import pytest
from helpers import refused
from run_folders import (
    NASTY_ID,
    finetuning_run,
    pretraining_run,
    recording,
    result_rows,
    write_json,
    write_results,
)

from hubert_lightning.cli import main
from hubert_lightning.report import words
from hubert_lightning.report.charts import confusion_chart, plain, thinned
from hubert_lightning.report.page import embedded, write_report
from hubert_lightning.training.watched import WatchedTranscript, write_transcripts

LARGEST_PAGE = 30_000_000
PLOTLY = 5_000_000


def written(folder: Path, *runs: Path, **options: Any) -> str:
    page = folder / "report.html"
    write_report(runs or [folder], page, **options)
    return page.read_text("utf-8")


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="(\w+)">', page)


def data_of(page: str, name: str) -> Any:
    match = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert match
    return json.loads(match[1])


def text_of(page: str) -> str:
    body = page[page.index("<body>") : page.index('<script type="application/json"')]
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_a_pre_training_alone_has_units_and_no_errors(tmp_path: Path) -> None:
    pretraining_run(tmp_path / "base" / "iteration1", recording(tmp_path / "a.wav", 3))
    page = written(tmp_path)
    assert sections(page) == ["summary", "runs", "units", "layers", "curves", "speed", "settings", "about"]


def test_a_fine_tuning_alone_has_errors_and_no_units(tmp_path: Path) -> None:
    run = finetuning_run(tmp_path / "run", result_rows(None))
    assert sections(written(tmp_path, run)) == ["summary", "runs", "errors", "curves", "speed", "settings", "about"]


def test_all_parts_of_a_demo_are_there(page_file: Path) -> None:
    page = page_file.read_text("utf-8")
    assert sections(page) == [
        *("summary", "runs", "errors", "units", "layers", "curves", "speed", "decoder", "settings", "about")
    ]
    assert len(data_of(page, "clips")) == 1 + 4  # both iterations watch one utterance, and four have errors


def test_a_run_that_has_only_begun_is_a_page(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: {class_path: hubert_lightning.CTCFinetuning}\n")
    text = text_of(written(tmp_path))
    assert "fine-tuning (CTC)" in text
    assert "not finished, 0 steps" in text


def test_a_training_that_was_not_tested_shows_its_newest_transcripts(tmp_path: Path) -> None:
    run = finetuning_run(tmp_path / "run", finished=False)
    row = WatchedTranscript(400, "a", None, 0, 0.0, 2.0, "anna", "LAMP ON", "LAMB ON", 0.5)
    write_transcripts(run, [row])
    text = text_of(written(tmp_path))
    assert "run, validation at step 400" in text
    assert "1 error in 2 words" in text


def test_numbers_of_two_runs_stand_side_by_side(tmp_path: Path) -> None:
    rows = result_rows(None, count=41, errors=2)[1:]
    better = [row | {"hypothesis": row["reference"]} for row in rows]
    runs = finetuning_run(tmp_path / "one", rows), finetuning_run(tmp_path / "two", better)
    text = text_of(written(tmp_path, *runs))
    rate = jiwer.wer([row["reference"] for row in rows], [row["hypothesis"] for row in rows])
    assert f"one on test, greedy {100 * rate:.1f} %" in text
    assert "two on test, greedy 0.0 % 0.0 to 0.0 %" in text
    assert f"two on test, greedy against one on test, greedy −{100 * rate:.1f} points" in text


def test_settings_that_differ_come_first_and_equal_ones_are_folded(tmp_path: Path) -> None:
    for number in (1, 2):
        run = pretraining_run(tmp_path / f"run{number}")
        record = json.loads((run / "record.json").read_text())
        write_json(run / "record.json", record | {"optimizer/lr": number / 1000})
    page = written(tmp_path)
    differences = page[page.index("Settings that differ") : page.index('<section id="curves">')]
    assert re.findall(r'<th scope="row"><bdi>([\w/]+)</bdi>', differences) == ["optimizer/lr"]
    folded = page[page.index('<section id="settings">') :]
    assert "optimizer/class" in folded
    assert "<bdi>optimizer/lr</bdi>" not in folded


def test_folders_of_somebodys_home_are_left_out(page_file: Path) -> None:
    page = page_file.read_text("utf-8")
    assert "manifests/train.jsonl.gz" in page
    assert "somebody" not in page


def test_corrupt_files_are_named_without_the_folders_around_them(tmp_path: Path) -> None:
    run = pretraining_run(tmp_path / "some body" / "run")
    (run / "watched").mkdir(exist_ok=True)
    (run / "watched" / "units.json").write_text("{")
    (run / "layers.json").write_text("{")
    write_report([run], tmp_path / "report.html", audio=False)
    page = unescape((tmp_path / "report.html").read_text())
    assert "<bdi>run/watched/units.json: line 1 is corrupt" in page
    assert "<bdi>run/layers.json cannot be read" in page
    assert "some body" not in page


def test_of_several_paths_each_is_shortened() -> None:
    assert words.setting("/home/jane/one/a.jsonl.gz, /home/jane/two/b.jsonl.gz") == "one/a.jsonl.gz, two/b.jsonl.gz"
    assert words.short_paths("/home/jane/run/test.jsonl: empty; run again", []) == "run/test.jsonl: empty; run again"


def test_words_that_begin_alike_have_rows_of_their_own() -> None:
    long = "Donaudampfschifffahrtsgesellschaft"
    [heatmap] = confusion_chart("", [long, long + "en"], ["a"], [[1], [2]]).figure["data"]
    assert len(set(heatmap["y"])) == 2


def test_nothing_is_heard_or_seen_without_audio(demo_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "quiet.html"
    write_report([demo_folder], page, audio=False)
    text = page.read_text("utf-8")
    assert data_of(text, "clips") == {}
    assert not any("images" in chart["figure"]["layout"] for chart in data_of(text, "charts"))
    assert "<audio" not in text
    assert "Recordings and spectrograms were left out" in text


def test_no_text_ends_a_script_or_becomes_a_tag(page_file: Path) -> None:
    page = page_file.read_text("utf-8")
    assert NASTY_ID not in page
    assert "<img" not in page
    assert page.count("</script>") == 4
    assert '"' not in re.findall(r'aria-label="recording of ([^>]*)"', page)[0]


def test_a_name_that_is_no_utf8_is_written_with_a_question_mark(tmp_path: Path) -> None:
    run = tmp_path / os.fsdecode(b"run\xff")
    try:
        run.mkdir()
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    write_json(run / "metrics.json", {"steps": 3})
    write_report([run], tmp_path / "page.html")
    assert "run?" in (tmp_path / "page.html").read_text()


def test_a_setting_of_a_decoder_that_is_no_number_has_no_chart(tmp_path: Path) -> None:
    run = finetuning_run(tmp_path / "run")
    write_json(run / "lm.trials.json", {"trials": [{"wer": 0.1, "kind": "fast", "lm_weight": 1.0}]})
    write_report([run], tmp_path / "page.html")
    section = (tmp_path / "page.html").read_text().split('<section id="decoder">')[1].split("</section>")[0]
    assert "lm weight" in section
    assert "kind" not in section


def test_embedded_json_is_read_back_as_it_was() -> None:
    content = {"</script>": ["<!--", "\u2028", "&amp;", "é", 1.5, None]}
    assert json.loads(str(embedded(content))) == content
    assert "<" not in embedded(content)


def test_texts_of_charts_are_escaped_for_plotly() -> None:
    assert plain('<a href="x">B\u202e\n</a>') == '&lt;a href="x"&gt;B  &lt;/a&gt;'
    assert len(plain("x" * 500)) == 60


def test_a_long_curve_is_thinned_to_means() -> None:
    curve = thinned([(step, float(step)) for step in range(1, 10_001)], 100)
    assert len(curve) == 100
    assert curve[0] == (100, 50.5)
    assert curve[-1][0] == 10_000


def test_decoder_trials_are_drawn_over_each_weight(page_file: Path) -> None:
    text = text_of(page_file.read_text("utf-8"))
    assert "finetuning, decoder Word error rate: greedy 30.0 %, default weights 25.0 % and best weights 20.0 %." in text
    traces = [chart["figure"]["data"] for chart in data_of(page_file.read_text("utf-8"), "charts")]
    [weights] = [
        trace for trace in traces if trace[0].get("name") == "trial" and trace[0]["x"] == [*map(float, range(8))]
    ]
    assert weights[1]["x"] == [4.0]


@pytest.mark.slow
def test_a_page_of_an_hour_of_tests_stays_small(tmp_path: Path) -> None:
    audio = recording(tmp_path / "a.wav", 60.0)
    rows = []
    for number, row in enumerate(result_rows(audio, count=720, seconds=5.0)):
        rows.append(row | {"speaker": f"speaker {number % 20}", "start": 0.07 * number})
    runs = [finetuning_run(tmp_path / name, rows) for name in ("one", "two")]
    page = written(tmp_path, *runs)
    assert "720 utterances (1 h)" in page
    assert len(data_of(page, "clips")) == 20
    assert PLOTLY < len(page.encode()) < LARGEST_PAGE


def test_report_states_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = finetuning_run(tmp_path / "run", result_rows(None))
    page = tmp_path / "out" / "page.html"
    main(["report", str(run), "--output", str(page), "--title", "Lamps & <doors>", "--no-audio"])
    assert capsys.readouterr().out.startswith(f"{page}: ")
    assert "<title>Lamps &amp; &lt;doors&gt;</title>" in page.read_text("utf-8")


def test_mistakes_are_answered_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "holds no run" in refused(capsys, "report", str(tmp_path))
    run = finetuning_run(tmp_path / "run")
    assert "ends in .html" in refused(capsys, "report", str(run), "--output", str(tmp_path / "page.pdf"))
    (tmp_path / "folder.html").mkdir()
    assert "a folder; give a name" in refused(capsys, "report", str(run), "--output", str(tmp_path / "folder.html"))


def test_score_writes_a_page_of_one_or_two_systems(tmp_path: Path) -> None:
    rows = result_rows(recording(tmp_path / "a.wav", 3))
    better = [row | {"hypothesis": row["reference"]} for row in rows]
    first = write_results(tmp_path / "first" / "test.jsonl", rows)
    second = write_results(tmp_path / "second" / "test.jsonl", better)
    page = tmp_path / "scores.html"
    main(["score", str(first), "--output", str(page)])
    assert sections(page.read_text("utf-8")) == ["summary", "errors", "about"]
    assert len(data_of(page.read_text("utf-8"), "clips")) == 4
    main(["score", str(first), "--against", str(second), "--output", str(page)])
    assert "second/test.jsonl against first/test.jsonl −" in text_of(page.read_text("utf-8"))


def test_score_still_writes_json(tmp_path: Path) -> None:
    results = write_results(tmp_path / "test.jsonl", result_rows(None))
    main(["score", str(results), "--output", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["words"]["errors"] == 8


def test_rates_and_shares_of_languages_are_in_the_page(tmp_path: Path) -> None:
    rows = [row | {"language": "sw" if number % 3 else "en"} for number, row in enumerate(result_rows(None))]
    run = finetuning_run(tmp_path / "run", rows)
    record = json.loads((run / "record.json").read_text())
    for name, hours, share in (("en", 3.0, 0.6), ("sw", 1.0, 0.4)):
        record |= {f"data/train/languages/{name}/hours": hours, f"data/train/languages/{name}/share": share}
    (run / "record.json").write_text(json.dumps(record))
    text = text_of(written(tmp_path, run))
    assert re.search(r"languages en 3.* \(60\.0 % of an epoch\), sw 1.* \(40\.0 % of an epoch\)", text)
    swahili = [row for row in rows if row["language"] == "sw"]
    rate = jiwer.wer([row["reference"] for row in swahili], [row["hypothesis"] for row in swahili])
    assert re.search(rf"language WER .* sw {100 * rate:.1f} % .* mean ", text)
