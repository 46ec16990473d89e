"""Figures are legible, and the same ones are the same files."""

from pathlib import Path

from helpers import check_figures
from matplotlib.figure import Figure

from hubert_lightning.figure_style import COLUMN, figure_files, figure_style
from hubert_lightning.files import write_all


@figure_style()
def a_figure() -> Figure:
    figure = Figure(figsize=(COLUMN, 2))
    axes = figure.subplots()
    axes.plot([1, 2, 3], [3, 1, 2], label="a")
    axes.set(xlabel="step", ylabel="WER, %")
    axes.legend()
    return figure


def test_a_figure_is_written_in_three_formats_with_legible_text(tmp_path: Path) -> None:
    figure = a_figure()
    write_all(figure_files(figure, tmp_path / "figure.json"))
    check_figures(tmp_path / "figure.png")
    [axes] = figure.axes
    texts = [axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_legend().get_texts()]
    assert {text.get_fontsize() for text in texts} == {8.0, 7.0}
    assert not axes.spines["top"].get_visible()


def test_the_same_figure_is_the_same_files() -> None:
    first, second = (figure_files(a_figure(), Path("figure.png")) for _ in range(2))
    assert first == second
