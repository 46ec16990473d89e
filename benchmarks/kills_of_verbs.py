"""Kill the verbs around training wherever they write, start them again, and compare with what was never interrupted.

    uv run python benchmarks/kills_of_verbs.py                  # every verb, before each of its writes, and at random
    uv run python benchmarks/kills_of_verbs.py --only units export --most 5

Each verb runs on small data made on the spot. It is killed (SIGKILL) before the n-th system call that opens a file to
write, names, renames, links or removes one, or brings one to the disk; then the same command starts again. What is
there after the kill must be whole: each file is one of a finished call, or absent. After the second start, the folder
must hold what an uninterrupted call leaves, and nothing else.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import fork_server
from helpers import save_ctc

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import fingerprint, read_manifest, write_manifest
from hubert_lightning.demo.synthesis import synthesise_corpus
from hubert_lightning.features.mfcc import mfcc
from hubert_lightning.files import is_unfinished
from hubert_lightning.frames import SAMPLE_RATE, num_frames
from hubert_lightning.pretrained.load import encoder_fingerprint, load_encoder
from hubert_lightning.units.kmeans_file import save_kmeans
from hubert_lightning.units.label_shards import LabelSource
from hubert_lightning.units.label_writer import LabelWriter

VERBS: dict[str, str] = {
    "prepare librispeech": "prepare librispeech IN/LibriSpeech OUT/made",
    "prepare folder": "prepare folder IN/spoken OUT/made",
    "prepare csv": "prepare csv IN/table.csv OUT/made",
    "prepare librilight": "prepare librilight IN/librispeech_finetuning OUT/made",
    "prepare shar": "prepare shar IN/shar OUT/made",
    "prepare alignments": "prepare alignments IN/dev.jsonl.gz IN/textgrids OUT/made",
    "vocabulary": "vocabulary [IN/dev.jsonl.gz] OUT/vocabulary.json",
    "ngram": "ngram IN/text.txt OUT/lm.arpa --order 2",
    "lexicon": "lexicon IN/text.txt OUT/words.lexicon",
    "tune-decoder": "tune-decoder IN/ctc.ckpt [IN/few.jsonl.gz] OUT/decoder.json --trials 3 --beam_size 5",
    "transcribe": "transcribe IN/ctc.ckpt IN/spoken --output OUT/words --format json",
    "align": "align IN/ctc.ckpt IN/spoken --output OUT/times",
    "units": "units mfcc IN/spoken --kmeans IN/mfcc.safetensors --output OUT/units.jsonl",
    "units kaldi": "units mfcc IN/spoken --kmeans IN/mfcc.safetensors --format kaldi --deduplicate --output OUT/units",
    "units npz": "units mfcc IN/spoken --kmeans IN/mfcc.safetensors --format npz --output OUT/units.npz",
    "labels export": "labels export IN/labels [IN/dev.jsonl.gz] OUT/labels.km",
    "labels import": "labels import [IN/labels.jsonl] [IN/dev.jsonl.gz] OUT/store [20]",
    "kmeans fit": "kmeans fit mfcc [IN/few.jsonl.gz] OUT/k.safetensors --clusters 10 --max_frames 500 --num_workers 0",
    "kmeans import": "kmeans import IN/centroids.npy OUT/kmeans.safetensors",
    "kmeans export": "kmeans export IN/streams.safetensors OUT/kmeans.joblib",
    "quality": "quality IN/ctc.ckpt [IN/few.jsonl.gz] --output OUT/quality --clusters 5 --max_frames 500",
    "import": "import IN/ctc.ckpt OUT/imported.ckpt",
    "average": "average [IN/ctc.ckpt,IN/other.ckpt] OUT/average.ckpt",
    "export transformers": "export IN/ctc.ckpt OUT/model",
    "export safetensors": "export IN/ctc.ckpt OUT/model --format safetensors",
    "export fairseq": "export IN/ctc.ckpt OUT/model --format fairseq --kmeans IN/layer.safetensors",
    "export onnx": "export IN/ctc.ckpt OUT/model --format onnx",
    "score": "score IN/test.jsonl --output OUT/scores.json",
}
"""A call of each verb that writes; IN is the folder of the material, OUT an empty one."""
REFUSES = ("exists already", "holds a label store already")
"""What verbs say that never replace what is there: of those, a finished output is as good as a second one."""
OPENED_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


def make_material(folder: Path) -> None:
    """Speech, manifests, models, labels and tables, a few seconds of each."""
    minutes = {"train_minutes": 0.4, "finetuning_minutes": 0.2, "dev_minutes": 0.3, "test_minutes": 0.1}
    synthesise_corpus(folder / "corpus", **minutes, train_speakers=2, heldout_speakers=1)
    (folder / "LibriSpeech").symlink_to(folder / "corpus" / "LibriSpeech")
    cuts = list(read_manifest(folder / "corpus" / "manifests" / "dev.jsonl.gz"))
    write_manifest(cuts, folder / "dev.jsonl.gz")
    write_manifest(cuts[:3], folder / "few.jsonl.gz")
    texts = [str(cut.supervisions[0].text) for cut in cuts]
    (folder / "text.txt").write_text("\n".join(texts * 2) + "\n")
    for place in ("spoken/a", "spoken/b", "librispeech_finetuning/1h/0/clean/1/2"):
        (folder / place).mkdir(parents=True)
    rows = ["path,text"]
    for number, (cut, text) in enumerate(zip(cuts[:6], texts, strict=False)):
        path = folder / "spoken" / "ab"[number % 2] / f"{number}.wav"
        soundfile.write(path, read_waveform(cut).numpy(), SAMPLE_RATE)
        path.with_suffix(".txt").write_text(text)
        rows.append(f"{path},{text}")
        shutil.copy(path, folder / "librispeech_finetuning" / "1h" / "0" / "clean" / "1" / "2" / f"1-2-{number:04}.wav")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    from lhotse import CutSet

    (folder / "shar").mkdir()
    CutSet(cuts).to_shar(folder / "shar", {"recording": "flac"}, shard_size=4, verbose=False)
    (folder / "textgrids").mkdir()
    for cut in cuts:
        (folder / "textgrids" / f"{cut.id}.TextGrid").write_text(_textgrid(cut.duration))
    save_ctc(folder / "ctc.ckpt", spread=3.0)
    save_ctc(folder / "other.ckpt", seed=1, spread=3.0)
    frames = torch.cat([mfcc(read_waveform(cut)) for cut in cuts[:3]])
    save_kmeans(folder / "mfcc.safetensors", [frames[:20].clone()], {"features": "mfcc"})
    np.save(folder / "centroids.npy", frames[:20].numpy())
    save_kmeans(folder / "streams.safetensors", [frames[:5].clone(), frames[5:15].clone()], {"features": "mfcc"})
    encoder = load_encoder(folder / "ctc.ckpt")
    layer = f"layer 2 of encoder {encoder_fingerprint(encoder)}"
    save_kmeans(folder / "layer.safetensors", [torch.randn(5, encoder.config.dim)], {"features": layer})
    source = LabelSource("mfcc", "kmeans", fingerprint(cuts), (20,))
    labels = {cut.id: np.arange(num_frames(cut.num_samples))[None] % 20 for cut in cuts}
    with LabelWriter(folder / "labels", source, num_shards=1) as writer:
        writer.write(0, labels)
    lines = [json.dumps({"id": name, "clusters": of.tolist()}) for name, of in labels.items()]
    (folder / "labels.jsonl").write_text("\n".join(lines) + "\n")
    said = [{"id": cut.id, "reference": text, "hypothesis": text[:-3]} for cut, text in zip(cuts, texts, strict=True)]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, said)) + "\n")


def _textgrid(duration: float) -> str:
    middle = duration / 2
    tiers = []
    for number, (name, first, second) in enumerate((("words", "one", "two"), ("phones", "AH0", "T")), start=1):
        tiers.append(
            f'    item [{number}]:\n        class = "IntervalTier"\n        name = "{name}"\n        xmin = 0\n'
            f"        xmax = {duration}\n        intervals: size = 2\n        intervals [1]:\n            xmin = 0\n"
            f'            xmax = {middle}\n            text = "{first}"\n        intervals [2]:\n'
            f'            xmin = {middle}\n            xmax = {duration}\n            text = "{second}"\n'
        )
    head = f'File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\nxmax = {duration}\n'
    return f"{head}tiers? <exists>\nsize = 2\nitem []:\n{''.join(tiers)}"


def kill_before(number: int, folder: str, record: str | None = None) -> None:
    """Kill this process before its n-th write below a folder; or record how many there are."""
    count = 0

    def happened() -> None:
        nonlocal count
        count += 1
        if record is not None:
            os.truncate(record, count)
        elif count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & OPENED_TO_WRITE
        else:
            path, writes = (arguments or (None,))[0], event in EVENTS
        if writes and isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(folder):
            happened()

    fsync = os.fsync

    def synced(file: int) -> None:
        happened()
        fsync(file)

    os.fsync = synced
    sys.addaudithook(audit)


def state(folder: Path) -> dict[str, object]:
    """Every file below a folder and what is in it; of npz, which holds the time, its arrays."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = "folder"
        elif path.suffix == ".npz":
            found[name] = {key: array.tolist() for key, array in np.load(path).items()}
        elif path.name.startswith(".made-"):  # which says when its output was finished
            found[name] = re.sub(rb', "output": .*', b"", path.read_bytes(), count=1)
        else:
            found[name] = path.read_bytes()
    return found


class Campaign:
    """Kills of one verb.

    Args:
        verb: Its line in `VERBS`.
        material: Folder of `make_material`.
        folder: Folder for what it writes and says.
    """

    def __init__(self, verb: str, material: Path, folder: Path) -> None:
        self.verb, self.material, self.folder = verb, material, folder
        self.log = folder / "log.txt"
        self.out = folder / "out"  # the same for all, since outputs name it
        self._empty()
        counter = folder / "counter"
        counter.touch()
        began = time.perf_counter()
        code = self._run(partial(kill_before, 0, str(self.out), str(counter)))
        self.seconds = time.perf_counter() - began
        if code:
            raise RuntimeError(f"{verb}: ended with {code}: {self.log.read_text()[-2000:]}")
        self.writes = counter.stat().st_size
        self.whole = state(self.out)

    def _empty(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        self.log.write_text("")

    def _args(self) -> list[str]:
        places = {"IN/": f"{self.material}/", "OUT/": f"{self.out}/"}
        return [re.sub("IN/|OUT/", lambda found: places[found[0]], word) for word in VERBS[self.verb].split()]

    def _run(self, before: "partial[None] | None" = None) -> int:
        return fork_server.run(self._args(), self.log, before=before)

    def kill(self, number: int | None = None, seconds: float | None = None) -> str | None:
        """Kill before a write, or after some seconds; start again, and say what is wrong then, if anything is."""
        self._empty()
        if seconds is None:
            self._run(partial(kill_before, number, str(self.out)))
        else:
            process = fork_server.start(self._args(), self.log)
            process.join(seconds)
            fork_server.end(process)
        left = state(self.out)
        for name, content in left.items():
            unfinished = any(is_unfinished(Path(part)) for part in Path(name).parts)
            if unfinished or Path(name).name.startswith(".made-"):  # which has a line for each recording that is done
                continue
            if content != self.whole.get(name) and not self._completed_later(name):
                return f"{name} is not whole after the kill"
        code = self._run()
        refused = any(sentence in self.log.read_text() for sentence in REFUSES)
        if code and not (refused and left == self.whole):
            return f"the next start ended with {code}: {self.log.read_text()[-500:]}"
        now = state(self.out)
        others = sorted(name for name in now.keys() | self.whole.keys() if now.get(name) != self.whole.get(name))
        return f"other than uninterrupted: {', '.join(others)}" if others else None

    def _completed_later(self, name: str) -> bool:
        return self.verb == "labels import" and name == "store/source.json"


def kills(verbs: Sequence[str], most: int, at_random: int, seed: int, folder: Path) -> tuple[int, list[str]]:
    """How many kills there were, and what went wrong."""
    material = folder / "material"
    material.mkdir()
    make_material(material)
    rng, number, wrong = random.Random(seed), 0, []
    for verb in verbs:
        try:
            campaign = Campaign(verb, material, folder / verb.replace(" ", "-"))
        except RuntimeError as error:
            wrong.append(f"{verb} does not run: {error}")
            print(wrong[-1], flush=True)
            continue
        places = range(1, campaign.writes + 1)
        chosen = sorted(rng.sample(places, min(most, len(places))))
        moments = sorted(rng.uniform(0, campaign.seconds) for _ in range(at_random))
        found = [(f"before write {place}", campaign.kill(number=place)) for place in chosen]
        found += [(f"after {moment:.2f} s", campaign.kill(seconds=moment)) for moment in moments]
        bad = [f"{verb}, killed {when}: {what}" for when, what in found if what]
        number, wrong = number + len(found), wrong + bad
        print(f"{verb:20} {len(found) - len(bad):3} of {len(found):3} kills, of {campaign.writes} writes", flush=True)
        for line in bad:
            print(f"  {line}", flush=True)
    return number, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(VERBS), default=list(VERBS), help="verbs to kill")
    parser.add_argument("--most", type=int, default=1000, help="kills of a verb before its writes, at most")
    parser.add_argument("--random", type=int, default=2, help="kills of a verb at random moments")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        number, wrong = kills(asked.only, asked.most, asked.random, asked.seed, Path(folder))
    print(f"{number - len(wrong)} of {number} kills leave what an uninterrupted call does")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
