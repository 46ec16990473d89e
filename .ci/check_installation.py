"""Use an installation as its users do: transcribe an m4a file, make units, and search with a language model.

Run by `.ci/install` with the Python of the environment. Arguments: the environment's `hubert`, a fine-tuned checkpoint.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import av
import numpy as np

from hubert_lightning import Transcriber
from hubert_lightning.asr.flashlight import IN_PYTHON
from hubert_lightning.cli import main


def write_m4a(path: Path, seconds: int) -> None:
    """Write noise as AAC in an m4a file."""
    samples = np.random.default_rng(seconds).normal(0, 3000, (1, seconds * 16_000)).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 16_000
        container.mux([*stream.encode(frame), *stream.encode(None)])


def verb(*args: str) -> str:
    """Call a verb in this process, which has its packages imported; returns its output."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main(args)
    return output.getvalue()


def command(*args: str) -> str:
    """Run the command `hubert` that was installed; returns its output."""
    return subprocess.run([hubert, *args], check=True, capture_output=True, text=True).stdout


hubert, model = (os.path.abspath(path) for path in sys.argv[1:])
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    Path("recordings").mkdir()
    recording = Path("recordings", "a.m4a")
    write_m4a(recording, 3)
    write_m4a(Path("recordings", "b.m4a"), 4)

    text = Transcriber.from_pretrained(model)(str(recording)).text
    assert text
    assert command("transcribe", model, str(recording)).strip() == text
    assert "transcribe" in command("--help")
    assert "finetune/10min" in command("configs")

    verb("prepare", "folder", "recordings", "manifests", "--heldout", "0")
    verb("kmeans", "fit", "mfcc", "manifests/recordings.jsonl.gz", "kmeans.safetensors", "--clusters", "8")
    verb("units", "mfcc", str(recording), "--kmeans", "kmeans.safetensors", "--output", "units.jsonl")
    units = json.loads(Path("units.jsonl").read_text())["units"]
    assert len(units) >= 149, units  # 3 s of 50 frames each, and AAC's padding
    assert set(units) <= set(range(8)), units

    # flashlight-text has wheels for Python 3.11 and 3.12; elsewhere the search in Python replaces it
    assert (sys.version_info >= (3, 13)) == IN_PYTHON
    Path("text.txt").write_text("A CAT\nTHE CAT SAT\n")
    verb("ngram", "text.txt", "words.arpa", "--order", "2")
    Path("search.json").write_text('{"lm": "words.arpa", "lexicon": "words.lexicon"}')
    words = verb("transcribe", model, str(recording), "--decoder", "search.json").split()
    assert words
    assert set(words) <= {"A", "CAT", "THE", "SAT"}, words
