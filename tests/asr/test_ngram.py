"""An n-gram model of a text has normalised probabilities, prefers the text, and gets a lexicon that fits it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import one_hot

from hubert_lightning.asr.decoder_settings import DecoderSettings
from hubert_lightning.asr.decoding import BeamSearch
from hubert_lightning.asr.lexicon import lexicon
from hubert_lightning.asr.ngram import ngram
from hubert_lightning.asr.recognition import words_in
from hubert_lightning.cli import main
from hubert_lightning.vocabulary import Vocabulary, vocabulary_of

NO_FLASHLIGHT = "flashlight-text has no wheel for this version of Python"
TEXT = """The cat sat on the mat.
The dog sat on the log, the cat on the dog.
On the mat sat a cat; on the log sat a dog!
A dog and a cat: 2 friends
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    vocabulary_of(["the cat sat on a mat", "dog log and friends"])[0].write(tmp_path / "vocabulary.json")
    return tmp_path / "vocabulary.json"


def words_of(lexicon: Path) -> dict[str, list[str]]:
    return {word: spelled for word, *spelled in (line.split() for line in lexicon.read_text().splitlines())}


def kenlm_log10(arpa: Path, words: Sequence[str], context: str, word: str) -> float:
    """KenLM's log-probability of a word after a context that begins a sentence."""
    kenlm = pytest.importorskip("flashlight.lib.text.decoder.kenlm", reason=NO_FLASHLIGHT)
    dictionary = pytest.importorskip("flashlight.lib.text.dictionary", reason=NO_FLASHLIGHT)
    lm = kenlm.KenLM(str(arpa), known := dictionary.Dictionary([*words, "</s>", "<unk>"]))
    state = lm.start(False)
    for before in context.split():
        state, _ = lm.score(state, known.get_index(before))
    log10: float = lm.score(state, known.get_index(word))[1] if word != "</s>" else lm.finish(state)[1]
    return log10


@pytest.mark.parametrize("order", [2, 3, 5])
def test_probabilities_after_any_context_add_up_to_1(text: Path, vocabulary: Path, tmp_path: Path, order: int) -> None:
    arpa = tmp_path / "a.arpa"
    ngram(text, arpa, order=order, vocabulary=vocabulary)
    words = list(words_of(tmp_path / "a.lexicon"))
    for context in ("", "the", "the cat", "on the mat sat", "dog mat"):
        all_of_it = sum(10 ** kenlm_log10(arpa, words, context, word) for word in [*words, "<unk>", "</s>"])
        assert all_of_it == pytest.approx(1, abs=2e-3)


def test_words_of_the_text_are_likelier_than_others(text: Path, vocabulary: Path, tmp_path: Path) -> None:
    ngram(text, tmp_path / "a.arpa", order=3, vocabulary=vocabulary)
    words = list(words_of(tmp_path / "a.lexicon"))
    assert (
        kenlm_log10(tmp_path / "a.arpa", words, "on", "the")
        > kenlm_log10(tmp_path / "a.arpa", words, "on", "cat") + 0.4
    )


def test_a_text_is_normalised_and_its_unknown_characters_are_printed(
    text: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ngram(text, tmp_path / "a.arpa", order=2, vocabulary=vocabulary)
    assert set(words_of(tmp_path / "a.lexicon")) == {
        *TEXT.lower().replace(",", "").replace(".", "").replace(";", "").replace("!", "").replace(":", "").split()
    } - {"2"}
    assert words_of(tmp_path / "a.lexicon")["cat"] == ["c", "a", "t", "|"]
    printed = capsys.readouterr().out
    assert "1 of 36 words are unknown to the model, since the vocabulary lacks '2' (1)" in printed
    assert "<unk>" in (tmp_path / "a.arpa").read_text()


def test_letters_are_the_words_of_a_model_of_letters(text: Path, vocabulary: Path, tmp_path: Path) -> None:
    ngram(text, tmp_path / "a.arpa", order=3, vocabulary=vocabulary, letters=True)
    letters = "|acdefghilmnorst"
    assert kenlm_log10(tmp_path / "a.arpa", letters, "t h", "e") > -0.2
    assert not (tmp_path / "a.lexicon").exists()


def test_rare_ngrams_are_left_out_if_asked(text: Path, vocabulary: Path, tmp_path: Path) -> None:
    for name, least in (("all", None), ("few", [0, 2, 2])):
        ngram(text, tmp_path / f"{name}.arpa", order=3, vocabulary=vocabulary, min_counts=least)
    counts = [(tmp_path / f"{name}.arpa").read_text().split("\n")[3] for name in ("all", "few")]
    assert int(counts[0].removeprefix("ngram 3=")) > int(counts[1].removeprefix("ngram 3=")) > 0


def test_one_sentence_is_enough(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two\n")
    ngram(tmp_path / "text.txt", tmp_path / "a.arpa")
    assert kenlm_log10(tmp_path / "a.arpa", ["ONE", "TWO"], "ONE", "TWO") > -0.5


def test_a_lexicon_is_made_of_a_language_model_or_a_list_of_words(
    text: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ngram(text, tmp_path / "a.arpa", order=2, vocabulary=vocabulary)
    lexicon(tmp_path / "a.arpa", tmp_path / "of-arpa", vocabulary)
    assert (tmp_path / "of-arpa").read_text() == (tmp_path / "a.lexicon").read_text()
    (tmp_path / "words.txt").write_text("cat\nnaïve cat\n")
    lexicon(tmp_path / "words.txt", tmp_path / "of-words", vocabulary)
    assert words_of(tmp_path / "of-words") == {"cat": ["c", "a", "t", "|"]}
    assert "1 word, without 1 with other letters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        (None, {}, "text.txt: cannot be read"),
        (b"\xff\xfe\xff", {}, "text.txt: is not UTF-8"),
        (b"\n\n", {}, "text.txt: no sentences in the letters of the vocabulary"),
        ("кот".encode(), {}, "text.txt: no sentences in the letters of the vocabulary"),
        (b"one two", {"order": 1}, "order 1: choose 2 to 5"),
        (b"one two", {"min_counts": [1]}, r"min_counts \[1\] for n-grams of order 4"),
        (b"one two", {"vocabulary": Path("no.json")}, "no.json: no such vocabulary"),
    ],
)
def test_a_text_without_sentences_is_refused(
    tmp_path: Path, content: bytes | None, options: dict[str, Any], sentence: str
) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        ngram(tmp_path / "text.txt", tmp_path / "a.arpa", **options)
    assert not (tmp_path / "a.arpa").exists()


@pytest.mark.parametrize("name", ["lm.lexicon", "text.txt", "lm.arpa.gz", "lm"])
def test_a_model_has_a_name_of_an_arpa_file(text: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: not a name of an ARPA file; choose one that ends in .arpa"):
        ngram(text, text.parent / name)
    assert [path.name for path in text.parent.iterdir()] == ["text.txt"]
    assert text.read_text() == TEXT


def test_a_model_does_not_take_the_name_of_its_text(text: Path) -> None:
    text = text.rename(text.with_suffix(".arpa"))
    with pytest.raises(ValueError, match=r"text\.arpa: the name of the text; choose another OUT"):
        ngram(text, text)
    assert text.read_text() == TEXT


def test_a_lexicon_that_exists_is_not_overwritten(text: Path, vocabulary: Path, tmp_path: Path) -> None:
    (tmp_path / "a.lexicon").write_text("CAT C A T |\n")
    with pytest.raises(ValueError, match=r"a\.lexicon: exists already; remove it or choose another OUT"):
        ngram(text, tmp_path / "a.arpa", order=2, vocabulary=vocabulary)
    assert not (tmp_path / "a.arpa").exists()
    assert (tmp_path / "a.lexicon").read_text() == "CAT C A T |\n"
    ngram(text, tmp_path / "a.arpa", order=2, vocabulary=vocabulary, letters=True)  # has no lexicon


def test_the_verbs_make_vocabulary_model_and_lexicon(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["vocabulary", f"[{manifests / 'train.jsonl.gz'}]", str(tmp_path / "v.json")])
    printed = capsys.readouterr().out
    assert "characters in" in printed
    assert "tokens, with the blank and the word boundary" in printed
    (tmp_path / "text.txt").write_text("Hello there\nhello you\n")
    options = ["--order=2", f"--vocabulary={tmp_path / 'v.json'}"]
    main(["ngram", str(tmp_path / "text.txt"), str(tmp_path / "a.arpa"), *options])
    main(["lexicon", str(tmp_path / "a.arpa"), str(tmp_path / "again"), f"--vocabulary={tmp_path / 'v.json'}"])
    assert words_of(tmp_path / "again").keys() == {"hello", "there", "you"}


def test_manifests_without_transcripts_have_no_vocabulary(tmp_path: Path, manifests: Path) -> None:
    from hubert_lightning.asr.lexicon import vocabulary
    from hubert_lightning.data.manifest import read_manifest, write_manifest

    write_manifest(read_manifest(manifests / "dev.jsonl.gz").drop_supervisions(), tmp_path / "dev.jsonl.gz")
    with pytest.raises(ValueError, match=r"dev\.jsonl\.gz: no transcripts; prepare them"):
        vocabulary([tmp_path / "dev.jsonl.gz"], tmp_path / "v.json")


def test_words_in_another_case_than_the_vocabulary_s_make_no_lexicon(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("one two\n")
    assert Vocabulary().case == "upper"
    with pytest.raises(ValueError, match=r"words\.txt: no words in the letters of the vocabulary; give the voc"):
        lexicon(tmp_path / "words.txt", tmp_path / "a.lexicon")


def test_phonemes_have_no_delimiter_between_them(tmp_path: Path) -> None:
    phonemes = Vocabulary(("<pad>", "|", "tʃ", "a", "ʃ", "t", "aɪ"), "as_written", spaced=True)
    phonemes.write(tmp_path / "vocabulary.json")
    (tmp_path / "text.txt").write_text("tʃ a t\nʃ aɪ t a\ntʃ aɪ a tʃ\n")
    ngram(tmp_path / "text.txt", tmp_path / "a.arpa", order=2, vocabulary=tmp_path / "vocabulary.json")
    ngram(tmp_path / "text.txt", tmp_path / "b.arpa", 2, tmp_path / "vocabulary.json", letters=True)
    assert words_of(tmp_path / "a.lexicon") == {name: [name] for name in ("a", "aɪ", "t", "tʃ", "ʃ")}
    path = [0, 2, 0, 1, 0, 6, 0, 3, 0, 1, 2, 0]  # the model says | between words
    log_probs = one_hot(torch.tensor(path), 7).float().log().clamp(min=-20)
    for files in ({"lm": "a.arpa", "lexicon": "a.lexicon"}, {"lexicon": "a.lexicon"}, {"lm": "b.arpa"}):
        named = {name: str(tmp_path / file) for name, file in files.items()}
        search = BeamSearch(DecoderSettings(**named, beam_size=20, num_workers=0), phonemes)
        assert words_in(log_probs, phonemes, search)[0] == "tʃ aɪ a tʃ"


def test_words_in_phonemes_keep_the_delimiter_of_their_lexicon(tmp_path: Path) -> None:
    phonemes = Vocabulary(("<pad>", "|", "tʃ", "a", "t"), "as_written", spaced=True)
    (tmp_path / "a.lexicon").write_text("chat\ttʃ a t |\nat\ta t |\n")
    log_probs = one_hot(torch.tensor([0, 2, 0, 3, 4, 0, 1, 0, 3, 4, 4, 0]), 5).float().log().clamp(min=-20)
    search = BeamSearch(DecoderSettings(lexicon=str(tmp_path / "a.lexicon"), num_workers=0), phonemes)
    text, words = words_in(log_probs, phonemes, search)
    assert text == " ".join(word.text for word in words) == "chat at"
