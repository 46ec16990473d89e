"""mHuBERT of 25 Hz: an encoder with a batch norm before its positional convolution, whose statistics are fixed."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign_models import (
    LENGTHS,
    NORMS,
    assert_layers_equal,
    fairseq_settings,
    fairseq_state,
    of_transformers,
    save_ours,
    small_config,
)
from helpers import AT_25_HZ, TINY, bare_trainer, pretraining_batch, pretraining_data, pretraining_model
from torch.testing import assert_close

from hubert_lightning.errors import UserError
from hubert_lightning.features.extractors import combined_extractor
from hubert_lightning.frames import Clock, num_frames
from hubert_lightning.interchange.import_export import export_model, import_model
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.model.positions import FixedBatchNorm
from hubert_lightning.planning.workload import Workload, num_parameters
from hubert_lightning.pretrained.load import encoder_fingerprint, load_encoder, load_hubert, read_weights
from hubert_lightning.pretrained.weights import PretrainedWeights
from hubert_lightning.training.pretraining import HubertPretraining
from hubert_lightning.training.relabelling import Relabel


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def config_of(norm: str) -> EncoderConfig:
    """As slprl/mhubert-base-25hz: an eighth convolution, and a batch norm."""
    return replace(small_config(norm), **AT_25_HZ, pos_batch_norm=True)


def of_batch_norm(norm: str, **settings: Any) -> Any:
    reference = of_transformers(config_of(norm), conv_pos_batch_norm=True, **settings)
    assert isinstance(reference.encoder.pos_conv_embed.batch_norm, torch.nn.BatchNorm1d)
    with torch.no_grad():
        module = reference.encoder.pos_conv_embed.batch_norm
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
        module.bias.normal_()  # so that padding, which it shifts, matters
    return reference


def ours(norm: str = "group") -> PretrainedWeights:
    encoder = HubertEncoder(config_of(norm))
    with torch.no_grad():
        for value in (encoder.positions.batch_norm.mean, encoder.positions.batch_norm.bias):
            value.normal_()
        encoder.positions.batch_norm.variance.uniform_(0.5, 2)
    return PretrainedWeights(config_of(norm), encoder.state_dict(), provenance={"note": "random"})


@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_every_layer_equals_that_of_transformers_padded_and_not(tmp_path: Path, norm: str) -> None:
    reference = of_batch_norm(norm)
    reference.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert isinstance(encoder, HubertEncoder)
    assert encoder.config.clock == Clock(640, 720)
    assert_layers_equal(encoder, reference, torch.randn(2, int(LENGTHS.max())))


@torch.no_grad()
def test_padding_changes_no_feature_where_it_is_ignored() -> None:
    encoder = HubertEncoder(config_of("group")).eval()
    encoder.positions.batch_norm.bias.normal_()
    waveform, clock = torch.randn(2, 16_000), encoder.config.clock
    alone = encoder.features(waveform[1:, :9_000], layer=2)[0]
    padded = encoder.features(waveform, LENGTHS, layer=2, ignore_padding=True)[1, : len(alone)]
    seen = encoder.features(waveform, LENGTHS, layer=2)[1, : len(alone)]
    assert len(alone) == num_frames(9_000, clock)
    assert_close(padded, alone, rtol=0, atol=1e-5)
    assert not torch.allclose(seen, alone, atol=1e-2)  # as in transformers
    last = encoder(waveform, LENGTHS, ignore_padding=True)[1, : len(alone)]
    assert_close(last, encoder(waveform[1:, :9_000])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_it_survives_the_way_through_transformers_to_the_bit(tmp_path: Path, norm: str) -> None:
    reference = of_batch_norm(norm)
    reference.save_pretrained(tmp_path / "reference")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=norm == "layer").save_pretrained(tmp_path / "reference")
    import_model(str(tmp_path / "reference"), tmp_path / "ours.ckpt")
    export_model(str(tmp_path / "ours.ckpt"), tmp_path / "again", "transformers")
    again, report = transformers.HubertModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.conv_pos_batch_norm is True
    for name, value in reference.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    fingerprints = {encoder_fingerprint(load_hubert(tmp_path / name)) for name in ("reference", "ours.ckpt", "again")}
    assert len(fingerprints) == 1


@pytest.mark.parametrize("format", ["transformers", "fairseq", "safetensors"])
@pytest.mark.parametrize("norm", NORMS)
def test_it_survives_every_format_that_has_it(tmp_path: Path, norm: str, format: Any) -> None:
    trained = ours(norm)
    export_model(str(save_ours(trained, tmp_path / "ours.ckpt")), tmp_path / "reference", format)
    back = read_weights(tmp_path / "reference")
    assert back.config == trained.config
    assert back.encoder.keys() == trained.encoder.keys()
    assert all(torch.equal(value, trained.encoder[name]) for name, value in back.encoder.items())


@pytest.mark.parametrize("stated", [True, False])
@torch.no_grad()
def test_a_checkpoint_of_fairseq_is_imported(tmp_path: Path, stated: bool) -> None:
    """fairseq puts the batch norm before the convolution, so the convolution's number is 1 (make_conv_pos)."""
    reference = of_batch_norm("group")
    model, task = fairseq_settings(config_of("group"))
    model["conv_feature_layers"] = "[(48,10,5)] + [(48,3,2)] * 4 + [(48,2,2)] * 3"
    model |= {"conv_pos_batch_norm": True} if stated else {}
    torch.save(
        {"model": fairseq_state(reference), "cfg": {"model": model, "task": task | {"label_rate": 25}}},
        tmp_path / "fairseq.pt",
    )
    assert_layers_equal(load_encoder(tmp_path / "fairseq.pt"), reference, torch.randn(2, int(LENGTHS.max())))


def test_systems_that_lack_it_and_settings_that_contradict_the_weights_are_refused(tmp_path: Path) -> None:
    path = save_ours(ours(), tmp_path / "ours.ckpt")
    with pytest.raises(UserError, match=r"has a batch norm of positions, which torchaudio lacks; export it to"):
        export_model(str(path), tmp_path / "out", "torchaudio")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="pos_batch_norm with 16 position_buckets: no system has both"):
        EncoderConfig(pos_batch_norm=True, position_buckets=16)
    reference = of_batch_norm("group")
    reference.save_pretrained(tmp_path / "reference")
    config = json.loads((tmp_path / "reference/config.json").read_text())
    (tmp_path / "reference/config.json").write_text(json.dumps(config | {"conv_pos_batch_norm": False}))
    with pytest.raises(UserError, match="lacks weights of the encoder"):
        load_hubert(tmp_path / "reference")


def test_its_statistics_are_fixed_in_training_and_the_rest_of_it_learns() -> None:
    model = pretraining_model(encoder=replace(TINY, pos_batch_norm=True)).train()
    module = model.encoder.positions.batch_norm
    assert isinstance(module, FixedBatchNorm)
    before = module.mean.clone(), module.variance.clone()
    with torch.no_grad():
        module.bias.normal_()
    batch = pretraining_batch()
    local = model.encoder.local_features(batch.waveform)
    full = model.encoder.eval().contextual(local)
    torch.testing.assert_close(full[:1], model.encoder.contextual(local[:1]), rtol=0, atol=1e-5)  # rows are alone
    full.square().sum().backward()
    assert torch.equal(module.mean, before[0])
    assert torch.equal(module.variance, before[1])
    assert module.weight.grad is not None
    assert module.weight.grad.abs().sum() > 0
    assert model.encoder.positions.conv.weight.grad is not None
    assert num_parameters(Workload(model.encoder.config, ())) == sum(p.numel() for p in model.encoder.parameters())
    copied = pickle.loads(pickle.dumps(model.encoder.positions))
    assert torch.equal(copied(full.detach()), model.encoder.positions(full.detach()))


@pytest.mark.slow
def test_it_teaches_models_of_its_rate_and_no_faster_ones(manifests: Path, tmp_path: Path) -> None:
    of_batch_norm("group").save_pretrained(tmp_path / "mhubert")
    assert combined_extractor([(str(tmp_path / "mhubert"), 2)], torch.device("cpu")).clock == Clock(640, 720)
    data = pretraining_data(manifests, num_workers=0, mask_length=5)
    relabel = Relabel(str(tmp_path / "mhubert"), 2, 20, max_frames=2000)
    student = HubertPretraining(encoder=replace(TINY, **AT_25_HZ), num_clusters=20, final_dim=16)
    bare_trainer(tmp_path / "student", max_steps=1, callbacks=[relabel]).fit(student, datamodule=data)
    assert (tmp_path / "student/labels").is_dir()
    continued = HubertPretraining(config_of("group"), num_clusters=20, final_dim=16, pretrained=tmp_path / "mhubert")
    bare_trainer(tmp_path / "continued", max_steps=1, callbacks=[relabel]).fit(continued, datamodule=data)
    relabel = Relabel(str(tmp_path / "mhubert"), 2, 20, max_frames=2000)
    model = HubertPretraining(encoder=TINY, num_clusters=20, final_dim=16)
    with pytest.raises(UserError, match=r"mhubert has a frame of 45 ms every 40 ms, and the model that learns its"):
        bare_trainer(tmp_path / "faster", max_steps=1, callbacks=[relabel]).fit(
            model, datamodule=pretraining_data(manifests, num_workers=0)
        )
