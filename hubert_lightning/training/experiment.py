"""LightningCLI for the two tasks: one YAML, one run folder, one or several iterations.

A fit that lists iterations is taken apart into fits of one iteration each. Each has a folder of its own
(`iteration1`, `iteration2`, …) with the config that would run it alone, its labels, and its checkpoint, from which the
next one takes its labels. What is finished is not done again: the same command goes on where it was interrupted.
"""

import copy
import logging
import re
import secrets
import shutil
import warnings
from argparse import SUPPRESS
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import Namespace
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from torch import Tensor

from hubert_lightning import console
from hubert_lightning.asr.results import SCORES, copy_to_run, results_folder
from hubert_lightning.asr.score_report import report
from hubert_lightning.asr.scoring import read_results, score, write_scores
from hubert_lightning.console import is_first_process, show_messages
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.errors import UserError
from hubert_lightning.features.mfcc import MfccPart
from hubert_lightning.files import check_regular, is_unfinished, write_whole
from hubert_lightning.interrupts import held
from hubert_lightning.pretrained.formats.own import read_checkpoint
from hubert_lightning.pretrained.load import encoder_config
from hubert_lightning.training.arguments import check_arguments, check_ignored
from hubert_lightning.training.callbacks import stalls
from hubert_lightning.training.callbacks.collapse import CollapseWatch
from hubert_lightning.training.callbacks.preemption import Preemption
from hubert_lightning.training.callbacks.run_record import RunRecord
from hubert_lightning.training.callbacks.stalls import StalledRanks
from hubert_lightning.training.callbacks.throughput import Throughput
from hubert_lightning.training.callbacks.whole_steps import WholeSteps
from hubert_lightning.training.checkpoints import WholeCheckpoints, newest_checkpoint, set_corrupt_aside
from hubert_lightning.training.lightning_internals import wandb_arguments
from hubert_lightning.training.metrics_table import keep_rows
from hubert_lightning.training.optimizer_state import probe_optimizer
from hubert_lightning.training.parser import INSIDE, SentenceParser
from hubert_lightning.training.restoring import check_kind, check_weights, model_arguments
from hubert_lightning.training.run_folder import (
    CONFIG,
    KEPT_CONFIG,
    KEPT_METRICS,
    METRICS,
    check_files,
    kept_config,
    kept_metrics,
    names_manifests,
    restore_config,
    restore_given_config,
    saved_configs,
    write_json,
)
from hubert_lightning.training.run_lock import RUN_LOCK, holder_of, locked, refuse
from hubert_lightning.training.run_state import check_entries, check_run, check_state
from hubert_lightning.training.task import CHANGEABLE_ON_RESUME
from hubert_lightning.units.kmeans import KMeans, ScikitKMeans
from hubert_lightning.units.label_recipe import LabelRecipe, is_best, is_fresh, is_mfcc, is_previous
from hubert_lightning.units.layer_quality import check_phones
from hubert_lightning.untrusted.yaml_file import check_typed, given_configs

log = logging.getLogger(__name__)

RELABEL = "hubert_lightning.Relabel"
SCRATCH = ".fast_dev_run"
"""How the folder of a trial run ends."""
TRIAL = ".trial"
"""File that says of a folder that a trial run made it."""
RESULTS_LOCK = "results.lock"  # of what a test or prediction writes, also while training goes on
IDENTITIES = ("id", "version", "run_id", "experiment_key", "with_id")
"""Arguments by which loggers (W&B, CSV, MLflow, Comet, Neptune) resume an existing run."""


@dataclass(frozen=True)
class Iteration:
    """One round of pre-training: what its labels are clusters of, and how long it lasts.

    Args:
        features: "mfcc", "previous" (the model of the iteration before), or a checkpoint.
        layer: Which Transformer layer of that model is clustered, counted from 1, or "best" (by PNMI, if the utterances
            to validate on have phones).
        clusters: Number of K-means clusters; several numbers make an ensemble.
        parts: Parts of MFCCs spliced over three frames, 39 dimensions each, clustered on their own (product codes):
            cepstra, delta, delta_delta.
        max_frames: Frames that K-means is fitted on: a tenth of 960 hours, as in the paper's iteration 2.
        kmeans: How it is fitted: hubert_lightning.KMeans unless named.
        quantizer: A K-means that somebody fitted on these features, used instead of fitting one.
        weights: What training starts from: "fresh" weights, the "previous" iteration's model, or a checkpoint.
        max_steps: Optimiser steps.
    """

    features: str = "mfcc"
    layer: int | Literal["best"] | None = None
    clusters: int | list[int] = 100
    parts: list[MfccPart] | None = None
    max_frames: int = 17_280_000
    kmeans: KMeans | ScikitKMeans | None = None
    quantizer: Path | None = None
    weights: str = "fresh"
    max_steps: int = 250_000


class SaveRunConfig(SaveConfigCallback):
    """Keeps the config in the run's folder, where the next command looks for it, and in its checkpoints.

    `metrics` are those of a run that has finished, None before; checkpoints hold them, too.
    """

    metrics: dict[str, Any] | None = None

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            path, text = Path(trainer.default_root_dir) / CONFIG, self._text.encode()
            if not path.exists() or path.stat().st_size != len(text) or path.read_bytes() != text:
                write_whole(path, text)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEPT_CONFIG] = self._text
        if self.metrics is not None:
            checkpoint[KEPT_METRICS] = self.metrics

    @cached_property
    def _text(self) -> str:
        run = self.config.clone()
        run.ckpt_path = None  # a run is the same wherever this start of it went on from
        for callback in _listed(run.trainer.callbacks):
            if callback.get("init_args", {}).get("dirpath") == run.output:
                callback.init_args.dirpath = None  # nor where it was begun: its folder may be moved
        return self.parser.dump(run, skip_none=False)


class HubertCLI(LightningCLI):
    """`hubert fit|validate|test|predict`: any of our models with its data, in subclass mode.

    `checkpoint` keeps `last.ckpt`, from which a run resumes; what else is worth keeping is a callback in YAML.
    """

    def __init__(self, args: ArgsType, is_iteration: bool = False) -> None:
        show_messages(of_ranks=True)
        self._is_iteration = is_iteration  # one of a fit of several
        self._locks = ExitStack()
        self._typed = not isinstance(args, Namespace)
        with self._locks, warnings.catch_warnings(), self._scratch_removed():
            for expected in (
                "LightningCLI's args parameter",  # `main(args)` passes on what was typed
                "Checkpoint directory .* exists and is not empty",  # of course: the run's labels are there
                "Experiment logs directory .* exists and is not empty",  # whose rows are kept
                "You're resuming from a checkpoint that ended before",  # our sampler goes on with the next batch
                "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning 2.6 with torch 2.13
                "Total length of .* across ranks is zero",  # of the validation that nobody asked for
                "The dirpath has changed from",  # a run's folder may be moved
                "FSDP2-wrapped module .* returned a view",  # on which nobody works in place
            ):
                warnings.filterwarnings("ignore", message=expected)
            super().__init__(
                LightningModule,
                LightningDataModule,
                save_config_callback=SaveRunConfig,
                save_config_kwargs={"save_to_log_dir": False},
                trainer_defaults={
                    "use_distributed_sampler": False,  # our batches are dealt to ranks already
                    # The last of them saves what the others have logged
                    "callbacks": [WholeSteps(), RunRecord(), Throughput(), CollapseWatch(), Preemption()],
                },
                seed_everything_default=0,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,  # both tasks make their own, with its schedule
                parser_class=SentenceParser,
                parser_kwargs={"prog": "hubert"},
                args=args,
            )
        stalls.end("")

    @contextmanager
    def _scratch_removed(self) -> Iterator[None]:
        self._scratch: Path | None = None
        try:
            yield
        finally:
            if self._scratch is not None and is_first_process():
                _empty(self._scratch)
                (self._scratch / TRIAL).unlink(missing_ok=True)
                self._locks.close()
                with suppress(OSError):  # another trial may have begun there
                    self._scratch.rmdir()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=str, default="checkpoints/run", help="The run's folder.")
        parser.add_argument("--iterations", type=list[Iteration], default=[], help="Rounds of pre-training, in order.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(StalledRanks, "stalls")
        parser.set_defaults(
            {
                "checkpoint.filename": "last",
                "checkpoint.every_n_train_steps": 500,
                "checkpoint.enable_version_counter": False,
            }
        )
        for name in INSIDE:  # configs that LightningCLI wrote before say that there is none
            parser.add_argument(f"--{name}", type=Any, default=None, help=SUPPRESS)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        typed = [str(arg) for arg in args] if isinstance(args, list) else []
        for path in given_configs(typed):
            check_regular(path)
            restore_given_config(path)
        check_typed(typed)
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        _find_moved(config, typed)
        check_arguments(config, self.config.subcommand)
        check_files(Path(config.output))
        check_ignored(config, _given(args))
        config.weights_only = True  # a checkpoint is data, never code
        if config.ckpt_path == "last":
            config.ckpt_path = None  # which is what we take
        if self.config.subcommand != "fit":
            config.ckpt_path = config.ckpt_path or _checkpoint_to_judge(Path(config.output))
        if config.ckpt_path:
            _check_kind(Path(config.ckpt_path), config.model.class_path)

    def _set_seed(self) -> None:
        """Set the seed, and say it once a command: not again for every iteration."""
        seed = self.config[self.config.subcommand].seed_everything
        seed_everything(seed, workers=True, verbose=self._typed and is_first_process())

    def _parse_ckpt_path(self) -> None:
        """Take the settings of the model that is judged from its checkpoint; a fit has those of its config."""
        verb = self.config.subcommand
        config = self.config[verb]
        if verb != "fit" and (path := config.ckpt_path):
            module, _, name = config.model.class_path.rpartition(".")
            task = getattr(import_module(module), name)  # that of the config, not of the checkpoint
            stated = model_arguments(task, read_checkpoint(Path(path)), Path(path))
            model = {"class_path": config.model.class_path, "init_args": stated}
            self.config = self.parser.parse_object({verb: {"model": model}}, self.config)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        plugins = _listed(self._get(self.config_init, "trainer").get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(WholeCheckpoints())
        try:
            trainer = super().instantiate_trainer(plugins=plugins, **kwargs)
        except (TypeError, ValueError) as error:  # such as a strategy that the accelerator has not
            raise UserError(f"trainer: {_one_line(error)}; correct the config") from error
        for logger in trainer.loggers:
            if (settings := wandb_arguments(logger)) is not None:
                _quieten(settings)
        _say_whom_it_waits_for(trainer)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.sort(key=lambda callback: not isinstance(callback, StalledRanks))  # it says which batch begins
        for callback in callbacks:
            if isinstance(callback, StalledRanks):
                callback.attach(trainer)
        return trainer

    def instantiate_classes(self) -> None:
        """Raises `UserError` with what another package says of a value that the config gives it."""
        with _sentences():
            super().instantiate_classes()
        make = getattr(self.model, "optimizer", None)
        if isinstance(make, partial) and make.args and isinstance(make.args[-1], type):
            # jsonargparse's own holds its parser, of which there is no copy: callbacks copy the model
            self.model.optimizer = partial(make.args[-1], **make.keywords)

    def _run_subcommand(self, subcommand: str) -> None:
        with _sentences():
            super()._run_subcommand(subcommand)

    def _to_scratch(self, config: Namespace) -> None:
        """Let a trial run (`fast_dev_run`) write to a folder that is removed, beside the one of the run.

        Raises:
            UserError: That folder is one of the user's, or another trial run is at work in it.
        """
        folder = Path(config.output).resolve()
        scratch = folder.with_name(folder.name + SCRATCH)
        if is_first_process():
            _check_trial(scratch)
            self._locks.enter_context(locked(scratch))
            _check_trial(scratch)
            write_whole(scratch / TRIAL, b"")
            _empty(scratch)
        self._scratch = scratch
        config.output = str(scratch)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        console.note("setting up")
        # A validation writes nothing, and reads the labels
        if config.trainer.fast_dev_run and self.subcommand != "validate" and not self._is_iteration:
            self._to_scratch(config)
        if self.subcommand == "fit":
            _check_output(config)
            runs = list(_single_iterations(config)) if config.iterations else [config]
            for run in runs:
                check_files(Path(run.output))
                _settle(run)
                self._refuse_another_run(run)
                _keep_run_id(run)
            unfinished = [run for run in runs if not _finished(run)]
            for run, following in pairwise(runs):
                if run in unfinished and any(Path(following.output).glob("*.ckpt")):
                    raise UserError(
                        f"{run.output}: with more steps, its labels would no longer be those of {following.output}; "
                        "remove that folder, or choose another --output"
                    )
            if not unfinished:
                for folder in dict.fromkeys([config.output, *(run.output for run in runs)]):
                    with suppress(UserError), locked(Path(folder)):
                        pass  # which removes the lock of a fit that was killed when all was done
                if is_first_process():
                    print(_finished_already(runs[-1], Path(config.output)))
                raise SystemExit(0)
            self._lock(Path(config.output))
            unfinished = [run for run in unfinished if not _finished(run)] or unfinished[-1:]
            *earlier, config = unfinished
            for run in earlier:
                HubertCLI(Namespace(subcommand="fit", fit=run), is_iteration=True)
            self._lock(Path(config.output))
            config.trainer.precision = config.trainer.precision or _default_precision(config.trainer)
            seed_everything(config.seed_everything, workers=True, verbose=False)  # the same start, whatever ran before
            if not config.ckpt_path and (newest := newest_checkpoint(Path(config.output))):
                config.ckpt_path = str(newest)
                if is_first_process():
                    set_corrupt_aside(Path(config.output), newest)
        else:
            _settle(config)
            folder = _log_apart(config, str(self.subcommand))
            if self.subcommand in ("test", "predict"):
                other = "take another set, checkpoint or decoder, whose results have a folder of their own"
                self._locks.enter_context(locked(folder, RESULTS_LOCK, other))
        self.config[self.subcommand] = config

    def _lock(self, folder: Path) -> None:
        """Be alone in a run's folder until this command ends, and in those of its iterations.

        Raises:
            UserError: Another process is at work there; or the folder cannot be made.
        """
        self._locks.enter_context(locked(folder))
        for other in (folder.parent, *folder.glob("iteration*")):
            if is_first_process() and (holder := holder_of(other)):
                raise refuse(other, holder)

    def _refuse_another_run(self, config: Namespace) -> None:
        """Raise `UserError` if the folder holds what a run with another model, other data or labels left."""
        folder = Path(config.output)
        if not any(folder.glob("*.ckpt")):
            return  # nothing was trained here
        by_content = names_manifests(folder, config.data.class_path)
        asked = _experiment(yaml.safe_load(self._parser("fit").dump(config, skip_none=False)), by_content)
        difference = _first_difference(_experiment(kept_config(folder), by_content), asked)
        if difference is None:
            return
        for checkpoint, saved in saved_configs(folder):
            if _first_difference(_experiment(saved, by_content), asked) is None:
                restore_config(folder / CONFIG, f"another {difference} than its checkpoint", checkpoint)
                return
            break
        raise UserError(
            f"{folder}: already holds another run, which differs in {difference}; "
            "choose another --output, or remove that folder"
        )

    def before_fit(self) -> None:
        """Raise `UserError` if the optimizer cannot be made, or the run cannot go on from its checkpoint."""
        for logger in self.trainer.loggers:
            if logger.log_dir:
                check_files(Path(logger.log_dir))
        if make := getattr(self.model, "optimizer", None):
            probe_optimizer(make)
        if path := self.config_init[self.subcommand].ckpt_path:
            path, checkpoint = Path(path), read_checkpoint(Path(path))
            if not names_manifests(path, self.config[self.subcommand].data.class_path):
                rank_zero_info(f"{path}: does not say which manifests it was trained with, so they are not compared")
            spelled = model_arguments(type(self.model), checkpoint, path).get("vocabulary")
            if spelled and spelled != self.model.hparams.get("vocabulary"):
                raise UserError(
                    f"{path}: spells with another vocabulary than the model to train; give both the same "
                    "model.init_args.vocabulary, or start from its encoder alone by model.init_args.pretrained"
                )
            if "optimizer_states" not in checkpoint:
                raise UserError(
                    f"{path}: weights alone, such as a mean, from which no run goes on; start another from its encoder "
                    "(model.init_args.pretrained)"
                )
            check_weights(self.model, checkpoint, path)
            check_state(self.trainer, checkpoint, path, "fit_loop")
            check_entries(checkpoint, type(self.datamodule).__qualname__, path)
            if make:
                check_run(self.model, make, checkpoint, path)
            for logger in self.trainer.loggers:
                if isinstance(logger, CSVLogger):
                    keep_rows(logger, checkpoint)

    def before_validate(self) -> None:
        self._check_judged("validate_loop")

    def before_predict(self) -> None:
        self._check_judged("predict_loop")

    def _check_judged(self, loop: str) -> None:
        """Raise `UserError` if the checkpoint to judge is damaged, or one of another model."""
        path = Path(self.config_init[self.subcommand].ckpt_path)
        checkpoint = read_checkpoint(path)
        check_weights(self.model, checkpoint, path)
        check_state(self.trainer, checkpoint, path, loop)
        check_entries(checkpoint, type(self.datamodule).__qualname__, path)

    def before_test(self) -> None:
        if not is_overridden("test_step", self.model):
            raise UserError(
                f"{type(self.model).__name__} has no error rates to test; use `hubert validate`, or fine-tune it first"
            )
        self._check_judged("test_loop")

    def after_test(self) -> None:
        if not self.trainer.is_global_zero:
            return
        assert self.model.results is not None
        folder, origin, whole = self.model.results
        write_json(folder / "test-metrics.json", _values(self.trainer.callback_metrics))
        scores = score(read_results(folder / "test.jsonl"))
        write_scores(folder / SCORES, scores, made_by=asdict(origin))
        if whole:
            copy_to_run(folder, Path(self.trainer.default_root_dir), ("test-metrics.json", SCORES))
        report(scores, Console())
        print(f"results in {folder}")
        _end_tracking(self.trainer)

    def after_validate(self) -> None:
        _end_tracking(self.trainer)

    def after_predict(self) -> None:
        _end_tracking(self.trainer)

    def after_fit(self) -> None:
        trainer = self.trainer
        if trainer.interrupted:
            return
        with held():
            self._keep_results(trainer)

    def _keep_results(self, trainer: Trainer) -> None:
        facts: dict[str, Any] = {"steps": trainer.global_step}
        if reason := _stopped_early(trainer):
            rank_zero_info(f"stopped early, after step {trainer.global_step}: {reason}")
            facts |= {"stopped_early": reason, "max_steps": trainer.max_steps}
        metrics = _values(trainer.callback_metrics) | facts
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveRunConfig):
                callback.metrics = metrics
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "last.ckpt", weights_only=False)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # the next iteration needs no more
            return
        if trainer.is_global_zero:
            write_json(Path(trainer.default_root_dir) / METRICS, metrics)
            _end_tracking(trainer)


def _say_whom_it_waits_for(trainer: Trainer) -> None:
    """Say where the processes of other nodes are awaited, if no launcher starts them: nothing else would."""
    nodes = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes > 1 and isinstance(nodes, LightningEnvironment) and is_first_process():
        ranks = "1" if trainer.num_nodes == 2 else f"1 to {trainer.num_nodes - 1}"
        rank_zero_info(
            f"waiting for {trainer.world_size} processes at {nodes.main_address}:{nodes.main_port}; start the same "
            f"command on the other node{'s' * (trainer.num_nodes > 2)} with NODE_RANK {ranks} and "
            "everywhere with the same MASTER_ADDR and MASTER_PORT, or use configs/launch/torchrun.sh"
        )


def _quieten(settings: dict[str, Any]) -> None:
    """Keep W&B from warning of what Lightning gives it: an option that is no more, and a folder that is yet to be."""
    if settings.get("anonymous") is None:
        settings.pop("anonymous", None)
    if is_first_process():
        Path(settings["dir"]).mkdir(parents=True, exist_ok=True)


def _end_tracking(trainer: Trainer) -> None:
    """End the runs of W&B: the next iteration, or a test of the same process, is a run of its own."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_table") and trainer.is_global_zero:
            logger.experiment.finish()  # type: ignore[attr-defined]


def _check_trial(scratch: Path) -> None:
    """Raise `UserError` if a folder, which a trial run empties, has anything in it that no trial run wrote."""
    theirs = [path for path in _content(scratch) if not is_unfinished(path)]
    if scratch.is_symlink() or (theirs and not (scratch / TRIAL).is_file()):
        raise UserError(
            f"{scratch}: a trial (fast_dev_run) would empty this folder, which none has made; rename it, or choose "
            "another --output"
        )


def _content(scratch: Path) -> list[Path]:
    """What is in the folder of a trial run besides its lock and the file that says what it is."""
    return [path for path in scratch.iterdir() if path.name not in (RUN_LOCK, TRIAL)] if scratch.is_dir() else []


def _empty(scratch: Path) -> None:
    for path in _content(scratch):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _sentences() -> Iterator[None]:
    """Turn what Lightning and others say of a mistake in the config into `UserError`s of one sentence."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"{_one_line(error)}; correct the config") from error
    except RuntimeError as error:
        if not str(error).startswith("Early stopping conditioned on metric"):
            raise
        raise UserError(f"EarlyStopping: {_one_line(error)}; correct its monitor") from error
    except ImportError as error:
        if str(error.name).startswith("hubert_lightning"):
            raise
        raise UserError(f"{_one_line(error)}; {INSTALL}") from error
    except ValueError as error:
        if "val_check_interval" in str(error) and not str(error).startswith("trainer."):
            raise UserError(
                f"trainer.val_check_interval: {_one_line(error)}; lower it, or set trainer.check_val_every_n_epoch to "
                "null to count batches over epochs"
            ) from error
        chain = [error, *_causes(error)]
        problem = next((one for one in chain if str(one).startswith("Problem with given class_path")), None)
        if problem is None or isinstance(chain[-1], UserError):
            raise
        way = INSTALL if isinstance(chain[-1], ImportError) else "correct the config"
        raise UserError(f"{_one_line(problem)}; {way}") from error


INSTALL = "install that package, or choose another class in the config (trainer.logger, trainer.callbacks)"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The errors that an error comes from, the first one last."""
    while cause := error.__cause__ or error.__context__:
        yield cause
        error = cause


def _one_line(error: BaseException) -> str:
    said = re.sub(r"<(?:[\w.]+\.)?(\w+) object at 0x[0-9a-f]+>", r"\1", str(error))
    return " ".join(said.split()).rstrip(".") or type(error).__name__


def _find_moved(config: Namespace, typed: list[str]) -> None:
    """Let the folder of a run be where its config lies, if the command names that and no other output."""
    given = [path for path in given_configs(typed) if path.name == CONFIG and any(path.parent.glob("*.ckpt"))]
    if not given or any(option.partition("=")[0] == "--output" for option in typed):
        return
    if (folder := given[-1].parent).resolve() != Path(config.output).resolve():
        log.info("%s: the run was moved here from %s", folder, config.output)
        config.output = str(folder)


def _given(args: ArgsType) -> Iterator[tuple[str, dict[str, Any]]]:
    """The options of each config that a command line names, and of the command line itself, by their dotted names."""
    typed = [str(arg) for arg in args] if isinstance(args, list) else []
    for path in given_configs(typed):
        content = yaml.safe_load(path.read_text()) if path.is_file() else None
        yield str(path), dict(_dotted(content or {}, ""))
    options = {}
    for arg, following in pairwise([*typed, ""]):
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            options[name] = value if equals else following
    yield "command line", options


def _dotted(value: dict[str, Any], start: str) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _dotted(inner, f"{start}{name}.")
        else:
            yield f"{start}{name}", inner


def _default_precision(trainer: Namespace) -> str | None:
    """bfloat16 where there is a GPU that computes in it."""
    gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else None


def _check_output(config: Namespace) -> None:
    """Raise `UserError` if the run has no end, or if its folder is none or one of the other kind of run."""
    folder, trainer = Path(config.output), config.trainer
    if not config.iterations and trainer.max_steps < 1 and (trainer.max_epochs or 0) < 1:
        raise UserError("nothing says when this fit ends; set trainer.max_steps, or the max_steps of iterations")
    if (clip := trainer.gradient_clip_val) is not None and clip < 0:
        raise UserError(
            f"trainer.gradient_clip_val is {clip}; it is the largest gradient to be allowed, 0 or null for any"
        )
    if trainer.gradient_clip_algorithm not in (None, "norm", "value"):
        raise UserError(f"trainer.gradient_clip_algorithm is {trainer.gradient_clip_algorithm}; choose norm or value")
    if config.iterations and config.ckpt_path:
        raise UserError(
            f"ckpt_path {config.ckpt_path} would be the start of every iteration; each goes on from its own last.ckpt, "
            "or name the checkpoint in the features of an iteration"
        )
    if config.iterations and (labels := config.data.init_args.get("labels")):
        raise UserError(
            f"data.labels {labels} and iterations, which make labels of their own, are both given; drop one"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, not a folder; choose another --output")
    other = sorted(folder.glob("*.ckpt" if config.iterations else "iteration*/config.yaml"))
    if other:
        raise UserError(f"{folder}: already holds another run ({other[0]}); choose another --output")


def _single_iterations(config: Namespace) -> Iterator[Namespace]:
    """The fits of one iteration each that a fit of several consists of."""
    if config.trainer.max_steps != -1:
        raise UserError(
            f"trainer.max_steps is {config.trainer.max_steps}, but each entry of iterations has its own; set it there"
        )
    if any(is_best(iteration.layer) for iteration in config.iterations):
        data = config.data.init_args
        check_phones(read_manifest(data.validation or data.train))
    for number, iteration in enumerate(config.iterations, start=1):
        _check_iteration(iteration, number, config.model.init_args.encoder.num_layers)
        one = copy.deepcopy(config)
        one.pop("config", None)
        one.iterations = []
        one.output = str(Path(config.output) / f"iteration{number}")
        previous = str(Path(config.output) / f"iteration{number - 1}" / "last.ckpt")
        recipe = _recipe(iteration, config.seed_everything).after(previous)
        relabel = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
        callback = Namespace(class_path=RELABEL, init_args=Namespace(relabel))
        one.trainer.callbacks = [*_listed(one.trainer.callbacks), callback]
        one.trainer.max_steps = iteration.max_steps
        clusters = recipe.num_clusters
        one.model.init_args.num_clusters = clusters[0] if len(clusters) == 1 else clusters
        if not is_fresh(iteration.weights):
            one.model.init_args.pretrained = previous if is_previous(iteration.weights) else iteration.weights
        for logger in _loggers(one):
            for key in ("name", "id"):
                if logger.init_args.get(key):
                    logger.init_args[key] += f"-iteration{number}"
        yield one


def _check_iteration(iteration: Iteration, number: int, num_layers: int) -> None:
    """Raise `UserError` for what would otherwise be found out when the iterations before it are trained."""
    name = f"iterations[{number - 1}]"
    if is_previous(iteration.features) and number == 1:
        raise UserError(f"{name}.features is 'previous', but nothing precedes it; say 'mfcc' or a path")
    if iteration.max_steps < 1:
        raise UserError(f"{name}.max_steps is {iteration.max_steps}; take at least one step, or drop the iteration")
    try:
        recipe = _recipe(iteration)
        recipe.check_layer(previous_layers=num_layers)
        _ = recipe.given
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if is_previous(iteration.weights) and number == 1:
        raise UserError(f"{name}.weights is 'previous', but nothing precedes it; say 'fresh' or a path")
    if not is_fresh(iteration.weights) and not is_previous(iteration.weights):
        try:
            encoder_config(iteration.weights)
        except ValueError as error:
            raise UserError(f"{name}.weights: {error}") from error


def _recipe(iteration: Iteration, seed: int = 0) -> LabelRecipe:
    """The labels of an iteration, which may come from the one before it."""
    return LabelRecipe(
        iteration.features,
        iteration.layer,
        iteration.clusters,
        iteration.parts,
        iteration.max_frames,
        iteration.kmeans,
        seed,
        iteration.quantizer,
    )


def _settle(config: Namespace) -> None:
    """Everything that a run writes goes to its folder."""
    config.trainer.default_root_dir = config.output
    config.checkpoint.dirpath = config.output
    for logger in _loggers(config):
        if "save_dir" in logger.init_args:
            logger.init_args.save_dir = config.output
    for callback in _listed(config.trainer.callbacks):
        if "dirpath" in callback.get("init_args", {}) and callback.init_args.dirpath is None:
            callback.init_args.dirpath = config.output


def _log_apart(config: Namespace, verb: str) -> Path:
    """Let a validation, test or prediction write to files and runs of its own: those of the fit stay as they are.

    Args:
        config: Config of the command.
        verb: "validate", "test" or "predict".

    Returns:
        Folder that it writes to.
    """
    model, data = config.model.init_args, config.data.init_args
    run = Path(config.output)
    folder = run / verb
    if verb in ("test", "predict") and data.get("test"):
        limit = config.trainer.get(f"limit_{verb}_batches")
        whole = limit is None or (isinstance(limit, float) and limit == 1.0)  # 1 is one batch
        folder = results_folder(run, verb, data.test, model.get("decoder"), config.ckpt_path, whole)
    check_files(folder)
    for logger in _loggers(config):
        settings = logger.init_args
        if "save_dir" in settings:
            settings.save_dir = str(folder)
        if "job_type" in settings or _has_id(logger):  # W&B
            settings.job_type = verb
            settings.group = settings.get("group") or settings.get("name") or settings.get("id")
            settings.name = f"{settings.get('name') or run.name}-{verb}-{folder.name}"
        for name in IDENTITIES:
            if name in settings:
                settings[name] = None
    return folder


def _keep_run_id(config: Namespace) -> None:
    """A run that goes on is the same run in W&B too: the config in its folder knows which."""
    folder, before = Path(config.output), None
    if any(folder.glob("*.ckpt")) and (folder / "config.yaml").exists():
        loggers = _listed(kept_config(folder)["trainer"]["logger"])
        before = next((logger["init_args"]["id"] for logger in loggers if _has_id(logger)), None)
    for logger in _loggers(config):
        if _has_id(logger) and not logger.init_args.id:
            logger.init_args.id = before or secrets.token_hex(4)


def _has_id(logger: Any) -> bool:
    return not isinstance(logger, bool) and "id" in logger.get("init_args", {})


def _loggers(config: Namespace) -> list[Namespace]:
    return [logger for logger in _listed(config.trainer.logger) if isinstance(logger, Namespace)]


def _listed(one_or_several: Any) -> list[Any]:
    if one_or_several is None:
        return []
    return list(one_or_several) if isinstance(one_or_several, list) else [one_or_several]


def _finished(config: Namespace) -> bool:
    """Whether all steps are done, or as many were asked for as when the run stopped early."""
    metrics = kept_metrics(Path(config.output))
    if "stopped_early" in metrics:
        before, asked = metrics["max_steps"], config.trainer.max_steps
        return before < 1 or 0 < asked <= before
    return 0 < config.trainer.max_steps <= metrics.get("steps", 0)


def _finished_already(config: Namespace, output: Path) -> str:
    if reason := kept_metrics(Path(config.output)).get("stopped_early"):
        return (
            f"{output}: finished already, stopped early ({reason}); to go on, raise max_steps, and the patience of "
            "EarlyStopping or leave it out; for a new run choose another --output"
        )
    return f"{output}: finished already (metrics.json); for a new run choose another --output"


def _stopped_early(trainer: Trainer) -> str | None:
    """What EarlyStopping says why it ended the run, if it did."""
    done = 0 < trainer.max_steps <= trainer.global_step
    if done or not trainer.should_stop:
        return None
    reasons = [callback.stopping_reason_message for callback in trainer.early_stopping_callbacks]
    return next((" ".join(reason.split()) for reason in reasons if reason), None)


def _experiment(config: dict[str, Any], by_content: bool) -> dict[str, Any]:
    """What makes a run the one that it is: not where it runs, how fast, or what it logs.

    Args:
        config: Config of the run.
        by_content: Whether its checkpoints tell which manifests and labels it has, whose paths may change then.

    Returns:
        What two configs of one run have in common.
    """
    callbacks = _listed(config["trainer"]["callbacks"])
    relabel = [
        dict(callback.get("init_args", {})) for callback in callbacks if callback["class_path"].endswith("Relabel")
    ]
    for labels in relabel:
        if not is_mfcc(labels.get("features", "")):
            labels["features"] = "a checkpoint"  # whose path changes with the run's; Relabel compares what is in it
        if labels.get("quantizer"):
            labels["quantizer"] = "a file"  # likewise
    experiment: dict[str, Any] = {key: copy.deepcopy(config.get(key)) for key in ("seed_everything", "model", "data")}
    for option in CHANGEABLE_ON_RESUME:
        experiment["model"]["init_args"].pop(option, None)
    for option in ("test", *(("train", "validation", "weights", "labels") if by_content else ())):
        experiment["data"]["init_args"].pop(option, None)
    if experiment["model"]["init_args"].get("warmup_steps") is not None:
        experiment["model"]["init_args"].pop("warmup", None)  # the share that this number replaces
    if experiment["model"]["init_args"].get("pretrained"):
        experiment["model"]["init_args"]["pretrained"] = "a checkpoint"  # as are those of the features, below
    return experiment | {"labels": relabel[0] if relabel else None}


def _checkpoint_to_judge(folder: Path) -> str:
    best = folder / "best.ckpt"
    if found := best if best.exists() else newest_checkpoint(folder):
        return str(found)
    if iterations := sorted(folder.glob("iteration*/config.yaml")):
        raise UserError(
            f"{folder}: holds several iterations; choose one by its config, as in --config {iterations[-1]}"
        )
    raise UserError(f"{folder}: holds no best.ckpt or last.ckpt; fit first, or name a checkpoint with --ckpt_path")


def _check_kind(path: Path, class_path: str) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; correct --ckpt_path")
    stated = read_checkpoint(path).get("hyper_parameters") or {}
    if not isinstance(stated, dict):
        raise UserError(f"{path}: its hyper_parameters are no settings; take another checkpoint")
    check_kind(stated, class_path.rsplit(".", 1)[-1], path)


def _values(metrics: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.item() for name, value in metrics.items()}


def _first_difference(kept: dict[str, Any], asked: dict[str, Any]) -> str | None:
    return next((found for key in kept for found in _differences(kept[key], asked[key], key)), None)


def _differences(kept: Any, asked: Any, key: str) -> Iterator[str]:
    if isinstance(kept, dict) and isinstance(asked, dict):
        for name in sorted(kept.keys() | asked.keys()):
            new = name not in kept and not asked[name]  # an option that there was not, and that is not used
            if name != "num_workers" and not new:
                yield from _differences(kept.get(name), asked.get(name), f"{key}.{name}")
    elif kept != asked:
        yield f"{key} ({kept} there, {asked} here)"
