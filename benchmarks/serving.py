"""A service under load: requests that are all sent at once, and what becomes of them.

    python benchmarks/serving.py [--requests 50] [--seconds 10] [--sizes small base] [--endpoint transcribe]

Each size is a model of random weights: `small` is that of configs/finetune/small.yaml, `base` is HuBERT Base. The
service is the verb in a process of its own; its clients are in this one. Printed for each size: requests that got no
answer, median, 95th percentile and longest time of an answer, seconds of audio a second, and the highest memory of the
service before and during the load.
"""

import argparse
import asyncio
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import httpx
import numpy as np
import soundfile
import torch
from torch import nn

from hubert_lightning.asr.ctc_model import CTCModel
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.load import encoder_fingerprint
from hubert_lightning.units.kmeans_file import save_kmeans
from hubert_lightning.vocabulary import Vocabulary

SIZES = {
    "small": EncoderConfig(conv_channels=64, dim=128, num_layers=3, num_heads=4, ffn_dim=512),
    "base": EncoderConfig(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each recording")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--endpoint", choices=["transcribe", "units"], default="transcribe")
    parser.add_argument("--options", nargs="*", default=[], help="of hubert serve, such as batch_duration=60")
    args = parser.parse_args()
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            model, kmeans = save_model(Path(folder), SIZES[size])
            options = [f"--{option}" for option in args.options]
            command = [sys.executable, "-m", "hubert_lightning", "serve", model, "--kmeans", kmeans, "--port", "0"]
            with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
                try:
                    print(f"{size}: {asyncio.run(load(process, args))}", flush=True)
                finally:
                    process.terminate()


def save_model(folder: Path, config: EncoderConfig) -> tuple[Path, Path]:
    """Save a fine-tuned model of random weights, and a K-means of its last layer."""
    torch.manual_seed(0)
    vocabulary = Vocabulary()
    encoder = HubertEncoder(config).eval()
    model = CTCModel(encoder, nn.Linear(config.dim, len(vocabulary)), vocabulary)
    settings = {"encoder": asdict(config), "vocabulary": asdict(vocabulary) | {"tokens": list(vocabulary.tokens)}}
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": settings}, folder / "model.ckpt")
    source = {"features": f"layer {config.num_layers} of encoder {encoder_fingerprint(encoder)}"}
    save_kmeans(folder / "kmeans.safetensors", [torch.randn(500, config.dim)], source)
    return folder / "model.ckpt", folder / "kmeans.safetensors"


async def load(process: subprocess.Popen[str], args: argparse.Namespace) -> str:
    """Send all requests at once; returns what was measured."""
    url = address(process)
    uploads = [recording(args.seconds, number) for number in range(args.requests)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=3600, limits=limits) as client:

        async def ask(upload: bytes) -> tuple[int, float]:
            began = time.perf_counter()
            try:
                answer = await client.post(f"{url}/{args.endpoint}", files={"file": upload})
            except httpx.HTTPError:
                return 0, time.perf_counter() - began
            return answer.status_code, time.perf_counter() - began

        for upload in uploads[:2]:  # kernels are compiled for each length
            await ask(upload)
        idle = peak_memory(process.pid)
        began = time.perf_counter()
        answers = await asyncio.gather(*map(ask, uploads))
        took = time.perf_counter() - began
    lost = sum(status != 200 for status, _ in answers)
    times = sorted(seconds for _, seconds in answers)
    p95 = times[min(int(0.95 * len(times)), len(times) - 1)]
    facts = [
        f"{len(answers)} requests of {args.seconds:g} s at once, {lost} lost",
        f"answers after {statistics.median(times):.1f} s (median), {p95:.1f} s (p95), {times[-1]:.1f} s (longest)",
        f"{args.requests * args.seconds / took:.1f} s of audio a second",
        f"memory {peak_memory(process.pid):.2f} GB at most, {idle:.2f} GB before",
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}",
    ]
    return "; ".join(facts)


def address(process: subprocess.Popen[str]) -> str:
    """Wait for the line that names the service's address."""
    assert process.stderr is not None
    for line in process.stderr:
        if match := re.search(r" at (http://\S+) \(", line):
            return match[1]
        print(line, end="", file=sys.stderr)
    raise SystemExit("the service did not start")


def recording(seconds: float, seed: int) -> bytes:
    """Noise of a changing loudness as FLAC."""
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal(round(16_000 * seconds)) * np.repeat(
        rng.uniform(0.01, 0.1, 4), round(4_000 * seconds)
    )
    content = io.BytesIO()
    soundfile.write(content, samples, 16_000, format="FLAC")
    return content.getvalue()


def peak_memory(pid: int) -> float:
    """Highest resident memory of a process, in GB."""
    [kilobytes] = re.findall(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kilobytes) / 1e6


if __name__ == "__main__":
    main()
