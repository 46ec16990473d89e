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

CHECKSUM, SHA256 = "checksum", "sha256:"
"""Key of the checksum and start of its value: if one is corrupt, the other is still found."""


def save_kmeans(path: Path, centroids: list[Tensor], source: dict[str, str]) -> None:
    """Write the centroids of every stream and their source; the file appears whole or not at all.

    Args:
        path: File to write, .safetensors.
        centroids: (clusters, dim) of each stream.
        source: Everything that the centroids depend on, by name.

    Raises:
        UserError: The disk is full or cannot be written to.
    """
    tensors = {
        f"centroids.{stream}": means.detach().float().cpu().contiguous() for stream, means in enumerate(centroids)
    }
    content = source | {CHECKSUM: _checksum(centroids, source)}
    # One key: safetensors writes several keys in random order
    write_whole(path, save(tensors, metadata={"source": json.dumps(content, sort_keys=True)}))


def load_kmeans(path: Path) -> tuple[list[Tensor], dict[str, str]]:
    """Read a K-means.

    Args:
        path: File of `save_kmeans`, or of another program (`load_foreign_kmeans`); the content tells which.

    Returns:
        Centroids (clusters, dim) float32 of each stream, and their source.

    Raises:
        UserError: The file is not a K-means, is corrupt, or cannot be opened safely.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; correct the path")
    if not is_safetensors(path):
        return load_foreign_kmeans(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = [f"centroids.{stream}" for stream in range(len(file.keys()))]
            if names and sorted(names) == sorted(file.keys()):
                source = read_source((file.metadata() or {})["source"], path)
                centroids = [checked_centroids(file.get_tensor(name).numpy(), path) for name in names]
                return centroids, _checked_source(path, centroids, source)
    except (SafetensorError, KeyError, TypeError):  # TypeError: numpy lacks the dtype
        pass
    raise UserError(f"{path}: no K-means centroids in this file; correct the path, or remove the file and fit again")


def _checked_source(path: Path, centroids: list[Tensor], source: dict[str, str]) -> dict[str, str]:
    """Check the checksum, which files of earlier versions lack, and return the source without it."""
    rest = {key: value for key, value in source.items() if key != CHECKSUM and not value.startswith(SHA256)}
    if rest != source and source != rest | {CHECKSUM: _checksum(centroids, rest)}:
        raise UserError(f"{path}: corrupt (its checksum differs); restore it, or fit it again")
    return rest


def _checksum(centroids: list[Tensor], source: dict[str, str]) -> str:
    content = kmeans_fingerprint(centroids) + json.dumps(source, sort_keys=True)
    return SHA256 + hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def kmeans_fingerprint(centroids: list[Tensor]) -> str:
    """Compute a short name that only equal centroids share.

    Args:
        centroids: (clusters, dim) of each stream.
    """
    digest = hashlib.sha256()
    for stream in centroids:
        digest.update(np.array(stream.shape).tobytes() + stream.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
