"""Lightning's contracts hold outside of the command line: a task is loaded, asked, tried, copied and exported."""

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, bare_trainer, data_of_task
from lightning import LightningModule
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import Tensor
from torch.utils.data import DataLoader

from hubert_lightning.data.manifest import read_manifest, write_manifest
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.training.batches import TranscribedBatches
from hubert_lightning.training.finetuning import CTCFinetuning
from hubert_lightning.training.pretraining import HubertPretraining
from hubert_lightning.training.restoring import ALLOWED
from hubert_lightning.training.sampler import BatchPlan

WAVEFORM = torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0)) / 10
INPUTS: dict[type[LightningModule], tuple[Tensor, Tensor]] = {
    HubertPretraining: (WAVEFORM, torch.arange(2 * 49).view(2, 49) % 3 == 0),
    CTCFinetuning: (WAVEFORM, torch.tensor([16_000, 12_000])),
}
both = pytest.mark.parametrize("task", [HubertPretraining, CTCFinetuning])


@pytest.fixture(scope="module")
def trained(
    run: Path, manifests: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[type[LightningModule], tuple[LightningModule, Path]]:
    """Of each task, a model that a plain Trainer has trained for two steps, and its checkpoint."""
    folder = tmp_path_factory.mktemp("plain")
    models: list[LightningModule] = [
        HubertPretraining(TINY, num_clusters=20, final_dim=16, temperature=0.2, normal_codewords=True),
        CTCFinetuning(encoder=TINY, layer_drop=0.3, freeze_steps=1),
    ]
    made = {}
    for model in models:
        trainer = bare_trainer(folder, max_steps=2)
        trainer.fit(model, datamodule=data_of_task(type(model), manifests, run))
        path = folder / f"{type(model).__name__}.ckpt"
        trainer.save_checkpoint(path)
        made[type(model)] = (model, path)
    return made


def outputs(model: LightningModule) -> list[Tensor]:
    with torch.no_grad():
        made = model.eval()(*INPUTS[type(model)])
    return [made] if isinstance(made, Tensor) else made[0]


@both
def test_load_from_checkpoint_needs_no_trainer_and_computes_what_was_trained(task: type, trained: dict) -> None:
    model, path = trained[task]
    loaded = task.load_from_checkpoint(path)  # type: ignore[attr-defined]
    assert loaded.training
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert dict(loaded.hparams) == dict(model.hparams)
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=0, atol=0)


@both
@pytest.mark.parametrize(
    "where",
    [
        {"map_location": None},
        {"map_location": torch.device("cpu"), "strict": None, "weights_only": None},
        {"map_location": {"cuda:0": "cpu"}, "hparams_file": "hparams.yaml"},
        {"map_location": lambda storage, location: storage},
        {"map_location": lambda storage, location: None},
    ],
    ids=["none", "device", "dict", "function", "default"],
)
def test_load_from_checkpoint_takes_the_arguments_of_lightnings(where: dict, task: type, trained: dict) -> None:
    model, path = trained[task]
    torch.testing.assert_close(task.load_from_checkpoint(path, **where).state_dict(), model.state_dict())  # type: ignore[attr-defined]
    names = inspect.signature(LightningModule.load_from_checkpoint).parameters.keys() - {"cls", "kwargs"}
    assert names <= inspect.signature(task.load_from_checkpoint).parameters.keys()  # type: ignore[attr-defined]


@both
def test_weights_go_to_the_device_of_map_location(task: type, trained: dict) -> None:
    asked = []

    def to_meta(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        asked.append(location)
        return torch.UntypedStorage(0, device="meta")

    for location in ("meta", {"cpu": "meta"}, to_meta):
        assert task.load_from_checkpoint(trained[task][1], location).device.type == "meta"  # type: ignore[attr-defined]
    assert asked == ["cpu"]


@both
def test_load_from_checkpoint_calls_the_hook_of_lightning(task: type, trained: dict, tmp_path: Path) -> None:
    path, loaded_steps = tmp_path / "skipped.ckpt", []
    torch.save(torch.load(trained[task][1], weights_only=True) | {"skipped_steps": 3.0}, path)

    class Inheriting(task):  # type: ignore[misc]
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_load_checkpoint(checkpoint)
            loaded_steps.append(checkpoint["global_step"])

    Inheriting.__name__ = task.__name__
    loaded = Inheriting.load_from_checkpoint(path)
    assert (loaded_steps, loaded.global_batch.skipped) == ([2], 3)
    assert loaded.trained_steps == 2
    for name, value in (("skipped_steps", "x"), ("skipped_steps", -1.0), ("global_step", "x")):
        torch.save(torch.load(path, weights_only=True) | {name: value}, tmp_path / "damaged.ckpt")
        with pytest.raises(ValueError, match=rf"damaged.ckpt: its {name} is .*, which must be an integer from 0 on"):
            task.load_from_checkpoint(tmp_path / "damaged.ckpt")  # type: ignore[attr-defined]


def test_arguments_that_are_given_replace_those_in_the_checkpoint(trained: dict) -> None:
    _, path = trained[HubertPretraining]
    loaded = HubertPretraining.load_from_checkpoint(path, optimizer=torch.optim.SGD, masked_weight=0.5)
    assert (loaded.optimizer, loaded.masked_weight, loaded.hparams["temperature"]) == (torch.optim.SGD, 0.5, 0.2)


def test_a_checkpoint_of_another_task_or_model_is_refused_by_name(trained: dict, tmp_path: Path) -> None:
    path = trained[CTCFinetuning][1]
    with pytest.raises(ValueError, match=r"CTCFinetuning.ckpt: its head.weight is \(29, 32\), in the model"):
        HubertPretraining.load_from_checkpoint(path)
    with pytest.raises(ValueError, match=r"CTCFinetuning.ckpt: warmup 0.9 and decay 0.5"):
        CTCFinetuning.load_from_checkpoint(path, warmup=0.9)
    with pytest.raises(ValueError, match=r"gone.ckpt"):
        CTCFinetuning.load_from_checkpoint(tmp_path / "gone.ckpt")


def test_every_argument_that_a_checkpoint_may_set_is_one_of_the_task() -> None:
    never = {"pretrained", "keep_head", "optimizer", "max_skipped", "compile", "activation_checkpointing"}
    for task in (HubertPretraining, CTCFinetuning):
        arguments = inspect.signature(task).parameters.keys()
        assert arguments - ALLOWED[task.__name__].keys() == never | ({"decoder"} & arguments)
        assert ALLOWED[task.__name__].keys() <= arguments


@both
def test_a_model_without_a_trainer_is_called_in_training_mode_and_every_part_learns(task: type, trained: dict) -> None:
    model = task.load_from_checkpoint(trained[task][1]).train()  # type: ignore[attr-defined]
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert all(name.startswith("encoder.convolutions.") for name in frozen)
    model.encoder.draw_kept = lambda generator=None: [True, True]
    made = model(*INPUTS[task])
    (made if isinstance(made, Tensor) else sum(part.sum() for part in made[0]) + made[1]).sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == frozen | ({"encoder.mask_embedding"} if task is CTCFinetuning else set())


@both
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_computes_the_same_and_learns_by_itself(
    task: type, copied: Callable[[LightningModule], LightningModule], trained: dict
) -> None:
    model = task.load_from_checkpoint(trained[task][1])  # type: ignore[attr-defined]
    twin = copied(model)
    torch.testing.assert_close(outputs(twin), outputs(model), rtol=0, atol=0)
    learning = [[parameter.requires_grad for parameter in module.parameters()] for module in (model, twin)]
    assert learning[0] == learning[1]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    torch.testing.assert_close(outputs(model), outputs(trained[task][0]), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "training"), [(HubertPretraining, False), (CTCFinetuning, True)])
def test_to_onnx_writes_a_graph_of_evaluation(task: type, training: bool, trained: dict, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    dropping = (
        {"dropout": 0.1} if task is CTCFinetuning else {"encoder": EncoderConfig(**vars(TINY) | {"dropout": 0.1})}
    )
    model = task.load_from_checkpoint(trained[task][1], **dropping)  # type: ignore[attr-defined]
    expected = outputs(model)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train(training).to_onnx(tmp_path / "model.onnx", INPUTS[task], verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    given = {node.name: value.numpy() for node, value in zip(session.get_inputs(), INPUTS[task], strict=True)}
    torch.testing.assert_close(torch.from_numpy(session.run(None, given)[0]), expected, rtol=1e-4, atol=1e-4)


@both
def test_a_summary_counts_every_parameter(task: type, trained: dict) -> None:
    model = task.load_from_checkpoint(trained[task][1])  # type: ignore[attr-defined]
    summary = ModelSummary(model, max_depth=-1)
    assert summary.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert "encoder.layers.1.ffn_output" in str(summary)


@both
def test_a_plain_trainer_resumes_from_a_plain_trainers_checkpoint(
    task: type, trained: dict, manifests: Path, run: Path, tmp_path: Path
) -> None:
    model = task.load_from_checkpoint(trained[task][1])  # type: ignore[attr-defined]
    trainer = bare_trainer(tmp_path, max_steps=3)
    trainer.fit(model, datamodule=data_of_task(task, manifests, run), ckpt_path=trained[task][1], weights_only=True)
    assert trainer.global_step == 3
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@both
def test_a_plain_trainer_validates_the_weights_of_the_checkpoint(
    task: type, trained: dict, manifests: Path, run: Path, tmp_path: Path
) -> None:
    def losses(model: LightningModule, **how: Any) -> dict[str, float]:
        data = data_of_task(task, manifests, run)
        [metrics] = bare_trainer(tmp_path).validate(model, datamodule=data, verbose=False, **how)
        return dict(metrics)

    path, expected = trained[task][1], losses(task.load_from_checkpoint(trained[task][1]))  # type: ignore[attr-defined]
    fresh = {"num_clusters": 20, "final_dim": 16, "temperature": 0.2} if task is HubertPretraining else {}
    assert losses(task(encoder=TINY, **fresh), ckpt_path=path, weights_only=True) == pytest.approx(expected)


def test_the_users_own_dataloader_is_validated_tested_and_predicted(
    trained: dict, manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = CTCFinetuning.load_from_checkpoint(trained[CTCFinetuning][1])
    cuts = read_manifest(manifests / "dev.jsonl.gz")
    batches = TranscribedBatches(cuts, model.vocabulary)
    loader = DataLoader([batches[BatchPlan((0, 1), seed=0)], batches[BatchPlan((2,), seed=0)]], batch_size=None)
    trainer = bare_trainer(tmp_path)
    [validated], [tested] = trainer.validate(model, loader, verbose=False), trainer.test(model, loader, verbose=False)
    assert validated["val/wer"] == tested["test/wer"]
    words = trainer.predict(model, loader)
    assert words is not None
    assert [len(batch) for batch in words] == [2, 1]
    with torch.no_grad():
        log_probs = model.eval()(batches[BatchPlan((2,), seed=0)].waveform, batches[BatchPlan((2,), seed=0)].length)
    assert words[1] == model.search(log_probs, torch.tensor([log_probs.shape[1]]), model.vocabulary)


@both
def test_another_order_of_manifests_is_refused_where_batches_are_planned_already(
    task: type, trained: dict, manifests: Path, run: Path, tmp_path: Path
) -> None:
    data = data_of_task(task, manifests, run)
    more = manifests / ("finetune.jsonl.gz" if task is CTCFinetuning else "train.jsonl.gz")
    other = tmp_path / "other.jsonl.gz"
    cuts = list(read_manifest(more))
    write_manifest(cuts[:2], tmp_path / "first.jsonl.gz")
    write_manifest(cuts[2:], other)
    data.manifests["train"] = [tmp_path / "first.jsonl.gz", other]
    trainer = bare_trainer(tmp_path, max_steps=1)
    trainer.fit(task.load_from_checkpoint(trained[task][1]), datamodule=data)  # type: ignore[attr-defined]
    state = data.state_dict()
    data.load_state_dict(state)  # of the same order
    state["train"].reverse()
    with pytest.raises(ValueError, match=rf"in another order, .* give data.train as \[{other}, {tmp_path / 'first'}"):
        data.load_state_dict(state)
    trainer.fit_loop._combined_loader = None  # as other strategies have it when they read a checkpoint
    data.load_state_dict(state)
    assert data.manifests["train"] == [other, tmp_path / "first.jsonl.gz"]


@both
def test_a_fit_without_a_number_of_steps_is_refused(task: type, run: Path, manifests: Path, tmp_path: Path) -> None:
    model = CTCFinetuning(encoder=TINY) if task is CTCFinetuning else HubertPretraining(TINY, 20, 16)
    trainer = bare_trainer(tmp_path, max_steps=-1, max_time="00:00:01:00")
    with pytest.raises(ValueError, match=r"the learning-rate schedule needs the number of steps .*max_steps"):
        trainer.fit(model, datamodule=data_of_task(task, manifests, run))


@both
def test_overfit_batches_is_refused(task: type, run: Path, manifests: Path, tmp_path: Path) -> None:
    model = CTCFinetuning(encoder=TINY) if task is CTCFinetuning else HubertPretraining(TINY, 20, 16)
    with pytest.raises(ValueError, match=r"overfit_batches is 2, which would replace our plan of batches"):
        bare_trainer(tmp_path, max_steps=1, overfit_batches=2).fit(model, datamodule=data_of_task(task, manifests, run))


@both
def test_data_without_a_trainer_is_refused_with_what_it_needs(task: type, run: Path, manifests: Path) -> None:
    data = data_of_task(task, manifests, run)
    if task is HubertPretraining:
        data.setup("fit")
    for ask in (data.train_dataloader, *([lambda: data.setup("fit")] if task is CTCFinetuning else [])):
        with pytest.raises(ValueError, match=r"Data: its batches depend on the model, .* call trainer.fit"):
            ask()


@both
def test_data_is_pickled_after_a_fit(task: type, run: Path, manifests: Path, tmp_path: Path) -> None:
    model = CTCFinetuning(encoder=TINY) if task is CTCFinetuning else HubertPretraining(TINY, 20, 16)
    data = data_of_task(task, manifests, run)
    bare_trainer(tmp_path, max_steps=1).fit(model, datamodule=data)
    assert pickle.loads(pickle.dumps(data)).manifests == data.manifests
