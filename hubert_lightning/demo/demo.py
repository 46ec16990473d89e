"""HuBERT from audio to words on a synthetic corpus, with the same functions that real training uses."""

import csv
import json
import logging
import time
from pathlib import Path

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

BATCH_FRAMES = 500  # 10 s
MINUTES = 12  # on two cores without bfloat16 (docs/results.md)


def demo(output: Path = Path("demo"), minutes: float = 60.0, steps: int | None = None) -> None:
    """Synthesise speech, pre-train two iterations, fine-tune, and compare with learning from scratch.

    Args:
        output: Folder for the corpus, the runs, results.json and results.png.
        minutes: Of speech to pre-train on; a sixth of it is transcribed.
        steps: Of each of the four trainings; for a look at how it runs, without time to learn.
    """
    console = Console()
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)  # what they say of devices and tips is not the show
    output = Path(output)
    if (output / "results.json").exists():
        raise UserError(f"{output}: holds a finished demo (results.json); look at it, or choose another --output")
    started = time.perf_counter()
    precision = _fastest_precision()
    console.print(
        f"Synthetic speech → MFCC clusters → iteration 1 → its own clusters → iteration 2 → CTC on {minutes / 6:.3g} "
        f"minutes of transcripts, and the same from scratch, in {precision}, into {output}/: "
        + (f"{steps} steps each, to see it run" if steps else f"about {MINUTES} minutes on two cores")
    )
    heldout = min(4.0, minutes / 6)
    synthesise_corpus(output, minutes, finetuning_minutes=minutes / 6, dev_minutes=heldout, test_minutes=heldout)
    manifests = output / "manifests"
    configs = configs_folder()

    def fit(names: list[str], folder: str, *more: str) -> Path:
        layers = [f"--config={configs / name}" for name in names]
        short = _shortened(configs / names[0], steps) if steps else []
        experiment.fit([*layers, f"--output={output / folder}", f"--trainer.precision={precision}", *short, *more])
        return output / folder

    pretraining = fit(
        ["demo.yaml"],
        "pretraining",
        f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
        f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
    )
    transcribed = [
        f"--data.init_args.train=[{manifests / 'finetune.jsonl.gz'}]",
        f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
        f"--data.init_args.test=[{manifests / 'test.jsonl.gz'}]",
    ]
    last = pretraining / "iteration2" / "last.ckpt"
    runs = {
        "pretrained": fit(["demo-finetune.yaml"], "finetuning", *transcribed, f"--model.init_args.pretrained={last}"),
        "scratch": fit(["demo-finetune.yaml", "demo-scratch.yaml"], "scratch", *transcribed),
    }
    for folder in runs.values():
        experiment.judge("test", ["--config", str(folder / "config.yaml")])
    scores = {name: json.loads((folder / "test-metrics.json").read_text()) for name, folder in runs.items()}
    results = {
        "pnmi": _pnmi(pretraining, manifests),
        "wer": {name: scores[name]["test/wer"] for name in ("scratch", "pretrained")},
        "cer": {name: scores[name]["test/cer"] for name in ("scratch", "pretrained")},
        "seconds": round(time.perf_counter() - started),
    }
    with replacing_all(output / "results.png", output / "results.json") as (figure, file):
        figure.write(_drawn(results, pretraining, minutes / 6))
        file.write((json.dumps(results, indent=2) + "\n").encode())
    _report(console, results, runs, minutes / 6)
    console.print(f"{results['seconds']} s; numbers in {output / 'results.json'}, figure in {output / 'results.png'}")


def _shortened(config: Path, steps: int) -> list[str]:
    iterations = yaml.safe_load(config.read_text()).get("iterations")
    if iterations:
        fewer = f"--iterations={json.dumps([iteration | {'max_steps': steps} for iteration in iterations])}"
    else:
        fewer = f"--trainer.max_steps={steps}"
    return [fewer, f"--trainer.val_check_interval={steps}"]


def _fastest_precision() -> str:
    """bf16 where this machine multiplies faster in it; processors that lack the instructions are slower."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(1024, 1024, dtype=dtype)
        a @ a
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        seconds[dtype] = time.perf_counter() - start
    return "bf16-mixed" if seconds[torch.bfloat16] < 0.7 * seconds[torch.float32] else "32-true"


def _pnmi(pretraining: Path, manifests: Path) -> dict[str, float]:
    """PNMI on speakers that no model heard; the clusters of iteration 2 are made as those of iteration 1 were."""
    heldout = [cut for name in ("dev", "test") for cut in read_manifest(manifests / f"{name}.jsonl.gz")]
    layer = int(LabelStore(pretraining / "iteration2" / "labels").source.features.split()[1])
    iteration1, iteration2 = (
        layer_extractor(pretraining / f"iteration{number}" / "last.ckpt", layer, torch.device("cpu"))
        for number in (1, 2)
    )
    [of_mfcc], _ = load_kmeans(pretraining / "iteration1" / "kmeans.safetensors")
    [of_iteration1], settings = load_kmeans(pretraining / "iteration2" / "kmeans.safetensors")
    seed = int(settings["seed"])
    train = list(read_manifest(manifests / "train.jsonl.gz"))
    sample, _ = sample_frames(iteration2, train, int(settings["max_frames"]), seed, batch_frames=BATCH_FRAMES)
    of_iteration2 = KMeans().fit(sample, len(of_iteration1), seed)

    def pnmi(extractor: Extractor, centroids: Tensor) -> float:
        [clusters] = assign_clusters(extractor, [(slice(None), centroids)], [heldout], BATCH_FRAMES)
        return round(phone_quality(heldout, clusters, len(centroids)).pnmi, 4)

    return {
        "mfcc": pnmi(mfcc_extractor(), of_mfcc),
        "iteration1": pnmi(iteration1, of_iteration1),
        "iteration2": pnmi(iteration2, of_iteration2),
    }


def _report(console: Console, results: dict, runs: dict[str, Path], minutes: float) -> None:
    clusters = Table("clusters of", "PNMI on unheard speakers", title="What the units know of phones")
    for name, value in results["pnmi"].items():
        clusters.add_row(name, f"{value:.3f}")
    errors = Table(
        f"{minutes:.3g} minutes of transcripts", "WER %", "CER %", title="What the model hears, unheard speakers"
    )
    for name in ("scratch", "pretrained"):
        errors.add_row(name, f"{100 * results['wer'][name]:.1f}", f"{100 * results['cer'][name]:.1f}")
    console.print(clusters)
    console.print(errors)
    rows = {name: [json.loads(line) for line in (run / "test.jsonl").open()] for name, run in runs.items()}
    for scratch, pretrained in list(zip(rows["scratch"], rows["pretrained"], strict=True))[:3]:
        console.print(f"said        {scratch['reference']}", highlight=False)
        console.print(f"scratch     {scratch['hypothesis']}", highlight=False)
        console.print(f"pretrained  {pretrained['hypothesis']}\n", highlight=False)


def _drawn(results: dict, pretraining: Path, minutes: float) -> bytes:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    curves, units, errors = figure.subplots(1, 3)
    for number, colour in ((1, ORANGE), (2, BLUE)):
        steps, accuracy = _curve(pretraining / f"iteration{number}", "val/masked_accuracy")
        curves.plot(
            steps, [100 * value for value in accuracy], color=colour, label=f"iteration {number}", lw=2, marker="."
        )
    curves.set(title="Masked frames predicted", xlabel="step", ylabel="accuracy, %", ylim=(0, None))
    curves.legend(frameon=False)
    bars = units.bar(["MFCC", "iteration 1", "iteration 2"], results["pnmi"].values(), color=[GREY, ORANGE, BLUE])
    units.bar_label(bars, fmt="%.3f")
    units.set(title="What clusters know of phones", ylabel="PNMI")
    for place, name, colour in ((-0.2, "scratch", GREY), (0.2, "pretrained", BLUE)):
        rates = [100 * results[rate][name] for rate in ("wer", "cer")]
        bars = errors.bar([0 + place, 1 + place], rates, width=0.36, color=colour, label=name)
        errors.bar_label(bars, fmt="%.1f")
    errors.set(
        title=f"Errors after {minutes:.3g} minutes of transcripts",
        ylabel="%",
        xticks=[0, 1],
        xticklabels=["words", "letters"],
    )
    errors.set_ylim(0, 125 * max(*results["wer"].values(), *results["cer"].values()))
    errors.legend(frameon=False, loc="upper center", ncols=2)
    return png_of(figure)


def _curve(run: Path, name: str) -> tuple[list[int], list[float]]:
    """One metric of a run and its steps; a run that was resumed has a log for each start."""
    rows: list[dict[str, str]] = []
    for log in sorted(run.glob("version_*/metrics.csv")):
        with log.open() as file:
            rows += [row for row in csv.DictReader(file) if row.get(name)]
    return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]
