"""What a user types, from the first command to a word error rate, and what they see when something is wrong."""

import copy
import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fork_server
import pytest
import soundfile
import torch
import yaml
from helpers import (
    RECORDINGS,
    SMOKE,
    SMOKE_FINETUNE,
    TWO_ITERATIONS,
    needs_recordings,
    pretraining_options,
    refused,
    transcribed_options,
)
from lhotse import CutSet

from hubert_lightning.cli import main
from hubert_lightning.data.manifest import read_manifest, write_manifest
from hubert_lightning.units.kmeans_file import load_kmeans
from hubert_lightning.units.label_store import LabelStore


@pytest.fixture(scope="module")
def pretraining(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations by one command."""
    output = tmp_path_factory.mktemp("runs") / "pretraining"
    main(["fit", *SMOKE, *pretraining_options(manifests), TWO_ITERATIONS, f"--output={output}"])
    return output


@pytest.fixture(scope="module")
def finetuning(pretraining: Path, manifests: Path) -> Path:
    output = pretraining.parent / "finetuning"
    pretrained = pretraining / "iteration2" / "last.ckpt"
    more = [f"--model.init_args.pretrained={pretrained}", f"--output={output}"]
    main(["fit", *SMOKE_FINETUNE, *transcribed_options(manifests), *more])
    return output


def test_help_needs_no_heavy_package() -> None:
    code = (
        "import sys, hubert_lightning.cli\n"
        "try: hubert_lightning.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'lightning', 'lhotse', 'sklearn', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "hubert fit" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_one_command_walks_through_the_iterations(pretraining: Path) -> None:
    first, second = pretraining / "iteration1", pretraining / "iteration2"
    steps = [json.loads((folder / "metrics.json").read_text())["steps"] for folder in (first, second)]
    assert steps == [2, 3]
    assert LabelStore(first / "labels").source.features == "mfcc"
    source = LabelStore(second / "labels").source
    assert source.features.startswith("layer 1 of encoder ")
    assert source.clusters == (10,)
    assert [len(of) for of in load_kmeans(second / "kmeans.safetensors")[0]] == [10]
    codewords = torch.load(second / "last.ckpt", weights_only=True)["state_dict"]["predictors.0.codewords"]
    assert len(codewords) == 10


@pytest.mark.slow
def test_an_ensemble_goes_on_from_the_weights_before_with_its_best_layer(manifests: Path, tmp_path: Path) -> None:
    iterations = (
        "--iterations=[{clusters: [10, 20], max_frames: 2000, max_steps: 2},"
        "{features: previous, layer: best, clusters: 10, max_frames: 2000, weights: previous, max_steps: 1,"
        "kmeans: {class_path: hubert_lightning.KMeans, init_args: {restarts: 1, batch_frames: 500}}}]"
    )
    main(
        [
            "fit",
            *SMOKE,
            *pretraining_options(manifests),
            iterations,
            f"--output={tmp_path}",
            "--model.init_args.warmup_steps=0",
        ]
    )
    first, second = (torch.load(tmp_path / f"iteration{k}" / "last.ckpt", weights_only=True) for k in (1, 2))
    weight = "encoder.projection.weight"
    assert first["state_dict"]["predictors.1.codewords"].shape[0] == 20
    # One step of AdamW at a rate of 2e-3 moves a weight by no more
    assert (second["state_dict"][weight] - first["state_dict"][weight]).abs().max() < 3e-3
    assert json.loads((tmp_path / "iteration2" / "layers.json").read_text())["best_layer"] in (1, 2)
    assert LabelStore(tmp_path / "iteration1" / "labels").source.clusters == (10, 20)


@pytest.mark.slow
def test_each_iteration_warms_up_for_8_percent_of_its_own_steps(manifests: Path, tmp_path: Path) -> None:
    few, many = (f"{{clusters: 20, max_frames: 2000, max_steps: {steps}}}" for steps in (13, 25))
    options = [
        "--model.init_args.warmup_steps=null",
        "--data.init_args.max_duration=5",
        "--trainer.limit_val_batches=0",
    ]
    main(
        [
            "fit",
            *SMOKE,
            *pretraining_options(manifests),
            f"--iterations=[{few}, {many}]",
            *options,
            f"--output={tmp_path}",
        ]
    )
    for number, warmup, steps in ((1, 1, 13), (2, 2, 25)):
        with (tmp_path / f"iteration{number}" / "metrics.csv").open() as file:
            logged = [row["train/learning_rate"] for row in csv.DictReader(file)]
        rates = [float(rate) for rate in logged if rate]
        expected = [step / warmup if step < warmup else (steps - step) / (steps - warmup) for step in range(steps)]
        assert rates == pytest.approx([2e-3 * rate for rate in expected])


@pytest.mark.slow
def test_a_run_from_before_there_was_a_share_goes_on_with_its_number_of_steps(manifests: Path, tmp_path: Path) -> None:
    def command(steps: int) -> list[str]:
        labels = f"--iterations=[{{clusters: 20, max_frames: 2000, max_steps: {steps}}}]"
        return ["fit", *SMOKE, *pretraining_options(manifests), labels, f"--output={tmp_path}"]

    main(command(2))
    kept = tmp_path / "iteration1" / "config.yaml"
    config = yaml.safe_load(kept.read_text())
    assert config["model"]["init_args"].pop("warmup") == 0.08
    kept.write_text(yaml.safe_dump(config))
    main(command(3))
    assert json.loads((tmp_path / "iteration1" / "metrics.json").read_text())["steps"] == 3


def test_an_iterations_config_would_run_it_alone(pretraining: Path, manifests: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((pretraining / "iteration2" / "config.yaml").read_text())
    assert config["iterations"] == []
    assert config["model"]["init_args"]["num_clusters"] == 10
    main(["fit", "--config", str(pretraining / "iteration2" / "config.yaml"), f"--output={tmp_path}"])
    here = LabelStore(tmp_path / "labels").source
    assert here == LabelStore(pretraining / "iteration2" / "labels").source


def test_finished_iterations_are_not_trained_again(
    pretraining: Path, manifests: Path, capsys: pytest.CaptureFixture
) -> None:
    before = (pretraining / "iteration1" / "last.ckpt").stat().st_mtime_ns
    main(["fit", *SMOKE, *pretraining_options(manifests), TWO_ITERATIONS, f"--output={pretraining}"])
    assert "finished already" in capsys.readouterr().out
    assert (pretraining / "iteration1" / "last.ckpt").stat().st_mtime_ns == before


def test_a_damaged_shard_of_a_finished_run_is_made_again_as_the_sentence_says(
    pretraining: Path, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "iteration1"
    shutil.copytree(pretraining / "iteration1", run)
    shard = run / "labels" / "00000.npy"
    before = shard.read_bytes()
    shard.write_bytes(before[:-2] + b"\xff\xff")
    said = refused(capsys, "labels", "check", str(run / "labels"))
    assert f"{run / 'metrics.json'}" in said
    assert f"`hubert fit --config {run / 'config.yaml'}` makes only that shard again" in said
    shard.unlink()
    (run / "metrics.json").unlink()
    main(["fit", "--config", str(run / "config.yaml"), f"--output={run}"])
    assert shard.read_bytes() == before


@pytest.mark.slow
def test_an_interrupted_walk_goes_on_where_it_stopped(pretraining: Path, manifests: Path, tmp_path: Path) -> None:
    shutil.copytree(pretraining, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "iteration2")
    first = tmp_path / "run" / "iteration1"
    before = (first / "last.ckpt").stat().st_mtime_ns
    main(["fit", *SMOKE, *pretraining_options(manifests), TWO_ITERATIONS, f"--output={tmp_path / 'run'}"])
    assert (first / "last.ckpt").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "run" / "iteration2" / "metrics.json").read_text())["steps"] == 3


def test_validate_repeats_the_last_validation(pretraining: Path, capsys: pytest.CaptureFixture) -> None:
    folder = pretraining / "iteration1"
    main(["validate", "--config", str(folder / "config.yaml")])
    printed = capsys.readouterr().out
    expected = json.loads((folder / "metrics.json").read_text())["val/masked_loss"]
    assert "val/masked_loss" in printed
    assert f"{expected:.6g}" in printed
    assert "DataLoader" not in printed


def test_fine_tuning_keeps_the_best_and_the_last(finetuning: Path) -> None:
    assert (finetuning / "best.ckpt").exists()
    assert (finetuning / "last.ckpt").exists()


def test_test_prints_error_rates_and_writes_hypotheses(
    finetuning: Path, manifests: Path, capsys: pytest.CaptureFixture
) -> None:
    other_steps = "--trainer.accumulate_grad_batches=3"  # than it was trained with, which is no matter here
    main(["test", "--config", str(finetuning / "config.yaml"), other_steps])
    printed = capsys.readouterr().out
    assert "WER" in printed
    assert "CER" in printed
    assert "DataLoader" not in printed
    rows = [json.loads(line) for line in (finetuning / "test.jsonl").open()]
    cuts = {cut.id: cut for cut in read_manifest(manifests / "test.jsonl.gz")}
    assert {row["id"] for row in rows} == set(cuts)
    assert all(row["reference"] == cuts[row["id"]].supervisions[0].text for row in rows)
    assert "test/wer" in json.loads((finetuning / "test-metrics.json").read_text())


def test_predict_writes_hypotheses_without_references(finetuning: Path) -> None:
    main(["predict", "--config", str(finetuning / "config.yaml")])
    rows = [json.loads(line) for line in (finetuning / "predict.jsonl").open()]
    assert rows
    made_by = {"checkpoint", "step", "weights", "manifest", "decoder", "version"}
    assert all(row.keys() == {"id", "hypothesis"} | made_by for row in rows)


def test_a_fine_tuned_model_moves_without_what_it_was_made_from(finetuning: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((finetuning / "config.yaml").read_text())
    config["model"]["init_args"]["pretrained"] = str(tmp_path / "gone.ckpt")
    config["output"] = str(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(finetuning / "best.ckpt", tmp_path)
    main(["test", "--config", str(tmp_path / "config.yaml")])
    assert (tmp_path / "test.jsonl").read_text() != ""


def test_a_run_that_is_given_more_steps_goes_on(finetuning: Path, manifests: Path, tmp_path: Path) -> None:
    shutil.copytree(finetuning, tmp_path / "run")
    pretrained = finetuning.parent / "pretraining" / "iteration2" / "last.ckpt"
    more = [f"--model.init_args.pretrained={pretrained}", f"--output={tmp_path / 'run'}", "--trainer.max_steps=5"]
    main(["fit", *SMOKE_FINETUNE, *transcribed_options(manifests), *more, "--trainer.logger.init_args.version=resumed"])
    with (tmp_path / "run" / "resumed" / "metrics.csv").open() as log:
        losses = [row["train/loss"] for row in csv.DictReader(log) if row["train/loss"]]
    assert len(losses) == 3  # the first two steps are not taken again
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["ckpt_path"] is None  # tests take the best
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 5
    kept = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 5
    assert kept["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] == 5  # not 2 + 5


@pytest.mark.slow
def test_a_killed_run_leaves_the_state_to_resume_from(manifests: Path, tmp_path: Path) -> None:
    command = [
        "fit",
        *SMOKE,
        *pretraining_options(manifests),
        f"--output={tmp_path}",
        "--checkpoint.every_n_train_steps=1",
    ]
    iterations = "--iterations=[{features: mfcc, clusters: 20, max_frames: 2000, max_steps: 100000}]"
    process = subprocess.Popen([sys.executable, "-m", "hubert_lightning", *command, iterations])
    newest = tmp_path / "iteration1" / "last.ckpt"
    try:
        while process.poll() is None and not newest.exists():
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    steps = torch.load(newest, weights_only=True)["global_step"]
    assert steps > 0
    shorter = iterations.replace("100000", str(steps + 2))
    main([*command, shorter])
    assert json.loads((newest.parent / "metrics.json").read_text())["steps"] == steps + 2


# `hubert fit` with shards of two utterances, each written after a moment
SLOW_SHARDS = """
import time
from hubert_lightning.units import label_writer
from hubert_lightning.cli import main
write_shard = label_writer.write_shard
def write_slowly(folder, shard, clusters):
    write_shard(folder, shard, clusters)
    time.sleep(1)
label_writer.shard_size, label_writer.write_shard = lambda cuts: 2, write_slowly
main()
"""


@pytest.mark.slow
def test_labels_whose_making_was_killed_end_as_the_same_bytes(
    manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["fit", *SMOKE, *pretraining_options(manifests)]
    killed, whole = (tmp_path / name for name in ("killed", "whole"))
    labels = killed / "iteration1" / "labels"
    process = subprocess.Popen([sys.executable, "-c", SLOW_SHARDS, *command, f"--output={killed}"])
    try:
        while process.poll() is None and not (labels / "00001.index.npy").exists():
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert not (labels / "store.json").exists()
    kept = (labels / "00000.npy").stat().st_mtime_ns
    monkeypatch.setattr("hubert_lightning.units.label_writer.shard_size", lambda cuts: 2)
    for output in (killed, whole):
        main([*command, f"--output={output}"])
    assert (labels / "00000.npy").stat().st_mtime_ns == kept
    files = {path.name: path.read_bytes() for path in labels.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (whole / "iteration1" / "labels").iterdir()}


@pytest.mark.slow
@needs_recordings
def test_real_recordings_go_the_same_way(tmp_path: Path) -> None:
    main(["prepare", "librispeech", str(RECORDINGS / "digits"), str(tmp_path / "manifests")])
    main(["prepare", "librilight", str(RECORDINGS / "digits"), str(tmp_path / "manifests")])
    train, dev = tmp_path / "manifests/10min.jsonl.gz", tmp_path / "manifests/dev-other.jsonl.gz"
    output = tmp_path / "run"
    data = [f"--data.init_args.train=[{train}]", f"--data.init_args.validation=[{dev}]"]
    main(["fit", *SMOKE, *data, "--data.init_args.min_duration=1", f"--output={output}"])
    assert (output / "iteration1" / "last.ckpt").exists()


def test_prepare_folder_takes_what_it_can(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    audio = tmp_path / "talks"
    audio.mkdir()
    soundfile.write(audio / "good.wav", torch.randn(48_000, 2).numpy() / 10, 48_000)
    (audio / "broken.flac").write_bytes(b"this is no audio")
    main(["prepare", "folder", str(audio), str(tmp_path / "manifests")])
    [cut] = read_manifest(tmp_path / "manifests" / "talks.jsonl.gz")
    assert cut.num_samples == 16_000
    assert "broken.flac" in capsys.readouterr().out


# Bad input: one sentence that names the thing, the fact and the way out, and nothing is lost.


def test_an_unknown_verb(capsys: pytest.CaptureFixture) -> None:
    sentence = refused(capsys, "trian")
    assert (
        "'trian' is not a verb of hubert; did you mean pretrain? the verbs are prepare, phones, vocabulary, demo"
        in sentence
    )


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("--data.init_args.max_durashun=3", "data: there is no option max_durashun; did you mean max_duration?"),
        ("--model.init_args.encoder.dimm=3", "model: there is no option encoder.dimm; did you mean encoder.dim?"),
        ("--trainer.max_stepss=3", "there is no option trainer.max_stepss; did you mean trainer.max_steps?"),
        ("trainer.max_steps=3", "trainer.max_steps is given without --; write --trainer.max_steps"),
        ("--config", "hubert: config: expects a value; `hubert fit --help` lists the options"),
        ("--output", "hubert: output: expects a value; `hubert fit --help` lists the options"),
        ("--stalls.stall=3", "there is no option stalls.stall; did you mean stalls.timeout?"),
        ("--max_epochs=3", "there is no option max_epochs; the key is trainer.max_epochs"),
        ("--data.weight=[3]", "data: there is no option weight; did you mean weights?"),
        ("--trainer.barebones=true", "trainer.barebones is true"),
        ("--iterations=[{clustrs: 3}]", "iterations: there is no option clustrs; did you mean clusters?"),
        ("--data.init_args.max_duration=long", "data.max_duration long: not a number, nor auto; `hubert fit"),
        ("--model=HubertPretrain", "model: HubertPretrain is not a class; give one, such as hubert_lightning"),
        ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val is -1"),
        ("--trainer.gradient_clip_algorithm=bogus", "trainer.gradient_clip_algorithm is bogus; choose norm or value"),
        ("--data.init_args.weights=[.inf]", "data.init_args.weights[0] is inf; give a finite number"),
        ("--config=/no/such.yaml", "/no/such.yaml: there is no such config; correct the path; `hubert configs` lists"),
    ],
)
def test_a_mistake_in_a_config_is_one_sentence(
    typed: str, sentence: str, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    error = refused(capsys, "fit", *SMOKE, *pretraining_options(manifests), f"--output={tmp_path}", typed)
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["data.init_args.train", "data.init_args.validation"])
def test_a_missing_manifest(key: str, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    error = refused(
        capsys, "fit", *SMOKE, *pretraining_options(manifests), f"--{key}=[/no/such.jsonl.gz]", f"--output={tmp_path}"
    )
    assert error == "hubert: /no/such.jsonl.gz: no such manifest; make it with `hubert prepare`\n"


def test_a_missing_pre_trained_model(manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    more = ["--model.init_args.pretrained=/no/model.ckpt", f"--output={tmp_path}"]
    error = refused(capsys, "fit", *SMOKE_FINETUNE, *transcribed_options(manifests), *more)
    assert error.startswith("hubert: /no/model.ckpt does not exist; give a .ckpt of `hubert fit`")


def test_a_checkpoint_of_the_wrong_kind(
    pretraining: Path, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    wrong = pretraining / "iteration1" / "last.ckpt"
    error = refused(
        capsys, "fit", *SMOKE_FINETUNE, *transcribed_options(manifests), f"--ckpt_path={wrong}", f"--output={tmp_path}"
    )
    assert "last.ckpt: a checkpoint of" in error
    assert "HubertPretraining, not of" in error
    assert "model.init_args.pretrained" in error


def test_a_checkpoint_that_is_none(
    pretraining: Path, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    wrong = pretraining / "iteration1" / "kmeans.safetensors"
    more = [f"--model.init_args.pretrained={wrong}", f"--output={tmp_path}"]
    error = refused(capsys, "fit", *SMOKE_FINETUNE, *transcribed_options(manifests), *more)
    assert "kmeans.safetensors holds no HuBERT; give a .ckpt" in error


def test_a_checkpoint_that_is_damaged_or_none_cannot_be_resumed_from(
    finetuning: Path, pretraining: Path, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "cut.ckpt").write_bytes((finetuning / "last.ckpt").read_bytes()[:5000])
    more = [*SMOKE_FINETUNE, *transcribed_options(manifests), f"--output={tmp_path / 'run'}"]
    assert "cut.ckpt is corrupt" in refused(capsys, "fit", *more, f"--ckpt_path={tmp_path / 'cut.ckpt'}")
    wrong = pretraining / "iteration1" / "kmeans.safetensors"
    assert "kmeans.safetensors is corrupt, or no file of torch.save" in refused(
        capsys, "fit", *more, f"--ckpt_path={wrong}"
    )
    assert "gone.ckpt: no such checkpoint" in refused(capsys, "fit", *more, f"--ckpt_path={tmp_path / 'gone.ckpt'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("--ckpt_path={run}/iteration1/last.ckpt", "would start every iteration"),
        ("--data.init_args.labels={run}/iteration1/labels", "and iterations, which make their own labels, are both"),
        ("--data.init_args.max_duration=-3", "data.max_duration is -3.0 s, too short for two frames"),
        ("--data.init_args.max_crop=0.01", "data.max_crop is 0.01 s, too short for two frames"),
        ("--data.init_args.mask_length=0", "mask_prob 0.8 and mask_length 0"),
        ("--output=/proc/nowhere", "/proc/nowhere: cannot be created or written to"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_made(
    typed: str, sentence: str, pretraining: Path, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    typed = typed.format(run=pretraining)
    more = [f"--output={tmp_path / 'run'}", typed]
    assert sentence in refused(capsys, "fit", *SMOKE, *pretraining_options(manifests), *more)
    assert not list((tmp_path / "run").glob("*/*"))


def test_more_steps_for_an_iteration_that_another_was_built_on(
    pretraining: Path, manifests: Path, capsys: pytest.CaptureFixture
) -> None:
    before = sorted(pretraining.rglob("*"))
    longer = TWO_ITERATIONS.replace("max_steps: 2", "max_steps: 4")
    error = refused(capsys, "fit", *SMOKE, *pretraining_options(manifests), longer, f"--output={pretraining}")
    assert "with more steps, its labels would no longer be those of" in error
    assert sorted(pretraining.rglob("*")) == before


def test_prepare_looks_where_it_will_write_first(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    soundfile.write(tmp_path / "a.wav", torch.randn(16000).numpy() / 10, 16000)
    (tmp_path / "taken").write_text("mine")
    error = refused(capsys, "prepare", "folder", str(tmp_path), str(tmp_path / "taken"))
    assert "taken: no folder can be made there" in error
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_that_holds_another_run(pretraining: Path, manifests: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(pretraining.rglob("*"))
    error = refused(
        capsys,
        *("fit", *SMOKE, *pretraining_options(manifests), TWO_ITERATIONS, f"--output={pretraining}"),
        "--model.init_args.temperature=0.2",
    )
    assert "already holds another run, which differs in model.init_args.temperature (0.1 there, 0.2 here)" in error
    assert sorted(pretraining.rglob("*")) == before


def test_a_folder_that_holds_the_other_kind_of_run(
    pretraining: Path, finetuning: Path, manifests: Path, capsys: pytest.CaptureFixture
) -> None:
    before = sorted([*pretraining.rglob("*"), *finetuning.rglob("*")])
    error = refused(capsys, "fit", *SMOKE_FINETUNE, *transcribed_options(manifests), f"--output={pretraining}")
    assert f"{pretraining}: already holds another run" in error
    error = refused(capsys, "fit", *SMOKE, *pretraining_options(manifests), TWO_ITERATIONS, f"--output={finetuning}")
    assert f"{finetuning}: already holds another run" in error
    assert sorted([*pretraining.rglob("*"), *finetuning.rglob("*")]) == before


def test_a_fit_without_an_end(manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    error = refused(capsys, "fit", *SMOKE, *pretraining_options(manifests), "--iterations=[]", f"--output={tmp_path}")
    assert "this fit has no end; set trainer.max_steps" in error


def test_an_output_that_is_a_file(manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "notes").write_text("mine")
    error = refused(capsys, "fit", *SMOKE, *pretraining_options(manifests), f"--output={tmp_path / 'notes'}")
    assert "notes: a file, not a folder; choose another --output" in error


def test_a_pre_training_has_no_error_rates_to_test(pretraining: Path, capsys: pytest.CaptureFixture) -> None:
    error = refused(capsys, "test", "--config", str(pretraining / "iteration1" / "config.yaml"))
    assert "HubertPretraining has no error rates to test; use `hubert validate`" in error


def test_a_label_store_cut_short_is_named_and_kept(
    pretraining: Path, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    labels = tmp_path / "labels"
    shutil.copytree(pretraining / "iteration1" / "labels", labels)
    shard = labels / "00000.npy"
    shard.write_bytes(shard.read_bytes()[:-10])
    more = [
        f"--data.init_args.labels={labels}",
        "--iterations=[]",
        "--trainer.max_steps=2",
        f"--output={tmp_path / 'run'}",
    ]
    error = refused(capsys, "fit", *SMOKE, *pretraining_options(manifests), *more)
    assert "00000.npy: cut short or missing" in error


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("--model.init_args.num_clusters=30", "labels of 20 clusters for a model of 30"),
        ("--data.init_args.train=[{test}]", "no labels in {labels}, which was made for another manifest"),
    ],
)
def test_labels_that_do_not_fit(
    change: str, sentence: str, pretraining: Path, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    places = {"test": manifests / "test.jsonl.gz", "labels": pretraining / "iteration1" / "labels"}
    more = ["--model.init_args.num_clusters=20", f"--data.init_args.labels={places['labels']}", "--iterations=[]"]
    error = refused(
        capsys,
        *("fit", *SMOKE, *pretraining_options(manifests), *more, f"--output={tmp_path}", change.format(**places)),
        "--trainer.max_steps=2",
    )
    assert sentence.format(**places) in error
    assert not list(tmp_path.rglob("*.ckpt"))


def test_audio_that_is_gone(manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    soundfile.write(tmp_path / "a.wav", torch.randn(48_000).numpy() / 10, 16_000)
    (tmp_path / "audio").mkdir()
    (tmp_path / "a.wav").rename(tmp_path / "audio" / "a.wav")
    main(["prepare", "folder", str(tmp_path / "audio"), str(tmp_path)])
    (tmp_path / "audio" / "a.wav").unlink()
    error = refused(
        capsys, "fit", *SMOKE, *pretraining_options(manifests),
        f"--data.init_args.train=[{tmp_path / 'audio.jsonl.gz'}]", f"--output={tmp_path / 'run'}",
    )  # fmt: skip
    assert "a.wav" in error
    assert "restore" in error


def test_an_iteration_with_nothing_before_it(manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    error = refused(
        capsys,
        *("fit", *SMOKE, *pretraining_options(manifests), f"--output={tmp_path}"),
        "--iterations=[{features: previous, layer: 1}]",
    )
    assert "iterations.1.features is 'previous', but no iteration precedes it" in error


@pytest.mark.parametrize(
    ("iteration", "sentence"),
    [
        ("{features: previous}", "iterations.2: features 'previous' with layer None: MFCCs have no layers"),
        ("{features: previous, layer: 3}", "iterations.2: previous has layers 1 to 2, not layer 3; name one of those"),
        ("{features: no.ckpt, layer: 1}", "iterations.2: no.ckpt does not exist"),
        (
            "{features: pyproject.toml, layer: 1}",
            "iterations.2: pyproject.toml is corrupt, or no file of torch.save",
        ),
        ("{clusters: 100000}", "iterations.2: clusters [100000]: each K-means has from 2 to 65536"),
        ("{max_steps: 0}", "iterations.2.max_steps is 0"),
        ("{clusters: []}", "iterations.2: clusters []: each K-means has"),
        (
            "{features: previous, layer: 1, parts: [delta]}",
            "parts delta of previous: only MFCCs have parts",
        ),
        ("{weights: no.ckpt}", "iterations.2.weights: no.ckpt does not exist"),
    ],
)
def test_a_mistake_in_the_second_iteration_is_found_before_the_first(
    iteration: str, sentence: str, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    iterations = f"--iterations=[{{clusters: 20, max_steps: 2}},{iteration}]"
    assert sentence in refused(
        capsys, "fit", *SMOKE, *pretraining_options(manifests), iterations, f"--output={tmp_path / 'run'}"
    )
    assert not (tmp_path / "run").exists()


def test_steps_that_iterations_would_overrule_are_refused(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    error = refused(
        capsys, "fit", *SMOKE, *pretraining_options(manifests), f"--output={tmp_path}", "--trainer.max_steps=9"
    )
    assert "trainer.max_steps is 9, but each entry of iterations has its own" in error


def test_labels_of_trained_checkpoints_are_never_replaced(
    pretraining: Path, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(pretraining, tmp_path / "run")
    (tmp_path / "run" / "iteration2" / "metrics.json").unlink()
    before = (tmp_path / "run" / "iteration2" / "kmeans.safetensors").read_bytes()
    other = TWO_ITERATIONS.replace("layer: 1", "layer: 2")
    error = refused(capsys, "fit", *SMOKE, *pretraining_options(manifests), other, f"--output={tmp_path / 'run'}")
    assert "iteration2: already holds another run, which differs in labels." in error
    assert (tmp_path / "run" / "iteration2" / "kmeans.safetensors").read_bytes() == before


def test_validating_a_walk_asks_which_iteration(
    pretraining: Path, manifests: Path, capsys: pytest.CaptureFixture
) -> None:
    error = refused(capsys, "validate", *SMOKE, *pretraining_options(manifests), f"--output={pretraining}")
    assert "holds several iterations; choose one by its config" in error


def test_testing_a_run_that_was_never_fitted(manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    error = refused(capsys, "test", *SMOKE_FINETUNE, *transcribed_options(manifests), f"--output={tmp_path}")
    assert "holds no best.ckpt or last.ckpt; fit first" in error


def test_the_best_of_layers_without_phones_is_refused_before_anything_is_trained(
    manifests: Path, dev_cuts: CutSet, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_manifest([cut.drop_alignments() for cut in dev_cuts], tmp_path / "dev.jsonl.gz")
    said = refused(
        capsys,
        *("fit", *SMOKE, f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]"),
        f"--data.init_args.validation=[{tmp_path / 'dev.jsonl.gz'}]",
        f"--output={tmp_path / 'run'}",
        "--iterations=[{clusters: 20, max_steps: 2}, {features: previous, layer: best, clusters: 20, max_steps: 2}]",
    )
    assert "layer: best compares clusters with phones, but no utterance to validate on has any" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_a_process_that_reads_audio_says_is_one_sentence(
    pretraining: Path, manifests: Path, train_cuts: CutSet, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cut, *others = copy.deepcopy(list(train_cuts))
    [source] = cut.recording.sources
    (tmp_path / "damaged.flac").write_bytes(Path(source.source).read_bytes()[:2000])
    cut.recording.sources = [dataclasses.replace(source, source=str(tmp_path / "damaged.flac"))]
    write_manifest([cut, *others], tmp_path / "train.jsonl.gz")
    said = refused(
        capsys,
        *("fit", *SMOKE, f"--data.init_args.train=[{tmp_path / 'train.jsonl.gz'}]", "--iterations=[]"),
        *("--data.init_args.validation=null", f"--data.init_args.labels={pretraining / 'iteration1' / 'labels'}"),
        *("--model.init_args.num_clusters=20", "--trainer.max_steps=50", "--trainer.limit_val_batches=0"),
        *("--trainer.val_check_interval=null", "--data.init_args.num_workers=1", f"--output={tmp_path / 'run'}"),
    )
    assert said.startswith(f"hubert: {cut.id}: ")
    assert "Traceback" not in said


def test_a_checkpoint_of_a_model_of_another_size(
    pretraining: Path, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first = pretraining / "iteration1"
    alone = ["--config", str(first / "config.yaml"), f"--output={tmp_path / 'run'}", "--trainer.max_steps=3"]
    wider = "--model.init_args.encoder.ffn_dim=48"
    error = refused(capsys, "fit", *alone, wider, f"--ckpt_path={first / 'last.ckpt'}")
    assert "its encoder.layers.0.ffn_input.weight is (64, 32), in the model to train it is (48, 32)" in error
    assert "model.init_args.pretrained" in error


@pytest.mark.slow
def test_the_last_checkpoint_is_asked_for_by_name_too(pretraining: Path, manifests: Path, tmp_path: Path) -> None:
    shutil.copytree(pretraining / "iteration1", tmp_path / "run")
    alone = ["--config", str(tmp_path / "run" / "config.yaml"), f"--output={tmp_path / 'run'}"]
    main(["fit", *alone, "--trainer.max_steps=3", "--ckpt_path=last"])
    kept = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert kept["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] == 3  # not 3 anew


def test_an_optimizer_that_cannot_be_made(manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    both = "--model.init_args.optimizer={class_path: torch.optim.AdamW, init_args: {fused: true, foreach: true}}"
    error = refused(capsys, "fit", *SMOKE, *pretraining_options(manifests), f"--output={tmp_path}", both)
    assert "the optimizer cannot be made (`fused` and `foreach` cannot be `True` together" in error


def test_a_run_that_is_given_more_steps_takes_the_rates_of_the_longer_schedule(
    pretraining: Path, manifests: Path, tmp_path: Path
) -> None:
    shutil.copytree(pretraining / "iteration1", tmp_path / "run")
    alone = ["--config", str(tmp_path / "run" / "config.yaml"), f"--output={tmp_path / 'run'}"]
    main(["fit", *alone, "--trainer.max_steps=6", "--trainer.logger.init_args.version=longer"])
    with (tmp_path / "run" / "longer" / "metrics.csv").open() as log:
        rates = [float(row["train/learning_rate"]) for row in csv.DictReader(log) if row["train/learning_rate"]]
    assert rates == pytest.approx([2e-3 * (6 - step) / 5 for step in range(2, 6)])  # after one step of warm-up


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("export x --foo=3", "hubert: there is no option foo; `hubert export --help` lists the options"),
        ("labels check x --foo", "hubert: there is no option foo; `hubert labels check --help` lists the options"),
        ("labels check", "hubert: STORE missing; `hubert labels check --help` lists the arguments"),
        ("kmeans fit --x=3", "hubert: there is no option x; `hubert kmeans fit --help` lists the options"),
        ("align", "hubert: MODEL, FILES missing; `hubert align --help` lists the arguments"),
        ("demo --foo", "hubert: there is no option foo; `hubert demo --help` lists the options"),
        ("score", "hubert: RESULTS missing; `hubert score --help` lists the arguments"),
        ("transcribe m f --num_workers=many", "hubert: "),
    ],
)
def test_a_mistake_in_a_verb_is_one_sentence(typed: str, sentence: str, capsys: pytest.CaptureFixture) -> None:
    said = refused(capsys, *typed.split())
    assert said.startswith(sentence)
    assert len(said.splitlines()) == 1, said


def test_a_fit_of_several_nodes_says_whom_it_waits_for(manifests: Path, tmp_path: Path) -> None:
    command = ["fit", *SMOKE_FINETUNE, *transcribed_options(manifests), "--model.init_args.pretrained=null"]
    several = ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp"]
    output = tmp_path / "output.txt"
    output.touch()
    alone = {name: value for name, value in os.environ.items() if "SLURM" not in name and name != "MASTER_PORT"}
    process = fork_server.start(
        [*command, *several, f"--output={tmp_path / 'run'}"], output, environment=alone | {"MASTER_PORT": "29637"}
    )
    sentence = "waiting for 2 processes at 127.0.0.1:29637; start the same command on the other node with NODE_RANK 1 "
    until = time.monotonic() + 120
    while process.is_alive() and sentence not in output.read_text() and time.monotonic() < until:
        time.sleep(0.1)
    fork_server.end(process)
    assert output.read_text().count(sentence) == 1, output.read_text()
