"""A corpus that needs no download: English sentences of a small grammar, spoken by espeak-ng in dozens of voices.

Its folders are those of LibriSpeech; its manifests also hold the times of words and phones. On one machine the same
seed makes the same files, sample by sample.
"""

import json
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import ceil
from pathlib import Path
from random import Random

import numpy as np
import soundfile
import torch
from lhotse import MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.supervision import AlignmentItem

from hubert_lightning.data.alignments import SILENCE
from hubert_lightning.data.audio import resampled
from hubert_lightning.data.manifest import write_manifest
from hubert_lightning.demo.espeak import Espeak, Phone, Voice
from hubert_lightning.demo.grammar import librispeech_transcript, sentences
from hubert_lightning.errors import UserError
from hubert_lightning.files import is_unfinished, write_whole
from hubert_lightning.frames import SAMPLE_RATE, seconds_to_samples
from hubert_lightning.interrupts import thread_pool
from hubert_lightning.progress_bar import progress

VERSION = 7
"""Version of the corpus, which changes when the same parameters make other audio."""
MARKER = "corpus.json"
MIN_SPEECH, MAX_SPEECH = 2.0, 8.0
"""Shortest and longest speech of an utterance in seconds."""
GRID = 0.25
"""Seconds of which every recording lasts a multiple, since CPUs compute repeated lengths faster."""
CHAPTER = 25
"""Utterances of a chapter."""
ONSETS = {"the": "D", "a": "@", "an": "@", "been": "b", "was": "w", "were": "w", "have": "h", "it": "I", "many": "m"}
"""First phones of words that espeak-ng joins to the word before."""
DIALECTS = ["en-us", "en", "en-us-nyc", "en-gb-x-rp"]
THROATS = {
    "train-clean-100": """
        m1 f1 m2 f3 m4 linda m7 steph m8 Annie Andy Andrea Mike Gene Alex quincy max michel pedro robert rob Michael
        antonio victor
    """,
    "dev-clean": "m5 f5 Mario aunty",
    "test-clean": "m3 f2 m6 f4 paul belinda",
}
"""Variants of voices in espeak-ng by subset; no two subsets share one."""
FIRST_SPEAKER = {"train-clean-100": 1001, "dev-clean": 2001, "test-clean": 3001}
"""Number of the first speaker of each subset."""


def synthesise_corpus(
    out: Path,
    train_minutes: float = 60.0,
    finetuning_minutes: float = 10.0,
    dev_minutes: float = 4.0,
    test_minutes: float = 4.0,
    train_speakers: int = 48,
    heldout_speakers: int = 12,
    seed: int = 0,
) -> Path:
    """Make a corpus in `OUT/LibriSpeech` and its manifests in `OUT/manifests`, unless it exists already.

    The manifests are train, finetune (some utterances of train), dev and test, with transcripts and the times of words
    ("word") and phones ("phone"). Train, dev and test share no speaker.

    Args:
        out: Folder of the corpus, which holds nothing else.
        train_minutes: Minutes of train-clean-100.
        finetuning_minutes: Minutes of its utterances that are listed for fine-tuning.
        dev_minutes: Minutes of dev-clean.
        test_minutes: Minutes of test-clean.
        train_speakers: Number of speakers of train-clean-100, who differ in dialect, voice, speed, pitch and noise.
        heldout_speakers: Number of speakers of dev-clean, and of test-clean.
        seed: Seed of sentences, speakers and noise.

    Returns:
        Folder of the manifests.

    Raises:
        UserError: The numbers make no corpus, or the folder holds something else.
    """
    if not 0 < finetuning_minutes <= train_minutes or min(dev_minutes, test_minutes) <= 0:
        raise UserError(
            f"minutes: train {train_minutes}, finetuning {finetuning_minutes}, dev {dev_minutes}, test {test_minutes}; "
            "ask for more than none of each, and for no more fine-tuning than training speech"
        )
    if min(train_speakers, heldout_speakers) < 1:
        raise UserError(f"{train_speakers} training and {heldout_speakers} held-out speakers: ask for one or more")
    parameters: dict[str, float] = {
        "version": VERSION,
        "train_minutes": train_minutes,
        "finetuning_minutes": finetuning_minutes,
        "dev_minutes": dev_minutes,
        "test_minutes": test_minutes,
        "train_speakers": train_speakers,
        "heldout_speakers": heldout_speakers,
        "seed": seed,
    }
    out = Path(out).resolve()
    if _is_complete(out, parameters):
        return out / "manifests"
    _mark(out, parameters, complete=False)
    sets = {
        "train-clean-100": (train_minutes, train_speakers),
        "dev-clean": (dev_minutes, heldout_speakers),
        "test-clean": (test_minutes, heldout_speakers),
    }
    texts = sentences(seed)
    seconds = 60 * (train_minutes + dev_minutes + test_minutes)
    with progress("speaking", seconds) as advance, Espeak() as espeak, thread_pool() as pool:
        cuts: dict[str, list[MonoCut]] = {subset: [] for subset in sets}
        for subset, (minutes, num_speakers) in sets.items():
            for cut in _speak_subset(
                espeak, pool, texts, out / "LibriSpeech", subset, minutes * 60, num_speakers, seed
            ):
                cuts[subset].append(cut)
                advance(cut.duration, subset)
    manifests = {
        "train": cuts["train-clean-100"],
        "finetune": _about(finetuning_minutes * 60, cuts["train-clean-100"], seed),
        "dev": cuts["dev-clean"],
        "test": cuts["test-clean"],
    }
    for name, listed in manifests.items():
        write_manifest(listed, out / "manifests" / f"{name}.jsonl.gz")
    _mark(out, parameters, complete=True)
    return out / "manifests"


def _word_times(text: str, phones: list[Phone]) -> list[tuple[str, float, float]]:
    """Words with their start and end in seconds.

    espeak-ng joins some pairs, such as "of the", to one word. They are divided before the first phone of the second
    word if it is known, else in proportion to their letters.
    """
    words = [(word[0], word.start() + 1) for word in re.finditer(r"[a-z']+", text)]  # espeak-ng counts from 1
    sounds: list[list[Phone]] = [[] for _ in words]
    for phone in phones:
        if phone.symbol != SILENCE:
            sounds[sum(position <= phone.position for _, position in words) - 1].append(phone)
    times: list[tuple[str, float, float]] = []
    for (word, _), spoken in zip(words, sounds, strict=True):
        if spoken:
            times.append((word.upper(), spoken[0].start, spoken[-1].end))
            together = spoken
            continue
        before, start, end = times.pop()
        onsets = [phone.start for phone in together if phone.start > start]
        known = [phone.start for phone in together if phone.start > start and phone.symbol == ONSETS.get(word)]
        by_letters = start + (end - start) * len(before) / len(before + word)
        parting = known[-1] if known else min(onsets, key=lambda onset: abs(onset - by_letters))
        times += [(before, start, parting), (word.upper(), parting, end)]
    return times


def _voices(subset: str, num_speakers: int, seed: int) -> list[Voice]:
    random = Random(f"{seed} {subset}")
    throats = THROATS[subset].split()
    return [
        Voice(
            name=f"{random.choice(DIALECTS)}+{throats[k % len(throats)]}",
            rate=random.randint(165, 215),
            pitch=random.randint(38, 62),
            pitch_range=random.randint(35, 65),
            level=random.uniform(-30, -18),  # as microphones and distances vary; MFCC clusters depend on levels
            noise=random.uniform(20, 40),
        )
        for k in range(num_speakers)
    ]


def _speak_subset(
    espeak: Espeak,
    pool: ThreadPoolExecutor,
    texts: Iterator[str],
    corpus: Path,
    subset: str,
    seconds: float,
    num_speakers: int,
    seed: int,
) -> Iterator[MonoCut]:
    """Utterances of one speaker after another, with equal shares; espeak-ng speaks here, and the pool finishes them."""
    num_speakers = min(num_speakers, ceil(seconds / MAX_SPEECH))
    spoken = 0.0
    random = Random(f"{seed} {subset} silence")
    for k, voice in enumerate(_voices(subset, num_speakers, seed)):
        finishing: list[Future[MonoCut]] = []
        while spoken < seconds * (k + 1) / num_speakers:
            text = next(texts)
            audio, phones = espeak.say(text, voice)
            if not MIN_SPEECH <= len(audio) / espeak.rate <= MAX_SPEECH:
                continue
            before = random.uniform(0.1, 0.4)
            duration = GRID * ceil((before + len(audio) / espeak.rate + 0.1) / GRID)
            spoken += duration
            speaker, (chapter, utterance) = FIRST_SPEAKER[subset] + k, divmod(len(finishing), CHAPTER)
            folder = corpus / subset / str(speaker) / str(chapter + 1)
            path = folder / f"{speaker}-{chapter + 1}-{utterance:04d}.flac"
            finishing.append(
                pool.submit(_finish, path, text, audio, espeak.rate, phones, voice, before, duration, seed)
            )
        cuts = [cut.result() for cut in finishing]
        _write_transcripts(cuts)
        yield from cuts


def _finish(
    path: Path,
    text: str,
    audio: np.ndarray,
    rate: int,
    phones: list[Phone],
    voice: Voice,
    silence: float,
    duration: float,
    seed: int,
) -> MonoCut:
    """An utterance of espeak-ng in a room: resampled, between silence, at the speaker's level, over faint noise."""
    random = np.random.default_rng([seed, *map(int, path.stem.split("-"))])
    before = seconds_to_samples(silence)
    speech = resampled(torch.from_numpy(audio.astype(np.float32)), rate).numpy()
    speech = speech[: seconds_to_samples(len(audio) / rate)]
    speech = np.convolve(speech, _room(seed, path.parts[-3]))[: len(speech)]
    level = voice.level + random.uniform(-2, 2)
    speech *= 10 ** (level / 20) / np.sqrt(np.mean(speech**2))
    speech *= min(1.0, 0.9 / np.abs(speech).max())
    waveform = random.normal(0, 10 ** ((level - voice.noise) / 20), seconds_to_samples(duration))
    waveform[before : before + len(speech)] += speech
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform, SAMPLE_RATE, subtype="PCM_16")

    def item(symbol: str, start: float, end: float) -> AlignmentItem:
        first, last = before + seconds_to_samples(start), before + seconds_to_samples(end)
        return AlignmentItem(symbol, first / SAMPLE_RATE, (last - first) / SAMPLE_RATE)

    after = len(waveform) - before - len(speech)
    recording = Recording(
        path.stem, [AudioSource("file", [0], str(path))], SAMPLE_RATE, num_samples=len(waveform), duration=duration
    )
    words, sounds = _word_times(text, phones), _with_silence(phones, before / SAMPLE_RATE, after / SAMPLE_RATE)
    supervision = SupervisionSegment(
        id=path.stem,
        recording_id=path.stem,
        start=0.0,
        duration=duration,
        text=librispeech_transcript(text),
        speaker=path.stem.split("-")[0],
        custom={"voice": voice.name},
        alignment={
            "word": [item(word, start, end) for word, start, end in words],
            "phone": [item(phone.symbol, phone.start, phone.end) for phone in sounds],
        },
    )
    return MonoCut(path.stem, start=0.0, duration=duration, channel=0, recording=recording, supervisions=[supervision])


def _room(seed: int, speaker: str) -> np.ndarray:
    """Impulse response of a speaker's microphone and room: (samples,). No two speakers have the same."""
    random = np.random.default_rng([seed, int(speaker)])
    response = 0.6 * random.normal(size=64) * np.exp(-np.arange(64) / 16)  # 4 ms, so no phone moves
    response[0] = 1
    return response.astype(np.float32)


def _with_silence(phones: list[Phone], before: float, after: float) -> list[Phone]:
    """Phones with the silence around them, in seconds from the start of the speech."""
    first, last = phones[0], phones[-1]
    leading = [] if first.symbol == SILENCE else [Phone(SILENCE, 0.0, 0.0, 0)]
    trailing = [] if last.symbol == SILENCE else [Phone(SILENCE, last.end, last.end, 0)]
    phones = [*leading, *phones, *trailing]
    phones[0] = phones[0]._replace(start=-before)
    phones[-1] = phones[-1]._replace(end=phones[-1].end + after)
    return phones


def _write_transcripts(cuts: list[MonoCut]) -> None:
    chapters: dict[Path, list[str]] = {}
    for cut in cuts:
        folder = Path(cut.recording.sources[0].source).parent
        chapters.setdefault(folder, []).append(f"{cut.id} {cut.supervisions[0].text}\n")
    for folder, lines in chapters.items():
        (folder / f"{folder.parent.name}-{folder.name}.trans.txt").write_text("".join(lines), "utf-8")


def _about(seconds: float, cuts: list[MonoCut], seed: int) -> list[MonoCut]:
    """Some of the cuts, drawn at random until they have the duration."""
    drawn, duration = set(), 0.0
    for cut in Random(seed).sample(cuts, len(cuts)):
        if duration >= seconds:
            break
        drawn.add(cut.id)
        duration += cut.duration
    return [cut for cut in cuts if cut.id in drawn]


def _is_complete(out: Path, parameters: dict[str, float]) -> bool:
    """Whether the folder holds this corpus, complete; refuse a folder that holds something else."""
    if not out.exists() or all(map(is_unfinished, out.iterdir())):
        return False
    marker = out / MARKER
    if not marker.is_file():
        raise UserError(f"{out}: holds something that is not a synthetic corpus; choose an empty folder")
    old = json.loads(marker.read_text("utf-8"))
    if old["parameters"] != parameters:
        raise UserError(
            f"{out}: holds a synthetic corpus made with {old['parameters']}, not with {parameters}; remove it, or "
            "choose another folder"
        )
    # Manifests hold absolute paths, so a corpus that was moved is made again in its new folder.
    return bool(old["complete"] and old["folder"] == str(out))


def _mark(out: Path, parameters: dict[str, float], complete: bool) -> None:
    marker = {"complete": complete, "folder": str(out), "parameters": parameters}
    write_whole(out / MARKER, json.dumps(marker, indent=1).encode())
