import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.cluster import MiniBatchKMeans
from sklearn.datasets import make_blobs

from hubert_lightning.clustering.kmeans import assign, fingerprint, fit_kmeans, load_kmeans, save_kmeans

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def rows(count: int = 2000, dim: int = 39) -> np.ndarray:
    return 10 * np.random.default_rng(0).standard_normal((count, dim)).astype(np.float32) + 5


@pytest.mark.parametrize("device", DEVICES)
def test_assign_is_what_scikit_learn_predicts(device):
    features = rows()
    reference = MiniBatchKMeans(50, n_init=1, random_state=0).fit(features)
    centroids = torch.from_numpy(reference.cluster_centers_).to(device)
    clusters = assign(torch.from_numpy(features).to(device), centroids)
    assert clusters.dtype == torch.int64
    assert np.array_equal(clusters.cpu().numpy(), reference.predict(features))


def test_assign_finds_the_smallest_distance():
    features, centroids = torch.from_numpy(rows()), torch.from_numpy(rows(64)) + 1
    assert torch.equal(assign(features, centroids), torch.cdist(features.double(), centroids.double()).argmin(dim=1))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_changes_no_cluster(device):
    features, centroids = torch.from_numpy(rows()).to(device), torch.from_numpy(rows(64)).to(device) + 1
    expected = assign(features, centroids)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(assign(features, centroids), expected)


def test_fit_finds_clusters_that_lie_apart():
    features, truth, centres = make_blobs(240, 8, centers=6, cluster_std=0.1, random_state=1, return_centers=True)
    centroids = fit_kmeans(features, 6, seed=0)
    assert centroids.dtype == torch.float32
    clusters = assign(torch.from_numpy(features), centroids)
    nearest = torch.from_numpy(centres[truth]).float()
    # The mean of the 40 points of a blob lies 0.1 / √40 = 0.016 from its centre
    torch.testing.assert_close(centroids[clusters], nearest, atol=0.1, rtol=0)


def test_fit_is_the_same_for_the_same_seed_and_for_arrays_and_tensors():
    features = rows(200)
    assert torch.equal(fit_kmeans(features, 5, seed=3), fit_kmeans(torch.from_numpy(features), 5, seed=3))


def test_fit_refuses_fewer_frames_than_clusters():
    with pytest.raises(ValueError, match="4 frames cannot make 5 clusters"):
        fit_kmeans(rows(4), 5, seed=0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_fit_refuses_frames_that_are_not_finite(value):
    features = rows(100)
    features[[3, 7], 1] = value
    with pytest.raises(ValueError, match="2 of 100 frames"):
        fit_kmeans(features, 5, seed=0)


def test_a_saved_kmeans_comes_back_with_its_source_and_no_other_file_stays(tmp_path):
    centroids, source = torch.from_numpy(rows(10)), {"features": "mfcc", "seed": "0"}
    path = tmp_path / "run" / "kmeans.safetensors"
    save_kmeans(path, torch.zeros(3, 2), {})
    save_kmeans(path, centroids, source)
    loaded, loaded_source = load_kmeans(path)
    assert torch.equal(loaded, centroids)
    assert loaded_source == source
    assert fingerprint(loaded) == fingerprint(centroids)
    assert list(path.parent.iterdir()) == [path]


def test_a_fingerprint_tells_centroids_apart():
    centroids = torch.from_numpy(rows(10))
    assert fingerprint(centroids) != fingerprint(centroids.flip(0))
    assert fingerprint(centroids.T.contiguous().T) == fingerprint(centroids)


def test_a_file_of_another_kind_is_refused_by_name(tmp_path):
    text, weights = tmp_path / "notes.txt", tmp_path / "encoder.safetensors"
    text.write_text("not centroids")
    save_file({"weight": torch.zeros(2)}, weights)
    for path in (text, weights):
        with pytest.raises(ValueError, match=f"{path.name}: no K-means centroids"):
            load_kmeans(path)
