"""Lines of a program: where in it an operation was asked for."""

import sys
from functools import cache
from pathlib import Path
from types import FrameType

import torch

HERE = str(Path(__file__).parent)
TORCH = str(Path(torch.__file__).parent)
OPTIMIZERS = str(Path(TORCH) / "optim")
LIMIT = 16
"""Lines of a stack."""


class Places:
    """The lines that lead to the operation at hand.

    Args:
        packages: Names of the packages whose lines are wanted; others, torch excepted, stand in where none of these
            is on the stack.
    """

    def __init__(self, packages: tuple[str, ...]) -> None:
        self._folders = tuple(f"/{package}/" for package in packages)

    def line(self) -> tuple[str, bool]:
        """Find the line that asks for the current operation.

        Returns:
            Line of a wanted package, such as "hubert_lightning/model/hubert.py:371", "" if there is none; and whether
            an optimizer of torch asks on its behalf.
        """
        frame: FrameType | None = sys._getframe(2)
        optimizing = False
        while frame is not None:
            path = frame.f_code.co_filename
            if path.startswith(OPTIMIZERS):
                optimizing = True
            elif any(folder in path for folder in self._folders) and not path.startswith(HERE):
                return f"{self._shown(path)}:{frame.f_lineno}", optimizing
            frame = frame.f_back
        return "", optimizing

    def stack(self) -> tuple[str, ...]:
        """List the lines outside torch that lead to the current operation, innermost first."""
        lines: list[str] = []
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and len(lines) < LIMIT:
            path = frame.f_code.co_filename
            if not path.startswith((HERE, TORCH, "<")):
                lines.append(f"{self._shown(path)}:{frame.f_lineno}")
            frame = frame.f_back
        return tuple(lines)

    @cache  # noqa: B019 a recorder has one, and few files
    def _shown(self, path: str) -> str:
        for folder in ("/site-packages/", *self._folders):
            if folder in path:
                shown = path.rpartition(folder)[2]
                return shown if folder == "/site-packages/" else folder[1:] + shown
        return str(Path(*Path(path).parts[-2:]))
