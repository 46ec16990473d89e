"""Time, memory and disk of a run: its trainings as configured and as this many GPUs would best do them."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from hubert_lightning.frames import CLOCK, Clock, num_frames, seconds_to_samples
from hubert_lightning.model.flops import encoder_operations, head_operations
from hubert_lightning.planning.devices import GIB, Device
from hubert_lightning.planning.memory import step_memory
from hubert_lightning.planning.network import HIDDEN, data_parallel_seconds, link_speed, sharded_seconds
from hubert_lightning.planning.pricing import Moved, Product
from hubert_lightning.planning.settings import CROP, Labels, Stage
from hubert_lightning.planning.steps import Batch, encoder_work, step_cost
from hubert_lightning.planning.workload import num_parameters

MFCC_SPEED = 900.0
"""Seconds of audio in a second of one core that computes MFCCs [assumed: 480 were measured, before they took half]."""
PASSES = 12
"""Passes of K-means over its frames [measured: 8 to 12 on CPUs]."""
FROM_HOST = 20e9
"""Bytes in a second that a GPU reads from the host's memory [assumed]; K-means reads its frames from there."""
SAMPLED = 4
"""Frames that are encoded for each frame that K-means is fitted on."""
UTTERANCE, BYTES_OF_UTTERANCE, BYTES_OF_LABEL = 12.3, 32, 2
WORTHWHILE = 1.1
"""Factor of the shortest time up to which fewer GPUs are advised."""
SLOWEST = 2.5
"""Factor by which a run may be slower than predicted: minimal-hubert's published speed on H100s is 0.37 of the
prediction for its step, without its loader, its waits and its network."""


@dataclass(frozen=True)
class Option:
    """One way to do a training.

    Args:
        name: "as configured", or what is different.
        strategy: "data parallel" or "sharded".
        compiled: Whether the model is compiled.
        batch_seconds: Audio of a batch of one GPU.
        accumulated: Batches of a step.
        peak_gib: Memory of tensors on each GPU.
        fits: Whether the GPU has it, with what the allocator and CUDA need.
        step_ms: Milliseconds of an optimizer step.
        audio_s_per_s: Seconds of audio in a second, over all GPUs.
        share_of_matrix_rate: Operations of the model in a second as a share of a large product's rate.
        hours: Hours of all steps.
        gpu_hours: The same times GPUs.
    """

    name: str
    strategy: str
    compiled: bool
    batch_seconds: float
    accumulated: int
    peak_gib: float
    fits: bool
    step_ms: float
    audio_s_per_s: float
    share_of_matrix_rate: float
    hours: float
    gpu_hours: float


@dataclass(frozen=True)
class Labelling:
    """How long the labels of an iteration take.

    Args:
        hours: Hours to sample frames, fit K-means, encode and assign.
        sample_hours: Hours of the sample.
        kmeans_hours: Hours of K-means.
        encode_hours: Hours to encode and assign the corpus.
        label_gb: Disk of the labels.
    """

    hours: float
    sample_hours: float
    kmeans_hours: float
    encode_hours: float
    label_gb: float


@dataclass(frozen=True)
class TrainingPlan:
    """The plan of a training.

    Args:
        name: Its name.
        parameters: Parameters of the model.
        steps: Optimizer steps.
        step_seconds: Audio of a step over all GPUs.
        gpus: GPUs that it is planned for: fewer than there are where more would save less than a tenth of the time.
        largest_batch_seconds: Audio of the largest batch that fits, data parallel; 0 if the model does not fit.
        options: Ways to do it.
        best: The fastest of those that fit and are not compiled; None if none fits.
        checkpoint_gb: Disk of a checkpoint; a run keeps two at times.
        labelling: Time and disk of its labels; None for fine-tuning, or if the hours of audio are not known.
    """

    name: str
    parameters: int
    steps: int
    step_seconds: float
    gpus: int
    largest_batch_seconds: float
    options: tuple[Option, ...]
    best: Option | None
    checkpoint_gb: float
    labelling: Labelling | None


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run.

    Args:
        device: One of them.
        gpus: Their number.
        gpus_per_node: GPUs in a node.
    """

    device: Device
    gpus: int
    gpus_per_node: int = 8


def plan_stage(stage: Stage, machine: Machine, hours: float | None) -> TrainingPlan:
    """Plan a training.

    Args:
        stage: The training.
        machine: The GPUs.
        hours: Hours of audio of the corpus; None if they are not known.
    """
    machine = replace(machine, gpus=_worthwhile(stage, machine))
    options = tuple(_options(stage, machine))
    row_frames = _row_frames(stage)
    memory = step_memory(stage.workload, row_frames=row_frames, gpus=machine.gpus, accumulates=True)
    frames_of_second = row_frames / stage.row_seconds
    labelling = None
    if stage.labels is not None and hours is not None:
        labelling = plan_labels(stage.labels, stage.workers, machine, hours, stage.workload.encoder.clock)
    parameters = num_parameters(stage.workload)
    return TrainingPlan(
        name=stage.name,
        parameters=parameters,
        steps=stage.steps,
        step_seconds=stage.step_seconds,
        gpus=machine.gpus,
        largest_batch_seconds=round(memory.largest_batch(machine.device.memory) / frames_of_second, 1),
        options=options,
        best=_fastest(options),
        checkpoint_gb=round(12 * parameters / 1e9, 2),
        labelling=labelling,
    )


def _fastest(options: Iterable[Option]) -> Option | None:
    fitting = [option for option in options if option.fits and not option.compiled]
    return min(fitting, key=lambda option: option.step_ms, default=None)


def _worthwhile(stage: Stage, machine: Machine) -> int:
    """Return the least number of GPUs that take at most `WORTHWHILE` times the time of any number that there is.

    A step that has few rows, or whose operations are launched more slowly than they are computed, is no faster on more.
    """
    most = min(machine.gpus, max(int(stage.step_seconds / stage.row_seconds + 1e-6), 1))
    numbers = sorted({*(2**power for power in range(most.bit_length())), most})
    times: dict[int, float] = {}
    for gpus in numbers:
        if best := _fastest(_options(stage, replace(machine, gpus=gpus))):
            times[gpus] = best.step_ms
    if not times:
        return machine.gpus
    return min(gpus for gpus in times if times[gpus] <= WORTHWHILE * min(times.values()))


def _options(stage: Stage, machine: Machine) -> Iterator[Option]:
    share = max(stage.step_seconds / machine.gpus, stage.row_seconds)
    batch = min(stage.batch_seconds, share)
    yield _option("as configured", stage, machine, batch, round(share / batch), stage.sharded, stage.compiled)
    one_fits = False  # unsharded
    for sharded in (False, True) if machine.gpus > 1 else (False,):
        if sharded and one_fits and not stage.sharded:
            continue
        row_frames = _row_frames(stage)
        memory = step_memory(
            stage.workload, row_frames=row_frames, gpus=machine.gpus, sharded=sharded, accumulates=True
        )
        rows = memory.largest_batch(machine.device.memory) // row_frames
        if rows < 1:
            continue
        one_fits = True
        accumulated = math.ceil(share / (rows * stage.row_seconds) - 1e-6)
        for compiled in (False, True):
            yield _option("largest batch", stage, machine, share / accumulated, accumulated, sharded, compiled)


def _option(
    name: str, stage: Stage, machine: Machine, seconds: float, accumulated: int, sharded: bool, compiled: bool
) -> Option:
    workload, device = stage.workload, machine.device
    rows = max(seconds / stage.row_seconds, 1)
    frames = _row_frames(stage)
    whole = max(round(rows), 1)
    per_row = round(frames * rows / whole)
    batch = Batch(whole, per_row, padded=bool(workload.tokens))
    step = step_cost(workload, batch, device, compiled=compiled, batches=accumulated).seconds
    if machine.gpus > 1:
        speed = link_speed(device, machine.gpus, machine.gpus_per_node)
        if sharded:
            step = max(step, accumulated * sharded_seconds(workload, machine.gpus, speed))
        else:
            step += max(data_parallel_seconds(workload, machine.gpus, speed) - HIDDEN * step / accumulated, 0)
    memory = step_memory(workload, row_frames=per_row, gpus=machine.gpus, sharded=sharded, accumulates=accumulated > 1)
    hours = step * stage.steps / 3600
    audio = whole * per_row * stage.row_seconds / frames * accumulated
    return Option(
        name=name,
        strategy="sharded" if sharded and machine.gpus > 1 else "data parallel",
        compiled=compiled,
        batch_seconds=round(seconds, 2),
        accumulated=accumulated,
        peak_gib=round(memory.peak(whole * per_row) / GIB, 1),
        fits=whole * per_row <= memory.largest_batch(device.memory),
        step_ms=round(step * 1e3, 1),
        audio_s_per_s=round(audio * machine.gpus / step, 1),
        share_of_matrix_rate=round(_operations(stage, whole, per_row) * accumulated / step / device.matrix, 3),
        hours=round(hours, 2),
        gpu_hours=round(hours * machine.gpus, 1),
    )


def _operations(stage: Stage, rows: int, frames: int) -> float:
    workload = stage.workload
    samples = round(frames * seconds_to_samples(stage.row_seconds) / _row_frames(stage))
    predicted = round(workload.predicted * frames)
    head = head_operations(workload.encoder.dim, workload.final_dim, list(workload.clusters), predicted)
    return float(rows * (encoder_operations(workload.encoder, samples) + head))


def _row_frames(stage: Stage) -> int:
    return num_frames(seconds_to_samples(stage.row_seconds), stage.workload.encoder.clock)


def plan_labels(labels: Labels, workers: int, machine: Machine, hours: float, clock: Clock = CLOCK) -> Labelling:
    """Predict how long the labels of an iteration take, and their disk.

    Args:
        labels: The labels.
        workers: Loader workers of each GPU.
        machine: The GPUs.
        hours: Hours of audio of the corpus.
        clock: Clock of the encoder that trains on the labels.
    """
    device = machine.device
    seconds = hours * 3600
    frames = seconds / clock.seconds
    sampled = min(labels.max_frames, frames)
    encoded = min(SAMPLED * sampled, frames) * clock.seconds
    speed = encoding_speed(labels, workers, device) * machine.gpus
    dim = max(encoder.dim if encoder else 39 for encoder, _ in labels.teachers)
    kmeans = 0.0
    for clusters in labels.clusters:
        product = Product(round(sampled), clusters, dim, dtype="float32").seconds(device)
        kmeans += PASSES * max(product, sampled * dim * 4 / FROM_HOST)
    streams = len(labels.clusters)
    label_bytes = frames * BYTES_OF_LABEL * streams + seconds / UTTERANCE * BYTES_OF_UTTERANCE
    sample, kmeans, encode = encoded / speed / 3600, kmeans / 3600, seconds / speed / 3600
    return Labelling(
        hours=round(sample + kmeans + encode, 3),
        sample_hours=round(sample, 3),
        kmeans_hours=round(kmeans, 3),
        encode_hours=round(encode, 3),
        label_gb=round(label_bytes / 1e9, 2),
    )


def encoding_speed(labels: Labels, workers: int, device: Device) -> float:
    """Seconds of audio that one GPU labels in a second, with its loader workers.

    Args:
        labels: The labels.
        workers: Loader workers of the GPU, which compute MFCCs.
        device: The GPU.
    """
    encoders = [(encoder, layer) for encoder, layer in labels.teachers if encoder is not None]
    if not encoders:
        return MFCC_SPEED * max(workers, 1)
    frames, seconds = 0, 0.0
    for encoder, layer in encoders:
        frames = num_frames(seconds_to_samples(CROP), encoder.clock)
        batch = Batch(6, frames, padded=True)
        seconds += sum(work.seconds(device) for _, work in encoder_work(encoder, batch, layer))
    of_mfcc = (len(labels.teachers) - len(encoders)) * batch.rows * CROP / (MFCC_SPEED * max(workers, 1))
    for clusters in labels.clusters:
        dim = max(encoder.dim for encoder, _ in encoders)
        seconds += Product(batch.rows * frames, clusters, dim, dtype="float32").seconds(device)
        seconds += Moved(8 * batch.rows * frames * clusters, 4).seconds(device)
    return batch.rows * CROP / (seconds + of_mfcc)
