"""Vocabularies, made from transcripts, and lexicons for a beam search, made from words."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hubert_lightning.asr.language_files import SENTENCE_MARKS, is_language_model, unigrams
from hubert_lightning.characters import is_spoken_symbol
from hubert_lightning.data.languages import language_of
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.errors import UserError, counted
from hubert_lightning.files import write_whole
from hubert_lightning.untrusted.text_file import lines_of
from hubert_lightning.vocabulary import BOUNDARY, Vocabulary, read_vocabulary, vocabulary_of

CHARACTERS_SHOWN = 40
"""Largest number of characters that are listed for a language."""


def vocabulary(
    manifests: list[Path],
    out: Path,
    case: Literal["lower", "upper", "as_written"] = "lower",
    keep_punctuation: str = "'",
) -> None:
    """Make the vocabulary of transcripts for `hubert fit`, and print a table of its characters, by language if known.

    Args:
        manifests: Manifests of the training data; characters that occur only in other data do not become tokens.
        out: Vocabulary to write, a .json file.
        case: Case of the tokens.
        keep_punctuation: Punctuation and symbols that are tokens, such as "'-". Spaces replace other punctuation;
            `hubert fit` refuses symbols that are read as words, such as € and %, unless they are tokens.
    """
    cuts = read_manifest(manifests)
    texts = [" ".join(segment.text or "" for segment in cut.supervisions) for cut in cuts]
    made, counts, left_out = vocabulary_of(texts, case, keep_punctuation)
    if not counts:
        raise UserError(f"{', '.join(map(str, manifests))}: no transcripts; prepare them with their transcripts")
    made.write(Path(out))
    table = Table(title=f"{counted(len(counts), 'character')} in {counted(sum(map(bool, texts)), 'transcript')}")
    table.add_column("character")
    table.add_column("times", justify="right")
    by_language = _characters_by_language(made, texts, [language_of(cut) for cut in cuts])
    for language in by_language:
        table.add_column(Text(language), justify="right")
    for character, count in counts.most_common():
        name = character if character.isprintable() else f"U+{ord(character):04X}"
        table.add_row(Text(name), str(count), *(str(times[character] or "–") for times in by_language.values()))
    Console().print(table)
    for sentence in _lacking(by_language):
        print(sentence)
    replaced = Counter({character: count for character, count in left_out.items() if not is_spoken_symbol(character)})
    if replaced:
        print("spaces replace " + format_counts(replaced))
    if spoken := left_out - replaced:
        print(
            f"{format_counts(spoken)} are read as words, and are not tokens: `hubert fit` refuses "
            f"{counted(_num_with(spoken, texts), 'transcript')} with them; write them as words (`hubert prepare` with "
            "--spell_numbers LANGUAGE where they are beside numbers), or name them in --keep_punctuation"
        )
    if digits := sorted(character for character in counts if unicodedata.category(character)[0] == "N"):
        print(
            f"{''.join(digits)} are tokens, in {counted(_num_with(digits, texts), 'transcript')}; a model learns "
            "better from numbers that are written as words (`hubert prepare` with --spell_numbers LANGUAGE)"
        )
    print(f"{out}: {counted(len(made), 'token')}, with the blank and the word boundary")


def _characters_by_language(
    vocabulary: Vocabulary, texts: Sequence[str], languages: Sequence[str]
) -> dict[str, Counter[str]]:
    """Count the characters of each language; empty if there are not several languages."""
    counts: dict[str, Counter[str]] = {}
    for text, language in zip(texts, languages, strict=True):
        if text:
            characters = counts.setdefault(language or "unknown", Counter())
            characters.update(character for character in vocabulary.normalise(text) if character != " ")
    return dict(sorted(counts.items())) if len(counts) > 1 else {}


def _lacking(by_language: Mapping[str, Counter[str]]) -> list[str]:
    """Say which characters each language lacks, and which no other language has."""
    everything = set().union(*by_language.values()) if by_language else set()
    sentences = []
    for language, counts in by_language.items():
        others = set().union(*(other for name, other in by_language.items() if name != language))
        own, missing = _listed(set(counts) - others), _listed(everything - set(counts))
        facts = [counted(len(counts), "character")]
        facts += [f"{own} only here"] if own else []
        facts += [f"lacks {missing}"] if missing else []
        sentences.append(f"{language}: {', '.join(facts)}")
    return sentences


def _listed(characters: Set[str]) -> str:
    """The characters in their order, or the first of many."""
    first, more = sorted(characters)[:CHARACTERS_SHOWN], len(characters) - CHARACTERS_SHOWN
    return "".join(first) + (f" and {more} more" if more > 0 else "")


def _num_with(characters: Iterable[str], texts: Iterable[str]) -> int:
    """Number of texts with any of the characters."""
    wanted = set(characters)
    return sum(not wanted.isdisjoint(text) for text in texts)


def lexicon(words: Path, out: Path, vocabulary: Path | None = None) -> None:
    """Make a lexicon for beam search; each line has a word and its tokens, `word<TAB>w o r d |`.

    Args:
        words: n-gram language model, or text of which every word is taken; either may be compressed.
        out: Lexicon to write.
        vocabulary: Vocabulary of the model: a file of `hubert vocabulary`, or a fine-tuned checkpoint. LibriSpeech's
            if not given.
    """
    content, summary = lexicon_of(_words_of(Path(words)), Path(out), model_vocabulary(vocabulary), str(words))
    write_whole(Path(out), content.encode())
    print(summary)


def lexicon_of(words: Iterable[str], out: Path, vocabulary: Vocabulary, source: str) -> tuple[str, str]:
    """Make the content of a lexicon: words sorted, each once, without words that are not in the vocabulary's letters.

    Args:
        words: Words in any order.
        out: Path of the lexicon, for the sentence.
        vocabulary: Vocabulary of the model.
        source: Name of the file that the words are from.

    Returns:
        The lexicon, and a sentence on it.

    Raises:
        UserError: No word can be written with the vocabulary.
    """
    distinct = set(words) - SENTENCE_MARKS
    writable = sorted(word for word in distinct if not vocabulary.unknown_characters(word))
    if not writable:
        raise UserError(
            f"{source}: no words in the letters of the vocabulary; give the vocabulary of the model, in its case"
        )
    end = [] if vocabulary.boundary is None or vocabulary.spaced else [BOUNDARY]
    content = "".join(f"{word}\t{' '.join([*vocabulary.spell(word), *end])}\n" for word in writable)
    num_left_out = len(distinct) - len(writable)
    left_out = f", without {num_left_out} with other letters" if num_left_out else ""
    return content, f"{out}: {counted(len(writable), 'word')}{left_out}"


def _words_of(path: Path) -> Iterable[str]:
    """Read the words of a language model or of a text."""
    if not is_language_model(path):
        return (word for line in lines_of(path) for word in line.split())
    words = unigrams(path)
    if words is None:
        raise UserError(f"{path}: KenLM's binary form without its words; give the ARPA model or a list of words")
    return words


def model_vocabulary(path: Path | None) -> Vocabulary:
    """Read a vocabulary.

    Args:
        path: File of `hubert vocabulary`, or a fine-tuned model; LibriSpeech's vocabulary if not given.

    Raises:
        UserError: The file holds no vocabulary.
    """
    if path is None:
        return Vocabulary()
    if Path(path).suffix == ".json":
        return read_vocabulary(Path(path))
    from hubert_lightning.asr.ctc_model import load_ctc

    return load_ctc(path).vocabulary


def format_counts(counts: Counter[str], most: int | None = None) -> str:
    """List characters with their counts, the most frequent first."""
    return ", ".join(f"{character!r} ({count})" for character, count in counts.most_common(most))
