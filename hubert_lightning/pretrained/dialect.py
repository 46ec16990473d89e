"""Names of tensors in other systems' checkpoints, and ours."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hubert_lightning.errors import UserError


class Dialect(NamedTuple):
    """Another system's names of the parts of an encoder; `{}` is a number that counts from 0.

    The last ones are those of WavLM and of a batch norm of positions, empty for a system that has no such encoder.
    """

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
    position_gate: str = ""
    position_scale: str = ""
    relative_positions: str = ""
    batch_norm: str = ""


class OurTensor(NamedTuple):
    """A tensor under this package's name.

    Args:
        name: Name of the tensor.
        third: Part of the tensor that another system stores separately: 0 query, 1 key, 2 value; None for the whole.
    """

    name: str
    third: int | None = None


GAIN, DIRECTION = "parametrizations.weight.original0", "parametrizations.weight.original1"
SCALE = ".position_gate.scale"
"""End of the names of tensors, (heads,), that other systems store as (1, heads, 1, 1)."""
BATCH_NORM = {"weight": "weight", "bias": "bias", "running_mean": "mean", "running_var": "variance"}
"""Names of a batch norm's tensors in torch → ours."""
COUNTER = "num_batches_tracked"
"""Steps of a batch norm in torch, which nothing depends on: we have none, and write 0."""
OLD_WEIGHT_NORM_NAMES = {"weight_g": GAIN, "weight_v": DIRECTION}  # before torch 2.0


def to_ours(theirs: Mapping[str, Tensor], dialect: Dialect) -> dict[str, Tensor]:
    """Rename an encoder's state from another system's names to ours.

    Args:
        theirs: State with another system's names.
        dialect: Names of that system.

    Returns:
        State with our names. Tensors that are no part of an encoder keep their names.

    Raises:
        UserError: One of the three parts of a layer's attention is missing.
    """
    names = tensor_names(dialect, count_layers(theirs, dialect.conv), count_layers(theirs, dialect.ffn_input))
    ours, thirds = dict[str, Tensor](), dict[str, dict[int, Tensor]]()
    for name, value in theirs.items():
        known = names.get(new_name(name)) or names.get(name)
        if known is None:
            ours[name] = value
        elif known.third is None:
            ours[known.name] = value.flatten() if known.name.endswith(SCALE) else value
        else:
            thirds.setdefault(known.name, {})[known.third] = value
    for name, parts in thirds.items():
        if len(parts) < 3 or len({part.shape for part in parts.values()}) > 1:
            raise UserError(f"{name} has {len(parts)} parts that fit together, and needs 3")
        ours[name] = torch.cat([parts[number] for number in range(3)])
    return ours


def from_ours(ours: Mapping[str, Tensor], dialect: Dialect, old_names: bool = False) -> dict[str, Tensor]:
    """Rename an encoder's state from our names to another system's.

    Args:
        ours: State of a HubertEncoder.
        dialect: Names of the other system.
        old_names: Whether the weight norm is named as before torch 2.0.
    """
    renamed = {}
    num_layers = sum(name.endswith(".ffn_input.weight") for name in ours)
    num_convolutions = sum(name.startswith("convolutions.") and name.endswith(".conv.weight") for name in ours)
    for name, (our_name, third) in tensor_names(dialect, num_convolutions, num_layers).items():
        if our_name in ours:
            value = ours[our_name] if third is None else ours[our_name].chunk(3)[third]
            renamed[name] = (value[:, None, None][None] if our_name.endswith(SCALE) else value).clone()
    if f"{dialect.batch_norm}.running_mean" in renamed:
        renamed[f"{dialect.batch_norm}.{COUNTER}"] = torch.tensor(0)
    elif old_names:
        for old, new in OLD_WEIGHT_NORM_NAMES.items():
            renamed[f"{dialect.positions}.{old}"] = renamed.pop(f"{dialect.positions}.{new}")
    return renamed


def has_part(names: Iterable[str], part: str) -> bool:
    """Tell whether a state has the weight of a part, such as `dialect.projection`, at any depth."""
    weight = f"{part}.weight"
    return any(name == weight or name.endswith(f".{weight}") for name in names)


def prefix_of(state: Mapping[str, object], dialect: Dialect) -> str:
    """Find the prefix of the encoder's names in the state of a larger module; "" if the encoder is the whole."""
    last = f"{dialect.projection}.weight"
    prefixes = [name.removesuffix(last) for name in state if name == last or name.endswith(f".{last}")]
    return min(prefixes, key=len, default="")


def tensor_names(dialect: Dialect, num_convolutions: int, num_layers: int) -> dict[str, OurTensor]:
    """List the tensors of an encoder: another system's name of each → ours."""
    names = {dialect.mask_embedding: OurTensor("mask_embedding")}

    def add_linear(theirs: str, ours: str, third: int | None = None) -> None:
        for part in ("weight", "bias"):
            names[f"{theirs}.{part}"] = OurTensor(f"{ours}.{part}", third)

    for index in range(num_convolutions):
        add_linear(dialect.conv.format(index), f"convolutions.{index}.conv")
        add_linear(dialect.conv_norm.format(index), f"convolutions.{index}.norm")
    for part in ("local_norm", "projection", "norm"):
        add_linear(getattr(dialect, part), part)
    for part in (GAIN, DIRECTION, "bias"):
        names[f"{dialect.positions}.{part}"] = OurTensor(f"positions.conv.{part}")
    if dialect.batch_norm:
        names[f"{dialect.positions}.weight"] = OurTensor("positions.conv.weight")
        names |= {
            f"{dialect.batch_norm}.{name}": OurTensor(f"positions.batch_norm.{our_name}")
            for name, our_name in BATCH_NORM.items()
        }
    for index in range(num_layers):
        for third, letter in enumerate("qkv"):
            add_linear(dialect.attention.format(index, letter), f"layers.{index}.query_key_value", third)
        for part in ("attention_output", "attention_norm", "ffn_input", "ffn_output", "ffn_norm"):
            add_linear(getattr(dialect, part).format(index), f"layers.{index}.{part}")
        if dialect.position_gate:
            add_linear(dialect.position_gate.format(index), f"layers.{index}.position_gate.linear")
            names[dialect.position_scale.format(index)] = OurTensor(f"layers.{index}{SCALE}")
    if dialect.relative_positions:
        names[f"{dialect.relative_positions}.weight"] = OurTensor("relative_positions.embedding.weight")
    return names


def new_name(name: str) -> str:
    """Return the name that a tensor has since torch 2.0, which renamed the parts of a weight norm."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.{OLD_WEIGHT_NORM_NAMES[last]}" if last in OLD_WEIGHT_NORM_NAMES else name


def count_layers(names: Iterable[str], pattern: str) -> int:
    """Count the layers of a state: one more than the largest number in names of a pattern."""
    numbered = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d{1,4})") + r"\.weight")
    return max((int(match[1]) + 1 for name in names if (match := numbered.fullmatch(name))), default=0)
