"""What is no file, or has no end, in the place of a small file of a run or a verb: one sentence, and nothing hangs."""

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import SMOKE_FINETUNE, refused, transcribed_options
from lightning.pytorch.loggers import CSVLogger

from hubert_lightning.training.metrics_table import keep_rows
from hubert_lightning.training.run_folder import check_files, kept_config, kept_metrics
from hubert_lightning.training.run_lock import locked


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**32)


ODD: dict[str, Callable[[Path], None]] = {
    "pipe": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
}
FILES = ("config.yaml", "metrics.json", "run.lock", "last.ckpt", "previous.ckpt", "results.lock", "test.jsonl")
FILES += ("scores.json", "test-metrics.json", "metrics.csv", "hparams.yaml")


@pytest.fixture(autouse=True)
def memory() -> object:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kB


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", FILES)
def test_a_path_in_a_runs_folder_that_is_no_file_is_named(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "real.ckpt").write_bytes(b"")
    (tmp_path / "link.ckpt").symlink_to("real.ckpt")
    (tmp_path / "gone.ckpt").symlink_to("nowhere")
    check_files(tmp_path)
    check_files(tmp_path / "nowhere")
    ODD[kind](tmp_path / name)
    with pytest.raises(ValueError, match=rf"{tmp_path / name}: a (pipe|device), where a run has its files; remove it"):
        check_files(tmp_path)


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
@pytest.mark.parametrize("place", ["last.ckpt", "metrics.json"])
def test_a_command_on_such_a_folder_ends_in_a_sentence(
    verb: str, place: str, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / place)
    said = refused(capsys, verb, *SMOKE_FINETUNE, *transcribed_options(manifests), f"--output={tmp_path / 'run'}")
    assert said.splitlines()[-1].startswith(f"hubert: {tmp_path / 'run' / place}: a pipe")


def test_results_of_a_set_are_not_written_to_a_pipe(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run/test/dev").mkdir(parents=True)
    os.mkfifo(tmp_path / "run/test/dev/test.jsonl")
    (tmp_path / "run/last.ckpt").touch()
    test = [f"--data.init_args.test=[{manifests / 'dev.jsonl.gz'}]"]
    command = ["test", *SMOKE_FINETUNE, *transcribed_options(manifests), *test, f"--output={tmp_path / 'run'}"]
    said = refused(capsys, *command)
    assert said.splitlines()[-1].startswith(f"hubert: {tmp_path / 'run'}")


@pytest.mark.parametrize("kind", ["pipe", "device", "4 GB"])
def test_small_files_are_read_within_bounds(kind: str, tmp_path: Path) -> None:
    make = sparse if kind == "4 GB" else ODD[kind]
    for name in ("config.yaml", "metrics.json", "run.lock", "metrics.csv"):
        make(tmp_path / name)
    with pytest.raises(ValueError, match=r"config\.yaml: "):
        kept_config(tmp_path)
    with pytest.raises(ValueError, match=r"run\.lock: "), locked(tmp_path):
        pass
    with pytest.raises(ValueError, match=r"metrics.csv: "):
        keep_rows(CSVLogger(tmp_path, name="", version=""), {"global_step": 3})
    assert kept_metrics(tmp_path) == {}  # which going on makes again


@pytest.mark.parametrize("kind", ["pipe", "device", "4 GB"])
def test_a_store_and_results_are_read_within_bounds(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make = sparse if kind == "4 GB" else ODD[kind]
    make(tmp_path / "store.json")
    make(tmp_path / "test.jsonl")
    assert f"{tmp_path}: " in refused(capsys, "labels", "check", str(tmp_path))
    assert f"{tmp_path / 'test.jsonl'}: " in refused(capsys, "score", str(tmp_path / "test.jsonl"))
