import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup

from hubert_lightning.training.schedules import linear_warmup_decay, tri_stage


def rates(schedule: LambdaLR, steps: int) -> list[float]:
    values = []
    for _ in range(steps):
        values += schedule.get_last_lr()
        schedule.optimizer.step()
        schedule.step()
    return values


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)


@pytest.mark.parametrize(("warmup", "total"), [(8, 100), (0, 10), (1, 1), (20, 10)])
def test_linear_warmup_decay_is_that_of_transformers(warmup, total):
    ours = LambdaLR(optimizer(), linear_warmup_decay(warmup, total))
    reference = get_linear_schedule_with_warmup(optimizer(), warmup, total)
    assert rates(ours, total + 20) == pytest.approx(rates(reference, total + 20))


def test_linear_warmup_decay_has_the_corners_of_hubert_base():
    factor = linear_warmup_decay(32_000, 400_000)
    corners = [0, 16_000, 32_000, 216_000, 400_000, 500_000]
    assert [factor(step) for step in corners] == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]


def test_tri_stage_warms_up_holds_decays_and_stays():
    factor = tri_stage(2_000, 8_000, 10_000)  # 10 h of labels
    corners = {0: 0.01, 1_000: 0.505, 2_000: 1.0, 9_999: 1.0, 10_000: 1.0, 20_000: 0.05, 99_999: 0.05}
    assert {step: factor(step) for step in corners} == pytest.approx(corners)
    assert factor(15_000) == pytest.approx(0.05**0.5)  # half-way of an exponential


def test_tri_stage_cut_short_ends_where_fairseq_s_10_h_recipe_ends():
    assert tri_stage(8_000, 0, 72_000)(25_000) == pytest.approx(0.05 ** (17 / 72))


@given(st.tuples(*[st.integers(0, 50)] * 3), st.floats(0, 1), st.floats(0.01, 1))
def test_tri_stage_rises_then_falls_between_its_ends_even_without_some_stage(stages, initial, final):
    factor = tri_stage(*stages, initial=initial, final=final)
    warmup, hold, _ = stages
    values = [factor(step) for step in range(sum(stages) + 5)]
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup : warmup + hold] == [1.0] * hold
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    assert values[-1] == final
