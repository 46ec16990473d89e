"""How many shapes of batches an epoch has: cuDNN plans, and torch compiles, something for each."""

import numpy as np
import pytest

from hubert_lightning.frames import num_frames, seconds_to_samples
from hubert_lightning.training.sampler import PlannedBatches, bucket_of, padded_frames


def frames_of_librispeech(rng: np.random.Generator, cuts: int = 28_000) -> np.ndarray:
    """Lengths like those of 100 hours: most utterances last 12 to 16 s, 12.7 s in the mean."""
    long = rng.random(cuts) < 0.7
    seconds = np.where(long, rng.normal(14.4, 1.1, cuts), rng.uniform(1.5, 13, cuts)).clip(1.4, 24.5)
    return np.array([num_frames(seconds_to_samples(duration)) for duration in seconds.tolist()])


@pytest.mark.parametrize("duration", [87.5, 350.0])
def test_epochs_of_pretraining_share_few_shapes(duration: float) -> None:
    longest = num_frames(seconds_to_samples(15.625))
    frames = frames_of_librispeech(np.random.default_rng(0)).clip(max=longest)
    sampler = PlannedBatches(frames, num_frames(seconds_to_samples(duration)))
    # All rows are cropped to the bucket of the shortest
    shapes = [{(len(p.cuts), int(bucket_of(frames[[*p.cuts]].min()))) for p in sampler.plan(epoch)} for epoch in (0, 1)]
    assert len(shapes[0]) <= 120
    assert len(shapes[1] - shapes[0]) <= 12


def test_epochs_of_finetuning_share_few_shapes() -> None:
    frames = frames_of_librispeech(np.random.default_rng(0), 3000)
    padded = np.array([padded_frames(count) for count in frames.tolist()])
    sampler = PlannedBatches(padded, num_frames(seconds_to_samples(200.0)))
    shapes = [{(len(p.cuts), int(padded[[*p.cuts]].max())) for p in sampler.plan(epoch)} for epoch in (0, 1)]
    assert len(shapes[0]) <= 120
    assert len(shapes[1] - shapes[0]) <= 12
