"""Directories of transformers: HubertModel and HubertForCTC, with processor and tokenizer, whole or in shards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.model.formats.checkpoint import read_safetensors
from hubert_lightning.model.hubert import KERNELS, STRIDES, EncoderConfig
from hubert_lightning.model.trained import (
    BOUNDARY,
    Dialect,
    Trained,
    encoder_alone,
    from_ours,
    mask_embedding,
    prefix_of,
    settings_of,
    some,
    spelling,
    to_ours,
)
from hubert_lightning.torch_files import read_torch

CONFIG, WEIGHTS, OLD_WEIGHTS = "config.json", "model.safetensors", "pytorch_model.bin"
LARGEST_JSON = 64 * 2**20  # bytes; the index of X-Large's shards has 50 kB
ELSEWHERE = ("flax_model.msgpack", "tf_model.h5")  # weights that only JAX, or TensorFlow, reads
PREFIX = "hubert."  # of the encoder in a model with a head

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
}
FIXED = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "feat_proj_layer_norm": True,
    "layer_norm_eps": 1e-5,
    "conv_pos_batch_norm": False,
    "adapter_attn_dim": None,
}


def read(folder: Path) -> Trained:
    """A directory that `save_pretrained` wrote.

    Raises:
        ValueError: A file is missing or damaged, or the model is no HuBERT.
    """
    config = read_config(folder)
    state = _weights(folder)
    spells = f"{prefix_of(state, DIALECT).removesuffix(PREFIX)}lm_head."
    head = {part: state.pop(spells + part) for part in ("weight", "bias") if spells + part in state} or None
    if head is not None and len(head) == 1:
        raise ValueError(f"{folder} has half a layer that spells, {spells}{some(head)} alone; save the model again")
    state, told = encoder_alone(state, DIALECT, folder)
    try:
        encoder = to_ours(state, DIALECT)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; copy or download it again") from error
    if "mask_embedding" not in encoder:  # transformers leaves it out where a model was configured without masking
        encoder["mask_embedding"], sentence = mask_embedding(config.dim)
        told.append(sentence)
    vocabulary = None
    if head is not None and (folder / "vocab.json").exists():
        order, vocabulary = _vocabulary(folder, len(head["weight"]))
        head = {part: value[order] for part, value in head.items()}
    return Trained(config, encoder, head=head, vocabulary=vocabulary, told=told)


def write(trained: Trained) -> dict[str, bytes]:
    """The files of a directory that `from_pretrained` opens: a HubertForCTC if there is a head, or a HubertModel."""
    state = from_ours(trained.encoder, DIALECT)
    files = {CONFIG: _json(_config(trained))}
    features = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": trained.config.normalize_waveform,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        # Base was trained without attention masks, and its group norm hears the padding (transformers' HubertConfig)
        "return_attention_mask": trained.config.conv_norm == "layer",
        "sampling_rate": 16_000,
    }
    if trained.head is not None and trained.vocabulary is not None:
        state = {PREFIX + name: value for name, value in state.items()}
        state |= {f"lm_head.{name}": value.contiguous() for name, value in trained.head.items()}
        features["processor_class"] = "Wav2Vec2Processor"
        files |= _tokenizer(trained.vocabulary)
    files["preprocessor_config.json"] = _json(features)
    files[WEIGHTS] = save({name: value.contiguous() for name, value in state.items()}, metadata={"format": "pt"})
    return files


def read_config(folder: Path) -> EncoderConfig:
    """The size of the encoder in a directory.

    Raises:
        ValueError: It has no config, or one of another model.
    """
    file = folder / CONFIG
    if not file.exists():
        raise ValueError(f"{folder} has no {CONFIG}; open the model in transformers and save_pretrained() it")
    theirs = read_json(file)
    if theirs.get("model_type") != "hubert":
        raise ValueError(f"{file} describes a model of type {theirs.get('model_type')!r}, not 'hubert'; give a HuBERT")
    required = ["conv_dim", "conv_kernel", "conv_stride", "feat_extract_norm", *SETTINGS.values()]
    if absent := [name for name in required if name not in theirs]:
        raise ValueError(f"{file} lacks {some(absent)}; open the model in transformers and save_pretrained() it")
    channels = theirs["conv_dim"][0] if isinstance(theirs["conv_dim"], list) and theirs["conv_dim"] else None
    supported = {"conv_kernel": list(KERNELS), "conv_stride": list(STRIDES), "conv_dim": [channels] * len(KERNELS)}
    for name, value in (supported | FIXED).items():
        if theirs.get(name, value) != value:
            raise ValueError(
                f"{file} sets {name} to {theirs[name]}; this encoder only knows {value}, so it cannot be used"
            )
    norm = theirs["feat_extract_norm"]
    if norm not in ("group", "layer"):
        raise ValueError(f"{file} sets feat_extract_norm to {norm}; this encoder only knows 'group' and 'layer'")
    normalize = _do_normalize(folder)
    stated = {ours: theirs[name] for ours, name in SETTINGS.items()}
    stated |= {"conv_channels": channels or 0, "conv_norm": norm}
    stated |= {"normalize_waveform": norm == "layer" if normalize is None else normalize}
    # not in their files: what fairseq trained Base and Large with
    return settings_of(stated | {"feature_grad_mult": 0.1 if norm == "group" else 1.0}, file)


def _do_normalize(folder: Path) -> Any:
    """Whether the feature extractor normalises the waveform, as transformers finds one; none if there is none.

    Raises:
        ValueError: It is for audio of another sampling rate.
    """
    files = [folder / name for name in ("processor_config.json", "preprocessor_config.json")]
    said = {file: read_json(file) for file in files if file.exists()}
    nested = {file: of.get("feature_extractor", of.get("audio_processor")) for file, of in said.items()}
    extractors = [(file, of) for file, of in nested.items() if isinstance(of, dict)]
    extractors += [(file, of) for file, of in said.items() if file == files[1] or "do_normalize" in of]
    if not extractors:
        return None
    file, extractor = extractors[0]
    if (rate := extractor.get("sampling_rate", SAMPLE_RATE)) != SAMPLE_RATE:
        raise ValueError(f"{file} sets sampling_rate to {rate}; this encoder hears audio of {SAMPLE_RATE} Hz alone")
    said = extractor.get("do_normalize", True)  # their default
    return False if said is None else said


def read_json(file: Path) -> dict[str, Any]:
    """The settings in a file of a directory.

    Raises:
        ValueError: It is no such file.
    """
    if file.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, where settings have a few thousand; get it again")
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no settings; copy or download it again")
    return content


def _weights(folder: Path) -> dict[str, Tensor]:
    """Of one file or of several, safetensors if there are any."""
    for name in (WEIGHTS, OLD_WEIGHTS):
        if (folder / name).exists():
            return _tensors(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
                raise ValueError(f"{index} does not say which weight is where; copy or download it again")
            return _shards(folder, index, sorted(set(places.values())), places)
    if elsewhere := [name for name in ELSEWHERE if (folder / name).exists()]:
        raise ValueError(
            f"{folder} has no {WEIGHTS}, only {elsewhere[0]}; open the model in a transformers that reads it, "
            "before 5, and save_pretrained() it for PyTorch"
        )
    raise ValueError(f"{folder} has no {WEIGHTS}; open the model in transformers and save_pretrained() it")


def _shards(folder: Path, index: Path, shards: list[str], places: Mapping[str, str]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard or shard in (".", ".."):
            raise ValueError(f"{index} names {shard!r}, a file outside of its directory; get the model elsewhere")
        if not (folder / shard).exists():
            raise ValueError(f"{folder} has no {shard}, of which {index.name} speaks; copy or download it again")
        state |= _tensors(folder / shard)
    if missing := places.keys() - state.keys():
        raise ValueError(f"{folder} lacks weights that its {index.name} names ({some(missing)}); download it again")
    return state


def _tensors(file: Path) -> dict[str, Tensor]:
    content = read_safetensors(file)[0] if file.suffix == ".safetensors" else read_torch(file)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{file} holds something else than weights; copy or download it again")
    return content


def _vocabulary(folder: Path, rows: int) -> tuple[list[int], dict[str, Any]]:
    """Which of the head's rows is the blank's, the next token's, …, and what they spell."""
    file = folder / "vocab.json"
    ids = read_json(file)
    special = _special_tokens(folder)
    if not all(isinstance(place, int) for place in ids.values()):
        raise ValueError(f"{file} holds several languages; save the model with the tokenizer of one of them")
    if (folder / "added_tokens.json").exists():
        ids |= read_json(folder / "added_tokens.json")
    tokens = [f"<{place}>" for place in range(rows)]
    for token, place in ids.items():
        if isinstance(place, int) and 0 <= place < rows:
            tokens[place] = BOUNDARY if token == special["word_delimiter_token"] else token
    if special["pad_token"] not in tokens:
        raise ValueError(f"{file} has no {special['pad_token']!r}, the blank; save its tokenizer again")
    blank = tokens.index(special["pad_token"])
    order = [blank, *(place for place in range(rows) if place != blank)]
    return order, spelling([tokens[place] for place in order])


def _special_tokens(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {"pad_token": "<pad>", "word_delimiter_token": BOUNDARY}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            theirs = read_json(folder / name)
            for key in settings:
                value = theirs.get(key) or settings[key]
                settings[key] = value["content"] if isinstance(value, dict) else value
    return settings


def _config(trained: Trained) -> dict[str, Any]:
    config = trained.config
    theirs = {
        "architectures": ["HubertModel"],
        "model_type": "hubert",
        "conv_dim": [config.conv_channels] * len(KERNELS),
        "conv_kernel": list(KERNELS),
        "conv_stride": list(STRIDES),
        "num_feat_extract_layers": len(KERNELS),
        "feat_extract_norm": config.conv_norm,
        "feat_extract_dropout": 0.0,
        "torch_dtype": "float32",
        # Masking while one fine-tunes there: HuBERT §IV-D as fairseq's base_10h
        "mask_time_prob": 0.05,
        "mask_time_length": 10,
        **{name: value for name, value in FIXED.items() if value is not None},
        **{theirs: getattr(config, ours) for ours, theirs in SETTINGS.items()},
    }
    if trained.head is not None and trained.vocabulary is not None:
        # On an utterance that is too short for its text, the loss is 0, as here and in fairseq
        theirs |= {"architectures": ["HubertForCTC"], "vocab_size": len(trained.head["weight"]), "pad_token_id": 0}
        theirs |= {"ctc_zero_infinity": True, "ctc_loss_reduction": "mean", "final_dropout": 0.0}
        theirs |= {"bos_token_id": None, "eos_token_id": None}
    return theirs


def _tokenizer(vocabulary: Mapping[str, Any]) -> dict[str, bytes]:
    tokens = list(vocabulary["tokens"])
    unknown = "<unk>" if "<unk>" in tokens else tokens[0]
    settings = {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "processor_class": "Wav2Vec2Processor",
        "pad_token": tokens[0],
        "unk_token": unknown,
        "bos_token": None,
        "eos_token": None,
        "word_delimiter_token": BOUNDARY,
        "do_lower_case": False,
        "clean_up_tokenization_spaces": False,
    }
    special = {"pad_token": tokens[0], "unk_token": unknown}
    ids = {token: place for place, token in enumerate(tokens)}
    return {
        "vocab.json": _json(ids),
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(special),
    }


def _json(content: Any) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
