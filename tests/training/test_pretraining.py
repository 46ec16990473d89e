from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, logging_trainer, pretraining_batch, pretraining_data, pretraining_model, summed_as_in_fairseq
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import AdamW

from hubert_lightning.data.manifest import read_manifest, write_manifest
from hubert_lightning.pretrained.load import load_encoder
from hubert_lightning.training.pretraining import HubertPretraining
from hubert_lightning.training.pretraining_data import PretrainingData
from hubert_lightning.training.relabelling import Relabel
from hubert_lightning.units.label_store import LabelStore


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("alpha", [1.0, 0.8, 0.5, 0.2, 0.0])
def test_the_loss_weighs_masked_and_unmasked_frames_as_the_reference_does(alpha: float, streams: int) -> None:
    model = pretraining_model(masked_weight=alpha, num_clusters=[20, 7][:streams])
    batch = pretraining_batch(streams=streams, clusters=7)
    total, frames_counted = summed_as_in_fairseq(model, batch)
    expected = total / frames_counted
    loss, metrics = model._step(batch, every_frame=True)
    torch.testing.assert_close(loss, expected)
    alone = model._step(batch, every_frame=False)[0]
    torch.testing.assert_close(alone, expected)
    names, parameters = zip(*model.named_parameters(), strict=True)
    losses, options = (alone, expected), {"allow_unused": True, "retain_graph": True}
    gradients = (torch.autograd.grad(loss, parameters, **options) for loss in losses)
    for name, gradient, reference in zip(names, *gradients, strict=True):
        assert (gradient is None) == (reference is None)
        if reference is not None:
            torch.testing.assert_close(gradient, reference, msg=name)

    frames = model.encoder.contextual(model.encoder.local_features(batch.waveform), mask=batch.mask)
    for name, mask in (("masked", batch.mask), ("unmasked", ~batch.mask)):
        of_streams = [
            F.cross_entropy(predictor(frames[mask]), cluster[mask])
            for predictor, cluster in zip(model.predictors, batch.cluster.unbind(dim=1), strict=True)
        ]
        torch.testing.assert_close(metrics[f"{name}_loss"], torch.stack(of_streams).sum().detach())


def test_accuracies_count_the_frames_they_are_named_for() -> None:
    model, batch = pretraining_model(), pretraining_batch()
    [logits], _ = model(batch.waveform, batch.mask)
    known = logits.argmax(dim=-1)
    half = torch.where(batch.mask, known, (known + 1) % 20)  # right at masked frames only
    half = batch._replace(cluster=half[:, None])
    _, metrics = model._step(half, every_frame=True)
    assert metrics["masked_accuracy"] == 1
    assert metrics["unmasked_accuracy"] == 0


def test_the_losses_of_an_ensembles_streams_add_up() -> None:
    model, batch = pretraining_model(num_clusters=[20, 7], masked_weight=0.5), pretraining_batch(streams=2, clusters=7)
    local = model.encoder.local_features(batch.waveform)
    frames = model.encoder.contextual(local, mask=batch.mask)
    expected = 10 * local.square().mean()
    for predictor, cluster in zip(model.predictors, batch.cluster.unbind(dim=1), strict=True):
        expected = expected + 0.5 * F.cross_entropy(predictor(frames).flatten(0, 1), cluster.flatten())
    torch.testing.assert_close(model._step(batch, every_frame=False)[0], expected)
    assert model.num_clusters == [20, 7]


def test_a_pretrained_encoder_is_trained_further_under_a_new_head(tmp_path: Path) -> None:
    trained = pretraining_model()
    path = tmp_path / "trained.ckpt"
    torch.save({"state_dict": trained.state_dict(), "hyper_parameters": dict(trained.hparams)}, path)
    model = HubertPretraining(encoder=TINY, num_clusters=5, final_dim=16, pretrained=path)
    for name, weight in trained.encoder.state_dict().items():
        torch.testing.assert_close(model.encoder.state_dict()[name], weight)
    assert "pretrained" not in model.hparams
    with pytest.raises(ValueError, match="its encoder has dim 32, the one to train 48"):
        HubertPretraining(encoder=replace(TINY, dim=48), pretrained=path)


def test_a_masked_weight_above_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"masked_weight is 1\.5"):
        HubertPretraining(encoder=TINY, masked_weight=1.5)


def test_defaults_are_the_papers_base_iteration_1() -> None:
    model = HubertPretraining()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert round(total / 1e6, 2) == 94.59  # torchaudio hubert_pretrain_base(num_classes=100)
    optimizer = model.optimizer(model.parameters())
    assert isinstance(optimizer, AdamW)
    assert optimizer.defaults["lr"] == 5e-4
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert (model.predictors[0].temperature, model.feature_penalty) == (0.1, 10)


def test_the_learning_rate_warms_up_for_8_percent_of_the_steps_unless_their_number_is_given() -> None:
    for steps, expected in ((250_000, 20_000), (400_000, 32_000), (100_000, 8_000)):
        model = pretraining_model()
        model.trainer = Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False)
        rate = model.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
        assert [rate(step) for step in (0, expected // 2, expected, steps)] == [0, 0.5, 1, 0]
        for options, number in (({"warmup_steps": 7}, 7), ({"warmup_steps": 0}, 0), ({"warmup": 0.5}, steps // 2)):
            other = pretraining_model(**options)
            other.trainer = model.trainer
            assert other.warmup_steps == number


def test_a_warm_up_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup is 32000; it is a fraction from 0 to 1"):
        pretraining_model(warmup=32_000)
    with pytest.raises(ValueError, match="warmup_steps is -1; it is a number of steps"):
        pretraining_model(warmup_steps=-1)


def fast_adam(parameters: object) -> AdamW:
    return AdamW(parameters, lr=3e-3)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_tiny_model_learns_to_predict_masked_and_unmasked_frames(manifests: Path, tmp_path: Path) -> None:
    cuts = sorted(read_manifest(manifests / "train.jsonl.gz"), key=lambda cut: cut.duration)[:8]
    write_manifest(cuts, tmp_path / "few.jsonl.gz")
    model = pretraining_model(normal_codewords=True, masked_weight=0.5, optimizer=fast_adam, warmup_steps=20)
    data = pretraining_data(manifests, num_workers=0, train=[tmp_path / "few.jsonl.gz"])
    logging_trainer(tmp_path, 300, val_check_interval=300, check_val_every_n_epoch=None).fit(model, datamodule=data)
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]

    def last(name: str) -> float:
        values = [float(row[rows[0].index(name)]) for row in rows[1:] if row[rows[0].index(name)]]
        return sum(values[-20:]) / 20

    [histogram] = LabelStore(tmp_path / "labels").histogram
    share = histogram / histogram.sum()
    entropy = -(share * np.log(share)).sum()  # the loss of knowing how common each cluster is, and no more
    assert last("train/unmasked_accuracy") > 1.5 * share.max()
    assert last("train/unmasked_loss") < entropy / 2
    assert last("train/masked_loss") < entropy - 0.3
    logged = set(rows[0])
    parts = {"loss", "masked_loss", "unmasked_loss", "feature_penalty", "masked_accuracy", "unmasked_accuracy"}
    rest = {"masked_fraction", "label_clusters", "predicted_clusters", "learning_rate", "gradient_norm"}
    assert {f"train/{name}" for name in parts | rest | {"skipped_steps"}} <= logged
    assert last("train/skipped_steps") == 0
    assert {f"val/{name}" for name in ("loss", "masked_accuracy", "unmasked_accuracy")} <= logged
    assert {
        f"units/{whose}_{what}" for whose in ("label", "predicted") for what in ("coverage", "perplexity")
    } <= logged


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_stop_and_resume_equals_an_uninterrupted_run(manifests: Path, tmp_path: Path, num_workers: int) -> None:
    whole = pretraining_model(optimizer=fast_adam, warmup_steps=2)
    trainer = logging_trainer(tmp_path, 12)
    trainer.callbacks.append(ModelCheckpoint(tmp_path, "half", every_n_train_steps=7, save_top_k=-1))  # type: ignore[attr-defined]
    trainer.fit(whole, datamodule=pretraining_data(manifests, num_workers=num_workers))
    second = pretraining_model(optimizer=fast_adam, warmup_steps=2)
    rest = logging_trainer(tmp_path, 12)
    data = pretraining_data(manifests, num_workers=num_workers)
    rest.fit(second, datamodule=data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for (name, expected), weight in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=0, msg=name)


def test_its_checkpoint_opens_as_an_encoder(manifests: Path, tmp_path: Path) -> None:
    model = pretraining_model()
    trainer = logging_trainer(tmp_path, 1)
    trainer.fit(model, datamodule=pretraining_data(manifests, num_workers=0))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    waveform = torch.randn(2, 8000)
    torch.testing.assert_close(load_encoder(tmp_path / "model.ckpt")(waveform), model.eval().encoder(waveform))


def test_data_without_labels_is_refused_with_the_way_to_get_them(manifests: Path, tmp_path: Path) -> None:
    trainer = logging_trainer(tmp_path, 1)
    trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, Relabel)]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"no labels to train on; add an entry to iterations"):
        trainer.fit(pretraining_model(), datamodule=pretraining_data(manifests, num_workers=0))


def test_data_that_is_all_too_short_is_refused(manifests: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no utterance lasts min_duration 100 s or more"):
        logging_trainer(tmp_path, 1).fit(
            pretraining_model(), datamodule=pretraining_data(manifests, num_workers=0, min_duration=100)
        )


def test_an_utterance_in_train_and_validation_is_refused(manifests: Path) -> None:
    both = [manifests / "train.jsonl.gz"]
    with pytest.raises(ValueError, match="among the training and the validation utterances"):
        PretrainingData(train=both, validation=both).setup("fit")


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, np.inf], [np.nan, 1.0]])
def test_weights_that_do_not_fit_the_manifests_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"data\.weights .* for 2 manifests in data\.train; give each one above 0"):
        PretrainingData(train=[Path("a.jsonl.gz"), Path("b.jsonl.gz")], weights=weights)


def test_a_fit_mixes_its_corpora_by_weight(manifests: Path, tmp_path: Path) -> None:
    both = [manifests / "train.jsonl.gz", manifests / "dev.jsonl.gz"]
    data = pretraining_data(manifests, num_workers=0, train=both, validation=None, weights=[1, 3], min_duration=0.5)
    trainer = logging_trainer(tmp_path, 1)
    trainer.fit(pretraining_model(), datamodule=data)
    sampler = data.train_dataloader().sampler
    drawn = np.array([cut for plan in sampler.plan(0) for cut in plan.cuts])  # type: ignore[attr-defined]
    samples = data.train_cuts.num_samples
    share = samples[drawn[drawn >= data.train_cuts.sizes[0]]].sum() / samples[drawn].sum()
    assert share == pytest.approx(0.75, abs=0.1)  # a long utterance is a tenth of so small a corpus
