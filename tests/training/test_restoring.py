"""A checkpoint is checked before it is used: names in it import nothing, and corrupt entries are one sentence."""

import copy
import functools
import io
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMOKE, SMOKE_FINETUNE, pretraining_options, refused, transcribed_options
from lightning import LightningModule
from torch import nn
from torch.optim import Optimizer

from hubert_lightning.cli import main
from hubert_lightning.training.finetuning import CTCFinetuning
from hubert_lightning.training.hubert_cli import HubertCLI
from hubert_lightning.training.pretraining import HubertPretraining
from hubert_lightning.training.run_state import check_run


@pytest.fixture(scope="module")
def runs(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training of one iteration and a fine-tuning, two steps each."""
    folder = tmp_path_factory.mktemp("runs")
    main(["fit", *SMOKE, *pretraining_options(manifests), f"--output={folder / 'pre'}"])
    fine = ["fit", *SMOKE_FINETUNE, *transcribed_options(manifests), f"--output={folder / 'fine'}"]
    main(
        [*fine, "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/wer"]
    )
    return folder


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that a module `foreign_module`, which can be imported here, writes when it is."""
    (tmp_path / "modules").mkdir()
    written = tmp_path / "trace"
    (tmp_path / "modules/foreign_module.py").write_text(
        f"open({str(written)!r}, 'w')\n"
        "from torch.optim import AdamW as Optimizer\n"
        "from hubert_lightning import HubertPretraining, CTCFinetuning, EncoderConfig\n"
        "from lightning.pytorch.cli import instantiate_module\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield written
    sys.modules.pop("foreign_module", None)


def changed(path: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, out)
    return out


def sentence_of(action: Callable[[], Any], capsys: pytest.CaptureFixture) -> str:
    """The sentence that an action is refused with, or "nothing"."""
    capsys.readouterr()
    try:
        action()
    except ValueError as error:
        return str(error)
    except SystemExit as stopped:
        return capsys.readouterr().err.splitlines()[-1] if stopped.code == 2 else f"exit {stopped.code}"
    return "nothing"


def of_settings(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["hyper_parameters"].update(values)


FOREIGN: dict[str, Callable[[dict[str, Any]], None]] = {
    "class": of_settings(_class_path="foreign_module.HubertPretraining"),
    "class and arguments": of_settings(class_path="foreign_module.HubertPretraining", init_args={}),
    "instantiator": of_settings(_instantiator="foreign_module.instantiate_module"),
    "optimizer": of_settings(optimizer={"class_path": "foreign_module.Optimizer"}),
    "optimizer's name": of_settings(optimizer="foreign_module.Optimizer"),
    "encoder": of_settings(encoder={"class_path": "foreign_module.EncoderConfig", "init_args": {}}),
    "inside the encoder": of_settings(encoder={"dim": {"class_path": "foreign_module.EncoderConfig"}}),
    "vocabulary": of_settings(vocabulary={"class_path": "foreign_module.EncoderConfig", "init_args": {}}),
    "clusters": of_settings(num_clusters={"class_path": "foreign_module.EncoderConfig"}),
    "pretrained": of_settings(pretrained="foreign_module.EncoderConfig", keep_head=True),
    "extra": of_settings(surprise={"class_path": "foreign_module.EncoderConfig"}, masked_wait=3),
    "all": of_settings(encoder="foreign_module.EncoderConfig", decoder={"class_path": "foreign_module.EncoderConfig"}),
}


@pytest.mark.parametrize(
    ("verb", "change"),
    [(verb, change) for change in FOREIGN for verb in (["validate", "test"] if change == "all" else ["validate"])]
    + [("predict", "vocabulary"), ("test", "encoder")],
)
def test_a_class_that_a_checkpoint_names_is_not_imported(
    verb: str, change: str, runs: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = runs / ("pre/iteration1" if verb == "validate" else "fine")
    path = changed(run / "last.ckpt", tmp_path / "foreign.ckpt", FOREIGN[change])
    command = [verb, "--config", str(run / "config.yaml"), f"--ckpt_path={path}", f"--output={tmp_path / 'out'}"]
    if verb == "validate":
        command += [f"--data.init_args.labels={run / 'labels'}", "--trainer.callbacks=null"]
    assert sentence_of(lambda: main(command), capsys).startswith((f"hubert: {path}", "nothing"))
    for task in (HubertPretraining, CTCFinetuning):
        assert sentence_of(lambda task=task: task.load_from_checkpoint(path), capsys).startswith((str(path), "nothing"))
    assert not trace.exists()
    assert "foreign_module" not in sys.modules


@pytest.mark.slow
def test_a_fit_imports_nothing_that_a_checkpoint_names(
    runs: Path, manifests: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for number, (name, change) in enumerate(FOREIGN.items()):
        path = changed(runs / "fine/last.ckpt", tmp_path / f"{number}.ckpt", change)
        more = [f"--ckpt_path={path}", f"--output={tmp_path / f'run{number}'}", "--trainer.max_steps=3"]
        message = sentence_of(lambda: main(["fit", *SMOKE_FINETUNE, *transcribed_options(manifests), *more]), capsys)  # noqa: B023
        assert message.startswith((f"hubert: {path}", "nothing")), name
        assert not trace.exists(), name


LOOP = ("loops", "fit_loop")
BATCHES = (*LOOP, "epoch_loop.batch_progress")
STEPS = (*LOOP, "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total")
STATE, GROUP, SCHEDULE = (
    ("optimizer_states", 0, "state"),
    ("optimizer_states", 0, "param_groups", 0),
    ("lr_schedulers", 0),
)
GONE = object()
INFINITE = torch.full((29, 32), torch.inf)
DAMAGE: list[tuple[tuple[Any, ...], Any]] = [
    *((("loops",), value) for value in (GONE, None, [], "x", {})),
    *((LOOP, value) for value in (GONE, None, [], {}, {"epoch_progress": 3})),
    *((BATCHES, value) for value in (GONE, None, 7, {}, {"total": {}})),
    *(((*BATCHES, "total"), value) for value in (GONE, [1, 2], {"ready": 1})),
    *(((*BATCHES, "total", "processed"), value) for value in (GONE, -1, 1.5, "2", None, True, torch.ones(3))),
    *(((*BATCHES, "total", "surprise"), value) for value in (3, {"class_path": "os.system"})),
    *(((*BATCHES, "is_last_batch"), value) for value in (GONE, "no")),
    *(((*STEPS, "completed"), value) for value in (GONE, -1, 10**6, "x", float("nan"))),
    *(((*LOOP, "epoch_loop.state_dict"), value) for value in (GONE, 3, {"_batches_that_stepped": "x"})),
    *(((*LOOP, "state_dict"), value) for value in (GONE, {"combined_loader": ["x"]})),
    *((("optimizer_states",), value) for value in (None, [], {}, "x", [None], [{}, {}])),
    *((STATE, value) for value in (GONE, None, [], {"x": {}}, {0: None}, {10**6: {}})),
    *(((*STATE, 20), value) for value in ({}, {"exp_avg": torch.zeros(3)}, {"momentum_buffer": torch.zeros(3)}, "x")),
    *(((*STATE, 20, "exp_avg"), value) for value in (GONE, torch.zeros(7), torch.full((1,), torch.nan), "x", None, 3)),
    *(((*STATE, 20, "step"), value) for value in (GONE, torch.zeros(7), "x", torch.tensor(torch.nan))),
    *((GROUP, value) for value in (GONE, None, {}, {"params": []})),
    *(((*GROUP, "params"), value) for value in (GONE, [], [0], None, ["x"])),
    *(((*GROUP, "lr"), value) for value in (GONE, "x", {}, [1.0])),
    *(((*GROUP, "betas"), value) for value in (GONE, 0.9, (0.9,), "xy")),
    *(((*GROUP, "fused"), value) for value in ("x", 7)),
    *((("lr_schedulers",), value) for value in (GONE, None, [], {}, [None], [{}])),
    *(((*SCHEDULE, name), value) for name in ("last_epoch", "_step_count") for value in (GONE, -1, "x", None, 1.5)),
    *(((*SCHEDULE, "base_lrs"), value) for value in (GONE, [], ["x"], [1.0, 2.0], 0.1)),
    *(((*SCHEDULE, "lr_lambdas"), value) for value in (GONE, [], None, ["x"], [3])),
    *(((*SCHEDULE, "optimizer"), value) for value in (3, {})),
    *((("callbacks",), value) for value in (None, [], "x")),
    *((("global_step",), value) for value in (GONE, -1, "x", 1.5, True, None, 10**6)),
    *((("epoch",), value) for value in (-1, "x", None)),
    *((("ranks",), value) for value in (0, -1, "x", None, 1.5)),
    *((("accumulate",), value) for value in (0, "x")),
    *((("state_dict",), value) for value in (GONE, {}, [], {"head.weight": 3}, {"x": torch.zeros(2)})),
    *((("state_dict", "head.weight"), value) for value in (GONE, torch.zeros(2, 2), "x", INFINITE)),
    *((("hyper_parameters",), value) for value in (3, "x", {"vocabulary": 3}, {"encoder": []})),
    *((("hyper_parameters", name), 10**400) for name in ("dropout", "warmup", "layer_drop")),
    (("hyper_parameters", "encoder", "dropout"), 10**400),
    *((("TranscribedData",), value) for value in (None, "x", [], 3)),
    *((("metrics",), value) for value in (None, "x", [], {"a": {}}, -1, {3: 1.0}, {"a": None}, {"a": 10**400})),
    *((("skipped_steps",), value) for value in (None, "x", [], {}, -1.0, 10**400, float("nan"), True)),
    *((("validation_due",), value) for value in (None, "x", 3)),
    *((("ended_by",), value) for value in (None, "x", 1.5, 10**400)),
    *((("pytorch-lightning_version",), value) for value in (GONE, 3, None, "x.y")),
]


def damage(checkpoint: dict[str, Any], keys: tuple[Any, ...], value: Any) -> None:
    *path, last = keys
    for key in path:
        checkpoint = checkpoint[key]
    if value is GONE:
        del checkpoint[last]
    else:
        checkpoint[last] = value


@pytest.mark.slow
def test_a_checkpoint_with_a_corrupt_state_is_refused_by_the_name_of_the_entry(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sound = torch.load(runs / "fine/last.ckpt", weights_only=True)
    stopping = next(key for key in sound["callbacks"] if key.startswith("EarlyStopping"))
    best = next(key for key in sound["callbacks"] if "'val/wer'" in key and key.startswith("ModelCheckpoint"))
    callbacks = [(("callbacks", stopping), value) for value in ({}, 3, {"wait_count": "x"})]
    callbacks += [(("callbacks", stopping, "wait_count"), value) for value in (GONE, "x", [])]
    callbacks += [(("callbacks", best, name), "x") for name in ("best_k_models", "kth_value")]
    path = tmp_path / "damaged.ckpt"
    shutil.copy(runs / "fine/last.ckpt", path)
    command = ["--config", str(runs / "fine/config.yaml"), f"--output={tmp_path / 'run'}", f"--ckpt_path={path}"]
    cli = HubertCLI("fit", [*command, "--trainer.logger=false"])
    cli.build(cli.config)
    cli.check()  # a sound one
    messages = []
    for keys, value in [*DAMAGE, *callbacks]:
        checkpoint = copy.deepcopy(sound)
        damage(checkpoint, keys, value)
        torch.save(checkpoint, path)
        messages.append((keys, value, sentence_of(cli.check, capsys)))
    wrong = [one for one in messages if not one[-1].startswith(str(path)) or "\n" in one[-1]]
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("loops",), None),
        ((*BATCHES, "total", "processed"), None),
        ((*STATE, 20, "exp_avg"), torch.zeros(7)),
        (("lr_schedulers",), [{}]),
        (("callbacks",), []),
        (("state_dict", "head.weight"), GONE),
        (("hyper_parameters",), 3),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_corrupt_state_ends_a_fit_in_one_sentence_before_it_writes(
    keys: tuple[Any, ...], value: Any, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(runs / "fine", tmp_path / "run")
    (tmp_path / "run/metrics.json").unlink()
    path = tmp_path / "run/last.ckpt"
    changed(path, path, lambda checkpoint: damage(checkpoint, keys, value))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    command = ["fit", "--config", str(tmp_path / "run/config.yaml"), f"--output={tmp_path / 'run'}"]
    message = refused(capsys, *command, "--trainer.max_steps=3", "--trainer.logger=false")
    assert message.splitlines()[-1].startswith(f"hubert: {path}")
    assert "Traceback" not in message
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_an_error_that_names_the_checkpoint_is_not_its_own_cause(runs: Path, tmp_path: Path) -> None:
    path = changed(runs / "fine/last.ckpt", tmp_path / "damaged.ckpt", of_settings(vocabulary=3))
    with pytest.raises(ValueError, match=str(path)) as refusal:
        CTCFinetuning.load_from_checkpoint(path)
    assert refusal.value.__cause__ is not refusal.value
    path = changed(runs / "fine/last.ckpt", tmp_path / "out.ckpt", of_settings(dropout=-1.0))
    with pytest.raises(ValueError, match=str(path)) as refusal:
        CTCFinetuning.load_from_checkpoint(path)
    assert str(path) not in str(refusal.value.__cause__)


Make = Callable[[Any], Optimizer]
OPTIMIZERS = [one for one in vars(torch.optim).values() if isinstance(one, type) and issubclass(one, Optimizer)]


class Layers(LightningModule):
    """Parameters of one, two and three dimensions, or of two alone."""

    def __init__(self, two: bool = False) -> None:
        super().__init__()
        shapes = [(3, 4), (20, 30)] if two else [(3, 4), (5,), (20, 30), (2, 3, 4)]
        self.weights = nn.ParameterList(torch.ones(shape) for shape in shapes)


class EightBits(Optimizer):
    """Keeps what the size of a parameter decides, and steps on a GPU alone: as 8-bit Adams do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert all(parameter.is_cuda for group in self.param_groups for parameter in group["params"])


def of_eight_bits(model: Layers) -> dict[str, Any]:
    state: dict[str, Any] = EightBits(model.parameters()).state_dict()
    for number, parameter in enumerate(model.parameters()):
        size = parameter.numel()
        coded = {"state1": torch.zeros(size, dtype=torch.uint8), "absmax1": torch.ones(-(-size // 16))}
        state["state"][number] = {"step": 1} | (coded if size > 20 else {"state1": torch.zeros(parameter.shape)})
    return state


def by_dimensions(parameters: Any) -> Optimizer:
    """An optimizer of two groups."""
    of_all = list(parameters)
    groups = [{"params": [one for one in of_all if one.dim() > 1]}]
    if few := [one for one in of_all if one.dim() < 2]:
        groups.append({"params": few, "weight_decay": 0.0})  # type: ignore[dict-item]
    return torch.optim.AdamW(groups, lr=0.1)


def after_a_step(model: Layers, make: Make) -> dict[str, Any]:
    """A checkpoint of step 1, as far as `check_run` reads it."""
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state = of_eight_bits(model) if isinstance(optimizer, EightBits) else None
    if state is None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
            if isinstance(optimizer, torch.optim.SparseAdam):
                parameter.grad = parameter.grad.to_sparse()
        if optimizer.defaults.get("capturable"):  # which steps on a GPU alone
            for group in optimizer.param_groups:
                group["capturable"] = False
        optimizer.step(lambda: torch.ones(()))  # type: ignore[arg-type, return-value]
        state = optimizer.state_dict()
        for group, as_given in zip(state["param_groups"], make(model.parameters()).param_groups, strict=True):
            group |= {name: value for name, value in as_given.items() if name == "capturable"}
    schedule.step()
    count = {"step": {"total": {"completed": 1}}}
    loops = {"epoch_loop.automatic_optimization.optim_progress": {"optimizer": count}}
    saved = io.BytesIO()
    schedules = [schedule.state_dict()]
    torch.save(
        {"loops": {"fit_loop": loops}, "global_step": 1, "optimizer_states": [state], "lr_schedulers": schedules}, saved
    )
    saved.seek(0)
    return torch.load(saved, weights_only=True)


@pytest.mark.parametrize(
    "make",
    [
        *(functools.partial(one, lr=0.01) for one in OPTIMIZERS if one not in (Optimizer, torch.optim.SparseAdam)),  # type: ignore[call-arg]
        functools.partial(torch.optim.AdamW, lr=0.01, amsgrad=True, weight_decay=0),
        functools.partial(torch.optim.Adam, lr=0.01, capturable=True),
        functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        by_dimensions,
        EightBits,
    ],
    ids=lambda make: getattr(getattr(make, "func", make), "__name__", ""),
)
def test_every_optimizer_resumes_from_its_own_state_and_from_no_other_type(make: Make) -> None:
    model = Layers(two=getattr(make, "func", None) is torch.optim.Muon)
    sound, path = after_a_step(model, make), Path("some.ckpt")
    before = [parameter.clone() for parameter in model.parameters()]
    check_run(model, make, sound, path)
    torch.testing.assert_close([*model.parameters()], before, rtol=0, atol=0)  # a check trains nothing
    states = sound["optimizer_states"][0]["state"]
    damages: list[tuple[tuple[Any, ...], Any]] = []
    damages += [((*STATE, number, key), "x") for number, kept in states.items() for key in kept]
    damages += [((*STATE, number), value) for number in (0, 99) for value in ("x", [1])]
    damages += [((*GROUP, "lr"), value) for value in (GONE, "x", {})]
    damages += [((*GROUP, "params"), value) for value in ([0], ["x"])]
    damages += [(("optimizer_states", 0, "param_groups"), value) for value in ([], [{}] * 3)]
    for keys, value in damages:
        damaged = copy.deepcopy(sound)
        damage(damaged, keys, value)
        with pytest.raises(ValueError, match=r"^some.ckpt: its optimizer"):
            check_run(model, make, damaged, path)


def test_an_option_that_a_later_torch_adds_does_not_end_a_run() -> None:
    model, make = Layers(), functools.partial(torch.optim.AdamW, lr=0.01)
    checkpoint = after_a_step(model, make)
    group = checkpoint["optimizer_states"][0]["param_groups"][0]
    del group["capturable"]
    check_run(model, make, checkpoint, Path("some.ckpt"))
    del group["lr"]  # which every torch has
    with pytest.raises(ValueError, match=r"^some.ckpt: its optimizer"):
        check_run(model, make, checkpoint, Path("some.ckpt"))
