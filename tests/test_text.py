import pickle
from string import ascii_uppercase

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchaudio.pipelines import HUBERT_ASR_LARGE

from hubert_lightning.data.text import BLANK, LETTERS, Vocabulary, normalise

letters = Vocabulary(LETTERS)


def test_there_are_torchaudio_s_29_tokens_with_the_blank_first():
    assert LETTERS[BLANK] == "-"
    assert len(letters) == 29
    assert set(LETTERS) == set(HUBERT_ASR_LARGE.get_labels())


@given(st.text(ascii_uppercase + "' "))
def test_what_is_encoded_decodes_to_itself(text):
    assert letters.decode(letters.encode(text)) == text
    assert BLANK not in letters.encode(text)


@given(st.text())
def test_normalising_twice_changes_nothing_more(text):
    assert normalise(normalise(text)) == normalise(text)


def test_normalised_text_is_upper_case_with_single_spaces():
    assert normalise("  it's\ta\n\nsmall  world ") == "IT'S A SMALL WORLD"
    assert normalise(" ") == ""


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
