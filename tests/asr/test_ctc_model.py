"""A loaded fine-tuned model computes the log-probabilities that it had when it was saved, by any system."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import save_transformers
from helpers import TINY, cut_of, noise_with_pauses, save_ctc
from lhotse import CutSet
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from hubert_lightning.asr.ctc_model import WINDOW_FRAMES, load_ctc, log_probabilities
from hubert_lightning.asr.decoding import greedy
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.features.windows import quiet_windows
from hubert_lightning.frames import HOP, SAMPLE_RATE, num_frames, num_samples
from hubert_lightning.vocabulary import LETTERS, vocabulary_of

RELEASED = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]  # as of hubert-large-ls960-ft


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize(
    ("tokens", "blank"), [(RELEASED, "<pad>"), (["|", "a", "b", "é", "'", "[UNK]", "[PAD]"], "[PAD]")]
)
def test_a_model_of_transformers_has_their_log_probabilities_and_transcripts(
    tmp_path: Path, tokens: list[str], blank: str, norm: str
) -> None:
    theirs, tokenizer, features = save_transformers(tmp_path, tokens, blank, norm)
    ours = load_ctc(tmp_path)
    assert ours.vocabulary.tokens == (blank, *(token for token in tokens if token != blank))
    audio = [torch.randn(samples).numpy() for samples in (16_000, 9_000, 12_345)]
    order = [tokens.index(token) for token in ours.vocabulary.tokens]
    for waveform in audio:
        inputs = features(waveform, sampling_rate=16_000, return_tensors="pt")
        logits = theirs(inputs.input_values).logits
        log_probs = ours(torch.from_numpy(waveform)[None])
        assert_close(log_probs, logits.log_softmax(dim=-1)[..., order], rtol=0, atol=1e-5)
        frames = torch.tensor([log_probs.shape[1]])
        [their_text] = tokenizer.batch_decode(logits.argmax(dim=-1))
        assert greedy(log_probs, frames, ours.vocabulary) == [" ".join(their_text.split())]
        assert len(their_text) > 5
    if norm == "layer":  # Base's group norm counts padding, ours at choice
        inputs = features(audio, sampling_rate=16_000, return_tensors="pt", padding=True, return_attention_mask=True)
        logits = theirs(inputs.input_values, attention_mask=inputs.attention_mask).logits
        length = torch.tensor([len(waveform) for waveform in audio])
        log_probs = ours(pad_sequence([torch.from_numpy(waveform) for waveform in audio], batch_first=True), length)
        for our_row, their_row, frames in zip(log_probs, logits.log_softmax(-1), num_frames(length), strict=True):
            assert_close(our_row[:frames], their_row[:frames, order], rtol=0, atol=1e-5)


def test_the_case_of_a_foreign_vocabulary_is_that_of_its_letters(tmp_path: Path) -> None:
    save_transformers(tmp_path, RELEASED, "<pad>")
    assert load_ctc(tmp_path).vocabulary.normalise("it’s – fine") == "IT'S FINE"


def test_a_checkpoint_of_ours_comes_back_with_its_letters(tmp_path: Path) -> None:
    vocabulary, _, _ = vocabulary_of(["Grüße", "12"])
    model = save_ctc(tmp_path / "best.ckpt", vocabulary)
    loaded, waveform = load_ctc(tmp_path / "best.ckpt"), torch.randn(1, 5000)
    assert loaded.vocabulary == vocabulary
    assert not loaded.training
    assert_close(loaded(waveform), model(waveform), rtol=0, atol=0)


def test_a_checkpoint_without_a_vocabulary_has_that_of_librispeech(tmp_path: Path) -> None:
    save_ctc(tmp_path / "old.ckpt", None)
    assert load_ctc(tmp_path / "old.ckpt").vocabulary.tokens == LETTERS


def no_head(folder: Path) -> Path:
    model = save_ctc(folder / "a.ckpt")
    state = {name: value for name, value in model.state_dict().items() if name.startswith("encoder")}
    torch.save({"state_dict": state, "hyper_parameters": {"encoder": asdict(TINY)}}, folder / "a.ckpt")
    return folder / "a.ckpt"


def other_letters(folder: Path) -> Path:
    model = save_ctc(folder / "a.ckpt")
    settings = {"encoder": asdict(TINY), "vocabulary": {"tokens": ["-", "|", "A"], "case": "upper"}}
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": settings}, folder / "a.ckpt")
    return folder / "a.ckpt"


def no_tokenizer(folder: Path) -> Path:
    save_transformers(folder, RELEASED, "<pad>")
    (folder / "vocab.json").unlink()
    return folder


def several_languages(folder: Path) -> Path:
    save_transformers(folder, RELEASED, "<pad>")
    (folder / "vocab.json").write_text(json.dumps({"eng": {"a": 0}, "fra": {"b": 0}}))
    return folder


def no_blank(folder: Path) -> Path:
    save_transformers(folder, RELEASED, "<pad>")
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "|": 1}))
    return folder


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (no_head, "has no CTC head; give a model that was fine-tuned"),
        (other_letters, "has a CTC head for 29 tokens, and its vocabulary has 3"),
        (no_tokenizer, "does not say what its 32 tokens are; put its tokenizer's vocab.json into the directory"),
        (several_languages, "holds several languages"),
        (no_blank, "has no '<pad>', the blank"),
    ],
)
def test_a_model_without_a_usable_ctc_head_is_refused_by_name(tmp_path: Path, make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}.* {sentence}"):
        load_ctc(make(tmp_path))


def test_log_probabilities_of_many_recordings_are_those_of_each_alone(tmp_path: Path, train_cuts: CutSet) -> None:
    model, cuts = save_ctc(tmp_path / "a.ckpt"), list(train_cuts)[:5]
    groups = [cuts[:3], cuts[3:]]
    computed = list(log_probabilities(model, groups, batch_duration=20, progress="test"))
    assert [len(group) for group in computed] == [3, 2]
    for cut, rows in zip(cuts, [rows for group in computed for rows in group], strict=True):
        assert_close(rows, model(read_waveform(cut)[None])[0])


def test_a_long_recording_has_the_log_probabilities_of_its_windows(tmp_path: Path) -> None:
    model = save_ctc(tmp_path / "a.ckpt")
    cut = cut_of(tmp_path / "a.wav", waveform := 0.1 * torch.randn(70 * SAMPLE_RATE + 123))
    [[rows]] = log_probabilities(model, [[cut]], progress="test")
    frames = num_frames(len(waveform))
    assert len(rows) == frames
    windows = quiet_windows(cut, WINDOW_FRAMES)
    for first, last, start, end in windows:
        window = waveform[first * HOP :]
        window = window if last == frames else window[: num_samples(last - first)]
        assert_close(rows[start:end], model(window[None])[0, start - first : end - first])
    assert len(windows) > 2


def test_a_part_of_a_long_recording_has_the_log_probabilities_of_the_whole_away_from_its_ends(tmp_path: Path) -> None:
    model, waveform = save_ctc(tmp_path / "a.ckpt"), noise_with_pauses(180)
    whole = cut_of(tmp_path / "whole.wav", waveform)
    part = cut_of(tmp_path / "part.wav", waveform[1_234 * HOP : 8_000 * HOP])
    [[of_whole, of_part]] = log_probabilities(model, [[whole, part]], progress="test")
    inside = slice(1_234 + WINDOW_FRAMES, 8_000 - WINDOW_FRAMES)
    assert_close(of_part[WINDOW_FRAMES : 8_000 - WINDOW_FRAMES - 1_234], of_whole[inside])
    assert of_whole[inside].shape[0] > 3_000
