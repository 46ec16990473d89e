"""Any speech encoder of transformers behind the interface of our own: WavLM, wav2vec 2.0, data2vec and others.

The network is that of transformers. Its input is made as its feature extractor makes it, its layers are its
`hidden_states` (tests/pretrained/test_transformers_encoder.py), and its frames are those of this package.
"""

import hashlib
import json
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_lightning.errors import UserError
from hubert_lightning.frames import HOP, SAMPLE_RATE, WINDOW, num_frames, padding_mask
from hubert_lightning.model.config import MAX_PARAMETERS
from hubert_lightning.model.convolutions import (
    WaveformStatistics,
    check_length,
    normalize,
    normalize_by,
)
from hubert_lightning.model.devices import without_waiting
from hubert_lightning.model.windows import normed_over_time
from hubert_lightning.pretrained.dialect import new_name
from hubert_lightning.pretrained.formats.transformers import read_state
from hubert_lightning.pretrained.teacher_config import (
    FRAME_SHIFT,
    TeacherConfig,
    assumed_preprocessing,
    read_teacher_config,
    transformers_for,
)
from hubert_lightning.pretrained.weights import abbreviated

log = logging.getLogger(__name__)

VARIANCE_EPSILON = 1e-7
"""Added to the variance of a waveform (transformers Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm)."""
PIECE_FRAMES = 1_500
"""Frames, 30 s, that are convolved at once."""
MASK_EMBEDDING = "masked_spec_embed"
"""Weight that features do not need, which transformers leaves out of some models."""

_one_call = threading.Lock()  # a call changes the model while it lasts


class TransformersEncoder(nn.Module):
    """Contextual features of 16 kHz audio by a speech encoder of transformers, one frame per 20 ms.

    It is a teacher: its layers can be clustered, but training, fine-tuning and export need a HubertEncoder.

    Args:
        model: Model of transformers, without heads.
        config: What the model is, and how its input is made.
        fingerprint: Short name that encoders share only if they compute the same features.
    """

    def __init__(self, model: nn.Module, config: TeacherConfig, fingerprint: str) -> None:
        super().__init__()
        self.config = config
        self.fingerprint = fingerprint
        self.model: Any = model
        self._frontend = None
        if not config.reads_filterbanks:
            self._frontend = Frontend(self.model.feature_extractor, config.hop)
            self.model.feature_extractor = self._frontend
        self._extractor = _filterbank_extractor(config) if config.reads_filterbanks else None

    @property
    def uses_statistics(self) -> bool:
        """Whether the model has norms over time that can follow a whole recording."""
        return self.config.normalize_waveform or (self._frontend is not None and self._frontend.norms_over_time)

    def check_layer(self, layer: int) -> None:
        """Check that the encoder has a layer.

        Raises:
            UserError: The number is below 1, or above the number of layers.
        """
        if not 1 <= layer <= self.config.num_layers:
            raise UserError(f"layer {layer} of an encoder of {self.config.num_layers} layers; they count from 1")

    def forward(self, waveform: Tensor, length: Tensor | None = None) -> Tensor:
        """Compute the output of the encoder, with the norm after its last layer if it has one.

        Args:
            waveform: (batch, samples).
            length: (batch,), samples before padding.

        Returns:
            (batch, frames, dim); frames of padding have no meaning.
        """
        return self._outputs(waveform, length, [], ignore_padding=False)[-1]

    def features(
        self,
        waveform: Tensor,
        length: Tensor | None = None,
        *,
        layer: int,
        ignore_padding: bool = False,
        statistics: WaveformStatistics | None = None,
    ) -> Tensor:
        """Compute the output of one Transformer layer; later layers are not computed.

        The output is `hidden_states[layer]` of transformers: without the norm that some models have after the last
        layer.

        Args:
            waveform: (batch, samples).
            length: (batch,), samples before padding; None if nothing is padded.
            layer: Number of the layer, counted from 1.
            ignore_padding: Whether the features of an utterance are the same as in a batch of one; otherwise padding is
                masked or not as the model's feature extractor says.
            statistics: Statistics of the recordings that the waveforms are parts of, for the norms over time.

        Returns:
            (batch, frames, dim).

        Raises:
            UserError: The encoder has no such layer, or an utterance is shorter than a frame.
        """
        self.check_layer(layer)
        return self._outputs(waveform, length, [layer], ignore_padding, statistics)[0]

    def features_of_layers(
        self,
        waveform: Tensor,
        length: Tensor | None = None,
        *,
        layers: Sequence[int],
        ignore_padding: bool = False,
        statistics: WaveformStatistics | None = None,
    ) -> list[Tensor]:
        """Compute the outputs of several Transformer layers in one pass, as `features`.

        Args:
            waveform: (batch, samples).
            length: (batch,), samples before padding.
            layers: Numbers of the layers, counted from 1.
            ignore_padding: Whether the features of an utterance are the same as in a batch of one.
            statistics: Statistics of the recordings that the waveforms are parts of, for the norms over time.

        Returns:
            (batch, frames, dim) of each layer, in the order of `layers`.

        Raises:
            UserError: The encoder lacks a layer, or an utterance is shorter than a frame.
        """
        for layer in layers:
            self.check_layer(layer)
        ascending = sorted(set(layers))
        outputs = self._outputs(waveform, length, ascending, ignore_padding, statistics)
        return [outputs[ascending.index(layer)] for layer in layers]

    def all_layers(
        self,
        waveform: Tensor,
        length: Tensor | None = None,
        *,
        ignore_padding: bool = False,
        with_input: bool = False,
    ) -> list[Tensor]:
        """Compute the features of every layer in one pass.

        Args:
            waveform: (batch, samples).
            length: (batch,), samples before padding.
            ignore_padding: Whether the features of an utterance are the same as in a batch of one.
            with_input: Whether the input of the first layer, "layer 0", comes before the layers: `hidden_states[0]`.

        Returns:
            (batch, frames, dim) for each layer, as `features` returns it.
        """
        layers = [*range(0 if with_input else 1, self.config.num_layers + 1)]
        return self._outputs(waveform, length, layers, ignore_padding)[:-1]

    def _outputs(
        self,
        waveform: Tensor,
        length: Tensor | None,
        layers: Sequence[int],
        ignore_padding: bool,
        statistics: WaveformStatistics | None = None,
    ) -> list[Tensor]:
        """Outputs of layers, and that of the last layer that is computed, with the norm after it."""
        check_length(waveform, length, WINDOW)
        if length is None or not ignore_padding or self.config.can_mask_padding:
            return self._in_one_batch(waveform, length, layers, ignore_padding, statistics)
        rows = []
        for row, samples in enumerate(length.tolist()):
            own = statistics and WaveformStatistics(*(value[row : row + 1] for value in statistics))
            rows.append(self._in_one_batch(waveform[row : row + 1, :samples], None, layers, True, own))
        frames = num_frames(waveform.shape[1])
        return [torch.cat([_with_frames(row[number], frames) for row in rows]) for number in range(len(layers) + 1)]

    def _in_one_batch(
        self,
        waveform: Tensor,
        length: Tensor | None,
        layers: Sequence[int],
        ignore_padding: bool,
        statistics: WaveformStatistics | None,
    ) -> list[Tensor]:
        # Where the model gets no mask, its feature extractor normalises padding with the rest of the row
        seen = length if ignore_padding or self.config.masks_padding else None
        mask = None
        if self._extractor is not None:
            inputs, mask = self._filterbanks(waveform, length)
        else:
            inputs = waveform
            if self.config.normalize_waveform and statistics is not None:
                inputs, statistics = normalize_by(waveform, statistics, VARIANCE_EPSILON)
            elif self.config.normalize_waveform:
                inputs = normalize(waveform, seen, VARIANCE_EPSILON)
            if seen is not None:
                mask = (~padding_mask(without_waiting(seen, waveform.device), waveform.shape[1])).long()
        with _one_call, warnings.catch_warnings(), self._watched(layers) as outputs:
            warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")  # in transformers' WavLM
            if self._frontend is not None:
                # Without a mask, and by default with one too, transformers' group norm includes padding
                self._frontend.length = length if ignore_padding else None
                self._frontend.statistics = statistics
            last = self.model(inputs, attention_mask=mask, return_dict=True).last_hidden_state
        step, frames = HOP // self.config.hop, num_frames(waveform.shape[1])
        results = [_with_frames(output[:, ::step], frames) for output in (*outputs, last)]
        if self._extractor is None or mask is None:
            return results
        return [_end_repeated(output, mask[:, ::step]) for output in results]

    @contextmanager
    def _watched(self, layers: Sequence[int]) -> Iterator[list[Tensor]]:
        """Collect the outputs of layers in ascending order, 0 for the input of the first, and leave out later ones."""
        outputs: list[Tensor] = []

        def keep_input(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            outputs.append(arguments[0])

        def keep(_: nn.Module, __: object, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        owner, name = _layers_of(self.model, self.config.num_layers)
        everything = getattr(owner, name)
        if layers:
            setattr(owner, name, everything[: max(layers)])
        handles = [everything[layer - 1].register_forward_hook(keep) for layer in layers if layer]
        if 0 in layers:
            handles.append(everything[0].register_forward_pre_hook(keep_input))
        try:
            yield outputs
        finally:
            setattr(owner, name, everything)
            for handle in handles:
                handle.remove()

    def _filterbanks(self, waveform: Tensor, length: Tensor | None) -> tuple[Tensor, Tensor]:
        """Filterbanks of a batch, (batch, frames, bands), and their mask, (batch, frames)."""
        assert self._extractor is not None
        lengths = [waveform.shape[1]] * len(waveform) if length is None else length.tolist()
        rows = [row[:samples].float().cpu() for row, samples in zip(waveform, lengths, strict=True)]
        # The variance of a single frame is not defined; silence adds a second one
        shortest = WINDOW + FRAME_SHIFT
        rows = [torch.cat([row, row.new_zeros(max(shortest - len(row), 0))]) for row in rows]
        made = self._extractor([row.numpy() for row in rows], sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return made["input_features"].to(waveform.device), made["attention_mask"].to(waveform.device)


class Frontend(nn.Module):
    """The convolutions of a model, on pieces of long audio, with a norm over time that can follow a whole recording.

    Args:
        convolutions: Convolutions of transformers.
        hop: Samples from one of their frames to the next.
    """

    def __init__(self, convolutions: Any, hop: int) -> None:
        super().__init__()
        self.convolutions, self.hop = convolutions, hop
        self.length: Tensor | None = None
        """(batch,), samples before padding, which the norm over time then ignores."""
        self.statistics: WaveformStatistics | None = None
        """Statistics of the whole recordings."""

    @property
    def norms_over_time(self) -> bool:
        """Whether the first convolution is normalised over time."""
        return isinstance(getattr(self.convolutions.conv_layers[0], "layer_norm", None), nn.GroupNorm)

    def forward(self, waveform: Tensor) -> Tensor:
        """Convolve a batch.

        Args:
            waveform: (batch, samples).

        Returns:
            (batch, channels, frames).
        """
        if self.norms_over_time and self.statistics is None:
            return self._convolved(waveform)
        return torch.cat([self._convolved(piece) for piece in self._pieces(waveform)], dim=2)

    def _pieces(self, waveform: Tensor) -> Iterator[Tensor]:
        """Cut waveforms so that the frames of the pieces, concatenated, are those of the whole."""
        frames, most = (waveform.shape[1] - WINDOW) // self.hop + 1, PIECE_FRAMES * HOP // self.hop
        for first in range(0, frames, most):
            count = min(most, frames - first)
            yield waveform[:, first * self.hop : (first + count - 1) * self.hop + WINDOW]

    def _convolved(self, waveform: Tensor) -> Tensor:
        if not self.norms_over_time or (self.length is None and self.statistics is None):
            x: Tensor = self.convolutions(waveform)
            return x
        first, *others = self.convolutions.conv_layers
        conv = first.conv
        x = normed_over_time(waveform, conv.weight, conv.bias, first.layer_norm, self.length, self.statistics)
        count = (waveform.shape[1] - conv.kernel_size[0]) // conv.stride[0] + 1
        x = first.activation(x[:, :count].transpose(1, 2))
        for layer in others:
            x = layer(x)
        return x


def load_transformers_encoder(folder: Path) -> TransformersEncoder:
    """Load a speech encoder of transformers in eval mode, on the CPU, in float32.

    Args:
        folder: Directory with config.json and weights. No code in it is run.

    Raises:
        UserError: A file is missing or corrupt, transformers is not installed, or the model cannot be a teacher.
    """
    config = read_teacher_config(folder)
    if note := assumed_preprocessing(folder, config):
        log.warning(note)
    with torch.random.fork_rng(devices=[]):
        state, model = _checked_state(folder, config)
    transformers = transformers_for(folder)
    with _quiet(transformers), torch.random.fork_rng(devices=[]):
        built = type(model).from_pretrained(None, config=model.config, state_dict=dict(state)).float().eval()
    digest = hashlib.sha256(json.dumps(config.for_fingerprint(), sort_keys=True).encode())
    for name, value in sorted(state.items()):
        if name != MASK_EMBEDDING:
            digest.update(name.encode())
            digest.update(value.numpy().tobytes())
    return TransformersEncoder(built, config, digest.hexdigest()[:16]).eval()


def check_transformers_encoder(folder: Path) -> TeacherConfig:
    """Check that `load_transformers_encoder` can load a model, and return its settings.

    Args:
        folder: Directory with config.json and weights.

    Raises:
        UserError: As of `load_transformers_encoder`.
    """
    config = read_teacher_config(folder)
    _checked_state(folder, config)
    return config


def _checked_state(folder: Path, config: TeacherConfig) -> tuple[dict[str, Tensor], Any]:
    """Weights of the encoder in float32, without heads, and the model without weights."""
    model = _without_weights(folder, config)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    if sum(shape.numel() for shape in expected.values()) > MAX_PARAMETERS:
        raise UserError(f"{folder} describes an encoder that fits into no memory; it is corrupt")
    state = _of_encoder(read_state(folder), f"{model.base_model_prefix}.")
    if MASK_EMBEDDING in expected and MASK_EMBEDDING not in state:
        state[MASK_EMBEDDING] = torch.zeros(expected[MASK_EMBEDDING])
    if missing := expected.keys() - state.keys():
        raise UserError(f"{folder} lacks weights of the encoder ({abbreviated(missing)}); copy or download it again")
    parts = {name.partition(".")[0] for name in expected}
    if unknown := [name for name in state if name not in expected and name.partition(".")[0] in parts]:
        raise UserError(
            f"{folder} has weights that a model of type {config.model_type!r} does not have ({abbreviated(unknown)}); "
            "its config.json is another model's"
        )
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise UserError(
                f"{folder}: {name} has shape {tuple(state[name].shape)}, but config.json asks for {tuple(shape)}; one "
                "of the two is wrong"
            )
        if state[name].is_floating_point() and not bool(state[name].isfinite().all()):
            raise UserError(f"{folder}: {name} has values that are NaN or infinite; copy or download it again")
    copies = {name: state[name].float() if state[name].is_floating_point() else state[name] for name in expected}
    return {name: value.clone() for name, value in copies.items()}, model


def _without_weights(folder: Path, config: TeacherConfig) -> Any:
    """Build the model on the meta device, which takes no memory and no random numbers."""
    transformers = transformers_for(folder)
    auto = transformers.models.auto
    try:
        settings = auto.configuration_auto.CONFIG_MAPPING[config.model_type](**config.settings)
        with torch.device("meta"):
            model = auto.modeling_auto.MODEL_MAPPING[type(settings)](settings)
        _layers_of(model, config.num_layers)
    except Exception as error:  # whatever transformers raises for settings that no model has
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{folder}: transformers cannot build this model ({reason}); copy or download it again"
        ) from error
    return model


def _of_encoder(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Name weights as in a model without heads, since torch 2.0."""
    inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return {new_name(name): value for name, value in (inside or state).items()}


def _layers_of(model: Any, num_layers: int) -> tuple[nn.Module, str]:
    """Find the list of Transformer layers: the module that has it, and its name there."""
    for owner in model.encoder.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == num_layers and name in ("layers", "layer"):
                return owner, name
    raise UserError(f"a {type(model).__name__} without a list of {num_layers} layers")


def _filterbank_extractor(config: TeacherConfig) -> Any:
    import transformers

    bands = config.filterbank["num_mel_bins"]
    settings = {"feature_size": bands, "sampling_rate": SAMPLE_RATE, **config.filterbank}
    return transformers.SeamlessM4TFeatureExtractor(**settings)  # type: ignore[no-untyped-call]


def _with_frames(x: Tensor, frames: int) -> Tensor:
    """Cut or pad (batch, frames, dim) to a number of frames."""
    return F.pad(x[:, :frames], (0, 0, 0, max(frames - x.shape[1], 0)))


def _end_repeated(x: Tensor, mask: Tensor) -> Tensor:
    """Repeat the last frame that a model has seen, for a recording whose last 20 ms are half a frame of filterbanks.

    Args:
        x: (batch, frames, dim).
        mask: (batch, frames), 1 for frames that the model has seen.
    """
    frames = torch.arange(x.shape[1], device=x.device)
    last = mask.sum(dim=1).clamp(min=1)[:, None] - 1
    return x.gather(1, torch.minimum(frames[None], last)[..., None].expand_as(x))


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the progress bar and the report of loading, whose facts have been checked."""
    logging_of = transformers.utils.logging
    verbosity, shows_bars = logging_of.get_verbosity(), logging_of.is_progress_bar_enabled()
    logging_of.set_verbosity_error()
    logging_of.disable_progress_bar()
    try:
        yield
    finally:
        logging_of.set_verbosity(verbosity)
        if shows_bars:
            logging_of.enable_progress_bar()
