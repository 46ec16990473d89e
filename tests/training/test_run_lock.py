"""One command at a time in a folder, with real processes; the lock of a dead process is taken over."""

import json
import os
import re
import signal
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import fork_server
import pytest
import torch
from helpers import SMOKE_FINETUNE, refused, short_finetuning, transcribed_options

from hubert_lightning.cli import main
from hubert_lightning.files import unfinished_name
from hubert_lightning.training import run_lock
from hubert_lightning.training.run_lock import Holder, holder_of, locked

HOLD = """
import sys, time
from pathlib import Path
from hubert_lightning.training.run_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def started(folder: Path, name: str, script: str = HOLD) -> BaseProcess:
    """A process that takes the lock; what it says is in a file of that name beside the folder."""
    path = folder.parent / f"{name}.py"
    path.write_text(script)
    return fork_server.start([str(path), str(folder)], folder.parent / name)


def holding(folder: Path, script: str = HOLD) -> BaseProcess:
    process = started(folder, "output.txt", script)
    while process.is_alive() and "held" not in text_of(folder):
        time.sleep(0.02)
    assert process.is_alive(), text_of(folder)
    return process


def text_of(folder: Path, name: str = "output.txt") -> str:
    path = folder.parent / name
    return path.read_text() if path.exists() else ""


def written(folder: Path, **changed: object) -> Path:
    """As if a process had been killed there that is described in another way than this one."""
    folder.mkdir(exist_ok=True)
    path = folder / "run.lock"
    path.write_text(json.dumps(vars(Holder.this()) | {"token": "0"} | changed))
    return path


@pytest.mark.slow
def test_two_fits_do_not_run_in_one_folder_and_the_second_starts_once_the_first_is_killed(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, long = tmp_path / "run", ["--trainer.max_steps=100000", "--trainer.val_check_interval=50000"]
    first = fork_server.start([*short_finetuning(manifests, run), *long], tmp_path / "first.txt")
    while first.is_alive() and not (run / "previous.ckpt").exists():
        time.sleep(0.05)
    with pytest.raises(SystemExit) as stopped:
        main([*short_finetuning(manifests, run), *long])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert f"hubert: {run}: process {first.pid} on " in message
    assert "is using it; wait until it ends, end it, or choose another --output" in message
    assert first.is_alive()
    os.kill(first.pid or 0, signal.SIGKILL)
    fork_server.end(first)
    step = torch.load(run / "last.ckpt", weights_only=True)["global_step"]
    main([*short_finetuning(manifests, run), f"--trainer.max_steps={step + 2}"])
    assert json.loads((run / "metrics.json").read_text())["steps"] == step + 2
    assert not (run / "run.lock").exists()
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_a_lock_is_held_by_a_process_and_not_by_another_of_the_same_number(folder: Path) -> None:
    process = holding(folder)
    with pytest.raises(ValueError, match=f"process {process.pid} on .* is using it"), locked(folder):
        pass
    content = json.loads((folder / "run.lock").read_text())
    (folder / "run.lock").write_text(json.dumps(content | {"started": "1"}))  # one that had its number before
    with locked(folder):
        assert json.loads((folder / "run.lock").read_text())["process"] == os.getpid()
        with locked(folder):  # as often as this process asks
            pass
        assert (folder / "run.lock").exists()
    assert not (folder / "run.lock").exists()
    fork_server.end(process)


def test_a_stopped_process_of_this_host_keeps_its_lock_at_any_age(folder: Path) -> None:
    process = holding(folder)
    os.kill(process.pid or 0, signal.SIGSTOP)
    try:
        os.utime(folder / "run.lock", (0, time.time() - 100 * run_lock.STALE_AFTER))
        held = holder_of(folder)
        assert held is not None
        assert held.process == process.pid
        with pytest.raises(ValueError, match=f"process {process.pid} on .* is using it"), locked(folder):
            pass
    finally:
        fork_server.end(process)
    assert holder_of(folder) is None


def test_one_of_many_processes_takes_over_the_lock_of_a_dead_one(folder: Path) -> None:
    dead = holding(folder)
    os.kill(dead.pid or 0, signal.SIGKILL)
    while holder_of(folder) is not None:  # a kill takes effect a little later
        time.sleep(0.01)
    crowd = {f"{number}.txt": started(folder, f"{number}.txt") for number in range(6)}
    while len(alive := [process for process in crowd.values() if process.is_alive()]) > 1:
        time.sleep(0.05)
    holder = json.loads((folder / "run.lock").read_text())["process"]
    assert [process.pid for process in alive] == [holder]
    fork_server.end(dead, *crowd.values())
    others = [text_of(folder, name) for name, process in crowd.items() if process.pid != holder]
    assert len(others) == 5
    assert [words for words in others if f"process {holder} on " not in words] == []


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"host": 1}', b"[" * 100_000])
def test_an_old_lock_of_another_host_or_a_corrupt_one_is_taken_over(content: bytes, folder: Path) -> None:
    path = written(folder, host="elsewhere", machine="another")
    if content:
        path.write_bytes(content)
    os.utime(path, (0, time.time() - 1.1 * run_lock.STALE_AFTER))
    with locked(folder):
        assert holder_of(folder) is None
        assert json.loads(path.read_text())["process"] == os.getpid()


def test_a_lock_that_cannot_be_read_is_refused_and_stays(folder: Path) -> None:
    (folder / "run.lock").mkdir()
    for ask in (lambda: locked(folder).__enter__(), lambda: holder_of(folder)):
        with pytest.raises(ValueError, match=r"run\.lock: a folder, which is not read here"):
            ask()
    assert [path.name for path in folder.iterdir()] == ["run.lock"]


def test_the_age_of_a_lock_is_measured_by_the_clock_of_its_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(folder, host="elsewhere", machine="another")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 10_000)  # a clock that is fast
    assert holder_of(folder) is not None
    monkeypatch.setattr(time, "time", lambda: now - 10_000)
    os.utime(path, (0, now - 1.1 * run_lock.STALE_AFTER))
    assert holder_of(folder) is None
    assert [one.name for one in folder.iterdir()] == ["run.lock"]


def test_a_start_time_is_the_same_in_every_language_and_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = set()
    for zone, language in (("UTC", "C"), ("Asia/Tokyo", "de_DE.UTF-8"), ("America/New_York", "ja_JP.UTF-8")):
        monkeypatch.setenv("TZ", zone)
        monkeypatch.setenv("LC_ALL", language)
        starts.add(run_lock._listed_start(os.getppid()))
    assert len(starts) == 1
    assert starts != {""}


def test_the_files_of_a_process_killed_while_it_took_a_lock_are_removed(folder: Path) -> None:
    with locked(folder):  # as in a notebook, where one process runs the next command too
        pass
    left = unfinished_name(folder / "run.lock")
    left.write_bytes(b"{}")
    with locked(folder):
        assert [path.name for path in folder.iterdir()] == ["run.lock"]


def test_a_process_on_another_host_is_alive_if_it_renews_its_lock(folder: Path) -> None:
    path = written(folder, host="elsewhere", machine="another", process=17)
    renewed = threading.Timer(1.0, os.utime, [path])
    renewed.start()
    with pytest.raises(ValueError, match="process 17 on elsewhere is using it"), locked(folder):
        pass
    assert path.exists()
    assert re.search("17", path.read_text())


def test_a_requeued_job_resumes_at_once_on_another_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(folder, host="elsewhere", machine="another", job="42", restart="0")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked(folder):
        assert json.loads((folder / "run.lock").read_text())["restart"] == "1"


def held_by_another(folder: Path, name: str) -> None:
    """The lock of a living process: this one's parent."""
    folder.mkdir(parents=True, exist_ok=True)
    parent = {"process": os.getppid(), "started": run_lock._started(os.getppid()), "token": "0"}
    (folder / name).write_text(json.dumps(vars(Holder.this()) | parent))


def test_a_trial_run_empties_no_folder_but_a_trials_and_waits_for_no_other_trial(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trial, scratch = (
        [*short_finetuning(manifests, tmp_path / "run"), "--trainer.fast_dev_run=1"],
        tmp_path / "run.fast_dev_run",
    )
    scratch.mkdir()
    (scratch / "theirs").write_bytes(b"theirs")
    assert f"{scratch}: a trial (fast_dev_run) would empty this folder" in refused(capsys, *trial)
    assert [path.name for path in scratch.iterdir()] == ["theirs"]
    (scratch / "theirs").rename(scratch / ".trial")
    held_by_another(scratch, "run.lock")
    (scratch / "last.ckpt").write_bytes(b"of the other trial")
    assert f"{scratch}: process {os.getppid()} on " in refused(capsys, *trial)
    assert sorted(path.name for path in scratch.iterdir()) == [".trial", "last.ckpt", "run.lock"]
    (scratch / "run.lock").unlink()
    main(trial)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_two_sets_are_tested_at_once_and_one_set_is_not_tested_twice_at_once(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    main(
        [
            "fit",
            *SMOKE_FINETUNE,
            *transcribed_options(manifests),
            f"--output={run}",
            "--model.init_args.pretrained=null",
        ]
    )
    held_by_another(run / "test" / "dev", "results.lock")

    def short_finetuning(name: str) -> list[str]:
        return ["test", "--config", f"{run}/config.yaml", f"--data.init_args.test=[{manifests / name}.jsonl.gz]"]

    message = refused(capsys, *short_finetuning("dev"))
    assert f"{run / 'test/dev'}: process {os.getppid()} on " in message
    assert "wait until it ends, end it, or choose another set, checkpoint or decoder" in message
    assert "--output" not in message
    main(short_finetuning("test"))
    assert (run / "test" / "test" / "scores.json").exists()
    assert not (run / "test" / "test" / "results.lock").exists()


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK"])
def test_only_rank_0_takes_a_lock(variable: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    with locked(folder):
        assert not list(folder.iterdir())


@pytest.mark.slow
def test_locks_work_without_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise PermissionError("this disk has no links")

    monkeypatch.setattr("os.link", refuse)
    with locked(folder):
        assert json.loads((folder / "run.lock").read_text())["process"] == os.getpid()
    process = holding(folder)
    with pytest.raises(ValueError, match=f"process {process.pid} on"), locked(folder):
        pass
    fork_server.end(process)


def test_a_process_that_was_stopped_ends_when_another_has_taken_over(folder: Path) -> None:
    process = holding(folder, "from hubert_lightning.training import run_lock\nrun_lock.RENEW_EVERY = 0.2\n" + HOLD)
    written(folder, host="elsewhere", process=17)
    assert fork_server.ended(process, timeout=60) == 2
    assert "process 17 on elsewhere took over while this one was stopped, so this one ends" in text_of(folder)
    assert (folder / "run.lock").exists()
