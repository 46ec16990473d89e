"""Babble: recordings of several people who speak at once, as a noise, and test sets with it.

    python benchmarks/babble.py noise MANIFEST OUT [--recordings 100] [--seconds 15] [--talkers 4] [--seed 0]
    python benchmarks/babble.py mix TEST BABBLE OUT [--ratio 5] [--talkers 4] [--seed 0]

`noise` writes babble of the recordings of a manifest, and `OUT/babble.jsonl.gz`, for `data.mixing.noise`. `mix` adds
babble of the recordings of BABBLE to every utterance of TEST, over its whole length, at one ratio of the energies in
dB, and writes `OUT/mixed.jsonl.gz` with the transcripts of TEST. Talkers are of different speakers while there are
enough, and equally loud.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from lhotse import MonoCut, Recording
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import read_manifest, speaker_of, write_manifest
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.training.mixing import overlapped, power

PEAK = 0.99
"""Largest sample that is written; a louder mixture is scaled down as a whole."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    noise, mix = commands.add_parser("noise"), commands.add_parser("mix")
    noise.add_argument("manifest", type=Path)
    noise.add_argument("out", type=Path)
    noise.add_argument("--recordings", type=int, default=100)
    noise.add_argument("--seconds", type=float, default=15)
    mix.add_argument("test", type=Path)
    mix.add_argument("babble", type=Path)
    mix.add_argument("out", type=Path)
    mix.add_argument("--ratio", type=float, default=5, help="energy of speech over babble in dB")
    for command in (noise, mix):
        command.add_argument("--talkers", type=int, default=4)
        command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    if args.command == "noise":
        cuts, name = list(_noises(args, rng)), "babble.jsonl.gz"
    else:
        cuts, name = list(_mixtures(args, rng)), "mixed.jsonl.gz"
    write_manifest(cuts, args.out / name)
    print(f"{args.out / name}: {len(cuts)} recordings with {args.talkers} talkers")


def _noises(args: argparse.Namespace, rng: np.random.Generator) -> Iterator[Cut]:
    sources, samples = [*read_manifest(args.manifest)], round(args.seconds * SAMPLE_RATE)
    for number in range(args.recordings):
        yield _written(args.out, f"babble-{number:04d}", babble(sources, samples, args.talkers, rng))


def _mixtures(args: argparse.Namespace, rng: np.random.Generator) -> Iterator[Cut]:
    sources = [*read_manifest(args.babble)]
    for cut in sorted(read_manifest(args.test), key=lambda cut: cut.id):
        waveform = read_waveform(cut)
        samples = len(waveform)
        noise = babble(sources, samples, args.talkers, rng)
        mixture = overlapped(waveform, noise, args.ratio, 0, 0, samples)
        written = _written(args.out, cut.id, mixture)
        written.supervisions = [replace(part, recording_id=cut.id) for part in cut.supervisions]
        yield written


def babble(sources: Sequence[Cut], samples: int, talkers: int, rng: np.random.Generator) -> Tensor:
    """Add up equally loud recordings, each from a random start, repeated to the end.

    Args:
        sources: Recordings to choose from.
        samples: Length of the babble.
        talkers: Number of recordings.
        rng: Source of all random numbers.

    Returns:
        (samples,).
    """
    chosen: list[Cut] = []
    for index in rng.permutation(len(sources)).tolist():
        if len(chosen) < talkers and speaker_of(sources[index]) not in {speaker_of(cut) for cut in chosen}:
            chosen.append(sources[index])
    rest = [cut for cut in sources if cut not in chosen]
    chosen += [rest[index] for index in rng.permutation(len(rest))[: talkers - len(chosen)].tolist()]
    total = torch.zeros(samples)
    for cut in chosen:
        waveform = read_waveform(cut)
        waveform = waveform.roll(-int(rng.integers(len(waveform)))).repeat(-(-samples // len(waveform)))[:samples]
        total += waveform / power(waveform) ** 0.5
    return 0.05 * total / talkers**0.5


def _written(folder: Path, name: str, waveform: Tensor) -> MonoCut:
    path = folder / f"{name}.flac"
    folder.mkdir(parents=True, exist_ok=True)
    loudest = float(waveform.abs().max())
    soundfile.write(path, (waveform * min(1.0, PEAK / loudest)).numpy(), SAMPLE_RATE)
    recording = Recording.from_file(path.resolve(), recording_id=name)
    return MonoCut(name, 0.0, recording.duration, 0, recording=recording)


if __name__ == "__main__":
    main()
