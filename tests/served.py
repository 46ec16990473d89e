"""A service of small models, in this process or in one of its own."""

import asyncio
import re
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fork_server
import soundfile
import torch
from fastapi.testclient import TestClient
from helpers import noise_with_pauses, prints_text, save_ctc, wait_until

from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.pretrained.load import encoder_fingerprint, load_encoder
from hubert_lightning.serving.application import application
from hubert_lightning.serving.limits import Limits
from hubert_lightning.serving.models import Models
from hubert_lightning.serving.service import Service
from hubert_lightning.units.kmeans_file import save_kmeans

Answer = TypeVar("Answer")


class ServedFiles(NamedTuple):
    """Files of a service.

    Attributes:
        model: Fine-tuned model, which predicts another letter at almost every frame.
        kmeans: K-means of its second layer.
        recordings: Recordings of 1 to 4 s.
    """

    model: Path
    kmeans: Path
    recordings: list[Path]


def save_served_files(folder: Path) -> ServedFiles:
    model, kmeans = folder / "best.ckpt", folder / "units.safetensors"
    save_ctc(model, spread=3.0)
    encoder = load_encoder(model)
    with torch.no_grad():
        rows = encoder.features(noise_with_pauses(4, seed=9)[None], layer=2)[0]
    save_kmeans(kmeans, [rows[::10].clone()], {"features": f"layer 2 of encoder {encoder_fingerprint(encoder)}"})
    recordings = [folder / f"{seconds}.wav" for seconds in range(1, 5)]
    for seconds, path in enumerate(recordings, start=1):
        soundfile.write(path, noise_with_pauses(seconds + 3, seed=seconds)[: seconds * SAMPLE_RATE], SAMPLE_RATE)
    return ServedFiles(model, kmeans, recordings)


@contextmanager
def served_with(
    models: Models, limits: Limits = Limits(), hosts: tuple[str, ...] = (), origins: tuple[str, ...] = ()
) -> Iterator[TestClient]:
    """A client of a service that runs as long as the block."""
    torch.set_num_threads(2)  # as in tests, since the last bits of a product depend on it
    with TestClient(application(Service(models, limits, "best.ckpt"), hosts, origins)) as client:
        yield client


def finished(coroutine: Coroutine[Any, Any, Answer]) -> Answer:
    """Run a coroutine in a thread of its own, since a browser of earlier tests leaves its loop running in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


@contextmanager
def service(served: ServedFiles, output: Path, *options: str) -> Iterator[tuple[BaseProcess, str]]:
    """A service in a process of its own, on a free port, and its address."""
    output.touch()
    process = fork_server.start(
        ["serve", str(served.model), "--kmeans", str(served.kmeans), "--port", "0", *options], output
    )
    try:
        wait_until(prints_text(output, "ends it"), process)
        [address] = re.findall(r"at (http://\S+) \(/transcribe, /units, /stream; ", output.read_text())
        yield process, address
    finally:
        fork_server.end(process)
