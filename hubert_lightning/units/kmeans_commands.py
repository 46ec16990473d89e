"""The verbs of K-means files: fit outside of a training run, import from and export to other programs."""

import json
from pathlib import Path
from typing import Any

import joblib
from torch import Tensor

from hubert_lightning.data.balance import Balance
from hubert_lightning.data.corpora import read_corpora
from hubert_lightning.data.workers import default_workers
from hubert_lightning.errors import UserError, check_installed, counted
from hubert_lightning.features.extractors import Extractor, combined_extractor, mfcc_extractor
from hubert_lightning.features.mfcc import MFCC_PARTS, MfccPart
from hubert_lightning.features.sample import sample_frames
from hubert_lightning.features.windows import WINDOW_FRAMES
from hubert_lightning.files import replacing_all
from hubert_lightning.frames import num_samples, seconds_to_samples
from hubert_lightning.model.devices import choose_device
from hubert_lightning.units.foreign_kmeans import SOURCE
from hubert_lightning.units.kmeans import KMeans, ScikitKMeans
from hubert_lightning.units.kmeans_file import load_kmeans, save_kmeans
from hubert_lightning.units.label_recipe import LabelRecipe, Stream, check_features
from hubert_lightning.units.residual import fit_streams


def fit_kmeans(
    model: str,
    manifests: list[Path],
    out: Path,
    layer: int | list[int] | None = None,
    clusters: int | list[int] = 100,
    parts: list[MfccPart] | None = None,
    max_frames: int = 17_280_000,
    kmeans: KMeans | ScikitKMeans | None = None,
    seed: int = 0,
    min_duration: float = 2.0,
    num_workers: int | None = None,
    residual: int = 1,
    balance_languages: float | dict[str, float] | None = None,
    balance_corpora: float | dict[str, float] | None = None,
) -> None:
    """Fit K-means on one layer of a model, or on MFCCs, as `hubert fit` does before its first step.

    Args:
        model: "mfcc", or a model in any format.
        manifests: Manifests of the utterances that frames are drawn from.
        out: File to write, .safetensors; an iteration can use it as its quantizer.
        layer: Transformer layer, counted from 1; none for "mfcc". Several layers have a K-means each.
        clusters: Number of clusters; several numbers make an ensemble.
        parts: Parts of MFCCs spliced over three frames, each with its own K-means (product codes): cepstra, delta,
            delta_delta.
        max_frames: Frames that K-means is fitted on, a uniform sample of all utterances.
        kmeans: K-means algorithm, hubert_lightning.KMeans or hubert_lightning.ScikitKMeans; the first if not given.
        seed: Seed of the sample and of K-means.
        min_duration: Minimum duration in seconds; shorter utterances are left out, as in `hubert fit`.
        num_workers: Number of processes that read audio; one for each core, but 4 at most, if not given.
        residual: Number of stages of residual K-means: every stage clusters the features minus their nearest centroids
            of the stages before.
        balance_languages: Exponent of the amounts of audio of the languages, from 0, which gives each the same share of
            the sample, to 1, which changes nothing; or the relative share of each language, such as '{en: 2, sw: 1}'.
        balance_corpora: The same for corpora, within each language if languages are balanced too.

    Raises:
        UserError: The arguments contradict each other, or a file cannot be used.
    """
    _check_new(out)
    if Path(out).suffix != ".safetensors":
        raise UserError(f"{out}: not a name of a K-means file; choose one that ends in .safetensors")
    layers: list[int | None] | int | None = [*layer] if isinstance(layer, list) else layer
    recipe = LabelRecipe(model, layers, clusters, parts, max_frames, kmeans, seed, residual=residual)
    recipe.check_layer()
    balance = Balance(balance_languages, balance_corpora)
    read = read_corpora(manifests)
    extractor = _extractor(recipe)
    least = max(seconds_to_samples(min_duration), num_samples(2, extractor.clock))
    long_enough = read.num_samples >= least
    if balance:
        reason = f"no utterance lasts {min_duration} s; lower min_duration"
        for sentence in balance.check(balance.groups(read), long_enough, reason):
            print(sentence)
    cuts = read.chosen(long_enough)
    if not len(cuts):
        raise UserError(f"no utterance of {', '.join(map(str, manifests))} lasts {min_duration} s; lower min_duration")
    num_workers = default_workers() if num_workers is None else num_workers
    rows, index = sample_frames(
        extractor, cuts, max_frames, seed, batch_frames=WINDOW_FRAMES, num_workers=num_workers, balance=balance
    )
    algorithm = recipe.kmeans or KMeans()

    def fit(stream: Stream, sample: Tensor) -> Tensor:
        return algorithm.fit(sample, stream.clusters, seed, index=index, device=extractor.device)

    streams = [(stream.columns(extractor), stream) for stream in recipe.streams]
    centroids = fit_streams(rows, streams, residual, fit, extractor.device)
    save_kmeans(out, centroids, recipe.source(extractor, cuts.fingerprint) | balance.source(cuts))
    print(f"{out}: {_described(centroids)}, fitted on {counted(len(rows), 'frame')} of {extractor.name}")


def import_kmeans(
    kmeans: Path,
    out: Path,
    model: str | None = None,
    layer: int | None = None,
    parts: list[MfccPart] | None = None,
) -> None:
    """Convert a K-means that scikit-learn, numpy or torch saved, such as a released quantizer of HuBERT.

    Nothing in the file is executed. With --model, the new file names its model and layer, and is refused for others.

    Args:
        kmeans: File of joblib or pickle, a .npy of centroids, or a torch file with cluster_centers_.
        out: File to write, .safetensors.
        model: Features that the K-means was fitted on: "mfcc", or a model in any format.
        layer: Transformer layer of the model, counted from 1.
        parts: Parts of MFCCs spliced over three frames, one per stream of a product code: cepstra, delta, delta_delta.

    Raises:
        UserError: The file is not a K-means, or does not belong to these features.
    """
    _check_new(out)
    centroids, source = load_kmeans(kmeans)
    if model is None and (parts or layer is not None):
        raise UserError("layer and parts are options of a model; name the model with --model, or leave them out")
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
    print(f"{out}: {_described(centroids)}, of {source.get('features', 'features that it does not state (--model)')}")


def export_kmeans(kmeans: Path, out: Path) -> None:
    """Write a K-means as scikit-learn's MiniBatchKMeans in a joblib file, for fairseq and others.

    Its `predict` takes float32 features. If there are several streams, each has its own file: km.0.joblib, km.1.joblib.
    The files also hold the source of their centroids, which `hubert kmeans import` restores.

    Args:
        kmeans: The kmeans.safetensors of a run, or any file that `hubert kmeans import` takes.
        out: File to write, .joblib or .bin.

    Raises:
        UserError: The file is not a K-means, or the output exists.
    """
    check_installed("sklearn")
    centroids, source = load_kmeans(kmeans)
    if len(centroids) == 1:
        files = {out: (centroids[0], source)}
    else:
        files = {
            out.with_suffix(f".{stream}{out.suffix}"): (means, _source_of_stream(source, stream, len(centroids)))
            for stream, means in enumerate(centroids)
        }
    for path in files:
        _check_new(path)
    if out.suffix not in (".joblib", ".bin", ".pkl"):
        raise UserError(f"{out}: not a name of a joblib file; choose one that ends in .joblib or .bin")
    with replacing_all(*files) as opened:
        for file, (means, source) in zip(opened, files.values(), strict=True):
            joblib.dump(_scikit_kmeans(means, source), file)
    for path, (means, _) in files.items():
        print(f"{path}: {_described([means])}, for scikit-learn")


def _source_of_stream(source: dict[str, str], stream: int, streams: int) -> dict[str, str]:
    """Source of one stream, with its number and its part."""
    parts = json.loads(source.get("parts", "null"))  # load_kmeans has checked it
    part = {"parts": json.dumps([parts[stream * len(parts) // streams]])} if parts else {}
    return source | part | {"stream": str(stream)}


def _scikit_kmeans(centroids: Tensor, source: dict[str, str]) -> Any:
    """Create a fitted MiniBatchKMeans, for everything that needs centroids alone."""
    from sklearn.cluster import MiniBatchKMeans

    clusters, dim = centroids.shape
    kmeans = MiniBatchKMeans(clusters, n_init=1)
    kmeans.cluster_centers_ = centroids.numpy()
    kmeans.n_features_in_, kmeans._n_features_out, kmeans._n_threads = dim, clusters, 1
    setattr(kmeans, SOURCE, json.dumps(source, sort_keys=True))
    return kmeans


def _extractor(recipe: LabelRecipe) -> Extractor:
    if recipe.parts:
        return mfcc_extractor(in_parts=True)
    assert recipe.known_sources is not None
    return combined_extractor(recipe.known_sources, choose_device())


def _described(centroids: list[Tensor]) -> str:
    return ", ".join(f"{clusters} clusters of {dim} dimensions" for clusters, dim in map(Tensor.size, centroids))


def _check_new(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path}: exists already; remove it or choose another OUT")
