import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.compliance import kaldi
from torchaudio.functional import compute_deltas

from hubert_lightning.features.mfcc import MFCC_PARTS, mfcc, spliced
from hubert_lightning.frames import HOP, SAMPLE_RATE, WINDOW, num_frames


def noise(length: int) -> torch.Tensor:
    return 0.1 * torch.randn(length, generator=torch.Generator().manual_seed(length))


@given(length=st.one_of(st.integers(WINDOW, 2 * SAMPLE_RATE), st.integers(WINDOW, 35 * SAMPLE_RATE)))
@settings(max_examples=40, deadline=None)
def test_every_other_mfcc_frame_has_a_hubert_frame(length):
    assert len(mfcc(noise(length))[::2]) == num_frames(length)


@contextmanager
def in_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("offset", [0.0, 0.4])
@given(length=st.one_of(st.integers(WINDOW, 3000), st.integers(WINDOW, 35 * SAMPLE_RATE)))
@settings(max_examples=30, deadline=None)
def test_every_bit_is_that_of_torchaudio(length, offset):
    waveform = noise(length) + offset
    waveform[: length // 3] = 0  # digital silence, whose logarithm is bounded
    with in_threads(1):
        cepstra = kaldi.mfcc(waveform[None], sample_frequency=SAMPLE_RATE, use_energy=False).T
        deltas = compute_deltas(cepstra)
        expected = torch.cat([cepstra, deltas, compute_deltas(deltas)]).T
    assert torch.equal(mfcc(waveform), expected)


@given(length=st.integers(WINDOW, 20 * SAMPLE_RATE))
@settings(max_examples=20, deadline=None)
def test_features_do_not_depend_on_the_number_of_threads(length):
    found = []
    for number in (1, 2, 7):
        with in_threads(number):
            found.append(mfcc(noise(length)))
            assert torch.get_num_threads() == number
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_there_are_39_finite_features_a_frame():
    features = mfcc(noise(SAMPLE_RATE))
    assert features.shape == (98, 39)
    assert features.isfinite().all()


def test_features_do_not_depend_on_chance():
    assert torch.equal(mfcc(noise(8000)), mfcc(noise(8000)))


def test_cepstra_of_a_crop_on_the_frame_grid_are_those_of_the_whole():
    whole, first = noise(SAMPLE_RATE), 7
    torch.testing.assert_close(mfcc(whole[first * HOP :])[:, :13], mfcc(whole)[2 * first :, :13])


@pytest.mark.parametrize("order", [1, 2])
def test_deltas_are_the_slope_of_a_line_fitted_to_five_frames(order):
    features = mfcc(noise(SAMPLE_RATE)).double()
    lower, delta = features[:, 13 * (order - 1) : 13 * order], features[:, 13 * order : 13 * (order + 1)]
    slope = sum(n * (lower[2 + n : len(lower) - 2 + n] - lower[2 - n : len(lower) - 2 - n]) for n in (1, 2)) / 10
    torch.testing.assert_close(delta[2:-2], slope, atol=1e-4, rtol=1e-4)  # computed in float32


def test_twice_the_amplitude_adds_log_4_in_each_of_23_mel_bands_to_the_first_cepstrum_alone():
    quiet, loud = mfcc(noise(SAMPLE_RATE)), mfcc(2 * noise(SAMPLE_RATE))
    louder = torch.zeros(39)
    louder[0] = math.sqrt(23) * math.log(4)  # the first basis vector of the DCT is 1 / √23; log energy would add log 4
    torch.testing.assert_close(loud - quiet, louder.expand_as(quiet), atol=1e-3, rtol=1e-3)  # log of float32 energies


@given(length=st.integers(WINDOW, 2 * SAMPLE_RATE))
@settings(max_examples=20, deadline=None)
def test_spliced_features_are_three_frames_cut_into_parts_of_39(length):
    features = mfcc(noise(length))
    rows = spliced(features)
    assert rows.shape == (len(features), 117)
    around = [features[[0, *range(len(features) - 1)]], features, features[[*range(1, len(features)), -1]]]
    for number, part in enumerate(("cepstra", "delta", "delta_delta")):
        found = rows[:, MFCC_PARTS[part]]
        assert found.shape[1] == 39
        expected = torch.cat([frames[:, 13 * number : 13 * (number + 1)] for frames in around], dim=1)
        # The order of columns inside of a part is of no account to K-means
        torch.testing.assert_close(found.sort(dim=1).values, expected.sort(dim=1).values, rtol=0, atol=0)


def test_the_three_frames_are_10_ms_apart_also_where_every_other_is_kept():
    features = mfcc(noise(SAMPLE_RATE))
    kept = spliced(features)[::2]
    torch.testing.assert_close(kept[5].view(39, 3).T, features[9:12], rtol=0, atol=0)


def test_the_outermost_frames_are_repeated_at_the_ends():
    features = mfcc(noise(SAMPLE_RATE))
    rows = spliced(features).unflatten(1, (39, 3))
    for number, frames in ((0, [0, 0, 1]), (-1, [-2, -1, -1])):
        torch.testing.assert_close(rows[number].T, features[frames], rtol=0, atol=0)
