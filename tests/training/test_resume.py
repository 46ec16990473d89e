"""A run that ends at any moment is resumed by the same command, and ends in the weights of an uninterrupted run."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    RESUMED_STEPS,
    has_steps,
    logging_trainer,
    plain_adam,
    pretraining_data,
    pretraining_model,
    resumed_pretraining,
)
from lightning import Trainer

from hubert_lightning.cli import main
from hubert_lightning.training.callbacks.whole_steps import WholeSteps
from hubert_lightning.training.checkpoints import newest_checkpoint
from hubert_lightning.training.pretraining import HubertPretraining
from hubert_lightning.training.pretraining_data import PretrainingData
from hubert_lightning.untrusted.file_kind import is_whole_zip

# `hubert`, which kills itself at the n-th call of a function, after what it calls if "after" is asked for
KILLED = """
import functools, importlib, os, signal
from hubert_lightning.cli import main
module, name, number, when = os.environ["KILL"].split()
owner = importlib.import_module(module)
if "." in name:
    part, name = name.split(".")
    owner = getattr(owner, part)
function, calls = getattr(owner, name), 0
@functools.wraps(function)
def fatal(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(number) and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = function(*args, **kwargs)
    if calls == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, fatal)
main()
"""
KILLS = [
    # while the labels of iteration 1 are made: one shard is written, and not yet named whole
    "hubert_lightning.units.label_writer write_shard 1 after",
    # in the middle of a step: one of its two batches is accumulated
    "hubert_lightning.training.pretraining HubertPretraining.training_step 10 after",
    # while a checkpoint is written
    "hubert_lightning.training.averaging torch.save 2 after",
    # between the renames of a save
    "hubert_lightning.training.checkpoints os.replace 3 before",
    # iteration 2: after K-means, before the first label; then once more in a step
    "hubert_lightning.training.relabelling save_kmeans 1 after",
    "hubert_lightning.training.pretraining HubertPretraining.configure_gradient_clipping 5 before",
]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def run(manifests: Path, output: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hubert_lightning", *resumed_pretraining(manifests, output)],
        env=environment(),
        check=True,
    )


@pytest.fixture(scope="module")
def whole(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing ended."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run(manifests, output)
    return output


def batches(checkpoint: dict) -> dict[str, int]:
    counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return {part: counts[part]["processed"] for part in ("total", "current")}


def assert_the_same(here: Path, there: Path) -> None:
    for iteration in ("iteration1", "iteration2"):
        ours, theirs = (torch.load(of / iteration / "last.ckpt", weights_only=True) for of in (here, there))
        assert ours["global_step"] == theirs["global_step"] == RESUMED_STEPS
        assert batches(ours) == batches(theirs) == {"total": 2 * RESUMED_STEPS, "current": batches(theirs)["current"]}
        for part in ("state_dict", "optimizer_states", "lr_schedulers"):
            torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
        labels = [
            {file.name: file.read_bytes() for file in (of / iteration / "labels").iterdir()} for of in (here, there)
        ]
        assert labels[0] == labels[1]


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_weights(
    manifests: Path, whole: Path, tmp_path: Path
) -> None:
    for kill in KILLS:
        died = subprocess.run(
            [sys.executable, "-c", KILLED, *resumed_pretraining(manifests, tmp_path / "run")],
            env=environment(KILL=kill),
            check=False,
        )
        assert died.returncode == -signal.SIGKILL, kill
    run(manifests, tmp_path / "run")
    assert_the_same(tmp_path / "run", whole)


def second_iteration_unfinished(whole: Path, output: Path) -> Path:
    shutil.copytree(whole, output)
    (output / "iteration2" / "metrics.json").unlink()
    return output / "iteration2"


@pytest.mark.parametrize("damage", ["cut short", "changed"])
def test_a_corrupt_checkpoint_is_skipped_with_a_warning(
    damage: str, manifests: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.set_num_threads(1)  # as the run that nothing ended
    last = second_iteration_unfinished(whole, tmp_path / "run") / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content[: len(content) // 2] if damage == "cut short" else content)
    assert not is_whole_zip(last)
    main(resumed_pretraining(manifests, tmp_path / "run"))
    assert f"{last} is corrupt; training resumes from the checkpoint before it" in caplog.text
    assert_the_same(tmp_path / "run", whole)


def test_a_run_without_an_intact_checkpoint_does_not_start_from_step_0(
    manifests: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = second_iteration_unfinished(whole, tmp_path / "run")
    for name in ("last.ckpt", "previous.ckpt"):
        (folder / name).write_bytes(b"")
    with pytest.raises(SystemExit):
        main(resumed_pretraining(manifests, tmp_path / "run"))
    assert f"{folder / 'last.ckpt'}: corrupt, and no other checkpoint of this run is intact" in capsys.readouterr().err


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from hubert_lightning.training.checkpoints import WholeCheckpoints
path = Path(sys.argv[1])
WholeCheckpoints().save_checkpoint({"step": 1}, path)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    WholeCheckpoints().save_checkpoint({"step": 2, "weight": torch.zeros(10_000)}, path)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    typed = [sys.executable, "-c", FULL_DISK, str(tmp_path / "last.ckpt")]
    message = subprocess.run(typed, capture_output=True, text=True, check=True).stdout
    assert f"{tmp_path / 'last.ckpt'}: cannot be written" in message
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert torch.load(newest, weights_only=True) == {"step": 1}


def constant_rate() -> HubertPretraining:
    model = pretraining_model()
    model.configure_optimizers = lambda: plain_adam(model.parameters())  # type: ignore[method-assign]
    return model


@pytest.mark.slow
@pytest.mark.parametrize("beyond", [0, 1])
def test_a_run_that_ended_with_an_epoch_resumes_with_the_next(beyond: int, manifests: Path, tmp_path: Path) -> None:
    def trainer(steps: int) -> Trainer:
        made = logging_trainer(
            tmp_path, steps, accumulate_grad_batches=2, val_check_interval=3, check_val_every_n_epoch=None
        )
        made.callbacks.append(WholeSteps())  # type: ignore[attr-defined]
        return made

    def data() -> PretrainingData:
        return pretraining_data(manifests, num_workers=0, max_duration=6, min_duration=0.5)

    measured = trainer(1)
    measured.fit(constant_rate(), datamodule=data())
    epoch = int(measured.num_training_batches) // 2  # steps
    assert epoch > 2
    whole = constant_rate()
    trainer(epoch + 4).fit(whole, datamodule=data())
    ended = trainer(epoch + beyond)
    ended.fit(constant_rate(), datamodule=data())
    ended.save_checkpoint(tmp_path / "ended.ckpt")
    rest, model = trainer(epoch + 4), constant_rate()
    rest.fit(model, datamodule=data(), ckpt_path=tmp_path / "ended.ckpt", weights_only=True)
    for (name, there), here in zip(whole.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_another_global_batch_is_refused(manifests: Path, tmp_path: Path) -> None:
    first = logging_trainer(tmp_path, 2, accumulate_grad_batches=2)
    first.callbacks.append(WholeSteps())  # type: ignore[attr-defined]
    first.fit(constant_rate(), datamodule=pretraining_data(manifests, num_workers=0))
    first.save_checkpoint(tmp_path / "two.ckpt")
    other = logging_trainer(tmp_path, 4, accumulate_grad_batches=3)
    other.callbacks.append(WholeSteps())  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="has 1 ranks x 2 batches, not 1 x 3; keep the product"):
        other.fit(
            constant_rate(),
            datamodule=pretraining_data(manifests, num_workers=0),
            ckpt_path=tmp_path / "two.ckpt",
            weights_only=True,
        )


@pytest.mark.slow
@pytest.mark.parametrize(("told", "processes"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 1)])
def test_a_run_that_receives_a_signal_saves_after_the_step_and_resumes(
    told: signal.Signals, processes: int, manifests: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "output.txt"
    many = "--iterations=[{features: mfcc, clusters: 20, max_frames: 2000, max_steps: 100000}]"
    more = ["--checkpoint.every_n_train_steps=50000", many]
    if processes == 2:
        more += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    requeue = tmp_path / "scontrol"
    requeue.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    requeue.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "17", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with log.open("w") as file:
        running = subprocess.Popen(
            [sys.executable, "-m", "hubert_lightning", *resumed_pretraining(manifests, output), *more],
            env=environment(**slurm),
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            trains = has_steps(output, 1)
            while running.poll() is None and not trains():
                time.sleep(0.05)
            running.send_signal(told)  # the first process alone: the other hears of it from this one
            code = running.wait(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    assert code == 128 + told, log.read_text()[-3000:]
    message = re.search(rf"hubert: {told.name}: saved at step (\d+); the same command resumes\n", log.read_text())
    assert message, log.read_text()[-3000:]
    saved = torch.load(output / "iteration1" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == int(message[1]) > 0
    assert "Traceback" not in log.read_text()
    assert (tmp_path / "requeued").exists() == (told == signal.SIGUSR1)
    alone = f"--trainer.accumulate_grad_batches={2 * processes}"  # steps of as many batches
    main([*resumed_pretraining(manifests, output), many.replace("100000", str(saved["global_step"] + 1)), alone])
    assert json.loads((output / "iteration1" / "metrics.json").read_text())["steps"] == saved["global_step"] + 1
