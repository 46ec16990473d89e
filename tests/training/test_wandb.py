"""What a run tells W&B, read back from the file that an offline run leaves."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import fork_server
import pytest
import soundfile
import wandb
import yaml
from helpers import ROOT
from wandb.proto import wandb_internal_pb2

from hubert_lightning.cli import main
from hubert_lightning.training.metrics_table import read_metrics


def records(path: Path, patience: float = 60) -> list[wandb_internal_pb2.Record]:  # type: ignore[name-defined]
    """The records of a finished run, whose last one W&B's service may write a moment after `finish` has returned."""
    end = time.monotonic() + patience
    while True:
        found = parsed(path)
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < end, f"{path}: no exit record after {patience} s"
        time.sleep(0.1)


def parsed(path: Path) -> list[wandb_internal_pb2.Record]:  # type: ignore[name-defined]
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB, fragments) behind seven bytes of W&B's."""
    content, place, found, parts = path.read_bytes(), 7, [], b""
    assert content.startswith(b":W&B")
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # too little for a header: padding
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])  # after a checksum of four bytes
        if place + 7 + length > len(content):  # W&B's service has not written all of it yet
            break
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def offline_run(folder: Path) -> list[wandb_internal_pb2.Record]:  # type: ignore[name-defined]
    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    return records(path)


def keys(found: list[wandb_internal_pb2.Record]) -> set[str]:  # type: ignore[name-defined]
    return {item.key or "/".join(item.nested_key) for record in found for item in record.history.item}


def run_of(found: list[wandb_internal_pb2.Record]) -> wandb_internal_pb2.RunRecord:  # type: ignore[name-defined]
    return next(record.run for record in found if record.WhichOneof("record_type") == "run")


def settings_of(found: list[wandb_internal_pb2.Record]) -> dict[str, Any]:  # type: ignore[name-defined]
    """The config of a run."""
    updates = [record.config.update for record in found if record.WhichOneof("record_type") == "config"]
    return {
        item.key: json.loads(item.value_json)
        for update in (run_of(found).config.update, *updates)
        for item in update
        if item.key != "_wandb"
    }


def history(found: list[wandb_internal_pb2.Record], name: str) -> list[tuple[int, float]]:  # type: ignore[name-defined]
    """Steps and values of a metric."""
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]
    return [(row["trainer/global_step"], row[name]) for row in rows if name in row]


def definitions(found: list[wandb_internal_pb2.Record]) -> dict[str, Any]:  # type: ignore[name-defined]
    """How W&B shows each metric."""
    metrics = [record.metric for record in found if record.WhichOneof("record_type") == "metric"]
    return {metric.name or metric.glob_name: metric for metric in metrics}


def alerts(found: list[wandb_internal_pb2.Record]) -> list[tuple[str, str]]:  # type: ignore[name-defined]
    """Titles and texts."""
    return [(record.alert.title, record.alert.text) for record in found if record.WhichOneof("record_type") == "alert"]


def artifacts(found: list[wandb_internal_pb2.Record]) -> dict[str, Path]:  # type: ignore[name-defined]
    """The copy of each artifact's only file, by type."""
    return {
        record.artifact.type: Path(record.artifact.manifest.contents[0].local_path)
        for record in found
        if record.WhichOneof("record_type") == "artifact"
    }


def layers(config: str, smoke: str) -> list[str]:
    return ["--config", str(ROOT / config), "--config", str(ROOT / "tests" / smoke)]


WANDB = (
    "--trainer.logger={class_path: lightning.pytorch.loggers.WandbLogger,"
    " init_args: {project: hubert_lightning, group: base, name: base}}"
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.slow
def test_each_iteration_is_a_run_of_the_recipes_group(manifests: Path, tmp_path: Path) -> None:
    main(
        [
            *("fit", *layers("configs/pretrain/base.yaml", "smoke.yaml"), f"--output={tmp_path}", WANDB),
            f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
            f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
            "--iterations=[{clusters: 20, max_frames: 2000, max_steps: 2},"
            "{features: previous, layer: 1, clusters: 20, max_frames: 2000, max_steps: 2}]",
        ]
    )
    for number in (1, 2):
        found = offline_run(tmp_path / f"iteration{number}")
        run = run_of(found)
        assert (run.project, run.run_group, run.display_name) == ("hubert_lightning", "base", f"base-iteration{number}")
        assert {"train/loss", "train/masked_accuracy", "train/gradient_norm", "val/masked_accuracy"} <= keys(found)
        assert {"speed/mfu", "units/predicted_coverage", "labels/kmeans_inertia", "labels/seconds"} <= keys(found)
        assert (run.job_type, list(run.tags)[:2]) == ("pretrain", ["pretrain", f"iteration {number}"])
        settings, folder = settings_of(found), tmp_path / f"iteration{number}"
        assert settings == json.loads((folder / "record.json").read_text())
        assert [name for name in settings if name.endswith("num_layers")] == ["encoder/num_layers"]
        assert (settings["encoder/num_layers"], settings["encoder/dim"], settings["iteration"]) == (2, 32, number)
        assert settings["labels/layer"] == (None if number == 1 else 1)
        shown = definitions(found)
        assert shown["val/masked_accuracy"].summary.max
        assert shown["val/loss"].summary.min
        assert {shown[name].step_metric for name in ("val/loss", "train/loss")} == {"trainer/global_step"}
        assert shown["labels/kmeans_inertia*"].step_metric == "labels/kmeans_round"
        kept = artifacts(found)
        assert kept["kmeans"].read_bytes() == (folder / "kmeans.safetensors").read_bytes()
        encoder = yaml.safe_load(kept["config"].read_text())["model"]["init_args"]["encoder"]
        assert (encoder["dim"], encoder["num_layers"]) == (32, 2)
        [(title, text)] = alerts(found)
        assert title == "run finished"
        assert "2 steps, val/masked_accuracy" in text
        shown = ("units/utterances/1", "units/audio/1", "units/phones_by_cluster", "layers/pnmi", "layers/best_pnmi")
        assert [name for name in shown if not any(key.startswith(name) for key in keys(found))] == []
        [media] = (tmp_path / f"iteration{number}").glob("wandb/offline-run-*/files/media")
        for file in ("images/units/utterances/1_*.png", "images/layers/pnmi_*.png", "audio/units/audio/1_*.wav"):
            assert len([*media.glob(file)]) == 1, file


def test_fine_tuning_shows_references_beside_hypotheses(manifests: Path, tmp_path: Path) -> None:
    main(
        [
            *("fit", *layers("configs/finetune/10h.yaml", "smoke-finetune.yaml"), f"--output={tmp_path}", WANDB),
            f"--data.init_args.train=[{manifests / 'finetune.jsonl.gz'}]",
            f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
        ]
    )
    found = offline_run(tmp_path)
    assert {"train/loss", "val/wer", "val/cer"} <= keys(found)
    assert any(key.startswith("val/transcripts") for key in keys(found))
    [media] = tmp_path.glob("wandb/offline-run-*/files/media")
    [path] = media.glob("table/val/transcripts_*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["id", "audio", "speaker", "seconds", "WER", "reference", "hypothesis", "errors"]
    assert {row[7] for row in table["data"]} == {"Html"}
    # W&B puts the media of a table into an artifact, and leaves names in its place
    [artifact] = [record.artifact for record in found if record.artifact.type == "run_table"]
    cells = [Path(entry.path) for entry in artifact.manifest.contents]
    assert 0 < len([cell for cell in cells if cell.suffix == ".wav"]) <= 4
    assert len([cell for cell in cells if cell.suffix == ".html"]) > 0
    [page] = media.glob("html/val/errors_*.html")
    assert page.read_text().count("<tr>") == len(table["data"]) + 1
    assert "<del" in page.read_text()
    [sound] = media.glob("audio/val/audio/1_*.wav")
    assert soundfile.info(sound).samplerate == 16_000


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_same_run(manifests: Path, tmp_path: Path) -> None:
    for steps in (2, 4):
        main(
            [
                *("fit", *layers("configs/pretrain/base.yaml", "smoke.yaml"), f"--output={tmp_path}", WANDB),
                f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
                f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
                f"--iterations=[{{clusters: 20, max_frames: 2000, max_steps: {steps}}}]",
            ]
        )
    before, after = (run_of(records(path)) for path in tmp_path.glob("iteration1/wandb/offline-run-*/run-*.wandb"))
    assert before.run_id == after.run_id


@pytest.mark.slow
def test_a_killed_run_logs_no_step_twice(manifests: Path, tmp_path: Path) -> None:
    folder = tmp_path / "iteration1"

    def fit(steps: int) -> None:
        main(
            [
                *("fit", *layers("configs/pretrain/base.yaml", "smoke.yaml"), f"--output={tmp_path}", WANDB),
                f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
                f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
                f"--iterations=[{{clusters: 20, max_frames: 2000, max_steps: {steps}}}]",
            ]
        )

    fit(2)
    checkpoint = (folder / "last.ckpt").read_bytes()
    fit(4)
    (folder / "last.ckpt").write_bytes(checkpoint)  # as if the fit had been killed after step 4, before it saved
    (folder / "previous.ckpt").unlink(missing_ok=True)
    (folder / "metrics.json").unlink()
    fit(6)
    starts = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    found = [records(path) for path in starts]
    assert len({run_of(start).run_id for start in found}) == 1
    for name in ("train/loss", "train/gradient_norm_head"):
        assert [step for start in found for step, _ in history(start, name)] == [0, 1, 2, 3, 4, 5]
    assert [step for start in found for step, _ in history(start, "val/loss")] == [1, 3, 5]
    assert [step for step, _ in read_metrics(folder)["train/loss"]] == [1, 2, 3, 4, 5, 6]


def test_a_test_is_a_run_of_its_own_in_the_fits_group(manifests: Path, tmp_path: Path) -> None:
    main(
        [
            *("fit", *layers("configs/finetune/10h.yaml", "smoke-finetune.yaml"), f"--output={tmp_path}", WANDB),
            f"--data.init_args.train=[{manifests / 'finetune.jsonl.gz'}]",
            f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
            f"--data.init_args.test=[{manifests / 'test.jsonl.gz'}]",
        ]
    )
    fit = run_of(offline_run(tmp_path))
    settings = settings_of(offline_run(tmp_path))
    assert settings["encoder/dim"] == 32
    assert settings["optimizer/class"] == "AdamW"
    assert (fit.job_type, list(fit.tags)) == ("finetune", ["finetune"])
    main(["test", "--config", str(tmp_path / "config.yaml"), f"--output={tmp_path}"])
    [test] = (run_of(records(path)) for path in (tmp_path / "test").rglob("run-*.wandb"))
    assert len([*tmp_path.rglob("run-*.wandb")]) == 2
    assert test.run_id != fit.run_id
    assert (test.run_group, test.job_type, test.display_name) == ("base", "test", "base-test-test")
    assert list(test.tags) == ["test"]


def test_without_an_account_the_way_out_is_named(
    manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for variable in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a key would be kept
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()  # it remembers the mode that another test has set
    train = f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]"
    more = [train, "--data.init_args.validation=null", WANDB, f"--output={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *layers("configs/demo.yaml", "smoke.yaml"), *more])
    assert stopped.value.code == 2
    assert "set WANDB_MODE=offline, or choose another trainer.logger" in capsys.readouterr().err


@pytest.mark.slow
def test_wandb_warns_of_nothing_that_the_user_did_not_do(
    manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_SILENT")
    output = tmp_path / "output.txt"
    data = [f"--data.init_args.{part}=[{manifests / 'dev.jsonl.gz'}]" for part in ("train", "validation", "test")]
    fit = ["fit", *layers("configs/finetune/10h.yaml", "smoke-finetune.yaml"), WANDB, *data]
    for command in (fit, ["test", "--config", str(tmp_path / "run/config.yaml")]):
        process = fork_server.start([*command, f"--output={tmp_path / 'run'}"], output)
        assert fork_server.ended(process) == 0, output.read_text()
    assert "wandb: " in output.read_text()
    assert "wandb: WARNING" not in output.read_text()
