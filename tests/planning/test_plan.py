"""`hubert plan`: what it reads of configs, and what its predictions must obey."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from helpers import refused
from lhotse import CutSet

from hubert_lightning.cli import main
from hubert_lightning.data.manifest import read_manifest, write_manifest
from hubert_lightning.errors import UserError
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.flops import encoder_operations
from hubert_lightning.packaged_configs import configs_folder, packaged
from hubert_lightning.planning.devices import DEVICES, H200
from hubert_lightning.planning.memory import GIB, step_memory
from hubert_lightning.planning.network import data_parallel_seconds, sharded_seconds
from hubert_lightning.planning.plan import Machine, TrainingPlan, plan_labels, plan_stage
from hubert_lightning.planning.settings import audio_hours, encoder_of, read_config, stages_of
from hubert_lightning.planning.steps import Batch, encoder_work, step_cost, step_work
from hubert_lightning.planning.workload import Workload
from hubert_lightning.training.hubert_cli import HubertCLI

FULL = sorted(
    str(path.relative_to(configs_folder()))
    for kind in ("pretrain", "finetune")
    for path in configs_folder().glob(f"{kind}/*.yaml")
    if {"model", "data", "trainer"} <= set(yaml.safe_load(path.read_text()))
)


def plans(config: str, gpus: int = 8, gpu: str = "H100-80GB") -> list[TrainingPlan]:
    content = read_config([packaged(config)])
    return [plan_stage(stage, Machine(DEVICES[gpu], gpus), audio_hours(content)) for stage in stages_of(content)]


@pytest.mark.parametrize("config", FULL)
def test_every_config_that_is_whole_can_be_planned(config: str) -> None:
    for plan in plans(config):
        assert plan.best is not None
        assert plan.best.audio_s_per_s > 0
        assert plan.best.share_of_matrix_rate < 0.9
        assert plan.best.gpu_hours == pytest.approx(plan.gpus * plan.best.hours, rel=0.02, abs=0.1)


def test_a_config_is_read_as_fit_reads_it() -> None:
    base, sizes = packaged("pretrain/base.yaml"), packaged("pretrain/size/large")
    first, second = stages_of(read_config([base]))
    assert (first.name, first.steps, first.workload.clusters) == ("iteration 1", 250_000, (100,))
    assert (second.steps, second.workload.clusters) == (400_000, (500,))
    assert (first.batch_seconds, first.accumulated, first.step_seconds) == (87.5, 4, 2800)
    assert first.labels is not None
    assert first.labels.encoder is None
    assert second.labels is not None
    assert (second.labels.encoder, second.labels.layer) == (EncoderConfig(), 6)
    assert stages_of(read_config([base, sizes]))[0].workload.encoder.num_layers == 24


def test_layers_teachers_residuals_and_labellings_are_planned(tmp_path: Path) -> None:
    content = yaml.safe_load(Path(packaged("pretrain/base.yaml")).read_text())
    content["iterations"] = [
        {"features": "mfcc", "clusters": 100, "max_steps": 100},
        {
            **{"features": ["previous", "facebook/hubert-large-ll60k", "mfcc"], "layer": [6, 9, None]},
            **{"clusters": 50, "residual": 2, "weights": "continued", "max_steps": 250, "relabel_every": 100},
        },
    ]
    content["model"]["init_args"]["intermediate_layers"] = [4]
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(content))
    stages = stages_of(read_config([path]))
    assert [stage.steps for stage in stages] == [100, 100, 100, 50]
    assert stages[0].workload.clusters == (100, 100)
    assert stages[1].workload.clusters == (50,) * 12
    labels = stages[3].labels
    assert labels is not None
    assert labels.clusters == (50,) * 6
    assert [(encoder and encoder.num_layers, layer) for encoder, layer in labels.teachers] == [
        (12, 6),
        (24, 9),
        (None, 0),
    ]
    one, three = (
        plan_labels(stage.labels, 8, Machine(H200, 8), 960) for stage in (stages[0], stages[1]) if stage.labels
    )
    assert three.hours > one.hours
    assert three.label_gb > 4 * one.label_gb


def test_keys_of_fit_and_several_configs_are_given_as_to_fit(tmp_path: Path) -> None:
    main(
        [
            *("plan", "--config", "pretrain/base.yaml", "--gpus", "4", "--config=pretrain/size/large.yaml"),
            *("--iterations", "[{features: mfcc, clusters: 50, max_steps: 7}]", "--data.init_args.max_duration=60"),
            *("--trainer.accumulate_grad_batches", "2", "--json", str(tmp_path / "plan.json")),
        ]
    )
    content = json.loads((tmp_path / "plan.json").read_text())
    [training] = content["trainings"]
    assert (content["gpus"], training["steps"], training["step_seconds"]) == (4, 7, 60 * 2 * 8)
    assert training["parameters"] > 3e8
    assert training["options"][0]["batch_seconds"] == 60


def test_a_step_that_is_too_small_for_many_gpus_is_planned_for_few(capsys: pytest.CaptureFixture[str]) -> None:
    [first, _] = plans("pretrain/small.yaml")
    assert first.gpus == 1
    assert first.best is not None
    assert (first.best.batch_seconds, first.best.accumulated, first.step_seconds) == (10, 1, 10)
    main(["plan", "pretrain/small.yaml", "--audio", "2"])
    printed = capsys.readouterr().out
    assert "--trainer.devices 1" in printed
    assert "8 GPUs are hardly faster" in printed
    assert [plan.gpus for plan in plans("pretrain/base.yaml")] == [8, 8]


def test_fine_tuning_has_the_size_of_the_recipe_whose_checkpoint_it_names() -> None:
    [stage] = stages_of(read_config([packaged("finetune/100h.yaml")]))
    assert stage.workload.encoder.dim == 768
    assert stage.workload.frozen_convolutions
    assert encoder_of(Path("checkpoints/xlarge/iteration1/last.ckpt")).num_layers == 48


def test_fine_tuning_has_the_size_that_the_run_of_its_checkpoint_states(tmp_path: Path) -> None:
    config = {"model": {"init_args": {"encoder": asdict(EncoderConfig(num_layers=5))}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert encoder_of(tmp_path / "last.ckpt").num_layers == 5


def test_more_gpus_take_less_time_for_the_same_steps() -> None:
    one, eight, many = (plans("pretrain/xlarge.yaml", gpus)[0] for gpus in (1, 8, 64))
    assert one.best is not None
    assert eight.best is not None
    assert many.best is not None
    assert one.best.hours > 6 * eight.best.hours > 18 * many.best.hours
    assert one.step_seconds == many.step_seconds == 5760
    assert (one.gpus, eight.gpus, many.gpus) == (1, 8, 32)  # 64 wait for the network
    for plan in (one, eight, many):
        audio = plan.options[0].batch_seconds * plan.options[0].accumulated
        assert audio * plan.gpus == pytest.approx(5760, rel=0.03)


def test_xlarge_is_sharded_where_a_gpu_is_too_small_for_it() -> None:
    large, small = plans("pretrain/xlarge.yaml")[0], plans("pretrain/xlarge.yaml", gpu="A10G")[0]
    assert large.best is not None
    assert small.best is not None
    assert large.best.strategy == "data parallel"
    assert small.best.strategy == "sharded"
    assert small.largest_batch_seconds == 0


def test_sharding_exchanges_more_than_data_parallel_training() -> None:
    [stage] = stages_of(read_config([packaged("pretrain/xlarge.yaml")]))
    whole = data_parallel_seconds(stage.workload, 8, H200.link)
    assert sharded_seconds(stage.workload, 8, H200.link) == pytest.approx(whole, rel=0.05)  # 2 + 2 + 4 for 2 · 4 bytes
    assert sharded_seconds(stage.workload, 8, H200.network) > 5 * sharded_seconds(stage.workload, 8, H200.link)


@pytest.mark.parametrize(
    "config",
    [
        EncoderConfig(),
        EncoderConfig(conv_norm="layer", pre_norm=True, dim=1024, num_heads=16),
        EncoderConfig(position_buckets=320),
    ],
)
def test_the_work_of_a_step_has_the_operations_that_are_counted_for_mfu(config: EncoderConfig) -> None:
    workload = Workload(config, clusters=())
    # torch computes attention's scores again in the backward pass
    again = config.num_layers * 2 * 624**2 * config.dim
    counted = encoder_operations(config, 200_000) + again
    total = 0.0
    for _, _, work in step_work(workload, Batch(1, 624)):
        total += max(getattr(work, "gradients", 0), 1) * work.operations
    assert total == pytest.approx(counted, rel=0.02)


def test_relative_positions_take_more_time_and_memory_the_longer_the_utterances() -> None:
    plain, gated = Workload(EncoderConfig()), Workload(EncoderConfig(position_buckets=320))
    extra = [
        step_cost(gated, batch, H200).seconds / step_cost(plain, batch, H200).seconds
        for batch in (Batch(20, 200), Batch(5, 800))
    ]
    assert 1 < extra[0] < extra[1]
    memory = [step_memory(gated, row_frames=frames).largest_batch(80 * GIB) for frames in (200, 800)]
    assert step_memory(plain).largest_batch(80 * GIB) > memory[0] > memory[1]


def test_fewer_layers_are_less_work() -> None:
    batch = Batch(7, 624)
    six, nine = (
        sum(work.seconds(H200) for _, work in encoder_work(EncoderConfig(), batch, layers)) for layers in (6, 9)
    )
    assert 1.2 * six < nine < 1.5 * six


def test_the_command_writes_all_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "pretrain/base.yaml", "--gpu", "h100", "--gpus", "16", "--json", str(tmp_path / "plan.json")])
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "plan.json").read_text())
    assert "iteration 2" in printed
    assert "--data.init_args.max_duration 175" in printed
    assert (content["gpu"], content["gpus"]) == ("H100-80GB", 16)
    assert content["hours_of_audio"] == pytest.approx(961.1)
    best = content["trainings"][1]["best"]
    assert (best["batch_seconds"], best["accumulated"]) == (175, 1)
    assert content["trainings"][0]["labelling"]["label_gb"] == pytest.approx(0.35, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pretrain/base.yaml", "--gpu", "TPU"], "GPU 'TPU' is not known; give one of H200"),
        (["pretrain/bsae.yaml"], "there is no such config; give a path, or one of this package: .*pretrain/base.yaml"),
        (["pretrain/size/large.yaml"], "has no data, as a config of `hubert fit` has; give the config that"),
        (["pretrain/base.yaml", "--gpus", "0"], "0 GPUs"),
        (["pretrain/base.yaml", "--trainer.device=2"], "no option trainer.device; did you mean trainer.devices?"),
        (["pretrain/base.yaml", "--data.max_duratoin", "3"], "did you mean data.init_args.max_duration?"),
        (["pretrain/base.yaml", "--model.init_args.lern=3"], "there is no option model.init_args.lern; .*--model.help"),
        (["pretrain/base.yaml", "--iterations", "[{feature: mfcc}]"], r"did you mean iterations\.1.features?"),
        (["pretrain/base.yaml", "--iterations"], "iterations: expects a value"),
        (["pretrain/base.yaml", "--data.init_args.max_duration.x=3"], "max_duration has a value, not keys below it"),
        (["pretrain/base.yaml", "--trainer.devices", "[2"], "is no YAML"),
        (["finetune/large/1h.yaml"], "has no model.class_path, .*; give the config that it is a layer over first"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["plan", *arguments])
    assert re.search(sentence, capsys.readouterr().err.replace("\n", " "))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ("null", "data.init_args is None; give names and values"),
        ("{max_duration: 0}", "max_duration is 0; a plan needs a number"),
        ("{max_duration: .nan}", "max_duration is nan; a plan needs a number"),
        ("{max_crop: long}", "max_crop is 'long'; a plan needs a number"),
    ],
)
def test_a_config_that_fit_refuses_is_answered_in_a_sentence(
    values: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = tmp_path / "layer.yaml"
    layer.write_text(f"data:\n  init_args: {values}\n")
    with pytest.raises(SystemExit):
        main(["plan", "pretrain/base.yaml", str(layer)])
    assert sentence in capsys.readouterr().err.replace("\n", " ")


def test_a_config_without_an_end_cannot_be_planned() -> None:
    config = read_config([packaged("finetune/100h.yaml")])
    del config["trainer"]["max_steps"]
    with pytest.raises(UserError, match="max_steps is -1; a plan needs the number of steps"):
        stages_of(config)


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        ("data: {init_args: {max_duration: 0}}", "data.init_args.max_duration is 0; a plan needs a number"),
        ("data: {init_args: {max_duration: .inf}}", "data.init_args.max_duration is inf; a plan needs a number"),
        ("data: {init_args: {max_duration: lots}}", "data.init_args.max_duration is 'lots'; a plan needs a number"),
        ("data: {init_args: {max_crop: 0.01}}", "data.init_args.max_crop is 0.01; a plan needs a number"),
        ("data: {init_args: {mask_prob: x}}", "data.init_args.mask_prob is 'x'"),
        ("data: {init_args: {num_workers: auto}}", "data.init_args.num_workers is 'auto'"),
        ("data: {init_args: [1]}", "data.init_args is .1.; give names and values"),
        ("trainer: {accumulate_grad_batches: two}", "trainer.accumulate_grad_batches is 'two'"),
        ("trainer: {devices: 2, num_nodes: two}", "trainer.num_nodes is 'two'"),
        ("iterations: 3", "iterations is 3; give a list"),
        ("iterations: [mfcc]", "iterations is .'mfcc'.; give a list"),
        ("iterations: [{clusters: 0}]", "iterations.1.clusters is 0; a plan needs a number, at least 1"),
        ("iterations: [{max_frames: lots}]", "iterations.1.max_frames is 'lots'"),
        (
            "iterations: [{relabel_every: 10, max_steps: 20}, {clusters: 0}]",
            "iterations.2.clusters is 0; a plan needs a number",
        ),
        ("iterations: [{}, {relabel_every: x}]", "iterations.2.relabel_every is 'x'"),
        ("iterations: [{features: previous, layer: 99}]", "layer is 99; the model has layers 1 to 12"),
        ("model: {init_args: {encoder: large}}", "model.init_args.encoder is 'large'; give names and values"),
        ("model: {init_args: {encoder: {dim: wide}}}", "model.init_args.encoder.dim is 'wide'"),
    ],
)
def test_odd_values_are_answered_in_a_sentence(layer: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text(layer)
    with pytest.raises(UserError, match=sentence):
        stages_of(read_config([packaged("pretrain/base.yaml"), tmp_path / "odd.yaml"]))


def test_listed_devices_are_counted_and_null_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "layer.yaml").write_text(
        "trainer: {devices: [0, 1]}\ndata: {init_args: {max_duration: null, train: null}}"
    )
    config = read_config([packaged("pretrain/base.yaml"), tmp_path / "layer.yaml"])
    assert stages_of(config)[0].step_seconds == 2 * 4 * 87.5
    assert audio_hours(config) is None
    assert audio_hours({"data": {"init_args": None}}) is None


@pytest.mark.parametrize("config", ["pretrain/small.yaml", "finetune/small.yaml", "finetune/100h.yaml"])
def test_the_config_that_a_run_writes_is_planned_as_the_one_it_was_started_with(config: str, tmp_path: Path) -> None:
    """A run states every option, most of them null, and classes with their arguments."""
    parsed = HubertCLI("fit", ["--config", str(packaged(config))])
    (tmp_path / "config.yaml").write_text(str(parsed.parser.dump(parsed.config, skip_none=False)))
    content = read_config([tmp_path / "config.yaml"])
    assert stages_of(content) == stages_of(read_config([packaged(config)]))
    assert audio_hours(content) == audio_hours(read_config([packaged(config)]))


@pytest.mark.parametrize(("name", "layers"), [("base-ls960", 12), ("large-ll60k", 24), ("xlarge-ls960-ft", 48)])
def test_a_published_model_has_the_size_of_its_recipe(name: str, layers: int) -> None:
    assert encoder_of(Path(f"facebook/hubert-{name}")).num_layers == layers
    with pytest.raises(UserError, match="so its size is unknown; plan with a model of the same size"):
        encoder_of(Path("nobody/hubert"))


def test_the_total_says_whether_it_includes_labels(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "finetune/own.yaml"])
    assert "labels" not in capsys.readouterr().out.lower()
    main(["plan", "pretrain/small.yaml"])
    assert "GPU-hours, labels not included." in capsys.readouterr().out
    main(["plan", "pretrain/small.yaml", "--audio", "2"])
    assert "GPU-hours, labels included." in capsys.readouterr().out


def test_no_word_of_the_table_is_cut_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for gpu, gpus in (("H100-80GB", "8"), ("A10G", "1")):
        main(["plan", "pretrain/xlarge.yaml", "--gpu", gpu, "--gpus", gpus])
        printed = capsys.readouterr().out
        assert "…" not in printed
        assert re.search("GPU-hours *\n", printed)


def test_the_plan_states_hours_and_shares_of_balanced_languages(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuts = list(read_manifest(manifests / "train.jsonl.gz"))
    for number, cut in enumerate(cuts):
        cut.supervisions[0].language = "sw" if number % 3 == 0 else "en"
    write_manifest(CutSet(cuts), tmp_path / "mixed.jsonl.gz")
    command = ["plan", "pretrain/small.yaml", "--data.init_args.train", f"[{tmp_path / 'mixed.jsonl.gz'}]"]
    main([*command, "--data.init_args.balance_languages", "0", "--json", str(tmp_path / "plan.json")])
    shares = json.loads((tmp_path / "plan.json").read_text())["shares"]["languages"]
    assert {name: part["share"] for name, part in shares.items()} == {"en": 0.5, "sw": 0.5}
    assert sum(part["hours"] for part in shares.values()) == pytest.approx(
        sum(cut.duration for cut in cuts) / 3600, abs=2e-3
    )
    assert "languages, with their shares of an epoch: en 0.0" in capsys.readouterr().out
    assert "balance_languages is 3; it is an exponent" in refused(
        capsys, *command, "--data.init_args.balance_languages", "3"
    )
