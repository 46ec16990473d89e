"""Reading of audio files, one core: times real time of whole files and of crops, by format.

    uv run python benchmarks/audio_files.py LibriSpeech/train-clean-100 --files 100

Needs ffmpeg, which makes the other formats of the FLAC files in the folder. Bare decodes a file from its beginning to
its end and keeps nothing, with soundfile for WAV and FLAC, with PyAV for the others; ours reads it through
`read_waveform`, which resamples and checks its length; a crop is 4 s at a random place. `prepare` is what `hubert
prepare` does to know that a file can be used. All take turns; medians. Also crops of 15 s from an hour in one file, the
first of which decodes up to itself.
"""

import argparse
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import soundfile
import torch
from lhotse.cut import Cut

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.examine import examine
from hubert_lightning.data.probe import probe
from hubert_lightning.frames import SAMPLE_RATE

FORMATS = {
    "flac": "-c:a flac",
    "wav": "",
    "ogg": "-c:a libvorbis",
    "mp3": "-b:a 48k -ar 32000",
    "m4a": "-ar 44100",
    "opus": "-c:a libopus -b:a 24k",
}
CROP = 4 * SAMPLE_RATE


def encoded(source: Path, target: Path, options: str) -> Path:
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-i", source, *options.split(), target], check=True)
    return target


def bare(path: Path) -> None:
    if path.suffix in (".wav", ".flac"):
        soundfile.read(path, dtype="float32")
        return
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            packet.decode()


def crop(cut: Cut, draw: random.Random, size: int) -> int:
    size = min(size, cut.num_samples)
    read_waveform(cut, draw.randrange(cut.num_samples - size + 1), size)
    return size


def timed(work: Callable[[], int]) -> float:
    """Times real time, of work that returns a number of samples at 16 kHz."""
    start = time.perf_counter()
    samples = work()
    return samples / SAMPLE_RATE / (time.perf_counter() - start)


def each(work: Callable[[Cut], object], cuts: Sequence[Cut]) -> int:
    for cut in cuts:
        work(cut)
    return sum(cut.num_samples for cut in cuts)


def path_of(cut: Cut) -> Path:
    return Path(cut.recording.sources[0].source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sources = sorted(args.folder.rglob("*.flac"))[: args.files]
    print(f"{'':6} {'bare':>8} {'ours':>8} {'crops':>8} {'prepare':>8}   times real time")
    with tempfile.TemporaryDirectory() as folder:
        for suffix, options in FORMATS.items():
            files = [encoded(path, Path(folder) / f"{n}.{suffix}", options) for n, path in enumerate(sources)]
            cuts, refused, _ = examine(files)
            assert not refused, refused
            draw = random.Random(0)
            kinds: dict[str, Callable[[], int]] = {
                "bare": lambda cuts=cuts: each(lambda cut: bare(path_of(cut)), cuts),
                "ours": lambda cuts=cuts: each(read_waveform, cuts),
                "crops": lambda cuts=cuts, draw=draw: sum(crop(cut, draw, CROP) for cut in cuts),
                "prepare": lambda cuts=cuts: each(lambda cut: probe(path_of(cut)), cuts),
            }
            took: dict[str, list[float]] = {name: [] for name in kinds}
            for _ in range(args.rounds):
                for name, work in kinds.items():
                    took[name].append(timed(work))
            print(f"{suffix:6}", *(f"{statistics.median(times):8.0f}" for times in took.values()))
        for suffix in ("mp3", "m4a", "opus"):
            listing = Path(folder) / "list.txt"
            listing.write_text("".join(f"file '{path.resolve()}'\n" for path in sources))
            command = ["ffmpeg", "-v", "error", "-y", "-f", "concat", "-safe", "0", "-stream_loop", "-1", "-i", listing]
            hour = Path(folder) / f"hour.{suffix}"
            subprocess.run([*command, "-t", "3600", *FORMATS[suffix].split(), hour], check=True)
            [cut], _, _ = examine([hour])
            draw, seconds = random.Random(0), []
            for _ in range(21):
                start = time.perf_counter()
                crop(cut, draw, 15 * SAMPLE_RATE)
                seconds.append(time.perf_counter() - start)
            later = statistics.median(seconds[10:])
            print(f"an hour of {suffix}: a crop of 15 s takes {seconds[0]:.2f} s at first, {later:.3f} s later")


if __name__ == "__main__":
    main()
