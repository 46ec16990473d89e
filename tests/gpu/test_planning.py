"""Steps by formulas against steps that the phantom records: time by the same model of cost, and memory."""

from dataclasses import asdict, replace
from typing import Any

import pytest
from phantom.device import Run

from hubert_lightning.frames import num_frames, seconds_to_samples
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.planning.devices import H200
from hubert_lightning.planning.memory import step_memory
from hubert_lightning.planning.recorded import StepCost, eager_cost, fused_cost
from hubert_lightning.planning.steps import Batch, step_cost
from hubert_lightning.planning.workload import Workload

BASE = EncoderConfig(layer_drop=0.0)
LARGE = EncoderConfig(
    conv_norm="layer", normalize_waveform=True, pre_norm=True, dim=1024, num_layers=24, num_heads=16, ffn_dim=4096,
    dropout=0.0, attention_dropout=0.0, input_dropout=0.0, layer_drop=0.0, feature_grad_mult=1.0,
)  # fmt: skip
SIZES = {"base": (BASE, 7), "large": (replace(LARGE, num_layers=12), 5)}
"""Encoder and rows of 12.5 s; Large with half of its layers, which take half of the time to record."""
ALLOWED = 0.10


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_step_by_formulas_agrees_with_the_recorded_one(recorded: Run, size: str) -> None:
    config, rows = SIZES[size]
    record = recorded("training_steps:pretraining", size="base", rows=rows, seconds=12.5, **_changes(config))
    frames = num_frames(seconds_to_samples(12.5))
    for compiled, price in ((False, eager_cost), (True, fused_cost)):
        seen = price(record.ops, H200)
        found = step_cost(Workload(config), Batch(rows, frames), H200, compiled=compiled)
        assert found.gpu == pytest.approx(seen.gpu, rel=ALLOWED), _compared(found, seen)
    assert step_memory(Workload(config)).peak(rows * frames) == pytest.approx(record.peak, rel=ALLOWED)


def _changes(config: EncoderConfig) -> dict[str, Any]:
    default = asdict(EncoderConfig())
    return {name: value for name, value in asdict(config).items() if value != default[name]}


def _compared(found: StepCost, seen: StepCost) -> str:
    return f"formulas {found.gpu * 1e3:.2f} ms {found.parts}, recorded {seen.gpu * 1e3:.2f} ms {seen.parts}"
