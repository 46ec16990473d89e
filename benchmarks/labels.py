"""A label store of 60 000 hours: how fast it opens, and how fast utterances are read at random.

    uv run python benchmarks/labels.py --hours 60000 --utterances 5000000

The index is real, written as `LabelWriter` writes it; the shards are sparse files of the right size, so that 21 GB of
labels need no disk.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from hubert_lightning.units.label_shards import LabelSource, id_digest
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.label_writer import shard_size


def simulated(folder: Path, utterances: int, frames: int) -> None:
    """A store of utterances `0`, `1`, … of equal length."""
    size = shard_size(utterances)
    index = np.empty((4, utterances), dtype=np.uint64)
    for number in range(utterances):
        shard, place = divmod(number, size)
        first, second = id_digest(str(number))
        index[:, number] = first, second, place * frames, (shard << 32) | frames
    np.save(folder / "index.npy", np.ascontiguousarray(index[:, np.lexsort((index[1], index[0]))]))
    sizes = []
    for shard, start in enumerate(range(0, utterances, size)):
        path = folder / f"{shard:05d}.npy"
        shape = (1, frames * min(size, utterances - start))
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": shape})
            file.truncate(file.tell() + 2 * shape[1])
        sizes.append(path.stat().st_size)
    source = LabelSource("simulated", "k", "m", (500,))
    about = {"bytes": sizes, "checksums": [0] * len(sizes), "index_checksum": 0, "histogram": [[1] * 500]}
    (folder / "store.json").write_text(json.dumps(source.described() | about))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=int, default=60_000)
    parser.add_argument("--utterances", type=int, default=5_000_000)
    parser.add_argument("--reads", type=int, default=200_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        simulated(folder, args.utterances, args.hours * 3600 * 50 // args.utterances)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        store = LabelStore(folder)
        opened = time.perf_counter() - start
        ids = [str(number) for number in np.random.default_rng(0).integers(args.utterances, size=args.reads)]
        for round_ in ("first", "second"):
            start = time.perf_counter()
            for cut_id in ids:
                labels = store[cut_id][0]
                labels[0], labels[-1]
            print(f"{round_}: {args.reads / (time.perf_counter() - start):,.0f} random reads a second, one process")
        index = (folder / "index.npy").stat().st_size / len(store)
        print(f"{len(store):,} utterances, {args.hours} h: opened in {1000 * opened:.1f} ms")
        print(f"index of {index:.1f} bytes an utterance")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(f"peak memory grew by {grown / 1024:.0f} MiB (pages of the maps that were touched)")


if __name__ == "__main__":
    main()
