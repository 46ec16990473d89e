"""What tracking costs: steps of one run with and without it, in turns.

    python benchmarks/tracking.py CONFIG FOLDER [OPTION…]

CONFIG and the options are those of `hubert fit`, FOLDER is its output. Blocks of steps alternate: in one, the callbacks
that track and the loggers (W&B offline and metrics.csv) work as in any run; in the next one they are off. Printed are
the medians over the blocks of the time of a step, and the median of the differences between neighbours: as the clock
shows it, and as the processor time of this process, which other processes do not disturb as much.
"""

import os
import statistics
import sys
import time
from typing import Any

from lightning import Callback, LightningModule, Trainer

from hubert_lightning.cli import main
from hubert_lightning.training.callbacks.alerts import RunAlerts
from hubert_lightning.training.callbacks.collapse import CollapseWatch
from hubert_lightning.training.callbacks.throughput import Throughput

TRACKING = (Throughput, CollapseWatch, RunAlerts)
BLOCK, WARM_UP = 20, 40
"""Steps of a block; steps before the first one."""


class Turns(Callback):
    """Switches tracking on and off, and times both."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        self.callbacks: list[Callback] = list(trainer.callbacks)  # type: ignore[attr-defined]
        self.first = trainer.global_step + WARM_UP
        self.times: list[tuple[float, float]] = []
        self.seconds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        self.tracking = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        done = trainer.global_step - self.first
        if done < 0 or done % BLOCK:
            return
        now = time.perf_counter(), time.process_time()
        if done:
            wall, used = (1e3 * (after - before) / BLOCK for after, before in zip(now, self.times[-1], strict=True))
            self.seconds[self.tracking].append((wall, used))
            self.tracking = not self.tracking
        bare = [callback for callback in self.callbacks if not isinstance(callback, TRACKING)]
        trainer.callbacks = self.callbacks if self.tracking else bare  # type: ignore[attr-defined]
        trainer.log_every_n_steps = self.every if self.tracking else 0  # type: ignore[attr-defined]
        self.times.append((time.perf_counter(), time.process_time()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.callbacks = self.callbacks  # type: ignore[attr-defined]
        pairs = min(map(len, self.seconds.values()))
        for number, clock in enumerate(("clock", "processor time")):
            tracked, bare = ([block[number] for block in self.seconds[kind][:pairs]] for kind in (True, False))
            differences = [with_it - without for with_it, without in zip(tracked, bare, strict=True)]
            middle, cost = statistics.median(bare), statistics.median(differences)
            print(
                f"{clock}: {statistics.median(tracked):.2f} ms a step with tracking, {middle:.2f} ms without; median "
                f"difference {cost:+.3f} ms, {cost / middle:+.2%}, of {pairs} pairs of {BLOCK} steps, logs every "
                f"{self.every} steps"
            )


if __name__ == "__main__":
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    sys.modules["tracking"] = sys.modules["__main__"]
    config, folder, *options = sys.argv[1:]
    logger = "{class_path: lightning.pytorch.loggers.WandbLogger, init_args: {project: tracking}}"
    callbacks = ["--trainer.callbacks+=tracking.Turns"]
    main(["fit", "--config", config, f"--output={folder}", f"--trainer.logger={logger}", *options, *callbacks])
