import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv1d

from hubert_lightning.frames import (
    CLOCK,
    HOP,
    MFCC_CLOCK,
    SAMPLE_RATE,
    WINDOW,
    Clock,
    frame_centres,
    frames_inside,
    in_frames,
    num_frames,
    num_samples,
    padding_mask,
    seconds_to_samples,
)

CONVOLUTIONS = [(10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)]  # kernel, stride


@pytest.mark.slow
@given(length=st.integers(WINDOW, 10 * SAMPLE_RATE))
@settings(max_examples=50, deadline=None)
def test_the_convolutions_make_as_many_frames_as_the_clock_says(length):
    signal = torch.zeros(1, 1, length)
    for kernel, stride in CONVOLUTIONS:
        signal = conv1d(signal, torch.ones(1, 1, kernel), stride=stride)
    assert signal.shape[-1] == num_frames(length)


def test_a_frame_sees_its_window_and_nothing_else():
    length = num_samples(4)
    signal = torch.zeros(length, requires_grad=True)
    frames = signal[None, None]
    for kernel, stride in CONVOLUTIONS:
        frames = conv1d(frames, torch.ones(1, 1, kernel), stride=stride)
    frames[0, 0, 2].backward()
    seen = signal.grad.nonzero().squeeze(1)
    assert (seen.min(), seen.max() + 1) == (2 * HOP, 2 * HOP + WINDOW)


@given(length=st.integers(0, WINDOW - 1))
def test_audio_shorter_than_a_window_has_no_frame(length):
    assert num_frames(length) == num_frames(torch.tensor(length)) == 0


@given(lengths=st.lists(st.integers(0, 35 * SAMPLE_RATE), min_size=1))
def test_tensors_and_integers_are_counted_alike(lengths):
    assert num_frames(torch.tensor(lengths)).tolist() == [num_frames(length) for length in lengths]


@given(frames=st.integers(1, 100_000))
def test_num_samples_are_the_fewest_that_make_so_many_frames(frames):
    assert num_frames(num_samples(frames)) == frames
    assert num_frames(num_samples(frames) - 1) == frames - 1


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_padding_is_what_lies_beyond_a_row_s_own_frames(counts):
    mask = padding_mask(torch.tensor(counts), max(counts))
    assert mask.tolist() == [[False] * count + [True] * (max(counts) - count) for count in counts]


def test_frame_centres_are_20_ms_apart_from_the_middle_of_the_first_window():
    torch.testing.assert_close(frame_centres(3), torch.tensor([0.0125, 0.0325, 0.0525], dtype=torch.float64))


def test_a_second_has_the_sample_rate_s_samples():
    assert seconds_to_samples(1.5) == 24_000


AT_25_HZ = Clock(640, 720)


@given(frames=st.integers(1, 100_000), clock=st.sampled_from([CLOCK, AT_25_HZ, Clock(640, 1040), MFCC_CLOCK]))
def test_every_clock_counts_the_frames_of_the_fewest_samples_that_make_them(frames, clock):
    assert num_frames(num_samples(frames, clock), clock) == frames
    assert num_frames(num_samples(frames, clock) - 1, clock) == frames - 1


@pytest.mark.parametrize(
    ("fine", "coarse", "expected"),
    [
        (CLOCK, CLOCK, (1, 1)),
        (MFCC_CLOCK, CLOCK, (2, 1)),
        (MFCC_CLOCK, AT_25_HZ, (4, 3)),
        (CLOCK, AT_25_HZ, (2, 2)),
        (CLOCK, Clock(640, 1040), (2, 3)),
        (AT_25_HZ, CLOCK, (0, 0)),  # no frame of 45 ms lies inside one of 25 ms
        (CLOCK, Clock(480, 720), (1, 0)),  # not on the same grid
        (Clock(320, 1120), CLOCK, (1, 0)),
    ],
)
def test_frames_inside_a_frame_share_its_centre(fine, coarse, expected):
    ratio, count = frames_inside(fine, coarse)
    assert (ratio, count) == expected
    if count:
        inside = frame_centres(5 * ratio + count, fine).unfold(0, count, ratio)[:5].mean(dim=1)
        torch.testing.assert_close(inside, frame_centres(5, coarse))


@given(samples=st.integers(720, 100_000))
def test_every_frame_of_25_hz_has_its_frames_of_50_hz_inside_the_audio(samples):
    frames, (ratio, count) = num_frames(samples, AT_25_HZ), frames_inside(CLOCK, AT_25_HZ)
    assert ratio * (frames - 1) + count <= num_frames(samples)


def test_frames_of_20_ms_are_counted_in_another_clock():
    assert (in_frames(1500, CLOCK), in_frames(1500, AT_25_HZ)) == (1500, 750)
    assert (CLOCK.duration(75), AT_25_HZ.duration(75)) == (1.5, 3.0)
