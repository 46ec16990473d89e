from dataclasses import replace

import pytest
import torch
from helpers import AT_25_HZ, of_more_frames
from lightning.fabric.utilities.throughput import measure_flops
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hubert_lightning.frames import SAMPLE_RATE, num_frames, num_samples
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.flops import encoder_operations, head_operations
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.model.prediction import ClusterPredictor

SMALL = EncoderConfig(
    conv_channels=64, dim=96, num_layers=2, num_heads=4, ffn_dim=160, pos_kernel=16, pos_groups=1, layer_drop=0.0
)  # torch's counter forgets about groups in the gradient of a convolution's weights


def counted(module: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        module(x).float().square().mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"conv_norm": "layer", "pre_norm": True},
        {"pos_kernel": 15},
        {"feature_grad_mult": 0.0},
        {"position_buckets": 32},
        AT_25_HZ,
    ],
    ids=["base", "large", "odd kernel", "frozen", "relative positions", "25 Hz"],
)
def test_the_operations_of_a_step_are_those_that_torch_counts(change: dict) -> None:
    config = replace(SMALL, **change)
    encoder = HubertEncoder(config)
    encoder.mask_embedding.requires_grad_(False)
    samples = num_samples(60)
    expected = 3 * encoder_operations(config, samples) + of_more_frames(config, 3, samples)
    assert counted(encoder, torch.randn(3, samples)) == expected


def test_the_operations_of_a_step_are_those_that_lightning_measures() -> None:
    encoder, samples = HubertEncoder(replace(SMALL, conv_norm="layer", pre_norm=True)), num_samples(60)
    encoder.mask_embedding.requires_grad_(False)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        measured = measure_flops(encoder, lambda: encoder(torch.randn(3, samples)), lambda x: x.square().mean())
    assert measured == 3 * encoder_operations(encoder.config, samples) + of_more_frames(encoder.config, 3, samples)


def test_the_operations_of_the_head_are_those_that_torch_counts() -> None:
    x = torch.randn(40, 96, requires_grad=True)
    assert counted(ClusterPredictor(96, 50, 24), x) == head_operations(96, 24, [50], 40)


def test_groups_of_the_positional_convolution_are_counted_apart() -> None:
    grouped, samples = replace(SMALL, pos_groups=4), num_samples(60)
    whole = encoder_operations(SMALL, samples) - encoder_operations(grouped, samples)
    with FlopCounterMode(display=False) as counter:
        HubertEncoder(grouped).positions(torch.randn(1, 60, 96))
    assert whole == 3 * 3 * counter.get_total_flops()  # three passes; three quarters and one quarter


def test_base_takes_43_billion_operations_for_a_second_of_audio() -> None:
    seconds = 5
    samples = seconds * SAMPLE_RATE
    assert encoder_operations(EncoderConfig(), samples) / seconds == pytest.approx(43e9, rel=0.01)
    share = head_operations(768, 256, [100], num_frames(samples)) / encoder_operations(EncoderConfig(), samples)
    assert share < 0.01
