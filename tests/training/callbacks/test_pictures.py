"""What people look at: the files of a run's folder, and what loggers get."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, bare_trainer, logging_trainer, pretraining_data, pretraining_model
from lhotse import CutSet
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from hubert_lightning.data.alignments import phones_of
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import read_manifest, speaker_of, write_manifest
from hubert_lightning.frames import num_frames, num_samples
from hubert_lightning.training.callbacks.layer_quality import LayerQuality
from hubert_lightning.training.callbacks.pictures import Pictures, fixed_cuts
from hubert_lightning.training.finetuning import CTCFinetuning
from hubert_lightning.training.finetuning_data import TranscribedData
from hubert_lightning.training.media import Markup, Sound
from hubert_lightning.training.watched import (
    read_layers,
    read_phone_clusters,
    read_transcripts,
    read_units,
)
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.layer_quality import phone_quality
from hubert_lightning.units.quality import pnmi


class Album(Logger):
    """A logger that keeps what it gets: images, audio and rows of tables by key."""

    def __init__(self) -> None:
        super().__init__()
        self.images: dict[str, list[Any]] = {}
        self.sounds: dict[str, list[np.ndarray]] = {}
        self.tables: dict[str, list[list[Any]]] = {}
        self.columns: list[str] = []
        self.metrics: dict[str, float] = {}

    name = version = "album"  # type: ignore[assignment]

    @property
    def experiment(self) -> "Album":
        return self

    def log_hyperparams(self, *arguments: Any, **settings: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.metrics |= metrics

    def log_image(self, key: str, images: list[Any], step: int, caption: list[str]) -> None:
        self.images.setdefault(key, []).extend(images)

    def log_audio(
        self, key: str, audios: list[np.ndarray], step: int, caption: list[str], sample_rate: list[int]
    ) -> None:
        self.sounds.setdefault(key, []).extend(audios)

    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        self.columns, self.tables[key] = columns, data


def fitted(manifests: Path, folder: Path, *callbacks: Any, steps: int = 2, logger: Any = None, **data: Any) -> Trainer:
    """A pre-training run that validates after each step."""
    trainer = logging_trainer(folder, steps, val_check_interval=1, limit_val_batches=1, num_sanity_val_steps=0)
    trainer.callbacks += [*callbacks]  # type: ignore[attr-defined]
    if logger is not None:
        trainer.loggers = [logger]
    trainer.fit(pretraining_model(), datamodule=pretraining_data(manifests, num_workers=0, **data))
    return trainer


@pytest.fixture(scope="module")
def shown(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Album, Trainer]:
    """The folder of a run of two steps, what its logger got, and its Trainer."""
    folder, album = tmp_path_factory.mktemp("shown"), Album()
    trainer = fitted(manifests, folder, Pictures(max_seconds=2.0), LayerQuality(clusters=10), logger=album)
    return folder, album, trainer


def test_utterances_have_their_labels_phones_and_predictions(
    shown: tuple[Path, Album, Trainer], dev_cuts: CutSet
) -> None:
    folder, _, trainer = shown
    units, labels = read_units(folder), LabelStore(folder / "labels")
    assert units is not None
    assert (units.step, units.hop, len(units.utterances)) == (2, 0.02, 4)
    model: Any = trainer.lightning_module.eval()
    for utterance in units.utterances:
        cut = dev_cuts[utterance.id]
        frames = len(utterance.labels[0])
        assert frames == min(num_frames(cut.num_samples), 99)  # of 2 s
        assert utterance.labels == labels[cut.id][:, :frames].tolist()
        assert utterance.source == cut.recording.sources[0].source
        assert (utterance.channel, utterance.start, utterance.speaker) == (0, cut.start, speaker_of(cut))
        assert utterance.duration == num_samples(frames) / 16_000
        assert utterance.phones is not None
        assert [symbol for symbol, *_ in utterance.phones] == [
            symbol for start, _, symbol in phones_of(cut) if start < utterance.duration
        ]
        mask = torch.zeros(1, frames, dtype=torch.bool)
        for first, length in utterance.mask:
            mask[0, first : first + length] = True
        assert 0.3 < float(mask.float().mean()) < 0.8
        with torch.no_grad():
            logits, _ = model(read_waveform(cut, 0, num_samples(frames))[None], mask)
        assert utterance.predictions == [logits[0][0].argmax(dim=-1).tolist()]


def test_phones_and_clusters_are_counted_over_the_validation_set(
    shown: tuple[Path, Album, Trainer], dev_cuts: CutSet
) -> None:
    folder, _, _ = shown
    counts = read_phone_clusters(folder)
    assert counts is not None
    expected = phone_quality(list(dev_cuts), LabelStore(folder / "labels"), 20)
    assert pnmi(np.array(counts.counts)) == pytest.approx(expected.pnmi)
    assert {symbol for cut in dev_cuts for *_, symbol in phones_of(cut)} >= {*counts.phones}


def test_a_logger_gets_pictures_at_every_validation_and_audio_once(shown: tuple[Path, Album, Trainer]) -> None:
    _, album, _ = shown
    utterances = [f"units/utterances/{number}" for number in (1, 2, 3, 4)]
    assert album.images.keys() == {*utterances, "units/phones_by_cluster", "layers/pnmi"}
    assert [len(album.images[key]) for key in (*utterances, "layers/pnmi")] == [2] * 5
    assert len(album.images["units/phones_by_cluster"]) == 1
    assert [len(sounds) for sounds in album.sounds.values()] == [1] * 4
    assert album.images[utterances[0]][0].size[0] >= 1400


def test_the_best_layer_is_logged_and_all_layers_are_kept(shown: tuple[Path, Album, Trainer]) -> None:
    folder, album, _ = shown
    entries = read_layers(folder)
    assert [(entry.step, entry.clusters, len(entry.layers)) for entry in entries] == [(1, 10, 2), (2, 10, 2)]
    best = entries[-1].best
    assert best is not None
    assert album.metrics["layers/best_pnmi"] == best.pnmi
    assert album.metrics["layers/best_layer"] == best.layer
    assert not any("layer1" in name for name in album.metrics)


def test_a_run_with_a_table_alone_keeps_the_files_and_draws_nothing(
    manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hubert_lightning.training.media.png_of", lambda figure: pytest.fail("drawn"))
    fitted(manifests, tmp_path, Pictures(), steps=1, logger=CSVLogger(tmp_path, name="", version=""))
    assert {path.name for path in (tmp_path / "watched").iterdir()} == {"units.json", "phone_clusters.json"}


def test_recordings_stay_in_the_house(manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hubert_lightning.training.callbacks.pictures.log_mel", lambda waveform: pytest.fail("a spectrogram is drawn")
    )
    album = Album()
    fitted(manifests, tmp_path, Pictures(audio=False, num_utterances=1), steps=1, logger=album)
    assert album.images
    assert not album.sounds


def test_pictures_can_be_switched_off(manifests: Path, tmp_path: Path) -> None:
    album = Album()
    fitted(manifests, tmp_path, Pictures(enabled=False), steps=1, logger=album)
    assert not (tmp_path / "watched").exists()
    assert not album.images


def test_pictures_change_no_bit_of_a_training(manifests: Path, tmp_path: Path) -> None:
    weights, states, modes = [], [], []
    for name, callbacks in (("with", [Pictures(num_utterances=1)]), ("without", [])):
        torch.manual_seed(0)
        model = fitted(manifests, tmp_path / name, *callbacks, logger=Album()).lightning_module
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        states.append(torch.get_rng_state())
        modes.append([module.training for module in model.modules()])
    assert torch.equal(*weights)
    assert torch.equal(*states)
    assert modes[0] == modes[1]


def test_without_phones_there_are_no_phones_to_show(manifests: Path, dev_cuts: CutSet, tmp_path: Path) -> None:
    validation = tmp_path / "unaligned.jsonl.gz"
    write_manifest([cut.drop_alignments() for cut in dev_cuts], validation)
    album = Album()
    callbacks = Pictures(num_utterances=1), LayerQuality(clusters=10)
    fitted(manifests, tmp_path, *callbacks, steps=1, logger=album, validation=[validation])
    units = read_units(tmp_path)
    assert units is not None
    assert units.utterances[0].phones is None
    assert read_phone_clusters(tmp_path) is None
    assert album.images.keys() == {"units/utterances", "layers/perplexity"}
    assert not album.metrics.keys() & {"layers/best_pnmi", "layers/best_layer"}


def test_the_same_utterances_are_chosen_in_any_order_of_other_speakers_and_lengths(train_cuts: CutSet) -> None:
    cuts = list(train_cuts)
    chosen = fixed_cuts(cuts, 3)
    random.Random(0).shuffle(cuts)
    assert [cut.id for cut in fixed_cuts(cuts, 3)] == [cut.id for cut in chosen]
    assert len({*map(speaker_of, chosen)}) == 3
    assert chosen[0].duration < chosen[1].duration < chosen[2].duration
    assert len(fixed_cuts(cuts, 10_000)) == len(cuts)
    assert fixed_cuts(cuts, 0) == fixed_cuts([], 4) == []


def tuned(manifests: Path, folder: Path, logger: Logger, **options: Any) -> None:
    limits = {"max_steps": 1, "val_check_interval": 1, "limit_val_batches": 2, "num_sanity_val_steps": 0}
    trainer = bare_trainer(folder, callbacks=[Pictures(**options)], **limits)
    trainer.loggers = [logger]
    parts = {"train": [manifests / "finetune.jsonl.gz"], "validation": [manifests / "dev.jsonl.gz"]}
    data = TranscribedData(**parts, max_duration=12, num_workers=0)
    trainer.fit(CTCFinetuning(encoder=TINY, freeze_steps=0), datamodule=data)


def test_transcripts_are_a_table_with_players_and_marked_errors(manifests: Path, tmp_path: Path) -> None:
    album, cuts = Album(), read_manifest(manifests / "dev.jsonl.gz")
    tuned(manifests, tmp_path, album, num_transcripts=3, num_utterances=2)
    rows = read_transcripts(tmp_path)
    assert len(rows) > 3
    assert [row.id for row in rows] == sorted(row.id for row in rows)
    for row in rows:
        cut = cuts[row.id]
        assert (row.step, row.source, row.speaker) == (1, cut.recording.sources[0].source, speaker_of(cut))
        assert row.reference == cut.supervisions[0].text
        assert row.wer > 0.5  # of an untrained model
    assert album.columns == ["id", "audio", "speaker", "seconds", "WER", "reference", "hypothesis", "errors"]
    table = [dict(zip(album.columns, row, strict=True)) for row in album.tables["val/transcripts"]]
    assert len(table) == 3
    assert sum(row["audio"] is not None for row in table) == 2
    assert table[0]["errors"].startswith("[-")  # this logger's package has no class for HTML


@pytest.mark.parametrize(
    ("options", "columns"),
    [({"audio": False}, ["id", "speaker", "seconds", "WER"]), ({"num_transcripts": 0}, [])],
)
def test_transcripts_and_their_audio_can_stay_in_the_house(
    manifests: Path, tmp_path: Path, options: dict[str, Any], columns: list[str]
) -> None:
    album = Album()
    tuned(manifests, tmp_path, album, **options)
    assert album.columns[:4] == columns
    assert bool(album.tables) == bool(columns)
    assert read_transcripts(tmp_path)


def test_tensorboard_gets_images_audio_and_text(manifests: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    fitted(manifests, tmp_path, Pictures(num_utterances=1), steps=1, logger=logger)
    tuned(manifests, tmp_path, logger, num_transcripts=2)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["images"]) == {"units/utterances", "units/phones_by_cluster"}
    assert set(events.Tags()["audio"]) == {"units/audio", "val/audio/1", "val/audio/2"}
    [text] = events.Tensors("val/transcripts/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert lines[0] == "| id | speaker | seconds | WER | reference | hypothesis | errors |"
    assert len(lines) == 4


def test_cells_keep_what_they_hold() -> None:
    cell = Markup("<b>A</b>", "A")
    assert (str(cell), cell.plain) == ("<b>A</b>", "A")
    assert np.asarray(np.zeros(3, np.float32).view(Sound)).shape == (3,)
