"""Whenever a run is ended, the same command goes on, and ends in the very weights of a run that nothing ended."""

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
from conftest import ROOT

from hubert_lightning.checkpoints import WholeCheckpoints, is_whole, newest_checkpoint
from hubert_lightning.cli import main

STEPS = 8
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
    "hubert_lightning.relabelling write_shard 1 after",
    # in the middle of a step: one of its two batches is accumulated
    "hubert_lightning.pretraining HubertPretraining.training_step 10 after",
    # while a checkpoint is written
    "hubert_lightning.checkpoints torch.save 2 after",
    # when the checkpoint before has lost its name, and the new one has none yet
    "hubert_lightning.checkpoints os.replace 3 before",
    # iteration 2: after K-means, before the first label; then once more in a step
    "hubert_lightning.relabelling save_kmeans 1 after",
    "hubert_lightning.pretraining HubertPretraining.configure_gradient_clipping 5 before",
]


def command(manifests: Path, output: Path) -> list[str]:
    iterations = (
        f"--iterations=[{{features: mfcc, clusters: 20, max_frames: 2000, max_steps: {STEPS}}},"
        f"{{features: previous, layer: 1, clusters: 10, max_frames: 2000, max_steps: {STEPS}}}]"
    )
    return [
        "fit",
        *("--config", str(ROOT / "configs/demo.yaml")),
        *("--config", str(ROOT / "tests/smoke.yaml")),
        f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
        f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
        "--data.init_args.max_duration=6",
        "--data.init_args.num_workers=2",
        "--model.init_args.encoder={dropout: 0.1, attention_dropout: 0.1, input_dropout: 0.1, layer_drop: 0.3}",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.val_check_interval=6",
        "--checkpoint.every_n_train_steps=2",
        iterations,
        f"--output={output}",
    ]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def run(manifests: Path, output: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hubert_lightning", *command(manifests, output)], env=environment(), check=True
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
        assert ours["global_step"] == theirs["global_step"] == STEPS
        assert batches(ours) == batches(theirs) == {"total": 2 * STEPS, "current": batches(theirs)["current"]}
        for part in ("state_dict", "optimizer_states", "lr_schedulers"):
            torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
        labels = [
            {file.name: file.read_bytes() for file in (of / iteration / "labels").iterdir()} for of in (here, there)
        ]
        assert labels[0] == labels[1]


def test_a_run_that_is_killed_again_and_again_ends_in_the_same_weights(
    manifests: Path, whole: Path, tmp_path: Path
) -> None:
    for kill in KILLS:
        died = subprocess.run(
            [sys.executable, "-c", KILLED, *command(manifests, tmp_path / "run")],
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
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    damage: str, manifests: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.set_num_threads(1)  # as the run that nothing ended
    last = second_iteration_unfinished(whole, tmp_path / "run") / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content[: len(content) // 2] if damage == "cut short" else content)
    assert not is_whole(last)
    main(command(manifests, tmp_path / "run"))
    assert f"{last} is damaged, and passed over" in caplog.text
    assert_the_same(tmp_path / "run", whole)


def test_a_run_without_a_sound_checkpoint_is_not_started_anew(
    manifests: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = second_iteration_unfinished(whole, tmp_path / "run")
    for name in ("last.ckpt", "previous.ckpt"):
        (folder / name).write_bytes(b"")
    with pytest.raises(SystemExit):
        main(command(manifests, tmp_path / "run"))
    assert f"{folder / 'last.ckpt'}: damaged, and no other checkpoint of this run is whole" in capsys.readouterr().err


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WholeCheckpoints().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hubert_lightning.files.os.fsync", full)
    with pytest.raises(ValueError, match="cannot be written"):
        WholeCheckpoints().save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert torch.load(newest, weights_only=True) == {"step": 1}


@pytest.mark.parametrize(("told", "processes"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 1)])
def test_a_run_that_is_told_to_end_saves_after_the_step_and_goes_on(
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
            [sys.executable, "-m", "hubert_lightning", *command(manifests, output), *more],
            env=environment(**slurm),
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            metrics = output / "iteration1" / "metrics.csv"
            while running.poll() is None and not (metrics.exists() and metrics.stat().st_size):
                time.sleep(0.05)
            running.send_signal(told)  # the first process alone: the other hears of it from this one
            code = running.wait(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    assert code == 128 + told, log.read_text()[-3000:]
    said = re.search(rf"told to end \({told.name}\): saved after step (\d+)", log.read_text())
    assert said, log.read_text()[-3000:]
    saved = torch.load(output / "iteration1" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == int(said[1]) > 0
    assert "Traceback" not in log.read_text()
    assert (tmp_path / "requeued").exists() == (told == signal.SIGUSR1)
    main([*command(manifests, output), many.replace("100000", str(saved["global_step"] + 1))])
    assert json.loads((output / "iteration1" / "metrics.json").read_text())["steps"] == saved["global_step"] + 1
