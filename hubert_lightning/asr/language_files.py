"""Lexicons and n-gram language models of any system: compressed or not, in ARPA or KenLM's binary form."""

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
from hubert_lightning.vocabulary import BOUNDARY

Lexicon = dict[str, list[list[str]]]
"""Spellings of each word, by the names of their tokens."""
UNKNOWN = "<unk>"
SENTENCE_MARKS = {"<s>", "</s>", UNKNOWN, "<UNK>"}
"""Entries of an n-gram model that are no words: start of a sentence, end of a sentence, unknown word."""
BOUNDARY_NAMES = (BOUNDARY, "<space>", "▁", "<sp>")
"""Names of the word boundary in language models of letters."""
KENLM_START = b"mmap lm http://kheafield.com/code"
"""First bytes of KenLM's binary form."""
PREAMBLE_LINES = 1_000
"""Number of lines above an ARPA model that are searched for its beginning."""


def read_lexicon(path: Path, tokens: Collection[str]) -> Lexicon:
    """Read a lexicon, with one spelling of a word per line: `word<TAB>t o k e n s`.

    Without a tab, the word ends at the first space. Marks of language models, such as <s>, are left out.

    Args:
        path: Lexicon, UTF-8 text, which may be compressed.
        tokens: Names of the tokens that a spelling may contain.

    Raises:
        UserError: The file cannot be read, is empty, or has a word without spelling or with other tokens.
    """
    lexicon: Lexicon = {}
    names = frozenset(tokens)
    for number, line in enumerate(lines_of(path), start=1):
        word, _, spelling = line.strip(" \r\n").partition("\t" if "\t" in line else " ")
        word, parts = word.strip(), re.findall(r"[^ \t\r\n]+", spelling)
        if not word and not parts:
            continue
        if not word or not parts:
            missing = f"{word[:40]!r} has no spelling" if word else "a spelling without its word"
            raise UserError(f"{path}, line {number}: {missing}; make it with `hubert lexicon`")
        if word in SENTENCE_MARKS:
            continue
        normalised = [part if part in names else unicodedata.normalize("NFC", part) for part in parts]
        if unknown := set(normalised) - names:
            quoted = str(sorted(unknown))[:200]
            raise UserError(
                f"{path}, line {number}: {word[:40]!r} contains {quoted}, which are not among the model's tokens; make "
                "the lexicon with `hubert lexicon` and the model's vocabulary"
            )
        spellings = lexicon.setdefault(word, [])
        if normalised not in spellings:
            spellings.append(normalised)
    if not lexicon:
        raise UserError(f"{path}: an empty lexicon; make it with `hubert lexicon`")
    return lexicon


def is_language_model(path: Path) -> bool:
    """Whether a file begins as an ARPA model or as KenLM's binary form."""
    return _is_binary(path) or _arpa_lines(path) is not None


def unigrams(path: Path) -> set[str] | None:
    """Read the words of a language model.

    Returns:
        The words without marks such as <s>; None for a binary model that does not store its words.

    Raises:
        UserError: The file cannot be read, or is no language model.
    """
    if _is_binary(path):
        return _words_of_binary(path)
    words: set[str] = set()
    in_unigrams = False
    for line in required_arpa_lines(path):
        if line.startswith("\\"):
            if in_unigrams:
                break
            in_unigrams = line.startswith("\\1-grams")
        elif in_unigrams and len(parts := line.split()) > 1:
            words.add(parts[1])
    return words - SENTENCE_MARKS


@contextmanager
def for_kenlm(path: Path) -> Iterator[Path]:
    """Provide a language model as a file that KenLM reads.

    KenLM does not read text with another compression than gzip, a byte order mark, UTF-16, spaces in place of tabs, a
    preamble, or line ends of old systems.

    Yields:
        The file itself, or a temporary copy without these.

    Raises:
        UserError: The file cannot be read, or is no language model.
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
    lines = required_arpa_lines(path)
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "model.arpa"
        with _copying(path), copy.open("w", encoding="utf-8", newline="\n") as file:
            file.write("\\data\\\n")
            file.writelines(_with_tabs(lines))
        yield copy


@contextmanager
def _copying(path: Path) -> Iterator[None]:
    """Convert errors of writing a temporary copy to one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: KenLM reads a temporary copy of it, which cannot be written to {gettempdir()} "
            f"({error.strerror}); make room there, or set TMPDIR to a folder with room"
        ) from error


def unreadable_model(path: Path | str, reason: str) -> UserError:
    """Error for a file that KenLM cannot read.

    Args:
        path: Path of the file.
        reason: Message of KenLM, whose last line is quoted.
    """
    quoted = reason.strip().splitlines()[-1][:200]
    return UserError(f"{path}: no n-gram language model that KenLM reads ({quoted}); make one with `hubert ngram`")


def _is_binary(path: Path) -> bool:
    with decompressed(path) as file:
        return file.read(len(KENLM_START)) == KENLM_START


def _arpa_lines(path: Path) -> Iterator[str] | None:
    """Lines below `\\data\\`; None if there is no such line."""
    lines = lines_of(path)
    try:
        return lines if any(line.strip() == "\\data\\" for line in islice(lines, PREAMBLE_LINES)) else None
    except UserError as error:
        if isinstance(error.__cause__, UnicodeError):
            return None
        raise


def required_arpa_lines(path: Path) -> Iterator[str]:
    """Read the lines of an ARPA model below `\\data\\`.

    Raises:
        UserError: The file cannot be read, or has no such line.
    """
    lines = _arpa_lines(path)
    if lines is None:
        raise unreadable_model(path, "neither a line \\data\\ nor KenLM's binary form")
    return lines


def _with_tabs(lines: Iterator[str]) -> Iterator[str]:
    """Put tabs between probability, words and back-off of n-grams."""
    order = 0
    for line in lines:
        if section := re.match(r"\\(\d+)-grams:", line):
            order = int(section[1])
        elif order and "\t" not in line and len(parts := line.split()) > order:
            line = "\t".join([parts[0], " ".join(parts[1 : order + 1]), *parts[order + 1 :]]) + "\n"
        yield line


def _words_of_binary(path: Path) -> set[str] | None:
    """Read the words of KenLM's binary form: after the numbers, the unknown word first, a zero byte after each."""
    start = UNKNOWN.encode() + b"\0"
    with (
        for_kenlm(path) as plain,
        plain.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        index = content.rfind(start)
        if index < 0 or content[-1] != 0:
            return None
        words = content[index:-1].split(b"\0")
    return {word.decode(errors="replace") for word in words} - SENTENCE_MARKS
