"""LightningCLI for our tasks: parses a command line, and builds and runs what its config describes."""

import os
from argparse import SUPPRESS
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hubert_lightning.asr.language_scores import metrics_by_name, write_scores
from hubert_lightning.asr.results import SCORES, copy_to_run
from hubert_lightning.asr.score_report import report
from hubert_lightning.asr.scoring import read_results, score
from hubert_lightning.data.workers import share_threads
from hubert_lightning.errors import UserError
from hubert_lightning.files import check_regular
from hubert_lightning.first_process import is_first_process
from hubert_lightning.interrupts import held
from hubert_lightning.model.devices import keep_freed_memory, set_float32_precision
from hubert_lightning.parsing import check_typed, given_configs
from hubert_lightning.pretrained.formats.own import read_checkpoint
from hubert_lightning.progress_bar import hidden_bars
from hubert_lightning.training import library_errors
from hubert_lightning.training.arguments import check_arguments, check_ignored
from hubert_lightning.training.callbacks import stalls
from hubert_lightning.training.callbacks.alerts import RunAlerts
from hubert_lightning.training.callbacks.collapse import CollapseWatch
from hubert_lightning.training.callbacks.pictures import Pictures
from hubert_lightning.training.callbacks.preemption import Preemption
from hubert_lightning.training.callbacks.progress import RunProgress
from hubert_lightning.training.callbacks.run_record import RunRecord
from hubert_lightning.training.callbacks.stalls import StalledRanks
from hubert_lightning.training.callbacks.throughput import Throughput
from hubert_lightning.training.callbacks.whole_steps import WholeSteps
from hubert_lightning.training.checkpoints import (
    WholeCheckpoints,
    finished_checkpoint,
    newest_checkpoint,
    set_corrupt_aside,
)
from hubert_lightning.training.iterations import Iteration
from hubert_lightning.training.lightning_internals import wandb_arguments
from hubert_lightning.training.media import check_drawing
from hubert_lightning.training.metrics_table import keep_rows, keeps_table, table_logger
from hubert_lightning.training.optimizer_state import probe_optimizer
from hubert_lightning.training.parser import KEYS_OF_RECIPE, SentenceParser
from hubert_lightning.training.restoring import check_weights, model_arguments
from hubert_lightning.training.run_config import (
    SaveRunConfig,
    check_checkpoint,
    checkpoint_to_judge,
    continued_run,
    default_precision,
    follow_moved_run,
    given_options,
    kept_run_id,
    listed,
)
from hubert_lightning.training.run_folder import METRICS, check_files, names_manifests, restore_given_config, write_json
from hubert_lightning.training.run_identity import early_stop
from hubert_lightning.training.run_state import check_entries, check_run, check_state, check_steps
from hubert_lightning.training.wandb_runs import is_wandb, log_once

Verb = Literal["fit", "validate", "test", "predict"]


class HubertCLI(LightningCLI):
    """LightningCLI in subclass mode for any of our models with its data.

    The constructor parses the command line. `train` and `run` build and run what a config describes, as often as there
    are iterations. The option `checkpoint` keeps `last.ckpt`, from which a run resumes; other checkpoints are kept by
    callbacks in YAML.

    Args:
        verb: Method of the Trainer.
        args: Command line after the verb.
    """

    def __init__(self, verb: Verb, args: ArgsType) -> None:
        self.verb = verb
        self._title = ""
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={"use_distributed_sampler": False},  # our batches are dealt to ranks already
            seed_everything_default=0,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # both tasks make their own, with its schedule
            parser_class=SentenceParser,
            parser_kwargs={"prog": f"hubert {verb}"},
            args=args,
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=str, default="checkpoints/run", help="Folder of the run.")
        parser.add_argument(
            "--iterations", type=list[Iteration], default=[], help="Iterations of pre-training, in order."
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(StalledRanks, "stalls")
        parser.add_lightning_class_args(Pictures, "pictures")
        parser.set_defaults(
            {
                "checkpoint.filename": "last",
                "checkpoint.every_n_train_steps": 500,
                "checkpoint.enable_version_counter": False,
            }
        )
        for name in KEYS_OF_RECIPE:  # configs that LightningCLI wrote have these keys, without a value
            parser.add_argument(f"--{name}", type=Any, default=None, help=SUPPRESS)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        skip: set[str | int] = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}
        skip &= self.subcommands()[self.verb]
        self._verb_options = parser.add_method_arguments(Trainer, self.verb, skip=skip)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        typed = [str(arg) for arg in args] if isinstance(args, list) else []
        for path in given_configs(typed):
            check_regular(path)
            restore_given_config(path)
        check_typed(typed)
        super().parse_arguments(parser, args)
        config = self.config
        follow_moved_run(config, typed)
        check_arguments(config, self.verb)
        check_files(Path(config.output))
        check_ignored(config, given_options(typed))
        config.weights_only = True  # a checkpoint is data, never code
        if config.ckpt_path == "last":
            config.ckpt_path = None  # the last one is the default
        if self.verb != "fit":
            config.ckpt_path = config.ckpt_path or checkpoint_to_judge(Path(config.output))
        if config.ckpt_path:
            check_checkpoint(Path(config.ckpt_path), config.model.class_path)
        if self.verb != "fit":
            self.config = self._with_settings_of_checkpoint(config)

    def _with_settings_of_checkpoint(self, config: Namespace) -> Namespace:
        """Take the model's settings from its checkpoint for an evaluation; a fit takes them from its config."""
        module, _, name = config.model.class_path.rpartition(".")
        task = getattr(import_module(module), name)  # the config's task, whatever the checkpoint names
        stated = model_arguments(task, read_checkpoint(Path(config.ckpt_path)), Path(config.ckpt_path))
        model = {"class_path": config.model.class_path, "init_args": stated}
        judged: Namespace = self.parser.parse_object({"model": model}, config)
        return judged

    def _set_seed(self) -> None:
        """Set the seed without a message: the config and record.json state it."""
        seed_everything(self.config.seed_everything, workers=True, verbose=False)

    def instantiate_classes(self) -> None:
        """Build nothing yet: `build` builds each run of the command."""

    def train(self, config: Namespace, title: str = "training") -> None:
        """Train one run, from its newest checkpoint if it has one.

        Args:
            config: Config of the run.
            title: Name of the run beside its progress bar.
        """
        self._title = title
        folder = Path(config.output)
        config.trainer.precision = config.trainer.precision or default_precision(config.trainer)
        seed_everything(config.seed_everything, workers=True, verbose=False)  # whatever ran before in this process
        if not config.ckpt_path and (newest := newest_checkpoint(folder)):
            config.ckpt_path = str(newest)
            if is_first_process():
                set_corrupt_aside(folder, newest)
        elif not config.ckpt_path and (before := continued_run(config)):
            config.ckpt_path = str(finished_checkpoint(before))
        self.run(config)

    def run(self, config: Namespace) -> None:
        """Build a run, check its checkpoint, and call the Trainer's method of the verb."""
        set_float32_precision()
        self.build(config)
        share_threads(self.trainer.num_devices)
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        shows = self.config_init["trainer"].get("enable_progress_bar") is not False
        with library_errors.config_errors(), nullcontext() if shows else hidden_bars():
            self.check()
            options = {name: self.config_init[name] for name in self._verb_options}
            if "verbose" in options:
                options["verbose"] = False  # Lightning's table; ours follows
            getattr(self.trainer, self.verb)(self.model, datamodule=self.datamodule, **options)
            getattr(self, f"_after_{self.verb}", lambda: _end_tracking(self.trainer))()
        stalls.end("")

    def build(self, config: Namespace) -> None:
        """Build model, data and Trainer.

        Raises:
            UserError: A class refuses a value of the config.
        """
        self.config = config
        vars(self).pop("config_dump", None)  # LightningCLI's copy of the config of the iteration before
        # The last of them saves what the others have logged
        self.trainer_defaults["callbacks"] = [
            WholeSteps(),
            RunRecord(),
            Throughput(),
            CollapseWatch(),
            RunAlerts(),
            Preemption(),
        ]
        with library_errors.config_errors():
            super().instantiate_classes()
        make = getattr(self.model, "optimizer", None)
        if isinstance(make, partial) and make.args and isinstance(make.args[-1], type):
            # jsonargparse's own holds its parser, which cannot be copied: callbacks copy the model
            self.model.optimizer = partial(make.args[-1], **make.keywords)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        plugins = listed(self.config_init["trainer"].get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(WholeCheckpoints())
        self._add_progress()
        try:
            if self.verb == "fit" and self.config_init["trainer"].get("logger") in (None, True, False):
                kwargs["logger"] = False  # our own table takes the place of Lightning's default
            trainer = super().instantiate_trainer(plugins=plugins, **kwargs)
        except (TypeError, ValueError) as error:  # such as a strategy that the accelerator does not have
            raise UserError(f"trainer: {library_errors.one_line(error)}; correct the config") from error
        _keep_table(trainer, self.verb)
        for logger in trainer.loggers:
            if (settings := wandb_arguments(logger)) is not None:
                _prepare_wandb(settings)
        if self.verb == "fit":
            check_drawing(trainer)
        _print_awaited_nodes(trainer)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.sort(key=lambda callback: not isinstance(callback, StalledRanks))  # notes first which batch begins
        for callback in callbacks:
            if isinstance(callback, StalledRanks):
                callback.attach(trainer)
        return trainer

    def _add_progress(self) -> None:
        """Add our progress bar, unless the config has another one, or none."""
        settings = self.config_init["trainer"]
        others = any(isinstance(callback, ProgressBar) for callback in listed(settings.get("callbacks")))
        if not others and settings.get("enable_progress_bar") is not False and not settings.get("barebones"):
            self.trainer_defaults["callbacks"].append(RunProgress(self._title))

    def check(self) -> None:
        """Check the optimizer and the checkpoint of the run.

        Raises:
            UserError: The optimizer cannot be made, or the checkpoint cannot be resumed from or evaluated.
        """
        if self.verb == "fit":
            self._check_fit()
            return
        if self.verb == "test" and not is_overridden("test_step", self.model):
            raise UserError(
                f"{type(self.model).__name__} has no error rates to test; use `hubert validate`, or fine-tune it first"
            )
        path = Path(self.config_init.ckpt_path)
        checkpoint = read_checkpoint(path)
        check_weights(self.model, checkpoint, path)
        check_state(self.trainer, checkpoint, path, f"{self.verb}_loop")
        check_entries(checkpoint, type(self.datamodule).__qualname__, path)

    def _check_fit(self) -> None:
        for logger in self.trainer.loggers:
            if logger.log_dir:
                check_files(Path(logger.log_dir))
        if make := getattr(self.model, "optimizer", None):
            probe_optimizer(make)
        if self.config_init.ckpt_path:
            path = Path(self.config_init.ckpt_path)
            checkpoint = read_checkpoint(path)
            if not names_manifests(path, self.config.data.class_path):
                rank_zero_info(f"{path}: does not record the manifests of its training, so they are not compared")
            vocabulary = model_arguments(type(self.model), checkpoint, path).get("vocabulary")
            if vocabulary and vocabulary != self.model.hparams.get("vocabulary"):
                raise UserError(
                    f"{path}: its CTC head has another vocabulary than the model to train; give both the same "
                    "model.init_args.vocabulary, or start from its encoder alone by model.init_args.pretrained"
                )
            if "optimizer_states" not in checkpoint:
                raise UserError(
                    f"{path}: weights alone, such as an average, so no run can resume from it; start another from its "
                    "encoder (model.init_args.pretrained)"
                )
            check_weights(self.model, checkpoint, path)
            check_state(self.trainer, checkpoint, path, "fit_loop")
            check_steps(self.trainer.max_steps, checkpoint, path)
            check_entries(checkpoint, type(self.datamodule).__qualname__, path)
            if make:
                check_run(self.model, make, checkpoint, path)
            repeated: dict[int, set[str]] = {}
            for logger in self.trainer.loggers:
                if isinstance(logger, CSVLogger):
                    repeated |= keep_rows(logger, checkpoint)
            for logger in self.trainer.loggers:
                if isinstance(logger, WandbLogger) and logger.version == kept_run_id(path.parent):
                    log_once(logger, repeated)

    def _after_validate(self) -> None:
        if self.trainer.is_global_zero and self.config_init.verbose:
            table = Table("measure", "value")
            for name, value in sorted(_values(self.trainer.callback_metrics).items()):
                table.add_row(name, f"{value:.6g}")
            Console().print(table)
        _end_tracking(self.trainer)

    def _after_test(self) -> None:
        if not self.trainer.is_global_zero:
            return
        assert self.model.results is not None
        folder, origin, whole = self.model.results
        write_json(folder / "test-metrics.json", _values(self.trainer.callback_metrics))
        scores = score(read_results(folder / "test.jsonl"))
        write_scores(folder / SCORES, scores, made_by=asdict(origin))
        if whole:
            copy_to_run(folder, Path(self.trainer.default_root_dir), ("test-metrics.json", SCORES))
        if metrics := metrics_by_name(scores):
            for logger in self.trainer.loggers:
                logger.log_metrics(metrics, step=origin.step or 0)
                logger.save()
        report(scores, Console())
        print(f"results in {folder}")
        _end_tracking(self.trainer)

    def _after_predict(self) -> None:
        if self.trainer.is_global_zero and self.model.results is not None:
            print(f"results in {self.model.results[0] / 'predict.jsonl'}")
        _end_tracking(self.trainer)

    def _after_fit(self) -> None:
        if not self.trainer.interrupted:
            with held():
                self._keep_results(self.trainer)

    def _keep_results(self, trainer: Trainer) -> None:
        facts: dict[str, Any] = {"steps": trainer.global_step}  # JSON values
        if reason := early_stop(trainer):
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


def _print_awaited_nodes(trainer: Trainer) -> None:
    """Print how to start the processes of other nodes, if no launcher starts them."""
    nodes = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes > 1 and isinstance(nodes, LightningEnvironment) and is_first_process():
        ranks = "1" if trainer.num_nodes == 2 else f"1 to {trainer.num_nodes - 1}"
        rank_zero_info(
            f"waiting for {trainer.world_size} processes at {nodes.main_address}:{nodes.main_port}; start the same "
            f"command on the other node{'s' * (trainer.num_nodes > 2)} with NODE_RANK {ranks} and "
            "everywhere with the same MASTER_ADDR and MASTER_PORT, or use configs/launch/torchrun.sh"
        )


def _keep_table(trainer: Trainer, verb: Verb) -> None:
    """Let a fit keep metrics.csv in its folder, whatever its loggers are."""
    folder, is_trial = Path(trainer.default_root_dir), trainer.fast_dev_run  # type: ignore[attr-defined]  # undeclared
    if verb == "fit" and not is_trial and not any(keeps_table(logger, folder) for logger in trainer.loggers):
        trainer.loggers = [*trainer.loggers, table_logger(folder)]


def _prepare_wandb(settings: dict[str, Any]) -> None:
    """Keep W&B from warning about Lightning's arguments, and from failing on a busy machine.

    The warnings are about a removed option, and a folder that does not exist yet. The variable is W&B's setting of the
    seconds within which its own process must start, 30 by default.
    """
    os.environ.setdefault("WANDB__SERVICE_WAIT", "300")
    if settings.get("anonymous") is None:
        settings.pop("anonymous", None)
    if is_first_process():
        Path(settings["dir"]).mkdir(parents=True, exist_ok=True)


def _end_tracking(trainer: Trainer) -> None:
    """End the runs of W&B: the next iteration, or a test of the same process, is a run of its own."""
    for logger in trainer.loggers:
        if is_wandb(logger) and trainer.is_global_zero:
            logger.experiment.finish()  # type: ignore[attr-defined]


def _values(metrics: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.item() for name, value in metrics.items()}
