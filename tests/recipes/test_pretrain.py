"""Pre-training and fine-tuning in one command."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from helpers import refused, save_ctc

from hubert_lightning import finetune, load_encoder, pretrain
from hubert_lightning.cli import main
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.data.prepare import prepare_folder
from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.pretrained.load import encoder_config
from hubert_lightning.recipes.pretrain import iterations_in, pretraining_recipe
from hubert_lightning.recipes.recipe import adapted_to_steps, names_option, paths_of
from hubert_lightning.short_options import settings_of
from hubert_lightning.training.run_folder import kept_config

SIZES: dict[str, Any] = {"conv_channels": 16, "dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64}
TINY_RUN = {
    **{f"model.init_args.encoder.{name}": size for name, size in SIZES.items()},
    "iterations.1.clusters": 8,
    "iterations.2.clusters": 8,
    "trainer.accelerator": "cpu",
    "data.init_args.min_duration": 1.0,
}
WORDS = ("one two", "two three", "three one", "one", "two", "three", "one three", "three two")


def recordings(folder: Path, count: int = 8, transcribed: bool = False) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        noise = np.random.default_rng(number).uniform(-0.5, 0.5, 3 * SAMPLE_RATE)
        soundfile.write(folder / f"{number}.wav", noise, SAMPLE_RATE)
        if transcribed:
            (folder / f"{number}.txt").write_text(WORDS[number])
    return folder


def table(folder: Path, encoding: str = "utf-16", delimiter: str = ";") -> Path:
    recordings(folder / "audio")
    rows = [["path", "text"], *([f"audio/{number}.wav", words] for number, words in enumerate(WORDS))]
    path = folder / "table.csv"
    path.write_text("\n".join(delimiter.join(row) for row in rows), encoding=encoding)
    return path


def test_a_folder_stands_for_a_preparation_and_a_fit(tmp_path: Path) -> None:
    folder = recordings(tmp_path / "my talks", 2)
    recipe = pretraining_recipe(folder, tmp_path / "out", steps=30, options={"trainer.devices": 1})
    prepare, fit = map(shlex.split, recipe.long_form())
    made = tmp_path / "out" / "manifests"
    assert prepare == ["hubert", "prepare", "folder", str(folder), str(made)]
    assert fit[:4] == ["hubert", "fit", "--config", "pretrain/small"]
    assert fit[fit.index("--data.init_args.train") + 1] == str(made / "my talks.jsonl.gz")
    assert fit[fit.index("--data.init_args.validation") + 1] == str(made / "my talks-dev.jsonl.gz")
    assert fit[-2:] == ["--output", str(tmp_path / "out")]
    assert "--trainer.devices=1" in fit
    iterations = json.loads(recipe.fit_options[-1].removeprefix("--iterations="))
    assert [entry["max_steps"] for entry in iterations] == [30, 30]
    assert not any(tmp_path.joinpath("out").glob("*"))


def test_nothing_is_held_out_if_a_validation_is_named(tmp_path: Path) -> None:
    folder = recordings(tmp_path / "talks", 2)
    (tmp_path / "dev.jsonl.gz").touch()
    recipe = pretraining_recipe(folder, tmp_path / "out", validation=tmp_path / "dev.jsonl.gz")
    assert "--heldout 0.0" in recipe.long_form()[0]
    assert recipe.validation == [tmp_path / "dev.jsonl.gz"]
    without = pretraining_recipe(folder, tmp_path / "out", heldout=0).fit
    assert without[without.index("--data.init_args.validation") + 1] == "null"


def test_a_model_to_start_from_makes_the_labels_and_is_trained_on(tmp_path: Path) -> None:
    model = save_ctc(tmp_path / "model.ckpt").encoder.config
    folder = recordings(tmp_path / "talks", 2)
    recipe = pretraining_recipe(folder, tmp_path / "out", init=tmp_path / "model.ckpt")
    settings = settings_of(recipe.fit_options)
    [entry] = settings["iterations"]
    assert entry["features"] == entry["weights"] == str(tmp_path / "model.ckpt")
    assert entry["layer"] == round(0.75 * model.num_layers)
    assert f"--model.init_args.encoder.dim={model.dim}" in recipe.fit
    labels_alone = pretraining_recipe(folder, tmp_path / "out", "base", init=tmp_path / "model.ckpt")
    [entry] = settings_of(labels_alone.fit_options)["iterations"]
    assert (entry["features"], entry["clusters"]) == (str(tmp_path / "model.ckpt"), 500)
    assert "weights" not in entry
    assert not any("encoder" in word for word in labels_alone.fit)


def test_a_run_of_few_steps_validates_at_its_end() -> None:
    small, own = ["--config", "pretrain/small"], ["--config", "finetune/own"]
    assert adapted_to_steps(small, 30, [], True) == [
        *("--trainer.val_check_interval", "30", "--model.init_args.warmup_steps", "null"),
    ]
    assert adapted_to_steps(own, 100, [], True) == [
        *("--trainer.val_check_interval", "400", "--model.init_args.freeze_steps", "10"),
    ]
    assert adapted_to_steps(own, 100, ["--trainer.val_check_interval=7", "--model.freeze_steps", "0"], True) == []
    assert adapted_to_steps(own, 10_000, [], True) == adapted_to_steps(small, 3000, [], True) == []
    assert names_option(["--data.train", "a"], "data.init_args.train")
    assert not names_option(["--data.training", "a"], "data.init_args.train")


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("pretrain", "usage"),
        ("pretrain IN", "--output missing"),
        ("pretrain IN --output", "--output: expects a value"),
        ("pretrain IN --output OUT --size tiny", "--size tiny: choose small, base, large or xlarge"),
        ("pretrain IN --output OUT --size base --config x", "--size base and --config x both name a config"),
        ("pretrain IN --output OUT --config no/such", "no/such: neither a size (small, base, large, xlarge) nor a co"),
        ("pretrain IN --output OUT --size large", "pretrain/large: its labels are made of another model, as in the p"),
        ("pretrain IN --output OUT --init IN/0.wav", "0.wav is corrupt, or no file of torch.save"),
        ("pretrain IN --output OUT --init no/model.ckpt", "no/model.ckpt does not exist"),
        ("pretrain IN --output OUT --steps 0", "steps is 0; give a number above 0"),
        ("pretrain IN --output OUT --steps many", "--steps many: not a whole number"),
        ("pretrain IN --output OUT --stepps 3", "there is no option stepps; did you mean --steps?"),
        ("pretrain IN --output OUT --heldout 1", "heldout is 1.0; it is a share of the audio"),
        ("pretrain IN --output OUT --trainer.devicess 3", "no option trainer.devicess; did you mean trainer.devices?"),
        ("pretrain IN IN --output OUT", "IN: one of several inputs, and not a manifest"),
        ("pretrain IN/0.wav --output OUT", "0.wav: a file, and not a manifest; give a folder of recordings"),
        ("pretrain none --output OUT", "none: there is no such file or folder"),
        ("pretrain EMPTY --output OUT", "EMPTY: no audio in it"),
        ("pretrain IN --output RUN", "RUN: already holds another run (RUN/config.yaml); choose another --output"),
        ("pretrain m.jsonl.gz --output RUN", "give --heldout 0 to continue a run that holds nothing out of these"),
        ("pretrain IN --output IN/0.wav", "0.wav: a file, not a folder; choose another --output"),
        ("finetune IN --output OUT", "--init missing"),
        ("finetune IN --output OUT --init IN", "IN has no config.json, and 0 files of weights"),
        ("finetune IN --output OUT --init MODEL --config no", "no: there is no such config"),
        ("finetune IN --output OUT --init MODEL --text_column x", "a folder, which has no columns; leave out text_co"),
        ("finetune IN --output OUT --init MODEL", "all 2 audio files are refused"),
        ("finetune IN --output OUT --init MODEL --heldout 0", "there is nothing to validate on"),
    ],
)
def test_a_mistake_is_answered_before_any_work(
    typed: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    recordings(Path("IN"), 2)
    Path("EMPTY").mkdir()
    Path("RUN").mkdir()
    Path("RUN/config.yaml").touch()
    Path("m.jsonl.gz").touch()
    save_ctc(Path("MODEL"))
    if sentence == "usage":
        main(typed.split())
        assert capsys.readouterr().out.startswith("usage: hubert pretrain FOLDER")
        return
    assert sentence in refused(capsys, *typed.split())
    assert not [*tmp_path.rglob("*.ckpt"), *Path("OUT").rglob("*.jsonl.gz")]


def test_several_manifests_are_inputs(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl"]
    for path in paths:
        path.touch()
    assert paths_of(paths) == paths
    whole = pretraining_recipe(paths, tmp_path / "out", heldout=0)
    assert whole.preparation is None
    assert len(whole.long_form()) == 1
    prepare, fit = map(shlex.split, pretraining_recipe(paths, tmp_path / "out").long_form())
    made = tmp_path / "out" / "manifests"
    assert prepare == ["hubert", "prepare", "split", *map(str, paths), str(made), "--heldout", "0.05"]
    validation = fit.index("--data.init_args.validation") + 1
    assert fit[validation : validation + 2] == [str(made / "a-dev.jsonl.gz"), str(made / "b-dev.jsonl.gz")]
    (tmp_path / "c.shar").touch()
    assert pretraining_recipe([tmp_path / "c.shar"], tmp_path / "out").preparation is None
    with pytest.raises(UserError, match="no recordings are named"):
        paths_of([])


@pytest.mark.slow
def test_recordings_become_an_encoder_and_the_same_call_does_nothing_more(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    folder, output = recordings(tmp_path / "talks"), tmp_path / "run"
    run = pretrain(folder, output, steps=2, options=TINY_RUN, report=False)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert run.iterations == (output / "iteration1", output / "iteration2")
    assert run.checkpoint == output / "iteration2" / "last.ckpt"
    assert run.metrics["steps"] == 2
    assert 0 <= run.metrics["val/masked_accuracy"] <= 1
    assert run.report is None
    assert encoder_config(run.checkpoint).dim == 32
    assert kept_config(run.iterations[0])["data"]["init_args"]["validation"] == [
        str(output / "manifests" / "talks-dev.jsonl.gz")
    ]
    before = {path: path.stat().st_mtime_ns for path in sorted(output.rglob("*")) if path.is_file()}
    assert pretrain(folder, output, steps=2, options=TINY_RUN, report=False) == run
    after = {path: path.stat().st_mtime_ns for path in sorted(output.rglob("*")) if path.is_file()}
    assert {path for path in before if before[path] != after[path] and path.suffix == ".ckpt"} == set()
    recordings(folder / "more", 1)
    with pytest.raises(UserError, match=r"made of 8 recordings, and there are 9 now|have changed since"):
        pretrain(folder, output, steps=2, options=TINY_RUN, report=False)


@pytest.mark.slow
def test_a_share_of_manifests_is_held_out(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    long, short = recordings(tmp_path / "long"), recordings(tmp_path / "short" / "more", 1).parent
    manifests = [*prepare_folder(long, tmp_path / "in", heldout=0), *prepare_folder(short, tmp_path / "in")]
    run = pretrain(manifests, tmp_path / "run", steps=1, options=TINY_RUN, report=False)
    data = kept_config(run.iterations[0])["data"]["init_args"]
    assert data["validation"] == [str(tmp_path / "run/manifests/long-dev.jsonl.gz")]
    parts = [len(read_manifest(Path(path))) for path in [*data["train"], *data["validation"]]]
    assert parts == [7, 1, 1]
    assert "val/masked_accuracy" in run.metrics
    assert pretrain(manifests, tmp_path / "run", steps=1, options=TINY_RUN, report=False) == run


@pytest.mark.slow
def test_one_recording_is_trained_on_without_a_validation(tmp_path: Path) -> None:
    folder = recordings(tmp_path / "talk", 1)
    run = pretrain(folder, tmp_path / "run", steps=1, options=TINY_RUN, report=False)
    assert not [name for name in run.metrics if name.startswith("val/")]
    assert kept_config(run.iterations[0])["data"]["init_args"]["validation"] is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["table", "folder"])
def test_sentences_become_a_model_that_transcribes(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_ctc(tmp_path / "model.ckpt")
    data = table(tmp_path) if kind == "table" else recordings(tmp_path / "spoken", transcribed=True)
    output = tmp_path / "run"
    typed = ["finetune", str(data), "--init", str(tmp_path / "model.ckpt"), "--output", str(output), "--steps", "2"]
    main([*typed, "--trainer.accelerator", "cpu", "--data.num_workers", "0"])
    printed = capsys.readouterr().out
    assert "In the long form:" in printed
    assert f"hubert vocabulary {output / 'manifests'}" in printed
    assert f"{output / 'best.ckpt'}: val/wer" in printed
    assert (output / "report.html").read_text().startswith("<!doctype html>")
    parts = list((output / "manifests").glob("*.jsonl.gz"))
    assert sorted(len(read_manifest(part)) for part in parts) == [1, 7]
    again = finetune(
        data, tmp_path / "model.ckpt", output, steps=2, report=False,
        options=["--trainer.accelerator", "cpu", "--data.num_workers", "0"],
    )  # fmt: skip
    assert again.checkpoint == output / "best.ckpt"
    assert again.metrics["steps"] == 2
    assert load_encoder(again.checkpoint).config.dim == EncoderConfig(**SIZES).dim


def test_the_iterations_of_a_run_are_in_their_order_without_other_folders(tmp_path: Path) -> None:
    for name in ("iteration10", "iteration2", "iteration1", "iteration1-old", "iterations"):
        (tmp_path / name).mkdir()
    assert [path.name for path in iterations_in(tmp_path)] == ["iteration1", "iteration2", "iteration10"]


def test_languages_go_to_the_preparation_and_their_balance_to_the_fit(tmp_path: Path) -> None:
    folder = recordings(tmp_path / "talks", 2)
    options = {"data.balance_languages": 0.7}
    recipe = pretraining_recipe(folder, tmp_path / "out", language_folders=True, corpus_name="radio", options=options)
    prepare, fit = map(shlex.split, recipe.long_form())
    assert prepare[5:] == ["--language_folders", "true", "--corpus_name", "radio"]
    assert "--data.balance_languages=0.7" in fit
    (tmp_path / "a.jsonl.gz").touch()
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: a manifest, which has its languages .*; leave out --language"):
        pretraining_recipe(tmp_path / "a.jsonl.gz", tmp_path / "out", language="en")


def test_a_table_and_a_folder_of_transcripts_name_languages_in_their_own_ways(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"table\.csv: a table; name its column of languages with --language_column"):
        finetune(table(tmp_path), "init", tmp_path / "out", language_folders=True)
    folder = recordings(tmp_path / "said", 2, transcribed=True)
    with pytest.raises(UserError, match="said: a folder, which has no columns; leave out language_column"):
        finetune(folder, "init", tmp_path / "out", language_column="locale")
