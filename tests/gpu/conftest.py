"""Runs of the product on the phantom: each is recorded once, however many tests assert something about it."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from phantom.device import Phantom, Run, missing
from phantom.record import Record

PRELOAD = ("training_steps", "inference_runs")
"""Modules of the functions that are run; each run is a fork of a process that has imported them."""


@pytest.fixture(scope="session")
def phantom() -> Iterator[Phantom]:
    if reason := missing():
        pytest.skip(reason)
    with Phantom(PRELOAD) as process:
        yield process


@pytest.fixture(scope="session")
def recorded(phantom: Phantom, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Run:
    """Run a function on the phantom, unless this test session has run it."""
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent  # shared by the processes of the session
    known: dict[Path, Record] = {}

    def run(function: str, **arguments: Any) -> Record:
        key = json.dumps([function, arguments], sort_keys=True)
        path = folder / f"record-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if path not in known:
            with FileLock(f"{path}.lock"):
                if not path.is_file():
                    path.write_text(phantom.run(function, **arguments).to_json())
            known[path] = Record.from_json(path.read_text())
        return known[path]

    return run
