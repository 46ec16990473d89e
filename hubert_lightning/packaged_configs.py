"""The configs of this package, found by name wherever it is installed: pretrain/base is configs/pretrain/base.yaml."""

import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path

from hubert_lightning.errors import UserError
from hubert_lightning.files import write_whole


def configs_folder() -> Path:
    """Return the folder of the YAML files: in a wheel inside the package, in a checkout beside it."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


def packaged(config: str) -> Path:
    """Return the path of a config.

    Args:
        config: Path of a file, or name of a config of this package, with or without `configs/` and `.yaml`. A file
            comes first.

    Returns:
        Path of the file; the given one if there is no such config.
    """
    path = Path(config)
    if not config or len(config) > 255 or path.is_file():
        return path
    return _inside(config) or path


def _inside(name: str) -> Path | None:
    """Path of a file of the configs, None if there is none of this name."""
    folder, name = configs_folder(), name.removeprefix("configs/")
    for path in (folder / name, folder / f"{name}.yaml"):
        if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            return path
    return None


def config_names() -> Iterator[tuple[str, Path]]:
    """Yield the name and the path of each config of `hubert fit`."""
    folder = configs_folder()
    for path in sorted(folder.rglob("*.yaml")):
        if path.parent.name != "sweeps":  # W&B's, which name a config
            yield path.relative_to(folder).with_suffix("").as_posix(), path


def listing() -> str:
    """The configs of this package, each with the first sentence of its header."""
    rows = [(name, _first_sentence(path.read_text())) for name, path in config_names()]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name:{width}}  {header}" for name, header in rows)


def list_configs() -> None:
    """List the configs of this package, each with the first sentence of its header."""
    others = [path.relative_to(configs_folder()) for path in sorted(configs_folder().rglob("*")) if path.is_file()]
    others = [path for path in others if path.suffix != ".yaml" or path.parent.name == "sweeps"]
    print(listing())
    print(f"\nScripts and sweeps: {', '.join(map(str, others))}")
    print("`hubert fit --config NAME` takes a name, `hubert configs copy NAME FOLDER` copies a file to edit.")


def copy_config(name: str, target: Path) -> None:
    """Copy a config of this package, to edit it.

    Args:
        name: Name of the config as `hubert configs` lists it, such as pretrain/base.
        target: Folder that is there, or path of the copy.
    """
    source = _inside(name)
    if source is None:
        similar = get_close_matches(name.removesuffix(".yaml"), [known for known, _ in config_names()], n=1)
        guess = f"did you mean {similar[0]}? " if similar else ""
        raise UserError(f"{name}: not a config of this package; {guess}`hubert configs` lists them")
    target = Path(target)
    copy = target / source.name if target.is_dir() else target
    if os.path.lexists(copy):
        raise UserError(f"{copy}: exists already; remove it, or give another name for the copy")
    if not copy.parent.is_dir():
        raise UserError(f"{copy.parent}: no such folder; make it, or give another path for the copy")
    write_whole(copy, source.read_bytes())
    print(f"{copy}: edit it, and run `hubert fit --config {copy}`" if source.suffix == ".yaml" else copy)


def _first_sentence(config: str) -> str:
    """Return the first sentence of a config's header, which may span several lines."""
    lines = takewhile(lambda line: line.startswith("#"), config.split("\n"))
    header = " ".join(line.removeprefix("#").strip() for line in lines)
    sentence = re.match(r".+?\.(?= [A-Z]|$)", header)
    return sentence[0] if sentence else header
