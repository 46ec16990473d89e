"""The memory of a step by formulas, against the model and against recorded steps."""

import pytest
import torch
from helpers import AT_25_HZ

from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.planning.memory import GIB, step_memory
from hubert_lightning.planning.workload import Workload, matrix_parameters, num_parameters
from hubert_lightning.training.finetuning import CTCFinetuning
from hubert_lightning.training.pretraining import HubertPretraining

LARGE = {"conv_norm": "layer", "normalize_waveform": True, "pre_norm": True, "num_heads": 16, "feature_grad_mult": 1.0}
LARGE |= dict.fromkeys(("dropout", "attention_dropout", "input_dropout", "layer_drop"), 0.0)
SIZES = {
    "base": Workload(EncoderConfig()),
    "large": Workload(EncoderConfig(**LARGE | {"dim": 1024, "num_layers": 24, "ffn_dim": 4096}), final_dim=768),
    "wavlm": Workload(EncoderConfig(position_buckets=320)),
    "xlarge": Workload(EncoderConfig(**LARGE | {"dim": 1280, "num_layers": 48, "ffn_dim": 5120}), final_dim=1024),
    "25 Hz": Workload(EncoderConfig(**AT_25_HZ)),
}
"""The three sizes of the paper, WavLM Base, and a model with an eighth convolution."""


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_model(size: str) -> None:
    workload = SIZES[size]
    with torch.device("meta"):
        model = HubertPretraining(workload.encoder, list(workload.clusters), workload.final_dim)
    assert num_parameters(workload) == sum(parameter.numel() for parameter in model.parameters())
    matrices = [weight for name, weight in model.encoder.named_parameters() if weight.dim() > 1]
    assert matrix_parameters(workload.encoder) == pytest.approx(sum(weight.numel() for weight in matrices), rel=1e-3)


def test_parameters_are_those_of_a_model_with_biases_and_a_ctc_head() -> None:
    config = EncoderConfig(conv_bias=True, conv_norm="layer", num_layers=2, dim=96, ffn_dim=64, conv_channels=24)
    with torch.device("meta"):
        model = CTCFinetuning(encoder=config)
    workload = Workload(config, clusters=(), tokens=len(model.vocabulary))
    assert num_parameters(workload) == sum(parameter.numel() for parameter in model.parameters())


def test_a_step_of_25_hz_keeps_half_of_the_frames_in_memory() -> None:
    half, whole = (step_memory(SIZES[size]).largest_batch(40 * GIB) * seconds for size, seconds in SECONDS_OF_FRAME)
    assert 1.2 * whole < half < 2 * whole  # seconds of audio: the convolutions take as much as before


SECONDS_OF_FRAME = (("25 Hz", 0.04), ("base", 0.02))


def test_a_larger_gpu_holds_a_larger_batch_which_fits() -> None:
    memory = step_memory(SIZES["large"], gpus=8)
    frames = memory.largest_batch(80 * GIB)
    assert memory.largest_batch(40 * GIB) < frames
    assert 65 * GIB < memory.peak(frames) < 78 * GIB


def test_a_model_that_does_not_fit_has_no_batch() -> None:
    assert step_memory(SIZES["xlarge"]).largest_batch(12 * GIB) == 0
    assert step_memory(SIZES["xlarge"], gpus=64, sharded=True).largest_batch(12 * GIB) > 0
