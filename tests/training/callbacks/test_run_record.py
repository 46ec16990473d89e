"""Records are true: what loggers hold is what was built, and results say what made them."""

import csv
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT
from lhotse import CutSet

from hubert_lightning import __version__
from hubert_lightning.cli import main
from hubert_lightning.console import show_messages
from hubert_lightning.data.manifest import fingerprint, read_manifest, write_manifest
from hubert_lightning.pretrained.formats.own import read_checkpoint
from hubert_lightning.units.kmeans_file import load_kmeans
from hubert_lightning.units.label_store import LabelStore

PRETRAINING = [
    *("fit", "--config", str(ROOT / "configs/demo.yaml"), "--config", str(ROOT / "tests/smoke.yaml")),
    "--data.init_args.validation=null",
]
FINETUNING = [
    *("fit", "--config", str(ROOT / "configs/demo-finetune.yaml")),
    *("--config", str(ROOT / "tests/smoke-finetune.yaml")),
]
ITERATION = "{clusters: 20, max_frames: 2000, max_steps: 1}"


def record(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "hparams.yaml").read_text())


def pretrained(folder: Path, manifests: Path, *more: str, train: str = "train", iteration: str = ITERATION) -> Path:
    manifest = f"--data.init_args.train=[{manifests / f'{train}.jsonl.gz'}]"
    main([*PRETRAINING, manifest, f"--iterations=[{iteration}]", f"--output={folder}", *more])
    return folder / "iteration1"


@pytest.fixture(scope="module")
def pretraining(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp("pretraining"), manifests)


@pytest.fixture(scope="module")
def finetuning(pretraining: Path, manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned from an encoder whose size the config does not say, on one set, with another to test on."""
    folder = tmp_path_factory.mktemp("finetuning")
    main(
        [
            *FINETUNING,
            f"--model.init_args.pretrained={pretraining / 'last.ckpt'}",
            "--model.init_args.encoder={dim: 768, num_layers: 12}",
            "--data.init_args.mask_prob=0.4",
            f"--data.init_args.train=[{manifests / 'finetune.jsonl.gz'}]",
            f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
            f"--data.init_args.test=[{manifests / 'test.jsonl.gz'}]",
            f"--output={folder}",
        ]
    )
    shutil.copy(folder / "last.ckpt", folder / "average.ckpt")
    return folder


def test_the_record_of_a_fit_describes_the_settings_as_built(
    pretraining: Path, finetuning: Path, manifests: Path
) -> None:
    kept, built = record(finetuning), read_checkpoint(finetuning / "last.ckpt")
    sizes = {name.removeprefix("encoder/"): value for name, value in kept.items() if name.startswith("encoder/")}
    config = built["hyper_parameters"]["encoder"]
    assert sizes == {
        name: ", ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in config.items()
    }
    assert (sizes["dim"], sizes["num_layers"], sizes["conv_channels"]) == (32, 2, 16)
    assert kept["parameters"] == sum(value.numel() for value in built["state_dict"].values())
    assert kept["pretrained"] == str(pretraining / "last.ckpt")
    assert kept["vocabulary/tokens"] == ", ".join(built["hyper_parameters"]["vocabulary"]["tokens"])
    group = built["optimizer_states"][0]["param_groups"][0]
    assert (kept["optimizer/class"], kept["optimizer/lr"]) == ("AdamW", group["initial_lr"])
    assert (kept["optimizer/eps"], kept["optimizer/weight_decay"]) == (group["eps"], group["weight_decay"])
    assert kept["data/train/manifests"] == str(manifests / "finetune.jsonl.gz")
    assert kept["data/train/fingerprint"] == fingerprint(read_manifest(manifests / "finetune.jsonl.gz"))
    assert (kept["batch/seconds"], kept["batch/global_seconds"]) == (10.0, 10.0)
    assert (kept["trainer/max_steps"], kept["schedule/total_steps"]) == (2, 2)
    assert (kept["seed"], kept["precision"], kept["world_size"]) == (0, "32-true", 1)
    assert kept["masks/mask_prob"] == 0.4
    assert "Namespace" not in (finetuning / "hparams.yaml").read_text()
    assert json.loads((finetuning / "record.json").read_text()) == kept


def test_the_record_of_pretraining_says_what_its_labels_are(pretraining: Path) -> None:
    kept = json.loads((pretraining / "record.json").read_text())
    assert (kept["labels/features"], kept["labels/clusters"], kept["labels/layer"]) == ("mfcc", 20, None)
    store = LabelStore(pretraining / "labels")
    assert kept["labels/fingerprint"] == store.fingerprint
    assert kept["labels/kmeans_fingerprint"] == store.source.kmeans
    [centroids], _ = load_kmeans(pretraining / "kmeans.safetensors")
    assert 0 < kept["labels/kmeans_inertia"] < 39 * float(centroids.var(dim=0).sum())
    assert kept["data/train/hours"] > 0
    assert all(value is None or isinstance(value, (bool, int, float, str)) for value in kept.values())


@pytest.mark.parametrize(
    "change",
    [
        ["--seed_everything=1"],
        ["--model.init_args.optimizer.init_args.lr=0.001"],
        ["--data.init_args.mask_prob=0.5"],
        ["--trainer.accumulate_grad_batches=2"],
        ["train: dev"],
        ["iteration: {clusters: 10, max_frames: 2000, max_steps: 1}"],
        ["iteration: {clusters: 20, max_frames: 2000, max_steps: 2}"],
        ["--trainer.limit_train_batches=2"],
    ],
)
def test_two_runs_that_differ_have_records_that_differ(
    change: list[str], pretraining: Path, manifests: Path, tmp_path: Path
) -> None:
    named = dict(option.split(": ", 1) for option in change if not option.startswith("--"))
    options = [option for option in change if option.startswith("--")]
    other = pretrained(tmp_path, manifests, *options, **named)  # type: ignore[arg-type]
    [before, after] = (record(folder) | {"folder": ""} for folder in (pretraining, other))
    assert before != after


def test_two_equal_runs_have_equal_records(pretraining: Path, manifests: Path, tmp_path: Path) -> None:
    again = record(pretrained(tmp_path, manifests)) | {"folder": ""}
    assert again == record(pretraining) | {"folder": ""}


def test_a_test_leaves_the_logs_of_its_fit_alone(finetuning: Path, tmp_path: Path) -> None:
    shutil.copytree(finetuning, tmp_path / "run")
    logs = [tmp_path / "run" / name for name in ("hparams.yaml", "metrics.csv")]
    before = [path.read_bytes() for path in logs]
    for verb in ("validate", "test"):
        main([verb, "--config", str(tmp_path / "run/config.yaml"), f"--output={tmp_path / 'run'}"])
    assert [path.read_bytes() for path in logs] == before
    [own] = (tmp_path / "run/test").rglob("hparams.yaml")
    assert yaml.safe_load(own.read_text())["checkpoint"] == str(tmp_path / "run/best.ckpt")


@pytest.mark.slow
def test_results_state_their_origin_and_each_set_keeps_its_own(
    finetuning: Path, manifests: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finetuning, run)
    elsewhere = tmp_path / "elsewhere" / "test.jsonl.gz"  # another set of the same name
    write_manifest(CutSet(list(read_manifest(manifests / "dev.jsonl.gz"))[:2]), elsewhere)
    (tmp_path / "beam.json").write_text('{"beam_size": 5, "num_workers": 0}')
    tested: dict[str, dict[str, Any]] = {}
    for options in (
        [],
        [f"--data.init_args.test=[{manifests / 'dev.jsonl.gz'}]"],
        [f"--data.init_args.test=[{elsewhere}]"],
        [f"--model.init_args.decoder={tmp_path / 'beam.json'}"],
        [f"--ckpt_path={run / 'average.ckpt'}"],
        [f"--ckpt_path={run / 'last.ckpt'}"],
        ["--model.init_args.decoder={beam_size: 6, num_workers: 0}"],
    ):
        main(["test", "--config", str(run / "config.yaml"), f"--output={run}", *options])
        tested[" ".join(options)] = json.loads((run / "scores.json").read_text())
    kept = {path.parent.name: json.loads(path.read_text()) for path in (run / "test").glob("*/scores.json")}
    assert len(kept) == 7
    assert {"test", "dev", "test-beam", "test-average", "test-decoder"} < kept.keys()
    assert sorted(map(str, kept.values())) == sorted(map(str, tested.values()))
    for folder, scores in kept.items():
        made_by = scores["made_by"]
        rows = [json.loads(line) for line in (run / "test" / folder / "test.jsonl").open()]
        for name in ("checkpoint", "step", "weights", "manifest", "version"):
            assert {row[name] for row in rows} == {made_by[name]}
        assert made_by["version"] == __version__
        assert len(rows) == len(scores["utterances"]) == len(read_manifest(Path(made_by["manifest"])))
    search = kept["test-beam"]["made_by"]["decoder"]
    assert (search["file"], search["beam_size"]) == (str(tmp_path / "beam.json"), 5)
    assert kept["test"]["made_by"]["decoder"] == "greedy"
    assert kept["test-average"]["made_by"]["checkpoint"] == str(run / "average.ckpt")
    assert kept["test"]["made_by"]["step"] == 2
    main(["score", str(run / "test/dev/test.jsonl"), "--output", str(tmp_path / "again.json")])
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["made_by"]["manifest"] == kept["dev"]["made_by"]["manifest"]
    assert again["words"] == kept["dev"]["words"]


def test_no_step_is_lost_or_written_twice_by_a_test(finetuning: Path) -> None:
    with (finetuning / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")]
    assert steps == [0, 1]


def test_good_news_is_logged_once_as_information(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    pretrained(tmp_path, manifests)
    messages = capsys.readouterr().err
    for sentence in ("K-means: 20 clusters of", "labels of mfcc, 20 clusters: PNMI"):
        [level] = {record.levelno for record in caplog.records if record.getMessage().startswith(sentence)}
        assert level == logging.INFO
        assert messages.count(sentence) == 1
    for noise in ("weights_only", "Tip:", "litlogger"):  # which Lightning prints at each start
        assert noise not in messages
    show_messages(of_ranks=True)  # twice, and still each message comes once
    log = logging.getLogger("hubert_lightning.training.pretraining_data")
    log.warning("short utterances")
    monkeypatch.setenv("LOCAL_RANK", "1")
    log.warning("short utterances")
    assert capsys.readouterr().err == "short utterances\n"


@pytest.mark.slow
def test_a_test_of_some_batches_does_not_replace_a_whole_test(
    finetuning: Path, manifests: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finetuning, run)
    command = ["test", "--config", str(run / "config.yaml"), f"--output={run}", "--data.init_args.max_duration=3"]
    main(command)
    whole = [(run / name).read_bytes() for name in ("test.jsonl", "scores.json", "test-metrics.json")]
    main([*command, "--trainer.limit_test_batches=2"])  # of three
    assert [(run / name).read_bytes() for name in ("test.jsonl", "scores.json", "test-metrics.json")] == whole
    made_by = json.loads((run / "test/test-partial/scores.json").read_text())["made_by"]
    assert made_by["utterances"] != json.loads(whole[1])["made_by"]["utterances"]


def test_a_run_whose_folder_was_moved_is_found_by_its_config(finetuning: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finetuning, moved)
    before = (finetuning / "last.ckpt").read_bytes()
    shutil.rmtree(finetuning / "test", ignore_errors=True)
    main(["test", "--config", str(moved / "config.yaml")])
    assert (moved / "test/test/scores.json").exists()
    assert not (finetuning / "test").exists()
    main(["fit", "--config", str(moved / "config.yaml"), "--trainer.max_steps=3"])
    assert read_checkpoint(moved / "last.ckpt")["global_step"] == 3
    assert (finetuning / "last.ckpt").read_bytes() == before
