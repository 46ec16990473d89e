"""Pre-trained weights under this package's names, and the modules built from them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hubert_lightning.errors import UserError
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.model.prediction import ClusterPredictor
from hubert_lightning.untrusted.json_file import shown
from hubert_lightning.vocabulary import Vocabulary


class OtherArchitecture(UserError):
    """A model is no HuBERT, but may be another speech encoder, whose layers can be clustered."""


@dataclass(frozen=True, eq=False)
class PretrainedWeights:
    """The weights of an encoder and of its heads.

    Args:
        config: Size of the encoder.
        encoder: State of a HubertEncoder.
        predictors: States of the heads of pre-training, one for each stream of labels.
        temperature: Temperature of these heads.
        head: weight (tokens, dim) and bias (tokens,) of the CTC head, the blank first.
        vocabulary: Tokens of the CTC head.
        special_codewords: (4, final dim), codewords of fairseq's own symbols, of each stream.
        provenance: Facts about where the weights come from, by name.
        notes: Sentences about an import: weights that were left out, values that were assumed.
        vocabulary_note: Sentence about a vocabulary that was assumed, or that cannot be used.
        intermediate_predictors: States of the heads of intermediate layers, one for each stream, by the number of the
            layer; checkpoints of a fit alone have them.
    """

    config: EncoderConfig
    encoder: Mapping[str, Tensor]
    predictors: Sequence[Mapping[str, Tensor]] = ()
    temperature: float = 0.1
    head: Mapping[str, Tensor] | None = None
    vocabulary: Vocabulary | None = None
    special_codewords: Sequence[Tensor] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)  # JSON values
    notes: Sequence[str] = ()
    vocabulary_note: str | None = None
    intermediate_predictors: Mapping[str, Sequence[Mapping[str, Tensor]]] = field(default_factory=dict)

    @property
    def num_clusters(self) -> list[int]:
        """Clusters of each stream of labels."""
        return [len(predictor["codewords"]) for predictor in self.predictors]

    def with_vocabulary(self, settings: Mapping[str, Any]) -> "PretrainedWeights":
        """Add the vocabulary that a file describes; if it cannot be used, add the reason as a note.

        The encoder of a model whose vocabulary is corrupt stays usable.

        Args:
            settings: Arguments of `Vocabulary`.
        """
        try:
            return replace(self, vocabulary=Vocabulary(**settings), vocabulary_note=None)
        except (UserError, TypeError) as error:  # TypeError: arguments that are unknown, or no mapping
            return replace(self, vocabulary=None, vocabulary_note=f"its vocabulary cannot be used: {error}")


class Export(NamedTuple):
    """The files of a model for another system.

    Args:
        files: Names and contents of the files in a folder.
        rest: Weights and settings that the format cannot hold, for an additional file of this package; None if there
            are none.
    """

    files: dict[str, bytes]
    rest: PretrainedWeights | None = None


def encoder_config_from(values: object, path: Path) -> EncoderConfig:
    """Check the settings of an encoder that a file holds under our names.

    Args:
        values: Arguments of `EncoderConfig`, as the file has them.
        path: File that errors name.

    Raises:
        UserError: There are no settings, or some that no encoder has.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path} does not say how large its encoder is; give a checkpoint of `hubert fit` or `import`")
    if unknown := values.keys() - {field.name for field in fields(EncoderConfig)}:
        raise UserError(
            f"{path} has unknown encoder settings ({abbreviated(unknown)}); open it with the version that wrote it"
        )
    for name, value in values.items():
        default = getattr(EncoderConfig, name)
        is_expected = type(value) is type(default) or (isinstance(default, float) and type(value) is int)
        if isinstance(default, tuple):  # a list in JSON
            is_expected = isinstance(value, (list, tuple)) and len(value) <= 99 and all(type(n) is int for n in value)
        if not is_expected or (isinstance(value, (int, float)) and not abs(value) < 2**63):
            raise UserError(f"{path} sets the encoder's {name} to {shown(value)}; it is corrupt, so copy it again")
    try:
        return EncoderConfig(**values)
    except UserError as error:
        raise UserError(f"{path} describes no encoder: {error}") from error


def build_encoder(weights: PretrainedWeights, path: Path) -> HubertEncoder:
    """Build the encoder in eval mode, on the CPU, in float32.

    Args:
        weights: Weights of the encoder.
        path: File that errors name.

    Raises:
        UserError: Weights are missing, superfluous, of another shape than the settings ask for, or not finite.
    """
    layers = {name.split(".")[1] for name in weights.encoder if name.startswith("layers.")}
    num_layers = weights.config.num_layers
    if len(layers) < num_layers:
        raise UserError(
            f"{path} lacks weights of the encoder: its settings ask for {num_layers} layers, and it has {len(layers)}"
        )
    try:
        with torch.device("meta"):  # takes no time, and no random numbers, for weights that are replaced at once
            encoder = HubertEncoder(weights.config)
    except (RuntimeError, TypeError) as error:  # TypeError: sizes above 64 bits
        reason = str(error).split("\n")[0]
        raise UserError(f"{path} describes an encoder that fits into no memory ({reason}); it is corrupt") from error
    load_state(encoder, weights.encoder, path, "encoder")
    return encoder.eval()


def build_ctc_head(weights: PretrainedWeights, path: Path) -> tuple[nn.Linear, Vocabulary]:
    """Build the CTC head in eval mode, and return it with its vocabulary.

    Args:
        weights: Weights of a fine-tuned model.
        path: File that errors name.

    Raises:
        UserError: The model was not fine-tuned, or its head does not fit its vocabulary.
    """
    if weights.head is None or weights.head.keys() != {"weight", "bias"}:
        raise UserError(f"{path} has no CTC head; give a model that was fine-tuned with CTC")
    if weights.head["weight"].dim() != 2:
        shape = tuple(weights.head["weight"].shape)
        raise UserError(f"{path} has a CTC head of shape {shape}, which is not a matrix; copy it again")
    num_tokens, dim = weights.head["weight"].shape
    vocabulary = weights.vocabulary
    if vocabulary is None and weights.vocabulary_note is not None:
        raise UserError(f"{path}: {weights.vocabulary_note}")
    if vocabulary is None:
        raise UserError(
            f"{path} does not say what its {num_tokens} tokens are; put its tokenizer's vocab.json into the directory, "
            "fairseq's dict.ltr.txt beside it, or a vocabulary as of `hubert vocabulary` into `hubert import "
            "--vocabulary`"
        )
    if num_tokens != len(vocabulary):
        raise UserError(
            f"{path} has a CTC head for {num_tokens} tokens, and its vocabulary has {len(vocabulary)}; one of them is "
            "another model's"
        )
    head = nn.Linear(dim, num_tokens, device="meta")
    load_state(head, weights.head, path, "CTC head")
    return head.eval(), vocabulary


def build_predictors(weights: PretrainedWeights, path: Path) -> list[ClusterPredictor]:
    """Build the heads of pre-training in eval mode.

    Args:
        weights: Weights of a pre-trained model.
        path: File that errors name.

    Raises:
        UserError: A part of a head is missing, or has another shape than the rest.
    """
    heads = []
    for state in weights.predictors:
        if state.keys() != {"codewords", "projection.weight", "projection.bias"} or state["codewords"].dim() != 2:
            raise UserError(f"{path} has half a head of pre-training ({abbreviated(state)}); copy or download it again")
        clusters, final_dim = state["codewords"].shape
        with torch.device("meta"):
            head = ClusterPredictor(weights.config.dim, clusters, final_dim, weights.temperature)
        load_state(head, state, path, "head of pre-training")
        heads.append(head.eval())
    return heads


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path, part: str) -> None:
    """Load weights from a file into a module.

    Args:
        module: Module, whose own weights may lie on the meta device.
        state: Weights by name.
        path: File that errors name.
        part: Name of the module in errors.

    Raises:
        UserError: Weights are missing, superfluous, of another shape, or not finite.
    """
    expected = {name: value.shape for name, value in module.state_dict().items()}
    if missing := expected.keys() - state.keys():
        raise UserError(f"{path} lacks weights of the {part} ({abbreviated(missing)}); give a whole HuBERT")
    if unexpected := state.keys() - expected.keys():
        raise UserError(
            f"{path} has weights that this {part} cannot use ({abbreviated(unexpected)}); give a plain HuBERT"
        )
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(state[name].shape)}, but its settings ask for {tuple(shape)}; one of "
                "the two is wrong"
            )
        if not state[name].is_floating_point() or not bool(state[name].isfinite().all()):
            raise UserError(f"{path}: {name} has values that are NaN or infinite; use an earlier checkpoint")
    # Copies: a mapped file may be overwritten by the next checkpoint while this process lives
    module.load_state_dict({name: value.float().clone() for name, value in state.items()}, assign=True)


def abbreviated(names: Iterable[str]) -> str:
    """Shorten a list of names to the first one and the number of others."""
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first
