"""Private parts of Lightning and torch are where `training/lightning_internals.py` looks for them."""

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor, nn
from torch.autograd import graph
from torch.distributed import c10d_logger
from torch.distributed.constants import default_pg_timeout
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, dataloader

from hubert_lightning.training import lightning_internals as internals


@contextlib.contextmanager
def needs(*private: str, of: str = "Lightning") -> Iterator[None]:
    """Name the private things behind a failure."""
    try:
        yield
    except (AssertionError, AttributeError, ImportError, KeyError, TypeError) as error:
        names = " or ".join(private)
        pytest.fail(
            f"{of}'s {names} has moved in this version: correct hubert_lightning/training/lightning_internals.py "
            f"({type(error).__name__}: {error})"
        )


class Line(LightningModule):
    """One weight, trained by steps of three batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.noted: list[Any] = []

    def training_step(self, batch: Tensor) -> Tensor:
        return (self.weight * batch).sum()

    def validation_step(self, batch: Tensor) -> None:
        self.noted.append("validated")

    def on_train_batch_end(self, *_: object) -> None:
        self.noted.append((internals.batches_trained(self.trainer), internals.validation_follows(self.trainer)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet(folder: Path, **settings: Any) -> Trainer:
    settings = {"accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0} | settings
    return Trainer(default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, **settings)


def fitted(folder: Path, model: Line, change: Callable[[Trainer], object] = lambda trainer: None) -> Trainer:
    data = DataLoader(torch.ones(12, 1), batch_size=1)
    trainer = quiet(folder, max_steps=2, accumulate_grad_batches=3, val_check_interval=6, limit_val_batches=1)
    change(trainer)
    trainer.fit(model, data, data)
    return trainer


LOOP_PARTS = (
    "fit_loop._data_fetcher",
    "fit_loop.epoch_loop._should_accumulate",
    "fit_loop.epoch_loop._should_check_val_fx",
    "fit_loop.epoch_loop._skip_next_val",
    "fit_loop.epoch_loop._on_before_fetch",
    "fit_loop.epoch_loop._on_after_fetch",
    "fit_loop.epoch_loop._broadcast_sigterm_tensor",
    "fit_loop.epoch_loop.advance",
    "fit_loop.epoch_loop.max_steps",
    "fit_loop.epoch_loop.batch_progress.total.processed",
    "_signal_connector.register_signal_handlers",
)


@pytest.mark.parametrize("name", LOOP_PARTS)
def test_the_trainer_has_the_parts_that_are_read_or_replaced(name: str, tmp_path: Path) -> None:
    with needs(f"Trainer.{name}"):
        *owners, part = name.split(".")
        owner = attrgetter(".".join(owners))(quiet(tmp_path)) if owners else quiet(tmp_path)
        assert hasattr(owner, part)


def test_batches_are_counted_and_a_validation_is_announced(tmp_path: Path) -> None:
    model = Line()
    with needs("Trainer.fit_loop.epoch_loop.batch_progress", "_should_accumulate", "_should_check_val_fx"):
        fitted(tmp_path, model)
        assert model.noted == [*((number, False) for number in range(1, 6)), (6, True), "validated"]


def test_each_fetch_of_a_batch_is_timed(tmp_path: Path) -> None:
    events: list[str] = []
    with needs("_TrainingEpochLoop._on_before_fetch", "_on_after_fetch"):
        fitted(tmp_path, Line(), lambda trainer: internals.time_fetches(
            trainer, lambda: events.append("before"), lambda: events.append("after")
        ))  # fmt: skip
        assert events == ["before", "after"] * (len(events) // 2)
        assert len(events) >= 2 * 6


def test_the_first_turn_of_the_loop_is_the_end_of_a_step(tmp_path: Path) -> None:
    class Resumed(Line):
        def on_train_start(self) -> None:
            internals.begin_with_end_of_step(self.trainer, validate=False, max_steps=1)

    model = Resumed()
    with needs("_TrainingEpochLoop.advance", "max_steps"):
        trainer = fitted(tmp_path, model)
        assert trainer.global_step == 1
        assert [note[0] for note in model.noted] == [1, 2, 3]


def test_neither_signal_handlers_nor_questions_to_rank_0_are_left(tmp_path: Path) -> None:
    def change(trainer: Trainer) -> None:
        internals.leave_signals(trainer)
        internals.ask_for_no_signals(trainer)

    with needs("_SignalConnector.register_signal_handlers", "_TrainingEpochLoop._broadcast_sigterm_tensor"):
        trainer = fitted(tmp_path, Line(), change)
        assert not trainer._signal_connector._original_handlers


def test_a_checkpoint_counts_as_it_did(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, Line())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    with needs("checkpoint['loops']['fit_loop']"):
        assert internals.count_whole_steps(checkpoint, before=3, accumulate=1) == 2
        assert internals.optimizer_steps(checkpoint) == checkpoint["global_step"] == 2
        loops = checkpoint["loops"]["fit_loop"]
        assert loops["epoch_loop.batch_progress"]["total"]["processed"] == 2
        assert loops["epoch_loop.state_dict"] == {"_batches_that_stepped": 1}


def test_early_stopping_waits_for_the_validation(tmp_path: Path) -> None:
    stopping = EarlyStopping("val/loss", check_on_train_epoch_end=True)
    with needs("EarlyStopping._check_on_train_epoch_end"):
        assert stopping._check_on_train_epoch_end is True
        internals.stop_after_validation(stopping)
        stopping.setup(quiet(tmp_path), Line(), "fit")
        assert stopping._check_on_train_epoch_end is False


def test_the_learning_rate_finder_is_known_by_its_callback(tmp_path: Path) -> None:
    with needs("lightning.pytorch.tuner.lr_finder._LRCallback"):
        finder = internals._LRCallback(num_training=2)
        assert internals.tries_learning_rates(quiet(tmp_path, callbacks=[finder]))
        assert not internals.tries_learning_rates(quiet(tmp_path))


def test_launched_processes_are_listed_by_the_launcher(tmp_path: Path) -> None:
    strategy = quiet(tmp_path, strategy="ddp", devices=1).strategy
    with needs("_SubprocessScriptLauncher.procs", "Strategy._launcher"):
        assert isinstance(strategy, DDPStrategy)
        assert strategy.cluster_environment is not None
        strategy._launcher = launcher = _SubprocessScriptLauncher(strategy.cluster_environment, 2, 1)
        process: Any = object()
        launcher.procs.append(process)
        assert internals.take_launched_processes(strategy) == [process]
        assert launcher.procs == []


def test_the_time_out_of_a_strategy_is_replaced_unless_it_was_given() -> None:
    with needs("Strategy._timeout"):
        for given, expected in ((default_pg_timeout, timedelta(hours=1)), (timedelta(minutes=7), timedelta(minutes=7))):
            for strategy in (DDPStrategy(timeout=given), ModelParallelStrategy(timeout=given)):
                assert strategy._timeout == given
                internals.extend_timeout(strategy, 3600)
                assert strategy._timeout == expected


def test_the_groups_of_a_sharded_model_are_all_ranks(tmp_path: Path) -> None:
    strategy = ModelParallelStrategy()
    strategy.parallel_devices = [torch.device("cpu")] * 2
    strategy.num_nodes = 3
    with needs("ModelParallelStrategy._data_parallel_size", "_tensor_parallel_size"):
        assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == ("auto", "auto")
        internals.shard_over_all_ranks(strategy)
        assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (6, 1)


def test_ddp_keeps_whether_it_looks_for_unused_parameters() -> None:
    with needs("DDPStrategy._ddp_kwargs"):
        assert internals.finds_unused_parameters(DDPStrategy(find_unused_parameters=True))
        assert not internals.finds_unused_parameters(DDPStrategy())


def test_the_store_by_which_ranks_met_is_found() -> None:
    with needs("distributed_c10d._get_default_store", "Store.clone", of="torch"):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            store = internals.connect_to_store()
            store.set("key", "value")
            assert internals.connect_to_store().get("key") == b"value"
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize(
    ("module", "what"),
    [(dataloader, internals.DATA), (c10d_logger, internals.OTHERS), (graph, internals.BACKWARD)],
)
def test_functions_that_wait_are_known_by_their_source_files(module: Any, what: str) -> None:
    with needs(module.__name__, of="torch"):
        frame = eval(compile("sys._getframe()", module.__file__, "eval"), {"sys": __import__("sys")})
        assert internals.waiting_in(frame) == what


def test_a_csv_logger_continues_a_table(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    table = tmp_path / internals.METRICS_TABLE
    table.write_text("loss,step\n3.0,1\n")
    with needs("CSVLogger._experiment", "ExperimentWriter.metrics_file_path", "metrics_keys"):
        internals.continue_table(logger, str(table), ["loss", "step"])
        logger.log_metrics({"loss": 2.0}, step=2)
        logger.save()
        assert table.read_text() == "loss,step\n3.0,1\n2.0,2\n"


def test_the_arguments_of_a_wandb_logger_are_found(tmp_path: Path) -> None:
    with needs("WandbLogger._wandb_init"):
        found = internals.wandb_arguments(WandbLogger(save_dir=tmp_path, name="mine", offline=True))
        assert found is not None
        assert found["name"] == "mine"
        assert "dir" in found
    assert internals.wandb_arguments(CSVLogger(tmp_path)) is None


def test_a_fused_optimizer_skips_a_step_by_itself() -> None:
    with needs("Optimizer._step_supports_amp_scaling", "found_inf", of="torch"):
        weight = nn.Parameter(torch.ones(3))
        optimizer: Any = AdamW([weight], fused=True)
        assert internals.is_fused(optimizer)
        assert not internals.is_fused(AdamW([weight]))
        weight.grad = torch.ones(3)
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        assert weight.eq(1).all()


def test_a_fused_optimizer_scales_the_gradients_of_its_step() -> None:
    with needs("grad_scale", of="torch"):
        gradient, factor = torch.linspace(-2, 2, 7), torch.tensor(3e-4)
        weights = [nn.Parameter(torch.ones(7)) for _ in range(2)]
        optimizers: list[Any] = [SGD([weight], lr=1.0, fused=True) for weight in weights]
        weights[0].grad, weights[1].grad = gradient.clone(), gradient * factor
        internals.scale_in_step(optimizers[0], factor)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(weights[0], weights[1])


def test_several_tensors_are_multiplied_by_one_factor() -> None:
    with needs("torch._foreach_mul_", of="torch"):
        tensors = [torch.ones(2), torch.ones(3, 3)]
        internals.multiply_in_place(tensors, torch.tensor(2.0))
        assert all(tensor.eq(2).all() for tensor in tensors)


def test_the_sentence_of_a_failure_names_what_has_moved() -> None:
    sentence = r"Lightning's Trainer\.x has moved in this version: correct hubert_lightning/training/"
    with pytest.raises(pytest.fail.Exception, match=sentence), needs("Trainer.x"):
        raise AttributeError("x")
