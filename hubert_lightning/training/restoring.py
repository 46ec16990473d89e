"""What a checkpoint brings back is checked first: the model's settings, its weights, and the state of its run.

A checkpoint may come from somebody else. Its settings are values, taken by an allow-list of names and types: whatever
class or path they name is neither imported nor opened.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from hubert_lightning.errors import UserError
from hubert_lightning.pretrained.formats.own import read_checkpoint
from hubert_lightning.pretrained.weights import abbreviated, encoder_config_from
from hubert_lightning.vocabulary import vocabulary_from

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


Storage = torch.UntypedStorage
MapLocation = torch.device | str | Mapping[str, str] | Callable[[Storage, str], Storage | None]


def load_task(
    task: type[Task],
    checkpoint_path: str | Path,
    map_location: MapLocation | None = None,
    hparams_file: str | Path | None = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    **given: Any,
) -> Task:
    """Load a task as `hubert fit` saved it, for `load_from_checkpoint`; nothing in the file is executed.

    Args:
        task: HubertPretraining or CTCFinetuning, or a class that inherits from one of them.
        checkpoint_path: Path of the checkpoint.
        map_location: Device of the weights, the CPU if not given; or, as in `torch.load`, devices by the device that
            the weights were saved from, or a function from a storage and that device to a storage.
        hparams_file: Without effect; the checkpoint has the settings.
        strict: Whether the checkpoint must have all weights of the task and no others; if not given, it must.
        weights_only: Without effect; the file is read as if it were true.
        **given: Arguments of the task that replace those in the checkpoint, such as `optimizer`.

    Raises:
        UserError: The checkpoint is damaged, belongs to another task, or has settings that no fit writes.
    """
    path, strict, saved_from = Path(checkpoint_path), strict is not False, list[str]()

    def note(storage: Storage, location: str) -> Storage:
        saved_from.append(location)
        return storage

    checkpoint = read_checkpoint(path, note)
    _check_counts(checkpoint, path)
    try:
        model = task(**(model_arguments(task, checkpoint, path) | given))
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise UserError(f"{path}: {error}") from error
    model.on_load_checkpoint(checkpoint)
    if strict:
        check_weights(model, checkpoint, path)
    model.load_state_dict(checkpoint["state_dict"], strict=strict)
    return model.to(_device(map_location, saved_from[0] if saved_from else "cpu"))


def _device(map_location: MapLocation | None, saved_from: str) -> torch.device | str:
    """Device of weights, by the argument `map_location` of `torch.load` and the device that they were saved from."""
    if map_location is None or isinstance(map_location, (torch.device, str)):
        return map_location or "cpu"
    if isinstance(map_location, Mapping):
        return map_location.get(saved_from, saved_from)
    storage = map_location(Storage(0), saved_from)
    return saved_from if storage is None else storage.device


def model_arguments(task: type, checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of a task that its checkpoint states; names that are not allowed are left out.

    Args:
        task: Class of the task; one that we do not know has no arguments that a checkpoint may set.
        checkpoint: Content of the checkpoint.
        path: File that errors name.

    Raises:
        UserError: The checkpoint is one of another task, or a value is of another type than the argument.
    """
    stated = checkpoint.get("hyper_parameters") or {}
    if not isinstance(stated, Mapping):
        raise UserError(f"{path}: its hyper_parameters are no settings but {stated!r:.40}; {AGAIN}")
    ours = next((of.__name__ for of in task.__mro__ if of.__name__ in ALLOWED), None)
    check_kind(stated, task.__name__, path)
    allowed = ALLOWED.get(ours or "", {})
    taken: dict[str, Any] = {}
    for name in [name for name in allowed if name in stated]:
        value, types = stated[name], allowed[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise UserError(f"{path}: its {name} is {value!r:.40}, which is no value of that setting; {AGAIN}")
        if isinstance(value, Number) and not isinstance(value, bool) and not _is_number(value):
            raise UserError(f"{path}: its {name} is {value!r:.40}, a number that no setting has; {AGAIN}")
        taken[name] = value
    if not taken:
        return {}
    if isinstance(clusters := taken.get("num_clusters"), list) and not all(type(number) is int for number in clusters):
        raise UserError(f"{path}: its num_clusters is {clusters!r:.40}, which are no numbers of clusters; {AGAIN}")
    if "encoder" in taken:
        taken["encoder"] = vars(encoder_config_from(taken["encoder"], path))
    if taken.get("vocabulary") is not None:
        taken["vocabulary"] = vocabulary_from(taken["vocabulary"], path).settings()
    return taken | (ELSEWHERE if ours == "CTCFinetuning" or "encoder" in taken else {})


AGAIN = "the file is damaged or not one of `hubert fit`, take another checkpoint"


def check_kind(stated: Mapping[str, Any], task: str, path: Path) -> None:
    """Raise `UserError` if a checkpoint says that it is one of another task than the one that is wanted."""
    kind = str(stated.get("_class_path", task))
    if kind.rsplit(".", 1)[-1] != task:
        raise UserError(
            f"{path}: a checkpoint of {kind}, not of {task}; to fine-tune a pre-trained model, name it in "
            "model.init_args.pretrained, not in --ckpt_path"
        )


def check_weights(model: nn.Module, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Raise `UserError` if the weights in a checkpoint are not those of this model, or are not finite."""
    ours, theirs = model.state_dict(), checkpoint["state_dict"]
    advice = "give both the same encoder, or start from its encoder alone by model.init_args.pretrained"
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        there, here = (_shape(of.get(name)) for of in (theirs, ours))
        if there != here:
            raise UserError(f"{path}: its {name} is {there}, that of the model to train {here}; {advice}")
        if not bool(theirs[name].isfinite().all()):
            raise UserError(f"{path}: {name} has values that are no finite numbers; take a checkpoint from before")


def _shape(value: Any) -> Any:
    if value is None:
        return "not there"
    return tuple(value.shape) if isinstance(value, Tensor) else f"no tensor but {value!r:.40}"


def check_state(trainer: Trainer, checkpoint: Mapping[str, Any], path: Path, loop: str) -> None:
    """Raise `UserError` if the Trainer's loops and callbacks could not take their state from a checkpoint.

    Args:
        trainer: Trainer, before it starts.
        checkpoint: Content of the checkpoint.
        path: File that errors name.
        loop: "fit_loop", "validate_loop", "test_loop" or "predict_loop".
    """
    _check_counts(checkpoint, path, ["epoch", "global_step"] if loop == "fit_loop" else [])
    version = checkpoint.get("pytorch-lightning_version")
    if not isinstance(version, str) or not version[:1].isdigit():
        raise UserError(f"{path}: the version of Lightning that saved it is {version!r:.40}; {AGAIN}")
    if "loops" in checkpoint or loop == "fit_loop":
        loops = checkpoint.get("loops")
        if not isinstance(loops, Mapping) or loop not in loops:
            raise UserError(f"{path}: its loops are {loops!r:.40}, without {loop}; {AGAIN}")
        # Another version may have other parts
        exact = version == installed_version("lightning")
        _check_like(loops[loop], getattr(trainer, loop).state_dict(), f"{path}: its {loop}", exact)
    states = checkpoint.get("callbacks", {})
    if not isinstance(states, Mapping):
        raise UserError(f"{path}: its callbacks are {states!r:.40}, not states of callbacks; {AGAIN}")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for key in (callback.state_key, callback._legacy_state_key):
            if key in states:
                what, expected = f"{path}: the state of {type(callback).__name__}", callback.state_dict()
                _check_like(states[key], expected, what)
                if missing := expected.keys() - states[key].keys():
                    raise UserError(f"{what} lacks {abbreviated(missing)}; {AGAIN}")


def _check_counts(checkpoint: Mapping[str, Any], path: Path, needed: Sequence[str] = ()) -> None:
    """Raise `UserError` if what a checkpoint counts is no number, or a count that is needed is missing."""
    for name, least in (("epoch", 0), ("global_step", 0), ("ranks", 1), ("accumulate", 1), ("skipped_steps", 0)):
        value = checkpoint.get(name) if name in checkpoint or name in needed else least
        whole = type(value) is int or (name == "skipped_steps" and isinstance(value, float) and value.is_integer())
        if not whole or value < least:  # type: ignore[operator]
            raise UserError(f"{path}: its {name} is {value!r:.40}, and is a number from {least} on; {AGAIN}")


def _check_like(there: Any, expected: Any, what: str, exact: bool = False) -> None:
    """Raise `UserError` if a part of a state is of another type, or missing, or with `exact` superfluous."""
    if isinstance(expected, Mapping):
        if not isinstance(there, Mapping):
            raise UserError(f"{what} is {there!r:.40}, and has parts; {AGAIN}")
        if exact and (unknown := there.keys() - expected.keys()):
            raise UserError(f"{what} has {abbreviated(map(str, unknown))}, which no run has; {AGAIN}")
        for name, value in expected.items():
            if name not in there and exact:
                raise UserError(f"{what} lacks {name}; {AGAIN}")
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
        raise UserError(f"{what} is {there!r:.40}, where {expected!r:.40} has its type; {AGAIN}")


def check_run(
    model: LightningModule, make: Callable[[ParamsT], Optimizer], checkpoint: Mapping[str, Any], path: Path
) -> None:
    """Raise `UserError` if the optimizer and its schedule could not go on from a checkpoint.

    Args:
        model: Model to train, with the shapes of the checkpoint's.
        make: How its optimizer is made.
        checkpoint: Content of the checkpoint.
        path: File that errors name.
    """
    steps = checkpoint["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    if steps["total"]["completed"] != checkpoint["global_step"]:
        raise UserError(
            f"{path}: it is of step {checkpoint['global_step']}, and its loops are at {steps['total']['completed']}; "
            f"{AGAIN}"
        )
    states, schedules = checkpoint.get("optimizer_states"), checkpoint.get("lr_schedulers")
    for name, listed in (("optimizer_states", states), ("lr_schedulers", schedules)):
        if not (isinstance(listed, list) and len(listed) == 1 and isinstance(listed[0], Mapping)):
            raise UserError(f"{path}: its {name} are {listed!r:.40}, and are a list of one state; {AGAIN}")
    assert states is not None
    assert schedules is not None
    _check_optimizer([*model.parameters()], make, states[0], path)
    schedule, groups = schedules[0], len(states[0]["param_groups"])
    if unknown := schedule.keys() - SCHEDULE:
        raise UserError(f"{path}: its schedule has {abbreviated(unknown)}, which is not ours; {AGAIN}")
    for name, kind in SCHEDULE.items():
        value = schedule.get(name)
        whole = kind is int and type(value) is int and value >= 0
        listed = kind is not int and isinstance(value, list) and len(value) == groups
        if not (whole or (listed and all(isinstance(one, kind) for one in value))) and name in NEEDED:
            raise UserError(f"{path}: its schedule has {name} {value!r:.40}, which is none; {AGAIN}")


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


def probe_optimizer(make: Callable[[ParamsT], Optimizer], parameters: Sequence[Tensor] | None = None) -> Optimizer:
    """Make an optimizer that trains nothing: its settings are known to be right before there is work to lose.

    Args:
        make: How it is made.
        parameters: Its parameters; one small one if not given.

    Raises:
        UserError: It cannot be made with these settings, or not take a step with gradients that are not sparse.
    """
    parameters = [nn.Parameter(torch.zeros(2, 3))] if parameters is None else parameters
    try:
        tried = make([probe := nn.Parameter(torch.zeros(2, 3))])
        made = make(parameters)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the optimizer cannot be made ({error}); correct model.init_args.optimizer") from error
    probe.grad = torch.zeros_like(probe)
    try:
        tried.step(lambda: torch.zeros(()))  # type: ignore[arg-type, return-value]
    except (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if "dense gradients" in str(error):  # others, which step on a GPU alone, are left to it
            raise UserError(f"the optimizer cannot train ({error}); correct model.init_args.optimizer") from error
    return made


def _check_optimizer(
    parameters: Sequence[Tensor], make: Callable[[ParamsT], Optimizer], state: Mapping[str, Any], path: Path
) -> None:
    """Refuse what no optimizer keeps, what this one cannot load, and what differs from what a step of it makes.

    Which states there are is known of those alone that can step on the CPU: another may need its device.
    """
    optimizer = probe_optimizer(make, parameters)
    name = type(optimizer).__name__
    other = f"give the optimizer that the run was begun with, or, if that is {name}, {AGAIN}"
    options = [dict(group) for group in optimizer.param_groups]
    places = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    groups, of_each = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not groups or not all(isinstance(group, Mapping) for group in groups):
        raise UserError(f"{path}: its optimizer has no group of parameters; {AGAIN}")
    if len(groups) != len(places):
        raise UserError(f"{path}: its optimizer has {len(groups)} groups of parameters, {name} {len(places)}; {other}")
    if [group.get("params") for group in groups] != places or not isinstance(of_each, Mapping):
        raise UserError(f"{path}: its optimizer is one of other parameters than the model has; {AGAIN}")
    for number, kept in of_each.items():
        if type(number) is not int or not 0 <= number < len(parameters) or not isinstance(kept, Mapping):
            raise UserError(f"{path}: its optimizer has a state of {number!r:.40}, which is no parameter; {AGAIN}")
        for key, value in kept.items():
            if (finite := _are_finite(value)) is None:
                raise UserError(
                    f"{path}: its optimizer's {key} of parameter {number} is {value!r:.40}, not numbers; {AGAIN}"
                )
            if not finite:
                raise UserError(f"{path}: its optimizer's {key} is not finite; take a checkpoint from before")
    try:
        optimizer.load_state_dict(dict(state))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its optimizer's state does not fit {name} ({error}); {other}") from error
    for expected, group in zip(options, optimizer.param_groups, strict=True):
        _check_options(expected, group, name, path)
    ours = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stepped: dict[torch.Size, dict[str, Any] | None] = {}
    for number, kept in of_each.items():
        shape = ours[number].shape
        if shape not in stepped:
            stepped[shape] = _state_of_step(make, shape)
        if (made := stepped[shape]) is not None:
            _check_kept(kept, made, shape, f"{path}: its optimizer", f"parameter {number}, {name}", other)


def _are_finite(value: Any) -> bool | None:
    """Whether a state of an optimizer is finite; None if there is something else in it than numbers."""
    if isinstance(value, (list, tuple, Mapping)):
        each = [_are_finite(one) for one in (value.values() if isinstance(value, Mapping) else value)]
        return None if None in each else all(each)
    if isinstance(value, Tensor):
        exotic = value.is_floating_point() and value.dtype.itemsize == 1  # of which torch does not know it
        return bool((value.float() if exotic else value).isfinite().all())
    return value is None or math.isfinite(value) if isinstance(value, (int, float, Nothing)) else None


def _check_options(expected: Mapping[str, Any], group: Mapping[str, Any], name: str, path: Path) -> None:
    """Raise `UserError` if a group of parameters, as it was loaded, lacks an option or has one of another type."""
    for option, value in expected.items():
        if option not in group:
            raise UserError(
                f"{path}: its optimizer has no {option}, as {name} has; give the optimizer that the run was begun "
                f"with, or, if that is {name}, {AGAIN}"
            )
        there = group[option]
        if isinstance(value, (tuple, list)):  # such as betas
            alike = isinstance(there, (tuple, list)) and len(there) == len(value)
        elif isinstance(value, (int, float, Tensor)) and not isinstance(value, bool):
            alike = isinstance(there, (int, float, Tensor)) and not isinstance(there, bool)
        else:
            alike = value is None or type(there) is type(value)
        if not (alike or there is None):
            raise UserError(f"{path}: its optimizer has {option} {there!r:.40}, which is none of {name}; {AGAIN}")


def _state_of_step(make: Callable[[ParamsT], Optimizer], shape: torch.Size) -> dict[str, Any] | None:
    """What an optimizer keeps of one parameter after a step, None if it cannot step here."""
    probe = nn.Parameter(torch.zeros(shape))
    probe.grad = torch.zeros(shape)
    try:
        optimizer = make([probe])
        optimizer.step(lambda: torch.zeros(()))  # type: ignore[arg-type, return-value]
    except (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError):
        return None  # such as one that wants a GPU, or gradients of another kind
    return {key: value for key, value in optimizer.state[probe].items() if value is not None}


def _check_kept(
    kept: Mapping[str, Any], made: Mapping[str, Any], shape: torch.Size, what: str, of_which: str, other: str
) -> None:
    """Raise `UserError` if what is kept of a parameter is not what a step makes, as far as all steps make the same."""
    if any(kept.get(key) is None for key in made):
        names = ", ".join(sorted(map(str, kept))) or "nothing"
        raise UserError(f"{what} keeps {names} of {of_which} {', '.join(map(str, made))}; {other}")
    for key, value in made.items():
        here = tuple(getattr(value, "shape", []))
        if isinstance(value, (Tensor, int, float)) and here in (tuple(shape), ()):
            there = tuple(getattr(kept[key], "shape", []))
            if not isinstance(kept[key], (Tensor, int, float)) or there != here:
                raise UserError(f"{what}'s {key} of {of_which} is {_shape(kept[key])}, not {here}; {AGAIN}")


def check_entries(checkpoint: Mapping[str, Any], data: str, path: Path) -> None:
    """Raise `UserError` if what our callbacks, data and tasks keep in a checkpoint is something else.

    Args:
        checkpoint: Content of the checkpoint.
        data: Name of the class of the run's data.
        path: File that errors name.
    """
    of_data, metrics = checkpoint.get(data, {}), checkpoint.get("metrics", {})
    if not isinstance(of_data, Mapping):
        raise UserError(f"{path}: its {data} is {of_data!r:.40}, and says which manifests there were; {AGAIN}")
    if not isinstance(metrics, Mapping):
        raise UserError(f"{path}: its metrics are {metrics!r:.40}, and are numbers by their names; {AGAIN}")
    for name, value in metrics.items():
        if not isinstance(name, str) or not (isinstance(value, float) or _is_number(value)):
            raise UserError(f"{path}: its metrics have {name!r:.40} of {value!r:.40}, which is no number; {AGAIN}")
    expected: dict[str, tuple[Any, Callable[[Any], bool]]] = {
        "skipped_steps": (0.0, lambda value: _is_number(value) and value >= 0),
        "validation_due": (False, lambda value: isinstance(value, bool)),
        "ended_by": (0, lambda value: type(value) is int and _is_number(value)),
    }
    for name, (default, fits) in expected.items():
        value = checkpoint.get(name, default)
        if not fits(value):
            raise UserError(f"{path}: its {name} is {value!r:.40}, as no run has it; {AGAIN}")


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number that torch can hold."""
    return type(value) in (int, float) and abs(value) < 2**63
