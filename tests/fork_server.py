"""Commands of `hubert` that start in a second: one process has imported everything, and each command is a fork of it.

The server is that of Python's `multiprocessing`: it runs no thread and computes nothing, so a fork of it is as good as
a new process. What libraries read from the environment while they are imported is the server's: `OMP_NUM_THREADS` is
1, and the seed of string hashes is one for all commands of a test session.

    process = start(["fit", "--config", "run.yaml"], tmp_path / "output.txt")
    os.kill(process.pid, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
"""

import atexit
import contextlib
import multiprocessing
import os
import pkgutil
import runpy
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import hubert_lightning

MODULES = [
    *(name for _, name, _ in pkgutil.walk_packages(hubert_lightning.__path__, "hubert_lightning.") if "__" not in name),
    # What a command imports when it gets there
    "lightning.pytorch.loggers",
    "torch._dynamo",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "sklearn.cluster",
    "scipy.optimize",
]
_servers = multiprocessing.get_context("forkserver")
_servers.set_forkserver_preload(MODULES)


def start(
    args: Sequence[str],
    output: Path,
    errors: Path | None = None,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> BaseProcess:
    """Start a command line in a process, session and process group of its own; `ended` waits for it.

    Args:
        args: What is typed after `hubert`; or after `python`, if it begins with a script or with `-m`.
        output: File that standard output is appended to.
        errors: File that standard error is appended to; that of the output if not given.
        folder: Working directory; this one if not given.
        environment: The whole environment; this one if not given.
        before: Called in the new process before the command; a function of a module, or a partial of one.
    """
    threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    os.environ |= dict.fromkeys(threads, "1")
    try:
        forkserver.ensure_running()
    finally:
        for name, value in threads.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    typed = [str(arg) for arg in args]
    given = dict(os.environ if environment is None else environment) | dict.fromkeys(threads, "1")
    process = _servers.Process(
        target=_command, args=(typed, output, errors or output, folder or Path.cwd(), given, before)
    )
    process.start()
    return process


def ended(process: BaseProcess, timeout: float = 600) -> int:
    """Exit status of a command, or the negative number of the signal that ended it; nothing of it is left running.

    Raises:
        TimeoutError: It did not end by itself.
    """
    process.join(timeout)
    code = process.exitcode
    end(process)
    if code is None:
        raise TimeoutError(f"process {process.pid} did not end in {timeout} s")
    return code


def end(*processes: BaseProcess) -> None:
    """Kill commands, and all that they started."""
    for process in processes:
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its loader workers
        process.join()


def run(args: Sequence[str], output: Path, timeout: float = 600, **more: object) -> int:
    """Start a command, wait for it, and return its exit status; the arguments are those of `start`."""
    return ended(start(args, output, **more), timeout)  # type: ignore[arg-type]


def of_ranks(number: int) -> list[dict[str, str]]:
    """The environment of each of several ranks on this machine, which are started side by side, as by torchrun.

    Lightning then starts no process of its own; the command says `--trainer.devices=2 --trainer.strategy=ddp`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    return [dict(os.environ) | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def _command(
    args: list[str],
    output: Path,
    errors: Path,
    folder: Path,
    environment: dict[str, str],
    before: Callable[[], None] | None,
) -> None:
    """Become a new process: session, signals, files, environment, random numbers; run, and end as Python does."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # that of a new process, where this one has the server's
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for path, stream in ((output, 1), (errors, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, stream)
        os.close(file)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 as Python has them, where they are files
    sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")  # noqa: SIM115

    import numpy as np
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    assert threading.active_count() == 1
    np.random.seed()  # noqa: NPY002 this is what libraries draw from
    # It reads the rank when it is imported
    rank_zero_only.rank = int(environment.get("RANK", "0"))  # type: ignore[attr-defined]
    code: int | None = 1
    try:
        if before:
            before()
        code = _run(args)
    finally:
        with contextlib.suppress(Exception):
            threading._shutdown()  # type: ignore[attr-defined]
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
        for file in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                file.flush()  # type: ignore[attr-defined]
        if code is None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(code or 0)


def _run(args: list[str]) -> int | None:
    """Exit status as Python has it; None for an interrupt that nobody handled, by which it ends itself."""
    try:
        if args[0] == "-m":
            sys.argv = [args[1], *args[2:]]
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        elif args[0].endswith(".py"):
            sys.argv = args
            sys.path.insert(0, str(Path(args[0]).parent))
            runpy.run_path(args[0], run_name="__main__")
        else:
            from hubert_lightning.cli import main

            sys.argv = ["hubert", *args]
            main(args)
    except SystemExit as stopped:
        if stopped.code is None or isinstance(stopped.code, int):
            return (stopped.code or 0) & 0xFF
        print(stopped.code, file=sys.stderr)
        return 1
    except BaseException as error:
        traceback.print_exc()
        return None if isinstance(error, KeyboardInterrupt) else 1
    return 0
