"""The sweeps of configs/sweeps run: the commands that W&B's agent builds of them are fits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
import yaml
from helpers import ROOT, write_store
from test_wandb import WANDB, records, run_of, settings_of
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from hubert_lightning.cli import main
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.frames import num_frames
from hubert_lightning.training.hubert_cli import HubertCLI
from hubert_lightning.units.label_shards import LabelSource

SWEEPS = sorted((ROOT / "configs/sweeps").glob("*.yaml"))


def trial(path: Path) -> tuple[list[str], dict[str, Any]]:
    """The command of a sweep's first trial, as `wandb agent` builds it, and its values by key."""
    sweep = yaml.safe_load(path.read_text())
    values = {
        name: parameter["values"][0] if "values" in parameter else parameter["min"]
        for name, parameter in sweep["parameters"].items()
    }
    variables = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    variables |= {"program": [sweep["program"]], "env": ["/usr/bin/env"], "interpreter": ["python"]}
    command: list[str] = []
    for word in create_sweep_command(sweep["command"]):
        command += variables[word[2:-1]] if word.startswith("${") else [word]
    return command, values


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_a_trial_is_a_fit_with_the_values_of_the_sweep(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # configs are named from there
    command, values = trial(path)
    assert command[:3] == ["/usr/bin/env", "hubert", "fit"]
    missing = ["--data.init_args.labels=null", "--model.init_args.pretrained=null"]  # runs that exist nowhere here
    used = [option for option in missing if any(word.startswith(option.split("=")[0]) for word in command[3:])]
    if "finetune" in path.name:
        used.append("--model.init_args.pretrained=null")
    config = HubertCLI("fit", [*command[3:], *used]).config
    for key, value in values.items():
        assert config[key] == value
        assert type(config[key]) is type(value)
    metric = yaml.safe_load(path.read_text())["metric"]
    assert metric["name"] in ("val/masked_accuracy", "val/wer")


def test_each_trial_has_a_folder_and_the_run_of_the_sweep(
    manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, values = trial(ROOT / "configs/sweeps/learning-rate.yaml")
    rng, cuts = np.random.default_rng(0), [*read_manifest(manifests / "train.jsonl.gz")]
    labels = {cut.id: rng.integers(100, size=(1, num_frames(cut.num_samples))).astype(np.uint16) for cut in cuts}
    write_store(tmp_path / "labels", LabelSource("mfcc", "k", "m", clusters=(100,)), labels)
    monkeypatch.chdir(ROOT)
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_SWEEP_ID": "sweep1",
        "WANDB_RUN_ID": "trial1",
    }.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # it remembers the variables of other tests
    smoke = [
        *("--config", "tests/smoke.yaml", "--iterations=[]", "--trainer.max_steps=2", WANDB),
        f"--data.init_args.labels={tmp_path / 'labels'}",
        f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
        "--data.init_args.validation=null",
        f"--output={tmp_path / 'sweep'}",
    ]
    main(["fit", *command[3:], *smoke])
    wandb.teardown()
    [path] = (tmp_path / "sweep/trial1").glob("wandb/offline-run-*/run-*.wandb")
    found = records(path)
    assert (run_of(found).run_id, run_of(found).sweep_id) == ("trial1", "sweep1")
    assert settings_of(found)["optimizer/lr"] == values["model.init_args.optimizer.init_args.lr"]
    assert (tmp_path / "sweep/trial1/last.ckpt").exists()


def test_a_trial_of_several_iterations_is_refused(
    manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(ROOT / "configs/pretrain/base.yaml"), f"--output={tmp_path}"])
    assert "2 iterations in a trial of a W&B sweep, which is one run" in capsys.readouterr().err
