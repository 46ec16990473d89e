"""Encoders come back from files with the numbers they were saved with, and every other file is refused by name."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from foreign_models import tiny_hubert
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.load import encoder_fingerprint, load_encoder, load_hubert

TINY = EncoderConfig(conv_channels=8, dim=16, num_layers=2, num_heads=2, ffn_dim=24, pos_kernel=6, pos_groups=2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def waveform() -> Tensor:
    return torch.randn(2, 4000)


def save_checkpoint(path: Path, encoder: HubertEncoder, **other: Tensor) -> None:
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    settings = {"encoder": asdict(encoder.config), "num_clusters": 100}
    torch.save({"state_dict": state | other, "hyper_parameters": settings, "optimizer_states": []}, path)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("head", ["predictors.0.codewords", "head.weight"])
def test_a_checkpoint_of_ours_comes_back(tmp_path: Path, waveform: Tensor, head: str) -> None:
    config = replace(TINY, conv_norm="layer", pre_norm=True, normalize_waveform=True, feature_grad_mult=0.0)
    encoder = HubertEncoder(config).eval()
    save_checkpoint(tmp_path / "last.ckpt", encoder, **{head: torch.zeros(3)})
    loaded = load_hubert(str(tmp_path / "last.ckpt"))
    assert loaded.config == config
    assert not loaded.training
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in encoder.parameters()]
    (tmp_path / "last.ckpt").write_bytes(b"")  # as the next checkpoint of a run that goes on would
    assert_close(loaded(waveform), encoder(waveform), rtol=0, atol=0)


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.ckpt", HubertEncoder(TINY))
    before = torch.get_rng_state()
    load_encoder(tmp_path / "last.ckpt")
    assert_close(torch.get_rng_state(), before)


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("model", ["HubertModel", "HubertForCTC"])
def test_a_directory_of_transformers_comes_back(tmp_path: Path, waveform: Tensor, model: str, norm: str) -> None:
    settings = {"conv_bias": True, "hidden_dropout": 0.2, "activation_dropout": 0.3, "attention_dropout": 0.4}
    theirs = tiny_hubert(model, norm, feat_proj_dropout=0.5, layerdrop=0.6, **settings)
    theirs.save_pretrained(tmp_path)
    encoder = load_hubert(tmp_path)
    assert not encoder.training
    assert encoder.config == replace(
        TINY,
        conv_norm="group" if norm == "group" else "layer",
        pre_norm=norm == "layer",
        normalize_waveform=norm == "layer",
        conv_bias=True,
        dropout=0.2,
        activation_dropout=0.3,
        attention_dropout=0.4,
        input_dropout=0.5,
        layer_drop=0.6,
        feature_grad_mult=0.1 if norm == "group" else 1.0,
    )
    seen = F.layer_norm(waveform, waveform.shape[1:]) if norm == "layer" else waveform
    assert_close(encoder(waveform), theirs.base_model(seen).last_hidden_state)
    assert_close(encoder.mask_embedding, theirs.base_model.masked_spec_embed, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("gain", "direction"),
    [("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")],
)
def test_both_names_of_weight_norm_are_read(tmp_path: Path, waveform: Tensor, gain: str, direction: str) -> None:
    theirs = tiny_hubert()
    theirs.save_pretrained(tmp_path)
    conv, prefix = theirs.encoder.pos_conv_embed.conv.parametrizations.weight, "encoder.pos_conv_embed.conv."
    state = {name: value for name, value in load_file(tmp_path / "model.safetensors").items() if prefix not in name}
    state[f"{prefix}bias"] = theirs.encoder.pos_conv_embed.conv.bias.data
    state |= {prefix + gain: conv.original0.data, prefix + direction: conv.original1.data}
    save_file(state, tmp_path / "model.safetensors")
    assert_close(load_encoder(tmp_path)(waveform), theirs(waveform).last_hidden_state)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_their_preprocessor_decides_whether_audio_is_normalized(tmp_path: Path, norm: str, normalize: bool) -> None:
    tiny_hubert(norm=norm).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize).save_pretrained(tmp_path)
    assert load_hubert(tmp_path).config.normalize_waveform == normalize


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    tiny_hubert().half().save_pretrained(tmp_path)
    assert {value.dtype for value in load_hubert(tmp_path).state_dict().values()} == {torch.float32}


def test_a_model_that_was_never_masked_is_read_too(tmp_path: Path, waveform: Tensor) -> None:
    theirs = tiny_hubert(mask_time_prob=0.0)
    theirs.save_pretrained(tmp_path)
    assert_close(load_encoder(tmp_path)(waveform), theirs(waveform).last_hidden_state)


def test_encoders_have_different_fingerprints_if_they_compute_different_features() -> None:
    encoder = HubertEncoder(TINY)
    name = encoder_fingerprint(encoder)
    trained = HubertEncoder(replace(TINY, layer_drop=0.5, feature_grad_mult=0.0))
    trained.load_state_dict(encoder.state_dict())
    assert encoder_fingerprint(trained) == name
    normalizing = HubertEncoder(replace(TINY, normalize_waveform=True))
    normalizing.load_state_dict(encoder.state_dict())
    assert encoder_fingerprint(normalizing) != name
    with torch.no_grad():
        trained.get_parameter("layers.1.ffn_output.bias")[0] += 1e-6
    assert encoder_fingerprint(trained) != name


def _shrink(path: Path) -> None:
    encoder = HubertEncoder(TINY)
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    state["encoder.norm.weight"] = torch.zeros(3)
    torch.save({"state_dict": state, "hyper_parameters": {"encoder": asdict(TINY)}}, path)


def _without(name: str) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        state = {f"encoder.{n}": v for n, v in HubertEncoder(TINY).state_dict().items() if n != name}
        torch.save({"state_dict": state, "hyper_parameters": {"encoder": asdict(TINY)}}, path)

    return save


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda path: None, "does not exist; give a .ckpt"),
        (lambda path: path.write_bytes(b""), "is corrupt, or no file of torch.save"),
        (lambda path: path.write_text("hello"), "is corrupt, or no file of torch.save"),
        (lambda path: save_file({"centroids": torch.zeros(5, 39)}, path), "holds no HuBERT"),
        (lambda path: torch.save(torch.zeros(3), path), "holds no HuBERT"),
        (lambda path: torch.save({"centroids": torch.zeros(5, 39)}, path), "holds no HuBERT"),
        (
            lambda path: torch.save(torch.nn.Linear(2, 2), path),
            "refused, the pickle would call torch.nn.modules.linear.Linear;",
        ),
        (
            lambda path: torch.save({"state_dict": {}, "hyper_parameters": {}}, path),
            "does not say how large its encoder",
        ),
        (
            lambda path: torch.save({"state_dict": {}, "hyper_parameters": {"encoder": {"width": 3, "dim": 5}}}, path),
            r"unknown encoder settings \(width\)",
        ),
        (_without("norm.bias"), r"lacks weights of the encoder \(norm.bias\)"),
        (_shrink, r"norm.weight has shape \(3,\), but its settings ask for \(16,\)"),
        (
            lambda path: save_checkpoint(path, HubertEncoder(TINY), **{"encoder.adapter": torch.zeros(1)}),
            r"cannot use \(adapter\)",
        ),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, save: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "encoder.ckpt"
    save(path)
    with pytest.raises(ValueError, match=message) as refusal:
        load_encoder(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "wav2vec2"}, "a model of type 'wav2vec2'"),
        ({"conv_pos_batch_norm": True}, "lacks weights of the encoder"),
        ({"conv_pos_batch_norm": "yes"}, "sets the encoder's pos_batch_norm to 'yes'"),
        (
            {"conv_kernel": [10, 3, 3, 3, 3, 3]},
            "describes no encoder: 7 conv_dim, 6 conv_kernel, 7 conv_stride",
        ),
        ({"conv_stride": [5, 2, 2, 2, 2, 2, 1]}, r"conv_strides \[5, .* move by 160 samples"),
        ({"conv_stride": "5, 2, 2"}, "sets the encoder's conv_strides to"),
        ({"conv_dim": [8, 8, 8, 8, 8, 8, 16]}, "sets conv_dim to"),
        ({"hidden_act": "relu"}, "sets hidden_act to 'relu'"),
        ({"feat_extract_activation": "gelu_new"}, "sets feat_extract_activation to 'gelu_new'"),
        ({"feat_proj_layer_norm": False}, "sets feat_proj_layer_norm to False"),
        ({"feat_extract_norm": "batch"}, "sets feat_extract_norm to 'batch'"),
        ({"layer_norm_eps": 1e-6}, "sets layer_norm_eps"),
        ({"num_hidden_layers": 3}, "lacks weights of the encoder"),
        ({"num_hidden_layers": 1}, "cannot use"),
        ({"intermediate_size": 32}, "its settings ask for"),
    ],
)
def test_a_hubert_that_this_encoder_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tiny_hubert().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **change)
    with pytest.raises(ValueError, match=message) as refusal:
        load_hubert(tmp_path)
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("config.json", "without settings; give the directory of config.json"),
        ("model.safetensors", "has no m"),
    ],
)
def test_half_a_directory_is_refused(tmp_path: Path, missing: str, sentence: str) -> None:
    tiny_hubert().save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=sentence):
        load_encoder(tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    tiny_hubert().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is corrupt"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "hubert"}')
    with pytest.raises(ValueError, match=r"config.json lacks activation_dropout and"):
        load_encoder(tmp_path)
