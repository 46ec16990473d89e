import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse import CutSet

from hubert_lightning.errors import UserError
from hubert_lightning.units.abx import Tokens, abx, check_abx, tokens_of
from hubert_lightning.units.stretches import draw_speech

HAS_FASTABX = importlib.util.find_spec("fastabx") is not None
needs_fastabx = pytest.mark.skipif(not HAS_FASTABX, reason="fastabx is not installed: it needs Python 3.12 or later")


def test_tokens_are_whole_phones_of_the_sample(train_cuts: CutSet) -> None:
    sample = draw_speech(list(train_cuts), [5], 3000, 0)
    tokens = tokens_of(sample)
    assert len(tokens.phone) > 50
    for phone, speaker, start, end in zip(*tokens, strict=True):
        assert set(sample.phone[start:end]) == {phone}
        assert set(sample.speaker[start:end]) == {speaker}
        assert sample.stretch[start - 1] == sample.stretch[end]
        assert sample.phone[start - 1] != phone != sample.phone[end]
    assert "sil" not in tokens.phone


@pytest.mark.skipif(HAS_FASTABX, reason="fastabx is installed")
def test_without_fastabx_one_sentence_names_what_is_missing(train_cuts: CutSet) -> None:
    with pytest.raises(UserError, match=r"ABX needs fastabx.*install hubert-lightning\[abx\]"):
        check_abx(draw_speech(list(train_cuts), [5], 3000, 0))


@needs_fastabx
def test_abx_needs_phones_and_speakers(train_cuts: CutSet, dev_cuts: CutSet) -> None:
    with pytest.raises(UserError, match="no utterance has any"):
        check_abx(draw_speech([cut.drop_alignments() for cut in train_cuts], [5], 3000, 0))
    speaker = next(iter(dev_cuts)).supervisions[0].speaker
    one = [cut for cut in dev_cuts if cut.supervisions[0].speaker == speaker]
    with pytest.raises(UserError, match="no two that the manifest names"):
        check_abx(draw_speech(one, [5], 3000, 0))


@needs_fastabx
def test_abx_is_that_of_fastabx_on_item_files(tmp_path: Path) -> None:
    from fastabx import zerospeech_abx

    rng = np.random.default_rng(0)
    phones, speakers = rng.choice(["AA", "B", "K"], size=60), rng.integers(3, size=60)
    means = {phone: rng.normal(size=4) for phone in ("AA", "B", "K")}
    lengths = rng.integers(2, 6, size=60)
    ends = np.cumsum(lengths)
    rows = np.concatenate(
        [means[phone] + rng.normal(scale=1.5, size=(length, 4)) for phone, length in zip(phones, lengths, strict=True)]
    )
    features = torch.from_numpy(rows).float()
    torch.save(features, tmp_path / "all.pt")
    lines = ["#file onset offset #phone prev-phone next-phone speaker"]
    for phone, speaker, start, end in zip(phones, speakers, ends - lengths, ends, strict=True):
        # fastabx takes the frames whose centres lie between onset and offset
        lines.append(f"all {start / 50:.3f} {end / 50:.3f} {phone} x x s{speaker}")
    (tmp_path / "items.item").write_text("\n".join(lines) + "\n")
    errors = abx(features, Tokens(phones, speakers, ends - lengths, ends))
    for mode, rate in zip(("within", "across"), errors, strict=True):
        expected = zerospeech_abx(
            tmp_path / "items.item", tmp_path, max_size_group=10, max_x_across=5, speaker=mode, context="any",
            progress=False,
        )  # fmt: skip
        assert rate == pytest.approx(expected, abs=1e-6)
        assert 0.01 < rate < 0.45


@needs_fastabx
def test_the_command_adds_abx_of_every_layer(manifests: Path, tmp_path: Path, run: Path) -> None:
    from hubert_lightning.units.quality_command import quality

    quality(run / "last.ckpt", [manifests / "train.jsonl.gz"], tmp_path, [10], max_frames=4000, abx=True)
    kept = json.loads((tmp_path / "quality.json").read_text())
    for row in kept["surveys"]["10"].values():
        assert 0 < row["abx_within"] < 0.6
        assert 0 < row["abx_across"] < 0.6
