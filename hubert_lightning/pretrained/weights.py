"""Pre-trained weights under this package's names, whichever file they came in."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hubert_lightning.errors import UserError
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.model.prediction import ClusterPredictor
from hubert_lightning.pretrained.dialect import DIRECTION, Dialect, _names, _new_name, count_layers, prefix_of
from hubert_lightning.spelling import is_special
from hubert_lightning.untrusted.json_file import shown
from hubert_lightning.vocabulary import BOUNDARY, with_boundary


class Trained(NamedTuple):
    """An encoder's weights and those of its heads.

    Args:
        config: Size of the encoder.
        encoder: State of a HubertEncoder.
        predictors: States of the heads of pre-training, one for each stream of labels.
        temperature: Temperature of these heads.
        head: weight (tokens, dim) and bias (tokens,) of the CTC head, its blank first.
        vocabulary: Arguments of data.text.Vocabulary: the head's tokens, and how a text is turned into them.
        special: (4, final dim), codewords that fairseq keeps for its own symbols, of each stream.
        source: Where the weights come from.
        notes: Sentences for whoever imports the model: what was left out, or assumed.
        vocabulary_note: Sentence on a vocabulary that was assumed; it goes when another one is given.
    """

    config: EncoderConfig
    encoder: dict[str, Tensor]
    predictors: Sequence[dict[str, Tensor]] = ()
    temperature: float = 0.1
    head: dict[str, Tensor] | None = None
    vocabulary: dict[str, Any] | None = None
    special: Sequence[Tensor] = ()
    source: Mapping[str, Any] = {}
    notes: Sequence[str] = ()
    vocabulary_note: str | None = None

    @property
    def num_clusters(self) -> list[int]:
        return [len(predictor["codewords"]) for predictor in self.predictors]


NO_DROPOUT = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "input_dropout", "layer_drop"), 0.0)
TRAINING: dict[str, dict[str, float]] = {
    "group": NO_DROPOUT
    | {"dropout": 0.1, "attention_dropout": 0.1, "input_dropout": 0.1, "layer_drop": 0.05, "feature_grad_mult": 0.1},
    "layer": NO_DROPOUT | {"feature_grad_mult": 1.0},
}
"""What the released models were trained with, Base or Large and X-Large, by the norm of their convolutions (fairseq
examples/hubert/config/pretrain), where a format does not say."""
HEADS = {768: 12, 1024: 16, 1280: 16}  # of the width: fairseq config/pretrain; HuBERT table I prints 8 for Base


def encoder_alone(state: Mapping[str, Tensor], dialect: Dialect, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Set aside what is not of the encoder: heads that have no place here, and what is around it.

    Args:
        state: State of a model in another system, without the heads that are known.
        dialect: Names of that system.
        path: File that errors name.

    Returns:
        State of the encoder, its names without a prefix, and what to tell of the rest: one sentence, or none.

    Raises:
        UserError: Some of the rest is inside the encoder, which then is another encoder than this.
    """
    prefix = prefix_of(state, dialect)
    inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    names = _names(dialect, count_layers(inside, dialect.conv), count_layers(inside, dialect.ffn_input))
    known = {name: value for name, value in inside.items() if name in names or _new_name(name) in names}
    rest = [name for name in inside if name not in known]
    roots = {pattern.split(".")[0] for pattern in dialect}
    if wrong := [name for name in rest if name.split(".")[0] in roots]:
        raise UserError(
            f"{path} has weights that this encoder has no place for ({summary_of(wrong)}); give a plain HuBERT"
        )
    rest += [name for name in state if not name.startswith(prefix)]
    return known, left_out(rest)


def left_out(names: Iterable[str]) -> list[str]:
    """What to tell of weights that are set aside: one sentence, or none."""
    rest = list(names)
    return [f"left out, since there is no place for it here: {summary_of(rest)}"] if rest else []


def shapes_of(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Settings of an encoder that its weights, under our names, tell: all but the number of heads and the dropout.

    Raises:
        UserError: Weights are missing that would tell.
    """
    wanted = (
        "convolutions.0.conv.weight",
        "projection.weight",
        f"positions.conv.{DIRECTION}",
        "layers.0.ffn_input.weight",
    )
    if missing := [name for name in wanted if name not in state or state[name].dim() < 2]:
        raise UserError(f"{path} lacks weights of the encoder ({summary_of(missing)}); give a whole HuBERT")
    conv, projection, positions, ffn = (state[name] for name in wanted)
    over_channels = "convolutions.1.norm.weight" in state
    return {
        "conv_channels": conv.shape[0],
        "conv_norm": "layer" if over_channels else "group",
        "conv_bias": "convolutions.0.conv.bias" in state,
        "dim": projection.shape[0],
        "num_layers": sum(name.endswith(".ffn_input.weight") for name in state),
        "ffn_dim": ffn.shape[0],
        "pos_kernel": positions.shape[-1],
        "pos_groups": positions.shape[0] // max(positions.shape[1], 1),
    }


def settings_of(values: Any, path: Path) -> EncoderConfig:
    """The size of an encoder that a file states, in our own words.

    Raises:
        UserError: It states none, or something that is none.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path} does not say how large its encoder is; give a checkpoint of `hubert fit` or `import`")
    if unknown := values.keys() - {field.name for field in fields(EncoderConfig)}:
        raise UserError(
            f"{path} has encoder settings we do not know ({summary_of(unknown)}); open it with its own version"
        )
    for name, value in values.items():
        default = getattr(EncoderConfig, name)
        if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            raise UserError(f"{path} sets the encoder's {name} to {shown(value)}, as nobody would; it is damaged")
        if isinstance(value, (int, float)) and not abs(value) < 2**63:
            raise UserError(f"{path} sets the encoder's {name} to {shown(value)}, as nobody would; it is damaged")
    try:
        return EncoderConfig(**values)
    except ValueError as error:
        raise UserError(f"{path} describes no encoder: {error}") from error


def heads_of(dim: int, num_heads: int | None, path: Path) -> int:
    """How many heads attend, where a format does not say: as in the released model of this width.

    Raises:
        UserError: None was released, and nobody says so.
    """
    if num_heads is None and dim not in HEADS:
        raise UserError(
            f"{path} has a width of {dim}, and does not tell how many heads attend; say so: hubert import {path} DEST "
            "--num_heads N"
        )
    return HEADS[dim] if num_heads is None else num_heads


def encoder_of(trained: Trained, path: Path) -> HubertEncoder:
    """The encoder in eval mode, on the CPU, in float32.

    Raises:
        UserError: Weights are missing, superfluous, of another shape than the settings ask for, or not finite.
    """
    layers = {name.split(".")[1] for name in trained.encoder if name.startswith("layers.")}
    asked = trained.config.num_layers
    if len(layers) < asked:
        raise UserError(
            f"{path} lacks weights of the encoder: its settings ask for {asked} layers, and it has {len(layers)}"
        )
    try:
        with torch.device("meta"):  # no time, and no random numbers, for weights that are replaced at once
            encoder = HubertEncoder(trained.config)
    except (RuntimeError, TypeError) as error:  # the second of what 64 bits cannot count
        said = str(error).split("\n")[0]
        raise UserError(f"{path} describes an encoder that no memory holds ({said}); it is damaged") from error
    load(encoder, trained.encoder, path, "encoder")
    return encoder.eval()


def linear_of(state: Mapping[str, Tensor], path: Path) -> nn.Linear:
    """The layer that spells, in eval mode."""
    weight = state["weight"]
    if weight.dim() != 2:
        raise UserError(f"{path}: the head has shape {tuple(weight.shape)}, and is a matrix; get it again")
    head = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    load(head, state, path, "layer that spells")
    return head.eval()


def predictors_of(trained: Trained, path: Path) -> list[ClusterPredictor]:
    """The heads of pre-training, in eval mode."""
    heads = []
    for state in trained.predictors:
        if state.keys() != {"codewords", "projection.weight", "projection.bias"} or state["codewords"].dim() != 2:
            raise UserError(f"{path} has half a head of pre-training ({summary_of(state)}); get it again")
        clusters, final_dim = state["codewords"].shape
        with torch.device("meta"):
            head = ClusterPredictor(trained.config.dim, clusters, final_dim, trained.temperature)
        load(head, state, path, "head of pre-training")
        heads.append(head.eval())
    return heads


def load(module: nn.Module, state: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Give a module weights that somebody else wrote.

    Raises:
        UserError: They are not those of such a module, or not finite.
    """
    expected = {name: value.shape for name, value in module.state_dict().items()}
    if missing := expected.keys() - state.keys():
        raise UserError(f"{path} lacks weights of the {what} ({summary_of(missing)}); give a whole HuBERT")
    if unexpected := state.keys() - expected.keys():
        raise UserError(
            f"{path} has weights that this {what} has no place for ({summary_of(unexpected)}); give a plain HuBERT"
        )
    for name, shape in expected.items():
        if state[name].shape != shape:
            found, wanted = tuple(state[name].shape), tuple(shape)
            raise UserError(
                f"{path}: {name} has shape {found}, but its settings ask for {wanted}; one of the two is wrong"
            )
        if not state[name].is_floating_point() or not bool(state[name].isfinite().all()):
            raise UserError(f"{path}: {name} has values that are no finite numbers; take a checkpoint from before")
    # Copies: a mapped file may be overwritten by the next checkpoint while we live
    module.load_state_dict({name: value.float().clone() for name, value in state.items()}, assign=True)


def spelling(
    tokens: Sequence[str], delimiter: str | None = BOUNDARY, spaced: bool | None = None, **printed: Any
) -> dict[str, Any]:
    """How a foreign system's tokens spell: in the case that its letters have, with spaces for punctuation.

    Args:
        tokens: Tokens, the blank first.
        delimiter: Token between words; none if it is not among them.
        spaced: Whether spaces part tokens, as phonemes; if not given, they do where no token parts words, and some
            tokens have several letters.
        **printed: Other arguments of data.text.Vocabulary.

    Returns:
        Arguments of data.text.Vocabulary.
    """
    letters = [token for token in tokens[1:] if token != delimiter and not is_special(token)]
    if delimiter not in tokens[1:]:
        delimiter = None
    if spaced is None:
        spaced = delimiter is None and any(len(token) > 1 and "▁" not in token for token in letters)
    made: dict[str, Any] = {
        "tokens": list(tokens),
        "case": "as_written" if spaced else _case(letters),
        "punctuation": "space",
    }
    made |= {} if delimiter == BOUNDARY else {"delimiter": delimiter}
    return made | ({"spaced": True} if spaced else {}) | printed


def tokens_with_boundary(vocabulary: Mapping[str, Any]) -> list[str]:
    """The tokens in a vocabulary's settings, as systems call them whose delimiter is always "|"."""
    return with_boundary(vocabulary["tokens"], vocabulary.get("delimiter", BOUNDARY))


def _case(letters: Sequence[str]) -> str:
    """The case of the letters, but for those that have no other one or whose other one is written with several."""
    cased = {one for letter in letters for one in letter if len(one.upper()) == len(one.lower()) == 1}
    cased = {one for one in cased if one.upper() != one.lower()}
    if cased and all(one == one.upper() for one in cased):
        return "upper"
    return "lower" if cased and all(one == one.lower() for one in cased) else "as_written"


def mask_embedding(dim: int) -> tuple[Tensor, str]:
    """For a model that was saved without one: drawn as fairseq does, U(0, 1), the same every time; and what to tell."""
    drawn = torch.rand(dim, generator=torch.Generator().manual_seed(0))
    return drawn, "it has no mask embedding, which is drawn anew: fine-tuning and pre-training will have to learn it"


def summary_of(names: Any) -> str:
    """The first of some names, and how many more there are."""
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first


def keeping(trained: Trained, system: str, settings: Mapping[str, Any]) -> Trained:
    """The model with settings of another system that this package does not use, for an export to that system.

    Args:
        trained: What was read of a file of that system.
        system: Name of its format.
        settings: Values by their names there; what is no plain value is left out.
    """
    plain = {name: value for name, value in settings.items() if _is_plain(value)}
    if not plain:
        return trained
    listed = ", ".join(f"{name} {value}" for name, value in sorted(plain.items()))
    source = {**trained.source, "settings": {**trained.source.get("settings", {}), system: plain}}
    return trained._replace(source=source, notes=[*trained.notes, f"not used here, kept for an export: {listed}"])


def kept_for(trained: Trained, system: str) -> dict[str, Any]:
    """The settings that `keeping` kept."""
    return dict((trained.source.get("settings") or {}).get(system) or {})


def trained_with(config: EncoderConfig, stated: Mapping[str, Any], path: Path) -> EncoderConfig:
    """An encoder's settings with those of its training, such as dropout, that are stated elsewhere."""
    return settings_of({**asdict(config), **stated}, path)


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return len(values) <= 16 and all(one is None or type(one) in (bool, int, float, str) for one in values)
