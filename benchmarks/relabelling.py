"""Relabelling as we do it against dump, fit and apply, as the reference does, with one encoder on the same audio.

    uv run hubert demo --minutes 60 --steps 1 --output demo     # makes an hour of speech
    uv run python benchmarks/relabelling.py --manifest demo/manifests/train.jsonl.gz
    uv run python benchmarks/relabelling.py --manifest demo/manifests/train.jsonl.gz --memory 1 20
    uv run python benchmarks/relabelling.py --manifest demo/manifests/train.jsonl.gz --times 20 \\
        --base_layer 6 --device cuda --precision bf16 --num_workers 8
    uv run python benchmarks/relabelling.py --manifest demo/manifests/train.jsonl.gz --times 1 --mfcc --num_workers 4

Prints seconds of each part, the ratio of the wholes, and the bytes of features that came to lie on disk. With
`--memory`, relabels the manifest so many times over, each in a process of its own, and prints the peak memory. The
encoder is a small one, or with `--base_layer` HuBERT Base, of random weights; `--mfcc` relabels as iteration 1 does.
With `--times`, the processor seconds of labelling are printed too: of this process, and of those that read audio.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.features.extract import extract
from hubert_lightning.features.extractors import Extractor, all_layers_extractor, mfcc_extractor
from hubert_lightning.features.sample import sample_frames
from hubert_lightning.frames import num_frames, seconds_to_samples
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.units.kmeans import KMeans, ScikitKMeans, assign
from hubert_lightning.units.label_recipe import assign_clusters
from hubert_lightning.units.label_shards import LabelSource
from hubert_lightning.units.label_writer import LabelWriter, shards_of

SMALL = EncoderConfig(conv_channels=64, dim=128, num_layers=2, num_heads=4, ffn_dim=512, pos_kernel=32)
BATCH_FRAMES = 1000


@contextmanager
def timed(what: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - start


def second_layer(encoder: HubertEncoder) -> Extractor:
    whole = all_layers_extractor(encoder)
    return Extractor(lambda *batch: whole.features(*batch)[:, :, 1], "layer 2", (encoder.config.dim,))


def layer_of_base(layer: int, device: str, precision: str) -> Extractor:
    """As `layer_extractor` makes one of a checkpoint."""
    encoder = HubertEncoder(EncoderConfig()).eval().to(device)

    def features(waveform: Tensor, length: Tensor, statistics: object = None) -> Tensor:
        padded = None if bool((length == length[0]).all()) else length.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            return encoder.features(waveform.to(device), padded, layer=layer, ignore_padding=True)

    return Extractor(features, f"layer {layer} of Base", (encoder.config.dim,), torch.device(device))


def ours(
    extractor: Extractor,
    cuts: list[Cut],
    clusters: int,
    max_frames: int,
    folder: Path,
    batch_frames: int = BATCH_FRAMES,
    num_workers: int = 0,
) -> tuple[dict[str, float], tuple[float, float]]:
    """Relabel; returns the seconds of each part, and the processor seconds of labelling, here and in workers."""
    seconds: dict[str, float] = {}
    with timed("sample", seconds):
        rows, _ = sample_frames(extractor, cuts, max_frames, 0, batch_frames=batch_frames, num_workers=num_workers)
    with timed("fit", seconds):
        centroids = KMeans().fit(rows.to(extractor.device), clusters, 0)
    before = processor_seconds()
    with timed("encode, assign, write", seconds):
        source = LabelSource("layer 2", "k", "m", (clusters,))
        shards = shards_of(cuts)
        labels = assign_clusters(extractor, [(slice(None), centroids)], shards, batch_frames, num_workers)
        with LabelWriter(folder, source, len(shards)) as writer:
            for shard, clusters_of_cuts in enumerate(labels):
                writer.write(shard, clusters_of_cuts)
    here, workers = (after - first for after, first in zip(processor_seconds(), before, strict=True))
    return seconds, (here, workers)


def processor_seconds() -> tuple[float, float]:
    """Seconds that this process has computed, and those that its finished children have."""
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    here, children = (usage.ru_utime + usage.ru_stime for usage in usages)
    return here, children


@torch.no_grad()
def dump_fit_apply(
    encoder: HubertEncoder, cuts: list[Cut], clusters: int, max_frames: int, folder: Path
) -> tuple[dict[str, float], int]:
    """The three programs of the reference, without the time that they take to start."""
    seconds: dict[str, float] = {}
    features = folder / "features.npy"
    lengths = [num_frames(cut.num_samples) for cut in cuts]
    with timed("dump", seconds):
        dumped = np.lib.format.open_memmap(features, "w+", np.float32, (sum(lengths), encoder.config.dim))
        end = 0
        for cut, length in zip(cuts, lengths, strict=True):
            dumped[end : end + length] = encoder.features(read_waveform(cut)[None], layer=2)[0].numpy()
            end += length
        dumped.flush()
    with timed("fit", seconds):
        rng = np.random.default_rng(0)
        chosen = np.sort(rng.permutation(len(dumped))[:max_frames])
        centroids = ScikitKMeans().fit(torch.from_numpy(np.load(features, mmap_mode="r")[chosen]), clusters, 0)
    with timed("apply", seconds):
        rows, end = np.load(features, mmap_mode="r"), 0
        with (folder / "train.km").open("w") as file:
            for length in lengths:
                found = assign(torch.from_numpy(np.array(rows[end : end + length])), centroids)
                file.write(" ".join(map(str, found.tolist())) + "\n")
                end += length
    return seconds, features.stat().st_size


def cost_of_assigning(encoder: HubertEncoder, cuts: list[Cut], clusters: int) -> float:
    """Share of the time of encoding that assigning adds to it; the two take turns."""
    encoding = assigning = 0.0
    centroids = torch.randn(clusters, encoder.config.dim)
    start = time.perf_counter()
    for _, _, features in extract(second_layer(encoder), [cuts], BATCH_FRAMES, "encode"):
        encoding += time.perf_counter() - start
        start = time.perf_counter()
        assign(features, centroids)
        assigning += time.perf_counter() - start
        start = time.perf_counter()
    return assigning / encoding


def only_ours(extractor: Extractor, cuts: list[Cut], args: argparse.Namespace, folder: Path) -> None:
    batch_frames = num_frames(seconds_to_samples(args.batch_duration))
    for _ in extract(extractor, [cuts[:20]], batch_frames, "warming up"):
        pass
    cuts = repeated(cuts, args.times)
    hours = sum(cut.duration for cut in cuts) / 3600
    seconds, (here, workers) = ours(
        extractor, cuts, args.clusters, args.max_frames, folder, batch_frames, args.num_workers
    )
    words = ", ".join(f"{what} {took:.1f} s" for what, took in seconds.items())
    labelled = hours * 3600 / seconds["encode, assign, write"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{extractor.name} on {extractor.device}: {hours:.1f} h, {len(cuts)} utterances: {sum(seconds.values()):.0f} s"
    )
    print(f"({words}), labelled {labelled:.0f} times as fast as it was said; peak memory {peak:.0f} MiB")
    print(f"processor seconds of labelling, for each hour: {here / hours:.2f} here, {workers / hours:.2f} in workers")


def repeated(cuts: list[Cut], times: int) -> list[Cut]:
    return [cut.with_id(f"{copy}-{cut.id}") for copy in range(times) for cut in cuts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--max_frames", type=int, default=100_000)
    parser.add_argument("--memory", type=int, nargs="*", default=[])
    parser.add_argument("--times", type=int, default=0, help="only ours, the manifest so many times over")
    parser.add_argument("--mfcc", action="store_true", help="with --times: of MFCCs")
    parser.add_argument("--base_layer", type=int, help="with --times: of HuBERT Base, not of a small encoder")
    parser.add_argument("--device", default="cpu", help="with --base_layer")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32", help="with --base_layer")
    parser.add_argument("--batch_duration", type=float, default=20.0, help="with --times: seconds, at once")
    parser.add_argument("--num_workers", type=int, default=0, help="with --times: processes that read audio")
    args = parser.parse_args()
    if args.memory:
        for times in args.memory:
            alone = [sys.executable, __file__, "--manifest", str(args.manifest), "--times", str(times)]
            more = ["--clusters", str(args.clusters), "--max_frames", str(args.max_frames)]
            subprocess.run([*alone, *more], check=True)
        return
    torch.manual_seed(0)
    encoder, cuts = HubertEncoder(SMALL).eval(), list(read_manifest(args.manifest))
    settings = (args.clusters, args.max_frames)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.times:
            extractor = second_layer(encoder)
            if args.mfcc:
                extractor = mfcc_extractor()
            elif args.base_layer:
                extractor = layer_of_base(args.base_layer, args.device, args.precision)
            only_ours(extractor, cuts, args, folder)
            return
        hours = sum(cut.duration for cut in cuts) / 3600
        print(f"{hours:.2f} h, {args.clusters} clusters of {args.max_frames} frames, {torch.get_num_threads()} threads")
        mine, _ = ours(second_layer(encoder), cuts, *settings, folder / "labels")
        theirs, size = dump_fit_apply(encoder, cuts, *settings, folder)
        for name, parts, on_disk in (("ours", mine, 0), ("dump, fit, apply", theirs, size)):
            words = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in parts.items())
            print(f"{name}: {sum(parts.values()):.1f} s ({words}), {on_disk / 1e6:.0f} MB of features on disk")
        print(f"ours is {sum(theirs.values()) / sum(mine.values()):.2f} times as fast")
        print(f"assigning costs {100 * cost_of_assigning(encoder, cuts[:200], args.clusters):.1f} % of encoding")


if __name__ == "__main__":
    main()
