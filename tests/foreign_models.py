"""Small models of other systems with random weights, and ours with the same weights."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
import transformers
from helpers import DIGITS, NUM_FRAMES, SMALL, Encoder
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.testing import assert_close

from hubert_lightning.asr.ngram import ngram
from hubert_lightning.frames import CLOCK, Clock, num_frames
from hubert_lightning.interchange.import_export import checkpoint_of
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.model.prediction import ClusterPredictor
from hubert_lightning.pretrained.formats import torchaudio as torchaudio_format
from hubert_lightning.pretrained.formats import transformers as transformers_format
from hubert_lightning.pretrained.load import read_weights
from hubert_lightning.pretrained.weights import PretrainedWeights
from hubert_lightning.vocabulary import Vocabulary

NORMS = ["group", "layer"]
FAIRSEQ_LETTERS = ["<s>", "<pad>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]  # fairseq's dict.ltr.txt
LENGTHS = torch.tensor([16_000, 9_000])
ATOL = 1e-5


def small_config(norm: str) -> EncoderConfig:
    """As wide as it must be for rounding to stay below 1e-5: norms over few channels magnify it."""
    return EncoderConfig(
        conv_channels=48,
        conv_norm="group" if norm == "group" else "layer",
        dim=64,
        num_layers=3,
        num_heads=4,
        ffn_dim=96,
        pos_kernel=16,
        pos_groups=4,
        pre_norm=norm == "layer",
        normalize_waveform=norm == "layer",
        dropout=0.2,
        layer_drop=0.3,
        feature_grad_mult=1.0 if norm == "layer" else 0.1,
    )


def random_weights(norm: str, kind: str, **settings: Any) -> PretrainedWeights:
    """Random weights with the heads of a kind: encoder, clusters, ensemble, letters, LibriSpeech's letters."""
    config = replace(small_config(norm), **settings)
    encoder = disturbed(HubertEncoder(config))
    if encoder.relative_positions is not None:
        nn.init.normal_(encoder.relative_positions.embedding.weight)
    trained = PretrainedWeights(config, encoder.state_dict(), provenance={"note": "random"})
    if kind in ("clusters", "ensemble"):
        heads = [ClusterPredictor(64, clusters, 24) for clusters in ((20, 33) if kind == "ensemble" else (20,))]
        trained = replace(trained, predictors=[dict(head.state_dict()) for head in heads], temperature=0.2)
    if "letters" in kind:
        vocabulary = Vocabulary(("<blank>", "|", *"abcdé'"), "lower", "space")
        if kind == "LibriSpeech's letters":  # as many as torchaudio's, in another order
            vocabulary = Vocabulary()
        head = nn.Linear(64, len(vocabulary))
        trained = replace(trained, head=dict(head.state_dict()), vocabulary=vocabulary)
    return trained


@torch.no_grad()
def disturbed(model: Any) -> Any:
    """Norms that are not 1 and 0, so that each is seen to arrive where it belongs."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save_ours(trained: PretrainedWeights, path: Path) -> Path:
    torch.save(checkpoint_of(trained), path)
    return path


def of_transformers(config: EncoderConfig, kind: str = "HubertModel", **settings: Any) -> Any:
    settings |= {theirs: getattr(config, name) for name, theirs in transformers_format.SETTINGS.items()}
    theirs = transformers.HubertConfig(
        conv_dim=[config.conv_channels] * len(config.conv_kernels),
        feat_extract_norm=config.conv_norm,
        apply_spec_augment=False,
        **settings,
    )
    return disturbed(getattr(transformers, kind)(theirs))


def wavlm_config(norm: str) -> EncoderConfig:
    """Distances beyond the exact buckets and beyond the largest one occur within a second."""
    return replace(small_config(norm), position_buckets=32, position_distance=20)


def of_wavlm(config: EncoderConfig, kind: str = "WavLMModel", **settings: Any) -> Any:
    names = transformers_format.SETTINGS | transformers_format.WAVLM_SETTINGS
    settings |= {theirs: getattr(config, name) for name, theirs in names.items()}
    theirs = transformers.WavLMConfig(
        conv_dim=[config.conv_channels] * len(config.conv_kernels),
        feat_extract_norm=config.conv_norm,
        apply_spec_augment=False,
        **settings,
    )
    model = disturbed(getattr(transformers, kind)(theirs))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gru_rel_pos" in name or "rel_attn_embed" in name:  # so that the gates differ, and matter
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def of_torchaudio(config: EncoderConfig, **settings: Any) -> Any:
    arguments = {theirs: getattr(config, name) for theirs, name in torchaudio_format.ARGUMENTS.items()}
    layers = [
        (config.conv_channels, kernel, stride)
        for kernel, stride in zip(config.conv_kernels, config.conv_strides, strict=True)
    ]
    if "num_classes" in settings:
        build = torchaudio.models.hubert_pretrain_model
        settings |= {"mask_prob": 0.8, "mask_selection": "static", "mask_other": 0.0, "mask_length": 10}
        settings |= {"no_mask_overlap": False, "mask_min_space": 1, "mask_channel_prob": 0.0}
        settings |= {"mask_channel_selection": "static", "mask_channel_other": 0.0, "mask_channel_length": 10}
        settings |= {"no_mask_channel_overlap": False, "mask_channel_min_space": 1}
        settings |= {"skip_masked": False, "skip_nomask": False, "feature_grad_mult": 0.1}
    else:
        build = torchaudio.models.wav2vec2_model
        settings = {"aux_num_out": None} | settings
    return disturbed(
        build(extractor_mode=f"{config.conv_norm}_norm", extractor_conv_layer_config=layers, **arguments, **settings)
    )


def normalized_input(waveform: Tensor, length: Tensor | None, config: EncoderConfig) -> Tensor:
    """What other systems want to be given: Large's waveform is normalised by their users."""
    if not config.normalize_waveform:
        return waveform
    samples = [len(row) for row in waveform] if length is None else length.tolist()
    rows = [F.layer_norm(row[:count], (count,)) for row, count in zip(waveform, samples, strict=True)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def valid(output: Tensor, length: Tensor | None, clock: Clock = CLOCK) -> Tensor:
    if length is None:
        return output.flatten(0, 1)
    return torch.cat([row[:frames] for row, frames in zip(output, num_frames(length, clock).tolist(), strict=True)])


def assert_layers_equal(encoder: HubertEncoder, theirs: Any, waveform: Tensor) -> None:
    """Every layer, the input of the first where it is known, and the last after its norm, padded and not."""
    clock = encoder.config.clock
    for length in (None, LENGTHS):
        given = normalized_input(waveform, length, encoder.config)
        if isinstance(theirs, transformers.PreTrainedModel):
            attend = None if length is None else (torch.arange(waveform.shape[1]) < length[:, None]).long()
            output = theirs.base_model(given, attention_mask=attend, output_hidden_states=True)
            layers, last = [*output.hidden_states], output.last_hidden_state
            if encoder.config.pre_norm:
                layers[-1] = None  # theirs is after the norm, which `last` compares
        else:
            layers = [None, *theirs.extract_features(given, length)[0]]
            last = theirs(given, length)[0] if theirs.aux is None else None
        mine = encoder.all_layers(waveform, length, with_input=True)
        assert len(layers) == len(mine) == encoder.config.num_layers + 1
        for our, their in zip(mine, layers, strict=True):
            if their is not None:
                assert_close(valid(our, length, clock), valid(their, length, clock), rtol=0, atol=ATOL)
        if last is not None:
            output = valid(encoder(waveform, length), length, clock)
            assert_close(output, valid(last, length, clock), rtol=0, atol=ATOL)


def fairseq_state(theirs: Any) -> dict[str, Tensor]:
    """A HubertModel of transformers under the names that fairseq gives to the same parts."""
    layer_norm = theirs.config.feat_extract_norm == "layer"
    state = {"mask_emb": theirs.masked_spec_embed.data if hasattr(theirs, "masked_spec_embed") else torch.rand(64)}

    def put(name: str, module: Any) -> None:
        state.update({f"{name}.{part}": value.detach() for part, value in module.named_parameters()})

    for number, layer in enumerate(theirs.feature_extractor.conv_layers):
        put(f"feature_extractor.conv_layers.{number}.0", layer.conv)
        if hasattr(layer, "layer_norm"):  # after the dropout, Sequential's number 1; between transpositions for Large
            put(f"feature_extractor.conv_layers.{number}.2{'.1' if layer_norm else ''}", layer.layer_norm)
    put("layer_norm", theirs.feature_projection.layer_norm)
    put("post_extract_proj", theirs.feature_projection.projection)
    conv, batch_norm = theirs.encoder.pos_conv_embed.conv, getattr(theirs.encoder.pos_conv_embed, "batch_norm", None)
    if batch_norm is not None:
        put("encoder.pos_conv.1", conv)
        state.update({f"encoder.pos_conv.0.{name}": value for name, value in batch_norm.state_dict().items()})
    else:
        state["encoder.pos_conv.0.bias"] = conv.bias.detach()
        state["encoder.pos_conv.0.weight_g"] = conv.parametrizations.weight.original0.detach()
        state["encoder.pos_conv.0.weight_v"] = conv.parametrizations.weight.original1.detach()
    put("encoder.layer_norm", theirs.encoder.layer_norm)
    for number, layer in enumerate(theirs.encoder.layers):
        at = f"encoder.layers.{number}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            put(f"{at}.self_attn.{part}", getattr(layer.attention, part))
        put(f"{at}.self_attn_layer_norm", layer.layer_norm)
        put(f"{at}.fc1", layer.feed_forward.intermediate_dense)
        put(f"{at}.fc2", layer.feed_forward.output_dense)
        put(f"{at}.final_layer_norm", layer.final_layer_norm)
    return state


def fairseq_settings(config: EncoderConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    model = {
        "_name": "hubert",
        "extractor_mode": "layer_norm" if config.conv_norm == "layer" else "default",
        "encoder_layers": config.num_layers,
        "encoder_embed_dim": config.dim,
        "encoder_ffn_embed_dim": config.ffn_dim,
        "encoder_attention_heads": config.num_heads,
        "activation_fn": "gelu",
        "layer_norm_first": config.pre_norm,
        "conv_feature_layers": f"[({config.conv_channels},10,5)] + [(48,3,2)] * 4 + [(48,2,2)] * 2",
        "logit_temp": 0.1,
        "final_dim": 24,
        "untie_final_proj": True,
        "conv_pos": config.pos_kernel,
        "conv_pos_groups": config.pos_groups,
        "dropout": config.dropout,
        "encoder_layerdrop": config.layer_drop,
    }
    return model, {"_name": "hubert_pretraining", "normalize": config.normalize_waveform, "labels": ["km"]}


def fairseq_heads(state: dict[str, Tensor], clusters: list[int]) -> dict[str, Tensor]:
    """With the heads of pre-training: four rows of symbols before the clusters of each dictionary."""
    return state | {
        "label_embs_concat": torch.rand(sum(clusters) + 4 * len(clusters), 24),
        "final_proj.weight": torch.randn(24 * len(clusters), 64),
        "final_proj.bias": torch.randn(24 * len(clusters)),
    }


def fine_tuned_state(norm: str, prefix: str = "") -> tuple[Any, nn.Linear, dict[str, Tensor]]:
    """A model of transformers and a layer that spells 32 tokens, and both under fairseq's names."""
    theirs, head = of_transformers(small_config(norm)), nn.Linear(64, 32)
    state = {f"{prefix}w2v_encoder.w2v_model.{name}": value for name, value in fairseq_state(theirs).items()}
    state |= {f"{prefix}w2v_encoder.proj.{name}": value for name, value in head.state_dict().items()}
    return theirs, head, state


def beside_a_model(folder: Path, dictionary: bytes, rows: int) -> list[str]:
    """The tokens that a model of fairseq has by the dictionary beside it."""
    _, _, state = fine_tuned_state("group")
    state |= {f"w2v_encoder.proj.{name}": value for name, value in nn.Linear(64, rows).state_dict().items()}
    model, task = fairseq_settings(small_config("group"))
    cfg = {"model": {"_name": "hubert_ctc", "w2v_args": {"model": model, "task": task}}, "task": task}
    torch.save({"args": None, "cfg": cfg, "model": state}, folder / "theirs.pt")
    (folder / "dict.ltr.txt").write_bytes(dictionary)
    vocabulary = read_weights(folder / "theirs.pt").vocabulary
    assert vocabulary is not None
    return list(vocabulary.tokens)


def tiny_hubert(model: str = "HubertModel", norm: str = "group", **settings: Any) -> Any:
    config = transformers.HubertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=6,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        **settings,
    )
    return getattr(transformers, model)(config).eval()


def save_transformers(path: Path, tokens: list[str], blank: str, norm: str = "group") -> Any:
    torch.manual_seed(0)
    config = transformers.HubertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        conv_dim=(64,) * 7,  # norms over fewer channels magnify rounding
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        vocab_size=len(tokens),
        pad_token_id=tokens.index(blank),
    )
    model = transformers.HubertForCTC(config).eval()
    nn.init.normal_(model.lm_head.weight, std=0.1)
    model.save_pretrained(path)
    (path / "given.json").write_text(json.dumps({token: place for place, token in enumerate(tokens)}))
    special = {"bos_token": None, "eos_token": None} if "<s>" not in tokens else {}
    unknown = next(token for token in tokens if token in ("<unk>", "[UNK]"))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(
        path / "given.json", pad_token=blank, unk_token=unknown, word_delimiter_token="|", **special
    )
    features = transformers.Wav2Vec2FeatureExtractor(do_normalize=norm == "layer")
    features.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model, tokenizer, features


def path_of(tokens: Sequence[str], blank: str) -> list[str]:
    """A token for each frame: most last one or two frames, some have blanks between them."""
    path = [blank] * 3
    for number, token in enumerate(tokens):
        if path[-1] == token or number % 3 == 1:
            path.append(blank)
        path += [token] * (1 + number % 2)
    assert len(path) <= NUM_FRAMES
    return path + [blank] * (NUM_FRAMES - len(path))


def save_solved_model(
    folder: Path, encoder: Encoder, table: Sequence[str], path: Sequence[str], blank: str = "[PAD]", **tokenizer: Any
) -> None:
    """A directory of transformers, whose model says a token of its table in each frame of the recording."""
    folder.mkdir(exist_ok=True)
    wanted = torch.zeros(NUM_FRAMES, len(table), dtype=torch.float64)
    wanted[range(NUM_FRAMES), [table.index(token) for token in path]] = 12.0
    solved = (encoder.inverse @ wanted).float()  # (dim and bias, tokens)
    head = {"lm_head.weight": solved[:-1].T.contiguous(), "lm_head.bias": solved[-1].contiguous()}
    save_file(encoder.state | head, folder / "model.safetensors", metadata={"format": "pt"})
    config = transformers.HubertConfig(**SMALL, vocab_size=len(table), pad_token_id=table.index(blank))
    config.architectures = ["HubertForCTC"]
    config.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(table)}))
    settings = {"tokenizer_class": "Wav2Vec2CTCTokenizer", "unk_token": "[UNK]", "pad_token": blank} | tokenizer
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def vocabulary_and_log_probs(folder: Path, encoder: Encoder) -> tuple[Vocabulary, Tensor]:
    """The vocabulary of a saved model, and its log-probabilities of the recording."""
    trained = read_weights(folder)
    assert trained.head is not None
    logits = linear(encoder.frames, trained.head["weight"], trained.head["bias"])
    assert trained.vocabulary is not None
    return trained.vocabulary, logits.log_softmax(dim=-1)


def save_digit_models(folder: Path) -> None:
    """Write digits.arpa with digits.lexicon, of words, and letters.arpa, of letters."""
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(DIGITS, size=rng.integers(1, 6))) for _ in range(60)]
    (folder / "text.txt").write_text("\n".join(sentences))
    ngram(folder / "text.txt", folder / "digits.arpa", order=3)
    ngram(folder / "text.txt", folder / "letters.arpa", order=4, letters=True)


def save_causal_lm(folder: Path) -> None:
    """Write a small GPT-2 with random weights, whose tokens are words."""
    words = {word.lower(): index for index, word in enumerate(["</s>", "<unk>", *DIGITS])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
