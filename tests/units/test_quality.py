import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from hubert_lightning.units.quality import (
    Quality,
    cluster_purity,
    dead_clusters,
    frame_phones,
    joint_counts,
    perplexity,
    phone_purity,
    pnmi,
)

frames = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 5)), min_size=1, max_size=200)


@pytest.mark.parametrize("seed", range(3))
def test_pnmi_and_perplexity_are_those_of_scikit_learn_and_scipy(seed):
    rng = np.random.default_rng(seed)
    phones = rng.integers(40, size=5000)
    clusters = (phones * 2 + rng.integers(60, size=5000)) % 100
    counts = joint_counts(phones, clusters, 100)
    expected = mutual_info_score(phones, clusters) / entropy(np.bincount(phones))
    assert pnmi(counts) == pytest.approx(expected)
    assert float(perplexity(counts.sum(axis=0))) == pytest.approx(np.exp(entropy(np.bincount(clusters))))


def test_measures_of_a_case_worked_by_hand():
    counts = np.array([[3, 1, 0], [0, 2, 0]])
    # I = H(phone) + H(cluster) - H(phone, cluster), all in sixths
    phone, cluster, both = entropy([4, 2]), entropy([3, 3]), entropy([3, 1, 2])
    expected = Quality((phone + cluster - both) / phone, (3 + 2) / 6, (3 + 2) / 6, 2.0, 1)
    assert Quality.of(counts) == pytest.approx(expected)


def test_phone_purity_looks_for_the_phone_of_each_cluster_and_cluster_purity_the_other_way_round():
    counts = np.array([[2, 2, 2], [1, 0, 1]])
    assert phone_purity(counts) == pytest.approx((2 + 2 + 2) / 8)
    assert cluster_purity(counts) == pytest.approx((2 + 1) / 8)


def test_purities_are_expectations_over_clusters_and_over_phones():
    counts = np.random.default_rng(0).integers(1, 50, size=(7, 11))
    joint = counts / counts.sum()
    per_cluster = (joint / joint.sum(axis=0)).max(axis=0)  # max over phones of p(phone | cluster)
    per_phone = (joint / joint.sum(axis=1, keepdims=True)).max(axis=1)
    assert phone_purity(counts) == pytest.approx((joint.sum(axis=0) * per_cluster).sum())
    assert cluster_purity(counts) == pytest.approx((joint.sum(axis=1) * per_phone).sum())


def test_a_cluster_for_every_phone_is_perfect_and_one_cluster_for_all_says_nothing():
    phones = list("aabbbc")
    perfect = Quality.of(joint_counts(phones, [2, 2, 0, 0, 0, 1], 4))
    assert perfect == pytest.approx((1.0, 1.0, 1.0, np.exp(entropy([2, 3, 1])), 1))
    useless = Quality.of(joint_counts(phones, [1] * 6, 4))
    assert useless == pytest.approx((0.0, 0.5, 1.0, 1.0, 3))


@given(frames)
def test_counts_are_scikit_learn_s_contingencies_with_the_dead_clusters_left_in(pairs):
    phones, clusters = zip(*pairs, strict=True)
    counts = joint_counts(phones, clusters, 6)
    alive = counts.sum(axis=0) > 0
    assert np.array_equal(counts[:, alive], contingency_matrix(phones, clusters))
    assert dead_clusters(counts) == 6 - len(set(clusters))


@given(frames)
def test_every_share_lies_between_0_and_1(pairs):
    quality = Quality.of(joint_counts(*zip(*pairs, strict=True), 6))  # type: ignore[call-arg]
    assert 0 < quality.phone_purity <= 1
    assert 0 < quality.cluster_purity <= 1
    assert math.isnan(quality.pnmi) or -1e-9 < quality.pnmi < 1 + 1e-9


def test_nothing_counted_and_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no frame has both"):
        Quality.of(joint_counts([], [], 4))
    with pytest.raises(ValueError, match="2 frames have a phone and 3 a cluster"):
        joint_counts(["a", "b"], [0, 1, 2], 4)
    with pytest.raises(ValueError, match="clusters range from 0 to 4, but there are 4"):
        joint_counts(["a", "b"], [0, 4], 4)


def test_a_frame_has_the_phone_at_its_centre():
    # centres: 12.5, 32.5, 52.5, 72.5, 92.5 ms
    alignment = [(0.0, 0.03, "h"), (0.03, 0.0, "x"), (0.03, 0.04, "i"), (0.09, 0.01, "z")]
    assert frame_phones(alignment, 5) == ["h", "i", "i", "", "z"]
    assert frame_phones(alignment[::-1], 6) == ["h", "i", "i", "", "z", ""]
    assert frame_phones([(0.0, 0.0125, "a"), (0.0125, 0.02, "b"), (0.0325, 0.01, "c")], 2) == ["b", "c"]
    assert frame_phones([], 2) == ["", ""]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_phones_on_a_10_ms_grid_without_gaps_leave_no_frame_empty(hundredths):
    ends = np.cumsum(hundredths)
    alignment = [((end - size) / 100, size / 100, str(end)) for end, size in zip(ends, hundredths, strict=True)]
    covered = int(ends[-1]) // 2  # centres lie 2.5 ms after every odd number of hundredths
    phones = frame_phones(alignment, covered + 3)
    assert "" not in phones[:covered]
    assert set(phones[covered:]) == {""}
