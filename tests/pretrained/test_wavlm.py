"""WavLM: the same numbers and gradients as in transformers, and checkpoints in both directions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign_models import (
    ATOL,
    LENGTHS,
    NORMS,
    assert_layers_equal,
    fairseq_settings,
    fairseq_state,
    of_wavlm,
    save_ours,
    valid,
    wavlm_config,
)
from torch.testing import assert_close

from hubert_lightning.frames import num_frames
from hubert_lightning.interchange.import_export import export_model, import_model
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.foreign_weights import attention_heads
from hubert_lightning.pretrained.load import encoder_fingerprint, load_hubert, read_weights
from hubert_lightning.pretrained.weights import PretrainedWeights, build_ctc_head

LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", "A", "B", "C"]


def saved(folder: Path, norm: str, kind: str = "WavLMModel", **settings: Any) -> Any:
    """A random model in a directory with its feature extractor, as `save_pretrained` writes it."""
    theirs = of_wavlm(wavlm_config(norm), kind, **settings)
    theirs.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=norm == "layer").save_pretrained(folder)
    return theirs


def saved_recogniser(folder: Path, norm: str) -> Any:
    theirs = saved(folder, norm, "WavLMForCTC", vocab_size=len(LETTERS), pad_token_id=0)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(LETTERS)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(folder / "vocab.json", pad_token="<pad>", word_delimiter_token="|")
    tokenizer.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("norm", NORMS)
def test_every_layer_of_a_wavlm_equals_that_of_transformers_padded_and_not(tmp_path: Path, norm: str) -> None:
    torch.manual_seed(0)
    theirs = saved(tmp_path, norm)
    encoder = load_hubert(tmp_path)
    assert encoder.config.position_buckets == 32
    with torch.no_grad():
        assert_layers_equal(encoder, theirs, torch.randn(2, int(LENGTHS.max())))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradients_of_a_wavlm_equal_those_of_transformers(tmp_path: Path, norm: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    theirs = saved(tmp_path, norm)
    encoder = load_hubert(tmp_path)
    encoder.checkpointing = checkpointing
    waveform, length = torch.randn(2, int(LENGTHS.max())), LENGTHS
    given = waveform.clone()
    if encoder.config.normalize_waveform:
        for row, samples in enumerate(length.tolist()):
            given[row, :samples] = torch.nn.functional.layer_norm(given[row, :samples], (samples,))
            given[row, samples:] = 0
    attend = (torch.arange(waveform.shape[1]) < length[:, None]).long()
    weights = torch.randn(int(num_frames(length).sum()), encoder.config.dim)
    (valid(encoder(waveform, length), length) * weights).sum().backward()
    (valid(theirs(given, attention_mask=attend).last_hidden_state, length) * weights).sum().backward()
    for number, layer in enumerate(theirs.encoder.layers):
        own, other = encoder.layers[number], layer.attention
        pairs = {
            "gate": (own.position_gate.linear.weight.grad, other.gru_rel_pos_linear.weight.grad),
            "gate's bias": (own.position_gate.linear.bias.grad, other.gru_rel_pos_linear.bias.grad),
            "scale": (own.position_gate.scale.grad, other.gru_rel_pos_const.grad.flatten()),
            "query": (own.query_key_value.weight.grad.chunk(3)[0], other.q_proj.weight.grad),
            "feed-forward": (own.ffn_input.weight.grad, layer.feed_forward.intermediate_dense.weight.grad),
        }
        for name, (ours, expected) in pairs.items():
            assert_close(ours, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    ours = encoder.relative_positions.embedding.weight.grad
    assert_close(ours, theirs.encoder.layers[0].attention.rel_attn_embed.weight.grad, rtol=1e-4, atol=1e-4)
    expected = theirs.feature_projection.projection.weight.grad
    assert_close(encoder.projection.weight.grad, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_a_wavlm_survives_the_way_through_transformers_to_the_bit(tmp_path: Path, norm: str) -> None:
    torch.manual_seed(0)
    theirs = saved(tmp_path / "theirs", norm)
    import_model(str(tmp_path / "theirs"), tmp_path / "ours.ckpt")
    export_model(str(tmp_path / "ours.ckpt"), tmp_path / "again", "transformers")
    again, report = transformers.AutoModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert type(again) is transformers.WavLMModel
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.config.num_buckets == 32
    assert again.config.max_bucket_distance == 20
    fingerprints = {encoder_fingerprint(load_hubert(tmp_path / name)) for name in ("theirs", "ours.ckpt", "again")}
    assert len(fingerprints) == 1
    assert "WavLMModel" in (tmp_path / "again/README.md").read_text()


def test_a_fine_tuned_wavlm_keeps_its_head_and_its_letters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = saved_recogniser(tmp_path / "theirs", "group")
    import_model(str(tmp_path / "theirs"), tmp_path / "ours.ckpt")
    export_model(str(tmp_path / "ours.ckpt"), tmp_path / "again", "transformers")
    waveform = torch.randn(1, 16_000)
    with torch.no_grad():
        expected = theirs(waveform).logits
        assert torch.equal(transformers.WavLMForCTC.from_pretrained(tmp_path / "again")(waveform).logits, expected)
        weights = read_weights(tmp_path / "ours.ckpt")
        head, vocabulary = build_ctc_head(weights, tmp_path)
        own = head(load_hubert(tmp_path / "ours.ckpt")(waveform))
    assert vocabulary.tokens[0] == "<pad>"
    rows = [LETTERS.index(token) for token in vocabulary.tokens]
    assert_close(own, expected[..., rows], rtol=0, atol=10 * ATOL)


@pytest.mark.parametrize("norm", NORMS)
def test_a_checkpoint_that_microsoft_released_opens(tmp_path: Path, norm: str) -> None:
    """All settings in one mapping, names of fairseq (unilm wavlm/WavLM.py)."""
    torch.manual_seed(0)
    config = wavlm_config(norm)
    theirs = of_wavlm(config)
    state = fairseq_state(theirs)
    for number, layer in enumerate(theirs.encoder.layers):
        at, attention = f"encoder.layers.{number}.self_attn", layer.attention
        state[f"{at}.grep_a"] = attention.gru_rel_pos_const.detach()
        state[f"{at}.grep_linear.weight"] = attention.gru_rel_pos_linear.weight.detach()
        state[f"{at}.grep_linear.bias"] = attention.gru_rel_pos_linear.bias.detach()
    state["encoder.layers.0.self_attn.relative_attention_bias.weight"] = theirs.encoder.layers[
        0
    ].attention.rel_attn_embed.weight.detach()
    model, _ = fairseq_settings(config)
    cfg = {name: value for name, value in model.items() if name not in ("_name", "logit_temp", "final_dim")}
    cfg |= {"relative_position_embedding": True, "num_buckets": 32, "max_distance": 20, "gru_rel_pos": True}
    torch.save({"cfg": cfg | {"normalize": norm == "layer"}, "model": state}, tmp_path / "WavLM.pt")
    encoder = load_hubert(tmp_path / "WavLM.pt")
    assert (encoder.config.num_heads, encoder.config.normalize_waveform) == (config.num_heads, norm == "layer")
    assert encoder.config.num_heads != attention_heads(768, None, tmp_path)
    with torch.no_grad():
        assert_layers_equal(encoder, theirs, torch.randn(2, int(LENGTHS.max())))


@pytest.mark.parametrize("format", ["fairseq", "torchaudio"])
def test_a_wavlm_is_refused_by_systems_without_its_positions(tmp_path: Path, format: Any) -> None:
    config = wavlm_config("group")
    ours = save_ours(PretrainedWeights(config, HubertEncoder(config).state_dict()), tmp_path / "ours.ckpt")
    with pytest.raises(ValueError, match=r"WavLM's relative positions.*export it .*to transformers"):
        export_model(str(ours), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_a_hubert_keeps_the_fingerprint_that_it_had_before_there_were_relative_positions() -> None:
    encoder = HubertEncoder(EncoderConfig(8, dim=16, num_layers=1, num_heads=2, ffn_dim=16))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(0.5)
    assert encoder_fingerprint(encoder) == "ba36cdc4f64f6c4d"


@torch.no_grad()
def test_a_wavlm_of_any_length_is_the_same_in_a_batch_and_alone() -> None:
    """With the norm of Large, so that nothing else depends on padding; a last layer that is dropped changes nothing."""
    torch.manual_seed(0)
    encoder = HubertEncoder(wavlm_config("layer")).eval()
    waveform = torch.randn(2, int(LENGTHS.max()))
    batch = encoder(waveform, LENGTHS)
    for row, samples in enumerate(LENGTHS.tolist()):
        alone = encoder(waveform[row : row + 1, :samples])[0]
        assert_close(batch[row, : len(alone)], alone, rtol=0, atol=ATOL)


def test_relative_positions_have_a_gradient_in_a_step_that_drops_all_layers() -> None:
    """Other ranks wait for it."""
    encoder = HubertEncoder(wavlm_config("group"))
    encoder(torch.randn(1, 4000), kept=[False] * 3).sum().backward()
    gradients = {name: value.grad for name, value in encoder.named_parameters() if "position" in name}
    assert len(gradients) == 1 + 3 * 3 + 3  # the embedding, three of each layer's gate, and the positional convolution
    assert all(value is not None for value in gradients.values())


@pytest.mark.slow
def test_a_compiled_wavlm_computes_the_same_for_every_length() -> None:
    torch.manual_seed(0)
    config = replace(wavlm_config("group"), dropout=0.0, attention_dropout=0.0, input_dropout=0.0)
    encoder, compiled = HubertEncoder(config), HubertEncoder(config)
    compiled.load_state_dict(encoder.state_dict())
    compiled.compile_parts()
    for samples in (4000, 5200):
        waveform, mask = torch.randn(2, samples), torch.rand(2, num_frames(samples)) < 0.5
        results = []
        for which in (encoder, compiled):
            which.zero_grad()
            output = which(waveform, mask=mask, kept=[True, True, False])
            output.square().mean().backward()
            results.append((output, {name: value.grad for name, value in which.named_parameters()}))
        assert_close(results[1], results[0])
