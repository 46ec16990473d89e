"""Words have the times of the most likely path, and no frame is lost or doubled where recordings are split."""

from collections.abc import Sequence
from itertools import groupby, pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from hubert_lightning.asr.decoding import greedy
from hubert_lightning.asr.pauses import PAUSE_FRAMES, insert_pause_boundaries, split_in_pauses
from hubert_lightning.asr.word_times import MAX_ALIGNMENT_SIZE, align_tokens, best_tokens, word_times, words_of
from hubert_lightning.vocabulary import BLANK, Vocabulary

letters = Vocabulary()
small = Vocabulary(("-", "|", "A", "B"))


def log_probs_on(path: str, vocabulary: Vocabulary = letters) -> Tensor:
    """Log-probabilities of a path with one character per frame: "-" for the blank, "|" between words."""
    tokens = torch.tensor([vocabulary.tokens.index(character) for character in path])
    return torch.full((len(path), len(vocabulary)), -8.0).scatter(1, tokens[:, None], 0.0).log_softmax(dim=-1)


def test_a_word_lasts_from_its_first_letter_to_its_last() -> None:
    #                    0.02 s a frame
    words = word_times(log_probs_on("---HHE-Y--||--Y-OU--"), "HEY YOU", letters)
    assert [word.text for word in words] == ["HEY", "YOU"]
    assert [(word.start, word.end) for word in words] == [(0.06, 0.16), (0.28, pytest.approx(0.36))]
    assert all(word.confidence == pytest.approx(torch.exp(log_probs_on("H")[0].max()).item()) for word in words)
    later = word_times(log_probs_on("---HHE-Y--||--Y-OU--"), "HEY YOU", letters, first_frame=100)
    assert [word.start for word in later] == [pytest.approx(2.06), pytest.approx(2.28)]


@pytest.mark.parametrize("text", ["A", "AB", "A B", "AA", "BA A"])
def test_the_path_is_the_most_likely_of_all_with_the_text(text: str) -> None:
    log_probs = torch.randn(7, 4, generator=torch.Generator().manual_seed(3)).log_softmax(dim=-1)
    tokens = small.encode(text)
    best = max(
        (path for path in product(range(4), repeat=7) if [t for t, _ in groupby(path) if t != BLANK] == tokens),
        key=lambda path: sum(log_probs[frame, token].item() for frame, token in enumerate(path)),
    )
    written = [small.tokens[token] for token in best]
    expected, word_frames = [], []
    for frame, character in enumerate(written):
        if character == "|":
            expected += [word_frames] if word_frames else []
            word_frames = []
        elif character != "-":
            word_frames.append(frame)
    spans = [(frames[0] * 0.02, (frames[-1] + 1) * 0.02) for frames in [*expected, word_frames]]
    words = word_times(log_probs, text, small)
    assert [(word.start, word.end) for word in words] == [(pytest.approx(a), pytest.approx(b)) for a, b in spans]


@pytest.mark.parametrize(
    ("tokens", "text", "other"),
    [
        (("-", "|", "a", "b", "ab"), "ab", {}),
        (("-", "|", "a", "b", "ab"), "ab ba", {}),
        (("-", "|", "a", "aa"), "aaa", {}),
        (("-", "e", "\u0301", "é"), "éé", {"delimiter": None}),
        (("-", "|", "A", "a"), "a aa", {"lower_case": True}),  # two tokens that print the same
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_word_is_aligned_in_the_tokens_that_the_model_predicts(
    tokens: tuple[str, ...], text: str, other: dict[str, Any], seed: int
) -> None:
    vocabulary = Vocabulary(tokens, "lower", **other)
    logits = 3 * torch.randn(6, len(tokens), generator=torch.Generator().manual_seed(seed))
    log_probs = logits.log_softmax(dim=-1)

    def collapsed(path: Sequence[int]) -> list[int]:
        return [token for token, _ in groupby(path) if token != BLANK]

    best = max(
        (path for path in product(range(len(tokens)), repeat=6) if vocabulary.decode(collapsed(path)) == text),
        key=lambda path: sum(log_probs[frame, token].item() for frame, token in enumerate(path)),
    )
    best_alone = torch.full_like(log_probs, -9.0)
    best_alone[range(6), list(best)] = log_probs[range(6), list(best)]
    [greedy_text] = greedy(best_alone[None], torch.tensor([6]), vocabulary)
    assert greedy_text == text
    expected, words = words_of(best_tokens(best_alone), vocabulary), word_times(log_probs, text, vocabulary)
    assert [(word.text, word.start, word.end) for word in words] == [
        (word.text, word.start, word.end) for word in expected
    ]
    assert [word.confidence for word in words] == pytest.approx([word.confidence for word in expected])


def test_a_long_text_in_ambiguous_tokens_is_aligned() -> None:
    vocabulary = Vocabulary(("-", "|", "a", "b", "ab", "ba"), "lower")
    path = "aa-b-|-ba-|-" * 400
    words = word_times(log_probs_on(path, vocabulary), "ab ba " * 400, vocabulary)
    assert [word.confidence for word in words] == pytest.approx([1.0] * 800, abs=0.01)


def test_no_words_have_no_times() -> None:
    assert word_times(log_probs_on("----"), "", letters) == []


@pytest.mark.parametrize(
    ("log_probs", "text", "sentence"),
    [
        (log_probs_on("AB"), "ABC", "'ABC' has 3 letters, and the audio 2 frames"),
        (
            log_probs_on("AAA"),
            "AAB",
            "has 3 letters, and the audio 3 frames",
        ),  # and a blank between the equal ones
        (log_probs_on("ABC"), "AÉ", r"has \['É'\], which are not among"),
        (torch.zeros(1, 29).expand(60_000, 29), "A " * 10_000, "too much to be aligned at once"),
    ],
)
def test_a_text_that_the_audio_cannot_hold_is_refused(log_probs: Tensor, text: str, sentence: str) -> None:
    assert MAX_ALIGNMENT_SIZE < 60_000 * 20_000
    with pytest.raises(ValueError, match=sentence):
        word_times(log_probs, text, letters)


@given(st.lists(st.tuples(st.sampled_from("--||AB"), st.integers(1, 24)), max_size=30), st.integers(4, 40))
def test_segments_follow_one_another_and_decode_to_the_text_of_the_whole(
    runs: list[tuple[str, int]], longest: int
) -> None:
    path = "".join(character * frames for character, frames in runs)
    assume("-" * PAUSE_FRAMES not in path)  # which parts words, and which greedy decoding does not
    log_probs = log_probs_on(path, small) if path else torch.zeros(0, 4)
    segments = split_in_pauses(log_probs, small, longest)
    assert segments[0].start == 0
    assert segments[-1].end == len(path)
    assert all(before.end == after.start < after.end for before, after in pairwise(segments))
    assert all(segment.end - segment.start <= longest for segment in segments)
    if any(len(list(run)) >= longest for quiet, run in groupby(path, key=lambda c: c in "-|") if not quiet):
        return  # letters in every frame of a segment: it has to be cut somewhere
    text = ""
    for segment in segments:
        rows = log_probs[segment.start : segment.end]
        [segment_text] = greedy(rows[None], torch.tensor([len(rows)]), small) if len(rows) else [""]
        text = " ".join(filter(None, [text, segment_text])) if segment.new_word else text + segment_text
    assert [text] == (greedy(log_probs[None], torch.tensor([len(path)]), small) if path else [""])


def test_a_recording_is_split_in_the_longest_pause_between_words() -> None:
    path = "AAAA|AAAA" + "A-----B" + "AB" + "----|----" + "AB|AB|ABAB"
    [first, *_] = split_in_pauses(log_probs_on(path, small), small, longest=34)
    assert path[: first.end] == "AAAA|AAAAA-----BAB----"
    assert first.new_word


def test_a_word_begins_after_half_a_second_without_a_letter() -> None:
    path = "A" + "-" * (PAUSE_FRAMES - 1) + "B" + "-" * PAUSE_FRAMES + "AB"
    assert [part.end for part in split_in_pauses(log_probs_on(path, small), small)] == [len(path)]
    words = words_of(insert_pause_boundaries(best_tokens(log_probs_on(path, small)), small), small)
    assert [word.text for word in words] == ["AB", "AB"]
    assert [(word.start, word.end) for word in words] == [
        (0, pytest.approx(0.02 * (PAUSE_FRAMES + 1))),
        (pytest.approx(0.02 * (2 * PAUSE_FRAMES + 1)), pytest.approx(0.02 * len(path))),
    ]


def test_letters_without_a_delimiter_make_one_word_whatever_the_pauses() -> None:
    chinese = Vocabulary(("-", "你", "好"), delimiter=None)
    letters = insert_pause_boundaries(best_tokens(log_probs_on("你" + "-" * 2 * PAUSE_FRAMES + "好", chinese)), chinese)
    assert [word.text for word in words_of(letters, chinese)] == ["你好"]


@given(st.lists(st.sampled_from(range(4)), min_size=1, max_size=40))
def test_the_letters_of_the_best_path_are_those_of_an_alignment_of_its_tokens(path: list[int]) -> None:
    log_probs = log_probs_on("".join(small.tokens[token] for token in path), small)
    letters = best_tokens(log_probs)
    assert align_tokens(log_probs, [letter.token for letter in letters], small) == [
        letter._replace(confidence=pytest.approx(letter.confidence)) for letter in letters
    ]
