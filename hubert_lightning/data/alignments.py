"""When each phone is spoken: TextGrids of the Montreal Forced Aligner → manifests with phones.

A cut carries them as lhotse does, in `supervision.alignment["phone"]`, in seconds from the start of the cut. They are
what clusters are judged by (HuBERT §IV-E), and never trained on.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lhotse import SupervisionSegment
from lhotse.cut import Cut
from lhotse.supervision import AlignmentItem
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from hubert_lightning.data.manifest import fingerprint, read_manifest, write_manifest
from hubert_lightning.data.prepare import Refusal, print_refusals, write_refusals
from hubert_lightning.data.probe import SUFFIXES
from hubert_lightning.errors import UserError
from hubert_lightning.files import check_regular, composed, printable
from hubert_lightning.frames import SAMPLE_RATE, WINDOW
from hubert_lightning.untrusted.text_file import UTF_16_MARKS

SILENCE = "sil"
SILENCES = {"", "sil", "sp"}  # MFA writes pauses as empty intervals, MFA 1 as sil at the edges and sp between words
TOLERANCE = WINDOW / SAMPLE_RATE  # seconds by which an aligner, which counts frames, may miss the end of the audio


class Interval(NamedTuple):
    """A phone or a word; seconds."""

    start: float
    end: float
    symbol: str


def phones_of(cut: Cut) -> list[tuple[float, float, str]]:
    """Start and duration (seconds, from the start of the cut) and symbol of every phone; empty when unaligned."""
    return [
        (phone.start, phone.duration, phone.symbol)
        for supervision in cut.supervisions
        for phone in (supervision.alignment or {}).get("phone", [])
    ]


def check_alignment(cut: Cut) -> None:
    """Refuse phones that cannot be those of the audio.

    Raises:
        UserError: They run past the audio by more than a frame, start before it, or end before they start.
    """
    phones = [Interval(start, start + duration, symbol) for start, duration, symbol in phones_of(cut)]
    _check_times(cut.id, phones, cut.duration)


def prepare_alignments(manifest: Path, textgrids: Path, out: Path, drop_stress: bool = True) -> Path:
    """TextGrids of the Montreal Forced Aligner → a copy of a manifest that knows when each phone is spoken.

    An utterance gets the phones and words of `<its id>.TextGrid`, anywhere below the folder; a piece of a longer
    recording that has none gets its part of the recording's. Silence (empty, sil, sp) becomes sil; spn, which is
    spoken noise, stays. A TextGrid that cannot be used is listed in `<manifest>.refused.tsv` beside the new manifest;
    its utterances stay without phones.

    Args:
        manifest: made by `hubert prepare`
        textgrids: the folder that the aligner wrote to
        out: where the new manifest goes, a folder or a .jsonl.gz
        drop_stress: count AH0, AH1 and AH2 as one phone, AH, as the paper's code does; false keeps them apart
    """
    manifest, textgrids, out = Path(manifest), Path(textgrids), Path(out)
    cuts = list(read_manifest(manifest))
    path = _destination(manifest, out, cuts)
    found, refused = _find_all(cuts, textgrids, manifest)
    read = lru_cache(maxsize=1)(_read)  # the pieces of a recording follow each other
    aligned = []
    errors: list[UserError] = []
    with Progress(transient=True) as progress:
        for cut in progress.track(cuts, description="reading TextGrids"):
            if cut.id in found:
                textgrid, own = found[cut.id]
                try:
                    cut = _align(cut, textgrid, read(textgrid), own, drop_stress)
                except UserError as error:
                    errors.append(error)
                    refused[cut.id] = [Refusal(textgrid, str(error).removeprefix(f"{textgrid}: "))]
            aligned.append(cut)
    if not found.keys() - refused.keys():
        first, *_ = next(iter(refused.values()))
        raise errors[0] if errors else UserError(f"{first.path}: {first.reason}")
    reasons = {textgrid: reason for of in reversed(refused.values()) for textgrid, reason in of}  # each file's first
    refusals = [Refusal(textgrid, reason) for textgrid, reason in sorted(reasons.items())]
    write_refusals(refusals, _refused_beside(path))
    write_manifest(aligned, path)
    _report(aligned, path, refused.keys(), refusals)
    return path


def _destination(manifest: Path, out: Path, cuts: list[Cut]) -> Path:
    named = out.name.endswith((".jsonl", ".jsonl.gz")) and not out.is_dir()
    path = out if named else out / manifest.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: no folder can be made there ({error.strerror}); choose another OUT") from error
    if path.exists() and path.samefile(manifest):
        raise UserError(f"{path}: is the manifest without phones, which stays as it is; choose another OUT")
    if path.is_file() and fingerprint(read_manifest(path)) != fingerprint(cuts):
        raise UserError(f"{path}: is there already and lists other audio; remove it, or choose another OUT")
    return path


def _find_all(
    cuts: list[Cut], textgrids: Path, manifest: Path
) -> tuple[dict[str, tuple[Path, bool]], dict[str, list[Refusal]]]:
    """Find the TextGrid of each cut.

    Args:
        cuts: All cuts of the manifest.
        textgrids: Folder of the TextGrids.
        manifest: File that errors name.

    Returns:
        Cut id → its TextGrid, and whether that is of the cut alone (else of the whole recording).
        Cut id → the TextGrids that could be its own, but also another's or no more than others, and why not.

    Raises:
        UserError: There are no TextGrids, or none is of an utterance of the manifest.
    """
    by_name: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(textgrids.rglob("*")):
        if file.suffix.lower() == ".textgrid" and not file.name.startswith("."):
            by_name[composed(file.stem)].append(file)
    if not by_name:
        fact = "no TextGrid below it" if textgrids.is_dir() else "no such folder"
        raise UserError(f"{textgrids}: {fact}; give the folder that the Montreal Forced Aligner wrote to")
    textgrid_of: dict[str, tuple[Path, bool]] = {}
    refused: dict[str, list[Refusal]] = {}
    cuts_of: dict[Path, list[Cut]] = defaultdict(list)
    for cut in cuts:
        own = _find(cut.id, by_name, textgrids)
        paths = own or _find(cut.recording_id, by_name, textgrids)
        if len(paths) == 1:
            textgrid_of[cut.id] = paths[0], bool(own)
            cuts_of[paths[0]].append(cut)
        elif paths:
            reason = f"could be the TextGrid of {cut.id}, as {{}} could; leave one of them in the folder"
            pairs = zip(paths, [*paths[1:], paths[0]], strict=True)
            refused[cut.id] = [Refusal(path, reason.format(printable(other))) for path, other in pairs]
    for path, sharing in cuts_of.items():
        owners = {cut.recording_id: cut.id for cut in reversed(sharing)}
        if len(owners) > 1:
            *_, second, first = owners.values()
            reason = f"would be the TextGrid of {first} and of {second}; name each by its whole id, such as"
            refused |= {cut.id: [Refusal(path, f"{reason} {first}.TextGrid")] for cut in sharing}
            textgrid_of = {cut_id: textgrid for cut_id, textgrid in textgrid_of.items() if textgrid[0] != path}
    if not textgrid_of and not refused:
        raise UserError(
            f"{manifest}: none of its {len(cuts)} utterances has a TextGrid below {textgrids}, such as "
            f"{cuts[0].id}.TextGrid; give the folder with alignments of this corpus"
        )
    return textgrid_of, refused


def _find(name: str, by_name: dict[str, list[Path]], textgrids: Path) -> list[Path]:
    """The TextGrids that a cut or a recording could have: sub/b.wav, as `prepare folder` calls it, sub/b.TextGrid too.

    Names are the same in any normal form of Unicode, of which file systems and programs choose one (macOS NFD), unless
    there are files in both.
    """
    for parts in (PurePosixPath(name).parts, PurePosixPath(_without_suffix(name)).parts):
        for form in (str, composed):
            wanted = tuple(map(form, parts))
            places = {
                path: tuple(map(form, (*path.relative_to(textgrids).parts[:-1], path.stem)))
                for path in by_name.get(composed(parts[-1]), [])
            }
            called = [path for path, place in places.items() if place[-len(parts) :] == wanted]
            exact = [path for path in called if places[path] == wanted]
            if called:
                return exact if len(exact) == 1 else called
    return []


def _without_suffix(name: str) -> str:
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in SUFFIXES else name


def _align(cut: Cut, path: Path, tiers: dict[str, list[Interval]], own: bool, drop_stress: bool) -> Cut:
    [supervision, *others] = cut.supervisions or [
        SupervisionSegment(cut.id, cut.recording_id, start=0.0, duration=cut.duration, channel=cut.channel)
    ]
    phones = _tier(tiers, "phones", supervision.speaker, path)
    if phones is None:
        others_there = f"only {', '.join(tiers)}" if tiers else "nor any other"
        raise UserError(f"{path}: no tier called phones, {others_there}; take the aligner's own output")
    _check_times(cut.id, phones, cut.duration if own else cut.recording.duration)
    start = 0.0 if own else cut.start
    named = [phone._replace(symbol=_symbol(phone.symbol, drop_stress)) for phone in phones]
    alignment = {"phone": _items(named, start, cut.duration)}
    if words := _tier(tiers, "words", supervision.speaker, path):
        spoken = [word for word in words if word.symbol not in SILENCES]
        alignment["word"] = _items(spoken, start, cut.duration)
    aligned = replace(supervision, alignment={**(supervision.alignment or {}), **alignment})
    return replace(cut, supervisions=[aligned, *others])


def _read(path: Path) -> dict[str, list[Interval]]:
    """Every interval tier of a TextGrid, by its name: long or short format, UTF-8 or UTF-16."""
    from praatio import textgrid
    from praatio.utilities.errors import PraatioException

    check_regular(path)
    try:
        tiers = textgrid.openTextgrid(str(path), includeEmptyIntervals=True, reportingMode="silence").tiers
    except Exception as error:  # praatio fails in as many ways as there are damaged files
        reason = " ".join(str(error).split()) if isinstance(error, PraatioException) else _why_unread(path, error)
        raise UserError(f"{path}: cannot be read as a TextGrid ({reason}); align that utterance again") from error
    intervals = {}
    for tier in tiers:
        if isinstance(tier, textgrid.IntervalTier):
            intervals[tier.name] = [Interval(*entry) for entry in tier.entries]
            end = tier.entries[-1].end if tier.entries else 0.0
            # a file cut short: Praat's intervals fill their tier, and praatio takes as many as it finds
            if tier.name.endswith(("phones", "words")) and tier.maxTimestamp - end > TOLERANCE:
                raise UserError(
                    f"{path}: cannot be read as a TextGrid ({tier.name} end at {end:.2f} s of "
                    f"{tier.maxTimestamp:.2f} s); align that utterance again"
                )
    return intervals


def _why_unread(path: Path, error: Exception) -> str:
    """What is wrong with a file on which praatio fails with an error of Python."""
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
    return "it is cut short or damaged"


def _tier(tiers: dict[str, list[Interval]], kind: str, speaker: str | None, path: Path) -> list[Interval] | None:
    """The tier called phones, or words; with several speakers in a file, `<speaker> - phones`."""
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


def _symbol(label: str, drop_stress: bool) -> str:
    if label.lower() in SILENCES:
        return SILENCE
    # fairseq hubert measure_teacher_quality: rm_stress; only where it is ARPAbet, since elsewhere digits are tones
    return re.sub(r"^([A-Z]{2})[012]$", r"\1", label) if drop_stress else label


def _items(intervals: Iterable[Interval], start: float, duration: float) -> list[AlignmentItem]:
    """What lies within so many seconds from `start`, counted from there."""
    clipped = [
        (max(interval.start - start, 0.0), min(interval.end - start, duration), interval.symbol)
        for interval in intervals
    ]
    # 8 digits, as lhotse rounds times
    return [
        AlignmentItem(symbol, round(begin, 8), round(end - begin, 8)) for begin, end, symbol in clipped if begin < end
    ]


def _check_times(cut_id: str, phones: list[Interval], audio_end: float) -> None:
    again = "align the audio that the manifest lists, and run `hubert prepare alignments` again"
    for start, end, symbol in phones:
        if not 0 <= start <= end:
            raise UserError(f"{cut_id}: its phone {symbol} goes from {start:.2f} s to {end:.2f} s; {again}")
    end = max((phone.end for phone in phones), default=0.0)
    if end > audio_end + TOLERANCE:
        raise UserError(f"{cut_id}: phones end at {end:.2f} s, but its audio at {audio_end:.2f} s; {again}")


def _refused_beside(manifest: Path) -> Path:
    name = manifest.name.removesuffix(".gz").removesuffix(".jsonl")
    return manifest.with_name(f"{name}.refused.tsv")


def _report(cuts: list[Cut], path: Path, refused: Collection[str], refusals: list[Refusal]) -> None:
    aligned = [cut for cut in cuts if phones_of(cut)]
    table = Table(title=f"in {escape(str(path.parent))}", title_justify="left")
    table.add_column("manifest", no_wrap=True)
    for heading in ["utterances", "aligned", "hours aligned", "phones"]:
        table.add_column(heading, justify="right")
    table.add_row(
        escape(path.name.removesuffix(".jsonl.gz")),
        str(len(cuts)),
        str(len(aligned)),
        f"{sum(cut.duration for cut in aligned) / 3600:.2f}",
        str(len({symbol for cut in aligned for _, _, symbol in phones_of(cut)})),
    )
    console = Console()
    console.print(table)
    if refusals:
        console.print(
            f"{len(refusals)} TextGrids refused, so that {len(refused)} utterances stay without phones (all of them in "
            f"{escape(_refused_beside(path).name)} beside the manifest):",
            soft_wrap=True,
        )
        print_refusals(refusals, console)
    if without := [cut.id for cut in cuts if not phones_of(cut) and cut.id not in refused]:
        console.print(
            f"{len(without)} of {len(cuts)} utterances have no TextGrid and stay without phones, the first is "
            f"{escape(without[0])}",
            soft_wrap=True,
        )
