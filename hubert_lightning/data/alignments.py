"""Manifests with the times of phones, from TextGrids of the Montreal Forced Aligner or of `hubert phones`.

A cut holds the phones as in lhotse, in `supervision.alignment["phone"]`, in seconds from the start of the cut. They
serve to measure the quality of clusters (HuBERT §IV-E); no model is trained on them.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from lhotse import SupervisionSegment
from lhotse.cut import Cut
from lhotse.supervision import AlignmentItem
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hubert_lightning.data.manifest import read_manifest, write_manifest
from hubert_lightning.data.phone_sets import check_one_phone_set
from hubert_lightning.data.prepare import check_same_audio, make_folder
from hubert_lightning.data.refusals import RefusedFile, print_refusals, write_listing
from hubert_lightning.data.textgrids import END_TOLERANCE, Interval, TextGrid, find_textgrids, read_textgrid, tier_of
from hubert_lightning.errors import UserError, counted
from hubert_lightning.progress_bar import progress

SILENCE = "sil"
"""Symbol of silence among phones."""
SILENCE_LABELS = {"", "sil", "sp"}
"""Labels of silence: empty in MFA; sil at the edges and sp between words in MFA 1; SIL in our first corpora."""


def is_silence(label: str) -> bool:
    """Check whether the label of a phone means silence, in any case of its letters."""
    return label.lower() in SILENCE_LABELS


def phones_of(cut: Cut) -> list[tuple[float, float, str]]:
    """Read the phones of a cut from its manifest.

    Returns:
        Start and duration in seconds from the start of the cut, and symbol, of each phone; empty without alignment.
        Silence is `SILENCE`, whatever its label in the manifest.
    """
    return [
        (phone.start, phone.duration, SILENCE if is_silence(phone.symbol) else phone.symbol)
        for supervision in cut.supervisions
        for phone in (supervision.alignment or {}).get("phone", [])
    ]


def symbols_of(cuts: Iterable[Cut]) -> dict[str, set[str]]:
    """Collect the symbols of the phones of each cut, by its id."""
    return {cut.id: {symbol for _, _, symbol in phones_of(cut)} for cut in cuts}


def check_alignment(cut: Cut) -> None:
    """Refuse phones that cannot belong to the audio.

    Raises:
        UserError: They end after the audio by more than a frame, start before it, or end before they start.
    """
    phones = [Interval(start, start + duration, symbol) for start, duration, symbol in phones_of(cut)]
    _check_times(cut.id, phones, cut.duration)


def prepare_alignments(manifest: Path, textgrids: Path, out: Path, drop_stress: bool = True) -> Path:
    """Copy a manifest, and add the times of phones and words from TextGrids of the Montreal Forced Aligner.

    An utterance gets the phones and words of `<its id>.TextGrid`, anywhere below the folder. A piece of a longer
    recording may use the TextGrid of the recording instead. All labels of silence (empty, sil, sp) become sil; spn,
    spoken noise, is kept. Unusable TextGrids are listed in `<manifest>.refused.tsv` beside the new manifest; their
    utterances stay without phones.

    Args:
        manifest: Manifest made by `hubert prepare`.
        textgrids: Folder of the aligner's output.
        out: Folder or file name (.jsonl.gz) of the new manifest.
        drop_stress: Write AH0, AH1 and AH2 as one phone, AH, as the paper's code does; false keeps them apart.

    Returns:
        Path of the new manifest.
    """
    manifest, textgrids, out = Path(manifest), Path(textgrids), Path(out)
    cuts = list(read_manifest(manifest))
    path = destination(manifest, out, cuts)
    write_aligned(cuts, manifest, textgrids, path, drop_stress)
    return path


def write_aligned(
    cuts: Sequence[Cut], source: Path, textgrids: Path, path: Path, drop_stress: bool, report: bool = True
) -> None:
    """Write a manifest of cuts with the phones and words of their TextGrids.

    Args:
        cuts: Cuts.
        source: File or folder of the cuts, which errors name.
        textgrids: Folder of TextGrids.
        path: Manifest to write, with the listing of refused TextGrids beside it.
        drop_stress: Whether ARPAbet's marks of stress are dropped.
        report: Whether a table is printed.

    Raises:
        UserError: No TextGrid can be used, or their phones are of different sets.
    """
    textgrid_of, refused = find_textgrids(cuts, textgrids, source)
    read = lru_cache(maxsize=1)(read_textgrid)  # the pieces of a recording follow each other
    aligned: list[Cut] = []
    errors: list[UserError] = []
    with progress("reading TextGrids", len(cuts), "utterances") as advance:
        for cut in cuts:
            if cut.id in textgrid_of:
                textgrid = textgrid_of[cut.id]
                try:
                    cut = _align(cut, textgrid, read(textgrid.path), drop_stress)
                except UserError as error:
                    errors.append(error)
                    reason = str(error).removeprefix(f"{textgrid.path}: ")
                    refused[cut.id] = [RefusedFile(textgrid.path, reason)]
            aligned.append(cut)
            advance()
    if not textgrid_of.keys() - refused.keys():
        first, *_ = next(iter(refused.values()))
        raise errors[0] if errors else UserError(f"{first.path}: {first.reason}")
    check_one_phone_set(
        {str(source): symbols_of(aligned)},
        f"{'leave drop_stress on, or ' if not drop_stress else ''}align all utterances with one aligner and dictionary",
    )
    # The first reason of each file
    reasons = {file: reason for refusals in reversed(refused.values()) for file, reason in refusals}
    refusals = [RefusedFile(file, reason) for file, reason in sorted(reasons.items())]
    write_listing(refusals, _listing_beside(path))
    write_manifest(aligned, path)
    if report:
        _report(aligned, path, refused.keys(), refusals)


def destination(manifest: Path, out: Path, cuts: Sequence[Cut]) -> Path:
    """Choose the file of the new manifest, and make its folder.

    Args:
        manifest: Manifest of the cuts, which is never overwritten, or a folder or table of them.
        out: Folder or file name of the new manifest.
        cuts: Cuts of the new manifest.

    Raises:
        UserError: The file lists other audio, or is the source; or its folder cannot be made.
    """
    is_file = out.name.endswith((".jsonl", ".jsonl.gz")) and not out.is_dir()
    is_manifest = manifest.name.endswith((".jsonl", ".jsonl.gz"))
    name = manifest.name if is_manifest else f"{manifest.name if manifest.is_dir() else manifest.stem}.jsonl.gz"
    path = out if is_file else out / name
    make_folder(path.parent, out)
    if path.exists() and path.samefile(manifest):
        raise UserError(f"{path}: is the input manifest, which is never overwritten; choose another OUT")
    check_same_audio(path, cuts, "choose another OUT")
    return path


def _align(cut: Cut, textgrid: TextGrid, tiers: dict[str, list[Interval]], drop_stress: bool) -> Cut:
    [supervision, *others] = cut.supervisions or [
        SupervisionSegment(cut.id, cut.recording_id, start=0.0, duration=cut.duration, channel=cut.channel)
    ]
    phones = tier_of(tiers, "phones", supervision.speaker, textgrid.path)
    if phones is None:
        present = f"only {', '.join(tiers)}" if tiers else "nor any other"
        raise UserError(f"{textgrid.path}: no tier called phones, {present}; take the aligner's own output")
    _check_times(cut.id, phones, cut.duration if textgrid.of_cut else cut.recording.duration)
    start = 0.0 if textgrid.of_cut else cut.start
    named = [phone._replace(symbol=_symbol(phone.symbol, drop_stress)) for phone in phones]
    alignment = {"phone": _items(named, start, cut.duration)}
    if words := tier_of(tiers, "words", supervision.speaker, textgrid.path):
        spoken = [word for word in words if word.symbol not in SILENCE_LABELS]
        alignment["word"] = _items(spoken, start, cut.duration)
    aligned = replace(supervision, alignment={**(supervision.alignment or {}), **alignment})
    return replace(cut, supervisions=[aligned, *others])


def _symbol(label: str, drop_stress: bool) -> str:
    if is_silence(label):
        return SILENCE
    # fairseq hubert measure_teacher_quality: rm_stress; only for ARPAbet, since digits are tones elsewhere
    return re.sub(r"^([A-Z]{2})[012]$", r"\1", label) if drop_stress else label


def _items(intervals: Iterable[Interval], start: float, duration: float) -> list[AlignmentItem]:
    """The intervals within `duration` seconds from `start`, counted from there."""
    clipped = [
        (max(interval.start - start, 0.0), min(interval.end - start, duration), interval.symbol)
        for interval in intervals
    ]
    # 8 digits, as lhotse rounds times
    return [
        AlignmentItem(symbol, round(begin, 8), round(end - begin, 8)) for begin, end, symbol in clipped if begin < end
    ]


def _check_times(cut_id: str, phones: Sequence[Interval], audio_end: float) -> None:
    way_out = "align the audio that the manifest lists, and run `hubert prepare alignments` again"
    for start, end, symbol in phones:
        if not 0 <= start <= end:
            raise UserError(f"{cut_id}: its phone {symbol} goes from {start:.2f} s to {end:.2f} s; {way_out}")
    end = max((phone.end for phone in phones), default=0.0)
    if end > audio_end + END_TOLERANCE:
        raise UserError(f"{cut_id}: phones end at {end:.2f} s, but its audio at {audio_end:.2f} s; {way_out}")


def _listing_beside(manifest: Path) -> Path:
    name = manifest.name.removesuffix(".gz").removesuffix(".jsonl")
    return manifest.with_name(f"{name}.refused.tsv")


def _report(cuts: Sequence[Cut], path: Path, refused: Collection[str], refusals: Sequence[RefusedFile]) -> None:
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
            f"{counted(len(refusals), 'TextGrid')} refused, so without phones: {counted(len(refused), 'utterance')} "
            f"(listed in {escape(_listing_beside(path).name)} beside the manifest):",
            soft_wrap=True,
        )
        print_refusals(refusals, console)
    if without := [cut.id for cut in cuts if not phones_of(cut) and cut.id not in refused]:
        console.print(
            f"no TextGrid, so no phones, for {len(without)} of {counted(len(cuts), 'utterance')}, the first is "
            f"{escape(without[0])}",
            soft_wrap=True,
        )
