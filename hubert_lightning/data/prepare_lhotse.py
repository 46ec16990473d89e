"""Manifests of corpora that lhotse has a recipe for."""

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partialmethod
from pathlib import Path
from typing import Any

from lhotse import Recording, RecordingSet, SupervisionSegment

from hubert_lightning.console import say
from hubert_lightning.data.audio_folder import AudioFile, Segment
from hubert_lightning.data.languages import language_named
from hubert_lightning.data.prepare import make_folder, prepare
from hubert_lightning.data.sources import check_pieces
from hubert_lightning.errors import UserError

PREFIX = "prepare_"
"""Start of the names of lhotse's functions that make manifests; `download_` starts those that are never called."""
DOWNLOADING = (
    "callhome_english", "chime6", "gale_mandarin", "sbcsae", "switchboard", "voxceleb", "voxpopuli",
)  # fmt: skip
"""Recipes whose `prepare_` function downloads a part of the corpus."""
OUTPUT_ARGUMENTS = ("output_dir", "manifest_dir", "workdir")
"""Arguments of recipes for folders that they write to."""
ROUNDING = 0.01
"""Seconds by which a supervision of a whole recording may differ from it."""

Option = str | int | float | bool | list[str]


def prepare_lhotse(
    recipe: str,
    corpus: Sequence[Path],
    out: Path,
    options: dict[str, Option] | None = None,
    max_duration: float = 30.0,
    heldout: float = 0.0,
    spell_numbers: str | None = None,
    language: str | None = None,
    corpus_name: str | None = None,
) -> list[Path]:
    """Make a manifest of each part of a corpus that lhotse has a recipe for, such as ami, commonvoice, tedlium or vctk.

    Nothing is downloaded: CORPUS is unpacked already.

    Args:
        recipe: Name of the recipe, as `lhotse prepare` has it.
        corpus: Folders of the corpus, in the order of the recipe's arguments; most recipes take one.
        out: Folder of the manifests.
        options: Other arguments of the recipe by their names, such as '{mic: sdm}'.
        max_duration: Longest cut in seconds of a recording without transcript, which is cut into equal pieces;
            transcribed utterances stay whole.
        heldout: Share of the audio of each manifest that goes into another one, <name>-dev, by whole recordings, or by
            whole speakers where ten or more are known.
        spell_numbers: Language of the transcripts, such as en or pt_BR, in which numbers are written as words; default:
            numbers stay as they are.
        language: Language of the utterances for which the recipe names none, such as en.
        corpus_name: Name of the corpus, by which it can be balanced and scored beside others.

    Returns:
        Paths of the manifests.
    """
    check_pieces(max_duration, heldout)
    name = recipe.replace("-", "_")
    function = _function(name)
    folders = [Path(folder) for folder in corpus]
    if missing := [folder for folder in folders if not folder.exists()]:
        raise UserError(f"{missing[0]}: no such folder; give the folder that the corpus was unpacked in")
    arguments = _arguments(name, function, folders, options or {}, Path(out))
    try:
        with _without_bars():
            parts = dict(_parts(function(**arguments), name))
        files_of = {part: _files(folders[0], *sets) for part, sets in parts.items()}
    except Exception as error:  # a recipe raises errors of any type at a corpus that it does not expect
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        raise UserError(
            f"{folders[0]}: lhotse's recipe {name} cannot read it ({reason}); give what the recipe expects, "
            f"{_expected(function)}"
        ) from error
    files_of = {part: files for part, files in files_of.items() if files}
    if not files_of:
        raise UserError(
            f"{folders[0]}: lhotse's recipe {name} finds no recordings in it; give what the recipe expects, "
            f"{_expected(function)}"
        )
    return prepare(
        files_of, Path(out), max_duration, number_language=spell_numbers, transcribed_whole=True, heldout=heldout,
        language=language, corpus=corpus_name,
    )  # fmt: skip


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the progress bars of lhotse's recipes, which overwrite each other, and say what takes the time."""
    from tqdm.std import tqdm

    say("hubert: lhotse's recipe reads the corpus")
    original = tqdm.__init__
    tqdm.__init__ = partialmethod(original, disable=True)  # the base of all kinds of bars
    try:
        yield
    finally:
        tqdm.__init__ = original


def recipe_names() -> list[str]:
    """Names of the recipes that download nothing."""
    from lhotse import recipes

    names = [name.removeprefix(PREFIX) for name in dir(recipes) if name.startswith(PREFIX)]
    return [name for name in names if callable(getattr(recipes, PREFIX + name)) and name not in DOWNLOADING]


def _function(name: str) -> Callable[..., Any]:
    from lhotse import recipes

    if name in DOWNLOADING:
        raise UserError(
            f"{name}: lhotse's recipe downloads a part of the corpus, and nothing is downloaded here; run `lhotse "
            "prepare` and `lhotse kaldi export`, and then `hubert prepare kaldi`"
        )
    names = recipe_names()
    if name not in names:
        similar = get_close_matches(name, names, n=1)
        guess = f"did you mean {similar[0]}? " if similar else ""
        raise UserError(f"{name!r} is no recipe of lhotse; {guess}the recipes are {', '.join(names)}")
    function: Callable[..., Any] = getattr(recipes, PREFIX + name)
    return function


def _arguments(
    name: str, function: Callable[..., Any], corpus: Sequence[Path], options: Mapping[str, Option], out: Path
) -> dict[str, Any]:
    """Arguments of a recipe: the folders of the corpus for those that it needs, and the options."""
    parameters = inspect.signature(function).parameters
    if unknown := sorted(options.keys() - parameters.keys()):
        raise UserError(
            f"{unknown[0]}: no argument of lhotse's recipe {name}; those are {', '.join(parameters)}; correct --options"
        )
    needed = [key for key, value in parameters.items() if value.default is value.empty and key not in options]
    folders = [key for key in needed if key not in OUTPUT_ARGUMENTS]
    if len(folders) != len(corpus):
        raise UserError(
            f"lhotse's recipe {name} takes {', '.join(folders) or 'no folder'}, and {len(corpus)} folders are given; "
            "name them in this order"
        )
    arguments: dict[str, Any] = dict(options)
    for key, folder in zip(folders, corpus, strict=True):
        arguments[key] = [folder] if key.endswith("_dirs") else folder
    for key in set(needed) & set(OUTPUT_ARGUMENTS):
        make_folder(out / f"lhotse-{name}", out)
        arguments[key] = out / f"lhotse-{name}"
    return arguments


def _expected(function: Callable[..., Any]) -> str:
    """The place of the documentation of a recipe."""
    return f"which `{function.__module__}` documents"


def _parts(made: Any, name: str) -> Iterator[tuple[str, tuple[RecordingSet, Sequence[SupervisionSegment]]]]:
    """Find the recordings and supervisions of each part in what a recipe returns, a mapping or mappings of mappings.

    Args:
        made: Mapping with "recordings" and perhaps "supervisions", or a mapping of such mappings by part.
        name: Name of the manifest of a corpus without parts.
    """
    if not isinstance(made, Mapping):
        return
    recordings = made.get("recordings")
    if isinstance(recordings, RecordingSet):
        yield name, (recordings, list(made.get("supervisions") or ()))
        return
    for key, value in made.items():
        part = re.sub(r"[^\w.-]+", "_", str(key))
        for inner, sets in _parts(value, ""):
            yield "-".join(filter(None, [part, inner])), sets


def _files(corpus: Path, recordings: RecordingSet, supervisions: Sequence[SupervisionSegment]) -> list[AudioFile]:
    by_recording: dict[str, list[SupervisionSegment]] = {}
    for supervision in supervisions:
        by_recording.setdefault(supervision.recording_id, []).append(supervision)
    has_texts = any(supervision.text for supervision in supervisions)
    files = []
    for recording in recordings:
        utterances = by_recording.get(recording.id, [])
        files += [_utterance(corpus, recording, supervision, has_texts) for supervision in utterances]
        if not utterances:
            files += _whole(corpus, recording, "the recipe has no utterance in it" if supervisions else None)
    return files


def _whole(corpus: Path, recording: Recording, refused: str | None) -> Iterator[AudioFile]:
    """A recording without utterances; each of its files, if it has several."""
    for number, source in enumerate(recording.sources):
        name = recording.id if number == 0 else f"{recording.id}-{number}"
        reason = refused or _unreadable(source.type)
        yield AudioFile(_path(corpus, source.source), name, None, None, reason)


def _utterance(corpus: Path, recording: Recording, supervision: SupervisionSegment, has_texts: bool) -> AudioFile:
    channels = supervision.channel if isinstance(supervision.channel, list) else [supervision.channel]
    text = " ".join((supervision.text or "").split()) or None
    sources = [source for source in recording.sources if set(channels) & set(source.channels)]
    source = (sources or recording.sources)[0]
    refused = "the recipe has no words for it" if has_texts and not text else _unreadable(source.type)
    if len(sources) != 1:
        refused = f"its channels, {channels}, are in {len(sources)} files: choose one in the recipe's --options"
    columns = tuple(source.channels.index(channel) for channel in channels if channel in source.channels)
    is_whole = supervision.start == 0 and abs(supervision.duration - recording.duration) < ROUNDING
    segment = Segment(
        recording.id,
        supervision.start,
        None if is_whole else supervision.duration,
        None if len(columns) == len(source.channels) else columns,
    )
    path = _path(corpus, source.source)
    spoken = language_named(supervision.language)
    return AudioFile(path, supervision.id, supervision.speaker, text, refused, segment, spoken)


def _path(corpus: Path, source: object) -> Path:
    """Path of an audio file, which a recipe may state from the folder of the corpus on."""
    path = Path(str(source))
    return path if os.path.isfile(path) or not os.path.isfile(corpus / path) else corpus / path


def _unreadable(kind: str) -> str | None:
    return None if kind == "file" else f"its audio is of type {kind}, and only files are read"
