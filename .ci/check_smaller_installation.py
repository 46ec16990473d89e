"""Use an installation from which packages were removed: verbs work without them, or say which one they need.

Run by `.ci/install` after `check_installation.py`. Arguments: a fine-tuned checkpoint, then the packages.
"""

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import soundfile

from hubert_lightning import Transcriber
from hubert_lightning.cli import main

MANIFEST = "manifests/recordings.jsonl.gz"
MISSING = {
    "matplotlib": [["quality", "mfcc", "recordings"], ["demo", "--steps", "1"]],
    "plotly": [["report", "run"], ["pretrain", "recordings", "--output", "run"]],
    "optuna": [["tune-decoder", "model.ckpt", MANIFEST, "search.json"]],
    "kaldingram": [["ngram", "text.txt", "words.arpa"]],
    "scikit-learn": [
        ["kmeans", "export", "kmeans.safetensors", "kmeans.joblib"],
        ["kmeans", "fit", "mfcc", MANIFEST, "new.safetensors", "--kmeans", "hubert_lightning.ScikitKMeans"],
        ["pretrain", MANIFEST, "--heldout=0", "--report=false", "--output=automatic", "--iterations.2.layer", "auto"],
        [
            "pretrain",
            MANIFEST,
            "--heldout=0",
            "--report=false",
            "--output=automatic",
            "--iterations.1.clusters",
            "auto",
        ],
    ],
    "wandb": [["fit", "--config", "pretrain/base", "--output", "run"]],
}
"""Command lines that need a package, by its name."""
WORKING = [
    ["--help"],
    ["configs"],
    ["prepare", "folder", "recordings", "manifests", "--heldout", "0"],
    ["kmeans", "fit", "mfcc", MANIFEST, "kmeans.safetensors", "--clusters", "8"],
    ["units", "mfcc", "recordings/a.wav", "--kmeans", "kmeans.safetensors", "--output", "units.jsonl"],
    ["transcribe", "model.ckpt", "recordings", "--output", "transcripts"],
    ["plan", "pretrain/base"],
    ["pretrain", MANIFEST, "--heldout", "0", "--output", "small", "--steps", "1", "--batch_seconds", "6",
     "--iterations.1.clusters", "8", "--iterations.2.clusters", "8", "--report", "false"],
]  # fmt: skip
"""Command lines that need none of them, in an order in which each has its files."""


def answer(args: list[str]) -> tuple[int, str]:
    """Call a verb; returns its exit status and what it prints on standard error."""
    status = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main(args)
        except SystemExit as end:
            status = int(end.code or 0)
    return status, errors.getvalue()


model, *removed = sys.argv[1:]
assert set(removed) == set(MISSING), removed
modules = {"scikit-learn": "sklearn"}
for package in removed:
    assert find_spec(modules.get(package, package)) is None, f"{package} is still installed"
checkpoint = Path(model).read_bytes()
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    Path("model.ckpt").write_bytes(checkpoint)
    Path("text.txt").write_text("A CAT\n")
    Path("recordings").mkdir()
    soundfile.write("recordings/a.wav", np.random.default_rng(0).normal(0, 0.1, 48_000), 16_000)
    assert Transcriber.from_pretrained("model.ckpt")("recordings/a.wav").text
    for args in WORKING:
        status, errors = answer(args)
        assert status == 0, (args, errors)
    assert json.loads(Path("units.jsonl").read_text())["units"]
    for package, lines in MISSING.items():
        for args in lines:
            status, errors = answer(args)
            assert status == 2, (args, status, errors)
            sentence = f"{package} is not installed; install it with: pip install '{package}"
            assert re.match(rf"hubert: (iterations\.\d: )?{re.escape(sentence)}", errors), (args, errors)
            assert errors.count("\n") == 1, (args, errors)
