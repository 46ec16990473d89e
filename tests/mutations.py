"""Files of every kind that this package reads, seeded mutations of them, and what a reader makes of each.

A mutation is read in a process of its own: it may end in success or in one sentence of this package, within a time and
a memory, and runs nothing. `tests/untrusted/test_mutations.py` reads a few hundred, `benchmarks/mutations.py` any
number.
"""

import gzip
import io
import json
import os
import pickle
import re
import resource
import select
import shutil
import signal
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import joblib
import numpy as np
import soundfile
import torch
import yaml
from foreign_models import (
    beside_a_model,
    fairseq_settings,
    fairseq_state,
    of_transformers,
    save_transformers,
    small_config,
)
from helpers import HELLO, HELLO_WORD, TINY, long_format, save_ctc, short_format, write_settings, write_store
from lhotse import CutSet
from sklearn.cluster import MiniBatchKMeans
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hubert_lightning.asr.causal_lm import CausalLM
from hubert_lightning.asr.ctc_model import load_ctc
from hubert_lightning.asr.decoder_settings import DecoderSettings
from hubert_lightning.asr.decoding import BeamSearch, search_with
from hubert_lightning.asr.lexicon import lexicon
from hubert_lightning.asr.ngram import ngram
from hubert_lightning.data.alignments import prepare_alignments
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.corpora import read_corpora
from hubert_lightning.data.manifest import check_audio, fingerprint, read_manifest, write_manifest
from hubert_lightning.data.prepare import prepare_folder
from hubert_lightning.data.prepare_csv import prepare_csv
from hubert_lightning.data.probe import probe
from hubert_lightning.data.shar import prepare_shar
from hubert_lightning.errors import user_error
from hubert_lightning.frames import SAMPLE_RATE, num_frames
from hubert_lightning.interchange.import_export import export_model
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.load import load_encoder
from hubert_lightning.report.commands import score_file
from hubert_lightning.training.data_checks import check_transcripts
from hubert_lightning.units.kmeans_file import load_kmeans, save_kmeans
from hubert_lightning.units.label_shards import LabelSource
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.label_text import export_labels, import_labels
from hubert_lightning.vocabulary import Vocabulary, read_vocabulary

SECONDS, BYTES = 30, 2 * 2**30
"""What a reader may take."""
LONGEST = 700
"""Characters of a sentence."""


class Reader(NamedTuple):
    """A folder of files, and what reads them.

    Attributes:
        name: Kind of the files.
        make: Writes sound files into a folder.
        read: Reads the files of a folder.
        mutated: Patterns of the files that are mutated.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    mutated: tuple[str, ...] = ("*",)


class Outcome(NamedTuple):
    """What became of a mutation.

    Attributes:
        verdict: "success", "sentence", or what must not be.
        said: The sentence, or the end of a traceback.
        seconds: Time that it took.
        bytes: Memory that it took.
    """

    verdict: str
    said: str
    seconds: float
    bytes: int

    @property
    def is_right(self) -> bool:
        return self.verdict in ("success", "sentence")


def speech(folder: Path) -> list[Path]:
    """Two recordings of a second."""
    rng = np.random.default_rng(0)
    paths = [folder / "a.wav", folder / "b.flac"]
    for path in paths:
        soundfile.write(path, rng.normal(0, 0.1, SAMPLE_RATE), SAMPLE_RATE)
    return paths


def manifest(folder: Path, name: str) -> list[Any]:
    """A manifest of two utterances that were transcribed."""
    (folder / "audio").mkdir()
    for path in speech(folder / "audio"):
        path.with_suffix(".txt").write_text("ONE TWO")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        [made] = prepare_folder(folder / "audio", folder / "made", heldout=0)
    cuts = list(read_manifest(made))
    write_manifest(cuts, folder / name)
    shutil.rmtree(folder / "made")
    return cuts


def make_manifest(name: str) -> Callable[[Path], object]:
    return lambda folder: manifest(folder, name)


def read_cuts(path: Path) -> None:
    cuts = read_manifest(path)
    check_audio(cuts)
    check_transcripts(cuts, Vocabulary())
    fingerprint(cuts)
    for cut in cuts:
        read_waveform(cut)


def read_shar(folder: Path) -> None:
    read_table(prepare_shar(folder / "shar", folder / "new"))


def make_shar(folder: Path) -> None:
    cuts = manifest(folder, "m.jsonl")
    (folder / "shar").mkdir()
    CutSet(cuts).to_shar(folder / "shar", fields={"recording": "flac"}, shard_size=1)


def read_table(table: Path) -> None:
    corpora = read_corpora([table])
    list(corpora.ids())
    for cut in corpora:
        read_waveform(cut)


def make_table(folder: Path) -> None:
    make_shar(folder)
    prepare_shar(folder / "shar", folder)
    (folder / "shar.shar").rename(folder / "table.shar")


def make_labels(folder: Path) -> None:
    cuts = manifest(folder, "m.jsonl")
    source = LabelSource("mfcc", "k", fingerprint(cuts), (10,))
    rng = np.random.default_rng(0)
    labels = {cut.id: rng.integers(0, 10, (1, num_frames(cut.num_samples))) for cut in cuts}
    write_store(folder / "labels", source, labels)


def read_labels(folder: Path) -> None:
    cuts = read_manifest(folder / "m.jsonl")
    store = LabelStore(folder / "labels")
    store.verify()
    store.check(cuts, [10])
    for cut in cuts:
        store[cut.id].sum()


def make_label_text(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        make_labels(folder)
        export_labels(folder / "labels", [folder / "m.jsonl"], folder / f"text{suffix}")
        shutil.rmtree(folder / "labels")

    return make


def read_label_text(suffix: str) -> Callable[[Path], object]:
    return lambda folder: import_labels([folder / f"text{suffix}"], [folder / "m.jsonl"], folder / "new", [10])


def make_textgrid(format: Callable[..., str]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "audio").mkdir()
        soundfile.write(folder / "audio" / "a.wav", np.random.default_rng(0).normal(0, 0.1, 19_200), SAMPLE_RATE)
        prepare_folder(folder / "audio", folder / "made", heldout=0)
        (folder / "grids").mkdir()
        (folder / "grids" / "a.TextGrid").write_text(format({"words": HELLO_WORD, "phones": HELLO}, 1.2))

    return make


def read_textgrid(folder: Path) -> object:
    return prepare_alignments(folder / "made" / "audio.jsonl.gz", folder / "grids", folder / "new")


def make_csv(folder: Path) -> None:
    speech(folder)
    (folder / "t.csv").write_text('path,sentence,speaker\na.wav,"one, two",x\nb.flac,three,y\n')


def make_language(folder: Path) -> None:
    (folder / "text.txt").write_text("ONE TWO\nTWO ONE ONE\nTHREE ONE\n" * 3)
    ngram(folder / "text.txt", folder / "a.arpa", order=3)
    (folder / "a.arpa.gz").write_bytes(gzip.compress((folder / "a.arpa").read_bytes(), mtime=0))
    (folder / "text.txt").unlink()
    Vocabulary().write(folder / "vocabulary.json")
    lm, lexicon = str(folder / "a.arpa"), str(folder / "a.lexicon")
    write_settings(DecoderSettings(lm=lm, lexicon=lexicon, beam_size=5, num_workers=0), folder / "decoder.json")


def searched(search: BeamSearch) -> None:
    rows = torch.randn(3, len(search.vocabulary), generator=torch.Generator().manual_seed(0)).log_softmax(dim=-1)
    search.nbest([rows])
    search.close()


def read_lm(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        searched(
            BeamSearch(DecoderSettings(str(folder / name), str(folder / "a.lexicon"), num_workers=0), Vocabulary())
        )

    return read


def read_decoder(folder: Path) -> None:
    searched(search_with(folder / "decoder.json", Vocabulary()))


def read_spelling(folder: Path) -> None:
    vocabulary = read_vocabulary(folder / "vocabulary.json")
    vocabulary.targets(vocabulary.normalise("a"))


def make_causal_lm(folder: Path) -> None:
    words = {word: place for place, word in enumerate(["</s>", "<unk>", "one", "two"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=4, n_positions=64, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)


def make_results(folder: Path) -> None:
    rows = [{"id": str(n), "reference": "one two", "hypothesis": "one", "speaker": "x"} for n in range(3)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ours(**how: Any) -> dict[str, Any]:
    state = {f"encoder.{name}": value for name, value in HubertEncoder(TINY).state_dict().items()}
    return {"state_dict": state, "hyper_parameters": {"encoder": asdict(TINY)}, "global_step": 5, **how}


def make_ckpt(protocol: int, zipped: bool) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        torch.save(ours(), folder / "a.ckpt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)

    return make


def make_run(folder: Path) -> None:
    save_ctc(folder / "last.ckpt")
    config = {"data": {"init_args": {"train": ["/a/train.jsonl.gz"]}}, "trainer": {"callbacks": None}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.json").write_text(json.dumps({"steps": 5, "val/loss": 1.5, "val/wer": 0.5}))
    rate = {"errors": 1, "rate": 0.5, "low": 0.1, "high": 0.7}
    (folder / "scores.json").write_text(json.dumps({"words": rate, "letters": rate}))
    (folder / "layers.json").write_text(json.dumps({"layer 1": {"pnmi": 0.5}}))


def make_fairseq(folder: Path) -> None:
    config = small_config("group")
    model, task = fairseq_settings(config)
    theirs = of_transformers(config)
    torch.save({"model": fairseq_state(theirs), "cfg": {"model": model, "task": task}}, folder / "a.pt")


def make_torchaudio(folder: Path) -> None:
    torch.save(ours(), folder / "a.ckpt")
    export_model(str(folder / "a.ckpt"), folder / "out", "torchaudio")


def make_transformers(folder: Path) -> None:
    save_transformers(folder, ["<pad>", "<s>", "</s>", "<unk>", "|", "A", "B"], "<pad>")


def make_exported(folder: Path) -> None:
    save_ctc(folder / "a.ckpt")
    export_model(str(folder / "a.ckpt"), folder / "out")


def make_dictionary(folder: Path) -> None:
    beside_a_model(folder, b"| 9\nA 1\nB 1\n", 7)


def make_transcripts(folder: Path) -> None:
    (folder / "audio").mkdir()
    speech(folder / "audio")
    (folder / "audio" / "x.trans.txt").write_text("a ONE TWO\n")
    (folder / "audio" / "b.txt").write_text("TWO ONE\n")


def read_transcripts(folder: Path) -> None:
    [made] = prepare_folder(folder / "audio", folder / "new", heldout=0)
    read_manifest(made)


def make_words(folder: Path) -> None:
    (folder / "words.txt").write_text("ONE\nTWO\nTHREE\n" * 5)


def make_kmeans(folder: Path) -> None:
    centroids = torch.randn(5, 39)
    save_kmeans(folder / "a.safetensors", [centroids], {"features": "mfcc", "parts": "null"})
    kmeans = MiniBatchKMeans(5, n_init=1).fit(np.random.default_rng(0).normal(size=(60, 3)))
    joblib.dump(kmeans, folder / "b.joblib")
    joblib.dump(kmeans, folder / "c.bin", compress=3)
    (folder / "d.pkl").write_bytes(pickle.dumps(kmeans))
    np.save(folder / "e.npy", centroids.numpy())
    torch.save({"cluster_centers_": centroids}, folder / "f.pt")


def of_every(read: Callable[[Path], object]) -> Callable[[Path], None]:
    def read_all(folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            read(path)

    return read_all


def make_audio(folder: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, (SAMPLE_RATE // 2, 2))
    kinds = {"a.wav": {}, "b.flac": {}, "c.mp3": {}, "d.ogg": {}, "f.aiff": {}, "g.au": {}, "h.w64": {}, "i.caf": {}}
    kinds["e.opus"] = {"format": "OGG", "subtype": "OPUS"}
    kinds["j.wav"] = {"subtype": "IMA_ADPCM"}
    for name, kind in kinds.items():
        soundfile.write(folder / name, noise, SAMPLE_RATE, **kind)
    import av

    for name, codec in (("k.m4a", "aac"), ("l.webm", "libopus")):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=48_000, layout="mono")
            frame = av.AudioFrame.from_ndarray(noise[:, :1].T.astype(np.float32), "fltp", "mono")
            frame.sample_rate = 48_000
            resampler = av.AudioResampler(stream.format.name, "mono", 48_000, frame_size=stream.frame_size or 1024)
            for part in [*resampler.resample(frame), *resampler.resample(None)]:
                container.mux(stream.encode(part))
            container.mux(stream.encode(None))


def read_audio(folder: Path) -> None:
    """As `prepare folder` and training do."""
    reasons = {path: probe(path) for path in sorted(folder.iterdir())}
    for reason in reasons.values():
        if isinstance(reason, str) and ("\n" in reason or len(reason) > LONGEST):
            raise AssertionError(reason)
    if not all(isinstance(reason, str) for reason in reasons.values()):
        for cut in read_manifest(prepare_folder(folder, folder.parent / "new", heldout=0)):
            read_waveform(cut)
            read_waveform(cut, max(cut.num_samples - 3000, 0))


READERS = [
    *(
        Reader(f"checkpoint, protocol {protocol}, {form}", make_ckpt(protocol, form == "zip"), read)
        for read in (lambda folder: load_encoder(folder / "a.ckpt"),)
        for protocol in (2, 5)
        for form in ("zip", "old")
    ),
    Reader("fine-tuned run", make_run, lambda folder: export_model(str(folder / "last.ckpt"), folder / "out")),
    Reader(
        "records of a run",
        make_run,
        lambda folder: export_model(str(folder / "last.ckpt"), folder / "out"),
        ("*.json", "*.yaml"),
    ),
    Reader("exported model", make_exported, lambda folder: load_ctc(folder / "out"), ("out/*",)),
    Reader("dictionary", make_dictionary, lambda folder: load_ctc(folder / "theirs.pt"), ("dict*",)),
    Reader("transcripts", make_transcripts, read_transcripts, ("*/*.txt",)),
    Reader("list of fairseq", make_label_text(".km"), read_label_text(".km"), ("*.tsv",)),
    Reader("words", make_words, lambda folder: lexicon(folder / "words.txt", folder / "new.lexicon")),
    Reader("text", make_words, lambda folder: ngram(folder / "words.txt", folder / "new.arpa")),
    Reader("fairseq", make_fairseq, lambda folder: load_encoder(folder / "a.pt")),
    Reader("torchaudio", make_torchaudio, lambda folder: load_encoder(folder / "out"), ("out/*.pt", "out/*.json")),
    Reader("transformers", make_transformers, load_ctc, ("*.json", "*.safetensors")),
    Reader("settings of transformers", make_transformers, load_ctc, ("*.json",)),
    Reader("K-means", make_kmeans, of_every(load_kmeans)),
    Reader("manifest", make_manifest("m.jsonl"), lambda folder: read_cuts(folder / "m.jsonl"), ("*.jsonl",)),
    Reader("packed manifest", make_manifest("m.jsonl.gz"), lambda folder: read_cuts(folder / "m.jsonl.gz"), ("*.gz",)),
    Reader("Shar corpus", make_shar, read_shar, ("shar/*",)),
    Reader("Shar table", make_table, lambda folder: read_table(folder / "table.shar"), ("table.shar/*",)),
    Reader("label store", make_labels, read_labels, ("labels/*",)),
    Reader("labels.km", make_label_text(".km"), read_label_text(".km"), ("text.km",)),
    Reader("labels.txt", make_label_text(".txt"), read_label_text(".txt"), ("text*",)),
    Reader("labels.jsonl", make_label_text(".jsonl"), read_label_text(".jsonl"), ("text*",)),
    Reader("long TextGrid", make_textgrid(long_format), read_textgrid, ("grids/*",)),
    Reader("short TextGrid", make_textgrid(short_format), read_textgrid, ("grids/*",)),
    Reader("CSV", make_csv, lambda folder: prepare_csv(folder / "t.csv", folder / "new"), ("*.csv",)),
    Reader("n-gram model", make_language, read_lm("a.arpa"), ("*.arpa",)),
    Reader("packed n-gram model", make_language, read_lm("a.arpa.gz"), ("*.arpa.gz",)),
    Reader("lexicon", make_language, read_lm("a.arpa"), ("*.lexicon",)),
    Reader("vocabulary", make_language, read_spelling, ("vocab*",)),
    Reader("decoder", make_language, read_decoder, ("d*",)),
    Reader("causal model", make_causal_lm, lambda folder: CausalLM(folder)(["one two"])),
    Reader("results", make_results, lambda folder: score_file(folder / "test.jsonl", output=folder / "out.json")),
    Reader("audio", make_audio, read_audio),
]  # fmt: skip

ODD: tuple[Any, ...] = (None, True, -1, 0, 1.5, 10**12, 2**63, 10**30, float("nan"), float("inf"), "", "x", [], {})
ODD += ("\ud800", "a\0b", "../..", "/dev/zero", "x" * 10**6, [[]], [None], {"a": None}, [0] * 10**5)


def mutated(path: Path, draw: Random) -> str:
    """Change a file, and say how."""
    content = path.read_bytes()
    ways: list[Callable[[bytes, Random], tuple[bytes, str]]] = [_flipped, _cut, _replaced, _numbered, _spliced]
    if path.suffix == ".gz" and draw.random() < 0.7:
        new, how = _structured(gzip.decompress(content), path.with_suffix(""), draw, ways)
        path.write_bytes(gzip.compress(new, mtime=0))
        return f"{how}, packed"
    new, how = _structured(content, path, draw, ways)
    path.write_bytes(new)
    return how


def _structured(content: bytes, path: Path, draw: Random, ways: list[Any]) -> tuple[bytes, str]:
    if path.suffix in (".json", ".jsonl") and draw.random() < 0.75:
        return _other_json(content, draw)
    if path.suffix == ".tar" and draw.random() < 0.6:
        return _other_tar(content, draw)
    if path.suffix in (".arpa", ".TextGrid", ".csv", ".km", ".txt", ".lexicon", ".yaml") and draw.random() < 0.5:
        return _other_text(content, draw)
    return draw.choice(ways)(content, draw)


def _flipped(content: bytes, draw: Random) -> tuple[bytes, str]:
    new = bytearray(content)
    reach = draw.choice([100, 4000, len(new)])  # where names and shapes are, more often than numbers
    for _ in range(draw.choice([1, 3, 30])):
        new[draw.randrange(min(reach, len(new)))] ^= 1 << draw.randrange(8)
    return bytes(new), f"bits flipped in the first {reach}"


def _cut(content: bytes, draw: Random) -> tuple[bytes, str]:
    size = draw.choice([0, 1, 8, 16, 64, 512, len(content) // 2, len(content) - 1, draw.randrange(len(content))])
    return content[:size], f"cut to {size}"


def _replaced(content: bytes, draw: Random) -> tuple[bytes, str]:
    begin, size = draw.randrange(len(content)), draw.choice([1, 4, 16, 256])
    filling = draw.choice([bytes(size), b"\xff" * size, draw.randbytes(size)])
    return content[:begin] + filling + content[begin + size :], f"{size} bytes replaced at {begin}"


def _numbered(content: bytes, draw: Random) -> tuple[bytes, str]:
    begin, size = draw.randrange(min(len(content), 4000)), draw.choice([1, 2, 4, 8])
    number = draw.choice([0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1])
    new = number.to_bytes(size, draw.choice(["little", "big"]))  # type: ignore[arg-type]
    return content[:begin] + new + content[begin + size :], f"{number} written at {begin}"


def _spliced(content: bytes, draw: Random) -> tuple[bytes, str]:
    begin, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    if draw.random() < 0.5:
        return content[:begin] + content[end:], f"{begin} to {end} left out"
    return content[:end] + content[begin:], f"{begin} to {end} twice"


def _other_json(content: bytes, draw: Random) -> tuple[bytes, str]:
    lines = content.decode().splitlines() if b"\n{" in content.strip() else [content.decode()]
    number = draw.randrange(len(lines))
    tree = json.loads(lines[number])
    places = list(_places(tree))
    way = draw.choice(["value"] * 6 + ["left out", "new", "twice", "deep"])
    holder, key = draw.choice(places)
    if way == "value":
        holder[key] = draw.choice(ODD)
    elif way == "left out":
        del holder[key]
    elif way == "new" and isinstance(holder, dict):
        holder[draw.choice(["more", "class_path", "auto_map", "__proto__"])] = draw.choice([*ODD, "os.system"])
    text = json.dumps(tree)
    if way == "twice" and isinstance(tree, dict) and tree:
        text = "{" + ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in [*tree.items()] * 2) + "}"
    if way == "deep":
        text = draw.choice(["[", '{"a":']) * draw.choice([200, 100_000])
    lines[number] = text
    return "\n".join(lines).encode(errors="surrogatepass"), f"JSON: {way} at {key}"


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    waiting = [tree]
    while waiting:
        inner = waiting.pop()
        for key in list(inner) if isinstance(inner, dict) else range(len(inner)):
            yield inner, key
            if isinstance(inner[key], (dict, list)):
                waiting.append(inner[key])


def _other_tar(content: bytes, draw: Random) -> tuple[bytes, str]:
    if draw.random() < 0.5:  # a field of a header: name, mode, size, checksum, type
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            member = draw.choice(archive.getmembers())
        member.size = draw.choice([-1, 0, 10**6, 6 * 2**30, 2**62])
        member.type = draw.choice([member.type, b"L", b"x", b"S", b"2", b"3", b"6"])
        new = bytearray(content)
        try:
            header = member.tobuf(tarfile.GNU_FORMAT)
        except (ValueError, OverflowError):
            header = bytes(512)
        new[member.offset : member.offset + 512] = header[-512:]
        return bytes(new), f"header of {member.name}, size {member.size}, type {member.type!r}"
    written = io.BytesIO()
    how = ""
    with tarfile.open(fileobj=io.BytesIO(content)) as before, tarfile.open(fileobj=written, mode="w") as after:
        chosen = draw.randrange(len(before.getmembers()) // 2)
        for number, member in enumerate(before):
            body = before.extractfile(member).read()  # type: ignore[union-attr]
            if number == 2 * chosen + 1 and member.name.endswith(".json"):
                body, how = _other_json(body, draw)
            member.size = len(body)
            after.addfile(member, io.BytesIO(body))
    return written.getvalue(), f"tar, {how}"


def _other_text(content: bytes, draw: Random) -> tuple[bytes, str]:
    lines = content.splitlines(keepends=True)
    number = draw.randrange(len(lines))
    way = draw.choice(["number", "left out", "twice", "bytes", "long", "word"])
    line = lines[number]
    parts = line.split(b" ")
    place = draw.randrange(len(parts))
    if way == "number":
        values = [b"-1", b"0", b"1e999", b"nan", b"9" * 5000, b"99999999999", b"0x10"]
        parts[place] = draw.choice(values) + (b"\n" if parts[place].endswith(b"\n") else b"")
        line = b" ".join(parts)
    elif way == "bytes":
        line = line[: len(line) // 2] + draw.choice([b"\0", b"\xff", b"\xed\xa0\x80", b"\x1b[31m", b"\r"]) + line
    elif way == "word":
        line = draw.choice([b"\t", b'"', b"\\", b"!!python/object/apply:os.system [ls]", b"&a [*a]"]) + line
    lines[number : number + 1] = {"left out": [], "twice": [line, line], "long": [line.rstrip() * 10**5]}.get(
        way, [line]
    )
    return b"".join(lines), f"line {number + 1}: {way}"


def outcome(reader: Reader, folder: Path, names: list[str]) -> Outcome:
    """Read the files of a folder in a process of its own, and judge how that ends."""
    answer, question = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if not child:
        os.close(answer)
        _read_and_tell(reader, folder, names, question)
    os.close(question)
    said = b""
    while True:
        ready, _, _ = select.select([answer], [], [], max(SECONDS - (time.monotonic() - began), 0))
        block = os.read(answer, 2**16) if ready else b""
        said += block
        if not block:
            break
    os.close(answer)
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - began
    told = (
        json.loads(said)
        if said and ready
        else {"verdict": f"hung, or ended by signal {os.WTERMSIG(status)}", "said": ""}
    )
    return Outcome(told["verdict"], told["said"], seconds, usage.ru_maxrss * 1024)


def _read_and_tell(reader: Reader, folder: Path, names: list[str], answer: int) -> None:
    """In the child: read, and write how that ended."""
    ran: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pty.spawn"):
            ran.append(f"{event} {arguments}")

    try:
        torch.set_num_threads(1)
        used, before = (
            int(pages) * resource.getpagesize() for pages in Path("/proc/self/statm").read_text().split()[:2]
        )
        resource.setrlimit(resource.RLIMIT_AS, (used + 2 * BYTES, used + 2 * BYTES))
        sys.addaudithook(watch)
        verdict, said = _verdict(reader, folder, names)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before  # which the parent has, too
        if ran:
            verdict, said = "ran something", ran[0]
        elif peak > BYTES:
            verdict, said = f"took {peak / 2**30:.1f} GB", said
        os.write(
            answer,
            json.dumps(
                {"verdict": verdict, "said": said if len(said) < 3000 else said[:400] + " ... " + said[-2000:]}
            ).encode(),
        )
    finally:
        os._exit(0)


def _verdict(reader: Reader, folder: Path, names: list[str]) -> tuple[str, str]:
    texts = [
        path.read_text(errors="ignore")
        for name in names
        for path in folder.rglob(name)
        if path.is_file() and path.suffix == ".json"
    ]
    quoted = [
        path for text in texts for path in re.findall(r"/[^\"\n]+", text)
    ]  # a sentence may name what a file names
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            reader.read(folder)
    except ValueError as error:
        ours = user_error(error)
        if ours is None:
            return "traceback", traceback.format_exc()
        said = str(ours)
        wrong = [
            *(["several lines"] if "\n" in said else []),
            *(["too long"] if len(said) > LONGEST + len(str(folder)) else []),
            *(["no way out"] if "; " not in said and ": " not in said else []),
            *(["no file"] if not any(name in said for name in (str(folder), *map(_stem, names), *quoted)) else []),
        ]
        return (", ".join(wrong) or "sentence"), said
    except BaseException:
        return "traceback", traceback.format_exc()
    return "success", ""


def _stem(name: str) -> str:
    return Path(name).stem


def campaign(
    folder: Path, seed: int, count: int, readers: list[Reader] = READERS
) -> Iterator[tuple[Reader, int, str, Outcome]]:
    """Mutate and read so many times, each reader in its turn: the reader, the number, what was changed, the outcome."""
    for number in range(count):
        reader = readers[number % len(readers)]
        sound = made(reader, folder)
        draw = Random(f"{seed} {number}")
        damaged = copied(sound, folder / f"damaged-{number}")
        files = sorted(path for pattern in reader.mutated for path in damaged.glob(pattern) if path.is_file())
        path = draw.choice([file for file in files if file.stat().st_size])
        how = f"{path.relative_to(damaged)}: {mutated(path, draw)}"
        if reader.name in ("K-means", "audio"):
            for other in files:
                if other != path:
                    other.unlink()
        yield reader, number, how, outcome(reader, damaged, [path.name])
        shutil.rmtree(damaged)
        shutil.rmtree(folder / "new", ignore_errors=True)


def made(reader: Reader, folder: Path) -> Path:
    """The sound files of a reader, which are made and read once."""
    sound = folder / "sound" / reader.name.replace(" ", "-")
    if not sound.exists():
        sound.mkdir(parents=True)
        torch.manual_seed(0)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            reader.make(sound)
        whole = outcome(reader, copied(sound, folder / "whole"), [])
        assert whole.verdict == "success", (reader.name, whole)
        shutil.rmtree(folder / "new", ignore_errors=True)
    return sound


def copied(sound: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    return folder
