"""Seconds of one core that the pictures of a validation take: predictions, figures, and logging to an offline W&B run.

    uv run python benchmarks/pictures.py
    uv run python benchmarks/pictures.py --seconds 10 --clusters 500 --utterances 4

Utterances are noise with random labels and phones, which take as long as speech. The encoder is HuBERT Base on the
CPU. Time is that of the processor, so other work beside it does not count.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger

from hubert_lightning.features.spectrogram import log_mel
from hubert_lightning.frames import SAMPLE_RATE, num_frames
from hubert_lightning.training.media import log_figures
from hubert_lightning.training.pretraining import HubertPretraining
from hubert_lightning.units.figures import (
    LayerCurve,
    UtteranceUnits,
    layer_figure,
    palette,
    phone_cluster_figure,
    utterance_figure,
)

PHONES = [f"P{number}" for number in range(40)]


def utterance(waveform: torch.Tensor, clusters: int, rng: np.random.Generator) -> UtteranceUnits:
    frames, duration = num_frames(len(waveform)), len(waveform) / SAMPLE_RATE
    labels = np.repeat(rng.integers(clusters, size=frames), 3)[:frames].tolist()
    phones = [(str(rng.choice(PHONES)), start, start + 0.08) for start in np.arange(0, duration - 0.08, 0.08).tolist()]
    spans = [(first, 10) for first in range(5, frames - 10, 20)]
    spectrogram = log_mel(waveform).numpy()
    return UtteranceUnits("id", "A TRANSCRIPT", duration, spectrogram, phones, [labels], [labels[::-1]], spans)


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median of several rounds, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    rng = np.random.default_rng(0)
    waveform = 0.1 * torch.randn(round(options.seconds * SAMPLE_RATE))
    counts = rng.integers(1000, size=(len(PHONES), options.clusters))
    colours = palette(options.clusters, PHONES, counts)
    curves = [LayerCurve(f"iteration {number}", rng.random(12).tolist()) for number in (1, 2)]
    model = HubertPretraining(num_clusters=options.clusters).eval()
    mask = torch.rand(1, num_frames(len(waveform))) < 0.5
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        loggers = [WandbLogger(project="pictures", save_dir=folder)]
        drawn = {
            "utterances": lambda: {
                str(number): utterance_figure(utterance(waveform, options.clusters, rng), [colours])
                for number in range(options.utterances)
            },
            "layers": lambda: {"": layer_figure(curves, "PNMI", 100)},
            "phones by cluster (once)": lambda: {"": phone_cluster_figure(PHONES, counts)},
        }
        predicting = options.utterances * seconds(lambda: model(waveform[None], mask), options.rounds)
        print(f"{'prediction':30}{predicting:8.2f} s")
        for name, draw in drawn.items():
            print(f"{name:30}{seconds(lambda draw=draw: log_figures(loggers, 'x', draw, 0), options.rounds):8.2f} s")  # type: ignore[misc]
        loggers[0].experiment.finish()


if __name__ == "__main__":
    main()
