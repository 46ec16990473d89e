from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.hubert.modeling_hubert import _compute_mask_indices

from hubert_lightning.training.masking import span_mask


def draw(num_frames, prob=0.8, length=10, seed=0, **options):
    return span_mask(num_frames, prob, length, torch.Generator().manual_seed(seed), **options)


def runs(row: torch.Tensor) -> list[int]:
    return [len(list(run)) for masked, run in groupby(row.tolist()) if masked]


batches = st.lists(st.integers(1, 120), min_size=1, max_size=12)
settings_of_spans = {"prob": st.floats(0.05, 1.0), "length": st.integers(1, 64), "seed": st.integers(0, 2**32)}


@given(frames=batches, **settings_of_spans)
def test_every_row_has_masked_frames_and_is_never_masked_whole_however_short(frames, prob, length, seed):
    for row, count in zip(draw(frames, prob, length, seed), frames, strict=True):
        assert 1 <= row.sum() <= max(count - 1, 1)
        assert not row[count:].any()


@given(frames=batches, **settings_of_spans)
def test_with_same_count_all_rows_have_the_masked_frames_of_the_row_with_the_fewest(frames, prob, length, seed):
    free, trimmed = draw(frames, prob, length, seed), draw(frames, prob, length, seed, same_count=True)
    assert trimmed.sum(dim=1).tolist() == [free.sum(dim=1).min()] * len(frames)
    assert not (trimmed & ~free).any()


@given(frames=st.lists(st.integers(20, 200), min_size=1, max_size=8), **settings_of_spans)
def test_masked_frames_come_in_whole_spans(frames, prob, length, seed):
    for row, count in zip(draw(frames, prob, length, seed), frames, strict=True):
        assert min(runs(row)) >= min(length, count // 2)


@given(seed=st.integers(0, 2**32))
def test_a_mask_is_a_function_of_its_seed(seed):
    assert torch.equal(draw([50, 80], seed=seed, same_count=True), draw([50, 80], seed=seed, same_count=True))


@pytest.mark.parametrize(("prob", "expected"), [(0.8, 0.53), (0.75, 0.51), (0.65, 0.46), (0.5, 0.37)])
def test_the_masked_share_of_equal_rows_is_that_of_fairseq(prob, expected):
    share = np.mean([draw([780] * 8, prob, seed=seed, same_count=True).float().mean() for seed in range(200)])
    assert share == pytest.approx(expected, abs=0.008)  # measured in whole percents


@pytest.mark.parametrize(
    ("prob", "length", "size"), [(0.8, 10, 780), (0.65, 10, 123), (0.5, 64, 768), (0.25, 64, 1024)]
)
def test_each_frame_is_masked_as_often_as_in_transformers(prob, length, size):
    np.random.seed(0)  # noqa: NPY002, the generator that transformers draws from
    reference = np.concatenate([_compute_mask_indices((200, size), prob, length, min_masks=1) for _ in range(10)])
    ours = torch.cat([draw([size] * 200, prob, length, seed=seed, min_spans=1) for seed in range(10)]).numpy()
    # 2000 rows: the difference at one frame has a standard deviation of at most 0.016
    assert np.abs(ours.mean(axis=0) - reference.mean(axis=0)).max() < 0.08
    assert ours.mean() == pytest.approx(reference.mean(), abs=0.006)
    assert ours.sum(axis=1).std() == pytest.approx(reference.sum(axis=1).std(), rel=0.15)


def test_long_rows_of_a_mixed_batch_keep_their_share():
    masks = torch.stack([draw([60, 780], seed=seed) for seed in range(200)]).float()
    short, long = masks[:, 0, :60].mean().item(), masks[:, 1].mean().item()
    # 62.4 of 771 starts are drawn, and a frame is spared by all ten that reach it
    assert long == pytest.approx(1 - (1 - 62.4 / 771) ** 10, abs=0.01)
    assert short == pytest.approx(long, abs=0.04)  # more of its frames lie near an end, where fewer starts reach


def test_the_number_of_spans_is_rounded_up_with_the_probability_of_its_fraction():
    # 64 of 100 channels at 0.2: 0.4 spans of 50 on average, and none where none are asked for
    masked = [bool(draw([100], 0.2, 64, seed=seed, min_spans=0).any()) for seed in range(1000)]
    assert np.mean(masked) == pytest.approx(0.4, abs=0.05)


def test_there_are_at_least_min_spans_and_no_two_start_together():
    counts = [int(draw([1000], 0.001, 10, seed=seed, min_spans=2).sum()) for seed in range(200)]
    assert min(counts) > 10
    assert max(counts) == 20


@given(size=st.integers(1, 40))
@settings(max_examples=40)
def test_any_frame_can_be_masked(size):
    masks = torch.cat([draw([size] * 40, seed=seed) for seed in range(10)])
    assert masks.any(dim=0).all()
