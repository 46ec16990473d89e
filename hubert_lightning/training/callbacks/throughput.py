"""The speed of training, and how long it waits for data."""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.training.lightning_internals import time_fetches
from hubert_lightning.training.task import Task, logs_step

# Lightning's ThroughputMonitor waits for the GPU after every batch, has one number of FLOPs for all batches, no MFU on
# CPUs and no waiting time; its audio a second agrees within 3 %. Its `measure_flops` takes 1.1 s for each length of a
# batch, and counts 16 % too many for Base: torch's counter ignores groups in the gradient of a convolution's weights.


class Throughput(Callback):
    """Log the speed of the steps since the last log.

    - speed/audio_seconds_per_second: Seconds of audio that all ranks together train on in a second.
    - speed/waste: Fraction of the audio that is cropped away (pre-training) or added as padding (fine-tuning).
    - speed/data_wait: Fraction of the time in which this rank waits for a batch from its workers. A GPU works through
      a queue, so this is an upper bound of its own waiting time.
    - speed/mfu: Model FLOPs utilisation, the operations of the model in a second as a fraction of `product_tflops`.
    - speed/product_tflops: 10¹² operations a second of a dense matrix product on this rank's device in the precision of
      the run, measured at the start. Vendors state rates that no product reaches, some with sparsity.
    - speed/memory_gib: Largest memory of tensors on this rank's GPU since the start; on a CPU, that of the process.

    The time includes checkpoints, but not validation.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._peak = _peak_speed(trainer)
        self._restart(trainer)

        def start_waiting() -> None:
            self._wait_start = time.perf_counter()

        def stop_waiting() -> None:
            self._waited += time.perf_counter() - self._wait_start

        time_fetches(trainer, start_waiting, stop_waiting)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:  # Any: the batch of either task
        assert isinstance(pl_module, Task)
        seconds = batch.waveform.numel() / SAMPLE_RATE
        self._seconds += seconds
        self._wasted += seconds * batch.waste
        self._operations += pl_module.operations(batch)
        if trainer.global_step != self._step and logs_step(trainer, trainer.global_step):
            elapsed = time.perf_counter() - self._start
            speed = {
                "audio_seconds_per_second": self._seconds * trainer.world_size / elapsed,
                "waste": self._wasted / self._seconds,
                "data_wait": self._waited / elapsed,
                "mfu": self._operations / elapsed / self._peak,
                "product_tflops": self._peak / 1e12,
                "memory_gib": _memory(trainer.strategy.root_device) / 2**30,
            }
            for name, value in speed.items():  # Lightning would copy numbers to the GPU, and wait for each
                pl_module.log(f"speed/{name}", torch.tensor(value))
            self._restart(trainer)

    def _restart(self, trainer: Trainer) -> None:
        self._seconds, self._wasted, self._operations, self._waited = 0.0, 0.0, 0, 0.0
        self._start = self._wait_start = time.perf_counter()
        self._step = trainer.global_step


def _memory(device: torch.device) -> int:
    """Return bytes; neither number waits for the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak_speed(trainer: Trainer) -> float:
    """Return the operations in a second of one rank's device at the trainer's precision."""
    device, precision = trainer.strategy.root_device, str(trainer.precision)
    reduced = torch.float16 if "16" in precision and "bf" not in precision else torch.bfloat16
    return measured_speed(device, reduced if "16" in precision else torch.float32)


def measured_speed(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    """Measure the operations in a second of a matrix product.

    Args:
        device: Device to measure.
        dtype: Precision of the matrices.
        size: Rows and columns of the matrices on a CPU; a GPU gets eight times as many.
        repeats: Number of measurements, of which the fastest counts; each is of one product, on a GPU of four.
    """
    size, products = (8 * size, 4) if device.type == "cuda" else (size, 1)
    # On the device: a CPU takes most of a second to draw so many numbers
    matrix = torch.randn(size, size, device=device, dtype=dtype, generator=torch.Generator(device))
    result, seconds = torch.empty_like(matrix), []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(matrix, matrix, out=result)
        result[0, 0].item()  # waits for the products
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 * products / min(seconds)
