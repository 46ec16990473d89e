"""Every released family's directory opens with transformers' numbers, or is refused in one sentence that says why.

The families are small copies with random weights: the settings are those of the released config.json and
preprocessor_config.json but for the sizes, the files those that lie in the released directory.
"""

import json
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from foreign_models import (
    ATOL,
    FAIRSEQ_LETTERS,
    assert_layers_equal,
    disturbed,
    fairseq_heads,
    fairseq_settings,
    fairseq_state,
    of_torchaudio,
    of_transformers,
    random_weights,
    small_config,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from hubert_lightning.interchange.import_export import checkpoint_of
from hubert_lightning.pretrained.formats.fairseq import INSIDE_CTC
from hubert_lightning.pretrained.formats.own import to_safetensors, to_state
from hubert_lightning.pretrained.load import encoder_config, load_encoder, load_hubert, read_weights
from hubert_lightning.pretrained.weights import PretrainedWeights, build_encoder

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "conv_dim": [48] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 24,
}
BASE = {
    "activation_dropout": 0.1,
    "apply_spec_augment": True,
    "attention_dropout": 0.1,
    "bos_token_id": 1,
    "conv_bias": False,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "ctc_loss_reduction": "sum",
    "ctc_zero_infinity": False,
    "do_stable_layer_norm": False,
    "eos_token_id": 2,
    "feat_extract_activation": "gelu",
    "feat_extract_dropout": 0.0,
    "feat_extract_norm": "group",
    "feat_proj_dropout": 0.1,
    "final_dropout": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "layerdrop": 0.1,
    "mask_channel_length": 10,
    "mask_channel_min_space": 1,
    "mask_channel_other": 0.0,
    "mask_channel_prob": 0.0,
    "mask_channel_selection": "static",
    "mask_feature_length": 10,
    "mask_feature_prob": 0.0,
    "mask_time_length": 10,
    "mask_time_min_space": 1,
    "mask_time_other": 0.0,
    "mask_time_prob": 0.05,
    "mask_time_selection": "static",
    "model_type": "hubert",
    "num_feat_extract_layers": 7,
    "pad_token_id": 0,
    "tokenizer_class": "Wav2Vec2CTCTokenizer",
    "torch_dtype": "float32",
    "transformers_version": "4.10.0.dev0",
    "vocab_size": 32,
}
LARGE = BASE | {
    "conv_bias": True,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "feat_proj_dropout": 0.0,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
}
SUPERB = {"use_weighted_layer_sum": True, "id2label": {"0": "yes", "1": "no"}, "label2id": {"yes": 0, "no": 1}}
NEW_SETTINGS = {"conv_pos_batch_norm": False, "feat_proj_layer_norm": True, "adapter_attn_dim": None}
NEW_SETTINGS |= {"mask_time_min_masks": 2, "mask_feature_min_masks": 0, "add_adapter": False, "dtype": "float32"}
WAV2VEC2_SETTINGS = {"num_adapter_layers": 3, "adapter_kernel_size": 3, "adapter_stride": 2, "output_hidden_size": 64}
WAV2VEC2_SETTINGS |= {
    "num_codevectors_per_group": 320,
    "num_negatives": 100,
    "codevector_dim": 256,
    "xvector_output_dim": 512,
}
EXTRACTOR = {
    "do_normalize": True,
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0,
    "sampling_rate": 16000,
}


class HubertModelWithFinalProj(transformers.HubertModel):
    """contentvec's class: the head of pre-training beside an encoder whose names have no prefix."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.final_proj = nn.Linear(config.hidden_size, config.classifier_proj_size)


class Family(NamedTuple):
    """What lies in a directory.

    config:     beyond the sizes
    extractor:  of preprocessor_config.json; none if there is no such file
    kind:       class that was saved
    weights:    "bin" or "safetensors", "in shards", or "from before torch 1.6"
    old_norm:   weight norm as before torch 2.0, weight_g and weight_v
    dtype:      of the weights
    beside:     names of other files
    """

    config: dict[str, Any]
    extractor: dict[str, Any] | None = EXTRACTOR
    kind: Any = transformers.HubertModel
    weights: str = "bin"
    old_norm: bool = True
    dtype: torch.dtype = torch.float32
    beside: tuple[str, ...] = ()


LIKE_LARGE = EXTRACTOR | {"return_attention_mask": True}
FAMILIES = {
    "facebook/hubert-base-ls960": Family(BASE, beside=("tf_model.h5", "README.md")),
    "facebook/hubert-large-ll60k": Family(LARGE, LIKE_LARGE, beside=("tf_model.h5",)),
    "facebook/hubert-large-ls960-ft": Family(LARGE, LIKE_LARGE, transformers.HubertForCTC, beside=("tf_model.h5",)),
    "facebook/hubert-xlarge-ll60k": Family(LARGE, LIKE_LARGE, weights="bin in shards"),
    "facebook/hubert-xlarge-ls960-ft": Family(LARGE, LIKE_LARGE, transformers.HubertForCTC, "bin in shards"),
    "lengyue233/content-vec-best": Family(
        BASE | {"architectures": ["HubertModelWithFinalProj"]}, None, HubertModelWithFinalProj, beside=("convert.py",)
    ),
    "TencentGameMate/chinese-hubert-base": Family(BASE, beside=("chinese-hubert-base-fairseq-ckpt.pt",)),
    "TencentGameMate/chinese-hubert-large": Family(LARGE, LIKE_LARGE, beside=("chinese-hubert-large-fairseq-ckpt.pt",)),
    "rinna/japanese-hubert-base": Family(
        BASE | NEW_SETTINGS, EXTRACTOR | {"do_normalize": False}, weights="safetensors", beside=("fairseq/model.pt",)
    ),
    "rinna/japanese-hubert-large": Family(LARGE, LIKE_LARGE, weights="safetensors", beside=("fairseq/model.pt",)),
    "team-lucid/hubert-base-korean": Family(
        BASE | {"num_attention_heads": 8}, weights="safetensors", beside=("flax_model.msgpack",)
    ),
    "utter-project/mHuBERT-147": Family(
        BASE | {"layerdrop": 0.0}, beside=("checkpoint_best.pt", "mhubert147_faiss.index")
    ),
    "voidful/mhubert-base": Family(BASE, EXTRACTOR | {"do_normalize": False}, weights="bin from before torch 1.6"),
    "superb/hubert-base-superb-ks": Family(BASE | SUPERB, kind=transformers.HubertForSequenceClassification),
    "superb/hubert-large-superb-er": Family(
        LARGE | SUPERB, LIKE_LARGE, transformers.HubertForSequenceClassification, "safetensors"
    ),
    "saved by transformers 5": Family(BASE | NEW_SETTINGS, weights="safetensors", old_norm=False),
    "saved by transformers 5, in shards": Family(
        LARGE | NEW_SETTINGS, weights="safetensors in shards", old_norm=False, kind=transformers.HubertForCTC
    ),
    "with wav2vec 2.0's settings": Family(BASE | NEW_SETTINGS | WAV2VEC2_SETTINGS),
    "in float16": Family(BASE | {"torch_dtype": "float16"}, dtype=torch.float16),
    "in bfloat16": Family(LARGE | {"torch_dtype": "bfloat16"}, dtype=torch.bfloat16, weights="safetensors"),
    "norm before attention, group norm": Family(BASE | {"do_stable_layer_norm": True, "conv_bias": True}),
    "norm after attention, layer norm": Family(LARGE | {"do_stable_layer_norm": False, "conv_bias": False}),
    "an odd number of positions": Family(BASE | {"num_conv_pos_embeddings": 19}),
    "never masked": Family(BASE | {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}),
    "an extractor that leaves the default out": Family(BASE, {"feature_extractor_type": "Wav2Vec2FeatureExtractor"}),
}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def old_name(name: str) -> str:
    """As torch called the parts of weight norm before 2.0."""
    name = name.replace("parametrizations.weight.original0", "weight_g")
    return name.replace("parametrizations.weight.original1", "weight_v")


def saved(folder: Path, family: Family) -> Any:
    """The directory of a family; returns the model."""
    settings = {key: value for key, value in (SMALL | family.config).items() if key not in ("torch_dtype", "dtype")}
    model = disturbed(family.kind(transformers.HubertConfig(**settings))).to(family.dtype)
    model.save_pretrained(folder, max_shard_size="60KB" if "shards" in family.weights else "5GB")
    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        if family.old_norm:
            state = {old_name(name): value for name, value in state.items()}
        if "bin" in family.weights:
            name = file.name.replace("model", "pytorch_model").replace("safetensors", "bin")
            torch.save(state, folder / name, _use_new_zipfile_serialization="1.6" not in family.weights)
            file.unlink()
        else:
            save_file(state, file, metadata={"format": "pt"})
    for index in folder.glob("*.index.json"):
        text = index.read_text()
        text = old_name(text) if family.old_norm else text
        if "bin" in family.weights:
            text = text.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            index.unlink()
            index = folder / "pytorch_model.bin.index.json"
        index.write_text(text)
    architectures = {"architectures": [family.kind.__name__], "_name_or_path": "/somebodys/checkpoint"}
    (folder / "config.json").write_text(json.dumps(architectures | SMALL | family.config))
    if family.extractor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(family.extractor))
    for name in family.beside:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not for us")
    return model.float()


def heard_there(folder: Path, waveform: Tensor) -> Tensor:
    """What their feature extractor makes of audio; the audio itself where there is none."""
    if not (folder / "preprocessor_config.json").exists() and not (folder / "processor_config.json").exists():
        return waveform
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    rows = [row.numpy() for row in waveform]
    return extractor(rows, sampling_rate=16_000, return_tensors="pt").input_values


def assert_opens(folder: Path, theirs: Any) -> None:
    """Every layer, of audio that is loud enough for what is added to its variance, 1e-7 there and 1e-5 here."""
    waveform = 10 * torch.randn(2, 6000) + 1
    encoder = load_hubert(folder)
    output = theirs.base_model(heard_there(folder, waveform), output_hidden_states=True)
    mine = encoder.all_layers(waveform)
    for our, their in list(zip(mine, output.hidden_states[1:], strict=True))[: -1 if encoder.config.pre_norm else None]:
        assert_close(our, their, rtol=0, atol=ATOL)
    assert_close(encoder(waveform), output.last_hidden_state, rtol=0, atol=ATOL)
    assert encoder_config(folder) == encoder.config


@pytest.mark.parametrize("name", FAMILIES)
def test_a_released_family_has_transformers_numbers(tmp_path: Path, name: str) -> None:
    assert_opens(tmp_path, saved(tmp_path, FAMILIES[name]))


def test_settings_are_read_as_in_transformers(tmp_path: Path) -> None:
    """So that the table is of what its names say: the layers of the reference are those of `from_pretrained`."""
    saved(tmp_path, FAMILIES["superb/hubert-large-superb-er"])
    theirs, report = transformers.HubertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert_opens(tmp_path, theirs.eval())


REFUSED = {
    "ntu-spml/distilhubert": (BASE | {"feat_proj_layer_norm": False}, "config.json sets feat_proj_layer_norm to False"),
    "m-a-p/MERT-v1-95M": (BASE | {"model_type": "mert_model"}, "config.json describes a model of type 'mert_model'"),
    "facebook/wav2vec2-base": (BASE | {"model_type": "wav2vec2"}, "config.json describes a model of type 'wav2vec2'"),
    "adapters in the layers": (LARGE | {"adapter_attn_dim": 16}, "config.json sets adapter_attn_dim to 16"),
    "HuBERT-ECG": (
        BASE | {"conv_stride": [8, 2, 2, 2, 2, 2, 2]},
        "config.json describes no encoder: conv_strides [8, 2, 2, 2, 2, 2, 2] move by 512 samples",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_architecture_is_refused_by_its_setting(tmp_path: Path, name: str) -> None:
    config, sentence = REFUSED[name]
    saved(tmp_path, Family(BASE))
    (tmp_path / "config.json").write_text(json.dumps(SMALL | config))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/{sentence}")) as refusal:
        load_hubert(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_processor_goes_before_an_old_preprocessor(tmp_path: Path, nested: bool, normalize: bool) -> None:
    """A directory that was saved before and since transformers 5 holds both files."""
    theirs = saved(tmp_path, Family(BASE, EXTRACTOR | {"do_normalize": not normalize}))
    extractor = EXTRACTOR | {"do_normalize": normalize}
    processor = {"processor_class": "Wav2Vec2Processor"} | ({"feature_extractor": extractor} if nested else {})
    (tmp_path / "processor_config.json").write_text(json.dumps(processor))
    assert load_hubert(tmp_path).config.normalize_waveform == (normalize if nested else not normalize)
    assert_opens(tmp_path, theirs)


def test_audio_of_another_rate_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, Family(BASE, EXTRACTOR | {"sampling_rate": 8000}))
    with pytest.raises(ValueError, match=r"preprocessor_config.json sets sampling_rate to 8000; this encoder only"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("name", ["flax_model.msgpack", "tf_model.h5"])
def test_weights_for_another_library_are_named(tmp_path: Path, name: str) -> None:
    saved(tmp_path, Family(BASE, beside=(name,)))
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=f"has no model.safetensors, only {name}; open the model in a transformers"):
        load_encoder(tmp_path)


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    """As of a Wav2Vec2 with add_adapter, whose CTC head follows the adapter."""
    saved(tmp_path, FAMILIES["facebook/hubert-large-ls960-ft"])
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    torch.save(state | {"lm_head.weight": torch.rand(32, 24)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has a CTC head of width 24, and an encoder of width 64; one of the"):
        read_weights(tmp_path)


@pytest.mark.parametrize("value", [None, "x", -1, [], {}, 1e300, True, [1, 2], float("nan"), 3.5, 2**70])
def test_no_setting_of_another_kind_ends_in_a_traceback(tmp_path: Path, value: Any) -> None:
    saved(tmp_path, Family(BASE | NEW_SETTINGS))
    config = json.loads((tmp_path / "config.json").read_text())
    for name in config:
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        said = f"{tmp_path} opens"
        try:
            load_encoder(tmp_path)
        except ValueError as error:
            said = str(error)
        assert str(tmp_path) in said
        assert "\n" not in said


# One tolerance for all formats: other heads are set aside, and named; what is inside the encoder is not


STRANGERS = {"final_proj.weight": (24, 64), "classifier.bias": (2,), "quantizer.vars": (1, 8, 4)}
STRANGERS |= {"projector.weight": (24, 64), "layer_weights": (4,), "norm.weight": (64,), "projection.weight": (9, 9)}


def strange(format: str, where: str, folder: Path) -> tuple[Path, Any, set[str]]:
    """A model of a format with parts of `STRANGERS` at a place; the file, its reference, and what has to be named."""
    theirs = of_torchaudio(small_config("group")) if format == "torchaudio" else of_transformers(small_config("group"))
    state = fairseq_state(theirs) if format in ("fairseq", "s3prl") else theirs.state_dict()
    inside = {"transformers": "hubert.", "torchaudio": "model.", "fairseq": INSIDE_CTC, "s3prl": "upstream.model."}
    prefix = "" if where == "beside the bare encoder" else inside[format]
    state = {prefix + name: value for name, value in state.items()}
    names = {f"{prefix}{name}" if where == "inside what has a prefix" else name for name in STRANGERS}
    if format in ("fairseq", "s3prl"):
        names -= {name for name in names if "final_proj" in name}  # half of a head that is known there
    state |= {name: torch.rand(STRANGERS[name.removeprefix(prefix)]) for name in names}
    path = folder / "theirs.pt"
    model, task = fairseq_settings(small_config("group"))
    if format == "transformers":
        theirs.save_pretrained(folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        path = folder
    elif format == "torchaudio":
        torch.save({"state_dict": state, "hyper_parameters": {"lr": 0.1}}, path)  # as Lightning does
    elif format == "fairseq":
        torch.save({"args": None, "cfg": {"model": model, "task": task}, "model": state}, path)
    else:
        torch.save({"model_cfg": model, "task_cfg": task, "model_weight": state}, path)
    return path, theirs, {name.removeprefix(prefix) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("format", ["transformers", "torchaudio", "fairseq", "s3prl"])
@pytest.mark.parametrize("where", ["beside the bare encoder", "beside what has a prefix", "inside what has a prefix"])
def test_other_heads_are_left_out_and_named_in_every_format(tmp_path: Path, format: str, where: str) -> None:
    path, theirs, names = strange(format, where, tmp_path)
    trained = read_weights(path, 4)
    assert f"left out, because this package cannot use it: {min(names)} and {len(names) - 1} more" in trained.notes
    assert trained.head is None
    rows = torch.randn(2, 16_000)
    rows[1, 9_000:] = 0
    assert_layers_equal(build_encoder(trained, path), theirs, rows)


@pytest.mark.parametrize("format", ["transformers", "torchaudio", "fairseq", "s3prl"])
@pytest.mark.parametrize("where", ["beside the bare encoder", "inside what has a prefix"])
def test_unknown_weights_inside_the_encoder_are_refused(
    tmp_path: Path, format: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STRANGERS, "encoder.layers.0.adapter_layer.weight", (2, 64))
    path, _, _ = strange(format, where, tmp_path)
    with pytest.raises(ValueError, match="has weights that this encoder cannot use"):
        read_weights(path, 4)


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_an_added_head_in_our_files_is_named(tmp_path: Path, form: str) -> None:
    trained = random_weights("group", "clusters")
    path = tmp_path / f"ours.{form}"
    if form == "ckpt":
        content = checkpoint_of(trained)
        content["state_dict"]["speaker_head.weight"] = torch.rand(3, 64)
        torch.save(content, path)
    else:
        save_file({"speaker_head.weight": torch.rand(3, 64), **to_state(trained)}, path, about(trained))
    again = read_weights(path)
    assert again.notes == ["left out, because this package cannot use it: speaker_head.weight"]
    assert_close(again.encoder, trained.encoder, rtol=0, atol=0)


def about(trained: PretrainedWeights) -> dict[str, str]:
    """What `to_safetensors` writes into the file's metadata."""
    with BytesIO(to_safetensors(trained)) as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size))["__metadata__"]


def test_a_model_of_fairseq_with_a_decoder_is_its_encoder(tmp_path: Path) -> None:
    """As of fairseq's HubertSeq2SeqModel."""
    theirs = of_transformers(small_config("layer"))
    model, task = fairseq_settings(small_config("layer"))
    state = {f"encoder.w2v_model.{name}": value for name, value in fairseq_state(theirs).items()}
    state |= {"decoder.embed_tokens.weight": torch.rand(9, 64), "encoder.proj.weight": torch.rand(5, 64)}
    settings = {"model": {"_name": "hubert_seq2seq", "w2v_args": {"model": model, "task": task}}, "task": task}
    torch.save({"args": None, "cfg": settings, "model": state}, tmp_path / "theirs.pt")
    trained = read_weights(tmp_path / "theirs.pt")
    assert trained.notes[0] == "left out, because this package cannot use it: decoder.embed_tokens.weight and 1 more"
    assert_layers_equal(load_encoder(tmp_path / "theirs.pt"), theirs, torch.randn(2, 16_000))


def test_bare_weights_of_a_fine_tuned_model_of_fairseq_keep_their_head(tmp_path: Path) -> None:
    state = {INSIDE_CTC + name: value for name, value in fairseq_state(of_transformers(small_config("group"))).items()}
    head = {f"w2v_encoder.proj.{name}": value for name, value in nn.Linear(64, 32).state_dict().items()}
    torch.save(state | head, tmp_path / "theirs.pt")
    (tmp_path / "dict.ltr.txt").write_text("".join(f"{letter} 1\n" for letter in FAIRSEQ_LETTERS[4:]))
    trained = read_weights(tmp_path / "theirs.pt", 4)
    assert trained.head is not None
    assert_close(trained.head["weight"], head["w2v_encoder.proj.weight"], rtol=0, atol=0)
    assert trained.vocabulary is not None
    assert list(trained.vocabulary.tokens) == FAIRSEQ_LETTERS


def test_a_checkpoint_of_fairseq_with_types_among_its_settings_opens(tmp_path: Path) -> None:
    theirs = of_transformers(small_config("group"))
    state = fairseq_heads(fairseq_state(theirs), [20])
    model, task = fairseq_settings(small_config("group"))
    about: dict[str, Any] = {"ref_type": str, "key_type": int, "element_type": Any, "optional": type(None)}
    content = {"cfg": {"model": model | {"_metadata": about}, "task": task}, "args": None, "model": state}
    torch.save(content, tmp_path / "theirs.pt")
    assert_layers_equal(load_encoder(tmp_path / "theirs.pt"), theirs, torch.randn(2, 16_000))
