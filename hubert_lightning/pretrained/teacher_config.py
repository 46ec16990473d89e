"""Settings of a speech encoder of transformers, read from its directory and checked before anything is built.

Such a model is a teacher: its layers are clustered, but it is not trained here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from types import ModuleType
from typing import Any

from hubert_lightning.errors import UserError
from hubert_lightning.frames import CLOCK, HOP, SAMPLE_RATE, WINDOW, Clock
from hubert_lightning.model.config import MAX_SIZE
from hubert_lightning.pretrained.formats.transformers import read_extractor
from hubert_lightning.pretrained.formats.transformers_tokenizer import CONFIG_FILE
from hubert_lightning.untrusted.json_file import read_json_object, shown

FILTERBANK = "wav2vec2-bert"
"""Type of the models that read log-mel filterbanks in place of waveforms."""
SUPPORTED_TYPES = (
    *("wav2vec2", "wavlm", "data2vec-audio", "unispeech", "unispeech-sat", "wav2vec2-conformer", FILTERBANK),
    *("hubert", "sew", "sew-d"),
)
"""`model_type` of the encoders that can be teachers."""
MASK_PADDING = ("wav2vec2", "wavlm", "unispeech", "unispeech-sat", "hubert", FILTERBANK)
"""Types whose attention mask hides padding from every module; in others, convolutions see it."""
QUADRATIC = ("wavlm", "wav2vec2-conformer", FILTERBANK, "sew-d")
"""Types that store a number for every pair of frames: WavLM has a bias of attention for each head."""
QUADRATIC_WINDOW = 1_500
"""Frames, 30 s, that these encode at once: WavLM Base needs 0.3 GB for their biases, and 3.6 GB for 100 s."""
FRAME_LENGTH, FRAME_SHIFT = 400, 160
"""Samples of a filterbank frame, and from one to the next (transformers SeamlessM4TFeatureExtractor)."""
SEQUENCE_TO_SEQUENCE = ("whisper", "speech_to_text", "speecht5", "seamless_m4t", "seamless_m4t_v2", "moonshine")
MAX_LAYERS, MAX_LIST = 512, 64
IGNORED_SETTINGS = (
    *("transformers_version", "architectures", "output_hidden_states", "output_attentions", "return_dict", "dtype"),
    *("id2label", "label2id", "problem_type", "is_encoder_decoder", "add_adapter", "_name_or_path"),
)
"""Settings of the loading, of heads, and of adapters after the last layer."""
TRAINING_SETTINGS = ("dropout", "mask_", "layerdrop", "apply_spec_augment", "ctc_", "initializer_range", "_token_id")
"""Parts of the names of settings that do not change features."""


@dataclass(frozen=True)
class TeacherConfig:
    """Type, size and input of a speech encoder of transformers.

    Args:
        model_type: Type of the model in transformers.
        dim: Width of the Transformer.
        num_layers: Transformer layers.
        hop: Samples from one frame of the model to the next.
        normalize_waveform: Whether each utterance gets zero mean and unit variance.
        masks_padding: Whether the model gets an attention mask for a padded batch, as its feature extractor says.
        settings: Arguments of the config class of transformers.
        filterbank: Arguments of the feature extractor of a model that reads filterbanks.
    """

    model_type: str
    dim: int
    num_layers: int
    hop: int
    normalize_waveform: bool
    masks_padding: bool
    settings: Mapping[str, Any]
    filterbank: Mapping[str, Any]

    @property
    def clock(self) -> Clock:
        """Clock of the features, which is that of a standard model."""
        return CLOCK

    @property
    def reads_filterbanks(self) -> bool:
        """Whether the model reads filterbanks in place of waveforms."""
        return self.model_type == FILTERBANK

    @property
    def can_mask_padding(self) -> bool:
        """Whether an attention mask hides padding from every module of the model."""
        return self.model_type in MASK_PADDING

    @property
    def window_frames(self) -> int | None:
        """Frames of 20 ms that fit into memory at once; None for a model that stores no number per pair of frames."""
        return QUADRATIC_WINDOW if self.model_type in QUADRATIC else None

    def for_fingerprint(self) -> dict[str, Any]:
        """Settings that change features."""
        settings = {
            name: value for name, value in self.settings.items() if not any(part in name for part in TRAINING_SETTINGS)
        }
        preprocessing = {"normalize_waveform": self.normalize_waveform, "filterbank": dict(self.filterbank)}
        return {"model_type": self.model_type, **preprocessing, "settings": settings}


def has_config(path: Path) -> bool:
    """Tell whether a path is a directory with a config.json."""
    return path.is_dir() and (path / CONFIG_FILE).is_file()


def transformers_for(path: Path) -> ModuleType:
    """Import transformers, an optional dependency.

    Args:
        path: Model that needs it, which the error names.

    Raises:
        UserError: It is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"{path}: a teacher of this kind needs transformers, which is not installed; install "
            "hubert-lightning[teachers]"
        ) from error
    return transformers


def read_teacher_config(folder: Path) -> TeacherConfig:
    """Read the settings of a speech encoder, and check that its frames are ours.

    Args:
        folder: Directory with config.json, and perhaps preprocessor_config.json.

    Raises:
        UserError: A file is corrupt, the model is no speech encoder, or it has another sampling rate or hop.
    """
    file = folder / CONFIG_FILE
    content = read_json_object(file)
    model_type = content.get("model_type")
    if model_type not in SUPPORTED_TYPES:
        raise _unsupported(file, content)
    config_class = _config_class(folder, model_type)
    settings = {**config_class().to_dict(), **content}
    settings = {name: settings[name] for name in config_class().to_dict() if name not in IGNORED_SETTINGS}
    for name, value in settings.items():
        _check_setting(file, name, value)
    layers = settings.get("num_hidden_layers")
    if not isinstance(layers, int) or not 1 <= layers <= MAX_LAYERS:
        raise UserError(f"{file} sets num_hidden_layers to {shown(layers)}; a model has 1 to {MAX_LAYERS}")
    extractor = read_extractor(folder) or {}
    masks = settings.get("feat_extract_norm", "layer") == "layer"
    return TeacherConfig(
        model_type=model_type,
        dim=settings["hidden_size"],
        num_layers=layers,
        hop=_filterbank_hop(file, settings, extractor) if model_type == FILTERBANK else _hop(file, settings),
        normalize_waveform=model_type != FILTERBANK and bool(extractor.get("do_normalize", True)),
        masks_padding=bool(extractor.get("return_attention_mask", masks)),
        settings=settings,
        filterbank=_filterbank_settings(extractor) if model_type == FILTERBANK else {},
    )


def assumed_preprocessing(folder: Path, config: TeacherConfig) -> str | None:
    """Return a sentence about what is assumed of the input, for a directory without a feature extractor.

    Args:
        folder: Directory of the model.
        config: Its settings.
    """
    if read_extractor(folder) is not None:
        return None
    if config.reads_filterbanks:
        return f"{folder} has no preprocessor_config.json; assumed: 80 mel bands, two frames of 10 ms joined"
    masks = "masked" if config.masks_padding else "not masked"
    return (
        f"{folder} has no preprocessor_config.json; assumed, as by transformers' feature extractor: waveforms get zero "
        f"mean and unit variance, and padding is {masks}"
    )


def _config_class(folder: Path, model_type: str) -> Any:
    transformers = transformers_for(folder)
    configs = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if model_type not in configs:
        raise UserError(
            f"{folder / CONFIG_FILE} describes a model of type {model_type!r}, which transformers "
            f"{transformers.__version__} does not have; install a newer one"
        )
    return configs[model_type]


def _unsupported(file: Path, content: Mapping[str, Any]) -> UserError:
    """Return the error of a model that is no teacher, with the reason."""
    model_type = content.get("model_type")
    known = f"give an encoder of type {', '.join(SUPPORTED_TYPES[:-1])} or {SUPPORTED_TYPES[-1]}"
    if model_type == "whisper":
        return UserError(
            f"{file} describes whisper, a sequence-to-sequence model whose encoder reads every recording as 30 s of "
            f"log-mel frames, padded or cut, so that its features depend on the padding; {known}"
        )
    if model_type in SEQUENCE_TO_SEQUENCE or content.get("is_encoder_decoder") is True:
        return UserError(
            f"{file} describes a sequence-to-sequence model of type {shown(model_type)}, and labels need an encoder "
            f"alone, with a frame every 20 ms; {known}"
        )
    if isinstance(content.get("auto_map"), Mapping):
        return UserError(
            f"{file} names Python code of its own (auto_map) for a model of type {shown(model_type)}, and such code is "
            f"never run; {known}"
        )
    if "vocab_size" in content and not {"conv_stride", "num_mel_bins", "sampling_rate"} & content.keys():
        return UserError(f"{file} describes a model of type {shown(model_type)}, which reads text, not speech; {known}")
    return UserError(f"{file} describes a model of type {shown(model_type)}, which cannot be a teacher; {known}")


def _check_setting(file: Path, name: str, value: object) -> None:
    values = value if isinstance(value, list) else [value]
    is_plain = all(item is None or isinstance(item, (bool, int, float, str)) for item in values)
    numbers = [item for item in values if isinstance(item, (int, float))]
    if not is_plain or len(values) > MAX_LIST or any(abs(number) > MAX_SIZE for number in numbers):
        raise UserError(f"{file} sets {name} to {shown(value)}, which no such model has; copy or download it again")


def _hop(file: Path, settings: Mapping[str, Any]) -> int:
    """Samples from one frame of the convolutions to the next; every frame must see the samples that ours sees."""
    kernels, strides = settings.get("conv_kernel"), settings.get("conv_stride")
    if not (_are_sizes(kernels) and _are_sizes(strides) and len(kernels) == len(strides)):  # type: ignore[arg-type]
        raise UserError(
            f"{file} sets conv_kernel to {shown(kernels)} and conv_stride to {shown(strides)}, which are no lists of "
            "equal length; copy or download it again"
        )
    *before, hop = accumulate(strides, mul, initial=1)  # type: ignore[arg-type]
    window = 1 + sum((kernel - 1) * step for kernel, step in zip(kernels, before, strict=True))  # type: ignore[arg-type]
    squeezed = settings.get("squeeze_factor", 1)
    squeezed = squeezed if isinstance(squeezed, int) else 1
    window += (squeezed - 1) * hop  # means of so many frames
    hop *= squeezed
    _check_clock(file, hop, window)
    if settings.get("feat_extract_norm") == "group" and (kernels[0], strides[0]) != (10, 5):  # type: ignore[index]
        raise UserError(
            f"{file} sets the first kernel and stride to {kernels[0]} and {strides[0]}; with a group norm, only 10 and "  # type: ignore[index]
            "5 are supported"
        )
    return int(hop)


def _filterbank_hop(file: Path, settings: Mapping[str, Any], extractor: Mapping[str, Any]) -> int:
    values = _filterbank_settings(extractor)
    hop: int = FRAME_SHIFT * values["stride"]
    _check_clock(file, hop, FRAME_LENGTH)
    if (width := values["num_mel_bins"] * values["stride"]) != settings.get("feature_projection_input_dim"):
        raise UserError(
            f"{file} expects {shown(settings.get('feature_projection_input_dim'))} numbers a frame, but its feature "
            f"extractor gives {width}; copy or download both again"
        )
    return hop


def _filterbank_settings(extractor: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of SeamlessM4TFeatureExtractor."""
    default = {"num_mel_bins": 80, "stride": 2, "padding_value": 0.0}
    values = {name: extractor.get(name, value) for name, value in default.items()}
    for name in ("num_mel_bins", "stride"):
        if not isinstance(values[name], int) or not 1 <= values[name] <= 256:
            raise UserError(f"the feature extractor sets {name} to {shown(values[name])}; give 1 to 256")
    if not isinstance(values["padding_value"], (int, float)):
        raise UserError(f"the feature extractor sets padding_value to {shown(values['padding_value'])}; give a number")
    return values


def _check_clock(file: Path, hop: int, window: int) -> None:
    if hop not in (HOP, HOP // 2):
        raise UserError(
            f"{file} describes layers with a frame every {1000 * hop / SAMPLE_RATE:g} ms; a teacher needs one every "
            f"{1000 * HOP // SAMPLE_RATE} ms, or twice as many"
        )
    if window != WINDOW:
        raise UserError(
            f"{file} describes frames of {1000 * window / SAMPLE_RATE:g} ms; a teacher needs frames of "
            f"{1000 * WINDOW // SAMPLE_RATE} ms, so that its frames are those of this package for every length"
        )


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and bool(values) and all(type(value) is int and value >= 1 for value in values)
