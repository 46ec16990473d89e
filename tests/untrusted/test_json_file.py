"""JSON of others is read with bounds, and what is wrong with it is one sentence."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubert_lightning.asr.decoder_settings import read_settings
from hubert_lightning.untrusted.json_file import parse_json, read_json
from hubert_lightning.vocabulary import read_vocabulary

plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    plain | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
)


@given(values, st.booleans())
def test_valid_json_is_read(value: Any, ascii: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii)) == value
    assert parse_json(json.dumps(value, ensure_ascii=ascii).encode()) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested deeper than 100"),
        ("[" * 101 + "]" * 101, "nested deeper than 100"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested deeper than 100"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        ("NaN", "NaN, which is not a JSON number"),
        ("-Infinity", "Infinity, which is not a JSON number"),
        ("1e999", "1e999, which is not a finite number"),
        ("9" * 5000, "a number of 5000 digits"),
        ('"\\ud800"', "holds half of a character"),
        ('{"\\udc80": 1}', "holds half of a character"),
        (b'"\xff"', "byte 1 is not UTF-8"),
        ("[1, 2", "line 1 column"),
    ],
)
def test_hostile_json_is_refused(tmp_path: Path, text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"a\.json(: | is not )") as refusal:
        read_json(tmp_path / "a.json", "get it again")
    assert len(str(refusal.value)) < 300
    assert str(refusal.value).endswith("; get it again") or "convert it" in str(refusal.value)


def test_a_file_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(ValueError, match=r"a\.json: has more than 16777216 characters, where settings have"):
        read_json(tmp_path / "a.json", "get it again")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"num_workers": 100_000}, "num_workers is 100000; it is a number from 0 to 1024"),
        ({"num_workers": -1}, "num_workers is -1; it is a number from 0 to 1024"),
        ({"num_workers": True}, "num_workers is True; it is a number from 0 to 1024"),
        ({"beam_size": 10**12}, "beam_size is 1000000000000; it is a number from 1 to 10000"),
        ({"nbest": 2**63}, "nbest is 9223372036854775808; it is a number from 1 to 10000"),
        ({"lm_weight": 1e300}, r"lm_weight is 1e\+300; it is a number, of 1000000 at most"),
        ({"word_score": None}, "word_score is None; it is a number"),
        ({"silence_score": "x" * 10**6}, "silence_score is 'xxxx.*; it is a number"),
        ({"lm": 3}, "lm is 3; it is a path"),
        ({"lexicon": ["a"]}, r"lexicon is \['a'\]; it is a path"),
        ({"rescorer": "a\0b"}, "rescorer is .*; it is a path"),
        ({"rescorer_case": {}}, "rescorer_case is {}; choose lower"),
        ({"beam_threshold": -1}, "beam_size 500, nbest 1, beam_threshold -1; each is above 0"),
    ],
)
def test_a_decoder_sets_nothing_beyond_its_bounds(tmp_path: Path, content: dict[str, Any], reason: str) -> None:
    (tmp_path / "decoder.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"decoder\.json: not a decoder settings file \({reason}") as refusal:
        read_settings(tmp_path / "decoder.json")
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"tokens": ["-", "|", None]}, "the token None is not text"),
        ({"tokens": ["-", "|", ""]}, "the token ''; give each from 1 to 1000 characters"),
        ({"tokens": ["-", "|", "a" * 10**6]}, "the token 'aaa.*; give each from 1 to 1000 characters"),
        ({"tokens": []}, r"the tokens are \[\]; give a list"),
        (
            {"tokens": [str(number) for number in range(200_000)]},
            "the tokens are .*; give a list of them, 100000 at most",
        ),
        ({"tokens": ["-"], "delimiter": None, "same": [1]}, r"same is \[1\]; give an object"),
        ({"tokens": ["-", "a"], "delimiter": None, "same": {"b": None}}, "same has None"),
        ({"tokens": ["-", "|"], "blank_id": True}, "blank_id is True"),
    ],
)
def test_a_vocabulary_has_tokens_alone(tmp_path: Path, content: dict[str, Any], reason: str) -> None:
    (tmp_path / "vocabulary.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"vocabulary\.json: {reason}") as refusal:
        read_vocabulary(tmp_path / "vocabulary.json")
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("text", ["[1]", '"x"', "3"])
def test_settings_of_a_decoder_that_are_no_object_are_quoted(text: str, tmp_path: Path) -> None:
    (tmp_path / "decoder.json").write_text(text)
    quoted = re.escape(repr(json.loads(text)))
    with pytest.raises(ValueError, match=rf"not a decoder settings file \({quoted} is not a JSON object\)"):
        read_settings(tmp_path / "decoder.json")
