"""HuBERT (Hsu et al. 2021, arXiv 2106.07447) as a PyTorch Lightning application.

The names a notebook wants are imported when they are first used: importing torch and Lightning takes seconds.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hubert_lightning.model.config import EncoderConfig
    from hubert_lightning.model.hubert import HubertEncoder
    from hubert_lightning.pretrained.load import load_encoder
    from hubert_lightning.training.callbacks.layer_quality import LayerQuality
    from hubert_lightning.training.callbacks.peak_rate import PeakRateFinder
    from hubert_lightning.training.checkpoints import BestCheckpoints
    from hubert_lightning.training.datamodules import PretrainingData, TranscribedData
    from hubert_lightning.training.distributed import LayerwiseFSDP
    from hubert_lightning.training.finetuning import CTCFinetuning
    from hubert_lightning.training.pretraining import HubertPretraining
    from hubert_lightning.training.relabelling import Relabel
    from hubert_lightning.units.kmeans import KMeans, ScikitKMeans
    from hubert_lightning.units.unit_extractor import Units

__version__ = "0.1.0"

_HOMES = {
    "BestCheckpoints": "training.checkpoints",
    "CTCFinetuning": "training.finetuning",
    "EncoderConfig": "model.hubert",
    "HubertEncoder": "model.hubert",
    "HubertPretraining": "training.pretraining",
    "KMeans": "units.kmeans",
    "LayerQuality": "units.layer_quality",
    "LayerwiseFSDP": "training.distributed",
    "PeakRateFinder": "training.callbacks.peak_rate",
    "PretrainingData": "training.datamodules",
    "Relabel": "training.relabelling",
    "ScikitKMeans": "units.kmeans",
    "TranscribedData": "training.datamodules",
    "Units": "units.unit_extractor",
    "load_encoder": "pretrained.load",
}

__all__ = [
    "BestCheckpoints",
    "CTCFinetuning",
    "EncoderConfig",
    "HubertEncoder",
    "HubertPretraining",
    "KMeans",
    "LayerQuality",
    "LayerwiseFSDP",
    "PeakRateFinder",
    "PretrainingData",
    "Relabel",
    "ScikitKMeans",
    "TranscribedData",
    "Units",
    "load_encoder",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
