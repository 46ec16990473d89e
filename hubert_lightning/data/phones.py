"""The verb `hubert phones`: the times of words and phones of English recordings with transcripts, as TextGrids."""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lhotse.cut import Cut
from rich.console import Console

from hubert_lightning.data.alignments import destination, write_aligned
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.audio_folder import AUDIO_SUFFIXES, skipped_sentence
from hubert_lightning.data.examine import cuts_of, decode_all
from hubert_lightning.data.forced_alignment import Aligned, Failure, Speech, align_each
from hubert_lightning.data.journal import Journal
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.data.prepare import files_of_folder, make_folder, usable_once
from hubert_lightning.data.prepare_csv import files_of_table
from hubert_lightning.data.pronunciation import (
    Pronunciations,
    Word,
    check_english,
    check_pocketsphinx,
    dictionary_words,
)
from hubert_lightning.data.refusals import RefusedFile, print_refusals, write_listing
from hubert_lightning.data.resources import usable_cores
from hubert_lightning.data.shar import SHAR_SUFFIX
from hubert_lightning.data.textgrids import Interval, write_textgrid
from hubert_lightning.errors import UserError, counted, within
from hubert_lightning.files import printable
from hubert_lightning.progress_bar import progress

JOURNAL = ".made-phones.jsonl"
"""File in the folder that records the finished utterances."""
REFUSED = "refused.tsv"
"""File in the folder that lists the utterances without phones."""
RULES = 1
"""Version of the normalisation, of the phones of unknown words and of the search."""


class Utterance(NamedTuple):
    """An utterance to align.

    Attributes:
        cut: Cut with its audio.
        words: Words of its transcript.
        textgrid: File to write.
    """

    cut: Cut
    words: Sequence[Word]
    textgrid: Path


def phones(
    source: Path,
    out: Path,
    manifest: Path | None = None,
    path_column: str | None = None,
    text_column: str | None = None,
    audio: Path | None = None,
    resume: bool = True,
    num_workers: int | None = None,
) -> int:
    """Find the times of the words and phones of English recordings with transcripts, and write TextGrids.

    pocketsphinx aligns the words with its English model and dictionary; espeak-ng gives phones to words that are not in
    the dictionary. Numbers are read as words. The phones are ARPAbet without stress, and sil. Utterances that cannot be
    aligned are listed in OUT/refused.tsv and stay without phones.

    Args:
        source: Manifest with transcripts; a folder of audio, with the transcript of each file beside it in `<same
            name>.txt` or, as in LibriSpeech, a `*.trans.txt`; or a CSV or TSV file with paths and transcripts.
        out: Folder of the TextGrids: `<id of the utterance>.TextGrid`, with the tiers words and phones.
        manifest: File (.jsonl.gz) or folder of a manifest with the phones, which is also written, for `hubert quality`.
        path_column: Column of the audio paths in a table, as for `hubert prepare csv`.
        text_column: Column of the transcripts in a table, as for `hubert prepare csv`.
        audio: Folder that relative paths of a table start from; default: the folder of the table.
        resume: Whether utterances that are finished in OUT are skipped. An utterance is aligned again if its audio or
            its transcript has changed (OUT/.made-phones.jsonl records them).
        num_workers: Number of processes that align; one for each core if not given.

    Returns:
        Number of utterances that have no phones.

    Raises:
        UserError: pocketsphinx is not installed, there are no English transcripts, or OUT holds other TextGrids.
    """
    source, out = Path(source), Path(out)
    within(1, num_workers=num_workers)
    check_pocketsphinx()
    _check_out(out)
    cuts, refused = _cuts(source, path_column, text_column, audio)
    path = None if manifest is None else destination(source, Path(manifest), cuts)
    with Pronunciations(dictionary_words()) as pronunciations:
        _check_transcripts(source, cuts, pronunciations)
        utterances, wordless = _utterances(cuts, out, pronunciations)
    refused += wordless
    make_folder(out, out)
    settings = {"verb": "phones", "pocketsphinx": version("pocketsphinx"), "rules": RULES}
    digests = {str(utterance.textgrid): _digest(utterance) for utterance in utterances}
    sources = {str(utterance.textgrid): _audio_of(utterance.cut) for utterance in utterances}
    with Journal(out / JOURNAL, settings, digests, sources) as journal:
        missing = [utterance for utterance in utterances if not (resume and _is_made(utterance, journal))]
        if done := len(utterances) - len(missing):
            print(f"hubert: skipped {done} of {counted(len(utterances), 'utterance')}, aligned before", file=sys.stderr)
        refused += _align_all(missing, journal, num_workers or usable_cores())
        journal.finish()
    refused.sort()
    write_listing(refused, out / REFUSED)
    unaligned = {file for file, _ in refused}
    aligned = [utterance for utterance in utterances if Path(utterance.cut.id) not in unaligned]
    _remove_outdated([cut for cut in cuts if Path(cut.id) in unaligned], cuts, out)
    _report(aligned, refused, len(cuts), out)
    if path is not None and aligned:
        write_aligned(cuts, source, out, path, drop_stress=True, report=False)
        print(f"manifest with phones: {path}")
    return len(refused)


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file, not a folder; choose another OUT")
    if out.is_dir() and not (out / JOURNAL).exists():
        other = next((file for file in out.rglob("*") if file.suffix.lower() == ".textgrid"), None)
        if other is not None:
            raise UserError(
                f"{printable(other)}: a TextGrid that `hubert phones` did not write, and would be mixed with its own; "
                "choose another OUT"
            )


def _cuts(
    source: Path, path_column: str | None, text_column: str | None, audio: Path | None
) -> tuple[list[Cut], list[RefusedFile]]:
    """Read or make the cuts of a source; files that cannot be used are refused by their ids."""
    if source.name.endswith((".jsonl", ".jsonl.gz")) and not source.is_dir():
        return list(read_manifest(source)), []
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; give a manifest, a folder of audio or a table")
    skipped = Counter[str]()
    if source.is_dir() and (source.suffix == SHAR_SUFFIX or any(source.glob("cuts.*.jsonl*"))):
        raise UserError(
            f"{source}: a Shar corpus, whose recordings are inside archives; give the manifest that it was exported "
            "from, or a folder of audio"
        )
    if source.is_dir():
        files = files_of_folder(source, skipped)
    else:
        files = files_of_table(source, path_column, text_column, audio=audio)
    if skipped:
        print(f"hubert: {skipped_sentence(skipped)}", file=sys.stderr)
    ids = {file.path: file.id for file in files}
    sounds = decode_all(sorted(ids))
    cuts, refused = cuts_of(list(usable_once(files, sounds)), sounds, None)
    if not cuts:
        raise UserError(
            f"{source}: none of its {len(files)} audio files can be used, the first, {printable(refused[0].path)}: "
            f"{refused[0].reason}"
        )
    return cuts, [RefusedFile(Path(ids[path]), reason) for path, reason in refused]


def _check_transcripts(source: Path, cuts: Sequence[Cut], pronunciations: Pronunciations) -> None:
    texts = [text for cut in cuts if (text := _text_of(cut))]
    if not texts:
        raise UserError(
            f"{source}: {counted(len(cuts), 'utterance')}, and none has a transcript, which phones are aligned with; "
            "write them beside the audio in .txt files, or use `hubert transcribe --format text` first"
        )
    languages = [supervision.language for cut in cuts for supervision in cut.supervisions]
    try:
        check_english(texts, languages, pronunciations)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _utterances(
    cuts: Sequence[Cut], out: Path, pronunciations: Pronunciations
) -> tuple[list[Utterance], list[RefusedFile]]:
    """Find the words of each cut, and the file of its TextGrid."""
    utterances: list[Utterance] = []
    refused: list[RefusedFile] = []
    names = _names([cut.id for cut in cuts])
    for cut in cuts:
        try:
            text = _text_of(cut)
            if not text:
                raise UserError("no transcript")
            utterances.append(Utterance(cut, pronunciations.words(text), out / f"{names[cut.id]}.TextGrid"))
        except UserError as error:
            refused.append(RefusedFile(Path(cut.id), str(error)))
    return utterances, refused


def _names(ids: Sequence[str]) -> dict[str, str]:
    """Names of the TextGrids of utterances: their ids, without the suffix of audio where these differ without it.

    Raises:
        UserError: An id would lead outside of the folder.
    """
    short = {
        name: name.removesuffix(suffix) if (suffix := PurePosixPath(name).suffix).lower() in AUDIO_SUFFIXES else name
        for name in ids
    }
    counts = Counter(name.casefold() for name in short.values())
    for name in ids:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise UserError(f"{name!r}: an id that names a file outside of OUT; rename the utterance")
    return {name: short[name] if counts[short[name].casefold()] == 1 else name for name in ids}


def _text_of(cut: Cut) -> str:
    return " ".join(supervision.text for supervision in cut.supervisions if supervision.text).strip()


def _remove_outdated(refused: Sequence[Cut], cuts: Sequence[Cut], out: Path) -> None:
    """Remove TextGrids that were made of other transcripts or audio of utterances which have no phones any more."""
    names = _names([cut.id for cut in cuts])
    for cut in refused:
        (out / f"{names[cut.id]}.TextGrid").unlink(missing_ok=True)


def _audio_of(cut: Cut) -> str:
    return str(cut.recording.sources[0].source)


def _digest(utterance: Utterance) -> str:
    cut = utterance.cut
    content = (_text_of(cut), cut.num_samples, round(cut.start * cut.sampling_rate), cut.channel)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _is_made(utterance: Utterance, journal: Journal) -> bool:
    return utterance.textgrid in journal and utterance.textgrid.is_file()


def _align_all(utterances: Sequence[Utterance], journal: Journal, num_processes: int) -> list[RefusedFile]:
    """Align utterances and write their TextGrids; returns those that cannot be aligned."""
    refused: list[RefusedFile] = []

    def speeches() -> Iterator[tuple[Utterance, Speech]]:
        for utterance in utterances:
            try:
                yield utterance, _speech(utterance)
            except UserError as error:
                refused.append(RefusedFile(Path(utterance.cut.id), str(error).removeprefix(f"{utterance.cut.id}: ")))

    hours = sum(utterance.cut.duration for utterance in utterances) / 3600
    with progress("aligning", hours, "h", at_most=True) as advance:
        for utterance, result in align_each(speeches(), max(1, min(num_processes, len(utterances)))):
            if isinstance(result, Failure):
                refused.append(RefusedFile(Path(utterance.cut.id), result.reason))
            else:
                _write(utterance, result)
                journal.add(utterance.textgrid)
            advance(utterance.cut.duration / 3600)
    return refused


def _speech(utterance: Utterance) -> Speech:
    samples = (read_waveform(utterance.cut) * 32767).clamp(-32768, 32767).short().numpy()
    spelled: Mapping[str, str] = {word.entry: word.phones for word in utterance.words if word.phones is not None}
    return Speech(samples.tobytes(), [word.entry for word in utterance.words], spelled)


def _write(utterance: Utterance, aligned: Aligned) -> None:
    duration = utterance.cut.duration
    words = [
        Interval(start, end, utterance.words[index].text if index >= 0 else "") for start, end, index in aligned.words
    ]
    phones = [Interval(*phone) for phone in aligned.phones]
    tiers = {"words": _filled(words, duration), "phones": _filled(phones, duration)}
    write_textgrid(utterance.textgrid, tiers, duration)


def _filled(intervals: Sequence[Interval], duration: float) -> list[Interval]:
    """Let the last interval end with the audio, of which pocketsphinx counts whole frames only."""
    last = intervals[-1]._replace(end=duration)
    return [
        interval._replace(start=round(interval.start, 4), end=round(interval.end, 4)) for interval in intervals[:-1]
    ] + [last._replace(start=round(last.start, 4))]


def _report(aligned: Sequence[Utterance], refused: Sequence[RefusedFile], total: int, out: Path) -> None:
    hours = sum(utterance.cut.duration for utterance in aligned) / 3600
    spelled = {word.text: word.phones for utterance in aligned for word in utterance.words if word.phones is not None}
    console = Console()
    console.print(
        f"aligned {len(aligned)} of {counted(total, 'utterance')} ({hours:.2f} h) into {out}",
        soft_wrap=True,
        markup=False,
    )
    if spelled:
        examples = ", ".join(f"{word} ({phones})" for word, phones in list(spelled.items())[:3])
        console.print(
            f"took phones from espeak-ng for {counted(len(spelled), 'word')} that the dictionary lacks: {examples}",
            soft_wrap=True,
            markup=False,
        )
    if refused:
        console.print(
            f"without phones: {counted(len(refused), 'utterance')} (listed in {REFUSED})", soft_wrap=True, markup=False
        )
        print_refusals(refused, console)
