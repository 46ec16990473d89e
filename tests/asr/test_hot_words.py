"""Hot words win where the audio allows them, in searches with and without a lexicon, and change nothing elsewhere."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import run_verb, save_ctc, write_settings
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hubert_lightning import Transcriber
from hubert_lightning.asr.decoder_settings import DecoderSettings
from hubert_lightning.asr.decoding import BeamSearch
from hubert_lightning.asr.hot_words import PhraseMatcher, read_hot_words
from hubert_lightning.asr.lexicon import lexicon_of
from hubert_lightning.asr.ngram import ngram
from hubert_lightning.errors import UserError
from hubert_lightning.vocabulary import LETTERS, Vocabulary

VOCABULARY = Vocabulary()


def frames_of(text: str, also: str, share: float = 0.2) -> Tensor:
    """Log-probabilities in which each letter of a text is likely, and the letter of another text less so."""
    probabilities = torch.full((4 * len(text), len(LETTERS)), 1e-4)
    for place, (letter, other) in enumerate(zip(text.replace(" ", "|"), also.replace(" ", "|"), strict=True)):
        probabilities[4 * place : 4 * place + 2, LETTERS.index(letter)] = 1 - share
        probabilities[4 * place : 4 * place + 2, LETTERS.index(other)] += share
        probabilities[4 * place + 2 : 4 * place + 4, 0] = 1.0
    return (probabilities / probabilities.sum(dim=1, keepdim=True)).log()


def best_text(log_probs: Tensor, hot_words: str | None = None, weight: float = 6.0, **settings: str) -> str:
    words = read_hot_words(hot_words, VOCABULARY, weight)[0] if hot_words else []
    search = BeamSearch(DecoderSettings(beam_size=30, num_workers=0, **settings), VOCABULARY, hot_words=words)
    return search.nbest([log_probs])[0][0].text


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of words, its lexicon, and a language model of letters."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text("CALL KATE NOW\nTELL KATE\nCALL ME ANY DAY NOW\nNEW CARS OR FORK\n" * 5)
    ngram(folder / "text.txt", folder / "words.arpa", order=2)
    ngram(folder / "text.txt", folder / "letters.arpa", order=3, letters=True)
    return folder


@pytest.mark.parametrize("search", ["plain", "letters", "lexicon", "words"])
@pytest.mark.parametrize(
    ("said", "also", "hot", "expected"),
    [
        ("CALL KATE NOW", "CALL KATY NOW", "katy", "CALL KATY NOW"),
        ("CALL KATE", "CALL KATY", "katy,tell", "CALL KATY"),  # at the end
        ("NEW CARS", "NEW YORK", "new york", "NEW YORK"),
    ],
)
def test_a_hot_word_wins_over_a_likelier_word(
    files: Path, search: str, said: str, also: str, hot: str, expected: str
) -> None:
    settings = {
        "plain": {},
        "letters": {"lm": str(files / "letters.arpa")},
        "lexicon": {"lexicon": str(files / "words.lexicon")},
        "words": {"lm": str(files / "words.arpa"), "lexicon": str(files / "words.lexicon")},
    }[search]
    log_probs = frames_of(said, also)
    assert best_text(log_probs, **settings) == said
    assert best_text(log_probs, hot, weight=30.0, **settings) == expected
    assert best_text(log_probs, hot, weight=0.0, **settings) == said


def test_a_hypothesis_without_hot_words_has_the_score_of_a_search_without_them() -> None:
    log_probs = frames_of("CALL KATE NOW", "CALL KATY NOW")
    settings = DecoderSettings(beam_size=30, nbest=20, num_workers=0)
    plain = BeamSearch(settings, VOCABULARY)
    hot = BeamSearch(settings, VOCABULARY, hot_words=read_hot_words("katy, callow", VOCABULARY, 4.0)[0])
    scores: dict[str, float] = {}
    for best in plain.nbest([log_probs])[0]:  # best first
        scores.setdefault(best.text, best.score)
    compared: set[str] = set()
    for best in hot.nbest([log_probs])[0]:
        if best.text in scores and best.text not in compared:
            expected = scores[best.text] + 4.0 * best.text.split().count("KATY")
            assert best.score == pytest.approx(expected, abs=1e-3)
            compared.add(best.text)
    assert {"CALL KATE NOW", "CALL KATY NOW"} <= compared


words_of_units = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=3), min_size=1, max_size=4)


@given(st.lists(words_of_units, min_size=1, max_size=3), st.lists(st.integers(0, 2), max_size=30))
def test_phrases_add_their_weight_as_often_as_they_occur_between_delimiters(
    phrases: Sequence[Sequence[Sequence[int]]], units: Sequence[int]
) -> None:
    with_ends = [[unit for word in phrase for unit in [*word, 0]] for phrase in phrases]
    joined = {tuple(phrase[:-1]): 2.0 + place for place, phrase in enumerate(with_ends)}
    matcher = PhraseMatcher(list(joined.items()), delimiter=0)
    places, total = matcher.start, 0.0
    for unit in units:
        places, score = matcher.step(places, unit)
        total += score
    total += matcher.end(places)
    bounded = [0, *units, 0]
    expected = sum(
        weight
        for phrase, weight in joined.items()
        for first in range(len(bounded))
        if bounded[first : first + len(phrase) + 2] == [0, *phrase, 0]
    )
    assert total == pytest.approx(expected)


def test_a_file_has_weights_and_spellings(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("Katy\nNew York\t12.5\nqs\tQ U E S T\t-1\n\n")
    words, refused = read_hot_words(path, VOCABULARY, 5.0)
    assert [(word.text, word.weight, "".join(LETTERS[token] for token in word.tokens)) for word in words] == [
        ("KATY", 5.0, "KATY"),
        ("NEW YORK", 12.5, "NEW|YORK"),
        ("qs", -1.0, "QUEST"),
    ]
    assert not refused
    lexicon = tmp_path / "words.lexicon"
    lexicon.write_text(lexicon_of(["CALL"], lexicon, VOCABULARY, "words")[0])
    search = BeamSearch(DecoderSettings(lexicon=str(lexicon), beam_size=30, num_workers=0), VOCABULARY, hot_words=words)
    assert search.nbest([frames_of("CALL QUEST", "CALL QUEST")])[0][0].text == "CALL qs"


def test_words_with_other_characters_are_left_out_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("Žofia\nKaty\nqs\tQ1 S\n...\n")
    words, refused = read_hot_words(path, VOCABULARY)
    assert [word.text for word in words] == ["KATY"]
    assert refused[0].startswith(f"{path}, line 1: 'Žofia' has ['Ž'], which are not tokens of the model; left out")
    assert "line 3: 'qs' is spelled with ['Q1']" in refused[1]
    assert len(refused) == 3
    for source, sentence in (
        ("Ž", "has ['Ž']"),
        ([], "none are given"),
        ("names.txt", "no such file"),
        (tmp_path / "absent", "no such file"),
    ):
        with pytest.raises(UserError) as error:
            read_hot_words(source, VOCABULARY)
        assert sentence in str(error.value)
    path.write_text("Katy\tinf\n")
    with pytest.raises(UserError, match="the weight is inf"):
        read_hot_words(path, VOCABULARY)


def test_the_verb_goes_on_without_a_hot_word_that_it_cannot_use(
    speech: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, decoder = tmp_path / "best.ckpt", tmp_path / "decoder.json"
    save_ctc(model, spread=3.0)
    write_settings(DecoderSettings(beam_size=10, num_workers=0), decoder)
    assert run_verb("transcribe", model, speech[0], "--decoder", decoder, "--hot_words", "Žofia, Katy") == 0
    captured = capsys.readouterr()
    assert "hubert: hot words: 'Žofia' has ['Ž'], which are not tokens of the model; left out" in captured.err
    assert captured.out
    assert run_verb("transcribe", model, speech[0], "--hot_words", "Katy") == 2
    assert "hot words need a beam search: greedy decoding takes" in capsys.readouterr().err
    with pytest.raises(UserError, match="'Žofia' has"):
        Transcriber.from_pretrained(model, decoder, hot_words=["Žofia", "Katy"])
