"""The positional convolution as products of blocks is the convolution, in values and gradients."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import hubert_lightning.model.hubert
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.positions import PositionalConvolution, convolved_blocks, in_blocks


def convolved(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Convolution by torch, of (batch, frames, channels)."""
    groups, kernel = x.shape[2] // weight.shape[1], weight.shape[2]
    output = F.conv1d(x.transpose(1, 2), weight, bias, padding=kernel // 2, groups=groups)
    return output[..., : x.shape[1]].transpose(1, 2)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 70), st.sampled_from([1, 2, 3, 32, 33, 128]), st.sampled_from([1, 4]))
def test_products_of_blocks_are_the_convolution(batch: int, frames: int, kernel: int, groups: int) -> None:
    torch.manual_seed(0)
    sizes = (batch, frames, 3 * groups), (2 * groups, 3, kernel), (2 * groups,)
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    x, weight, bias = inputs
    found, expected = convolved_blocks(in_blocks(x), weight, bias).flatten(1, 2)[:, :frames], convolved(*inputs)
    assert_close(found, expected)
    gradient = torch.randn_like(expected)
    assert_close(torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(expected, inputs, gradient))


@pytest.mark.parametrize("learns", ["input", "weight"])
def test_a_gradient_that_nobody_needs_is_not_computed(learns: str) -> None:
    x, weight = torch.randn(1, 20, 8, requires_grad=learns == "input"), torch.randn(8, 8, 4)
    weight.requires_grad_(learns == "weight")
    convolved_blocks(in_blocks(x), weight, torch.zeros(8)).sum().backward()
    assert (x.grad is not None, weight.grad is not None) == (learns == "input", learns == "weight")


def test_products_in_bfloat16_are_the_convolution_but_for_rounding() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 124, 96), 0.05 * torch.randn(96, 48, 128), torch.randn(96)
    weight.requires_grad_(), x.requires_grad_()
    exact = convolved(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = convolved_blocks(in_blocks(x), weight, bias)
    assert rounded.dtype == torch.bfloat16
    rounded = rounded.flatten(1, 2)[:, :124].float()
    assert (rounded - exact).norm() < 0.01 * exact.norm()  # bfloat16 keeps 8 bits: 0.4 %
    gradient = torch.randn_like(exact)
    for one, other in zip(
        torch.autograd.grad(rounded, (x, weight), gradient),
        torch.autograd.grad(exact, (x, weight), gradient),
        strict=True,
    ):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.01 * other.norm()


def test_the_module_has_its_old_path_and_survives_pickling() -> None:
    assert hubert_lightning.model.hubert.PositionalConvolution is PositionalConvolution
    positions = PositionalConvolution(EncoderConfig(dim=16, num_heads=2, pos_kernel=8, pos_groups=4))
    x = torch.randn(2, 30, 16)
    assert_close(pickle.loads(pickle.dumps(positions))(x), positions(x), rtol=0, atol=0)
