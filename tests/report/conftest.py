"""A page of runs, and a browser that opens it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opened_pages import BROWSER
from run_folders import finetuning_run, pretraining_run, recording, result_rows, trials_file

from hubert_lightning.report.page import write_report


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations of pre-training, and a fine-tuning with results and a tuned decoder."""
    folder = tmp_path_factory.mktemp("report") / "demo"
    audio = recording(folder / "audio" / "tone.wav", 3.0)
    for number in (1, 2):
        pretraining_run(folder / "pretraining" / f"iteration{number}", audio, number)
    finetuning_run(folder / "finetuning", result_rows(audio))
    trials_file(folder / "finetuning" / "decoder.trials.json")
    return folder


@pytest.fixture(scope="session")
def page_file(demo_folder: Path) -> Path:
    """The page of these runs."""
    page = demo_folder / "report.html"
    write_report([demo_folder], page)
    return page


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    if BROWSER is None:
        pytest.skip("no Chromium to open pages in; install it (Debian: apt-get install chromium), or set CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives Chromium; `uv sync` installs it")
    options = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=options)
        yield opened
        opened.close()
