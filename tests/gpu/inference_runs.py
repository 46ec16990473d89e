"""Labelling, units, transcripts and K-means of the product, recorded on the phantom in processes of their own."""

from copy import deepcopy
from pathlib import Path

import torch
from helpers import ROOT
from lhotse.cut import Cut
from phantom.record import Record
from phantom.recorder import Recorder
from torch import Tensor

from hubert_lightning.asr.ctc_model import load_ctc, log_probabilities
from hubert_lightning.asr.decoding import greedy
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.errors import UserError
from hubert_lightning.features.extractors import Extractor, layer_extractor
from hubert_lightning.features.sample import sample_frames
from hubert_lightning.model.convolutions import WaveformStatistics
from hubert_lightning.units.kmeans import KMeans
from hubert_lightning.units.label_recipe import assign_clusters
from hubert_lightning.units.unit_extractor import Units

PRETRAINED, FINETUNED = ROOT / "tests/checkpoints/pretraining.ckpt", ROOT / "tests/checkpoints/finetuning.ckpt"
BATCH_FRAMES = 1000
"""20 s: several utterances, and several batches."""
GPU = torch.device("cuda")


class Counted:
    """An extractor that counts the batches it is given.

    Args:
        extractor: Computes the features.
    """

    def __init__(self, extractor: Extractor) -> None:
        self.batches = 0

        def features(waveform: Tensor, length: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
            self.batches += 1
            return extractor.features(waveform, length, statistics)

        self.extractor = extractor._replace(features=features)


def cuts(manifests: str) -> list[Cut]:
    return list(read_manifest(Path(manifests) / "train.jsonl.gz"))


def labelling(manifests: str, clusters: int = 20) -> Record:
    """Encode and assign a corpus; the result is the number of batches."""
    with Recorder() as recorder:
        counted = Counted(layer_extractor(PRETRAINED, 1, GPU))
        streams = [(slice(None), torch.zeros(clusters, counted.extractor.shape[0]))]
        with recorder.recording("labelling"):
            list(assign_clusters(counted.extractor, streams, [cuts(manifests)], BATCH_FRAMES))
    return recorder.record(counted.batches)


def labelling_until_a_file_is_missing(manifests: str) -> Record:
    """Label three utterances, the last of which is missing; the result is the number of those that got labels."""
    first, second, missing = (cut.drop_features() for cut in cuts(manifests)[:3])
    missing = deepcopy(missing)
    missing.recording.sources[0].source = "missing.flac"
    labelled = 0
    with Recorder() as recorder:
        extractor = layer_extractor(PRETRAINED, 1, GPU)
        streams = [(slice(None), torch.zeros(20, extractor.shape[0]))]
        try:
            for _ in assign_clusters(extractor, streams, [[first], [second], [missing]], BATCH_FRAMES):
                labelled += 1
        except UserError:
            pass
    return recorder.record(labelled)


def sampling(manifests: str) -> Record:
    """Draw the sample of frames for K-means; the result is the number of batches."""
    with Recorder() as recorder:
        counted = Counted(layer_extractor(PRETRAINED, 1, GPU))
        with recorder.recording("sampling"):
            sample_frames(counted.extractor, cuts(manifests), 1000, 0, batch_frames=BATCH_FRAMES)
    return recorder.record(counted.batches)


def units(manifests: str) -> Record:
    """Compute the units of a corpus; the result is the number of batches."""
    with Recorder() as recorder:
        counted = Counted(layer_extractor(PRETRAINED, 1, GPU))
        of_audio = Units(counted.extractor, torch.zeros(20, counted.extractor.shape[0]))
        with recorder.recording("units"):
            list(of_audio.of_cuts([cuts(manifests)], batch_duration=20.0))
    return recorder.record(counted.batches)


def transcription(manifests: str) -> Record:
    """Transcribe a corpus greedily; the result is the number of batches."""
    batches = 0
    with Recorder() as recorder:
        model = load_ctc(FINETUNED).to(GPU)

        def count(*arguments: object) -> None:
            nonlocal batches
            batches += 1

        model.register_forward_pre_hook(count)
        with recorder.recording("transcribing"):
            for rows in log_probabilities(model, [cuts(manifests)], batch_duration=20.0, progress="encoding"):
                for row in rows:
                    greedy(row[None], torch.tensor([len(row)]), model.vocabulary)
    return recorder.record(batches)


def kmeans(rows: int = 30_000, dim: int = 24, clusters: int = 16, on_gpu: bool = True, **options: int) -> Record:
    """Fit K-means; the result is the number of rounds of Lloyd's algorithm.

    Args:
        rows: Rows of the sample.
        dim: Dimensions.
        clusters: Clusters.
        on_gpu: Whether the rows lie on the GPU, not in the host's memory.
        **options: Arguments of `KMeans`.
    """
    rounds: list[float] = []
    with Recorder() as recorder:
        sample = torch.zeros(rows, dim, device=GPU if on_gpu else "cpu")
        with recorder.recording("kmeans"):
            KMeans(**options).fit(sample, clusters, 0, device=GPU, report=rounds.append)
    return recorder.record(len(rounds))
