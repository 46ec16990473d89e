import pickle
from string import ascii_uppercase

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchaudio.pipelines import HUBERT_ASR_LARGE

from hubert_lightning.characters import comparable
from hubert_lightning.vocabulary import BLANK, BOUNDARY, LETTERS, Vocabulary, read_vocabulary, vocabulary_of

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


def test_a_vocabulary_has_the_letters_of_its_language_and_lists_the_others():
    said = ["Où est-ce, l’œuvre nº 12 ?", "Ça coûte 5 €", "हिन्दी में"]
    vocabulary, counts, left_out = vocabulary_of(said)
    assert vocabulary.normalise(said[0]) == "où est ce l'œuvre nº 12"
    assert vocabulary.tokens[:2] == ("<blank>", BOUNDARY)
    assert {"ù", "œ", "ç", "û", "'", "5", "ह", "ि", "्"} <= set(vocabulary.tokens)
    assert counts["5"] == 1
    assert left_out == {"-": 1, ",": 1, "?": 1, "€": 1}
    assert vocabulary.normalise(said[1]) == "ça coûte 5 €"
    assert vocabulary.unknown_characters(vocabulary.normalise(said[1])) == {"€"}
    assert "-" in vocabulary_of(said, keep_punctuation="'-")[0].tokens


@pytest.mark.parametrize("symbol", "€$£¥₹%‰&@#§°№℃+=×<>±")
def test_a_spoken_symbol_does_not_vanish(symbol):
    vocabulary, _, left_out = vocabulary_of(["a b"] + [f"a {symbol} b"] * 3)
    assert vocabulary.normalise(f"A {symbol}b!") == f"a {symbol}b"
    assert vocabulary.unknown_characters(f"a {symbol}b") == {symbol}
    assert left_out == {symbol: 3}
    kept, _, _ = vocabulary_of([f"a {symbol} b"], keep_punctuation=symbol)
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
        ('{"tokens": ["-", "|", 1, "a"]}', "the token 1 is not text; put it in quotes"),
        ('{"tokens": ["-", "|", null]}', "the token None is not text"),
        ('{"tokens": "abc|"}', r"the tokens are 'abc\|'; give a list of them"),
        ('{"tokens": 5}', "the tokens are 5; give a list of them"),
        ('{"tokens": ["-", "|", "a"], "delimiter": 1}', "delimiter is 1, which is not text"),
        ('{"tokens": ["-", "|", "a"], "separator": null}', "separator is None, which is not text"),
        ('{"tokens": ["-", "|", "a"], "lower_case": "no"}', "lower_case is 'no'; choose true or false"),
        ('{"tokens": ["-", "|", "a"], "blank_id": "0"}', "blank_id is '0'; give a number"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, content, sentence):
    path = tmp_path / "v.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"v.json: {sentence}"):
        read_vocabulary(path)


def test_tokens_are_indices_in_the_vocabulary():
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


YA, NUKTA, YYA, RRA = "\u09af", "\u09bc", "\u09df", "\u09dc"  # য, its mark, and letters that NFC takes apart


def test_a_token_that_nfc_takes_apart_spells_its_letter():
    bengali = Vocabulary(("-", "|", "হ", YYA, RRA), "as_written")
    for written in (f"হ{YYA}", f"হ{YA}{NUKTA}"):
        assert bengali.normalise(written) == f"হ{YA}{NUKTA}"
        assert bengali.encode(bengali.normalise(written)) == [2, 3]
    assert bengali.decode([2, 3, 1, 4]) == f"হ{YA}{NUKTA} \u09a1{NUKTA}"
    assert bengali.unknown_characters(bengali.normalise(f"ক{YYA}")) == {"ক"}


@pytest.mark.parametrize(
    ("tokens", "text", "spelled"),
    [
        ("ao\u0301", "óa", "o \u0301 a"),  # decomposed
        (["a", "ê", "\u0323"], "ệ", "ê \u0323"),  # a Vietnamese vowel and a tone, in another order than Unicode's
        (
            ["\ufb2a", "\u05b8", "ל"],
            "שָׁל",
            "\ufb2a \u05b8 ל",
        ),  # a Hebrew letter and its dot, around which a vowel stands
        (["하", "\u11ab", "한"], "한하", "한 하"),
        (["ᄒ", "ᅡ", "ᆫ"], "한", "ᄒ ᅡ ᆫ"),
        (["ch", "c", "h", "i", "ich"], "chich", "ch ich"),  # the longest
        (["ab", "a", "bc"], "abc", "a bc"),  # that spell the whole
        (["a", "[UNK]", "b"], "a[UNK]b", "a [UNK] b"),
        (["σ", "ο"], "σος", "σ ο σ"),  # a table without the final form
    ],
)
def test_a_text_is_spelled_with_the_tokens_that_are_there(tokens, text, spelled):
    vocabulary = Vocabulary(("-", "|", *tokens), "lower", "space")
    assert vocabulary.spell(vocabulary.normalise(text)) == spelled.split()
    assert vocabulary.decode(vocabulary.encode(vocabulary.normalise(text))) == vocabulary.normalise(text)


@pytest.mark.parametrize("held", ["'", "’", "ʼ", "＇", "ʻ", "`"])
@pytest.mark.parametrize("written", ["'", "’", "ʼ", "＇"])
def test_an_apostrophe_is_the_one_that_is_a_token(held, written):
    vocabulary = Vocabulary(("-", "|", *"celns", held), "lower", "space")
    assert vocabulary.normalise(f"C{written}EN") == f"c{held}en"
    assert not vocabulary.unknown_characters(vocabulary.normalise(f"C{written}EN"))
    assert comparable(f"c{written}en") == comparable(f"c{held}en") or held in "ʻ`"


def test_apostrophes_that_are_tokens_stay_apart_and_compare_as_one():
    vocabulary = Vocabulary(("-", "|", *"c'’"), "lower", "space")
    assert vocabulary.normalise("c'c’cʼc") == "c'c’c'c"
    assert comparable("c'c") == comparable("c’c")


def test_turkish_has_two_i_s_each_with_its_capital():
    small, counts, _ = vocabulary_of(["İğne ISPARTA ılık iyi"])
    assert {"ı", "i"} <= set(counts)
    assert "\u0307" not in counts
    assert small.normalise("ISPARTA İZMİR I\u0307") == "ısparta izmir i"
    large, _, _ = vocabulary_of(["İğne ısı"], "upper")
    assert large.normalise("iğne ısı") == "İĞNE ISI"
    for table in ("ABCÇDEFGĞHIİJ", "ABCDEFGHIJ\u0306\u0307\u0327"):  # composed, and decomposed
        imported = Vocabulary(("-", "|", *table), "upper", "space")
        assert imported.normalise("iğ ıc") == "İĞ IC"
        assert not imported.unknown_characters("İĞ IC")
    assert Vocabulary(("-", "|", *"abcçdefgğhıij"), "lower").normalise("IĞ İC") == "ığ ic"
    assert Vocabulary(("-", "|", *"abıi\u0307"), "lower").normalise("Iİ") == "ii\u0307"  # made by Python's lower()
    assert Vocabulary(("-", "|", *"abi"), "lower").normalise("Iİ") == "ii"


@pytest.mark.parametrize(
    ("tokens", "case", "text", "normal"),
    [
        ("AßS", "upper", "aß", "Aß"),
        ("AẞS", "upper", "aß", "Aẞ"),
        ("AS", "upper", "aß", "ASS"),
        ("aßs", "lower", "Aẞ", "aß"),
        ("σςο", "lower", "ΣΟΣ", "σος"),
        ("σο", "lower", "ΣΟΣ", "σοσ"),
        ("ΣΟ", "upper", "σος", "ΣΟΣ"),
        ("აბ", "lower", "აბ", "აბ"),
    ],
)
def test_the_case_is_one_that_the_tokens_spell(tokens, case, text, normal):
    vocabulary = Vocabulary(("-", "|", *tokens), case)
    assert vocabulary.normalise(text) == normal
    assert vocabulary.decode(vocabulary.encode(normal)) == normal


def test_invisible_characters_are_no_letters():
    said = [
        "gut 👩\u200d👩\u200d👧 ❤\ufe0f 1\ufe0f\u20e3 葛\U000e0100",
        "Auf\u200clage ma\u00adchen a\u034fb \ufeff\u115fc\u2060",
    ]
    vocabulary, counts, left_out = vocabulary_of(said)
    assert set(counts) == set("gut1葛auflgemchenb")
    assert set(left_out) == set("👩👧❤\u20e3")
    assert vocabulary.normalise(said[1]) == "auflage machen ab c"


@pytest.mark.parametrize("text", ["می\u200cخواهم", "क्\u200dष", "क्\u200cष", "മ്\u200d"])
def test_joiners_stay_where_they_change_what_is_written(text):
    assert vocabulary_of([text])[0].normalise(f"\u200d{text}") == text


def test_all_white_space_parts_words():
    assert comparable("a\u00a0b\u3000c\u2028d\te\r\nf\u202fg") == "a b c d e f g"
    assert letters.normalise("a\u00a0b\u3000c\u2028d\te\r\nf") == "A B C D E F"


def test_phonemes_are_spelled_between_spaces_and_count_as_words():
    phones = Vocabulary(("<pad>", "h", "ə", "oʊ", "t^", "l", "|"), "as_written", "space", delimiter=None, spaced=True)
    assert phones.normalise(" h  ə l oʊ t^ ") == "h ə l oʊ t^"
    assert phones.encode("h ə l oʊ t^") == [1, 2, 5, 3, 4]
    assert phones.decode([1, 2, 5, 3, 4]) == "h ə l oʊ t^"
    assert [word.text for word in phones.words_of([1, 3, 3])] == ["h", "oʊ", "oʊ"]
    assert phones.targets("h ə") == [1, 2]


def test_the_settings_of_a_vocabulary_leave_out_defaults():
    assert letters.settings() == {"tokens": [*LETTERS], "case": "upper", "punctuation": "refuse"}
    chinese = Vocabulary(("-", "你", "好"), "as_written", "space", delimiter=None)
    assert chinese.settings()["delimiter"] is None
    assert Vocabulary(**chinese.settings()) == chinese
    assert chinese.encode("你好 你") == [1, 2, 1]
    assert chinese.targets("你好") == [1, 2]
