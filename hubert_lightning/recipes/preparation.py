"""Manifests of a short command: made once, found again when the command resumes."""

import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from hubert_lightning.asr.lexicon import vocabulary
from hubert_lightning.data.audio_folder import audio_by_folder
from hubert_lightning.data.prepare import prepare_folder
from hubert_lightning.data.prepare_csv import prepare_csv
from hubert_lightning.data.prepare_split import prepare_split
from hubert_lightning.errors import UserError, counted
from hubert_lightning.files import read_regular, write_whole
from hubert_lightning.first_process import is_first_process
from hubert_lightning.progress_bar import hidden_bars
from hubert_lightning.recipes.recipe import Preparation, Recipe

RECORD = "made-of.json"
"""File beside the manifests: what they were made of, and their names."""
SIGNS_OF_A_RUN = ("config.yaml", "*.ckpt", "iteration*/config.yaml")
WAIT_SECONDS = 2.0
"""Time between two looks for the manifests that the first process of a run makes."""


def check_output(recipe: Recipe) -> None:
    """Refuse an output that holds another run, or manifests of other recordings, before any audio is read.

    Raises:
        UserError: It does.
    """
    output = recipe.output
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: a file, not a folder; choose another --output")
    if recipe.preparation is None:
        return
    record = _record(output)
    if record is None:
        runs = [path for sign in SIGNS_OF_A_RUN for path in sorted(output.glob(sign))]
        if runs:
            given = recipe.preparation.command[1] == "split"
            way = "give --heldout 0 to continue a run that holds nothing out of these manifests, or " if given else ""
            raise UserError(f"{output}: already holds another run ({runs[0]}); {way}choose another --output")
        return
    now = _made_of(recipe.preparation)
    for name, value in now.items():
        if record.get(name) != value:
            raise UserError(
                f"{output / 'manifests'}: made of {_difference(name, record.get(name), value)}; choose another "
                "--output, or give these manifests in place of the recordings"
            )


def prepare(recipe: Recipe, quiet: bool) -> None:
    """Make the manifests of a recipe, unless they are there; and the vocabulary of its transcripts.

    Of several processes of a run, the first one makes them, and the others wait.

    Args:
        recipe: Recipe whose output has been checked.
        quiet: Whether nothing is printed.
    """
    with silence() if quiet else nullcontext():
        if recipe.preparation is not None and is_first_process() and _record(recipe.output) is None:
            _make(recipe.preparation, recipe.output / "manifests")
        if recipe.vocabulary and is_first_process() and not recipe.vocabulary_file.is_file():
            recipe.vocabulary_file.parent.mkdir(parents=True, exist_ok=True)
            manifests = dict.fromkeys([*recipe.train, *recipe.existing_validation])
            vocabulary(list(manifests), recipe.vocabulary_file)
    while (recipe.preparation is not None and _record(recipe.output) is None) or (
        recipe.vocabulary and not recipe.vocabulary_file.is_file()
    ):
        time.sleep(WAIT_SECONDS)


@contextmanager
def silence() -> Iterator[None]:
    """Print nothing on standard output inside the block, and show no progress."""
    with hidden_bars(), redirect_stdout(io.StringIO()):
        yield


def _make(preparation: Preparation, folder: Path) -> None:
    made_of = _made_of(preparation)
    [source, *_] = preparation.sources
    match preparation.command[1]:
        case "folder":
            made = prepare_folder(source, folder, **preparation.options)
        case "csv":
            made = prepare_csv(source, folder, **preparation.options)
        case _:
            made = prepare_split(preparation.sources, folder, **preparation.options)
    record = made_of | {"manifests": [path.name for path in made]}
    write_whole(folder / RECORD, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


def _record(output: Path) -> dict[str, Any] | None:
    """Read what the manifests of an output were made of; None if they are not made yet."""
    path = output / "manifests" / RECORD
    try:
        record = json.loads(read_regular(path))
    except FileNotFoundError:
        return None
    except ValueError:
        record = None
    names = record.get("manifests") if isinstance(record, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: corrupt; remove it, and run the same command again")
    if not all((path.parent / name).is_file() for name in names):
        return None
    return dict(record)


def _made_of(preparation: Preparation) -> dict[str, Any]:
    """What manifests are made of: the source, its content, and the options."""
    digest = hashlib.sha256()
    count = 0
    for source in preparation.sources:
        if not source.is_dir():
            digest.update(source.read_bytes())
            count += 1
            continue
        for _, paths in audio_by_folder(source.resolve(), Counter()):
            for path in paths:
                size = path.stat().st_size if path.exists() else -1
                digest.update(f"{path.relative_to(source.resolve())}\t{size}\n".encode(errors="surrogateescape"))
                count += 1
    source_names = ", ".join(str(source.resolve()) for source in preparation.sources)
    options = {name: str(value) for name, value in preparation.options.items()}
    return {"source": source_names, "options": options, "files": count, "content": digest.hexdigest()[:16]}


def _difference(name: str, before: object, now: object) -> str:
    if name == "files" and isinstance(before, int):
        return f"{counted(before, 'recording')}, and there are {now} now"
    if name == "content":
        return "recordings, or a table, that have changed since"
    return f"another {name.removesuffix('s')} ({before} there, {now} here)"
