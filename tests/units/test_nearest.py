import pytest
import torch
from torch import Tensor

from hubert_lightning.units import kmeans_sample, nearest
from hubert_lightning.units.kmeans import KMeans, ScikitKMeans
from hubert_lightning.units.kmeans_seeds import plus_plus, principal_axes


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def drawn(rows: int, clusters: int, dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, dim, generator=generator), torch.randn(clusters, dim, generator=generator)


@pytest.mark.parametrize(
    ("rows", "clusters", "dim"), [(1, 5, 3), (7, 500, 8), (10_001, 100, 39), (301, 1, 4), (2000, 2000, 17)]
)
def test_the_nearest_centroid_is_that_of_float64(threads, rows, clusters, dim):
    x, centroids = drawn(rows, clusters, dim)
    half, cluster = nearest.nearest(x, centroids)
    distances = torch.cdist(x.double(), centroids.double()).square()
    assert torch.equal(cluster, distances.argmin(dim=1))
    expected = (distances.min(dim=1).values - x.double().square().sum(dim=1)) / 2
    torch.testing.assert_close(half.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [16, nearest.WIDE + 1])
def test_sums_are_those_of_the_rows_of_each_cluster(dim):
    x, centroids = drawn(3000, 50, dim)
    cluster = nearest.nearest(x, centroids)[1] // 2  # half of the clusters are empty
    sums, counts = nearest.cluster_sums(x, cluster, 50)
    expected = torch.zeros(50, dim, dtype=torch.float64).index_add_(0, cluster, x.double())
    torch.testing.assert_close(sums.double(), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(counts.long(), torch.bincount(cluster, minlength=50))


@pytest.mark.parametrize("backend", [False, True], ids=["for all", "of a backend"])
def test_products_are_of_float32_whatever_is_allowed_elsewhere(backend):
    matmul = torch.backends.cuda.matmul
    try:
        if backend:
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("medium")
        with nearest.float32_products():
            assert matmul.fp32_precision == "ieee" or torch.get_float32_matmul_precision() == "highest"
        assert matmul.fp32_precision == "tf32"
    finally:
        if backend:
            matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


def speechlike(count: int = 20_000, dim: int = 96) -> Tensor:
    """Rows that differ in a few directions most, as those of a layer do."""
    generator = torch.Generator().manual_seed(0)
    sounds = torch.randn(200, 10, generator=generator)
    mixed = (sounds[torch.randint(200, (count,), generator=generator)]) @ torch.randn(10, dim, generator=generator)
    return mixed + 0.5 * torch.randn(count, dim, generator=generator) + 5


def mean_distance(rows: Tensor, centroids: Tensor) -> float:
    return float(torch.cdist(rows.double(), centroids.double()).min(dim=1).values.square().mean())


def test_rows_that_differ_in_few_directions_are_projected_on_them():
    rows = speechlike() - speechlike().mean(dim=0)
    axes = principal_axes(rows)
    assert axes is not None
    assert axes.shape == (96, 16)
    torch.testing.assert_close(axes.T @ axes, torch.eye(16), atol=1e-5, rtol=0)
    assert (rows @ axes).square().sum() > 0.9 * rows.square().sum()
    assert principal_axes(drawn(5000, 1, 24)[0]) is None  # in all directions alike


def test_projected_rounds_end_no_higher_than_rounds_in_all_dimensions(monkeypatch):
    rows = speechlike()
    reported: list[float] = []
    projected = KMeans().fit(rows, 100, seed=0, report=reported.append)
    monkeypatch.setattr("hubert_lightning.units.kmeans.principal_axes", lambda rows: None)
    whole = KMeans().fit(rows, 100, seed=0)
    assert mean_distance(rows, projected) < 1.01 * mean_distance(rows, whole)
    # That of a round is the distance to the centroids before it
    assert mean_distance(rows, projected) <= reported[-1] < 1.01 * mean_distance(rows, projected)


def test_a_projected_round_reports_the_inertia_in_all_dimensions():
    rows = speechlike()
    sample = kmeans_sample.Sample(rows, None, 0, None, None)
    sample.centre = rows.mean(dim=0)
    axes = principal_axes(rows - sample.centre)
    assert axes is not None
    centroids = plus_plus((rows - sample.centre) @ axes, 50, [0])[0]
    projected = sample.projected(axes)
    inertia = float(projected.round(centroids, sample.total).inertia) / sample.total
    assert inertia == pytest.approx(mean_distance(rows, centroids @ axes.T + sample.centre), rel=1e-4)
    means = sample.means(projected, 50)
    cluster = torch.cdist((rows - sample.centre) @ axes, centroids).argmin(dim=1)
    torch.testing.assert_close(means.means[7].float(), (rows - sample.centre)[cluster == 7].mean(dim=0))
    squares = ((rows - sample.centre).double() - means.means[cluster]).square().sum()
    assert float(means.inertia) == pytest.approx(float(squares), rel=1e-5)


def test_seedings_side_by_side_are_those_one_by_one(monkeypatch):
    rows = speechlike(1000)
    together = plus_plus(rows, 20, [3, 4, 5])
    monkeypatch.setattr("hubert_lightning.units.kmeans_seeds.SEEDING_DISTANCES", 1)
    assert all(map(torch.equal, together, plus_plus(rows, 20, [3, 4, 5])))
    assert all(len(seeds.unique(dim=0)) == 20 for seeds in together)


def test_rows_too_many_for_scikit_learn_are_refused_before_they_are_copied(monkeypatch):
    monkeypatch.setattr("hubert_lightning.units.kmeans.os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096}.get(name, 100))
    with pytest.raises(ValueError, match=r"copies all 20000 frames, which takes 0 GB of memory.* lower max_frames"):
        ScikitKMeans().fit(speechlike(), 10, seed=0)
