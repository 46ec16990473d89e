"""Weights that somebody trained: `load_encoder` opens our checkpoints and directories of transformers."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hubert_lightning.model.hubert import KERNELS, STRIDES, EncoderConfig, HubertEncoder

WHAT_WE_OPEN = "a .ckpt of `hubert fit`, or a directory in which transformers saved a HubertModel or HubertForCTC"


def load_encoder(path: Path | str) -> HubertEncoder:
    """A trained encoder in eval mode, on the CPU.

    path: `.ckpt` of pre-training or fine-tuning, or a directory that `save_pretrained` of transformers wrote
    """
    path = Path(path)
    config = encoder_config(path)
    weights = _transformers_weights(path, config) if path.is_dir() else _checkpoint_weights(path)
    with torch.device("meta"):  # no time, and no random numbers, for weights that are replaced at once
        encoder = HubertEncoder(config)
    _check_weights(path, {name: value.shape for name, value in encoder.state_dict().items()}, weights)
    # Copies: a mapped file may be overwritten by the next checkpoint while we live
    encoder.load_state_dict({name: value.float().clone() for name, value in weights.items()}, assign=True)
    return encoder.eval()


def encoder_config(path: Path | str) -> EncoderConfig:
    """The size of the encoder that `load_encoder` would open, without its weights."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give {WHAT_WE_OPEN}")
    if path.is_dir():
        for name in ("config.json", "model.safetensors"):
            if not (path / name).exists():
                raise ValueError(f"{path} has no {name}; open the model in transformers and save_pretrained() it")
        return _transformers_config(path)
    settings = read_checkpoint(path).get("hyper_parameters", {}).get("encoder")
    if not isinstance(settings, dict):
        raise ValueError(f"{path} does not say how large its encoder is; give {WHAT_WE_OPEN}")
    unknown = settings.keys() - {field.name for field in fields(EncoderConfig)}
    if unknown:
        raise ValueError(f"{path} has encoder settings we do not know ({_some(unknown)}); open it with its own version")
    return EncoderConfig(**settings)


def load_head(path: Path | str) -> nn.Linear:
    """The linear layer that spells, of a fine-tuned model; its rows are in the order of the model's own tokens.

    path: `.ckpt` of fine-tuning, or a directory in which transformers saved a HubertForCTC

    Raises:
        ValueError: The model has none, since it was not fine-tuned.
    """
    path = Path(path)
    state = _safetensors(path) if path.is_dir() else read_checkpoint(path)["state_dict"]
    prefix = "lm_head" if path.is_dir() else "head"
    if f"{prefix}.weight" not in state or f"{prefix}.bias" not in state:
        raise ValueError(f"{path} has no head that spells letters; give a model that was fine-tuned with CTC")
    weight, bias = (state[f"{prefix}.{part}"].float().clone() for part in ("weight", "bias"))
    head = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    head.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return head.eval()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `hubert fit` saved, its tensors mapped from the file; nothing in it is executed.

    Raises:
        ValueError: The file is damaged, or no checkpoint of a fit.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path} is damaged, or no checkpoint that opens safely; give {WHAT_WE_OPEN}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} holds no state_dict, so it is not a checkpoint of a fit; give {WHAT_WE_OPEN}")
    return checkpoint


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


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a transformers HubertModel under our names."""
    renamed = {}
    for name, value in state.items():
        for pattern, ours in _NAMES:
            name = re.sub(pattern, ours, name)
        renamed[name] = value
    for query in [name for name in renamed if ".attention.q_proj." in name]:
        parts = [query, query.replace("q_proj", "k_proj"), query.replace("q_proj", "v_proj")]
        if all(part in renamed for part in parts):  # one that is missing is reported under its own name
            joined = torch.cat([renamed.pop(part) for part in parts])
            renamed[query.replace("attention.q_proj", "query_key_value")] = joined
    return renamed


_NAMES = (
    (r"^masked_spec_embed$", "mask_embedding"),
    (r"^feature_extractor\.conv_layers\.(\d)\.layer_norm\.", r"convolutions.\1.norm."),
    (r"^feature_extractor\.conv_layers\.", "convolutions."),
    (r"^feature_projection\.layer_norm\.", "local_norm."),
    (r"^feature_projection\.projection\.", "projection."),
    (r"^encoder\.pos_conv_embed\.", "positions."),
    (r"^positions\.conv\.weight_g$", "positions.conv.parametrizations.weight.original0"),  # torch before 2.0
    (r"^positions\.conv\.weight_v$", "positions.conv.parametrizations.weight.original1"),
    (r"^encoder\.layer_norm\.", "norm."),
    (r"^encoder\.layers\.(\d+)\.layer_norm\.", r"layers.\1.attention_norm."),
    (r"^encoder\.layers\.(\d+)\.attention\.out_proj\.", r"layers.\1.attention_output."),
    (r"^encoder\.layers\.(\d+)\.feed_forward\.intermediate_dense\.", r"layers.\1.ffn_input."),
    (r"^encoder\.layers\.(\d+)\.feed_forward\.output_dense\.", r"layers.\1.ffn_output."),
    (r"^encoder\.layers\.(\d+)\.final_layer_norm\.", r"layers.\1.ffn_norm."),
    (r"^encoder\.layers\.", "layers."),
)


def _checkpoint_weights(path: Path) -> dict[str, Tensor]:
    prefix = "encoder."
    state = read_checkpoint(path)["state_dict"].items()
    return {name.removeprefix(prefix): value for name, value in state if name.startswith(prefix)}


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{path / 'model.safetensors'} is damaged ({error}); copy or download it again") from error


def _transformers_weights(path: Path, config: EncoderConfig) -> dict[str, Tensor]:
    state = _safetensors(path)
    prefix = "hubert."  # of the encoder in HubertForCTC, next to its head
    if any(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    # transformers leaves the mask embedding out where a model was configured without masking
    return {"mask_embedding": torch.zeros(config.dim), **from_transformers(state)}


def _transformers_config(path: Path) -> EncoderConfig:
    file = path / "config.json"
    theirs = read_json(file)
    if theirs.get("model_type") != "hubert":
        raise ValueError(f"{file} describes a model of type {theirs.get('model_type')!r}, not 'hubert'; give a HuBERT")
    required = ["conv_dim", "conv_kernel", "conv_stride", "feat_extract_norm", *_SETTINGS.values()]
    absent = [name for name in required if name not in theirs]
    if absent:
        raise ValueError(f"{file} lacks {_some(absent)}; open the model in transformers and save_pretrained() it")
    channels = theirs["conv_dim"][0]
    supported = {"conv_kernel": list(KERNELS), "conv_stride": list(STRIDES), "conv_dim": [channels] * len(KERNELS)}
    for name, value in (supported | _FIXED).items():
        if theirs.get(name, value) != value:
            raise ValueError(
                f"{file} sets {name} to {theirs[name]}; this encoder only knows {value}, so it cannot be used"
            )
    norm = theirs["feat_extract_norm"]
    if norm not in ("group", "layer"):
        raise ValueError(f"{file} sets feat_extract_norm to {norm}; this encoder only knows 'group' and 'layer'")
    preprocessor = path / "preprocessor_config.json"
    normalize = read_json(preprocessor).get("do_normalize") if preprocessor.exists() else None
    return EncoderConfig(
        conv_channels=channels,
        conv_norm=norm,
        normalize_waveform=norm == "layer" if normalize is None else normalize,
        feature_grad_mult=0.1
        if norm == "group"
        else 1.0,  # not in their files: what fairseq trained Base and Large with
        **{ours: theirs[name] for ours, name in _SETTINGS.items()},
    )


_SETTINGS = {
    "conv_bias": "conv_bias",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "pre_norm": "do_stable_layer_norm",
    "pos_kernel": "num_conv_pos_embeddings",
    "pos_groups": "num_conv_pos_embedding_groups",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "input_dropout": "feat_proj_dropout",
    "layer_drop": "layerdrop",
}
_FIXED = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "feat_proj_layer_norm": True,
    "layer_norm_eps": 1e-5,
    "conv_pos_batch_norm": False,
    "adapter_attn_dim": None,
}


def read_json(file: Path) -> dict[str, Any]:
    """The settings in a file of a transformers directory."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no settings; copy or download it again")
    return content


def _check_weights(path: Path, expected: Mapping[str, torch.Size], weights: Mapping[str, Tensor]) -> None:
    if missing := expected.keys() - weights.keys():
        raise ValueError(f"{path} lacks weights of the encoder ({_some(missing)}); give {WHAT_WE_OPEN}")
    if unexpected := weights.keys() - expected.keys():
        raise ValueError(
            f"{path} has weights that this encoder has no place for ({_some(unexpected)}); give a plain HuBERT"
        )
    for name, shape in expected.items():
        if weights[name].shape != shape:
            found, wanted = tuple(weights[name].shape), tuple(shape)
            raise ValueError(
                f"{path}: {name} has shape {found}, but its settings ask for {wanted}; one of the two is wrong"
            )


def _some(names: Any) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first
