"""A step of pre-training: ours, torchaudio's, transformers' and minimal-hubert's, on one batch with one mask.

    uv run python benchmarks/train_step.py --precision float32 bf16
    uv run python benchmarks/train_step.py --precision float32 bf16 --memory
    uv run python benchmarks/train_step.py --precision bf16 --device cuda --batch 16 --seconds 15 --optimizer --compile
    uv run python benchmarks/train_step.py --size large --contestants ours torchaudio

Forward and backward; with `--optimizer` whole steps with a fused AdamW: ours with the GlobalBatch of `hubert fit`,
which scales and clips gradients and decides whether to skip the step, the others with torch's clipping, as in their
training loops. No layers are dropped, and dropout is that of each one's recipe. With `--compile`, ours and
minimal-hubert take part twice, as they are and compiled, each as its authors do. First ours is given the weights of
each, and must have its loss; a difference is printed. On a CPU, freed memory is kept for all, as in our training.

Then each takes its turn in every round, and so do matrix products of the same precision; medians are compared. In
float32 on a CPU, the product is that of the faster of torch's two libraries, MKL and oneDNN, whichever of them a
contestant uses. On a CPU, `--memory` measures nothing but the peak of each, in a process of its own. minimal-hubert
needs Python 3.12, what it requires, and a checkout: `--minimal_hubert PATH`.
"""

import argparse
import json
import math
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from contestants import BUILD, COMPILABLE, COMPILED, CONTESTANTS, MAX_NORM, OURS, Contestant, Size, check_loss
from rich.console import Console
from rich.table import Table

from hubert_lightning.frames import num_frames, seconds_to_samples
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.devices import keep_freed_memory
from hubert_lightning.model.flops import encoder_operations, head_operations
from hubert_lightning.training.batches import PretrainingBatch
from hubert_lightning.training.masking import span_mask

RECIPES = Path(__file__).parent.parent / "configs" / "pretrain"
# Rows, inner and columns; the first as in Base's feed-forward
PRODUCTS = {"cpu": ((2048, 768, 3072), (2048, 2048, 2048)), "cuda": ((8192, 768, 3072), (8192, 8192, 8192))}

Of = tuple[str, str]  # precision, and contestant or shape of a product
Numbers = dict[Of, list[float]]


def random_batch(args: argparse.Namespace) -> PretrainingBatch:
    generator = torch.Generator().manual_seed(0)
    samples = seconds_to_samples(args.seconds)
    frames = num_frames(samples)
    waveform = F.layer_norm(torch.randn(args.batch, samples, generator=generator), (samples,))
    cluster = torch.randint(args.clusters, (args.batch, 1, frames), generator=generator)
    mask = span_mask([frames] * args.batch, 0.8, 10, generator, same_count=True)
    return PretrainingBatch(
        waveform.to(args.device), cluster.to(args.device), mask.to(args.device), num_masked=int(mask[0].sum())
    )


def batch_operations(args: argparse.Namespace, batch: PretrainingBatch) -> int:
    """Of a forward and backward pass, counted once for all, the head at masked frames only."""
    size = size_of(args)
    head = head_operations(size.config.dim, size.final_dim, [size.clusters], batch.num_masked)
    return len(batch.mask) * (encoder_operations(size.config, batch.waveform.shape[1]) + head)


def step(
    contestant: Contestant, optimizer: torch.optim.Optimizer | None, batch: PretrainingBatch, precision: str
) -> None:
    with torch.autocast(batch.waveform.device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = contestant.loss(batch)
    if optimizer is None:
        loss.backward()
    else:
        contestant.add(loss, batch).backward()
        if contestant.finish is None:
            torch.nn.utils.clip_grad_norm_(contestant.model.parameters(), MAX_NORM)
        else:
            contestant.finish(optimizer)
        optimizer.step()
    contestant.model.zero_grad()


def product(shape: tuple[int, int, int], precision: str, device: str) -> tuple[Callable[[], None], int, str]:
    """The fastest product that torch has: something to time, how many operations it is, and its library."""
    libraries = {library: multiply(library, shape, precision, device) for library in libraries_of(precision, device)}
    for run in libraries.values():
        run()
    library = min(libraries, key=lambda name: min(timed(libraries[name], device)[0] for _ in range(3)))
    return libraries[library], repeats_on(device) * 2 * math.prod(shape), library


def libraries_of(precision: str, device: str) -> tuple[str, ...]:
    """Libraries that torch can multiply by; other products than those in float32 on a CPU have one."""
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return ("torch", "oneDNN") if (precision, device) == ("float32", "cpu") and has_onednn else ("torch",)


def repeats_on(device: str) -> int:
    return 20 if device == "cuda" else 2


def multiply(library: str, shape: tuple[int, int, int], precision: str, device: str) -> Callable[[], None]:
    rows, inner, columns = shape
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(rows, inner, device=device, dtype=dtype), torch.randn(inner, columns, device=device, dtype=dtype)

    def run() -> None:
        for _ in range(repeats_on(device)):
            if library == "oneDNN":
                torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
            else:
                a @ b

    return run


def timed(run: Callable[[], None], device: str) -> tuple[float, int]:
    """Seconds, and the peak of bytes allocated on the GPU beyond what is there between steps."""
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before


def profiled(name: str, run: Callable[[], None]) -> str:
    with torch.profiler.profile() as profile:
        run()
    by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return f"{name}\n{profile.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=90)}\n"


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text()
    name, family, model = (re.search(rf"^{of}\s*: (.*)", info, re.M)[1] for of in ("model name", "cpu family", "model"))
    instructions = [of for of in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {of} " in info]
    return f"{name}, family {family}, model {model} ({', '.join(instructions)})"


def standing_bytes(contestant: Contestant, optimizer: torch.optim.Optimizer | None) -> int:
    state = [] if optimizer is None else [value for of in optimizer.state.values() for value in of.values()]
    return sum(tensor.nbytes for tensor in (*contestant.model.parameters(), *state))


def peaks_on_cpu(args: argparse.Namespace) -> None:
    """Each in a process of its own, started before this one has grown: a child's peak counts its parent's."""
    for precision in args.precision:
        for name in args.contestants:
            arguments = [*sys.argv[1:], "--precision", precision, "--contestants", name]
            subprocess.run([sys.executable, __file__, *arguments], check=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["base", "large", "xlarge"], default="base")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", nargs="+", choices=["float32", "bf16"], default=["float32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--optimizer", action="store_true", help="whole steps, with clipping and a fused AdamW")
    parser.add_argument("--compile", action="store_true", help="also ours and minimal-hubert, compiled")
    parser.add_argument("--profile", type=Path, help="write what a step of ours spends its time on to this file")
    parser.add_argument("--memory", action="store_true", help="on a CPU: the peak of each, and no times")
    parser.add_argument("--minimal_hubert", type=Path, help="a checkout of minimal-hubert")
    parser.add_argument("--json", type=Path, help="write all times to this file")
    parser.add_argument("--activation_checkpointing", action="store_true", help="in ours")
    return parser.parse_args()


def size_of(args: argparse.Namespace) -> Size:
    recipe = yaml.safe_load((RECIPES / f"{args.size}.yaml").read_text())["model"]["init_args"]
    config = EncoderConfig(**recipe.get("encoder", {}) | {"layer_drop": 0.0})
    return Size(args.size, config, recipe.get("final_dim", 256), args.clusters)


def build(args: argparse.Namespace) -> dict[str, Contestant]:
    size = size_of(args)
    if args.minimal_hubert is not None:
        sys.path.insert(0, str(args.minimal_hubert / "src"))
    built = {}
    compiled = [f"{name}{COMPILED}" for name in args.contestants if args.compile and name in COMPILABLE]
    for name in [*args.contestants, *compiled]:
        try:
            with torch.device(args.device):
                built[name] = BUILD[name.removesuffix(COMPILED)](size)
        except ImportError as error:
            print(f"{name} is left out ({error}); it needs --minimal_hubert, Python 3.12 and what it requires")
            continue
        built[name].model.to(args.device).train()
        if name in OURS:
            built[name].model.encoder.checkpointing = args.activation_checkpointing
    return built


def report(
    args: argparse.Namespace,
    seconds: Numbers,
    operations: int,
    rates: Numbers,
    peaks: dict[Of, int],
    libraries: dict[Of, str],
) -> None:
    products = PRODUCTS[args.device]
    shapes = [" x ".join(map(str, shape)) for shape in products]
    headings = ("", "precision", "median s", "fastest s", "audio s/s", "speed / fastest peer", "GFLOP/s")
    table = Table(*headings, *(f"/ {shape}" for shape in shapes), "peak MiB")
    for (precision, name), times in seconds.items():
        median = statistics.median(times)
        peers = [statistics.median(of) for (at, peer), of in seconds.items() if at == precision and peer not in OURS]
        rate = operations / median / 1e9
        table.add_row(
            *(name, precision, f"{median:.3f}", f"{min(times):.3f}", f"{args.batch * args.seconds / median:.2f}"),
            *(f"{min(peers) / median:.2f}" if peers else "", f"{rate:.0f}"),
            *(f"{rate / statistics.median(rates[precision, str(shape)]):.2f}" for shape in products),
            f"{peaks[precision, name] / 2**20:.0f}" if peaks[precision, name] else "",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for (precision, shape), of in rates.items():
        library = libraries[precision, shape]
        print(f"matrix product {shape}, {precision}, by {library}: {statistics.median(of):.0f} GFLOP/s")
    a_second = operations / args.batch / args.seconds / 1e9
    print(f"{a_second:.1f} GFLOP for a second of audio, forward and backward, counted once for all")


def main() -> None:
    args = parsed()
    measures_peaks = args.memory and args.device == "cpu"
    if measures_peaks and len(args.precision) * len(args.contestants) > 1:
        peaks_on_cpu(args)
        return
    if args.device == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    contestants, batch = build(args), random_batch(args)
    optimizers = {
        name: torch.optim.AdamW(of.model.parameters(), lr=1e-6, fused=True) if args.optimizer else None
        for name, of in contestants.items()
    }
    runs = {
        (precision, name): partial(step, of, optimizers[name], batch, precision)
        for precision in args.precision
        for name, of in contestants.items()
    }
    if measures_peaks:
        for (precision, name), run in runs.items():
            run(), run()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"{name}, {precision}: peak memory {peak:.0f} MiB", flush=True)
        return

    header = {
        "processor": processor(args.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "size": args.size,
        "batch": f"{args.batch} x {args.seconds:g} s",
        "step": "forward, backward" + ", GlobalBatch (ours) or clipping, AdamW" * args.optimizer,
    }
    print("; ".join(f"{name} {value}" for name, value in header.items()), flush=True)
    if "ours" in contestants:
        for name in [name for name in contestants if name not in OURS and not name.endswith(COMPILED)]:
            check_loss(contestants["ours"], name, contestants[name], batch)
    operations = batch_operations(args, batch)
    for name, of in contestants.items():
        if name.endswith(COMPILED):
            of.compile()

    products = {
        (p, str(shape)): product(shape, p, args.device) for p in args.precision for shape in PRODUCTS[args.device]
    }
    for run in [*runs.values(), *runs.values()]:  # the second may compile too
        timed(run, args.device)
    seconds: Numbers = {of: [] for of in runs}
    rates: Numbers = {of: [] for of in products}
    peaks = dict.fromkeys(runs, 0)
    for number in range(args.rounds):
        for of, (run, count, _) in products.items():
            rates[of].append(count / timed(run, args.device)[0] / 1e9)
        order = list(runs)
        turn = number % len(order)
        for of in order[turn:] + order[:turn]:
            taken, extra = timed(runs[of], args.device)
            seconds[of].append(taken)
            if extra:
                peaks[of] = max(peaks[of], extra + standing_bytes(contestants[of[1]], optimizers[of[1]]))
    libraries = {of: library for of, (_, _, library) in products.items()}
    report(args, seconds, operations, rates, peaks, libraries)
    if args.profile:
        args.profile.write_text(
            "\n".join(profiled(name, runs[precision, name]) for precision, name in runs if name in OURS)
        )
    if args.json:
        steps = [{"precision": p, "name": name, "seconds": of} for (p, name), of in seconds.items()]
        plain = [
            {"precision": p, "shape": shape, "library": libraries[p, shape], "gflop_per_second": of}
            for (p, shape), of in rates.items()
        ]
        whole = header | {"operations": operations, "steps": steps, "products": plain}
        args.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
