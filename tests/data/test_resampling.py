"""Resampling is that of torchaudio."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.transforms import Resample

from hubert_lightning.data.resampling import Resampler

RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000)


@given(rate=st.sampled_from(RATES), length=st.integers(0, 5_000), channels=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_samples_are_those_of_torchaudio(rate: int, length: int, channels: int) -> None:
    waveform = torch.randn(channels, length, generator=torch.Generator().manual_seed(length))
    resampled = Resampler(rate, 16_000)(waveform)
    if length:
        torch.testing.assert_close(resampled, Resample(rate, 16_000)(waveform))
    else:
        assert resampled.shape == (channels, 0)


@pytest.mark.parametrize("shape", [(2_000,), (2, 3, 2_000)])
@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_audio_of_any_shape_is_resampled(shape: tuple[int, ...], rate: int) -> None:
    waveform = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Resampler(rate, 16_000)(waveform), Resample(rate, 16_000)(waveform))
