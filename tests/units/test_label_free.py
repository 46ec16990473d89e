import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.cluster import KMeans as Reference
from sklearn.metrics import adjusted_mutual_info_score, mutual_info_score, normalized_mutual_info_score
from torch.testing import assert_close

from hubert_lightning.units.label_free import (
    agreement,
    beyond_chance,
    content,
    counts_of,
    effective_rank,
    explained,
    information,
    runs_of,
    spread,
)

LABELS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=150)


@given(LABELS)
def test_information_and_agreement_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    first, second = np.array(pairs).T
    assert information(counts_of(first, second)) == pytest.approx(mutual_info_score(first, second), abs=1e-9)
    assert agreement(first, second) == pytest.approx(normalized_mutual_info_score(first, second), abs=1e-9)


def test_information_beyond_chance_has_the_expectation_of_the_adjusted_score_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    speaker = rng.integers(30, size=3000)
    cluster = np.where(rng.random(3000) < 0.2, speaker, rng.integers(60, size=3000))
    entropies = [entropy(np.bincount(labels)) for labels in (speaker, cluster)]
    # AMI = (I - E) / (mean entropy - E) with the exact expected value E
    adjusted, found = adjusted_mutual_info_score(speaker, cluster), mutual_info_score(speaker, cluster)
    mean = float(np.mean(entropies))
    expected = (found - adjusted * mean) / (1 - adjusted)
    draws = [found - beyond_chance(speaker, cluster, seed) for seed in range(5)]
    assert np.mean(draws) == pytest.approx(expected, rel=0.05)  # a draw differs by 2 %
    assert expected > 0.1  # so many cells are far from 0 by chance
    assert explained(speaker, cluster) == pytest.approx((found - expected) / entropies[0], abs=0.02)


def test_independent_labels_explain_nothing_and_equal_ones_nearly_everything() -> None:
    rng = np.random.default_rng(1)
    speaker = rng.integers(10, size=2000)
    assert abs(explained(speaker, rng.integers(50, size=2000))) < 0.02
    assert 0.95 < explained(speaker, speaker) <= 1
    assert math.isnan(explained(np.zeros(9), np.arange(9)))


def test_effective_rank_is_that_of_the_singular_values() -> None:
    torch.manual_seed(0)
    rows = torch.randn(500, 6) @ torch.randn(6, 20) + 3
    singular = torch.linalg.svdvals((rows - rows.mean(dim=0)).double())
    share = singular / singular.sum()
    expected = torch.special.entr(share).sum().exp()
    assert_close(effective_rank(rows), float(expected), rtol=1e-4, atol=0)
    assert effective_rank(rows) < 6
    assert effective_rank(torch.eye(8).repeat(3, 1)) == pytest.approx(7)  # less the mean
    assert effective_rank(torch.ones(5, 3)) == 0


def test_spread_is_the_inertia_of_scikit_learn_over_the_variance() -> None:
    rows = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    kmeans = Reference(5, n_init=1, random_state=0).fit(rows)
    centroids = torch.from_numpy(kmeans.cluster_centers_)
    share = spread(torch.from_numpy(rows), centroids, torch.from_numpy(kmeans.labels_.astype(np.int64)))
    assert share == pytest.approx(kmeans.inertia_ / (300 * rows.var(axis=0).sum()), rel=1e-4)


def test_runs_and_bit_rate_of_a_case_worked_by_hand() -> None:
    units = np.array([1, 1, 2, 2, 2, 1, 1, 3])
    stretch = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    runs = runs_of(units, stretch)  # 11, 222, 1 | 1, 3: five runs of which three are of unit 1
    assert runs.length == pytest.approx(8 / 5)
    assert runs.per_second == pytest.approx(50 * 5 / 8)
    assert runs.bit_rate == pytest.approx(50 * 5 / 8 * entropy([3, 1, 1], base=2))


def test_content_is_high_for_units_of_sounds_and_low_for_units_of_speakers_or_none() -> None:
    rng = np.random.default_rng(0)
    stretch = np.repeat(np.arange(40), 100)
    sound = np.repeat(rng.integers(20, size=1000), 4)  # each lasts 4 frames
    speaker = stretch % 8
    assert content(sound, stretch) > 0.8
    assert content(speaker, stretch) < 0.1  # predicts itself, but that is the stretch
    assert abs(content(rng.integers(20, size=4000), stretch)) < 0.2
    assert content(sound, stretch) > content(np.where(rng.random(4000) < 0.5, sound, speaker), stretch)
