"""HuBERT from audio to words on a synthetic corpus, with the same functions that real training uses."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypedDict

import soundfile
import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hubert_lightning.asr.ngram import ngram
from hubert_lightning.asr.transcribe import transcribe
from hubert_lightning.asr.tune_decoder import tune_decoder
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.demo.stages import Stages
from hubert_lightning.demo.synthesis import synthesise_corpus
from hubert_lightning.errors import UserError
from hubert_lightning.features.extractors import Extractor, layer_extractor, mfcc_extractor
from hubert_lightning.features.sample import sample_frames
from hubert_lightning.figure_style import BLUE, GREY, ORANGE, figure_files, figure_style
from hubert_lightning.files import replacing_all, write_whole
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.packaged_configs import configs_folder
from hubert_lightning.report.page import write_report
from hubert_lightning.training import experiment
from hubert_lightning.training.metrics_table import read_metrics
from hubert_lightning.units.kmeans import KMeans
from hubert_lightning.units.kmeans_file import load_kmeans
from hubert_lightning.units.label_recipe import assign_clusters
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.layer_quality import phone_quality

BATCH_FRAMES = 500
"""Frames that are encoded at once: 10 s."""
STAGES = {
    "speech": 10.0,
    "iteration 1": 90.0,
    "iteration 2": 195.0,
    "fine-tuning": 60.0,
    "training from scratch": 95.0,
    "language model": 20.0,
    "quality of the clusters": 10.0,
    "report": 5.0,
}
"""Stages of the demo, with their durations in seconds on two cores (docs/results.md)."""
TITLE = "Commands to a household assistant"
"""Title of the report."""
TUNING_TRIALS = 12
NGRAM_ORDER = 3
BEAM_SIZE = 50
SYSTEMS = ("scratch", "pretrained")
ALL_SYSTEMS = (*SYSTEMS, *(f"{name}_lm" for name in SYSTEMS))
PRINTED = {
    "mfcc": "MFCC",
    "iteration1": "iteration 1",
    "iteration2": "iteration 2",
    "scratch": "from scratch",
    "pretrained": "pre-trained",
}
TRANSCRIBED = {"train": "finetune", "test": "test"}
"""Manifest of each part of the data for fine-tuning."""
LIBRARIES = ("lightning.pytorch", "lightning.fabric")
DECODER = "lm.json"
"""Decoder settings in the folder of a run."""
SHOWN = 5
"""Held-out sentences that are printed."""

SystemRates = dict[str, float]
"""Rate of each system, greedy ("scratch", "pretrained") and with the n-gram ("scratch_lm", "pretrained_lm")."""


class Test(NamedTuple):
    """Results of one system on the test set.

    Attributes:
        wer: Word error rate.
        cer: Character error rate.
        rows: Reference and hypothesis of each utterance.
    """

    wer: float
    cer: float
    rows: list[dict[str, str]]


class Results(TypedDict):
    """Numbers of a demo.

    Attributes:
        pnmi: PNMI of the clusters of "mfcc", "iteration1" and "iteration2".
        wer: Word error rate of each system.
        cer: Character error rate of each system.
        seconds: Duration of the demo.
    """

    pnmi: dict[str, float]
    wer: SystemRates
    cer: SystemRates
    seconds: int


def demo(output: Path = Path("demo"), minutes: float = 60.0, steps: int | None = None, seed: int = 0) -> None:
    """Run the whole method on synthetic speech, and compare it with training from scratch.

    Synthesise commands to a household assistant, pre-train two iterations, fine-tune with CTC, decode with a language
    model, and test on unknown speakers.

    Args:
        output: Folder for the corpus, the runs, results.json, results.png and report.html.
        minutes: Minutes of speech to pre-train on; a sixth of them is transcribed.
        steps: Steps of each of the four trainings, for a quick trial in which nothing is learnt; by default those of
            the configs.
        seed: Seed of sentences, speakers, weights and batches.
    """
    console = Console()
    output = Path(output)
    if (output / "results.json").exists():
        raise UserError(f"{output}: holds a finished demo (results.json); look at it, or choose another --output")
    started = time.perf_counter()
    training = _Training(output, _fastest_precision(), steps, seed)
    console.print(
        "Commands to a household assistant, spoken by a synthesiser → MFCC clusters → iteration 1 → its own clusters "
        f"→ iteration 2 → CTC on {minutes / 6:.3g} minutes of transcripts, and the same from scratch, in "
        f"{training.precision}, into {output}/"
    )
    announced = Stages({name: seconds * (0.1 if steps else 1.0) for name, seconds in STAGES.items()})
    announced.begin("speech")
    heldout = min(4.0, minutes / 6)
    with _quiet():
        synthesise_corpus(output, minutes, minutes / 6, dev_minutes=heldout, test_minutes=heldout, seed=seed)
    training.pretrain(begins=lambda number: announced.begin(f"iteration {number}"))
    announced.begin("fine-tuning")
    runs = {"pretrained": training.finetune()}
    announced.begin("training from scratch")
    runs["scratch"] = training.train_from_scratch()
    announced.begin("language model")
    with _quiet():
        tests = _test(output, runs)
        subtitles = _subtitles(output, runs["pretrained"])
    announced.begin("quality of the clusters")
    results: Results = {
        "pnmi": _pnmi(output / "pretraining", output / "manifests"),
        "wer": {name: tests[name].wer for name in ALL_SYSTEMS},
        "cer": {name: tests[name].cer for name in ALL_SYSTEMS},
        "seconds": 0,
    }
    announced.begin("report")
    with _quiet():
        write_report([output / "pretraining", *runs.values()], output / "report.html", title=TITLE)
    results["seconds"] = round(time.perf_counter() - started)
    images = figure_files(_figure(results, output / "pretraining", minutes / 6), output / "results.png")
    with replacing_all(*images, output / "results.json") as (*figures, file):
        for figure, content in zip(figures, images.values(), strict=True):
            figure.write(content)
        file.write((json.dumps(results, indent=2) + "\n").encode())
    _print_results(console, results, tests, minutes / 6)
    console.print(f"Subtitles of {output / 'recording.flac'}, an unknown speaker:\n\n{subtitles}", highlight=False)
    console.print(
        f"{results['seconds']} s; numbers in {output / 'results.json'}, figure in {output / 'results.png'}, "
        f"and all of it in {output / 'report.html'}, a page for any browser",
        soft_wrap=True,
    )


class _Training:
    """The four trainings of a demo.

    Args:
        output: Folder of the demo.
        precision: Numeric precision of the Trainer.
        steps: Steps of each training; those of the configs if None.
        seed: Seed of weights and batches.
    """

    def __init__(self, output: Path, precision: str, steps: int | None, seed: int) -> None:
        self.output, self.precision, self.steps, self.seed = output, precision, steps, seed
        self.manifests = {
            name: f"[{output / 'manifests' / f'{name}.jsonl.gz'}]" for name in ("train", "finetune", "dev", "test")
        }

    def pretrain(self, begins: Callable[[int], object]) -> None:
        """Pre-train both iterations; `begins` is called with the number of each one that begins."""
        options = [f"--data.init_args.train={self.manifests['train']}"]
        if self.steps:
            iterations = yaml.safe_load((configs_folder() / "demo.yaml").read_text())["iterations"]
            shortened = [iteration | {"max_steps": self.steps} for iteration in iterations]
            options.append(f"--iterations={json.dumps(shortened)}")
        self._fit(["demo.yaml"], "pretraining", *options, begins=begins)

    def finetune(self) -> Path:
        """Fine-tune the model of iteration 2; returns the folder of the run."""
        last = self.output / "pretraining" / "iteration2" / "last.ckpt"
        return self._transcribe(["demo-finetune.yaml"], "finetuning", f"--model.init_args.pretrained={last}")

    def train_from_scratch(self) -> Path:
        """Train fresh weights on the same transcripts; returns the folder of the run."""
        return self._transcribe(["demo-finetune.yaml", "demo-scratch.yaml"], "scratch")

    def _transcribe(self, names: list[str], folder: str, *options: str) -> Path:
        limit = [f"--trainer.max_steps={self.steps}"] if self.steps else []
        data = (f"--data.init_args.{part}={self.manifests[name]}" for part, name in TRANSCRIBED.items())
        return self._fit(names, folder, *data, *limit, *options)

    def _fit(self, names: list[str], folder: str, *options: str, begins: Callable[[int], object] | None = None) -> Path:
        layers = [f"--config={configs_folder() / name}" for name in names]
        interval = [f"--trainer.val_check_interval={self.steps}"] if self.steps else []
        run = self.output / folder
        with _quiet():
            experiment.fit(
                [
                    *layers,
                    f"--output={run}",
                    f"--seed_everything={self.seed}",
                    f"--trainer.precision={self.precision}",
                    f"--data.init_args.validation={self.manifests['dev']}",
                    *interval,
                    *options,
                ],
                begins,
            )
        return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave standard output to the results of the demo; messages and bars are on standard error."""
    levels = {name: logging.getLogger(name).level for name in LIBRARIES}
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)  # hides seeds, precisions and the paths of checkpoints
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _fastest_precision() -> str:
    """bf16 where this machine multiplies faster in it: processors without the instructions are slower."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(1024, 1024, dtype=dtype)
        matrix @ matrix
        start = time.perf_counter()
        for _ in range(5):
            matrix @ matrix
        seconds[dtype] = time.perf_counter() - start
    return "bf16-mixed" if seconds[torch.bfloat16] < 0.7 * seconds[torch.float32] else "32-true"


def _test(output: Path, runs: Mapping[str, Path]) -> dict[str, Test]:
    """Test each run greedily and with an n-gram of the training transcripts, whose weight is tuned on dev.

    Returns:
        Results of each system.
    """
    manifests = output / "manifests"
    text, lm = output / "lm" / "transcripts.txt", output / "lm" / "transcripts.arpa"
    lexicon = lm.with_suffix(".lexicon")
    text.parent.mkdir(exist_ok=True)
    transcripts = [cut.supervisions[0].text for cut in read_manifest(manifests / "finetune.jsonl.gz")]
    write_whole(text, "".join(f"{transcript}\n" for transcript in transcripts).encode())
    lexicon.unlink(missing_ok=True)  # left by an interrupted demo
    ngram(text, lm, order=NGRAM_ORDER)
    tests = {}
    for name, run in runs.items():
        decoder = run / DECODER
        tune_decoder(run / "best.ckpt", [manifests / "dev.jsonl.gz"], decoder, lm, lexicon, TUNING_TRIALS, BEAM_SIZE)
        test = [f"--config={run / 'config.yaml'}"]
        tests[f"{name}_lm"] = _test_run(run, [*test, f"--model.init_args.decoder={decoder}"])
        tests[name] = _test_run(run, test)  # last, since the newest results are those in the run's folder
    return tests


def _test_run(run: Path, args: list[str]) -> Test:
    experiment.judge("test", args)
    metrics = json.loads((run / "test-metrics.json").read_text())
    rows = [json.loads(line) for line in (run / "test.jsonl").open()]
    return Test(metrics["test/wer"], metrics["test/cer"], rows)


def _subtitles(output: Path, run: Path) -> str:
    """Join utterances of one test speaker to a recording, transcribe it, and return its subtitles."""
    waveforms: list[Tensor] = []
    cuts = list(read_manifest(output / "manifests" / "test.jsonl.gz"))
    for cut in cuts:
        if cut.supervisions[0].speaker == cuts[0].supervisions[0].speaker:
            waveforms.append(read_waveform(cut))
    recording = output / "recording.flac"
    soundfile.write(recording, torch.cat(waveforms).numpy(), SAMPLE_RATE)
    transcribe(run / "best.ckpt", [recording], "srt", output, run / DECODER)
    return recording.with_suffix(".srt").read_text()


def _pnmi(pretraining: Path, manifests: Path) -> dict[str, float]:
    """PNMI on held-out speakers; the model of iteration 2 is clustered like that of iteration 1."""
    heldout = [cut for name in ("dev", "test") for cut in read_manifest(manifests / f"{name}.jsonl.gz")]
    layer = int(LabelStore(pretraining / "iteration2" / "labels").source.features.split()[1])
    iteration1, iteration2 = (
        layer_extractor(pretraining / f"iteration{number}" / "last.ckpt", layer, torch.device("cpu"))
        for number in (1, 2)
    )
    [mfcc_centroids], _ = load_kmeans(pretraining / "iteration1" / "kmeans.safetensors")
    [centroids1], settings = load_kmeans(pretraining / "iteration2" / "kmeans.safetensors")
    seed = int(settings["seed"])
    train = list(read_manifest(manifests / "train.jsonl.gz"))
    sample, _ = sample_frames(iteration2, train, int(settings["max_frames"]), seed, batch_frames=BATCH_FRAMES)
    centroids2 = KMeans().fit(sample, len(centroids1), seed)

    def pnmi(extractor: Extractor, centroids: Tensor) -> float:
        [clusters] = assign_clusters(extractor, [(slice(None), centroids)], [heldout], BATCH_FRAMES)
        return round(phone_quality(heldout, clusters, len(centroids)).pnmi, 4)

    return {
        "mfcc": pnmi(mfcc_extractor(), mfcc_centroids),
        "iteration1": pnmi(iteration1, centroids1),
        "iteration2": pnmi(iteration2, centroids2),
    }


def _print_results(console: Console, results: Results, tests: Mapping[str, Test], minutes: float) -> None:
    clusters = Table("clusters of", "PNMI, unknown speakers", title="Quality of the clusters")
    for name, value in results["pnmi"].items():
        clusters.add_row(PRINTED[name], f"{value:.3f}")
    errors = Table(f"{minutes:.3g} minutes of transcripts", title="Errors, unknown speakers and sentences")
    for column in ("WER %", "CER %", f"WER % with {NGRAM_ORDER}-gram", "CER %"):
        errors.add_column(column, justify="right")
    for name in SYSTEMS:
        rates = [results[rate][system] for system in (name, f"{name}_lm") for rate in ("wer", "cer")]
        errors.add_row(PRINTED[name], *(f"{100 * value:.1f}" for value in rates))
    console.print(clusters)
    console.print(errors)
    rows = zip(tests["pretrained"].rows, *(tests[name].rows for name in SYSTEMS), strict=True)
    for reference, scratch, pretrained in islice(rows, SHOWN):
        console.print(f"said          {reference['reference']}", highlight=False, soft_wrap=True)
        console.print(f"from scratch  {scratch['hypothesis']}", highlight=False, soft_wrap=True)
        console.print(f"pre-trained   {pretrained['hypothesis']}\n", highlight=False, soft_wrap=True)


@figure_style()
def _figure(results: Results, pretraining: Path, minutes: float) -> Figure:
    figure = Figure(figsize=(7.2, 2.4), layout="constrained")
    curves, units, errors = figure.subplots(1, 3)
    for number, colour in ((1, ORANGE), (2, BLUE)):
        points = read_metrics(pretraining / f"iteration{number}")["val/masked_accuracy"]
        steps, accuracy = zip(*points, strict=True)
        curves.plot(steps, [100 * value for value in accuracy], color=colour, label=f"iteration {number}", marker=".")
    curves.set(title="Masked accuracy", xlabel="step", ylabel="accuracy, %", ylim=(0, None))
    curves.legend(frameon=False)
    bars = units.bar([PRINTED[name] for name in results["pnmi"]], results["pnmi"].values(), color=[GREY, ORANGE, BLUE])
    units.bar_label(bars, fmt="%.3f")
    units.set(title="Quality of the clusters", ylabel="PNMI")
    for offset, name, colour in ((-0.2, "scratch", GREY), (0.2, "pretrained", BLUE)):
        rates = [100 * results["wer"][system] for system in (name, f"{name}_lm")]
        bars = errors.bar([offset, 1 + offset], rates, width=0.36, color=colour, label=PRINTED[name])
        errors.bar_label(bars, fmt="%.1f")
    errors.set(
        title=f"Errors after {minutes:.3g} min of transcripts",
        ylabel="WER, %",
        xticks=[0, 1],
        xticklabels=["greedy", f"{NGRAM_ORDER}-gram"],
        ylim=(0, 125 * max(results["wer"].values())),
    )
    errors.legend(frameon=False, loc="upper center", ncols=2)
    return figure
