"""State dicts of torchaudio: Wav2Vec2Model with or without its `aux` layer, HuBERTPretrainModel, its recipes'
checkpoints.

They hold weights alone. Other facts are taken from the released models, or have to be given: heads of 64 channels (80
in an encoder of width 1280), norms before attention where every convolution has a norm, a waveform that was normalised
there, and for 29 or 32 letters their order in torchaudio.pipelines.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.pretrained.checkpoint_source import CheckpointSource
from hubert_lightning.pretrained.dialect import Dialect, from_ours
from hubert_lightning.pretrained.foreign_weights import (
    RELEASED_REGULARISATION,
    attention_heads,
    config_from_shapes,
    drawn_mask_embedding,
    encoder_state,
    foreign_settings,
    strides_of,
    vocabulary_settings,
    with_foreign_settings,
    with_regularisation,
)
from hubert_lightning.pretrained.weights import Export, PretrainedWeights, abbreviated, encoder_config_from
from hubert_lightning.untrusted.json_file import read_json_object

FIRST_CONV = "feature_extractor.conv_layers.0.conv.weight"
LETTERS = tuple("-|ETAONIHSRDLUMWCFGYPBVK'XJQZ")  # torchaudio.pipelines.HUBERT_ASR_LARGE.get_labels()
FAIRSEQ_LETTERS = (LETTERS[0], "<pad>", "</s>", "<unk>", *LETTERS[1:])  # with the rows that its bundles leave out
ENCODER_PREFIX = "wav2vec2."
PARTS = ("weight", "bias")
STATE_FILE, ARGUMENTS_FILE = "model.pt", "model.json"

DIALECT = Dialect(
    conv="feature_extractor.conv_layers.{}.conv",
    conv_norm="feature_extractor.conv_layers.{}.layer_norm",
    local_norm="encoder.feature_projection.layer_norm",
    projection="encoder.feature_projection.projection",
    positions="encoder.transformer.pos_conv_embed.conv",
    norm="encoder.transformer.layer_norm",
    attention="encoder.transformer.layers.{}.attention.{}_proj",
    attention_output="encoder.transformer.layers.{}.attention.out_proj",
    attention_norm="encoder.transformer.layers.{}.layer_norm",
    ffn_input="encoder.transformer.layers.{}.feed_forward.intermediate_dense",
    ffn_output="encoder.transformer.layers.{}.feed_forward.output_dense",
    ffn_norm="encoder.transformer.layers.{}.final_layer_norm",
    mask_embedding="mask_generator.mask_embedding",
)
ARGUMENTS = {
    "extractor_conv_bias": "conv_bias",
    "encoder_embed_dim": "dim",
    "encoder_projection_dropout": "input_dropout",
    "encoder_pos_conv_kernel": "pos_kernel",
    "encoder_pos_conv_groups": "pos_groups",
    "encoder_num_layers": "num_layers",
    "encoder_num_heads": "num_heads",
    "encoder_attention_dropout": "attention_dropout",
    "encoder_ff_interm_features": "ffn_dim",
    "encoder_ff_interm_dropout": "activation_dropout",
    "encoder_dropout": "dropout",
    "encoder_layer_norm_first": "pre_norm",
    "encoder_layer_drop": "layer_drop",
}
"""Argument of torchaudio.models.wav2vec2_model → argument of `EncoderConfig`."""
MASKS = {
    **{"mask_prob": 0.8, "mask_selection": "static", "mask_other": 0.0, "mask_length": 10, "no_mask_overlap": False},
    **{"mask_min_space": 1, "mask_channel_prob": 0.0, "mask_channel_selection": "static", "mask_channel_other": 0.0},
    **{"mask_channel_length": 10, "no_mask_channel_overlap": False, "mask_channel_min_space": 1},
    **{"skip_masked": False, "skip_nomask": False},
}
"""Arguments of torchaudio.models.hubert_pretrain_model that this package has elsewhere (masks belong to the data), and
their values in hubert_pretrain_base."""


def has_names(state: Mapping[str, object]) -> bool:
    """Tell whether a state dict has torchaudio's names, also inside a larger module."""
    return any(name == FIRST_CONV or name.endswith(f".{FIRST_CONV}") for name in state) and any(
        ".transformer.layers." in name for name in state
    )


def matches(source: CheckpointSource) -> bool:
    """Tell whether a file holds a state dict of torchaudio."""
    return has_names(source.state)


def read(source: CheckpointSource, num_heads: int | None = None) -> PretrainedWeights:
    """Read a state dict, also inside of another module's.

    Args:
        source: File.
        num_heads: Attention heads; those of the released model of this width if not given.

    Raises:
        UserError: Weights are missing, or the number of heads is unknown.
    """
    path = source.path
    about = _arguments_file(path)
    arguments = about.get("arguments") or {}
    state, outer = _without_encoder_prefix(source.state)
    # The CTC head lies in Wav2Vec2Model, or beside it in the recipe's module
    head = {part: state.pop(f"{at}aux.{part}") for at in ("", outer) for part in PARTS if f"{at}aux.{part}" in state}
    predictors = _predictors(path, state, f"{outer}logit_generator.")
    encoder, notes = encoder_state(state, DIALECT, path)
    sizes = config_from_shapes(encoder, path)
    is_large = sizes["conv_norm"] == "layer"
    heads = arguments.get("encoder_num_heads") if num_heads is None else num_heads
    layout = arguments.get("extractor_conv_layer_config")
    strides = [stride for *_, stride in layout] if layout else strides_of(sizes["conv_kernels"], path)
    config = encoder_config_from(
        {
            **sizes,
            "conv_strides": strides,
            "pre_norm": is_large,
            "normalize_waveform": is_large,
            "num_heads": attention_heads(sizes["dim"], heads, path),
            **RELEASED_REGULARISATION[sizes["conv_norm"]],
        },
        path,
    )
    if "mask_embedding" not in encoder:  # Wav2Vec2Model has none
        encoder["mask_embedding"], note = drawn_mask_embedding(config.dim)
        notes.append(note)
    weights = PretrainedWeights(config, encoder, predictors, notes=[*notes, *source.notes])
    if head:
        weights = _with_head(path, weights, head, about.get("labels"))
    if not about:
        return weights
    settings: dict[str, Any] = {ours: arguments[theirs] for theirs, ours in ARGUMENTS.items() if theirs in arguments}
    if "normalize_waveform" in about:
        settings |= {"normalize_waveform": about["normalize_waveform"]}
    if "feature_grad_mult" in arguments:
        scale = arguments["feature_grad_mult"]
        settings |= {"feature_grad_mult": 1.0 if scale is None else scale}
    config = with_regularisation(config, settings, path.with_name(ARGUMENTS_FILE))
    masks = {name: arguments[name] for name in MASKS if name in arguments}
    return with_foreign_settings(replace(weights, config=config), "torchaudio", masks)


def _arguments_file(path: Path) -> dict[str, Any]:
    """Read the arguments that `write` put beside a state dict; empty if there are none."""
    beside = path.with_name(ARGUMENTS_FILE)
    return read_json_object(beside) if path.name == STATE_FILE and beside.exists() else {}


def _without_encoder_prefix(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Remove the prefix of the encoder, and return that of the module around it, which is "" for a bare model."""
    first = min((name for name in state if name.endswith(FIRST_CONV)), key=len)
    outer = first.removesuffix(FIRST_CONV).removesuffix(ENCODER_PREFIX)
    named = {
        outer + name.removeprefix(outer).removeprefix(ENCODER_PREFIX) if name.startswith(outer) else name: value
        for name, value in state.items()
    }
    return named, outer


def _predictors(path: Path, state: dict[str, Tensor], prefix: str) -> list[dict[str, Tensor]]:
    """Take the head of pre-training out of a state: one, or none."""
    names = {
        "codewords": "label_embeddings",
        "projection.weight": "final_proj.weight",
        "projection.bias": "final_proj.bias",
    }
    head = {ours: state.pop(prefix + theirs) for ours, theirs in names.items() if prefix + theirs in state}
    if head and len(head) < len(names):
        raise UserError(f"{path} has half a head of pre-training, {' and '.join(head)} alone; copy it again")
    return [head] if head else []


def _with_head(path: Path, weights: PretrainedWeights, head: dict[str, Tensor], labels: object) -> PretrainedWeights:
    """Add a CTC head and its letters: those that `write` put beside it, or those of torchaudio.pipelines."""
    if len(head) < 2:
        raise UserError(f"{path} has half a CTC head, aux.{abbreviated(head)} alone; copy or download it again")
    weights = replace(weights, head=head)
    rows = len(head["weight"])
    if isinstance(labels, list):
        return weights.with_vocabulary(vocabulary_settings([str(label) for label in labels])) if labels else weights
    letters: Sequence[str] | None = {len(table): table for table in (LETTERS, FAIRSEQ_LETTERS)}.get(rows)
    if letters is None:
        return weights
    note = (
        f"it does not say what its {rows} tokens are, which are assumed to be those of torchaudio.pipelines, "
        f"{' '.join(letters)}; if they are not, give them by --vocabulary"
    )
    return replace(weights.with_vocabulary(vocabulary_settings(letters)), vocabulary_note=note)


def write(weights: PretrainedWeights) -> Export:
    """Write a folder with a state dict, and with the function of torchaudio.models and the arguments that it fits.

    Raises:
        UserError: torchaudio has no such model: a WavLM, one with a batch norm of positions, or one that predicts
            several streams of labels.
    """
    config = weights.config
    if config.position_buckets:
        raise UserError("this encoder has WavLM's relative positions; export it to transformers, not to torchaudio")
    if config.pos_batch_norm:
        raise UserError(
            "this encoder has a batch norm of positions, which torchaudio lacks; export it to transformers or fairseq"
        )
    state = from_ours(weights.encoder, DIALECT)
    mask_embedding = state.pop(DIALECT.mask_embedding)
    arguments: dict[str, Any] = {
        "extractor_mode": "layer_norm" if config.conv_norm == "layer" else "group_norm",
        "extractor_conv_layer_config": [
            [config.conv_channels, kernel, stride]
            for kernel, stride in zip(config.conv_kernels, config.conv_strides, strict=True)
        ],
        **{theirs: getattr(config, ours) for theirs, ours in ARGUMENTS.items()},
    }
    function = "wav2vec2_model"
    left: dict[str, Tensor] = {"mask_embedding": weights.encoder["mask_embedding"]}
    if weights.head is not None:
        state |= {f"aux.{part}": value.clone() for part, value in weights.head.items()}
        arguments["aux_num_out"] = len(weights.head["weight"])
    elif weights.predictors:
        if len(weights.predictors) > 1:
            raise UserError(
                f"this model predicts {len(weights.predictors)} streams of clusters, torchaudio's one; export it to "
                "fairseq, or to transformers, which keeps the encoder"
            )
        [predictor] = weights.predictors
        function, left = "hubert_pretrain_model", {}
        state = {ENCODER_PREFIX + name: value for name, value in state.items()} | {
            DIALECT.mask_embedding: mask_embedding,
            "logit_generator.label_embeddings": predictor["codewords"],
            "logit_generator.final_proj.weight": predictor["projection.weight"],
            "logit_generator.final_proj.bias": predictor["projection.bias"],
        }
        clusters, final_dim = predictor["codewords"].shape
        arguments |= MASKS | {"num_classes": clusters, "final_dim": final_dim} | foreign_settings(weights, "torchaudio")
        scale = config.feature_grad_mult  # torchaudio takes None for 1, and has no value for 0, a frozen encoder
        arguments |= {"feature_grad_mult": scale if 0 < scale < 1 else None}
    else:
        arguments["aux_num_out"] = None
    file = BytesIO()
    torch.save({name: value.contiguous() for name, value in state.items()}, file)
    about: dict[str, Any] = {"function": f"torchaudio.models.{function}", "arguments": arguments}
    about |= {"normalize_waveform": config.normalize_waveform}
    if weights.vocabulary is not None:
        about["labels"] = weights.vocabulary.search_names
    files = {
        STATE_FILE: file.getvalue(),
        ARGUMENTS_FILE: (json.dumps(about, ensure_ascii=False, indent=2) + "\n").encode(),
    }
    return Export(files, replace(weights, encoder=left, head=None, predictors=[]))
