"""Ctrl-C and SIGTERM, sent to real processes: one sentence, the right exit status, and a run that resumes."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import fork_server
import pytest
import soundfile
import torch
from helpers import LABELLING, ROOT, has_steps, long_pretraining, prints_text, wait_until, with_folder

from hubert_lightning import interrupts
from hubert_lightning.cli import main

SAVED = re.compile(r"hubert: (Ctrl-C|SIGTERM|SIGUSR1): saved at step (\d+); the same command resumes\n")
# A callback by which each step and each batch of validation takes longer
SLOW = """
import time

from lightning import Callback


class Slow(Callback):
    def __init__(self, step: float = 0.0, validation: float = 0.0) -> None:
        self.step, self.validation = step, validation

    def on_train_batch_start(self, *_):
        if self.step:
            print("a step begins", flush=True)
        time.sleep(self.step)

    def on_validation_batch_start(self, *_):
        print("validation begins", flush=True)
        time.sleep(self.validation)

    on_test_batch_start = on_validation_batch_start
"""


def to_group(process: BaseProcess, number: int) -> None:
    """As a terminal does: to the process and to its workers."""
    os.killpg(process.pid, number)


def step_of(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_saves_after_the_step(
    number: signal.Signals, manifests: Path, tmp_path: Path
) -> None:
    process = fork_server.start(long_pretraining(manifests, tmp_path / "run"), tmp_path / "output.txt")
    wait_until(has_steps(tmp_path / "run"), process)
    to_group(process, number)
    assert fork_server.ended(process, 60) == 128 + number
    printed = (tmp_path / "output.txt").read_text()
    [(_, step)] = SAVED.findall(printed)
    assert step_of(tmp_path / "run/iteration1/last.ckpt") == int(step) > 0
    assert "Traceback" not in printed
    more = long_pretraining(manifests, tmp_path / "run", steps=int(step) + 1)
    assert fork_server.run(more, tmp_path / "again.txt") == 0
    assert json.loads((tmp_path / "run/iteration1/metrics.json").read_text())["steps"] == int(step) + 1


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(manifests: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    slow = "--trainer.callbacks+={class_path: slow.Slow, init_args: {step: 600}}"
    environment = dict(os.environ) | {"PYTHONPATH": str(tmp_path)}
    output = tmp_path / "output.txt"
    process = fork_server.start(
        long_pretraining(manifests, tmp_path / "run", slow),
        output,
        folder=tmp_path,
        environment=environment,
        before=with_folder,
    )
    wait_until(prints_text(output, "a step begins"), process)
    to_group(process, signal.SIGINT)
    wait_until(prints_text(output, "saving after this step; a second one ends at once"), process)
    time.sleep(0.5)
    to_group(process, signal.SIGINT)
    assert fork_server.ended(process, 120) == 130  # the step lasts ten minutes
    assert "hubert: Ctrl-C again: ended at once; what was saved before is kept\n" in output.read_text()
    assert "Traceback" not in output.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_labels_are_made_ends_at_once_and_names_what_is_kept(
    number: signal.Signals, manifests: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output.txt"
    labels = f"--iterations=[{{features: mfcc, {LABELLING}}}]"
    process = fork_server.start(long_pretraining(manifests, tmp_path / "run", labels), output)
    wait_until(prints_text(output, "K-means: 1500 clusters"), process)
    to_group(process, number)
    assert fork_server.ended(process, 60) == 128 + number
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert re.search(
        rf"hubert: {name} while making labels \(K-means, 1500 clusters\): finished work is kept; "
        "the same command resumes\n",
        output.read_text(),
    )
    assert "Traceback" not in output.read_text()
    assert not list((tmp_path / "run").rglob("*.part*"))


def test_ranks_that_wait_for_labels_end_with_the_one_that_makes_them(manifests: Path, tmp_path: Path) -> None:
    labels = f"--iterations=[{{features: mfcc, {LABELLING}}}]"
    more = [labels, "--trainer.devices=2", "--trainer.strategy=ddp"]
    outputs = [tmp_path / f"output{rank}.txt" for rank in range(2)]
    ranks = [
        fork_server.start(long_pretraining(manifests, tmp_path / "run", *more), output, environment=environment)
        for output, environment in zip(outputs, fork_server.of_ranks(2), strict=True)
    ]
    wait_until(prints_text(outputs[0], "K-means: 1500 clusters"), ranks[0])
    for rank in ranks:
        to_group(rank, signal.SIGINT)
    assert [fork_server.ended(rank, 60) for rank in ranks] == [130, 130]
    message = "".join(output.read_text() for output in outputs)
    assert message.count("hubert: Ctrl-C while making labels") == 1
    assert "Traceback" not in message


@pytest.mark.slow
def test_a_validation_is_abandoned_and_repeated(manifests: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    output, run = tmp_path / "output.txt", tmp_path / "run"
    environment = dict(os.environ) | {"PYTHONPATH": str(tmp_path)}
    slow = [
        "--trainer.callbacks+={class_path: slow.Slow, init_args: {validation: 2}}",
        "--trainer.val_check_interval=2",
    ]
    slow += ["--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=1.0", "--data.init_args.max_duration=3"]
    process = fork_server.start(
        long_pretraining(manifests, run, *slow), output, folder=tmp_path, environment=environment, before=with_folder
    )
    wait_until(prints_text(output, "validation begins"), process)
    to_group(process, signal.SIGTERM)
    assert fork_server.ended(process, 60) == 143
    message = output.read_text()
    assert "SIGTERM: saving; the same command repeats this validation" in message
    assert SAVED.findall(message) == [("SIGTERM", "2")]
    assert message.count("validation begins") == 1  # of many batches
    assert step_of(run / "iteration1/last.ckpt") == 2


@pytest.fixture(scope="module")
def finetuned(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning of two steps, from scratch."""
    output = tmp_path_factory.mktemp("finetuned") / "run"
    data = [f"--data.init_args.{part}=[{manifests / 'dev.jsonl.gz'}]" for part in ("train", "validation", "test")]
    args = [
        "fit",
        *("--config", str(ROOT / "configs/finetune/small.yaml")),
        *("--config", str(ROOT / "tests/smoke-finetune.yaml")),
        *data,
        f"--output={output}",
        "--model.init_args.pretrained=null",
    ]
    assert fork_server.run(args, output.with_name("output.txt")) == 0, output.with_name("output.txt").read_text()
    return output


@pytest.mark.parametrize(
    ("verb", "what", "kept"),
    [
        ("validate", r"validating \(batch 1\)", "nothing is changed; the same command starts it again"),
        ("test", r"testing \(batch 1\)", "its results are not written; the same command starts it again"),
    ],
)
def test_a_signal_while_a_model_is_judged_ends_at_once(
    verb: str, what: str, kept: str, finetuned: Path, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    output = tmp_path / "output.txt"
    process = fork_server.start(
        [
            verb,
            "--config",
            str(finetuned / "config.yaml"),
            "--trainer.callbacks+={class_path: slow.Slow, init_args: {validation: 600}}",
        ],
        output,
        folder=tmp_path,
        environment=dict(os.environ) | {"PYTHONPATH": str(tmp_path)},
        before=with_folder,
    )
    wait_until(prints_text(output, "validation begins"), process)
    before = sorted(path.name for path in finetuned.iterdir())
    to_group(process, signal.SIGINT)
    assert fork_server.ended(process, 120) == 130
    assert re.search(rf"hubert: Ctrl-C while {what}: {kept}\n", output.read_text()), output.read_text()
    assert "Traceback" not in output.read_text()
    assert sorted(path.name for path in finetuned.iterdir()) == before


# `hubert prepare`, each of whose files takes a second to decode
SLOW_FILES = """
import sys, time
from hubert_lightning.cli import main
from hubert_lightning.data import examine
probe = examine.probe
def slow(path):
    time.sleep(1)
    print("a file", flush=True)
    return probe(path)
examine.probe = slow
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_ctrl_c_ends_a_verb_after_the_files_that_it_reads(tmp_path: Path) -> None:
    (tmp_path / "recordings").mkdir()
    for number in range(400):
        soundfile.write(tmp_path / "recordings" / f"{number}.wav", [0.0] * 16000, 16000)
    (tmp_path / "slow_files.py").write_text(SLOW_FILES)
    output = tmp_path / "output.txt"
    typed = [str(tmp_path / "slow_files.py"), "prepare", "folder", str(tmp_path / "recordings"), str(tmp_path / "out")]
    process = fork_server.start(typed, output)
    wait_until(prints_text(output, "a file"), process)
    to_group(process, signal.SIGINT)
    assert fork_server.ended(process, 100) == 130  # all files take 400 s and more
    assert output.read_text().endswith(
        "hubert: interrupted; finished files are complete, and the same command does the rest\n"
    )
    assert "Traceback" not in output.read_text()
    assert not list((tmp_path / "out").iterdir())


def test_handlers_are_as_they_were_after_a_command(finetuned: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    threads = threading.enumerate()  # a refused fit of another test may have left its own
    main(["validate", "--config", str(finetuned / "config.yaml")])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1
    left = [thread for thread in threading.enumerate() if thread.name in ("interrupts", "stalls")]
    for thread in {*left} - {*threads}:
        thread.join(60)
        assert not thread.is_alive()


FINALIZER = """
import signal, time
from hubert_lightning.interrupts import listening
class Slow:
    def __del__(self):
        print("the finalizer", flush=True)
        time.sleep(1)
with listening([signal.SIGINT], lambda name: f"{name}: what was finished before is kept"):
    Slow()
    time.sleep(600)
"""


def test_a_signal_in_a_finalizer_where_python_raises_nothing_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "finalizer.py").write_text(FINALIZER)
    output = tmp_path / "output.txt"
    process = fork_server.start([str(tmp_path / "finalizer.py")], output)
    wait_until(prints_text(output, "the finalizer"), process)
    os.kill(process.pid, signal.SIGINT)
    assert fork_server.ended(process, 120) == 130
    assert output.read_text() == "the finalizer\nhubert: Ctrl-C: what was finished before is kept\n"


def test_a_clean_end_waits_for_ranks_that_take_long_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "REACTION_TIME", 0.05)
    with interrupts.listening([signal.SIGUSR1], str):
        signals = interrupts.current()
        assert signals is not None
        process = subprocess.Popen(["sh", "-c", f"sleep 0.5; touch {tmp_path / 'ended'}"])
        signals.launched = [process]
    assert process.returncode == 0
    assert (tmp_path / "ended").exists()


def test_a_signal_ends_the_wait_for_other_ranks_and_them() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    process = subprocess.Popen(["sh", "-c", "trap '' TERM; exec sleep 600"])

    def wait_for_it() -> None:
        with interrupts.listening([signal.SIGUSR1], str):
            signals = interrupts.current()
            assert signals is not None
            signals.launched = [process]
            threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGUSR1]).start()

    try:
        with pytest.raises(interrupts.Interrupted):
            wait_for_it()
        assert process.wait(120) in (-signal.SIGTERM, -signal.SIGKILL)
        assert not [thread for thread in threading.enumerate() if thread.name == "interrupts"]
    finally:
        signal.signal(signal.SIGUSR1, before)
