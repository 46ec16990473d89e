"""Pre-train on a folder of recordings, and fine-tune the result on a table of sentences.

Run: python docs/examples/pretrain_and_finetune.py RECORDINGS table.csv checkpoints/mine

The table (CSV or TSV) has the columns `path` and `text`. `--steps 20` tries everything out in a few minutes. The same
command resumes an interrupted run.
"""

import argparse
from math import nan
from pathlib import Path

import hubert_lightning as hl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path, help="folder of audio in any format")
    parser.add_argument("table", type=Path, help="table of audio paths and their sentences")
    parser.add_argument("output", type=Path, help="folder of the two runs")
    parser.add_argument("--size", default="small", help="size of the model: small, base")
    parser.add_argument("--steps", type=int, help="optimizer steps of each training; default: those of the configs")
    args = parser.parse_args()

    pretraining = hl.pretrain(args.recordings, args.output / "encoder", args.size, steps=args.steps)
    accuracy = pretraining.metrics.get("val/masked_accuracy", nan)  # none without held-out recordings
    print(f"{pretraining.checkpoint}: predicts {accuracy:.1%} of the masked clusters")

    finetuning = hl.finetune(args.table, pretraining.checkpoint, args.output / "words", steps=args.steps)
    print(f"{finetuning.checkpoint}: word error rate {finetuning.metrics['val/wer']:.1%} on held-out sentences")


if __name__ == "__main__":  # processes of several GPUs start this file again
    main()
