"""Lexicons and n-gram language models in files of any system: compressed or not, ARPA or KenLM's binary form."""

import mmap
import re
import unicodedata
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryDirectory, gettempdir

from hubert_lightning.errors import UserError
from hubert_lightning.untrusted.file_kind import compression
from hubert_lightning.untrusted.text_file import decompressed, lines_of

UNKNOWN = "<unk>"
MARKS = {"<s>", "</s>", UNKNOWN, "<UNK>"}
"""What an n-gram model has besides words: a sentence's start, its end, and any word that it does not know."""
KENLM = b"mmap lm http://kheafield.com/code"
"""The first bytes of KenLM's binary form."""
PREAMBLE = 1_000
"""Lines that a program may write above an ARPA model."""


def read_lexicon(path: Path, tokens: Collection[str]) -> dict[str, list[list[str]]]:
    """Read the words that can be said, and the spellings of each, one a line: `word<TAB>t o k e n s`.

    Without a tab, the word ends at the first space. Marks of language models are no words.

    Args:
        path: The lexicon, UTF-8 text, which may be compressed.
        tokens: What words may be spelled with.

    Returns:
        Word → its spellings.

    Raises:
        UserError: It cannot be read, is empty, or has a word without spelling or one of other tokens.
    """
    words: dict[str, list[list[str]]] = {}
    names = frozenset(tokens)
    for number, line in enumerate(lines_of(path), start=1):
        word, _, spelling = line.strip(" \r\n").partition("\t" if "\t" in line else " ")
        word, named = word.strip(), re.findall(r"[^ \t\r\n]+", spelling)
        if not word and not named:
            continue
        if not word or not named:
            missing = f"{word[:40]!r} has no spelling" if word else "a spelling without its word"
            raise UserError(f"{path}, line {number}: {missing}; make it with `hubert lexicon`")
        if word in MARKS:
            continue
        spelled = [token if token in names else unicodedata.normalize("NFC", token) for token in named]
        if unknown := set(spelled) - names:
            quoted = str(sorted(unknown))[:200]
            raise UserError(
                f"{path}, line {number}: {word[:40]!r} is spelled with {quoted}, which are not among the model's "
                "tokens; make the lexicon with `hubert lexicon` and the model's vocabulary"
            )
        ways = words.setdefault(word, [])
        if spelled not in ways:
            ways.append(spelled)
    if not words:
        raise UserError(f"{path}: an empty lexicon; make it with `hubert lexicon`")
    return words


def is_language_model(path: Path) -> bool:
    """Whether a file begins as an ARPA model, or as KenLM's binary form."""
    return _is_binary(path) or _arpa(path) is not None


def unigrams(path: Path) -> set[str] | None:
    """The words of a language model, without its marks; none of a binary one that does not hold them.

    Raises:
        UserError: It cannot be read, or is no language model.
    """
    if _is_binary(path):
        return _words_of_binary(path)
    lines = _arpa(path)
    if lines is None:
        raise UserError(_no_model(path, "neither a line \\data\\ nor KenLM's binary form"))
    words: set[str] = set()
    inside = False
    for line in lines:
        if line.startswith("\\"):
            if inside:
                break
            inside = line.startswith("\\1-grams")
        elif inside and len(parts := line.split()) > 1:
            words.add(parts[1])
    return words - MARKS


@contextmanager
def for_kenlm(path: Path) -> Iterator[Path]:
    """A language model as a file that KenLM reads: itself, or a temporary copy without what KenLM does not know.

    Of text, that is any compression but gzip, a byte order mark, UTF-16, spaces for tabs, a preamble and old line ends.

    Raises:
        UserError: It cannot be read, or is no language model.
    """
    if _is_binary(path):
        if not compression(path):
            yield path
            return
        with TemporaryDirectory() as folder:
            copy = Path(folder) / "model.bin"
            with _copying(path), decompressed(path) as model, copy.open("wb") as file:
                copyfileobj(model, file)
            yield copy
        return
    with decompressed(path) as file:
        head = file.read(2**16).lstrip()
    first = re.search(rb"^\\1-grams:.*\r?\n([^\r\n]+)", head, re.MULTILINE)
    if head.startswith(b"\\data\\") and first and b"\t" in first[1] and compression(path) in (None, "gzip"):
        yield path
        return
    lines = _arpa(path)
    if lines is None:
        raise UserError(_no_model(path, "neither a line \\data\\ nor KenLM's binary form"))
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "model.arpa"
        with _copying(path), copy.open("w", encoding="utf-8", newline="\n") as file:
            file.write("\\data\\\n")
            file.writelines(_tabbed(lines))
        yield copy


@contextmanager
def _copying(path: Path) -> Iterator[None]:
    """Errors of a temporary copy, as one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: KenLM reads a temporary copy of it, which cannot be written to {gettempdir()} "
            f"({error.strerror}); make room there, or set TMPDIR to a folder with room"
        ) from error


def no_model(path: Path | str, reason: object) -> UserError:
    """What KenLM says of a file that it cannot read, as a sentence."""
    return UserError(_no_model(path, str(reason).strip().splitlines()[-1][:200]))


def _no_model(path: Path | str, reason: str) -> str:
    return f"{path}: no n-gram language model that KenLM reads ({reason}); make one with `hubert ngram`"


def _is_binary(path: Path) -> bool:
    with decompressed(path) as file:
        return file.read(len(KENLM)) == KENLM


def _arpa(path: Path) -> Iterator[str] | None:
    """The lines below `\\data\\`, or none if there is no such line."""
    lines = lines_of(path)
    try:
        return lines if any(line.strip() == "\\data\\" for line in islice(lines, PREAMBLE)) else None
    except ValueError as error:
        if isinstance(error.__cause__, UnicodeError):
            return None
        raise


def _tabbed(lines: Iterator[str]) -> Iterator[str]:
    """Lines of n-grams with tabs between probability, words and back-off."""
    order = 0
    for line in lines:
        if section := re.match(r"\\(\d+)-grams:", line):
            order = int(section[1])
        elif order and "\t" not in line and len(parts := line.split()) > order:
            line = "\t".join([parts[0], " ".join(parts[1 : order + 1]), *parts[order + 1 :]]) + "\n"
        yield line


def _words_of_binary(path: Path) -> set[str] | None:
    """The words of KenLM's binary form, which follow the numbers, each ended by a zero byte, the unknown one first."""
    first = UNKNOWN.encode() + b"\0"
    with (
        for_kenlm(path) as plain,
        plain.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        index = content.rfind(first)
        if index < 0 or content[-1] != 0:
            return None
        words = content[index:-1].split(b"\0")
    return {word.decode(errors="replace") for word in words} - MARKS
