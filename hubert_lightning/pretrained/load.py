"""Weights that somebody trained, in any format: `load_encoder` tells which by looking."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.formats import fairseq, own, torchaudio, transformers
from hubert_lightning.pretrained.weights import (
    TRAINING,
    Trained,
    encoder_of,
    summary_of,
    tokens_with_boundary,
    trained_with,
)
from hubert_lightning.untrusted.file_kind import is_safetensors
from hubert_lightning.untrusted.torch_file import read_torch

WHAT_WE_OPEN = (
    "a .ckpt of `hubert fit`, a folder of `hubert export`, a directory or hub name of transformers, a checkpoint of "
    "fairseq or s3prl, or a state dict of torchaudio"
)
WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
REST = "hubert_lightning.safetensors"
"""In a folder of another system's format: what that format has no place for."""
KMEANS = "kmeans.safetensors"  # of units, which may lie in a folder, too
BESIDE = (REST, KMEANS)
STATES = ("state_dict", "model_state_dict", "model", "module", "net", "weights")
"""Keys under which training scripts save the state of a model, the usual ones first."""
MAX_DEPTH = 4  # dicts around each other in which a state is looked for
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_encoder(path: Path | str) -> HubertEncoder:
    """A trained encoder in eval mode, on the CPU.

    path: whatever `read_trained` opens

    Raises:
        UserError: There is no such file, or it is damaged, unsafe, or no HuBERT.
    """
    return encoder_of(read_trained(path), Path(path))


def head_of(trained: Trained, path: Path | str) -> dict[str, Tensor]:
    """The state of the layer that spells, of a fine-tuned model.

    Raises:
        UserError: The model has none, since it was not fine-tuned.
    """
    if trained.head is None or trained.head.keys() != {"weight", "bias"}:
        raise UserError(f"{path} has no head that spells letters; give a model that was fine-tuned with CTC")
    return trained.head


def no_letters(path: Path | str, rows: int) -> str:
    """What to say of a layer whose tokens nobody told."""
    return (
        f"{path} does not say what its {rows} tokens are; put its tokenizer's vocab.json into the directory, fairseq's "
        "dict.ltr.txt beside it, or a vocabulary as of `hubert vocabulary` into `hubert import --vocabulary`"
    )


def encoder_config(path: Path | str) -> EncoderConfig:
    """The size of the encoder that `load_encoder` would open."""
    found = located(path)
    if found.is_dir() and (found / transformers.CONFIG).exists():
        return transformers.read_config(found)
    return read_trained(found).config


def read_trained(path: Path | str, num_heads: int | None = None) -> Trained:
    """An encoder and its heads, in whichever format they are.

    path:      `.ckpt` of pre-training or fine-tuning, `.safetensors` or a folder of `hubert export`; a directory that
               transformers saved, or its name on the Hugging Face hub; a checkpoint of fairseq, or one that s3prl
               converted; a state dict of torchaudio or a checkpoint of its recipes
    num_heads: that attend, where a format does not say and it is not a released size

    Raises:
        UserError: There is no such file, or it is damaged, unsafe, or no HuBERT.
    """
    found = located(path)
    try:
        trained = _of_folder(found, num_heads) if found.is_dir() else _of_file(found, num_heads)
    except (AttributeError, TypeError, LookupError, RecursionError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserError(f"{path} holds something that no model of its kind has ({said}); get it again") from error
    heads = [trained.encoder, *trained.predictors, trained.head or {}]
    if other_values := [str(name) for part in heads for name, value in part.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path} holds something else than weights ({summary_of(other_values)}); get it again")
    weight, dim = (trained.head or {}).get("weight"), trained.config.dim
    if weight is not None and weight.dim() == 2 and weight.shape[1] != dim:
        raise UserError(
            f"{path} has a layer that spells from {weight.shape[1]} channels, and an encoder of {dim}; one of the two "
            "is another model's"
        )
    if num_heads not in (None, trained.config.num_heads):
        raise UserError(f"{path} says that {trained.config.num_heads} heads attend, not {num_heads}; leave it out")
    return trained


def _of_file(found: Path, num_heads: int | None) -> Trained:
    tensors: Mapping[str, Any]
    if is_safetensors(found):
        tensors, metadata = own.read_safetensors(found)
        if own.KEY in metadata:
            return own.of_safetensors(found, tensors, metadata)
    else:
        content = read_torch(found)
        if own.is_of_fit(content) and not _is_foreign(content["state_dict"]):
            own.verify(found)
            return own.of_fit(found, content)
        if fairseq.is_fairseq(content) and not torchaudio.is_state(content["model"]):
            return fairseq.with_settings(found, fairseq.read(found, content, num_heads), content)
        if fairseq.is_s3prl(content):
            return fairseq.with_settings(found, fairseq.read_s3prl(found, content, num_heads), content)
        tensors, notes = _state_in(content)
        trained = _of_state(found, tensors, num_heads)
        return trained._replace(notes=[*trained.notes, *notes])
    return _of_state(found, tensors, num_heads)


def _state_in(content: Any) -> tuple[Mapping[str, Any], list[str]]:
    """The state dict in a file, which may lie in a dict under any key, with others such as that of an optimizer.

    Args:
        content: Content of the file.

    Returns:
        The state, or an empty one if there is none, and a sentence on other states beside it, if there are any.
    """
    if isinstance(content, dict) and not isinstance(content.get("state_dict", {}), dict):
        raise TypeError(f"a state_dict that is of type {type(content['state_dict']).__name__}")
    depth = [("", content)]
    seen: set[int] = set()
    for _ in range(MAX_DEPTH):
        dicts = [(key, inner) for key, inner in depth if isinstance(inner, dict) and id(inner) not in seen]
        seen |= {id(inner) for _, inner in dicts}
        if states := [(key, inner) for key, inner in dicts if _is_foreign(inner)]:
            states.sort(key=lambda pair: STATES.index(pair[0]) if pair[0] in STATES else len(STATES))
            (taken, state), *others = states
            names = ", ".join(key for key, _ in others)
            return state, [
                f"it has several states, of which that under {taken} is taken: not {names}"
            ] if others else []
        depth = [(str(key), inner) for _, outer in dicts for key, inner in outer.items()]
    return {}, []


def _is_foreign(state: Any) -> bool:
    """Whether a dict holds the weights of an encoder under the names of another system."""
    if not isinstance(state, dict):
        return False
    names = [name for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)]
    dialects = (fairseq.DIALECT.projection, transformers.DIALECT.projection)
    return torchaudio.is_state(dict.fromkeys(names)) or any(
        name == f"{part}.weight" or name.endswith(f".{part}.weight") for name in names for part in dialects
    )


def located(path: Path | str) -> Path:
    """Where a model is on this machine; one on the Hugging Face hub is downloaded, unless it was before.

    Raises:
        UserError: It is nowhere.
    """
    if Path(path).exists():
        return Path(path)
    if not is_hub_name(path):
        raise UserError(f"{path} does not exist; give {WHAT_WE_OPEN}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    settings, new, old = ["*.json"], ["model*.safetensors"], ["pytorch_model*.bin"]
    try:
        folder = Path(snapshot_download(str(path), allow_patterns=settings + new))
        if not [*folder.glob("*.safetensors")]:
            folder = Path(snapshot_download(str(path), allow_patterns=settings + old))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{path} does not exist here, nor could it be had from the Hugging Face hub ({reason}); give {WHAT_WE_OPEN}"
        ) from error
    return folder


def is_hub_name(path: Path | str) -> bool:
    """Whether what does not exist here may be the name of a model on the hub, not that of a file that was mistyped."""
    named = HUB_NAME.fullmatch(str(path)) is not None and Path(path).suffix not in WEIGHTS
    return named and not Path(path).parent.exists()


def encoder_fingerprint(encoder: HubertEncoder) -> str:
    """A short name that encoders share only if they compute the same features."""
    training_only = {"dropout", "attention_dropout", "activation_dropout", "input_dropout", "layer_drop"}
    training_only.add("feature_grad_mult")
    shape = {name: value for name, value in asdict(encoder.config).items() if name not in training_only}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _of_folder(folder: Path, num_heads: int | None) -> Trained:
    rest = None
    if (folder / REST).exists():
        rest = own.of_safetensors(folder / REST, *own.read_safetensors(folder / REST))
    if (folder / transformers.CONFIG).exists():
        theirs = transformers.with_settings(folder, transformers.read(folder))
    else:
        inside = [file for file in sorted(folder.iterdir()) if file.suffix in WEIGHTS and file.name not in BESIDE]
        if not inside and [*folder.glob("*.onnx")]:
            raise UserError(f"{folder} holds an ONNX graph, which nothing is read back from; give what it was made of")
        if len(inside) != 1:
            raise UserError(
                f"{folder} has no {transformers.CONFIG}, and {len(inside)} files of weights; give one of those, or "
                f"{WHAT_WE_OPEN}"
            )
        theirs = read_trained(inside[0], rest.config.num_heads if rest else num_heads)
    return theirs if rest is None else _completed(theirs, rest)


def _of_state(path: Path, state: Mapping[str, Any], num_heads: int | None) -> Trained:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if torchaudio.is_state(tensors):
        return torchaudio.with_settings(path, torchaudio.read(path, tensors, num_heads))
    if any(name.endswith("post_extract_proj.weight") for name in tensors):
        trained = fairseq.of_state(path, tensors, num_heads)
        released = TRAINING[trained.config.conv_norm]
        return trained._replace(config=trained_with(trained.config, released, path))
    if any(name.endswith(f"{transformers.DIALECT.positions}.bias") for name in tensors):
        raise UserError(f"{path} holds weights of transformers without settings; give a directory with its config.json")
    raise UserError(f"{path} holds no HuBERT; give {WHAT_WE_OPEN}")


def _completed(theirs: Trained, rest: Trained) -> Trained:
    """What a folder's own format holds, which may have been trained on since, and the rest of what was exported."""
    encoder = theirs.encoder | rest.encoder
    head, vocabulary = theirs.head, theirs.vocabulary
    if head is not None and rest.vocabulary is not None:
        tokens = tokens_with_boundary(rest.vocabulary)
        of_theirs = tokens if vocabulary is None else tokens_with_boundary(vocabulary)
        if [*of_theirs] == fairseq.rows_of(tokens)[0] and len(head["weight"]) == len(of_theirs):
            head, of_theirs = fairseq.in_order_of(tokens, head), tokens
        if [*of_theirs[1:]] == [*tokens[1:]] and len(head["weight"]) == len(tokens):
            vocabulary = rest.vocabulary
    return theirs._replace(
        config=rest.config,
        encoder=encoder,
        predictors=theirs.predictors or (rest.predictors if head is None else []),
        temperature=rest.temperature,
        head=head,
        vocabulary=vocabulary,
        special=theirs.special or (rest.special if head is None else []),
        source={**rest.source, "settings": {**rest.source.get("settings", {}), **theirs.source.get("settings", {})}},
        notes=[],
        vocabulary_note=None,
    )
