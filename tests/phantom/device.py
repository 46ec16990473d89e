"""Builds the phantom, and runs functions in processes that see it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from phantom.record import Record

Run = Callable[..., Record]
"""`Phantom.run`, or a function that remembers what it returned."""
SOURCE = Path(__file__).with_name("phantom.c")
NAME = "libcuda.so.1"
"""Name under which torch loads the driver; the same library is preloaded as the runtime."""


def missing() -> str:
    """Say in a sentence why there is no phantom here; empty if there can be one."""
    if sys.platform != "linux":
        return "the phantom GPU is preloaded, which needs Linux"
    if torch.version.cuda is None:
        return "the phantom GPU needs a build of torch for CUDA"
    if _compiler() is None:
        return "the phantom GPU needs a C compiler, cc"
    if not any((folder / "cuda_runtime_api.h").is_file() for folder in _headers()):
        return "the phantom GPU needs the CUDA headers that torch and Triton bring"
    return ""


def build() -> Path:
    """Compile the phantom, once for each source and version of CUDA.

    Returns:
        The library, in a folder of the system's temporary files.
    """
    content = SOURCE.read_bytes() + str(torch.version.cuda).encode()
    folder = Path(tempfile.gettempdir()) / f"phantom-{os.getuid()}-{hashlib.sha256(content).hexdigest()[:16]}"
    library = folder / NAME
    if not library.is_file():
        folder.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            compiled = Path(unfinished) / NAME
            includes = [f"-I{path}" for path in _headers()]
            command = [_compiler() or "cc", "-shared", "-fPIC", "-O1", "-w", *includes, SOURCE, "-o", compiled]
            subprocess.run(command, check=True)
            compiled.rename(library)
    return library


def environment() -> dict[str, str]:
    """Return the environment of a process that sees the phantom; modules are found where this process finds them."""
    library = build()
    paths = [str(library.parent), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ,
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths)),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }


def _compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def _headers() -> list[Path]:
    """Folders of headers: those of torch's CUDA first, which fit its library; Triton's have what these leave out."""
    packages = Path(sysconfig.get_path("purelib"))
    major = str(torch.version.cuda).partition(".")[0]
    folders = [
        packages / "nvidia" / f"cu{major}" / "include",
        packages / "nvidia" / "cuda_runtime" / "include",
        packages / "triton" / "backends" / "nvidia" / "include",
    ]
    return [folder for folder in folders if folder.is_dir()]


class PhantomError(RuntimeError):
    """A function failed on the phantom; the message is its traceback."""


class Phantom:
    """A process that sees the phantom and has imported what functions need; each run is a fork of it.

    Args:
        preload: Modules to import at once.
    """

    def __init__(self, preload: tuple[str, ...] = ("phantom.recorder",)) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "phantom.serve", *preload],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, function: str, **arguments: Any) -> Record:
        """Run a function that returns a `Record`.

        Args:
            function: Module and name, such as "steps:pretraining".
            **arguments: Its named arguments, values of JSON.

        Raises:
            PhantomError: It raised an error.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "record.json"
            job = {"function": function, "arguments": arguments, "output": str(output)}
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            if not answer or json.loads(answer)["status"]:
                raise PhantomError(output.read_text() if output.is_file() else f"{function} ended: {answer!r}")
            return Record.from_json(output.read_text())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
