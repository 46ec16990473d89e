"""Every logger of Lightning gets the same metrics and settings, alone or beside others."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from test_wandb import WANDB, history, offline_run, settings_of

from hubert_lightning.cli import main
from hubert_lightning.training.metrics_table import read_metrics

LOGGERS = (
    "--trainer.logger=[{class_path: lightning.pytorch.loggers.TensorBoardLogger,"
    f" init_args: {{save_dir: ., name: '', version: tensorboard}}}},{WANDB.partition('=')[2]}]"
)


def events_of(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], list[str]]:
    """Scalars and texts of a TensorBoard folder."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events: Any = accumulators.EventAccumulator(str(folder))
    events.Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars, events.Tags()["tensors"]


@pytest.mark.slow
def test_tensorboard_wandb_and_the_table_get_the_same_metrics(
    manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    main(
        [
            *("fit", "--config", str(ROOT / "configs/pretrain/base.yaml")),
            *("--config", str(ROOT / "tests/smoke.yaml"), LOGGERS, f"--output={tmp_path}"),
            f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
            f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
            "--iterations=[{clusters: 20, max_frames: 2000, max_steps: 2}]",
        ]
    )
    run = tmp_path / "iteration1"
    table, (scalars, _), found = read_metrics(run), events_of(run / "tensorboard"), offline_run(run)
    assert settings_of(found) == json.loads((run / "record.json").read_text())
    for name in ("train/loss", "train/gradient_norm_transformer", "val/masked_accuracy", "units/label_coverage"):
        steps = [step - 1 for step, _ in table[name]]
        values = pytest.approx([value for _, value in table[name]])
        assert [step for step, _ in scalars[name]] == steps == [step for step, _ in history(found, name)]
        assert [value for _, value in scalars[name]] == values
        assert [value for _, value in history(found, name)] == values
    assert len(table["labels/kmeans_inertia"]) == len(scalars["labels/kmeans_inertia"]) > 2
    assert (run / "tensorboard/hparams.yaml").exists()


@pytest.mark.parametrize("logger", ["null", "true", "false"])
def test_a_run_without_a_logger_keeps_its_metrics(logger: str, manifests: Path, tmp_path: Path) -> None:
    main(
        [
            *("fit", "--config", str(ROOT / "configs/finetune/10h.yaml")),
            *("--config", str(ROOT / "tests/smoke-finetune.yaml"), f"--output={tmp_path}"),
            f"--data.init_args.train=[{manifests / 'finetune.jsonl.gz'}]",
            "--data.init_args.validation=null",
            "--trainer.callbacks=null",
            f"--trainer.logger={logger}",
        ]
    )
    assert [step for step, _ in read_metrics(tmp_path)["train/loss"]] == [1, 2]
    assert not (tmp_path / "lightning_logs").exists()
