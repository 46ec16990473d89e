"""The espeak-ng library, and the phones that it gives to words without speaking them."""

import ctypes
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

import espeakng_loader

AUDIO_SYNCHRONOUS, DO_NOT_EXIT = 2, 0x8000
UTF8 = 1
SEPARATOR = "_"
"""Character between the phones of a word."""


class EspeakLibrary:
    """A fresh copy of the espeak-ng library.

    The state of the library is global and outlives a voice, so only a newly loaded copy gives the same results again.

    Args:
        options: Options of espeak_Initialize.

    Attributes:
        rate: Sampling rate in Hz.
    """

    def __init__(self, options: int = DO_NOT_EXIT) -> None:
        # espeak-ng truncates paths of more than about 150 characters, so its data lie beside its copy.
        self.folder = TemporaryDirectory(prefix="espeak", ignore_cleanup_errors=True)
        self.library = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), self.folder.name))
        _link(Path(espeakng_loader.get_data_path()), Path(self.folder.name, "espeak-ng-data"))
        self.rate: int = self.library.espeak_Initialize(AUDIO_SYNCHRONOUS, 0, os.fsencode(self.folder.name), options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.library.espeak_Terminate()
        self.folder.cleanup()

    def has_voice(self, name: str) -> bool:
        """Choose a voice by its name; returns whether there is one of this name."""
        return bool(self.library.espeak_SetVoiceByName(name.encode()) == 0)

    def phones(self, text: str) -> list[str]:
        """Return the phones of a text in the chosen voice.

        Args:
            text: Words.

        Returns:
            Mnemonics of espeak-ng, with marks of stress such as ' and , before vowels.
        """
        spoken = self.library.espeak_TextToPhonemes
        spoken.restype = ctypes.c_char_p
        spoken.argtypes = [ctypes.POINTER(ctypes.c_char_p), ctypes.c_int, ctypes.c_int]
        rest = ctypes.c_char_p(text.encode())
        clauses = []
        while rest.value:  # the library moves the pointer behind each clause, and to null at the end
            clauses.append(spoken(ctypes.byref(rest), UTF8, ord(SEPARATOR) << 8) or b"")
        names = " ".join(clause.decode("utf-8", "replace") for clause in clauses).replace(SEPARATOR, " ")
        return names.split()


def _link(data: Path, link: Path) -> None:
    try:
        link.symlink_to(data, target_is_directory=True)
    except OSError:  # Windows reserves links for administrators
        shutil.copytree(data, link)
