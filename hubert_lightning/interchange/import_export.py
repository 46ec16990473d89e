"""Models from and for other systems: `hubert import` and `hubert export`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from hubert_lightning.errors import UserError
from hubert_lightning.files import new_folder, replacing
from hubert_lightning.hub import CardFacts
from hubert_lightning.interchange.hub import check_push, push_folder
from hubert_lightning.interchange.model_card import check_stated, model_card
from hubert_lightning.interchange.onnx import write_onnx
from hubert_lightning.interchange.run_facts import public_provenance, run_facts
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.formats import FORMATS
from hubert_lightning.pretrained.formats.own import save_tensors, to_safetensors, to_state
from hubert_lightning.pretrained.load import (
    COMPANION_FILE,
    KMEANS_FILE,
    WEIGHT_SUFFIXES,
    encoder_fingerprint,
    is_hub_name,
    located,
    read_weights,
)
from hubert_lightning.pretrained.weights import PretrainedWeights, build_ctc_head, build_encoder, build_predictors
from hubert_lightning.units.kmeans_file import kmeans_fingerprint, load_kmeans, save_kmeans
from hubert_lightning.vocabulary import read_vocabulary

ExportFormat = Literal["transformers", "torchaudio", "fairseq", "safetensors", "onnx"]
"""Names in `FORMATS`, and onnx, which is not read back."""


def import_model(source: str, out: Path, num_heads: int | None = None, vocabulary: Path | None = None) -> None:
    """Convert a model of another system to a checkpoint of this package, with its heads, tokens and provenance.

    This is optional: every verb also opens models of other systems directly. A checkpoint is a single file and loads
    faster.

    Args:
        source: Checkpoint of fairseq or s3prl, directory or hub name of transformers, or state dict of torchaudio.
        out: Checkpoint to write, a .ckpt.
        num_heads: Number of attention heads, for formats that do not state it and sizes that were never released.
        vocabulary: Tokens of the CTC head in the order of its rows, if the format does not state them: a JSON file
            such as `hubert vocabulary` writes.
    """
    _check_new(Path(out))
    weights = read_weights(source, num_heads)
    if vocabulary is not None:
        if weights.head is None:
            raise UserError(f"{source} has no CTC head, so it needs no vocabulary; leave it out")
        weights = replace(weights, vocabulary=read_vocabulary(vocabulary), vocabulary_note=None)
    encoder = _checked_encoder(weights, Path(source))
    provenance = {
        **weights.provenance,
        "source": f"https://huggingface.co/{source}" if is_hub_name(source) else str(source),
        "sha256": _sha256(located(source)),
        "encoder": encoder_fingerprint(encoder),
    }
    with replacing(Path(out)) as file:
        save_tensors(checkpoint_of(replace(weights, provenance=provenance)), file)
    print(f"{out}: {_description(weights)}, from {source}")
    for note in [*weights.notes, *([weights.vocabulary_note] if weights.vocabulary_note else [])]:
        print(f"{source}: {note}")


def export_model(
    model: str,
    out: Path,
    format: ExportFormat = "transformers",
    kmeans: Path | None = None,
    layer: int | None = None,
    push: str | None = None,
    private: bool = False,
    license: str | None = None,
    language: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
) -> None:
    """Convert a model for another system, with its heads, tokens and a model card.

    Args:
        model: Checkpoint of `hubert fit`, or any other model.
        out: Folder to create.
        format: Format to write: transformers; torchaudio; fairseq (also for s3prl); safetensors, one file of this
            package; onnx, which is tested with onnxruntime.
        kmeans: K-means of a layer of the model, stored in the folder for `hubert units`.
        layer: For onnx, layer whose output the graph computes, counted from 1. If not given, the graph computes the
            log-probabilities of the tokens, or, without a CTC head, the output of the last layer.
        push: Name on the Hugging Face hub, owner/name, that the folder is uploaded to; nothing is uploaded without it.
        private: Whether a repository that is created on the hub is private.
        license: Licence for the model card, such as mit or cc-by-4.0.
        language: Codes of the languages for the model card, such as en or pt.
        datasets: Names of datasets on the hub for the model card.
    """
    out = Path(out)
    stated = CardFacts(license, language or (), datasets or ())
    check_stated(stated)
    if push is not None:
        check_push(push)
    _check_new(out)
    if layer is not None and format != "onnx":
        raise UserError(f"layer {layer} of {format}: only onnx can have the output of one layer; leave it out")
    weights = read_weights(model)
    if layer is not None and not 1 <= layer <= weights.config.num_layers:
        raise UserError(f"layer {layer} of an encoder of {weights.config.num_layers} layers; they count from 1")
    encoder = _checked_encoder(weights, Path(model))
    fingerprint = encoder_fingerprint(encoder)
    facts = run_facts(Path(model))
    provenance = public_provenance({**weights.provenance, **facts.provenance(), "encoder": fingerprint})
    weights = replace(weights, provenance=provenance)
    with new_folder(out) as folder:
        if format == "onnx":
            _write_onnx(folder, weights, encoder, layer, Path(model))
        else:
            files, rest = FORMATS[format].write(weights)
            files |= {} if rest is None else {COMPANION_FILE: to_safetensors(rest)}
            for name, content in files.items():
                (folder / name).write_bytes(content)
        if kmeans is not None:
            _write_kmeans(folder, kmeans, weights.config.dim, fingerprint)
        (folder / "README.md").write_text(
            model_card(push or out.name, weights, encoder, facts, format, stated), "utf-8"
        )
    print(f"{out}: {_description(weights)}, for {format}")
    if push is not None:
        print(f"{push}: uploaded, {push_folder(out, push, private)}")


def _check_new(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out}: exists already; remove it or choose another OUT")


def _checked_encoder(weights: PretrainedWeights, path: Path) -> HubertEncoder:
    """Build the encoder, and check that all weights fit and are finite."""
    encoder = build_encoder(weights, path)
    build_predictors(weights, path)
    if weights.head is not None:
        build_ctc_head(weights, path)
    return encoder


def checkpoint_of(weights: PretrainedWeights) -> dict[str, Any]:
    """Return the content of the checkpoint that `hubert fit` would have saved."""
    settings: dict[str, Any] = {"encoder": asdict(weights.config)}
    if weights.head is not None:
        assert weights.vocabulary is not None
        settings |= {"_class_path": "hubert_lightning.CTCFinetuning", "pretrained": None, "keep_head": False}
        settings |= {"vocabulary": weights.vocabulary.settings()}
    else:
        settings |= {"_class_path": "hubert_lightning.HubertPretraining", "temperature": weights.temperature}
        if weights.predictors:
            settings |= {"num_clusters": weights.num_clusters}
            settings |= {"final_dim": weights.predictors[0]["codewords"].shape[1]}
    return {
        "state_dict": {name: value.float() for name, value in to_state(weights).items()},
        "hyper_parameters": settings,
        "imported": {**weights.provenance, "special": [rows.float() for rows in weights.special_codewords]},
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
    }


def _write_onnx(
    folder: Path, weights: PretrainedWeights, encoder: HubertEncoder, layer: int | None, path: Path
) -> None:
    head = None
    about: dict[str, Any] = {"encoder": asdict(weights.config), "layer": layer, "source": dict(weights.provenance)}
    if weights.head is not None and layer is None:
        head, vocabulary = build_ctc_head(weights, path)
        about["vocabulary"] = vocabulary.settings()
        (folder / "vocabulary.json").write_text(json.dumps(about["vocabulary"], ensure_ascii=False, indent=1), "utf-8")
    difference = write_onnx(folder / "model.onnx", encoder, head, layer, about)
    print(f"onnxruntime computes the same within {difference:.1g}")


def _write_kmeans(folder: Path, kmeans: Path, dim: int, fingerprint: str) -> None:
    centroids, source = load_kmeans(kmeans)
    features = source.get("features", "")
    if features and not features.endswith(fingerprint):
        raise UserError(
            f"{kmeans} was fitted on {features}, and this is encoder {fingerprint}; give K-means of one of its layers"
        )
    if any(rows.shape[1] != dim for rows in centroids):
        raise UserError(
            f"{kmeans}: centroids of {centroids[0].shape[1]} dimensions for an encoder of {dim}; give K-means of one "
            "of its layers"
        )
    save_kmeans(folder / KMEANS_FILE, centroids, public_provenance(source) | {"kmeans": kmeans_fingerprint(centroids)})


def _description(weights: PretrainedWeights) -> str:
    config = weights.config
    parts = [f"an encoder of {config.num_layers} layers of {config.dim}"]
    if weights.predictors:
        parts.append(f"the head of pre-training for {' + '.join(map(str, weights.num_clusters))} clusters")
    if weights.head is not None:
        parts.append(f"the CTC head for {len(weights.head['weight'])} tokens")
    return " and ".join(parts)


def _sha256(path: Path) -> str:
    """Compute the checksum of all weights, file after file."""
    files = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.suffix in WEIGHT_SUFFIXES]
    digest = sha256()
    for file in files:
        with file.open("rb") as content:
            while block := content.read(2**20):
                digest.update(block)
    return digest.hexdigest()
