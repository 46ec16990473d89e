"""Models from and for the rest of the world: `hubert import` and `hubert export`."""

import json
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from hubert_lightning.errors import UserError
from hubert_lightning.files import new_folder, replacing
from hubert_lightning.interchange.model_card import model_card, run_facts, told_source
from hubert_lightning.interchange.onnx import write_onnx
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.formats import fairseq, own, torchaudio, transformers
from hubert_lightning.pretrained.formats.own import save_tensors
from hubert_lightning.pretrained.load import (
    KMEANS,
    REST,
    WEIGHTS,
    encoder_fingerprint,
    is_hub_name,
    located,
    no_letters,
    read_trained,
)
from hubert_lightning.pretrained.weights import Trained, encoder_of, linear_of, predictors_of
from hubert_lightning.units.kmeans_file import kmeans_fingerprint, load_kmeans, save_kmeans
from hubert_lightning.vocabulary import Vocabulary, read_vocabulary, vocabulary_from

Format = Literal["transformers", "torchaudio", "fairseq", "safetensors", "onnx"]


def import_model(source: str, out: Path, num_heads: int | None = None, vocabulary: Path | None = None) -> None:
    """Make a checkpoint of ours from one of another system, with its heads, its letters and where it comes from.

    Any of them opens directly, too, wherever a checkpoint is wanted; this keeps it in one file that is read in no time.

    Args:
        source: a checkpoint of fairseq or s3prl, a directory or hub name of transformers, a state dict of torchaudio
        out: the .ckpt to write
        num_heads: heads of attention, where the format does not say and the size is none of the released ones
        vocabulary: what the layer that spells spells, where the format does not say, a JSON file as of
            `hubert vocabulary`, its tokens in the order of the layer's rows
    """
    if Path(out).exists():
        raise UserError(f"{out}: is there already; remove it, or choose another OUT")
    trained = read_trained(source, num_heads)
    if vocabulary is not None:
        if trained.head is None:
            raise UserError(f"{source} has no layer that spells, for which a vocabulary would be; leave it out")
        trained = trained._replace(vocabulary=read_vocabulary(vocabulary).settings(), vocabulary_note=None)
    encoder = _checked(trained, Path(source))
    provenance = {
        **trained.source,
        "source": f"https://huggingface.co/{source}" if is_hub_name(source) else str(source),
        "sha256": _digest(located(source)),
        "encoder": encoder_fingerprint(encoder),
    }
    with replacing(Path(out)) as file:
        save_tensors(as_fit(trained._replace(source=provenance)), file)
    print(f"{out}: {_described(trained)}, from {source}")
    for note in [*trained.notes, *([trained.vocabulary_note] if trained.vocabulary_note else [])]:
        print(f"{source}: {note}")


def export_model(
    model: str,
    out: Path,
    format: Format = "transformers",
    kmeans: Path | None = None,
    layer: int | None = None,
) -> None:
    """Write a model for another system, with its heads, its letters and a model card.

    Args:
        model: a .ckpt of `hubert fit`, or any other model
        out: the folder to make
        format: transformers; torchaudio; fairseq, whose file s3prl opens, too; safetensors, all in one file of ours;
            onnx, which is tried in onnxruntime
        kmeans: K-means of one of its layers, which goes along for `hubert units`
        layer: for onnx, whose output is wanted, counted from 1; the letters' log-probabilities if the model has a head,
            or the last layer's output
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: is there already; remove it, or choose another OUT")
    if layer is not None and format != "onnx":
        raise UserError(f"layer {layer} of {format}: only onnx can be of one layer; leave it out")
    trained = read_trained(model)
    if layer is not None and not 1 <= layer <= trained.config.num_layers:
        raise UserError(f"layer {layer} of an encoder of {trained.config.num_layers} layers; they count from 1")
    encoder = _checked(trained, Path(model))
    if trained.vocabulary is not None:
        trained = trained._replace(vocabulary=vocabulary_from(trained.vocabulary, model).settings())
    facts = run_facts(Path(model))
    source = told_source({**trained.source, **facts.told(), "encoder": encoder_fingerprint(encoder)})
    trained = trained._replace(source=source)
    with new_folder(out) as folder:
        if format == "onnx":
            _write_onnx(folder, trained, encoder, layer, Path(model))
        else:
            for name, content in _files(trained, format).items():
                (folder / name).write_bytes(content)
        if kmeans is not None:
            _write_kmeans(folder, kmeans, trained.config.dim, encoder_fingerprint(encoder))
        (folder / "README.md").write_text(model_card(out.name, trained, encoder, facts, format), "utf-8")
    print(f"{out}: {_described(trained)}, for {format}")


def _files(trained: Trained, format: Format) -> dict[str, bytes]:
    """Of a folder; what a format has no place for goes into a file of ours beside it."""
    if format == "safetensors":
        return {"model.safetensors": own.to_safetensors(trained)}
    fine_tuned = trained.head is not None
    rest = trained._replace(encoder={}, head=None, predictors=[], special=[])
    if format == "transformers":
        rest = rest._replace(predictors=trained.predictors, special=trained.special)
        files = transformers.write(trained)
    elif format == "torchaudio":
        if fine_tuned or not trained.predictors:
            rest = rest._replace(encoder={"mask_embedding": trained.encoder["mask_embedding"]})
        rest = rest._replace(special=trained.special)
        files = torchaudio.write(trained)
    else:
        files = fairseq.write(trained)
    return files | {REST: own.to_safetensors(rest)}


def _checked(trained: Trained, path: Path) -> HubertEncoder:
    """The encoder, once all that was trained is known to fit and to be finite."""
    encoder = encoder_of(trained, path)
    predictors_of(trained, path)
    if trained.head is not None:
        rows = len(linear_of(trained.head, path).weight)
        if trained.vocabulary is None:
            raise UserError(no_letters(path, rows))
        if rows != len(vocabulary := vocabulary_from(trained.vocabulary, path)):
            raise UserError(
                f"{path} has a head for {rows} tokens, and its vocabulary has {len(vocabulary)}; one of them is "
                "another model's"
            )
    return encoder


def as_fit(trained: Trained) -> dict[str, Any]:
    """What `hubert fit` would have saved, had it trained this."""
    settings: dict[str, Any] = {"encoder": asdict(trained.config)}
    if trained.head is not None:
        assert trained.vocabulary is not None
        settings |= {"_class_path": "hubert_lightning.CTCFinetuning", "pretrained": None, "keep_head": False}
        settings |= {"vocabulary": Vocabulary(**trained.vocabulary).settings()}
    else:
        settings |= {"_class_path": "hubert_lightning.HubertPretraining", "temperature": trained.temperature}
        if trained.predictors:
            settings |= {"num_clusters": trained.num_clusters}
            settings |= {"final_dim": trained.predictors[0]["codewords"].shape[1]}
    return {
        "state_dict": {name: value.float() for name, value in own.to_state(trained).items()},
        "hyper_parameters": settings,
        "imported": {**trained.source, "special": [rows.float() for rows in trained.special]},
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
    }


def _write_onnx(folder: Path, trained: Trained, encoder: HubertEncoder, layer: int | None, path: Path) -> None:
    head = None if trained.head is None or layer is not None else linear_of(trained.head, path)
    about = {"encoder": asdict(trained.config), "layer": layer, "source": dict(trained.source)}
    if head is not None:
        about["vocabulary"] = trained.vocabulary
        (folder / "vocabulary.json").write_text(json.dumps(trained.vocabulary, ensure_ascii=False, indent=1), "utf-8")
    worst = write_onnx(folder / "model.onnx", encoder, head, layer, about)
    print(f"onnxruntime computes the same but for {worst:.1g}")


def _write_kmeans(folder: Path, kmeans: Path, dim: int, fingerprint: str) -> None:
    centroids, source = load_kmeans(kmeans)
    features = source.get("features", "")
    if features and not features.endswith(fingerprint):
        raise UserError(
            f"{kmeans} was fitted on {features}, and this is encoder {fingerprint}; give K-means of one of its layers"
        )
    if any(of.shape[1] != dim for of in centroids):
        raise UserError(
            f"{kmeans}: centroids of {centroids[0].shape[1]} dimensions for an encoder of {dim}; give K-means of one "
            "of its layers"
        )
    save_kmeans(folder / KMEANS, centroids, told_source(source) | {"kmeans": kmeans_fingerprint(centroids)})


def _described(trained: Trained) -> str:
    config = trained.config
    parts = [f"an encoder of {config.num_layers} layers of {config.dim}"]
    if trained.predictors:
        parts.append(f"the head of pre-training for {' + '.join(map(str, trained.num_clusters))} clusters")
    if trained.head is not None:
        parts.append(f"the layer that spells {len(trained.head['weight'])} tokens")
    return " and ".join(parts)


def _digest(path: Path) -> str:
    """Of all weights, file after file."""
    files = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.suffix in WEIGHTS]
    digest = sha256()
    for file in files:
        with file.open("rb") as content:
            while block := content.read(2**20):
                digest.update(block)
    return digest.hexdigest()
