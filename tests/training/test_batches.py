from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from helpers import write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import CutSet, Recording, SupervisionSegment

from hubert_lightning.frames import HOP, SAMPLE_RATE, num_frames, num_samples
from hubert_lightning.training.batches import PretrainingBatches, TranscribedBatches
from hubert_lightning.training.sampler import BatchPlan, PlannedBatches, bucket_of, shortest_of_bucket
from hubert_lightning.units.label_shards import LabelSource
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.vocabulary import LETTERS, Vocabulary

lengths = st.lists(st.integers(1, 800), min_size=1, max_size=200)


@given(
    frames=lengths,
    max_frames=st.integers(800, 5000),
    world_size=st.integers(1, 5),
    epoch=st.integers(0, 3),
    block_cuts=st.sampled_from([7, 50, 1000]),
)
def test_every_cut_is_seen_once_per_epoch_whatever_the_number_of_ranks(
    frames: list[int], max_frames: int, world_size: int, epoch: int, block_cuts: int
) -> None:
    options = {"world_size": world_size, "block_cuts": block_cuts}
    ranks = [PlannedBatches(frames, max_frames, rank=rank, **options) for rank in range(world_size)]
    plans = [rank.plan(epoch) for rank in ranks]
    assert len({len(plan) for plan in plans}) == 1
    assert len(plans[0]) == len(ranks[0])
    dealt = [batch.cuts for step in zip(*plans, strict=True) for batch in step]  # in the order they are trained on
    seen = Counter(cut for cuts in dict.fromkeys(dealt) for cut in cuts)
    assert seen == Counter(range(len(frames)))
    assert len(dealt) - len(set(dealt)) < world_size  # only the last step may repeat a batch


@given(
    frames=lengths,
    max_frames=st.integers(800, 5000),
    shape=st.sampled_from([(1, 6), (2, 3), (3, 2), (6, 1)]),
    block_cuts=st.sampled_from([7, 1000]),
)
def test_a_step_has_the_same_batches_however_ranks_and_accumulation_share_them(
    frames: list[int], max_frames: int, shape: tuple[int, int], block_cuts: int
) -> None:
    def steps(world_size: int, accumulate: int) -> list[list[BatchPlan]]:
        options = {"world_size": world_size, "accumulate": accumulate, "block_cuts": block_cuts}
        ranks = [PlannedBatches(frames, max_frames, rank=rank, **options).plan(1) for rank in range(world_size)]
        assert all(len(plans) == len(ranks[0]) and len(plans) % accumulate == 0 for plans in ranks)
        starts = range(0, len(ranks[0]), accumulate)
        return [sorted(batch for plans in ranks for batch in plans[start : start + accumulate]) for start in starts]

    alone = steps(1, 6)
    assert steps(*shape) == alone
    assert all(len({batch.step_seed for batch in step}) == 1 for step in alone)


@given(
    sizes=st.lists(st.integers(30, 300), min_size=2, max_size=3),
    weights=st.lists(st.floats(0.2, 3), min_size=3, max_size=3),
    block_cuts=st.sampled_from([90, 1000]),
)
def test_corpora_are_mixed_by_their_weights(sizes: list[int], weights: list[float], block_cuts: int) -> None:
    frames = np.random.default_rng(0).integers(100, 780, size=sum(sizes))
    weights = weights[: len(sizes)]
    batches = PlannedBatches(frames, 4000, corpora=sizes, weights=weights, block_cuts=block_cuts)
    corpus = np.repeat(np.arange(len(sizes)), sizes)
    for epoch in range(2):
        plans = batches.plan(epoch)
        assert len(plans) == len(batches)
        seen = np.array([cut for plan in plans for cut in plan.cuts])
        shares = np.bincount(corpus[seen], frames[seen], len(sizes)) / frames[seen].sum()
        np.testing.assert_allclose(shares, np.array(weights) / sum(weights), atol=0.04)
        assert frames[seen].sum() == pytest.approx(frames.sum(), rel=0.05)


def test_a_corpus_of_fewer_cuts_than_blocks_is_mixed_too() -> None:
    batches = PlannedBatches([100] * 305, 1000, corpora=[300, 5], weights=[1, 1], block_cuts=10)
    seen = Counter(cut for plan in batches.plan(0) for cut in plan.cuts)
    assert len(batches.plan(0)) == len(batches)
    assert set(range(300, 305)) <= set(seen)


def test_validation_gives_sharded_ranks_the_same_number_of_batches() -> None:
    ranks = [PlannedBatches([100] * 5, 100, shuffle=False, even=True, rank=k, world_size=2) for k in range(2)]
    assert [len(list(rank)) for rank in ranks] == [len(rank) for rank in ranks] == [3, 3]


def test_a_large_corpus_gives_each_epoch_other_cuts_and_a_small_one_repeats_its_cuts() -> None:
    batches = PlannedBatches([100] * 500, 1000, corpora=[400, 100], weights=[1, 1])
    first, second = (Counter(cut for plan in batches.plan(epoch) for cut in plan.cuts) for epoch in (0, 1))
    assert sum(count for cut, count in first.items() if cut < 400) == 250
    assert {cut for cut in first if cut < 400} != {cut for cut in second if cut < 400}
    assert {count for cut, count in first.items() if cut >= 400} == {2, 3}
    assert set(range(400, 500)) <= set(first)


@given(frames=lengths, max_frames=st.integers(800, 5000), world_size=st.integers(1, 5))
def test_validation_counts_every_cut_once_if_there_are_batches_for_all_ranks(
    frames: list[int], max_frames: int, world_size: int
) -> None:
    ranks = [
        PlannedBatches(frames, max_frames, shuffle=False, rank=k, world_size=world_size) for k in range(world_size)
    ]
    assert all(len(rank) == len(list(rank)) > 0 for rank in ranks)
    seen = [cut for rank in ranks for plan in rank for cut in plan.cuts]
    assert set(seen) == set(range(len(frames)))
    if len(PlannedBatches(frames, max_frames)) >= world_size:
        assert len(seen) == len(frames)


@given(frames=lengths, max_frames=st.integers(800, 5000))
def test_a_batch_fits_its_limit_with_padding(frames: list[int], max_frames: int) -> None:
    for batch in PlannedBatches(frames, max_frames).plan(0):
        assert len(batch.cuts) * max(frames[cut] for cut in batch.cuts) <= max_frames or len(batch.cuts) == 1


@given(frames=st.integers(1, 100_000))
def test_a_bucket_is_at_most_four_percent_wide(frames: int) -> None:
    shortest = shortest_of_bucket(int(bucket_of(np.array(frames))))
    assert shortest <= frames < max(1.04 * shortest + 1, shortest + 1)
    assert bucket_of(np.array(shortest)) <= bucket_of(np.array(frames))


def test_epochs_and_seeds_redraw_the_batches() -> None:
    frames = np.random.default_rng(0).integers(100, 780, size=500).tolist()
    batches = PlannedBatches(frames, 4000)
    assert batches.plan(0) == PlannedBatches(frames, 4000).plan(0)
    assert {plan.cuts for plan in batches.plan(0)}.isdisjoint({plan.cuts for plan in batches.plan(1)})
    assert batches.plan(0) != PlannedBatches(frames, 4000, seed=1).plan(0)


def test_batches_waste_less_than_five_percent() -> None:
    frames = np.random.default_rng(0).integers(100, 780, size=5000)
    plans = PlannedBatches(frames.tolist(), 4375).plan(0)
    cropped = sum(len(plan.cuts) * min(frames[list(plan.cuts)]) for plan in plans)
    assert cropped > 0.95 * frames.sum()


def rows_of(frames: np.ndarray, plan: BatchPlan, max_frames: int, crop: int) -> tuple[int, int]:
    """Rows and frames of the batch that `PretrainingBatches` makes of a plan."""
    shortest = min(frames[list(plan.cuts)])
    size = crop if shortest >= crop else shortest_of_bucket(int(bucket_of(np.array(shortest))))
    return len(plan.cuts), size if len(plan.cuts) == 1 else min(size, max_frames // len(plan.cuts))


@given(
    frames=st.lists(st.integers(50, 900), min_size=1, max_size=200),
    max_frames=st.integers(900, 5000),
    epoch=st.integers(0, 2),
)
def test_filled_batches_have_every_cut_once_and_keep_their_limit(
    frames: list[int], max_frames: int, epoch: int
) -> None:
    cropped = np.minimum(frames, 780)
    plans = PlannedBatches(cropped, max_frames, crop=780).plan(epoch)
    assert sorted(cut for plan in plans for cut in plan.cuts) == [*range(len(frames))]
    for plan in plans:
        rows, size = rows_of(cropped, plan, max_frames, 780)
        assert rows * size <= max_frames
        assert size <= cropped[list(plan.cuts)].min()


@pytest.mark.parametrize(("seconds", "full", "before"), [(87.5, 0.95, 0.90), (350.0, 0.99, 0.96)])
def test_batches_are_filled_where_rows_are_cropped(seconds: float, full: float, before: float) -> None:
    """Lengths like those of LibriSpeech: most around 14.4 s, the others shorter; rows of at most 15.625 s."""
    rng, crop, max_frames = np.random.default_rng(0), num_frames(250_000), num_frames(int(16_000 * seconds))
    lengths = np.where(rng.random(30_000) < 0.72, rng.normal(14.4, 1.3, 30_000), rng.uniform(2, 13, 30_000))
    frames = np.minimum(num_frames((lengths.clip(2, 17.5) * 16_000).astype(int)), crop)
    shapes = {}
    for way in (None, crop):
        plans = PlannedBatches(frames, max_frames, crop=way).plan(0)
        shapes[way] = Counter(rows_of(frames, plan, max_frames, crop) for plan in plans)
    used = {way: sum(rows * size * count for (rows, size), count in counted.items()) for way, counted in shapes.items()}
    assert used[crop] / shapes[crop].total() > full * max_frames
    assert used[None] / shapes[None].total() < before * max_frames
    assert 1 - used[crop] / frames.sum() < 0.025  # cropped away
    assert len(shapes[crop]) < 60  # kernels are chosen, or compiled, for each


def test_a_resumed_sampler_continues_with_the_very_next_batch() -> None:
    frames = [100] * 60
    whole = PlannedBatches(frames, 500)
    stream = [plan for epoch in range(3) for plan in whole.plan(epoch)]
    resumed = PlannedBatches(frames, 500, position=lambda: 17)
    assert list(resumed) == stream[17 : 2 * len(whole)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("done", range(12))
def test_a_sampler_resumes_in_the_middle_of_any_block(rank: int, done: int) -> None:
    frames = np.random.default_rng(0).integers(100, 780, size=300)
    options = {"block_cuts": 60, "rank": rank, "world_size": 2, "accumulate": 3}
    whole = PlannedBatches(frames, 4000, **options).plan(0)
    assert list(PlannedBatches(frames, 4000, position=lambda: done, **options)) == whole[done:]


def test_validation_keeps_one_order_and_one_seed_per_batch() -> None:
    frames = [50, 700, 60, 300, 310]
    batches = PlannedBatches(frames, 700, position=lambda: 99, shuffle=False)
    assert list(batches) == list(batches)
    assert [cut for plan in batches for cut in plan.cuts] == [0, 2, 3, 4, 1]


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> tuple[CutSet, LabelStore]:
    """Three recordings whose every sample tells where it lies, and labels that tell their frame."""
    tmp_path = tmp_path_factory.mktemp("ramps")
    cuts, labels = [], {}
    for number, seconds in enumerate([3.0, 3.3, 4.0]):
        samples = round(seconds * SAMPLE_RATE)
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, (np.arange(samples) / 2**17).astype(np.float32), SAMPLE_RATE, subtype="FLOAT")
        cut = Recording.from_file(path, recording_id=str(number)).to_cut()
        cut.supervisions = [
            SupervisionSegment(str(number), str(number), 0.0, cut.duration, text=f"it is  {'x' * number}")
        ]
        cuts.append(cut)
        labels[cut.id] = np.arange(num_frames(samples))[None]
    source = LabelSource("mfcc", "k", "m", clusters=(1000,))
    return CutSet.from_cuts(cuts), write_store(tmp_path / "labels", source, labels)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**62))
def test_label_k_belongs_to_frame_k(ramps: tuple[CutSet, LabelStore], seed: int) -> None:
    cuts, labels = ramps
    batches = PretrainingBatches(cuts, labels, max_crop_frames=120, mask_prob=0.8, mask_length=10)
    batch = batches[BatchPlan((0, 1, 2), seed)]
    assert batch.waveform.shape == (3, num_samples(120))
    first_sample = (batch.waveform[:, ::HOP][:, :120] * 2**17).round().long()
    torch.testing.assert_close(first_sample, batch.cluster[:, 0] * HOP)


def test_a_batch_is_cropped_to_the_bucket_of_its_shortest_utterance(ramps: tuple[CutSet, LabelStore]) -> None:
    cuts, labels = ramps
    batch = PretrainingBatches(cuts, labels, max_crop_frames=780, mask_prob=0.8, mask_length=10)[BatchPlan((0, 2), 0)]
    shortest = num_frames(3 * SAMPLE_RATE)
    assert batch.cluster.shape == (2, 1, shortest_of_bucket(int(bucket_of(np.array(shortest)))))
    assert 0.96 * shortest < batch.cluster.shape[2] <= shortest
    counts = batch.mask.sum(dim=1)
    assert counts[0] == counts[1] > 0


def test_a_batch_depends_on_its_plan_alone(ramps: tuple[CutSet, LabelStore]) -> None:
    cuts, labels = ramps
    batches = PretrainingBatches(cuts, labels, max_crop_frames=100, mask_prob=0.8, mask_length=10)
    first, again = batches[BatchPlan((0, 1), 5)], batches[BatchPlan((0, 1), 5)]
    other = batches[BatchPlan((0, 1), 6)]
    assert first[3:] == again[3:]
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert not torch.equal(first.waveform, other.waveform)
    assert not torch.equal(first.mask, other.mask)


def test_transcribed_batches_are_padded_and_tokenized(ramps: tuple[CutSet, LabelStore]) -> None:
    cuts, _ = ramps
    vocabulary = Vocabulary(LETTERS)
    batch = TranscribedBatches(cuts, vocabulary)[BatchPlan((2, 0), 0)]
    assert batch.length.tolist() == [4 * SAMPLE_RATE, 3 * SAMPLE_RATE]
    assert batch.waveform.shape == (2, 4 * SAMPLE_RATE)
    assert batch.waveform[1, 3 * SAMPLE_RATE :].abs().max() == 0
    assert batch.text == ("IT IS XX", "IT IS")
    assert batch.id == (cuts[2].id, cuts[0].id)
    for row, text in enumerate(batch.text):  # each ended by a word boundary, which decodes to a space
        assert vocabulary.decode(batch.token[row, : batch.num_tokens[row]].tolist()) == f"{text} "
    assert batch.mask is None
    assert batch.channel_mask is None


def test_fine_tuning_masks_hide_valid_frames_and_channels(ramps: tuple[CutSet, LabelStore]) -> None:
    cuts, _ = ramps
    batches = TranscribedBatches(
        cuts,
        Vocabulary(LETTERS),
        training=True,
        channels=128,
        mask_prob=0.65,
        channel_mask_prob=0.5,
        channel_mask_length=16,
    )
    batch = batches[BatchPlan((0, 2), 3)]
    assert batch.mask is not None
    assert batch.channel_mask is not None
    assert batch.mask.shape == (2, num_frames(batch.waveform.shape[1]))
    assert num_frames(4 * SAMPLE_RATE) < batch.mask.shape[1] <= 1.04 * num_frames(4 * SAMPLE_RATE) + 1
    assert not batch.mask[:, num_frames(4 * SAMPLE_RATE) :].any()
    assert not batch.mask[0, num_frames(3 * SAMPLE_RATE) :].any()
    assert batch.mask.any(dim=1).all()
    assert batch.channel_mask.shape == (2, 128)
    assert batch.channel_mask.any()
