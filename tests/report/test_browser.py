"""The page in a real browser."""

import base64
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
from opened_pages import Opened, open_page
from run_folders import NASTY_ID, NASTY_TEXT, STEPS

from hubert_lightning.asr.scoring import read_results
from hubert_lightning.characters import comparable

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def opened(browser: Any, page_file: Path) -> Iterator[Opened]:
    page = open_page(browser, page_file)
    page.show_all()
    yield page
    page.page.context.close()


def plotted(opened: Opened, title: str) -> list[dict[str, Any]]:
    """Names and points of the curves that plotly has drawn under a heading."""
    traces: list[dict[str, Any]] = opened.page.evaluate(
        """(title) => {
            const figures = [...document.querySelectorAll('figure')];
            const figure = figures.find((one) => one.querySelector('figcaption')?.textContent === title);
            return figure.querySelector('.plot').data.map(({ name, x, y }) => ({ name, x: [...x], y: [...y] }));
        }""",
        title,
    )
    return traces


def test_the_page_prints_no_error_and_asks_for_nothing(opened: Opened) -> None:
    assert opened.messages == []
    assert opened.requests == []


def test_every_chart_is_drawn(opened: Opened) -> None:
    assert opened.page.locator(".plot").count() > 15
    svgs = "[...document.querySelectorAll('.plot .main-svg:first-of-type')]"
    assert min(opened.page.evaluate(f"{svgs}.map((svg) => svg.getBoundingClientRect().width)")) > 200


def test_error_rates_are_those_of_the_results(opened: Opened, demo_folder: Path) -> None:
    results = read_results(demo_folder / "finetuning" / "test.jsonl")
    references = [comparable(result.reference) for result in results]
    hypotheses = [comparable(result.hypothesis) for result in results]
    words, letters = jiwer.wer(references, hypotheses), jiwer.cer(references, hypotheses)
    row = opened.page.locator("#errors table").first.locator("tbody tr").first.inner_text().split("\t")
    assert row[0] == "finetuning on test, greedy"
    assert row[1] == f"{100 * words:.1f} %"
    assert row[3] == f"{100 * letters:.1f} %"
    assert opened.page.locator(".cards .value").first.inner_text() == f"{100 * words:.1f} %"


def test_curves_are_those_of_the_table(opened: Opened, demo_folder: Path) -> None:
    for number in (1, 2):
        with (demo_folder / "pretraining" / f"iteration{number}" / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["val/masked_loss"]]
        name = f"pretraining/iteration{number} validation"
        [trace] = [trace for trace in plotted(opened, "Masked loss") if trace["name"] == name]
        assert trace["x"] == [int(row["step"]) + 1 for row in rows]
        np.testing.assert_allclose(trace["y"], [float(row["val/masked_loss"]) for row in rows])
        assert trace["x"][-1] == STEPS


def test_layers_of_both_iterations_are_in_one_chart(opened: Opened) -> None:
    traces = plotted(opened, "Agreement with phones")
    assert [trace["name"] for trace in traces] == ["pretraining/iteration1", "pretraining/iteration2"]
    np.testing.assert_allclose([trace["y"] for trace in traces], [[0.3, 0.4, 0.5]] * 2)


def test_players_know_their_length_and_play(opened: Opened) -> None:
    players = opened.page.locator("audio")
    assert players.count() == 2 + 4  # watched utterances, and utterances with errors
    opened.wait_until("[...document.querySelectorAll('audio')].every((audio) => audio.readyState >= 1)")
    durations = opened.page.evaluate("[...document.querySelectorAll('audio')].map((audio) => audio.duration)")
    assert sorted(round(duration, 1) for duration in durations) == [1.5] * 4 + [2.0] * 2
    for part in (".utterance", ".watched"):
        opened.page.evaluate(f"document.querySelector('{part} audio').play()")
        opened.wait_until(f"document.querySelector('{part} audio').currentTime > 0.3")
    assert opened.page.evaluate("document.querySelector('.utterance audio').paused"), "one recording plays at a time"


def test_a_line_follows_the_recording_over_its_units(opened: Opened) -> None:
    opened.page.evaluate("document.querySelectorAll('audio').forEach((audio) => audio.pause())")
    positions = []
    for second in (0.5, 1.5):
        opened.page.evaluate(f"document.querySelector('.watched audio').currentTime = {second}")
        opened.wait_until("document.querySelector('.head').style.display === 'block'")
        opened.page.wait_for_timeout(300)
        positions.append(opened.page.evaluate("parseFloat(document.querySelector('.head').style.left)"))
    width = opened.page.evaluate(
        "(() => { const { l, r } = document.querySelector('.watched .plot').layout.margin;"
        " return document.querySelector('.watched .plot').clientWidth - l - r; })()"
    )
    assert positions[1] - positions[0] == pytest.approx(width / 2, abs=3)


def test_a_transcript_that_ends_a_script_is_only_text(opened: Opened) -> None:
    assert opened.page.title() == "demo"
    text = opened.page.locator(".utterance").first.inner_text()
    assert NASTY_ID in text
    assert "onerror=alert(1)>" in text
    assert opened.page.locator("img").count() == 0
    assert '"QUOTED"' in NASTY_TEXT
    assert '"QUOTED"' in text


def test_a_reversing_character_stays_inside_its_name(opened: Opened) -> None:
    name = opened.page.locator(".utterance").first.locator("strong bdi")
    assert "\u202e" in name.inner_text()
    left = opened.page.evaluate("document.querySelector('.utterance header').innerText.indexOf('speaker')")
    assert left > len(NASTY_ID), "the text after the name stands after it"


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_page_and_charts_follow_light_and_dark(browser: Any, page_file: Path, scheme: str, is_dark: bool) -> None:
    opened = open_page(browser, page_file, scheme=scheme)
    opened.page.locator("#curves").scroll_into_view_if_needed()
    opened.page.wait_for_selector("#curves .main-svg .xtick text")
    background, text = (
        brightness(opened.page.evaluate(f"getComputedStyle(document.body).{name}"))
        for name in ("backgroundColor", "color")
    )
    tick = opened.page.evaluate("getComputedStyle(document.querySelector('#curves .xtick text')).fill")
    assert (background < 0.2) == is_dark
    assert abs(text - background) > 0.7
    assert abs(brightness(tick) - background) > 0.3
    assert opened.messages == []
    opened.page.context.close()


def brightness(colour: str) -> float:
    """Mean of red, green and blue of rgb(…), from 0 to 1."""
    numbers = colour[colour.index("(") + 1 : -1].split(",")[:3]
    return sum(map(float, numbers)) / 3 / 255


def test_a_phone_scrolls_only_inside_figures_and_tables(browser: Any, page_file: Path) -> None:
    opened = open_page(browser, page_file, width=380)
    opened.show_all()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 380
    outside = opened.page.evaluate(
        """[...document.querySelectorAll('main *, header *, nav *')]
            .filter((one) => !one.closest('.scroll') && one.getBoundingClientRect().right > 381)
            .map((one) => one.outerHTML.slice(0, 80))"""
    )
    assert outside == []
    assert opened.messages == []
    opened.page.context.close()


def test_paper_shows_folded_parts_and_no_players(browser: Any, page_file: Path) -> None:
    opened = open_page(browser, page_file, scheme="dark")
    closed = opened.page.locator("details:not([open])").count()
    assert closed > 0
    document = opened.page.pdf(format="A4")
    assert document.startswith(b"%PDF")
    opened.page.emulate_media(media="print")
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.page.locator("details:not([open])").count() == 0
    assert opened.page.locator("audio:visible").count() == 0
    assert brightness(opened.page.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.9
    opened.page.emulate_media(media="screen")
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.page.locator("details:not([open])").count() == closed
    assert opened.messages == []
    opened.page.context.close()


def test_a_clip_is_the_recording_that_it_names(opened: Opened) -> None:
    """The page's own MP3 of the watched utterance is as loud as the tone, and as long."""
    address = opened.page.evaluate("document.querySelector('.watched audio').src")
    assert address.startswith("data:audio/mpeg;base64,")
    content = base64.b64decode(address.partition(",")[2])
    assert 4_000 < len(content) < 16_000  # two seconds at 32 kbit/s
