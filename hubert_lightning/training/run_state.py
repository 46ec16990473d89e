"""The state of a run in a checkpoint, checked before the run resumes: loops, callbacks, data and metrics."""

import re
from collections.abc import Callable, Mapping
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from hubert_lightning.errors import UserError
from hubert_lightning.pretrained.weights import abbreviated
from hubert_lightning.training.callbacks.best_checkpoints import BestCheckpoints
from hubert_lightning.training.lightning_internals import callbacks_of, optimizer_steps
from hubert_lightning.training.optimizer_state import check_optimizer, check_schedule
from hubert_lightning.training.restoring import ADVICE, check_counts, is_finite_number


def check_state(trainer: Trainer, checkpoint: Mapping[str, Any], path: Path, loop: str) -> None:
    """Check that the Trainer's loops and callbacks can load their state from a checkpoint.

    Args:
        trainer: Trainer, before it starts.
        checkpoint: Content of the checkpoint.
        path: Path of the checkpoint, for errors.
        loop: "fit_loop", "validate_loop", "test_loop" or "predict_loop".

    Raises:
        UserError: A part is missing, superfluous or of another type.
    """
    check_counts(checkpoint, path, ["epoch", "global_step"] if loop == "fit_loop" else [])
    version = checkpoint.get("pytorch-lightning_version")
    if not isinstance(version, str) or not version[:1].isdigit():
        raise UserError(f"{path}: the version of Lightning that saved it is {version!r:.40}; {ADVICE}")
    if "loops" in checkpoint or loop == "fit_loop":
        loops = checkpoint.get("loops")
        if not isinstance(loops, Mapping) or loop not in loops:
            raise UserError(f"{path}: its loops are {loops!r:.40}, without {loop}; {ADVICE}")
        # Another version may have other parts
        exact = version == installed_version("lightning")
        _check_like(loops[loop], getattr(trainer, loop).state_dict(), f"{path}: its {loop}", exact)
    states = checkpoint.get("callbacks", {})
    if not isinstance(states, Mapping):
        raise UserError(f"{path}: its callbacks are {states!r:.40}, not states of callbacks; {ADVICE}")
    if loop == "fit_loop":
        _check_best_checkpoints(trainer, states, path)
    for callback in callbacks_of(trainer):
        if callback.state_key in states:
            what, expected = f"{path}: the state of {type(callback).__name__}", callback.state_dict()
            state = states[callback.state_key]
            _check_like(state, expected, what)
            if missing := expected.keys() - state.keys():
                raise UserError(f"{what} lacks {abbreviated(missing)}; {ADVICE}")


def _check_best_checkpoints(trainer: Trainer, states: Mapping[str, Any], path: Path) -> None:
    """Refuse to choose the best checkpoints of a run by another metric than before, whose values are not comparable."""
    ours = {callback.state_key for callback in trainer.checkpoint_callbacks if isinstance(callback, BestCheckpoints)}
    saved = {key for key in states if isinstance(key, str) and key.startswith(BestCheckpoints.__name__)}
    if saved - ours and ours - saved:
        before, now = (re.findall(r"'monitor': '([^']*)'", key) for key in (min(saved - ours), min(ours - saved)))
        if before != now:
            raise UserError(
                f"{path}: its best checkpoints are chosen by {''.join(before)}, not by {''.join(now)}; keep the "
                "monitor of BestCheckpoints, or start another run with another --output"
            )


def _check_like(value: Any, expected: Any, what: str, exact: bool = False) -> None:
    """Raise `UserError` if a part of a state has another type than expected; with `exact`, also other names."""
    if isinstance(expected, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{what} is {value!r:.40}, and must have parts; {ADVICE}")
        if exact and (unknown := value.keys() - expected.keys()):
            raise UserError(f"{what} has {abbreviated(map(str, unknown))}, which a run never has; {ADVICE}")
        for name, part in expected.items():
            if name in value:
                _check_like(value[name], part, f"{what}.{name}", exact)
            elif exact:
                raise UserError(f"{what} lacks {name}; {ADVICE}")
        return
    is_count = type(expected) in (int, bool)
    if expected is None or (value is None and not is_count):
        return
    numbers = (int, float, Tensor)
    alike = isinstance(value, numbers) if isinstance(expected, numbers) else isinstance(value, type(expected))
    if is_count:
        alike = type(value) is type(expected) and (value >= 0 or value == expected)
    if not alike:
        raise UserError(f"{what} is {value!r:.40}, and must have the type of {expected!r:.40}; {ADVICE}")


def check_run(
    model: LightningModule, make: Callable[[ParamsT], Optimizer], checkpoint: Mapping[str, Any], path: Path
) -> None:
    """Check that the optimizer and its schedule can resume from a checkpoint.

    Args:
        model: Model to train, whose weights have the shapes of the checkpoint's.
        make: Function that makes the optimizer of parameters.
        checkpoint: Content of the checkpoint.
        path: Path of the checkpoint, for errors.

    Raises:
        UserError: A state is missing or does not fit.
    """
    if (steps := optimizer_steps(checkpoint)) != checkpoint["global_step"]:
        raise UserError(f"{path}: its global_step is {checkpoint['global_step']}, in its loops it is {steps}; {ADVICE}")
    states: dict[str, Mapping[str, Any]] = {}
    for name in ("optimizer_states", "lr_schedulers"):
        listed = checkpoint.get(name)
        if not (isinstance(listed, list) and len(listed) == 1 and isinstance(listed[0], Mapping)):
            raise UserError(f"{path}: its {name} are {listed!r:.40}, and must be a list of one state; {ADVICE}")
        states[name] = listed[0]
    check_optimizer([*model.parameters()], make, states["optimizer_states"], path)
    check_schedule(states["lr_schedulers"], len(states["optimizer_states"]["param_groups"]), path)


def check_steps(max_steps: int, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Refuse to end a run before the step of its checkpoint: its model would be one in the middle of its schedule.

    Args:
        max_steps: Steps of the run; -1 for any number.
        checkpoint: Content of the checkpoint.
        path: Path of the checkpoint, for errors.

    Raises:
        UserError: The checkpoint has more steps.
    """
    if 0 < max_steps < checkpoint["global_step"]:
        raise UserError(
            f"{path}: saved after step {checkpoint['global_step']}, and the run is to end after step {max_steps}; give "
            f"at least {checkpoint['global_step']} steps (max_steps), or start another run with another --output"
        )


def check_entries(checkpoint: Mapping[str, Any], data: str, path: Path) -> None:
    """Check the entries that this package's callbacks, data modules and tasks add to a checkpoint.

    Args:
        checkpoint: Content of the checkpoint.
        data: Name of the class of the run's data.
        path: Path of the checkpoint, for errors.

    Raises:
        UserError: An entry has another type.
    """
    manifests, metrics = checkpoint.get(data, {}), checkpoint.get("metrics", {})
    if not isinstance(manifests, Mapping):
        raise UserError(f"{path}: its {data} is {manifests!r:.40}, and must describe the manifests; {ADVICE}")
    if not isinstance(metrics, Mapping):
        raise UserError(f"{path}: its metrics are {metrics!r:.40}, and must be numbers by name; {ADVICE}")
    for name, value in metrics.items():
        if not isinstance(name, str) or not (isinstance(value, float) or is_finite_number(value)):
            raise UserError(f"{path}: its metrics have {name!r:.40} of {value!r:.40}, which is not a number; {ADVICE}")
    expected: dict[str, tuple[Any, Callable[[Any], bool]]] = {
        "skipped_steps": (0.0, lambda value: is_finite_number(value) and value >= 0),
        "validation_due": (False, lambda value: isinstance(value, bool)),
        "ended_by": (0, lambda value: type(value) is int and is_finite_number(value)),
    }
    for name, (default, is_valid) in expected.items():
        value = checkpoint.get(name, default)
        if not is_valid(value):
            raise UserError(f"{path}: its {name} is {value!r:.40}, which a run never has; {ADVICE}")
