"""Settings, names and metrics that a run sends to W&B, without a run of W&B."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.training.wandb_runs import config_as_built, describe_run, log_once, name_group, own_folder


def test_a_resumed_run_logs_nothing_that_it_has() -> None:
    logged: list[tuple[int | None, dict[str, Any]]] = []
    logger: Any = SimpleNamespace(log_metrics=lambda metrics, step=None: logged.append((step, metrics)))
    log_once(logger, {3: {"epoch", "train/loss"}, 4: {"epoch", "val/loss"}})
    logger.log_metrics({"train/loss": 1.0, "epoch": 0}, 3)
    logger.log_metrics({"val/loss": 2.0, "epoch": 0}, 3)
    logger.log_metrics({"units/utterances/1": ["a picture"]}, 4)
    logger.log_metrics({"units/utterances/1": ["a picture"]}, 5)
    logger.log_metrics({"labels/kmeans_inertia": 3.0})
    assert logged == [
        (3, {"val/loss": 2.0}),
        (5, {"units/utterances/1": ["a picture"]}),
        (None, {"labels/kmeans_inertia": 3.0}),
    ]


def test_the_config_states_the_encoder_that_was_built(tmp_path: Path) -> None:
    """Fine-tuning takes the encoder of its checkpoint, whatever its config says."""
    path = tmp_path / "config.yaml"
    path.write_text("model: {init_args: {encoder: {dim: 768, num_layers: 12}, pretrained: a.ckpt}}\n")
    built = SimpleNamespace(encoder=HubertEncoder(EncoderConfig(conv_channels=8, dim=16, num_layers=1, num_heads=2)))
    model = yaml.safe_load(config_as_built(path, built))["model"]["init_args"]
    assert (model["encoder"]["dim"], model["encoder"]["num_layers"], model["pretrained"]) == (16, 1, "a.ckpt")


def fit_config(**options: Any) -> Any:
    settings = {"group": None, "name": None, "tags": None, "job_type": None} | options
    logger = Namespace(class_path="lightning.pytorch.loggers.WandbLogger", init_args=Namespace(**settings))
    relabel = Namespace(class_path="hubert_lightning.Relabel", init_args=Namespace(features="a.ckpt", layer=6))
    return Namespace(
        output="checkpoints/base",
        iterations=[],
        model=Namespace(class_path="hubert_lightning.HubertPretraining"),
        trainer=Namespace(logger=logger, callbacks=[relabel]),
    )


def test_a_run_is_named_for_its_folder_unless_the_config_names_it() -> None:
    plain, named = fit_config(), fit_config(name="mine", tags=["trial"], job_type="sweep")
    for config in (plain, named):
        name_group(config)
        describe_run(config, 2)
        describe_run(config, 2)  # as when a run's own config is started again
    settings = plain.trainer.logger.init_args
    assert (settings.group, settings.name, settings.job_type) == ("base", "base", "pretrain")
    assert settings.tags == ["pretrain", "iteration 2", "layer 6 labels"]
    settings = named.trainer.logger.init_args
    assert (settings.group, settings.name, settings.job_type) == ("mine", "mine", "sweep")
    assert settings.tags == ["trial", "pretrain", "iteration 2", "layer 6 labels"]


def test_a_trial_of_a_sweep_has_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    config = fit_config()
    own_folder(config)
    assert config.output == "checkpoints/base"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "t1")
    for _ in range(2):
        name_group(config)
        own_folder(config)
        assert config.output == "checkpoints/base/t1"
    settings = config.trainer.logger.init_args
    assert (settings.group, settings.name) == ("base", None)
