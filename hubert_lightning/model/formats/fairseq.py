"""Checkpoints of fairseq, pre-trained or fine-tuned, and of s3prl, which keeps the same under other keys.

fairseq's dictionaries begin with four symbols of their own, so the codewords of its clusters begin at row 4 (fairseq
data/dictionary.py; models/hubert/hubert.py: label_embs_concat).
"""

import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubert_lightning.model.hubert import KERNELS, STRIDES, EncoderConfig
from hubert_lightning.model.trained import Dialect, Trained, from_ours, shapes_of, spelling, to_ours
from hubert_lightning.torch_files import plain

OWN_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")  # the blank of CTC is the first
INSIDE_CTC = "w2v_encoder.w2v_model."
HEAD = "w2v_encoder.proj."
NEVER = -1e4  # a bias that no letter wins against

GROUP_NORM, LAYER_NORM = "feature_extractor.conv_layers.{}.2", "feature_extractor.conv_layers.{}.2.1"
DIALECT = Dialect(
    conv="feature_extractor.conv_layers.{}.0",
    conv_norm=GROUP_NORM,
    local_norm="layer_norm",
    projection="post_extract_proj",
    positions="encoder.pos_conv.0",
    norm="encoder.layer_norm",
    attention="encoder.layers.{}.self_attn.{}_proj",
    attention_output="encoder.layers.{}.self_attn.out_proj",
    attention_norm="encoder.layers.{}.self_attn_layer_norm",
    ffn_input="encoder.layers.{}.fc1",
    ffn_output="encoder.layers.{}.fc2",
    ffn_norm="encoder.layers.{}.final_layer_norm",
    mask_embedding="mask_emb",
)
SETTINGS = {
    "num_layers": "encoder_layers",
    "dim": "encoder_embed_dim",
    "ffn_dim": "encoder_ffn_embed_dim",
    "num_heads": "encoder_attention_heads",
    "pre_norm": "layer_norm_first",
    "conv_bias": "conv_bias",
    "pos_kernel": "conv_pos",
    "pos_groups": "conv_pos_groups",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "input_dropout": "dropout_input",
    "layer_drop": "encoder_layerdrop",
    "feature_grad_mult": "feature_grad_mult",
}
FIXED = {
    "activation_fn": "gelu",
    "layer_type": "transformer",
    "target_glu": False,
    "conv_pos_batch_norm": False,
    "pos_conv_depth": 1,
}
# What fairseq's HubertConfig has where a checkpoint does not say
DEFAULTS = {
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "layer_norm_first": False,
    "conv_bias": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "dropout_input": 0.0,
    "encoder_layerdrop": 0.0,
    "feature_grad_mult": 1.0,
}


def is_fairseq(content: Any) -> bool:
    return (
        isinstance(content, dict) and isinstance(content.get("model"), dict) and ("cfg" in content or "args" in content)
    )


def is_s3prl(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("model_weight"), dict) and "model_cfg" in content


def read(path: Path, content: Mapping[str, Any]) -> Trained:
    """A checkpoint of fairseq.

    content: what `read_torch` found in it

    Raises:
        ValueError: It is no HuBERT, or one with parts that we have not.
    """
    settings = plain(content.get("cfg")) or _old_settings(plain(content["args"]))
    model, task = settings.get("model") or {}, settings.get("task") or {}
    state = dict(content["model"])
    symbols = plain(content.get("task_state") or {})
    if not any(name.startswith(INSIDE_CTC) for name in state):
        dictionaries = [entry["symbols"] for entry in symbols.get("dictionaries") or []]
        dictionaries = dictionaries or plain(content.get("dictionaries_symbols")) or []  # s3prl's, in what we write
        return _pretrained(path, state, model, task, dictionaries)
    inside = _old_settings(plain(model.get("w2v_args")) or {})
    encoder = {name.removeprefix(INSIDE_CTC): value for name, value in state.items() if name.startswith(INSIDE_CTC)}
    for name in ("label_embs_concat", "final_proj.weight", "final_proj.bias"):
        encoder.pop(name, None)  # of pre-training; fine-tuning does not keep them whole
    trained = _pretrained(path, encoder, inside.get("model") or model, inside.get("task") or task, [])
    head = {part: state[HEAD + part] for part in ("weight", "bias") if HEAD + part in state}
    if len(head) < 2:
        raise ValueError(f"{path} was fine-tuned, but not with CTC: it has no layer that spells; give another model")
    tokens = (symbols.get("target_dictionary") or {}).get("symbols") or _beside(path, len(head["weight"]))
    return trained._replace(head=head, vocabulary=None if tokens is None else spelling(tokens))


def read_s3prl(path: Path, content: Mapping[str, Any]) -> Trained:
    """A checkpoint that s3prl converted (s3prl upstream/hubert/convert.py)."""
    model, task = plain(content["model_cfg"]), plain(content.get("task_cfg")) or {}
    return _pretrained(
        path, dict(content["model_weight"]), model, task, plain(content.get("dictionaries_symbols")) or []
    )


def of_state(path: Path, state: Mapping[str, Tensor], num_heads: int | None) -> Trained:
    """The bare weights of a pre-trained model, without settings."""
    ours = _to_ours(path, state)
    known = shapes_of(ours, path)
    norm_first = {"layer_norm_first": known["conv_norm"] == "layer", "encoder_attention_heads": num_heads}
    settings = {SETTINGS[name]: value for name, value in known.items() if name in SETTINGS} | norm_first
    mode = "layer_norm" if known["conv_norm"] == "layer" else "default"
    return _pretrained(path, state, settings | {"extractor_mode": mode}, {"normalize": mode == "layer_norm"}, [])


def write(trained: Trained) -> dict[str, bytes]:
    """The files of a folder that fairseq and, but for fine-tuned models, s3prl open.

    checkpoint.pt: fairseq's keys beside s3prl's, of the same weights
    dict.*.txt:    what the clusters, or letters, are called; fairseq looks for them in `task.data`
    """
    config = trained.config
    dialect = DIALECT._replace(conv_norm=LAYER_NORM) if config.conv_norm == "layer" else DIALECT
    state = from_ours(trained.encoder, dialect, old_names=True)
    clusters = trained.num_clusters or [1]
    names = [f"km{number}" for number in range(len(clusters))] if len(clusters) > 1 else ["km"]
    final_dim = trained.predictors[0]["codewords"].shape[1] if trained.predictors else 256
    task = {
        "_name": "hubert_pretraining",
        "data": ".",
        "labels": names,
        "label_dir": None,
        "label_rate": 50.0,
        "sample_rate": 16_000,
        "normalize": config.normalize_waveform,
        "fine_tuning": False,
        "single_target": False,
    }
    model = {
        "_name": "hubert",
        "label_rate": 50.0,
        "extractor_mode": "layer_norm" if config.conv_norm == "layer" else "default",
        "conv_feature_layers": str([(config.conv_channels, *of) for of in zip(KERNELS, STRIDES, strict=True)]),
        "final_dim": final_dim,
        "untie_final_proj": True,
        "logit_temp": trained.temperature,
        **FIXED,
        **{theirs: getattr(config, ours) for ours, theirs in SETTINGS.items()},
    }
    special = list(trained.special) or _drawn(len(clusters), final_dim)
    files = {f"dict.{name}.txt": _symbols(map(str, range(of))) for name, of in zip(names, clusters, strict=True)}
    if trained.head is None or trained.vocabulary is None:
        if trained.predictors:
            pairs = zip(special, trained.predictors, strict=True)
            state["label_embs_concat"] = torch.cat([torch.cat([few, of["codewords"]]) for few, of in pairs])
            for part in ("weight", "bias"):
                state[f"final_proj.{part}"] = torch.cat([of[f"projection.{part}"] for of in trained.predictors])
        content = _fairseq(task, model, "hubert", state)
        if trained.predictors:
            numbered = [[*OWN_SYMBOLS, *map(str, range(of))] for of in clusters]
            content |= {"task_cfg": task, "model_cfg": model, "model_weight": state, "dictionaries_symbols": numbered}
    else:
        tokens, head = list(trained.vocabulary["tokens"]), trained.head
        if tuple(tokens[1 : len(OWN_SYMBOLS)]) != OWN_SYMBOLS[1:]:  # fairseq has three more, which nothing spells
            weight, bias, more = head["weight"], head["bias"], len(OWN_SYMBOLS) - 1
            none, never = weight.new_zeros(more, weight.shape[1]), bias.new_full((more,), NEVER)
            head = {
                "weight": torch.cat([weight[:1], none, weight[1:]]),
                "bias": torch.cat([bias[:1], never, bias[1:]]),
            }
            tokens = [*OWN_SYMBOLS, *tokens[1:]]
        # fairseq makes the pre-trained model first, for which it wants clusters, and throws its head away
        state["label_embs_concat"] = torch.cat([special[0], special[0][:1]])
        state = {INSIDE_CTC + name: value for name, value in state.items()}
        state |= {HEAD + part: value for part, value in head.items()}
        tuned = {
            "_name": "hubert_ctc",
            "w2v_path": "",
            "w2v_args": {"task": task, "model": model},
            "normalize": config.normalize_waveform,
            "data": ".",
            "apply_mask": True,
            "layerdrop": config.layer_drop,
            **{name: model[name] for name in ("dropout", "attention_dropout", "activation_dropout")},
            "feature_grad_mult": 0.0,
        }
        content = _fairseq(task | {"fine_tuning": True, "labels": ["ltr"]}, tuned, "ctc", state)
        files["dict.ltr.txt"] = _symbols(tokens[len(OWN_SYMBOLS) :])
    file = BytesIO()
    torch.save(content, file)
    return {"checkpoint.pt": file.getvalue()} | files


def has_three_more(theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Whether a model of these tokens was written with three that nothing spells."""
    own = len(OWN_SYMBOLS)
    return tuple(theirs[:own]) == OWN_SYMBOLS and [*theirs[own:]] == [*ours[1:]]


def without_three_more(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layer that spells, as it was before `write` gave it those."""
    rows = [0, *range(len(OWN_SYMBOLS), len(head["weight"]))]
    return {part: value[rows] for part, value in head.items()}


def _pretrained(
    path: Path, state: Mapping[str, Tensor], model: Mapping[str, Any], task: Mapping[str, Any], symbols: list[list[str]]
) -> Trained:
    ours = _to_ours(path, state)
    config = _config(path, ours, model, task)
    head = {name: ours.pop(name, None) for name in ("label_embs_concat", "final_proj.weight", "final_proj.bias")}
    temperature = float(model.get("logit_temp", 0.1))
    codewords, weight, bias = head.values()
    if codewords is None or weight is None or bias is None:
        return Trained(config, ours, temperature=temperature)
    rows = [len(of) for of in symbols] or [len(codewords)]
    own = len(OWN_SYMBOLS)
    if codewords.dim() != 2 or sum(rows) != len(codewords) or min(rows) <= own:
        # Without the dictionaries, as when several were joined, nothing says which cluster is whose
        raise ValueError(
            f"{path} has codewords of shape {tuple(codewords.shape)} for dictionaries of {rows} symbols, {own} "
            "of which are fairseq's own; one of the two is another model's"
        )
    split = codewords.split(rows)
    tied = len(weight) != codewords.shape[1] * len(rows)
    weights, biases = ([part] * len(rows) if tied else part.chunk(len(rows)) for part in (weight, bias))
    predictors = [
        {"codewords": of[own:], "projection.weight": w, "projection.bias": b}
        for of, w, b in zip(split, weights, biases, strict=True)
    ]
    return Trained(config, ours, predictors, temperature, special=[of[:own].clone() for of in split])


def _to_ours(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    over_channels = f"{LAYER_NORM.format(1)}.weight" in state
    try:
        return to_ours(state, DIALECT._replace(conv_norm=LAYER_NORM) if over_channels else DIALECT)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; copy or download it again") from error


def _config(path: Path, ours: Mapping[str, Tensor], model: Mapping[str, Any], task: Mapping[str, Any]) -> EncoderConfig:
    for name, value in FIXED.items():
        if model.get(name, value) != value:
            raise ValueError(f"{path} sets {name} to {model[name]}; this encoder only knows {value}")
    layout = str(model.get("conv_feature_layers") or "")
    if layout and _layers(layout) != [*zip(KERNELS, STRIDES, strict=True)]:
        raise ValueError(
            f"{path} has convolutions {layout}; this encoder only knows kernels {list(KERNELS)} and strides "
            f"{list(STRIDES)}, give another model"
        )
    known = shapes_of(ours, path)
    stated = {name: model.get(theirs, DEFAULTS[theirs]) for name, theirs in SETTINGS.items()}
    if stated["num_heads"] is None:
        stated["num_heads"] = known["dim"] // 64
    try:
        return EncoderConfig(
            conv_channels=known["conv_channels"],
            conv_norm=known["conv_norm"],
            normalize_waveform=bool(task.get("normalize", False)),
            **stated,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} describes no encoder: {error}") from error


def _layers(layout: str) -> list[tuple[int, int]] | None:
    """Kernel and stride of each convolution in "[(512,10,5)] + [(512,3,2)] * 4 + …", read, not run."""
    layers: list[tuple[int, int]] = []
    for tuples, times in re.findall(r"\[([^\[\]]*)\](?:\s*\*\s*(\d{1,2}))?", layout):
        found = re.findall(r"\(\s*\d+\s*,\s*(\d+)\s*,\s*(\d+)\s*\)", tuples)
        layers += [(int(kernel), int(stride)) for kernel, stride in found] * int(times or 1)
    return layers


def _old_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the time when model and task shared one namespace."""
    return dict(settings) if not settings or "model" in settings else {"model": settings, "task": settings}


def _beside(path: Path, rows: int) -> list[str] | None:
    """The symbols in the dictionary that lies beside a checkpoint, as fairseq reads it."""
    file = path.parent / "dict.ltr.txt"
    if not file.exists():
        return None
    symbols = [line.rsplit(" ", 1)[0] for line in file.read_text("utf-8").splitlines() if line]
    tokens = [*OWN_SYMBOLS, *symbols]
    if len(tokens) != rows:
        raise ValueError(f"{file} has {len(symbols)} symbols, and the model beside it spells {rows - len(OWN_SYMBOLS)}")
    return tokens


def _symbols(names: Any) -> bytes:
    return "".join(f"{name} 1\n" for name in names).encode()


def _drawn(streams: int, final_dim: int) -> list[Tensor]:
    """Codewords of fairseq's own symbols as it draws them, U(0, 1), the same every time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(len(OWN_SYMBOLS), final_dim, generator=generator) for _ in range(streams)]


def _fairseq(task: Any, model: Any, criterion: str, state: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "args": None,
        "cfg": {"_name": None, "common": {}, "task": task, "model": model, "criterion": {"_name": criterion}},
        "model": state,
        "optimizer_history": [
            {
                "criterion_name": "HubertCriterion" if criterion == "hubert" else "CtcCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {"best": None},
                "num_updates": 0,
            }
        ],
        "task_state": {},
        "extra_state": {"epoch": 1},
        "last_optimizer_state": None,
    }
