"""Trial runs (`trainer.fast_dev_run`): they write to a folder of their own, which is removed at the end."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hubert_lightning.errors import UserError
from hubert_lightning.files import is_unfinished, write_whole
from hubert_lightning.first_process import is_first_process
from hubert_lightning.training.run_lock import RUN_LOCK, locked

TRIAL_SUFFIX = ".fast_dev_run"
"""End of the name of a trial run's folder."""
TRIAL_MARK = ".trial"
"""File that marks a folder as one that a trial run made."""


@contextmanager
def trial_folder(output: Path) -> Iterator[Path]:
    """Make the folder of a trial run, beside the folder of the run, and remove it at the end.

    Args:
        output: Folder of the run.

    Raises:
        UserError: The folder is one of the user's, or another trial run uses it.
    """
    folder = output.resolve()
    folder = folder.with_name(folder.name + TRIAL_SUFFIX)
    if not is_first_process():
        yield folder
        return
    _check_trial(folder)
    with locked(folder):
        _check_trial(folder)
        write_whole(folder / TRIAL_MARK, b"")
        _empty(folder)
        try:
            yield folder
        finally:
            _empty(folder)
            (folder / TRIAL_MARK).unlink(missing_ok=True)
    with suppress(OSError):  # another trial may use it meanwhile
        folder.rmdir()


def _check_trial(folder: Path) -> None:
    """Raise `UserError` if a folder, which a trial run empties, holds anything that no trial run wrote."""
    foreign = [path for path in _content(folder) if not is_unfinished(path)]
    if folder.is_symlink() or (foreign and not (folder / TRIAL_MARK).is_file()):
        raise UserError(
            f"{folder}: a trial (fast_dev_run) would empty this folder, which is not the folder of a trial; rename it, "
            "or choose another --output"
        )


def _content(folder: Path) -> list[Path]:
    """Files of a trial run's folder, except its lock and its mark."""
    return [path for path in folder.iterdir() if path.name not in (RUN_LOCK, TRIAL_MARK)] if folder.is_dir() else []


def _empty(folder: Path) -> None:
    for path in _content(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
