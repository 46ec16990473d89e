"""Directories of transformers: HubertModel and HubertForCTC, with processor and tokenizer, whole or in shards."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.convolutions import KERNELS, STRIDES
from hubert_lightning.pretrained.dialect import Dialect, from_ours, prefix_of, to_ours
from hubert_lightning.pretrained.formats.own import read_safetensors
from hubert_lightning.pretrained.weights import (
    Trained,
    encoder_alone,
    keeping,
    kept_for,
    mask_embedding,
    settings_of,
    spelling,
    summary_of,
)
from hubert_lightning.untrusted.json_file import read_json, shown
from hubert_lightning.untrusted.torch_file import read_torch
from hubert_lightning.vocabulary import BOUNDARY

VOCABULARY, TOKENIZER = "vocab.json", "tokenizer_config.json"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"
PHONEMES = "Wav2Vec2PhonemeCTCTokenizer"
UNKNOWN = ("<unk>", "[UNK]", "<unknown>")  # how what has no token is written, if a vocabulary does not say so
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
# What this package has elsewhere (masks belong to the data) or not at all
KEPT = (
    *("apply_spec_augment", "mask_time_prob", "mask_time_length", "mask_time_min_masks"),
    *("mask_feature_prob", "mask_feature_length", "mask_feature_min_masks"),
    *("final_dropout", "ctc_loss_reduction", "ctc_zero_infinity", "initializer_range"),
    *("use_weighted_layer_sum", "classifier_proj_size"),
)
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
        UserError: A file is missing or damaged, or the model is no HuBERT.
    """
    config = read_config(folder)
    state = _weights(folder)
    spells = f"{prefix_of(state, DIALECT).removesuffix(PREFIX)}lm_head."
    head = {part: state.pop(spells + part) for part in ("weight", "bias") if spells + part in state} or None
    if head is not None and len(head) == 1:
        raise UserError(
            f"{folder} has half a layer that spells, {spells}{summary_of(head)} alone; save the model again"
        )
    state, notes = encoder_alone(state, DIALECT, folder)
    try:
        encoder = to_ours(state, DIALECT)
    except ValueError as error:
        raise UserError(f"{folder}: {error}; copy or download it again") from error
    if "mask_embedding" not in encoder:  # transformers leaves it out where a model was configured without masking
        encoder["mask_embedding"], sentence = mask_embedding(config.dim)
        notes.append(sentence)
    vocabulary = None
    if head is not None and (folder / VOCABULARY).exists():
        order, vocabulary = _vocabulary(folder, len(head["weight"]))
        head = {part: value[order] for part, value in head.items()}
    return Trained(config, encoder, head=head, vocabulary=vocabulary, notes=notes)


def with_settings(folder: Path, trained: Trained) -> Trained:
    """What `read` made, with the settings of its config that are not of an encoder, for `write`."""
    config = read_settings(folder / CONFIG)
    settings = {name: config[name] for name in KEPT if name in config}
    if trained.head is not None:
        spoken = {"bos_token_id": "start", "eos_token_id": "end"}  # which `write` knows of a vocabulary that has them
        missing = [name for name, ours in spoken.items() if ours not in (trained.vocabulary or {})]
        settings |= {name: config[name] for name in missing if config.get(name) is not None}
    return keeping(trained, "transformers", settings)


def write(trained: Trained) -> dict[str, bytes]:
    """The files of a directory that `from_pretrained` opens: a HubertForCTC if there is a head, or a HubertModel."""
    state = from_ours(trained.encoder, DIALECT)
    files = {CONFIG: _json(_config(trained) | kept_for(trained, "transformers"))}
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
        blank = trained.vocabulary.get("blank_id", 0)
        for name, value in trained.head.items():
            state[f"lm_head.{name}"] = torch.cat([value[1 : blank + 1], value[:1], value[blank + 1 :]])
        features["processor_class"] = "Wav2Vec2Processor"
        files |= _tokenizer(trained.vocabulary)
    files["preprocessor_config.json"] = _json(features)
    files[WEIGHTS] = save({name: value.contiguous() for name, value in state.items()}, metadata={"format": "pt"})
    return files


def read_config(folder: Path) -> EncoderConfig:
    """The size of the encoder in a directory.

    Raises:
        UserError: It has no config, or one of another model.
    """
    file = folder / CONFIG
    if not file.exists():
        raise UserError(f"{folder} has no {CONFIG}; open the model in transformers and save_pretrained() it")
    theirs = read_settings(file)
    if theirs.get("model_type") != "hubert":
        raise UserError(
            f"{file} describes a model of type {shown(theirs.get('model_type'))}, not 'hubert'; give a HuBERT"
        )
    required = ["conv_dim", "conv_kernel", "conv_stride", "feat_extract_norm", *SETTINGS.values()]
    if absent := [name for name in required if name not in theirs]:
        raise UserError(f"{file} lacks {summary_of(absent)}; open the model in transformers and save_pretrained() it")
    channels = theirs["conv_dim"][0] if isinstance(theirs["conv_dim"], list) and theirs["conv_dim"] else None
    supported = {"conv_kernel": list(KERNELS), "conv_stride": list(STRIDES), "conv_dim": [channels] * len(KERNELS)}
    for name, value in (supported | FIXED).items():
        if theirs.get(name, value) != value:
            raise UserError(
                f"{file} sets {name} to {shown(theirs[name])}; this encoder only knows {value}, so it cannot be used"
            )
    norm = theirs["feat_extract_norm"]
    if norm not in ("group", "layer"):
        raise UserError(f"{file} sets feat_extract_norm to {shown(norm)}; this encoder only knows 'group' and 'layer'")
    normalize = _do_normalize(folder)
    stated = {ours: theirs[name] for ours, name in SETTINGS.items()}
    stated |= {"conv_channels": channels or 0, "conv_norm": norm}
    stated |= {"normalize_waveform": norm == "layer" if normalize is None else normalize}
    # not in their files: what fairseq trained Base and Large with
    return settings_of(stated | {"feature_grad_mult": 0.1 if norm == "group" else 1.0}, file)


def _do_normalize(folder: Path) -> Any:
    """Whether the feature extractor normalises the waveform, as transformers finds one; none if there is none.

    Raises:
        UserError: It is for audio of another sampling rate.
    """
    files = [folder / name for name in ("processor_config.json", "preprocessor_config.json")]
    settings = {file: read_settings(file) for file in files if file.exists()}
    nested = {file: held.get("feature_extractor", held.get("audio_processor")) for file, held in settings.items()}
    extractors = [(file, inner) for file, inner in nested.items() if isinstance(inner, dict)]
    extractors += [(file, held) for file, held in settings.items() if file == files[1] or "do_normalize" in held]
    if not extractors:
        return None
    file, extractor = extractors[0]
    if (rate := extractor.get("sampling_rate", SAMPLE_RATE)) != SAMPLE_RATE:
        raise UserError(
            f"{file} sets sampling_rate to {shown(rate)}; this encoder hears audio of {SAMPLE_RATE} Hz alone"
        )
    normalize = extractor.get("do_normalize", True)  # their default
    return False if normalize is None else normalize


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in a file of a directory.

    Raises:
        UserError: It is no such file.
    """
    if file.stat().st_size > LARGEST_JSON:
        raise UserError(f"{file} has {file.stat().st_size} bytes, where settings have a few thousand; get it again")
    content = read_json(file, "copy or download it again", LARGEST_JSON)
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no settings; copy or download it again")
    return content


def _weights(folder: Path) -> dict[str, Tensor]:
    """Of one file or of several, safetensors if there are any."""
    for name in (WEIGHTS, OLD_WEIGHTS):
        if (folder / name).exists():
            return _tensors(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            places = read_settings(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
                raise UserError(f"{index} does not say which weight is where; copy or download it again")
            return _shards(folder, index, sorted(set(places.values())), places)
    if elsewhere := [name for name in ELSEWHERE if (folder / name).exists()]:
        raise UserError(
            f"{folder} has no {WEIGHTS}, only {elsewhere[0]}; open the model in a transformers that reads it, "
            "before 5, and save_pretrained() it for PyTorch"
        )
    raise UserError(f"{folder} has no {WEIGHTS}; open the model in transformers and save_pretrained() it")


def _shards(folder: Path, index: Path, shards: list[str], places: Mapping[str, str]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard or shard in (".", ".."):
            raise UserError(f"{index} names {shown(shard)}, a file outside of its directory; get the model elsewhere")
        if not (folder / shard).exists():
            raise UserError(f"{folder} has no {shown(shard)}, of which {index.name} speaks; copy or download it again")
        state |= _tensors(folder / shard)
    if missing := places.keys() - state.keys():
        raise UserError(
            f"{folder} lacks weights that its {index.name} names ({summary_of(missing)}); download it again"
        )
    return state


def _tensors(file: Path) -> dict[str, Tensor]:
    content = read_safetensors(file)[0] if file.suffix == ".safetensors" else read_torch(file)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file} holds something else than weights; copy or download it again")
    return content


def _vocabulary(folder: Path, rows: int) -> tuple[list[int], dict[str, Any]]:
    """Which of the head's rows is the blank's, the next token's, …, and what they spell."""
    settings = _tokenizer_settings(folder)
    ids = _ids(folder, settings)
    names = {row: token for token, row in ids.items()}  # the last of several, as transformers prints it
    tokens = [names.get(row, f"<{row}>") for row in range(rows)]  # the latter of rows that have no token
    blank = _blank(folder, settings["pad_token"], tokens)
    order = [blank, *(row for row in range(rows) if row != blank)]
    phonemes = settings["tokenizer_class"] == PHONEMES
    delimiter = settings["word_delimiter_token"]
    if not phonemes and delimiter not in tokens and " " in tokens:
        delimiter = " "
    made = spelling([tokens[row] for row in order], None if delimiter == tokens[blank] else delimiter, spaced=phonemes)
    special = {"unknown": "unk_token", "start": "bos_token", "end": "eos_token"}
    made |= {ours: settings[theirs] for ours, theirs in special.items() if settings[theirs] in made["tokens"][1:]}
    others = {token: names[row] for token, row in ids.items() if row < rows and names[row] != token}
    if others := {token: name for token, name in others.items() if name != tokens[blank]}:
        made |= {"same": others}
    if settings["do_lower_case"] and not phonemes:
        made |= {"case": "lower", "lower_case": True}
    if settings["replace_word_delimiter_char"] != " " and not phonemes:
        made |= {"separator": str(settings["replace_word_delimiter_char"])}
    if settings["clean_up_tokenization_spaces"]:
        made |= {"clean_up": True}
    return order, made | ({"blank_id": blank} if blank else {})


def _ids(folder: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """The number of every token: those of the table, those that were added, and special ones that are in neither."""
    file = folder / VOCABULARY
    ids = read_settings(file)
    if any(isinstance(of_language, dict) for of_language in ids.values()):
        language = settings["target_lang"]
        if not isinstance(ids.get(language), dict):
            raise UserError(f"{file} holds several languages; save the model with the tokenizer of one of them")
        ids = dict(ids[language])
    if wrong := next((token for token, number in ids.items() if not isinstance(number, int)), None):
        raise UserError(f"{file} numbers {shown(wrong)} with {shown(ids[wrong])}; save its tokenizer again")
    taken = set(ids.values())
    ids |= {
        token: number
        for token, number in settings["added_tokens"].items()
        if not {token, number} & (ids.keys() | taken)
    }
    special = [settings[name] for name in ("bos_token", "eos_token", "unk_token")]
    for token in dict.fromkeys(special):
        if isinstance(token, str) and token and token not in ids:
            ids[token] = len(ids)
    return ids


def _blank(folder: Path, pad: Any, tokens: Sequence[str]) -> int:
    """The row of the blank: that of the tokenizer's padding, or of the model's where there is no tokenizer."""
    if pad in tokens:
        return tokens.index(pad)
    padding = read_settings(folder / CONFIG).get("pad_token_id")
    has_tokenizer = any((folder / name).exists() for name in (TOKENIZER, SPECIAL))
    if (
        not has_tokenizer
        and isinstance(padding, int)
        and 0 <= padding < len(tokens)
        and re.fullmatch(r"[\[<].+[\]>]", tokens[padding])
    ):
        return padding
    raise UserError(f"{folder / VOCABULARY} has no {shown(pad)}, the blank; save its tokenizer again")


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    """What transformers makes the tokenizer with: tokenizer_config.json, in folders of old completed by other files."""
    config = read_settings(folder / TOKENIZER) if (folder / TOKENIZER).exists() else {}
    kind = config.get("tokenizer_class") or read_settings(folder / CONFIG).get("tokenizer_class")
    settings: dict[str, Any] = {
        **{"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        **{"word_delimiter_token": None if kind == PHONEMES else BOUNDARY, "replace_word_delimiter_char": " "},
        **{"do_lower_case": False, "clean_up_tokenization_spaces": False, "target_lang": None},
    }
    stated = dict(config)
    added: dict[str, Any] = {}
    if isinstance(config.get("added_tokens_decoder"), dict):
        for number, token in config["added_tokens_decoder"].items():
            if number.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str):
                added[token["content"]] = int(number)
    else:
        stated |= read_settings(folder / SPECIAL) if (folder / SPECIAL).exists() else {}
        added = read_settings(folder / ADDED) if (folder / ADDED).exists() else {}
    for name in settings:
        if name in stated:
            value = stated[name]
            settings[name] = value.get("content") if isinstance(value, dict) else value
    return settings | {"tokenizer_class": kind, "added_tokens": added}


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
        # Masking while one fine-tunes there: the released models' config.json, a tenth of fairseq's or less
        "mask_time_prob": 0.05,
        "mask_time_length": 10,
        **{name: value for name, value in FIXED.items() if value is not None},
        **{theirs: getattr(config, ours) for ours, theirs in SETTINGS.items()},
    }
    if trained.head is not None and trained.vocabulary is not None:
        # On an utterance that is too short for its text, the loss is 0, as here and in fairseq
        theirs |= {"architectures": ["HubertForCTC"], "vocab_size": len(trained.head["weight"])}
        theirs |= {"ctc_zero_infinity": True, "ctc_loss_reduction": "mean", "final_dropout": 0.0}
        ids: dict[str | None, int] = {token: row for row, token in enumerate(in_their_order(trained.vocabulary))}
        theirs |= {"pad_token_id": trained.vocabulary.get("blank_id", 0)}
        theirs |= {"bos_token_id": ids.get(trained.vocabulary.get("start"))}
        theirs |= {"eos_token_id": ids.get(trained.vocabulary.get("end"))}
    return theirs


def _tokenizer(vocabulary: Mapping[str, Any]) -> dict[str, bytes]:
    tokens = in_their_order(vocabulary)
    unknown = vocabulary.get("unknown") or next((name for name in UNKNOWN if name in vocabulary["tokens"][1:]), None)
    ids = {token: tokens.index(name) for token, name in (vocabulary.get("same") or {}).items()}  # the last is printed
    ids |= {token: row for row, token in enumerate(tokens) if token != f"<{row}>"}
    if unknown is None:
        # It needs one, which is not the blank; the head has no row for it, so that no text can be trained with it
        unknown = next(name for name in UNKNOWN if name not in ids)
        ids[unknown] = len(tokens)
    delimiter = vocabulary.get("delimiter", BOUNDARY)
    spaced = vocabulary.get("spaced", False)
    if delimiter is None and not spaced and BOUNDARY not in tokens:
        delimiter = BOUNDARY  # which is no token, but spaces of a text become it
    special = {"pad_token": vocabulary["tokens"][0], "unk_token": unknown}
    special |= {"bos_token": vocabulary.get("start"), "eos_token": vocabulary.get("end")}
    settings = {
        "tokenizer_class": PHONEMES if spaced else "Wav2Vec2CTCTokenizer",
        "processor_class": "Wav2Vec2Processor",
        **special,
        "word_delimiter_token": delimiter,
        "clean_up_tokenization_spaces": vocabulary.get("clean_up", False),
    }
    if spaced:
        settings |= {"phone_delimiter_token": " ", "do_phonemize": False}
    else:
        settings |= {"replace_word_delimiter_char": vocabulary.get("separator", " ")}
        settings |= {"do_lower_case": vocabulary.get("lower_case", False)}
    return {
        VOCABULARY: _json(ids),
        TOKENIZER: _json(settings),
        SPECIAL: _json({name: token for name, token in special.items() if token is not None}),
    }


def in_their_order(vocabulary: Mapping[str, Any]) -> list[str]:
    """The tokens as transformers numbers them, its blank where it was."""
    blank, *tokens = vocabulary["tokens"]
    row = vocabulary.get("blank_id", 0)
    return [*tokens[:row], blank, *tokens[row:]]


def _json(content: Any) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
