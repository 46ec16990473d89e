"""Arguments of the verbs that make manifests of other systems' lists of recordings."""

from collections.abc import Sequence
from pathlib import Path

from hubert_lightning.errors import UserError, within

SHORTEST_PIECE, LONGEST_PIECE = 1.0, 1e6
"""Seconds that the longest cut may have."""
LARGEST_SHARE = 0.99


def check_pieces(max_duration: float, heldout: float) -> None:
    """Check the longest cut and the share of the audio that is held out.

    Raises:
        UserError: The cuts would be shorter than a second, or nothing would be left to train on.
    """
    within(SHORTEST_PIECE, LONGEST_PIECE, max_duration=max_duration)
    within(0, LARGEST_SHARE, heldout=heldout)


def named_once(sources: Sequence[Path]) -> dict[str, Path]:
    """Name the manifest of each dataset after its file or folder.

    Args:
        sources: Files or folders.

    Returns:
        Data sets by the names of their manifests.

    Raises:
        UserError: A dataset is missing, or two have the same name.
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
