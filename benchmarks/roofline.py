"""Predicted steps on a GPU that is not there: ours, minimal-hubert's, torchaudio's and transformers'.

    uv run python benchmarks/roofline.py --minimal_hubert PATH
    uv run python benchmarks/roofline.py --sizes base --seconds 87.5 350 --contestants ours --json roofline.json
    uv run python benchmarks/roofline.py --check_cpu --minimal_hubert PATH

Each contestant of train_step.py takes whole steps in bf16 on the phantom of tests/phantom, which records launches,
waits of the host and memory; ours is the step of the Trainer, with GlobalBatch. The model of cost in
hubert_lightning/planning prices them all: as they were launched, and "compiled", as if every run of pointwise
operations were one kernel. It needs a C compiler, no GPU.

`--check_cpu` tests the same model where there is something to measure: it records the steps of train_step.py on this
processor, prices them with this processor's own products (torch's, and oneDNN's, which ours uses in float32 and all use
for convolutions), copy and random numbers, and times them in turns.

minimal-hubert needs a checkout and the packages `spidr` and `huggingface-hub`; with Python 3.11, a copy without its
`type` statements is used.
"""

import argparse
import json
import logging
import re
import shutil
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "gpu"))

import torch
import train_step
from cpu_steps import measured_processor, median_of, recorded_on_cpu
from phantom.device import Phantom, missing
from phantom.record import Record
from phantom.recorder import Recorder
from rich.console import Console
from rich.table import Table

from hubert_lightning.frames import num_frames, seconds_to_samples
from hubert_lightning.model.devices import keep_freed_memory
from hubert_lightning.planning.devices import GIB, Device, device_named
from hubert_lightning.planning.memory import step_memory
from hubert_lightning.planning.network import sharded_seconds
from hubert_lightning.planning.recorded import eager_cost, fused_cost
from hubert_lightning.planning.workload import Workload

ROWS = {"base": 12.5, "large": 11.25, "xlarge": 11.25}
"""Seconds of each row of a batch."""
SECONDS = {"base": (87.5, 175.0, 350.0), "large": (56.25, 225.0), "xlarge": (22.5, 90.0, 180.0)}
"""Seconds of a batch: the recipe's, and larger ones."""
CLUSTERS = 500
ALLOWED = 0.30
"""Largest error of a prediction for a processor."""


@dataclass(frozen=True)
class Run:
    """A step to predict.

    Args:
        contestant: Name of train_step.py.
        size: base, large or xlarge.
        seconds: Audio of the batch.
        checkpointing: Whether layers are computed again.
        gpus: GPUs that share the parameters; 1 for no sharding.
    """

    contestant: str
    size: str
    seconds: float
    checkpointing: bool = False
    gpus: int = 1

    @property
    def rows(self) -> int:
        return round(self.seconds / ROWS[self.size])

    @property
    def label(self) -> str:
        extra = ", checkpointing" * self.checkpointing + f", sharded over {self.gpus}" * (self.gpus > 1)
        return f"{self.contestant}{extra}"


def arguments_of(run: Run, minimal_hubert: str | None, device: str = "cuda") -> argparse.Namespace:
    return argparse.Namespace(
        size=run.size, batch=run.rows, seconds=ROWS[run.size], clusters=CLUSTERS, device=device,
        contestants=[run.contestant], compile=False, activation_checkpointing=run.checkpointing,
        minimal_hubert=None if minimal_hubert is None else Path(minimal_hubert),
    )  # fmt: skip


def recorded_step(minimal_hubert: str | None, **run: Any) -> Record:
    """A whole step of a contestant on the phantom; runs in a process of its own."""
    wanted = Run(**run)
    args = arguments_of(wanted, minimal_hubert)
    return _our_step(args) if wanted.contestant == "ours" else _peer_step(args)


def _our_step(args: argparse.Namespace) -> Record:
    from training_steps import fit, pretraining_batch

    from hubert_lightning.training.pretraining import HubertPretraining

    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    size = train_step.size_of(args)
    checkpointing = args.activation_checkpointing
    model = HubertPretraining(size.config, size.clusters, size.final_dim, activation_checkpointing=checkpointing)
    return fit(model, pretraining_batch(args.batch, args.seconds, size.clusters), Recorder())


def _peer_step(args: argparse.Namespace) -> Record:
    on_cpu = argparse.Namespace(**vars(args) | {"device": "cpu"})
    batch, built = train_step.random_batch(on_cpu), train_step.build(on_cpu)
    if args.contestants[0] not in built:
        raise SystemExit(f"{args.contestants[0]} cannot be built here")
    contestant = built[args.contestants[0]]
    packages = ("hubert_lightning", "minimal_hubert", "spidr", "torchaudio", "transformers")
    with Recorder(packages) as recorder:
        recorder.modules.name(contestant.model.to("cuda"))
        parameters = list(contestant.model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
        pinned = type(batch)(*(value.pin_memory() if isinstance(value, torch.Tensor) else value for value in batch))

        def step() -> None:
            recorder.begin("transfer")
            there = type(batch)(
                *(v.to("cuda", non_blocking=True) if isinstance(v, torch.Tensor) else v for v in pinned)
            )
            recorder.begin("forward")
            with torch.autocast("cuda", torch.bfloat16):
                loss = contestant.loss(there)
            loss.backward()
            recorder.begin("finish")
            torch.nn.utils.clip_grad_norm_(parameters, 10.0)
            optimizer.step()
            contestant.model.zero_grad()

        step()
        with recorder.recording("transfer"):
            step()
    return recorder.record()


def priced(run: Run, record: Record, device: Device) -> list[dict[str, Any]]:
    """The two rows of a run: as it was launched, and compiled."""
    waits = len(record.waits)
    args = arguments_of(run, None)
    size = train_step.size_of(args)
    operations = train_step.batch_operations(args, train_step.random_batch(arguments_of(run, None, "cpu")))
    rows = []
    for compiled, cost in (
        (False, eager_cost(record.ops, device, waits)),
        (True, fused_cost(record.ops, device, waits)),
    ):
        peak = float(record.peak)
        seconds = cost.seconds
        if run.gpus > 1:
            workload = Workload(size.config, (CLUSTERS,), size.final_dim, activation_checkpointing=run.checkpointing)
            seconds = max(seconds, sharded_seconds(workload, run.gpus, device.link))
            peak = step_memory(workload, gpus=run.gpus, sharded=True).peak(run.rows * _frames(run))
        audio = run.rows * ROWS[run.size] / seconds
        rows.append(
            {
                "contestant": run.label, "size": run.size, "seconds": run.seconds, "compiled": compiled,
                "host_ms": round(cost.host * 1e3, 3), "gpu_ms": round(cost.gpu * 1e3, 3), "waits": waits,
                "launches": cost.launches, "peak_gib": round(peak / GIB, 2), "audio_s_per_s": round(audio, 1),
                "share_of_matrix_rate": round(operations / seconds / device.matrix, 4),
                "parts_ms": {part: round(value * 1e3, 3) for part, value in cost.parts.items()},
            }
        )  # fmt: skip
    return rows


def _frames(run: Run) -> int:
    return num_frames(seconds_to_samples(ROWS[run.size]))


def runs_of(args: argparse.Namespace) -> list[Run]:
    runs = []
    for size in args.sizes:
        for seconds in args.seconds or SECONDS[size]:
            runs += [Run(contestant, size, seconds) for contestant in args.contestants]
            if "ours" in args.contestants and size != "base":
                runs += [Run("ours", size, seconds, checkpointing=True)]
            if "ours" in args.contestants and size == "xlarge":
                runs += [Run("ours", size, seconds, gpus=args.gpus)]
    return runs


def report(rows: Sequence[dict[str, Any]], device: Device) -> None:
    headings = ("", "size", "batch s", "", "GPU ms", "host ms", "launches", "waits", "peak GiB", "audio s/s", "share")
    table = Table(*headings, title=f"Predicted for one {device.name}; nothing here was measured on a GPU")
    for row in rows:
        table.add_row(
            row["contestant"], row["size"], f"{row['seconds']:g}", "compiled" if row["compiled"] else "eager",
            f"{row['gpu_ms']:.1f}", f"{row['host_ms']:.1f}", str(row["launches"]), str(row["waits"]),
            f"{row['peak_gib']:.1f}", f"{row['audio_s_per_s']:.0f}", f"{row['share_of_matrix_rate']:.0%}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def predict(args: argparse.Namespace) -> None:
    if reason := missing():
        raise SystemExit(reason)
    device, rows = device_named(args.gpu), []
    records: dict[str, Record] = {}
    with Phantom(("roofline", "training_steps")) as phantom:
        for run in runs_of(args):
            if run.contestant == "minimal-hubert" and args.minimal_hubert is None:
                continue
            arguments = vars(replace(run, gpus=1))
            key = json.dumps(arguments)
            if key not in records:
                records[key] = phantom.run("roofline:recorded_step", minimal_hubert=args.minimal_hubert, **arguments)
            rows += priced(run, records[key], device)
            print(f"{run.label} {run.size} {run.seconds:g} s", file=sys.stderr, flush=True)
    report(rows, device)
    if args.parts:
        for row in rows:
            parts = sorted(row["parts_ms"].items(), key=lambda part: -part[1])
            name = f"{row['contestant']} {row['size']} {row['seconds']:g} s{', compiled' * row['compiled']}"
            print(f"{name}: " + ", ".join(f"{part} {value:.2f}" for part, value in parts))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def check_cpu(args: argparse.Namespace) -> None:
    """Predict and time the steps of train_step.py on this processor."""
    keep_freed_memory()
    names = [name for name in args.contestants if name != "minimal-hubert" or args.minimal_hubert]
    wanted = argparse.Namespace(
        size="base", batch=args.cpu_batch, seconds=5.0, clusters=100, device="cpu", contestants=names, compile=False,
        activation_checkpointing=False, minimal_hubert=args.minimal_hubert and Path(args.minimal_hubert),
    )  # fmt: skip
    torch.manual_seed(0)
    contestants, batch = train_step.build(wanted), train_step.random_batch(wanted)
    steps = {(precision, name): contestants[name] for precision in args.precision for name in contestants}
    recorded = {of: recorded_on_cpu(contestant, batch, of[0]) for of, contestant in steps.items()}
    processors, seconds = [], {of: [] for of in steps}
    for number in range(args.rounds + 1):
        processors.append(measured_processor(args.precision))
        for of, contestant in steps.items():
            taken, _ = train_step.timed(lambda c=contestant, p=of[0]: train_step.step(c, None, batch, p), "cpu")
            if number:
                seconds[of].append(taken)
        print(f"round {number} of {args.rounds}", file=sys.stderr, flush=True)
    processor = median_of(processors)
    for library, device in (("torch's library", processor.torch), ("oneDNN", processor.onednn)):
        print(
            f"products by {library}: {device.float32 / 1e9:.0f} GFLOP/s in float32, {device.matrix / 1e9:.0f} in bf16"
        )
    print(f"copies {device.bandwidth / 1e9:.1f} GB/s read and written")
    print(", ".join(f"{name} {1e9 * seconds:.2f} ns a number" for name, seconds in processor.draws.items()))
    table = Table("", "precision", "predicted s", "measured s", "predicted / measured", f"within {ALLOWED:.0%}")
    for of in steps:
        predicted, measured = processor.seconds(recorded[of]), statistics.median(seconds[of])
        ratio = predicted / measured
        met = "yes" if abs(ratio - 1) <= ALLOWED else "no"
        table.add_row(of[1], of[0], f"{predicted:.2f}", f"{measured:.2f}", f"{ratio:.2f}", met)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if args.parts:
        for of, operations in recorded.items():
            for library, parts in processor.parts(operations).items():
                longest = sorted(parts.items(), key=lambda part: -part[1])
                print(f"{of[1]}, {of[0]}, {library}: " + ", ".join(f"{part} {value:.2f} s" for part, value in longest))


def readable_checkout(path: Path, folder: str) -> str:
    """Return a checkout of minimal-hubert that this Python can read."""
    if sys.version_info >= (3, 12):
        return str(path)
    copied = Path(folder) / "minimal_hubert"
    shutil.copytree(path / "src", copied / "src")
    for module in (copied / "src" / "minimal_hubert").glob("*.py"):
        module.write_text(re.sub(r"^type (\w+) = ", r"\1 = ", module.read_text(), flags=re.M))
    return str(copied)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seconds", nargs="+", type=float, help="audio of a batch; by default those of each size")
    names = train_step.CONTESTANTS
    parser.add_argument("--contestants", nargs="+", choices=names, default=names)
    parser.add_argument("--gpu", default="H200", help="name in hubert_lightning/planning/devices.py")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of one node that share the parameters of X-Large")
    parser.add_argument("--minimal_hubert", help="a checkout of minimal-hubert")
    parser.add_argument("--parts", action="store_true", help="also the time of each kind of work")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--check_cpu", action="store_true", help="test the model of cost on this processor instead")
    parser.add_argument("--precision", nargs="+", choices=["float32", "bf16"], default=["float32", "bf16"])
    parser.add_argument("--cpu_batch", type=int, default=4, help="rows of 5 s in the batch of --check_cpu")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    with tempfile.TemporaryDirectory() as folder:
        if args.minimal_hubert is not None:
            args.minimal_hubert = readable_checkout(Path(args.minimal_hubert), folder)
        (check_cpu if args.check_cpu else predict)(args)


if __name__ == "__main__":
    main()
