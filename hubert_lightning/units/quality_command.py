"""`hubert quality`: the table, the figure and the numbers of every layer and several numbers of clusters."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lhotse.cut import Cut
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hubert_lightning.data.alignments import symbols_of
from hubert_lightning.data.examine import examine
from hubert_lightning.data.manifest import check_audio, read_manifests
from hubert_lightning.data.phone_sets import check_one_phone_set
from hubert_lightning.data.refusals import print_refusals
from hubert_lightning.data.workers import default_workers
from hubert_lightning.errors import UserError, check_installed
from hubert_lightning.features.extractors import all_layers_extractor, mfcc_extractor
from hubert_lightning.features.recordings import listed
from hubert_lightning.figure_style import COLOURS, GREY, PAGE, figure_files, figure_style
from hubert_lightning.files import write_all
from hubert_lightning.model.devices import choose_device
from hubert_lightning.pretrained.load import load_encoder
from hubert_lightning.units.abx import check_abx
from hubert_lightning.units.proposal import FRAMES_A_CLUSTER, Proposal, grid_for, is_too_many, propose
from hubert_lightning.units.stretches import SpeechSample, draw_speech
from hubert_lightning.units.survey import Measures, survey

COLUMNS = {
    "PNMI": ("pnmi", ".3f"),
    "adj.": ("adjusted_pnmi", ".3f"),
    "content": ("content", ".2f"),
    "speaker": ("speaker_information", ".2f"),
    "halves": ("half_agreement", ".2f"),
    "seeds": ("seed_agreement", ".2f"),
    "inertia": ("inertia", ".2f"),
    "DB": ("davies_bouldin", ".1f"),
    "rank": ("effective_rank", ".0f"),
    "perpl.": ("perplexity", ".0f"),
    "dead": ("dead_clusters", "d"),
    "run": ("run_length", ".1f"),
    "bit/s": ("bit_rate", ".0f"),
}
"""Heading of each column of the table → measure and format."""
ABX_COLUMNS = {"within": ("abx_within", ".3f"), "across": ("abx_across", ".3f")}
"""The same, of the table of ABX error rates."""
CURVES = {
    "pnmi": "PNMI",
    "adjusted_pnmi": "PNMI beyond chance",
    "content": "content (bits)",
    "half_agreement": "NMI with other speakers'",
    "inertia": "relative inertia",
    "speaker_information": "speaker information",
}
"""Measures of the figure, with their labels."""
PROPOSED = ("layer", "clusters", "reason")
"""Keys of the proposal in quality.json."""
UNLIMITED = 10_000
"""Characters of a line to which no table comes."""


def quality(
    checkpoint: Path,
    recordings: list[Path],
    output: Path = Path("quality"),
    clusters: list[int] | None = None,
    max_frames: int = 100_000,
    seed: int = 0,
    abx: bool = False,
) -> None:
    """Judge the clusters of every layer of a model, and of MFCCs, with or without phones.

    No transcripts are needed. One pass over the audio judges all layers and numbers of clusters. With phones
    (`hubert prepare alignments`), PNMI and purities are measured as well.

    Nothing is proposed where each cluster has fewer than ten frames, or the best units reveal nothing of the speech
    around them.

    Args:
        checkpoint: Model in any format.
        recordings: Manifests, folders of recordings, or audio files.
        output: Folder for quality.json and the figure: quality.png, quality.svg and quality.pdf.
        clusters: Numbers of K-means clusters; 50, 100, 200 and 500, as far as there are frames for them, if not given.
        max_frames: Number of frames, half to fit K-means and half to judge it.
        seed: Seed of the sample and of K-means.
        abx: Whether to compute ABX error rates within and across speakers; needs phones, speakers and fastabx.

    Raises:
        UserError: scikit-learn is not installed, a file cannot be read, manifests have phones of different sets, or
            there are too few frames.
    """
    check_installed("sklearn")
    cuts = read_speech(recordings)
    numbers = sorted(set(clusters)) if clusters is not None else None
    encoder = load_encoder(checkpoint).to(choose_device())
    clock = encoder.config.clock
    if numbers is None:
        numbers = grid_for(draw_speech(cuts, [2], max_frames, seed, clock=clock).least)
    sample = draw_speech(cuts, numbers, max_frames, seed, clock=clock)
    tokens = check_abx(sample) if abx else None
    num_workers = default_workers()
    layers = survey(all_layers_extractor(encoder, with_input=True), sample, numbers, seed, num_workers, tokens)
    of_mfcc = survey(mfcc_extractor(clock=clock), sample, numbers, seed, num_workers, tokens)
    proposal = propose(layers, sample.least)
    _report(checkpoint, sample, [*of_mfcc, *layers], proposal, Path(output))


def read_speech(paths: Sequence[Path]) -> list[Cut]:
    """Read the cuts of manifests, and those of audio files and folders of them.

    Args:
        paths: Manifests (.jsonl, .jsonl.gz), audio files, and folders in which all audio files are used.

    Raises:
        UserError: A path cannot be used, or two manifests have phones of different sets.
    """
    manifests = [path for path in map(Path, paths) if path.name.endswith((".jsonl", ".jsonl.gz", ".shar"))]
    others = [path for path in map(Path, paths) if path not in manifests]
    for path in others:
        if not path.exists():
            raise UserError(f"{path}: no such manifest, folder or recording; name one that exists")
    parts = read_manifests(manifests)
    check_audio(cut for part in parts for cut in part)
    check_one_phone_set(
        {str(path): symbols_of(part) for path, part in zip(manifests, parts, strict=True)},
        "align all utterances with one aligner and dictionary, or judge manifests of different sets one at a time",
    )
    cuts = [cut for part in parts for cut in part]
    if others:
        examined, refused, _ = examine(listed(others))
        if refused:
            print_refusals(refused, Console(stderr=True))
        cuts += examined
    if not cuts:
        raise UserError("no recording can be used; name manifests, folders of recordings, or audio files")
    return cuts


def _report(
    checkpoint: Path, sample: SpeechSample, measures: Sequence[Measures], proposal: Proposal, output: Path
) -> None:
    """Print the tables, and write the numbers and the figure."""
    console = Console()
    numbers = sorted({row.clusters for row in measures})
    of_number = [row for row in measures if row.clusters == proposal.clusters]
    _print_table(console, of_number, "features", f"{proposal.clusters} clusters of each layer of {checkpoint}")
    if len(numbers) > 1:
        of_layer = [row for row in measures if row.layer == proposal.layer]
        _print_table(console, of_layer, "clusters", f"layer {proposal.layer}, by the number of clusters")
    if not math.isnan(max(row.abx_across for row in measures)):
        _print_table(console, of_number, "ABX errors of", "A, B and X of one speaker, and X of another", ABX_COLUMNS)
    for sentence in _remarks(sample, of_number):
        console.print(sentence, soft_wrap=True, highlight=False)
    if too_many := [number for number in numbers if is_too_many(number, sample.least)]:
        console.print(
            f"warning: fewer than {FRAMES_A_CLUSTER} frames a cluster for {', '.join(map(str, too_many))} clusters "
            f"(half of the sample has {sample.least} frames), which are not proposed",
            soft_wrap=True,
            highlight=False,
        )
    console.print(
        f"nothing is proposed: {proposal.doubt}"
        if proposal.doubt
        else f"proposed: layer {proposal.layer}, {proposal.clusters} clusters: {proposal.reason}; in YAML: "
        f"layer: {proposal.layer}, clusters: {proposal.clusters}, or auto for both",
        soft_wrap=True,
        highlight=False,
    )
    content = json.dumps(as_json(measures, proposal, sample), indent=2) + "\n"
    figures = figure_files(_drawn(measures, proposal), output / "quality.png")
    write_all(figures | {output / "quality.json": content.encode()})
    console.print(f"numbers in {output / 'quality.json'}, figure in {output / 'quality.png'}, .svg and .pdf")


def as_json(measures: Sequence[Measures], proposal: Proposal, sample: SpeechSample) -> dict[str, Any]:
    """Collect the numbers of a survey.

    Args:
        measures: Measures of all layers and numbers of clusters.
        proposal: Proposed layer and number of clusters.
        sample: Speech that was judged.

    Returns:
        JSON: the layers with the proposed number of clusters by name, as `hubert report` reads them; "proposal", None
        if nothing is proposed; "surveys", all layers by the number of clusters; and "sample".
    """
    surveys: dict[str, dict[str, Any]] = {}
    for row in measures:
        surveys.setdefault(str(row.clusters), {})[row.name] = row.as_numbers()
    proposed = [row for row in measures if row.clusters == proposal.clusters]
    layers = [row for row in proposed if row.layer and not math.isnan(row.pnmi)]
    return {
        **{row.name: row.as_numbers() for row in proposed if row.layer != 0},
        "clusters": proposal.clusters,
        "best_layer": max(layers, key=lambda row: row.pnmi).layer if layers else None,
        "proposal": None if proposal.doubt else {name: getattr(proposal, name) for name in PROPOSED},
        "surveys": surveys,
        "sample": {"frames": len(sample.fit), "speakers": sample.num_speakers or None, "halves_of": sample.split},
    }


def _remarks(sample: SpeechSample, measures: Sequence[Measures]) -> list[str]:
    sentences = []
    if sample.num_speakers == 1:
        sentences.append("all recordings are of one speaker: speaker information is left out")
    elif not sample.num_speakers:
        sentences.append("speakers are not known: speaker information is left out")
    if sample.split != "speakers":
        sentences.append(
            f"the halves are different {sample.split}, since no two speakers are named (`hubert prepare folder` names "
            "them after the folders of the recordings)"
        )
    layers = [row for row in measures if row.layer]
    if any(math.isnan(row.pnmi) for row in layers):
        sentences.append(
            "no utterance has phones, so PNMI is not measured; add them with `hubert phones`, if some are English and "
            "have transcripts, or with `hubert prepare alignments`, if there are TextGrids"
        )
    else:
        best = max(layers, key=lambda row: row.pnmi)
        sentences.append(f"best by PNMI: layer {best.layer}, which layer: best takes")
    return sentences


def _print_table(
    console: Console,
    measures: Sequence[Measures],
    first: str,
    title: str,
    columns: Mapping[str, tuple[str, str]] = COLUMNS,
) -> None:
    """Print the known measures, in several tables if the console is too narrow for all columns in one."""
    known = {
        heading: (name, style)
        for heading, (name, style) in columns.items()
        if any(not math.isnan(getattr(row, name)) for row in measures)
    }
    shown: dict[str, tuple[str, str]] = {}
    for heading, column in known.items():
        wider = _table(measures, first, title, {**shown, heading: column})
        if shown and console.measure(wider, options=console.options.update_width(UNLIMITED)).maximum > console.width:
            console.print(_table(measures, first, title, shown))
            shown = {}
        shown[heading] = column
    console.print(_table(measures, first, title, shown))


def _table(measures: Sequence[Measures], first: str, title: str, columns: Mapping[str, tuple[str, str]]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=0)
    table.add_column(first, no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in measures:
        values = [(getattr(row, name), style) for name, style in columns.values()]
        cells = ["–" if math.isnan(value) else f"{value:{style}}" for value, style in values]
        table.add_row(str(row.clusters) if first == "clusters" else row.name, *cells)
    return table


@figure_style()
def _drawn(measures: Sequence[Measures], proposal: Proposal) -> Figure:
    """Plot measures by layer, a line for each number of clusters; those of MFCCs are dotted, the proposal is marked."""
    numbers = sorted({row.clusters for row in measures})
    shown = {
        name: label for name, label in CURVES.items() if any(not math.isnan(getattr(row, name)) for row in measures)
    }
    figure = Figure(figsize=(PAGE, 2.0 * math.ceil(len(shown) / 3)))
    panels = figure.subplots(math.ceil(len(shown) / 3), 3, sharex=True, squeeze=False).ravel()
    colours = dict(zip(numbers, COLOURS * (1 + len(numbers) // len(COLOURS)), strict=False))
    for axes, (name, label) in zip(panels, shown.items(), strict=False):
        for number in numbers:
            rows = [row for row in measures if row.clusters == number]
            layers = [row for row in rows if row.layer is not None]
            axes.plot(
                [row.layer for row in layers], [getattr(row, name) for row in layers], "o-", color=colours[number]
            )
            axes.axhline(getattr(rows[0], name), color=colours[number], ls=":", lw=1)
        if not proposal.doubt:
            axes.axvline(proposal.layer or 0, color=GREY, lw=0.6, zorder=0)
        axes.set(ylabel=label, xlabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    handles = [Line2D([], [], color=colours[number], marker="o", label=f"{number} clusters") for number in numbers]
    handles.append(Line2D([], [], color="black", ls=":", label="MFCC"))
    if not proposal.doubt:
        handles.append(Line2D([], [], color=GREY, lw=0.6, label="proposed layer"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure
