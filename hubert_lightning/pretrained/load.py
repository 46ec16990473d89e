"""Pre-trained weights of any format, which is recognised from the content."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.checkpoint_source import CheckpointSource, open_source
from hubert_lightning.pretrained.formats import FORMATS, Format
from hubert_lightning.pretrained.speech_encoder import EncoderSize, SpeechEncoder
from hubert_lightning.pretrained.teacher_config import has_config
from hubert_lightning.pretrained.transformers_encoder import (
    TransformersEncoder,
    check_transformers_encoder,
    load_transformers_encoder,
)
from hubert_lightning.pretrained.weights import OtherArchitecture, PretrainedWeights, abbreviated, build_encoder

SUPPORTED_MODELS = (
    "a .ckpt of `hubert fit`, a folder of `hubert export`, a directory or hub name of transformers, a checkpoint of "
    "fairseq or s3prl, or a state dict of torchaudio"
)
WEIGHT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
COMPANION_FILE = "hubert_lightning.safetensors"
"""File in an export to another system that keeps the parts which that system's format lacks."""
KMEANS_FILE = "kmeans.safetensors"
"""K-means of a layer, which may lie in an export for `hubert units`."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_encoder(path: Path | str) -> SpeechEncoder:
    """Load a speech encoder in eval mode, on the CPU.

    Args:
        path: Model as in `read_weights`, or a directory or hub name of another speech encoder of transformers.

    Returns:
        A HubertEncoder, or a TransformersEncoder for another architecture.

    Raises:
        UserError: The file is missing, corrupt or unsafe, or holds no speech encoder.
    """
    location = located(path)
    try:
        return build_encoder(read_weights(location), Path(path))
    except OtherArchitecture:
        if not has_config(location):
            raise
        return load_transformers_encoder(location)


def load_hubert(path: Path | str) -> HubertEncoder:
    """Load a HuBERT in eval mode, on the CPU, for what other speech encoders cannot do, such as training.

    Args:
        path: Model as in `read_weights`.

    Raises:
        UserError: The file is missing, corrupt or unsafe, or holds no HuBERT.
    """
    return build_encoder(read_weights(path), Path(path))


def encoder_config(path: Path | str) -> EncoderConfig:
    """Return the size of the encoder that `load_hubert` loads."""
    return read_weights(path).config


def encoder_size(path: Path | str) -> EncoderSize:
    """Return the width and the number of layers of the encoder that `load_encoder` loads, after all of its checks."""
    location = located(path)
    try:
        return read_weights(location).config
    except OtherArchitecture:
        if not has_config(location):
            raise
        return check_transformers_encoder(location)


def read_weights(path: Path | str, num_heads: int | None = None) -> PretrainedWeights:
    """Read an encoder and its heads.

    Args:
        path: A `.ckpt` of pre-training or fine-tuning; a `.safetensors` file or folder of `hubert export`; a directory
            of transformers, or its name on the Hugging Face hub; a checkpoint of fairseq, or one that s3prl converted;
            a state dict of torchaudio, or a checkpoint of its recipes.
        num_heads: Attention heads, for a format that does not state them and a size that was not released.

    Raises:
        UserError: The file is missing, corrupt or unsafe, or holds no HuBERT.
    """
    location = located(path)
    try:
        weights = _read(location, num_heads)
    except (AttributeError, TypeError, LookupError, RecursionError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserError(f"{path} holds something that such a model never has ({reason}); copy it again") from error
    if num_heads not in (None, weights.config.num_heads):
        raise UserError(f"{path} states {weights.config.num_heads} attention heads, not {num_heads}; leave it out")
    return weights


def _read(location: Path, num_heads: int | None) -> PretrainedWeights:
    companion = None
    if (location / COMPANION_FILE).exists():
        companion = FORMATS["safetensors"].read(open_source(location / COMPANION_FILE, _is_foreign))
    source = open_source(location, _is_foreign, companion)
    format = _format_of(source)
    if format is None and location.is_dir():
        source = open_source(_single_file(location), _is_foreign, companion)
        format = _format_of(source)
        num_heads = num_heads if companion is None else companion.config.num_heads
    if format is None:
        raise UserError(f"{source.path} holds no HuBERT; give {SUPPORTED_MODELS}")
    weights = format.read(source, num_heads)
    _check(weights, source.path)
    return weights if companion is None else _with_companion(weights, companion)


def _format_of(source: CheckpointSource) -> Format | None:
    return next((format for format in FORMATS.values() if format.matches(source)), None)


def _is_foreign(state: Mapping[str, object]) -> bool:
    return any(format.has_names(state) for format in FORMATS.values())


def _single_file(folder: Path) -> Path:
    """Find the one file of weights in a folder."""
    beside = (COMPANION_FILE, KMEANS_FILE)
    files = [file for file in sorted(folder.iterdir()) if file.suffix in WEIGHT_SUFFIXES and file.name not in beside]
    if not files and [*folder.glob("*.onnx")]:
        raise UserError(f"{folder} holds an ONNX graph, which cannot be read back; give the model that it was made of")
    if len(files) != 1:
        raise UserError(
            f"{folder} has no config.json, and {len(files)} files of weights; give one of those, or {SUPPORTED_MODELS}"
        )
    return files[0]


def _check(weights: PretrainedWeights, path: Path) -> None:
    """Check that weights are tensors, and that the CTC head fits the encoder."""
    head = weights.head or {}
    intermediate = [state for states in weights.intermediate_predictors.values() for state in states]
    parts = [weights.encoder, *weights.predictors, *intermediate, head]
    if wrong := [str(name) for part in parts for name, value in part.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path} holds something else than weights ({abbreviated(wrong)}); copy or download it again")
    weight, dim = head.get("weight"), weights.config.dim
    if weight is not None and weight.dim() == 2 and weight.shape[1] != dim:
        raise UserError(
            f"{path} has a CTC head of width {weight.shape[1]}, and an encoder of width {dim}; one of the two is "
            "another model's"
        )


def _with_companion(weights: PretrainedWeights, companion: PretrainedWeights) -> PretrainedWeights:
    """Add the parts that an export keeps beside another system's file, whose weights may have been trained further."""
    head, vocabulary = weights.head, weights.vocabulary
    if head is not None and companion.vocabulary is not None:
        names = companion.vocabulary.search_names
        exported_names = names if vocabulary is None else vocabulary.search_names
        if exported_names[1:] == names[1:] and len(head["weight"]) == len(names):
            vocabulary = companion.vocabulary
    settings = {**companion.provenance.get("settings", {}), **weights.provenance.get("settings", {})}
    return replace(
        weights,
        config=companion.config,
        encoder={**weights.encoder, **companion.encoder},
        predictors=weights.predictors or (companion.predictors if head is None else []),
        temperature=companion.temperature,
        vocabulary=vocabulary,
        special_codewords=weights.special_codewords or (companion.special_codewords if head is None else []),
        provenance={**companion.provenance, "settings": settings},
        notes=[],
        vocabulary_note=None,
    )


def located(path: Path | str) -> Path:
    """Find a model on this machine; download it from the Hugging Face hub if it is not in the cache.

    Args:
        path: Path of a file or folder, or a hub name.

    Raises:
        UserError: The model is neither here nor on the hub.
    """
    if Path(path).exists():
        return Path(path)
    if not is_hub_name(path):
        raise UserError(f"{path} does not exist; give {SUPPORTED_MODELS}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    settings = ["*.json", COMPANION_FILE, KMEANS_FILE]
    new, old = ["model*.safetensors"], ["pytorch_model*.bin"]
    try:
        folder = Path(snapshot_download(str(path), allow_patterns=settings + new))
        if not [*folder.glob("model*.safetensors")]:
            folder = Path(snapshot_download(str(path), allow_patterns=settings + old))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{path} does not exist here, and the Hugging Face hub did not send it ({reason}); give {SUPPORTED_MODELS}"
        ) from error
    return folder


def is_hub_name(path: Path | str) -> bool:
    """Tell whether a path that does not exist may name a model on the hub, and is no mistyped file."""
    is_name = HUB_NAME.fullmatch(str(path)) is not None and Path(path).suffix not in WEIGHT_SUFFIXES
    return is_name and not Path(path).parent.exists()


def encoder_fingerprint(encoder: SpeechEncoder) -> str:
    """Compute a short name that encoders share only if they compute the same features."""
    if isinstance(encoder, TransformersEncoder):
        return encoder.fingerprint
    assert isinstance(encoder, HubertEncoder)
    training_only = {"dropout", "attention_dropout", "activation_dropout", "input_dropout", "layer_drop"}
    training_only.add("feature_grad_mult")
    if not encoder.config.position_buckets:  # encoders from before there was a choice keep their fingerprints
        training_only |= {"position_buckets", "position_distance"}
    if not encoder.config.pos_batch_norm:
        training_only.add("pos_batch_norm")
    shape = {name: value for name, value in asdict(encoder.config).items() if name not in training_only}
    for name in ("conv_kernels", "conv_strides"):
        if shape[name] == getattr(EncoderConfig, name):  # earlier versions had no others
            del shape[name]
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
