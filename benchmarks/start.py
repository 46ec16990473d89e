"""How long `hubert fit` takes before its first step, and in how much memory, with a manifest of a million lines.

    uv run python benchmarks/start.py --cuts 1000000

A thousand small files stand for the audio, and a thousand cuts of each for the lines; nothing is decoded. Each part
runs in a process of its own: pre-training (manifest, audio files, a finished label store, the plan of an epoch, its
first batches), fine-tuning (manifest, audio files, transcripts, plan), and what a loader process takes for itself
once it has asked for its share of an epoch's cuts. Times are of the second reading of the files.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import soundfile
from lhotse import MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource

from hubert_lightning.data.manifest import fingerprint, write_manifest
from hubert_lightning.frames import SAMPLE_RATE, num_frames
from hubert_lightning.training.finetuning_data import TranscribedData
from hubert_lightning.training.pretraining_data import PretrainingData
from hubert_lightning.units.label_shards import LabelSource
from hubert_lightning.units.label_writer import LabelWriter, shards_of
from hubert_lightning.vocabulary import Vocabulary

SECONDS = 12.5
FILES = 1_000
CLUSTERS = 100
TEXT = "MISTER QUILTER IS THE APOSTLE OF THE MIDDLE CLASSES AND WE ARE GLAD TO WELCOME HIS GOSPEL"


def make(folder: Path, number: int) -> None:
    """A manifest of so many lines, and a label store of its first hundred cuts, which stands for all."""
    each = max(1, number // FILES)
    samples = round(SECONDS * SAMPLE_RATE)
    silence = np.zeros(16, np.int16)

    def cuts() -> Any:
        for file in range(-(-number // each)):
            path = folder / f"{file:04}.flac"
            soundfile.write(path, silence, SAMPLE_RATE)
            length = each * samples
            sources = [AudioSource("file", [0], str(path))]
            recording = Recording(path.stem, sources, SAMPLE_RATE, length, length / SAMPLE_RATE)
            for piece in range(each):
                cut_id = f"speaker-{file:04}-utterance-{piece:06}"
                said = SupervisionSegment(cut_id, path.stem, 0.0, SECONDS, text=TEXT, speaker=path.stem)
                start = piece * SECONDS
                yield MonoCut(cut_id, start, SECONDS, 0, [said], recording=recording, custom={"bytes": _size(path)})

    write_manifest(cuts(), folder / "train.jsonl.gz")


def _size(path: Path) -> int:
    return path.stat().st_size


def label(folder: Path) -> None:
    """Labels of all cuts, as `hubert fit` leaves them."""
    data = PretrainingData([folder / "train.jsonl.gz"], num_workers=0)
    data.setup("fit")
    cuts = list(data.train_cuts)
    source = LabelSource("mfcc", "kmeans", fingerprint(cuts), (CLUSTERS,))
    clusters = np.random.default_rng(0).integers(CLUSTERS, size=(1, num_frames(cuts[0].num_samples)), dtype=np.uint16)
    shards = shards_of(cuts)
    with LabelWriter(folder / "labels", source, len(shards)) as writer:
        for shard, labelled in enumerate(shards):
            writer.write(shard, {cut.id: clusters for cut in labelled})


def measured(name: str, what: Callable[[], Any]) -> Any:
    began, computed = time.perf_counter(), time.process_time()
    result = what()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    took, computed = time.perf_counter() - began, time.process_time() - computed
    print(f"  {name:34} {took:7.1f} s, {computed:7.1f} s of CPU   peak {peak:5.2f} GB", flush=True)
    return result


def start(data: Any, model: Any) -> None:
    """What `hubert fit` does with a data module before its first step."""
    data.trainer = SimpleNamespace(
        lightning_module=model,
        global_rank=0,
        world_size=1,
        accumulate_grad_batches=1,
        strategy=SimpleNamespace(root_device=SimpleNamespace(type="cpu")),
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(processed=0)))
        ),
    )
    measured("reading and checking the manifest", lambda: data.setup("fit"))
    loader = measured("labels or letters, planning", data.train_dataloader)
    plans = iter(loader.sampler)
    measured("first batch of an epoch", lambda: next(plans))
    measured("the others", lambda: sum(1 for _ in plans))
    cuts = loader.dataset.cuts
    share = list(range(0, len(cuts), 4))
    np.random.default_rng(0).shuffle(share)
    told, tell = os.pipe()
    if not os.fork():
        if loader.worker_init_fn:
            loader.worker_init_fn(0)
        before = _own_memory()
        for place in share:
            _ = cuts[place].num_samples
        used = _own_memory()
        gc.collect()
        os.write(tell, json.dumps([used - before, _own_memory() - before]).encode())
        os._exit(0)
    used, collected = json.loads(os.read(told, 1000))
    print(f"  one of four loader processes copies {used:.2f} GB in an epoch, {collected:.2f} GB once it collects")


def _own_memory() -> float:
    """GB that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cuts", type=int, default=1_000_000)
    parser.add_argument("--part", choices=["label", "pretraining", "finetuning"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where the manifest is, or goes; a temporary one if not given")
    asked = parser.parse_args()
    if asked.part == "label":
        label(asked.folder)
    elif asked.part == "pretraining":
        data = PretrainingData([asked.folder / "train.jsonl.gz"], labels=asked.folder / "labels", num_workers=4)
        start(data, SimpleNamespace(num_clusters=[CLUSTERS]))
    elif asked.part == "finetuning":
        encoder = SimpleNamespace(config=SimpleNamespace(dim=768))
        tuned = TranscribedData([asked.folder / "train.jsonl.gz"], num_workers=4)
        start(tuned, SimpleNamespace(vocabulary=Vocabulary(), encoder=encoder))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = asked.folder or Path(temporary)
            if not (folder / "labels" / "store.json").exists():
                folder.mkdir(exist_ok=True)
                make(folder, asked.cuts)
                _in_a_process(folder, "label")
            size = _size(folder / "train.jsonl.gz") / 2**20
            print(f"{asked.cuts} lines, {size:.0f} MiB compressed")
            for part in ("pretraining", "finetuning"):
                print(part, flush=True)
                _in_a_process(folder, part)


def _in_a_process(folder: Path, part: str) -> None:
    subprocess.run([sys.executable, __file__, "--folder", str(folder), "--part", part], check=True)


if __name__ == "__main__":
    main()
