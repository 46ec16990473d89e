from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hubert_lightning.model import products
from hubert_lightning.model.products import Linear, linear, product, uses_onednn


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let oneDNN multiply on every processor that has it."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch is built without oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


@pytest.mark.parametrize("shape", [(7, 48), (2, 5, 48), (2, 3, 4, 48), (1, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_of_a_linear_map_are_torchs(shape: tuple[int, ...], bias: bool) -> None:
    layer = Linear(48, 32, bias=bias)
    results = []
    for compute in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
        layer.zero_grad()
        output = compute(x)
        output.square().sum().backward()
        results.append((output, x.grad, [parameter.grad for parameter in layer.parameters()]))
    assert_close(*results)


def test_a_frozen_weight_gets_no_gradient_and_passes_it_on() -> None:
    layer, x = Linear(8, 4).requires_grad_(False), torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert [parameter.grad for parameter in layer.parameters()] == [None, None]
    assert_close(x.grad, layer.weight.sum(dim=0).expand(3, 8))


def strided() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    a, b = torch.randn(20, 64), torch.randn(64, 24)
    yield a, b
    yield a.T.contiguous().T, b.T.contiguous().T
    yield a[::2, :32], b[1::2]


def test_a_product_of_matrices_of_any_strides_is_torchs() -> None:
    for a, b in strided():
        assert uses_onednn(a, b)
        assert_close(product(a, b), a @ b)


def test_other_precisions_and_empty_batches_are_left_to_torch() -> None:
    layer = Linear(8, 4)
    assert layer(torch.randn(0, 8)).shape == (0, 4)
    assert layer.double()(torch.randn(2, 8).double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(torch.randn(2, 8)).dtype == torch.bfloat16
        assert linear(torch.randn(2, 8), layer.weight).dtype == torch.bfloat16


def test_the_operations_of_a_product_are_counted() -> None:
    x = torch.randn(2, 5, 48, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        Linear(48, 32)(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 5 * 48 * 32
