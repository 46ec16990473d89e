"""Our own files: the `.ckpt` of a fit, and one safetensors file with the same in it."""

import json
import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.files import check_regular
from hubert_lightning.pretrained.weights import Trained, left_out, settings_of
from hubert_lightning.untrusted.file_kind import is_whole_zip
from hubert_lightning.untrusted.json_file import parse_json
from hubert_lightning.untrusted.torch_file import read_torch

KEY = "hubert_lightning"  # of the metadata, which holds what is no tensor


def of_fit(path: Path, content: Mapping[str, Any]) -> Trained:
    """What `hubert fit`, `import` or `average` saved.

    content: of the `.ckpt`
    """
    settings = content.get("hyper_parameters") or {}
    parts = _parts(content["state_dict"])
    imported = content.get("imported") or {}
    return Trained(
        settings_of(settings.get("encoder"), path),
        parts.pop("encoder", {}),
        _numbered(parts, "predictors."),
        float(settings.get("temperature", 0.1)),
        parts.get("head"),
        # Checkpoints from before there was a choice spell with LibriSpeech's letters, which are the default
        (settings.get("vocabulary") or {}) if "head" in parts else None,
        imported.get("special", ()),
        {name: value for name, value in imported.items() if name != "special"},
        left_out(_foreign_names(content["state_dict"])),
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and what it says of them.

    Raises:
        UserError: It is damaged, or no file of safetensors.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); copy or download it again") from error


def of_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Trained:
    """What `to_safetensors` made.

    Raises:
        UserError: It says something else of its tensors than that.
    """
    try:
        about = parse_json(metadata[KEY])
        config, temperature = about["encoder"], float(about["temperature"])
        vocabulary, source = about["vocabulary"], dict(about["source"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not say what its weights are of; export the model again") from error
    parts = _parts(tensors)
    return Trained(
        settings_of(config, path),
        parts.get("encoder", {}),
        _numbered(parts, "predictors."),
        temperature,
        parts.get("head"),
        vocabulary,
        [one["weight"] for one in _numbered(parts, "special.")],
        source,
        left_out(_foreign_names(tensors)),
    )


def to_safetensors(trained: Trained) -> bytes:
    """All of it in one file, in our names."""
    state = to_state(trained) | {f"special.{number}.weight": rows for number, rows in enumerate(trained.special)}
    about = {
        "encoder": vars(trained.config),
        "temperature": trained.temperature,
        "vocabulary": trained.vocabulary,
        "source": dict(trained.source),
    }
    tensors = {name: value.contiguous() for name, value in state.items()}
    return save(tensors, metadata={KEY: json.dumps(about, sort_keys=True, ensure_ascii=False)})


def to_state(trained: Trained) -> dict[str, Tensor]:
    """The state of the module that trained it, or would go on: HubertPretraining, or CTCFinetuning."""
    state = {f"encoder.{name}": value for name, value in trained.encoder.items()}
    for number, predictor in enumerate(trained.predictors):
        state |= {f"predictors.{number}.{name}": value for name, value in predictor.items()}
    return state | {f"head.{name}": value for name, value in (trained.head or {}).items()}


def _parts(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """encoder, head, predictors.0, … → their states; numbers have two digits here, so that names sort as they count"""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part in ("predictors", "special"):
            number, _, rest = rest.partition(".")
            part = f"{part}.{number:0>2}"
        parts.setdefault(part, {})[rest] = value
    return parts


def _foreign_names(state: Mapping[str, Tensor]) -> list[str]:
    """Names of weights that belong to no part of our models, such as an additional head."""
    return [name for name in state if name.partition(".")[0] not in ("encoder", "head", "predictors", "special")]


def _numbered(parts: Mapping[str, dict[str, Tensor]], prefix: str) -> list[dict[str, Tensor]]:
    return [parts[name] for name in sorted(parts) if name.startswith(prefix)]


def is_of_fit(content: Any) -> bool:
    """Whether a file of torch holds what Lightning saves of a module with settings."""
    return isinstance(content, dict) and "state_dict" in content and "hyper_parameters" in content


def verify(path: Path) -> None:
    """Compare every byte of a checkpoint with its checksums, once for each state of the file.

    Args:
        path: Checkpoint; a file that is no zip archive has no checksums.

    Raises:
        UserError: A byte is not as it was written.
    """
    if path.is_file() and zipfile.is_zipfile(path):
        state = path.stat()
        if not _is_whole(path, state.st_ino, state.st_size, state.st_mtime_ns):
            raise UserError(f"{path}: damaged, some bytes are not as they were written; take another checkpoint")


@lru_cache(maxsize=16)
def _is_whole(path: Path, *state: int) -> bool:
    return is_whole_zip(path)


def read_checkpoint(path: Path, map_location: str | Callable = "cpu") -> dict[str, Any]:
    """What `hubert fit` saved, its tensors mapped from the file; nothing in it is executed.

    Args:
        path: Path of the checkpoint.
        map_location: As of `torch.load`.

    Raises:
        UserError: The file is damaged, or no checkpoint of a fit.
    """
    verify(path)
    checkpoint = read_torch(path, map_location=map_location)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path} holds no state_dict, so it is not a checkpoint of a fit; give a .ckpt of `hubert fit`")
    return checkpoint


def save_tensors(content: Any, file: BinaryIO) -> None:
    """`torch.save`, which says of a full disk that it is full."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # which torch makes another of
            raise error.__context__ from None
        raise
