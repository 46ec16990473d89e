"""The verb `hubert plan`: what a run will take, before it is started."""

import json as as_json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hubert_lightning.errors import UserError, counted
from hubert_lightning.files import write_whole
from hubert_lightning.packaged_configs import packaged
from hubert_lightning.planning.devices import GIB, device_named
from hubert_lightning.planning.plan import SLOWEST, Machine, Option, TrainingPlan, plan_stage
from hubert_lightning.planning.settings import audio_hours, read_config, stages_of
from hubert_lightning.planning.shares import audio_shares
from hubert_lightning.short_options import long_options


def plan(
    configs: list[str],
    *,
    gpu: str = "H100-80GB",
    gpus: int = 8,
    gpus_per_node: int = 8,
    audio: float | None = None,
    json: Path | None = None,
    settings: list[str] | None = None,
) -> None:
    """Predict memory, time and disk of a run: hubert plan CONFIG --gpu H100-80GB --gpus 8.

    Nothing is measured: the numbers follow from the size of the model and a table of what GPUs can do. Training may
    take 2.5 times as long as predicted; memory is within a few percent of recorded steps.

    Args:
        configs: Configs of `hubert fit`; a later one overrides an earlier one. Those of this package can be named as
            pretrain/base.yaml.
        gpu: GPU: H200, B200, H100-80GB, H100-PCIe, A100-80GB, A100-40GB, L40S, A6000, A10G, RTX-4090 or RTX-3090.
        gpus: GPUs that train together. The audio of a step stays that of the config.
        gpus_per_node: GPUs in a node; more than these exchange gradients over the network.
        audio: Hours of audio of the training set, for labels; known for LibriSpeech and Libri-light, and if languages
            or corpora are balanced and the manifests are there.
        json: File for all numbers.
        settings: Keys of `hubert fit`, as KEY=VALUE. They may also be given as there: --config CONFIG,
            --data.init_args.max_duration 175, --iterations [...], also in short: --steps, --lr, --batch_seconds,
            --iterations.2.clusters 100.
    """
    if not configs:
        raise UserError("which config? hubert plan CONFIG, such as pretrain/base.yaml")
    if not 1 <= gpus <= 2**16 or not 1 <= gpus_per_node <= 2**10:
        raise UserError(f"{gpus} GPUs, {gpus_per_node} in a node: give numbers from 1 to 65536 and 1024")
    if audio is not None and not 0 < audio <= 10**8:
        raise UserError(f"audio is {audio}; it is the number of hours of the training set")
    machine = Machine(device_named(gpu), gpus, gpus_per_node)
    config = read_config([packaged(name) for name in configs], _long_settings(configs, settings or ()))
    try:
        stages = stages_of(config)
        shares = audio_shares(config, stages[0].workload.encoder.clock)
        hours = audio if audio is not None else audio_hours(config) if shares is None else shares.hours
        plans = [plan_stage(stage, machine, hours) for stage in stages]
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{', '.join(configs)}: a value has another form or size than `hubert fit` accepts ({error}); "
            "`hubert fit` with this config names it"
        ) from error
    if json is not None:
        facts = {"gpu": machine.device.name, "gpus": gpus, "hours_of_audio": hours, "slowest_factor": SLOWEST}
        content = facts | ({"shares": shares.parts} if shares else {}) | {"trainings": [asdict(one) for one in plans]}
        write_whole(json, (as_json.dumps(content, indent=2) + "\n").encode())
    _show(plans, machine, hours)
    for thing, parts in (shares.parts if shares else {}).items():
        amounts = (f"{name} {part['hours']:.2f} h ({100 * part['share']:.1f} %)" for name, part in parts.items())
        print(f"{thing}, with their shares of an epoch: {', '.join(amounts)}")


def _long_settings(configs: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Keys of a command line as "key=value", with the short forms of `hubert fit` rewritten."""
    named = [f"--config={packaged(name)}" for name in configs]
    words = long_options([*named, *(f"--{setting}" for setting in settings)])
    return [word.removeprefix("--") for word in words if word not in named]


def _show(plans: Sequence[TrainingPlan], machine: Machine, hours: float | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for training in plans:
        title = f"{training.name}: {training.parameters / 1e6:.0f} M parameters, {counted(training.steps, 'step')} of "
        title += f"{training.step_seconds:.0f} s of audio, on {training.gpus} x {machine.device.name}"
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", min_width=len("as configured,"))
        for heading in ("batch", "memory", "step", "audio/s", "MFU", "hours", "GPU-hours"):
            table.add_column(heading, no_wrap=heading != "memory")
        console.print(title, soft_wrap=True, highlight=False)
        for option in training.options:
            table.add_row(*_cells(option))
        console.print(table)
        console.print(_advice(training, machine), soft_wrap=True)
        console.print(_disk(training, hours), soft_wrap=True)
        console.print()
    total = [training.best.hours for training in plans if training.best]
    labels = sum(training.labelling.hours for training in plans if training.labelling)
    if len(total) == len(plans):
        whole = sum(total) + labels
        gpu_hours = sum(
            (training.best.hours + (training.labelling.hours if training.labelling else 0)) * training.gpus
            for training in plans
            if training.best
        )
        iterations = [training for training in plans if training.name.startswith("iteration")]
        known = all(training.labelling for training in iterations)
        included = f", labels {'' if known else 'not '}included" if iterations else ""
        console.print(
            f"In all {_rounded(whole)} to {_rounded(SLOWEST * whole)} hours, {_rounded(gpu_hours)} to "
            f"{_rounded(SLOWEST * gpu_hours)} GPU-hours{included}.",
            soft_wrap=True,
        )
    console.print(
        f"Predictions, not measurements: time may be {SLOWEST:g} times as long. Validation is not included. "
        "speed/audio_seconds_per_second and speed/memory_gib of the first steps show the truth.",
        soft_wrap=True,
    )


def _cells(option: Option) -> tuple[str, ...]:
    name = f"{option.name}, {option.strategy}{', compiled' * option.compiled}"
    return (
        name,
        f"{option.accumulated} x {option.batch_seconds:.1f} s",
        f"{option.peak_gib:.1f} GiB{'' if option.fits else ', too much'}",
        f"{option.step_ms:.0f} ms" if option.step_ms < 10_000 else f"{option.step_ms / 1000:.1f} s",
        f"{option.audio_s_per_s:.0f}",
        f"{option.share_of_matrix_rate:.0%}",
        _rounded(option.hours),
        _rounded(option.gpu_hours),
    )


def _rounded(hours: float) -> str:
    return f"{hours:.0f}" if hours >= 100 else f"{hours:.1f}" if hours >= 1 else f"{hours:.2f}"


def _advice(training: TrainingPlan, machine: Machine) -> str:
    memory = f"{machine.device.memory / GIB:.0f} GiB"
    if training.best is None:
        return f"It fits into {memory} neither whole nor sharded: more GPUs, or activation_checkpointing: true."
    best = training.best
    sentence = f"Best: {best.strategy}, --data.init_args.max_duration {best.batch_seconds:g}"
    sentence += f" --trainer.accumulate_grad_batches {best.accumulated}"
    if training.gpus < machine.gpus:
        sentence += f" --trainer.devices {training.gpus}"
    if training.gpus > 1:
        strategy = "hubert_lightning.LayerwiseFSDP" if best.strategy == "sharded" else "ddp"
        sentence += f" --trainer.strategy {strategy}"
    sentence += "."
    if training.gpus < machine.gpus:
        sentence += (
            f" {machine.gpus} GPUs are hardly faster, as a step has only {training.step_seconds:.0f} s of audio."
        )
    largest = training.largest_batch_seconds
    return f"{sentence} Data parallel, {memory} hold batches of {largest:.0f} s." if largest else sentence


def _disk(training: TrainingPlan, hours: float | None) -> str:
    sentence = f"Checkpoints: {training.checkpoint_gb:.1f} GB, twice that while one replaces another."
    labels = training.labelling
    if labels is not None:
        sentence += (
            f" Labels: {labels.label_gb:.2f} GB in {labels.hours:.2f} hours (sample {labels.sample_hours:.2f}, "
            f"K-means {labels.kmeans_hours:.2f}, encode {labels.encode_hours:.2f})."
        )
    elif hours is None and training.name.startswith("iteration"):
        sentence += " Labels: give --audio HOURS."
    return sentence
