"""K-means as a safetensors file, with its source and a checksum."""

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.files import write_whole
from hubert_lightning.units.foreign_kmeans import checked_centroids, load_foreign_kmeans, read_source
from hubert_lightning.untrusted.file_kind import is_safetensors

CHECKSUM, SHA256 = "checksum", "sha256:"  # key and start of the value: one is left where the other is damaged


def save_kmeans(path: Path, centroids: list[Tensor], source: dict[str, str]) -> None:
    """Write the centroids of every stream and where they come from; the file appears whole or not at all.

    Raises:
        UserError: The disk is full, or cannot be written to.
    """
    tensors = {f"centroids.{stream}": of.detach().float().cpu().contiguous() for stream, of in enumerate(centroids)}
    said = source | {CHECKSUM: _checksum(centroids, source)}
    # One key: of several, safetensors writes the order at random
    write_whole(path, save(tensors, metadata={"source": json.dumps(said, sort_keys=True)}))


def load_kmeans(path: Path) -> tuple[list[Tensor], dict[str, str]]:
    """The centroids of every stream, (clusters, dim) float32, and where they come from.

    path: what `save_kmeans` wrote, or a K-means of another program (`load_foreign_kmeans`), told by what is in the file

    Raises:
        UserError: The file holds something else, or nothing that can be opened safely.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file with K-means centroids; correct the path")
    if not is_safetensors(path):
        return load_foreign_kmeans(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = [f"centroids.{stream}" for stream in range(len(file.keys()))]
            if names and sorted(names) == sorted(file.keys()):
                source = read_source((file.metadata() or {})["source"], path)
                centroids = [checked_centroids(file.get_tensor(name).numpy(), path) for name in names]
                return centroids, _checked_source(path, centroids, source)
    except (SafetensorError, KeyError, TypeError):  # the last of a dtype that numpy has not
        pass
    raise UserError(f"{path}: no K-means centroids in this file; correct the path, or remove the file and fit again")


def _checked_source(path: Path, centroids: list[Tensor], source: dict[str, str]) -> dict[str, str]:
    """The source without its checksum, which files of earlier versions do not have.

    Raises:
        UserError: The checksum is another than that of the file's content.
    """
    rest = {key: value for key, value in source.items() if key != CHECKSUM and not value.startswith(SHA256)}
    if rest != source and source != rest | {CHECKSUM: _checksum(centroids, rest)}:
        raise UserError(f"{path}: damaged (its checksum is another); restore it, or fit it again")
    return rest


def _checksum(centroids: list[Tensor], source: dict[str, str]) -> str:
    about = kmeans_fingerprint(centroids) + json.dumps(source, sort_keys=True)
    return SHA256 + hashlib.sha256(about.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def kmeans_fingerprint(centroids: list[Tensor]) -> str:
    """A short name that only equal centroids share."""
    digest = hashlib.sha256()
    for stream in centroids:
        digest.update(np.array(stream.shape).tobytes() + stream.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
