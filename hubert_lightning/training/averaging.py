"""The mean of several checkpoints' weights: one model, often a little better than each of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.files import replacing
from hubert_lightning.pretrained.formats.own import read_checkpoint, save_tensors

OF_ONE_RUN = ("optimizer_states", "lr_schedulers", "callbacks", "config", "metrics", "final_metrics")
"""What a checkpoint holds for its run to go on, which no run does from a mean."""


def average(checkpoints: list[Path], out: Path) -> None:
    """Write a checkpoint whose weights are the mean of those of several, for `hubert test` and as a pre-trained model.

    Args:
        checkpoints: of one model, as those of different steps of a run; the first gives all that is not averaged
        out: the .ckpt to write
    """
    if Path(out).exists():
        raise UserError(f"{out}: is there already; remove it, or choose another OUT")
    write_average(checkpoints, out)
    print(f"{out}: the mean of {', '.join(map(str, checkpoints))}")


def write_average(checkpoints: Sequence[Path], out: Path) -> None:
    """Write the mean of some checkpoints whole or not at all.

    Raises:
        UserError: None is named, one is damaged, or they are of different models; or the disk is full.
    """
    mean = averaged(checkpoints)
    with replacing(Path(out)) as file:
        save_tensors(mean, file)


def averaged(checkpoints: Sequence[Path]) -> dict[str, Any]:
    """The first checkpoint, with the mean of all for weights; counts (integer buffers) are those of the first.

    Raises:
        UserError: None is named, one is damaged, or they are of different models.
    """
    if not checkpoints:
        raise UserError("no checkpoint is named to be averaged; give one or more in brackets: '[a.ckpt, b.ckpt]'")
    first, *others = (_sound(Path(path)) for path in checkpoints)
    states: list[dict[str, Tensor]] = [first["state_dict"], *(other["state_dict"] for other in others)]
    for path, state in zip(checkpoints[1:], states[1:], strict=True):
        for name in states[0] | state:
            here, there = (tuple(of[name].shape) if name in of else "not there" for of in (state, states[0]))
            if here != there:
                raise UserError(
                    f"{path}: its {name} is {here}, that of {checkpoints[0]} {there}; average checkpoints of one model"
                )
    for path, state in zip(checkpoints, states, strict=True):
        if (broken := first_not_finite(state)) is not None:
            raise UserError(f"{path}: its {broken} is NaN or infinite; average others")
    weights = {name: _mean([state[name] for state in states]) for name in states[0]}
    rest = {name: value for name, value in first.items() if name not in OF_ONE_RUN}
    return rest | {"state_dict": weights, "averaged": [Path(path).name for path in checkpoints]}


def _sound(path: Path) -> dict[str, Any]:
    try:
        return read_checkpoint(path)
    except ValueError as error:
        if not path.is_file():
            raise
        raise UserError(
            f"{path}: damaged; remove it, and run the same command again to average the others ({error})"
        ) from error


def first_not_finite(state: Mapping[str, Any]) -> str | None:
    """The name of a tensor that has a value which is NaN or infinite, if one has."""
    return next(
        (
            name
            for name, value in state.items()
            if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all()
        ),
        None,
    )


def _mean(values: list[Tensor]) -> Tensor:
    if not values[0].is_floating_point():
        return values[0]
    total = torch.zeros(values[0].shape, dtype=torch.float64)
    for value in values:
        total += value
    return (total / len(values)).to(values[0].dtype)
