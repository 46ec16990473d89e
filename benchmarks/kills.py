"""Kill fits again and again; the same command must end in what a fit leaves that nothing interrupted, to the bit.

    python benchmarks/kills.py [pretraining finetuning labelling ranks] [--trials 20] [--seed 0] [--writes]

A trial starts a fit, kills it, starts it again, one to three times, then lets it end, and compares all of its files
with those of a fit that nothing interrupted. A kill is a SIGKILL at a random moment, or before a random one of the
calls by which the fit writes (open, fsync, rename, link, remove, mkdir). `--writes` kills once before each of these
calls, in turn. Of two ranks, one is killed, and the other must end by itself, once they have found each other.

What differs rightly is left out of the comparison: speeds (`Throughput`), the folder's own path, previous.ckpt. Of the
rows of metrics.csv, none may come twice, and of each kill one may be missing.
"""

import argparse
import csv
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import fork_server  # noqa: E402

SPEEDS = "speed/"
"""How the names of metrics begin that no two runs share: measured speeds, since the last log or since the start."""
UNCOMPARED = ("previous.ckpt", "metrics.csv", "record.json", "labelling.json")
"""What was saved last before the end; a row may be missing, of the step of a kill; folders, devices and times."""
WRITES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir")
FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT
PATIENCE = 120
"""Seconds in which the other rank must end."""
MET = "distributed processes registered"
"""What is printed when ranks have found each other."""


@dataclass
class Fit:
    """A command line to be killed.

    Args:
        args: All but the folder.
        results: Files that an uninterrupted fit must leave, lest the comparison be of nothing.
        ranks: Processes that run it side by side.
        prepare: Called in each process before it begins.
    """

    args: list[str]
    results: list[str]
    ranks: int = 1
    prepare: Callable[[], None] | None = None
    seconds: float = 0.0
    writes: int = 0
    reference: Path = field(default_factory=Path)


class Kill(NamedTuple):
    """When a fit is killed: at the n-th write, or after so many seconds."""

    write: int = 0
    seconds: float = 0.0
    rank: int = 0


def count_writes(folder: Path, until: int, report: Path | None, prepare: Callable[[], None] | None) -> None:
    """Be killed before the n-th write in a folder; never if that is 0. Runs in the process that is to be killed.

    Args:
        folder: Folder of the run.
        until: Number of the write.
        report: File that lists the writes when the process ends.
        prepare: What else is to be done before the command.
    """
    process, inside, writes = os.getpid(), str(folder), [""][:0]

    def write(event: str, path: object) -> None:
        name = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if os.getpid() != process or not os.path.abspath(name).startswith(inside):
            return
        if os.path.exists(name) != (event != "os.mkdir") and event in WRITES:
            return  # which changes nothing
        writes.append(f"{event} {name}")
        if len(writes) == until:
            os.kill(process, signal.SIGKILL)

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event in WRITES or (event == "open" and isinstance(args[2], int) and args[2] & FLAGS):
            write(event, args[0])

    fsync = os.fsync

    def synced(file: int) -> None:
        write("fsync", os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}"))
        fsync(file)

    os.fsync = synced
    sys.addaudithook(hear)
    if report:
        import atexit

        atexit.register(lambda: report.write_text("\n".join(writes)))
    if prepare:
        prepare()


def small_shards() -> None:
    """Many shards of labels of few utterances."""
    from hubert_lightning.units import label_writer

    label_writer.shard_size = lambda cuts: 8


def fits(manifests: Path) -> dict[str, Fit]:
    """The fits to be killed, on a corpus of two minutes."""
    pretraining = [
        "fit",
        *("--config", str(ROOT / "configs/demo.yaml")),
        *("--config", str(ROOT / "tests/smoke.yaml")),
        f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
        f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
        "--data.init_args.max_duration=6",
        "--data.init_args.num_workers=2",
        "--model.init_args.encoder={dropout: 0.1, attention_dropout: 0.1, input_dropout: 0.1, layer_drop: 0.3}",
        "--checkpoint.every_n_train_steps=2",
    ]
    first = "{features: mfcc, clusters: 20, max_frames: 2000, max_steps: %d}"
    second = "{features: previous, layer: 1, clusters: 10, max_frames: 2000, max_steps: %d}"
    best = "{class_path: hubert_lightning.BestCheckpoints, init_args: {keep: 2, monitor: %s}}"
    stopping = "{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/wer, patience: %d}}"
    finetuning = [
        "fit",
        *("--config", str(ROOT / "configs/finetune/small.yaml")),
        *("--config", str(ROOT / "tests/smoke-finetune.yaml")),
        f"--data.init_args.train=[{manifests / 'finetune.jsonl.gz'}]",
        f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
        "--data.init_args.num_workers=1",
        "--model.init_args.layer_drop=0.2",
    ]
    of_iteration = ["last.ckpt", "metrics.json", "kmeans.safetensors", "labels/store.json", "config.yaml"]
    of_finetuning = ["last.ckpt", "metrics.json", "average.ckpt", "best.ckpt", "config.yaml"]
    both = [f"iteration{number}/{name}" for number in (1, 2) for name in of_iteration]
    return {
        "pretraining": Fit(
            [
                *pretraining,
                f"--iterations=[{first % 8},{second % 8}]",
                "--trainer.accumulate_grad_batches=2",
                "--trainer.val_check_interval=6",  # every third step, of which the sixth is saved
            ],
            both,
        ),
        "labelling": Fit([*pretraining, f"--iterations=[{first % 1},{second % 1}]"], both, prepare=small_shards),
        "finetuning": Fit(
            [
                *finetuning,
                "--trainer.max_steps=40",
                "--checkpoint.every_n_train_steps=2",
                "--trainer.val_check_interval=2",  # on saved steps, as in configs/finetune
                f"--trainer.callbacks=[{best % 'val/loss'}, {stopping % 4}]",
            ],
            of_finetuning,
        ),
        "epochs": Fit(
            [
                *finetuning,
                "--trainer.max_steps=9",
                "--checkpoint.every_n_train_steps=1",
                "--trainer.val_check_interval=1.0",  # when an epoch ends
                "--trainer.check_val_every_n_epoch=1",
                f"--trainer.callbacks=[{best % 'val/wer'}, {stopping % 10}]",
            ],
            of_finetuning,
        ),
        "ranks": Fit(
            [
                *pretraining,
                f"--iterations=[{first % 6},{second % 6}]",
                "--trainer.val_check_interval=2",
                "--trainer.devices=2",
                "--trainer.strategy=ddp",
            ],
            both,
            ranks=2,
            prepare=small_shards,
        ),
    }


def begin(fit: Fit, folder: Path, log: Path, kill: Kill = Kill(), report: Path | None = None) -> list[BaseProcess]:
    """Start a fit, all of its ranks."""
    environments: list[dict[str, str] | None] = [None]
    if fit.ranks > 1:
        environments = [*fork_server.of_ranks(fit.ranks)]
    return [
        fork_server.start(
            [*fit.args, f"--output={folder}"],
            log,
            environment=environment,
            before=functools.partial(
                count_writes, folder, kill.write if rank == kill.rank else 0, None if rank else report, fit.prepare
            ),
        )
        for rank, environment in enumerate(environments)
    ]


def measure(name: str, fit: Fit, folder: Path, alone: bool = True) -> None:
    """Run a fit that nothing interrupts twice, the second time as a fork; the two must not differ.

    Args:
        name: What its folder is called.
        fit: Is told how long it takes, how often it writes, and where the first, the reference, is.
        folder: Where they go.
        alone: Whether the first is a process of its own, where nothing has to be prepared in it.
    """
    fit.reference = folder / f"{name}-reference"
    for output in (fit.reference, folder / f"{name}-fork"):
        shutil.rmtree(output, ignore_errors=True)
    alone = alone and fit.ranks == 1 and fit.prepare is None
    if alone:
        typed = [sys.executable, "-m", "hubert_lightning", *fit.args, f"--output={fit.reference}"]
        with (folder / f"{name}-reference.txt").open("w") as log:
            subprocess.run(typed, check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for output in [folder / f"{name}-fork"] if alone else [fit.reference, folder / f"{name}-fork"]:
        started = time.monotonic()
        log, report = folder / f"{name}.txt", folder / f"{name}-writes.txt"
        codes = [fork_server.ended(process) for process in begin(fit, output, log, report=report)]
        if any(codes):
            raise SystemExit(f"{name}: ended with {codes} without a kill\n{log.read_text()[-3000:]}")
        fit.seconds, fit.writes = time.monotonic() - started, len(report.read_text().splitlines())
    for result in fit.results:
        assert (fit.reference / result).exists(), result
    if found := list(differences(folder / f"{name}-fork", fit.reference)):
        raise SystemExit(f"{name}: two fits that nothing interrupted differ: {found}")


def killed(fit: Fit, folder: Path, log: Path, kill: Kill) -> bool:
    """Start a fit and kill it; false if it ended before.

    Raises:
        RuntimeError: It ended otherwise, or another rank did not end.
    """
    before = log.stat().st_size if log.exists() else 0
    processes = begin(fit, folder, log, kill)
    try:
        if kill.seconds:
            processes[kill.rank].join(kill.seconds)
            processes[kill.rank].kill()
        processes[kill.rank].join()
        code = processes[kill.rank].exitcode
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"ended with {code} before it was killed:\n{log.read_text()[-3000:]}")
        if MET not in log.read_text()[before:]:
            return code != 0  # those that wait for another are ended by what started them: srun, torchrun
        for rank, process in enumerate(processes):
            process.join(PATIENCE)
            if process.exitcode is None:
                raise RuntimeError(f"rank {rank} still runs {PATIENCE} s after the other was killed")
    finally:
        fork_server.end(*processes)
    return code != 0


def trial(fit: Fit, folder: Path, kills: list[Kill]) -> list[str]:
    """Kill a fit some times, let it end, and return what is not as it should be."""
    shutil.rmtree(folder, ignore_errors=True)
    log = folder.with_suffix(".txt")
    log.unlink(missing_ok=True)
    for kill in kills:
        try:
            killed(fit, folder, log, kill)
        except RuntimeError as error:
            return [str(error)]
    codes = [fork_server.ended(process) for process in begin(fit, folder, log)]
    if any(codes):
        return [f"ended with {codes}:\n{log.read_text()[-3000:]}"]
    return list(differences(folder, fit.reference, len(kills)))


def differences(here: Path, there: Path, kills: int = 0) -> Iterator[str]:
    """In what the files of two runs differ, of which the first was killed some times."""
    ours, theirs = (
        {str(path.relative_to(of)): path for path in of.rglob("*") if path.is_file() and path.name not in UNCOMPARED}
        for of in (here, there)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            yield f"{name}: left over"
        elif name not in ours:
            yield f"{name}: missing"
        else:
            left, right = _content(ours[name], here), _content(theirs[name], there)
            yield from (f"{name}: {place}" for place in _unlike(left, right, ""))
    for table in there.rglob("metrics.csv"):
        name = table.relative_to(there)
        logged, expected = _rows(here / name), _rows(table)
        if len(set(logged)) < len(logged) or [row for row in expected if row in logged] != logged:
            yield f"{name}: has rows twice, or others"
        elif len(logged) < len(expected) - kills:
            yield f"{name}: has {len(logged)} of {len(expected)} rows, after {kills} kills"


def _rows(table: Path) -> list[tuple[tuple[str, str], ...]]:
    """What was logged, but for speeds."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [tuple(sorted((name, of) for name, of in row.items() if of and not name.startswith(SPEEDS))) for row in rows]


def _content(path: Path, folder: Path) -> Any:
    if path.suffix == ".ckpt":
        return _without_folder(torch.load(path, weights_only=True), folder)
    if path.suffix == ".json":
        return _without_folder(json.loads(path.read_text()), folder)
    return path.read_bytes().replace(str(folder).encode(), b"")


def _without_folder(value: Any, folder: Path) -> Any:
    """A value whose strings do not name the folder that it is in, and without the speed that it was made with."""
    if isinstance(value, dict):
        return {
            _without_folder(key, folder): _without_folder(of, folder)
            for key, of in value.items()
            if not str(key).startswith(SPEEDS)
        }
    if isinstance(value, (list, tuple)):
        return [_without_folder(of, folder) for of in value]
    return value.replace(str(folder), "") if isinstance(value, str) else value


def _unlike(left: Any, right: Any, place: str) -> Iterator[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in left.keys() | right.keys():
            if key not in left or key not in right:
                yield f"{place}.{key} is in one alone"
            else:
                yield from _unlike(left[key], right[key], f"{place}.{key}")
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for number, pair in enumerate(zip(left, right, strict=True)):
            yield from _unlike(*pair, f"{place}[{number}]")
    elif isinstance(left, Tensor) and isinstance(right, Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape
        if not same or left.numpy().tobytes() != right.numpy().tobytes():
            yield f"{place} ({str(left)[:60]} here, {str(right)[:60]} there)"
    elif type(left) is not type(right) or (left != right and left == left):
        yield f"{place} ({str(left)[:60]} here, {str(right)[:60]} there)"


def drawn(fit: Fit, generator: random.Random) -> list[Kill]:
    """One to three kills, half of them at writes."""
    kills = []
    for _ in range(generator.choice([1, 1, 2, 3])):
        rank = generator.randrange(fit.ranks)
        if rank == 0 and generator.random() < 0.5:
            kills.append(Kill(write=generator.randint(1, fit.writes)))
        else:
            kills.append(Kill(seconds=generator.uniform(0.05, fit.seconds), rank=rank))
    return kills


def campaign(name: str, fit: Fit, folder: Path, plans: list[list[Kill]]) -> tuple[int, int]:
    """Trials that ended as they should, and kills.

    Raises:
        SystemExit: One did not; its kills are printed, and its folder stays.
    """
    kills = 0
    for number, plan in enumerate(plans):
        if wrong := trial(fit, folder / name, plan):
            first = "\n".join(wrong[:20])
            raise SystemExit(f"{name}, trial {number}: after {plan}, in {folder / name}:\n{first}")
        kills += len(plan)
    return len(plans), kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fits", nargs="*", help="of pretraining, finetuning, epochs, labelling, ranks; all by default")
    parser.add_argument("--trials", type=int, default=20, help="of each fit, at random")
    parser.add_argument("--writes", action="store_true", help="instead, kill once before each write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs go")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kills"))
    manifests = corpus(folder)
    for name, fit in fits(manifests).items():
        if args.fits and name not in args.fits:
            continue
        measure(name, fit, folder)
        generator = random.Random(f"{args.seed} {name}")
        plans = [drawn(fit, generator) for _ in range(args.trials)]
        if args.writes:
            plans = [[Kill(write=number)] for number in range(1, fit.writes + 1)]
        started = time.monotonic()
        trials, kills = campaign(name, fit, folder, plans)
        print(
            f"{name}: {trials} of {len(plans)} ended in the same bits, after {kills} kills, "
            f"{time.monotonic() - started:.0f} s (uninterrupted {fit.seconds:.1f} s, {fit.writes} writes)",
            flush=True,
        )


def corpus(folder: Path) -> Path:
    """Manifests of two minutes of synthetic speech."""
    from hubert_lightning.demo.synthesis import synthesise_corpus

    minutes = {"train_minutes": 1.5, "finetuning_minutes": 0.5, "dev_minutes": 0.3, "test_minutes": 0.3}
    if not (folder / "corpus" / "manifests").exists():
        synthesise_corpus(folder / "corpus", **minutes, train_speakers=3, heldout_speakers=1)
    return folder / "corpus" / "manifests"


if __name__ == "__main__":
    main()
