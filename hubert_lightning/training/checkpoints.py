"""Checkpoints of a run on disk: written whole or not at all, and the newest intact one found."""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from hubert_lightning.errors import UserError
from hubert_lightning.files import replacing, sync_folder, unfinished_name
from hubert_lightning.pretrained.formats.own import read_checkpoint, save_tensors
from hubert_lightning.training.averaging import first_not_finite
from hubert_lightning.untrusted.file_kind import has_zip_directory, is_whole_zip

log = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
BEST, AVERAGE = "best.ckpt", "average.ckpt"


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all; a `last.ckpt` that is replaced stays as `previous.ckpt`.

    `previous.ckpt` is replaced last, after the new `last.ckpt` is on the disk, so one of the two is always intact.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any = None,  # Lightning's name for options of remote file systems
    ) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: Content of the checkpoint.
            path: Path of the checkpoint.
            storage_options: Without effect.

        Raises:
            UserError: The disk is full or read-only. Earlier checkpoints stay.
        """
        path = Path(path)
        if path.name != LAST:
            with replacing(path) as file:
                save_tensors(checkpoint, file)
            return
        new, link = unfinished_name(path), unfinished_name(path)
        try:
            with replacing(new) as file:
                save_tensors(checkpoint, file)
        except UserError as error:
            raise UserError(str(error).replace(str(new), str(path), 1)) from error
        try:
            _replace_last(path, new, link)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be replaced ({error.strerror}); earlier checkpoints are kept, so correct that and run "
                "the same command again"
            ) from error
        finally:
            for name in (new, link):
                with suppress(OSError):
                    name.unlink(missing_ok=True)


def _replace_last(path: Path, new: Path, link: Path) -> None:
    """Replace `last.ckpt` by a new file, and `previous.ckpt` by the old one.

    Args:
        path: Path of `last.ckpt`.
        new: Path of the new checkpoint.
        link: Name in the same folder that no file has.
    """
    if path.exists() and not has_zip_directory(path):
        set_aside(path)
    linked = path.exists() and _link(path, link)
    if path.exists() and not linked:  # without links, last.ckpt is missing for a moment: previous.ckpt must be intact
        os.replace(path, path.with_name(PREVIOUS)) if is_whole_zip(path) else set_aside(path)
    os.replace(new, path)
    sync_folder(path.parent)
    if linked:
        os.replace(link, path.with_name(PREVIOUS))
        sync_folder(path.parent)


def _link(path: Path, name: Path) -> bool:
    """Give a file a second name, and return whether the file system can."""
    try:
        os.link(path, name)
    except OSError:
        return False
    return True


def set_aside(path: Path) -> Path:
    """Rename a corrupt checkpoint so that no command reads it, and return its new path."""
    aside = path.with_name(f"{path.name}.corrupt")
    os.replace(path, aside)
    sync_folder(path.parent)
    return aside


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the newest intact checkpoint of a run: every byte as it was written, every weight finite.

    Args:
        folder: Output folder of the run.

    Returns:
        Path of the checkpoint, None if the run has not saved any.

    Raises:
        UserError: The run has checkpoints, but none is intact.
    """
    checkpoints = [path for name in (LAST, PREVIOUS) if (path := folder / name).exists()]
    for path in checkpoints:
        if (defect := _defect(path)) is None:
            return path
        log.warning("%s is %s; training resumes from the checkpoint before it", path, defect)
    if checkpoints:
        raise UserError(
            f"{checkpoints[0]}: corrupt, and no other checkpoint of this run is intact; restore one, or remove "
            f"{' and '.join(path.name for path in checkpoints)} to start from step 0"
        )
    return None


def finished_checkpoint(folder: Path) -> Path:
    """Return the last checkpoint of a finished run, which another run continues.

    Args:
        folder: Output folder of the run.

    Raises:
        UserError: It is missing or corrupt, so that the other run would not start where this one ended.
    """
    last = folder / LAST
    defect = _defect(last) if last.exists() else "missing"
    if defect is None:
        return last
    raise UserError(
        f"{last} is {defect}, and the next part of the training starts from its step; restore it, or remove "
        f"{folder / 'metrics.json'}, so that the same command first repeats the steps after {PREVIOUS}"
    )


def set_corrupt_aside(folder: Path, newest: Path | None) -> None:
    """Rename a corrupt `last.ckpt`, so that the next checkpoint does not make it `previous.ckpt`.

    Args:
        folder: Output folder of the run.
        newest: Newest intact checkpoint of the run.

    Raises:
        UserError: The folder is read-only.
    """
    last = folder / LAST
    if newest is None or newest == last or not last.exists():
        return
    try:
        log.warning("%s is renamed to %s", last, set_aside(last).name)
    except OSError as error:
        raise UserError(
            f"{last}: corrupt, and cannot be renamed ({error.strerror}); make {folder} writable, and run the same "
            "command again"
        ) from error


def _defect(path: Path) -> str | None:
    """Why training cannot resume from a checkpoint; None if it can."""
    if not is_whole_zip(path):
        return "corrupt"
    try:
        weights = read_checkpoint(path)["state_dict"]
    except UserError:  # an intact file of another kind; the error names it when the run reads it
        return None
    if name := first_not_finite(weights):
        return f"not finite (its {name} is NaN or infinite)"
    return None
