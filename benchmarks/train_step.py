"""A step of pre-training: ours, torchaudio's, transformers' and minimal-hubert's, on one batch with one mask.

    uv run python benchmarks/train_step.py --precision float32 bf16
    uv run python benchmarks/train_step.py --precision float32 bf16 --memory
    uv run python benchmarks/train_step.py --precision bf16 --device cuda --batch 16 --seconds 15 --optimizer --compile
    uv run python benchmarks/train_step.py --size large --contestants ours torchaudio

Forward and backward, and with `--optimizer` clipping and a fused AdamW; no layers are dropped, and dropout is that of
each one's recipe. With `--compile`, ours takes part twice, as it is and compiled. First ours is given the weights of
each, and must have its loss; a difference is printed. On a CPU, freed memory is kept for all, as in our training. Then
each takes its turn in every round, and so do plain matrix products of the same precision; medians are compared. On a
CPU, `--memory` measures nothing but the peak of each, in a process of its own. minimal-hubert needs Python 3.12, what
it requires, and a checkout: `--minimal_hubert PATH`.
"""

import argparse
import json
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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchaudio
import transformers
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchaudio.models.wav2vec2.components import LogitGenerator

from hubert_lightning.frames import num_frames, seconds_to_samples
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.devices import keep_freed_memory
from hubert_lightning.model.flops import encoder_operations, head_operations
from hubert_lightning.model.prediction import ClusterPredictor
from hubert_lightning.pretrained.dialect import to_ours
from hubert_lightning.pretrained.formats.transformers import DIALECT, SETTINGS
from hubert_lightning.training.batches import PretrainingBatch
from hubert_lightning.training.masking import span_mask
from hubert_lightning.training.pretraining import HubertPretraining

RECIPES = Path(__file__).parent.parent / "configs" / "pretrain"
# Rows, inner and columns; the first as in Base's feed-forward
PRODUCTS = {"cpu": ((2048, 768, 3072), (2048, 2048, 2048)), "cuda": ((8192, 768, 3072), (8192, 8192, 8192))}
COMPILED = "ours, compiled"
OURS = ("ours", COMPILED)
HEAD = {"logit_generator.label_embeddings": "predictors.0.codewords"}
HEAD |= {"logit_generator.final_proj.": "predictors.0.projection."}

Of = tuple[str, str]  # precision, and contestant or shape of a product
Numbers = dict[Of, list[float]]


class Size(NamedTuple):
    name: str  # base, large or xlarge
    config: EncoderConfig
    final_dim: int
    clusters: int


class Contestant(NamedTuple):
    """A model, its loss, what its weights are called in transformers or here, and how its authors compile it."""

    model: nn.Module
    loss: Callable[[PretrainingBatch], Tensor]
    names: dict[str, str] = {}  # noqa: RUF012
    penalty: float | None = 10.0  # none: the number of masked frames
    compile: dict[str, Any] | None = None


def ours(size: Size) -> Contestant:
    model = HubertPretraining(size.config, size.clusters, size.final_dim)
    # training_step without the Trainer that it logs to
    return Contestant(model, lambda batch: model._step(batch, every_frame=False)[0])


def of_torchaudio(size: Size) -> Contestant:
    model = getattr(torchaudio.models, f"hubert_pretrain_{size.name}")(encoder_layer_drop=0.0)
    model.mask_generator = hiding = GivenMask(model.mask_generator.mask_embedding)
    model.logit_generator = LogitGenerator(size.config.dim, size.clusters, size.final_dim, False, False)

    def loss(batch: PretrainingBatch) -> Tensor:
        hiding.mask = batch.mask
        masked, unmasked, penalty = model(batch.waveform, batch.cluster[:, 0])
        first = [torch.zeros(len(logits), dtype=torch.long, device=logits.device) for logits in (masked, unmasked)]
        # Its examples/hubert: sums, weighted by 1 and 0, of which the gradient is divided by the masked frames
        prediction = F.cross_entropy(masked, first[0], reduction="sum")
        prediction = prediction + 0.0 * F.cross_entropy(unmasked, first[1], reduction="sum")
        return (prediction + 10 * len(masked) * penalty) / len(masked)

    names = {"wav2vec2.": "", "encoder.feature_projection.": "feature_projection.", ".transformer.": "."}
    return Contestant(model, loss, names | {"mask_generator.mask_embedding": "masked_spec_embed"} | HEAD)


class GivenMask(nn.Module):
    """In the place of torchaudio's mask generator: the same, but for drawing the mask."""

    def __init__(self, mask_embedding: nn.Parameter) -> None:
        super().__init__()
        self.mask_embedding, self.mask = mask_embedding, torch.empty(0)

    def forward(self, x: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        x[self.mask] = self.mask_embedding.to(x.dtype)
        return x, self.mask


def of_transformers(size: Size) -> Contestant:
    """It has no recipe for pre-training: our dropout and head, and our loss at masked frames only."""
    settings = {theirs: getattr(size.config, ours) for ours, theirs in SETTINGS.items()}
    settings |= {"feat_extract_norm": size.config.conv_norm, "conv_dim": (size.config.conv_channels,) * 7}
    encoder = transformers.HubertModel(transformers.HubertConfig(**settings))
    predictor = ClusterPredictor(size.config.dim, size.clusters, size.final_dim)
    local: list[Tensor] = []
    encoder.feature_extractor.register_forward_hook(lambda module, inputs, output: local.append(output))

    def loss(batch: PretrainingBatch) -> Tensor:
        frames = encoder(batch.waveform, mask_time_indices=batch.mask).last_hidden_state
        prediction = F.cross_entropy(predictor(frames[batch.mask]), batch.cluster[:, 0][batch.mask])
        return prediction + 10 * local.pop().float().square().mean()

    model = nn.ModuleDict({"hubert": encoder, "predictors": nn.ModuleList([predictor])})
    return Contestant(model, loss, {"hubert.": ""})


def of_minimal_hubert(size: Size) -> Contestant:
    from minimal_hubert import HuBERTPretrain

    model = HuBERTPretrain(size.clusters, size.name)
    model.encoder.layer_drop = 0.0

    def loss(batch: PretrainingBatch) -> Tensor:
        losses, _ = model(batch.waveform, batch.cluster[:, 0], mask=batch.mask, attention_mask=None)
        return losses.sum() / batch.mask.sum()  # its train.py; every frame's loss has the penalty of all frames in it

    names = {"feature_projection.0.": "feature_projection.", ".convs.0.": ".conv."}
    names |= {".attention.qkv.": ".query_key_value.", ".attention.proj.": ".attention_output."}
    names |= {"mask_embedding": "masked_spec_embed"} | HEAD
    return Contestant(model, loss, names, penalty=None, compile={"dynamic": True})


CONTESTANTS = ["ours", "torchaudio", "transformers", "minimal-hubert"]
BUILD = {"ours": ours, "torchaudio": of_torchaudio, "transformers": of_transformers}
BUILD |= {"minimal-hubert": of_minimal_hubert, COMPILED: ours}


@torch.no_grad()
def check_loss(mine: Contestant, name: str, peer: Contestant, batch: PretrainingBatch) -> None:
    state = {}
    for parameter, value in peer.model.named_parameters():
        for theirs, renamed in peer.names.items():
            parameter = parameter.replace(theirs, renamed)
        state[parameter] = value
    state = {n if n.startswith("predictors.") else f"encoder.{n}": v for n, v in to_ours(state, DIALECT).items()}
    mine.model.load_state_dict(state)
    mine.model.feature_penalty = float(batch.mask.sum()) if peer.penalty is None else peer.penalty
    mine.model.eval(), peer.model.eval()
    with torch.backends.cudnn.flags(allow_tf32=False):  # a GPU's convolutions would round to 10 bits
        expected, found = float(peer.loss(batch)), float(mine.loss(batch))
    differ = abs(found - expected) > 1e-4 * abs(expected)
    print(f"{name}: loss {expected:.5f}, ours with its weights {found:.5f}" + "; THEY DIFFER" * differ, flush=True)
    mine.model.train(), peer.model.train()
    mine.model.feature_penalty = mine.penalty


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
    loss.backward()
    if optimizer is not None:
        torch.nn.utils.clip_grad_norm_(contestant.model.parameters(), 10.0)  # as in fairseq
        optimizer.step()
    contestant.model.zero_grad()


def product(shape: tuple[int, int, int], precision: str, device: str) -> tuple[Callable[[], None], int]:
    """Something to time, and how many operations it is."""
    rows, inner, columns = shape
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(rows, inner, device=device, dtype=dtype), torch.randn(inner, columns, device=device, dtype=dtype)
    repeats = 20 if device == "cuda" else 2

    def run() -> None:
        for _ in range(repeats):
            a @ b

    return run, repeats * 2 * rows * inner * columns


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
    parser.add_argument(
        "--compile", action="store_true", help="also ours compiled, and minimal-hubert as its recipe does"
    )
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
    for name in [*args.contestants, *([COMPILED] if args.compile and "ours" in args.contestants else [])]:
        try:
            with torch.device(args.device):
                built[name] = BUILD[name](size)
        except ImportError as error:
            print(f"{name} is left out ({error}); it needs --minimal_hubert, Python 3.12 and what it requires")
            continue
        built[name].model.to(args.device).train()
        if name in OURS:
            built[name].model.encoder.checkpointing = args.activation_checkpointing
    return built


def report(args: argparse.Namespace, seconds: Numbers, operations: int, rates: Numbers, peaks: dict[Of, int]) -> None:
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
        print(f"matrix product {shape}, {precision}: {statistics.median(of):.0f} GFLOP/s")
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
        "step": "forward, backward" + ", clipping, AdamW" * args.optimizer + ", compiled" * args.compile,
    }
    print("; ".join(f"{name} {value}" for name, value in header.items()), flush=True)
    if "ours" in contestants:
        for name in [name for name in contestants if name not in OURS]:
            check_loss(contestants["ours"], name, contestants[name], batch)
    operations = batch_operations(args, batch)
    for name, of in contestants.items():
        if name == COMPILED:
            of.model.encoder.compile_parts()
        elif args.compile and of.compile is not None:
            of.model.compile(**of.compile)

    products = {
        (p, str(shape)): product(shape, p, args.device) for p in args.precision for shape in PRODUCTS[args.device]
    }
    for run in [*runs.values(), *runs.values(), *(run for run, _ in products.values())]:  # the second may compile too
        timed(run, args.device)
    seconds: Numbers = {of: [] for of in runs}
    rates: Numbers = {of: [] for of in products}
    peaks = dict.fromkeys(runs, 0)
    for number in range(args.rounds):
        for of, (run, count) in products.items():
            rates[of].append(count / timed(run, args.device)[0] / 1e9)
        order = list(runs)
        turn = number % len(order)
        for of in order[turn:] + order[:turn]:
            taken, extra = timed(runs[of], args.device)
            seconds[of].append(taken)
            if extra:
                peaks[of] = max(peaks[of], extra + standing_bytes(contestants[of[1]], optimizers[of[1]]))
    report(args, seconds, operations, rates, peaks)
    if args.profile:
        args.profile.write_text(
            "\n".join(profiled(name, runs[precision, name]) for precision, name in runs if name in OURS)
        )
    if args.json:
        steps = [{"precision": p, "name": name, "seconds": of} for (p, name), of in seconds.items()]
        plain = [{"precision": p, "shape": shape, "gflop_per_second": of} for (p, shape), of in rates.items()]
        whole = header | {"operations": operations, "steps": steps, "products": plain}
        args.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
