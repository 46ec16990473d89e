"""Training steps on a GPU, as far as a phantom shows: what they launch, hold and wait for."""

from collections import Counter
from math import prod
from typing import Any

import pytest
from helpers import of_more_frames
from phantom.device import Run
from phantom.record import Op, Record
from training_steps import encoder

from hubert_lightning.frames import num_frames, seconds_to_samples
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.positions import BLOCK, is_multiplied

PRETRAINING, FINETUNING = "training_steps:pretraining", "training_steps:finetuning"
DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1, "input_dropout": 0.1}
"""That of Base."""
LARGE = {"conv_norm": "layer", "pre_norm": True, "normalize_waveform": True}
"""How Large differs from Base, besides its size."""
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "pre-training": (PRETRAINING, DROPOUT),
    "pre-training of Large's kind": (PRETRAINING, DROPOUT | LARGE),
    "pre-training with checkpointing": (PRETRAINING, DROPOUT | {"checkpointing": True}),
    "pre-training with accumulation": (PRETRAINING, DROPOUT | {"trainer": {"accumulate_grad_batches": 2}}),
    "fine-tuning": (FINETUNING, {}),
    "fine-tuning of all": (FINETUNING, {"freeze_convolutions": False}),
    "fine-tuning of the head": (FINETUNING, {"freeze_steps": 100}),
    "fine-tuning with checkpointing": (FINETUNING, {"checkpointing": True}),
}
each_step = pytest.mark.parametrize("step", STEPS)
MIB = 2**20


def waits(record: Record) -> dict[str, int]:
    """How often the host waits, by reason and line."""
    return dict(Counter(f"{wait.phase}: {wait.what} at {wait.line}" for wait in record.waits))


def elements(op: Op) -> int:
    """Elements of the largest result of an operation."""
    return max((prod(out.shape) for out in op.outs), default=0)


@each_step
def test_a_step_mixes_no_devices(recorded: Run, step: str) -> None:
    function, options = STEPS[step]
    assert not recorded(function, **options).mixtures


@each_step
def test_a_step_does_not_wait_for_the_gpu(recorded: Run, step: str) -> None:
    function, options = STEPS[step]
    record = recorded(function, **options)
    assert waits(record) == {}
    assert all(copy.to_gpu and copy.pinned for copy in record.copies)
    rows = 3
    sizes = 2 * rows * 4  # of the utterances, for the CTC loss
    assert all(copy.phase == "transfer" or copy.bytes == sizes for copy in record.copies)


def test_the_ctc_loss_is_a_kernel_a_pass_and_where_they_do_not_work_torchs_which_waits(recorded: Run) -> None:
    ours, torchs = recorded(FINETUNING), recorded("training_steps:finetuning_without_kernels")
    assert [(op.name, op.phase, op.launches) for op in ours.named("ctc_")] == [
        ("ctc_losses", "forward", 1),
        ("ctc_gradient", "backward", 1),
    ]
    assert {"_ctc_loss", "_ctc_loss_backward"} <= {op.name for op in torchs.ops}
    assert torchs.waits


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("ddp", DROPOUT),
        ("fsdp", DROPOUT),
        ("fsdp", DROPOUT | LARGE | {"checkpointing": True}),
    ],
    ids=["DDP", "FSDP", "FSDP of Large's kind with checkpointing"],
)
def test_a_step_of_several_ranks_does_not_wait(recorded: Run, strategy: str, options: dict[str, Any]) -> None:
    record = recorded("training_steps:on_ranks", task="pretraining", trainer={"strategy": strategy}, **options)
    assert record.ops
    assert not record.mixtures
    assert waits(record) == {}


def test_a_step_that_logs_waits_for_no_number_of_the_host(recorded: Run) -> None:
    for function in (PRETRAINING, FINETUNING):
        record = recorded(function, trainer={"log_every_n_steps": 1})
        assert not [wait.stack for wait in record.waits if "copy of ()" in wait.what]


@pytest.mark.parametrize(("task", "most"), [("pre-training", 0), ("fine-tuning", 1)])
def test_validation_waits_at_most_once_a_batch(recorded: Run, task: str, most: int) -> None:
    few, many = (recorded("training_steps:validation", task=task, batches=batches) for batches in (2, 4))
    assert not many.mixtures
    more = Counter(waits(many))
    more.subtract(waits(few))
    assert more.total() <= 2 * most, +more


@pytest.mark.parametrize(
    ("step", "most"), [("pre-training", 60), ("pre-training with checkpointing", 82), ("fine-tuning", 59)]
)
def test_a_layer_launches_few_kernels(recorded: Run, step: str, most: int) -> None:
    function, options = STEPS[step]
    two, three = (recorded(function, **options | {"num_layers": layers}).launches for layers in (2, 3))
    assert three - two <= most


@pytest.mark.parametrize("step", ["pre-training", "pre-training of Large's kind"])
def test_nothing_as_large_as_the_audio_is_computed_in_float64(recorded: Run, step: str) -> None:
    function, options = STEPS[step]
    record = recorded(function, **options)
    samples = record.copies[0].bytes // 4
    large = [op for op in record.ops if op.dtype == "float64" and elements(op) >= samples]
    assert {op.line for op in large} == set()


def base(recorded: Run) -> Record:
    """A step of Base on 87.5 s, that of its recipe, with all layers."""
    return recorded(PRETRAINING, size="base", rows=7, seconds=12.5, layer_drop=0.0)


def test_autocast_leaves_only_norms_sums_and_the_loss_of_base_in_float32(recorded: Run) -> None:
    record = base(recorded)
    frames = 7 * 624
    large = [op for op in record.ops if op.dtype == "float32" and elements(op) >= 256 * frames]
    in_layers = Counter(op.name for op in large if op.module.startswith("encoder.layers.") and op.phase == "forward")
    assert in_layers == {"native_layer_norm": 24, "add": 24}  # the residual stream
    products = [op for op in record.ops if op.flops > record.flops / 1000]
    assert {op.dtype for op in products if not op.module.startswith("predictors")} == {"bfloat16"}
    assert not [op for op in large if "gelu" in op.name or ("softmax" in op.name and "log" not in op.name)]


def test_attention_is_that_of_the_flash_kernels(recorded: Run) -> None:
    layers = 12
    kernels = Counter(op.name for op in base(recorded).named("attention"))
    assert kernels == {
        "_scaled_dot_product_flash_attention": layers,
        "_scaled_dot_product_flash_attention_backward": layers,
    }
    padded = {op.name.removesuffix("_backward") for op in recorded(FINETUNING).named("attention")}
    # The first where cuDNN is recent; flash attention takes no mask
    assert padded <= {"_scaled_dot_product_cudnn_attention", "_scaled_dot_product_efficient_attention"}


def test_base_holds_less_than_four_gib(recorded: Run) -> None:
    record = base(recorded)
    assert record.peak < 4 * 1024 * MIB, record.held_at_peak()


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (PRETRAINING, DROPOUT),
        (PRETRAINING, DROPOUT | LARGE),
        (PRETRAINING, {"size": "base", "rows": 7, "seconds": 12.5, "layer_drop": 0.0}),
        (FINETUNING, {}),
        (FINETUNING, LARGE),
        (FINETUNING, LARGE | {"freeze_convolutions": False}),
    ],
    ids=["tiny", "Large's kind", "Base", "fine-tuning", "fine-tuning of Large's kind", "fine-tuning of all"],
)
def test_the_operations_of_a_step_are_those_that_the_task_counts(
    recorded: Run, function: str, options: dict[str, Any]
) -> None:
    record = recorded(function, **options)
    # The kernels compute the scores again in the backward pass: one of five products
    again = sum(op.flops for op in record.named("attention_backward")) // 5
    batch = {"size": "tiny", "rows": 3, "seconds": 2.0} | options
    frozen = function == FINETUNING and batch.pop("freeze_convolutions", True)
    samples = seconds_to_samples(batch.pop("seconds"))
    rows = batch.pop("rows")
    config = encoder(**batch | ({"feature_grad_mult": 0.0} if frozen else {}))
    more = of_more_frames(config, rows, samples) + of_blocks(config, rows, num_frames(samples))
    assert record.flops - again == record.result + more


def of_blocks(config: EncoderConfig, rows: int, frames: int) -> int:
    """Operations of the positional convolution beyond the formula: zeros around its kernels, but no frame too many."""
    channels, kernel = config.dim // config.pos_groups, config.pos_kernel
    if not is_multiplied(channels, kernel, rows * frames):
        return 0
    multiplied = -(-frames // BLOCK) * BLOCK * (kernel + BLOCK - 1)
    return 3 * 2 * rows * config.dim * channels * (multiplied - (frames + 1 - kernel % 2) * kernel)


def test_the_positions_of_base_are_products_of_blocks(recorded: Run) -> None:
    record = base(recorded)
    inner = 48 * (128 + BLOCK - 1)
    products = [op for op in record.named("bmm") if any(inner in operand.shape for operand in (*op.ins, *op.outs))]
    assert [op.phase for op in products] == ["forward", "backward", "backward"]
    assert all(op.dtype == "bfloat16" for op in products)
    assert not record.named("convolution")
