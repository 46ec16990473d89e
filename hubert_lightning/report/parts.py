"""Parts of a page: what the template shows."""

from dataclasses import dataclass, field

from hubert_lightning.report import words
from hubert_lightning.report.breakdown import Aligned
from hubert_lightning.report.charts import (
    Chart,
)
from hubert_lightning.report.summary import Summary


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        headings: Heading of each column.
        rows: Cells of each row, the first one its name.
        numeric: First column of numbers; None if there is none.
    """

    headings: list[str]
    rows: list[list[str]]
    numeric: int | None = None


@dataclass(frozen=True)
class WatchedUnits:
    """Watched utterances of a run.

    Args:
        run: Name of the run.
        step: Optimizer steps before the validation.
        utterances: Heading, text, and chart of each utterance.
    """

    run: str
    step: int
    utterances: list[tuple[str, str, Chart]]


@dataclass(frozen=True)
class Worst:
    """An utterance with many errors.

    Args:
        aligned: The utterance with its errors marked.
        clip: Key of its recording, if the page has it.
    """

    aligned: Aligned
    clip: str | None

    @property
    def counts(self) -> str:
        """Its errors."""
        row = self.aligned.utterance
        return f"{words.counted(row.words.errors, 'error')} in {words.counted(row.words.total, 'word')}"


@dataclass(frozen=True)
class Detail:
    """Errors of one test, broken down.

    Args:
        title: Run, test set and decoder.
        anchor: Id of the part.
        numbers: Errors by kind.
        speakers: Chart of the speakers, if they are known.
        lengths: Chart of the lengths.
        confusion: Confusion matrix, if there are substitutions.
        pairs: The most frequent errors.
        worst: Utterances with most errors.
        parts: Heading and table of the rates by language, and by corpus, if there are several.
    """

    title: str
    anchor: str
    numbers: Table
    speakers: Chart | None
    speaker_table: Table | None
    lengths: Chart | None
    confusion: Chart | None
    pairs: list[tuple[str, Table]]
    unit: str
    worst: list[Worst]
    parts: list[tuple[str, Table]] = field(default_factory=list)


@dataclass
class Page:
    """Content of a page; empty parts are left out.

    Args:
        title: Title.
        subtitle: What the page covers.
        summary: Numbers and sentences.
        legend: Name and colour of each run.
        legend_of_layers: Name and colour of each run whose layers were judged.
        lines_of_layers: Meaning of dotted and dashed lines over layers.
        facts: What was trained on what.
        differences: Settings that differ between runs of a task, by the task.
        settings: All settings of each run.
        curves: Task, colours of its runs, and charts over steps.
        units: Watched utterances.
        phones: Phones in clusters.
        layers: Charts over layers.
        speed: Charts and a table of speed and cost.
        rates: Chart and table of error rates.
        details: Errors of each test, broken down.
        tunings: Charts of each tuning of a decoder.
        remarks: What could not be read or was left out.
    """

    title: str
    subtitle: str
    summary: Summary
    legend: list[tuple[str, str]] = field(default_factory=list)
    legend_of_layers: list[tuple[str, str]] = field(default_factory=list)
    lines_of_layers: str = ""
    facts: Table | None = None
    differences: list[tuple[str, Table]] = field(default_factory=list)
    settings: list[tuple[str, Table]] = field(default_factory=list)
    curves: list[tuple[str, list[tuple[str, str]], list[Chart]]] = field(default_factory=list)
    units: list[WatchedUnits] = field(default_factory=list)
    phones: list[Chart] = field(default_factory=list)
    layers: list[Chart] = field(default_factory=list)
    speed: list[Chart] = field(default_factory=list)
    speed_table: Table | None = None
    rates: Chart | None = None
    rates_table: Table | None = None
    comparisons: Table | None = None
    details: list[Detail] = field(default_factory=list)
    tunings: list[tuple[str, str, list[Chart]]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
