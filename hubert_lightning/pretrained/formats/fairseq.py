"""Checkpoints of fairseq, pre-trained or fine-tuned, and of s3prl, which has the same content under other keys.

The checkpoints of WavLM that Microsoft released are read as well; all their settings are in one mapping (unilm
wavlm/WavLM.py: WavLMConfig).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.pretrained.checkpoint_source import CheckpointSource
from hubert_lightning.pretrained.dialect import Dialect, from_ours, has_part, prefix_of
from hubert_lightning.pretrained.foreign_weights import (
    RELEASED_REGULARISATION,
    encoder_state,
    vocabulary_settings,
    with_foreign_settings,
    with_regularisation,
)
from hubert_lightning.pretrained.formats.fairseq_dictionary import (
    OWN_SYMBOLS,
    cluster_rows,
    dictionary_file,
    dictionary_sizes,
    head_for_symbols,
    head_for_tokens,
    symbols_and_rows,
    symbols_beside,
)
from hubert_lightning.pretrained.formats.fairseq_settings import (
    FINE_TUNING_SETTINGS,
    SETTINGS,
    UNUSED_SETTINGS,
    Settings,
    by_part,
    check_settings,
    completed_settings,
    ctc_settings,
    describe_encoder,
    encoder_config,
    model_settings,
    task_settings,
)
from hubert_lightning.pretrained.weights import Export, PretrainedWeights, abbreviated
from hubert_lightning.untrusted.torch_stand_ins import plain

INSIDE_CTC = "w2v_encoder.w2v_model."
"""Prefix of the encoder in a fine-tuned model."""
CTC_HEAD = "w2v_encoder.proj."
PRETRAINING_HEAD = ("label_embs_concat", "final_proj.weight", "final_proj.bias")

BATCH_NORM = {"batch_norm": "encoder.pos_conv.0", "positions": "encoder.pos_conv.1"}
"""Part → name in a model with a batch norm of positions (fairseq models/wav2vec/wav2vec2.py: make_conv_pos)."""
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
    position_gate="encoder.layers.{}.self_attn.grep_linear",
    position_scale="encoder.layers.{}.self_attn.grep_a",
    relative_positions="encoder.layers.0.self_attn.relative_attention_bias",
)


def has_names(state: Mapping[str, object]) -> bool:
    """Tell whether a state dict has fairseq's names, also inside a larger module."""
    return has_part(state, DIALECT.projection)


def matches(source: CheckpointSource) -> bool:
    """Tell whether a file is a checkpoint of fairseq or s3prl, or a bare state dict of such a model."""
    return _is_of_fairseq(source.content) or _is_of_s3prl(source.content) or has_names(source.state)


def _is_of_fairseq(content: Any) -> bool:
    """Tell whether a file has weights under "model", and settings under "cfg" or "args"."""
    return (
        isinstance(content, dict) and isinstance(content.get("model"), dict) and ("cfg" in content or "args" in content)
    )


def _is_of_s3prl(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("model_weight"), dict) and "model_cfg" in content


def read(source: CheckpointSource, num_heads: int | None = None) -> PretrainedWeights:
    """Read a checkpoint of fairseq or s3prl, or a bare state dict.

    Args:
        source: File.
        num_heads: Attention heads, for a file without settings of its encoder.

    Raises:
        UserError: The model is no HuBERT, or has parts that this package lacks.
    """
    path, content = source.path, source.content
    if _is_of_fairseq(content):
        weights = _read_fairseq(source, num_heads)
    elif _is_of_s3prl(content):
        weights = _read_s3prl(path, content, num_heads)
    else:
        weights = _read_state(source, num_heads)
        released = RELEASED_REGULARISATION[weights.config.conv_norm]
        config = with_regularisation(weights.config, released, path)
        return replace(weights, config=config, notes=[*weights.notes, *source.notes])
    return _with_unused_settings(path, weights, content)


def _read_fairseq(source: CheckpointSource, num_heads: int | None) -> PretrainedWeights:
    path, content = source.path, source.content
    settings = by_part(plain(content.get("cfg")) or plain(content.get("args")) or {})
    model, task = settings.get("model") or {}, settings.get("task") or {}
    state = _without_outer_prefix(content["model"])
    task_state = plain(content.get("task_state") or {})
    if not prefix_of(state, DIALECT):
        dictionaries = [entry["symbols"] for entry in task_state.get("dictionaries") or []]
        dictionaries = dictionaries or plain(content.get("dictionaries_symbols")) or []  # s3prl's, in our exports
        sizes, task = _completed(path, state, model, task, num_heads)
        return _noted(_pretrained(path, state, sizes, task, dictionaries), model)
    inner = by_part(plain(model.get("w2v_args")) or {})
    symbols = (task_state.get("target_dictionary") or {}).get("symbols")
    encoder_settings = inner.get("model") or model
    sizes, task = _completed(path, state, encoder_settings, inner.get("task") or task, num_heads)
    return _noted(_fine_tuned(source, state, sizes, task, symbols), encoder_settings)


def _read_s3prl(path: Path, content: Mapping[str, Any], num_heads: int | None) -> PretrainedWeights:
    """Read a checkpoint that s3prl converted (s3prl upstream/hubert/convert.py)."""
    state, model = dict(content["model_weight"]), plain(content["model_cfg"])
    sizes, task = _completed(path, state, model, plain(content.get("task_cfg")) or {}, num_heads)
    return _noted(_pretrained(path, state, sizes, task, plain(content.get("dictionaries_symbols")) or []), model)


def _read_state(source: CheckpointSource, num_heads: int | None) -> PretrainedWeights:
    """Read the bare weights of a model without settings."""
    state = _without_outer_prefix(source.state)
    settings, task = _completed(source.path, state, {}, {}, num_heads)
    if prefix_of(state, DIALECT):
        return _fine_tuned(source, state, settings, task, None)
    return _pretrained(source.path, state, settings, task, [])


def _with_unused_settings(path: Path, weights: PretrainedWeights, content: Mapping[str, Any]) -> PretrainedWeights:
    """Keep the settings that are not of an encoder, for `write`.

    A fine-tuned model gets the dropouts of its fine-tuning, as in fairseq (models/hubert/hubert_asr.py: arg_overrides).
    """
    settings = by_part(plain(content.get("cfg")) or plain(content.get("args")) or {})
    model = settings.get("model") or plain(content.get("model_cfg")) or {}
    task = settings.get("task") or plain(content.get("task_cfg")) or {}
    parts = {"model": model, "task": task}
    inner = by_part(plain(model.get("w2v_args")) or {})
    if inner or prefix_of(_without_outer_prefix(content.get("model") or {}), DIALECT):
        parts = {"model": inner.get("model") or {}, "task": inner.get("task") or {}, "ctc": model}
        tuned = {ours: name for ours, name in SETTINGS.items() if name in FINE_TUNING_SETTINGS}
        tuned |= {"layer_drop": "layerdrop"}
        stated = {ours: model[name] for ours, name in tuned.items() if name in model}
        weights = replace(weights, config=with_regularisation(weights.config, stated, path))
    kept = {
        f"{part}.{name}": values[name]
        for part, values in parts.items()
        for name in UNUSED_SETTINGS[part]
        if name in values
    }
    if not weights.predictors and "logit_temp" in parts["model"]:  # belongs to the missing head of pre-training
        kept["model.logit_temp"] = parts["model"]["logit_temp"]
    # A label rate may be a reference to another setting
    values = {name: value for name, value in kept.items() if not str(value).startswith("${")}
    return with_foreign_settings(weights, "fairseq", values)


def _without_outer_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix of a module that holds the whole model."""
    outer = prefix_of(state, DIALECT).removesuffix(INSIDE_CTC)
    if outer and all(name.startswith(outer) for name in state):
        return {name.removeprefix(outer): value for name, value in state.items()}
    return dict(state)


def _completed(
    path: Path, state: Mapping[str, Tensor], model: Settings, task: Settings, num_heads: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    check_settings(path, model, task)
    return completed_settings(path, _to_ours(path, state)[0], model, task, num_heads)


def _noted(weights: PretrainedWeights, model: Settings) -> PretrainedWeights:
    if describe_encoder(model):
        return weights
    note = "it has no settings of its encoder, which are taken from its weights and from the released model of its kind"
    return replace(weights, notes=[*weights.notes, note])


def _to_ours(path: Path, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the encoder's state under our names, and notes about weights that are left out."""
    has_layer_norms = any(name.endswith(f"{LAYER_NORM.format(1)}.weight") for name in state)
    has_batch_norm = any(name.endswith(f"{BATCH_NORM['batch_norm']}.running_mean") for name in state)
    return encoder_state(state, _dialect(has_layer_norms, has_batch_norm), path)


def _dialect(has_layer_norms: bool, has_batch_norm: bool) -> Dialect:
    """Names of an encoder with layer norms of its convolutions or a batch norm of its positions."""
    dialect = DIALECT._replace(conv_norm=LAYER_NORM) if has_layer_norms else DIALECT
    return dialect._replace(**BATCH_NORM) if has_batch_norm else dialect


def _pretrained(
    path: Path, state: Mapping[str, Tensor], model: Settings, task: Settings, dictionaries: list[list[str]]
) -> PretrainedWeights:
    """Read a pre-trained model and its head.

    Args:
        path: File that errors name.
        state: Weights of the model.
        model: Settings of the model.
        task: Settings of the task.
        dictionaries: Symbols of each stream of labels, if the checkpoint holds them.
    """
    state = dict(state)
    head = {name: state.pop(name, None) for name in PRETRAINING_HEAD}
    encoder, notes = _to_ours(path, state)
    temperature = float(model.get("logit_temp", 0.1))
    weights = PretrainedWeights(
        encoder_config(path, encoder, model, task), encoder, temperature=temperature, notes=notes
    )
    present = [name for name, value in head.items() if value is not None]
    if not present:
        return weights
    codewords, weight, bias = head.values()
    if codewords is None or weight is None or bias is None:
        raise UserError(f"{path} has half a head of pre-training, {' and '.join(present)} alone; copy it again")
    sizes, own = dictionary_sizes(path, len(codewords), task.get("labels") or ["km"], dictionaries), len(OWN_SYMBOLS)
    if sizes == [own + 1]:  # `write` adds a single cluster to a model without a head
        return weights
    streams = torch.split(codewords, sizes)
    is_tied = not model.get("untie_final_proj", len(sizes) == 1)
    projections, biases = ([part] * len(sizes) if is_tied else part.chunk(len(sizes)) for part in (weight, bias))
    orders = [cluster_rows(symbols[own:]) for symbols in dictionaries] or [slice(None)] * len(sizes)
    predictors = [
        {"codewords": stream[own:][order], "projection.weight": w.clone(), "projection.bias": b.clone()}
        for stream, order, w, b in zip(streams, orders, projections, biases, strict=True)
    ]
    for symbols, order in zip(dictionaries, orders, strict=False):
        numbered = enumerate(symbols[own:]) if order == slice(None) else ()
        if renamed := next(((index, name) for index, name in numbered if name != str(index)), None):
            notes.append("its dictionary calls cluster {} {!r}: labels are rows of the dictionary".format(*renamed))
    return replace(
        weights, predictors=predictors, special_codewords=[stream[:own].clone() for stream in streams], notes=notes
    )


def _fine_tuned(
    source: CheckpointSource,
    state: Mapping[str, Tensor],
    model: Settings,
    task: Settings,
    symbols: Sequence[str] | None,
) -> PretrainedWeights:
    """Read a pre-trained model inside another one, and its CTC head, if it has one."""
    path = source.path
    # Fine-tuning does not keep the head of pre-training whole
    state = {name: value for name, value in state.items() if not name.endswith(PRETRAINING_HEAD)}
    head = {part: state.pop(CTC_HEAD + part) for part in ("weight", "bias") if CTC_HEAD + part in state}
    encoder, notes = _to_ours(path, state)
    config, temperature = encoder_config(path, encoder, model, task), float(model.get("logit_temp", 0.1))
    weights = PretrainedWeights(config, encoder, temperature=temperature, notes=notes)
    if not head:
        return weights
    if len(head) < 2:
        raise UserError(f"{path} has half a CTC head, {CTC_HEAD}{abbreviated(head)} alone; copy or download it again")
    symbols = symbols or symbols_beside(path, len(head["weight"]))
    exported = source.companion.vocabulary if source.companion is not None else None
    if exported is not None and symbols is not None and len(symbols) == len(head["weight"]):
        tokens = exported.search_names
        if [*symbols] == symbols_and_rows(tokens)[0]:
            return replace(weights, head=head_for_tokens(head, tokens), vocabulary=exported)
    weights = replace(weights, head=head)
    return weights if symbols is None else weights.with_vocabulary(vocabulary_settings(symbols))


def write(weights: PretrainedWeights) -> Export:
    """Write a folder that fairseq opens, and s3prl, unless the model is fine-tuned.

    checkpoint.pt holds fairseq's keys and s3prl's, with the same weights; dict.*.txt the symbols of clusters or
    letters, which fairseq looks for in `task.data`.

    Raises:
        UserError: The convolutions are as wide as the Transformer: fairseq then has no projection between them. Or it
            is a WavLM, which fairseq lacks.
    """
    config = weights.config
    if config.position_buckets:
        raise UserError("this encoder has WavLM's relative positions, which fairseq lacks; export it to transformers")
    if config.conv_channels == config.dim:
        raise UserError(
            f"convolutions and Transformer both have {config.dim} channels, for which fairseq has no projection; "
            "export this model to transformers or torchaudio"
        )
    dialect = _dialect(config.conv_norm == "layer", config.pos_batch_norm)
    state = from_ours(weights.encoder, dialect, old_names=True)
    clusters = weights.num_clusters or [1]  # fairseq wants a head; one cluster stands for none
    labels = [f"km{number}" for number in range(len(clusters))] if len(clusters) > 1 else ["km"]
    task, model = task_settings(weights, labels), model_settings(weights)
    files = {f"dict.{label}.txt": dictionary_file(range(num)) for label, num in zip(labels, clusters, strict=True)}
    head = _pretraining_head(weights, model["final_dim"])
    if weights.head is None or weights.vocabulary is None:
        state |= head
        content = _checkpoint(task, model, "hubert", state)
        symbols = [[*OWN_SYMBOLS, *map(str, range(number))] for number in clusters]
        content |= {"task_cfg": task, "model_cfg": model, "model_weight": state, "dictionaries_symbols": symbols}
    else:
        names, rows = symbols_and_rows(weights.vocabulary.search_names)
        # fairseq builds the pre-trained model first, for which it wants clusters, and drops its head
        codewords = PRETRAINING_HEAD[0]
        state = {INSIDE_CTC + name: value for name, value in (state | {codewords: head[codewords]}).items()}
        state |= {CTC_HEAD + part: value for part, value in head_for_symbols(weights.head, rows).items()}
        ctc_task = task | {"fine_tuning": True, "labels": ["ltr"], "single_target": True}
        content = _checkpoint(ctc_task, ctc_settings(weights, task, model), "ctc", state)
        files["dict.ltr.txt"] = dictionary_file(names[len(OWN_SYMBOLS) :])
    file = BytesIO()
    torch.save(content, file)
    rest = replace(weights, encoder={}, head=None, predictors=[], special_codewords=[])
    return Export({"checkpoint.pt": file.getvalue()} | files, rest)


def _pretraining_head(weights: PretrainedWeights, final_dim: int) -> dict[str, Tensor]:
    """Write the head of pre-training; a missing one, or missing symbols, are drawn as fairseq draws them, U(0, 1)."""
    special, predictors = weights.special_codewords, weights.predictors
    generator = torch.Generator().manual_seed(0)  # the same every time
    if not special:
        streams = weights.num_clusters or [1]
        special = [torch.rand(len(OWN_SYMBOLS), final_dim, generator=generator) for _ in streams]
    if not predictors:
        shapes: dict[str, tuple[int, ...]] = {"codewords": (1, final_dim)}
        shapes |= {"projection.weight": (final_dim, weights.config.dim), "projection.bias": (final_dim,)}
        predictors = [{name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}]
    rows = [torch.cat([own, predictor["codewords"]]) for own, predictor in zip(special, predictors, strict=True)]
    head = [torch.cat(rows)]
    head += [torch.cat([predictor[f"projection.{part}"] for predictor in predictors]) for part in ("weight", "bias")]
    return dict(zip(PRETRAINING_HEAD, head, strict=True))


def _checkpoint(task: Settings, model: Settings, criterion: str, state: dict[str, Tensor]) -> dict[str, Any]:
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
