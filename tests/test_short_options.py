"""Short forms of the options of `hubert fit`."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers import SMOKE, TWO_ITERATIONS, parsed_config, pretraining_options

from hubert_lightning.cli import main
from hubert_lightning.errors import UserError
from hubert_lightning.short_options import ITERATION_KEYS, long_options, named_configs, settings_of
from hubert_lightning.training.finetuning import ten_hour_optimizer
from hubert_lightning.training.iterations import Iteration
from hubert_lightning.training.pretraining import base_optimizer
from hubert_lightning.training.run_folder import kept_config, kept_metrics

BASE = ["--config", "pretrain/base"]
TWO_MANIFESTS = ["a.jsonl.gz", "b.jsonl.gz"]


def parsed(*args: str) -> Any:
    return parsed_config(*long_options(named_configs(args))).config.fit


@pytest.mark.parametrize(
    ("typed", "manifests"),
    [
        (["--data.init_args.train", "a.jsonl.gz"], ["a.jsonl.gz"]),
        (["--data.init_args.train=a.jsonl.gz"], ["a.jsonl.gz"]),
        (["--data.train", *TWO_MANIFESTS], TWO_MANIFESTS),
        (["--data.init_args.train", "a.jsonl.gz,b.jsonl.gz"], TWO_MANIFESTS),
        (["--data.init_args.train", "[a.jsonl.gz, b.jsonl.gz]"], TWO_MANIFESTS),
        (["--data.init_args.train=[a.jsonl.gz]", "--data.init_args.train+=b.jsonl.gz"], TWO_MANIFESTS),
    ],
    ids=" ".join,
)
def test_manifests_need_no_brackets(typed: list[str], manifests: list[str]) -> None:
    config = parsed(*BASE, *typed, "--data.init_args.validation", "dev, é.jsonl.gz", "--output", "out")
    assert [str(path) for path in config.data.init_args.train] == manifests
    assert [str(path) for path in config.data.init_args.validation] == ["dev", " é.jsonl.gz"]
    assert config.output == "out"


def test_a_manifest_with_a_comma_in_its_name_is_one(tmp_path: Path) -> None:
    (tmp_path / "a,b.jsonl.gz").touch()
    config = parsed(*BASE, "--data.init_args.train", str(tmp_path / "a,b.jsonl.gz"))
    assert config.data.init_args.train == [tmp_path / "a,b.jsonl.gz"]


def test_no_validation_is_null() -> None:
    assert parsed(*BASE, "--data.init_args.validation", "null").data.init_args.validation is None


@pytest.mark.parametrize(
    ("config", "default"), [("pretrain/base", base_optimizer), ("finetune/960h", ten_hour_optimizer)]
)
def test_a_learning_rate_alone_keeps_the_rest_of_the_optimizer(config: str, default: Any) -> None:
    [reference] = default([{"params": []}]).param_groups
    optimizer = parsed("--config", config, "--lr", "1e-3").model.init_args.optimizer.init_args
    named = {"lr", "betas", "eps", "weight_decay", "fused"}
    if config == "pretrain/base":
        settings = {name: tuple(optimizer[name]) if name == "betas" else optimizer[name] for name in named}
        assert settings == {name: reference[name] for name in named} | {"lr": 1e-3}
    assert optimizer.lr == 1e-3


def test_a_learning_rate_keeps_the_optimizer_of_the_config() -> None:
    optimizer = parsed("--config", "pretrain/small", "--lr=0.5").model.init_args.optimizer.init_args
    assert (optimizer.lr, optimizer.weight_decay) == (0.5, 0.01)
    given = ["--model.init_args.optimizer", "torch.optim.SGD"]
    assert parsed(*BASE, *given, "--lr", "0.5").model.init_args.optimizer.class_path == "torch.optim.SGD"


def test_steps_are_those_of_each_iteration() -> None:
    config = parsed(*BASE, "--steps", "5_000", "--iterations.2.max_steps", "7", "--batch-seconds", "12")
    assert [iteration.max_steps for iteration in config.iterations] == [5000, 7]
    assert config.trainer.max_steps == -1
    assert config.data.init_args.max_duration == 12
    assert parsed("--config", "finetune/own", "--max-steps=30").trainer.max_steps == 30


def test_a_key_of_one_iteration_leaves_the_others() -> None:
    kmeans = "hubert_lightning.ScikitKMeans"
    config = parsed(*BASE, "--iterations.1.clusters", "[50, 100]", "--iterations.2.kmeans.class_path", kmeans)
    first, second = config.iterations
    assert (first.clusters, second.clusters) == ([50, 100], 500)
    assert (second.features, second.layer) == ("previous", 6)
    assert second.kmeans.class_path == kmeans


def test_an_iteration_of_the_command_line_can_be_changed() -> None:
    config = parsed(*BASE, TWO_ITERATIONS, "--iterations.2.layer=best")
    assert [iteration.clusters for iteration in config.iterations] == [20, 10]
    assert config.iterations[1].layer == "best"


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("--iterations.3.layer 1", r"the config has iterations 1 to 2; write --iterations\.1\.layer"),
        ("--iterations.0.layer 1", r"the config has iterations 1 to 2; write --iterations\.1\.layer"),
        ("--iterations.two.layer 1", r"the config has iterations 1 to 2"),
        ("--iterations.1 3", "an iteration has no such key; its keys are features, layer"),
        ("--iterations.1.layers 1", "an iteration has no layers; its keys are features, layer"),
        ("--iterations.1.layer.x 1", "an iteration has no layer.x"),
        ("--lr", "--lr: expects a value"),
        ("--steps --lr 3", "--steps: expects a value"),
    ],
)
def test_a_mistake_is_one_sentence(typed: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        long_options(named_configs([*BASE, *typed.split()]))


def test_a_config_without_iterations_has_no_entry_to_change() -> None:
    with pytest.raises(UserError, match="the config has no iterations; give --iterations, or --steps"):
        long_options(named_configs(["--config", "finetune/own", "--iterations.1.max_steps", "3"]))


def test_long_forms_stay_as_they_are() -> None:
    args = named_configs([*BASE, "--data.train", "a", "--lr", "1", "--steps=3", "--iterations.1.layer", "null"])
    assert long_options(long_options(args)) == long_options(args)
    others = ["--config=a.yaml", "--trainer.devices", "2", "--print_config", "--data.init_args.labels", "x"]
    assert long_options(others) == others


def test_the_keys_of_an_entry_are_those_of_an_iteration() -> None:
    assert set(ITERATION_KEYS) == {field.name for field in fields(Iteration)}


def test_an_option_before_a_config_counts_as_one_after_it(tmp_path: Path) -> None:
    options = ["--output", "elsewhere", "--lr=1e-5", "--trainer.max_steps", "7"]
    assert parsed(*options, *BASE) == parsed(*BASE, *options)
    assert parsed(*options, *BASE).output == "elsewhere"


def test_a_later_config_overrides_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("iterations: [{max_steps: 1}]\nmodel: {init_args: {optimizer: null, warmup: 0.1}}")
    settings = settings_of(["--config", str(tmp_path / "a.yaml"), "--config={model: {init_args: {warmup: 0.2}}}"])
    assert settings["model"] == {"init_args": {"optimizer": None, "warmup": 0.2}}
    assert settings["iterations"] == [{"max_steps": 1}]


@pytest.mark.slow
def test_a_fit_takes_short_forms(manifests: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train = ["--data.init_args.train", str(manifests / "train.jsonl.gz"), "--data.validation", "null"]
    main(["fit", *SMOKE, *pretraining_options(manifests), TWO_ITERATIONS, "--output", str(folder), *train,
          "--steps", "2", "--iterations.2.max_steps", "1", "--lr", "1e-3"])  # fmt: skip
    assert [kept_metrics(folder / f"iteration{number}")["steps"] for number in (1, 2)] == [2, 1]
    settings = kept_config(folder / "iteration2")
    assert settings["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-3
    assert settings["data"]["init_args"]["validation"] is None
