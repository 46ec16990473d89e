"""A command of the fork server is what a new process would be."""

import functools
import os
import signal
import time
from pathlib import Path

import fork_server
import pytest

SCRIPT = """
import os, signal, sys, time
print(os.getcwd(), os.environ["WORD"], sys.argv[1:], signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
print(os.getsid(0) == os.getpgid(0) == os.getpid(), len(os.listdir("/proc/self/task")), file=sys.stderr)
"""


def write(path: Path) -> None:
    path.write_text("before")


def script(folder: Path, content: str) -> str:
    (folder / "script.py").write_text(content)
    return str(folder / "script.py")


def test_a_script_has_its_own_folder_environment_files_and_session(tmp_path: Path) -> None:
    output, errors = tmp_path / "output.txt", tmp_path / "errors.txt"
    code = fork_server.run(
        [script(tmp_path, SCRIPT), "a", "b"],
        output,
        errors=errors,
        folder=tmp_path,
        environment={"WORD": "word"},
        before=functools.partial(write, tmp_path / "written"),
    )
    assert (code, output.read_text()) == (0, f"{tmp_path} word ['a', 'b'] True\n"), errors.read_text()
    assert errors.read_text() == "True 1\n"
    assert (tmp_path / "written").read_text() == "before"


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('a sentence')", 1, "a sentence\n"),
        ("import atexit; atexit.register(print, 'at the end'); print('said')", 0, "said\nat the end\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import sys; print(len([m for m in sys.modules if m.startswith('lightning.')]) > 100)", 0, "True\n"),
    ],
)
def test_it_ends_as_python_would(content: str, code: int, said: str, tmp_path: Path) -> None:
    assert fork_server.run([script(tmp_path, content)], tmp_path / "output.txt") == code
    assert (tmp_path / "output.txt").read_text() == said


def test_an_error_is_a_traceback_and_status_1(tmp_path: Path) -> None:
    assert fork_server.run([script(tmp_path, "raise KeyError('x')")], tmp_path / "output.txt") == 1
    assert (tmp_path / "output.txt").read_text().startswith("Traceback (most recent call last)")


def test_an_interrupt_that_nobody_handles_ends_it_by_that_signal(tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    process = fork_server.start([script(tmp_path, "import time; print(1, flush=True); time.sleep(60)")], output)
    while not (output.exists() and output.read_text()):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    assert fork_server.ended(process) == -signal.SIGINT
    assert "KeyboardInterrupt" in output.read_text()


def test_several_run_at_once_and_one_is_killed_alone(tmp_path: Path) -> None:
    waiting = script(tmp_path, "import time; time.sleep(60)")
    processes = [fork_server.start([waiting], tmp_path / "output.txt") for _ in range(2)]
    first, second = processes
    first.kill()
    assert fork_server.ended(first) == -signal.SIGKILL
    assert second.exitcode is None
    fork_server.end(second)
    assert second.exitcode == -signal.SIGKILL


def test_it_runs_commands_of_hubert(tmp_path: Path) -> None:
    assert fork_server.run(["fit", "--help"], tmp_path / "fit.txt") == 0
    assert "usage: hubert" in (tmp_path / "fit.txt").read_text()
    assert fork_server.run(["-m", "hubert_lightning", "no-verb"], tmp_path / "refused.txt") == 2
    assert "'no-verb' is not a verb of hubert" in (tmp_path / "refused.txt").read_text()


def test_two_ranks_find_each_other(tmp_path: Path) -> None:
    content = """
import torch, torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_only
dist.init_process_group("gloo")
number = torch.ones(1) * (dist.get_rank() + 1)
dist.all_reduce(number)
print(int(number), dist.get_rank() == rank_zero_only.rank)
dist.destroy_process_group()
"""
    outputs = [tmp_path / f"{rank}.txt" for rank in range(2)]
    ranks = [
        fork_server.start([script(tmp_path, content)], output, environment=environment)
        for output, environment in zip(outputs, fork_server.of_ranks(2), strict=True)
    ]
    assert [fork_server.ended(rank) for rank in ranks] == [0, 0], [output.read_text() for output in outputs]
    assert [output.read_text() for output in outputs] == ["3 True\n", "3 True\n"]
