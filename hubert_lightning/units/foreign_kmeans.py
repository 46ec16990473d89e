"""K-means of other programs: objects of scikit-learn in joblib or pickle files, arrays of numpy, tensors of torch.

The first bytes of a file tell its kind. The released quantizers of HuBERT are of the first kind:
`hubert_base_ls960_L9_km500.bin` is a `MiniBatchKMeans` that joblib wrote.
"""

import hashlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.units.label_shards import MAX_CLUSTERS
from hubert_lightning.untrusted.json_file import parse_json
from hubert_lightning.untrusted.pickle_file import NUMPY, StandIn, array_of, read_at_most, unpacked, unpickle
from hubert_lightning.untrusted.torch_file import read_torch

ARRAYS = ("numpy.ndarray", "numpy.core.", "numpy._core.")
"""Classes that some torch files hold instead of tensors."""
MAX_BYTES = 2**30
"""Size of a file, compressed or not: 65536 centroids of 4096 dimensions in float32."""
OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""First bytes of files from before torch 1.6."""
SOURCE = "hubert_lightning_source"
"""Attribute of the scikit-learn objects that we write: the source of the centroids, as JSON."""
WHAT_WE_OPEN = (
    "give our .safetensors, a K-means of scikit-learn as joblib or pickle wrote it, a .npy of centroids, or a torch "
    "file with cluster_centers_"
)


class KMeansStandIn(StandIn):
    """Content of a pickled KMeans of scikit-learn."""


class MiniBatchKMeansStandIn(StandIn):
    """Content of a pickled MiniBatchKMeans of scikit-learn."""


STAND_INS = {
    f"sklearn.cluster.{module}.{kind.__name__.removesuffix('StandIn')}": kind
    for module in ("k_means_", "_kmeans")  # before and since scikit-learn 0.22
    for kind in (KMeansStandIn, MiniBatchKMeansStandIn)
}


def load_foreign_kmeans(path: Path) -> tuple[list[Tensor], dict[str, str]]:
    """Read a K-means of another program. Nothing in the file is executed.

    Args:
        path: File of scikit-learn, numpy or torch.

    Returns:
        Centroids (clusters, dim) float32 of one stream, and their source; of a file that we exported, the original one.

    Raises:
        UserError: The file is not a K-means, is corrupt, or cannot be opened safely.
    """
    content = read_at_most(path, MAX_BYTES)
    source = {"file": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    if content.startswith(b"\x93NUMPY"):
        return [checked_centroids(_numpy_array(content, path), path)], {"imported": "NumPy array"} | source
    if content.startswith((b"PK\x03\x04", OLD_TORCH)):
        return [checked_centroids(_torch_array(path), path)], {"imported": "torch file"} | source
    pickled = unpacked(content, path, MAX_BYTES)
    if not pickled.startswith((b"\x80", b"c", b"(")):  # protocols 2 and later; 0 and 1
        raise UserError(f"{path}: no K-means centroids in this file; {WHAT_WE_OPEN}")
    kmeans = unpickle(pickled, path, STAND_INS)
    if type(kmeans) not in STAND_INS.values() or not isinstance(kmeans.state, dict):
        raise UserError(f"{path}: a pickle that holds no K-means of scikit-learn; {WHAT_WE_OPEN}")
    if "cluster_centers_" not in kmeans.state:
        raise UserError(f"{path}: a K-means that was never fitted; give one that has cluster_centers_")
    centroids = checked_centroids(array_of(kmeans.state["cluster_centers_"], path), path)
    if SOURCE in kmeans.state:
        return [centroids], read_source(kmeans.state[SOURCE], path)
    return [centroids], {"imported": f"scikit-learn {type(kmeans).__name__.removesuffix('StandIn')}"} | source


def checked_centroids(array: np.ndarray, path: Path) -> Tensor:
    """Check an array of centroids.

    Args:
        array: Array of a file.
        path: Path of the file.

    Returns:
        (clusters, dim) float32.

    Raises:
        UserError: The array has another shape, no floating-point numbers, too many rows, or values that are not finite.
    """
    if array.dtype.kind != "f":
        raise UserError(
            f"{path}: an array of {array.dtype}, where centroids are floating-point numbers; {WHAT_WE_OPEN}"
        )
    if array.ndim != 2 or not all(array.shape):
        raise UserError(f"{path}: an array of shape {array.shape} where centroids are (clusters, dim); {WHAT_WE_OPEN}")
    if len(array) > MAX_CLUSTERS:
        raise UserError(f"{path}: {len(array)} centroids, but labels can name {MAX_CLUSTERS}; fit fewer clusters")
    with np.errstate(over="ignore"):
        centroids = array.astype(np.float32)
    if broken := int((~np.isfinite(centroids)).any(axis=1).sum()):
        raise UserError(f"{path}: {broken} of {len(array)} centroids are NaN or infinite; fit them again")
    return torch.from_numpy(np.ascontiguousarray(centroids))


def read_source(text: Any, path: Path) -> dict[str, str]:
    """Parse the source of the centroids in one of our files.

    Args:
        text: JSON, of any type in a file that others changed.
        path: Path of the file.

    Returns:
        Entries of the source.

    Raises:
        UserError: The text is not a source.
    """
    try:
        source: Any = parse_json(text)
    except (ValueError, TypeError, AttributeError):
        source = None
    is_source = isinstance(source, dict) and all(isinstance(value, str) for value in source.values())
    if not is_source or not _is_parts(source.get("parts", "null")):
        raise UserError(f"{path}: the source of its centroids is not in our format; save it again")
    entries: dict[str, str] = source
    return entries


def _is_parts(text: str) -> bool:
    """Whether a text is a JSON list of names, or null."""
    try:
        parts = parse_json(text)
    except ValueError:
        return False
    return parts is None or (isinstance(parts, list) and all(isinstance(part, str) for part in parts))


def _numpy_array(content: bytes, path: Path) -> np.ndarray:
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, column_major, dtype = read_header(file)
    except Exception as error:  # the header is a line of Python, which may fail in any way
        raise UserError(f"{path}: starts as an array of numpy, but is corrupt; copy it again") from error
    if dtype.kind != "f":
        raise UserError(
            f"{path}: an array of {ascii(str(dtype))[1:-1][:100]}, where centroids are floating-point numbers; "
            f"{WHAT_WE_OPEN}"
        )
    numbers = content[file.tell() :]
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(numbers):
        raise UserError(f"{path}: {len(numbers)} bytes for an array of shape {shape}; corrupt, copy it again")
    return np.frombuffer(numbers, dtype).reshape(shape, order="F" if column_major else "C")


def _torch_array(path: Path) -> np.ndarray:
    arrays = {name: kind for name, kind in NUMPY.items() if name.startswith(("numpy.dtype", *ARRAYS))}
    held = read_torch(path, arrays)
    centroids = held.get("cluster_centers_") if isinstance(held, dict) else held
    if not isinstance(centroids, Tensor):
        return array_of(centroids, path)
    if not centroids.is_floating_point():
        raise UserError(
            f"{path}: cluster_centers_ of {centroids.dtype}, where centroids are floating-point numbers; {WHAT_WE_OPEN}"
        )
    return centroids.detach().double().numpy()  # numpy has no bfloat16
