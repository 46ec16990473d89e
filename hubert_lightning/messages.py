"""Messages on standard error: information and warnings, each once for a run of any number of processes."""

import logging
import os
import sys

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK", "GROUP_RANK")
"""Variables that launchers set, 0 for rank 0: torchrun, Lightning, SLURM, LSF; of the node, Lightning and torchrun."""
NOISE = (
    "💡 Tip:",  # advertisements
    "`Trainer(limit_val_batches=",  # that what was asked for is done, once a start
    "`weights_only` was not set",  # a choice of Lightning's own
)
"""Beginnings of messages of libraries that say nothing to a user of this package."""


def show_messages() -> None:
    """Show this package's information and warnings on standard error, and hide messages that are noise.

    Without this call, as in a notebook, Python's defaults hold: warnings are shown, information is not.
    """
    package = logging.getLogger("hubert_lightning")
    if not any(isinstance(handler, _FirstRankHandler) for handler in package.handlers):
        package.addHandler(_FirstRankHandler())
    package.setLevel(logging.INFO)
    for library in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(library).handlers:
            handler.addFilter(_is_no_noise)


class _FirstRankHandler(logging.Handler):
    """Prints the messages of a run's first process: the others have the same ones."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_first_process():
            print(self.format(record), file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Whether this process is rank 0 of its run, or the only one; known before ranks have found one another."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE)
