"""Long recordings are cut in their pauses, wherever they begin."""

from pathlib import Path

import pytest
import torch
from helpers import cut_of, noise_with_pauses
from hypothesis import given
from hypothesis import strategies as st

from hubert_lightning.features.windows import quiet_windows
from hubert_lightning.frames import HOP, SAMPLE_RATE, num_frames


@given(
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0.0, 1e-3, 0.3])), min_size=1, max_size=20),
    st.integers(40, 400),
)
def test_windows_cover_every_frame_once_and_none_is_longer_than_allowed(
    tmp_path_factory: pytest.TempPathFactory, tenths: list[tuple[int, float]], longest: int
) -> None:
    waveform = torch.cat([torch.full((tenth * SAMPLE_RATE // 10,), level) for tenth, level in tenths])
    found = quiet_windows(cut_of(tmp_path_factory.mktemp("audio") / "a.wav", waveform), longest)
    frames = num_frames(len(waveform))
    assert [found[0].start, *(window.end for window in found)] == [*(window.start for window in found), frames]
    assert all(window.start < window.end for window in found)
    assert all(0 <= window.first <= window.start < window.end <= window.last <= frames for window in found)
    assert all(window.last - window.first <= longest for window in found)


def test_cuts_fall_into_pauses(tmp_path: Path) -> None:
    waveform = noise_with_pauses(300)
    found = quiet_windows(cut_of(tmp_path / "a.wav", waveform), 1_500)
    levels = [waveform[(w.end - 5) * HOP : (w.end + 5) * HOP].abs().mean().item() for w in found[:-1]]
    assert len(levels) > 10
    assert max(levels) < 0.02
    assert waveform.abs().mean() > 0.03


@pytest.mark.parametrize("offset", [0.05, -0.5])
def test_a_constant_offset_moves_no_cut(tmp_path: Path, offset: float) -> None:
    """As cheap sound cards add one."""
    waveform = noise_with_pauses(300)
    expected = quiet_windows(cut_of(tmp_path / "a.wav", waveform), 1_500)
    assert quiet_windows(cut_of(tmp_path / "b.wav", waveform + offset), 1_500) == expected


def test_a_part_of_a_recording_is_cut_where_the_whole_is(tmp_path: Path) -> None:
    waveform = noise_with_pauses(400)
    whole = quiet_windows(cut_of(tmp_path / "whole.wav", waveform), 1_500)
    first = 3_333  # frames
    part = quiet_windows(cut_of(tmp_path / "part.wav", waveform[first * HOP : 18_000 * HOP]), 1_500)
    joints, theirs = {window.end for window in whole}, {window.end + first for window in part}
    inside = range(first + 1_500, 18_000 - 1_500)
    assert {joint for joint in joints if joint in inside} == {joint for joint in theirs if joint in inside}
    assert len([joint for joint in joints if joint in inside]) > 10
