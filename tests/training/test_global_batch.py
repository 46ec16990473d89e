from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import plain_adam, pretraining_batch, pretraining_model, summed_as_in_fairseq
from lightning import Trainer
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from hubert_lightning.training.batches import PretrainingBatch
from hubert_lightning.training.global_batch import GlobalBatch, build_optimizer, check_finite
from hubert_lightning.training.pretraining import HubertPretraining


def trained(
    model: HubertPretraining, batches: Sequence[PretrainingBatch], folder: Path, **options: object
) -> dict[str, Tensor]:
    """The weights after one epoch of these batches."""
    trainer = Trainer(
        default_root_dir=folder,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,  # type: ignore[arg-type]
    )
    trainer.fit(model, DataLoader(list(batches), batch_size=None, collate_fn=lambda batch: batch))
    return model.state_dict()


def plain_sgd(parameters: object) -> SGD:
    return SGD(parameters, lr=1.0)  # type: ignore[arg-type]


def fused_adam(parameters: object) -> AdamW:
    return AdamW(parameters, lr=1e-3, fused=True)  # type: ignore[arg-type]


def mean_gradient(model: HubertPretraining, batches: Sequence[PretrainingBatch]) -> dict[str, Tensor]:
    """Of the sum of all batches' losses, divided by the number of frames that they count for."""
    totals, frames_counted = zip(*(summed_as_in_fairseq(model, batch) for batch in batches), strict=True)
    (torch.stack(totals).sum() / sum(frames_counted)).backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }
    model.zero_grad()
    return gradients


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.2, 0.0])
@pytest.mark.parametrize("clip", [None, 0.1, 100.0])
def test_every_frame_of_the_accumulated_batches_weighs_as_in_the_reference(
    clip: float | None, alpha: float, tmp_path: Path
) -> None:
    batches = [
        pretraining_batch(0, masked=5),
        pretraining_batch(1, masked=30, frames=60),
        pretraining_batch(2, masked=17),
    ]
    model = pretraining_model(optimizer=plain_sgd, warmup_steps=0, masked_weight=alpha)
    before = {name: value.clone() for name, value in model.named_parameters()}
    gradients = mean_gradient(model, batches)
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    shrunk = min(1.0, (clip or torch.inf) / norm)
    assert (shrunk < 1) == (clip == 0.1)
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": clip}
    after = trained(model, batches, tmp_path, **options)
    for name, gradient in gradients.items():
        torch.testing.assert_close(after[name], before[name] - shrunk * gradient, msg=name)


def test_gradients_are_clipped_by_value_after_they_are_averaged(tmp_path: Path) -> None:
    batches = [pretraining_batch(0, masked=5), pretraining_batch(1, masked=30)]
    model = pretraining_model(optimizer=plain_sgd, warmup_steps=0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    gradients = mean_gradient(model, batches)
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-2, "gradient_clip_algorithm": "value"}
    after = trained(model, batches, tmp_path, **options)
    for name, gradient in gradients.items():
        torch.testing.assert_close(after[name], before[name] - gradient.clamp(-1e-2, 1e-2), msg=name)


def test_the_norms_of_the_parts_are_those_of_the_mean_gradient_before_clipping(tmp_path: Path) -> None:
    batches = [pretraining_batch(0, masked=5), pretraining_batch(1, masked=30)]
    model = pretraining_model(optimizer=plain_sgd, warmup_steps=0)
    gradients = mean_gradient(model, batches)
    trained(model, batches, tmp_path, accumulate_grad_batches=2, gradient_clip_val=1e-2)
    logged = model.trainer.callback_metrics
    parts = {
        "_convolutions": [name for name in gradients if name.startswith("encoder.convolutions.")],
        "_head": [name for name in gradients if name.startswith("predictors.")],
        "": list(gradients),
    }
    known = {*parts["_convolutions"], *parts["_head"]}
    parts["_transformer"] = [name for name in gradients if name not in known]
    for part, names in parts.items():
        norm = torch.nn.utils.get_total_norm([gradients[name] for name in names])
        torch.testing.assert_close(logged[f"train/gradient_norm{part}"], norm, msg=part)


@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 1e-3}, {"gradient_clip_val": 1e-5, "by_value": True}])
def test_a_fused_optimizer_takes_the_steps_of_one_that_is_not(clip: dict[str, Any], tmp_path: Path) -> None:
    clip = dict(clip)
    algorithm = "value" if clip.pop("by_value", False) else "norm"
    batches, weights = [pretraining_batch(seed) for seed in range(6)], []
    for fused in (True, False):
        optimizer = partial(SGD, lr=0.1, momentum=0.9, fused=fused)
        model = pretraining_model(optimizer=optimizer, warmup_steps=0)
        options = {**clip, "gradient_clip_algorithm": algorithm, "accumulate_grad_batches": 2}
        weights.append(trained(model, batches, tmp_path, **options))
    torch.testing.assert_close(weights[0], weights[1])


def broken(batch: PretrainingBatch, name: str) -> PretrainingBatch:
    return batch._replace(waveform=torch.full_like(batch.waveform, torch.nan), id=(name, "whole"))


@pytest.mark.parametrize("optimizer", [plain_sgd, plain_adam, fused_adam])
def test_a_skipped_step_leaves_no_trace(optimizer: Callable[[object], Optimizer], tmp_path: Path) -> None:
    def constant_rate() -> HubertPretraining:
        model = pretraining_model()
        model.configure_optimizers = lambda: optimizer(model.parameters())  # type: ignore[method-assign]
        return model

    good = [pretraining_batch(seed) for seed in range(4)]
    kept = trained(constant_rate(), good, tmp_path)
    model = constant_rate()
    after = trained(model, [good[0], broken(good[1], "bad"), good[1], broken(good[0], "bad"), *good[2:]], tmp_path)
    assert model.global_batch.skipped == 2
    for name, value in kept.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, msg=name)


def test_too_many_consecutive_skipped_steps_end_training_with_the_ids_of_the_utterances(tmp_path: Path) -> None:
    model = pretraining_model(optimizer=fused_adam, warmup_steps=0, max_skipped=3)
    batches = [
        broken(pretraining_batch(0), "a"),
        pretraining_batch(1),
        *(broken(pretraining_batch(k), f"bad{k}") for k in range(2, 9)),
    ]
    sentence = r"skipped 3 steps in a row because the loss was not finite \(last on rank 0, utterances bad4, whole\)"
    with pytest.raises(ValueError, match=sentence):
        trained(model, batches, tmp_path)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_one_broken_batch_of_an_accumulated_step_skips_the_whole_step(tmp_path: Path) -> None:
    model = pretraining_model(optimizer=fused_adam, warmup_steps=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = trained(
        model, [pretraining_batch(0), broken(pretraining_batch(1), "bad")], tmp_path, accumulate_grad_batches=2
    )
    assert model.global_batch.skipped == 1
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)


def test_at_least_one_step_may_fail() -> None:
    with pytest.raises(ValueError, match="max_skipped is 0"):
        GlobalBatch(0)


def test_a_fused_optimizer_with_scaled_float16_gradients_is_refused() -> None:
    model = pretraining_model()
    precision = SimpleNamespace(scaler=object())
    model.trainer = SimpleNamespace(strategy=None, precision_plugin=precision, precision="16-mixed")  # type: ignore
    with pytest.raises(ValueError, match="precision 16-mixed with a fused AdamW: its gradients cannot be clipped"):
        build_optimizer(model, fused_adam)
    assert isinstance(build_optimizer(model, plain_adam), AdamW)


def test_a_model_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    model = pretraining_model()
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    model.trainer = trainer
    model.encoder.get_parameter("mask_embedding").data[0] = torch.nan
    with pytest.raises(ValueError, match="starts again, since no checkpoint was saved; or start a run"):
        check_finite(model)
    (tmp_path / "last.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"resumes from the checkpoint before, {tmp_path / 'last.ckpt'}; or start a"):
        check_finite(model)
