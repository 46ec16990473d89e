"""Names of the manifests that several data sets of one command become."""

from collections.abc import Sequence
from pathlib import Path

from hubert_lightning.errors import UserError


def named_once(sources: Sequence[Path]) -> dict[str, Path]:
    """Name the manifest of each data set after its file or folder.

    Args:
        sources: Files or folders.

    Returns:
        Data sets by the names of their manifests.

    Raises:
        UserError: A data set is missing, or two have the same name.
    """
    by_name: dict[str, Path] = {}
    for source in map(Path, sources):
        if not source.exists():
            raise UserError(f"{source}: no such file or folder; correct the path")
        name = source.resolve().name
        if source.is_file():  # not of a folder such as v1.0
            name = name.split(".")[0] or name
        if name in by_name:
            raise UserError(
                f"{source}: its manifest would have the name of that of {by_name[name]}, {name}; give each another OUT"
            )
        by_name[name] = source
    return by_name
