"""Messages for people, on standard error. A run of several processes prints each message once."""

import logging
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from hubert_lightning.first_process import print_on_first_rank, prints
from hubert_lightning.progress_bar import erased_bar

NOISE = (
    "💡 Tip:",  # advertisements
    "`Trainer(limit_val_batches=",  # repeats the user's own setting at each start
    "`weights_only` was not set",  # Lightning's own choice
    "GPU available:",  # a GPU that is not used has a warning
    "TPU available:",
    "LOCAL_RANK:",
    "Initializing distributed:",  # our own message names ranks that do not start
    "-" * 100 + "\ndistributed_backend",
    "Restoring states from the checkpoint",  # the run's first line says where it resumes
    "Restored all states from the checkpoint",
    "`Trainer.fit` stopped: `max_steps",  # its last line says what was done
)
"""Beginnings of library messages that are of no use to a user of this package."""
SECONDS_BEFORE_REPEATING = 3
"""Time that ranks other than the first wait before they print why they end."""
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(10), *range(11, 32), *range(127, 160))}
"""Control characters, except line feeds, and their printed form."""


def show_messages(of_ranks: bool) -> None:
    """Print this package's information and warnings on standard error, and hide messages that are noise.

    Without this call, as in a notebook, Python's defaults hold: warnings are shown, information is not.

    Args:
        of_ranks: Whether the processes that a launcher started are ranks of one run, of which only the first one
            prints; otherwise each process is a job of its own.
    """
    print_on_first_rank(of_ranks)
    package = logging.getLogger("hubert_lightning")
    if not any(isinstance(handler, _FirstRankHandler) for handler in package.handlers):
        package.addHandler(_FirstRankHandler())
    package.setLevel(logging.INFO)
    for library in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(library)
        if any(type(handler) is logging.StreamHandler for handler in logger.handlers):
            logger.handlers = [_FirstRankHandler()]  # Lightning's own would print into the bar


def print_refusal(sentence: str) -> None:
    """Print why a command ends; if several ranks fail with the same message, only the first one prints it."""
    if not prints():
        time.sleep(SECONDS_BEFORE_REPEATING)  # meanwhile the launcher of a failed first rank ends this process
    # a name in a file may hold control characters
    print(f"hubert: {sentence.translate(CONTROLS)}", file=sys.stderr)


def output_is_closed() -> bool:
    """Whether the reader of standard output has closed the pipe."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


class _FirstRankHandler(logging.Handler):
    """Prints the messages of a run's first process, except noise: the other processes log the same ones."""

    def emit(self, record: logging.LogRecord) -> None:
        if not record.getMessage().startswith(NOISE):
            say(self.format(record))


def say(sentence: str) -> None:
    """Print a message on standard error, on the first rank, above the progress bar if there is one."""
    if prints():
        with erased_bar():
            print(sentence, file=sys.stderr, flush=True)


@contextmanager
def above_bar() -> Iterator[None]:
    """Print results of any length in the block, above the bar if both are on a terminal."""
    with erased_bar() if sys.stdout.isatty() else nullcontext():
        yield
