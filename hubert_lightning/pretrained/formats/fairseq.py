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

from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.convolutions import KERNELS, STRIDES
from hubert_lightning.pretrained.dialect import Dialect, from_ours, prefix_of, to_ours
from hubert_lightning.pretrained.weights import (
    TRAINING,
    Trained,
    encoder_alone,
    heads_of,
    keeping,
    kept_for,
    settings_of,
    shapes_of,
    spelling,
    summary_of,
    tokens_with_boundary,
    trained_with,
)
from hubert_lightning.untrusted.json_file import shown
from hubert_lightning.untrusted.text_file import lines_of
from hubert_lightning.untrusted.torch_file import plain

OWN_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")  # the blank of CTC is the first
INSIDE_CTC = "w2v_encoder.w2v_model."
HEAD = "w2v_encoder.proj."
PRETRAINED_HEAD = ("label_embs_concat", "final_proj.weight", "final_proj.bias")
OVERWRITE = "#fairseq:overwrite"
"""After a symbol in a dictionary: it takes the place of the one of its name."""
BESIDE_BLANK = "<bos>"
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
MASKS = (
    *("mask_prob", "mask_length", "mask_selection", "mask_other", "no_mask_overlap"),
    *("mask_channel_prob", "mask_channel_length", "mask_channel_selection", "mask_channel_other"),
    "no_mask_channel_overlap",
)
# What this package has elsewhere (masks belong to the data) or not at all, of each part of fairseq's settings
KEPT = {
    "model": (
        *MASKS,
        *("mask_min_space", "mask_channel_min_space", "dropout_features", "skip_masked", "skip_nomask", "latent_temp"),
        *("final_dim", "untie_final_proj", "required_seq_len_multiple", "checkpoint_activations", "max_positions"),
        *("pos_enc_type", "attn_type", "depthwise_conv_kernel_size", "fp16"),
    ),
    "task": ("label_rate", "max_sample_size", "min_sample_size", "max_keep_size", "min_keep_size", "random_crop")
    + ("pad_audio", "enable_padding"),
    "ctc": (*MASKS, "apply_mask", "final_dropout", "freeze_finetune_updates", "no_pretrained_weights"),
}
# fairseq examples/hubert/config/pretrain: the same for Base, Large and X-Large; HubertConfig has mask_prob 0.65
RECIPE = {"mask_prob": 0.8, "mask_length": 10, "mask_selection": "static", "mask_other": 0, "no_mask_overlap": False}
RECIPE |= {"mask_channel_prob": 0.0, "skip_masked": False, "skip_nomask": False}
TUNED = ("dropout", "attention_dropout", "activation_dropout", "dropout_input", "feature_grad_mult")
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
    """Whether a file of torch holds what fairseq saves: weights under "model", settings under "cfg" or "args"."""
    return (
        isinstance(content, dict) and isinstance(content.get("model"), dict) and ("cfg" in content or "args" in content)
    )


def is_s3prl(content: Any) -> bool:
    """Whether a file of torch holds what s3prl makes of fairseq's."""
    return isinstance(content, dict) and isinstance(content.get("model_weight"), dict) and "model_cfg" in content


def read(path: Path, content: Mapping[str, Any], num_heads: int | None = None) -> Trained:
    """A checkpoint of fairseq.

    content:   what `read_torch` found in it
    num_heads: number of attention heads, for a file without settings of its encoder

    Raises:
        UserError: It is no HuBERT, or one with parts that we have not.
    """
    settings = plain(content.get("cfg")) or _old_settings(plain(content.get("args")) or {})
    model, task = settings.get("model") or {}, settings.get("task") or {}
    state = _whole(content["model"])
    symbols = plain(content.get("task_state") or {})
    if not prefix_of(state, DIALECT):
        dictionaries = [entry["symbols"] for entry in symbols.get("dictionaries") or []]
        dictionaries = dictionaries or plain(content.get("dictionaries_symbols")) or []  # s3prl's, in what we write
        return _noted(
            _pretrained(path, state, *_sizes_and_task(path, state, model, task, num_heads), dictionaries), model
        )
    inside = _old_settings(plain(model.get("w2v_args")) or {})
    tokens = (symbols.get("target_dictionary") or {}).get("symbols")
    of_encoder = inside.get("model") or model
    sizes_and_task = _sizes_and_task(path, state, of_encoder, inside.get("task") or task, num_heads)
    return _noted(_fine_tuned(path, state, *sizes_and_task, tokens), of_encoder)


def read_s3prl(path: Path, content: Mapping[str, Any], num_heads: int | None = None) -> Trained:
    """A checkpoint that s3prl converted (s3prl upstream/hubert/convert.py); arguments as of `read`."""
    state, model, task = (
        dict(content["model_weight"]),
        plain(content["model_cfg"]),
        plain(content.get("task_cfg")),
    )
    sizes_and_task = _sizes_and_task(path, state, model, task or {}, num_heads)
    return _noted(_pretrained(path, state, *sizes_and_task, plain(content.get("dictionaries_symbols")) or []), model)


def with_settings(path: Path, trained: Trained, content: Mapping[str, Any]) -> Trained:
    """What `read` or `read_s3prl` made, with the settings of its file that are not of an encoder, for `write`.

    A fine-tuned model has the dropouts of its fine-tuning, as fairseq gives its encoder (models/hubert/hubert_asr.py:
    arg_overrides).
    """
    settings = plain(content.get("cfg")) or _old_settings(plain(content.get("args")) or {})
    model = settings.get("model") or plain(content.get("model_cfg")) or {}
    task = settings.get("task") or plain(content.get("task_cfg")) or {}
    parts = {"model": model, "task": task}
    inside = _old_settings(plain(model.get("w2v_args")) or {})
    if inside or prefix_of(_whole(content.get("model") or {}), DIALECT):
        parts = {"model": inside.get("model") or {}, "task": inside.get("task") or {}, "ctc": model}
        stated = {ours: model[theirs] for ours, theirs in SETTINGS.items() if theirs in TUNED and theirs in model}
        stated |= {"layer_drop": model["layerdrop"]} if "layerdrop" in model else {}
        trained = trained._replace(config=trained_with(trained.config, stated, path))
    kept = {f"{part}.{name}": given[name] for part, given in parts.items() for name in KEPT[part] if name in given}
    if not trained.predictors and "logit_temp" in parts["model"]:  # of the head of pre-training, which is not there
        kept["model.logit_temp"] = parts["model"]["logit_temp"]
    # A label rate may be another setting's name
    return keeping(trained, "fairseq", {name: value for name, value in kept.items() if not str(value).startswith("${")})


def of_state(path: Path, state: Mapping[str, Tensor], num_heads: int | None) -> Trained:
    """The bare weights of a model, pre-trained or inside of another, without settings."""
    state = _whole(state)
    settings, task = _sizes_and_task(path, state, {}, {}, num_heads)
    if prefix_of(state, DIALECT):
        return _fine_tuned(path, state, settings, task, None)
    return _pretrained(path, state, settings, task, [])


def _whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model, without the prefix of a module that holds the whole of it."""
    outer = prefix_of(state, DIALECT).removesuffix(INSIDE_CTC)
    if outer and all(name.startswith(outer) for name in state):
        return {name.removeprefix(outer): value for name, value in state.items()}
    return dict(state)


def _has_encoder(model: Mapping[str, Any]) -> bool:
    """Whether settings of a model are those of an encoder, and not only of what was made of one."""
    return any(SETTINGS[name] in model for name in ("num_layers", "dim", "ffn_dim", "num_heads", "pre_norm"))


def _sizes_and_task(
    path: Path, state: Mapping[str, Tensor], model: Mapping[str, Any], task: Mapping[str, Any], num_heads: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of model and task, those that are missing from the weights or, where these do not tell, as released."""
    _check(path, model, task)
    known = shapes_of(_to_ours(path, state)[0], path)
    shapes = {SETTINGS[name]: value for name, value in known.items() if name in SETTINGS}
    if _has_encoder(model):
        return shapes | dict(model), dict(task)
    over_channels = known["conv_norm"] == "layer"
    released: dict[str, Any] = {SETTINGS[name]: value for name, value in TRAINING[known["conv_norm"]].items()}
    released |= {"layer_norm_first": over_channels, "extractor_mode": "layer_norm" if over_channels else "default"}
    released |= {"encoder_attention_heads": heads_of(known["dim"], num_heads, path)}
    return shapes | released | dict(model), {"normalize": over_channels} | dict(task)


def _noted(trained: Trained, model: Mapping[str, Any]) -> Trained:
    if _has_encoder(model):
        return trained
    note = "it has no settings of its encoder, which are taken from its weights and from the released model of its kind"
    return trained._replace(notes=[*trained.notes, note])


def write(trained: Trained) -> dict[str, bytes]:
    """The files of a folder that fairseq and, but for fine-tuned models, s3prl open.

    checkpoint.pt: fairseq's keys beside s3prl's, of the same weights
    dict.*.txt:    what the clusters, or letters, are called; fairseq looks for them in `task.data`

    Raises:
        UserError: The convolutions are as wide as the Transformer: fairseq then has no projection between them.
    """
    config = trained.config
    if config.conv_channels == config.dim:
        raise UserError(
            f"convolutions and Transformer are both of {config.dim} channels, for which fairseq has no projection; "
            "export this model to transformers or torchaudio"
        )
    dialect = DIALECT._replace(conv_norm=LAYER_NORM) if config.conv_norm == "layer" else DIALECT
    state = from_ours(trained.encoder, dialect, old_names=True)
    clusters = trained.num_clusters or [1]  # without a head, one that says nothing, which fairseq wants to be there
    labels = [f"km{number}" for number in range(len(clusters))] if len(clusters) > 1 else ["km"]
    task, model = _task(trained, labels), _model(trained)
    files = {f"dict.{label}.txt": _symbols(map(str, range(of))) for label, of in zip(labels, clusters, strict=True)}
    special, predictors = list(trained.special), list(trained.predictors)
    generator = torch.Generator().manual_seed(0)
    if not special:  # as fairseq draws its own symbols, U(0, 1), the same every time
        special = [torch.rand(len(OWN_SYMBOLS), model["final_dim"], generator=generator) for _ in clusters]
    if not predictors:
        final_dim = model["final_dim"]
        dims: dict[str, tuple[int, ...]] = {"codewords": (1, final_dim), "projection.weight": (final_dim, config.dim)}
        dims["projection.bias"] = (final_dim,)
        predictors = [{name: torch.rand(shape, generator=generator) for name, shape in dims.items()}]
    pairs = zip(special, predictors, strict=True)
    codewords = {"label_embs_concat": torch.cat([torch.cat([few, of["codewords"]]) for few, of in pairs])}
    if trained.head is None or trained.vocabulary is None:
        state |= codewords
        for part in ("weight", "bias"):
            state[f"final_proj.{part}"] = torch.cat([of[f"projection.{part}"] for of in predictors])
        content = _fairseq(task, model, "hubert", state)
        numbered = [[*OWN_SYMBOLS, *map(str, range(of))] for of in clusters]
        content |= {"task_cfg": task, "model_cfg": model, "model_weight": state, "dictionaries_symbols": numbered}
    else:
        names, rows = rows_of(tokens_with_boundary(trained.vocabulary))
        # fairseq makes the pre-trained model first, for which it wants clusters, and throws its head away
        state = {INSIDE_CTC + name: value for name, value in (state | codewords).items()}
        state |= {HEAD + part: _at(value, rows, part) for part, value in trained.head.items()}
        of_ctc = task | {"fine_tuning": True, "labels": ["ltr"], "single_target": True}
        content = _fairseq(of_ctc, _tuned(trained, task, model), "ctc", state)
        files["dict.ltr.txt"] = _symbols(names[len(OWN_SYMBOLS) :])
    file = BytesIO()
    torch.save(content, file)
    return {"checkpoint.pt": file.getvalue()} | files


def rows_of(tokens: Sequence[str]) -> tuple[list[str], list[int | None]]:
    """The symbols by which fairseq knows tokens, the blank first, and the row of each; none for what nothing spells.

    Its dictionaries begin with four of its own: the blank is one, and tokens of these names are the others.
    """
    _, *own = OWN_SYMBOLS
    places: list[int | None] = [0, *(tokens.index(name) if name in tokens[1:] else None for name in own)]
    rest = [place for place in range(1, len(tokens)) if tokens[place] not in own]
    # A token of the blank's name, as beside the blank of transformers, would be taken for it
    names = [BESIDE_BLANK if tokens[place] == OWN_SYMBOLS[0] else tokens[place] for place in rest]
    return [*OWN_SYMBOLS, *names], [*places, *rest]


def in_order_of(tokens: Sequence[str], head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layer that spells these tokens, of one that `write` wrote."""
    _, rows = rows_of(tokens)
    order = [rows.index(place) for place in range(len(tokens))]
    return {part: value[order] for part, value in head.items()}


def _at(value: Tensor, rows: Sequence[int | None], part: str) -> Tensor:
    """Rows of a head in another order; those of no token never win."""
    never = torch.full_like(value[0], NEVER if part == "bias" else 0)
    return torch.stack([never if row is None else value[row] for row in rows])


def _kept(trained: Trained, part: str) -> dict[str, Any]:
    kept = kept_for(trained, "fairseq")
    return {name.removeprefix(f"{part}."): value for name, value in kept.items() if name.startswith(f"{part}.")}


def _task(trained: Trained, labels: Sequence[str]) -> dict[str, Any]:
    return {
        "_name": "hubert_pretraining",
        "data": ".",
        "labels": list(labels),
        "label_dir": None,
        "label_rate": 50.0,
        **_kept(trained, "task"),
        "sample_rate": 16_000,
        "normalize": trained.config.normalize_waveform,
        "fine_tuning": False,
        "single_target": False,
    }


def _model(trained: Trained) -> dict[str, Any]:
    config, kept = trained.config, _kept(trained, "model")
    final_dim, streams = kept.pop("final_dim", 0) or 256, len(trained.predictors)
    return {
        "_name": "hubert",
        "label_rate": _task(trained, [])["label_rate"],
        **RECIPE,
        **kept,
        "extractor_mode": "layer_norm" if config.conv_norm == "layer" else "default",
        "conv_feature_layers": str([(config.conv_channels, *of) for of in zip(KERNELS, STRIDES, strict=True)]),
        "final_dim": trained.predictors[0]["codewords"].shape[1] if streams else final_dim,
        "untie_final_proj": streams > 1 or kept.get("untie_final_proj", True),  # each stream has its own here
        "logit_temp": kept.get("logit_temp", trained.temperature),
        **FIXED,
        **{theirs: getattr(config, ours) for ours, theirs in SETTINGS.items()},
    }


def _tuned(trained: Trained, task: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "_name": "hubert_ctc",
        "w2v_path": "",
        "w2v_args": {"task": task, "model": model},
        "normalize": trained.config.normalize_waveform,
        "data": ".",
        "apply_mask": True,
        **_kept(trained, "ctc"),
        "layerdrop": trained.config.layer_drop,
        **{name: model[name] for name in TUNED},
    }


def _pretrained(
    path: Path, state: Mapping[str, Tensor], model: Mapping[str, Any], task: Mapping[str, Any], symbols: list[list[str]]
) -> Trained:
    state = dict(state)
    head = {name: state.pop(name, None) for name in PRETRAINED_HEAD}
    ours, notes = _to_ours(path, state)
    config = _config(path, ours, model, task)
    temperature = float(model.get("logit_temp", 0.1))
    there = [name for name, value in head.items() if value is not None]
    if not there:
        return Trained(config, ours, temperature=temperature, notes=notes)
    codewords, weight, bias = head.values()
    if codewords is None or weight is None or bias is None:
        raise UserError(f"{path} has half a head of pre-training, {' and '.join(there)} alone; get it again")
    rows, own = _rows(path, len(codewords), task, symbols), len(OWN_SYMBOLS)
    split = codewords.split(rows)
    tied = not model.get("untie_final_proj", len(rows) == 1)
    weights, biases = ([part] * len(rows) if tied else part.chunk(len(rows)) for part in (weight, bias))
    orders = [_by_cluster(dictionary[own:]) for dictionary in symbols] or [slice(None)] * len(rows)
    predictors = [
        {"codewords": stream[own:][order], "projection.weight": w.clone(), "projection.bias": b.clone()}
        for stream, order, w, b in zip(split, orders, weights, biases, strict=True)
    ]
    for dictionary, order in zip(symbols, orders, strict=False):
        numbered = enumerate(dictionary[own:]) if order == slice(None) else ()
        if other := next(((index, name) for index, name in numbered if name != str(index)), None):
            notes.append("its dictionary calls cluster {} {!r}: labels are places in the dictionary".format(*other))
    if rows == [own + 1]:  # one cluster says nothing: `write` puts it where there was no head
        return Trained(config, ours, temperature=temperature, notes=notes)
    return Trained(
        config, ours, predictors, temperature, special=[stream[:own].clone() for stream in split], notes=notes
    )


def _fine_tuned(
    path: Path,
    state: Mapping[str, Tensor],
    model: Mapping[str, Any],
    task: Mapping[str, Any],
    tokens: Sequence[str] | None,
) -> Trained:
    """A pre-trained model inside of another, and the layer that spells, if it is a CTC's."""
    # Fine-tuning does not keep the head of pre-training whole
    state = {name: value for name, value in state.items() if not name.endswith(PRETRAINED_HEAD)}
    head = {part: state.pop(HEAD + part) for part in ("weight", "bias") if HEAD + part in state}
    ours, notes = _to_ours(path, state)
    trained = Trained(
        _config(path, ours, model, task), ours, temperature=float(model.get("logit_temp", 0.1)), notes=notes
    )
    if not head:
        return trained
    if len(head) < 2:
        raise UserError(f"{path} has half a layer that spells, {HEAD}{summary_of(head)} alone; get it again")
    tokens = tokens or _beside(path, len(head["weight"]))
    return trained._replace(head=head, vocabulary=None if tokens is None else spelling(tokens))


def _by_cluster(symbols: Sequence[str]) -> list[int] | slice:
    """Rows of the clusters 0, 1, … in a dictionary, which may list them by how frequent they are."""
    rows = {symbol: row for row, symbol in enumerate(symbols)}
    wanted = [str(cluster) for cluster in range(len(symbols))]
    if [*symbols] == wanted or rows.keys() != set(wanted):
        return slice(None)
    return [rows[cluster] for cluster in wanted]


def _rows(path: Path, codewords: int, task: Mapping[str, Any], symbols: Sequence[Sequence[str]]) -> list[int]:
    """How many codewords each dictionary has, fairseq's own symbols among them."""
    own, labels = len(OWN_SYMBOLS), task.get("labels") or ["km"]
    rows = [len(of) for of in symbols]
    if not rows and len(labels) == 1:
        rows = [codewords]
    if not rows:
        raise UserError(
            f"{path} predicts {len(labels)} streams of clusters, and does not hold the dictionaries that say how many "
            "each has; save it in fairseq with its task_state"
        )
    if sum(rows) != codewords or min(rows) <= own:
        raise UserError(
            f"{path} has {codewords} codewords for dictionaries of {rows} symbols, {own} of which are fairseq's own; "
            "one of the two is another model's"
        )
    return rows


def _to_ours(path: Path, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The encoder's state under our names, and what to tell of what is left out."""
    over_channels = any(name.endswith(f"{LAYER_NORM.format(1)}.weight") for name in state)
    dialect = DIALECT._replace(conv_norm=LAYER_NORM) if over_channels else DIALECT
    encoder, notes = encoder_alone(state, dialect, path)
    try:
        return to_ours(encoder, dialect), notes
    except ValueError as error:
        raise UserError(f"{path}: {error}; copy or download it again") from error


def _check(path: Path, model: Mapping[str, Any], task: Mapping[str, Any]) -> None:
    """Refuse settings of another encoder.

    Raises:
        UserError: One is not as here.
    """
    for name, value in FIXED.items():
        if model.get(name, value) != value:
            raise UserError(f"{path} sets {name} to {model[name]}; this encoder only knows {value}")
    if (rate := task.get("sample_rate", SAMPLE_RATE)) != SAMPLE_RATE:
        raise UserError(f"{path} sets sample_rate to {rate}; this encoder hears audio of {SAMPLE_RATE} Hz alone")
    layout = str(model.get("conv_feature_layers") or "")
    if layout and _layers(layout) != [*zip(KERNELS, STRIDES, strict=True)]:
        raise UserError(
            f"{path} has convolutions {layout}; this encoder only knows kernels {list(KERNELS)} and strides "
            f"{list(STRIDES)}, give another model"
        )


def _config(path: Path, ours: Mapping[str, Tensor], model: Mapping[str, Any], task: Mapping[str, Any]) -> EncoderConfig:
    known = shapes_of(ours, path)
    stated = {name: model.get(theirs, DEFAULTS[theirs]) for name, theirs in SETTINGS.items()}
    stated |= {"conv_channels": known["conv_channels"], "conv_norm": known["conv_norm"]}
    return settings_of(stated | {"normalize_waveform": task.get("normalize", False)}, path)


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
    """The symbols in the dictionary that lies beside a checkpoint, as fairseq reads it (data/dictionary.py).

    Raises:
        UserError: It is no such dictionary, or not of as many symbols as the model has rows.
    """
    file = path.parent / "dict.ltr.txt"
    if not file.exists():
        return None
    symbols = list(OWN_SYMBOLS)
    for number, line in enumerate(lines_of(file), start=1):
        entry, flagged = line.removesuffix("\n"), False
        if entry.rstrip().endswith(" " + OVERWRITE):
            entry, flagged = entry.rstrip().removesuffix(" " + OVERWRITE), True
        symbol, space, count = entry.rstrip().rpartition(" ")
        if not entry.strip():
            continue
        if not space:
            symbol = count
        elif not count.isdecimal():
            raise UserError(
                f"{file}, line {number}: {shown(count)} is no count, as follows each symbol; correct the line"
            )
        symbol = symbol or ("\ufeff" if number == 1 else "")  # a symbol at the start that looks like a mark
        if symbol in symbols:
            place = symbols.index(symbol)
            if not flagged:
                raise UserError(
                    f"{file}, line {number}: {shown(symbol)} is there already; keep it once, or add {OVERWRITE}"
                )
            symbols[place] = f"<{place}>"  # a row that nothing spells any more
        symbols.append(symbol)
        if len(symbols) > rows:
            break
    if len(symbols) != rows:
        own = len(OWN_SYMBOLS)
        more = "" if len(symbols) < rows else " or more"
        raise UserError(
            f"{file} has {len(symbols) - own}{more} symbols, and the model beside it spells {rows - own}; put the "
            "dictionary of that model there"
        )
    return symbols


def _symbols(names: Any) -> bytes:
    return "".join(f"{name} 1\n" for name in names).encode()


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
