"""fairseq's settings of a model and its task, and ours."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.pretrained.foreign_weights import (
    RELEASED_REGULARISATION,
    attention_heads,
    config_from_shapes,
    foreign_settings,
    strides_of,
)
from hubert_lightning.pretrained.weights import PretrainedWeights, encoder_config_from

Settings = Mapping[str, Any]  # JSON values by fairseq's names

SETTINGS = {
    "num_layers": "encoder_layers",
    "dim": "encoder_embed_dim",
    "ffn_dim": "encoder_ffn_embed_dim",
    "num_heads": "encoder_attention_heads",
    "pre_norm": "layer_norm_first",
    "conv_bias": "conv_bias",
    "pos_kernel": "conv_pos",
    "pos_groups": "conv_pos_groups",
    "pos_batch_norm": "conv_pos_batch_norm",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "input_dropout": "dropout_input",
    "layer_drop": "encoder_layerdrop",
    "feature_grad_mult": "feature_grad_mult",
}
"""Argument of `EncoderConfig` → fairseq's name."""
RELATIVE_POSITIONS = "relative_positions.embedding.weight"
FIXED = {
    "activation_fn": "gelu",
    "layer_type": "transformer",
    "target_glu": False,
    "pos_conv_depth": 1,
}
"""Settings that have one value in every HuBERT."""
MASKS = (
    *("mask_prob", "mask_length", "mask_selection", "mask_other", "no_mask_overlap"),
    *("mask_channel_prob", "mask_channel_length", "mask_channel_selection", "mask_channel_other"),
    "no_mask_channel_overlap",
)
UNUSED_SETTINGS = {
    "model": (
        *MASKS,
        *("mask_min_space", "mask_channel_min_space", "dropout_features", "skip_masked", "skip_nomask", "latent_temp"),
        *("final_dim", "untie_final_proj", "required_seq_len_multiple", "checkpoint_activations", "max_positions"),
        *("pos_enc_type", "attn_type", "depthwise_conv_kernel_size", "fp16"),
    ),
    "task": ("label_rate", "max_sample_size", "min_sample_size", "max_keep_size", "min_keep_size", "random_crop")
    + ("pad_audio", "enable_padding"),
    "ctc": (*MASKS, "apply_mask", "final_dropout", "freeze_finetune_updates", "no_pretrained_weights"),
}
"""Part of fairseq's settings → those that this package has elsewhere (masks belong to the data) or not at all."""
# fairseq examples/hubert/config/pretrain: the same for Base, Large and X-Large; HubertConfig has mask_prob 0.65
RELEASED_MASKS = {
    **{"mask_prob": 0.8, "mask_length": 10, "mask_selection": "static", "mask_other": 0, "no_mask_overlap": False},
    **{"mask_channel_prob": 0.0, "skip_masked": False, "skip_nomask": False},
}
FINE_TUNING_SETTINGS = ("dropout", "attention_dropout", "activation_dropout", "dropout_input", "feature_grad_mult")
"""Settings of an encoder that fine-tuning replaces (fairseq models/hubert/hubert_asr.py: arg_overrides)."""
DEFAULTS = {
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "layer_norm_first": False,
    "conv_bias": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "conv_pos_batch_norm": False,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "dropout_input": 0.0,
    "encoder_layerdrop": 0.0,
    "feature_grad_mult": 1.0,
}
"""Defaults of fairseq's HubertConfig, for settings that a checkpoint lacks."""


def by_part(settings: Settings) -> dict[str, Any]:
    """Split settings into model and task; checkpoints of old keep both in one namespace."""
    return dict(settings) if not settings or "model" in settings else {"model": settings, "task": settings}


def describe_encoder(model: Settings) -> bool:
    """Tell whether a model's settings include those of its encoder, not only those of fine-tuning."""
    return any(SETTINGS[name] in model for name in ("num_layers", "dim", "ffn_dim", "num_heads", "pre_norm"))


def completed_settings(
    path: Path, encoder: Mapping[str, Tensor], model: Settings, task: Settings, num_heads: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Complete the settings of a checkpoint from its weights, and from the released model of its kind.

    Args:
        path: File that errors name.
        encoder: State of the encoder under our names.
        model: Settings of the model.
        task: Settings of the task.
        num_heads: Attention heads that the user gives.

    Returns:
        Settings of model and task.

    Raises:
        UserError: Weights are missing, or the number of heads is unknown.
    """
    sizes = config_from_shapes(encoder, path)
    shapes = {SETTINGS[name]: value for name, value in sizes.items() if name in SETTINGS}
    if describe_encoder(model):
        return shapes | dict(model), dict(task)
    is_large = sizes["conv_norm"] == "layer"
    released: dict[str, Any] = {
        SETTINGS[name]: value for name, value in RELEASED_REGULARISATION[sizes["conv_norm"]].items()
    }
    released |= {"layer_norm_first": is_large, "extractor_mode": "layer_norm" if is_large else "default"}
    released |= {"encoder_attention_heads": attention_heads(sizes["dim"], num_heads, path)}
    return shapes | released | dict(model), {"normalize": is_large} | dict(task)


def check_settings(path: Path, model: Settings, task: Settings) -> None:
    """Refuse settings of another encoder.

    Raises:
        UserError: A setting has a value that this encoder does not support.
    """
    layout = str(model.get("conv_feature_layers") or "")
    if re.sub(LAYOUT_PART, "", layout).strip(" +") or (layout and not _kernels_and_strides(layout)):
        raise UserError(
            f"{path} has convolutions {layout:.80}; give a layout such as [(512,10,5)] + [(512,3,2)] * 4 + "
            "[(512,2,2)] * 2"
        )
    for name, value in FIXED.items():
        if model.get(name, value) != value:
            raise UserError(f"{path} sets {name} to {model[name]}; this encoder only supports {value}")
    if (rate := task.get("sample_rate", SAMPLE_RATE)) != SAMPLE_RATE:
        raise UserError(f"{path} sets sample_rate to {rate}; this encoder only supports {SAMPLE_RATE} Hz")


def encoder_config(path: Path, encoder: Mapping[str, Tensor], model: Settings, task: Settings) -> EncoderConfig:
    """Translate settings of an encoder into ours.

    Args:
        path: File that errors name.
        encoder: State of the encoder under our names.
        model: Settings of the model.
        task: Settings of the task.
    """
    sizes = config_from_shapes(encoder, path)
    settings = {name: model.get(theirs, DEFAULTS[theirs]) for name, theirs in SETTINGS.items()}
    settings |= {"conv_channels": sizes["conv_channels"], "conv_norm": sizes["conv_norm"]}
    if (positions := encoder.get(RELATIVE_POSITIONS)) is not None:
        settings |= {"position_buckets": len(positions), "position_distance": model.get("max_distance", 1280)}
    layout = _kernels_and_strides(str(model.get("conv_feature_layers") or ""))
    kernels = [kernel for kernel, _ in layout] or sizes["conv_kernels"]
    strides = [stride for _, stride in layout] or strides_of(kernels, path)
    settings |= {"conv_kernels": kernels, "conv_strides": strides}
    return encoder_config_from(settings | {"normalize_waveform": task.get("normalize", False)}, path)


LAYOUT_PART = r"\[([^\[\]]*)\](?:\s*\*\s*(\d{1,2}))?"
"""Convolutions of one shape in fairseq's layout, and how many times they follow one another."""


def _kernels_and_strides(layout: str) -> list[tuple[int, int]]:
    """Parse the convolutions in "[(512,10,5)] + [(512,3,2)] * 4 + …"; nothing is evaluated."""
    layers: list[tuple[int, int]] = []
    for tuples, times in re.findall(LAYOUT_PART, layout):
        pairs = re.findall(r"\(\s*\d+\s*,\s*(\d+)\s*,\s*(\d+)\s*\)", tuples)
        layers += [(int(kernel), int(stride)) for kernel, stride in pairs] * int(times or 1)
    return layers


def _kept(weights: PretrainedWeights, part: str) -> dict[str, Any]:
    """Return the settings of a part that an import kept for an export."""
    kept = foreign_settings(weights, "fairseq")
    return {name.removeprefix(f"{part}."): value for name, value in kept.items() if name.startswith(f"{part}.")}


def task_settings(weights: PretrainedWeights, labels: Sequence[str]) -> dict[str, Any]:
    """Write the settings of a pre-training task.

    Args:
        weights: Weights to export.
        labels: Names of the streams of labels.
    """
    return {
        "_name": "hubert_pretraining",
        "data": ".",
        "labels": list(labels),
        "label_dir": None,
        "label_rate": SAMPLE_RATE / weights.config.clock.hop,
        **_kept(weights, "task"),
        "sample_rate": SAMPLE_RATE,
        "normalize": weights.config.normalize_waveform,
        "fine_tuning": False,
        "single_target": False,
    }


def model_settings(weights: PretrainedWeights) -> dict[str, Any]:
    """Write the settings of a pre-trained model."""
    config, kept = weights.config, _kept(weights, "model")
    final_dim, streams = kept.pop("final_dim", 0) or 256, len(weights.predictors)
    layout = [
        (config.conv_channels, kernel, stride)
        for kernel, stride in zip(config.conv_kernels, config.conv_strides, strict=True)
    ]
    return {
        "_name": "hubert",
        "label_rate": task_settings(weights, [])["label_rate"],
        **RELEASED_MASKS,
        **kept,
        "extractor_mode": "layer_norm" if config.conv_norm == "layer" else "default",
        "conv_feature_layers": str(layout),
        "final_dim": weights.predictors[0]["codewords"].shape[1] if streams else final_dim,
        "untie_final_proj": streams > 1 or kept.get("untie_final_proj", True),  # each stream has its own here
        "logit_temp": kept.get("logit_temp", weights.temperature),
        **FIXED,
        **{theirs: getattr(config, ours) for ours, theirs in SETTINGS.items()},
    }


def ctc_settings(weights: PretrainedWeights, task: Settings, model: Settings) -> dict[str, Any]:
    """Write the settings of a fine-tuned model around those of its encoder."""
    return {
        "_name": "hubert_ctc",
        "w2v_path": "",
        "w2v_args": {"task": task, "model": model},
        "normalize": weights.config.normalize_waveform,
        "data": ".",
        "apply_mask": True,
        **_kept(weights, "ctc"),
        "layerdrop": weights.config.layer_drop,
        **{name: model[name] for name in FINE_TUNING_SETTINGS},
    }
