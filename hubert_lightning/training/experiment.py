"""One run of `hubert fit`, `validate`, `test` or `predict`, with LightningCLI; and the fit of several iterations.

Finished iterations are not trained again: the same command resumes where it was interrupted.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path

from hubert_lightning import current_work
from hubert_lightning.console import show_messages
from hubert_lightning.errors import UserError
from hubert_lightning.first_process import is_first_process, prints
from hubert_lightning.progress_bar import hidden_bars
from hubert_lightning.training.hubert_cli import HubertCLI, Verb
from hubert_lightning.training.iterations import settle_clusters, single_iterations
from hubert_lightning.training.run_config import (
    check_output,
    keep_run_id,
    log_separately,
    write_to_output,
)
from hubert_lightning.training.run_folder import check_files
from hubert_lightning.training.run_identity import finished_sentence, is_finished, refuse_another_run
from hubert_lightning.training.run_lock import holder_of, locked, refuse
from hubert_lightning.training.trial import trial_folder
from hubert_lightning.training.wandb_runs import describe_run, name_group, own_folder

RESULTS_LOCK = "results.lock"
"""Lock of the folder that a test or prediction writes to, also while training goes on."""

LOGGERS = ("hubert_lightning", "lightning", "lightning.pytorch", "lightning.fabric", "lightning_utilities")
"""Names of the loggers that print information on a run."""

EXPECTED_WARNINGS = (
    "LightningCLI's args parameter",  # `main(args)` passes on the command line
    "Checkpoint directory .* exists and is not empty",  # the run's labels are in it
    "Experiment logs directory .* exists and is not empty",  # its rows are kept
    "You're resuming from a checkpoint that ended before",  # our sampler resumes with the next batch
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning 2.6 with torch 2.13
    "Total length of .* across ranks is zero",  # of a validation that nobody asked for
    "The dirpath has changed from",  # a run's folder may be moved
    "FSDP2-wrapped module .* returned a view",  # nothing changes it in place
    "The number of training batches .* is smaller than the logging interval",  # of an epoch; a run counts steps
    "The `srun` command is available on your system but is not used",  # the launcher is the user's choice
)
"""Warnings of libraries on what is intended here."""


def check(args: list[str]) -> None:
    """Parse a command line and check its output, without building anything.

    Args:
        args: Command line after `hubert fit`.

    Raises:
        UserError: A value cannot be used.
    """
    with _process(quiet=True):
        check_output(HubertCLI("fit", args).config)


def fit(args: list[str], begins: Callable[[int], object] | None = None, quiet: bool = False) -> None:
    """Train the run that a command line describes, or its iterations one after another.

    A run that is finished is left as it is.

    Args:
        args: Command line after `hubert fit`.
        begins: Called with the number of each iteration that begins, counted from 1.
        quiet: Whether only warnings are shown.

    Raises:
        UserError: The run cannot be trained as described.
    """
    with _process(quiet) as resources:
        cli = HubertCLI("fit", args)
        config = cli.config
        name_group(config)
        own_folder(config)
        if config.trainer.fast_dev_run:
            config.output = str(resources.enter_context(trial_folder(Path(config.output))))
        check_output(config)
        runs = list(single_iterations(config)) if config.iterations else [config]
        for number, run in enumerate(runs, start=1):
            describe_run(run, number if config.iterations else None)
            check_files(Path(run.output))
            write_to_output(run)
            settle_clusters(run)
            refuse_another_run(run, cli.parser)
            keep_run_id(run)
        unfinished = [run for run in runs if not is_finished(run)]
        for run, following in pairwise(runs):
            if run in unfinished and any(Path(following.output).glob("*.ckpt")):
                raise UserError(
                    f"{run.output}: with more steps, its labels would no longer be those of {following.output}; "
                    "remove that folder, or choose another --output"
                )
        if not unfinished:
            for folder in dict.fromkeys([config.output, *(run.output for run in runs)]):
                with suppress(UserError), locked(Path(folder)):
                    pass  # removes the lock of a fit that was killed when all was done
            if is_first_process() and not quiet:
                print(finished_sentence(runs[-1], Path(config.output)))
            return
        resources.enter_context(_alone_in(Path(config.output)))
        # another command may have finished some before it released the folder
        for run in [run for run in unfinished if not is_finished(run)] or unfinished[-1:]:
            number = runs.index(run) + 1
            if begins:
                begins(number)
            with _alone_in(Path(run.output)):
                cli.train(run, f"iteration {number} of {len(runs)}" if config.iterations else "training")


def judge(verb: Verb, args: list[str]) -> None:
    """Validate or test a checkpoint, or transcribe with it.

    Args:
        verb: "validate", "test" or "predict".
        args: Command line after the verb.

    Raises:
        UserError: The checkpoint cannot be evaluated as described.
    """
    with _process() as resources:
        cli = HubertCLI(verb, args)
        config = cli.config
        if config.trainer.fast_dev_run and verb != "validate":  # a validation writes nothing, and reads the labels
            config.output = str(resources.enter_context(trial_folder(Path(config.output))))
        write_to_output(config)
        folder = log_separately(config, verb)
        if verb != "validate":
            other = "choose another set, checkpoint or decoder, whose results have a folder of their own"
            resources.enter_context(locked(folder, RESULTS_LOCK, other))
        cli.run(config)


@contextmanager
def _process(quiet: bool = False) -> Iterator[ExitStack]:
    """Set up this process for a run; the stack holds what the command gives back at its end."""
    if not quiet:
        show_messages(of_ranks=True)
    current_work.note("setting up")
    with ExitStack() as resources, warnings.catch_warnings():
        for expected in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=expected)
        if not prints():
            warnings.simplefilter("ignore")  # the first rank prints the same ones
        if quiet:
            resources.enter_context(hidden_bars())
            resources.enter_context(_warnings_alone())
        yield resources


@contextmanager
def _warnings_alone() -> Iterator[None]:
    """Hide information that is logged, of this package and of Lightning."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lock a run's folder and those of its iterations against other commands.

    Raises:
        UserError: Another process uses the folder, or the folder cannot be created.
    """
    with locked(folder):
        for other in (folder.parent, *folder.glob("iteration*")):
            if is_first_process() and (holder := holder_of(other)):
                raise refuse(other, holder)
        yield
