from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import TINY
from hypothesis import given
from hypothesis import strategies as st
from lhotse import CutSet, Recording
from lhotse.cut import Cut
from torch import Tensor

import hubert_lightning.features.windows as windowing
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.features.extract import extract
from hubert_lightning.features.extractors import Extractor, layer_extractor, mfcc_extractor
from hubert_lightning.features.mfcc import mfcc, spliced
from hubert_lightning.features.sample import chosen_features, sample_frames
from hubert_lightning.features.windows import OVERLAP_FRAMES, WINDOW_FRAMES, windows
from hubert_lightning.frames import HOP, SAMPLE_RATE, num_frames, num_samples
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.model.statistics import statistics_of
from hubert_lightning.pretrained.load import load_encoder


@given(frames=st.integers(1, 10 * WINDOW_FRAMES))
def test_windows_cover_every_frame_once_and_are_all_of_one_length(frames: int) -> None:
    found = windows(frames)
    size = min(frames, WINDOW_FRAMES)
    assert [(window.start, window.end) for window in found] == [*pairwise([0, *(window.end for window in found)])]
    assert found[-1].end == frames
    for number, (first, last, start, end) in enumerate(found):
        assert first >= 0
        assert first + size == last <= frames
        before, after = start - first, first + size - end
        assert before >= (OVERLAP_FRAMES // 2 if number else 0)
        assert after >= (OVERLAP_FRAMES // 2 if number < len(found) - 1 else 0)


def features_of(extractor: Extractor, cuts: list[Cut], max_frames: int = 500) -> list[Tensor]:
    rows = [torch.full((num_frames(cut.num_samples), *extractor.shape), torch.nan) for cut in cuts]
    for _, piece, features in extract(extractor, [cuts], max_frames, "test"):
        rows[piece.cut_index][piece.window.start : piece.window.end] = features
    return rows


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny encoder with group norm (as Base), and one with layer norm of the waveform too (as Large)."""
    folder = tmp_path_factory.mktemp("encoders")
    configs = {"base": TINY.__dict__, "large": TINY.__dict__ | {"conv_norm": "layer", "normalize_waveform": True}}
    for name, config in configs.items():
        state = HubertEncoder(EncoderConfig(**config)).state_dict()
        checkpoint = {"state_dict": {f"encoder.{key}": of for key, of in state.items()}}
        torch.save(checkpoint | {"hyper_parameters": {"encoder": config}}, folder / f"{name}.ckpt")
    return {name: folder / f"{name}.ckpt" for name in configs}


@pytest.mark.parametrize("size", ["base", "large"])
@torch.no_grad()
def test_features_of_a_cut_do_not_depend_on_its_batch(
    checkpoints: dict[str, Path], size: str, train_cuts: CutSet
) -> None:
    encoder = load_encoder(checkpoints[size])
    extractor = layer_extractor(checkpoints[size], 2, torch.device("cpu"))
    for cut, features in zip(train_cuts, features_of(extractor, list(train_cuts)), strict=True):
        torch.testing.assert_close(features, encoder.features(read_waveform(cut)[None], layer=2)[0], atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def long_cut(train_cuts: CutSet, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    """All training speech in one recording, whose last samples make no frame."""
    path = tmp_path_factory.mktemp("long") / "long.wav"
    audio = torch.cat([read_waveform(cut) for cut in train_cuts])
    soundfile.write(path, audio[: num_samples(num_frames(len(audio))) - 1].numpy(), SAMPLE_RATE, subtype="FLOAT")
    return Recording.from_file(path, recording_id="long").to_cut()


def test_mfcc_of_a_padded_batch_are_those_of_each_cut_alone(train_cuts: CutSet) -> None:
    cuts = list(train_cuts)[:6]
    for cut, features in zip(cuts, features_of(mfcc_extractor(in_parts=True), cuts, max_frames=10_000), strict=True):
        torch.testing.assert_close(features, spliced(mfcc(read_waveform(cut)))[::2])


@pytest.mark.parametrize("tail", [1, 399, 400, 401, 20_000])
def test_mfcc_of_a_long_recording_are_those_of_the_whole(
    long_cut: Cut, tail: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windowing, "WINDOW_FRAMES", 1000)
    monkeypatch.setattr(windowing, "OVERLAP_FRAMES", 100)
    cut = long_cut.truncate(duration=(num_samples(1900) + tail) / SAMPLE_RATE)
    whole = mfcc(read_waveform(cut))
    for in_parts, expected in ((False, whole), (True, spliced(whole))):
        [features] = features_of(mfcc_extractor(in_parts)._replace(window_frames=1000), [cut])
        torch.testing.assert_close(features, expected[::2])


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("tail", [0, 1, 399, 20_000])
@torch.no_grad()
def test_a_frame_of_a_long_recording_has_the_features_of_its_window(
    checkpoints: dict[str, Path], long_cut: Cut, size: str, tail: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windowing, "WINDOW_FRAMES", 1000)
    monkeypatch.setattr(windowing, "OVERLAP_FRAMES", 100)
    cut = long_cut.truncate(duration=(num_samples(2300) + tail) / SAMPLE_RATE)
    extractor = layer_extractor(checkpoints[size], 2, torch.device("cpu"))._replace(window_frames=1000)
    [features] = features_of(extractor, [cut])
    waveform, encoder = read_waveform(cut), load_encoder(checkpoints[size])
    frames = num_frames(len(waveform))
    for first, _, start, end in windows(frames):
        last = None if end == frames else first * HOP + num_samples(1000)
        expected = encoder.features(waveform[None, first * HOP : last], layer=2)[0]
        torch.testing.assert_close(features[start:end], expected[start - first : end - first], atol=2e-5, rtol=0)


def test_the_sample_is_uniform_and_of_the_size_asked_for(train_cuts: CutSet) -> None:
    total = sum(num_frames(cut.num_samples) for cut in train_cuts)
    sample, _ = sample_frames(mfcc_extractor(), list(train_cuts), total // 2, 0, batch_frames=500)
    assert abs(len(sample) - total // 2) < 4 * (total / 4) ** 0.5  # four standard deviations of a binomial
    everything, _ = sample_frames(mfcc_extractor(), list(train_cuts), 10 * total, 0, batch_frames=500)
    assert len(everything) == total


def test_frames_that_are_chosen_twice_take_the_places_of_others(train_cuts: CutSet) -> None:
    cuts = sorted(train_cuts, key=lambda cut: cut.num_samples)[:2]
    frames = [num_frames(cut.num_samples) for cut in cuts]
    padding = frames[1] - frames[0]
    # As many as the batch has with its padding: of the first cut one twice and one left out, and some more twice
    chosen = [np.sort(np.r_[0, 0, 2 : frames[0], : 2 * padding : 2]), np.r_[: frames[1]]]
    rows = chosen_features(mfcc_extractor(), cuts, [chosen[0], chosen[1][padding:]], batch_frames=10_000)
    first, second = features_of(mfcc_extractor(), cuts, max_frames=10_000)
    torch.testing.assert_close(rows, torch.cat([first[chosen[0]], second[padding:]]))
    rows = chosen_features(mfcc_extractor(), cuts[:1], [np.r_[0, 0, 2 : frames[0]]], batch_frames=10_000)
    torch.testing.assert_close(rows, first[np.r_[0, 0, 2 : frames[0]]])


def test_a_sample_that_no_memory_holds_is_refused(train_cuts: CutSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 20}.__getitem__)
    with pytest.raises(ValueError, match=r"a sample of \d+ frames takes .* lower max_frames"):
        sample_frames(mfcc_extractor(), list(train_cuts), 10**6, 0, batch_frames=500)


def test_ranks_of_one_machine_share_its_memory(train_cuts: CutSet, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sample_frames(mfcc_extractor(), list(train_cuts), 1000, 0, batch_frames=500)[0].nbytes
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2 * size}.__getitem__)
    sample_frames(mfcc_extractor(), list(train_cuts), 1000, 0, batch_frames=500)
    with pytest.raises(ValueError, match="lower max_frames"):
        sample_frames(mfcc_extractor(), list(train_cuts), 1000, 0, batch_frames=500, local_ranks=2)


def test_the_sample_is_the_same_for_any_number_of_ranks_and_any_order(train_cuts: CutSet) -> None:
    def sample(cuts: list[Cut], world_size: int, batch_frames: int) -> Tensor:
        parts = [
            sample_frames(mfcc_extractor(), cuts, 1000, 0, batch_frames=batch_frames, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        rows, index = (torch.cat(part) for part in zip(*parts, strict=True))
        np.testing.assert_array_equal(index.sort().values, np.arange(len(index)))
        return rows[index.argsort()]

    alone = sample(list(train_cuts), 1, 500)
    torch.testing.assert_close(sample(list(train_cuts)[::-1], 3, 2000), alone)


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("num_workers", [0, 1])
@torch.no_grad()
def test_windows_as_the_whole_are_normalised_by_what_the_whole_recording_has(
    checkpoints: dict[str, Path], long_cut: Cut, size: str, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windowing, "WINDOW_FRAMES", 1000)
    waveform, encoder = read_waveform(long_cut), load_encoder(checkpoints[size])
    extractor = layer_extractor(checkpoints[size], 2, torch.device("cpu"))._replace(window_frames=1000)
    short = long_cut.truncate(duration=num_samples(1000) / SAMPLE_RATE).with_id("short")
    statistics = statistics_of([waveform])
    found = {
        (piece.cut_index, piece.window): rows
        for _, piece, rows in extract(extractor, [[long_cut, short]], 2000, "test", num_workers, as_whole=True)
    }
    for window in windows(num_frames(len(waveform))):
        part = waveform[window.first * HOP : window.first * HOP + num_samples(1000)]
        expected = encoder.features(part[None], layer=2, statistics=statistics)[0]
        expected = expected[window.start - window.first : window.end - window.first]
        torch.testing.assert_close(found[0, window], expected, atol=2e-5, rtol=0)
    alone = encoder.features(read_waveform(short)[None], layer=2)[0]
    torch.testing.assert_close(found[1, windows(1000)[0]], alone, atol=2e-5, rtol=0)
