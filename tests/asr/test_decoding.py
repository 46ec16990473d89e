"""Decoding gives the texts of other systems for the same log-probabilities, and refuses unusable files."""

import json
import shutil
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DIGITS, write_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import Wav2Vec2CTCTokenizer

from hubert_lightning.asr.causal_lm import CausalLM
from hubert_lightning.asr.decoder_settings import DecoderSettings, read_settings
from hubert_lightning.asr.decoding import BeamSearch, greedy, search_with
from hubert_lightning.asr.flashlight import Hypothesis
from hubert_lightning.asr.ngram import ngram
from hubert_lightning.asr.recognition import words_in
from hubert_lightning.vocabulary import BLANK, LETTERS, Vocabulary

NO_FLASHLIGHT = "flashlight-text has no wheel for this version of Python"

letters = Vocabulary()
normalise = letters.normalise
paths = st.lists(st.integers(0, len(LETTERS) - 1), min_size=1, max_size=40)


def certain_log_probs(path: list[int]) -> torch.Tensor:
    return one_hot(torch.tensor(path, dtype=torch.int64), len(LETTERS)).float().log()[None]


def collapsed_text(path: list[int]) -> str:
    """Collapse a CTC path, step by step."""
    kept = [token for token, _ in groupby(path) if token != BLANK]
    return normalise(letters.decode(kept))


@given(st.text("ABEL' ", max_size=30), st.integers(1, 3))
def test_text_with_blanks_between_its_letters_decodes_to_itself(text, repeats):
    text = normalise(text)
    path = [BLANK]
    for token in letters.encode(text):
        path += [token] * repeats + [BLANK]
    assert greedy(certain_log_probs(path), torch.tensor([len(path)]), letters) == [text]


@given(paths)
def test_repeats_collapse_before_blanks_are_dropped(path):
    assert greedy(certain_log_probs(path), torch.tensor([len(path)]), letters) == [collapsed_text(path)]


def test_any_path_decodes_as_in_transformers(tmp_path):
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps({token: place for place, token in enumerate(LETTERS)}))
    tokenizer = Wav2Vec2CTCTokenizer(vocabulary, pad_token="-", word_delimiter_token="|", unk_token="-", bos_token=None)
    logits = torch.randn(20, 60, len(LETTERS), generator=torch.Generator().manual_seed(0))
    logits[..., :2] += 2  # blanks and word boundaries, more often than by chance
    ours = greedy(logits, torch.full((20,), 60), letters)
    theirs = [tokenizer.decode(path) for path in logits.argmax(dim=-1)]
    assert ours == [normalise(text) for text in theirs]
    assert any(" " in text for text in ours)


@given(st.lists(paths, min_size=2, max_size=4))
def test_padding_changes_no_text(batch):
    longest = max(map(len, batch))
    padded = torch.cat([certain_log_probs(path + [5] * (longest - len(path))) for path in batch])
    assert greedy(padded, torch.tensor([len(path) for path in batch]), letters) == [
        collapsed_text(path) for path in batch
    ]


def test_blanks_alone_are_no_words():
    assert greedy(certain_log_probs([BLANK, BLANK]), torch.tensor([2]), letters) == [""]
    assert greedy(certain_log_probs([2]), torch.tensor([0]), letters) == [""]


def random_log_probs(utterances: int = 4, frames: int = 80, seed: int = 0) -> list[Tensor]:
    """Random log-probabilities in which blanks and boundaries are frequent."""
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(utterances, frames, len(LETTERS), generator=rng)
    logits[..., :2] += 2
    return list(logits.log_softmax(dim=-1))


def settings_of(digit_models: Path, **other: Any) -> DecoderSettings:
    return DecoderSettings(
        **{"lm": str(digit_models / "digits.arpa"), "lexicon": str(digit_models / "digits.lexicon"), **other}
    )


def flashlights_own(
    digit_models: Path, log_probs: Tensor, nbest: int, **weights: float
) -> list[tuple[list[str], float]]:
    """Search with flashlight's classes alone."""
    fl = pytest.importorskip("flashlight.lib.text.decoder", reason=NO_FLASHLIGHT)
    fl_dictionary = pytest.importorskip("flashlight.lib.text.dictionary", reason=NO_FLASHLIGHT)
    kenlm = pytest.importorskip("flashlight.lib.text.decoder.kenlm", reason=NO_FLASHLIGHT)
    spellings = fl_dictionary.load_words(str(digit_models / "digits.lexicon"))
    words, tokens = fl_dictionary.create_word_dict(spellings), fl_dictionary.Dictionary(list(LETTERS))
    lm = kenlm.KenLM(str(digit_models / "digits.arpa"), words)
    trie, start = fl.Trie(len(LETTERS), tokens.get_index("|")), lm.start(False)
    for word, ways in spellings.items():
        for letters_of_word in ways:
            index = words.get_index(word)
            spelled = [tokens.get_index(letter) for letter in letters_of_word]
            trie.insert(spelled, index, lm.score(start, index)[1])
    trie.smear(fl.SmearingMode.MAX)
    options = fl.LexiconDecoderOptions(
        beam_size=20,
        beam_size_token=len(LETTERS),
        beam_threshold=50.0,
        unk_score=-float("inf"),
        log_add=False,
        criterion_type=fl.CriterionType.CTC,
        **weights,
    )
    decoder = fl.LexiconDecoder(options, trie, lm, tokens.get_index("|"), 0, words.get_index("<unk>"), [], False)
    results = decoder.decode(log_probs.data_ptr(), *log_probs.shape)[:nbest]
    return [([words.get_entry(word) for word in result.words if word >= 0], result.score) for result in results]


@pytest.mark.parametrize("weights", [(2.0, -1.0, 0.0), (0.7, 1.5, -0.4)])
def test_the_search_equals_one_of_flashlights_classes(digit_models: Path, weights: tuple[float, float, float]) -> None:
    lm, word, silence = weights
    settings = settings_of(
        digit_models, lm_weight=lm, word_score=word, silence_score=silence, beam_size=20, beam_threshold=50.0, nbest=5
    )
    search = BeamSearch(settings, letters)
    for log_probs, hypotheses in zip(random_log_probs(), search.nbest(random_log_probs()), strict=True):
        # One more frame ends the last word, at no cost, where it has not ended yet
        end = torch.full((1, len(LETTERS)), -torch.inf)
        end[:, BLANK], end[:, letters.boundary] = 0.0, -silence
        ended = torch.cat([log_probs, end])
        own = flashlights_own(digit_models, ended, 5, lm_weight=lm, word_score=word, sil_score=silence)
        assert [best.text.split() for best in hypotheses] == [words for words, _ in own]
        assert [best.score for best in hypotheses] == [score for _, score in own]
        assert len(hypotheses) > 1


@given(paths)
@settings(max_examples=25)
def test_a_search_without_files_finds_the_certain_path(path: list[int]) -> None:
    search = BeamSearch(DecoderSettings(beam_size=5, num_workers=0), letters)
    log_probs = certain_log_probs(path).clamp(min=-30)
    assert search(log_probs, torch.tensor([len(path)])) == [collapsed_text(path)]


def test_hypotheses_contain_words_of_the_lexicon_alone(digit_models: Path) -> None:
    hypotheses = BeamSearch(settings_of(digit_models, lm=None), letters).nbest(random_log_probs(8))
    assert {word for [best] in hypotheses for word in best.text.split()} <= set(DIGITS)
    assert any(best.text for [best] in hypotheses)


def test_a_language_model_of_letters_needs_no_lexicon(digit_models: Path) -> None:
    lm = str(digit_models / "letters.arpa")
    plain, weighed = (
        BeamSearch(DecoderSettings(lm=lm, lm_weight=weight, beam_size=50, num_workers=0), letters).nbest(
            random_log_probs(8)
        )
        for weight in (0.0, 3.0)
    )
    pairs = {a + b for word in DIGITS for a, b in pairwise(f" {word} ")}

    def share(hypotheses: list[list[Hypothesis]]) -> float:
        pairs_in_texts = [a + b for [best] in hypotheses for a, b in pairwise(best.text)]
        return sum(pair in pairs for pair in pairs_in_texts) / len(pairs_in_texts)

    assert share(weighed) > share(plain) + 0.3


def test_several_processes_find_what_one_finds(digit_models: Path) -> None:
    alone, together = (BeamSearch(settings_of(digit_models, nbest=3, num_workers=n), letters) for n in (0, 3))
    assert together.nbest(random_log_probs(7)) == alone.nbest(random_log_probs(7))
    together.close()


def test_other_settings_give_the_results_of_a_new_search(digit_models: Path) -> None:
    weights = {"lm_weight": 0.3, "word_score": 2.0, "silence_score": -1.0, "num_workers": 0}
    anew = BeamSearch(settings_of(digit_models, **weights), letters).nbest(random_log_probs())
    assert BeamSearch(settings_of(digit_models), letters).with_settings(**weights).nbest(random_log_probs()) == anew


def test_padding_changes_no_hypothesis(digit_models: Path) -> None:
    search = BeamSearch(settings_of(digit_models, num_workers=0), letters)
    batch, length = torch.stack(random_log_probs()), torch.tensor([80, 33, 0, 61])
    texts = search(batch, length)
    single_texts = [best.text for [best] in search.nbest([row[:n] for row, n in zip(batch, length, strict=True)])]
    assert texts == single_texts
    assert texts[2] == ""


def test_a_neural_model_scores_texts_as_transformers_does(causal_lm: Path) -> None:
    model, texts = CausalLM(causal_lm, batch_size=2), ["one two", "", "nine nine nine eight zero"]
    for text, score in zip(texts, model(texts), strict=True):
        tokens = torch.tensor([[0, *model.tokenizer(text)["input_ids"], 0]])
        loss = model.model(input_ids=tokens, labels=tokens).loss.item()  # the mean over all but the first
        assert score == pytest.approx(-loss * (tokens.shape[1] - 1), rel=1e-5)


def test_rescoring_adds_the_neural_model_s_score_to_that_of_the_search(digit_models: Path, causal_lm: Path) -> None:
    plain = BeamSearch(settings_of(digit_models, nbest=10), letters).nbest(random_log_probs())
    settings = settings_of(digit_models, nbest=10, rescorer=str(causal_lm), rescorer_weight=1.5)
    rescored = BeamSearch(settings, letters).nbest(random_log_probs())
    model = CausalLM(causal_lm)
    for before, after in zip(plain, rescored, strict=True):
        scores = model([best.text.lower() for best in before])
        expected = {best.text: best.score + 1.5 * score for best, score in zip(before, scores, strict=True)}
        assert {best.text: best.score for best in after} == pytest.approx(expected)
        assert [best.score for best in after] == sorted((best.score for best in after), reverse=True)
    assert [few[0].text for few in plain] != [few[0].text for few in rescored]


def test_settings_move_with_the_folder_that_holds_their_files(digit_models: Path, tmp_path: Path) -> None:
    shutil.copytree(digit_models, tmp_path / "a")
    settings = settings_of(tmp_path / "a", lm_weight=1.25, rescorer="elsewhere")
    write_settings(settings, tmp_path / "a" / "decoder.json")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = read_settings(tmp_path / "b" / "decoder.json")
    assert Path(moved.lm or "") == tmp_path / "b" / "digits.arpa"
    assert moved.lm_weight == 1.25
    assert moved.rescorer == str(Path("elsewhere").resolve())
    assert search_with(replace(moved, rescorer=None), letters).settings.lm == moved.lm


def with_file(name: str, content: str | None, **other: str) -> Any:
    def make(digit_models: Path, folder: Path) -> DecoderSettings:
        if content is not None:
            (folder / name).write_text(content)
        return settings_of(digit_models, **({"lm" if name.endswith("arpa") else "lexicon": str(folder / name)} | other))

    return make


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (with_file("absent.arpa", None), "absent.arpa: no such file"),
        (with_file("absent.lexicon", None), "absent.lexicon: no such file"),
        (with_file("text.arpa", "ONE TWO THREE\n"), r"text.arpa: no n-gram language model that KenLM reads \(.*data"),
        (with_file("cut.arpa", "\\data\\\nngram 1=5\n"), "cut.arpa: no n-gram language model that KenLM reads"),
        (with_file("a.lexicon", "ONE\tO N E |\nÜBEL\tÜ B E L |\n"), r"a.lexicon, line 2: 'ÜBEL' .* \['Ü'\]"),
        (with_file("a.lexicon", "ONE\tO N E |\nTWO\n"), "a.lexicon, line 2: 'TWO' has no spelling"),
        (with_file("a.lexicon", "\n"), "a.lexicon: an empty lexicon"),
        (
            with_file("a.lexicon", "RED\tR E D |\nBLUE\tB L U E |\nRUST\tR U S T |\n"),
            "knows 0 of 3 words of .*in the same case",
        ),
        (
            lambda digit_models, folder: settings_of(digit_models, lexicon=None),
            "knows words such as 'EIGHT', not letters; give the",
        ),
        (
            lambda digit_models, folder: settings_of(digit_models, rescorer=str(folder / "no")),
            "rescorer .*no: no such directory",
        ),
        (
            lambda digit_models, folder: settings_of(digit_models, rescorer=str(folder)),
            "rescorer .*: no causal language model",
        ),
    ],
)
def test_a_file_that_a_search_cannot_use_is_refused_by_name(
    digit_models: Path, tmp_path: Path, make: Any, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        BeamSearch(make(digit_models, tmp_path), letters)


def test_a_binary_lexicon_is_refused(digit_models: Path, tmp_path: Path) -> None:
    (tmp_path / "a.lexicon").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.lexicon: is not UTF-8"):
        BeamSearch(settings_of(digit_models, lexicon=str(tmp_path / "a.lexicon")), letters)


@pytest.mark.parametrize("content", [None, "[1]", "{", '{"lm_wait": 1}'])
def test_a_file_without_settings_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "decoder.json").write_text(content)
    with pytest.raises(ValueError, match=r"no(t a| such) decoder settings file.*make it with `hubert tune-decoder`"):
        read_settings(tmp_path / "decoder.json")


def test_a_beam_of_size_0_is_refused() -> None:
    with pytest.raises(ValueError, match="beam_size 0, nbest 1"):
        DecoderSettings(beam_size=0)


def test_a_word_and_a_letter_can_be_the_same(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A CAT AND I SAT\nI SAW A DOG AND A CAT\n")
    ngram(tmp_path / "text.txt", tmp_path / "words.arpa", order=2)
    ngram(tmp_path / "text.txt", tmp_path / "letters.arpa", order=3, letters=True)
    with pytest.raises(ValueError, match="knows words such as 'AND', not letters"):
        BeamSearch(DecoderSettings(lm=str(tmp_path / "words.arpa")), letters)
    BeamSearch(DecoderSettings(lm=str(tmp_path / "letters.arpa")), letters)
    (tmp_path / "long.lexicon").write_text("".join(f"{word}\t{' '.join(word)} |\n" for word in DIGITS))
    mixed = DecoderSettings(lm=str(tmp_path / "letters.arpa"), lexicon=str(tmp_path / "long.lexicon"))
    with pytest.raises(ValueError, match="knows 0 of 8 words"):
        BeamSearch(mixed, letters)


def test_a_narrow_beam_gives_no_half_words(digit_models: Path) -> None:
    search = BeamSearch(settings_of(digit_models, lm=None, beam_size=1, num_workers=0), letters)
    assert {word for [best] in search.nbest(random_log_probs(8)) for word in best.text.split()} <= set(DIGITS)


@pytest.mark.parametrize(
    "wrong", [{"lm_weight": "x"}, {"nbest": 1.5}, {"num_workers": "a"}, {"rescorer_case": "title"}]
)
def test_settings_of_other_types_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (tmp_path / "decoder.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=r"decoder\.json: not a decoder settings file \(.*; (it is a num|choose low)"):
        read_settings(tmp_path / "decoder.json")


def log_probs_of(
    words: str, vocabulary: Vocabulary, pause: int = 1, boundaries: bool = True, silent: int = 30
) -> Tensor:
    """Log-probabilities of .9 for the letters of a text, and of 1e-7 for all other tokens in silence.

    Args:
        words: Text; a blank follows every letter.
        vocabulary: Vocabulary of the tokens.
        pause: Blanks between words.
        boundaries: Whether the delimiter is between words.
        silent: Blanks after the last word.
    """
    frames = []
    for number, word in enumerate(words.split()):
        if number:
            frames += (["|"] if boundaries else []) + [None] * pause
        for letter in word:
            frames += [letter, None]
    rows = torch.full((len(frames) + silent, len(vocabulary)), 1e-7)
    rows[:, BLANK] = 1
    for row, letter in zip(rows, frames, strict=False):
        if letter is not None:
            row[BLANK], row[vocabulary.tokens.index(letter)] = 0.1, 0.9
    return (rows / rows.sum(dim=1, keepdim=True)).log()


@pytest.mark.parametrize("lexicon", ["digits.lexicon", "bare.lexicon"])  # with the delimiter after each word, or not
@pytest.mark.parametrize("silent", [0, 30])
@pytest.mark.parametrize("text", ["ONE", "TWO THREE", "NINE EIGHT ONE ZERO"])
def test_a_last_word_without_delimiter_is_decoded(digit_models: Path, lexicon: str, silent: int, text: str) -> None:
    (digit_models / "bare.lexicon").write_text((digit_models / "digits.lexicon").read_text().replace(" |", ""))
    search = BeamSearch(settings_of(digit_models, lexicon=str(digit_models / lexicon), num_workers=0), letters)
    [[best]] = search.nbest([log_probs_of(text, letters, silent=silent)])
    assert best.text == text
    assert [word for word, _ in search.word_tokens(best)] == text.split()


def test_words_before_a_pause_without_delimiter_are_decoded(digit_models: Path) -> None:
    search = BeamSearch(settings_of(digit_models, num_workers=0), letters)
    for text in ("ONE TWO", "NINE EIGHT ZERO"):
        [[best]] = search.nbest([log_probs_of(text, letters, pause=40, boundaries=False)])
        assert best.text == text


@pytest.mark.parametrize("silence", [-0.7, 0.0, 0.7])
def test_the_end_costs_nothing_where_the_model_predicts_the_delimiter(digit_models: Path, silence: float) -> None:
    weights = {"lm_weight": 1.0, "word_score": 0.5}
    search = BeamSearch(
        settings_of(digit_models, silence_score=silence, beam_size=20, num_workers=0, **weights), letters
    )
    path = [BLANK, *(token for letter in letters.targets("ONE NINE") for token in (letter, BLANK))]
    log_probs = certain_log_probs(path)[0].clamp(min=-30)
    [(words, score)] = flashlights_own(digit_models, log_probs, 1, sil_score=silence, **weights)
    [[best]] = search.nbest([log_probs])
    assert best.text.split() == words == ["ONE", "NINE"]
    assert best.score == pytest.approx(score, rel=1e-6)  # the scores of silence cancel out in float32


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("lm", [None, "letters.arpa"])
def test_a_search_without_lexicon_splits_words_in_pauses_as_greedy_decoding_does(
    digit_models: Path, lm: str | None, timed: bool
) -> None:
    model = lm and str(digit_models / lm)
    search = BeamSearch(DecoderSettings(lm=model, lm_weight=0.5, beam_size=20, num_workers=0), letters)
    log_probs = log_probs_of("ONE TWO FIVE", letters, pause=40, boundaries=False)
    text, words = words_in(log_probs, letters, search, timed)
    assert text == "ONE TWO FIVE" == words_in(log_probs, letters)[0]
    assert [(word.text, word.start) for word in words] == [
        (word.text, word.start) for word in (words_in(log_probs, letters)[1] if timed else ())
    ]
