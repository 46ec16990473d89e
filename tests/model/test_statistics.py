from dataclasses import replace

import pytest
import torch
from helpers import TINY
from hypothesis import given
from hypothesis import strategies as st

from hubert_lightning.frames import HOP, num_samples
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.convolutions import PIECE_SAMPLES
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.model.statistics import RunningStatistics, statistics_of

ENCODERS = {
    "base": TINY,
    "large": replace(TINY, conv_norm="layer", normalize_waveform=True, conv_bias=True),
    "both norms": replace(TINY, normalize_waveform=True),
    "both norms and a bias": replace(TINY, normalize_waveform=True, conv_bias=True),
}


def uneven_waveform(frames: int, tail: int = 0) -> torch.Tensor:
    """Louder and louder around a level that is not 0, so that no part of it has the statistics of the whole."""
    samples = num_samples(frames) + tail
    generator = torch.Generator().manual_seed(0)
    return 0.1 + torch.linspace(0.01, 0.5, samples) * torch.randn(samples, generator=generator)


@given(cuts=st.lists(st.integers(0, 5_000), max_size=8))
def test_statistics_do_not_depend_on_the_pieces(cuts: list[int]) -> None:
    waveform = uneven_waveform(15, tail=123)
    running = RunningStatistics()
    for piece in waveform.tensor_split(sorted(cuts)):
        running.add(piece)
    samples = waveform.double()
    mean, windows = samples.mean(), samples.unfold(0, 10, 5)
    expected = mean, samples.var(correction=0), windows.mean(dim=0) - mean, windows.T.cov(correction=0)
    for found, wanted in zip(running.statistics(), expected, strict=True):
        torch.testing.assert_close(found[0], wanted)


@pytest.mark.parametrize("config", ENCODERS.values(), ids=ENCODERS)
@torch.no_grad()
def test_given_the_statistics_of_the_whole_a_window_has_the_convolution_features_of_the_whole(
    config: EncoderConfig,
) -> None:
    encoder, waveform = HubertEncoder(config).eval(), uneven_waveform(400, tail=77)
    whole = encoder.local_features(waveform[None])[0]
    statistics = statistics_of(waveform.split(1000))
    for first, last in ((0, 100), (50, 300), (123, 400)):
        window = waveform[None, first * HOP : first * HOP + num_samples(last - first)]
        found = encoder.local_features(window, statistics=statistics)[0]
        torch.testing.assert_close(found, whole[first:last], atol=1e-5, rtol=1e-5)
        assert (encoder.local_features(window)[0] - whole[first:last]).abs().max() > 1e-2


@pytest.mark.parametrize("config", ENCODERS.values(), ids=ENCODERS)
@torch.no_grad()
def test_padding_changes_no_frame_of_a_batch_with_statistics(config: EncoderConfig) -> None:
    encoder, waveform = HubertEncoder(config).eval(), uneven_waveform(100)
    running = RunningStatistics()
    running.add(waveform)
    short = waveform[: num_samples(60)]
    batch = torch.stack([waveform, torch.nn.functional.pad(short, (0, len(waveform) - len(short)))])
    length = torch.tensor([len(waveform), len(short)])
    found = encoder.features(batch, length, layer=2, ignore_padding=True, statistics=running.statistics(batch=2))
    alone = encoder.features(short[None], layer=2, statistics=running.statistics())
    torch.testing.assert_close(found[1, :60], alone[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("config", ENCODERS.values(), ids=ENCODERS)
@torch.no_grad()
def test_convolving_in_pieces_changes_nothing(config: EncoderConfig) -> None:
    encoder, waveform = HubertEncoder(config).eval(), uneven_waveform(2 * PIECE_SAMPLES // HOP + 123, tail=77)
    found = encoder.local_features(waveform[None], statistics=statistics_of([waveform]))
    torch.testing.assert_close(found, encoder.local_features(waveform[None]), atol=1e-5, rtol=1e-5)
