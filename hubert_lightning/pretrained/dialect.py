"""Names of tensors in other systems' checkpoints, and ours."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.model.convolutions import KERNELS


class Dialect(NamedTuple):
    """What another system calls the parts of an encoder; `{}` is a number that counts from 0."""

    conv: str
    conv_norm: str
    local_norm: str
    projection: str
    positions: str
    norm: str
    attention: str
    attention_output: str
    attention_norm: str
    ffn_input: str
    ffn_output: str
    ffn_norm: str
    mask_embedding: str


GAIN, DIRECTION = "parametrizations.weight.original0", "parametrizations.weight.original1"


OLD_NAMES = {"weight_g": GAIN, "weight_v": DIRECTION}  # of weight norm, before torch 2.0


def to_ours(theirs: Mapping[str, Tensor], dialect: Dialect) -> dict[str, Tensor]:
    """An encoder's state under our names; what is not of an encoder keeps its own name.

    Raises:
        UserError: One of the three parts of a layer's attention is missing.
    """
    names = _names(dialect, count_layers(theirs, dialect.conv), count_layers(theirs, dialect.ffn_input))
    ours, parts = dict[str, Tensor](), dict[str, dict[int, Tensor]]()
    for name, value in theirs.items():
        known = names.get(_new_name(name)) or names.get(name)
        if known is None:
            ours[name] = value
        elif known[1] is None:
            ours[known[0]] = value
        else:
            parts.setdefault(known[0], {})[known[1]] = value
    for name, three in parts.items():
        if len(three) < 3 or len({part.shape for part in three.values()}) > 1:
            raise UserError(f"{name} has {len(three)} parts that fit together, and is made of 3")
        ours[name] = torch.cat([three[number] for number in range(3)])
    return ours


def prefix_of(state: Mapping[str, Any], dialect: Dialect) -> str:
    """What precedes the encoder's names where it is a part of another module; "" where it is the whole."""
    last = f"{dialect.projection}.weight"
    prefixes = [name.removesuffix(last) for name in state if name == last or name.endswith(f".{last}")]
    return min(prefixes, key=len, default="")


def from_ours(ours: Mapping[str, Tensor], dialect: Dialect, old_names: bool = False) -> dict[str, Tensor]:
    """An encoder's state under another system's names; with `old_names`, weight norm as before torch 2.0."""
    theirs = {}
    layers = sum(name.endswith(".ffn_input.weight") for name in ours)
    for name, (known, part) in _names(dialect, len(KERNELS), layers).items():
        if known in ours:
            value = ours[known] if part is None else ours[known].chunk(3)[part]
            theirs[name] = value.clone()
    if old_names:
        for old, new in OLD_NAMES.items():
            theirs[f"{dialect.positions}.{old}"] = theirs.pop(f"{dialect.positions}.{new}")
    return theirs


def _names(dialect: Dialect, convolutions: int, layers: int) -> dict[str, tuple[str, int | None]]:
    """Their name of every tensor → ours, and which third of it theirs is, if it is one."""
    names: dict[str, tuple[str, int | None]] = {dialect.mask_embedding: ("mask_embedding", None)}

    def both(theirs: str, ours: str, third: int | None = None) -> None:
        for part in ("weight", "bias"):
            names[f"{theirs}.{part}"] = (f"{ours}.{part}", third)

    for index in range(convolutions):
        both(dialect.conv.format(index), f"convolutions.{index}.conv")
        both(dialect.conv_norm.format(index), f"convolutions.{index}.norm")
    for part in ("local_norm", "projection", "norm"):
        both(getattr(dialect, part), part)
    for part in (GAIN, DIRECTION, "bias"):
        names[f"{dialect.positions}.{part}"] = (f"positions.conv.{part}", None)
    for index in range(layers):
        for third, letter in enumerate("qkv"):
            both(dialect.attention.format(index, letter), f"layers.{index}.query_key_value", third)
        for part in ("attention_output", "attention_norm", "ffn_input", "ffn_output", "ffn_norm"):
            both(getattr(dialect, part).format(index), f"layers.{index}.{part}")
    return names


def _new_name(name: str) -> str:
    stem, _, last = name.rpartition(".")
    return f"{stem}.{OLD_NAMES[last]}" if last in OLD_NAMES else name


def count_layers(names: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number in names of this pattern."""
    numbered = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d{1,4})") + r"\.weight")
    return max((int(found[1]) + 1 for name in names if (found := numbered.fullmatch(name))), default=0)
