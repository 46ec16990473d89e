import pickle
from string import ascii_uppercase

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchaudio.pipelines import HUBERT_ASR_LARGE

from hubert_lightning.data.text import BLANK, BOUNDARY, LETTERS, Vocabulary, read_vocabulary, vocabulary_of

letters = Vocabulary()


def test_there_are_torchaudio_s_29_tokens_with_the_blank_first():
    assert LETTERS[BLANK] == "-"
    assert len(letters) == 29
    assert set(LETTERS) == set(HUBERT_ASR_LARGE.get_labels())


@given(st.text(ascii_uppercase + "' "))
def test_what_is_encoded_decodes_to_itself(text):
    assert letters.decode(letters.encode(text)) == text
    assert BLANK not in letters.encode(text)


@given(st.text(), st.sampled_from(["upper", "lower", "as_written"]), st.sampled_from(["refuse", "space"]))
def test_normalising_twice_changes_nothing_more(text, case, punctuation):
    normalise = Vocabulary(case=case, punctuation=punctuation).normalise
    assert normalise(normalise(text)) == normalise(text)


def test_normalised_text_is_upper_case_with_single_spaces():
    assert letters.normalise("  it’s\ta\n\nsmall\u200b  world ") == "IT'S A SMALL WORLD"
    assert letters.normalise(" ") == ""


@given(st.lists(st.text(), min_size=1), st.sampled_from(["upper", "lower", "as_written"]))
def test_a_vocabulary_spells_the_texts_that_it_was_made_of(texts, case):
    vocabulary, counts, left_out = vocabulary_of(texts, case)
    for text in texts:
        spelled = vocabulary.known(vocabulary.normalise(text))
        assert vocabulary.decode(vocabulary.encode(spelled)) == spelled
    assert set(vocabulary.tokens[2:]) == set(counts)
    assert not set(counts) & set(left_out)


def test_a_vocabulary_has_the_letters_of_its_language_and_says_what_it_leaves_out():
    said = ["Où est-ce, l’œuvre nº 12 ?", "Ça coûte 5 €", "हिन्दी में"]
    vocabulary, counts, left_out = vocabulary_of(said)
    assert vocabulary.normalise(said[0]) == "où est ce l'œuvre nº 12"
    assert vocabulary.tokens[:2] == ("<blank>", BOUNDARY)
    assert {"ù", "œ", "ç", "û", "'", "5", "ह", "ि", "्"} <= set(vocabulary.tokens)
    assert counts["5"] == 1
    assert left_out == {"-": 1, ",": 1, "?": 1, "€": 1}
    assert vocabulary.normalise(said[1]) == "ça coûte 5 €"
    assert vocabulary.unknown_characters(vocabulary.normalise(said[1])) == {"€"}
    assert "-" in vocabulary_of(said, kept="'-")[0].tokens


@pytest.mark.parametrize("symbol", "€$£¥₹%‰&@#§°№℃+=×<>±")
def test_a_symbol_that_is_said_does_not_vanish(symbol):
    vocabulary, _, left_out = vocabulary_of(["a b"] + [f"a {symbol} b"] * 3)
    assert vocabulary.normalise(f"A {symbol}b!") == f"a {symbol}b"
    assert vocabulary.unknown_characters(f"a {symbol}b") == {symbol}
    assert left_out == {symbol: 3}
    kept, _, _ = vocabulary_of([f"a {symbol} b"], kept=symbol)
    assert kept.decode(kept.encode(f"a {symbol}b")) == f"a {symbol}b"


@pytest.mark.parametrize(
    "text", ["one, two!", "(one) two…", "«one» – two", "one_two", "one♪two", "one 👍 two", "¿one? /two/"]
)
def test_punctuation_and_pictures_are_spaces(text):
    assert vocabulary_of(["one two"])[0].normalise(text) == "one two"


def test_decomposed_letters_are_the_composed_ones():
    assert letters.normalise("é") == letters.normalise("e\u0301") == "É"


def test_a_vocabulary_is_read_as_it_was_written(tmp_path):
    vocabulary, _, _ = vocabulary_of(["Übung macht den Meister!"])
    vocabulary.write(tmp_path / "new" / "vocabulary.json")
    assert read_vocabulary(tmp_path / "new" / "vocabulary.json") == vocabulary


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no such vocabulary; make it with"),
        ("[1, 2", "no vocabulary .*; make one with"),
        ('{"letters": []}', "no vocabulary, .*letters"),
        ('{"tokens": ["-", "|", "a", "a"]}', r"the tokens \['a'\] are there more than once"),
        ('{"tokens": ["-", "|"], "case": "Upper"}', "case 'Upper' and"),
    ],
)
def test_what_is_no_vocabulary_is_refused(tmp_path, content, sentence):
    path = tmp_path / "v.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"v.json: {sentence}"):
        read_vocabulary(path)


def test_tokens_are_places_in_the_vocabulary():
    assert letters.encode("A B'") == [2, 1, 3, 28]
    assert letters.decode([2, 2, 0, 1, 3]) == "AA- B"


def test_the_blank_and_the_boundary_are_no_characters_of_a_text():
    assert letters.unknown_characters("TWENTY-ONE | É2") == {"-", "|", "É", "2"}
    assert letters.unknown_characters("IT'S FINE") == set()


def test_unknown_characters_are_refused_with_their_text_and_the_way_out():
    with pytest.raises(ValueError, match=r"'CHAPTER 21.*has \['1', '2'\].*spell out or remove"):
        letters.encode("CHAPTER 21")


def test_a_vocabulary_needs_a_boundary_and_no_token_twice():
    with pytest.raises(ValueError, match=r"\['A'\] are there more than once"):
        Vocabulary(("-", "|", "A", "A"))
    with pytest.raises(ValueError, match=r"no token '\|'"):
        Vocabulary(("-", "A"))


def test_a_vocabulary_of_other_letters_travels_to_a_worker():
    cyrillic = Vocabulary(("<blank>", "|", "Д", "Ю"))
    assert cyrillic.encode("ДЮ ДЮ") == [2, 3, 1, 2, 3]
    assert pickle.loads(pickle.dumps(cyrillic)) == cyrillic
    assert Vocabulary(list(cyrillic.tokens)) == cyrillic
