import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, pretraining_data, pretraining_model
from lhotse import CutSet
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from hubert_lightning.data.alignments import phones_of
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import write_manifest
from hubert_lightning.features.extractors import all_layers_extractor, mfcc_extractor
from hubert_lightning.frames import num_frames
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.training.callbacks.layer_quality import LayerQuality
from hubert_lightning.training.relabelling import Relabel
from hubert_lightning.training.watched import read_layers
from hubert_lightning.units.kmeans import KMeans, assign
from hubert_lightning.units.layer_quality import layer_quality, phone_quality
from hubert_lightning.units.quality import Quality, frame_phones, joint_counts


@pytest.fixture(scope="module")
def encoder() -> HubertEncoder:
    torch.manual_seed(0)
    return HubertEncoder(TINY).eval()


@torch.no_grad()
def test_a_layer_is_judged_on_utterances_that_its_kmeans_has_not_seen(encoder: HubertEncoder, dev_cuts: CutSet) -> None:
    ours = layer_quality(all_layers_extractor(encoder), list(dev_cuts), 10, max_frames=10**6)
    assert len(ours) == 2
    cuts = sorted(dev_cuts, key=lambda cut: cut.id)
    cuts = [cuts[place] for place in np.random.default_rng(0).permutation(len(cuts))]
    phones = [np.array(frame_phones(phones_of(cut), num_frames(cut.num_samples))) for cut in cuts]
    for layer, quality in enumerate(ours, start=1):
        features = [encoder.features(read_waveform(cut)[None], layer=layer)[0].half() for cut in cuts]
        rows = [of[torch.from_numpy(named != "")] for of, named in zip(features, phones, strict=True)]
        centroids = KMeans().fit(torch.cat(rows[::2]).float(), 10, seed=0)
        judged = np.concatenate([named[named != ""] for named in phones[1::2]])
        expected = Quality.of(joint_counts(judged, assign(torch.cat(rows[1::2]), centroids).numpy(), 10))
        # Half precision and a batch's rounding move a frame or two
        np.testing.assert_allclose(quality, expected, rtol=0.02)


def test_mfcc_are_one_layer(dev_cuts: CutSet) -> None:
    [of_mfcc] = layer_quality(mfcc_extractor(), list(dev_cuts), 20)
    assert 0.1 < of_mfcc.pnmi < 0.9
    assert 1 < of_mfcc.perplexity <= 20


def test_without_phones_only_what_needs_none_is_known(encoder: HubertEncoder, dev_cuts: CutSet) -> None:
    unaligned = [cut.drop_alignments() for cut in dev_cuts]
    for quality in layer_quality(all_layers_extractor(encoder), unaligned, 10):
        assert math.isnan(quality.pnmi)
        assert math.isnan(quality.phone_purity)
        assert 1 < quality.perplexity <= 10


def test_phones_as_clusters_know_everything_and_one_cluster_nothing(dev_cuts: CutSet) -> None:
    numbers: dict[str, int] = {}
    perfect, nothing = {}, {}
    for cut in dev_cuts:
        named = frame_phones(phones_of(cut), num_frames(cut.num_samples))
        perfect[cut.id] = np.array([[numbers.setdefault(name, len(numbers)) for name in named]])
        nothing[cut.id] = np.zeros((1, len(named)), dtype=int)
    assert phone_quality(list(dev_cuts), perfect, 100).pnmi == pytest.approx(1)
    assert phone_quality(list(dev_cuts), nothing, 100).pnmi == pytest.approx(0, abs=1e-9)


def test_phones_that_run_past_the_audio_are_refused(encoder: HubertEncoder, dev_cuts: CutSet) -> None:
    cuts = copy.deepcopy(list(dev_cuts))  # lhotse changes an alignment in place
    long = cuts[0].map_supervisions(lambda segment: segment.with_alignment("phone", stretched(segment)))
    with pytest.raises(ValueError, match=rf"{cuts[0].id}: phones end at"):
        layer_quality(all_layers_extractor(encoder), [long, *cuts[1:]], 10)
    with pytest.raises(ValueError, match=rf"{cuts[0].id}: phones end at"):
        phone_quality([long], {}, 10)


def stretched(segment):
    return [phone._replace(start=phone.start * 2) for phone in segment.alignment["phone"]]


@pytest.mark.parametrize("aligned", [True, False])
def test_validation_judges_every_layer(manifests: Path, dev_cuts: CutSet, tmp_path: Path, aligned: bool) -> None:
    validation = manifests / "dev.jsonl.gz"
    if not aligned:
        validation = tmp_path / "unaligned.jsonl.gz"
        write_manifest([cut.drop_alignments() for cut in dev_cuts], validation)
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_steps=2,
        val_check_interval=1,
        accelerator="cpu",
        logger=CSVLogger(tmp_path, name="", version=""),
        callbacks=[Relabel(clusters=20, max_frames=2000), LayerQuality(clusters=10)],
        enable_progress_bar=False,
    )
    model, data = pretraining_model(), pretraining_data(manifests, num_workers=0, validation=[validation])
    trainer.fit(model, datamodule=data)
    judge = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        callbacks=[Relabel(clusters=20, max_frames=2000), LayerQuality(clusters=10)],
        enable_progress_bar=False,
    )
    judge.validate(model, datamodule=data, verbose=False)  # as `hubert validate`, which leaves what the fit has found
    entries = read_layers(tmp_path)
    assert [entry.step for entry in entries] == [1, 2]
    for entry in entries:
        assert [row.layer for row in entry.layers] == [1, 2]
        assert all((row.pnmi is not None) == aligned and row.perplexity > 1 for row in entry.layers)
    header, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    for name in ("layers/best_pnmi", "layers/best_layer"):
        assert sum(row[header.index(name)] != "" for row in rows if name in header) == (2 if aligned else 0)
    assert not any(name.startswith("val/layer") for name in header)


def test_too_few_utterances_or_frames_are_refused(encoder: HubertEncoder, dev_cuts: CutSet) -> None:
    with pytest.raises(ValueError, match=r"judged by 1 of the utterances: .*, 0 to judge them"):
        layer_quality(all_layers_extractor(encoder), list(dev_cuts)[:1], 10)
    with pytest.raises(ValueError, match="frames to fit 5000 clusters"):
        layer_quality(all_layers_extractor(encoder), list(dev_cuts), 5_000)


def test_what_validation_could_not_judge_is_refused_before_the_first_step(manifests: Path, tmp_path: Path) -> None:
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_steps=2,
        accelerator="cpu",
        logger=False,
        callbacks=[Relabel(clusters=20, max_frames=2000), LayerQuality(clusters=5_000)],
        enable_progress_bar=False,
    )
    with pytest.raises(ValueError, match="frames to fit 5000 clusters"):
        trainer.fit(pretraining_model(), datamodule=pretraining_data(manifests, num_workers=0))
    assert trainer.global_step == 0
