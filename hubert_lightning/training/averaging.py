"""The mean of the weights of several checkpoints, often a little better than each of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.files import replacing
from hubert_lightning.pretrained.formats.own import read_checkpoint, save_tensors

RUN_STATE = ("optimizer_states", "lr_schedulers", "callbacks", "config", "metrics", "final_metrics")
"""Entries of a checkpoint from which its run resumes; a mean leaves them out, since no run resumes from it."""


def average(checkpoints: list[Path], out: Path) -> None:
    """Average the weights of several checkpoints in a new one, for `hubert test` or as a pre-trained model.

    Args:
        checkpoints: Checkpoints of one model, such as different steps of a run. All other entries come from the first.
        out: Path of the new checkpoint.

    Raises:
        UserError: There are fewer than two checkpoints, they cannot be averaged, or the new one exists.
    """
    if Path(out).exists():
        raise UserError(f"{out}: exists already; remove it or choose another OUT")
    if len(checkpoints) == 1:
        raise UserError(f"{checkpoints[0]}: a single checkpoint, which is its own mean; give at least two")
    write_average(checkpoints, out)
    print(f"{out}: the mean of {', '.join(map(str, checkpoints))}")


def write_average(checkpoints: Sequence[Path], out: Path) -> None:
    """Write the mean of checkpoints, whole or not at all.

    Args:
        checkpoints: Checkpoints of one model.
        out: Path of the mean.

    Raises:
        UserError: The list is empty, a checkpoint is corrupt, or they are of different models; or the disk is full.
    """
    mean = averaged(checkpoints)
    with replacing(Path(out)) as file:
        save_tensors(mean, file)


def averaged(checkpoints: Sequence[Path]) -> dict[str, Any]:
    """Compute the mean of checkpoints.

    Args:
        checkpoints: Checkpoints of one model.

    Returns:
        Content of the first checkpoint with the mean of all weights; integer buffers, which count, are the first's.

    Raises:
        UserError: The list is empty, a checkpoint is corrupt, or they are of different models.
    """
    if not checkpoints:
        raise UserError("no checkpoint to average; give two or more in brackets: '[a.ckpt, b.ckpt]'")
    first, *others = (_read(Path(path)) for path in checkpoints)
    states: list[dict[str, Tensor]] = [first["state_dict"], *(other["state_dict"] for other in others)]
    for path, state in zip(checkpoints, states, strict=True):
        for name in states[0] | state:
            shape, expected = (shape_of(weights.get(name)) for weights in (state, states[0]))
            if shape != expected:
                raise UserError(
                    f"{path}: its {name} is {shape}, in {checkpoints[0]} it is {expected}; average checkpoints of one "
                    "model"
                )
        if (broken := first_not_finite(state)) is not None:
            raise UserError(f"{path}: its {broken} is NaN or infinite; average others")
    means = {name: _mean([state[name] for state in states]) for name in states[0]}
    rest = {name: value for name, value in first.items() if name not in RUN_STATE}
    return rest | {"state_dict": means, "averaged": [Path(path).name for path in checkpoints]}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_checkpoint(path)
    except UserError as error:
        if not path.is_file():
            raise
        raise UserError(
            f"{path}: corrupt; remove it, and run the same command again to average the others ({error})"
        ) from error


def first_not_finite(state: Mapping[str, Any]) -> str | None:
    """Find a weight that is NaN or infinite.

    Args:
        state: Weights by name.

    Returns:
        Name of the first such weight, None if all are finite.
    """
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            return name
    return None


def shape_of(value: Any) -> tuple[int, ...] | str:
    """Return the shape of a tensor, or a few words for an error about another value."""
    if value is None:
        return "missing"
    return tuple(value.shape) if isinstance(value, Tensor) else f"no tensor but {value!r:.40}"


def _mean(values: list[Tensor]) -> Tensor:
    if not values[0].is_floating_point():
        return values[0]
    total = torch.zeros(values[0].shape, dtype=torch.float64)
    for value in values:
        total += value
    return (total / len(values)).to(values[0].dtype)
