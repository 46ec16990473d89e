from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans as FullKMeans
from sklearn.cluster import MiniBatchKMeans

from hubert_lightning.units.kmeans import KMeans, ScikitKMeans
from hubert_lightning.units.kmeans_sample import Sample
from hubert_lightning.units.residual import assign_streams, fit_streams

CPU = torch.device("cpu")


def test_residual_kmeans_is_that_of_scikit_learn_twice() -> None:
    rows = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))

    def fit(clusters: int, left: torch.Tensor) -> torch.Tensor:
        return ScikitKMeans().fit(left, clusters, 3)

    first, second = fit_streams(rows.clone(), [(slice(None), 8), (slice(None), 5)], 2, fit, CPU)
    ordered = Sample(rows, None, 3, None, None).gather(600).double().numpy()
    settings: dict[str, Any] = {
        "max_iter": 100,
        "batch_size": 10_000,
        "tol": 0.0,
        "max_no_improvement": 100,
        "n_init": 20,
    }
    settings |= {"reassignment_ratio": 0.0, "random_state": 3}
    reference = MiniBatchKMeans(8, **settings).fit(ordered)
    torch.testing.assert_close(first.double(), torch.from_numpy(reference.cluster_centers_), atol=1e-5, rtol=1e-5)
    residual = ordered - reference.cluster_centers_[reference.labels_]
    of_residual = MiniBatchKMeans(5, **settings).fit(residual)
    torch.testing.assert_close(second.double(), torch.from_numpy(of_residual.cluster_centers_), atol=1e-4, rtol=1e-4)

    labels = assign_streams(rows, [(slice(None), first), (slice(None), second)], 2)
    left = rows.double().numpy()
    assert np.array_equal(labels[:, 0], reference.predict(left))
    left = left - reference.cluster_centers_[labels[:, 0]]
    assert (labels[:, 1].numpy() == of_residual.predict(left)).mean() > 0.99  # rounding may move frames at a border


def test_each_stage_lowers_the_error_as_much_as_kmeans_of_the_residual() -> None:
    rows = torch.randn(2000, 6, generator=torch.Generator().manual_seed(1))
    streams = [(slice(None), 16)] * 3
    centroids = fit_streams(rows.clone(), streams, 3, lambda clusters, left: KMeans().fit(left, clusters, 0), CPU)
    labels = assign_streams(rows, [(slice(None), means) for means in centroids], 3)
    errors: list[float] = []
    left = rows
    for stage, means in enumerate(centroids):
        reference = FullKMeans(16, n_init=5, random_state=0).fit(left.numpy()).inertia_
        left = left - means[labels[:, stage]]
        errors.append(float(left.square().sum()))
        assert errors[-1] < 1.03 * reference
    assert errors[0] > errors[1] > errors[2]


def test_streams_side_by_side_each_have_residuals_of_their_own_columns() -> None:
    rows = torch.randn(900, 10, generator=torch.Generator().manual_seed(2))
    left, right = slice(0, 4), slice(4, 10)

    def fit(clusters: int, sample: torch.Tensor) -> torch.Tensor:
        return KMeans().fit(sample, clusters, 0)

    streams = [(left, 7), (left, 7), (left, 5), (left, 5), (right, 6), (right, 6)]
    together = fit_streams(rows.clone(), streams, 2, fit, CPU)
    for number in range(0, 6, 2):
        columns, clusters = streams[number]
        alone = fit_streams(rows[:, columns].clone(), [(slice(None), clusters)] * 2, 2, fit, CPU)
        for own, other in zip(together[number : number + 2], alone, strict=True):
            assert torch.equal(own, other)


def test_without_residual_streams_are_plain_kmeans_and_rows_stay_as_they_are() -> None:
    rows = torch.randn(300, 3, generator=torch.Generator().manual_seed(3))
    kept = rows.clone()
    [centroids] = fit_streams(rows, [(slice(None), 9)], 1, lambda clusters, left: KMeans().fit(left, clusters, 0), CPU)
    assert torch.equal(rows, kept)
    assert torch.equal(centroids, KMeans().fit(rows, 9, 0))
