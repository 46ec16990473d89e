"""What a model spells with: the letters of transcripts, and the words that a search may choose from."""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from hubert_lightning.asr.language_files import MARKS, is_language_model, unigrams
from hubert_lightning.characters import is_spoken_symbol
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.errors import UserError
from hubert_lightning.files import write_whole
from hubert_lightning.untrusted.text_file import lines_of
from hubert_lightning.vocabulary import BOUNDARY, Vocabulary, read_vocabulary, vocabulary_of


def vocabulary(
    manifests: list[Path], out: Path, case: Literal["lower", "upper", "as_written"] = "lower", kept: str = "'"
) -> None:
    """The letters of the transcripts in manifests → a file for `hubert fit`, and a table of their counts.

    Args:
        manifests: those that will be trained on; letters that only others have are no tokens
        out: where the vocabulary goes, a .json file
        case: into which letters are turned
        kept: punctuation and symbols that are spelled too; spaces take the place of others, but for symbols that are
            said as words, such as € and %
    """
    texts = [" ".join(segment.text or "" for segment in cut.supervisions) for cut in read_manifest(manifests)]
    made, counts, left_out = vocabulary_of(texts, case, kept)
    if not counts:
        raise UserError(f"{', '.join(map(str, manifests))}: no transcripts; prepare them with their transcripts")
    made.write(Path(out))
    table = Table(title=f"{len(counts)} characters in {sum(bool(text) for text in texts)} transcripts")
    table.add_column("character")
    table.add_column("times", justify="right")
    for character, count in counts.most_common():
        table.add_row(_shown(character), str(count))
    Console().print(table)
    vanishing = Counter({character: count for character, count in left_out.items() if not is_spoken_symbol(character)})
    if vanishing:
        print("spaces take the place of " + _listed(vanishing))
    if said := left_out - vanishing:
        texts_of = sum(any(character in said for character in text) for text in texts)
        print(
            f"{_listed(said)} are said as words, and are no tokens: `hubert fit` refuses the {texts_of} transcripts "
            "with them; spell them out (`hubert prepare` with --spell_numbers LANGUAGE where they are beside numbers), "
            "or name them in --kept"
        )
    if digits := sorted(character for character in counts if unicodedata.category(character)[0] == "N"):
        texts_of = sum(any(character in digits for character in text) for text in texts)
        print(
            f"{''.join(digits)} are spelled as digits in {texts_of} transcripts; a model learns better from numbers "
            "written out as words (`hubert prepare` with --spell_numbers LANGUAGE)"
        )
    print(f"{out}: {len(made)} tokens, with the blank and the space between words")


def lexicon(words: Path, out: Path, vocabulary: Path | None = None) -> None:
    """The letters of every word → a lexicon for the beam search: `word<TAB>w o r d |` on each line.

    Args:
        words: an n-gram language model, or a text of which every word is taken; either may be compressed
        out: where the lexicon goes
        vocabulary: of the model, a file of `hubert vocabulary` or a fine-tuned checkpoint; LibriSpeech's if not given
    """
    spelled_with = model_vocabulary(vocabulary)
    found = Counter(_words_of(Path(words)))
    write_lexicon(found, Path(out), spelled_with, str(words))


def write_lexicon(words: Iterable[str], out: Path, vocabulary: Vocabulary, source: str) -> None:
    """Write the lexicon of words and print a sentence on it; raises as `lexicon_of` and `files.replacing` do."""
    content, said = lexicon_of(words, out, vocabulary, source)
    write_whole(out, content.encode())
    print(said)


def lexicon_of(words: Iterable[str], out: Path, vocabulary: Vocabulary, source: str) -> tuple[str, str]:
    """The lexicon of words, sorted, each once, without those that cannot be spelled; and a sentence on it.

    Raises:
        UserError: None of what `source` holds can be spelled.
    """
    spelled = sorted(word for word in set(words) - MARKS if not vocabulary.unknown_characters(word))
    if not spelled:
        raise UserError(f"{source}: no words that the vocabulary spells; give the vocabulary of the model, in its case")
    end = [] if vocabulary.boundary is None or vocabulary.spaced else [BOUNDARY]
    content = "".join(f"{word}\t{' '.join([*vocabulary.spell(word), *end])}\n" for word in spelled)
    left_out = len(set(words) - MARKS) - len(spelled)
    left = f", without {left_out} that cannot be spelled" if left_out else ""
    return content, f"{out}: {len(spelled)} words{left}"


def _words_of(path: Path) -> Iterable[str]:
    """Those of a language model as they are; those of a text."""
    if not is_language_model(path):
        return (word for line in lines_of(path) for word in line.split())
    words = unigrams(path)
    if words is None:
        raise UserError(f"{path}: KenLM's binary form without its words; give the ARPA model or a list of words")
    return words


def model_vocabulary(path: Path | None) -> Vocabulary:
    """The vocabulary in a file of `hubert vocabulary`, or of a fine-tuned model; LibriSpeech's if none is named."""
    if path is None:
        return Vocabulary()
    if Path(path).suffix == ".json":
        return read_vocabulary(Path(path))
    from hubert_lightning.asr.ctc_model import load_ctc

    return load_ctc(path).vocabulary


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{character!r} ({count})" for character, count in counts.most_common())


def _shown(character: str) -> str:
    return character if character.isprintable() else f"U+{ord(character):04X}"
