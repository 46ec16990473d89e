"""Manifests of audio on disk.

Each `prepare_*` scans a corpus, decodes every file once to its end, writes a manifest of the readable files, and lists
the others with the reason. So every file that training reads has been decoded once without an error.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lhotse import CutSet
from lhotse.cut import Cut
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hubert_lightning.data.audio_folder import (
    AUDIO_SUFFIXES,
    AudioFile,
    Segment,
    audio_by_folder,
    file_identity,
    skipped_sentence,
    transcribed,
)
from hubert_lightning.data.examine import cuts_of, decode_all
from hubert_lightning.data.heldout import split
from hubert_lightning.data.languages import hours_by_name, hours_sentence, language_named, with_names
from hubert_lightning.data.manifest import fingerprint, read_manifest, write_manifests
from hubert_lightning.data.numbers import check_language, number_report, spell_numbers
from hubert_lightning.data.probe import Sound
from hubert_lightning.data.refusals import FileRemark, RefusedFile, print_refusals, write_listing
from hubert_lightning.errors import UserError
from hubert_lightning.files import printable
from hubert_lightning.frames import WINDOW, seconds_to_samples

UNTRANSCRIBED = "no transcript beside it: write one, or leave transcribed_only out"
"""Reason why a recording is left out where transcripts are needed."""


def prepare_librispeech(
    corpus: Path,
    out: Path,
    subsets: Sequence[str] | None = None,
    language: str | None = None,
    corpus_name: str | None = None,
) -> list[Path]:
    """Make manifests of LibriSpeech's subsets, with transcripts: `OUT/train-clean-100.jsonl.gz` and so on.

    Args:
        corpus: Folder with train-clean-100, dev-clean, …, or the folder around it.
        out: Folder of the manifests.
        subsets: Names of the subsets; default: all in the folder.
        language: Language of the recordings, such as en.
        corpus_name: Name of the corpus, by which it can be balanced and scored beside others.

    Returns:
        Paths of the manifests.
    """
    corpus = _inner_folder(corpus, "LibriSpeech")
    present = [folder.name for folder in sorted(corpus.iterdir()) if folder.is_dir() and any(folder.glob("*/*/*.flac"))]
    if missing := sorted(set(subsets or ()) - set(present)):
        raise UserError(
            f"{corpus}: no {', '.join(missing)} with audio in it, only {', '.join(present) or 'other things'}; "
            "name subsets that are there, or unpack the missing ones"
        )
    if not present:
        raise UserError(
            f"{corpus}: no subset such as train-clean-100/19/198/19-198-0000.flac in it; give the folder that holds "
            "the subsets, or use `hubert prepare folder` for another layout"
        )
    skipped = Counter[str]()
    files_of = {subset: _utterances(corpus / subset, skipped) for subset in subsets or present}
    return prepare(files_of, out, skipped=skipped, language=language, corpus=corpus_name)


def prepare_librilight(
    corpus: Path, out: Path, language: str | None = None, corpus_name: str | None = None
) -> list[Path]:
    """Make manifests of Libri-light's limited supervision: `OUT/10min.jsonl.gz`, `1h.jsonl.gz` and `10h.jsonl.gz`.

    10min is 1h/0; 1h is all of 1h; 10h is 1h and 9h together. Missing parts are left out.

    Args:
        corpus: Folder librispeech_finetuning, which holds 1h and 9h, or the folder around it.
        out: Folder of the manifests.
        language: Language of the recordings, such as en.
        corpus_name: Name of the corpus, by which it can be balanced and scored beside others.

    Returns:
        Paths of the manifests.
    """
    corpus = _inner_folder(corpus, "librispeech_finetuning")
    skipped = Counter[str]()
    ten_minutes = _utterances(corpus / "1h" / "0", Counter())
    one_hour = _utterances(corpus / "1h", skipped)
    nine_hours = _utterances(corpus / "9h", skipped)
    files_of = {"10min": ten_minutes, "1h": one_hour, "10h": one_hour + nine_hours if nine_hours else []}
    files_of = {name: files for name, files in files_of.items() if files}
    if not files_of:
        raise UserError(f"{corpus}: no audio below 1h or 9h; give the unpacked librispeech_finetuning folder")
    return prepare(files_of, out, skipped=skipped, language=language, corpus=corpus_name)


def prepare_folder(
    audio: Path,
    out: Path,
    max_duration: float = 30.0,
    heldout: float = 0.05,
    transcribed_only: bool = False,
    spell_numbers: str | None = None,
    language: str | None = None,
    language_folders: bool = False,
    corpus_name: str | None = None,
) -> list[Path]:
    """Make manifests of the audio files in a folder and its subfolders: `OUT/<name of the folder>.jsonl.gz`.

    A share of the recordings is held out for validation: `OUT/<name of the folder>-dev.jsonl.gz`. The id of an
    utterance is its path in the tree, and its speaker is its folder. Its transcript, if there is one, lies beside it as
    `<same name>.txt` or in a `*.trans.txt` as in LibriSpeech.

    Args:
        audio: Folder with wav, flac, mp3, m4a, ogg, webm or other files that FFmpeg decodes, of any rate and channels.
        out: Folder of the manifest.
        max_duration: Longest cut in seconds; longer recordings are cut into equal pieces, without their transcript.
        heldout: Share of the audio in the -dev manifest, from 0 to below 1; at least one recording if there are two,
            none if 0. With ten or more speakers, whole speakers are held out. The choice depends on names alone.
        transcribed_only: Leave out recordings without a transcript, and cut none of the others.
        spell_numbers: Language of the transcripts, such as en or pt_BR, in which numbers are written as words; default:
            numbers stay as they are.
        language: Language of the recordings, such as en.
        language_folders: Whether the first folder below AUDIO in a recording's path names its language, such as sw for
            AUDIO/sw/day1/a.wav.
        corpus_name: Name of the corpus, by which it can be balanced and scored beside others.

    Returns:
        Paths of the manifests.
    """
    if seconds_to_samples(max_duration) < 2 * WINDOW:
        raise UserError(f"max_duration {max_duration} s would leave pieces shorter than a frame; take 1 s or more")
    if not 0 <= heldout < 1:
        raise UserError(f"heldout is {heldout}; it is a share of the audio, from 0 to below 1")
    root, skipped = _inner_folder(audio, "").resolve(), Counter[str]()
    files = files_of_folder(audio, skipped)
    if language_folders:
        files = [file._replace(language=_first_folder(file)) for file in files]
        if outside := [file for file in files if not (file.language or language)]:
            raise UserError(
                f"{outside[0].path}: in no folder of {audio} that names its language; move it into one, or give "
                "--language for such recordings"
            )
    if transcribed_only:
        files = [file if file.text or file.refused else file._replace(refused=UNTRANSCRIBED) for file in files]
    longest = None if transcribed_only else max_duration
    return prepare(
        {root.name: files}, out, longest, skipped, spell_numbers, heldout=heldout, language=language, corpus=corpus_name
    )


def files_of_folder(audio: Path, skipped: Counter[str]) -> list[AudioFile]:
    """List the audio files in a folder and its subfolders, with the transcripts beside them.

    Args:
        audio: Folder of the audio.
        skipped: Counts by suffix, to which other files are added.

    Raises:
        UserError: There is no such folder, or no audio in it.
    """
    root = _inner_folder(audio, "").resolve()
    files = [
        AudioFile(
            path, path.relative_to(root).as_posix(), path.parent.name if path.parent != root else None, *transcript
        )
        for folder, paths in audio_by_folder(root, skipped)
        for path, transcript in transcribed(folder, paths)
    ]
    if not files:
        raise UserError(
            f"{audio}: no audio in it; give a folder with .wav, .flac, .mp3 or another of {len(AUDIO_SUFFIXES)} "
            "suffixes of audio, or convert its files"
        )
    return files


def _first_folder(file: AudioFile) -> str | None:
    """The first folder of a path in the tree."""
    parts = Path(file.id).parts
    return language_named(parts[0]) if len(parts) > 1 else None


def _inner_folder(folder: Path, name: str) -> Path:
    """The folder, or the one called `name` inside it."""
    folder = Path(folder)
    if not folder.is_dir():
        fact = "a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {fact}; give the folder that the corpus was unpacked in")
    return folder / name if (folder / name).is_dir() else folder


def _utterances(folder: Path, skipped: Counter[str]) -> list[AudioFile]:
    """Audio files of a folder, with names as in LibriSpeech: <speaker>-<chapter>-<utterance>."""
    return [
        AudioFile(path, path.stem, path.stem.split("-")[0], *transcript)
        for chapter, paths in audio_by_folder(folder, skipped)
        for path, transcript in transcribed(chapter, paths)
    ]


def prepare(
    files_of: Mapping[str, Sequence[AudioFile]],
    out: Path,
    max_duration: float | None = None,
    skipped: Mapping[str, int] | None = None,
    number_language: str | None = None,
    transcribed_whole: bool = False,
    heldout: float = 0.0,
    language: str | None = None,
    corpus: str | None = None,
) -> list[Path]:
    """Write a manifest for each list of audio files, and print a report.

    Args:
        files_of: Audio files of each manifest, by its name.
        out: Folder of the manifests.
        max_duration: Longest cut in seconds; longer recordings are cut into equal pieces.
        skipped: Counts of other files by their suffix, for the report.
        number_language: Language in which numbers in transcripts are written as words; None keeps the numbers.
        transcribed_whole: Whether utterances with a transcript stay whole, however long they are.
        heldout: Share of the audio of each manifest that goes into another one, `<name>-dev`.
        language: Language of the files for which none is known.
        corpus: Name of the corpus.

    Returns:
        Paths of the manifests.

    Raises:
        UserError: All files of a manifest are refused, or the manifest exists and lists other audio.
    """
    out = Path(out)
    files_of = {name: with_names(files, language, corpus) for name, files in files_of.items()}
    files_of, numbers = _with_spelled_numbers(files_of, number_language)
    make_folder(out, out)
    sounds = decode_all(sorted({file.path for files in files_of.values() for file in files}))
    manifests: dict[Path, CutSet] = {}
    refusals: dict[Path, list[RefusedFile]] = {}
    remarks: dict[Path, list[FileRemark]] = {}
    choices: list[str] = []
    for name, files in files_of.items():
        path, listing = out / f"{name}.jsonl.gz", out / f"{name}.refused.tsv"
        usable = list(usable_once(files, sounds))
        cuts, refusals[listing] = cuts_of(usable, sounds, max_duration, transcribed_whole)
        remarks[out / f"{name}.remarks.tsv"] = _remarks(cuts, sounds)
        if not cuts:
            write_listing(refusals[listing], listing)
            raise UserError(
                f"{name}: all {len(files)} audio files are refused, for reasons listed in {listing}, the first, "
                f"{printable(refusals[listing][0].path)[-300:]}: {refusals[listing][0].reason}"
            )
        train, dev, choice = split(cuts, heldout)
        choices += [f"{name}: {choice}"] * bool(heldout)
        for part, manifest in ((train, path), (dev, out / f"{name}-dev.jsonl.gz")):
            if part:
                check_same_audio(manifest, part, "choose another folder for the manifests")
                manifests[manifest] = CutSet(part)
        if not dev:
            check_held_out(out / f"{name}-dev.jsonl.gz", train, "choose another folder for the manifests")
    for path, rows in (refusals | remarks).items():
        write_listing(rows, path)
    write_manifests(manifests)
    all_refusals = list(dict.fromkeys(file for files in refusals.values() for file in files))
    all_remarks = list(dict.fromkeys(remark for rows in remarks.values() for remark in rows))
    report(manifests, all_refusals, all_remarks, skipped or {}, choices)
    if numbers:
        print(numbers)
    return list(manifests)


def make_folder(folder: Path, out: Path) -> None:
    """Make the folder of a manifest; errors name OUT, the argument."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: no folder can be made there ({error.strerror}); choose another OUT") from error


def check_held_out(path: Path, train: Iterable[Cut], way_out: str) -> None:
    """Refuse to leave a manifest of held-out audio beside one that trains on the same audio."""
    if path.is_file() and {cut.id for cut in read_manifest(path)} & {cut.id for cut in train}:
        raise UserError(f"{path}: holds audio out that would be trained on; remove it, or {way_out}")


def check_same_audio(path: Path, cuts: Iterable[Cut], way_out: str) -> None:
    """Refuse to replace a manifest that lists other audio than the cuts."""
    if path.is_file() and fingerprint(read_manifest(path)) != fingerprint(cuts):
        raise UserError(f"{path}: exists already and lists other audio; remove it, or {way_out}")


def usable_once(files: Sequence[AudioFile], sounds: Mapping[Path, Sound | str]) -> Iterator[AudioFile]:
    """Mark silent files as refused, and all but the first path of a file that has several, such as links."""
    seen: dict[tuple[object, ...], AudioFile] = {}
    for file in sorted(files, key=lambda file: (file.id, file.path)):
        sound = sounds[file.path]
        if file.refused or isinstance(sound, str):
            yield file
        elif sound.silent:
            yield file._replace(refused=sound.remarks[0])
        elif (same := seen.setdefault((file_identity(file.path), _part(file)), file)) != file:
            thing = "file as" if file.segment is None else f"segment as {printable(Path(same.id))[:200]} in"
            yield file._replace(refused=f"the same {thing} {printable(same.path)}")
        else:
            yield file


def _part(file: AudioFile) -> Segment | None:
    """The segment of a file, whatever its recording is called."""
    return file.segment and file.segment._replace(recording="")


def _remarks(cuts: Iterable[Cut], sounds: Mapping[Path, Sound | str]) -> list[FileRemark]:
    """Remarks on the files of the cuts."""
    used = {str(source.source) for cut in cuts for source in cut.recording.sources}
    return [
        FileRemark(path, text)
        for path, sound in sounds.items()
        if isinstance(sound, Sound) and sound.remarks and os.path.abspath(path) in used
        for text in sound.remarks
    ]


def _with_spelled_numbers(
    files_of: Mapping[str, Sequence[AudioFile]], language: str | None
) -> tuple[Mapping[str, Sequence[AudioFile]], str | None]:
    """The same files, with numbers written as words if a language is given, and a sentence on numbers."""
    texts = dict.fromkeys(file.text for files in files_of.values() for file in files if file.text and not file.refused)
    if language is None:
        return files_of, number_report([text for text in texts if text], None)
    check_language(language)
    spelled = {text: spell_numbers(text, language) for text in texts if text}
    replaced = {
        name: [file._replace(text=spelled[file.text].text) if file.text in spelled else file for file in files]
        for name, files in files_of.items()
    }
    return replaced, number_report(list(spelled), list(spelled.values()))


def report(
    manifests: Mapping[Path, CutSet],
    refusals: Sequence[RefusedFile],
    remarks: Sequence[FileRemark],
    skipped: Mapping[str, int],
    choices: Sequence[str],
) -> None:
    """Print a table of manifests, and what is not in them.

    Args:
        manifests: Cuts of each manifest, at least one.
        refusals: Files that are left out.
        remarks: What is unusual in files that are not.
        skipped: Counts of other files by their suffix.
        choices: Sentences on what is held out.
    """
    table = Table(title=f"in {next(iter(manifests)).parent}", title_justify="left")
    table.add_column("manifest", no_wrap=True)
    for heading in ["utterances", "hours", "speakers", "shortest", "longest", "texts"]:
        table.add_column(heading, justify="right")
    for path, cuts in manifests.items():
        durations = [cut.duration for cut in cuts]
        supervisions = [supervision for cut in cuts for supervision in cut.supervisions]
        table.add_row(
            path.name.removesuffix(".jsonl.gz"),
            str(len(durations)),
            f"{sum(durations) / 3600:.2f}",
            str(len({supervision.speaker for supervision in supervisions if supervision.speaker})),
            f"{min(durations):.2f} s",
            f"{max(durations):.2f} s",
            str(sum(bool(supervision.text) for supervision in supervisions)),
        )
    console = Console()
    console.print(table)
    for path, cuts in manifests.items():
        for kind, hours in zip(("language", "corpus"), hours_by_name(cuts), strict=True):
            if sentence := hours_sentence(hours, kind):
                line = f"{path.name.removesuffix('.jsonl.gz')} {sentence}"
                console.print(escape(line), soft_wrap=True, highlight=False)
    for choice in choices:
        console.print(escape(choice), soft_wrap=True, highlight=False)
    if refusals:
        files = f"{len(refusals)} audio file{'s' * (len(refusals) > 1)}"
        console.print(f"{files} refused (listed in *.refused.tsv beside the manifests):")
        print_refusals(refusals, console)
    if remarks:
        by_kind: dict[str, list[tuple[Path, str]]] = {}
        for path, remark in remarks:
            kind, _, sentence = remark.partition(": ")
            by_kind.setdefault(kind, []).append((path, sentence))
        console.print("accepted, but listen to these (all of them in *.remarks.tsv beside the manifests):")
        for kind, remarked in by_kind.items():
            path, sentence = remarked[0]
            example = escape(f"{printable(path)}: {sentence}")
            console.print(f"  {len(remarked)} {kind}, such as {example}", soft_wrap=True)
    if skipped:
        console.print(escape(skipped_sentence(skipped)), soft_wrap=True)
