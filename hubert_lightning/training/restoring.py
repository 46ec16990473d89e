"""Models from checkpoints, whose settings and weights are checked first.

A checkpoint may come from an untrusted source. Only settings in a list of allowed names and types are used; classes or
paths that they name are neither imported nor opened.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning import LightningModule
from torch import nn

from hubert_lightning.errors import UserError
from hubert_lightning.pretrained.formats.own import read_checkpoint
from hubert_lightning.pretrained.weights import encoder_config_from
from hubert_lightning.training.averaging import shape_of
from hubert_lightning.vocabulary import vocabulary_from

ADVICE = "the file is corrupt or not one of `hubert fit`, use another checkpoint"
"""The way out of an error about an entry that no fit writes."""
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
        "intermediate_layers": (list, Nothing),
        "schedule_steps": (int, Nothing),
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
"""Arguments of each task that a checkpoint may set, and their types.

The other arguments name files and classes, or decide how a step is computed.
"""
NO_PRETRAINED = {"pretrained": None, "keep_head": False}
"""Arguments of a task that is built from a checkpoint, which has its weights in it."""

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
    **given: Any,  # arguments of any task
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

    Returns:
        The task with the weights of the checkpoint.

    Raises:
        UserError: The checkpoint is corrupt, belongs to another task, or has settings that `hubert fit` never writes.
    """
    path, strict, saved_from = Path(checkpoint_path), strict is not False, list[str]()

    def note(storage: Storage, location: str) -> Storage:
        saved_from.append(location)
        return storage

    checkpoint = read_checkpoint(path, note)
    check_counts(checkpoint, path)
    try:
        model = task(**(model_arguments(task, checkpoint, path) | given))
    except ValueError as error:  # also torch's, of a setting in the file
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
    make: Any = Storage  # torch declares no types for its constructor
    storage = map_location(make(0), saved_from)
    return saved_from if storage is None else storage.device


def model_arguments(task: type, checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Collect the arguments of a task that a checkpoint may set; other names in it are left out.

    Args:
        task: Class of the task. A class that inherits from neither of our tasks has no such arguments.
        checkpoint: Content of the checkpoint.
        path: Path of the checkpoint, for errors.

    Returns:
        Arguments by name.

    Raises:
        UserError: The checkpoint belongs to another task, or a value has another type than the argument.
    """
    settings = checkpoint.get("hyper_parameters") or {}
    if not isinstance(settings, Mapping):
        raise UserError(f"{path}: its hyper_parameters are not settings but {settings!r:.40}; {ADVICE}")
    known = next((parent.__name__ for parent in task.__mro__ if parent.__name__ in ALLOWED), None)
    check_kind(settings, task.__name__, path)
    allowed = ALLOWED.get(known or "", {})
    arguments: dict[str, Any] = {}
    for name in [name for name in allowed if name in settings]:
        value, types = settings[name], allowed[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise UserError(f"{path}: its {name} is {value!r:.40}, which is not a valid value; {ADVICE}")
        if isinstance(value, Number) and not isinstance(value, bool) and not is_finite_number(value):
            raise UserError(f"{path}: its {name} is {value!r:.40}, which is out of range; {ADVICE}")
        arguments[name] = value
    if not arguments:
        return {}
    for name, kind in (("num_clusters", "numbers of clusters"), ("intermediate_layers", "numbers of layers")):
        numbers = arguments.get(name)
        if isinstance(numbers, list) and not all(type(number) is int for number in numbers):
            raise UserError(f"{path}: its {name} is {numbers!r:.40}, which are not {kind}; {ADVICE}")
    if "encoder" in arguments:
        arguments["encoder"] = vars(encoder_config_from(arguments["encoder"], path))
    if arguments.get("vocabulary") is not None:
        arguments["vocabulary"] = vocabulary_from(arguments["vocabulary"], path).settings()
    return arguments | (NO_PRETRAINED if known == "CTCFinetuning" or "encoder" in arguments else {})


def check_kind(settings: Mapping[str, Any], task: str, path: Path) -> None:
    """Check that a checkpoint belongs to a task.

    Args:
        settings: Settings of the model in the checkpoint.
        task: Name of the class of the task.
        path: Path of the checkpoint, for errors.

    Raises:
        UserError: The settings name another class.
    """
    kind = str(settings.get("_class_path", task))
    if kind.rsplit(".", 1)[-1] != task:
        raise UserError(
            f"{path}: a checkpoint of {kind}, not of {task}; to fine-tune a pre-trained model, name it in "
            "model.init_args.pretrained, not in --ckpt_path"
        )


def check_weights(model: nn.Module, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Check that the weights in a checkpoint have the names and shapes of a model's and are finite.

    Args:
        model: Model that will load them.
        checkpoint: Content of the checkpoint.
        path: Path of the checkpoint, for errors.

    Raises:
        UserError: A weight is missing, superfluous, of another shape, or not finite.
    """
    expected, saved = model.state_dict(), checkpoint["state_dict"]
    advice = "give both the same encoder, or start from its encoder alone by model.init_args.pretrained"
    for name in [*saved, *(name for name in expected if name not in saved)]:
        shape, model_shape = (shape_of(weights.get(name)) for weights in (saved, expected))
        if shape != model_shape:
            raise UserError(f"{path}: its {name} is {shape}, in the model to train it is {model_shape}; {advice}")
        if not bool(saved[name].isfinite().all()):
            raise UserError(f"{path}: its {name} is NaN or infinite; use an earlier checkpoint")


def check_counts(checkpoint: Mapping[str, Any], path: Path, required: Sequence[str] = ()) -> None:
    """Check the numbers of steps, epochs and ranks in a checkpoint.

    Args:
        checkpoint: Content of the checkpoint.
        path: Path of the checkpoint, for errors.
        required: Names that must be there.

    Raises:
        UserError: A count is missing, not an integer, or too small.
    """
    for name, least in (("epoch", 0), ("global_step", 0), ("ranks", 1), ("accumulate", 1), ("skipped_steps", 0)):
        value = checkpoint.get(name) if name in checkpoint or name in required else least
        is_whole = type(value) is int or (name == "skipped_steps" and isinstance(value, float) and value.is_integer())
        if not is_whole or value < least:  # type: ignore[operator]  # a number, as `is_whole` knows
            raise UserError(f"{path}: its {name} is {value!r:.40}, which must be an integer from {least} on; {ADVICE}")


def is_finite_number(value: Any) -> bool:
    """Return whether a value is a finite number that torch can hold."""
    return type(value) in (int, float) and abs(value) < 2**63
