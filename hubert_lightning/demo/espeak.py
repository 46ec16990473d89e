"""The espeak-ng library: text → speech, and the time of each phone."""

import ctypes
import re
from typing import Any, NamedTuple

import numpy as np

from hubert_lightning.data.alignments import SILENCE
from hubert_lightning.data.espeak_library import DO_NOT_EXIT, UTF8, EspeakLibrary
from hubert_lightning.errors import UserError

PHONEME_EVENTS = 0x0001
RATE, PITCH, PITCH_RANGE = 1, 3, 4
BY_CHARACTER = 1
LAST_EVENT, PHONEME = 0, 7
"""Numbers of espeak-ng/speak_lib.h."""
RARE_PHONES = {"a#": "@", "VR": "3", "IR": "3"}
"""Common phones for rare ones: the last vowel of "letter", and vowels of "bird" in Scotland."""


class Voice(NamedTuple):
    """A speaker.

    Attributes:
        name: Name of the voice in espeak-ng, dialect+throat.
        rate: Speed in words a minute.
        pitch: Pitch from 0 to 99.
        pitch_range: Range of the pitch from 0 to 99.
        level: Level (root mean square) in dB of full scale.
        noise: Level of the noise in dB below the speech.
    """

    name: str
    rate: int
    pitch: int
    pitch_range: int
    level: float
    noise: float


class Phone(NamedTuple):
    """A phone in synthetic speech.

    Attributes:
        symbol: Mnemonic of espeak-ng.
        start: Start in seconds.
        end: End in seconds.
        position: Index in the text of the first character of its word.
    """

    symbol: str
    start: float
    end: float
    position: int


class Espeak(EspeakLibrary):
    """A fresh copy of the espeak-ng library that speaks: the same text sounds different the second time.

    Attributes:
        rate: Sampling rate in Hz.
    """

    def __init__(self) -> None:
        super().__init__(PHONEME_EVENTS | DO_NOT_EXIT)
        self.audio: list[np.ndarray] = []
        self.events: list[tuple[str, int, int]] = []  # phone, sample, position in the text
        self.callback = _Callback(self._hear)  # the library holds no reference that Python counts
        self.library.espeak_SetSynthCallback(self.callback)

    def say(self, text: str, voice: Voice) -> tuple[np.ndarray, list[Phone]]:
        """Speak a text.

        Args:
            text: English, with commas for pauses.
            voice: Speaker.

        Returns:
            (samples,) int16 at `self.rate`, and the phones, which follow one another without gaps.

        Raises:
            UserError: The library has no such voice.
        """
        if not self.has_voice(voice.name):
            raise UserError(
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

    def _hear(self, samples: Any, num_samples: int, events: Any) -> int:  # pointers of ctypes
        """Keep the audio and the phones that the library has just made (espeak_SetSynthCallback)."""
        if samples and num_samples:
            self.audio.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        for event in events:  # an array of unknown length
            if event.type == LAST_EVENT:
                break
            if event.type == PHONEME:
                self.events.append((event.name.decode("utf-8", "replace"), event.sample, event.text_position))
        return 0


class _Event(ctypes.Structure):
    """espeak_EVENT of a phoneme, whose union is a name of up to eight bytes."""

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


def _phones(events: list[tuple[str, int, int]], num_samples: int, rate: int) -> list[Phone]:
    """Phones that last until the next one; links between words have no sound and lengthen the phone before them."""
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
    """The mnemonic of a phone without stress, length and variant; empty if the event is not a phone."""
    if name.startswith("_"):
        return SILENCE
    name = name.strip("',%=;|")
    return RARE_PHONES.get(name) or re.sub(r"(?<=.)[-#:0-9]+$", "", name)
