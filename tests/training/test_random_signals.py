"""A campaign of signals at random moments: whatever is sent, the same command ends in the results of a quiet run.

pytest -m slow tests/training/test_random_signals.py
"""

import json
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import fork_server
import pytest
import torch
from helpers import resumed_pretraining

pytestmark = pytest.mark.campaign
ENDED = {0, 1, 130, 143}
"""Exit statuses: at its end, after another rank was stopped or killed, saved and left."""


def start(manifests: Path, output: Path, ranks: int) -> list[BaseProcess]:
    typed = resumed_pretraining(manifests, output)
    quick = ["--stalls.timeout=0.15", "--stalls.step_timeout=2"]
    if ranks == 1:
        return [fork_server.start([*typed, *quick], output.with_name("output0.txt"))]
    on_two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accumulate_grad_batches=1"]
    return [
        fork_server.start([*typed, *quick, *on_two], output.with_name(f"output{rank}.txt"), environment=environment)
        for rank, environment in enumerate(fork_server.of_ranks(ranks))
    ]


def disturb(processes: list[BaseProcess], draw: random.Random) -> str:
    """Send something to one rank or all, to its process or to its workers too."""
    what = draw.choice(["SIGINT", "SIGTERM", "SIGINT twice", "SIGSTOP for a second", "SIGSTOP for long"])
    some = processes if draw.random() < 0.5 else [draw.choice(processes)]
    to_all = draw.random() < 0.5
    for process in some:
        send(process, signal.SIGTERM if what == "SIGTERM" else signal.Signals[what.split()[0]], to_all)
    if what == "SIGINT twice":
        time.sleep(0.3)
        for process in some:
            send(process, signal.SIGINT, to_all)
    if what.startswith("SIGSTOP"):
        time.sleep(1 if what.endswith("second") else 14)
        for process in some:
            send(process, signal.SIGCONT, to_all)
    return f"{what} to {'the group of ' if to_all else ''}{len(some)} of {len(processes)}"


def send(process: BaseProcess, number: int, to_group: bool) -> None:
    if process.exitcode is None:
        (os.killpg if to_group else os.kill)(process.pid, number)


def wait(processes: list[BaseProcess], seconds: float) -> list[int | None]:
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(until - time.monotonic(), 0))
    return [process.exitcode for process in processes]


def results(output: Path) -> dict[str, object]:
    kept: dict[str, object] = {}
    for folder in sorted(output.glob("iteration*")):
        checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
        parts = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
        kept |= {f"{folder.name}/{part}": checkpoint[part] for part in parts}
        kept[f"{folder.name}/kmeans"] = (folder / "kmeans.safetensors").read_bytes()
        kept[f"{folder.name}/steps"] = json.loads((folder / "metrics.json").read_text())["steps"]
        kept |= {str(file.relative_to(output)): file.read_bytes() for file in (folder / "labels").iterdir()}
    return kept


@pytest.fixture(scope="module")
def quiet(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[dict[str, object], float]]:
    """The results of runs of one and two ranks that nothing disturbs, and how long they take."""
    runs = {}
    assert fork_server.run(["fit", "--help"], tmp_path_factory.mktemp("help") / "output.txt") == 0  # it has started
    for ranks in (1, 2):
        output = tmp_path_factory.mktemp(f"quiet{ranks}") / "run"
        began = time.monotonic()
        processes = start(manifests, output, ranks)
        assert wait(processes, 300) == [0] * ranks, output.with_name("output0.txt").read_text()[-3000:]
        runs[ranks] = results(output), time.monotonic() - began
        fork_server.end(*processes)
    return runs


@pytest.mark.parametrize("seed", range(int(os.environ.get("SIGNALS", "10"))))
def test_the_results_are_those_of_a_quiet_run(
    seed: int, quiet: dict[int, tuple[dict[str, object], float]], manifests: Path, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    ranks = draw.choice([1, 2])
    expected, seconds = quiet[ranks]
    sent = []
    for disturbed in (True, True, True, False):  # starts of the command
        processes = start(manifests, tmp_path / "run", ranks)
        wait(processes, draw.uniform(0.05, 0.8) * seconds if disturbed else 300)
        if disturbed and any(process.exitcode is None for process in processes):
            sent.append(disturb(processes, draw))
            codes = wait(processes, 90)
        else:
            codes = wait(processes, 300)
        fork_server.end(*processes)
        message = "".join((tmp_path / f"output{rank}.txt").read_text() for rank in range(ranks))
        assert set(codes) <= ENDED, (sent, codes, message[-3000:])
        assert "Traceback" not in message, (sent, message[-5000:])
        if codes == [0] * ranks:
            break
    assert codes == [0] * ranks, (sent, message[-3000:])
    ours = results(tmp_path / "run")
    assert ours.keys() == expected.keys()
    for name, there in expected.items():
        if isinstance(there, bytes):
            assert ours[name] == there, f"{name} after {sent}"
        else:
            torch.testing.assert_close(ours[name], there, rtol=0, atol=0, msg=f"{name} after {sent}")
    print(f"seed {seed}: {'; '.join(sent) or 'nothing was sent'}")
