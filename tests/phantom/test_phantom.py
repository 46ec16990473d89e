"""The phantom itself: what it takes torch for, and what the recorder sees."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from phantom.device import Phantom, missing
from phantom.record import Record
from phantom.recorder import Recorder

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a phantom")


@pytest.fixture(scope="module")
def phantom() -> Iterator[Phantom]:
    with Phantom(("phantom.test_phantom",)) as process:
        yield process


def run(phantom: Phantom, function: str) -> Record:
    return phantom.run(f"phantom.test_phantom:{function}")


def device() -> Record:
    properties = torch.cuda.get_device_properties(0)
    facts = [properties.name, properties.multi_processor_count, list(torch.cuda.get_device_capability())]
    pinned = [torch.zeros(2).pin_memory().is_pinned(), torch.zeros(2).is_pinned()]
    return Record(result=[torch.cuda.is_available(), *facts, *pinned])


def test_torch_takes_it_for_an_h200(phantom: Phantom) -> None:
    assert run(phantom, "device").result == [True, "NVIDIA H200", 132, [9, 0], True, False]


def waits() -> Record:
    with Recorder() as recorder:
        x = torch.zeros(4, 5, device="cuda")
        pinned, pageable = torch.arange(3).pin_memory(), torch.arange(3)
        with recorder.recording():
            there = pinned.to("cuda", non_blocking=True)  # does not wait
            there.to("cpu", non_blocking=True)  # nor does this
            pageable.to("cuda", non_blocking=True)
            pinned.to("cuda")
            torch.tensor(2.0, device="cuda")
            read = [there.tolist(), x.sum().item(), x.argmax().cpu().item()]
            x[x > 0]
            x.nonzero()
            torch.bincount(there, minlength=3)
            torch.cuda.synchronize()
            torch.cuda.current_stream().synchronize()
            event = torch.cuda.Event()
            event.record()
            event.synchronize()
    return recorder.record(read)


def test_each_kind_of_wait_is_recorded(phantom: Phantom) -> None:
    record = run(phantom, "waits")
    assert [wait.what for wait in record.waits] == [
        "non_blocking copy of (3,) to the GPU, pageable memory",
        "blocking copy of (3,) to the GPU, pinned memory",
        "blocking copy of () to the GPU, pageable memory",
        "blocking copy of (3,) from the GPU, pageable memory",
        "item of torch.float32",
        "blocking copy of () from the GPU, pageable memory",
        "index by a mask of (4, 5)",
        "nonzero of (4, 5)",
        "the smallest value of bincount",
        "the largest value of bincount",
        "torch.cuda.synchronize",
        "Stream.synchronize",
        "Event.synchronize",
    ]
    assert record.result == [[0, 1, 2], 1.0, 0]
    assert not record.mixtures


def natively() -> Record:
    """Waits of torch's own code, counted by the phantom, in the order of `recorded_like_natively`."""
    from phantom.native import WAITS, NativeLaunches

    count = NativeLaunches()._count
    assert count is not None
    log_probs = torch.zeros(9, 2, 4, device="cuda", requires_grad=True)
    token, number = torch.ones(2, 3, dtype=torch.int64, device="cuda"), torch.full((2,), 3, device="cuda")
    frames = torch.full((2,), 9, device="cuda")
    found = []

    def counted(work: object) -> None:
        before = count(WAITS)
        work()  # type: ignore[operator]
        found.append(count(WAITS) - before)

    for work in _dependent(torch.zeros(6, dtype=torch.int64, device="cuda"), log_probs, token, frames, number):
        counted(work)
    return Record(result=found)


def on_fakes() -> Record:
    found = []
    with Recorder() as recorder, recorder.recording():
        log_probs = torch.zeros(9, 2, 4, device="cuda", requires_grad=True)
        token, number = torch.ones(2, 3, dtype=torch.int64, device="cuda"), torch.full((2,), 3, device="cuda")
        frames = torch.full((2,), 9, device="cuda")
        x = torch.zeros(6, dtype=torch.int64, device="cuda")
        for work in _dependent(x, log_probs, token, frames, number):
            before = len(recorder.record().waits)
            work()  # type: ignore[operator]
            found.append(len(recorder.record().waits) - before)
    return recorder.record(found)


def _dependent(x: torch.Tensor, *ctc: torch.Tensor) -> list[object]:
    log_probs, token, frames, number = ctc
    loss: list[torch.Tensor] = []
    return [
        lambda: x.sum(),
        lambda: x[0].item(),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: torch.bincount(x, minlength=6),
        lambda: x.to("cpu"),
        lambda: torch.equal(x, x + 1),
        lambda: loss.append(nn.functional.ctc_loss(log_probs, token, frames, number, reduction="sum")),
        lambda: loss[0].backward(),
        lambda: nn.functional.ctc_loss(log_probs, token, [9, 9], [3, 3], reduction="sum"),
    ]


def test_waits_are_as_many_as_in_torchs_own_code(phantom: Phantom) -> None:
    recorded, native = run(phantom, "on_fakes").result, run(phantom, "natively").result
    assert recorded == native


def step() -> Record:
    with Recorder(packages=("phantom",)) as recorder:
        model = nn.Sequential(nn.Conv1d(4, 8, 3, groups=2), nn.GELU(), nn.Flatten(), nn.Linear(8 * 10, 6))
        recorder.modules.name(model.to("cuda"))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        with recorder.recording(), torch.autocast("cuda", torch.bfloat16):
            loss = model(torch.zeros(5, 4, 12, device="cuda")).sum()
            loss.backward()
            optimizer.step()
    return recorder.record()


def test_operations_have_phase_module_type_and_cost(phantom: Phantom) -> None:
    record = run(phantom, "step")
    convolution, product = record.named("convolution"), [op for op in record.ops if op.name == "addmm"]
    assert [(op.phase, op.module, op.dtype) for op in convolution] == [
        ("forward", "0", "bfloat16"),
        ("backward", "0", "bfloat16"),
    ]
    forward = 2 * 5 * 10 * 8 * 2 * 3  # batch, frames, channels out, channels in of a group, kernel
    assert [op.flops for op in convolution] == [forward, forward]  # the input needs no gradient
    [linear] = product
    assert (linear.flops, linear.module, linear.outs[0].shape) == (2 * 5 * 80 * 6, "3", (5, 6))
    assert linear.bytes == 2 * (6 + 5 * 80 + 80 * 6 + 5 * 6)
    assert [op.phase for op in record.named("_fused_adamw_")] == ["optimizer"]
    assert {op.line.partition(":")[0] for op in record.ops} <= {"phantom/test_phantom.py", ""}


def memory() -> Record:
    with Recorder() as recorder:
        kept = torch.zeros(1000, device="cuda")
        with recorder.recording():
            first = torch.zeros(10_000, device="cuda")
            del first
            second = kept + 1
    return recorder.record([kept.numel(), second.numel()])


def test_live_memory_is_followed_in_blocks_of_512_bytes(phantom: Phantom) -> None:
    record = run(phantom, "memory")
    assert [storage.bytes for storage in record.storages] == [4096, 40_448, 4096]
    assert record.peak == 4096 + 40_448
    assert [storage.died > 0 for storage in record.storages] == [False, True, False]


def mixed() -> Record:
    with Recorder() as recorder, recorder.recording():
        try:
            torch.zeros(3, device="cuda") + torch.zeros(3)
        except RuntimeError as error:
            return recorder.record(str(error))
    return recorder.record()


def test_a_mixture_of_devices_is_recorded_and_fails(phantom: Phantom) -> None:
    record = run(phantom, "mixed")
    assert [mixture.devices for mixture in record.mixtures] == [("cpu", "cuda:0")]
    assert "devices" in record.result


def test_a_record_survives_json(phantom: Phantom) -> None:
    record = run(phantom, "step")
    assert Record.from_json(record.to_json()) == record
