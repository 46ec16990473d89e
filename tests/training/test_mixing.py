"""Speech, noise and rooms in training utterances: energies, places, and the same batch wherever it is made."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
import yaml
from helpers import (
    SMOKE,
    SMOKE_FINETUNE,
    TINY,
    cut_of,
    logging_trainer,
    parsed_config,
    pretraining_data,
    pretraining_model,
    refused,
    silent_trainer,
)
from hypothesis import given
from hypothesis import strategies as st
from lhotse.cut import Cut
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.testing import assert_close

from hubert_lightning.data.manifest import write_manifest
from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.training.batches import PretrainingBatch, PretrainingBatches, TranscribedBatch
from hubert_lightning.training.finetuning import CTCFinetuning
from hubert_lightning.training.finetuning_data import TranscribedData
from hubert_lightning.training.mixing import Mixer, Mixing, overlapped, power, reverberated
from hubert_lightning.training.pretraining_data import PretrainingData
from hubert_lightning.training.relabelling import Relabel
from hubert_lightning.training.sampler import PlannedBatches

SAMPLES = 800
EVERY: dict[str, Any] = {"probability": 1.0, "speech_ratio": (0.0, 0.0)}


def noise(samples: int, seed: int = 0, level: float = 0.1) -> Tensor:
    return level * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, *waveforms: Tensor) -> Path:
    """A manifest of recordings."""
    folder.mkdir(exist_ok=True)
    cuts = [cut_of(folder / f"{number}.wav", waveform) for number, waveform in enumerate(waveforms)]
    write_manifest(cuts, folder / "cuts.jsonl.gz")
    return folder / "cuts.jsonl.gz"


def cuts_in(folder: Path, *waveforms: Tensor) -> list[Cut]:
    return [cut_of(folder / f"{number}.wav", waveform) for number, waveform in enumerate(waveforms)]


def mixed(mixing: Mixing, rows: Sequence[Tensor], seed: int = 0, **recordings: Any) -> list[Tensor]:
    cuts: Any = [None] * (len(rows) + 1)  # a batch of several rows reads none of them
    return Mixer(mixing, cuts, **recordings).mixed(rows, range(len(rows)), seed)


@given(
    ratio=st.floats(-20, 20),
    level=st.floats(0.001, 1),
    samples=st.integers(2, 500),
    data=st.data(),
)
def test_the_ratio_of_energies_is_exact(ratio: float, level: float, samples: int, data: st.DataObject) -> None:
    waveform, added = noise(samples).double(), noise(samples, 1, level).double()
    length = data.draw(st.integers(1, samples))
    start, first = data.draw(st.integers(0, samples - length)), data.draw(st.integers(0, samples - length))
    change = overlapped(waveform, added, ratio, start, first, length) - waveform
    assert not change[:start].any()
    assert not change[start + length :].any()
    scaled = change[start : start + length] / added[first : first + length]
    assert_close(scaled, scaled[:1].expand_as(scaled), rtol=1e-6, atol=1e-9)
    assert 10 * math.log10(power(waveform) / power(scaled[0] * added)) == pytest.approx(ratio, abs=1e-6)


@given(
    seed=st.integers(0, 2**62),
    max_overlap=st.sampled_from([0.1, 0.5, 1.0]),
    lengths=st.sampled_from([(SAMPLES, SAMPLES, SAMPLES), (SAMPLES, 60, 300)]),
)
def test_other_speech_covers_at_most_a_part_of_an_utterance_and_comes_from_another_row(
    seed: int, max_overlap: float, lengths: tuple[int, ...]
) -> None:
    rows = [noise(samples, row) for row, samples in enumerate(lengths)]
    kept = [row.clone() for row in rows]
    result = mixed(Mixing(max_overlap=max_overlap, **EVERY), rows, seed)
    for row, (clean, mixture) in enumerate(zip(rows, result, strict=True)):
        changed = (mixture != clean).nonzero().flatten()
        assert len(changed) >= 1
        length = int(changed[-1] - changed[0]) + 1
        assert length <= max(max_overlap * len(clean), 1)
        segment = (mixture - clean)[changed[0] : changed[0] + length]
        others = [other for number, other in enumerate(kept) if number != row and len(other) >= length]
        assert any(_holds(other, segment) for other in others)
    assert all(torch.equal(row, before) for row, before in zip(rows, kept, strict=True))


def _holds(signal: Tensor, segment: Tensor) -> bool:
    """Whether a segment is part of a signal, at any scale."""
    windows = signal.unfold(0, len(segment), 1)
    scale = (windows * segment).sum(dim=1, keepdim=True) / windows.square().sum(dim=1, keepdim=True)
    return bool(((scale * windows - segment).abs().amax(dim=1) < 1e-4 * segment.abs().max()).any())


def test_as_many_utterances_are_mixed_as_the_probability_says() -> None:
    rows = [noise(8, row) for row in range(50)]
    count = sum(
        not torch.equal(clean, mixture)
        for seed in range(40)
        for clean, mixture in zip(rows, mixed(Mixing(probability=0.2), rows, seed), strict=True)
    )
    assert count / 2000 == pytest.approx(0.2, abs=0.03)


def test_a_short_noise_is_repeated_and_a_long_one_is_read_at_a_random_place(tmp_path: Path) -> None:
    short, long = noise(100, 5), noise(5 * SAMPLES, 6)
    mixing = Mixing(probability=1.0, noise_share=1.0, max_overlap=1.0, noise_ratio=(3.0, 3.0), noise=[tmp_path])
    rows = [noise(SAMPLES, row) for row in range(20)]
    for recording, whole in ((short, short.repeat(20)), (long, long)):
        cuts = cuts_in(tmp_path, recording)
        starts = set()
        for clean, mixture in zip(rows, mixed(mixing, rows, 1, noises=cuts), strict=True):
            changed = (mixture != clean).nonzero().flatten()
            segment = (mixture - clean)[changed[0] : int(changed[-1]) + 1]
            assert _holds(whole.float(), segment[: min(len(segment), 150)])
            starts.add(int(changed[0]))
        assert len(starts) > 5


def test_a_batch_of_one_row_reads_another_utterance(tmp_path: Path) -> None:
    recordings = [noise(SAMPLES, number) for number in range(3)]
    cuts = cuts_in(tmp_path, *recordings)
    sources = set()
    for seed in range(12):
        [mixture] = Mixer(Mixing(**EVERY), cuts).mixed([recordings[1]], [1], seed)
        changed = (mixture != recordings[1]).nonzero().flatten()
        segment = (mixture - recordings[1])[changed[0] : int(changed[-1]) + 1]
        if len(segment) > 20:
            sources |= {number for number in range(3) if _holds(recordings[number], segment)}
    assert sources == {0, 2}


def test_silence_is_neither_mixed_nor_divided_by() -> None:
    rows = [noise(SAMPLES), torch.zeros(SAMPLES)]
    for clean, mixture in zip(rows, mixed(Mixing(**EVERY), rows), strict=True):
        assert torch.equal(mixture, clean)


@given(delay=st.integers(0, 300), reflections=st.integers(1, 200), seed=st.integers(0, 100))
def test_a_room_keeps_the_energy_and_the_place_of_every_sample(delay: int, reflections: int, seed: int) -> None:
    """Convolved by scipy, without the delay of the direct path."""
    waveform = noise(SAMPLES, seed)
    echoes = noise(reflections, seed + 1, 0.2).clamp(-0.9, 0.9)
    response = torch.cat([torch.zeros(delay), torch.ones(1), echoes])
    result = reverberated(waveform, response)
    expected = scipy.signal.convolve(waveform.double().numpy(), response.double().numpy())[delay:][:SAMPLES]
    expected *= np.sqrt(power(waveform) / np.square(expected).mean())
    assert_close(result.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
    assert power(result) == pytest.approx(power(waveform), rel=1e-5)
    assert_close(reverberated(waveform, torch.eye(1, delay + 1)[0].roll(delay)), waveform, rtol=1e-5, atol=1e-6)


def test_rooms_are_used_as_often_as_their_probability_says(tmp_path: Path) -> None:
    rooms = cuts_in(tmp_path, torch.tensor([0.1, 0.9, 0.3, -0.2]))
    rows = [noise(50, row) for row in range(400)]
    result = mixed(Mixing(rooms=[tmp_path], room_probability=0.3), rows, rooms=rooms)
    changed = sum(not torch.equal(clean, mixture) for clean, mixture in zip(rows, result, strict=True))
    assert changed / 400 == pytest.approx(0.3, abs=0.07)


# In the data module


def batches(data: PretrainingData, run: Path, count: int = 4, **options: Any) -> list[PretrainingBatch]:
    data.labels = None
    trainer = silent_trainer(run, 1, callbacks=[Relabel(clusters=20, max_frames=3000)], **options)
    trainer.fit(pretraining_model(), datamodule=data)
    loader = iter(data.train_dataloader())
    return [next(loader) for _ in range(count)]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("recordings")
    response = torch.cat([torch.tensor([0.0, 0.9]), noise(2000, 3)])
    return {
        "noise": [saved(folder / "noise", noise(SAMPLE_RATE), noise(900))],
        "rooms": [saved(folder / "r", response)],
    }


def test_labels_crops_and_masks_are_those_of_the_clean_utterance(
    manifests: Path, tmp_path: Path, recordings: dict[str, list[Path]]
) -> None:
    mixing = Mixing(probability=0.8, noise_share=0.4, **recordings)  # type: ignore[arg-type]
    clean = batches(pretraining_data(manifests, num_workers=0), tmp_path / "clean")
    mixtures = batches(pretraining_data(manifests, num_workers=0, mixing=mixing), tmp_path / "mixed")
    for one, other in zip(clean, mixtures, strict=True):
        assert one.id == other.id
        assert torch.equal(one.cluster, other.cluster)
        assert torch.equal(one.mask, other.mask)
    differ = [
        not torch.equal(row, changed)
        for one, other in zip(clean, mixtures, strict=True)
        for row, changed in zip(one.waveform, other.waveform, strict=True)
    ]
    assert 0.5 < np.mean(differ) < 1


def test_validation_stays_clean(manifests: Path, tmp_path: Path) -> None:
    results = []
    for name, mixing in (("clean", Mixing()), ("mixed", Mixing(probability=1.0))):
        data = pretraining_data(manifests, num_workers=0, mixing=mixing)
        batches(data, tmp_path / name)
        loader = data.val_dataloader()
        assert not isinstance(loader, list)
        results.append(next(iter(loader)))
    assert torch.equal(results[0].waveform, results[1].waveform)


def test_workers_make_the_same_mixtures_as_no_workers(
    manifests: Path, tmp_path: Path, recordings: dict[str, list[Path]]
) -> None:
    mixing = Mixing(probability=0.8, noise_share=0.4, **recordings)  # type: ignore[arg-type]
    alone, shared = (
        batches(pretraining_data(manifests, num_workers=workers, mixing=mixing), tmp_path / str(workers))
        for workers in (0, 2)
    )
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.waveform, other.waveform)


def test_two_ranks_take_the_mixtures_that_one_takes(
    manifests: Path, tmp_path: Path, recordings: dict[str, list[Path]]
) -> None:
    """Each rank makes the batches of its own plans, with recordings that it has read itself."""
    mixing = Mixing(probability=0.8, noise_share=0.4, **recordings)  # type: ignore[arg-type]
    data = pretraining_data(manifests, num_workers=0, mixing=mixing)
    alone = batches(data, tmp_path, 6)
    frames, labels = data._frames(data.train_cuts), data.labels
    assert labels is not None
    dealt = {}
    for rank in range(2):
        own = pretraining_data(manifests, mixing=mixing)
        own.setup("fit")
        mixer = own.mixed.mixer(own.train_cuts)
        settings = {"max_crop_frames": data.max_crop_frames, "mask_prob": 0.8, "mask_length": 10}
        made = PretrainingBatches(own.train_cuts, labels, max_frames=data.max_frames, mixer=mixer, **settings)
        plans = PlannedBatches(frames, data.max_frames, rank=rank, world_size=2, crop=data.max_crop_frames)
        dealt |= {plan.cuts: made[plan].waveform for plan in plans.plan(0)}
    numbers = {cut.id: number for number, cut in enumerate(data.train_cuts)}
    for batch in alone:
        assert torch.equal(dealt[tuple(numbers[cut_id] for cut_id in batch.id)], batch.waveform)


def test_a_resumed_run_trains_on_the_mixtures_of_an_uninterrupted_one(
    manifests: Path, tmp_path: Path, recordings: dict[str, list[Path]]
) -> None:
    mixing = Mixing(probability=0.8, noise_share=0.4, **recordings)  # type: ignore[arg-type]

    def trained(folder: Path, checkpoint: Path | None = None) -> dict[str, Tensor]:
        keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = Trainer(
            default_root_dir=folder,
            max_steps=3,
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Relabel(clusters=20, max_frames=3000), keep],
        )
        model = pretraining_model()
        data = pretraining_data(manifests, num_workers=0, validation=None, mixing=mixing)
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
        return model.state_dict()

    whole = trained(tmp_path)
    first = tmp_path / "step=1.ckpt"
    resumed = trained(tmp_path, first)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    clean = torch.load(first, weights_only=True)["state_dict"]
    assert not all(torch.equal(value, clean[name]) for name, value in whole.items())


def test_other_noises_than_those_of_the_checkpoint_are_refused(
    manifests: Path, tmp_path: Path, recordings: dict[str, list[Path]]
) -> None:
    mixing = Mixing(probability=0.5, noise=recordings["noise"])
    trainer = logging_trainer(tmp_path, 1)
    trainer.fit(pretraining_model(), datamodule=pretraining_data(manifests, num_workers=0, mixing=mixing))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = Mixing(probability=0.5, noise=[saved(tmp_path / "other", noise(500))])
    with pytest.raises(UserError, match=re.escape("the noises or rooms of data.mixing are not those that")):
        logging_trainer(tmp_path, 2).fit(
            pretraining_model(),
            datamodule=pretraining_data(manifests, num_workers=0, mixing=other),
            ckpt_path=tmp_path / "last.ckpt",
        )


def test_the_options_are_nested_and_in_the_config_of_the_run(tmp_path: Path) -> None:
    config = tmp_path / "mixing.yaml"
    mixing = {"probability": 0.2, "noise": ["noise.jsonl.gz"], "noise_ratio": [0, 10]}
    config.write_text(yaml.safe_dump({"data": {"init_args": {"mixing": mixing}}}))
    parsed = parsed_config(*SMOKE, "--config", str(config), "--data.init_args.mixing.noise_share=0.3").config.fit
    given = parsed.data.init_args.mixing
    assert (given.probability, given.noise_share, list(given.noise_ratio)) == (0.2, 0.3, [0.0, 10.0])
    assert [str(path) for path in given.noise] == ["noise.jsonl.gz"]
    plain = parsed_config(*SMOKE).config.fit.data.init_args.mixing
    assert plain.probability == 0


# In fine-tuning


@pytest.fixture(scope="module")
def all_mixing(recordings: dict[str, list[Path]]) -> Mixing:
    return Mixing(probability=0.8, noise_share=0.4, **recordings)  # type: ignore[arg-type]


def transcribed_data(manifests: Path, mixing: Mixing = Mixing(), workers: int = 0) -> TranscribedData:
    train, dev = [manifests / "finetune.jsonl.gz"], [manifests / "dev.jsonl.gz"]
    return TranscribedData(train, dev, max_duration=12, num_workers=workers, mixing=mixing)


def transcribed_batches(data: TranscribedData, run: Path, part: str = "train") -> list[TranscribedBatch]:
    silent_trainer(run, 1, limit_val_batches=0).fit(CTCFinetuning(encoder=TINY), datamodule=data)
    loader = data.train_dataloader() if part == "train" else data.val_dataloader()
    assert not isinstance(loader, list)
    return list(loader)  # type: ignore[arg-type]


def test_transcripts_and_masks_of_fine_tuning_are_those_of_the_clean_utterance(
    manifests: Path, tmp_path: Path, all_mixing: Mixing
) -> None:
    clean = transcribed_batches(transcribed_data(manifests), tmp_path / "clean")
    mixing = replace(all_mixing, probability=0.4)
    mixtures = transcribed_batches(transcribed_data(manifests, mixing), tmp_path / "mixed")
    differ = []
    for one, other in zip(clean, mixtures, strict=True):
        assert (one.id, one.text, one.num_frames, one.seed) == (other.id, other.text, other.num_frames, other.seed)
        for name in ("token", "mask", "channel_mask", "length"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert one.waveform.shape == other.waveform.shape
        for row, changed, length in zip(one.waveform, other.waveform, one.length.tolist(), strict=True):
            assert not changed[length:].any()
            differ.append(not torch.equal(row, changed))
    assert any(differ)
    assert not all(differ)


def test_validation_of_fine_tuning_stays_clean(manifests: Path, tmp_path: Path) -> None:
    one, other = (
        transcribed_batches(transcribed_data(manifests, mixing), tmp_path / name, "validation")
        for name, mixing in (("clean", Mixing()), ("mixed", Mixing(probability=1.0)))
    )
    assert all(torch.equal(clean.waveform, same.waveform) for clean, same in zip(one, other, strict=True))


def test_workers_of_fine_tuning_make_the_same_mixtures_as_no_workers(
    manifests: Path, tmp_path: Path, all_mixing: Mixing
) -> None:
    one, other = (
        transcribed_batches(transcribed_data(manifests, all_mixing, workers), tmp_path / str(workers))
        for workers in (0, 2)
    )
    assert all(torch.equal(alone.waveform, shared.waveform) for alone, shared in zip(one, other, strict=True))


def test_resumed_fine_tuning_trains_on_the_same_mixtures_and_refuses_other_noises(
    manifests: Path, tmp_path: Path, all_mixing: Mixing
) -> None:
    def trained(mixing: Mixing, folder: Path, checkpoint: Path | None = None) -> dict[str, Tensor]:
        keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(
            default_root_dir=folder, max_steps=3, max_epochs=-1, accelerator="cpu", callbacks=[keep], **quiet
        )
        torch.manual_seed(0)
        model = CTCFinetuning(encoder=TINY, freeze_steps=0)
        trainer.fit(model, datamodule=transcribed_data(manifests, mixing), ckpt_path=checkpoint)
        return model.state_dict()

    first = tmp_path / "step=1.ckpt"
    whole = trained(all_mixing, tmp_path)
    resumed = trained(all_mixing, tmp_path / "resumed", first)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    other = Mixing(probability=0.5, noise=[saved(tmp_path / "other", noise(500))])
    with pytest.raises(UserError, match=re.escape("the noises or rooms of data.mixing are not those that")):
        trained(other, tmp_path / "refused", first)


# Bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"probability": 1.5}, "data.mixing.probability is 1.5; it is a probability from 0 to 1"),
        ({"noise_share": -0.1}, "data.mixing.noise_share is -0.1; it is a probability from 0 to 1"),
        ({"max_overlap": 0}, "data.mixing.max_overlap is 0; give a part of an utterance, above 0 and at most 1"),
        ({"speech_ratio": (5, -5)}, "data.mixing.speech_ratio is from 5 to -5; give the lower ratio first"),
        ({"noise": []}, "data.mixing.noise names no manifest; name one, or leave it out"),
        ({"noise": ["n"]}, "data.mixing.noise is given, and data.mixing.probability is 0, so it is not used"),
        (
            {"probability": 0.2, "noise": ["n"], "noise_share": 0},
            "data.mixing.noise is given, and data.mixing.noise_share is 0, so it is not used",
        ),
        (
            {"probability": 0.2, "noise_share": 0.5},
            "data.mixing.noise_share is 0.5, and data.mixing.noise names no manifest, so it is not used; name one",
        ),
        ({"room_probability": 0.5}, "data.mixing.room_probability is 0.5, and data.mixing.rooms names no manifest"),
        ({"rooms": ["r"], "room_probability": 0}, "data.mixing.rooms is given, and data.mixing.room_probability is 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        Mixing(**options)


@pytest.mark.parametrize("config", [SMOKE, SMOKE_FINETUNE], ids=["pre-training", "fine-tuning"])
def test_silent_and_empty_noises_are_refused_before_work_starts(
    config: list[str], manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    silent = saved(tmp_path / "silent", torch.zeros(1000), torch.zeros(10))
    empty = tmp_path / "empty.jsonl.gz"
    write_manifest([], empty)
    for path, reason in ((silent, "all its recordings are silent"), (empty, "an empty manifest")):
        for option in ("noise", "rooms"):
            data = {"probability": 0.2, option: [str(path)]}
            sentence = refused(
                capsys,
                *("fit", *config, "--output", str(tmp_path / "run")),
                f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
                f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
                f"--data.init_args.mixing={yaml.safe_dump(data, default_flow_style=True).strip()}",
            )
            assert f"{path}: {reason}" in sentence
    assert not [*tmp_path.glob("run/**/*.ckpt")]


def test_a_noise_is_not_silent_if_its_beginning_is(tmp_path: Path) -> None:
    late = torch.cat([torch.zeros(40 * SAMPLE_RATE), noise(100)])
    path = saved(tmp_path / "late", torch.zeros(100), late)
    data = PretrainingData(train=[path], mixing=Mixing(probability=0.2, noise=[path], noise_share=1.0))
    data.setup("fit")
    assert len(data.mixed.noises) == 2
    assert soundfile.info(tmp_path / "late/1.wav").frames > 40 * SAMPLE_RATE


def test_a_corpus_of_one_utterance_has_no_other_speech(tmp_path: Path) -> None:
    path = saved(tmp_path / "one", noise(3 * SAMPLE_RATE))
    for data in (PretrainingData, TranscribedData):
        with pytest.raises(UserError, match=r"the only training utterance, so data\.mixing has no other speech to add"):
            data(train=[path], mixing=Mixing(probability=0.2)).setup("fit")
