"""A page that shows runs and their results: one HTML file with everything in it.

The page asks no other host for anything: plotly.js, pictures and recordings are inside, and its content security policy
forbids requests. Texts of transcripts and files are escaped.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from hubert_lightning import __version__
from hubert_lightning.errors import UserError
from hubert_lightning.files import write_whole
from hubert_lightning.progress_bar import progress
from hubert_lightning.report import words
from hubert_lightning.report.breakdown import read_evaluation
from hubert_lightning.report.charts import SERIES, Chart
from hubert_lightning.report.clips import Clips
from hubert_lightning.report.json_files import is_number, json_object
from hubert_lightning.report.parts import Page, Table
from hubert_lightning.report.recognition import add_rates, detail_of, tuning_charts
from hubert_lightning.report.run_files import BEHIND_LABELS, MEASURED, Results, Run, find_runs
from hubert_lightning.report.summary import Scored, summarise
from hubert_lightning.report.training_parts import add_speed, add_units, curve_charts, layer_charts
from hubert_lightning.training.watched import TRANSCRIPTS, WATCHED

WORST = 20
"""Worst utterances of each test that a page shows."""


def write_report(runs: Sequence[Path], output: Path, *, audio: bool = True, title: str | None = None) -> None:
    """Write a page that shows runs: what they trained, how well and how fast.

    Args:
        runs: Folders of runs, or folders that hold such folders.
        output: HTML file to write.
        audio: Whether recordings go into the page.
        title: Title of the page; made from the names of the folders if not given.

    Raises:
        UserError: A folder does not exist or holds no run, or the page cannot be written.
    """
    listed = find_runs(runs)
    clips = Clips(audio)
    names = words.listing([Path(folder).resolve().name for folder in runs])
    with progress("reading results", len(listed) + 1, "runs") as advance:
        scored, remarks = _scored_runs(listed, advance)
        page = _page_of(listed, scored, _demo_pnmi(runs) or _pnmi_of(listed), clips, title or names, remarks)
        advance()
    _write(output, page, clips)


def write_score_page(
    results: Path, output: Path, *, against: Path | None = None, audio: bool = True, worst: int = WORST
) -> None:
    """Write a page that shows the results of one test, or of two systems.

    Args:
        results: JSON lines of `hubert test`.
        output: HTML file to write.
        against: Results of a second system for the same utterances.
        audio: Whether recordings go into the page.
        worst: Number of utterances to show, those with most errors first.

    Raises:
        UserError: The results cannot be read or the page cannot be written.
    """
    clips = Clips(audio)
    scored = []
    paths = [results] if against is None else [results, against]
    for path, name in zip(paths, words.distinct_names([*map(Path, paths)]), strict=True):
        origin = Results.of(path)
        scored.append(Scored(name, None, origin, read_evaluation(path, origin.origin)))
    page = _page_of([], scored, {}, clips, words.listing([item.title for item in scored]), [], worst)
    _write(output, page, clips)


def _scored_runs(runs: Sequence[Run], advance: Any) -> tuple[list[Scored], list[str]]:
    """Score the results of all runs; of a fine-tuning without a test, the transcripts of its newest validation."""
    scored, remarks = [], []
    for run in runs:
        for results in run.results or _validation_of(run):
            title = f"{run.name}, {results.name}"
            if results.origin:
                title = f"{run.name} on {results.manifest}, {results.decoder}"
            try:
                scored.append(Scored(title, run, results, read_evaluation(results.path, results.origin)))
            except UserError as error:
                remarks.append(f"{error}.")
        advance()
    return scored, remarks


def _validation_of(run: Run) -> list[Results]:
    path = run.folder / WATCHED / TRANSCRIPTS
    return [Results(path, f"validation at step {words.number(run.step)}", {})] if path.is_file() else []


def _demo_pnmi(folders: Sequence[Path]) -> dict[str, float]:
    """PNMI of MFCC and of each iteration, as a demo measures it on held-out speakers."""
    for folder in folders:
        pnmi = json_object(Path(folder) / "results.json", []).get("pnmi")
        if isinstance(pnmi, dict):
            titles = {"mfcc": "MFCC", "iteration1": "iteration 1", "iteration2": "iteration 2"}
            return {titles.get(name, str(name)): float(value) for name, value in pnmi.items() if is_number(value)}
    return {}


def _pnmi_of(runs: Sequence[Run]) -> dict[str, float]:
    """PNMI of the labels of each run, as labelling measured it."""
    values = {run.name: run.record.get("labels/pnmi") for run in runs}
    return {f"labels of {name}": float(value) for name, value in values.items() if is_number(value)}


def _page_of(
    runs: Sequence[Run],
    scored: Sequence[Scored],
    pnmi: Mapping[str, float],
    clips: Clips,
    title: str,
    remarks: list[str],
    worst: int = WORST,
) -> Page:
    colours = {run.name: SERIES[number % len(SERIES)] for number, run in enumerate(runs)}
    layers, best_layers = layer_charts(runs, colours, pnmi)
    page = Page(title, _subtitle(runs, scored), summarise(runs, scored, pnmi, best_layers))
    page.legend = [*colours.items()] if len(runs) > 1 else []
    page.layers = layers
    kinds = {kind for run in runs for kind in run.layers}
    page.legend_of_layers = [(run.name, colours[run.name]) for run in runs if run.layers]
    lines = {BEHIND_LABELS: "dotted: the model behind the labels of the run", MEASURED: "dashed: hubert quality, MFCC"}
    page.lines_of_layers = " · ".join(text for kind, text in lines.items() if kind in kinds)
    _add_settings(page, runs)
    for task in ("pre-training", "fine-tuning", "run"):
        members = [run for run in runs if run.task == task]
        if charts := curve_charts(members, colours):
            page.curves.append((task, [(run.name, colours[run.name]) for run in members], charts))
    add_units(page, runs, clips)
    add_speed(page, runs, colours)
    add_rates(page, scored, colours)
    page.details = [detail_of(item, number, clips, worst) for number, item in enumerate(scored)]
    page.tunings = [tuning_charts(run.name, tuning) for run in runs for tuning in run.tunings]
    problems = [*page.remarks, *remarks, *(f"{problem}." for run in runs for problem in run.problems)]
    page.remarks = [words.short_paths(text, {run.folder.parent for run in runs}) for text in problems]
    if clips.missing:
        page.remarks.append(
            f"{words.counted(len(clips.missing), 'recording')} could not be read, among them "
            f"{words.short_path(min(clips.missing))}; it may have been moved."
        )
    if clips.left_out:
        page.remarks.append(
            f"{words.counted(clips.left_out, 'recording')} would have made the page too large and were left out."
        )
    if not clips.audio:
        page.remarks.append(
            "Recordings and spectrograms were left out (--no-audio). Transcripts and names of speakers are in the page."
        )
    return page


def _subtitle(runs: Sequence[Run], scored: Sequence[Scored]) -> str:
    counts = [
        words.counted(sum(run.task == task for run in runs), f"{task} run")
        for task in ("pre-training", "fine-tuning")
        if any(run.task == task for run in runs)
    ]
    if scored:
        counts.append(words.counted(len(scored), "set of results", "sets of results"))
    return words.listing(counts) if counts else words.counted(len(runs), "run")


def _add_settings(page: Page, runs: Sequence[Run]) -> None:
    if not runs:
        return
    facts = [words.facts(run) for run in runs]
    names = [*dict.fromkeys(name for row in facts for name in row)]
    order = [name for name in _FACTS_ORDER if name in names] + [name for name in names if name not in _FACTS_ORDER]
    page.facts = Table(
        ["", *(run.name for run in runs)], [[name, *(row.get(name, "–") for row in facts)] for name in order]
    )
    for task, group in groupby(runs, key=lambda run: run.task):
        members = [*group]
        keys = [*dict.fromkeys(key for run in members for key in run.record if not words.is_place(key))]
        values = {key: [words.setting(run.record.get(key)) for run in members] for key in sorted(keys)}
        different = {key: row for key, row in values.items() if len(set(row)) > 1}
        different = dict(sorted(different.items(), key=lambda item: "fingerprint" in item[0]))  # those say least
        same = {key: row for key, row in values.items() if key not in different}
        headings = ["", *(run.name for run in members)]
        if different:
            page.differences.append((task, Table(headings, [[key, *row] for key, row in different.items()])))
        if same:
            label = members[0].name if len(members) == 1 else f"equal in all {task} runs"
            page.settings.append((label, Table(["", "value"], [[key, row[0]] for key, row in same.items()])))


_FACTS_ORDER = (
    "task", "state", "training data", "languages", "corpora", "manifests", "validation data", "targets",
    "PNMI of the targets", "K-means inertia", "initial weights", "encoder", "parameters", "optimizer", "warm-up",
    "batch", "masks", "precision", "devices", "seed", "version",
)  # fmt: skip


def _write(output: Path, page: Page, clips: Clips) -> None:
    environment = Environment(
        loader=PackageLoader("hubert_lightning.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts: list[dict[str, Any]] = []

    def figure(chart: Chart) -> int:
        """Number of a chart in the page, whose data stand at its end."""
        charts.append({"figure": chart.figure, "clip": chart.clip})
        return len(charts) - 1

    loader = partial(environment.loader.get_source, environment)  # type: ignore[union-attr]
    body = environment.get_template("page.html.j2").render(
        page=page,
        figure=figure,
        version=__version__,
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        style=Markup(loader("page.css")[0]),
        script=Markup(loader("page.js")[0]),
        plotly=Markup(get_plotlyjs()),
        clips=lambda: embedded(clips.uris),
        charts=lambda: embedded(charts),
    )
    write_whole(output, body.encode(errors="replace"))  # names of files may have bytes that are no UTF-8


def embedded(content: Any) -> Markup:
    """Write JSON that may stand inside a script element: no text in it can end the element."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_listed)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else asdict(value)
