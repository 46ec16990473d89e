"""Transcribe a recording to subtitles, and compare the words with what was said.

Run: python docs/examples/transcribe_and_score.py checkpoints/mine/words/best.ckpt recording.m4a recording.srt \\
         --reference said.txt
"""

import argparse
from pathlib import Path

import hubert_lightning as hl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="fine-tuned model: a checkpoint, a folder, or a name on the Hugging Face hub")
    parser.add_argument("recording", type=Path, help="audio or video of any format and length")
    parser.add_argument("subtitles", type=Path, help="file to write; WebVTT if it ends in .vtt, else SRT")
    parser.add_argument("--reference", type=Path, help="text file of what was said")
    args = parser.parse_args()

    transcriber = hl.Transcriber.from_pretrained(args.model)
    transcript = transcriber(args.recording)
    subtitles = transcript.to_vtt() if args.subtitles.suffix == ".vtt" else transcript.to_srt()
    args.subtitles.write_text(subtitles, "utf-8")
    print(f"{args.subtitles}: {len(transcript.words)} words in {transcript.duration:.1f} s")
    if args.reference:
        reference = transcriber.vocabulary.normalise(args.reference.read_text("utf-8"))  # case, punctuation
        scores = hl.score(reference, transcript)
        print(f"word error rate {scores.words.rate:.1%}, character error rate {scores.letters.rate:.1%}")


if __name__ == "__main__":
    main()
