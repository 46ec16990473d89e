"""Speech encoders of transformers as teachers: their layers are its hidden states, and bad ones are refused."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign_models import ATOL, tiny_hubert
from safetensors.torch import load_file, save_file
from teacher_models import FAMILIES, edited, hidden_states, random_teacher
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from hubert_lightning.cli import main
from hubert_lightning.errors import UserError
from hubert_lightning.frames import num_frames
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.model.statistics import statistics_of
from hubert_lightning.pretrained.load import encoder_fingerprint, encoder_size, load_encoder, read_weights
from hubert_lightning.pretrained.transformers_encoder import TransformersEncoder, load_transformers_encoder

LENGTHS = [16_000, 9_150]


def loaded(folder: Path) -> TransformersEncoder:
    return load_transformers_encoder(folder)  # also of a WavLM, which load_encoder reads as our own


def recordings() -> list[Tensor]:
    return [0.1 * torch.randn(samples) + 0.05 for samples in LENGTHS]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_layer_is_a_hidden_state_of_transformers_padded_and_not(family: str, tmp_path: Path) -> None:
    theirs = random_teacher(family, tmp_path)
    encoder = loaded(tmp_path)
    step = 2 if family == "10 ms" else 1
    long, short = recordings()
    for waveforms, length in (([long, long.flip(0)], None), ([long, short], torch.tensor(LENGTHS))):
        states, seen = hidden_states(family, theirs, waveforms)
        waveform = pad_sequence(waveforms, batch_first=True)
        layers = encoder.all_layers(waveform, length, with_input=True)
        assert len(layers) == len(states) == encoder.config.num_layers + 1
        for number, (our, their) in enumerate(zip(layers, states, strict=True)):
            assert our.shape == (2, num_frames(LENGTHS[0]), encoder.config.dim)
            frames = seen[:, ::step][:, : our.shape[1]]
            assert_close(our[frames], their[:, ::step][:, : our.shape[1]][frames], rtol=0, atol=ATOL)
            if number:
                assert_close(encoder.features(waveform, length, layer=number), our, rtol=0, atol=0)
        chosen = encoder.features_of_layers(waveform, length, layers=[3, 1])
        assert_close(chosen, [layers[3], layers[1]], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_do_not_depend_on_the_batch(family: str, tmp_path: Path) -> None:
    random_teacher(family, tmp_path)
    encoder, (long, short) = loaded(tmp_path), recordings()
    waveform, length = pad_sequence([long, short], batch_first=True), torch.tensor(LENGTHS)
    together = encoder.features(waveform, length, layer=3, ignore_padding=True)
    alone = encoder.features(short[None], layer=3)
    assert_close(together[1, : num_frames(len(short))], alone[0], rtol=0, atol=ATOL)
    assert_close(together[0], encoder.features(long[None], layer=3)[0], rtol=0, atol=ATOL)


@pytest.mark.parametrize("family", ["wav2vec 2.0", "XLS-R", "WavLM", "10 ms"])
@torch.no_grad()
def test_a_part_is_normalised_as_its_whole_recording(family: str, tmp_path: Path) -> None:
    random_teacher(family, tmp_path)
    encoder = loaded(tmp_path)
    assert encoder.uses_statistics == (family != "10 ms" or encoder.config.normalize_waveform)
    waveform = 0.1 * torch.randn(1, 33 * 16_000)  # longer than a piece of the convolutions
    waveform[:, 16_000:] *= 3
    whole = encoder.all_layers(waveform, with_input=True)[0]
    statistics = statistics_of([waveform[0]])
    frontend = encoder.model.feature_extractor
    inputs = []
    handle = frontend.register_forward_hook(lambda _, __, output: inputs.append(output))
    encoder.features(waveform, layer=1)
    encoder.features(waveform, layer=1, statistics=statistics)
    encoder.features(waveform[:, : 320 * 200 + 80], layer=1, statistics=statistics)
    handle.remove()
    at_once, in_pieces, part = inputs
    assert whole.shape[1] == num_frames(waveform.shape[1])
    assert_close(in_pieces, at_once, rtol=1e-4, atol=1e-5)
    assert_close(part, at_once[..., : part.shape[-1]], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_filterbanks_have_our_frames_for_every_length(tmp_path: Path) -> None:
    """The last frame of some lengths is half a frame of filterbanks, which the model masks."""
    random_teacher("wav2vec-BERT", tmp_path)
    encoder = loaded(tmp_path)
    for samples in range(400, 1400, 111):
        features = encoder.features(torch.randn(1, samples), layer=2)
        assert features.shape[1] == num_frames(samples)
        assert features.isfinite().all()
    odd = encoder.features(torch.randn(1, 400 + 320 * 4), layer=2)[0]
    assert_close(odd[-1], odd[-2], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "head"), [("wav2vec 2.0", "ForCTC"), ("XLS-R", "ForPreTraining"), ("WavLM", "ForXVector")]
)
@torch.no_grad()
def test_heads_are_left_out_and_old_names_are_read(family: str, head: str, tmp_path: Path) -> None:
    theirs = random_teacher(family, tmp_path, head)
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    state = load_file(tmp_path / "model.safetensors")
    for new, old in names.items():
        state = {name.replace(new, old): value for name, value in state.items()}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    states, _ = hidden_states(family, theirs, recordings()[:1])
    torch.manual_seed(0)
    waveform = torch.randn(1, 16_000)
    states, _ = hidden_states(family, theirs, [waveform[0]])
    assert_close(loaded(tmp_path).features(waveform, layer=3), states[3], rtol=0, atol=ATOL)


@torch.no_grad()
def test_the_output_has_the_norm_after_the_last_layer(tmp_path: Path) -> None:
    theirs, waveform = random_teacher("WavLM Large", tmp_path), torch.randn(1, 9000)
    given = torch.nn.functional.layer_norm(waveform, waveform.shape[1:])
    assert_close(loaded(tmp_path)(waveform), theirs(given).last_hidden_state, rtol=0, atol=ATOL)


def test_loading_draws_no_random_numbers_and_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    random_teacher("WavLM", tmp_path)
    capfd.readouterr()
    before = torch.get_rng_state()
    assert not loaded(tmp_path).training
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


def test_the_fingerprint_names_what_is_computed(tmp_path: Path) -> None:
    theirs = random_teacher("WavLM", tmp_path / "a")
    for copy in ("b", "c"):
        shutil.copytree(tmp_path / "a", tmp_path / copy)
    edited(
        tmp_path / "b", architectures=["Another"], transformers_version="4.0", hidden_dropout=0.3, mask_time_prob=0.0
    )
    edited(tmp_path / "c", max_bucket_distance=400)
    first = encoder_fingerprint(loaded(tmp_path / "a"))
    assert encoder_fingerprint(loaded(tmp_path / "b")) == first
    assert encoder_fingerprint(loaded(tmp_path / "c")) != first
    edited(tmp_path / "b", "preprocessor_config.json", do_normalize=True)
    assert encoder_fingerprint(loaded(tmp_path / "b")) != first
    with torch.no_grad():
        theirs.encoder.layers[0].layer_norm.bias[0] += 1e-3
    theirs.save_pretrained(tmp_path / "a")
    assert encoder_fingerprint(loaded(tmp_path / "a")) != first


def test_a_hubert_with_a_final_projection_is_read_as_our_own(tmp_path: Path) -> None:
    """Contentvec in transformers: class HubertModelWithFinalProj."""
    theirs = tiny_hubert()
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state |= {"final_proj.weight": torch.randn(8, 16), "final_proj.bias": torch.randn(8)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    edited(tmp_path, architectures=["HubertModelWithFinalProj"])
    encoder, waveform = load_encoder(tmp_path), torch.randn(1, 9000)
    assert isinstance(encoder, HubertEncoder)
    expected = theirs(waveform, output_hidden_states=True).hidden_states[2]
    assert_close(encoder.features(waveform, layer=2), expected, rtol=0, atol=ATOL)


def test_a_directory_without_a_feature_extractor_states_what_is_assumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    random_teacher("wav2vec 2.0", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert loaded(tmp_path).config.normalize_waveform
    assert "has no preprocessor_config.json; assumed, as by transformers' feature extractor" in caplog.text
    assert "padding is not masked" in caplog.text


def whisper(folder: Path) -> None:
    transformers.WhisperConfig().save_pretrained(folder)


def bert(folder: Path) -> None:
    transformers.BertConfig().save_pretrained(folder)


def with_(family: str, file: str = "config.json", **settings: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        random_teacher(family, folder)
        edited(folder, file, **settings)

    return write


def without_weight(folder: Path) -> None:
    random_teacher("UniSpeech-SAT", folder)
    state = load_file(folder / "model.safetensors")
    del state["encoder.layers.1.attention.q_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def with_nan(folder: Path) -> None:
    random_teacher("UniSpeech-SAT", folder)
    state = load_file(folder / "model.safetensors")
    state["encoder.layer_norm.bias"][0] = torch.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another hop": (
        with_("XLS-R", conv_stride=[5, 2, 2, 2, 2, 2, 4]),
        "layers with a frame every 40 ms; a teacher needs",
    ),
    "squeezed": (with_("SEW", squeeze_factor=2), "a frame every 40 ms"),
    "squeezed from 10 ms": (
        with_("SEW", squeeze_factor=2, conv_stride=[5, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 1, 1]),
        "describes frames of 35 ms; a teacher needs",
    ),
    "another window": (
        with_("XLS-R", conv_kernel=[10, 3, 3, 3, 3, 2, 3]),
        "describes frames of 35 ms; a teacher needs",
    ),
    "another filterbank": (
        with_("wav2vec-BERT", "preprocessor_config.json", stride=4),
        "a frame every 40 ms",
    ),
    "another rate": (
        with_("XLS-R", "preprocessor_config.json", sampling_rate=24_000),
        "sets sampling_rate to 24000; this encoder only supports 16000 Hz",
    ),
    "whisper": (whisper, "whisper, a sequence-to-sequence model whose encoder reads every recording as 30 s"),
    "speech to text": (with_("XLS-R", model_type="speech_to_text"), "a sequence-to-sequence model of type"),
    "text": (bert, "a model of type 'bert', which reads text, not speech"),
    "remote code": (
        with_("XLS-R", model_type="mine", auto_map={"AutoModel": "mine.Model"}),
        r"names Python code of its own \(auto_map\)",
    ),
    "unknown": (
        with_("XLS-R", model_type="mine", vocab_size=None),
        "a model of type 'mine', which cannot be a teacher",
    ),
    "no type": (with_("XLS-R", model_type=None), "a model of type None"),
    "huge": (with_("XLS-R", num_hidden_layers=10**6), "sets num_hidden_layers to 1000000"),
    "not a number": (with_("XLS-R", hidden_size="many"), "transformers cannot build this model"),
    "no such activation": (with_("XLS-R", hidden_act="mine"), r"cannot build this model \(KeyError"),
    "kernels": (with_("XLS-R", conv_kernel=7), "sets conv_kernel to 7 and conv_stride to"),
    "half a weight": (without_weight, "lacks weights of the encoder"),
    "another size": (
        with_("UniSpeech-SAT", intermediate_size=100),
        r"has shape \(96, 64\), but config.json asks for \(100, 64\)",
    ),
    "another architecture": (
        with_("XLS-R", feat_extract_norm="group"),
        "weights that a model of type 'wav2vec2' does not have",
    ),
    "not finite": (with_nan, "has values that are NaN or infinite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_teacher_is_refused_in_a_sentence(case: str, tmp_path: Path) -> None:
    write, sentence = REFUSED[case]
    write(tmp_path)
    for use in (load_encoder, encoder_size):
        with pytest.raises(UserError, match=sentence) as refusal:
            use(tmp_path)
        assert "\n" not in str(refusal.value)


def test_code_and_kernels_that_a_config_names_are_not_used(tmp_path: Path) -> None:
    random_teacher("XLS-R", tmp_path)
    (tmp_path / "mine.py").write_text("raise SystemExit('run')")
    settings = {"auto_map": {"AutoModel": "mine.Model"}, "_attn_implementation": "someone/kernels"}
    edited(tmp_path, **settings, quantization_config={"quant_method": "mine"})
    assert loaded(tmp_path).model.config._attn_implementation in ("sdpa", "eager")


def test_without_transformers_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_teacher("XLS-R", tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"transformers, which is not installed; install hubert-lightning\[teachers\]"):
        load_encoder(tmp_path)


def test_what_needs_a_hubert_refuses_another_encoder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    random_teacher("XLS-R", tmp_path / "model", "ForCTC")
    sentence = "of type 'wav2vec2', not 'hubert' or 'wavlm'; its layers can make labels and units, but training"
    with pytest.raises(UserError, match=sentence):
        read_weights(tmp_path / "model")
    for verb in (["import", str(tmp_path / "model"), "a.ckpt"], ["export", str(tmp_path / "model"), "out"]):
        with pytest.raises(SystemExit):
            main(verb)
        assert sentence in " ".join(capsys.readouterr().err.split())


def test_a_layer_that_a_teacher_lacks_is_named(tmp_path: Path) -> None:
    random_teacher("XLS-R", tmp_path)
    for layer in (0, 4):
        with pytest.raises(UserError, match=f"layer {layer} of an encoder of 3 layers"):
            loaded(tmp_path).features(torch.randn(1, 9000), layer=layer)
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == encoder_size(tmp_path).num_layers
