"""Directories of transformers: a HuBERT or a WavLM, also with a CTC head, a processor and a tokenizer, or in shards."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.frames import HOP, SAMPLE_RATE
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.pretrained.checkpoint_source import CheckpointSource, read_safetensors
from hubert_lightning.pretrained.dialect import Dialect, from_ours, has_part, prefix_of
from hubert_lightning.pretrained.foreign_weights import (
    RELEASED_REGULARISATION,
    drawn_mask_embedding,
    encoder_state,
    foreign_settings,
    with_foreign_settings,
)
from hubert_lightning.pretrained.formats.transformers_tokenizer import (
    CONFIG_FILE,
    has_tokenizer,
    read_tokenizer,
    tokenizer_files,
    tokens_by_id,
)
from hubert_lightning.pretrained.weights import (
    Export,
    OtherArchitecture,
    PretrainedWeights,
    abbreviated,
    encoder_config_from,
)
from hubert_lightning.untrusted.json_file import read_json_object, shown
from hubert_lightning.untrusted.torch_file import read_torch

WEIGHTS_FILE, OLD_WEIGHTS_FILE = "model.safetensors", "pytorch_model.bin"
OTHER_LIBRARIES = ("flax_model.msgpack", "tf_model.h5")  # weights that only JAX or TensorFlow reads
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
ENCODER_PREFIXES = ("hubert.", "wavlm.")  # in a model with a head
SAVE_AGAIN = "open the model in transformers and save_pretrained() it"

DIALECT = Dialect(
    conv="feature_extractor.conv_layers.{}.conv",
    conv_norm="feature_extractor.conv_layers.{}.layer_norm",
    local_norm="feature_projection.layer_norm",
    projection="feature_projection.projection",
    positions="encoder.pos_conv_embed.conv",
    norm="encoder.layer_norm",
    attention="encoder.layers.{}.attention.{}_proj",
    attention_output="encoder.layers.{}.attention.out_proj",
    attention_norm="encoder.layers.{}.layer_norm",
    ffn_input="encoder.layers.{}.feed_forward.intermediate_dense",
    ffn_output="encoder.layers.{}.feed_forward.output_dense",
    ffn_norm="encoder.layers.{}.final_layer_norm",
    mask_embedding="masked_spec_embed",
    position_gate="encoder.layers.{}.attention.gru_rel_pos_linear",
    position_scale="encoder.layers.{}.attention.gru_rel_pos_const",
    relative_positions="encoder.layers.0.attention.rel_attn_embed",
    batch_norm="encoder.pos_conv_embed.batch_norm",
)
SETTINGS = {
    "conv_bias": "conv_bias",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "pre_norm": "do_stable_layer_norm",
    "pos_kernel": "num_conv_pos_embeddings",
    "pos_groups": "num_conv_pos_embedding_groups",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "input_dropout": "feat_proj_dropout",
    "layer_drop": "layerdrop",
    "conv_kernels": "conv_kernel",
    "conv_strides": "conv_stride",
}
"""Argument of `EncoderConfig` → setting of HubertConfig and WavLMConfig."""
HUBERT_SETTINGS = {"pos_batch_norm": "conv_pos_batch_norm"}
"""Argument of `EncoderConfig` → setting of HubertConfig alone, which older directories lack."""
WAVLM_SETTINGS = {"position_buckets": "num_buckets", "position_distance": "max_bucket_distance"}
"""Argument of `EncoderConfig` → setting of WavLMConfig alone."""
UNUSED_SETTINGS = (
    *("apply_spec_augment", "mask_time_prob", "mask_time_length", "mask_time_min_masks"),
    *("mask_feature_prob", "mask_feature_length", "mask_feature_min_masks"),
    *("final_dropout", "ctc_loss_reduction", "ctc_zero_infinity", "initializer_range"),
    *("use_weighted_layer_sum", "classifier_proj_size"),
)
"""Settings that this package has elsewhere (masks belong to the data) or not at all."""
FIXED: dict[str, Any] = {"hidden_act": "gelu", "feat_extract_activation": "gelu", "layer_norm_eps": 1e-5}
HUBERT_FIXED = FIXED | {"feat_proj_layer_norm": True, "adapter_attn_dim": None}
WAVLM_FIXED = FIXED | {"add_adapter": False}
"""Settings that have one value in every HuBERT or WavLM."""


def has_names(state: Mapping[str, object]) -> bool:
    """Tell whether a state dict has the names of transformers, also inside a larger module."""
    return has_part(state, DIALECT.projection)


def matches(source: CheckpointSource) -> bool:
    """Tell whether a folder is one of `save_pretrained`, or a file holds weights of such a model."""
    is_directory = source.path.is_dir() and (source.path / CONFIG_FILE).exists()
    return is_directory or has_names(source.state)


def read(source: CheckpointSource, num_heads: int | None = None) -> PretrainedWeights:
    """Read a directory that `save_pretrained` wrote.

    Args:
        source: Directory.
        num_heads: Ignored; its config.json states the heads.

    Raises:
        UserError: A file is missing or corrupt, or the model is no HuBERT.
    """
    folder = source.path
    if not folder.is_dir():
        raise UserError(f"{folder} holds weights of transformers without settings; give the directory of config.json")
    config, state = _read_encoder_config(folder), read_state(folder)
    prefix = prefix_of(state, DIALECT)
    for inside in ENCODER_PREFIXES:
        prefix = prefix.removesuffix(inside)
    prefix = f"{prefix}lm_head."
    head = {part: state.pop(prefix + part) for part in ("weight", "bias") if prefix + part in state}
    if len(head) == 1:
        raise UserError(f"{folder} has half a CTC head, {prefix}{abbreviated(head)} alone; save the model again")
    encoder, notes = encoder_state(state, DIALECT, folder)
    if "mask_embedding" not in encoder:  # transformers leaves it out where a model was configured without masking
        encoder["mask_embedding"], note = drawn_mask_embedding(config.dim)
        notes.append(note)
    weights = PretrainedWeights(config, encoder, head=head or None, notes=notes)
    if head and has_tokenizer(folder):
        order, vocabulary = read_tokenizer(folder, len(head["weight"]))
        head = {part: value[order] for part, value in head.items()}
        weights = replace(weights, head=head).with_vocabulary(vocabulary)
    return _with_unused_settings(folder, weights)


def _with_unused_settings(folder: Path, weights: PretrainedWeights) -> PretrainedWeights:
    """Keep the settings of config.json that are not of an encoder, for `write`."""
    config = read_json_object(folder / CONFIG_FILE)
    settings = {name: config[name] for name in UNUSED_SETTINGS if name in config}
    if weights.head is not None:  # `write` knows these ids of a vocabulary that has the tokens
        vocabulary = weights.vocabulary
        tokens = {"bos_token_id": vocabulary and vocabulary.start, "eos_token_id": vocabulary and vocabulary.end}
        missing = [name for name, token in tokens.items() if token is None]
        settings |= {name: config[name] for name in missing if config.get(name) is not None}
    return with_foreign_settings(weights, "transformers", settings)


def _read_encoder_config(folder: Path) -> EncoderConfig:
    """Read the size of the encoder in a directory.

    Raises:
        UserError: The directory has the config of another model.
    """
    file = folder / CONFIG_FILE
    content = read_json_object(file)
    if content.get("model_type") not in ("hubert", "wavlm"):
        raise OtherArchitecture(
            f"{file} describes a model of type {shown(content.get('model_type'))}, not 'hubert' or 'wavlm'; its layers "
            "can make labels and units, but training, fine-tuning and export need a HuBERT or a WavLM"
        )
    is_wavlm = content["model_type"] == "wavlm"
    names, fixed = (SETTINGS | WAVLM_SETTINGS, WAVLM_FIXED) if is_wavlm else (SETTINGS, HUBERT_FIXED)
    required = ["conv_dim", "feat_extract_norm", *names.values()]
    if missing := [name for name in required if name not in content]:
        raise UserError(f"{file} lacks {abbreviated(missing)}; {SAVE_AGAIN}")
    channels = content["conv_dim"][0] if isinstance(content["conv_dim"], list) and content["conv_dim"] else None
    kernels = content["conv_kernel"]
    counts = {
        name: len(content[name])
        for name in ("conv_dim", "conv_kernel", "conv_stride")
        if isinstance(content[name], list)
    }
    if len(set(counts.values())) > 1:
        numbers = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise UserError(f"{file} describes no encoder: {numbers}, one of each for a convolution; {SAVE_AGAIN}")
    supported = {"conv_dim": [channels] * (len(kernels) if isinstance(kernels, list) else 0)}
    for name, value in (supported | fixed).items():
        if content.get(name, value) != value:
            raise OtherArchitecture(f"{file} sets {name} to {shown(content[name])}; this encoder only supports {value}")
    norm = content["feat_extract_norm"]
    if norm not in ("group", "layer"):
        raise UserError(
            f"{file} sets feat_extract_norm to {shown(norm)}; this encoder only supports 'group' and 'layer'"
        )
    normalize = _do_normalize(folder)
    settings = {ours: content[name] for ours, name in names.items()}
    if not is_wavlm:
        settings |= {ours: content[name] for ours, name in HUBERT_SETTINGS.items() if name in content}
    settings |= {"conv_channels": channels or 0, "conv_norm": norm}
    settings |= {"normalize_waveform": norm == "layer" if normalize is None else normalize}
    # transformers has no such setting; fairseq trained Base and Large with these
    settings |= {"feature_grad_mult": RELEASED_REGULARISATION[norm]["feature_grad_mult"]}
    return encoder_config_from(settings, file)


def _do_normalize(folder: Path) -> Any:
    """Find out whether the feature extractor normalises the waveform, as transformers does; None if there is none."""
    extractor = read_extractor(folder)
    if extractor is None:
        return None
    normalize = extractor.get("do_normalize", True)  # the default there
    return False if normalize is None else normalize


def read_extractor(folder: Path) -> dict[str, Any] | None:
    """Read the settings of the feature extractor of a directory.

    Args:
        folder: Directory that `save_pretrained` wrote.

    Returns:
        Arguments of the feature extractor; None if the directory has none.

    Raises:
        UserError: It is for audio of another sampling rate, or a file is corrupt.
    """
    files = [folder / name for name in PROCESSOR_FILES]
    contents = {file: read_json_object(file) for file in files if file.exists()}
    nested = {file: held.get("feature_extractor", held.get("audio_processor")) for file, held in contents.items()}
    extractors = [(file, inner) for file, inner in nested.items() if isinstance(inner, dict)]
    extractors += [(file, held) for file, held in contents.items() if file == files[1] or "do_normalize" in held]
    if not extractors:
        return None
    file, extractor = extractors[0]
    if (rate := extractor.get("sampling_rate", SAMPLE_RATE)) != SAMPLE_RATE:
        raise UserError(f"{file} sets sampling_rate to {shown(rate)}; this encoder only supports {SAMPLE_RATE} Hz")
    return extractor


def read_state(folder: Path) -> dict[str, Tensor]:
    """Read the weights in one file or in several, safetensors if there are any.

    Args:
        folder: Directory that `save_pretrained` wrote.

    Raises:
        UserError: A file is missing or corrupt.
    """
    for name in (WEIGHTS_FILE, OLD_WEIGHTS_FILE):
        if (folder / name).exists():
            return read_tensors(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = read_json_object(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise UserError(f"{index} does not say which weight is where; copy or download it again")
            return _read_shards(folder, index, shards)
    if unreadable := [name for name in OTHER_LIBRARIES if (folder / name).exists()]:
        raise UserError(
            f"{folder} has no {WEIGHTS_FILE}, only {unreadable[0]}; open the model in a transformers that reads it, "
            "before 5, and save_pretrained() it for PyTorch"
        )
    raise UserError(f"{folder} has no {WEIGHTS_FILE}; {SAVE_AGAIN}")


def _read_shards(folder: Path, index: Path, shard_of: Mapping[str, str]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard or shard in (".", ".."):
            raise UserError(f"{index} names {shown(shard)}, a file outside of its directory; get the model elsewhere")
        if not (folder / shard).exists():
            raise UserError(f"{folder} has no {shown(shard)}, which {index.name} names; copy or download it again")
        state |= read_tensors(folder / shard)
    if missing := shard_of.keys() - state.keys():
        raise UserError(
            f"{folder} lacks weights that its {index.name} names ({abbreviated(missing)}); download it again"
        )
    return state


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the weights in a file of a directory, a state dict of torch or safetensors.

    Raises:
        UserError: The file is corrupt, or holds something else than tensors.
    """
    content = read_safetensors(file)[0] if file.suffix == ".safetensors" else read_torch(file)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file} holds something else than weights; copy or download it again")
    return content


def write(weights: PretrainedWeights) -> Export:
    """Write a directory that `from_pretrained` opens: a HubertForCTC if there is a CTC head, or a HubertModel.

    An encoder with relative positions becomes a WavLMForCTC or a WavLMModel.
    """
    state = from_ours(weights.encoder, DIALECT)
    objects = {CONFIG_FILE: _config(weights) | foreign_settings(weights, "transformers")}
    extractor: dict[str, Any] = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": weights.config.normalize_waveform,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        # Base was trained without attention masks: padding counts in its group norm (transformers' HubertConfig)
        "return_attention_mask": weights.config.conv_norm == "layer",
        "sampling_rate": SAMPLE_RATE,
    }
    if weights.head is not None and weights.vocabulary is not None:
        prefix = ENCODER_PREFIXES[bool(weights.config.position_buckets)]
        state = {prefix + name: value for name, value in state.items()}
        blank = weights.vocabulary.blank_id
        for name, value in weights.head.items():
            state[f"lm_head.{name}"] = torch.cat([value[1 : blank + 1], value[:1], value[blank + 1 :]])
        extractor["processor_class"] = "Wav2Vec2Processor"
        objects |= tokenizer_files(weights.vocabulary)
    objects[PROCESSOR_FILES[1]] = extractor
    files = {
        name: json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n" for name, content in objects.items()
    }
    files[WEIGHTS_FILE] = save({name: value.contiguous() for name, value in state.items()}, metadata={"format": "pt"})
    return Export(files, replace(weights, encoder={}, head=None))


def _config(weights: PretrainedWeights) -> dict[str, Any]:
    config, vocabulary = weights.config, weights.vocabulary
    is_wavlm = config.position_buckets > 0
    own, fixed = (WAVLM_SETTINGS, WAVLM_FIXED) if is_wavlm else (HUBERT_SETTINGS, HUBERT_FIXED)
    names = SETTINGS | own
    family = "WavLM" if is_wavlm else "Hubert"
    content = {
        "architectures": [f"{family}Model"],
        "model_type": family.lower(),
        "conv_dim": [config.conv_channels] * len(config.conv_kernels),
        "num_feat_extract_layers": len(config.conv_kernels),
        "feat_extract_norm": config.conv_norm,
        "feat_extract_dropout": 0.0,
        "torch_dtype": "float32",
        # Masking during fine-tuning there: the released models' config.json, a tenth of fairseq's or less
        "mask_time_prob": 0.05,
        "mask_time_length": 10 * HOP // config.clock.hop,
        **{name: value for name, value in fixed.items() if value is not None},
        **{theirs: getattr(config, ours) for ours, theirs in names.items()},
    }
    if weights.head is not None and vocabulary is not None:
        # The loss of an utterance that is too short for its text is 0, as here and in fairseq
        content |= {"architectures": [f"{family}ForCTC"], "vocab_size": len(weights.head["weight"])}
        content |= {"ctc_zero_infinity": True, "ctc_loss_reduction": "mean", "final_dropout": 0.0}
        ids: dict[str | None, int] = {token: row for row, token in enumerate(tokens_by_id(vocabulary))}
        content |= {"pad_token_id": vocabulary.blank_id}
        content |= {"bos_token_id": ids.get(vocabulary.start), "eos_token_id": ids.get(vocabulary.end)}
    return content
