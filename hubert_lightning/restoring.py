"""What a checkpoint brings back is checked first: the model's settings, its weights, and the state of its run.

A checkpoint may come from somebody else. Its settings are values, taken by an allow-list of names and types: whatever
class or path they name is neither imported nor opened.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from hubert_lightning.data.text import vocabulary_from
from hubert_lightning.model.formats.checkpoint import read_checkpoint
from hubert_lightning.model.trained import settings_of, summary_of

Number, Nothing = (int, float), type(None)
ALLOWED: dict[str, dict[str, tuple[type, ...]]] = {
    "HubertPretraining": {
        "encoder": (Mapping,),
        "num_clusters": (int, list),
        "final_dim": (int,),
        "temperature": Number,
        "normal_codewords": (bool,),
        "masked_weight": Number,
        "feature_penalty": Number,
        "warmup": Number,
        "warmup_steps": (int, Nothing),
    },
    "CTCFinetuning": {
        "encoder": (Mapping,),
        "vocabulary": (Mapping, Nothing),
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "input_dropout", "layer_drop"), Number),
        "freeze_steps": (int,),
        "freeze_convolutions": (bool,),
        "warmup": Number,
        "decay": Number,
    },
}
"""Arguments of each task that a checkpoint may set, and their types. The others name files and classes, or say how a
step is computed."""
ELSEWHERE = {"pretrained": None, "keep_head": False}
"""Arguments that a checkpoint, which has its weights in it, leaves at this."""

Task = TypeVar("Task", bound=LightningModule)


def load_task(
    task: type[Task], path: Path, strict: bool = True, device: torch.device | str = "cpu", **given: Any
) -> Task:
    """The task as it was saved, with its weights, for `load_from_checkpoint`.

    Args:
        task: HubertPretraining or CTCFinetuning, or a class that inherits from one of them.
        path: Checkpoint of a fit.
        strict: Whether the checkpoint has to have all weights of the task, and no others.
        device: Device of the weights.
        **given: Arguments of the task that replace those in the checkpoint.

    Raises:
        ValueError: The checkpoint is damaged, or one of another task, or says of itself what no fit has written.
    """
    checkpoint = read_checkpoint(path)
    try:
        model = task(**(model_arguments(task, checkpoint, path) | given))
    except ValueError as error:
        raise error if str(error).startswith(str(path)) else ValueError(f"{path}: {error}") from error
    if strict:
        check_weights(model, checkpoint, path)
    model.load_state_dict(checkpoint["state_dict"], strict=strict)
    return model.to(device)


def model_arguments(task: type, checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of a task that its checkpoint states; names that are not allowed are left out.

    Args:
        task: Class of the task; one that we do not know has no arguments that a checkpoint may set.
        checkpoint: Content of the checkpoint.
        path: File that errors name.

    Raises:
        ValueError: The checkpoint is one of another task, or a value is of another type than the argument.
    """
    stated = checkpoint.get("hyper_parameters") or {}
    if not isinstance(stated, Mapping):
        raise ValueError(f"{path}: its hyper_parameters are no settings but {stated!r:.40}; {AGAIN}")
    ours = next((of.__name__ for of in task.__mro__ if of.__name__ in ALLOWED), None)
    check_kind(stated, task.__name__, path)
    allowed = ALLOWED.get(ours or "", {})
    taken: dict[str, Any] = {}
    for name in [name for name in allowed if name in stated]:
        value, types = stated[name], allowed[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ValueError(f"{path}: its {name} is {value!r:.40}, which is no value of that setting; {AGAIN}")
        taken[name] = value
    if not taken:
        return {}
    if isinstance(clusters := taken.get("num_clusters"), list) and not all(type(number) is int for number in clusters):
        raise ValueError(f"{path}: its num_clusters is {clusters!r:.40}, which are no numbers of clusters; {AGAIN}")
    if "encoder" in taken:
        taken["encoder"] = vars(settings_of(taken["encoder"], path))
    if taken.get("vocabulary") is not None:
        taken["vocabulary"] = vocabulary_from(taken["vocabulary"], path).settings()
    return taken | (ELSEWHERE if ours == "CTCFinetuning" or "encoder" in taken else {})


AGAIN = "the file is damaged or not one of `hubert fit`, take another checkpoint"


def check_kind(stated: Mapping[str, Any], task: str, path: Path) -> None:
    """Raise `ValueError` if a checkpoint says that it is one of another task than the one that is wanted."""
    kind = str(stated.get("_class_path", task))
    if kind.rsplit(".", 1)[-1] != task:
        raise ValueError(
            f"{path}: a checkpoint of {kind}, not of {task}; to fine-tune a pre-trained model, name it in "
            "model.init_args.pretrained, not in --ckpt_path"
        )


def check_weights(model: nn.Module, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Raise `ValueError` if the weights in a checkpoint are not those of this model, or are not finite."""
    ours, theirs = model.state_dict(), checkpoint["state_dict"]
    advice = "give both the same encoder, or start from its encoder alone by model.init_args.pretrained"
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        there, here = (_shape(of.get(name)) for of in (theirs, ours))
        if there != here:
            raise ValueError(f"{path}: its {name} is {there}, that of the model to train {here}; {advice}")
        if not bool(theirs[name].isfinite().all()):
            raise ValueError(f"{path}: {name} has values that are no finite numbers; take a checkpoint from before")


def _shape(value: Any) -> Any:
    if value is None:
        return "not there"
    return tuple(value.shape) if isinstance(value, Tensor) else f"no tensor but {value!r:.40}"


def check_state(trainer: Trainer, checkpoint: Mapping[str, Any], path: Path, loop: str) -> None:
    """Raise `ValueError` if the Trainer's loops and callbacks could not take their state from a checkpoint.

    Args:
        trainer: Trainer, before it starts.
        checkpoint: Content of the checkpoint.
        path: File that errors name.
        loop: "fit_loop", "validate_loop", "test_loop" or "predict_loop".
    """
    for name, least in (("epoch", 0), ("global_step", 0), ("ranks", 1), ("accumulate", 1)):
        needed = loop == "fit_loop" and name in ("epoch", "global_step")
        value = checkpoint.get(name) if name in checkpoint or needed else least
        if type(value) is not int or value < least:
            raise ValueError(f"{path}: its {name} is {value!r:.40}, and is a number from {least} on; {AGAIN}")
    version = checkpoint.get("pytorch-lightning_version")
    if not isinstance(version, str) or not version[:1].isdigit():
        raise ValueError(f"{path}: the version of Lightning that saved it is {version!r:.40}; {AGAIN}")
    if "loops" in checkpoint or loop == "fit_loop":
        loops = checkpoint.get("loops")
        if not isinstance(loops, Mapping) or loop not in loops:
            raise ValueError(f"{path}: its loops are {loops!r:.40}, without {loop}; {AGAIN}")
        # Another version may have other parts
        exact = version == installed_version("lightning")
        _check_like(loops[loop], getattr(trainer, loop).state_dict(), f"{path}: its {loop}", exact)
    states = checkpoint.get("callbacks", {})
    if not isinstance(states, Mapping):
        raise ValueError(f"{path}: its callbacks are {states!r:.40}, not states of callbacks; {AGAIN}")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for key in (callback.state_key, callback._legacy_state_key):
            if key in states:
                what, expected = f"{path}: the state of {type(callback).__name__}", callback.state_dict()
                _check_like(states[key], expected, what)
                if missing := expected.keys() - states[key].keys():
                    raise ValueError(f"{what} lacks {summary_of(missing)}; {AGAIN}")


def _check_like(there: Any, expected: Any, what: str, exact: bool = False) -> None:
    """Raise `ValueError` if a part of a state is of another type, or missing, or with `exact` superfluous."""
    if isinstance(expected, Mapping):
        if not isinstance(there, Mapping):
            raise ValueError(f"{what} is {there!r:.40}, and has parts; {AGAIN}")
        if exact and (unknown := there.keys() - expected.keys()):
            raise ValueError(f"{what} has {summary_of(map(str, unknown))}, which no run has; {AGAIN}")
        for name, value in expected.items():
            if name not in there and exact:
                raise ValueError(f"{what} lacks {name}; {AGAIN}")
            if name in there:
                _check_like(there[name], value, f"{what}.{name}", exact)
        return
    counted = type(expected) in (int, bool)
    if expected is None or (there is None and not counted):
        return
    numbers = (int, float, Tensor)
    alike = isinstance(there, numbers) if isinstance(expected, numbers) else isinstance(there, type(expected))
    if counted:
        alike = type(there) is type(expected) and (there >= 0 or there == expected)
    if not alike:
        raise ValueError(f"{what} is {there!r:.40}, where {expected!r:.40} has its type; {AGAIN}")


def check_run(
    model: LightningModule, make: Callable[[ParamsT], Optimizer], checkpoint: Mapping[str, Any], path: Path
) -> None:
    """Raise `ValueError` if the optimizer and its schedule could not go on from a checkpoint.

    Args:
        model: Model to train, with the shapes of the checkpoint's.
        make: How its optimizer is made.
        checkpoint: Content of the checkpoint.
        path: File that errors name.
    """
    steps = checkpoint["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    if steps["total"]["completed"] != checkpoint["global_step"]:
        raise ValueError(
            f"{path}: it is of step {checkpoint['global_step']}, and its loops are at {steps['total']['completed']}; "
            f"{AGAIN}"
        )
    states, schedules = checkpoint.get("optimizer_states"), checkpoint.get("lr_schedulers")
    for name, listed in (("optimizer_states", states), ("lr_schedulers", schedules)):
        if not (isinstance(listed, list) and len(listed) == 1 and isinstance(listed[0], Mapping)):
            raise ValueError(f"{path}: its {name} are {listed!r:.40}, and are a list of one state; {AGAIN}")
    assert states is not None
    assert schedules is not None
    _check_optimizer([*model.parameters()], make, states[0], path)
    schedule, groups = schedules[0], len(states[0]["param_groups"])
    if unknown := schedule.keys() - SCHEDULE:
        raise ValueError(f"{path}: its schedule has {summary_of(unknown)}, which is not ours; {AGAIN}")
    for name, kind in SCHEDULE.items():
        value = schedule.get(name)
        whole = kind is int and type(value) is int and value >= 0
        listed = kind is not int and isinstance(value, list) and len(value) == groups
        if not (whole or (listed and all(isinstance(one, kind) for one in value))) and name in NEEDED:
            raise ValueError(f"{path}: its schedule has {name} {value!r:.40}, which is none; {AGAIN}")


SCHEDULE: dict[str, Any] = {
    "last_epoch": int,
    "_step_count": int,
    "base_lrs": Number,
    "_last_lr": Number,
    "lr_lambdas": (dict, Nothing),
    "_is_initial": Any,
    "_get_lr_called_within_step": Any,
}
"""What the state of a schedule holds: a number, or of each group of parameters one of these."""
NEEDED = ("last_epoch", "_step_count", "base_lrs", "_last_lr", "lr_lambdas")


def probe_optimizer(make: Callable[[ParamsT], Optimizer]) -> Optimizer:
    """The optimizer, of one small parameter: its settings are known to be right before there is work to lose.

    Raises:
        ValueError: It cannot be made with these settings, or not take a step with gradients that are not sparse.
    """
    try:
        tried = make([probe := nn.Parameter(torch.zeros(2, 3))])
        probe.grad = torch.zeros_like(probe)
        tried.step(lambda: torch.zeros(()))  # type: ignore[arg-type, return-value]
        return make([nn.Parameter(torch.zeros(2, 3))])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the optimizer cannot be made ({error}); correct model.init_args.optimizer") from error


def _check_optimizer(
    parameters: Sequence[Tensor], make: Callable[[ParamsT], Optimizer], state: Mapping[str, Any], path: Path
) -> None:
    optimizer = probe_optimizer(make)
    [probe] = optimizer.param_groups[0]["params"]
    name = type(optimizer).__name__
    probe.grad = torch.zeros_like(probe)
    optimizer.step(lambda: torch.zeros(()))  # type: ignore[arg-type, return-value]
    expected = {key: value for key, value in optimizer.state[probe].items() if value is not None}
    other = f"give the optimizer that the run was begun with, or, if that is {name}, {AGAIN}"
    groups, of_each = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], Mapping):
        raise ValueError(f"{path}: its optimizer has no group of parameters; {AGAIN}")
    options = optimizer.param_groups[0]
    if groups[0].get("params") != list(range(len(parameters))) or not isinstance(of_each, Mapping):
        raise ValueError(f"{path}: its optimizer is one of other parameters than the model has; {AGAIN}")
    for option, value in options.items():
        if option not in groups[0]:
            raise ValueError(f"{path}: its optimizer has no {option}, as {name} has; {other}")
        there = groups[0][option]
        if isinstance(value, (tuple, list)):  # such as betas
            alike = isinstance(there, (tuple, list)) and (len(there) == len(value) or option == "params")
        else:
            number = isinstance(value, float)
            alike = isinstance(there, (int, float, Tensor)) if number else type(there) is type(value)
            alike = alike or there is None or value is None
        if not alike:
            raise ValueError(f"{path}: its optimizer has {option} {there!r:.40}, which is none of {name}; {AGAIN}")
    for number, kept in of_each.items():
        if type(number) is not int or not 0 <= number < len(parameters) or not isinstance(kept, Mapping):
            raise ValueError(f"{path}: its optimizer has a state of {number!r:.40}, which is no parameter; {AGAIN}")
        kept = {key: value for key, value in kept.items() if value is not None}
        if kept.keys() != expected.keys():
            there, here = (", ".join(sorted(map(str, of))) or "nothing" for of in (kept, expected))
            raise ValueError(f"{path}: its optimizer keeps {there} of a parameter, {name} {here}; {other}")
        for key, value in expected.items():
            elementwise = isinstance(value, Tensor) and value.shape == probe.shape
            shape = parameters[number].shape if elementwise else getattr(value, "shape", ())
            fits = isinstance(kept[key], (Tensor, int, float)) and (
                not (elementwise or shape == ()) or getattr(kept[key], "shape", ()) == shape
            )
            if not fits:
                raise ValueError(
                    f"{path}: its optimizer's {key} of parameter {number} is {_shape(kept[key])}, and has to be "
                    f"{tuple(shape)}; {AGAIN}"
                )
            if isinstance(kept[key], Tensor) and not bool(kept[key].isfinite().all()):
                raise ValueError(f"{path}: its optimizer's {key} is not finite; take a checkpoint from before")
