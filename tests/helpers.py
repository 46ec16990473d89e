"""What several tests need: models, data, trainers, command lines, and files of small models."""

import math
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from lhotse import CutSet, MonoCut, Recording
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from matplotlib.image import imread
from soundfile import write
from torch import Tensor, nn
from torch.optim import AdamW

from hubert_lightning.asr.ctc_model import CTCModel
from hubert_lightning.asr.decoder_settings import DecoderSettings, settings_json
from hubert_lightning.cli import main
from hubert_lightning.frames import SAMPLE_RATE, num_frames, num_samples
from hubert_lightning.model.config import KERNELS, STRIDES, EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.model.windows import WindowLayout
from hubert_lightning.training.batches import PretrainingBatch
from hubert_lightning.training.finetuning_data import TranscribedData
from hubert_lightning.training.hubert_cli import HubertCLI
from hubert_lightning.training.metrics_table import read_metrics
from hubert_lightning.training.pretraining import HubertPretraining
from hubert_lightning.training.pretraining_data import PretrainingData
from hubert_lightning.training.relabelling import Relabel
from hubert_lightning.units.label_shards import LabelSource
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.label_writer import LabelWriter
from hubert_lightning.vocabulary import Vocabulary

TINY = EncoderConfig(
    conv_channels=16,
    dim=32,
    num_layers=2,
    num_heads=2,
    ffn_dim=64,
    pos_kernel=16,
    pos_groups=4,
    dropout=0.0,
    attention_dropout=0.0,
    input_dropout=0.0,
    layer_drop=0.0,
    feature_grad_mult=1.0,
)
SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "group",
}
NUM_FRAMES = 120
ROOT = Path(__file__).parent.parent
RECORDINGS = ROOT.parent / "shared" / "data"
needs_recordings = pytest.mark.skipif(
    not RECORDINGS.is_dir(), reason="the real recordings are not beside this checkout (../shared/data)"
)
Interval = tuple[float, float, str]  # start and end in seconds, label
HELLO: list[Interval] = [
    (0.0, 0.31, ""), (0.31, 0.40, "HH"), (0.40, 0.47, "AH0"), (0.47, 0.55, "L"), (0.55, 0.83, "OW1"), (0.83, 1.2, ""),
]  # fmt: skip
HELLO_WORD: list[Interval] = [(0.0, 0.31, ""), (0.31, 0.83, "hello"), (0.83, 1.2, "")]
SMALL_FINETUNING = [
    *("--config", str(ROOT / "configs/finetune/small.yaml")),
    *("--config", str(ROOT / "tests/smoke-finetune.yaml")),
]
SMOKE = ["--config", str(ROOT / "configs/demo.yaml"), "--config", str(ROOT / "tests/smoke.yaml")]
SMOKE_FINETUNE = [
    *("--config", str(ROOT / "configs/demo-finetune.yaml")),
    *("--config", str(ROOT / "tests/smoke-finetune.yaml")),
]
TWO_ITERATIONS = (
    "--iterations=[{features: mfcc, clusters: 20, max_frames: 2000, max_steps: 2},"
    "{features: previous, layer: 1, clusters: 10, max_frames: 2000, max_steps: 3}]"
)
PRETRAINING_CONFIGS = [*sorted((ROOT / "configs/pretrain").glob("*.yaml")), ROOT / "configs/demo.yaml"]
SPLITS = ("10min", "1h", "10h", "100h", "960h")
FINETUNING_CONFIGS = [
    *(ROOT / f"configs/finetune/{name}.yaml" for name in (*SPLITS, "own", "small")),
    ROOT / "configs/demo-finetune.yaml",
]
LABELLING = "clusters: 1500, max_frames: 4000, kmeans: {class_path: hubert_lightning.ScikitKMeans}, max_steps: 2"
LABEL_SOURCE = LabelSource(features="mfcc", kmeans="k", manifest="m", clusters=(50, 7))
DIGITS = ["ONE", "TWO", "THREE", "FOUR", "FIVE", "NINE", "EIGHT", "ZERO"]
HUBERT = ("-m", "hubert_lightning")
RESUMED_STEPS = 8
FINETUNING_STEPS = 6


@dataclass
class Encoder:
    """What models with a solved head share: an encoder's state, a recording, and what the one hears in the other."""

    state: dict[str, Tensor]
    recording: Path
    frames: Tensor  # (frames, dim)
    inverse: Tensor  # (dim and bias, frames), which solves a head


def long_format(tiers: dict[str, list[Interval]], end: float) -> str:
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0 ", f"xmax = {end} "]
    lines += ["tiers? <exists> ", f"size = {len(tiers)} ", "item []: "]
    for number, (name, intervals) in enumerate(tiers.items(), start=1):
        lines += [f"    item [{number}]:", '        class = "IntervalTier" ', f'        name = "{name}" ']
        lines += ["        xmin = 0 ", f"        xmax = {end} ", f"        intervals: size = {len(intervals)} "]
        for k, (start, stop, label) in enumerate(intervals, start=1):
            lines += [f"        intervals [{k}]:", f"            xmin = {start} ", f"            xmax = {stop} "]
            lines += [f'            text = "{label}" ']
    return "\n".join(lines) + "\n"


def short_format(tiers: dict[str, list[Interval]], end: float) -> str:
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "0", f"{end}", "<exists>", f"{len(tiers)}"]
    for name, intervals in tiers.items():
        lines += ['"IntervalTier"', f'"{name}"', "0", f"{end}", f"{len(intervals)}"]
        lines += [f'{start}\n{stop}\n"{label}"' for start, stop, label in intervals]
    return "\n".join(lines) + "\n"


def finetuning_options(manifests: Path) -> list[str]:
    names = {"train": "finetune", "validation": "dev", "test": "test"}
    return [f"--data.init_args.{part}=[{manifests / name}.jsonl.gz]" for part, name in names.items()]


def pretraining_options(manifests: Path) -> list[str]:
    return [
        f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
        f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
    ]


def transcribed_options(manifests: Path) -> list[str]:
    return [
        f"--data.init_args.train=[{manifests / 'finetune.jsonl.gz'}]",
        f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
        f"--data.init_args.test=[{manifests / 'test.jsonl.gz'}]",
    ]


def refused(capsys: pytest.CaptureFixture, *args: str) -> str:
    """The one sentence that a command line is refused with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def parsed_config(*args: str) -> SimpleNamespace:
    """The config of `hubert fit` with these arguments, as `config.fit`; nothing is built."""
    return SimpleNamespace(config=SimpleNamespace(fit=HubertCLI("fit", list(args)).config))


def bare_trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=folder, **quiet, **options)


def data_of_task(task: type[LightningModule], manifests: Path, run: Path) -> PretrainingData | TranscribedData:
    dev = [manifests / "dev.jsonl.gz"]
    if task is HubertPretraining:
        train, labels = [manifests / "train.jsonl.gz"], run / "labels"
        return PretrainingData(train, None, dev, labels, max_duration=10, max_crop=3, num_workers=0)
    return TranscribedData([manifests / "finetune.jsonl.gz"], dev, dev, max_duration=10, num_workers=0)


def silent_trainer(folder: Path, steps: int, **options: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def quick_adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)  # type: ignore[arg-type]


def plain_adam(parameters: object) -> AdamW:
    return AdamW(parameters, lr=1e-3)  # type: ignore[arg-type]


def long_pretraining(manifests: Path, output: Path, *more: str, steps: int = 100_000) -> list[str]:
    """A pre-training of one iteration that nobody waits for."""
    return [
        "fit",
        *("--config", str(ROOT / "configs/demo.yaml")),
        *("--config", str(ROOT / "tests/smoke.yaml")),
        f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
        f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
        "--data.init_args.max_duration=6",
        "--data.init_args.num_workers=2",
        "--checkpoint.every_n_train_steps=50000",
        "--trainer.val_check_interval=100000",
        "--trainer.check_val_every_n_epoch=null",
        f"--iterations=[{{features: mfcc, clusters: 20, max_frames: 2000, max_steps: {steps}}}]",
        f"--output={output}",
        *more,
    ]


def wait_until(condition: Callable[[], bool], process: BaseProcess, seconds: float = 120) -> None:
    """Wait until something is there; the process must not end before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.exitcode is None
        assert time.monotonic() < end
        time.sleep(0.01)


def prints_text(output: Path, text: str) -> Callable[[], bool]:
    return lambda: output.exists() and text in output.read_text()


def has_steps(run: Path, rows: int = 2) -> Callable[[], bool]:
    """Whether some steps are logged; the rounds of K-means are rows of the same table."""
    return lambda: len(read_metrics(run / "iteration1").get("train/loss", [])) >= rows


def with_folder() -> None:
    sys.path.insert(0, os.getcwd())


def cut_of(path: Path, waveform: Tensor) -> MonoCut:
    write(path, waveform.numpy(), SAMPLE_RATE, subtype="FLOAT")
    return Recording.from_file(path).to_cut()


def noise_with_pauses(seconds: int, seed: int = 0) -> Tensor:
    """Noise whose loudness changes every quarter of a second, with a pause of half a second now and then."""
    rng = torch.Generator().manual_seed(seed)
    loudness = torch.rand(4 * seconds, generator=rng) + 0.1
    for first in torch.randint(4 * seconds - 2, (seconds // 4,), generator=rng).tolist():
        loudness[first : first + 2] = 1e-3
    noise = torch.randn(4 * seconds, SAMPLE_RATE // 4, generator=rng)
    return (0.1 * loudness[:, None] * noise).flatten()


def pretraining_batch(
    seed: int = 0, frames: int = 40, clusters: int = 20, streams: int = 1, masked: int = 23
) -> PretrainingBatch:
    rng = torch.Generator().manual_seed(seed)
    return PretrainingBatch(
        waveform=torch.randn(3, num_samples(frames), generator=rng),
        cluster=torch.randint(clusters, (3, streams, frames), generator=rng),
        mask=torch.rand(3, frames, generator=rng).argsort(dim=1) < masked,
        num_masked=masked,
    )


def pretraining_model(**options: object) -> HubertPretraining:
    seed_everything(0, verbose=False)
    options = {"encoder": TINY, "num_clusters": 20, "final_dim": 16} | options
    return HubertPretraining(**options).eval()  # type: ignore[arg-type]


def summed_as_in_fairseq(model: HubertPretraining, batch: PretrainingBatch) -> tuple[torch.Tensor, int]:
    """The sum of a batch's losses, and by how many frames fairseq divides it (criterions/hubert_criterion.py)."""
    local = model.encoder.local_features(batch.waveform)
    frames = model.encoder.contextual(local, mask=batch.mask)
    total, frames_counted = torch.zeros(()), 0
    for mask, weight in ((batch.mask, model.masked_weight), (~batch.mask, 1 - model.masked_weight)):
        if weight > 0:
            for predictor, cluster in zip(model.predictors, batch.cluster.unbind(dim=1), strict=True):
                logits = predictor(frames[mask])
                total = total + weight * F.cross_entropy(logits, cluster[mask], reduction="sum")
            frames_counted += int(mask.sum())
    return total + model.feature_penalty * local.square().mean() * frames_counted, frames_counted


def logging_trainer(folder: Path, steps: int, **options: object) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=CSVLogger(folder, name="", version=""),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[Relabel(clusters=20, max_frames=3000)],
        **options,  # type: ignore[arg-type]
    )


def pretraining_data(manifests: Path, **options: object) -> PretrainingData:
    defaults: dict[str, Any] = {"train": [manifests / "train.jsonl.gz"], "validation": [manifests / "dev.jsonl.gz"]}
    return PretrainingData(**{"max_duration": 12, "max_crop": 3} | defaults | options)


def check_figures(path: Path, inches: float = 3.4) -> None:
    """Check that a figure is there as PNG, SVG and PDF, and fits a column of a paper, or another width."""
    image = imread(path.with_suffix(".png"))
    assert image.shape[1] == 200 * inches
    assert image[:, :, :3].std() > 0.05
    assert path.with_suffix(".svg").read_text().startswith("<?xml")
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF-")


class Screen:
    """A terminal of a process: what it shows at each moment, by the control sequences that bars use.

    Attributes:
        shown: Content before each time that something is erased, and at the end.
    """

    CONTROL = re.compile(
        r"\x1b\[\??(?P<number>\d*)(?:;\d+)*(?P<control>[A-Za-z])|(?P<move>[\r\n])|(?P<text>[^\x1b\r\n]+)"
    )

    def __init__(self, output: str) -> None:
        self.lines, self.row, self.column = [""], 0, 0
        self.shown: list[str] = []
        drawn = False
        for match in self.CONTROL.finditer(output):
            if match["text"]:
                self._type(match["text"])
            elif match["move"] == "\n":
                self.row += 1
                self.lines += [""] * (self.row == len(self.lines))
            elif match["move"]:
                self.column = 0
            elif match["control"] == "A":
                self.row -= int(match["number"] or 1)
            elif match["control"] == "K":
                if drawn:
                    self.shown.append("\n".join(self.lines))
                self.lines[self.row] = ""
            drawn = (drawn and match["control"] != "K") or bool(match["text"])
        self.shown.append("\n".join(self.lines))

    def _type(self, text: str) -> None:
        line = self.lines[self.row].ljust(self.column)
        self.lines[self.row] = line[: self.column] + text + line[self.column + len(text) :]
        self.column += len(text)


def in_terminal(*command: str, columns: int = 100, **more: Any) -> Screen:
    """Run a command with its standard output and standard error on a terminal."""
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (40, columns))
    with subprocess.Popen(command, stdin=child, stdout=child, stderr=child, **more) as process:
        os.close(child)
        output = b""
        with suppress(OSError):  # Linux has no end of file here
            while content := os.read(parent, 65536):
                output += content
    os.close(parent)
    screen = Screen(output.decode())
    assert process.returncode == 0, screen.shown[-1]
    return screen


def save_ctc(path: Path, vocabulary: Vocabulary | None = Vocabulary(), seed: int = 0, spread: float = 1.0) -> CTCModel:
    """A checkpoint of random weights as fine-tuning writes it; with `spread`, letters of more than one kind win."""
    torch.manual_seed(seed)
    known = vocabulary or Vocabulary()
    model = CTCModel(HubertEncoder(TINY), nn.Linear(TINY.dim, len(known)), known).eval()
    nn.init.normal_(model.head.weight, std=spread)
    settings: dict[str, Any] = {"encoder": asdict(TINY)}
    if vocabulary is not None:
        settings["vocabulary"] = asdict(vocabulary) | {"tokens": list(vocabulary.tokens)}
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": settings}, path)
    return model


def resumed_pretraining(manifests: Path, output: Path) -> list[str]:
    iterations = (
        f"--iterations=[{{features: mfcc, clusters: 20, max_frames: 2000, max_steps: {RESUMED_STEPS}}},"
        f"{{features: previous, layer: 1, clusters: 10, max_frames: 2000, max_steps: {RESUMED_STEPS}}}]"
    )
    return [
        "fit",
        *("--config", str(ROOT / "configs/demo.yaml")),
        *("--config", str(ROOT / "tests/smoke.yaml")),
        f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
        f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
        "--data.init_args.max_duration=6",
        "--data.init_args.num_workers=2",
        "--model.init_args.encoder={dropout: 0.1, attention_dropout: 0.1, input_dropout: 0.1, layer_drop: 0.3}",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.val_check_interval=6",
        "--checkpoint.every_n_train_steps=2",
        iterations,
        f"--output={output}",
    ]


def short_finetuning(manifests: Path, output: Path, **data: list[Path]) -> list[str]:
    """A fine-tuning of so many steps, which saves every two."""
    data = {"train": [manifests / "finetune.jsonl.gz"], "validation": [manifests / "dev.jsonl.gz"]} | data
    return [
        "fit",
        *("--config", str(ROOT / "configs/finetune/small.yaml")),
        *("--config", str(ROOT / "tests/smoke-finetune.yaml")),
        *(f"--data.init_args.{part}=[{','.join(map(str, paths))}]" for part, paths in data.items()),
        f"--trainer.max_steps={FINETUNING_STEPS}",
        "--checkpoint.every_n_train_steps=2",
        f"--output={output}",
    ]


def export_shar(cuts: CutSet, folder: Path, audio: str = "flac") -> Path:
    folder.mkdir(parents=True)
    cuts.to_shar(folder, fields={"recording": audio}, shard_size=7)
    return folder


def read_samples(path: Path) -> Tensor:
    return torch.from_numpy(soundfile.read(path, dtype="float32")[0])


def write_settings(settings: DecoderSettings, path: Path) -> None:
    path.write_bytes(settings_json(settings, path))


def run_verb(*args: object) -> int:
    try:
        main([str(arg) for arg in args])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def write_store(folder: Path, source: LabelSource, *shards: Mapping[str, np.ndarray]) -> LabelStore:
    """A finished label store of these shards, each of labels (streams, frames) by cut id."""
    with LabelWriter(folder, source, len(shards)) as writer:
        for number, labels in enumerate(shards):
            writer.write(number, labels)
    return LabelStore(folder)


AT_25_HZ: dict[str, Any] = {"conv_kernels": (*KERNELS, 2), "conv_strides": (*STRIDES, 2)}
"""Convolutions of an encoder of 25 frames a second, as TWIST's: an eighth one."""


def of_more_frames(config: EncoderConfig, batch: int, samples: int) -> int:
    """Operations of a step's convolutions beyond the formula: a frame more, and rows of 16 samples for windows of ten.

    Base's first norm multiplies these rows with one another, and their moments with the weights.
    """
    frozen, channels, length = config.feature_grad_mult == 0, config.conv_channels, samples
    frames, layout = num_frames(samples, config.clock), WindowLayout.of(config)
    more = 0
    if config.conv_norm == "group":
        kernel = layout.kernel
        more += 2 * batch * layout.factor * (frames + 2) * layout.columns**2
        more += 2 * batch * channels * (kernel**2 + 2 * kernel)
        more += 0 if frozen else 2 * batch * channels * (kernel**2 + 3 * kernel)
    for index, (kernel, stride) in enumerate(zip(config.conv_kernels, config.conv_strides, strict=True)):
        length = (length - kernel) // stride + 1
        rows = batch * (frames + 1) * math.prod(config.conv_strides[index + 1 :])
        if index == 0:
            more += (1 if frozen else 2) * 2 * channels * (layout.columns * rows - kernel * batch * length)
        else:
            computed = kernel * rows - (kernel == 3)  # the last row of a batch has no third frame
            more += (1 if frozen else 3) * 2 * channels**2 * (computed - kernel * batch * length)
    return more


def two_processes(folder: Path, *command: str) -> None:
    """Run a command that starts its own second process; neither outlives the test."""
    threads = {"OMP_NUM_THREADS": "1"}  # two processes, two cores
    log = folder / "output.txt"
    with log.open("w") as output:
        running = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=os.environ | threads,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            code = running.wait(timeout=600)
        finally:
            with suppress(ProcessLookupError):  # both are gone
                os.killpg(running.pid, signal.SIGKILL)
    assert code == 0, log.read_text()[-4000:]


def on_two(strategy: str) -> list[str]:
    return ["--trainer.accelerator=cpu", "--trainer.devices=2", f"--trainer.strategy={strategy}"]
