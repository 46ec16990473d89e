from dataclasses import replace

import pytest
import torch
from helpers import TINY
from torch.testing import assert_close

from hubert_lightning.frames import num_frames
from hubert_lightning.model.hubert import HubertEncoder


@pytest.mark.parametrize("level", [0.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_a_padded_utterance_has_the_features_and_gradients_of_a_batch_of_one(level: float, bias: bool) -> None:
    encoder = HubertEncoder(replace(TINY, conv_bias=bias))
    generator = torch.Generator().manual_seed(0)
    length = torch.tensor([6000, 2531, 400, 4800])
    waveform = level + torch.randn(4, 6000, generator=generator) / 10
    parameters = dict(encoder.convolutions.named_parameters())
    found = encoder.local_features(waveform, length, ignore_padding=True)
    alone = [encoder.local_features(row[None, :samples])[0] for row, samples in zip(waveform, length, strict=True)]
    for row, expected in zip(found, alone, strict=True):
        assert_close(row[: len(expected)], expected)
    inside = torch.arange(found.shape[1]) < num_frames(length)[:, None]
    gradients = [
        torch.autograd.grad(frames.square().sum(), list(parameters.values()))
        for frames in (found[inside], torch.cat(alone))
    ]
    for name, ours, expected in zip(parameters, *gradients, strict=True):
        assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()) + 1e-6, msg=name)
