"""Parts that the readers and writers of other systems' formats share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.model.config import KERNELS, STRIDES, EncoderConfig
from hubert_lightning.pretrained.dialect import (
    COUNTER,
    DIRECTION,
    Dialect,
    count_layers,
    new_name,
    prefix_of,
    tensor_names,
    to_ours,
)
from hubert_lightning.pretrained.weights import PretrainedWeights, abbreviated, encoder_config_from
from hubert_lightning.spelling import is_special
from hubert_lightning.vocabulary import BOUNDARY

NO_DROPOUT = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "input_dropout", "layer_drop"), 0.0)
RELEASED_REGULARISATION: dict[str, dict[str, float]] = {
    "group": NO_DROPOUT
    | {"dropout": 0.1, "attention_dropout": 0.1, "input_dropout": 0.1, "layer_drop": 0.05, "feature_grad_mult": 0.1},
    "layer": NO_DROPOUT | {"feature_grad_mult": 1.0},
}
"""Norm of the convolutions → regularisation of the released models, Base ("group") or Large and X-Large ("layer"), for
files that do not state it (fairseq examples/hubert/config/pretrain)."""
RELEASED_NUM_HEADS = {768: 12, 1024: 16, 1280: 16}
"""Width → attention heads of the released models (fairseq config/pretrain; HuBERT table I prints 8 for Base)."""
MAX_SETTING_LENGTH = 16  # values of a list that is kept for an export


def encoder_state(state: Mapping[str, Tensor], dialect: Dialect, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Rename an encoder's weights, and leave out everything around the encoder, such as unknown heads.

    Args:
        state: State of a model in another system, without the heads that are known.
        dialect: Names of that system.
        path: File that errors name.

    Returns:
        The encoder's state under our names, and a note about the weights that are left out, if there are any.

    Raises:
        UserError: The encoder has unknown weights, so it is of another kind, or a weight lacks a part.
    """
    prefix = prefix_of(state, dialect)
    inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    inside.pop(f"{dialect.batch_norm}.{COUNTER}", None)
    names = tensor_names(dialect, count_layers(inside, dialect.conv), count_layers(inside, dialect.ffn_input))
    known = {name: value for name, value in inside.items() if name in names or new_name(name) in names}
    unknown = [name for name in inside if name not in known]
    roots = {pattern.split(".")[0] for pattern in dialect if pattern}
    if unsupported := [name for name in unknown if name.split(".")[0] in roots]:
        raise UserError(
            f"{path} has weights that this encoder cannot use ({abbreviated(unsupported)}); give a plain HuBERT"
        )
    notes = omission_notes(unknown + [name for name in state if not name.startswith(prefix)])
    try:
        return to_ours(known, dialect), notes
    except UserError as error:
        raise UserError(f"{path}: {error}; copy or download it again") from error


def omission_notes(names: Iterable[str]) -> list[str]:
    """Write a note about weights that are left out.

    Args:
        names: Names of the weights.

    Returns:
        One sentence, or none if nothing is left out.
    """
    omitted = list(names)
    return [f"left out, because this package cannot use it: {abbreviated(omitted)}"] if omitted else []


def config_from_shapes(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Derive the size of an encoder from its weights.

    Args:
        state: State of the encoder under our names.
        path: File that errors name.

    Returns:
        Arguments of `EncoderConfig`: all but the number of heads and the regularisation.

    Raises:
        UserError: Weights are missing.
    """
    has_batch_norm = "positions.batch_norm.weight" in state
    wanted = (
        "convolutions.0.conv.weight",
        "projection.weight",
        "positions.conv.weight" if has_batch_norm else f"positions.conv.{DIRECTION}",
        "layers.0.ffn_input.weight",
    )
    if missing := [name for name in wanted if name not in state or state[name].dim() < 2]:
        raise UserError(f"{path} lacks weights of the encoder ({abbreviated(missing)}); give a whole HuBERT")
    conv, projection, positions, ffn = (state[name] for name in wanted)
    kernels = [
        int(value.shape[-1])
        for index in range(count_layers(state, "convolutions.{}.conv"))
        if (value := state.get(f"convolutions.{index}.conv.weight")) is not None and value.dim() == 3
    ]
    return {
        "conv_kernels": kernels,
        "conv_channels": conv.shape[0],
        "conv_norm": "layer" if "convolutions.1.norm.weight" in state else "group",
        "conv_bias": "convolutions.0.conv.bias" in state,
        "dim": projection.shape[0],
        "num_layers": sum(name.endswith(".ffn_input.weight") for name in state),
        "ffn_dim": ffn.shape[0],
        "pos_kernel": positions.shape[-1],
        "pos_groups": positions.shape[0] // max(positions.shape[1], 1),
        "pos_batch_norm": has_batch_norm,
    }


def strides_of(kernels: Sequence[int], path: Path) -> list[int]:
    """Return the strides of convolutions for a file that does not state them.

    Args:
        kernels: Kernels of the convolutions.
        path: File that errors name.

    Raises:
        UserError: They are not the kernels of HuBERT, after which models of 25 Hz have an eighth convolution.
    """
    if tuple(kernels) == KERNELS:
        return [*STRIDES]
    if tuple(kernels) == (*KERNELS, 2):  # TWIST (Hassid et al. 2023): the eighth convolution has stride 2
        return [*STRIDES, 2]
    raise UserError(
        f"{path} has convolutions with kernels {list(kernels)}, and does not state their strides; give a model in "
        "transformers' or fairseq's format, which states them"
    )


def attention_heads(dim: int, num_heads: int | None, path: Path) -> int:
    """Return the number of attention heads for a file that does not state it.

    Args:
        dim: Width of the encoder.
        num_heads: Number that the user gives; that of the released model of this width if not given.
        path: File that errors name.

    Raises:
        UserError: No model of this width was released, and no number is given.
    """
    if num_heads is None and dim not in RELEASED_NUM_HEADS:
        raise UserError(
            f"{path} has a width of {dim}, and does not state its number of attention heads; give it: hubert import "
            f"{path} DEST --num_heads N"
        )
    return RELEASED_NUM_HEADS[dim] if num_heads is None else num_heads


def with_regularisation(config: EncoderConfig, settings: Mapping[str, Any], path: Path) -> EncoderConfig:
    """Replace an encoder's training settings, such as dropout."""
    return encoder_config_from({**asdict(config), **settings}, path)


def drawn_mask_embedding(dim: int) -> tuple[Tensor, str]:
    """Draw a mask embedding for a model that was saved without one, as fairseq does: U(0, 1), the same every time.

    Args:
        dim: Width of the encoder.

    Returns:
        (dim,), and a note about it.
    """
    drawn = torch.rand(dim, generator=torch.Generator().manual_seed(0))
    return drawn, "it has no mask embedding, which is drawn at random: fine-tuning and pre-training have to learn it"


def vocabulary_settings(
    tokens: Sequence[str], delimiter: str | None = BOUNDARY, spaced: bool | None = None
) -> dict[str, Any]:
    """Derive the settings of a vocabulary from a foreign system's tokens.

    Args:
        tokens: Tokens, the blank first.
        delimiter: Token between words; ignored if it is not among the tokens.
        spaced: Whether spaces separate tokens, as with phonemes. If not given, they do where there is no token between
            words, and some tokens have several letters.

    Returns:
        Arguments of `Vocabulary`: the case of the letters among the tokens, and spaces for punctuation.
    """
    letters = [token for token in tokens[1:] if token != delimiter and not is_special(token)]
    if delimiter not in tokens[1:]:
        delimiter = None
    if spaced is None:
        spaced = delimiter is None and any(len(token) > 1 and "▁" not in token for token in letters)
    case = "as_written" if spaced else _case(letters)
    return {
        **{"tokens": list(tokens), "case": case, "punctuation": "space"},
        **{"delimiter": delimiter, "spaced": spaced},
    }


def _case(letters: Sequence[str]) -> str:
    """Find the case of letters; those without another case, or whose other case has several letters, do not count."""
    characters = {character for letter in letters for character in letter}
    cased = {c for c in characters if len(c.upper()) == len(c.lower()) == 1 and c.upper() != c.lower()}
    if cased and all(character == character.upper() for character in cased):
        return "upper"
    return "lower" if cased and all(character == character.lower() for character in cased) else "as_written"


def with_foreign_settings(weights: PretrainedWeights, system: str, settings: Mapping[str, Any]) -> PretrainedWeights:
    """Keep settings of another system that this package does not use, for an export to that system.

    Args:
        weights: Weights read from a file of that system.
        system: Name of its format.
        settings: Values by their names there. Values that are no plain numbers, texts or short lists are dropped.
    """
    plain = {name: value for name, value in settings.items() if _is_plain(value)}
    if not plain:
        return weights
    names = ", ".join(f"{name} {value}" for name, value in sorted(plain.items()))
    provenance = {**weights.provenance, "settings": {**weights.provenance.get("settings", {}), system: plain}}
    notes = [*weights.notes, f"not used here, kept for an export: {names}"]
    return replace(weights, provenance=provenance, notes=notes)


def foreign_settings(weights: PretrainedWeights, system: str) -> dict[str, Any]:
    """Return the settings that `with_foreign_settings` kept."""
    return dict((weights.provenance.get("settings") or {}).get(system) or {})


def _is_plain(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return len(values) <= MAX_SETTING_LENGTH and all(
        item is None or type(item) in (bool, int, float, str) for item in values
    )
