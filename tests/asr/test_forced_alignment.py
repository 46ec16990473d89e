"""Forced alignment is that of torchaudio, and the best of all paths."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchaudio.functional import forced_align, merge_tokens

from hubert_lightning.asr.forced_alignment import forced_path
from hubert_lightning.asr.word_times import align_tokens
from hubert_lightning.vocabulary import BLANK, Vocabulary

TOKENS = 6


def random_log_probs(frames: int, seed: int, peak: float = 2.0) -> Tensor:
    return (peak * torch.randn(frames, TOKENS, generator=torch.Generator().manual_seed(seed))).log_softmax(dim=-1)


def frames_needed(tokens: list[int]) -> int:
    return len(tokens) + sum(a == b for a, b in pairwise(tokens))


@given(
    tokens=st.lists(st.integers(1, TOKENS - 1), min_size=1, max_size=30),
    more=st.integers(0, 60),
    seed=st.integers(0, 2**31),
    peak=st.sampled_from([0.5, 2.0, 8.0]),
)
@settings(max_examples=100, deadline=None)
def test_a_path_is_that_of_torchaudio(tokens: list[int], more: int, seed: int, peak: float) -> None:
    log_probs = random_log_probs(frames_needed(tokens) + more, seed, peak)
    expected, _ = forced_align(log_probs[None], torch.tensor([tokens], dtype=torch.int32), blank=BLANK)
    assert forced_path(log_probs, tokens).tolist() == expected[0].tolist()


@pytest.mark.parametrize("tokens", [[1], [1, 1], [2, 1, 2], [3, 3, 3]])
@pytest.mark.parametrize("frames", [5, 6])
def test_no_other_path_through_the_tokens_is_more_likely(tokens: list[int], frames: int) -> None:
    log_probs = random_log_probs(frames, seed=frames)

    def probability(path: tuple[int, ...]) -> float:
        return float(sum(row[token] for row, token in zip(log_probs.double(), path, strict=True)))

    def collapsed(path: tuple[int, ...]) -> list[int]:
        return [token for before, token in pairwise((BLANK, *path)) if token not in (BLANK, before)]

    paths = [path for path in product(range(TOKENS), repeat=frames) if collapsed(path) == tokens]
    path = tuple(forced_path(log_probs, tokens).tolist())
    assert path == max(paths, key=probability)


def test_frames_where_a_token_is_impossible_are_left_to_others() -> None:
    log_probs = torch.full((4, TOKENS), -torch.inf)
    log_probs[[0, 1, 2, 3], [2, BLANK, 3, 3]] = 0.0
    assert forced_path(log_probs, [2, 3]).tolist() == [2, BLANK, 3, 3]


@given(tokens=st.lists(st.integers(1, 4), min_size=1, max_size=20), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_times_and_confidences_of_tokens_are_those_of_torchaudio(tokens: list[int], seed: int) -> None:
    log_probs = random_log_probs(frames_needed(tokens) + 20, seed)
    path, scores = forced_align(log_probs[None], torch.tensor([tokens], dtype=torch.int32), blank=BLANK)
    expected = merge_tokens(path[0], scores[0].exp(), blank=BLANK)
    path = align_tokens(log_probs, tokens, Vocabulary(tuple("-abcd|")), first_frame=7)
    assert [token[:3] for token in path] == [(span.token, 7 + span.start, 7 + span.end) for span in expected]
    assert [token.confidence for token in path] == pytest.approx([span.score for span in expected], rel=1e-5)
