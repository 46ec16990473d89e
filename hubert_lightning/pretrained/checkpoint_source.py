"""A file or folder with weights, opened before its format is known: the input of each format's `matches` and `read`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.files import check_regular
from hubert_lightning.pretrained.weights import PretrainedWeights
from hubert_lightning.untrusted.file_kind import is_safetensors
from hubert_lightning.untrusted.torch_file import read_torch

STATE_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")
"""Keys under which training scripts save the state of a model, the usual ones first."""
MAX_DEPTH = 4  # dicts inside each other that are searched for a state


@dataclass(frozen=True)
class CheckpointSource:
    """A file or folder, and its content.

    Args:
        path: Path of the file or folder.
        content: Content of a torch file, the tensors of a safetensors file, or None for a folder.
        metadata: Metadata of a safetensors file.
        state: State dict in the content with another system's names, tensors alone; empty if there is none.
        notes: Note about other states in the content, if there are any.
        companion: Content of our own file in the folder of an export: parts that the other system's format lacks.
    """

    path: Path
    content: Any = None  # whatever a file holds
    metadata: Mapping[str, str] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    companion: PretrainedWeights | None = None


def open_source(
    path: Path, is_foreign: Callable[[Mapping[str, object]], bool], companion: PretrainedWeights | None = None
) -> CheckpointSource:
    """Open a file of weights; nothing in it is executed.

    Args:
        path: Path of the file, or of a folder, whose files stay closed.
        is_foreign: Predicate that knows the names of other systems' weights.
        companion: Content of our own file in the same folder.

    Raises:
        UserError: The file is corrupt, or would call something.
    """
    if path.is_dir():
        return CheckpointSource(path, companion=companion)
    content, metadata = read_safetensors(path) if is_safetensors(path) else (read_torch(path), {})
    state, notes = _find_state(content, is_foreign)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return CheckpointSource(path, content, metadata, tensors, notes, companion)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a safetensors file, and its metadata.

    Raises:
        UserError: The file is corrupt, or no safetensors file.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is corrupt ({error}); copy or download it again") from error


def _find_state(
    content: Any, is_foreign: Callable[[Mapping[str, object]], bool]
) -> tuple[Mapping[str, object], list[str]]:
    """Find a state dict, which may lie in a dict under any key, beside others such as that of an optimizer.

    Returns:
        The state, empty if there is none, and a note about other states beside it.

    Raises:
        TypeError: "state_dict" is no dict.
    """
    if isinstance(content, dict) and not isinstance(content.get("state_dict", {}), dict):
        raise TypeError(f"a state_dict of type {type(content['state_dict']).__name__}")
    level = [("", content)]
    seen: set[int] = set()
    for _ in range(MAX_DEPTH):
        dicts = [(key, value) for key, value in level if isinstance(value, dict) and id(value) not in seen]
        seen |= {id(value) for _, value in dicts}
        states = [(key, value) for key, value in dicts if is_foreign(_tensors_of(value))]
        if states:
            states.sort(key=lambda pair: STATE_KEYS.index(pair[0]) if pair[0] in STATE_KEYS else len(STATE_KEYS))
            (key, state), *others = states
            names = ", ".join(other for other, _ in others)
            return state, [f"it has several states, of which {key} is read, not {names}"] if others else []
        level = [(str(key), value) for _, outer in dicts for key, value in outer.items()]
    return {}, []


def _tensors_of(state: Mapping[object, object]) -> dict[str, object]:
    return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
