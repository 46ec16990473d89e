"""The state of an optimizer and of its schedule in a checkpoint, checked before they load it."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from hubert_lightning.errors import UserError
from hubert_lightning.pretrained.weights import abbreviated
from hubert_lightning.training.averaging import shape_of
from hubert_lightning.training.restoring import ADVICE, Nothing, Number

Make = Callable[[ParamsT], Optimizer]
UNUSABLE = (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of an optimizer that cannot step on the CPU, such as one that needs a GPU; beside AssertionError."""
SCHEDULE: dict[str, Any] = {
    "last_epoch": int,
    "_step_count": int,
    "base_lrs": Number,
    "_last_lr": Number,
    "lr_lambdas": (dict, Nothing),
    "_is_initial": Any,
    "_get_lr_called_within_step": Any,
}
"""Entries of LambdaLR's state: an integer, or a list with one value of these types for each group of parameters."""
REQUIRED = ("last_epoch", "_step_count", "base_lrs", "_last_lr", "lr_lambdas")
"""Entries without which a schedule cannot resume."""


def probe_optimizer(make: Make, parameters: Sequence[Tensor] | None = None) -> Optimizer:
    """Make an optimizer that trains nothing, so that wrong settings are found before there is work to lose.

    Args:
        make: Function that makes the optimizer of parameters.
        parameters: Parameters; one small one if not given.

    Returns:
        The optimizer.

    Raises:
        UserError: The optimizer cannot be made with its settings, or takes sparse gradients alone.
    """
    parameters = [nn.Parameter(torch.zeros(2, 3))] if parameters is None else parameters
    try:
        probe = make([parameter := nn.Parameter(torch.zeros(2, 3))])
        optimizer = make(parameters)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the optimizer cannot be made ({error}); correct model.init_args.optimizer") from error
    parameter.grad = torch.zeros_like(parameter)
    try:
        _step(probe)
    except (AssertionError, *UNUSABLE) as error:
        if "dense gradients" in str(error):  # other errors may be of an optimizer that needs a GPU
            raise UserError(f"the optimizer cannot train ({error}); correct model.init_args.optimizer") from error
    return optimizer


def _step(optimizer: Optimizer) -> None:
    """Take a step; optimizers such as LBFGS compute the loss themselves."""
    closure: Any = lambda: torch.zeros(())  # torch declares a float, and takes a tensor
    optimizer.step(closure)


def check_optimizer(parameters: Sequence[Tensor], make: Make, state: Mapping[str, Any], path: Path) -> None:
    """Check that an optimizer can load a state, and that the state is one that its steps make.

    The second is known only of optimizers that can step on the CPU.

    Args:
        parameters: Parameters of the model, in the order of the optimizer.
        make: Function that makes the optimizer of parameters.
        state: State of the optimizer in the checkpoint.
        path: Path of the checkpoint, for errors.

    Raises:
        UserError: The state belongs to another optimizer or model, or is corrupt.
    """
    optimizer = probe_optimizer(make, parameters)
    name = type(optimizer).__name__
    advice = f"use the optimizer that the run began with, or, if that is {name}, {ADVICE}"
    options = [dict(group) for group in optimizer.param_groups]
    _check_groups(optimizer, state, len(parameters), path, advice)
    try:
        optimizer.load_state_dict(dict(state))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its optimizer's state does not fit {name} ({error}); {advice}") from error
    for expected, group in zip(options, optimizer.param_groups, strict=True):
        _check_options(expected, group, name, path, advice)
    loaded = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stepped: dict[torch.Size, dict[str, Any] | None] = {}
    for number, values in state["state"].items():
        shape = loaded[number].shape
        if shape not in stepped:
            stepped[shape] = _state_of_step(make, shape)
        if (expected_values := stepped[shape]) is not None:
            which = f"parameter {number}, {name}"
            _check_values(values, expected_values, shape, f"{path}: its optimizer", which, advice)


def _check_groups(optimizer: Optimizer, state: Mapping[str, Any], num_parameters: int, path: Path, advice: str) -> None:
    """Raise `UserError` if a state has other groups or parameters than an optimizer, or values that are not finite."""
    expected = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    groups, values_of = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not groups or not all(isinstance(group, Mapping) for group in groups):
        raise UserError(f"{path}: its optimizer has no group of parameters; {ADVICE}")
    if len(groups) != len(expected):
        name = type(optimizer).__name__
        raise UserError(
            f"{path}: its optimizer has {len(groups)} groups of parameters, {name} {len(expected)}; {advice}"
        )
    if [group.get("params") for group in groups] != expected or not isinstance(values_of, Mapping):
        raise UserError(f"{path}: its optimizer has other parameters than the model; {ADVICE}")
    for number, values in values_of.items():
        if type(number) is not int or not 0 <= number < num_parameters or not isinstance(values, Mapping):
            raise UserError(f"{path}: its optimizer has a state of {number!r:.40}, which is not a parameter; {ADVICE}")
        for key, value in values.items():
            if (finite := _are_finite(value)) is None:
                raise UserError(
                    f"{path}: its optimizer's {key} of parameter {number} is {value!r:.40}, not numbers; {ADVICE}"
                )
            if not finite:
                raise UserError(f"{path}: its optimizer's {key} is NaN or infinite; use an earlier checkpoint")


def _are_finite(value: Any) -> bool | None:
    """Whether a value of an optimizer's state is finite; None if it holds something other than numbers."""
    if isinstance(value, (list, tuple, Mapping)):
        each = [_are_finite(part) for part in (value.values() if isinstance(value, Mapping) else value)]
        return None if None in each else all(each)
    if isinstance(value, Tensor):
        is_float8 = value.is_floating_point() and value.dtype.itemsize == 1  # torch's isfinite lacks these types
        return bool((value.float() if is_float8 else value).isfinite().all())
    return value is None or math.isfinite(value) if isinstance(value, (int, float, Nothing)) else None


def _check_options(expected: Mapping[str, Any], group: Mapping[str, Any], name: str, path: Path, advice: str) -> None:
    """Raise `UserError` if a loaded group of parameters lacks an option or has one of another type."""
    for option, value in expected.items():
        if option not in group:
            raise UserError(f"{path}: its optimizer has no {option}, unlike {name}; {advice}")
        loaded = group[option]
        if isinstance(value, (tuple, list)):  # such as betas
            alike = isinstance(loaded, (tuple, list)) and len(loaded) == len(value)
        elif isinstance(value, (int, float, Tensor)) and not isinstance(value, bool):
            alike = isinstance(loaded, (int, float, Tensor)) and not isinstance(loaded, bool)
        else:
            alike = value is None or type(loaded) is type(value)
        if not (alike or loaded is None):
            raise UserError(f"{path}: its optimizer has {option} {loaded!r:.40}, which {name} cannot have; {ADVICE}")


def _state_of_step(make: Make, shape: torch.Size) -> dict[str, Any] | None:
    """State that an optimizer has of one parameter after a step, None if it cannot step here."""
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.zeros(shape)
    try:
        optimizer = make([parameter])
        _step(optimizer)
    except (AssertionError, *UNUSABLE):
        return None
    return {key: value for key, value in optimizer.state[parameter].items() if value is not None}


def _check_values(
    values: Mapping[str, Any], expected: Mapping[str, Any], shape: torch.Size, what: str, which: str, advice: str
) -> None:
    """Raise `UserError` if the state of a parameter lacks what a step makes, or has it in another shape."""
    if any(values.get(key) is None for key in expected):
        names = ", ".join(sorted(map(str, values))) or "nothing"
        raise UserError(f"{what} has {names} of {which} {', '.join(map(str, expected))}; {advice}")
    for key, value in expected.items():
        expected_shape = tuple(getattr(value, "shape", []))
        # Other shapes may differ from step to step
        if isinstance(value, (Tensor, int, float)) and expected_shape in (tuple(shape), ()):
            saved_shape = tuple(getattr(values[key], "shape", []))
            if not isinstance(values[key], (Tensor, int, float)) or saved_shape != expected_shape:
                raise UserError(f"{what}'s {key} of {which} is {shape_of(values[key])}, not {expected_shape}; {ADVICE}")


def check_schedule(state: Mapping[str, Any], groups: int, path: Path) -> None:
    """Check the state of a learning-rate schedule.

    Args:
        state: State of the schedule in the checkpoint.
        groups: Number of groups of parameters.
        path: Path of the checkpoint, for errors.

    Raises:
        UserError: An entry is missing, superfluous or of another type.
    """
    if unknown := state.keys() - SCHEDULE:
        raise UserError(f"{path}: its schedule has {abbreviated(unknown)}, which LambdaLR has not; {ADVICE}")
    for name in REQUIRED:
        kind, value = SCHEDULE[name], state.get(name)
        if kind is int:
            is_valid = type(value) is int and value >= 0
        else:
            values = value if isinstance(value, list) else []
            is_valid = len(values) == groups and all(isinstance(item, kind) for item in values)
        if not is_valid:
            raise UserError(f"{path}: its schedule has {name} {value!r:.40}, which is invalid; {ADVICE}")
