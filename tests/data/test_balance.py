"""Shares of languages and corpora follow the formula of mHuBERT-147, and a sample of frames has them."""

from collections import Counter, defaultdict
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource

from hubert_lightning.data.balance import Balance, amounts, names_fingerprint
from hubert_lightning.data.corpora import Corpora
from hubert_lightning.data.manifest import write_manifest
from hubert_lightning.errors import UserError
from hubert_lightning.features.sample import choose_frames
from hubert_lightning.frames import SAMPLE_RATE, num_frames


def cut_of(name: str, seconds: float, language: str | None, corpus: str | None) -> MonoCut:
    samples = round(seconds * SAMPLE_RATE)
    source = AudioSource("file", [0], f"{name}.wav")
    recording = Recording(name, [source], SAMPLE_RATE, samples, samples / SAMPLE_RATE)
    spoken = SupervisionSegment(name, name, 0.0, recording.duration, language=language)
    return MonoCut(
        name, 0.0, recording.duration, 0, [spoken] if language else [], recording=recording,
        custom={"corpus": corpus} if corpus else None,
    )  # fmt: skip


def corpora_of(counts: dict[tuple[str, str], int], seconds: float = 4.0) -> Corpora:
    """Cuts of each language and corpus, dealt to two manifests."""
    cuts = [
        cut_of(f"{language}-{corpus}-{number:04d}", seconds * (1 + number % 3 / 2), language, corpus)
        for (language, corpus), count in counts.items()
        for number in range(count)
    ]
    return Corpora([cuts[::2], cuts[1::2]], ["first", "second"])


COUNTS = {("de", "cv"): 30, ("de", "mls"): 90, ("en", "cv"): 240, ("sw", "cv"): 6, ("sw", "alffa"): 14}

counts = st.dictionaries(
    st.tuples(st.sampled_from(["de", "en", "sw"]), st.sampled_from(["cv", "mls"])), st.integers(1, 30), min_size=1
)
exponents = st.floats(0, 1)


@given(counts=counts, alpha=exponents, beta=exponents)
def test_shares_are_those_of_the_formula_computed_term_by_term(
    counts: dict[tuple[str, str], int], alpha: float, beta: float
) -> None:
    cuts = corpora_of(counts)
    frames = num_frames(cuts.num_samples)
    seconds: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for cut, size in zip(cuts, frames.tolist(), strict=True):
        seconds[cut.supervisions[0].language][cut.custom["corpus"]] += size
    total = sum(sum(corpora.values()) for corpora in seconds.values())
    of_language = {name: (sum(corpora.values()) / total) ** alpha for name, corpora in seconds.items()}
    expected = {}
    for name, corpora in seconds.items():
        of_corpus = {corpus: (size / sum(corpora.values())) ** beta for corpus, size in corpora.items()}
        for corpus, size in of_corpus.items():
            expected[name, corpus] = of_language[name] / sum(of_language.values()) * size / sum(of_corpus.values())
    balance = Balance(alpha, beta)
    groups = balance.groups(cuts)
    assert groups.names == sorted(expected)
    np.testing.assert_allclose(balance.shares(groups, frames), [expected[name] for name in groups.names], rtol=1e-12)


def test_an_exponent_of_1_gives_the_shares_of_the_audio_and_0_equal_shares() -> None:
    cuts = corpora_of(COUNTS)
    frames = num_frames(cuts.num_samples)
    for balance, expected in ((Balance(languages=1.0), None), (Balance(languages=0.0), [1 / 3] * 3)):
        groups = balance.groups(cuts)
        assert groups.names == [("de", ""), ("en", ""), ("sw", "")]
        natural = np.bincount(groups.number, frames) / frames.sum()
        np.testing.assert_allclose(balance.shares(groups, frames), natural if expected is None else expected)


def test_corpora_alone_are_balanced_across_languages_and_given_shares_are_taken() -> None:
    cuts = corpora_of(COUNTS)
    frames = num_frames(cuts.num_samples)
    balance = Balance(corpora={"alffa": 1, "cv": 2, "mls": 5})
    groups = balance.groups(cuts)
    assert groups.names == [("", "alffa"), ("", "cv"), ("", "mls")]
    np.testing.assert_allclose(balance.shares(groups, frames), [1 / 8, 2 / 8, 5 / 8])
    within = Balance(languages={"de": 1, "en": 1, "sw": 2}, corpora={"alffa": 1, "cv": 3, "mls": 1})
    np.testing.assert_allclose(
        within.shares(within.groups(cuts), frames), [0.25 * 3 / 4, 0.25 / 4, 0.25, 0.5 / 4, 0.5 * 3 / 4]
    )


def test_amounts_state_hours_and_shares_of_languages_and_of_corpora() -> None:
    cuts = corpora_of(COUNTS)
    frames = num_frames(cuts.num_samples)
    described = amounts(cuts, Balance(0.0), frames)
    assert {name: row["share"] for name, row in described["languages"].items()} == {
        "de": 0.3333,
        "en": 0.3333,
        "sw": 0.3333,
    }
    seconds = sum(cut.duration for cut in cuts if cut.supervisions[0].language == "en")
    assert described["languages"]["en"]["hours"] == round(seconds / 3600, 3)
    assert described["corpora"].keys() == {"alffa", "cv", "mls"}
    assert sum(row["share"] for row in described["corpora"].values()) == pytest.approx(1, abs=1e-3)
    assert amounts(corpora_of({("de", "cv"): 4}), Balance(), np.ones(4)) == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"languages": 1.5}, "balance_languages is 1.5; it is an exponent from 0"),
        ({"languages": -0.1}, "balance_languages is -0.1; it is an exponent"),
        ({"corpora": float("nan")}, "balance_corpora is nan; it is an exponent"),
        ({"languages": {"en": 0}}, "balance_languages is en: 0; give each name a share above 0"),
        ({"languages": {False: 1, "en": 2}}, "balance_languages names False, which is no text: YAML reads no"),
        ({"corpora": {2023: 1}}, "balance_corpora names 2023, which is no text"),
        ({"languages": {}}, "balance_languages is empty; give each name a share above 0"),
    ],
)
def test_a_value_out_of_range_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Balance(**options)  # type: ignore[arg-type]


def test_languages_without_recordings_or_shares_and_cuts_without_a_language_are_refused() -> None:
    cuts = corpora_of({("de", "cv"): 3, ("en", "cv"): 2})
    everything = np.ones(5, bool)
    balance = Balance({"de": 1, "en": 1, "fr": 2})
    with pytest.raises(
        UserError, match=r"balance_languages names fr, a language without a recording; .* de, en: correct"
    ):
        balance.check(balance.groups(cuts), everything, "")
    balance = Balance({"de": 1})
    with pytest.raises(UserError, match="balance_languages has no share for en, a language of the manifests"):
        balance.check(balance.groups(cuts), everything, "")
    balance = Balance(0.5)
    kept = np.array([cut.supervisions[0].language == "de" for cut in cuts])
    with pytest.raises(UserError, match="en: no utterance lasts 2 s"):
        balance.check(balance.groups(cuts), kept, "no utterance lasts 2 s")
    unknown = Corpora([[cut_of("a", 2, "de", None), cut_of("b", 2, None, None), cut_of("c", 2, None, None)]], ["x"])
    with pytest.raises(UserError, match=r"b: no language in the manifest \(and 1 other\), so languages cannot"):
        balance.groups(unknown)
    assert Balance(corpora=0.5).groups(unknown).names == [("", "x")]


def test_one_language_alone_changes_nothing_and_a_sentence_says_so() -> None:
    cuts = corpora_of({("de", "cv"): 3, ("de", "mls"): 2})
    balance = Balance(0.5, 0.5)
    [sentence] = balance.check(balance.groups(cuts), np.ones(5, bool), "")
    assert sentence == "balance_languages changes nothing: all utterances are of one language, de"


def sampled_shares(cuts: Corpora, balance: Balance, max_frames: int) -> tuple[dict[tuple[str, str], float], int]:
    chosen, kept = choose_frames(cuts, max_frames, 0, balance)
    size: Counter[tuple[str, str]] = Counter()
    for cut, frames in zip(chosen, kept, strict=True):
        size[cut.supervisions[0].language, cut.custom["corpus"]] += len(frames)
    return {name: count / size.total() for name, count in size.items()}, size.total()


@pytest.mark.parametrize("max_frames", [6_000, 10**9])
def test_the_sample_of_k_means_has_the_shares(max_frames: int) -> None:
    cuts, balance = corpora_of(COUNTS), Balance(0.3, 0.8)
    groups, frames = balance.groups(cuts), num_frames(cuts.num_samples)
    shares, total = sampled_shares(cuts, balance, max_frames)
    assert total == pytest.approx(min(max_frames, frames.sum()), rel=0.03)
    expected = dict(zip(groups.names, balance.shares(groups, frames), strict=True))
    for name, share in expected.items():
        assert shares[name] == pytest.approx(share, abs=0.02)


def test_a_balanced_sample_does_not_depend_on_the_order_of_the_manifests() -> None:
    cuts, balance = corpora_of(COUNTS), Balance(0.0)
    other = cuts.ordered([1, 0])
    for one, two in zip(choose_frames(cuts, 5_000, 3, balance), choose_frames(other, 5_000, 3, balance), strict=True):
        assert all(
            np.array_equal(a, b) if isinstance(a, np.ndarray) else a.id == b.id for a, b in zip(one, two, strict=True)
        )
    assert names_fingerprint(cuts) == names_fingerprint(other)
    assert balance.source(cuts) == balance.source(other) != Balance(0.1).source(cuts)
    assert Balance().source(cuts) == {}


def test_a_changed_language_changes_what_a_sample_depends_on(tmp_path: Path) -> None:
    first = corpora_of({("de", "cv"): 2, ("en", "cv"): 2})
    second = Corpora([[cut_of(cut.id, cut.duration, "en", "cv") for cut in part] for part in first.parts], first.names)
    assert Balance(0.5).source(first) != Balance(0.5).source(second)
    assert first.fingerprint == second.fingerprint
    write_manifest(CutSet(list(first)), tmp_path / "cuts.jsonl.gz")


@pytest.mark.parametrize("max_frames", [2_000, 10**9])
def test_without_balance_a_sample_has_no_frame_twice_and_is_drawn_from_all_alike(max_frames: int) -> None:
    cuts = corpora_of(COUNTS)
    listed = sorted(cuts, key=lambda cut: cut.id)
    frames = np.array([num_frames(cut.num_samples) for cut in listed])
    order = np.random.default_rng(7).permutation(len(listed))
    ends = np.cumsum(frames[order])
    order = order[: int(np.searchsorted(ends, 4 * max_frames)) + 1]
    share = max_frames / ends[len(order) - 1]
    chosen, kept = choose_frames(cuts, max_frames, 7)
    assert [cut.id for cut in chosen] == [listed[number].id for number in order]
    for cut, number, rows in zip(chosen, order, kept, strict=True):
        draws = np.random.default_rng([7, crc32(cut.id.encode())]).random(frames[number])
        np.testing.assert_array_equal(rows, np.flatnonzero(draws < share))
