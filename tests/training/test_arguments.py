"""Every number that a user can give is used, or refused by its name: no traceback, and no loss that is not finite."""

import inspect
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from helpers import (
    FINETUNING_CONFIGS,
    PRETRAINING_CONFIGS,
    ROOT,
    SMOKE,
    SMOKE_FINETUNE,
    TINY,
    TWO_ITERATIONS,
    bare_trainer,
    data_of_task,
    parsed_config,
    pretraining_options,
    refused,
    transcribed_options,
)
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hubert_lightning.cli import main
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.training.arguments import VALIDATION_METRICS, check_arguments, check_ignored
from hubert_lightning.training.callbacks.best_checkpoints import BestCheckpoints
from hubert_lightning.training.callbacks.layer_quality import LayerQuality
from hubert_lightning.training.callbacks.peak_rate import PeakRateFinder
from hubert_lightning.training.callbacks.pictures import Pictures
from hubert_lightning.training.finetuning import CTCFinetuning
from hubert_lightning.training.finetuning_data import TranscribedData
from hubert_lightning.training.iterations import Iteration, check_iteration
from hubert_lightning.training.pretraining import HubertPretraining
from hubert_lightning.training.pretraining_data import PretrainingData
from hubert_lightning.training.relabelling import Relabel
from hubert_lightning.units.kmeans import KMeans

ODD = (math.nan, math.inf, -math.inf, -1, 0, 2**40)
TRAIN = Path("train.jsonl.gz")


def numeric(of: Callable) -> Iterator[tuple[str, list[type]]]:
    """The arguments that take numbers, and which."""
    hints = get_type_hints(of.__init__)  # type: ignore[misc]
    for name in inspect.signature(of).parameters:
        hint = hints[name]
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if taken := [kind for kind in (int, float) if kind in kinds]:
            yield name, taken


def odd_values(of: Callable) -> Iterator[tuple[str, float]]:
    for name, kinds in numeric(of):
        for value in ODD:
            if float in kinds or isinstance(value, int):
                yield name, value


def accepted(of: Callable, **needed: Any) -> Iterator[tuple[str, float, Any]]:
    """What is made with each odd value, where it is not refused by the name of its argument."""
    for name, value in odd_values(of):
        try:
            made = of(**needed | {name: value})
        except ValueError as error:
            refusal = str(error)
        else:
            yield name, value, made
            continue
        assert name in refusal or (name.endswith("duration") and "too short" in refusal), (name, value, refusal)
        assert "cannot convert" not in refusal


@pytest.mark.parametrize(
    ("of", "needed"),
    [
        (EncoderConfig, {}),
        (KMeans, {}),
        (Relabel, {}),
        (BestCheckpoints, {}),
        (LayerQuality, {}),
        (Pictures, {}),
        (PeakRateFinder, {}),
        (PretrainingData, {"train": [TRAIN]}),
        (TranscribedData, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_number_that_makes_no_sense_is_refused_by_its_name(of: Callable, needed: dict[str, Any]) -> None:
    assert [*numeric(of)]
    for name, value, _ in accepted(of, **needed):
        assert math.isfinite(value), (name, value)
        assert value >= 0 or name == "seed", (name, value)


def test_an_iteration_that_makes_no_sense_is_refused_by_its_name() -> None:
    for field in fields(Iteration):
        for value in (-1, 0) if field.name in ("clusters", "max_frames", "max_steps") else ():
            with pytest.raises(ValueError, match=rf"iterations\.1.*({field.name}|{value} frames)"):
                check_iteration(Iteration(**{field.name: value}), 1, 12)


def one_step(task: type, model: Any, data: Any, folder: Path) -> None:
    trainer = bare_trainer(folder, max_steps=1, limit_val_batches=0, log_every_n_steps=1)
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 1
    assert float(model.global_batch.skipped) == 0
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert math.isfinite(float(trainer.callback_metrics["train/loss"]))


@pytest.mark.slow
def test_a_pre_training_with_odd_numbers_that_are_accepted_takes_a_finite_step(
    run: Path, manifests: Path, tmp_path: Path
) -> None:
    needed = {"encoder": TINY, "num_clusters": 20, "final_dim": 16}
    for name, value, model in accepted(HubertPretraining, **needed):
        assert name != "num_clusters", value
        one_step(HubertPretraining, model, data_of_task(HubertPretraining, manifests, run), tmp_path)
    data: dict[str, Any] = {"train": [manifests / "train.jsonl.gz"], "labels": run / "labels", "max_crop": 3}
    for name, value, made in accepted(PretrainingData, num_workers=0, max_duration=10, **data):
        if name == "balance_languages":
            with pytest.raises(ValueError, match="no language in the manifest"):
                one_step(HubertPretraining, HubertPretraining(**needed), made, tmp_path)
            continue
        if (name, value) == ("min_duration", 2**40):
            with pytest.raises(ValueError, match=r"no utterance lasts min_duration 1099511627776 s or more; lower it"):
                one_step(HubertPretraining, HubertPretraining(**needed), made, tmp_path)
            continue
        one_step(HubertPretraining, HubertPretraining(**needed), made, tmp_path)


def test_a_fine_tuning_with_odd_numbers_that_are_accepted_takes_a_finite_step(
    run: Path, manifests: Path, tmp_path: Path
) -> None:
    models, sets = (
        [*accepted(CTCFinetuning, encoder=TINY)],
        [*accepted(TranscribedData, train=[manifests / "finetune.jsonl.gz"], num_workers=0)],
    )
    assert models
    assert sets
    for _, _, model in models:
        one_step(CTCFinetuning, model, data_of_task(CTCFinetuning, manifests, run), tmp_path)
    for name, _, made in sets:
        if name == "balance_languages":
            with pytest.raises(ValueError, match="no language in the manifest"):
                one_step(CTCFinetuning, CTCFinetuning(encoder=TINY), made, tmp_path)
            continue
        one_step(CTCFinetuning, CTCFinetuning(encoder=TINY), made, tmp_path)


def test_every_number_of_the_trainer_is_taken_or_refused(tmp_path: Path) -> None:
    config = parsed_config(*SMOKE_FINETUNE, f"--output={tmp_path}").config.fit
    hints = get_type_hints(Trainer.__init__)
    numbers = [name for name in hints if {int, float} & {hints[name], *get_args(hints[name])}]
    assert {"gradient_clip_val", "max_steps", "devices", "val_check_interval", "num_nodes"} <= {*numbers}
    for name in dict.fromkeys(numbers):
        for value in ODD:
            one = config.clone()
            one.trainer[name] = value
            try:
                check_arguments(one, "fit")
            except ValueError as error:
                assert f"trainer.{name}" in str(error)  # noqa: PT017
                continue
            assert math.isfinite(value), name
            try:
                Trainer(accelerator="cpu", logger=False, **{"devices": 1, name: value})
            except (MisconfigurationException, ValueError, TypeError) as error:  # one sentence: the tests below
                assert name in str(error) or name == "precision", (name, value, str(error))  # noqa: PT017


FINE = [
    ("--optimizer=torch.optim.SGD", "no option optimizer; did you mean model.init_args.optimizer?"),
    ("--optimizer.lr=0.1", "no option optimizer; did you mean model.init_args.optimizer?"),
    ("--lr_scheduler=torch.optim.lr_scheduler.StepLR", "no option lr_scheduler; the recipe sets the schedule"),
    ("--trainer.overfit_batches=2", "trainer.overfit_batches is 2"),
    ("--trainer.strategy=ddp_spawn", "trainer.strategy is ddp_spawn"),
    ("--trainer.check_val_every_n_epoch=1 --trainer.val_check_interval=5000", "trainer.val_check_interval: "),
    ("--trainer.val_check_interval=0", "trainer.val_check_interval is 0"),
    ("--trainer.logger=lightning.pytorch.loggers.CometLogger", "comet-ml"),
    ("--trainer.callbacks+=no.such.Callback", "trainer.callbacks: No module named 'no'"),
    ("--trainer.callbacks+=hubert_lightning.NoSuchThing", "trainer.callbacks: "),
    ("--seed_everything=-1", "seed_everything is -1"),
    ("--seed_everything=1099511627776", "seed_everything is 1099511627776"),
    ("--seed_everything=true", "seed_everything is True"),
    ("--data.init_args.num_workers=-1", "num_workers is -1"),
    ("--trainer.devices=0", "trainer.devices is 0"),
    ("--trainer.devices=abc", "trainer: `devices` selected with"),
    ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches is 0"),
    ("--trainer.strategy=nothing", "trainer: You selected an invalid strategy name"),
    ("--trainer.accelerator=nothing", "trainer: You selected an invalid accelerator name"),
    ("--trainer.gradient_clip_val=.nan", "trainer.gradient_clip_val is nan"),
    ("--trainer.max_time=foo", "is not a valid duration"),
    ("--trainer.limit_train_batches=0", "trainer.limit_train_batches is 0"),
    ("--trainer.precision=transformer-engine", "transformer_engine"),
    ("--checkpoint.save_top_k=-2", "checkpoint.save_top_k=-2"),
    ("--checkpoint.every_n_epochs=0", "checkpoint.every_n_epochs is 0"),
    ("--trainer.enable_checkpointing=false", "trainer.enable_checkpointing is false"),
    ("--trainer.max_steps=-1 --trainer.max_time=00:00:01:00", "trainer.max_time is given and trainer.max_steps is not"),
    ("--model.init_args.optimizer=torch.optim.SparseAdam", "SparseAdam does not support dense gradients"),
    ("--data.init_args.train=null", "data.train names no manifest; `hubert fit` needs one"),
    ("--data.init_args.seed=5", "data.init_args.seed is 5"),
    ("--data.seed=5", "data.seed is 5"),
    ("--trainer.default_root_dir=elsewhere", "trainer.default_root_dir is elsewhere"),
    ("--checkpoint.dirpath elsewhere", "checkpoint.dirpath is elsewhere"),
    *(
        (f"--checkpoint.{typed}", f"checkpoint.{typed} would not keep the last.ckpt")
        for typed in (
            "save_top_k=0",
            "save_top_k=3",
            "filename=foo",
            "filename={step}",
            "filename=../esc",
            "filename=None",
            "save_weights_only=True",
            "save_last=True",
            "save_last=link",
            "enable_version_counter=True",
            "monitor=val/loss",
        )
    ),
    ("--model.init_args.optimizer.init_args.lr=-1", "the optimizer cannot be made (Invalid learning rate: -1.0)"),
    ("--model.init_args.optimizer.init_args.lr=.nan", "model.init_args.optimizer.init_args.lr is nan"),
    ("--model.init_args.encoder=null", "model.init_args.encoder is null"),
    ("--data.init_args.mask_length=1.5", "data.mask_length 1.5: not a whole number"),
]


@pytest.mark.slow
def test_options_that_no_run_can_have_are_one_sentence_before_the_first_step(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    scratch = ["--model.init_args.pretrained=null", f"--output={tmp_path / 'run'}"]
    for typed, sentence in FINE:
        said = refused(capsys, "fit", *SMOKE_FINETUNE, *transcribed_options(manifests), *scratch, *typed.split())
        told = [line for line in said.splitlines() if line.startswith("hubert: ")]
        assert len(told) == 1, typed
        assert sentence in told[0], (typed, told)
        assert "Traceback" not in said
        written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert not written or ("val_check_interval=5000" in typed and not {*written} & {"last.ckpt", "metrics.json"})
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("--data.init_args.max_crop=.inf", "data.init_args.max_crop is inf"),
        ("--model.init_args.final_dim=0", "final_dim is 0"),
        ("--model.init_args.temperature=0", "temperature is 0"),
        ("--model.init_args.feature_penalty=.inf", "model.init_args.feature_penalty is inf"),
        (
            "--iterations=[{max_frames: 2000, max_steps: 2, clusters: 0}]",
            "iterations.1: clusters [0]: each K-means has",
        ),
    ],
)
def test_a_pre_training_that_cannot_be_is_refused_before_there_are_labels(
    typed: str, sentence: str, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert sentence in refused(
        capsys, "fit", *SMOKE, *pretraining_options(manifests), typed, f"--output={tmp_path / 'run'}"
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# A trial run


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_trial_run_walks_through_all_iterations_and_leaves_nothing(manifests: Path, tmp_path: Path) -> None:
    command = ["fit", *SMOKE, *pretraining_options(manifests), TWO_ITERATIONS, f"--output={tmp_path / 'run'}"]
    main([*command, "--trainer.fast_dev_run=true"])
    assert not [*tmp_path.iterdir()]
    main(command)
    before = files(tmp_path)
    main([*command, "--trainer.fast_dev_run=2"])
    assert files(tmp_path) == before


@pytest.mark.slow
def test_a_trial_run_of_every_verb_leaves_a_run_as_it_is(manifests: Path, tmp_path: Path) -> None:
    command = ["fit", *SMOKE_FINETUNE, *transcribed_options(manifests), f"--output={tmp_path / 'run'}"]
    main([*command, "--model.init_args.pretrained=null"])
    before = files(tmp_path)
    trial = ["--config", str(tmp_path / "run/config.yaml"), "--trainer.fast_dev_run=true"]
    for verb in ("fit", "validate", "test", "predict"):
        main([verb, *trial])
        assert files(tmp_path) == before, verb


@pytest.mark.campaign
@pytest.mark.parametrize("path", [*PRETRAINING_CONFIGS, *FINETUNING_CONFIGS], ids=lambda path: path.stem)
def test_a_trial_run_of_every_config(path: Path, manifests: Path, tmp_path: Path) -> None:
    pretraining = path in PRETRAINING_CONFIGS
    smoke = ROOT / f"tests/{'smoke' if pretraining else 'smoke-finetune'}.yaml"
    given = yaml.safe_load(path.read_text())
    more = pretraining_options(manifests) if pretraining else transcribed_options(manifests)
    if pretraining:  # as many iterations as the config has, of a tiny encoder
        each = "{features: %s, layer: %s, clusters: 20, max_frames: 2000, max_steps: 100}"
        number = len(given["iterations"])
        rounds = [each % (("mfcc", "null") if not index else ("previous", 1)) for index in range(number)]
        more.append(f"--iterations=[{', '.join(rounds)}]")
    main(
        ["fit", f"--config={path}", f"--config={smoke}", *more, f"--output={tmp_path}/run", "--trainer.fast_dev_run=1"]
    )
    assert not [*tmp_path.iterdir()]


def test_no_tensor_is_made_to_refuse_an_encoder_that_is_too_large() -> None:
    with pytest.raises(ValueError, match="billion parameters"):
        EncoderConfig(dim=2**18, num_heads=2**10, ffn_dim=2**20)


def test_a_callback_that_cannot_work_is_one_sentence_before_the_first_step(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lightning, scratch = "lightning.pytorch.callbacks.", "--model.init_args.pretrained=null"
    for name, settings, sentence in (
        ("EarlyStopping", {"monitor": "foo"}, "EarlyStopping monitors foo"),
        ("EarlyStopping", {"monitor": "val/masked_loss"}, "use one of val/loss, val/wer, val/cer"),
        ("ModelCheckpoint", {"monitor": "wer"}, "ModelCheckpoint monitors wer"),
        ("ModelCheckpoint", {"filename": "last"}, "a ModelCheckpoint with filename last would overwrite"),
        ("StochasticWeightAveraging", {"swa_lrs": "0.1"}, "StochasticWeightAveraging would replace the schedule"),
        ("LearningRateFinder", {}, "use hubert_lightning.PeakRateFinder"),
        ("Timer", {"duration": "00:00:10:00"}, "set trainer.max_time"),
    ):
        given = [f"--trainer.callbacks.{option}={value}" for option, value in settings.items()]
        callback = [f"--trainer.callbacks+={lightning}{name}", *given]
        output = f"--output={tmp_path / 'run'}"
        said = refused(capsys, "fit", *SMOKE_FINETUNE, *transcribed_options(manifests), scratch, *callback, output)
        assert sentence in said, name
        assert len(said.splitlines()) == 1, said
        assert not [*tmp_path.iterdir()]


def test_a_metric_that_only_training_could_tell_is_one_sentence_at_the_first_validation(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    callback = "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping"
    typed = [callback, "--trainer.callbacks.monitor=train/los", "--model.init_args.pretrained=null"]
    said = refused(
        capsys, "fit", *SMOKE_FINETUNE, *transcribed_options(manifests), *typed, f"--output={tmp_path / 'run'}"
    )
    assert "hubert: EarlyStopping: Early stopping conditioned on metric `train/los`" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_the_metrics_of_each_task_are_those_that_its_validation_finds(
    run: Path, manifests: Path, tmp_path: Path
) -> None:
    models = (HubertPretraining(TINY, num_clusters=20, final_dim=16), CTCFinetuning(encoder=TINY))
    for model in models:
        trainer = bare_trainer(tmp_path)
        trainer.validate(model, datamodule=data_of_task(type(model), manifests, run), verbose=False)
        assert {*trainer.callback_metrics} == {*VALIDATION_METRICS[type(model).__name__]}


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("--model=lightning.pytorch.demos.boring_classes.BoringModel", "is not a task of this package"),
        ("--data=lightning.pytorch.demos.boring_classes.BoringDataModule", "use hubert_lightning.TranscribedData"),
        ("--data=hubert_lightning.PretrainingData", "use hubert_lightning.TranscribedData"),
        ("--model=hubert_lightning.HubertPretraining", "use hubert_lightning.PretrainingData"),
    ],
)
def test_a_model_and_data_that_do_not_fit_are_one_sentence(
    typed: str, sentence: str, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = f"--output={tmp_path / 'run'}"
    given = ["--config", str(ROOT / "tests/smoke-finetune.yaml"), "--data.train=[a]", output]
    both = ["--model=hubert_lightning.CTCFinetuning", "--data=hubert_lightning.TranscribedData"]
    said = refused(capsys, "fit", *both, *given, typed)
    assert sentence in said
    assert len(said.splitlines()) == 1, said


def test_options_that_a_config_of_a_run_repeats_are_no_mistakes() -> None:
    config = Namespace(output="new", seed_everything=3)
    of_run = {"trainer.default_root_dir": "old", "checkpoint.dirpath": "old", "data.init_args.seed": 0}
    check_ignored(config, [("config.yaml", of_run | {"output": "old", "seed_everything": 0})])
    check_ignored(config, [("command line", {"trainer.default_root_dir": "./new", "data.seed": "3"})])
    with pytest.raises(ValueError, match=r"config.yaml: data.init_args.seed is 0, .* the seed of the run, 3"):
        check_ignored(config, [("config.yaml", {"data.init_args.seed": 0})])


def test_a_callback_may_copy_a_model_whose_optimizer_the_config_names(manifests: Path, tmp_path: Path) -> None:
    averaging = "--trainer.callbacks+=lightning.pytorch.callbacks.WeightAveraging"
    typed = [averaging, "--model.init_args.pretrained=null", f"--output={tmp_path / 'run'}"]
    main(["fit", *SMOKE_FINETUNE, *transcribed_options(manifests), *typed])
    assert (tmp_path / "run/last.ckpt").exists()
