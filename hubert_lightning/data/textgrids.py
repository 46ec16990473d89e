"""TextGrids: which file belongs to a cut, and the phones and words in it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lhotse.cut import Cut

from hubert_lightning.data.audio_folder import AUDIO_SUFFIXES
from hubert_lightning.data.refusals import RefusedFile
from hubert_lightning.errors import UserError
from hubert_lightning.files import check_regular, composed, printable, unfinished_file, write_whole
from hubert_lightning.frames import SAMPLE_RATE, WINDOW
from hubert_lightning.untrusted.text_file import UTF_16_MARKS

END_TOLERANCE = WINDOW / SAMPLE_RATE
"""Seconds by which an aligner, which counts frames, may miss the end of the audio."""


class Interval(NamedTuple):
    """A phone or a word.

    Attributes:
        start: Start in seconds.
        end: End in seconds.
        symbol: Phone or word.
    """

    start: float
    end: float
    symbol: str


class TextGrid(NamedTuple):
    """The TextGrid of a cut.

    Attributes:
        path: Path of the file.
        of_cut: Whether the file is of this cut alone, rather than of the whole recording.
    """

    path: Path
    of_cut: bool


def find_textgrids(
    cuts: Sequence[Cut], folder: Path, manifest: Path
) -> tuple[dict[str, TextGrid], dict[str, list[RefusedFile]]]:
    """Find the TextGrid of each cut.

    Args:
        cuts: All cuts of the manifest.
        folder: Folder of the TextGrids.
        manifest: File that errors name.

    Returns:
        The TextGrid of each cut by the cut's id; and, by the same id, the refused TextGrids: those that could belong to
        several cuts, and several for one cut.

    Raises:
        UserError: There are no TextGrids, or none belongs to an utterance of the manifest.
    """
    by_name: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() == ".textgrid" and not file.name.startswith("."):
            by_name[composed(file.stem)].append(file)
    if not by_name:
        fact = "no TextGrid below it" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {fact}; give the folder that the Montreal Forced Aligner wrote to")
    textgrids: dict[str, TextGrid] = {}
    refused: dict[str, list[RefusedFile]] = {}
    cuts_of: dict[Path, list[Cut]] = defaultdict(list)
    for cut in cuts:
        of_cut = _paths_named(cut.id, by_name, folder)
        paths = of_cut or _paths_named(cut.recording_id, by_name, folder)
        if len(paths) == 1:
            textgrids[cut.id] = TextGrid(paths[0], bool(of_cut))
            cuts_of[paths[0]].append(cut)
        elif paths:
            reason = f"could be the TextGrid of {cut.id}, and so could {{}}; leave one of them in the folder"
            pairs = zip(paths, [*paths[1:], paths[0]], strict=True)
            refused[cut.id] = [RefusedFile(path, reason.format(printable(other))) for path, other in pairs]
    for path, sharing in cuts_of.items():
        owners = {cut.recording_id: cut.id for cut in reversed(sharing)}
        if len(owners) > 1:
            *_, second, first = owners.values()
            reason = f"would be the TextGrid of {first} and of {second}; name each by its whole id, such as"
            refused |= {cut.id: [RefusedFile(path, f"{reason} {first}.TextGrid")] for cut in sharing}
            textgrids = {cut_id: textgrid for cut_id, textgrid in textgrids.items() if textgrid.path != path}
    if not textgrids and not refused:
        named = next(((cut, path) for cut in cuts for path in by_name.get(composed(_stem(cut.id)), [])), None)
        way_out = "give the folder with alignments of this corpus"
        if named is not None:
            way_out = (
                f"{printable(named[1])} has its name but not its folders: give the folder above, or rename folders"
            )
        raise UserError(
            f"{manifest}: no utterance of {len(cuts)} has a TextGrid below {folder}, such as "
            f"{_without_suffix((named[0] if named else cuts[0]).id)}.TextGrid; {way_out}"
        )
    return textgrids, refused


def _paths_named(name: str, by_name: dict[str, list[Path]], folder: Path) -> list[Path]:
    """TextGrids that could belong to a cut or a recording; for sub/b.wav (`prepare folder`) also sub/b.TextGrid.

    Names agree in any normal form of Unicode, of which file systems and programs choose one (macOS NFD), unless there
    are files in both.
    """
    for parts in (PurePosixPath(name).parts, PurePosixPath(_without_suffix(name)).parts):
        for form in (str, composed):
            wanted = tuple(map(form, parts))
            names = {
                path: tuple(map(form, (*path.relative_to(folder).parts[:-1], path.stem)))
                for path in by_name.get(composed(parts[-1]), [])
            }
            matching = [path for path, parts_of_path in names.items() if parts_of_path[-len(parts) :] == wanted]
            exact = [path for path in matching if names[path] == wanted]
            if matching:
                return exact if len(exact) == 1 else matching
    return []


def _stem(name: str) -> str:
    return PurePosixPath(_without_suffix(name)).name


def _without_suffix(name: str) -> str:
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in AUDIO_SUFFIXES else name


def read_textgrid(path: Path) -> dict[str, list[Interval]]:
    """Read the interval tiers of a TextGrid, in long or short format, UTF-8 or UTF-16.

    Returns:
        Intervals of each tier, by its name.

    Raises:
        UserError: The file cannot be read, or is cut short.
    """
    from praatio import textgrid
    from praatio.utilities.errors import PraatioException

    check_regular(path)
    try:
        tiers = textgrid.openTextgrid(str(path), includeEmptyIntervals=True, reportingMode="silence").tiers
    except Exception as error:  # praatio raises errors of many types on corrupt files
        reason = " ".join(str(error).split()) if isinstance(error, PraatioException) else _why_unreadable(path, error)
        raise UserError(f"{path}: cannot be read as a TextGrid ({reason}); align that utterance again") from error
    intervals = {}
    for tier in tiers:
        if isinstance(tier, textgrid.IntervalTier):
            intervals[tier.name] = [Interval(*entry) for entry in tier.entries]
            end = tier.entries[-1].end if tier.entries else 0.0
            # Praat's intervals fill their tier, and praatio takes as many as a file that is cut short has
            if tier.name.endswith(("phones", "words")) and tier.maxTimestamp - end > END_TOLERANCE:
                raise UserError(
                    f"{path}: cannot be read as a TextGrid ({tier.name} end at {end:.2f} s of "
                    f"{tier.maxTimestamp:.2f} s); align that utterance again"
                )
    return intervals


def write_textgrid(path: Path, tiers: Mapping[str, Sequence[Interval]], duration: float) -> None:
    """Write a TextGrid in Praat's long format, in UTF-8.

    Args:
        path: File to write, whose folder is made.
        tiers: Intervals of each tier by its name, in order; gaps between them get empty labels.
        duration: Seconds of the audio.

    Raises:
        UserError: The disk is full or cannot be written to.
    """
    from praatio import textgrid

    grid = textgrid.Textgrid(0.0, duration)
    for name, intervals in tiers.items():
        grid.addTier(textgrid.IntervalTier(name, [tuple(interval) for interval in intervals], 0.0, duration))
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_file(path) as unfinished:
        grid.save(str(unfinished), "long_textgrid", includeBlankSpaces=True)
        write_whole(path, unfinished.read_bytes())


def _why_unreadable(path: Path, error: Exception) -> str:
    """The reason for an error of Python that praatio raised."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    content = path.read_bytes()
    if not content.strip():
        return "the file is empty"
    if isinstance(error, UnicodeError):
        return "it is not UTF-8, nor UTF-16 with its mark"
    encoding = "utf-16" if content.startswith(UTF_16_MARKS) else "utf-8"
    head = content[:200].decode(encoding, "ignore")
    if "ooText" not in head and "TextGrid" not in head:
        return "it does not begin as one, with ooTextFile"
    return "it is cut short or corrupt"


def tier_of(tiers: dict[str, list[Interval]], kind: str, speaker: str | None, path: Path) -> list[Interval] | None:
    """Choose the tier of phones or words.

    Args:
        tiers: Tiers of a TextGrid by name.
        kind: "phones" or "words".
        speaker: Speaker, whose tier is `<speaker> - phones` where several speakers have one.
        path: File that errors name.

    Returns:
        Intervals of the tier, or None if there is no such tier.

    Raises:
        UserError: There are several tiers, and none is of the speaker.
    """
    names = [name for name in tiers if name.endswith(kind)]
    if len(names) > 1:
        of_speaker = [name for name in names if name == f"{speaker} - {kind}"]
        if not of_speaker:
            raise UserError(
                f"{path}: has the tiers {', '.join(names)}, and none of them is of speaker {speaker}; leave the one "
                "that counts"
            )
        names = of_speaker
    return tiers[names[0]] if names else None
