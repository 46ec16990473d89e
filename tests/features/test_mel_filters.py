"""Filters of MFCCs and spectrograms are those of torchaudio, to the last bit."""

import pytest
import torch
from torchaudio.compliance.kaldi import get_mel_banks
from torchaudio.functional import melscale_fbanks

from hubert_lightning.features.mel_filters import kaldi_mel_filters, mel_filters


@pytest.mark.parametrize(("num_filters", "rate", "lowest"), [(23, 16_000, 20.0), (40, 16_000, 0.0), (13, 8_000, 60.0)])
def test_kaldi_s_filters_are_those_of_torchaudio(num_filters: int, rate: int, lowest: float) -> None:
    expected, _ = get_mel_banks(num_filters, 512, rate, lowest, 0.0, 100.0, -500.0, 1.0)
    torch.testing.assert_close(kaldi_mel_filters(num_filters, 512, rate, lowest), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("num_filters", "rate"), [(80, 16_000), (40, 8_000)])
def test_filters_of_pictures_are_those_of_torchaudio(num_filters: int, rate: int) -> None:
    expected = melscale_fbanks(257, 0.0, rate / 2, num_filters, rate)
    torch.testing.assert_close(mel_filters(num_filters, 512, rate), expected, rtol=0, atol=0)
