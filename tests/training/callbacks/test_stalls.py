"""Ranks that are stopped, hang or are killed: real processes over gloo, each named in one sentence by the others."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import fork_server
import pytest
import torch.distributed as dist
from helpers import LABELLING, has_steps, long_pretraining, prints_text, wait_until, with_folder
from lightning import Trainer
from torch.distributed.constants import default_pg_timeout

from hubert_lightning import current_work
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.training import rank_watch
from hubert_lightning.training.callbacks import stalls
from hubert_lightning.training.callbacks.stalls import StalledRanks
from hubert_lightning.training.distributed import LayerwiseFSDP

pytestmark = pytest.mark.distributed

QUICK = ["--stalls.timeout=0.05", "--stalls.step_timeout=0.1"]  # 3 s and 6 s
WITHOUT_WORK = ["--stalls.step_timeout=0.1"]  # only work that stands still ends a run soon, not a slow sign of life


def two_ranks(manifests: Path, folder: Path, *more: str, steps: int = 100_000) -> list[BaseProcess]:
    on_two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    return [
        fork_server.start(
            long_pretraining(manifests, folder / "run", *on_two, *more, steps=steps),
            folder / f"output{rank}.txt",
            folder=folder,
            environment=environment | {"PYTHONPATH": str(folder)},
            before=with_folder,
        )
        for rank, environment in enumerate(fork_server.of_ranks(2))
    ]


def printed(folder: Path) -> list[str]:
    return [(folder / f"output{rank}.txt").read_text() for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_by_the_other(stopped: int, manifests: Path, tmp_path: Path) -> None:
    ranks = two_ranks(manifests, tmp_path, *QUICK)
    wait_until(has_steps(tmp_path / "run"), ranks[0])
    os.kill(ranks[stopped].pid, signal.SIGSTOP)
    code = fork_server.ended(ranks[1 - stopped], 120)
    fork_server.end(ranks[stopped])
    message = printed(tmp_path)
    assert code == 1, message[1 - stopped][-3000:]
    assert re.search(
        rf"hubert: no sign of life of rank {stopped} \(host \S+, pid {ranks[stopped].pid}\) since \d\d:\d\d:\d\d .*"
        "; the same command resumes\n",
        message[1 - stopped],
    ), message[1 - stopped][-3000:]
    assert "Traceback" not in message[1 - stopped]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named_by_the_other(killed: int, manifests: Path, tmp_path: Path) -> None:
    ranks = two_ranks(manifests, tmp_path)
    wait_until(has_steps(tmp_path / "run"), ranks[0])
    os.kill(ranks[killed].pid, signal.SIGKILL)
    code = fork_server.ended(ranks[1 - killed], 60)
    fork_server.end(ranks[killed])
    message = printed(tmp_path)
    assert code == 1, message[1 - killed][-3000:]
    assert re.search(rf"hubert: .*rank {killed} .*; the same command resumes\n", message[1 - killed]), message[
        1 - killed
    ]
    assert "Traceback" not in message[1 - killed]


def start_within_two_seconds() -> None:
    stalls.START_TIMEOUT = 2.0
    with_folder()


@pytest.mark.slow
@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_is_killed_before_the_ranks_meet_ends_the_other(
    missing: int, manifests: Path, tmp_path: Path
) -> None:
    started = fork_server.start(
        long_pretraining(manifests, tmp_path / "run", "--trainer.devices=2", "--trainer.strategy=ddp", QUICK[0]),
        tmp_path / "output.txt",
        folder=tmp_path,
        environment=fork_server.of_ranks(2)[1 - missing] | {"PYTHONPATH": str(tmp_path)},
        before=start_within_two_seconds,
    )
    assert fork_server.ended(started, 60) == 1
    printed = (tmp_path / "output.txt").read_text()
    assert re.search(
        rf"hubert: a rank \(host \S+, pid {started.pid}\) waits for other ranks to start since \S+ \(\d+ s\); look at "
        "their output. This run ends; the same command resumes\n",
        printed,
    ), printed
    assert "Traceback" not in printed


def test_a_rank_that_is_killed_before_its_first_sign_of_life_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(rank_watch, "connect_to_store", lambda: store)
    watch = rank_watch.RankWatch(rank_watch.Limits(silence=1, step=1800, labelling=86400, start=1800), 0, 2, {}, "one")
    try:
        sentence = watch.culprit(60)
    finally:
        watch.end("")
    assert sentence is not None
    assert re.fullmatch(r"no sign of life of rank 1 since \S+ \(\d s\): .*; look at its own output", sentence)


def workers(process: BaseProcess) -> list[int]:
    """The processes that read audio for a rank."""
    task = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in task.read_text().split()]


@pytest.mark.slow
def test_a_rank_whose_workers_hang_is_named_as_waiting_for_data(manifests: Path, tmp_path: Path) -> None:
    ranks = two_ranks(manifests, tmp_path, *WITHOUT_WORK)
    wait_until(has_steps(tmp_path / "run"), ranks[0])
    for pid in workers(ranks[1]):
        os.kill(pid, signal.SIGSTOP)
    codes = [fork_server.ended(rank, 120) for rank in ranks]
    message = printed(tmp_path)
    assert codes == [1, 1], message
    assert re.search(
        r"hubert: no work was finished since \S+ \(\d+ s, stalls.step_timeout\): "
        rf"rank 1 \(host \S+, pid {ranks[1].pid}\) waits for data, while training \(.*step \d+\); "
        "look at the file system that it reads from. This run ends; the same command resumes\n",
        message[0],
    ), message[0]
    assert "no work was finished" not in message[1]
    assert "Traceback" not in "".join(message)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "reason"), [(signal.SIGKILL, "was killed"), (signal.SIGBUS, "shared memory")])
def test_a_killed_worker_is_named_with_the_utterances_that_it_read(
    number: int, reason: str, manifests: Path, tmp_path: Path
) -> None:
    ids = {cut.id for cut in read_manifest(manifests / "train.jsonl.gz")}
    output = tmp_path / "output.txt"
    process = fork_server.start(long_pretraining(manifests, tmp_path / "run"), output)
    wait_until(has_steps(tmp_path / "run"), process)
    worker = workers(process)[-1]  # those that validate were started before
    os.kill(worker, number)
    assert fork_server.ended(process, 60) == 1
    message = output.read_text()
    sentence = re.search(rf"hubert: a process that reads audio \(pid {worker}\) (.*)\n", message)
    assert sentence, message[-3000:]
    assert reason in sentence[1]
    assert sum(cut_id in sentence[1] for cut_id in ids) >= 1
    assert "Traceback" not in message


@pytest.mark.slow
def test_a_run_of_one_process_without_progress_is_warned_and_continues(manifests: Path, tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    process = fork_server.start(long_pretraining(manifests, tmp_path / "run", *QUICK), output)
    wait_until(has_steps(tmp_path / "run"), process)
    stopped = workers(process)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    wait_until(prints_text(output, "hubert: warning: no work was finished since"), process)
    assert f"pid {process.pid}) waits for data, while training" in output.read_text()
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    wait_until(has_steps(tmp_path / "run", 6), process)  # more than were trained and read ahead before
    os.kill(process.pid, signal.SIGINT)
    assert fork_server.ended(process, 60) == 130
    began = re.findall(r"warning: no work was finished since (\S+)", output.read_text())
    assert len(began) == len(set(began))  # a loaded machine may stall a second time


def test_a_stall_is_warned_once_though_work_goes_on_before_the_next_sign_of_life(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_watch.RankWatch, "_exchange", lambda watch: None)
    watch = rank_watch.RankWatch(rank_watch.Limits(silence=0.1, step=0.05, labelling=9, start=9), 0, 1, {}, "one")
    warnings = ""
    try:
        for count in (1, 2):
            watch.signs = {0: rank_watch.Sign("host", 1, count, "training", count, in_steps=True, activity="computes")}
            while warnings.count("no work was finished") < count:
                time.sleep(0.01)
                warnings += capsys.readouterr().err
            current_work.note("training", in_steps=True)
            judged = watch._judged
            while watch._judged < judged + 0.2:  # ten judgements of the old sign
                time.sleep(0.01)
            warnings += capsys.readouterr().err
            assert warnings.count("no work was finished") == count
    finally:
        watch.end("")


@pytest.mark.campaign
def test_long_work_of_rank_0_alone_is_no_stall(manifests: Path, tmp_path: Path) -> None:
    """Neither scikit-learn's K-means nor the choice of a layer, each longer here than the time-outs of a step."""
    kmeans = "kmeans: {class_path: hubert_lightning.ScikitKMeans}"
    iterations = (
        f"--iterations=[{{features: mfcc, clusters: 2000, max_frames: 4000, {kmeans}, max_steps: 2}},"
        f"{{features: previous, layer: best, clusters: 500, max_frames: 2000, max_steps: 2}}]"
    )
    ranks = two_ranks(manifests, tmp_path, "--stalls.timeout=0.02", "--stalls.step_timeout=0.02", iterations)
    assert [fork_server.ended(rank) for rank in ranks] == [0, 0], printed(tmp_path)[0][-3000:]
    assert not re.search("no sign|no work was finished|Traceback", "".join(printed(tmp_path)))


@contextlib.contextmanager
def launched_by_lightning(manifests: Path, folder: Path, *more: str) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Two ranks of which one starts the other, as on a machine with several GPUs."""
    output = folder / "output.txt"
    typed = long_pretraining(manifests, folder / "run", "--trainer.devices=2", "--trainer.strategy=ddp", *more)
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "hubert_lightning", *typed],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    try:
        yield process, output
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None
        time.sleep(0.05)


def second_rank(process: subprocess.Popen) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(int(pid) for pid in children if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes())


def runs(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return False


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("number", "whom", "code", "sentence"),
    [
        (signal.SIGINT, "group", 130, r"hubert: Ctrl-C: saved at step \d+; the same command resumes\n"),
        (signal.SIGTERM, "first", 143, r"hubert: SIGTERM: saved at step \d+; the same command resumes\n"),
        (signal.SIGTERM, "second", 143, r"hubert: SIGTERM: saved at step \d+; the same command resumes\n"),
        (signal.SIGKILL, "second", 1, r"hubert: rank 1 \(pid \d+\) was ended by signal 9; look at its own output"),
        (signal.SIGSTOP, "second", 1, r"hubert: no sign of life of rank 1 \(host \S+, pid \d+\) since "),
    ],
)
def test_ranks_that_lightning_launched_end_together(
    number: int, whom: str, code: int, sentence: str, manifests: Path, tmp_path: Path
) -> None:
    with launched_by_lightning(manifests, tmp_path, *QUICK) as (process, output):
        wait_for(has_steps(tmp_path / "run"), process)
        second = second_rank(process)
        if whom == "group":
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid if whom == "first" else second, number)
        assert process.wait(60) == code, output.read_text()[-3000:]
        assert len(re.findall(sentence, output.read_text())) == 1, output.read_text()[-3000:]
        assert "Traceback" not in output.read_text()
        time.sleep(0.1)
        assert not runs(second)


@pytest.mark.campaign
@pytest.mark.parametrize(("number", "whom"), [(signal.SIGINT, "group"), (signal.SIGTERM, "first")])
def test_labelling_ranks_that_lightning_launched_end_together(
    number: int, whom: str, manifests: Path, tmp_path: Path
) -> None:
    labels = f"--iterations=[{{features: mfcc, {LABELLING}}}]"
    with launched_by_lightning(manifests, tmp_path, labels) as (process, output):
        wait_for(prints_text(output, "K-means: 1500 clusters"), process)
        second = second_rank(process)
        os.killpg(process.pid, number) if whom == "group" else os.kill(process.pid, number)
        assert process.wait(60) == 128 + number, output.read_text()[-3000:]
        assert output.read_text().count("finished work is kept; the same command resumes\n") == 1
        assert "Traceback" not in output.read_text()
        time.sleep(0.1)
        assert not runs(second)


@pytest.mark.parametrize(("given", "minutes"), [(None, 24.5 * 60), (30, 30), (7, 7)])
def test_a_time_out_of_the_strategy_that_the_user_gave_is_kept(
    given: float | None, minutes: float, tmp_path: Path
) -> None:
    strategy = LayerwiseFSDP(given) if given else LayerwiseFSDP()
    trainer = Trainer(strategy=strategy, devices=1, accelerator="cpu", default_root_dir=tmp_path, logger=False)
    assert strategy._timeout == (timedelta(minutes=given) if given else default_pg_timeout)
    StalledRanks().attach(trainer)
    assert strategy._timeout == timedelta(minutes=minutes)


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_an_invalid_time_out_is_refused(minutes: float) -> None:
    with pytest.raises(ValueError, match="it is a number of minutes above 0"):
        LayerwiseFSDP(minutes)


LOCALS = """
import gc, sys, threading
from hubert_lightning.training.rank_watch import frame_of
gc.set_threshold(1)  # so that whatever is allocated collects
for _ in range(2000):
    circle = [threading.local()]
    circle.append(circle)
    circle[0].value = 1
    del circle
    frame_of(threading.main_thread().ident)
print("done")
"""


def test_reading_the_frame_of_a_thread_does_not_deadlock_python(tmp_path: Path) -> None:
    (tmp_path / "locals.py").write_text(LOCALS)
    assert fork_server.run([str(tmp_path / "locals.py")], tmp_path / "output.txt", timeout=60) == 0
    assert (tmp_path / "output.txt").read_text() == "done\n"


# Two ranks, the second one's way to the store leads through a forwarder, whose connections are cut
CUT = """
import socket, threading, time
from datetime import timedelta
import torch.distributed as dist
from hubert_lightning.training import rank_watch

def piped(source, target):
    try:
        while content := source.recv(65536):
            target.sendall(content)
    except OSError:
        pass
    for end in (source, target):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

def forward():
    while True:
        inner, _ = listener.accept()
        outer = socket.create_connection(("127.0.0.1", server.port))
        ends.append(inner)
        for pair in ((inner, outer), (outer, inner)):
            threading.Thread(target=piped, args=pair, daemon=True).start()

waits = {"timeout": timedelta(seconds=60), "wait_for_workers": False}
server = dist.TCPStore("127.0.0.1", 0, 2, True, **waits)
listener, ends = socket.create_server(("127.0.0.1", 0)), []
threading.Thread(target=forward, daemon=True).start()
stores = [server, dist.TCPStore("127.0.0.1", listener.getsockname()[1], 2, False, **waits)]
limits = rank_watch.Limits(silence=5, step=1800, labelling=86400, start=1800)
watches = []
for rank, store in enumerate(stores):
    rank_watch.connect_to_store = lambda: (store if rank else server).clone()
    watches.append(rank_watch.RankWatch(limits, rank, 2, {}, "cut"))
store = stores[1]
rank_watch.connect_to_store = lambda: store.clone()

def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)

wait_until(lambda: all(set(watch.signs) == {0, 1} for watch in watches))
for _ in range(2):
    beats = [watch.signs[1].beat for watch in watches]
    for end in ends:
        end.shutdown(socket.SHUT_RDWR)
    ends.clear()
    # Three more signs, so that the first ones after the cut were judged, too
    wait_until(lambda: all(watch.signs[1].beat > beat + 3 for watch, beat in zip(watches, beats)))
    wait_until(lambda: watches[1].lost is None)
print("well")
"""


@pytest.mark.slow
def test_a_connection_that_breaks_once_ends_no_healthy_run(tmp_path: Path) -> None:
    (tmp_path / "cut.py").write_text(CUT)
    code = fork_server.run([str(tmp_path / "cut.py")], tmp_path / "output.txt", timeout=150)
    assert (code, (tmp_path / "output.txt").read_text().splitlines()[-1]) == (0, "well")
