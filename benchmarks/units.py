"""Units beside transformers: HuBERT Base with random weights, its layer 9, 500 clusters, the same recordings for all.

    python benchmarks/units.py FOLDER_OF_AUDIO [--seconds 120] [--rounds 3] [--memory 5 30]

Transformers are given one recording at a time, then the nearest centroid by `torch.cdist`: the whole model with
`output_hidden_states`, and a model that has only the layers that are needed. All read their files themselves. Rounds
are interleaved; what is printed are medians. Peak memory is that of a process of its own for each recording.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
import transformers
from torch import Tensor

from hubert_lightning import Units
from hubert_lightning.data.examine import examine
from hubert_lightning.pretrained.load import encoder_fingerprint, load_encoder
from hubert_lightning.units.kmeans_file import save_kmeans

LAYER, CLUSTERS, DIM = 9, 500, 768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=120, help="of audio, in whole files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="*", default=[5, 30], help="minutes of one recording")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model:
        found = list(Units.from_pretrained(args.model).of_cuts([examine([args.folder])[0]]))
        assert len(found) == 1
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    folder = Path(tempfile.mkdtemp())
    theirs, centroids = save_model(folder)
    if args.seconds > 0:
        compare(args, folder, theirs, centroids)
    for minutes in args.memory:
        path = folder / f"{minutes}.wav"
        write_noise(path, minutes)
        command = [sys.executable, __file__, path, "--model", folder]
        printed = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
        print(f"{minutes} minutes of one recording: peak memory {printed.split()[-1]} MiB", flush=True)


def compare(args: argparse.Namespace, folder: Path, theirs: transformers.HubertModel, centroids: Tensor) -> None:
    files, seconds = [], 0.0
    for file in sorted(args.folder.rglob("*.flac")):
        if seconds >= args.seconds:
            break
        files.append(file)
        seconds += soundfile.info(file).duration
    ours = Units.from_pretrained(folder, device="cpu")
    config = transformers.HubertConfig(num_hidden_layers=LAYER)
    fewer = transformers.HubertModel(config).eval()
    fewer.load_state_dict(theirs.state_dict(), strict=False)

    def by_verb() -> list[Tensor]:
        cuts, _, _ = examine(files)
        [found] = ours.of_cuts([cuts])
        return found

    def by_call() -> list[Tensor]:
        return [ours(*read(file)) for file in files]

    def by_transformers(model: transformers.HubertModel) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            found = []
            with torch.inference_mode():
                for file in files:
                    hidden = model(read(file)[0][None], output_hidden_states=True).hidden_states[LAYER][0]
                    found.append(torch.cdist(hidden, centroids).argmin(dim=1))
            return found

        return run

    systems = {
        "ours, files examined first": by_verb,
        "ours, call": by_call,
        "transformers": by_transformers(theirs),
        f"transformers, {LAYER} layers": by_transformers(fewer),
    }
    units = {name: torch.cat(run()) for name, run in systems.items()}  # also warms up
    took: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(args.rounds):
        for name, run in systems.items():
            start = time.perf_counter()
            run()
            took[name].append(time.perf_counter() - start)
    print(f"{len(files)} files, {seconds:.0f} s of audio, {torch.get_num_threads()} threads, torch {torch.__version__}")
    first = statistics.median(took["ours, files examined first"])
    for name, times in took.items():
        median = statistics.median(times)
        same = (units[name] == units["transformers"]).double().mean()
        print(
            f"{name:28} {median:7.2f} s, {seconds / median:6.1f} × real time, {median / first:.2f} of ours, "
            f"{100 * same:.2f} % of units as theirs"
        )


def read(file: Path) -> tuple[Tensor, int]:
    samples, rate = soundfile.read(file, dtype="float32")
    return torch.from_numpy(samples), rate


def save_model(folder: Path) -> tuple[transformers.HubertModel, Tensor]:
    torch.manual_seed(0)
    model = transformers.HubertModel(transformers.HubertConfig()).eval()
    model.save_pretrained(folder)
    encoder = load_encoder(folder)
    with torch.no_grad():
        rows = encoder.features(torch.randn(1, 16_000 * 20) / 10, layer=LAYER)[0]
    centroids = rows[torch.randperm(len(rows))[:CLUSTERS]] + 0.1 * torch.randn(CLUSTERS, DIM)
    source = {"features": f"layer {LAYER} of encoder {encoder_fingerprint(encoder)}"}
    save_kmeans(folder / "kmeans.safetensors", [centroids], source)
    return model, centroids


def write_noise(path: Path, minutes: int) -> None:
    rng = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", 16_000, 1, "PCM_16") as file:
        for _ in range(minutes):
            file.write(0.1 * rng.standard_normal(60 * 16_000))


if __name__ == "__main__":
    main()
