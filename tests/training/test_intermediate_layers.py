from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, logging_trainer, pretraining_batch, pretraining_data, pretraining_model
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from hubert_lightning.errors import UserError
from hubert_lightning.model import compilation
from hubert_lightning.model.flops import head_operations
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.load import load_encoder
from hubert_lightning.training.batches import PretrainingBatch
from hubert_lightning.training.metrics_table import read_metrics
from hubert_lightning.training.pretraining import HubertPretraining

DEEP = replace(TINY, num_layers=4)


def by_hand(model: HubertPretraining, batch: PretrainingBatch, kept: list[bool]) -> Tensor:
    """The loss of ILS-SSL, layer by layer, with masks in place of gathered frames."""
    local = model.encoder.local_features(batch.waveform)
    x, bias, positions = model.encoder._transformer_input(local, None, batch.mask)
    total = torch.zeros(())
    for number, layer in enumerate(model.encoder.layers, start=1):
        x = layer(x, bias, positions) if kept[number - 1] else x
        last = number == len(model.encoder.layers)
        if not last and str(number) not in model.intermediate_predictors:
            continue
        predictors = model.predictors if last else model.intermediate_predictors[str(number)]
        frames = model.encoder.norm(x) if last and model.encoder.config.pre_norm else x
        assert isinstance(predictors, nn.ModuleList)
        for predictor, cluster in zip(predictors, batch.cluster.unbind(dim=1), strict=True):
            of_frames = F.cross_entropy(predictor(frames).flatten(0, 1), cluster.flatten(), reduction="none")
            weights = torch.where(batch.mask, model.masked_weight, 1 - model.masked_weight)
            total = total + (of_frames * weights.flatten()).sum()
    counted = batch.mask.numel() if model.masked_weight < 1 else int(batch.mask.sum())
    return total / counted + model.feature_penalty * local.square().mean()


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize(("alpha", "streams"), [(1.0, 1), (0.5, 2)])
@pytest.mark.parametrize("kept", [[True] * 4, [True, False, True, False]])
def test_the_losses_of_intermediate_layers_add_up_also_of_skipped_ones(
    pre_norm: bool, alpha: float, streams: int, kept: list[bool]
) -> None:
    encoder = replace(DEEP, pre_norm=pre_norm)
    clusters = [20, 7][:streams]
    model = pretraining_model(encoder=encoder, num_clusters=clusters, masked_weight=alpha, intermediate_layers=[2, 1])
    batch = pretraining_batch(streams=streams, clusters=7)
    expected = by_hand(model, batch, kept)
    loss, metrics = model._step(batch, kept, every_frame=True)
    torch.testing.assert_close(loss, expected)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = [torch.autograd.grad(one, parameters, allow_unused=True) for one in (loss, expected)]
    for name, gradient, reference in zip(names, *gradients, strict=True):
        gradient = torch.zeros(()) if gradient is None else gradient  # a skipped layer has none, or zeros
        reference = torch.zeros_like(gradient) if reference is None else reference
        torch.testing.assert_close(gradient, reference.expand_as(gradient), msg=name)
    assert {name for name in metrics if "layer" in name} == {
        f"{part}_{measure}_layer{layer}"
        for part in ("masked", "unmasked")
        for measure in ("loss", "accuracy")
        for layer in (1, 2)
    }


def test_the_outputs_of_layers_are_those_of_the_encoder_and_of_a_skipped_layer_its_input() -> None:
    encoder, waveform = HubertEncoder(DEEP).eval(), torch.randn(2, 8000)
    layers = encoder.all_layers(waveform)
    local = encoder.local_features(waveform)
    second, last = encoder.contextual_layers(local, intermediate=[2])
    torch.testing.assert_close(second, layers[1])
    torch.testing.assert_close(last, layers[3])
    skipped = encoder.contextual_layers(local, kept=[True, False, True, True], intermediate=[1, 2])
    torch.testing.assert_close(skipped[1], skipped[0])


def test_an_intermediate_predictor_makes_no_difference_to_the_last_layers() -> None:
    torch.manual_seed(0)
    plain = pretraining_model(encoder=DEEP)
    torch.manual_seed(0)
    supervised = pretraining_model(encoder=DEEP, intermediate_layers=[2])
    state = supervised.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(state.pop(name), value), name
    assert set(state) == {
        f"intermediate_predictors.2.0.{name}" for name in ("projection.weight", "projection.bias", "codewords")
    }
    batch = pretraining_batch()
    for name in ("masked_loss", "unmasked_accuracy"):
        values = [model._step(batch, every_frame=True)[1][name] for model in (plain, supervised)]
        assert torch.equal(*values), name
    heads = head_operations(32, plain.hparams["final_dim"], plain.num_clusters, batch.mask.numel())
    assert supervised.operations(batch) - plain.operations(batch) <= len(batch.mask) * heads


def test_layers_are_trained_logged_resumed_and_their_encoder_loaded(tmp_path: Path, manifests: Path) -> None:
    def model() -> HubertPretraining:
        torch.manual_seed(0)
        encoder = replace(DEEP, layer_drop=0.3)
        return pretraining_model(encoder=encoder, intermediate_layers=[1, 3], masked_weight=0.5)

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    trained = model()
    trainer = logging_trainer(whole, 4)
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer.callbacks.append(saved)  # type: ignore[attr-defined]  # undeclared
    trainer.fit(trained, pretraining_data(manifests))
    path = tmp_path / "step=2.ckpt"
    again = model()
    logging_trainer(resumed, 4).fit(again, pretraining_data(manifests), ckpt_path=path)
    for name, value in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    metrics = read_metrics(whole)
    assert {"train/masked_loss_layer1", "train/masked_accuracy_layer3", "train/unmasked_loss_layer3"} <= set(metrics)
    restored = HubertPretraining.load_from_checkpoint(path)
    assert list(restored.intermediate_predictors) == ["1", "3"]
    assert load_encoder(path).config.num_layers == 4


@pytest.mark.slow
@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_compiled_model_has_the_losses_and_gradients_of_intermediate_layers_and_streams(
    pre_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")  # traces as inductor does, and compiles at once
    torch._dynamo.reset()
    settings = {"encoder": replace(DEEP, pre_norm=pre_norm), "num_clusters": [20, 7], "intermediate_layers": [1, 3]}
    plain, compiled = pretraining_model(**settings), pretraining_model(**settings, compile=True)
    compiled.load_state_dict(plain.state_dict())
    compiled.configure_model()
    for seed, kept in ((0, [True] * 4), (1, [True, False, False, True])):
        batch = pretraining_batch(seed, streams=2, clusters=7)
        losses = [model._step(batch, kept, every_frame=True)[0] for model in (plain, compiled)]
        torch.testing.assert_close(*losses)
        gradients = [
            torch.autograd.grad(loss, [*model.parameters()], allow_unused=True, materialize_grads=True)
            for loss, model in zip(losses, (plain, compiled), strict=True)
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_the_predictors_of_intermediate_layers_are_kept_with_the_head(tmp_path: Path, pre_norm: bool) -> None:
    encoder, settings = replace(DEEP, pre_norm=pre_norm), {"num_clusters": [20, 7], "intermediate_layers": [1, 3]}
    torch.manual_seed(1)
    trained = pretraining_model(encoder=encoder, **settings)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": trained.state_dict(), "hyper_parameters": dict(trained.hparams)}, path)
    torch.manual_seed(2)
    kept = HubertPretraining(encoder, final_dim=16, pretrained=path, keep_head=True, **settings)
    for name, value in trained.state_dict().items():
        assert torch.equal(kept.state_dict()[name], value), name
    fresh = HubertPretraining(encoder, final_dim=16, pretrained=path, **settings)
    assert not torch.equal(
        fresh.intermediate_predictors["1"][0].codewords, trained.intermediate_predictors["1"][0].codewords
    )
    fewer = HubertPretraining(encoder, [20, 7], 16, pretrained=path, keep_head=True, intermediate_layers=[3])
    assert [*fewer.intermediate_predictors] == ["3"]


def test_layers_whose_predictors_a_checkpoint_lacks_start_from_random_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    trained = pretraining_model(encoder=DEEP, num_clusters=[20, 7], intermediate_layers=[3])
    path = tmp_path / "last.ckpt"
    saved = {"state_dict": trained.state_dict(), "hyper_parameters": dict(trained.hparams)}
    torch.save(saved, path)

    def kept() -> HubertPretraining:
        torch.manual_seed(2)
        return HubertPretraining(
            DEEP, [20, 7], 16, pretrained=path, keep_head=True, intermediate_layers=[1, 2, 3], temperature=0.1
        )

    states = kept().state_dict()
    for name, value in trained.state_dict().items():
        assert torch.equal(states[name], value), name
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: has no predictors of layers 1, 2, which start from random weights"
    ]
    second = "intermediate_predictors.3.1."
    del saved["hyper_parameters"]["num_clusters"]
    saved["state_dict"] = {name: value for name, value in trained.state_dict().items() if not name.startswith(second)}
    torch.save(saved | {"hyper_parameters": dict(trained.hparams)}, path)
    with pytest.raises(UserError, match=r"has 1 predictor of layer 3, the model to train 2; leave keep_head out"):
        kept()


@pytest.mark.parametrize(
    ("layers", "words"),
    [([4], "is the last"), ([5], "1 to 3, not layer 5"), ([0], "not layer 0"), ([2, 2], "named twice")],
)
def test_layers_that_cannot_be_supervised_are_refused(layers: list[int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        pretraining_model(encoder=DEEP, intermediate_layers=layers)
