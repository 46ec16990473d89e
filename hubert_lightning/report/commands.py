"""The verbs `report` and `score`."""

from pathlib import Path

from rich.console import Console

from hubert_lightning.asr.language_scores import write_scores
from hubert_lightning.asr.results import origin_columns
from hubert_lightning.asr.score import score
from hubert_lightning.asr.score_report import report as print_scores
from hubert_lightning.asr.score_report import report_comparison
from hubert_lightning.asr.scoring import compare
from hubert_lightning.errors import UserError

PAGES = (".html", ".htm")


def report(
    runs: list[Path], output: Path = Path("report.html"), title: str | None = None, no_audio: bool = False
) -> None:
    """Write a page that shows runs: what they trained, how well and how fast, with recordings.

    Args:
        runs: Folders of runs, or folders that hold such folders, such as that of a pre-training with its iterations.
        output: HTML file to write, which holds everything that it shows.
        title: Title of the page; made from the names of the folders if not given.
        no_audio: Leave out recordings and their spectrograms. Transcripts, names of speakers and ids stay in the page.
    """
    from hubert_lightning.report.page import write_report

    output = Path(output)
    if output.suffix.lower() not in PAGES:
        raise UserError(f"{output}: a report is a web page; give a name that ends in .html")
    if output.is_dir():
        raise UserError(f"{output}: a folder; give a name for the page, such as {output / 'report.html'}")
    write_report(runs, output, audio=not no_audio, title=title)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB; open it in a browser, or send it as one file")


def score_file(
    results: Path,
    against: Path | None = None,
    output: Path | None = None,
    worst: int = 5,
    no_audio: bool = False,
) -> None:
    """Print word and character error rates with 95 % confidence intervals, by speaker, and the worst utterances.

    Args:
        results: JSON lines with id, reference, hypothesis and, where known, speaker: the test.jsonl of `hubert test`.
        against: Results of a second system for the same utterances, for a significance test of the difference.
        output: File for all numbers, including those of every utterance (.json), or for a page with figures and
            recordings (.html).
        worst: Number of utterances to show, those with most errors first; a page shows at least 20.
        no_audio: Leave recordings out of the page.
    """
    if worst < 0:
        raise UserError(f"worst {worst}: a number of utterances to show; 0 shows none")
    if output and output in (results, against):
        raise UserError(f"{output}: holds results, which the scores would replace; choose another output")
    scores = score(Path(results))
    comparison = compare(scores, score(Path(against))) if against else None
    console = Console()
    print_scores(scores, console, worst)
    if comparison:
        console.print(f"first: {results}, second: {against}", markup=False, highlight=False, soft_wrap=True)
        report_comparison(comparison, console)
    if output and Path(output).suffix.lower() in PAGES:
        from hubert_lightning.report.page import WORST, write_score_page

        shown = max(worst, WORST) if worst else 0
        write_score_page(Path(results), Path(output), against=against, audio=not no_audio, worst=shown)
        console.print(f"page in {output}", markup=False, highlight=False, soft_wrap=True)
    elif output:
        write_scores(output, scores, comparison, {"results": str(results), **origin_columns(results)})
        console.print(f"numbers in {output}", markup=False, highlight=False, soft_wrap=True)
