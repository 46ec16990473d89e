"""Files of this package: the `.ckpt` of a fit, and a safetensors file with the same content."""

import json
import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.pretrained.checkpoint_source import CheckpointSource
from hubert_lightning.pretrained.foreign_weights import omission_notes
from hubert_lightning.pretrained.weights import Export, PretrainedWeights, encoder_config_from
from hubert_lightning.untrusted.file_kind import is_whole_zip
from hubert_lightning.untrusted.json_file import parse_json
from hubert_lightning.untrusted.torch_file import read_torch

METADATA_KEY = "hubert_lightning"
"""Entry of a safetensors file's metadata that holds, as JSON, everything that is no tensor."""
OWN_PARTS = ("encoder", "head", "predictors", "special", "intermediate_predictors")
"""Parts of a state that our models have; the predictors of intermediate layers only serve their own training."""


def has_names(state: Mapping[str, object]) -> bool:
    """Return False: our files are recognised by their other entries."""
    return False


def matches(source: CheckpointSource) -> bool:
    """Tell whether a file is one of `hubert fit`, `import`, `average` or `export --format safetensors`."""
    content = source.content
    if METADATA_KEY in source.metadata:
        return True
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters"} <= content.keys():
        return False
    # Lightning saves modules with other systems' names, too
    return not source.state or not source.state.keys() <= content["state_dict"].keys()


def read(source: CheckpointSource, num_heads: int | None = None) -> PretrainedWeights:
    """Read one of our files.

    Args:
        source: File.
        num_heads: Ignored; our files state their heads.

    Raises:
        UserError: The file is corrupt.
    """
    if METADATA_KEY in source.metadata:
        return _from_safetensors(source)
    verify(source.path)
    return _from_checkpoint(source.path, source.content)


def write(weights: PretrainedWeights) -> Export:
    """Write everything into one safetensors file."""
    return Export({"model.safetensors": to_safetensors(weights)})


def _from_checkpoint(path: Path, content: Mapping[str, Any]) -> PretrainedWeights:
    settings = content.get("hyper_parameters") or {}
    parts = _parts(content["state_dict"])
    imported = content.get("imported") or {}
    weights = PretrainedWeights(
        encoder_config_from(settings.get("encoder"), path),
        parts.pop("encoder", {}),
        _numbered(parts, "predictors."),
        float(settings.get("temperature", 0.1)),
        parts.get("head"),
        special_codewords=imported.get("special", ()),
        provenance={name: value for name, value in imported.items() if name != "special"},
        notes=omission_notes(_foreign_names(content["state_dict"])),
        intermediate_predictors=_by_layer(parts.get("intermediate_predictors", {})),
    )
    # Checkpoints from before there was a choice have LibriSpeech's letters, which are the default
    return weights.with_vocabulary(settings.get("vocabulary") or {}) if "head" in parts else weights


def _from_safetensors(source: CheckpointSource) -> PretrainedWeights:
    path = source.path
    try:
        about = parse_json(source.metadata[METADATA_KEY])
        config, temperature = about["encoder"], float(about["temperature"])
        vocabulary, provenance = about["vocabulary"], dict(about["source"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe its weights; export the model again") from error
    parts = _parts(source.content)
    weights = PretrainedWeights(
        encoder_config_from(config, path),
        parts.get("encoder", {}),
        _numbered(parts, "predictors."),
        temperature,
        parts.get("head"),
        special_codewords=[rows["weight"] for rows in _numbered(parts, "special.")],
        provenance=provenance,
        notes=omission_notes(_foreign_names(source.content)),
    )
    return weights if vocabulary is None else weights.with_vocabulary(vocabulary)


def to_safetensors(weights: PretrainedWeights) -> bytes:
    """Serialise weights and settings under our names."""
    special = {f"special.{number}.weight": rows for number, rows in enumerate(weights.special_codewords)}
    about = {
        "encoder": vars(weights.config),
        "temperature": weights.temperature,
        "vocabulary": None if weights.vocabulary is None else weights.vocabulary.settings(),
        "source": dict(weights.provenance),
    }
    tensors = {name: value.contiguous() for name, value in (to_state(weights) | special).items()}
    return save(tensors, metadata={METADATA_KEY: json.dumps(about, sort_keys=True, ensure_ascii=False)})


def to_state(weights: PretrainedWeights) -> dict[str, Tensor]:
    """Return the state of the task that trains such weights: HubertPretraining or CTCFinetuning."""
    state = {f"encoder.{name}": value for name, value in weights.encoder.items()}
    for number, predictor in enumerate(weights.predictors):
        state |= {f"predictors.{number}.{name}": value for name, value in predictor.items()}
    return state | {f"head.{name}": value for name, value in (weights.head or {}).items()}


def _parts(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split a state: encoder, head, predictors.00, … → their states. Two digits sort as numbers do."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part in ("predictors", "special"):
            number, _, rest = rest.partition(".")
            part = f"{part}.{number:0>2}"
        parts.setdefault(part, {})[rest] = value
    return parts


def _foreign_names(state: Mapping[str, Tensor]) -> list[str]:
    """List weights that belong to no part of our models, such as an additional head."""
    return [name for name in state if name.partition(".")[0] not in OWN_PARTS]


def _numbered(parts: Mapping[str, dict[str, Tensor]], prefix: str) -> list[dict[str, Tensor]]:
    return [parts[name] for name in sorted(parts) if name.startswith(prefix)]


def _by_layer(state: Mapping[str, Tensor]) -> dict[str, list[dict[str, Tensor]]]:
    """Split the state of intermediate predictors, named layer.stream.part, by layer and stream."""
    layers: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, value in state.items():
        layer, _, rest = name.partition(".")
        stream, _, part = rest.partition(".")
        layers.setdefault(layer, {}).setdefault(f"{stream:0>2}", {})[part] = value
    return {layer: [streams[stream] for stream in sorted(streams)] for layer, streams in layers.items()}


def verify(path: Path) -> None:
    """Compare every byte of a checkpoint with its checksums, once for each state of the file.

    Args:
        path: Checkpoint; a file that is no zip archive has no checksums.

    Raises:
        UserError: A byte differs from what was written.
    """
    if path.is_file() and zipfile.is_zipfile(path):
        status = path.stat()
        if not _is_whole(path, status.st_ino, status.st_size, status.st_mtime_ns):
            raise UserError(f"{path}: corrupt, some bytes differ from what was written; take another checkpoint")


@lru_cache(maxsize=16)
def _is_whole(path: Path, *status: int) -> bool:
    return is_whole_zip(path)


def read_checkpoint(path: Path, map_location: str | Callable[..., Any] = "cpu") -> dict[str, Any]:
    """Read a checkpoint of `hubert fit`, its tensors mapped from the file; nothing in it is executed.

    Args:
        path: Path of the checkpoint.
        map_location: Device of the tensors, as in `torch.load`.

    Raises:
        UserError: The file is corrupt, or no checkpoint of a fit.
    """
    verify(path)
    checkpoint = read_torch(path, map_location=map_location)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path} holds no state_dict, so it is not a checkpoint of a fit; give a .ckpt of `hubert fit`")
    return checkpoint


def save_tensors(content: object, file: BinaryIO) -> None:
    """Call `torch.save`, and raise the error of a full disk as an OSError.

    Raises:
        OSError: The disk is full, or cannot be written to; torch makes a RuntimeError of it.
    """
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
