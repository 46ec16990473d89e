"""The best few checkpoints of a run, and the mean of their weights."""

import csv
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import fork_server
import pytest
import torch
from helpers import ROOT, SMALL_FINETUNING, finetuning_options
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hubert_lightning import BestCheckpoints
from hubert_lightning.cli import main
from hubert_lightning.files import remove_unfinished_once
from hubert_lightning.pretrained.load import load_hubert
from hubert_lightning.training.averaging import averaged
from hubert_lightning.training.checkpoints import WholeCheckpoints, newest_checkpoint, set_corrupt_aside
from hubert_lightning.training.metrics_table import keep_rows


class Judged(LightningModule):
    """Learns one number, and is judged by a list: so well after one step, so well after two, …"""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))
        self.scores = scores

    def training_step(self, batch: Tensor) -> Tensor:
        self.count += 1
        return ((self.weight - 1) ** 2).sum()

    def validation_step(self, batch: Tensor) -> None:
        self.log("val/wer", self.scores[self.global_step - 1], batch_size=1)

    def configure_optimizers(self) -> torch.optim.SGD:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class BestIsBest(Callback):
    """After every validation, `best.ckpt` is what the best of all scores was found for."""

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Judged, *batch: object) -> None:  # type: ignore[override]
        done = pl_module.scores[: trainer.global_step - 1]  # this one is yet to be kept
        if any(math.isfinite(score) for score in done):
            best = min((score, step) for step, score in enumerate(done, start=1) if math.isfinite(score))[1]
            kept = torch.load(Path(trainer.default_root_dir) / "best.ckpt", weights_only=True)
            assert kept["global_step"] == best


def fit(folder: Path, scores: list[float], steps: int | None = None, keep: int = 3, watched: bool = True) -> Trainer:
    data = DataLoader(torch.zeros(100, 1), batch_size=1)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        max_steps=steps or len(scores),
        val_check_interval=1,
        limit_val_batches=1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[WholeCheckpoints()],
        callbacks=[BestCheckpoints(keep=keep, dirpath=folder), *([BestIsBest()] if watched else [])],
    )
    last = folder / "last.ckpt"
    before = last if last.exists() else None
    trainer.fit(Judged(scores), data, data, ckpt_path=before, weights_only=True)
    trainer.save_checkpoint(last)
    return trainer


def kept(folder: Path) -> set[int]:
    return {int(path.stem.removeprefix("best-")) for path in folder.glob("best-*.ckpt")}


def weight(path: Path) -> Tensor:
    return torch.load(path, weights_only=True)["state_dict"]["weight"]


SCORES = [0.9, 0.5, 0.7, 0.8, 0.4, 0.6, 0.95]


def test_the_best_few_checkpoints_stay_and_average_holds_their_mean(tmp_path: Path) -> None:
    fit(tmp_path, SCORES)
    assert kept(tmp_path) == {2, 5, 6}
    assert (tmp_path / "best.ckpt").samefile(tmp_path / "best-5.ckpt")
    mean = torch.load(tmp_path / "average.ckpt", weights_only=True)
    weights = torch.stack([weight(tmp_path / f"best-{step}.ckpt").double() for step in (2, 5, 6)])
    torch.testing.assert_close(mean["state_dict"]["weight"], weights.mean(dim=0).float(), rtol=0, atol=0)
    assert mean["state_dict"]["count"] == mean["global_step"] == 5  # the best's
    assert [Path(path).name for path in mean["averaged"]] == ["best-5.ckpt", "best-2.ckpt", "best-6.ckpt"]
    assert "optimizer_states" not in mean


@pytest.mark.parametrize("stopped", range(1, len(SCORES)))
def test_a_resumed_run_keeps_the_checkpoints_of_an_uninterrupted_one(stopped: int, tmp_path: Path) -> None:
    fit(tmp_path / "whole", SCORES)
    fit(tmp_path / "run", SCORES, steps=stopped)
    (tmp_path / "run").rename(tmp_path / "moved")
    fit(tmp_path / "moved", SCORES)
    assert kept(tmp_path / "moved") == kept(tmp_path / "whole")
    assert (tmp_path / "moved" / "best.ckpt").samefile(tmp_path / "moved" / "best-5.ckpt")
    torch.testing.assert_close(
        weight(tmp_path / "moved" / "average.ckpt"), weight(tmp_path / "whole" / "average.ckpt"), rtol=0, atol=0
    )
    assert not (tmp_path / "run").exists()


def test_a_run_resumed_in_another_folder_leaves_the_files_of_the_first(tmp_path: Path) -> None:
    fit(tmp_path / "run", SCORES, steps=4)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "run" / "last.ckpt", tmp_path / "other")
    fit(tmp_path / "other", SCORES, watched=False)
    assert kept(tmp_path / "other") == {5, 6, 7}  # of those that it made
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def test_removed_checkpoints_are_forgotten_and_a_smaller_keep_removes_the_worst(tmp_path: Path) -> None:
    fit(tmp_path, SCORES, steps=4)
    assert kept(tmp_path) == {2, 3, 4}
    (tmp_path / "best-3.ckpt").unlink()
    fit(tmp_path, SCORES, steps=5)
    assert kept(tmp_path) == {2, 4, 5}
    fit(tmp_path, SCORES, steps=6, keep=2)
    assert kept(tmp_path) == {2, 5}
    torch.testing.assert_close(
        weight(tmp_path / "average.ckpt"),
        averaged([tmp_path / f"best-{k}.ckpt" for k in (2, 5)])["state_dict"]["weight"],
    )


def test_a_fit_with_nothing_left_to_train_writes_the_mean(tmp_path: Path) -> None:
    fit(tmp_path, SCORES)
    (tmp_path / "average.ckpt").unlink()  # as if it had been killed before it was written
    fit(tmp_path, SCORES)
    assert (tmp_path / "average.ckpt").exists()


def test_a_model_whose_metric_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    fit(tmp_path / "some", [math.nan, 0.5, math.nan, math.inf, 0.4])
    assert kept(tmp_path / "some") == {2, 5}
    fit(tmp_path / "none", [math.nan, math.nan])
    assert not [*(tmp_path / "none").glob("best*.ckpt"), *(tmp_path / "none").glob("average.ckpt")]


def test_a_fit_without_a_validation_keeps_nothing(tmp_path: Path) -> None:
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        max_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BestCheckpoints(dirpath=tmp_path)],
    )
    trainer.fit(Judged([]), DataLoader(torch.zeros(4, 1), batch_size=1))
    assert not list(tmp_path.glob("*.ckpt"))


def test_without_links_the_best_checkpoint_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise OSError("this disk has no links")

    monkeypatch.setattr("os.link", refuse)
    fit(tmp_path, SCORES)
    assert (tmp_path / "best.ckpt").read_bytes() == (tmp_path / "best-5.ckpt").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".ckpt"]


def test_a_monitor_that_validation_does_not_log_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        max_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BestCheckpoints(monitor="val/wre", dirpath=tmp_path)],
    )
    data = DataLoader(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="validation logs val/wer, but no val/wre; correct its monitor"):
        trainer.fit(Judged([0.5]), data, data)
    with pytest.raises(ValueError, match="keep is 0; keep one or more"):
        BestCheckpoints(keep=0)


@pytest.fixture(scope="module")
def finetuning(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("best") / "run"
    main(["fit", *SMALL_FINETUNING, *finetuning_options(manifests), "--trainer.max_steps=4", f"--output={output}"])
    return output


def test_a_mean_is_tested_and_opened_like_any_other_checkpoint(finetuning: Path, tmp_path: Path) -> None:
    assert kept(finetuning) == {2, 4}
    main(["test", "--config", str(finetuning / "config.yaml"), f"--ckpt_path={finetuning / 'average.ckpt'}"])
    assert (finetuning / "test.jsonl").exists()
    main(["average", f"[{finetuning / 'best-2.ckpt'}, {finetuning / 'best-4.ckpt'}]", str(tmp_path / "mean.ckpt")])
    of_fit, of_verb = (load_hubert(path).state_dict() for path in (finetuning / "average.ckpt", tmp_path / "mean.ckpt"))
    torch.testing.assert_close(of_verb, of_fit, rtol=0, atol=0)


@pytest.mark.slow
def test_a_moved_run_takes_more_steps_by_its_own_config(finetuning: Path, tmp_path: Path) -> None:
    shutil.copytree(finetuning, tmp_path / "moved")
    config = str(tmp_path / "moved" / "config.yaml")
    main(["fit", "--config", config, f"--output={tmp_path / 'moved'}", "--trainer.max_steps=6"])
    assert kept(tmp_path / "moved") == {2, 4, 6}
    assert kept(finetuning) == {2, 4}


def refused(capsys: pytest.CaptureFixture, *args: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_checkpoints_that_cannot_be_averaged_are_refused_in_one_sentence(
    finetuning: Path, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    best, out = finetuning / "best.ckpt", str(tmp_path / "out.ckpt")
    other = torch.load(best, weights_only=True)
    other["state_dict"]["head.bias"] = torch.zeros(3)
    torch.save(other, tmp_path / "other.ckpt")
    message = refused(capsys, "average", f"[{best}, {tmp_path / 'other.ckpt'}]", out)
    assert f"other.ckpt: its head.bias is (3,), in {best} it is (29,); average checkpoints of one model" in message
    assert "no checkpoint to average" in refused(capsys, "average", "[]", out)
    message = refused(capsys, "average", f"[{best}]", out)
    assert "best.ckpt: a single checkpoint, which is its own mean; give at least two" in message
    assert "is corrupt, or no file of torch.save" in refused(capsys, "average", f"[{best}, {ROOT / 'README.md'}]", out)
    assert "exists already; remove it" in refused(capsys, "average", f"[{best}]", str(finetuning / "last.ckpt"))
    assert not Path(out).exists()
    more = [
        *SMALL_FINETUNING,
        *finetuning_options(manifests),
        f"--output={tmp_path / 'run'}",
        f"--ckpt_path={finetuning / 'average.ckpt'}",
    ]
    assert "average.ckpt: weights alone, such as an average, so no run can resume" in refused(capsys, "fit", *more)


# Saves step 3 over what is there, and kills itself before the n-th thing that it does to files
SAVE_AND_DIE = """
import os, signal, sys
from pathlib import Path
import torch
from hubert_lightning.training.checkpoints import WholeCheckpoints, newest_checkpoint, set_corrupt_aside
folder, number, links = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "links"
calls = 0
def hear(event, args):
    global calls
    if event in ("open", "os.rename", "os.link", "os.remove") and str(folder) in str(args[0]):
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
def refuse(*paths):
    raise OSError("this disk has no links")
if not links:
    os.link = refuse
if sys.argv[4] == "resumed":
    set_corrupt_aside(folder, newest_checkpoint(folder))
sys.addaudithook(hear)
WholeCheckpoints().save_checkpoint({"state_dict": {"weight": torch.full((100,), 3.0)}}, folder / "last.ckpt")
"""


def saved(path: Path, step: int) -> None:
    WholeCheckpoints().save_checkpoint({"state_dict": {"weight": torch.full((100,), float(step))}}, path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((4,), 2.0).numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)


def step_of(path: Path | None) -> int:
    assert path is not None
    return int(weight(path)[0])


@pytest.mark.slow
@pytest.mark.parametrize("links", ["links", "no links"])
@pytest.mark.parametrize(
    ("damage", "known", "sound"),
    [
        (lambda last: None, "while training", 2),
        (flip, "resumed", 1),
        (flip, "while training", 1),
        (lambda last: last.write_bytes(b""), "while training", 1),
    ],
    ids=["sound", "damaged before the start", "damaged while training", "emptied while training"],
)
def test_a_kill_at_any_moment_of_a_save_leaves_an_intact_checkpoint(
    damage: Callable[[Path], object], known: str, sound: int, links: str, tmp_path: Path
) -> None:
    script = tmp_path / "save.py"
    script.write_text(SAVE_AND_DIE)
    for number in range(1, 40):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        for step in (1, 2):
            saved(folder / "last.ckpt", step)
        damage(folder / "last.ckpt")
        code = fork_server.run([str(script), str(folder), str(number), links, known], tmp_path / "output.txt")
        step = step_of(newest_checkpoint(folder))
        remove_unfinished_once.cache_clear()  # as in another process
        saved(folder / "last.ckpt", 4)  # whatever it left does not stand in the way
        assert step_of(newest_checkpoint(folder)) == 4
        assert {path.name for path in folder.iterdir()} - {"last.ckpt.corrupt"} == {"last.ckpt", "previous.ckpt"}
        if code == 0:
            assert step == 3
            break
        assert code == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
        assert step in (sound, 3)
    assert number > 5


def test_a_save_follows_no_link_and_removes_no_file_of_the_users(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "mine").write_text("mine")
    for name in ("new", "before"):
        (folder / f"last.ckpt.{name}").symlink_to(tmp_path / "mine")
    (folder / "last.ckpt.part").write_text("mine")
    for step in (1, 2, 3):
        saved(folder / "last.ckpt", step)
    assert (tmp_path / "mine").read_text() == (folder / "last.ckpt.part").read_text() == "mine"
    assert all((folder / f"last.ckpt.{name}").is_symlink() for name in ("new", "before"))
    checkpoints = {"last.ckpt", "previous.ckpt"}
    assert {path.name for path in folder.iterdir()} == checkpoints | {
        f"last.ckpt.{of}" for of in ("new", "before", "part")
    }
    assert (step_of(folder / "last.ckpt"), step_of(folder / "previous.ckpt")) == (3, 2)


def test_a_corrupt_checkpoint_gets_a_name_that_no_command_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        saved(tmp_path / "last.ckpt", step)
    flip(tmp_path / "last.ckpt")
    damaged = (tmp_path / "last.ckpt").read_bytes()
    set_corrupt_aside(tmp_path, newest_checkpoint(tmp_path))
    saved(tmp_path / "last.ckpt", 3)
    assert step_of(tmp_path / "previous.ckpt") == 1
    assert (tmp_path / "last.ckpt.corrupt").read_bytes() == damaged
    assert "is renamed to last.ckpt.corrupt" in caplog.text
    assert len(list(tmp_path.glob("*.ckpt"))) == 2


def test_a_corrupt_best_checkpoint_is_named_and_the_same_command_then_averages_the_others(
    tmp_path: Path,
) -> None:
    fit(tmp_path, SCORES)
    (tmp_path / "average.ckpt").unlink()
    content = bytearray((tmp_path / "best-5.ckpt").read_bytes())
    place = content.index(weight(tmp_path / "best-5.ckpt").numpy().tobytes())
    content[place] ^= 1
    (tmp_path / "best-5.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"best-5\.ckpt: corrupt; remove it, and run the same command again"):
        fit(tmp_path, SCORES)
    (tmp_path / "best-5.ckpt").unlink()
    fit(tmp_path, SCORES)
    mean = torch.load(tmp_path / "average.ckpt", weights_only=True)
    assert [Path(path).name for path in mean["averaged"]] == ["best-2.ckpt", "best-6.ckpt"]
    assert (tmp_path / "best.ckpt").samefile(tmp_path / "best-2.ckpt")


def test_the_mean_of_weights_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, SCORES)
    content = torch.load(tmp_path / "best-5.ckpt", weights_only=True)
    content["state_dict"]["weight"][0] = math.nan
    torch.save(content, tmp_path / "broken.ckpt")
    with pytest.raises(ValueError, match=r"broken\.ckpt: its weight is NaN or infinite; average others"):
        averaged([tmp_path / "best-2.ckpt", tmp_path / "broken.ckpt"])


# Keeps the rows of three steps, and kills itself before the n-th thing that it does to files
KEEP_AND_DIE = """
import os, signal, sys
from pathlib import Path
from lightning.pytorch.loggers import CSVLogger
from hubert_lightning.training.metrics_table import keep_rows
folder, number = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
def hear(event, args):
    global calls
    if event in ("open", "os.rename", "os.link", "os.remove", "os.truncate") and str(folder) in str(args[0]):
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
logger = CSVLogger(folder, name="", version="")
sys.addaudithook(hear)
keep_rows(logger, {"global_step": 3})
logger.log_metrics({"train/loss": 0.5}, 3)
logger.save()
"""


def test_a_kill_at_any_moment_of_a_start_leaves_the_rows_of_the_table(tmp_path: Path) -> None:
    def steps(folder: Path) -> list[str]:
        with (folder / "metrics.csv").open(newline="") as file:
            return [row["step"] for row in csv.DictReader(file)]

    (tmp_path / "keep.py").write_text(KEEP_AND_DIE)
    for number in range(1, 40):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        rows = "".join(f"{step},{1 / (step + 1)}\r\n" for step in range(5))
        (folder / "metrics.csv").write_text("step,train/loss\r\n" + rows, newline="")
        code = fork_server.run([str(tmp_path / "keep.py"), str(folder), str(number)], tmp_path / "output.txt")
        assert steps(folder)[:3] == ["0", "1", "2"], number
        keep_rows(CSVLogger(folder, name="", version=""), {"global_step": 3})
        assert steps(folder) == ["0", "1", "2"]
        if code == 0:
            break
        assert code == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
    assert number > 3


def test_a_table_without_rows_to_keep_is_removed(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss\n5,1.0\n")
    logger = CSVLogger(tmp_path, name="", version="")
    keep_rows(logger, {"global_step": 3})
    assert not (tmp_path / "metrics.csv").exists()
    logger.log_metrics({"val/wer": 0.5}, 3)
    logger.save()
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,val/wer", "3,0.5"]
