"""K-means: from a sample of features to centroids, and from features to the nearest of them."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor


def fit_kmeans(features: np.ndarray | Tensor, num_clusters: int, seed: int) -> Tensor:
    """Centroids of a sample of features, with the settings of the reference.

    features: (n, dim)
    returns:  (clusters, dim) float32

    Raises:
        ValueError: Fewer rows than clusters, or a row that is not finite.
    """
    # float64: scikit-learn converts float32 block by block, for every distance, and takes twice as long
    rows = torch.as_tensor(features).detach().cpu().double().numpy()
    if len(rows) < num_clusters:
        raise ValueError(
            f"{len(rows)} frames cannot make {num_clusters} clusters; give more frames or ask for fewer clusters"
        )
    if broken := int((~np.isfinite(rows)).any(axis=1).sum()):
        raise ValueError(
            f"{broken} of {len(rows)} frames have features that are NaN or infinite; "
            "look for broken audio, or for an encoder whose training diverged"
        )
    kmeans = MiniBatchKMeans(  # fairseq learn_kmeans
        num_clusters,
        init="k-means++",
        max_iter=100,
        batch_size=10_000,
        tol=0.0,
        max_no_improvement=100,
        n_init=20,
        reassignment_ratio=0.0,
        compute_labels=False,
        random_state=seed,
    )
    return torch.from_numpy(kmeans.fit(rows).cluster_centers_).float()


def assign(features: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of every frame.

    features:  (frames, dim)
    centroids: (clusters, dim), on the same device
    returns:   (frames,) int64
    """
    features, centroids = features.float(), centroids.float()
    with torch.autocast(features.device.type, enabled=False):  # half precision confuses near neighbours
        # ‖x - c‖² = ‖x‖² - 2xc + ‖c‖²; ‖x‖² is the same for every centroid
        return torch.addmm(centroids.square().sum(dim=1), features, centroids.T, alpha=-2).argmin(dim=1)


def save_kmeans(path: Path, centroids: Tensor, source: dict[str, str]) -> None:
    """Write centroids and where they come from; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(save({"centroids": centroids.detach().float().cpu().contiguous()}, metadata=source))
    os.replace(part, path)


def load_kmeans(path: Path) -> tuple[Tensor, dict[str, str]]:
    """The centroids, (clusters, dim) float32, and where they come from.

    Raises:
        ValueError: The file holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if list(file.keys()) == ["centroids"]:
                return file.get_tensor("centroids"), file.metadata() or {}
    except SafetensorError:
        pass
    raise ValueError(f"{path}: no K-means centroids in this file; correct the path, or remove the file and fit again")


def fingerprint(centroids: Tensor) -> str:
    """A short name that only equal centroids share."""
    return hashlib.sha256(centroids.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
