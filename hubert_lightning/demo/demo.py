"""HuBERT from audio to words on a synthetic corpus, with the same functions that real training uses."""

import csv
import json
import logging
import time
from pathlib import Path
from typing import TypedDict

import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hubert_lightning.console import BLUE, GREY, ORANGE, png_of
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.demo.synthesis import synthesise_corpus
from hubert_lightning.errors import UserError
from hubert_lightning.features.extractors import Extractor, layer_extractor, mfcc_extractor
from hubert_lightning.features.sample import sample_frames
from hubert_lightning.files import replacing_all
from hubert_lightning.training import experiment
from hubert_lightning.training.commands import configs_folder
from hubert_lightning.units.kmeans import KMeans
from hubert_lightning.units.kmeans_file import load_kmeans
from hubert_lightning.units.label_recipe import assign_clusters
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.layer_quality import phone_quality

BATCH_FRAMES = 500
"""Frames that are encoded at once: 10 s."""
EXPECTED_MINUTES = 12
"""Duration of the demo on two cores without bfloat16 (docs/results.md)."""

SystemRates = dict[str, float]
"""Rate of each system: "scratch" and "pretrained"."""


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


def demo(output: Path = Path("demo"), minutes: float = 60.0, steps: int | None = None) -> None:
    """Run the whole method on synthetic speech, and compare it with training from scratch.

    Synthesise speech, pre-train two iterations, fine-tune with CTC, and test.

    Args:
        output: Folder for the corpus, the runs, results.json and results.png.
        minutes: Minutes of speech to pre-train on; a sixth of them is transcribed.
        steps: Steps of each of the four trainings, for a quick trial in which nothing is learnt; by default those of
            the configs.
    """
    console = Console()
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)  # hides lines on devices, and tips
    output = Path(output)
    if (output / "results.json").exists():
        raise UserError(f"{output}: holds a finished demo (results.json); look at it, or choose another --output")
    started = time.perf_counter()
    precision = _fastest_precision()
    duration = f"{steps} steps each, to see it run" if steps else f"about {EXPECTED_MINUTES} minutes on two cores"
    console.print(
        f"Synthetic speech → MFCC clusters → iteration 1 → its own clusters → iteration 2 → CTC on {minutes / 6:.3g} "
        f"minutes of transcripts, and the same from scratch, in {precision}, into {output}/: {duration}"
    )
    heldout = min(4.0, minutes / 6)
    synthesise_corpus(output, minutes, finetuning_minutes=minutes / 6, dev_minutes=heldout, test_minutes=heldout)
    pretraining, runs = _train(output, precision, steps)
    for run in runs.values():
        experiment.judge("test", ["--config", str(run / "config.yaml")])
    scores = {name: json.loads((run / "test-metrics.json").read_text()) for name, run in runs.items()}
    results: Results = {
        "pnmi": _pnmi(pretraining, output / "manifests"),
        "wer": {name: scores[name]["test/wer"] for name in ("scratch", "pretrained")},
        "cer": {name: scores[name]["test/cer"] for name in ("scratch", "pretrained")},
        "seconds": round(time.perf_counter() - started),
    }
    with replacing_all(output / "results.png", output / "results.json") as (figure, file):
        figure.write(_figure(results, pretraining, minutes / 6))
        file.write((json.dumps(results, indent=2) + "\n").encode())
    _report(console, results, runs, minutes / 6)
    console.print(f"{results['seconds']} s; numbers in {output / 'results.json'}, figure in {output / 'results.png'}")


def _train(output: Path, precision: str, steps: int | None) -> tuple[Path, dict[str, Path]]:
    """Pre-train, fine-tune, and train from scratch.

    Returns:
        Folder of the pre-training, and of the run of each system.
    """
    configs = configs_folder()
    lists = {name: f"[{output / 'manifests' / f'{name}.jsonl.gz'}]" for name in ("train", "finetune", "dev", "test")}

    def fit(names: list[str], folder: str, *options: str) -> Path:
        layers = [f"--config={configs / name}" for name in names]
        shortened = _shortened(configs / names[0], steps) if steps else []
        run = output / folder
        experiment.fit([*layers, f"--output={run}", f"--trainer.precision={precision}", *shortened, *options])
        return run

    dev = f"--data.init_args.validation={lists['dev']}"
    transcribed = [f"--data.init_args.train={lists['finetune']}", dev, f"--data.init_args.test={lists['test']}"]
    pretraining = fit(["demo.yaml"], "pretraining", f"--data.init_args.train={lists['train']}", dev)
    last = pretraining / "iteration2" / "last.ckpt"
    return pretraining, {
        "pretrained": fit(["demo-finetune.yaml"], "finetuning", *transcribed, f"--model.init_args.pretrained={last}"),
        "scratch": fit(["demo-finetune.yaml", "demo-scratch.yaml"], "scratch", *transcribed),
    }


def _shortened(config: Path, steps: int) -> list[str]:
    """Options that let a fit end after some steps."""
    if iterations := yaml.safe_load(config.read_text()).get("iterations"):
        option = f"--iterations={json.dumps([iteration | {'max_steps': steps} for iteration in iterations])}"
    else:
        option = f"--trainer.max_steps={steps}"
    return [option, f"--trainer.val_check_interval={steps}"]


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


def _report(console: Console, results: Results, runs: dict[str, Path], minutes: float) -> None:
    clusters = Table("clusters of", "PNMI, held-out speakers", title="Quality of the clusters")
    for name, value in results["pnmi"].items():
        clusters.add_row(name, f"{value:.3f}")
    errors = Table(f"{minutes:.3g} minutes of transcripts", "WER %", "CER %", title="Error rates, held-out speakers")
    for name in ("scratch", "pretrained"):
        errors.add_row(name, f"{100 * results['wer'][name]:.1f}", f"{100 * results['cer'][name]:.1f}")
    console.print(clusters)
    console.print(errors)
    rows = {name: [json.loads(line) for line in (run / "test.jsonl").open()] for name, run in runs.items()}
    for scratch, pretrained in list(zip(rows["scratch"], rows["pretrained"], strict=True))[:3]:
        console.print(f"reference   {scratch['reference']}", highlight=False)
        console.print(f"scratch     {scratch['hypothesis']}", highlight=False)
        console.print(f"pretrained  {pretrained['hypothesis']}\n", highlight=False)


def _figure(results: Results, pretraining: Path, minutes: float) -> bytes:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    curves, units, errors = figure.subplots(1, 3)
    for number, colour in ((1, ORANGE), (2, BLUE)):
        steps, accuracy = _curve(pretraining / f"iteration{number}", "val/masked_accuracy")
        curves.plot(
            steps, [100 * value for value in accuracy], color=colour, label=f"iteration {number}", lw=2, marker="."
        )
    curves.set(title="Masked accuracy", xlabel="step", ylabel="accuracy, %", ylim=(0, None))
    curves.legend(frameon=False)
    bars = units.bar(["MFCC", "iteration 1", "iteration 2"], results["pnmi"].values(), color=[GREY, ORANGE, BLUE])
    units.bar_label(bars, fmt="%.3f")
    units.set(title="Quality of the clusters", ylabel="PNMI")
    for offset, name, colour in ((-0.2, "scratch", GREY), (0.2, "pretrained", BLUE)):
        rates = [100 * results["wer"][name], 100 * results["cer"][name]]
        bars = errors.bar([offset, 1 + offset], rates, width=0.36, color=colour, label=name)
        errors.bar_label(bars, fmt="%.1f")
    errors.set(
        title=f"Error rates, {minutes:.3g} min of transcripts",
        ylabel="%",
        xticks=[0, 1],
        xticklabels=["WER", "CER"],
    )
    errors.set_ylim(0, 125 * max(*results["wer"].values(), *results["cer"].values()))
    errors.legend(frameon=False, loc="upper center", ncols=2)
    return png_of(figure)


def _curve(run: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric of a run; a resumed run has a log for each start."""
    rows: list[dict[str, str]] = []
    for log in sorted(run.glob("version_*/metrics.csv")):
        with log.open() as file:
            rows += [row for row in csv.DictReader(file) if row.get(name)]
    return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]
