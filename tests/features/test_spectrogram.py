"""Spectrograms to look at."""

import math

import pytest
import torch

from hubert_lightning.features.spectrogram import MELS, log_mel, mel_band
from hubert_lightning.frames import SAMPLE_RATE


@pytest.mark.parametrize("hertz", [300, 1000, 2500, 6000])
def test_a_tone_is_loudest_in_the_band_of_its_frequency(hertz: int) -> None:
    time = torch.arange(SAMPLE_RATE) / SAMPLE_RATE
    picture = log_mel(0.3 * torch.sin(2 * math.pi * hertz * time))
    assert picture.shape == (MELS, 101)  # a column every 10 ms, the first at 0
    assert float(picture.max()) == 0.0
    assert picture[:, 50].argmax() == pytest.approx(mel_band(hertz), abs=1)


def test_silence_and_the_shortest_audio_have_a_spectrogram() -> None:
    assert log_mel(torch.zeros(400)).isfinite().all()
