"""State dicts of torchaudio: Wav2Vec2Model with or without its `aux` layer, HuBERTPretrainModel, its recipes'
checkpoints.

They hold weights alone. What the weights do not tell is taken from the released models, or has to be given: heads of 64
channels (80 where there are 1280), norms before attention where every convolution has a norm, a waveform that was
normalised there, and for 29 or 32 letters their order in torchaudio.pipelines.
"""

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.model.convolutions import KERNELS, STRIDES
from hubert_lightning.pretrained.dialect import Dialect, from_ours, to_ours
from hubert_lightning.pretrained.formats.transformers import read_settings
from hubert_lightning.pretrained.weights import (
    TRAINING,
    Trained,
    encoder_alone,
    heads_of,
    keeping,
    kept_for,
    mask_embedding,
    settings_of,
    shapes_of,
    spelling,
    summary_of,
    tokens_with_boundary,
    trained_with,
)

FIRST_CONV = "feature_extractor.conv_layers.0.conv.weight"
LETTERS = tuple("-|ETAONIHSRDLUMWCFGYPBVK'XJQZ")  # torchaudio.pipelines.HUBERT_ASR_LARGE.get_labels()
FAIRSEQ_LETTERS = (LETTERS[0], "<pad>", "</s>", "<unk>", *LETTERS[1:])  # with the rows that its bundles leave out
WRAPPED = "wav2vec2."
BOTH = ("weight", "bias")
WEIGHTS, ABOUT = "model.pt", "model.json"

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
"""Of torchaudio.models.wav2vec2_model: what they are called here."""
KEPT = (
    *("mask_prob", "mask_selection", "mask_other", "mask_length", "no_mask_overlap", "mask_min_space"),
    *("mask_channel_prob", "mask_channel_selection", "mask_channel_other", "mask_channel_length"),
    *("no_mask_channel_overlap", "mask_channel_min_space", "skip_masked", "skip_nomask"),
)
"""Of torchaudio.models.hubert_pretrain_model: what this package has elsewhere (masks belong to the data)."""


def is_state(state: Mapping[str, Any]) -> bool:
    """Whether weights have torchaudio's names, also inside of another module."""
    return any(name == FIRST_CONV or name.endswith(f".{FIRST_CONV}") for name in state) and any(
        ".transformer.layers." in name for name in state
    )


def read(path: Path, state: Mapping[str, Tensor], num_heads: int | None = None) -> Trained:
    """A state dict, also inside of another module's.

    num_heads: of the attention; that of the released model of this width if not given

    Raises:
        UserError: It lacks weights, or the number of heads cannot be known.
    """
    first = min((name for name in state if name.endswith(FIRST_CONV)), key=len)
    outer = first.removesuffix(FIRST_CONV).removesuffix(WRAPPED)  # "" but for modules that hold the model
    named = {
        outer + name.removeprefix(outer).removeprefix(WRAPPED) if name.startswith(outer) else name: value
        for name, value in state.items()
    }
    # The layer that spells lies in Wav2Vec2Model, or beside it in the recipe's module
    head = {part: named.pop(f"{at}aux.{part}") for at in ("", outer) for part in BOTH if f"{at}aux.{part}" in named}
    codewords, weight, bias = (
        named.pop(f"{outer}logit_generator.{name}", None)
        for name in ("label_embeddings", "final_proj.weight", "final_proj.bias")
    )
    named, notes = encoder_alone(named, DIALECT, path)
    try:
        ours = to_ours(named, DIALECT)
    except ValueError as error:
        raise UserError(f"{path}: {error}; copy or download it again") from error
    known = shapes_of(ours, path)
    labels, heads = _told_beside(path)
    over_channels = known["conv_norm"] == "layer"
    stated = {"pre_norm": over_channels, "normalize_waveform": over_channels}
    stated |= {"num_heads": heads_of(known["dim"], heads if num_heads is None else num_heads, path)}
    config = settings_of(known | stated | {"feature_grad_mult": 1.0 if over_channels else 0.1}, path)
    if "mask_embedding" not in ours:  # Wav2Vec2Model has none
        ours["mask_embedding"], sentence = mask_embedding(config.dim)
        notes.append(sentence)
    predictors = []
    parts = {"codewords": codewords, "projection.weight": weight, "projection.bias": bias}
    if found := {name: value for name, value in parts.items() if value is not None}:
        if len(found) < len(parts):
            raise UserError(f"{path} has half a head of pre-training, {' and '.join(found)} alone; get it again")
        predictors = [found]
    letters: Sequence[str] | None = None
    vocabulary_note = None
    if head:
        if len(head) < 2:
            raise UserError(f"{path} has half a layer that spells, aux.{summary_of(head)} alone; get it again")
        rows = len(head["weight"])
        letters = labels
        if letters is None and (letters := {len(of): of for of in (LETTERS, FAIRSEQ_LETTERS)}.get(rows)):
            vocabulary_note = (
                f"it does not say what its {rows} tokens are, which are taken for those of torchaudio.pipelines, "
                f"{' '.join(letters)}; if they are not, say so with --vocabulary"
            )
    spelt = spelling(letters) if letters else None
    trained = Trained(config, ours, predictors, head=head or None, vocabulary=spelt, notes=notes)
    return trained._replace(vocabulary_note=vocabulary_note)


def with_settings(path: Path, trained: Trained) -> Trained:
    """What `read` made, with the dropouts of its size, or all settings of the arguments that `write` put beside it."""
    released = trained_with(trained.config, TRAINING[trained.config.conv_norm], path)
    beside = path.with_name(ABOUT)
    if path.name != WEIGHTS or not beside.exists():
        return trained._replace(config=released)
    about = read_settings(beside)
    arguments = about.get("arguments") or {}
    stated: dict[str, Any] = {ours: arguments[theirs] for theirs, ours in ARGUMENTS.items() if theirs in arguments}
    if "normalize_waveform" in about:
        stated |= {"normalize_waveform": about["normalize_waveform"]}
    if "feature_grad_mult" in arguments:
        scale = arguments["feature_grad_mult"]
        stated |= {"feature_grad_mult": 1.0 if scale is None else scale}
    trained = trained._replace(config=trained_with(released, stated, beside))
    return keeping(trained, "torchaudio", {name: arguments[name] for name in KEPT if name in arguments})


def _told_beside(path: Path) -> tuple[list[str] | None, int | None]:
    """The letters, and the number of heads, that `write` told of beside a state dict."""
    beside = path.with_name(ABOUT)
    if path.name != WEIGHTS or not beside.exists():
        return None, None
    about = read_settings(beside)
    labels, heads = about.get("labels"), (about.get("arguments") or {}).get("encoder_num_heads")
    return [str(label) for label in labels] if isinstance(labels, list) else None, heads


def write(trained: Trained) -> dict[str, bytes]:
    """The files of a folder: the state dict, and the function of torchaudio.models and its arguments that it fits.

    Raises:
        UserError: There are several streams of labels, for which torchaudio has no model.
    """
    config = trained.config
    state = from_ours(trained.encoder, DIALECT)
    mask_embedding = state.pop(DIALECT.mask_embedding)
    arguments: dict[str, Any] = {
        "extractor_mode": "layer_norm" if config.conv_norm == "layer" else "group_norm",
        "extractor_conv_layer_config": [
            [config.conv_channels, kernel, stride] for kernel, stride in zip(KERNELS, STRIDES, strict=True)
        ],
        **{theirs: getattr(config, ours) for theirs, ours in ARGUMENTS.items()},
    }
    function = "wav2vec2_model"
    if trained.head is not None:
        state |= {f"aux.{part}": value.clone() for part, value in trained.head.items()}
        arguments["aux_num_out"] = len(trained.head["weight"])
    elif trained.predictors:
        if len(trained.predictors) > 1:
            raise UserError(
                f"this model predicts {len(trained.predictors)} streams of clusters, torchaudio's one; export it to "
                "fairseq, or to transformers, which keeps the encoder"
            )
        [predictor] = trained.predictors
        function = "hubert_pretrain_model"
        state = {WRAPPED + name: value for name, value in state.items()} | {
            DIALECT.mask_embedding: mask_embedding,
            "logit_generator.label_embeddings": predictor["codewords"],
            "logit_generator.final_proj.weight": predictor["projection.weight"],
            "logit_generator.final_proj.bias": predictor["projection.bias"],
        }
        clusters, final_dim = predictor["codewords"].shape
        # torchaudio.models.hubert_pretrain_base
        arguments |= {"mask_prob": 0.8, "mask_selection": "static", "mask_other": 0.0, "mask_length": 10}
        arguments |= {"no_mask_overlap": False, "mask_min_space": 1, "mask_channel_prob": 0.0}
        arguments |= {"mask_channel_selection": "static", "mask_channel_other": 0.0, "mask_channel_length": 10}
        arguments |= {"no_mask_channel_overlap": False, "mask_channel_min_space": 1}
        arguments |= {"skip_masked": False, "skip_nomask": False, "num_classes": clusters, "final_dim": final_dim}
        arguments |= kept_for(trained, "torchaudio")
        scale = config.feature_grad_mult  # torchaudio takes none for 1, and nothing for 0, a frozen encoder
        arguments |= {"feature_grad_mult": scale if 0 < scale < 1 else None}
    else:
        arguments["aux_num_out"] = None
    file = BytesIO()
    torch.save({name: value.contiguous() for name, value in state.items()}, file)
    about: dict[str, Any] = {"function": f"torchaudio.models.{function}", "arguments": arguments}
    about |= {"normalize_waveform": config.normalize_waveform}
    if trained.vocabulary is not None:
        about["labels"] = tokens_with_boundary(trained.vocabulary)
    return {
        WEIGHTS: file.getvalue(),
        ABOUT: (json.dumps(about, ensure_ascii=False, indent=2) + "\n").encode(),
    }
