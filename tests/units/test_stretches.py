import numpy as np
import pytest
import torch
from lhotse import CutSet

from hubert_lightning.data.alignments import phones_of
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.examine import cut_in_memory
from hubert_lightning.features.extractors import mfcc_extractor
from hubert_lightning.features.sample import chosen_features
from hubert_lightning.frames import num_frames
from hubert_lightning.units import stretches
from hubert_lightning.units.quality import frame_phones
from hubert_lightning.units.stretches import draw_speech


def test_all_frames_are_drawn_if_they_fit_and_no_speaker_is_in_both_halves(train_cuts: CutSet) -> None:
    sample = draw_speech(list(train_cuts), [5], 10**6, 0)
    assert len(sample.fit) == sum(num_frames(cut.num_samples) for cut in train_cuts)
    assert sample.num_speakers == 3
    assert sample.split == "speakers"
    assert not set(sample.speaker[sample.fit]) & set(sample.speaker[~sample.fit])
    phones = {cut.id: frame_phones(phones_of(cut), num_frames(cut.num_samples)) for cut in train_cuts}
    assert sample.phone.tolist() == [phone for cut in sample.cuts for phone in phones[cut.id]]


@pytest.mark.parametrize("max_frames", [300, 1234])
def test_a_sample_has_as_many_frames_as_allowed_in_stretches_of_consecutive_frames(
    train_cuts: CutSet, max_frames: int
) -> None:
    sample = draw_speech(list(train_cuts), [5], max_frames, 3)
    assert len(sample.fit) == max_frames == sum(map(len, sample.frames))
    assert len(sample.phone) == len(sample.speaker) == len(sample.stretch) == max_frames
    places = np.concatenate([frames + 10**6 * number for number, frames in enumerate(sample.frames)])
    same = sample.stretch[1:] == sample.stretch[:-1]
    assert (np.diff(places)[same] == 1).all()


def test_only_the_drawn_stretches_of_a_long_recording_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    noise = cut_in_memory("long", torch.randn(16_000 * 30) * 0.1)
    whole = chosen_features(mfcc_extractor(), [noise], [np.arange(num_frames(noise.num_samples))], 5000)
    monkeypatch.setattr(stretches, "WHOLE_FRAMES", 600)
    sample = draw_speech([noise], [5], 900, 0)
    assert sample.split == "stretches"
    assert sample.num_speakers == 0
    assert all(cut.duration < 11 for cut in sample.cuts)
    rows = chosen_features(mfcc_extractor(), sample.cuts, sample.frames, 5000)
    starts = [int(cut.id.removeprefix("long-")) for cut in sample.cuts]
    expected = [whole[start : start + len(frames)] for start, frames in zip(starts, sample.frames, strict=True)]
    middle = [slice(8, -8)] * len(starts)  # differences over time see the edges
    place = 0
    for part, inner in zip(expected, middle, strict=True):
        torch.testing.assert_close(rows[place : place + len(part)][inner], part[inner], rtol=1e-3, atol=1e-2)
        place += len(part)
    assert read_waveform(sample.cuts[0]).shape[0] == sample.cuts[0].num_samples
