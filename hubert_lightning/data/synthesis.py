"""The corpus that needs no download: English made up by a small grammar, spoken by espeak-ng in dozens of voices.

It is laid out as LibriSpeech is, and its manifests know more than LibriSpeech's: where each word and each phone lies.
On one machine the same seed makes the same files, sample by sample.
"""

import ctypes
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import ceil
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, NamedTuple

import espeakng_loader
import numpy as np
import soundfile
import torch
import torchaudio
from lhotse import MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.supervision import AlignmentItem
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from hubert_lightning.data.manifest import write_manifest
from hubert_lightning.frames import SAMPLE_RATE, seconds_to_samples

VERSION = 5  # of the corpus: another number when the same parameters make other audio
SILENCE = "SIL"
MARKER = "corpus.json"
SHORTEST, LONGEST = 2.0, 8.0  # seconds of speech in an utterance
GRID = 0.25  # seconds: recordings last a multiple of it, since a CPU is faster at lengths that recur
CHAPTER = 25  # utterances

# A symbol becomes one of its lines; {symbol} in a line becomes a line of that symbol. The past tense agrees with any
# subject. Commas are pauses, and no part of the transcript.
GRAMMAR = """
sentence: {clause} | {clause} | {clause} {time} | {clause}, {and} {clause} | {clause}, {and} {clause}
sentence: {clause} {because} {clause} | {clause} {because} {clause} | {when} {clause}, {clause} | {time}, {clause}
sentence: {people} {said} that {clause} | {they} {said} {clause}, {and} {clause} | {question} | {question}
sentence: there was {a_thing} {where}, {and} {clause} | it {was} {adjective}, {and} {clause}
sentence: {clause}, which {was} {very} {adjective} | if {clause}, {they} {would} {go} {to}
clause: {people} {did} {things} | {people} {did} {things} | {people} {did} {things} {where} | {they} {did} {things}
clause: {people} {went} {to} | {they} {went} {to} {how} | {people} {how} {went} {to} | {they} {would} {go} {to}
clause: {people} {would} {do} {things} | {they} {would} {do} {things} | {they} {would} {do} {things} {where}
clause: {people} had {ever} {done} {things} | {they} had {ever} been {adjective} | {they} {would} be {adjective}
clause: the {thing} {was} {very} {adjective} | the {thing} {was} {adjective} and {adjective}
clause: the {thing} {lay} {where} | {people} gave {things} to {people} | {they} took {things} from {people}
clause: {people} {felt} {adjective} | the {thing} {was} as {adjective} as the {thing}
clause: the {person}'s {thing} {lay} {where} | nobody {did} {things} | {they} {went} {number} {measures} {to}
clause: {people} {lived} {where} | {people} {lived} {where} {how}
question: why {didnt} {people} {do} {things} | where {didnt} {they} {do} {things} | {didnt} {people} {go} {to}
question: how {didnt} {they} {do} {things} {where} | when {didnt} {people} {go} {to} | who {did} {things} {where}
people: the {person} | {this} {person} | the {adjective} {person} | a {person} | {whose} {person} | the {person}s
people: the {person} and the {person} | {number} {person}s | {some} {adjective} {person}s | the {person}'s {person}
things: the {thing} | {this} {thing} | a {thing} | {whose} {thing} | the {adjective} {thing} | a {adjective} {thing}
things: {number} {thing}s | {some} {thing}s | the {person}'s {thing} | the {thing} of {people} | {whose} {thing}s
a_thing: a {thing} | a {adjective} {thing} | a {thing} and a {thing} | a {adjective} {adjective} {thing}
where: in the {place} | near the {place} | behind the {place} | under the {thing} | beside {people} | on the {place}
where: in {whose} {place} | between the {place} and the {place} | at the end of the {place}
where: in the {adjective} {place}
to: to the {place} | to the {place} | towards the {place} | across the {place} | through the {adjective} {place}
to: past the {place} | away from the {place} | into the {place} | with {people} to the {place} | back to {people}
they: i | you | he | she | we | they | it | she | he | they | everyone
whose: my | your | his | her | our | their | its
this: this | that | another | every | the
some: some | many | all the | most | few | these | those | both | no | several
number: two | three | four | five | six | seven | eight | nine | ten | eleven | twelve | twenty | thirty | a hundred
measures: miles | times | steps | days | weeks | nights
and: and | and | but | and then | so | or | yet
because: because | while | until | before | after | since | though | as | where
when: when | if | once | after | before | although | as soon as | because
said: said | knew | thought | believed | heard | told us | hoped | wrote | agreed | dreamed | was sure | remembered
was: was | was | wasn't | became | seemed | looked | would be | could be | must be
very: very | too | so | rather | quite | almost | never | still | always | not
ever: never | often | always | once | already | just | hardly | only
would: would | could | should | must | might | will | can | didn't | couldn't | wouldn't | won't | can't
didnt: did | didn't | could | would | should | couldn't | must | will
lay: lay | stood | fell | was lost | had been | was hidden | was found | burned | stayed
felt: felt | was | looked | seemed | grew | became | were never | slept until it was
lived: lived | worked | slept | waited | sat | danced | sang | played | rested | laughed | prayed | stopped | talked
how: slowly | quickly | quietly | alone | again | at last | with care | in silence | in haste | together | by chance
how: gladly | without a word | for a long time | once more | as usual
time: in the morning | at night | yesterday | last winter | every day | long ago | after dinner | at noon | one day
time: this evening | in the spring | all summer | on sunday | before dawn | next year | every autumn | that afternoon
go: go | walk | run | ride | travel | hurry | return | climb | sail | fly | march | creep | come | wander | jump
went: went | walked | ran | rode | travelled | hurried | returned | climbed | sailed | flew | marched | crept | came
went: wandered | jumped | turned | moved
do: find | see | take | bring | carry | break | build | buy | sell | lose | leave | keep | watch | follow | open
do: close | choose | draw | drop | hold | hide | love | hate | make | need | pull | push | read | share | show | steal
do: throw | touch | use | want | wash | paint | catch | cut | forget | join | move | shake | give | lift | burn
do: cover
did: found | saw | took | brought | carried | broke | built | bought | sold | lost | left | kept | watched | followed
did: opened | closed | chose | drew | dropped | held | hid | loved | hated | made | needed | pulled | pushed | shared
did: showed | stole | threw | touched | used | wanted | washed | painted | caught | cut | forgot | joined | moved
did: shook
done: found | seen | taken | brought | carried | broken | built | sold | lost | kept | followed | opened | chosen
done: held | drawn | hidden | loved | made | needed | shared | shown | stolen | touched | used | wanted | caught
done: forgotten
person: son | king | queen | friend | girl | boy | mother | father | sister | brother | doctor | teacher | farmer
person: soldier | captain | judge | lawyer | sailor | painter | poet | stranger | neighbour | uncle | cousin | hunter
person: baker | driver | singer | writer | student | merchant | servant | priest | prince | giant | aunt | dog | horse
person: bird | bear | lion | tiger | cat | cow | rabbit | eagle | lady | guest
thing: book | letter | table | chair | window | door | lamp | ring | coat | hat | shoe | cup | plate | bottle | basket
thing: boat | ship | wagon | wheel | rope | sail | net | sword | shield | coin | crown | jewel | key | box | clock
thing: bell | apple | orange | cake | egg | flower | tree | branch | root | seed | stone | cloud | star | song | story
thing: treasure | picture | name | word | question | answer | dream | secret | promise | plan | game | voice | machine
thing: engine | tool | hammer | needle | mirror | candle | pillow | blanket | drum | violin | garden | idea | thought
place: house | garden | street | village | city | river | forest | mountain | valley | island | harbour | bridge
place: church | school | market | kitchen | hall | tower | castle | field | farm | road | shore | beach | lake
place: desert | station | museum | library | square | hospital | cellar | camp | cave | ocean | north | south | east
place: west | world | hill
adjective: old | young | small | large | great | tall | short | long | dark | bright | black | white | red | green
adjective: blue | yellow | cold | warm | heavy | light | quiet | loud | strange | happy | sad | angry | clever
adjective: foolish | brave | poor | rich | kind | cruel | gentle | strong | weak | thin | thick | sharp | soft | hard
adjective: wet | dry | clean | fresh | sweet | bitter | broken | golden | silver | wooden | empty | full | open
adjective: hungry | thirsty | tired | useless | pleasant | ancient | modern | famous | beautiful | ordinary
adjective: dangerous | curious | careful | proud
"""

DIALECTS = ["en-us", "en", "en-us-nyc", "en-gb-x-rp", "en-gb-scotland"]
# espeak-ng's descriptions of throats, by subset: none is in two of them
THROATS = {
    "train-clean-100": """
        m1 f1 m2 f2 m4 f4 m6 Alicia m7 Andrea m8 aunty Alex belinda Andy grandma Gene linda Hugo steph Lee anika Mike
        Nguyen adam announcer antonio croak david ed gustave ian klatt4 marcelo norbert
    """,
    "dev-clean": "m3 f3 Jacky Annie paul quincy",
    "test-clean": "m5 f5 pablo shelby boris victor",
}
FIRST_SPEAKER = {"train-clean-100": 1001, "dev-clean": 2001, "test-clean": 3001}


class Voice(NamedTuple):
    """A speaker."""

    name: str  # espeak-ng's: dialect+throat
    rate: int  # words a minute
    pitch: int  # of espeak-ng's 0 to 99
    pitch_range: int  # of espeak-ng's 0 to 99
    level: float  # dB of full scale, root mean square
    noise: float  # dB below the speech


class Phone(NamedTuple):
    """A phone in what espeak has just said."""

    symbol: str
    start: float  # seconds
    end: float
    position: int  # in the text: the first character of its word


def synthesise_corpus(
    out: Path,
    train_minutes: float = 60.0,
    finetuning_minutes: float = 10.0,
    dev_minutes: float = 4.0,
    test_minutes: float = 4.0,
    train_speakers: int = 240,
    heldout_speakers: int = 30,
    seed: int = 0,
) -> Path:
    """Speak a corpus into `OUT/LibriSpeech` and its manifests into `OUT/manifests`, unless it is there already.

    The manifests are train, finetune (some utterances of train), dev and test (other speakers than train, and than
    each other), all with the text and the times of words ("word") and phones ("phone").

    Args:
        out: a folder of its own
        train_minutes: of train-clean-100
        finetuning_minutes: of the part of it that is listed for fine-tuning
        dev_minutes: of dev-clean
        test_minutes: of test-clean
        train_speakers: each is a dialect, a throat, a speed, a pitch, a level and a noise
        heldout_speakers: of dev-clean, and of test-clean
        seed: of sentences, speakers and noise

    returns: the folder of the manifests
    """
    if not 0 < finetuning_minutes <= train_minutes or min(dev_minutes, test_minutes) <= 0:
        raise ValueError(
            f"minutes: train {train_minutes}, finetuning {finetuning_minutes}, dev {dev_minutes}, test {test_minutes}; "
            "ask for more than none of each, and for no more fine-tuning than training speech"
        )
    if min(train_speakers, heldout_speakers) < 1:
        raise ValueError(f"{train_speakers} training and {heldout_speakers} held-out speakers: ask for one or more")
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
    columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()]
    with Progress(*columns) as progress, Espeak() as espeak, ThreadPoolExecutor() as pool:
        cuts: dict[str, list[MonoCut]] = {subset: [] for subset in sets}
        for subset, (minutes, num_speakers) in sets.items():
            task = progress.add_task(f"speaking {subset}", total=minutes * 60)
            for cut in _speak_subset(
                espeak, pool, texts, out / "LibriSpeech", subset, minutes * 60, num_speakers, seed
            ):
                cuts[subset].append(cut)
                progress.update(task, advance=cut.duration)
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


def sentences(seed: int = 0) -> Iterator[str]:
    """English without end, no sentence twice: lower case, with a comma where a speaker would pause."""
    lines: dict[str, list[str]] = {}
    for rule in GRAMMAR.strip().splitlines():
        symbol, _, choices = rule.partition(": ")
        lines.setdefault(symbol, []).extend(choices.split(" | "))
    random = Random(seed)
    said = set()
    while True:
        text = "{sentence}"
        while "{" in text:
            text = re.sub(r"{(\w+)}", lambda symbol: random.choice(lines[symbol[1]]), text)
        text = re.sub(r"\ba (?=[aeiou])", "an ", text)
        text = re.sub(r"(?<=[^aeiou])ys\b", "ies", text)  # stories
        text = re.sub(r"xs\b", "xes", text)
        if text not in said:
            said.add(text)
            yield text


def transcript(text: str) -> str:
    """As LibriSpeech writes it: upper-case words, without punctuation."""
    return " ".join(re.findall(r"[a-z']+", text)).upper()


class Espeak:
    """The espeak-ng library, alone: a copy of it that nobody else in this process has used.

    Its state is global and outlives a voice, so the same text sounds different the second time. Only a copy that is
    loaded afresh says the same things the same way.
    """

    def __init__(self) -> None:
        # espeak-ng truncates paths of more than about 150 characters: it finds its data beside the copy of itself.
        self.folder = TemporaryDirectory(prefix="espeak", ignore_cleanup_errors=True)
        self.library = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), self.folder.name))
        _link(Path(espeakng_loader.get_data_path()), Path(self.folder.name, "espeak-ng-data"))
        self.rate = self.library.espeak_Initialize(
            AUDIO_SYNCHRONOUS, 0, os.fsencode(self.folder.name), PHONEME_EVENTS | DO_NOT_EXIT
        )
        self.audio: list[np.ndarray] = []
        self.events: list[tuple[str, int, int]] = []  # phone, sample, position in the text
        self.callback = _Callback(self._hear)  # the library keeps no reference that Python would count
        self.library.espeak_SetSynthCallback(self.callback)

    def __enter__(self) -> "Espeak":
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.library.espeak_Terminate()
        self.folder.cleanup()

    def say(self, text: str, voice: Voice) -> tuple[np.ndarray, list[Phone]]:
        """16-bit samples at `self.rate`, and the phones that fill them without a gap."""
        if self.library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise ValueError(
                f"espeak-ng has no voice {voice.name}; install the espeakng-loader that the project asks for"
            )
        for parameter, value in [(RATE, voice.rate), (PITCH, voice.pitch), (PITCH_RANGE, voice.pitch_range)]:
            self.library.espeak_SetParameter(parameter, value, 0)
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # of breath
        self.audio, self.events = [], []
        characters = text.encode()
        self.library.espeak_Synth(
            ctypes.c_char_p(characters), ctypes.c_size_t(len(characters) + 1), 0, BY_CHARACTER, 0, UTF8, None, None
        )
        audio = np.concatenate(self.audio)
        return audio, _phones(self.events, len(audio), self.rate)

    def _hear(self, samples: Any, num_samples: int, events: Any) -> int:
        if samples and num_samples:
            self.audio.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        for event in events:  # an array of unknown length
            if event.type == LAST_EVENT:
                break
            if event.type == PHONEME:
                self.events.append((event.name.decode("utf-8", "replace"), event.sample, event.text_position))
        return 0


# espeak-ng/speak_lib.h
AUDIO_SYNCHRONOUS, PHONEME_EVENTS, DO_NOT_EXIT = 2, 0x0001, 0x8000
RATE, PITCH, PITCH_RANGE = 1, 3, 4
BY_CHARACTER, UTF8 = 1, 1
LAST_EVENT, PHONEME = 0, 7
ONSETS = {"the": "D", "a": "@", "an": "@", "been": "b", "was": "w", "were": "w", "have": "h", "it": "I", "many": "m"}
RARE_PHONES = {"a#": "@", "VR": "3", "IR": "3"}  # the last vowel of "letter", and vowels of "bird" in Scotland


class _Event(ctypes.Structure):
    """espeak_EVENT, for phonemes: the union at its end is a name of up to eight bytes."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def _link(data: Path, there: Path) -> None:
    try:
        there.symlink_to(data, target_is_directory=True)
    except OSError:  # Windows reserves links for administrators
        shutil.copytree(data, there)


def _phones(events: list[tuple[str, int, int]], num_samples: int, rate: int) -> list[Phone]:
    """Each phone lasts until the next; links between words have no sound of their own and lengthen what they follow."""
    phones = [Phone(SILENCE, 0.0, 0.0, 0)]
    ends = [sample for _, sample, _ in events[1:]] + [num_samples]
    for (name, _, position), end in zip(events, ends, strict=True):
        symbol = _symbol(name)
        last = phones[-1]
        if symbol == "" or symbol == last.symbol == SILENCE:
            phones[-1] = last._replace(end=end / rate)
        else:
            phones.append(Phone(symbol, last.end, end / rate, position))
    return [phone for phone in phones if phone.end > phone.start]


def _symbol(name: str) -> str:
    """espeak-ng's mnemonic of a phone without stress, length and variant; empty for what is no phone."""
    if name.startswith("_"):
        return SILENCE
    name = name.strip("',%=;|")
    return RARE_PHONES.get(name) or re.sub(r"(?<=.)[-#:0-9]+$", "", name)


def _word_times(text: str, phones: list[Phone]) -> list[tuple[str, float, float]]:
    """Words with their start and end in seconds.

    espeak-ng says some pairs, such as "of the", as one word: they are parted before the phone that the second one
    begins with, or where their letters would part them.
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
            rate=random.randint(135, 200),
            pitch=random.randint(35, 65),
            pitch_range=random.randint(35, 65),
            level=random.uniform(-38, -14),  # as microphones and distances do; MFCC clusters tell levels apart
            noise=random.uniform(5, 30),
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
    """Speakers in turn, each saying its share; espeak-ng speaks here, and the pool finishes what it said."""
    num_speakers = min(num_speakers, ceil(seconds / LONGEST))
    spoken = 0.0
    random = Random(f"{seed} {subset} silence")
    for k, voice in enumerate(_voices(subset, num_speakers, seed)):
        finishing: list[Future[MonoCut]] = []
        while spoken < seconds * (k + 1) / num_speakers:
            text = next(texts)
            audio, phones = espeak.say(text, voice)
            if not SHORTEST <= len(audio) / espeak.rate <= LONGEST:
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
    """What espeak-ng said, in a room: resampled, with silence around it, at the speaker's level, over faint noise."""
    random = np.random.default_rng([seed, *map(int, path.stem.split("-"))])
    before = seconds_to_samples(silence)
    speech = torchaudio.functional.resample(torch.from_numpy(audio.astype(np.float32)), rate, SAMPLE_RATE).numpy()
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
        text=transcript(text),
        speaker=path.stem.split("-")[0],
        custom={"voice": voice.name},
        alignment={
            "word": [item(word, start, end) for word, start, end in words],
            "phone": [item(phone.symbol, phone.start, phone.end) for phone in sounds],
        },
    )
    return MonoCut(path.stem, start=0.0, duration=duration, channel=0, recording=recording, supervisions=[supervision])


def _room(seed: int, speaker: str) -> np.ndarray:
    """Impulse response, (samples,), of a speaker's microphone and what stands near it: no two colour a voice alike."""
    random = np.random.default_rng([seed, int(speaker)])
    response = 0.6 * random.normal(size=64) * np.exp(-np.arange(64) / 16)  # 4 ms: no phone moves
    response[0] = 1
    return response.astype(np.float32)


def _with_silence(phones: list[Phone], before: float, after: float) -> list[Phone]:
    """Phones, still counted from the start of speech, with the silence around them."""
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
    """Some of the cuts, drawn at random until they last so long."""
    taken, duration = set(), 0.0
    for cut in Random(seed).sample(cuts, len(cuts)):
        if duration >= seconds:
            break
        taken.add(cut.id)
        duration += cut.duration
    return [cut for cut in cuts if cut.id in taken]


def _is_complete(out: Path, parameters: dict[str, float]) -> bool:
    """Whether the folder holds this corpus; an error if it holds something else."""
    if not out.exists() or not any(out.iterdir()):
        return False
    marker = out / MARKER
    if not marker.is_file():
        raise ValueError(f"{out}: holds something that is no synthetic corpus; choose an empty folder")
    made = json.loads(marker.read_text("utf-8"))
    if made["parameters"] != parameters:
        raise ValueError(
            f"{out}: holds a synthetic corpus made with {made['parameters']}, not with {parameters}; remove it, or "
            "choose another folder"
        )
    # Manifests hold absolute paths: a corpus that was moved is made again where it is.
    return bool(made["complete"] and made["folder"] == str(out))


def _mark(out: Path, parameters: dict[str, float], complete: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    marker = {"complete": complete, "folder": str(out), "parameters": parameters}
    (out / MARKER).write_text(json.dumps(marker, indent=1), "utf-8")
