"""Turn a folder of recordings into units without repetitions, and compute their bit rate.

Run: python docs/examples/units_bit_rate.py checkpoints/mine/encoder/iteration1/last.ckpt \\
         checkpoints/mine/encoder/iteration2/kmeans.safetensors RECORDINGS
"""

import argparse
from math import log
from pathlib import Path

import torch

from hubert_lightning import Units
from hubert_lightning.data.examine import examine
from hubert_lightning.features.recordings import listed
from hubert_lightning.units.quality import entropy
from hubert_lightning.units.unit_extractor import deduplicated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model in any format, or mfcc")
    parser.add_argument("kmeans", type=Path, help="K-means of a layer of the model, by a run or `hubert kmeans fit`")
    parser.add_argument("folder", type=Path, help="folder of audio in any format")
    args = parser.parse_args()
    units = Units.from_pretrained(args.model, args.kmeans)
    cuts, refused, _ = examine(listed([args.folder]), progress=False)
    for file in refused:
        print(f"{file.path}: {file.reason}")
    [frames] = units.of_cuts([cuts])  # of each recording, one unit per 20 ms
    runs = [deduplicated(recording).units for recording in frames]
    for name, units_of in (("one per 20 ms", frames), ("without repetitions", runs)):
        bits = float(entropy(torch.bincount(torch.cat(units_of)))) / log(2)  # of a unit, from how often each occurs
        rate = sum(map(len, units_of)) / sum(cut.duration for cut in cuts)
        print(f"{name}: {rate:.1f} units/s of {bits:.2f} bits, {rate * bits:.0f} bit/s")


if __name__ == "__main__":
    main()
