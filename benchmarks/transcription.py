"""Transcribing beside the pipeline of transformers: one model, the same files, the best letter of each frame; and how
fast a beam search with a language model is.

    python benchmarks/transcription.py FOLDER_OF_AUDIO [--files 24] [--rounds 3]
    python benchmarks/transcription.py FOLDER_OF_AUDIO --files 200 --device cuda --batches 1 8 32

The model is HuBERT Base with random weights, in float32 unless told otherwise. Rounds are interleaved; what is printed
are medians. The pipeline is measured with batches of several sizes: which is fastest depends on how alike lengths are.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import soundfile
import torch
import transformers

from hubert_lightning.asr.ctc_model import load_ctc, log_probabilities
from hubert_lightning.asr.decoder_settings import DecoderSettings
from hubert_lightning.asr.decoding import BeamSearch, greedy
from hubert_lightning.asr.ngram import ngram
from hubert_lightning.data.examine import examine

TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="of the pipeline, in files")
    parser.add_argument("--text", type=Path, help="of a language model of words, for the beam search")
    args = parser.parse_args()
    files = sorted(args.folder.rglob("*.flac"))[: args.files]
    seconds = sum(soundfile.info(file).duration for file in files)
    folder = Path(tempfile.mkdtemp())
    theirs, tokenizer, features = save_model(folder)
    ours = load_ctc(folder).to(args.device)
    precision = partial(torch.autocast, args.device, torch.bfloat16, enabled=args.precision == "bf16")

    def transcribe() -> list[str]:
        cuts, _, _ = examine(files)
        [log_probs] = log_probabilities(ours, [cuts], progress="ours", precision=precision)
        return [greedy(rows[None], torch.tensor([len(rows)]), ours.vocabulary)[0] for rows in log_probs]

    def pipeline(batch_size: int) -> Callable[[], list[str]]:
        pipe = transformers.pipeline(
            "automatic-speech-recognition",
            model=theirs,
            tokenizer=tokenizer,
            feature_extractor=features,
            batch_size=batch_size,
            device=args.device,
        )

        def run() -> list[str]:
            heard = [{"raw": soundfile.read(file, dtype="float32")[0], "sampling_rate": 16_000} for file in files]
            with torch.inference_mode(), precision():
                return [" ".join(found["text"].split()) for found in pipe(heard)]

        return run

    systems = {"ours": transcribe} | {f"transformers, {size} at once": pipeline(size) for size in args.batches}
    said = {name: run() for name, run in systems.items()}  # also warms up
    took: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(args.rounds):
        for name, run in systems.items():
            start = time.perf_counter()
            run()
            took[name].append(time.perf_counter() - start)
    where = f"{torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{len(files)} files, {seconds:.0f} s of audio, {args.precision}, {where}")
    first = statistics.median(took["ours"])
    for name, times in took.items():
        median = statistics.median(times)
        print(f"{name:28} {median:7.2f} s, {seconds / median:6.1f} × real time, {median / first:.2f} of ours")
    theirs_first = said[f"transformers, {args.batches[0]} at once"]
    same = sum(a == b for a, b in zip(said["ours"], theirs_first, strict=True))
    print(f"{same} of {len(files)} transcripts are the same as theirs, {args.batches[0]} at once")
    if args.text:
        time_search(args.text, folder)


def save_model(folder: Path) -> tuple:
    torch.manual_seed(0)
    config = transformers.HubertConfig(vocab_size=len(TOKENS), pad_token_id=0)
    model = transformers.HubertForCTC(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)  # some letters, not blanks alone
    model.save_pretrained(folder)
    (folder / "letters.json").write_text(json.dumps({token: place for place, token in enumerate(TOKENS)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(folder / "letters.json")
    tokenizer.save_pretrained(folder)
    features = transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=False)
    features.save_pretrained(folder)
    return model, tokenizer, features


def time_search(text: Path, folder: Path) -> None:
    """Ten minutes of log-probabilities that spell sentences of the text, not clearly."""
    vocabulary = load_ctc(folder).vocabulary
    vocabulary.write(folder / "v.json")
    ngram(text, folder / "lm.arpa", order=3, vocabulary=folder / "v.json")
    rng = torch.Generator().manual_seed(0)
    heard, frames = [], 0
    for line in text.read_text().splitlines():
        path = [token for letter in vocabulary.encode(vocabulary.normalise(line)) for token in (letter, 0, 0)]
        if frames > 30_000 or not path:
            continue
        logits = 2 * torch.randn(len(path), len(vocabulary), generator=rng)
        logits[torch.arange(len(path)), path] += 6
        heard.append(logits.log_softmax(dim=-1))
        frames += len(path)
    for beam in (50, 500, 1500):
        settings = DecoderSettings(lm=f"{folder}/lm.arpa", lexicon=f"{folder}/lm.lexicon", beam_size=beam)
        search = BeamSearch(settings, vocabulary)
        search.nbest(heard[:4])  # starts its processes
        start = time.perf_counter()
        search.nbest(heard)
        took = time.perf_counter() - start
        search.close()
        print(
            f"beam of {beam:4}: {frames * 0.02:.0f} s of audio in {took:.1f} s, {frames * 0.02 / took:.0f} × real time"
        )


if __name__ == "__main__":
    main()
