"""What a user waits for is quality, not steps: iteration 1 of our recipe for small models against minimal-hubert's.

    uv run python benchmarks/time_to_quality.py --minimal_hubert CHECKOUT --peer_python PYTHON3.12

Both train the model of configs/demo.yaml on the demo's speech and on the same labels, ours with `hubert fit`, the peer
with its own loop and settings (minimal_hubert_small.py). One of them runs at a time, in turns of a few seconds, and the
other is paused, so both get the same machine. Prints the PNMI of each layer's K-means and the accuracy at masked
frames, of held-out speakers and by the same code, against the seconds that each was running since its training began,
and the seconds of processors that it used, which other work on the machine changes less.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.demo.synthesis import synthesise_corpus
from hubert_lightning.features.extractors import all_layers_extractor
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.pretrained.dialect import to_ours
from hubert_lightning.pretrained.formats.transformers import DIALECT
from hubert_lightning.training.batches import PretrainingBatches
from hubert_lightning.training.pretraining import HubertPretraining
from hubert_lightning.training.sampler import BatchPlan
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.layer_quality import layer_quality

BENCHMARKS = Path(__file__).parent
RECIPE = BENCHMARKS.parent / "configs" / "demo.yaml"
CLUSTERS = 100
NAMES = {
    "feature_projection.0.": "feature_projection.",
    ".convs.0.": ".conv.",
    ".attention.qkv.": ".query_key_value.",
    ".attention.proj.": ".attention_output.",
    "mask_embedding": "masked_spec_embed",
    "logit_generator.label_embeddings": "predictors.0.codewords",
    "logit_generator.final_proj.": "predictors.0.projection.",
}
"""Names of minimal-hubert's parameters, as train_step.py has them, and those in transformers or here."""


class Usage(NamedTuple):
    """What a training has used at a time, in seconds."""

    time: float
    running: float
    processor: float


class Snapshot(NamedTuple):
    """Weights, what their training had used until then in seconds, and their quality."""

    step: int
    seconds: float
    processor: float
    pnmi: list[float]  # of each layer
    accuracy: float  # at masked frames, percent


class Contestant(NamedTuple):
    """A training, its folder of snapshots, and the file that it writes when its training begins."""

    process: subprocess.Popen[bytes]
    snapshots: Path
    start: Path


def hubert_fit(work: Path, name: str, manifests: Path, precision: str, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "hubert_lightning", "fit", "--config", str(RECIPE), f"--output={work / name}"),
        f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
        f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
        f"--trainer.precision={'bf16-mixed' if precision == 'bf16' else '32-true'}",
        *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0"),
        *more,
    ]


def export_labels(store: LabelStore, manifest: Path, out: Path) -> None:
    """Write the labels of the utterances that ours trains on, as minimal-hubert's loader reads them."""
    with out.open("w") as file:
        for cut in read_manifest([manifest]):
            if cut.id not in store:  # shorter than min_duration
                continue
            [source] = cut.recording.sources
            assert cut.start == 0
            line = {"fileid": cut.id, "path": source.source, "num_samples": cut.num_samples}
            file.write(json.dumps(line | {"units": store[cut.id][0].tolist()}) + "\n")


def take_turns(contestants: Mapping[str, Contestant], seconds: float, turn: float) -> dict[str, list[Usage]]:
    """Let one training run at a time until all have had their seconds; returns what each had used, twice a second.

    Ends when one of them has failed.
    """
    usage: dict[str, list[Usage]] = {name: [Usage(time.time(), 0.0, 0.0)] for name in contestants}
    for of in contestants.values():
        os.killpg(of.process.pid, signal.SIGSTOP)
    try:
        while True:
            waiting = [
                name
                for name, of in contestants.items()
                if of.process.poll() is None and used(usage[name], of.start, time.time())[0] < seconds
            ]
            if not waiting or any(of.process.poll() for of in contestants.values()):
                return usage
            for name in waiting:
                run_for(contestants[name].process, turn, usage[name])
    finally:
        for of in contestants.values():
            if of.process.poll() is None:
                os.killpg(of.process.pid, signal.SIGKILL)
                of.process.wait()


def run_for(process: subprocess.Popen[bytes], turn: float, usage: list[Usage]) -> None:
    before, start = usage[-1].running, time.time()
    usage.append(Usage(start, before, usage[-1].processor))
    os.killpg(process.pid, signal.SIGCONT)
    while (now := time.time()) < start + turn:
        try:
            process.wait(min(0.5, start + turn - now))
            return
        except subprocess.TimeoutExpired:
            usage.append(Usage(time.time(), before + time.time() - start, processor_seconds(process.pid)))
    os.killpg(process.pid, signal.SIGSTOP)


def processor_seconds(group: int) -> float:
    """Seconds of user and system that the processes of a group, and those that they waited for, have used (Linux)."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15])) if int(fields[2]) == group else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def used(usage: list[Usage], first: Path, end: float) -> tuple[float, float]:
    """Running and processor seconds from the modification of a file to a time, 0 while there is no such file."""
    if not first.exists():
        return 0.0, 0.0
    times, *amounts = zip(*usage, strict=True)
    running, processor = (np.diff(np.interp([first.stat().st_mtime, end], times, of))[0] for of in amounts)
    return float(running), float(processor)


def weights_of(snapshot: Path, ours: bool) -> dict[str, Tensor]:
    state = torch.load(snapshot, weights_only=True, map_location="cpu")
    if ours:
        weights: dict[str, Tensor] = state["state_dict"]
        return weights
    renamed = {}
    for parameter, value in state.items():
        for theirs, name in NAMES.items():
            parameter = parameter.replace(theirs, name)
        renamed[parameter] = value
    renamed.pop("logit_generator.logit_temp", None)
    head = {name: value for name, value in renamed.items() if name.startswith("predictors.")}
    body = {name: value for name, value in renamed.items() if name not in head}
    return head | {f"encoder.{name.removeprefix('encoder.')}": value for name, value in to_ours(body, DIALECT).items()}


def quality_of(
    snapshot: Path, ours: bool, settings: dict[str, Any], dev: Path, store: LabelStore
) -> tuple[list[float], float]:
    """PNMI of each layer and accuracy at masked frames, in percent, of held-out speakers."""
    config = EncoderConfig(**settings["encoder"] | {"normalize_waveform": not ours})
    model = HubertPretraining(config, CLUSTERS, settings["final_dim"])
    model.load_state_dict(weights_of(snapshot, ours))
    model.eval()
    cuts = list(read_manifest([dev]))
    layers = layer_quality(all_layers_extractor(model.encoder), cuts, CLUSTERS, 20_000)
    batches = PretrainingBatches(cuts, store, max_crop_frames=125, mask_prob=0.8, mask_length=10)
    right = frames = 0.0
    with torch.no_grad():
        for number in islice(range(0, len(cuts) - 8, 8), 12):
            batch = batches[BatchPlan(tuple(range(number, number + 8)), number)]
            _, metrics = model._step(batch, every_frame=True)
            right += float(metrics["masked_accuracy"]) * batch.num_masked
            frames += batch.num_masked
    return [layer.pnmi for layer in layers], 100 * right / frames


def started(
    args: argparse.Namespace, work: Path, manifests: Path, store: LabelStore, settings: dict[str, Any]
) -> dict[str, Contestant]:
    saving = {"dirpath": str(work / "snapshots"), "filename": "{step}", "every_n_train_steps": args.every}
    saving |= {"save_top_k": -1, "save_weights_only": True}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}
    ours = hubert_fit(
        *(work, "ours", manifests, args.precision, "--iterations=[]", f"--data.init_args.labels={store.path}"),
        *(f"--model.init_args.num_clusters={CLUSTERS}", f"--trainer.max_steps={args.steps}"),
        f"--trainer.callbacks={json.dumps([callback])}",
    )
    export_labels(store, manifests / "train.jsonl.gz", work / "labels.jsonl")
    names = ("conv_channels", "dim", "num_layers", "num_heads", "ffn_dim", "pos_kernel")
    sizes = {name: settings["encoder"][name] for name in names} | {"final_dim": settings["final_dim"]}
    peer = [
        *(args.peer_python, str(BENCHMARKS / "minimal_hubert_small.py"), str(args.minimal_hubert)),
        *(str(work / "labels.jsonl"), str(work / "peer"), "--sizes", json.dumps(sizes)),
        *("--steps", str(args.steps), "--every", str(args.every), "--precision", args.precision),
        *(["--compile"] if args.compile else []),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    of_peer = subprocess.Popen(peer, start_new_session=True, env=environment)
    of_ours = subprocess.Popen(ours, start_new_session=True, stdout=subprocess.DEVNULL)
    return {
        "ours": Contestant(of_ours, work / "snapshots", work / "ours" / "record.json"),
        "minimal-hubert": Contestant(of_peer, work / "peer", work / "peer" / "start"),
    }


def report(results: Mapping[str, list[Snapshot]], layer: int) -> None:
    """Print all snapshots, and when each training first had the PNMI that both reached in one layer."""
    table = Table("", "step", "seconds", "of processors", "PNMI of layers", "masked accuracy, %")
    for name, snapshots in results.items():
        for step, seconds, processor, pnmi, accuracy in snapshots:
            layers = " ".join(f"{value:.3f}" for value in pnmi)
            table.add_row(name, str(step), f"{seconds:.0f}", f"{processor:.0f}", layers, f"{accuracy:.1f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    best = {name: max(of.pnmi[layer - 1] for of in snapshots) for name, snapshots in results.items()}
    common = min(best.values())
    for name, snapshots in results.items():
        first = next(of for of in snapshots if of.pnmi[layer - 1] >= common)
        when = f"{first.seconds:.0f} s ({first.processor:.0f} of processors)"
        print(f"{name}: layer {layer} has a PNMI of {common:.3f} after {when}, and at best {best[name]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minimal_hubert", type=Path, required=True, help="a checkout of minimal-hubert")
    parser.add_argument("--peer_python", required=True, help="a Python 3.12 that has what it requires")
    parser.add_argument("--corpus", type=Path, default=Path("demo"), help="the demo's folder, made if it is not there")
    parser.add_argument("--minutes", type=float, default=60.0, help="of training audio")
    parser.add_argument("--steps", type=int, default=2000, help="over which both schedules run")
    parser.add_argument("--every", type=int, default=200, help="steps from one snapshot to the next")
    parser.add_argument("--seconds", type=float, default=240.0, help="that each may train")
    parser.add_argument("--turn", type=float, default=5.0, help="seconds of a turn")
    parser.add_argument("--compile", action="store_true", help="the peer, as its recipe does; the clock runs meanwhile")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="bf16")
    args = parser.parse_args()
    recipe = yaml.safe_load(RECIPE.read_text())
    settings = recipe["model"]["init_args"]
    manifests = synthesise_corpus(args.corpus, args.minutes, min(args.minutes, 10.0))
    print(f"load {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} cores, {args.precision}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        first = "--iterations=[{features: mfcc, clusters: 100, max_frames: 60000, max_steps: 1}]"
        subprocess.run(
            hubert_fit(work, "labels", manifests, args.precision, first, "--trainer.callbacks=null"), check=True
        )
        store = LabelStore(work / "labels" / "iteration1" / "labels")
        contestants = started(args, work, manifests, store, settings)
        usage = take_turns(contestants, args.seconds, args.turn)
        print(f"load {os.getloadavg()[0]:.1f} at the end")
        if failed := [name for name, of in contestants.items() if of.process.returncode not in (0, -signal.SIGKILL)]:
            raise SystemExit(f"{', '.join(failed)} failed; see its error above")
        if early := [name for name, of in contestants.items() if not list(of.snapshots.glob("step=*"))]:
            raise SystemExit(f"{', '.join(early)} has no snapshot yet; give more --seconds, or a smaller --every")
        results: dict[str, list[Snapshot]] = {name: [] for name in contestants}
        for name, of in contestants.items():
            for path in sorted(of.snapshots.glob("step=*"), key=lambda path: path.stat().st_mtime):
                seconds = used(usage[name], of.start, path.stat().st_mtime)
                quality = quality_of(path, name == "ours", settings, manifests / "dev.jsonl.gz", store)
                results[name].append(Snapshot(int(path.stem.removeprefix("step=")), *seconds, *quality))
    report(results, recipe["iterations"][1]["layer"])


if __name__ == "__main__":
    main()
