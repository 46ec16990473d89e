"""Batches of pre-training against bare decoding of the same files, one core each: hours of audio a second.

    uv run hubert demo --minutes 60 --steps 1 --output demo     # makes an hour of speech
    uv run python benchmarks/loader.py --manifest demo/manifests/train.jsonl.gz
    uv run python benchmarks/loader.py --manifest demo/manifests/train.jsonl.gz --workers 2

Bare is soundfile.read of every file from its beginning to its end. Ours is an epoch of batches: planned, read (from
files and from Shar archives), cropped at random, masked, with their labels. The three take turns; medians. Also
the time that it takes to plan an epoch of 281 241 utterances, as many as LibriSpeech has, and of 20 million in blocks.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from torch.utils.data import DataLoader

from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.data.shar import SharCuts, prepare_shar
from hubert_lightning.frames import SAMPLE_RATE, num_frames, seconds_to_samples
from hubert_lightning.training.batches import PretrainingBatches
from hubert_lightning.training.sampler import PlannedBatches
from hubert_lightning.units.label_shards import LabelSource
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.label_writer import LabelWriter

MAX_CROP = num_frames(seconds_to_samples(15.625))


def decode(cuts: Sequence[Cut]) -> float:
    """Hours in the files of these cuts."""
    samples = 0
    for cut in cuts:
        audio, _ = soundfile.read(cut.recording.sources[0].source, dtype="float32")
        samples += len(audio)
    return samples / SAMPLE_RATE / 3600


def an_epoch(cuts: Sequence[Cut], labels: LabelStore, epoch: int, workers: int) -> float:
    """Hours in the batches of an epoch."""
    frames = [min(num_frames(cut.num_samples), MAX_CROP) for cut in cuts]
    plans = PlannedBatches(frames, num_frames(seconds_to_samples(87.5)), seed=epoch)
    batches = PretrainingBatches(cuts, labels, max_crop_frames=MAX_CROP, mask_prob=0.8, mask_length=10)
    loader = DataLoader(batches, sampler=plans, batch_size=None, collate_fn=lambda batch: batch, num_workers=workers)
    return sum(batch.waveform.numel() for batch in loader) / SAMPLE_RATE / 3600


def some_labels(cuts: Sequence[Cut], folder: Path) -> LabelStore:
    rng = np.random.default_rng(0)
    source = LabelSource("mfcc", "k", "m", clusters=(500,))
    with LabelWriter(folder, source, num_shards=1) as writer:
        writer.write(0, {cut.id: rng.integers(500, size=(1, num_frames(cut.num_samples))) for cut in cuts})
    return LabelStore(folder)


def timed(work: Callable[[], float]) -> float:
    """Hours a second."""
    start = time.perf_counter()
    hours = work()
    return hours / (time.perf_counter() - start)


def plan(utterances: int, **options: int) -> float:
    """Seconds until an epoch is planned (with blocks: its first block)."""
    frames = np.clip(np.random.default_rng(0).gamma(8, 80, utterances), 100, MAX_CROP).astype(np.int32)
    start = time.perf_counter()
    batches = PlannedBatches(frames, num_frames(seconds_to_samples(87.5)), **options)
    next(iter(batches)) if options else batches.plan(0)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches; 0 is this one")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cuts = list(read_manifest(args.manifest))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        labels = some_labels(cuts, folder / "labels")
        (folder / "shar").mkdir()
        CutSet(cuts).to_shar(folder / "shar", fields={"recording": "flac"}, shard_size=1000)
        archived = SharCuts(prepare_shar(folder / "shar", folder))
        contestants: dict[str, Callable[[int], float]] = {
            "bare decoding": lambda epoch: decode(cuts),
            "batches from files": lambda epoch: an_epoch(cuts, labels, epoch, args.workers),
            "batches from archives": lambda epoch: an_epoch(archived, labels, epoch, args.workers),
        }
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for epoch in range(args.rounds):
            for name, work in contestants.items():
                rates[name].append(timed(lambda work=work, epoch=epoch: work(epoch)))
    hours = sum(cut.duration for cut in cuts) / 3600
    print(f"{hours:.2f} h, {len(cuts)} utterances; medians of {args.rounds} rounds; workers: {args.workers}")
    bare = statistics.median(rates["bare decoding"])
    for name, of in rates.items():
        rate = statistics.median(of)
        print(f"{name}: {rate:.2f} h of audio a second, {rate * 3600:.0f} times real time, {rate / bare:.2f} of bare")
    print(f"281 241 utterances planned in {plan(281_241):.2f} s")
    print(f"20 million, block by block: the first after {plan(20_000_000, block_cuts=100_000):.2f} s")


if __name__ == "__main__":
    main()
