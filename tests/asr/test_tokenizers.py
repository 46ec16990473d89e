"""Tokenizers of released and of fine-tuned models are read from their files, and print the same text."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign_models import path_of, save_solved_model, vocabulary_and_log_probs
from helpers import Encoder, save_ctc
from torch import Tensor

from hubert_lightning.asr.ctc_model import load_ctc
from hubert_lightning.asr.decoder_settings import DecoderSettings
from hubert_lightning.asr.decoding import BeamSearch, greedy
from hubert_lightning.asr.recognition import words_in
from hubert_lightning.asr.word_times import word_times
from hubert_lightning.interchange.import_export import export_model, import_model
from hubert_lightning.pretrained.foreign_weights import vocabulary_settings
from hubert_lightning.pretrained.load import load_encoder, read_weights
from hubert_lightning.vocabulary import Vocabulary

PHONES = ["n", "s", "t", "ə", "l", "a", "i", "k", "d", "m", "ɛ", "ɪ", "ɑː", "oʊ", "tʃ", "t^", "ts.", "ɑ̃", "ai5", "nʲ"]
XLSR = ["<pad>", "<s>", "</s>", "<unk>", "|", "'", "-", *"abcdefghijklmnopqrstuvwxyz", "à", "ç", "œ", "’"]
TUTORIAL = ["'", *"abcdefg", "|", *"hijkl", "[UNK]", "[PAD]"]
NAMES = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>"}
FACEBOOK = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
ESPEAK = {"tokenizer_class": "Wav2Vec2PhonemeCTCTokenizer", "do_phonemize": True, "phonemizer_backend": "espeak"}


def added(**tokens: int) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": True}
    return {"added_tokens_decoder": {str(place): {"content": token, **flags} for token, place in tokens.items()}}


class Layout:
    """Files of a tokenizer: its table and other settings; `rows` of the CTC head, if not one for each token."""

    def __init__(self, table: list[str] | dict[str, Any], rows: int | None = None, **files: Any) -> None:
        self.table = {token: place for place, token in enumerate(table)} if isinstance(table, list) else table
        self.rows = rows or len(self.table)
        self.files = files

    def write(self, folder: Path) -> None:
        files = {"vocab": self.table, **self.files}
        config = json.loads((folder / "config.json").read_text())
        files["config"] = config | {"vocab_size": self.rows} | self.files.get("config", {})
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")


LAYOUTS = {
    "facebook/hubert-large-ls960-ft": Layout(
        ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"],
        tokenizer_config={**FACEBOOK, "do_lower_case": False, "return_attention_mask": True, "do_normalize": True},
        special_tokens_map=FACEBOOK,
    ),
    "jonatasgrosman/wav2vec2-large-xlsr-53-french": Layout(
        XLSR, tokenizer_config={**FACEBOOK, "do_lower_case": False, "word_delimiter_token": "|"}
    ),
    "digits, and letters of both cases": Layout(
        [*"ABCabc0123", "|", "<unk>", "<pad>", "<s>", "</s>"], tokenizer_config=FACEBOOK
    ),
    "the tutorial on fine-tuning, of 2021": Layout(
        TUTORIAL,
        rows=len(TUTORIAL) + 2,
        tokenizer_config={**NAMES, "do_lower_case": False, "word_delimiter_token": "|"},
        special_tokens_map=NAMES | {"additional_special_tokens": [{"content": "<s>"}, {"content": "</s>"}]},
        added_tokens={"<s>": len(TUTORIAL), "</s>": len(TUTORIAL) + 1},
    ),
    "the same, whose model has fewer rows": Layout(
        TUTORIAL, tokenizer_config=NAMES, added_tokens={"<s>": len(TUTORIAL), "</s>": len(TUTORIAL) + 1}
    ),
    "the same, without added tokens": Layout(TUTORIAL, rows=len(TUTORIAL) + 2, tokenizer_config=NAMES),
    "the tutorial, of transformers 4.40": Layout(
        TUTORIAL,
        rows=len(TUTORIAL) + 2,
        tokenizer_config={
            **NAMES,
            **added(**{"[UNK]": 14, "[PAD]": 15, "<s>": 16, "</s>": 17}),
            "clean_up_tokenization_spaces": True,
            "replace_word_delimiter_char": " ",
            "target_lang": None,
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "word_delimiter_token": "|",
        },
        special_tokens_map={"unk_token": "<other>", "pad_token": "<other>"},
    ),
    "special tokens that are objects": Layout(
        [*"abc", "<p>", "|", "<u>"],
        tokenizer_config={"do_lower_case": False},
        special_tokens_map={"pad_token": {"content": "<p>"}, "unk_token": {"content": "<u>"}, "bos_token": None},
    ),
    "no tokenizer_config.json": Layout(["a", "b", "|", "[UNK]", "[PAD]"], special_tokens_map=NAMES),
    "Chinese, without a delimiter": Layout(["[PAD]", "[UNK]", *"今天气很好我你"], tokenizer_config=NAMES),
    "a delimiter of null": Layout(
        ["a", "|", "b", "[UNK]", "[PAD]"], tokenizer_config={**NAMES, "word_delimiter_token": None}
    ),
    "a space between words": Layout(
        [" ", *"abc", "[UNK]", "[PAD]"], tokenizer_config={**NAMES, "word_delimiter_token": " "}
    ),
    "a space that is no delimiter": Layout([" ", *"abc", "[UNK]", "[PAD]"], tokenizer_config=NAMES),
    "[SPACE] between words": Layout(
        ["a", "b", "[SPACE]", "[UNK]", "[PAD]"], tokenizer_config={**NAMES, "word_delimiter_token": "[SPACE]"}
    ),
    "▁ between words": Layout([*"ab▁", "[UNK]", "[PAD]"], tokenizer_config={**NAMES, "word_delimiter_token": "▁"}),
    "upper case that is printed in lower case": Layout(
        ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABΣΟÉİI'"], tokenizer_config={**FACEBOOK, "do_lower_case": True}
    ),
    "another character for the delimiter": Layout(
        [*"abc|", "[UNK]", "[PAD]"], tokenizer_config={**NAMES, "replace_word_delimiter_char": "-"}
    ),
    "punctuation that is cleaned up": Layout(
        [*"nts.?,!'|", "[UNK]", "[PAD]"], tokenizer_config={**NAMES, "clean_up_tokenization_spaces": True}
    ),
    "word pieces": Layout(["[PAD]", "th", "e", "he", "|", "ing", "[UNK]", "a b"], tokenizer_config=NAMES),
    "a table in NFD": Layout([*"aeo|", "\u0301", "\u0323", "\u0302", "[UNK]", "[PAD]"], tokenizer_config=NAMES),
    "facebook/wav2vec2-lv-60-espeak-cv-ft": Layout(
        ["<s>", "<pad>", "</s>", "<unk>", *PHONES],
        tokenizer_config={**FACEBOOK, **ESPEAK, "phone_delimiter_token": " ", "word_delimiter_token": None},
    ),
    "phonemes with a delimiter": Layout(
        ["<s>", "<pad>", "</s>", "<unk>", *PHONES, "|"],
        tokenizer_config={**FACEBOOK, **ESPEAK, "phone_delimiter_token": " ", "word_delimiter_token": "|"},
    ),
    "phonemes whose class is in config.json": Layout(
        ["<s>", "<pad>", "</s>", "<unk>", *PHONES],
        tokenizer_config=FACEBOOK,
        config={"tokenizer_class": "Wav2Vec2PhonemeCTCTokenizer"},
    ),
    "two letters of one row": Layout(
        {"a": 0, "ä": 0, "b": 1, "é": 2, "è": 2, "e": 2, "ß": 3, "ss": 3, "|": 4, "[UNK]": 5, "[PAD]": 6},
        rows=7,
        tokenizer_config=NAMES,
    ),
    "a space and | of one row": Layout(
        {" ": 3, "a": 0, "b": 1, "c": 2, "|": 3, "[UNK]": 4, "[PAD]": 5}, rows=6, tokenizer_config=NAMES
    ),
    "one language of several": Layout(
        {"deu": {"<pad>": 0, "a": 1, "ß": 2, "|": 3, "<unk>": 4}, "eng": {"<pad>": 0, "x": 1, "|": 2, "<unk>": 3}},
        rows=5,
        tokenizer_config={**FACEBOOK, "target_lang": "deu"},
    ),
}


def save_layout(folder: Path, encoder: Encoder, layout: Layout) -> None:
    table = [f"token {place}" for place in range(layout.rows)]
    save_solved_model(folder, encoder, table, path_of(table, "token 0"), blank="token 0")
    (folder / "tokenizer_config.json").unlink()
    layout.write(folder)


def tokenizer_of(folder: Path, layout: Layout) -> Any:
    settings = layout.files.get("tokenizer_config", {})
    if settings.get("word_delimiter_token", "|") in ("|", None):
        return transformers.AutoTokenizer.from_pretrained(folder)
    # transformers 5.23 forgets any other delimiter when it opens a folder, which transformers 4 does not
    return transformers.Wav2Vec2CTCTokenizer(folder / "vocab.json", **settings)


def paths(rows: int) -> Tensor:
    """(20, 60) tokens, drawn so that many of them repeat."""
    drawn = torch.randint(rows, (20, 40), generator=torch.Generator().manual_seed(0))
    return drawn.repeat_interleave(torch.arange(40) % 2 + 1, dim=1)


def normalised(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tokenizer_decodes_as_in_transformers(tmp_path: Path, encoder: Encoder, name: str) -> None:
    layout = LAYOUTS[name]
    save_layout(tmp_path, encoder, layout)
    tokenizer = tokenizer_of(tmp_path, layout)
    vocabulary = load_ctc(tmp_path).vocabulary
    drawn = paths(layout.rows)
    blank = tokenizer.pad_token_id
    order = torch.tensor([blank, *(place for place in range(layout.rows) if place != blank)])
    ours = torch.nn.functional.one_hot(drawn, layout.rows)[..., order].float()
    printed = greedy(ours, torch.full((len(drawn),), drawn.shape[1]), vocabulary)
    assert printed == [normalised(text) for text in tokenizer.batch_decode(drawn)]
    assert len(set(printed)) == len(drawn)
    for log_probs, text in zip(ours.log(), printed, strict=True):
        again, words = words_in(log_probs, vocabulary)
        assert again == text
        if vocabulary.separator == " ":
            assert [word.text for word in words] == text.split()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tokenizer_survives_import_and_export(tmp_path: Path, encoder: Encoder, name: str) -> None:
    layout = LAYOUTS[name]
    save_layout(tmp_path / "theirs", encoder, layout)
    import_model(str(tmp_path / "theirs"), tmp_path / "ours.ckpt")
    export_model(str(tmp_path / "ours.ckpt"), tmp_path / "back")
    before, after = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("theirs", "back"))
    drawn = paths(layout.rows)
    assert after.batch_decode(drawn) == before.batch_decode(drawn)
    assert after.pad_token_id == before.pad_token_id
    assert after.pad_token == before.pad_token
    assert after.unk_token != after.pad_token
    rows = range(layout.rows)
    assert after.convert_ids_to_tokens(rows) == before.convert_ids_to_tokens(rows)
    heads = [transformers.HubertForCTC.from_pretrained(tmp_path / name).lm_head for name in ("theirs", "back")]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert torch.equal(heads[0].bias, heads[1].bias)
    # With our own file beside it, and without
    again = [read_weights(tmp_path / "ours.ckpt").vocabulary, read_weights(tmp_path / "back").vocabulary]
    for file in (tmp_path / "back").glob("*hubert_lightning*"):
        file.unlink()
    again.append(read_weights(tmp_path / "back").vocabulary)
    assert again == [load_ctc(tmp_path / "theirs").vocabulary] * 3


@pytest.mark.parametrize("name", ["two letters of one row", "a space and | of one row"])
def test_letters_that_share_a_row_survive_import_and_export(tmp_path: Path, encoder: Encoder, name: str) -> None:
    """As in transformers#15275; the last of them is printed."""
    layout = LAYOUTS[name]
    save_layout(tmp_path / "theirs", encoder, layout)
    vocabulary = load_ctc(tmp_path / "theirs").vocabulary
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    letters = [token for token in layout.table if len(token) == 1 and token not in "| "]
    for text in ["ab ba", *letters]:
        assert vocabulary.normalise(text) == text
        order = [theirs.pad_token_id, *(place for place in range(layout.rows) if place != theirs.pad_token_id)]
        assert [order[token] for token in vocabulary.encode(text)] == theirs(text).input_ids
    import_model(str(tmp_path / "theirs"), tmp_path / "ours.ckpt")
    export_model(str(tmp_path / "ours.ckpt"), tmp_path / "back")
    table = json.loads((tmp_path / "back" / "vocab.json").read_text("utf-8"))
    assert {token: table.get(token) for token in layout.table} == layout.table


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_in_another_encoding_give_the_same_model(tmp_path: Path, encoder: Encoder, encoding: str) -> None:
    save_layout(tmp_path, encoder, LAYOUTS["the tutorial on fine-tuning, of 2021"])
    before = load_ctc(tmp_path)
    for file in tmp_path.glob("*.json"):
        file.write_text(file.read_text("utf-8"), encoding)
    after = load_ctc(tmp_path)
    assert after.vocabulary == before.vocabulary
    assert after.encoder.config == before.encoder.config
    (tmp_path / "vocab.json").write_text('{"é": 1}', "latin-1")
    with pytest.raises(ValueError, match=r"vocab\.json: is not UTF-8, nor UTF-16 with its mark; convert it"):
        load_ctc(tmp_path)


@pytest.mark.parametrize("format", ["fairseq", "torchaudio", "safetensors"])
@pytest.mark.parametrize(
    "name",
    [
        "Chinese, without a delimiter",
        "a space between words",
        "[SPACE] between words",
        "phonemes with a delimiter",
        "upper case that is printed in lower case",
    ],
)
def test_a_tokenizer_comes_back_from_any_system(tmp_path: Path, encoder: Encoder, name: str, format: Any) -> None:
    save_layout(tmp_path / "theirs", encoder, LAYOUTS[name])
    import_model(str(tmp_path / "theirs"), tmp_path / "ours.ckpt")
    export_model(str(tmp_path / "ours.ckpt"), tmp_path / "there", format)
    before, after = load_ctc(tmp_path / "ours.ckpt"), load_ctc(tmp_path / "there")
    assert after.vocabulary == before.vocabulary
    assert torch.equal(after.head.weight, before.head.weight)


@pytest.mark.parametrize(
    ("tokens", "case"),
    [
        ("abcß", "lower"),
        ("ABCß", "upper"),  # which has no other case of one letter
        ("ABCẞ", "upper"),
        ("aBc", "as_written"),
        ("abı", "lower"),
        ("ABİ", "upper"),
        ("აბგ", "lower"),
        ("今天", "as_written"),
        (["th", "e", "<s>", "[UNK]"], "lower"),
        (["▁THE", "CAT", "<s>"], "upper"),
    ],
)
def test_the_case_of_a_table_is_that_of_its_letters(tokens: Any, case: str) -> None:
    assert vocabulary_settings(["<pad>", "|", *tokens])["case"] == case


def test_a_vocabulary_that_cannot_be_used_is_refused_with_its_file(tmp_path: Path, encoder: Encoder) -> None:
    save_layout(tmp_path, encoder, Layout(["a", "|", "[UNK]"], tokenizer_config=NAMES))
    with pytest.raises(ValueError, match=f"{tmp_path / 'vocab.json'} has no '\\[PAD\\]', the blank"):
        load_ctc(tmp_path)
    save_layout(tmp_path, encoder, Layout({"a": 0, "|": "1", "[PAD]": 2}, tokenizer_config=NAMES))
    with pytest.raises(ValueError, match=f"{tmp_path / 'vocab.json'} numbers '\\|' with '1'"):
        load_ctc(tmp_path)
    save_with_vocabulary(tmp_path / "ours.ckpt", {"tokens": ["-", "|", "|"]})
    with pytest.raises(ValueError, match=r"ours.ckpt: its vocabulary cannot be used: the tokens \['\|'\]"):
        load_ctc(tmp_path / "ours.ckpt")
    assert load_encoder(tmp_path / "ours.ckpt")  # which needs no letters


def save_with_vocabulary(path: Path, vocabulary: dict[str, Any]) -> Path:
    save_ctc(path, Vocabulary(("-", "|", "A")))
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["vocabulary"] = vocabulary
    torch.save(content, path)
    return path


PHONEMES = ["h", "ə", "l", "oʊ", "ɑː", "oʊ"]


def test_phonemes_have_times_and_are_aligned(tmp_path: Path, encoder: Encoder) -> None:
    table = ["<s>", "<pad>", "</s>", "<unk>", *PHONES, "h"]
    path = path_of(PHONEMES, "<pad>")
    save_solved_model(tmp_path, encoder, table, path, blank="<pad>", **FACEBOOK, **ESPEAK)
    vocabulary, log_probs = vocabulary_and_log_probs(tmp_path, encoder)
    text, words = words_in(log_probs, vocabulary)
    assert text == " ".join(PHONEMES)
    spans = [(start, start + len(list(run))) for token, run, start in runs(path) if token != "<pad>"]
    assert [(word.text, word.start, word.end) for word in words] == [
        (phone, pytest.approx(0.02 * start), pytest.approx(0.02 * end))
        for phone, (start, end) in zip(PHONEMES, spans, strict=True)
    ]
    assert all(word.confidence > 0.95 for word in words)
    assert [word[:3] for word in word_times(log_probs, text, vocabulary)] == [word[:3] for word in words]
    search = BeamSearch(DecoderSettings(beam_size=20, num_workers=0), vocabulary)
    assert [word[:3] for word in words_in(log_probs, vocabulary, search)[1]] == [word[:3] for word in words]


def runs(path: list[str]) -> list[tuple[str, list[str], int]]:
    result: list[tuple[str, list[str], int]] = []
    for frame, token in enumerate(path):
        if result and result[-1][0] == token:
            result[-1][1].append(token)
        else:
            result.append((token, [token], frame))
    return result


def test_a_word_with_an_unknown_token_has_the_times_of_all_its_tokens(tmp_path: Path, encoder: Encoder) -> None:
    tokens = ["[UNK]", "a", "|", "b", "[UNK]"]
    path = path_of(tokens, "[PAD]")
    save_solved_model(tmp_path, encoder, [*"ab|", "[UNK]", "[PAD]"], path)
    vocabulary, log_probs = vocabulary_and_log_probs(tmp_path, encoder)
    text, words = words_in(log_probs, vocabulary)
    assert text == "[UNK]a b[UNK]"
    frames = [frame for frame, token in enumerate(path) if token not in ("[PAD]", "|")]
    assert words[0].start == pytest.approx(0.02 * frames[0])
    assert words[-1].end == pytest.approx(0.02 * (frames[-1] + 1))
    assert all(word.confidence > 0.99 for word in words)
    assert [token.text for token in words[0].tokens] == ["[UNK]", "a"]
    assert [word[:3] for word in word_times(log_probs, vocabulary.normalise(text), vocabulary)] == [
        word[:3] for word in words
    ]
