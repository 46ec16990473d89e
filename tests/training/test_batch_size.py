"""The largest batch that fits is found by real training steps with a given limit, which leave no trace."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import SMOKE, TINY, bare_trainer, data_of_task, plain_adam, pretraining_options, quick_adam
from hypothesis import given
from hypothesis import strategies as st
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from hubert_lightning.cli import main
from hubert_lightning.errors import UserError
from hubert_lightning.frames import num_frames, num_samples, seconds_to_samples
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.training import batch_size
from hubert_lightning.training.batch_size import CpuMemory, largest_rows
from hubert_lightning.training.finetuning import CTCFinetuning
from hubert_lightning.training.finetuning_data import TranscribedData
from hubert_lightning.training.lightning_internals import batches_trained, scale_in_step
from hubert_lightning.training.pretraining import HubertPretraining

DROPPING = EncoderConfig(**TINY.__dict__ | {"dropout": 0.1, "layer_drop": 0.3})


class Limited(CpuMemory):
    """The memory of real steps, of which a given number of bytes may be taken."""

    def __init__(self, model: LightningModule, limit: float) -> None:
        super().__init__(model, 1)
        self.limit = limit
        self.peaks: list[float] = []

    def peak(self, step: Any) -> float:
        self.peaks.append(super().peak(step))
        return self.peaks[-1]


costs = given(
    standing=st.floats(0, 0.9),
    each=st.floats(1e-4, 2),
    bend=st.floats(0, 1.5),
    most=st.integers(1, 3000),
)


@costs
def test_the_largest_number_of_rows_fits_and_a_few_more_would_not(
    standing: float, each: float, bend: float, most: int
) -> None:
    """Where a step has two peaks, the larger one counts: memory grows faster from some number of rows on."""

    def share(rows: int) -> float:
        taken = max(standing + each * rows, standing / 2 + each * bend * rows)
        tried.append(rows)
        return taken if taken < 2 else float("inf")

    tried: list[int] = []
    rows, taken = largest_rows(share, most)
    assert len(tried) <= 8
    if rows == 0:
        assert share(1) > 1
        return
    assert taken == share(rows) <= 1
    assert rows == most or share(int(rows * 1.05) + 1) > 1


@costs
def test_a_sharded_model_never_tries_a_batch_that_may_not_fit(
    standing: float, each: float, bend: float, most: int
) -> None:
    def share(rows: int) -> float:
        taken = max(standing + each * rows, standing / 2 + each * bend * rows)
        tried.append(rows)
        return taken

    tried: list[int] = []
    fixed = standing / 2
    rows, taken = largest_rows(share, most, fixed)
    assert len(tried) <= 8
    assert all(share(number) <= 1.1 for number in set(tried) if number > 1)
    if rows == 0:
        assert share(1) > 1
        return
    assert taken == share(rows) <= 1
    allows_no_more = fixed + (taken - fixed) * (rows + 1) / rows > 1.1
    assert rows == most or allows_no_more or share(int(rows / 0.9) + 1) > 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("NCCL error: Cuda failure 2 'out of memory'"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_an_error_of_a_library_that_has_no_memory_is_known(error: RuntimeError, expected: bool) -> None:
    assert batch_size.ran_out(error) == expected


def test_two_small_batches_predict_the_largest_and_one_confirms_it() -> None:
    tried: list[int] = []

    def share(rows: int) -> float:
        tried.append(rows)
        return 0.1 + 0.004 * rows

    assert largest_rows(share, 10_000) == (225, pytest.approx(1.0))
    assert tried == [1, 3, 225]


def found(task: type[LightningModule], run: Path, manifests: Path, folder: Path, limit: float, **options: Any) -> Any:
    seed_everything(0, verbose=False)
    pretrains = task is HubertPretraining
    needed = {"num_clusters": 20, "final_dim": 16} if pretrains else {"layer_drop": 0.3, "freeze_steps": 5}
    model = task(encoder=DROPPING, optimizer=plain_adam, **needed, **options)
    data = data_of_task(task, manifests, run)
    data.max_duration, data.meter = None, Limited(model, limit)
    watch = Watch()
    trainer = bare_trainer(folder, max_steps=1, limit_val_batches=0, callbacks=[watch])
    trainer.fit(model, datamodule=data)
    return data, watch


class Watch(Callback):
    """Looks at everything that a search could change, before and after it."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        before = self.state(trainer, pl_module)
        trainer.datamodule.find_duration()  # type: ignore[attr-defined]
        for name, value in self.state(trainer, pl_module).items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
        assert all(parameter.grad is None for parameter in pl_module.parameters())

    def state(self, trainer: Trainer, task: Any) -> dict[str, Any]:
        return {
            "weights": {name: value.clone() for name, value in task.state_dict().items()},
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state()[1].copy(),  # type: ignore[index]  # noqa: NPY002
            "python": list(random.getstate()[1]),
            "optimizer": len(trainer.optimizers[0].state),
            "weight": task.global_batch._weight,
            "batches": len(task.global_batch._batches),
            "skipped": task.global_batch.skipped,
            "freeze_steps": getattr(task, "freeze_steps", 0),
            "training": [module.training for module in task.modules()],
            "log_every_n_steps": trainer.log_every_n_steps,  # type: ignore[attr-defined]
            "done": batches_trained(trainer),
        }


@pytest.mark.parametrize(("task", "limit"), [(HubertPretraining, 25e6), (CTCFinetuning, 6.5e6)])
def test_the_search_takes_real_steps_and_leaves_no_trace(
    task: type[LightningModule], limit: float, run: Path, manifests: Path, tmp_path: Path
) -> None:
    data, _ = found(task, run, manifests, tmp_path, limit)
    peaks = sorted(data.meter.peaks)
    rows = num_frames(seconds_to_samples(data.max_duration)) // (trial := data._trial()).frames
    assert rows > 3
    assert 3 <= len(peaks) <= 5
    assert peaks[-1] <= limit
    each = (peaks[-1] - peaks[0]) / (rows - 1)
    assert limit - peaks[-1] < 2 * each + 0.05 * limit  # nearly filled
    assert data.max_duration == num_samples(rows * trial.frames) / 16_000
    saving, _ = found(task, run, manifests, tmp_path, limit, activation_checkpointing=True)
    assert saving.max_duration > data.max_duration


def test_a_run_with_auto_takes_the_steps_of_one_that_is_given_the_same_seconds(
    run: Path, manifests: Path, tmp_path: Path
) -> None:
    def weights(max_duration: float | None) -> tuple[dict[str, torch.Tensor], float]:
        seed_everything(0, verbose=False)
        model = HubertPretraining(encoder=DROPPING, num_clusters=20, final_dim=16, optimizer=quick_adam)
        data = data_of_task(HubertPretraining, manifests, run)
        data.max_duration, data.meter = max_duration, Limited(model, 8e6)
        trainer = bare_trainer(tmp_path, max_steps=4, limit_val_batches=1)
        trainer.fit(model, datamodule=data)
        assert data.max_duration is not None
        return model.state_dict(), data.max_duration

    found, seconds = weights(None)
    given, _ = weights(seconds)
    for name, value in found.items():
        torch.testing.assert_close(value, given[name], rtol=0, atol=0)


@pytest.mark.slow
def test_a_resumed_run_keeps_what_was_found(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(output: Path, free: float, steps: int) -> str:
        monkeypatch.setattr(batch_size, "available_memory", lambda: free)
        iterations = f"--iterations=[{{features: mfcc, clusters: 20, max_frames: 2000, max_steps: {steps}}}]"
        auto = "--data.init_args.max_duration=auto"
        main(["fit", *SMOKE, *pretraining_options(manifests), iterations, auto, f"--output={output}"])
        return "".join(capsys.readouterr())

    fit(tmp_path / "whole", 60e6, 4)
    said = fit(tmp_path / "run", 60e6, 2)
    fit(tmp_path / "run", 10e9, 4)
    record = json.loads((tmp_path / "run" / "iteration1" / "record.json").read_text())
    checkpoints = [torch.load(tmp_path / name / "iteration1" / "last.ckpt") for name in ("whole", "run")]
    kept = checkpoints[1]["PretrainingData"]["max_duration"]
    assert kept == record["batch/seconds"] == checkpoints[0]["PretrainingData"]["max_duration"] < 87.5
    assert f"data.max_duration auto: {kept:.2f} s" in said
    for name, value in checkpoints[0]["state_dict"].items():
        torch.testing.assert_close(value, checkpoints[1]["state_dict"][name], rtol=0, atol=0)


def test_on_a_cpu_with_enough_memory_auto_is_the_default_of_the_recipe(
    run: Path, manifests: Path, tmp_path: Path
) -> None:
    data = TranscribedData(train=[manifests / "finetune.jsonl.gz"], max_duration="auto", num_workers=0)
    model = CTCFinetuning(encoder=TINY)
    bare_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(model, datamodule=data)
    trial = data._trial()
    assert data.max_duration is not None
    assert data.max_duration <= 200
    assert data.max_duration + trial.frames * 0.02 > min(200, trial.epoch * 0.02)


def test_an_evaluation_before_the_run_finds_nothing(run: Path, manifests: Path, tmp_path: Path) -> None:
    model = CTCFinetuning(encoder=TINY)
    data = data_of_task(CTCFinetuning, manifests, run)
    data.max_duration, data.meter = None, Limited(model, 6.5e6)
    bare_trainer(tmp_path, limit_val_batches=1).validate(model, datamodule=data, verbose=False)
    assert data.max_duration is None
    bare_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(model, datamodule=data)
    assert data.max_duration is not None
    assert data.meter.peaks


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="torch before 2.13 cannot forget a step")
@pytest.mark.parametrize("in_backward", [True, False])
def test_a_sharded_model_forgets_a_step_that_memory_ran_out_in(alone: None, in_backward: bool) -> None:
    mesh = init_device_mesh("cpu", (1,))
    layers, head = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), nn.Linear(4, 2)
    for part in (*layers, layers, head):
        fully_shard(part, mesh=mesh)
    task, rows = SimpleNamespace(encoder=layers, heads=[head], zero_grad=layers.zero_grad), torch.randn(3, 4)

    def gradients() -> list[torch.Tensor]:
        for part in (layers, head):
            part.zero_grad(set_to_none=True)
        head(layers(rows)).square().sum().backward()
        return [parameter.grad.full_tensor() for part in (layers, head) for parameter in part.parameters()]  # type: ignore[union-attr]

    def run_out(*arguments: object) -> None:
        raise torch.OutOfMemoryError("in a layer")

    middle = layers[1]
    hook = middle.register_full_backward_hook(run_out) if in_backward else middle.register_forward_hook(run_out)
    with pytest.raises(torch.OutOfMemoryError):
        gradients()
    hook.remove()
    batch_size._forget_step(task)
    after_failure = gradients()
    assert all(map(torch.equal, after_failure, gradients()))


@pytest.mark.parametrize("broken", [0.0, 1.0])
def test_a_fused_optimizer_scales_and_skips_the_step_of_a_sharded_model(alone: None, broken: float) -> None:
    torch.manual_seed(0)
    whole = nn.Linear(4, 3)
    sharded = copy.deepcopy(whole)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    for model in (whole, sharded):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        model(torch.ones(2, 4)).square().sum().backward()
        if model is whole and not broken:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad *= 0.5
        if model is sharded:
            scale_in_step(optimizer, torch.tensor(0.5))
            optimizer.found_inf = torch.tensor(broken)  # type: ignore[attr-defined]
        if model is sharded or not broken:
            optimizer.step()
    for expected, found in zip(whole.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(found.full_tensor(), expected)  # type: ignore[attr-defined]


def test_a_row_that_does_not_fit_is_refused_with_what_helps(run: Path, manifests: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set model\.init_args\.activation_checkpointing to true"):
        found(HubertPretraining, run, manifests, tmp_path, limit=1e5)


@pytest.mark.parametrize("kept", ["long", True, -1.0, [3]])
def test_a_duration_of_a_checkpoint_that_is_none_is_refused(kept: object) -> None:
    with pytest.raises(UserError, match="max_duration"):
        batch_size.kept_duration({"max_duration": kept})
