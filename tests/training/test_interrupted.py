"""Work that a kill interrupts is repeated: checkpoints, metrics and logs are those of an uninterrupted run."""

import csv
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hubert_lightning import BestCheckpoints
from hubert_lightning.training.callbacks.preemption import Preemption
from hubert_lightning.training.callbacks.whole_steps import WholeSteps
from hubert_lightning.training.checkpoints import WholeCheckpoints
from hubert_lightning.training.metrics_table import keep_rows

EPOCH = 6
"""Batches of an epoch."""
# Ties and setbacks, by optimiser step; nothing after step 13 is better than what was before
SCORES = [9.0, 8.0, 8.0, 5.0, 7.0, 7.0, 4.0, 6.0, 4.5, 4.0, 3.0, 5.0, 2.0, *[6.0] * 20]


class Judged(LightningModule):
    """Learns one number, and is judged by a list."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def training_step(self, batch: Tensor) -> Tensor:
        loss = ((self.weight - 1) ** 2).sum()
        self.log("train/loss", loss.detach(), batch_size=1)
        if self.global_step == 2:
            self.log("train/once", 1.0, batch_size=1)
        return loss

    def validation_step(self, batch: Tensor) -> None:
        self.log("val/wer", SCORES[self.global_step - 1] + float(self.weight.detach().sum()) / 1e3, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Rows(Logger):
    """Keeps what is logged: step, epoch, and the rest."""

    name = version = "rows"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.append((step, {name: value for name, value in metrics.items() if name != "train/once"}))


class Killed:
    """Copies a run's folder before and after every change of it: what a kill would leave there."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self.folder, self.copies, self.number, self.before = folder, copies, 0, set[Any]()

    def copy(self) -> None:
        files = [*self.folder.iterdir()] if (self.folder / "last.ckpt").exists() else []
        there = {(file.name, file.stat().st_ino, file.stat().st_mtime_ns, file.stat().st_size) for file in files}
        if there and there != self.before:
            shutil.copytree(self.folder, self.copies / f"{self.number}", copy_function=shutil.copyfile)
            self.before, self.number = there, self.number + 1

    def around(self, function: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.copy()
            result = function(*args, **kwargs)
            self.copy()
            return result

        return watched


def fit(folder: Path, stopping: int = 100, **settings: Any) -> Rows:
    """Run, or go on with, a fit, to its end, with the files of `HubertCLI`."""
    every = settings.pop("every", 2)
    rows, data = settings.pop("logger", Rows()), DataLoader(torch.zeros(EPOCH, 1), batch_size=1)
    callbacks: list[Callback] = [
        BestCheckpoints(keep=2, dirpath=folder),
        EarlyStopping("val/wer", patience=stopping),
        ModelCheckpoint(dirpath=folder, filename="last", every_n_train_steps=every, enable_version_counter=False),
        WholeSteps(),
        *settings.pop("more", []),
    ]
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=rows,
        log_every_n_steps=1,
        limit_val_batches=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[WholeCheckpoints()],
        callbacks=callbacks,
        **({"val_check_interval": 2, "check_val_every_n_epoch": None, "max_steps": 14, "max_epochs": -1} | settings),
    )
    last = folder / "last.ckpt"
    trainer.fit(Judged(), data, data, ckpt_path=last if last.exists() else None, weights_only=True)
    trainer.save_checkpoint(last)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    (folder / "metrics.json").write_text(json.dumps({"steps": trainer.global_step} | metrics))
    return rows


def results(folder: Path) -> dict[str, Any]:
    """What is in a run's files, but for the folders of paths."""
    files = {path.name: path for path in folder.iterdir() if path.name != "previous.ckpt"}
    return {
        name: json.loads(path.read_text()) if name == "metrics.json" else plain(torch.load(path, weights_only=True))
        for name, path in files.items()
    }


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {plain(key): plain(of) for key, of in value.items() if key != "dirpath"}
    if isinstance(value, (list, tuple)):
        return [plain(of) for of in value]
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    return Path(value).name if isinstance(value, str) else value


def differences(left: Any, right: Any, place: str = "") -> Iterator[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in left.keys() | right.keys():
            yield from differences(left.get(key), right.get(key), f"{place}.{key}")
    elif left != right:
        yield f"{place}: {left} here, {right} there"


def interruptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> Iterator[tuple[Path, list[Any], list[Any], dict[str, Any]]]:
    """Each folder that a kill leaves, resumed; what the whole run logs, what the resumed one; the whole's files."""
    (tmp_path / "copies").mkdir()
    killed = Killed(tmp_path / "whole", tmp_path / "copies")
    with monkeypatch.context() as patch:
        for name in ("replace", "link", "remove", "fsync"):
            patch.setattr(os, name, killed.around(getattr(os, name)))
        rows = fit(tmp_path / "whole", **settings)
    for number in range(killed.number):
        folder = tmp_path / "copies" / str(number)
        logged = fit(folder, **settings)
        yield folder, rows.rows, logged.rows, results(tmp_path / "whole")


WAYS: dict[str, dict[str, Any]] = {
    "on saved steps": {},
    "between saved steps": {"val_check_interval": 3, "every": 2},
    "before every save": {"val_check_interval": 1, "every": 3},
    "a share of the epoch": {"val_check_interval": 0.5, "check_val_every_n_epoch": 1, "every": 1},
    "at the end of each epoch": {"val_check_interval": 1.0, "check_val_every_n_epoch": 1, "every": 1},
    "at the end of every second epoch": {"val_check_interval": 1.0, "check_val_every_n_epoch": 2, "every": 3},
    "of accumulated batches": {"accumulate_grad_batches": 2, "val_check_interval": 4, "max_steps": 8, "every": 2},
    "in the middle of accumulating": {
        "accumulate_grad_batches": 2,
        "val_check_interval": 3,
        "max_steps": 8,
        "every": 1,
    },
    "by epochs": {"val_check_interval": 3, "max_steps": -1, "max_epochs": 2, "every": 1},
    "after a sanity check": {"num_sanity_val_steps": 1, "every": 3, "val_check_interval": 6},
    "until it stops early": {"stopping": 3, "max_steps": 30},
    "until an epoch stops early": {
        **{"stopping": 1, "max_steps": 40, "every": 2},
        **{"val_check_interval": 1.0, "check_val_every_n_epoch": 1},
    },
}


SELDOM = ("between saved steps", "before every save", "of accumulated batches", "after a sanity check", "by epochs")


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.campaign if way in SELDOM else []) for way in WAYS]
)
def test_a_run_that_is_killed_around_any_write_ends_in_the_same_files_and_logs_the_same_steps(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = 0
    for folder, whole, logged, expected in interruptions(tmp_path, monkeypatch, **WAYS[way]):
        found = results(folder)
        assert found.keys() == expected.keys(), folder.name
        for name, content in expected.items():
            assert list(differences(found[name], content)) == [], (folder.name, name)
        assert logged == whole[len(whole) - len(logged) :], folder.name
        number += 1
    assert number >= 15


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("steps", [2, 3, 5, 6, 7])  # 3 and 6: those of whole epochs
def test_a_finished_run_that_is_given_more_steps_is_the_longer_run(steps: int, accumulate: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate, "val_check_interval": 2 * accumulate}
    whole = fit(tmp_path / "whole", max_steps=10, **settings)
    before = fit(tmp_path / "run", max_steps=steps, **settings)
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert saved["epoch"] == (steps * accumulate - 1) // EPOCH
    after = fit(tmp_path / "run", max_steps=10, **settings)
    assert before.rows + after.rows == whole.rows
    found, expected = results(tmp_path / "run"), results(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert list(differences(found[name], content)) == [], name


class Told(Callback):
    """Tells the process to end, in a step that a validation follows."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_receives_a_signal_before_a_validation_resumes_with_it(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"every": 100, "max_steps": 9}
    whole = fit(tmp_path / "whole", **settings)
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", more=[Told(), Preemption()], **settings)
    assert [*(tmp_path / "run").glob("best-*.ckpt")] == [tmp_path / "run" / "best-2.ckpt"]
    after = fit(tmp_path / "run", **settings)
    assert after.rows[0] == whole.rows[4 + 1]  # four steps and a validation precede it
    assert set(after.rows[0][1]) == {"val/wer", "epoch"}
    found, expected = results(tmp_path / "run"), results(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert list(differences(found[name], content)) == [], name


def test_a_run_that_is_killed_in_the_step_after_a_restart_ends_in_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "val_check_interval": 6, "max_steps": 7, "every": 2}
    fit(tmp_path / "whole", **settings)
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", more=[Told(), Preemption()], **settings)  # at step 4, as is saved once more in step 5
    (tmp_path / "copies").mkdir()
    killed = Killed(tmp_path / "run", tmp_path / "copies")
    with monkeypatch.context() as patch:
        for name in ("replace", "link", "remove", "fsync"):
            patch.setattr(os, name, killed.around(getattr(os, name)))
        fit(tmp_path / "run", **settings)
    expected = results(tmp_path / "whole")
    for number in range(killed.number):
        fit(tmp_path / "copies" / f"{number}", **settings)
        found = results(tmp_path / "copies" / f"{number}")
        assert found.keys() == expected.keys(), number
        for name, content in expected.items():
            assert list(differences(found[name], content)) == [], (number, name)


def test_a_table_resumes_where_the_checkpoint_was_saved(tmp_path: Path) -> None:
    def rows(folder: Path) -> list[dict[str, str]]:
        with (folder / "metrics.csv").open(newline="") as file:
            return [
                {name: value for name, value in row.items() if name != "train/once"} for row in csv.DictReader(file)
            ]

    def table(folder: Path) -> CSVLogger:
        return CSVLogger(folder, name="", version="")

    fit(tmp_path / "whole", logger=table(tmp_path / "whole"), max_steps=7)
    fit(tmp_path / "run", logger=table(tmp_path / "run"), max_steps=5)
    with (tmp_path / "run" / "metrics.csv").open("a") as file:  # of later steps, the last cut short
        file.write("0,5,1.0,\n0,")
    logger = table(tmp_path / "run")
    keep_rows(logger, torch.load(tmp_path / "run" / "last.ckpt", weights_only=True))
    fit(tmp_path / "run", logger=logger, max_steps=7)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    saved = torch.load(tmp_path / "run" / "previous.ckpt", weights_only=True)  # of step 6, before it was validated
    assert (saved["global_step"], saved["validation_due"]) == (6, True)
    logger = table(tmp_path / "run")
    keep_rows(logger, saved)
    assert [(row["step"], row["val/wer"] != "") for row in rows(tmp_path / "run")][-3:] == [
        ("3", True),
        ("4", False),
        ("5", False),
    ]


@pytest.mark.parametrize("damage", [b"\xf3\xff,1,2\n", b"\0\n", b"\xb2,3,4\n", b'"never closed'])
def test_a_corrupt_table_keeps_its_intact_rows(damage: bytes, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    (tmp_path / "metrics.csv").write_bytes(b"epoch,step,train/loss\n0,0,2.5\n" + damage)
    keep_rows(logger, {"global_step": 5})
    with (tmp_path / "metrics.csv").open() as file:
        assert next(csv.DictReader(file)) == {"epoch": "0", "step": "0", "train/loss": "2.5"}


def test_a_file_that_is_no_table_is_one_sentence(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(ValueError, match=r"metrics\.csv: a folder, which is not read here"):
        keep_rows(logger, {"global_step": 5})
