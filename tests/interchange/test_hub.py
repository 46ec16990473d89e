"""Encoders, units and transcribers go to folders and to the hub, and come back equal to the bit."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import TINY, refused
from local_hub import TOKEN, LocalHub, local_hub
from torch import nn
from torch.testing import assert_close

import hubert_lightning as hl
from hubert_lightning.asr.ctc_model import CTCModel
from hubert_lightning.cli import main
from hubert_lightning.errors import UserError
from hubert_lightning.interchange.import_export import checkpoint_of
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.load import encoder_fingerprint
from hubert_lightning.pretrained.weights import PretrainedWeights
from hubert_lightning.units.kmeans_file import load_kmeans, save_kmeans
from hubert_lightning.vocabulary import Vocabulary


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    with local_hub(monkeypatch, tmp_path / "cache") as server:
        yield server


def encoder_of(seed: int = 0, **settings: object) -> HubertEncoder:
    torch.manual_seed(seed)
    return HubertEncoder(EncoderConfig(**{**vars(TINY), **settings})).eval()


def transcriber_of(encoder: HubertEncoder) -> hl.Transcriber:
    vocabulary = Vocabulary()
    return hl.Transcriber(CTCModel(encoder, nn.Linear(TINY.dim, len(vocabulary)), vocabulary).eval())


def units_of(encoder: HubertEncoder, folder: Path) -> hl.Units:
    torch.save(checkpoint_of(PretrainedWeights(encoder.config, encoder.state_dict())), folder / "encoder.ckpt")
    name = f"layer 2 of encoder {encoder_fingerprint(encoder)}"
    save_kmeans(folder / "means.safetensors", [torch.randn(7, TINY.dim)], {"features": name, "manifest": "abc"})
    return hl.Units.from_pretrained(folder / "encoder.ckpt", folder / "means.safetensors", device="cpu")


def test_an_encoder_comes_back_from_its_folder_equal_to_the_bit(tmp_path: Path) -> None:
    encoder = encoder_of(layer_drop=0.05, normalize_waveform=True)
    assert encoder.save_pretrained(tmp_path / "mine") == tmp_path / "mine"
    for back in (HubertEncoder.from_pretrained(tmp_path / "mine"), hl.load_encoder(tmp_path / "mine")):
        assert_close(back.state_dict(), encoder.state_dict(), rtol=0, atol=0)
        assert back.config == encoder.config
        assert not back.training


def test_a_folder_is_named_by_a_text_or_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hl.save_model(encoder_of(), "mine") == Path("mine")
    assert (tmp_path / "mine/README.md").is_file()
    with pytest.raises(UserError, match="mine: exists already"):
        hl.save_model(encoder_of(), Path("mine"))


def test_transformers_opens_the_folder_of_an_encoder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    encoder = encoder_of()
    encoder.save_pretrained(tmp_path / "mine")
    reference = transformers.HubertModel.from_pretrained(tmp_path / "mine").eval()
    waveform = torch.randn(1, 16_000)
    with torch.no_grad():
        assert_close(encoder(waveform), reference(waveform).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_units_come_back_from_their_folder_equal_to_the_bit(tmp_path: Path) -> None:
    units = units_of(encoder_of(), tmp_path)
    units.save_pretrained(tmp_path / "mine")
    back = hl.Units.from_pretrained(tmp_path / "mine", device="cpu")
    waveform = torch.randn(48_000)
    assert torch.equal(back(waveform, 16_000), units(waveform, 16_000))
    assert back.source == units.source
    before, after = (load_kmeans(tmp_path / name) for name in ("means.safetensors", "mine/kmeans.safetensors"))
    assert torch.equal(before[0][0], after[0][0])
    assert after[1]["features"] == before[1]["features"]


def test_units_of_mfccs_have_no_encoder_to_save(tmp_path: Path) -> None:
    save_kmeans(tmp_path / "means.safetensors", [torch.randn(7, 39)], {"features": "mfcc"})
    with pytest.raises(UserError, match="has no encoder, so there is no model to save"):
        hl.Units.from_pretrained("mfcc", tmp_path / "means.safetensors").save_pretrained(tmp_path / "mine")


def test_a_transcriber_comes_back_from_its_folder_equal_to_the_bit(tmp_path: Path) -> None:
    transcriber = transcriber_of(encoder_of())
    transcriber.save_pretrained(tmp_path / "mine")
    back = hl.Transcriber.from_pretrained(tmp_path / "mine", device="cpu")
    assert_close(back.model.state_dict(), transcriber.model.state_dict(), rtol=0, atol=0)
    assert back.model.fingerprint() == transcriber.model.fingerprint()
    assert back.vocabulary.settings() == transcriber.vocabulary.settings()


def test_models_go_to_the_hub_and_come_back_by_their_names(tmp_path: Path, hub: LocalHub) -> None:
    encoder = encoder_of()
    units, transcriber = units_of(encoder, tmp_path), transcriber_of(encoder)
    card = hl.CardFacts("cc-by-4.0", ["en"], ["openslr/librispeech_asr"])
    address = encoder.push_to_hub("me/hubert-tiny", private=True, card=card)
    assert address.startswith(f"{hub.endpoint}/me/hubert-tiny/commit/")
    assert hub.created[0]["name"] == "hubert-tiny"
    assert "private" in json.dumps(hub.created[0])
    assert hub.tokens == {TOKEN}
    front = yaml.safe_load(hub.repositories["me/hubert-tiny"]["README.md"].decode().split("---")[1])
    assert front["license"] == "cc-by-4.0"
    assert front["language"] in ("en", ["en"])
    assert front["datasets"] == ["openslr/librispeech_asr"]
    back = HubertEncoder.from_pretrained("me/hubert-tiny")
    assert_close(back.state_dict(), encoder.state_dict(), rtol=0, atol=0)
    assert back.config == encoder.config

    units.push_to_hub("me/units")
    waveform = torch.randn(16_000)
    loaded = hl.Units.from_pretrained("me/units", device="cpu")
    assert torch.equal(loaded(waveform, 16_000), units(waveform, 16_000))

    transcriber.push_to_hub("me/transcriber")
    heard = hl.Transcriber.from_pretrained("me/transcriber", device="cpu")
    assert heard.model.fingerprint() == transcriber.model.fingerprint()


def test_export_uploads_only_when_it_is_asked_to(
    tmp_path: Path, hub: LocalHub, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = encoder_of()
    weights = PretrainedWeights(encoder.config, encoder.state_dict())
    torch.save(checkpoint_of(weights), tmp_path / "run.ckpt")
    main(["export", str(tmp_path / "run.ckpt"), str(tmp_path / "kept")])
    assert not hub.repositories
    main(
        ["export", str(tmp_path / "run.ckpt"), str(tmp_path / "out"), "--push", "me/exported", "--license", "mit"]
        + ["--language", "en", "de"]
    )
    assert "me/exported: uploaded, http://127.0.0.1" in capsys.readouterr().out
    for file in (tmp_path / "out").iterdir():
        assert hub.repositories["me/exported"][file.name] == file.read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()
    front = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---")[1])
    assert (front["license"], front["language"]) == ("mit", ["en", "de"])
    assert 'from_pretrained("me/exported")' in (tmp_path / "out/README.md").read_text()


def test_a_card_has_the_error_rates_of_its_run_in_its_front_matter(tmp_path: Path) -> None:
    encoder = encoder_of()
    head = nn.Linear(TINY.dim, len(Vocabulary()))
    weights = PretrainedWeights(
        encoder.config, encoder.state_dict(), head=head.state_dict(), vocabulary=Vocabulary(), provenance={}
    )
    torch.save(checkpoint_of(weights), tmp_path / "run.ckpt")
    config = {"data": {"init_args": {"test": ["/home/a-user/manifests/test-other.jsonl.gz"]}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    scores = {"words": {"rate": 0.0421}, "letters": {"rate": 0.0123}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    main(["export", str(tmp_path / "run.ckpt"), str(tmp_path / "out")])
    text = (tmp_path / "out/README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    [entry] = front["model-index"]
    assert entry["name"] == "out"
    [result] = entry["results"]
    assert result["dataset"]["name"] == "test-other.jsonl.gz"
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {"wer": 4.21, "cer": 1.23}
    assert front["metrics"] == ["wer", "cer"]
    assert "a-user" not in text


def test_an_upload_that_fails_is_told_in_a_sentence(
    tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = encoder_of()
    with pytest.raises(UserError, match="me/x: not uploaded, the hub refuses the token; run `hf auth login` again"):
        encoder.push_to_hub("me/x", token="hf_wrong")
    with pytest.raises(UserError, match="others/x: not uploaded, the token may not write there"):
        encoder.push_to_hub("others/x")
    with pytest.raises(UserError, match="'hubert-base' has no owner; give owner/name"):
        encoder.push_to_hub("hubert-base")
    with pytest.raises(UserError, match="cannot be a name on the hub"):
        encoder.push_to_hub("me/a b")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"me/x: not uploaded, http://127.0.0.1:9 does not answer .*; check the network"
    ):
        encoder.push_to_hub("me/x")
    assert not hub.repositories
    torch.save(checkpoint_of(PretrainedWeights(encoder.config, encoder.state_dict())), tmp_path / "run.ckpt")
    export = ["export", str(tmp_path / "run.ckpt"), str(tmp_path / "out")]
    assert "no code of a language" in refused(capsys, *export, "--language", "English")
    assert "no identifier of the hub" in refused(capsys, *export, "--license", "MIT licence")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "no token of the Hugging Face hub on this machine" in refused(capsys, *export, "--push", "me/x")
    assert not (tmp_path / "out").exists()


def test_a_model_that_the_hub_does_not_have_is_told_in_a_sentence(hub: LocalHub) -> None:
    with pytest.raises(UserError, match=r"me/nothing does not exist here, and the Hugging Face hub did not send it"):
        HubertEncoder.from_pretrained("me/nothing")
