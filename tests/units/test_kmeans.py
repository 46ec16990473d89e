import ast
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.cluster import MiniBatchKMeans
from sklearn.datasets import make_blobs
from torch import Tensor

from hubert_lightning.units.kmeans import KMeans, ScikitKMeans, _filled, assign
from hubert_lightning.units.kmeans_file import kmeans_fingerprint, load_kmeans, save_kmeans
from hubert_lightning.units.kmeans_sample import Sample

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


def shifted(features: Tensor, offset: float, where: str) -> Tensor:
    """Some rows, one of whose dimensions, or all of them, are far from 0."""
    return features + offset * (torch.arange(features.shape[1]) == 3 if where == "in one dimension" else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["in one dimension", "in all"])
@pytest.mark.parametrize("offset", [0.0, 100.0, 1e3, 1e4, -1e4])
@pytest.mark.parametrize("device", DEVICES)
def test_assign_is_that_of_float64_however_far_from_zero(device, offset, where, dtype):
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(24, 256, generator=generator)
    features = 0.06 * torch.randn(3000, 24, generator=generator) @ spread
    centroids = features[:200] + 0.03 * torch.randn(200, 256, generator=generator)
    features, centroids = (shifted(of, offset, where).to(dtype) for of in (features, centroids))
    expected = torch.cdist(features.double(), centroids.double()).argmin(dim=1)
    assert torch.equal(assign(features.to(device), centroids.to(device)).cpu(), expected)


@pytest.mark.parametrize("far", [1e3, 1e5])
def test_one_far_centroid_confuses_no_others(far):
    generator = torch.Generator().manual_seed(0)
    centroids = 0.3 * torch.randn(100, 64, generator=generator)
    features = centroids[torch.arange(3000) % 100] + 0.3 * torch.randn(3000, 64, generator=generator)
    centroids[7] = far
    expected = torch.cdist(features.double(), centroids.double()).argmin(dim=1)
    assert torch.equal(assign(features, centroids), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kmeans", "where"),
    [(KMeans(), "in one dimension"), (KMeans(), "in all"), (KMeans(batch_frames=3000), "in all")],
    ids=["lloyd-one", "lloyd-all", "mini-batch-all"],
)
def test_a_fit_is_as_good_far_from_zero(kmeans, where):
    features = torch.from_numpy(make_blobs(10_000, 16, centers=100, cluster_std=1.5, random_state=0)[0]).float()
    features = (256 * features).round() / 256  # so that adding 2 ** 14 rounds nothing
    far = shifted(features, 2.0**14, where)
    near = inertia(features, kmeans.fit(features, 40, seed=0))
    # Another local minimum at most: sums are rounded elsewhere
    assert inertia(far, kmeans.fit(far, 40, seed=0)) < 1.005 * near


def test_autocast_changes_no_centroid():
    features = torch.from_numpy(rows(1000, 8))
    expected = KMeans().fit(features, 20, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(KMeans().fit(features, 20, seed=0), expected)


FITS = [KMeans(), KMeans(batch_frames=100), ScikitKMeans()]
named = pytest.mark.parametrize("kmeans", FITS, ids=["lloyd", "mini-batch", "scikit-learn"])


def inertia(features: Tensor, centroids: Tensor) -> float:
    return float(torch.cdist(features.double(), centroids.double()).min(dim=1).values.square().mean())


@named
def test_fit_finds_clusters_that_lie_apart(kmeans):
    features, truth, centres = make_blobs(240, 8, centers=6, cluster_std=0.1, random_state=1, return_centers=True)
    rows = torch.from_numpy(features).float()
    centroids = kmeans.fit(rows, 6, seed=0)
    assert centroids.dtype == torch.float32
    nearest = torch.from_numpy(centres[truth]).float()
    # The mean of the 40 points of a blob lies 0.1 / √40 = 0.016 from its centre
    torch.testing.assert_close(centroids[assign(rows, centroids)], nearest, atol=0.1, rtol=0)


def test_scikit_k_means_has_the_settings_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Recorded(MiniBatchKMeans):
        def fit(self, X, y=None, sample_weight=None):
            asked.append(self.get_params())
            return super().fit(X, y, sample_weight)

    monkeypatch.setattr("sklearn.cluster.MiniBatchKMeans", Recorded)
    ScikitKMeans().fit(torch.from_numpy(rows(500)), 7, seed=3)
    # fairseq examples/hubert/simple_kmeans/learn_kmeans.py: its defaults; HuBERT §IV-B has 10 000 frames and 20 starts
    expected = {"n_clusters": 7, "init": "k-means++", "max_iter": 100, "batch_size": 10_000, "tol": 0.0, "n_init": 20}
    expected |= {"max_no_improvement": 100, "reassignment_ratio": 0.0, "init_size": None, "compute_labels": False}
    assert [{name: of[name] for name in expected} for of in asked] == [expected]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_lloyd_ends_no_worse_than_scikit_learn(device):
    features = torch.from_numpy(make_blobs(20_000, 16, centers=300, cluster_std=1.5, random_state=0)[0]).float()
    ours = KMeans().fit(features.to(device), 100, seed=0).cpu()
    # Both end in a local minimum; a hundredth is what two seeds differ by
    assert inertia(features, ours) < 1.01 * inertia(features, ScikitKMeans().fit(features, 100, seed=0))


@pytest.mark.slow
def test_at_the_end_every_centroid_is_the_mean_of_its_rows():
    features = torch.from_numpy(rows(3000, 8))
    centroids = KMeans(max_rounds=500, tolerance=0).fit(features, 10, seed=0)
    clusters = assign(features, centroids)
    means = torch.stack([features[clusters == cluster].mean(dim=0) for cluster in range(10)])
    torch.testing.assert_close(centroids, means, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_mini_batches_come_near_to_lloyd():
    features = torch.from_numpy(make_blobs(20_000, 16, centers=300, cluster_std=1.5, random_state=0)[0]).float()
    lloyd = inertia(features, KMeans().fit(features, 100, seed=0))
    assert inertia(features, KMeans(batch_frames=2000).fit(features, 100, seed=0)) < 1.02 * lloyd


@named
def test_fit_is_the_same_for_the_same_seed(kmeans):
    features = torch.from_numpy(rows(500))
    assert torch.equal(kmeans.fit(features, 5, seed=3), kmeans.fit(features, 5, seed=3))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_in_half_precision_are_taken_in_chunks(monkeypatch, device):
    monkeypatch.setattr("hubert_lightning.units.kmeans_sample.CPU_PIECE", 3000)
    features = torch.from_numpy(rows(20_000, 8))
    half = KMeans().fit(features.half(), 20, seed=0, device=torch.device(device))
    torch.testing.assert_close(half.cpu(), KMeans().fit(features.half().float(), 20, seed=0))


def test_an_empty_cluster_moves_to_where_no_centroid_is_near():
    features = torch.cat([torch.zeros(50, 2), torch.ones(50, 2) * 9]) + torch.from_numpy(rows(100, 2)) / 1000
    centroids = torch.tensor([[0.0, 0.0], [500.0, 500.0]])
    filled = _filled(centroids, torch.tensor([100, 0]), features, 1)
    assert torch.equal(filled[0], torch.zeros(2))
    assert (filled[1] - 9).abs().max() < 0.1


FIT_ON_TWO = """
import sys
import torch
import torch.distributed as dist
from hubert_lightning.units import kmeans
from hubert_lightning.units.kmeans import KMeans
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
rows = torch.load(f"{folder}/rows.pt")
index = torch.arange(len(rows))
index = index[index % 3 % 2 == rank] if sys.argv[4:] != ["one"] else index[: len(index) * (rank == 0)]
if sys.argv[4:] == ["axes"] and rank:
    kmeans.principal_axes = None  # only the first rank may find them
try:
    centroids = KMeans(**eval(sys.argv[3])).fit(rows[index], 50, 0, index=index, group=dist.group.WORLD)
    torch.save(centroids, f"{folder}/{rank}.pt")
except ValueError as error:
    print(error)
dist.barrier()  # gloo aborts a process whose peer leaves before it has read that peer's last answer
dist.destroy_process_group()
"""


def fitted_on_two(folder: Path, features: Tensor, options: str = "{}", dealt: str = "unevenly") -> list[str]:
    torch.save(features, folder / "rows.pt")
    command = [sys.executable, "-c", FIT_ON_TWO]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder), options, dealt], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return said


@pytest.mark.slow
@pytest.mark.parametrize("dealt", ["unevenly", "one"])
@pytest.mark.parametrize("options", ["{}", "{'batch_frames': 5000}"])
def test_two_ranks_find_the_centroids_that_one_finds(tmp_path, options, dealt):
    # More rows than the seeds are chosen from, so that the ranks' sums are added up
    features = torch.from_numpy(make_blobs(20_000, 16, centers=60, cluster_std=1.0, random_state=0)[0]).float()
    features[torch.arange(len(features)) % 3 % 2 == 1] += (
        1000  # of one rank alone, if dealt unevenly: its mean is not all's
    )
    fitted_on_two(tmp_path, features, options, dealt)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, KMeans(**ast.literal_eval(options)).fit(features, 50, 0))


@pytest.mark.slow
def test_the_first_rank_finds_the_principal_axes_of_both(tmp_path):
    features = torch.randn(20_000, 6) @ torch.randn(6, 64) + 0.1 * torch.randn(20_000, 64)
    fitted_on_two(tmp_path, features, dealt="axes")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)


@pytest.mark.slow
def test_a_frame_that_is_not_finite_on_one_rank_is_refused_on_both(tmp_path):
    features = torch.from_numpy(rows(500))
    features[1, 3] = torch.nan
    assert all("NaN or infinite features in 1 of 500 frames" in said for said in fitted_on_two(tmp_path, features))


@named
def test_fit_refuses_fewer_frames_than_clusters(kmeans):
    with pytest.raises(ValueError, match="4 frames cannot make 5 clusters"):
        kmeans.fit(torch.from_numpy(rows(4)), 5, seed=0)


@named
def test_fit_refuses_fewer_different_frames_than_clusters(kmeans):
    with pytest.raises(ValueError, match="only 4 different frames among 80 for 5 clusters"):
        kmeans.fit(torch.from_numpy(rows(4)).repeat(20, 1), 5, seed=0)


def test_fit_finds_the_frames_among_much_silence():
    features = torch.cat([torch.zeros(100_000, 4), torch.from_numpy(rows(1000, 4))])
    centroids = KMeans().fit(features, 200, seed=0)
    assert len(assign(features, centroids).unique()) > 190


@pytest.mark.slow
def test_small_mini_batches_keep_the_seeds_that_they_have_not_met():
    features = torch.from_numpy(make_blobs(12_000, 16, centers=300, cluster_std=1.5, random_state=0)[0]).float()
    seeds_alone = inertia(features, KMeans(max_rounds=1).fit(features[:8192], 300, seed=0))
    assert inertia(features, KMeans(batch_frames=300).fit(features, 300, seed=0)) < seeds_alone


@named
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_fit_refuses_frames_that_are_not_finite(kmeans, value):
    features = torch.from_numpy(rows(100))
    features[[3, 7], 1] = value
    with pytest.raises(ValueError, match="2 of 100 frames"):
        kmeans.fit(features, 5, seed=0)


@pytest.mark.parametrize("options", [{"restarts": 0}, {"max_rounds": 0}, {"tolerance": -1.0}, {"batch_frames": 0}])
def test_settings_that_fit_nothing_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        KMeans(**options)


def test_a_saved_kmeans_comes_back_with_its_source_and_no_other_file_stays(tmp_path):
    centroids, source = (
        [torch.from_numpy(rows(10)), torch.from_numpy(rows(4, 13))],
        {"seed": "0", "features": "mfcc", "kmeans": "KMeans"},
    )
    path = tmp_path / "run" / "kmeans.safetensors"
    save_kmeans(path, [torch.zeros(3, 2)], {})
    save_kmeans(path, centroids, source)
    loaded, loaded_source = load_kmeans(path)
    assert all(map(torch.equal, loaded, centroids))
    assert loaded_source == source
    assert kmeans_fingerprint(loaded) == kmeans_fingerprint(centroids)
    assert list(path.parent.iterdir()) == [path]
    before = path.read_bytes()
    save_kmeans(path, centroids, dict(reversed(source.items())))
    assert path.read_bytes() == before


def test_a_fingerprint_tells_centroids_apart():
    centroids = torch.from_numpy(rows(10))
    assert kmeans_fingerprint([centroids]) != kmeans_fingerprint([centroids.flip(0)])
    assert kmeans_fingerprint([centroids]) != kmeans_fingerprint([centroids[:5], centroids[5:]])
    assert kmeans_fingerprint([centroids.T.contiguous().T]) == kmeans_fingerprint([centroids])


def test_a_file_of_another_kind_is_refused_by_name(tmp_path):
    text, weights = tmp_path / "notes.txt", tmp_path / "encoder.safetensors"
    text.write_text("not centroids")
    save_file({"weight": torch.zeros(2)}, weights)
    for path in (text, weights):
        with pytest.raises(ValueError, match=f"{path.name}: no K-means centroids"):
            load_kmeans(path)


@pytest.mark.parametrize("kmeans", [KMeans(tolerance=0.0, max_rounds=300), ScikitKMeans()])
def test_clusters_keep_the_numbers_of_the_centroids_that_a_fit_starts_from(kmeans: KMeans | ScikitKMeans) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = 10 * torch.eye(6)
    rows = corners.repeat(50, 1) + torch.randn(300, 6, generator=generator)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    start = corners[order] + torch.randn(6, 6, generator=generator)
    fitted = kmeans.fit(rows, 6, 0, start=start)
    assert torch.equal(assign(corners, fitted), order.argsort())
    if isinstance(kmeans, KMeans):  # the centroids of mini-batches are no means of all rows
        torch.testing.assert_close(fitted, rows.view(50, 6, 6).mean(dim=0)[order])


def test_a_fit_from_given_centroids_is_that_of_scikit_learn() -> None:
    rows = torch.randn(3000, 5, generator=torch.Generator().manual_seed(1))
    start = rows[:40].clone()
    reference = SklearnKMeans(40, init=start.numpy(), n_init=1, tol=0, max_iter=1000).fit(rows.numpy())
    fitted = KMeans(tolerance=0.0, max_rounds=1000).fit(rows, 40, 0, start=start)
    torch.testing.assert_close(fitted, torch.from_numpy(reference.cluster_centers_), atol=1e-4, rtol=1e-4)


def test_a_cluster_without_frames_starts_where_no_centroid_is_near() -> None:
    rows = torch.cat([torch.randn(200, 3), torch.randn(200, 3) + 40])
    start = torch.stack([rows[:200].mean(dim=0), torch.full((3,), math.nan)])
    fitted = KMeans().fit(rows, 2, 0, start=start)
    torch.testing.assert_close(fitted, torch.stack([rows[:200].mean(dim=0), rows[200:].mean(dim=0)]))


def test_the_means_of_given_clusters_are_those_of_their_rows() -> None:
    rows, cluster = torch.randn(500, 4), torch.randint(7, (500,))
    result = Sample(rows, None, 3, None, None).means_of(cluster, 9)
    for number in range(7):
        torch.testing.assert_close(result.means[number].float(), rows[cluster == number].mean(dim=0))
    assert result.counts.tolist() == torch.bincount(cluster, minlength=9).tolist()
