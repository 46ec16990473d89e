"""Folders of runs, written by hand with the files that a fit, a test and a tuned decoder leave; nothing is trained."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.training.watched import (
    LayerRow,
    LayersOfStep,
    PhoneClusters,
    WatchedUnits,
    WatchedUtterance,
    add_layers,
    write_phone_clusters,
    write_units,
)

STEPS = 400
CLUSTERS = 20
NASTY_ID = '</script><script>document.title="broken"</script> \u202edesrever'
NASTY_TEXT = 'SAY </script><img src=x onerror=alert(1)> "QUOTED" END'
SPEAKERS = ("anna", "ben", "cho", "dede")


def recording(path: Path, seconds: float, pitch: float = 220.0) -> Path:
    """A tone whose loudness rises and falls twice a second."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tone = 0.3 * np.sin(2 * np.pi * pitch * time) * (1 + np.sin(4 * np.pi * time)) / 2
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone, SAMPLE_RATE, subtype="PCM_16")
    return path


def write_table(run: Path, curves: Mapping[str, Mapping[int, float]]) -> None:
    """Write metrics.csv as a CSVLogger does, which counts steps from 0."""
    run.mkdir(parents=True, exist_ok=True)
    steps = sorted({step for curve in curves.values() for step in curve})
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", *curves])
        writer.writeheader()
        for step in steps:
            values = {name: curve[step] for name, curve in curves.items() if step in curve}
            writer.writerow({"step": step - 1, **values})


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def pretraining_run(run: Path, audio: Path | None = None, number: int = 1, finished: bool = True) -> Path:
    """A pre-training run of one iteration.

    Args:
        run: Folder.
        audio: Recording of at least two seconds that is watched.
        number: Number of the iteration.
        finished: Whether the fit has ended.
    """
    every, validations = range(20, STEPS + 1, 20), range(100, STEPS + 1, 100)
    curves = {
        "train/masked_loss": {step: 3 * math.exp(-step / 300) + 1 / number for step in every},
        "train/learning_rate": {step: 5e-4 * step / STEPS for step in every},
        "train/gradient_norm": {step: 2 + math.sin(step) for step in every},
        "val/masked_loss": {step: 3.1 * math.exp(-step / 300) + 1 / number for step in validations},
        "val/masked_accuracy": {step: 0.1 + 0.001 * step * number for step in validations},
        "units/label_perplexity": dict.fromkeys(validations, 15.0),
        "units/predicted_perplexity": {step: 5 + step / 50 for step in validations},
        "units/label_coverage": dict.fromkeys(validations, 1.0),
        "units/predicted_coverage": {step: step / 500 for step in validations},
        "speed/audio_seconds_per_second": dict.fromkeys(every, 250.0),
        "speed/data_wait": dict.fromkeys(every, 0.4),
        "speed/mfu": dict.fromkeys(every, 0.31),
    }
    write_table(run, curves)
    features = "mfcc" if number == 1 else str(run.parent / f"iteration{number - 1}" / "last.ckpt")
    write_json(
        run / "record.json",
        {
            "task": "HubertPretraining",
            "parameters": 1_500_000,
            "encoder/num_layers": 3,
            "encoder/dim": 128,
            "encoder/num_heads": 4,
            "optimizer/class": "AdamW",
            "optimizer/lr": 5e-4,
            "schedule/total_steps": STEPS,
            "batch/global_seconds": 40.0,
            "data/train/hours": 1.25,
            "data/train/speakers": 24,
            "data/train/manifests": "/home/somebody/secret/manifests/train.jsonl.gz",
            "labels/features": features,
            "labels/layer": None if number == 1 else 1,
            "labels/clusters": CLUSTERS,
            "world_size": 1,
            "seed": 0,
        },
    )
    if finished:
        write_json(run / "metrics.json", {"val/masked_accuracy": curves["val/masked_accuracy"][STEPS], "steps": STEPS})
    if audio is not None:
        labels = [(7 * frame // 3) % CLUSTERS for frame in range(99)]
        utterance = WatchedUtterance(
            id="watched-1",
            source=str(audio),
            channel=0,
            start=0.0,
            duration=2.0,
            speaker="anna",
            text="HELLO",
            phones=[("sil", 0.0, 0.4), ("AH", 0.4, 1.2), ("sil", 1.2, 2.0)],
            labels=[labels],
            predictions=[[(label + frame % 2) % CLUSTERS for frame, label in enumerate(labels)]],
            mask=[(10, 10), (50, 12)],
        )
        write_units(run, WatchedUnits(STEPS, 0.02, [utterance]))
        counts = [[30 * (cluster % 3 == phone) + 1 for cluster in range(CLUSTERS)] for phone in range(3)]
        write_phone_clusters(run, PhoneClusters(STEPS, ["sil", "AH", "S"], counts))
        layers = [LayerRow(layer, 0.2 + 0.1 * layer, 0.5, 0.1, 15.0, 0) for layer in (1, 2, 3)]
        add_layers(run, LayersOfStep(STEPS, CLUSTERS, layers))
    return run


def result_rows(audio: Path | None, count: int = 12, seconds: float = 1.5, errors: int = 3) -> list[dict[str, Any]]:
    """Rows of a test.jsonl: each `errors`-th utterance has a wrong word; id and text of the first need escapes."""
    rows = []
    for number in range(count):
        reference = f"TURN THE LAMP {('ON', 'OFF', 'UP', 'DOWN')[number % 4]} PLEASE"
        hypothesis = reference.replace("LAMP", "LAMB") if number % errors == 0 else reference
        place = {"source": str(audio), "channel": 0, "start": 0.1 * (number % 5), "duration": seconds}
        rows.append(
            {
                "id": f"{number:04d}",
                "speaker": SPEAKERS[number % len(SPEAKERS)],
                "reference": reference,
                "hypothesis": hypothesis,
                **(place if audio else {}),
                "checkpoint": "best.ckpt",
                "step": STEPS,
                "manifest": "manifests/test.jsonl.gz",
                "decoder": "greedy",
                "version": "0.1.0",
            }
        )
    rows[0] |= {"id": NASTY_ID, "reference": NASTY_TEXT, "hypothesis": "SAY NOTHING"}
    return rows


def write_results(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def finetuning_run(run: Path, rows: Sequence[Mapping[str, Any]] = (), finished: bool = True) -> Path:
    """A fine-tuning run, with the results of a test if there are rows."""
    validations = range(50, STEPS + 1, 50)
    wer = {step: max(0.05, 1 - step / 500) for step in validations}
    write_table(
        run,
        {
            "train/loss": {step: 300 * math.exp(-step / 150) for step in range(25, STEPS + 1, 25)},
            "val/loss": {step: 320 * math.exp(-step / 150) for step in validations},
            "val/wer": wer,
            "val/cer": {step: rate / 3 for step, rate in wer.items()},
            "speed/audio_seconds_per_second": dict.fromkeys(validations, 180.0),
        },
    )
    write_json(
        run / "record.json",
        {
            "task": "CTCFinetuning",
            "pretrained": "/home/somebody/secret/pretraining/iteration2/last.ckpt",
            "optimizer/lr": 1e-4,
            "schedule/total_steps": STEPS,
            "batch/global_seconds": 20.0,
            "data/train/hours": 0.2,
        },
    )
    if finished:
        write_json(run / "metrics.json", {"val/wer": wer[STEPS], "steps": STEPS})
    if rows:
        write_results(run / "test" / "test" / "test.jsonl", rows)
        write_results(run / "test.jsonl", rows)
    return run


def trials_file(path: Path) -> Path:
    """The trials of a tuned decoder."""
    trials = [{"wer": 0.2 + 0.01 * abs(4 - weight), "lm_weight": float(weight)} for weight in range(8)]
    write_json(path, {"greedy_wer": 0.3, "default_wer": 0.25, "best_wer": 0.2, "trials": trials})
    return path
