"""Tokenizers of transformers: Wav2Vec2CTCTokenizer and Wav2Vec2PhonemeCTCTokenizer, and our vocabularies."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hubert_lightning.errors import UserError
from hubert_lightning.pretrained.foreign_weights import vocabulary_settings
from hubert_lightning.untrusted.json_file import read_json_object, shown
from hubert_lightning.vocabulary import BOUNDARY, Vocabulary

VOCABULARY_FILE, TOKENIZER_FILE = "vocab.json", "tokenizer_config.json"
SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE = "special_tokens_map.json", "added_tokens.json"
CONFIG_FILE = "config.json"
PHONEMES = "Wav2Vec2PhonemeCTCTokenizer"
UNKNOWN_TOKENS = ("<unk>", "[UNK]", "<unknown>")
"""Usual names of the token for text without a token, for vocabularies that do not name it."""


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a directory has the table of a tokenizer."""
    return (folder / VOCABULARY_FILE).exists()


def read_tokenizer(folder: Path, rows: int) -> tuple[list[int], dict[str, Any]]:
    """Read the tokenizer of a directory.

    Args:
        folder: Directory.
        rows: Rows of the CTC head.

    Returns:
        Rows of the head in our order, the blank's first, and the arguments of `Vocabulary` that describe the tokens.

    Raises:
        UserError: A file is corrupt, or the blank is not in the table.
    """
    settings = _tokenizer_settings(folder)
    ids = _token_ids(folder, settings)
    names = {row: token for token, row in ids.items()}  # the last of several, as transformers prints it
    tokens = [names.get(row, f"<{row}>") for row in range(rows)]  # the latter for rows without a token
    blank = _blank(folder, settings["pad_token"], tokens)
    order = [blank, *(row for row in range(rows) if row != blank)]
    is_phonemic = settings["tokenizer_class"] == PHONEMES
    delimiter = settings["word_delimiter_token"]
    if not is_phonemic and delimiter not in tokens and " " in tokens:
        delimiter = " "
    ordered = [tokens[row] for row in order]
    described = vocabulary_settings(ordered, None if delimiter == tokens[blank] else delimiter, spaced=is_phonemic)
    special = {"unknown": "unk_token", "start": "bos_token", "end": "eos_token"}
    described |= {ours: settings[theirs] for ours, theirs in special.items() if settings[theirs] in ordered[1:]}
    synonyms = {token: names[row] for token, row in ids.items() if row < rows and names[row] != token}
    if synonyms := {token: name for token, name in synonyms.items() if name != tokens[blank]}:
        described |= {"same": synonyms}
    if settings["do_lower_case"] and not is_phonemic:
        described |= {"case": "lower", "lower_case": True}
    if settings["replace_word_delimiter_char"] != " " and not is_phonemic:
        described |= {"separator": str(settings["replace_word_delimiter_char"])}
    if settings["clean_up_tokenization_spaces"]:
        described |= {"clean_up": True}
    return order, described | {"blank_id": blank}


def _token_ids(folder: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """Number every token: those of the table, added ones, and special ones that are in neither."""
    file = folder / VOCABULARY_FILE
    ids = read_json_object(file)
    if any(isinstance(table, dict) for table in ids.values()):
        language = settings["target_lang"]
        if not isinstance(ids.get(language), dict):
            raise UserError(f"{file} holds several languages; save the model with the tokenizer of one of them")
        ids = dict(ids[language])
    if wrong := next((token for token, number in ids.items() if not isinstance(number, int)), None):
        raise UserError(f"{file} numbers {shown(wrong)} with {shown(ids[wrong])}; save its tokenizer again")
    used_ids = set(ids.values())
    ids |= {
        token: number
        for token, number in settings["added_tokens"].items()
        if not {token, number} & (ids.keys() | used_ids)
    }
    special = [settings[name] for name in ("bos_token", "eos_token", "unk_token")]
    for token in dict.fromkeys(special):
        if isinstance(token, str) and token and token not in ids:
            ids[token] = len(ids)
    return ids


def _blank(folder: Path, pad: Any, tokens: Sequence[str]) -> int:
    """Find the row of the blank: the tokenizer's padding, or the model's where there is no tokenizer."""
    if pad in tokens:
        return tokens.index(pad)
    padding = read_json_object(folder / CONFIG_FILE).get("pad_token_id")
    has_settings = any((folder / name).exists() for name in (TOKENIZER_FILE, SPECIAL_TOKENS_FILE))
    if (
        not has_settings
        and isinstance(padding, int)
        and 0 <= padding < len(tokens)
        and re.fullmatch(r"[\[<].+[\]>]", tokens[padding])
    ):
        return padding
    raise UserError(f"{folder / VOCABULARY_FILE} has no {shown(pad)}, the blank; save its tokenizer again")


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Read the arguments of the tokenizer: tokenizer_config.json, and in old directories two other files."""
    config = _read_if_present(folder / TOKENIZER_FILE)
    kind = config.get("tokenizer_class") or read_json_object(folder / CONFIG_FILE).get("tokenizer_class")
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
        stated |= _read_if_present(folder / SPECIAL_TOKENS_FILE)
        added = _read_if_present(folder / ADDED_TOKENS_FILE)
    for name in settings:
        if name in stated:
            value = stated[name]
            settings[name] = value.get("content") if isinstance(value, dict) else value
    return settings | {"tokenizer_class": kind, "added_tokens": added}


def _read_if_present(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.exists() else {}


def tokenizer_files(vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """Write the files of a tokenizer: name → JSON object."""
    tokens = tokens_by_id(vocabulary)
    unknown = vocabulary.unknown or next((name for name in UNKNOWN_TOKENS if name in vocabulary.tokens[1:]), None)
    ids = {token: tokens.index(name) for token, name in (vocabulary.same or {}).items()}  # the last is printed
    ids |= {token: row for row, token in enumerate(tokens) if token != f"<{row}>"}
    if unknown is None:
        # transformers needs one, other than the blank; the head has no row for it, so no text can be trained with it
        unknown = next(name for name in UNKNOWN_TOKENS if name not in ids)
        ids[unknown] = len(tokens)
    delimiter = vocabulary.delimiter
    if delimiter is None and not vocabulary.spaced and BOUNDARY not in tokens:
        delimiter = BOUNDARY  # no token, but spaces of a text become it
    special: dict[str, str | None] = {"pad_token": vocabulary.tokens[0], "unk_token": unknown}
    special |= {"bos_token": vocabulary.start, "eos_token": vocabulary.end}
    settings: dict[str, Any] = {
        "tokenizer_class": PHONEMES if vocabulary.spaced else "Wav2Vec2CTCTokenizer",
        "processor_class": "Wav2Vec2Processor",
        **special,
        "word_delimiter_token": delimiter,
        "clean_up_tokenization_spaces": vocabulary.clean_up,
    }
    if vocabulary.spaced:
        settings |= {"phone_delimiter_token": " ", "do_phonemize": False}
    else:
        settings |= {"replace_word_delimiter_char": vocabulary.separator, "do_lower_case": vocabulary.lower_case}
    return {
        VOCABULARY_FILE: ids,
        TOKENIZER_FILE: settings,
        SPECIAL_TOKENS_FILE: {name: token for name, token in special.items() if token is not None},
    }


def tokens_by_id(vocabulary: Vocabulary) -> list[str]:
    """Order tokens as transformers numbers them, with the blank where it was."""
    blank, *tokens = vocabulary.tokens
    return [*tokens[: vocabulary.blank_id], blank, *tokens[vocabulary.blank_id :]]
