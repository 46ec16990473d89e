"""A recipe, executed: checked, prepared and trained; and the results of its run."""

import json
from pathlib import Path
from typing import Any

from hubert_lightning.errors import check_installed
from hubert_lightning.first_process import is_first_process
from hubert_lightning.recipes import preparation
from hubert_lightning.recipes.recipe import Recipe
from hubert_lightning.training import experiment
from hubert_lightning.training.checkpoints import LAST
from hubert_lightning.training.run_folder import kept_metrics, metrics_at


def execute(recipe: Recipe, progress: bool) -> None:
    """Do what a recipe says; what was done already stays.

    Args:
        recipe: Recipe of `pretrain` or `finetune`.
        progress: Whether to print what is done.

    Raises:
        UserError: The recipe cannot be executed.
    """
    preparation.check_output(recipe)
    experiment.check(recipe.fit_options)
    if progress and is_first_process():
        print("In the long form:")
        for command in recipe.long_form():
            print(f"  {command}")
        print(flush=True)
    preparation.prepare(recipe, quiet=not progress)
    words = recipe.fit_options
    if (validation := recipe.existing_validation) != recipe.validation:
        words += [
            f"--data.init_args.validation={json.dumps([str(path) for path in validation]) if validation else 'null'}"
        ]
    experiment.fit(words, quiet=not progress)


def check_page() -> None:
    """Check, before work starts, that `write_page` can draw.

    Raises:
        UserError: The package that draws is not installed.
    """
    check_installed("plotly", "or write no page: --report false")


def metrics_of(folder: Path, checkpoint: Path) -> dict[str, Any]:
    """The metrics of a finished run, when it saved a checkpoint of its folder."""
    return kept_metrics(folder) | ({} if checkpoint.name == LAST else metrics_at(checkpoint))


def write_page(folder: Path, progress: bool) -> Path | None:
    """Write the page that shows a run, on its first process.

    Args:
        folder: Folder of the run.
        progress: Whether to print where the page is.
    """
    if not is_first_process():
        return None
    from hubert_lightning.report.page import write_report

    page = folder / "report.html"
    with preparation.silence():
        write_report([folder], page)
    if progress:
        print(f"{page}: what was trained, in a page for a browser")
    return page
