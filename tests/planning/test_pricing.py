"""The model of cost: what its prices must obey, whatever the assumptions are."""

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubert_lightning.errors import UserError
from hubert_lightning.planning.devices import DEVICES, H200, device_named
from hubert_lightning.planning.pricing import Convolution, Moved, Product
from hubert_lightning.planning.recorded import eager_cost, fused_cost, work_of

sizes = st.integers(1, 20_000)


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    strides: tuple[int, ...] = ()

    @property
    def stride(self) -> tuple[int, ...]:
        contiguous = [1]
        for size in reversed(self.shape[1:]):
            contiguous.insert(0, contiguous[0] * size)
        return self.strides or tuple(contiguous)


class Access(NamedTuple):
    storage: int
    bytes: int


class Operation(NamedTuple):
    name: str
    ins: tuple[Tensor, ...] = ()
    outs: tuple[Tensor, ...] = ()
    reads: tuple[Access, ...] = ()
    writes: tuple[Access, ...] = ()
    phase: str = "forward"
    launches: int = 1
    dropout: bool = False


def pointwise(name: str, reads: list[int], write: int, megabytes: int = 100) -> Operation:
    size = megabytes * 10**6
    return Operation(name, reads=tuple(Access(of, size) for of in reads), writes=(Access(write, size),))


def test_the_h200s_measured_product_takes_its_measured_time() -> None:
    product = Product(8192, 8192, 8192)
    assert product.operations / product.seconds(H200) == pytest.approx(788e12, rel=0.03)


@given(sizes, sizes, sizes, st.integers(1, 16))
def test_no_product_is_faster_than_the_rate_or_its_traffic(rows: int, columns: int, inner: int, batch: int) -> None:
    for device in DEVICES.values():
        product = Product(rows, columns, inner, batch)
        seconds = product.seconds(device)
        assert seconds >= product.operations / device.matrix * 0.96
        assert seconds >= batch * 2 * rows * columns / device.bandwidth


@given(sizes, sizes, sizes)
def test_twice_the_rows_take_no_less_time(rows: int, columns: int, inner: int) -> None:
    assert Product(2 * rows, columns, inner).seconds(H200) >= Product(rows, columns, inner).seconds(H200)


def test_one_tile_more_than_a_wave_takes_another_wave() -> None:
    wave = Product(128 * H200.processors, 256, 8192)
    seconds = wave.seconds(H200) - H200.product_launch
    more = Product(128 * H200.processors + 1, 256, 8192).seconds(H200) - H200.product_launch
    assert 1.3 * seconds < more <= 2 * seconds


def test_float32_is_slower_than_bfloat16() -> None:
    for device in DEVICES.values():
        assert Product(4096, 4096, 4096, dtype="float32").seconds(device) > Product(4096, 4096, 4096).seconds(device)


@pytest.mark.parametrize(
    ("operation", "rows", "columns", "inner", "batch"),
    [
        (Operation("addmm", (Tensor((5,)), Tensor((3, 4)), Tensor((4, 5)))), 3, 5, 4, 1),
        (Operation("bmm", (Tensor((2, 3, 4)), Tensor((2, 4, 5)))), 3, 5, 4, 2),
        (Operation("linear", (Tensor((2, 3, 4)), Tensor((5, 4)), Tensor((5,)))), 6, 5, 4, 1),
    ],
)
def test_products_are_read_from_shapes(operation: Operation, rows: int, columns: int, inner: int, batch: int) -> None:
    assert work_of(operation) == Product(rows, columns, inner, batch)


def test_a_convolution_whose_channels_come_last_is_not_copied() -> None:
    source, weight, output = Tensor((7, 512, 999)), Tensor((512, 512, 3)), Tensor((7, 512, 499))
    last = Tensor((7, 512, 999), strides=(512 * 999, 1, 512))
    first = work_of(Operation("convolution", (source, weight), (output,)))
    copied_not = work_of(Operation("convolution", (last, weight), (output,)))
    assert isinstance(first, Convolution)
    assert first.operations == 2 * 7 * 499 * 512 * 512 * 3
    assert first.seconds(H200) > copied_not.seconds(H200)


def test_gradients_of_the_input_are_priced_only_where_they_are_computed() -> None:
    shapes = Tensor((7, 512, 499)), Tensor((7, 512, 999)), Tensor((512, 512, 3))
    both = work_of(Operation("convolution_backward", shapes, shapes[1:]))
    weights = work_of(Operation("convolution_backward", shapes, shapes[2:]))
    assert both.seconds(H200) > 1.5 * weights.seconds(H200)


def test_attention_takes_its_operations_with_a_backward_pass_two_and_a_half_times() -> None:
    heads = Tensor((7, 12, 624, 64))
    forward = work_of(Operation("_scaled_dot_product_flash_attention", (heads,) * 3))
    backward = work_of(Operation("_scaled_dot_product_flash_attention_backward", (heads,) * 4))
    assert forward.operations == 4 * 7 * 12 * 624**2 * 64
    assert backward.operations == 2.5 * forward.operations


def test_fusing_a_chain_moves_its_first_input_and_its_last_output_alone() -> None:
    chain = [pointwise("add", [1], 2), pointwise("mul", [2], 3), pointwise("gelu", [3], 4)]
    product = Operation("mm", (Tensor((8, 8)), Tensor((8, 8))), (Tensor((8, 8)),), (Access(4, 128),), (Access(5, 128),))
    eager, fused = eager_cost([*chain, product], H200), fused_cost([*chain, product], H200)
    one = Moved(2 * 10**8).seconds(H200)
    assert fused.parts["pointwise"] == pytest.approx(one)
    assert eager.gpu - fused.gpu == pytest.approx(2 * one)
    assert (eager.launches, fused.launches) == (4, 2)


def test_fusing_keeps_what_is_read_later() -> None:
    product = Operation("mm", (Tensor((8, 8)), Tensor((8, 8))), (Tensor((8, 8)),), (Access(3, 128),), (Access(9, 128),))
    chain = [pointwise("add", [1], 2), pointwise("mul", [2], 3)]
    late = pointwise("gelu", [2], 4)
    kept = fused_cost([*chain, product, late], H200).parts["pointwise"]
    assert kept == pytest.approx(Moved(3 * 10**8).seconds(H200) + Moved(2 * 10**8).seconds(H200))


def test_the_slower_of_host_and_gpu_sets_the_step() -> None:
    many = [pointwise("add", [1], 2, megabytes=0)] * 1000
    few = [pointwise("add", [1], 2, megabytes=100_000)]
    assert eager_cost(many, H200).seconds == eager_cost(many, H200).host
    assert eager_cost(few, H200).seconds == eager_cost(few, H200).gpu
    assert eager_cost(few, H200, waits=5).seconds == pytest.approx(eager_cost(few, H200).gpu + 5 * H200.host.wait)


@pytest.mark.parametrize("typed", ["H100-80GB", "h100 80gb", "H100", "4090", "rtx4090"])
def test_a_gpu_is_found_as_it_is_typed(typed: str) -> None:
    assert device_named(typed).name in ("H100-80GB", "RTX-4090")


def test_an_unknown_gpu_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(UserError, match="'TPU' is not known; give one of H200, B200, H100-80GB"):
        device_named("TPU")
