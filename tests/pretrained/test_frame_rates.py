"""Models with other convolutions, such as those of 25 frames a second, come in and go out with their numbers."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers
from foreign_models import (
    assert_layers_equal,
    disturbed,
    fairseq_settings,
    fairseq_state,
    of_torchaudio,
    of_transformers,
    save_ours,
    small_config,
)
from helpers import AT_25_HZ

from hubert_lightning.errors import UserError
from hubert_lightning.frames import Clock
from hubert_lightning.interchange.import_export import export_model
from hubert_lightning.model.config import KERNELS, STRIDES, EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.formats import FORMATS
from hubert_lightning.pretrained.load import encoder_fingerprint, load_encoder, load_hubert, read_weights
from hubert_lightning.pretrained.weights import PretrainedWeights, encoder_config_from

STRIDE_OF_4 = {"conv_kernels": (*KERNELS[:-1], 4), "conv_strides": (*STRIDES[:-1], 4)}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def config_at_25_hz(norm: str) -> EncoderConfig:
    return replace(small_config(norm), **(AT_25_HZ if norm == "group" else STRIDE_OF_4))


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_an_encoder_of_25_hz_of_transformers_is_imported(tmp_path: Path, norm: str) -> None:
    theirs = of_transformers(config_at_25_hz(norm))
    theirs.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert encoder.config.clock == Clock(640, 720)
    assert_layers_equal(encoder, theirs, torch.randn(2, 16_000))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_an_encoder_of_25_hz_survives_every_format(tmp_path: Path, norm: str, format: str) -> None:
    config = config_at_25_hz(norm)
    trained = PretrainedWeights(config, disturbed(HubertEncoder(config)).state_dict(), provenance={"note": "random"})
    export_model(str(save_ours(trained, tmp_path / "ours.ckpt")), tmp_path / "theirs", format=format)
    back = read_weights(tmp_path / "theirs")
    assert back.config == config
    assert all(torch.equal(value, trained.encoder[name]) for name, value in back.encoder.items())
    assert back.encoder.keys() == trained.encoder.keys()


def test_transformers_opens_an_export_of_25_hz(tmp_path: Path) -> None:
    config = config_at_25_hz("group")
    trained = PretrainedWeights(config, disturbed(HubertEncoder(config)).state_dict(), provenance={"note": "random"})
    export_model(str(save_ours(trained, tmp_path / "ours.ckpt")), tmp_path / "theirs")
    theirs, report = transformers.HubertModel.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_layers_equal(load_encoder(tmp_path / "ours.ckpt"), theirs.eval(), torch.randn(2, 16_000))
    stated = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (stated["num_feat_extract_layers"], stated["mask_time_length"]) == (8, 5)


def test_a_fairseq_checkpoint_of_25_hz_is_imported_by_its_conv_feature_layers(tmp_path: Path) -> None:
    config = replace(small_config("group"), **AT_25_HZ)
    theirs = of_transformers(config)
    model, task = fairseq_settings(config)
    model["conv_feature_layers"] = "[(48,10,5)] + [(48,3,2)] * 4 + [(48,2,2)] * 3"
    checkpoint = {"model": fairseq_state(theirs), "cfg": {"model": model, "task": task | {"label_rate": 25}}}
    torch.save(checkpoint, tmp_path / "fairseq.pt")
    assert_layers_equal(load_encoder(tmp_path / "fairseq.pt"), theirs, torch.randn(2, 16_000))


def test_strides_that_a_state_dict_does_not_state_are_those_of_the_released_models(tmp_path: Path) -> None:
    theirs = of_torchaudio(replace(small_config("group"), dim=768, num_heads=12, **AT_25_HZ))
    torch.save(theirs.state_dict(), tmp_path / "state.pt")
    encoder = load_hubert(tmp_path / "state.pt")
    assert encoder.config.conv_strides == (*STRIDES, 2)
    assert_layers_equal(encoder, theirs, torch.randn(2, 16_000))
    other = of_torchaudio(replace(small_config("group"), dim=768, num_heads=12, **STRIDE_OF_4))
    torch.save(other.state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt has convolutions with kernels .* does not state their strides"):
        load_encoder(tmp_path / "other.pt")


def test_settings_of_earlier_versions_have_the_standard_convolutions() -> None:
    settings = asdict(small_config("group"))
    for name in ("conv_kernels", "conv_strides"):
        del settings[name]
    assert encoder_config_from(settings, Path("old.ckpt")) == small_config("group")
    assert encoder_config_from(asdict(small_config("group")), Path("new.ckpt")) == small_config("group")


def test_the_fingerprint_of_a_standard_encoder_is_that_of_earlier_versions() -> None:
    """Labels and K-means of earlier versions name their encoder by it."""
    encoder = HubertEncoder(EncoderConfig(conv_channels=4, dim=8, num_layers=1, num_heads=1, ffn_dim=8, pos_groups=2))
    for number, value in enumerate(encoder.state_dict().values()):
        value.fill_(number / 64)
    assert encoder_fingerprint(encoder) == "2c0e338cb3bd3cef"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"conv_strides": (5, 2, 2, 2, 2, 2, 1)}, r"move by 160 samples; give strides whose product is 320 .* or 640"),
        ({"conv_strides": (5, 2, 2, 2, 2, 2)}, "7 conv_kernels and 6 conv_strides"),
        ({"conv_strides": (5, 2, 2, 2, 2, 2, 4)}, "a kernel shorter than its stride"),
        ({"conv_kernels": (5, 2, 2, 2, 2, 2, 2)}, "see 320 samples, less than the 400"),
        ({"conv_kernels": (), "conv_strides": ()}, "0 conv_kernels and 0 conv_strides"),
        ({"conv_kernels": 3}, "give a list of whole numbers"),
        ({"conv_strides": "5222222"}, "give a list of whole numbers"),
        ({"conv_strides": (5, 2, 2, 2, 2, 2, 2.0)}, "give a list of whole numbers"),
    ],
)
def test_impossible_convolutions_are_refused_in_a_sentence(settings: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refusal:
        EncoderConfig(**settings)
    assert "\n" not in str(refusal.value)
