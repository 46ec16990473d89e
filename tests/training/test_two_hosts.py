"""Training on several hosts through the scripts of configs/launch, which end in the weights of one host.

The hosts are network namespaces of this machine, each with an address, a list of processes and an environment of its
own; what they share is the file system. SLURM is a stand-in `srun`, which starts what it is given as SLURM would.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import ROOT
from torch import Tensor

pytestmark = pytest.mark.distributed

STEPS = 4
TORCHRUN, SLURM = (str(ROOT / "configs/launch" / name) for name in ("torchrun.sh", "slurm.sh"))
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # as `uv run` sets it
SMALL = {"CONFIG": str(ROOT / "configs/pretrain/small.yaml")}
JOB = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "1"}  # of two nodes
# A task on each of two nodes, which here are one machine
SRUN = """#!/usr/bin/env bash
shift # its own option
export SLURM_NTASKS=2 SLURM_NNODES=2 SLURM_NODELIST=127.0.0.1 SLURM_LOCALID=0
SLURM_PROCID=0 SLURM_NODEID=0 "$@" &
SLURM_PROCID=1 SLURM_NODEID=1 "$@" && wait $!
"""
# A callback by which the second host's process is killed before the last step, the first time that it gets there
DIES_ONCE = f"""
import os, signal

from lightning import Callback


class DiesOnce(Callback):
    def on_train_batch_start(self, trainer, *_):
        first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if trainer.global_step == {STEPS - 1} and trainer.node_rank == 1 and first_start:
            os.kill(os.getpid(), signal.SIGKILL)
"""


class Host(NamedTuple):
    """A namespace, by what starts a command in it, and its address."""

    enter: list[str]
    address: str


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """Two hosts with a cable between them."""
    if missing := [command for command in ("ip", "unshare") if not shutil.which(command)]:
        pytest.skip(f"two hosts need the command {missing[0]}, which is not here")
    if os.geteuid():
        pytest.skip("two hosts need network namespaces, which only root may make")
    names = [f"hubert-{secrets.token_hex(4)}-{number}" for number in range(2)]
    hosts = [
        Host(
            ["ip", "netns", "exec", name, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"],
            f"10.0.0.{number}",
        )
        for number, name in enumerate(names, start=1)
    ]
    first, second = names
    try:
        with contextlib.ExitStack() as stack:
            for name in names:
                _administer("ip", "netns", "add", name)
                stack.callback(_administer, "ip", "netns", "delete", name)
            cable = ["type", "veth", "peer", "name", "eth0", "netns", second]
            _administer("ip", "link", "add", "eth0", "netns", first, *cable)
            for name, host in zip(names, hosts):
                _administer("ip", "-n", name, "address", "add", f"{host.address}/24", "dev", "eth0")
                _administer("ip", "-n", name, "link", "set", "eth0", "up")
                _administer("ip", "-n", name, "link", "set", "lo", "up")
                _administer(*host.enter, "true")
            yield hosts
    except subprocess.CalledProcessError as error:
        pytest.skip(f"two hosts need network namespaces; {' '.join(error.cmd)!r} says: {error.stderr.strip()}")


def _administer(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


def run(folder: Path, *commands: tuple[list[str], dict[str, str]]) -> list[str]:
    """What commands, run side by side in environments of their own, print; none outlives the test."""
    folder.mkdir(exist_ok=True)
    logs = [folder / f"output{number}.txt" for number in range(len(commands))]
    with contextlib.ExitStack() as stack:
        running = []
        for (command, environment), log in zip(commands, logs):
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={"PATH": PATH, "HOME": str(folder), "OMP_NUM_THREADS": "1"} | environment,
                stdout=stack.enter_context(log.open("w")),
                stderr=subprocess.STDOUT,
                process_group=0,
            )
            stack.callback(end, process)
            running.append(process)
        codes = [process.wait(timeout=300) for process in running]
    printed = [log.read_text() for log in logs]
    assert not any(codes), "\n".join(text[-4000:] for text in printed)
    return printed


def end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def arguments(manifests: Path, output: Path) -> list[str]:
    """Of a tiny pre-training."""
    return [
        *("--config", str(ROOT / "tests/smoke.yaml")),
        f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
        f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
        f"--iterations=[{{features: mfcc, clusters: 20, max_frames: 2000, max_steps: {STEPS}}}]",
        "--trainer.strategy=ddp",
        "--trainer.enable_progress_bar=true",
        f"--output={output}",
    ]


def on_two_hosts(hosts: list[Host], folder: Path, extra: list[str], environment: dict[str, str]) -> list[str]:
    """What the same script prints on each host, told which one it is."""
    commands = []
    for number, host in enumerate(hosts):
        launch = {"NODES": "2", "NODE_RANK": str(number), "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29500"}
        no_names = {"PET_LOCAL_ADDR": host.address, "GLOO_SOCKET_IFNAME": "eth0"}  # nobody resolves names here
        commands.append(([*host.enter, TORCHRUN, *extra], launch | no_names | {"DEVICES": "1"} | SMALL | environment))
    return run(folder, *commands)


def weights(output: Path) -> dict[str, Tensor]:
    """After as many steps as were asked for."""
    iteration = output / "iteration1"
    assert json.loads((iteration / "metrics.json").read_text())["steps"] == STEPS
    return torch.load(iteration / "last.ckpt", weights_only=True)["state_dict"]


def same_to_the_bit(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.fixture(scope="module")
def of_one_host(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights that two processes of one host end in."""
    folder = tmp_path_factory.mktemp("one_host")
    command = [sys.executable, "-m", "hubert_lightning", "fit", "--config", SMALL["CONFIG"]]
    run(folder, ([*command, *arguments(manifests, folder / "run"), "--trainer.devices=2"], {}))
    return weights(folder / "run")


def put_on_path(folder: Path, **scripts: str) -> dict[str, str]:
    """The environment in which commands of these names are found before any other."""
    for name, script in scripts.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return {"PATH": os.pathsep.join([str(folder), PATH])}


@pytest.mark.slow
def test_two_hosts_end_in_the_weights_of_one(
    hosts: list[Host], of_one_host: dict[str, Tensor], manifests: Path, tmp_path: Path
) -> None:
    first, second = on_two_hosts(hosts, tmp_path, arguments(manifests, tmp_path / "run"), {})
    assert [printed.count(" steps in ") for printed in (first, second)] == [1, 0]
    same_to_the_bit(weights(tmp_path / "run"), of_one_host)


@pytest.mark.slow
def test_a_process_that_dies_is_started_again_and_both_hosts_resume(
    hosts: list[Host], of_one_host: dict[str, Tensor], manifests: Path, tmp_path: Path
) -> None:
    (tmp_path / "dies_once.py").write_text(DIES_ONCE)
    dying = ["--trainer.callbacks+=dies_once.DiesOnce", "--checkpoint.every_n_train_steps=1"]
    first, second = on_two_hosts(
        hosts, tmp_path, [*arguments(manifests, tmp_path / "run"), *dying], {"PYTHONPATH": str(tmp_path)}
    )
    assert "exitcode: -9" in second
    assert [printed.count("resumes after step") for printed in (first, second)] == [1, 0]
    same_to_the_bit(weights(tmp_path / "run"), of_one_host)


@pytest.mark.parametrize("missing", ["NODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_host_without_a_number_or_address_is_refused_in_one_sentence(missing: str) -> None:
    told = {"NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    del told[missing]
    refused = subprocess.run([TORCHRUN], env={"PATH": PATH} | told, capture_output=True, text=True, timeout=60)
    assert refused.returncode
    assert f"{missing}: is not set; give " in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_host_beyond_the_number_of_hosts_is_refused() -> None:
    told = {"NODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    refused = subprocess.run([TORCHRUN], env={"PATH": PATH} | told, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert refused.stderr == "torchrun.sh: NODE_RANK 2 is none of 2 hosts; they count from 0\n"


@pytest.mark.slow
def test_two_tasks_of_slurm_end_in_the_weights_of_one_host(
    of_one_host: dict[str, Tensor], manifests: Path, tmp_path: Path
) -> None:
    stand_in = put_on_path(tmp_path, srun=SRUN)
    [printed] = run(tmp_path, ([SLURM, *arguments(manifests, tmp_path / "run")], JOB | SMALL | stand_in))
    assert printed.count(" steps in ") == 1  # Lightning knows where it is; signals are ours
    assert json.loads((tmp_path / "run/iteration1/record.json").read_text())["world_size"] == 2
    same_to_the_bit(weights(tmp_path / "run"), of_one_host)


def test_slurm_starts_the_config_with_its_nodes_its_gpus_and_what_the_user_adds(tmp_path: Path) -> None:
    stand_in = put_on_path(
        tmp_path,
        srun=f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n",
    )
    job = {"SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "9"}
    added = ["--iterations=[{features: mfcc, clusters: 20}]", "--output", "a folder", "--trainer.devices=1"]
    [printed] = run(tmp_path, ([SLURM, *added], job | stand_in))
    command, environment = json.loads(printed)
    assert command == [
        "--kill-on-bad-exit=1",
        *("hubert", "fit", "--config", "configs/pretrain/base.yaml"),
        *added,
        *("--trainer.num_nodes", "4", "--trainer.devices", "8"),
    ]
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["SRUN_CPUS_PER_TASK"] == "9"


def test_slurm_is_asked_for_a_process_per_gpu_before_the_first_command() -> None:
    lines = Path(SLURM).read_text().splitlines()
    asked = [line.removeprefix("#SBATCH ").split("=") for line in lines if line.startswith("#SBATCH ")]
    options = {name: rest[0] if rest else "" for name, *rest in asked}
    assert options["--ntasks-per-node"] == options["--gpus-per-node"]
    assert {"--requeue", "--signal", "--open-mode"} <= options.keys()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])  # where sbatch would not look


def test_a_job_that_runs_out_of_time_is_requeued_and_ends_as_its_tasks_do(tmp_path: Path) -> None:
    stand_in = put_on_path(
        tmp_path,
        srun='#!/usr/bin/env bash\ntrap "" TERM\nkill -USR1 $PPID && exit 7\n',
        scontrol=f'#!/usr/bin/env bash\necho "$@" >> {tmp_path / "asked.txt"}\n',
    )
    ended = subprocess.run([SLURM], env=JOB | stand_in, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "asked.txt").read_text() == f"requeue {JOB['SLURM_JOB_ID']}\n"
    assert ended.returncode == 7
