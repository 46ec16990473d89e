"""HuBERT (Hsu et al. 2021, arXiv 2106.07447) as a PyTorch Lightning application.

The names a notebook wants are imported when they are first used: importing torch and Lightning takes seconds.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hubert_lightning.checkpoints import BestCheckpoints
    from hubert_lightning.clustering.kmeans import KMeans, ScikitKMeans
    from hubert_lightning.data.datamodule import PretrainingData, TranscribedData
    from hubert_lightning.finetuning import CTCFinetuning
    from hubert_lightning.model.hubert import EncoderConfig, HubertEncoder
    from hubert_lightning.model.pretrained import load_encoder
    from hubert_lightning.peak_rate import PeakRateFinder
    from hubert_lightning.pretraining import HubertPretraining
    from hubert_lightning.relabelling import Relabel
    from hubert_lightning.sharding import LayerwiseFSDP
    from hubert_lightning.unit_quality import LayerQuality
    from hubert_lightning.units import Units

__version__ = "0.1.0"

_HOMES = {
    "BestCheckpoints": "checkpoints",
    "CTCFinetuning": "finetuning",
    "EncoderConfig": "model.hubert",
    "HubertEncoder": "model.hubert",
    "HubertPretraining": "pretraining",
    "KMeans": "clustering.kmeans",
    "LayerQuality": "unit_quality",
    "LayerwiseFSDP": "sharding",
    "PeakRateFinder": "peak_rate",
    "PretrainingData": "data.datamodule",
    "Relabel": "relabelling",
    "ScikitKMeans": "clustering.kmeans",
    "TranscribedData": "data.datamodule",
    "Units": "units",
    "load_encoder": "model.pretrained",
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
