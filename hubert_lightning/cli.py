"""The command `hubert`. Each verb is a function, and its docstring and signature are its help.

Heavy packages are imported by the verb that needs them, so that help and mistakes answer at once.
"""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from hubert_lightning import __version__, current_work
from hubert_lightning.console import output_is_closed, print_refusal, show_messages
from hubert_lightning.errors import answer_to
from hubert_lightning.first_process import prints
from hubert_lightning.interrupts import SIGNALS, listening, no_workers_left
from hubert_lightning.verb_table import VERBS
from hubert_lightning.verbs import call_verb, find_verb, usage

KEPT_AFTER_SIGNAL = {
    "fit": "finished work is kept; the same command resumes",
    "pretrain": "finished work is kept; the same command resumes",
    "finetune": "finished work is kept; the same command resumes",
    "demo": "finished work is kept; the same command resumes",
    "test": "its results are not written; the same command starts it again",
    "predict": "its results are not written; the same command starts it again",
    "validate": "nothing is changed; the same command starts it again",
}
"""Verbs that train or evaluate a model, and the message when a signal ends them."""

VERBS_OF_RANKS = ("fit", "pretrain", "finetune", "validate", "test", "predict")
"""Verbs that a launcher may start as several ranks of one run."""

CLOSED_PIPE = 128 + signal.SIGPIPE
"""Exit status that a shell reports for other tools when the reader of their output has closed the pipe."""


def main(args: Sequence[str] | None = None) -> None:
    """Run one command line.

    Args:
        args: Arguments after `hubert`; those of the process if not given.

    Raises:
        SystemExit: Some of several files failed (1), the user's input cannot be used (2), Ctrl-C was pressed (130), or
            the reader of the output closed the pipe (141).
    """
    try:
        status = _run(list(sys.argv[1:] if args is None else args))
        sys.stdout.flush()
    except BrokenPipeError:
        if not output_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(CLOSED_PIPE) from None
    except SystemExit as end:  # rich ends the process with status 1 when a console's pipe is closed
        if isinstance(end.__context__, BrokenPipeError):
            raise SystemExit(CLOSED_PIPE) from None
        raise
    if status:
        raise SystemExit(status)


def _run(args: list[str]) -> int:
    """Run a command line; returns its exit status."""
    if not args or args[0] in ("-h", "--help"):
        print(usage(VERBS))
        return 0
    if args[0] in ("-V", "--version"):
        print(f"hubert_lightning {__version__}")
        return 0
    show_messages(of_ranks=args[0] in VERBS_OF_RANKS)
    if not prints():  # torch reads it when it is imported; the first rank prints the same warnings
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # OpenMP reads it when torch is imported. Threads that wait by turning in a loop take the processor from those that
    # they wait for: on a busy machine a step of a small model took five times as long (docs/dev/measurements.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        verb, target, rest = find_verb(VERBS, args)
        if isinstance(target, dict):
            print(usage(VERBS, verb))
            return 0
        with _signals_of(verb), no_workers_left():
            result = call_verb(verb, target, rest)
    except KeyboardInterrupt:
        print("hubert: interrupted; finished files are complete, and the same command does the rest", file=sys.stderr)
        return 130
    except Exception as error:
        answer = answer_to(error)
        if answer is None:
            raise
        sentence, status = answer
        print_refusal(sentence)
        return status
    return int(isinstance(result, int) and result > 0)  # verbs of many files return how many failed


def _signals_of(verb: str) -> AbstractContextManager[None]:
    """End verbs that train or evaluate on SIGTERM as on Ctrl-C; in other verbs, raise `KeyboardInterrupt` on Ctrl-C.

    A service ends by itself, after the requests that it has accepted.
    """
    if verb == "serve":
        return nullcontext()
    if verb not in KEPT_AFTER_SIGNAL:
        return listening([signal.SIGINT])
    return listening(SIGNALS, lambda name: f"{name} while {current_work.now.what}: {KEPT_AFTER_SIGNAL[verb]}")
