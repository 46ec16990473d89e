"""Languages and corpora of utterances.

The language of an utterance is that of its supervision in lhotse's cut, and the name of its corpus is a custom field of
the cut. Nothing else stores them.
"""

from collections.abc import Iterable, Sequence

from lhotse.cut import Cut

from hubert_lightning.data.audio_folder import AudioFile
from hubert_lightning.errors import UserError

CORPUS = "corpus"
"""Custom field of a cut that names its corpus."""
LANGUAGE_COLUMNS = ("language", "locale", "lang")
"""Usual names of columns of the language, that of Common Voice among them."""
MAX_CHARACTERS = 200
"""Characters of the name of a language or corpus."""


def language_of(cut: Cut) -> str:
    """The first language of a cut; empty if the manifest has none."""
    return next((segment.language for segment in cut.supervisions if segment.language), "")


def corpus_of(cut: Cut) -> str:
    """The corpus of a cut; empty if the manifest names none."""
    return (cut.custom or {}).get(CORPUS) or ""


def with_names(files: Sequence[AudioFile], language: str | None, corpus: str | None) -> Sequence[AudioFile]:
    """Name the language and the corpus of audio files.

    Args:
        files: Audio files.
        language: Language of the files for which their source names none; None leaves it open.
        corpus: Name of the corpus; None leaves it open.

    Raises:
        UserError: A name is empty, or longer than 200 characters.
    """
    check_names(language=language, corpus=corpus)
    if language is None and corpus is None:
        return files
    return [file._replace(language=file.language or language, corpus=corpus or file.corpus) for file in files]


def check_names(**names: str | None) -> None:
    """Refuse a name of a language or corpus that cannot be written into a manifest, by the name of its option."""
    for option, name in names.items():
        if name is not None and not (name == name.strip() and 0 < len(name) <= MAX_CHARACTERS and name.isprintable()):
            raise UserError(
                f"--{option} is {name[:40]!r}; give a name of 1 to {MAX_CHARACTERS} characters, such as "
                f"{'en' if option == 'language' else 'librispeech'}"
            )


def language_named(value: object) -> str | None:
    """The language that a cell of a table names, or None."""
    name = " ".join(str(value).split()) if value is not None else ""
    return name[:MAX_CHARACTERS] or None


def hours_by_name(cuts: Iterable[Cut]) -> tuple[dict[str, float], dict[str, float]]:
    """Add up the audio of each language and of each corpus.

    Args:
        cuts: Utterances.

    Returns:
        Hours by language and by corpus, the most first; "" where they are not known.
    """
    languages: dict[str, float] = {}
    corpora: dict[str, float] = {}
    for cut in cuts:
        for hours, name in ((languages, language_of(cut)), (corpora, corpus_of(cut))):
            hours[name] = hours.get(name, 0.0) + cut.duration / 3600
    ordered = (dict(sorted(hours.items(), key=lambda item: (-item[1], item[0]))) for hours in (languages, corpora))
    return next(ordered), next(ordered)


def hours_sentence(hours: dict[str, float], kind: str) -> str:
    """Say how much audio each language or corpus has; empty if none is known.

    Args:
        hours: Hours by name.
        kind: "language" or "corpus".
    """
    if not any(hours):
        return ""
    total = sum(hours.values())
    amounts = (
        f"{name or f'no {kind}'} {amount:.2f} h ({100 * amount / total:.1f} %)" for name, amount in hours.items()
    )
    return f"by {kind}: {', '.join(amounts)}"
