"""Every YAML in configs/ parses as it stands; with a smoke layer on top, each takes two real steps."""

import json
import math
from pathlib import Path

import pytest
import yaml

from hubert_lightning.cli import main
from hubert_lightning.experiment import HubertCLI

ROOT = Path(__file__).parent.parent
PRETRAINING = [*sorted((ROOT / "configs/pretrain").glob("*.yaml")), ROOT / "configs/demo.yaml"]
FINETUNING = [
    *(ROOT / f"configs/finetune/{name}.yaml" for name in ("10h", "100h", "small")),
    ROOT / "configs/demo-finetune.yaml",
]
SCRATCH = {
    ROOT / "configs/finetune/small-scratch.yaml": FINETUNING[2],
    ROOT / "configs/demo-scratch.yaml": FINETUNING[3],
}
SIZES = sorted((ROOT / "configs/size").glob("*.yaml"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


class ParsedOnly(HubertCLI):
    """Stops where classes would be built: XLarge would take 4 GB, and no manifest is there."""

    def before_instantiate_classes(self) -> None:
        raise SystemExit(0)


def parsed(*args: str) -> ParsedOnly:
    cli = ParsedOnly.__new__(ParsedOnly)
    with pytest.raises(SystemExit) as stopped:
        cli.__init__(["fit", *args])  # type: ignore[misc]
    assert stopped.value.code == 0
    return cli


def assert_runs_alone(kept: Path) -> None:
    """The config in a run's folder says all of it, in words that another process understands."""
    assert "Unable to serialize" not in kept.read_text()
    given, again = yaml.safe_load(kept.read_text()), parsed("--config", str(kept)).config.fit
    assert again.model.init_args.encoder.as_dict() == given["model"]["init_args"]["encoder"]


def test_every_file_is_one_of_these() -> None:
    assert {*PRETRAINING, *FINETUNING, *SIZES, *SCRATCH} == set((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", [*PRETRAINING, *FINETUNING], ids=name)
def test_a_config_parses_as_it_stands(path: Path) -> None:
    config = parsed("--config", str(path)).config.fit
    given = yaml.safe_load(path.read_text())
    assert config.output == given["output"]
    assert config.model.class_path.endswith(given["model"]["class_path"].split(".")[-1])
    for key, value in given["trainer"].items():
        if key not in ("logger", "callbacks"):  # these become class paths with all their arguments
            assert config.trainer[key] == value


@pytest.mark.parametrize("size", SIZES, ids=name)
def test_a_size_is_a_layer_over_a_pre_training_config(size: Path) -> None:
    asked = yaml.safe_load(size.read_text())["model"]["init_args"]
    base, recipe = (str(ROOT / "configs/pretrain" / name) for name in ("base.yaml", size.name))
    for args in (["--config", base, "--config", str(size)], ["--config", recipe]):  # a recipe has its size in it
        model = parsed(*args).config.fit.model.init_args
        assert {key: model.encoder[key] for key in asked["encoder"]} == asked["encoder"]
        assert model.final_dim == asked["final_dim"]


@pytest.mark.parametrize("layer", SCRATCH, ids=name)
def test_scratch_is_a_layer_that_forgets_what_was_pre_trained(layer: Path) -> None:
    model = parsed("--config", str(SCRATCH[layer]), "--config", str(layer)).config.fit.model.init_args
    recipe = {"configs/demo-scratch.yaml": "demo.yaml", "configs/finetune/small-scratch.yaml": "pretrain/small.yaml"}
    pretraining = parsed("--config", str(ROOT / "configs" / recipe[str(layer.relative_to(ROOT))]))
    encoder = pretraining.config.fit.model.init_args.encoder
    assert model.pretrained is None
    assert not model.freeze_convolutions
    for size in ("conv_channels", "dim", "num_layers", "num_heads", "ffn_dim", "pos_kernel", "conv_norm", "pre_norm"):
        assert model.encoder[size] == encoder[size]


@pytest.mark.parametrize("path", [*PRETRAINING, *FINETUNING, *SIZES, *SCRATCH], ids=name)
def test_a_config_opens_with_what_it_reproduces(path: Path) -> None:
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", PRETRAINING, ids=name)
def test_a_pre_training_config_takes_real_steps(path: Path, manifests: Path, tmp_path: Path) -> None:
    main(
        ["fit", "--config", str(path), "--config", str(ROOT / "tests/smoke.yaml")]
        + [f"--output={tmp_path}"]
        + [f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]"]
        + [f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]"]
    )
    metrics = json.loads((tmp_path / "iteration1" / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert math.isfinite(metrics["val/loss"])
    assert (tmp_path / "iteration1" / "last.ckpt").exists()
    assert_runs_alone(tmp_path / "iteration1" / "config.yaml")


@pytest.mark.parametrize("path", FINETUNING, ids=name)
def test_a_fine_tuning_config_takes_real_steps(path: Path, manifests: Path, tmp_path: Path) -> None:
    main(
        ["fit", "--config", str(path), "--config", str(ROOT / "tests/smoke-finetune.yaml")]
        + [f"--output={tmp_path}"]
        + [f"--data.init_args.train=[{manifests / 'finetune.jsonl.gz'}]"]
        + [f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]"]
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert math.isfinite(metrics["val/loss"])
    assert (tmp_path / "best.ckpt").exists()
    assert_runs_alone(tmp_path / "config.yaml")
