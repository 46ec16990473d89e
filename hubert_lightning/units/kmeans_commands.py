"""K-means as files: fitted outside of a training run, taken from other programs, given to them."""

import json
from pathlib import Path

import joblib
import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from hubert_lightning.data.corpora import read_corpora
from hubert_lightning.errors import UserError
from hubert_lightning.features.extractors import Extractor, layer_extractor, mfcc_extractor
from hubert_lightning.features.mfcc import MFCC_PARTS, MfccPart
from hubert_lightning.features.sample import sample_frames
from hubert_lightning.files import replacing_all
from hubert_lightning.frames import num_samples, seconds_to_samples
from hubert_lightning.units.foreign_kmeans import SOURCE
from hubert_lightning.units.kmeans import KMeans, ScikitKMeans
from hubert_lightning.units.kmeans_file import load_kmeans, save_kmeans
from hubert_lightning.units.label_recipe import LabelRecipe, check_features

BATCH_FRAMES = 5_000  # 100 s of audio at once


def fit_kmeans(
    model: str,
    manifests: list[Path],
    out: Path,
    layer: int | None = None,
    clusters: int | list[int] = 100,
    parts: list[MfccPart] | None = None,
    max_frames: int = 17_280_000,
    kmeans: KMeans | ScikitKMeans | None = None,
    seed: int = 0,
    min_duration: float = 2.0,
    num_workers: int = 4,
) -> None:
    """Fit K-means on one layer of a model, or on MFCCs, as `hubert fit` does before its first step.

    Args:
        model: "mfcc", or a checkpoint (or transformers directory).
        manifests: Utterances that frames are drawn from, evenly.
        out: The .safetensors to write; use it as the quantizer of an iteration.
        layer: Which Transformer layer, counted from 1; none for "mfcc".
        clusters: Number of clusters; several numbers make an ensemble.
        parts: Parts of MFCCs spliced over three frames, each clustered on its own (product codes): cepstra, delta,
            delta_delta.
        max_frames: Frames that K-means is fitted on.
        kmeans: How it is fitted: hubert_lightning.KMeans unless named.
        seed: Of the sample and of K-means.
        min_duration: Seconds below which an utterance is left out, as in a fit.
        num_workers: Processes that read audio.
    """
    _check_new(out)
    recipe = LabelRecipe(model, layer, clusters, parts, max_frames, kmeans, seed)
    recipe.check_layer()
    read = read_corpora(manifests)
    cuts = read.chosen(read.num_samples >= max(seconds_to_samples(min_duration), num_samples(2)))
    if not len(cuts):
        raise UserError(f"no utterance of {', '.join(map(str, manifests))} lasts {min_duration} s; lower min_duration")
    extractor = _extractor(recipe)
    rows, index = sample_frames(extractor, cuts, max_frames, seed, batch_frames=BATCH_FRAMES, num_workers=num_workers)
    algorithm = recipe.kmeans or KMeans()
    centroids = [
        algorithm.fit(rows[:, stream.columns], stream.clusters, seed, index=index, device=extractor.device)
        for stream in recipe.streams
    ]
    save_kmeans(out, centroids, recipe.source(extractor, cuts.fingerprint))
    print(f"{out}: {_said(centroids)}, of {len(rows)} frames of {extractor.name}")


def import_kmeans(
    kmeans: Path,
    out: Path,
    model: str | None = None,
    layer: int | None = None,
    parts: list[MfccPart] | None = None,
) -> None:
    """Make our file of a K-means that scikit-learn, numpy or torch saved, such as a released quantizer of HuBERT.

    Nothing in the file is executed. With a model, ours says what the K-means is of, and is refused for other features.

    Args:
        kmeans: What joblib or pickle dumped, a .npy of centroids, or a torch file with cluster_centers_.
        out: The .safetensors to write.
        model: What it was fitted on: "mfcc", or a checkpoint (or transformers directory).
        layer: Which Transformer layer of the model, counted from 1.
        parts: Parts of MFCCs spliced over three frames that the streams of a product code are of: cepstra, delta,
            delta_delta.
    """
    _check_new(out)
    centroids, source = load_kmeans(kmeans)
    if model is None and (parts or layer is not None):
        raise UserError(f"layer {layer} and parts {parts} of no model; name it with --model, or leave them out")
    if parts and len(parts) != len(centroids):
        raise UserError(f"{kmeans}: {len(centroids)} streams, but {len(parts)} parts; name one part per stream")
    if model is not None:
        recipe = LabelRecipe(model, layer, parts=parts)
        recipe.check_layer()
        extractor = _extractor(recipe)
        columns = [MFCC_PARTS[part] for part in parts] if parts else [slice(None)] * len(centroids)
        check_features(kmeans, centroids, source, extractor, columns, parts)
        source = source | {"features": extractor.name} | ({"parts": json.dumps(parts)} if parts else {})
    save_kmeans(out, centroids, source)
    print(f"{out}: {_said(centroids)}, of {source.get('features', 'features that it does not name (--model)')}")


def export_kmeans(kmeans: Path, out: Path) -> None:
    """Write a K-means as scikit-learn's MiniBatchKMeans, in a file of joblib: fairseq and others open it.

    It predicts features in float32. Of several streams there is a file for each: km.0.joblib, km.1.joblib. Such a file
    says where its centroids come from: `hubert kmeans import` finds what was exported.

    Args:
        kmeans: The kmeans.safetensors of a run, or any that `hubert kmeans import` takes.
        out: The file to write, .joblib or .bin.
    """
    centroids, source = load_kmeans(kmeans)
    if len(centroids) == 1:
        files = {out: (centroids[0], source)}
    else:
        files = {
            out.with_suffix(f".{stream}{out.suffix}"): (means, _of_stream(source, stream, len(centroids)))
            for stream, means in enumerate(centroids)
        }
    for path in files:
        _check_new(path)
    if out.suffix not in (".joblib", ".bin", ".pkl"):
        raise UserError(f"{out}: a file of joblib; choose a name that ends in .joblib or .bin")
    with replacing_all(*files) as opened:
        for file, (of, its_source) in zip(opened, files.values(), strict=True):
            joblib.dump(_of_scikit_learn(of, its_source), file)
    for path, (of, _) in files.items():
        print(f"{path}: {_said([of])}, for scikit-learn")


def _of_stream(source: dict[str, str], stream: int, streams: int) -> dict[str, str]:
    """What a file of one stream says of itself: which it is, and of which part."""
    parts = json.loads(source.get("parts", "null"))  # load_kmeans has checked it
    part = {"parts": json.dumps([parts[stream * len(parts) // streams]])} if parts else {}
    return source | part | {"stream": str(stream)}


def _of_scikit_learn(centroids: Tensor, source: dict[str, str]) -> MiniBatchKMeans:
    """As if it had been fitted, for all that needs no more than centroids."""
    clusters, dim = centroids.shape
    kmeans = MiniBatchKMeans(clusters, n_init=1)
    kmeans.cluster_centers_ = centroids.numpy()
    kmeans.n_features_in_, kmeans._n_features_out, kmeans._n_threads = dim, clusters, 1
    setattr(kmeans, SOURCE, json.dumps(source, sort_keys=True))
    return kmeans


def _extractor(recipe: LabelRecipe) -> Extractor:
    if recipe.known_layer is None:
        return mfcc_extractor(in_parts=bool(recipe.parts))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return layer_extractor(recipe.features, recipe.known_layer, device)


def _said(centroids: list[Tensor]) -> str:
    return ", ".join(f"{clusters} clusters of {dim} dimensions" for clusters, dim in map(torch.Tensor.size, centroids))


def _check_new(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path}: is there already; remove it, or choose another name")
