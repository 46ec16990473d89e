"""Audio on disk → manifests.

Each `prepare_*` scans a corpus, decodes every file once to know that it can be read, writes a manifest of those that
can, and lists those that cannot with the reason. What training reads later has been read before.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import NamedTuple

from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.cut import Cut
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from hubert_lightning.data.manifest import fingerprint, read_manifest, write_manifests
from hubert_lightning.data.numbers import check_language, number_report, spell_numbers
from hubert_lightning.data.probe import SUFFIXES, Sound, probe
from hubert_lightning.errors import UserError
from hubert_lightning.files import composed, printable, write_whole
from hubert_lightning.frames import SAMPLE_RATE, WINDOW, seconds_to_samples
from hubert_lightning.interrupts import thread_pool
from hubert_lightning.untrusted.text_file import lines_of
from hubert_lightning.vocabulary import has_words

REFUSALS_SHOWN = 20


class AudioFile(NamedTuple):
    """What a scan finds."""

    path: Path
    id: str
    speaker: str | None
    text: str | None
    refused: str | None = None  # the reason, if its transcript cannot be read


class Refusal(NamedTuple):
    """A file that is not used, and the reason; or one that is used, and a remark on it."""

    path: Path
    reason: str


def prepare_librispeech(corpus: Path, out: Path, subsets: Sequence[str] | None = None) -> list[Path]:
    """LibriSpeech → `OUT/train-clean-100.jsonl.gz` and so on, with transcripts where they are.

    Args:
        corpus: the folder that holds train-clean-100, dev-clean, …, or the folder around it
        out: where the manifests go
        subsets: which ones; all that are there if not given
    """
    corpus = _inner(corpus, "LibriSpeech")
    there = [folder.name for folder in sorted(corpus.iterdir()) if folder.is_dir() and any(folder.glob("*/*/*.flac"))]
    if missing := sorted(set(subsets or ()) - set(there)):
        raise UserError(
            f"{corpus}: no {', '.join(missing)} with audio in it, only {', '.join(there) or 'other things'}; "
            "name subsets that are there, or unpack the missing ones"
        )
    if not there:
        raise UserError(
            f"{corpus}: no subset such as train-clean-100/19/198/19-198-0000.flac in it; give the folder that holds "
            "the subsets, or use `hubert prepare folder` for another layout"
        )
    skipped = Counter[str]()
    files_of = {subset: _utterances(corpus / subset, skipped) for subset in subsets or there}
    return prepare(files_of, out, skipped=skipped)


def prepare_librilight(corpus: Path, out: Path) -> list[Path]:
    """Libri-light's limited supervision → `OUT/10min.jsonl.gz`, `1h.jsonl.gz` and `10h.jsonl.gz`.

    10min is 1h/0; 1h is all of 1h; 10h is 1h and 9h together. A part that is not there is left out.

    Args:
        corpus: librispeech_finetuning, which holds 1h and 9h, or the folder around it
        out: where the manifests go
    """
    corpus = _inner(corpus, "librispeech_finetuning")
    skipped = Counter[str]()
    ten_minutes = _utterances(corpus / "1h" / "0", Counter())
    one_hour = _utterances(corpus / "1h", skipped)
    nine_hours = _utterances(corpus / "9h", skipped)
    files_of = {"10min": ten_minutes, "1h": one_hour, "10h": one_hour + nine_hours if nine_hours else []}
    files_of = {name: files for name, files in files_of.items() if files}
    if not files_of:
        raise UserError(f"{corpus}: no audio below 1h or 9h; give the unpacked librispeech_finetuning folder")
    return prepare(files_of, out, skipped=skipped)


def prepare_folder(audio: Path, out: Path, max_duration: float = 30.0, spell_numbers: str | None = None) -> list[Path]:
    """Any tree of audio files → `OUT/<its name>.jsonl.gz`.

    An utterance is named by its path in the tree. Its speaker is the folder it lies in; its transcript, if there is
    one, lies beside it as `<same name>.txt` or in a `*.trans.txt` as in LibriSpeech.

    Args:
        audio: the folder; wav, flac, mp3, m4a, ogg, webm and whatever else FFmpeg decodes, at any rate, any channels
        out: where the manifest goes
        max_duration: seconds; a longer recording is cut into equal pieces, without its transcript
        spell_numbers: language of the transcripts, such as en or pt_BR, in which numbers in them are spelled out; they
            stay as they are if not given
    """
    if seconds_to_samples(max_duration) < 2 * WINDOW:
        raise UserError(f"max_duration {max_duration} s would leave pieces shorter than a frame; take 1 s or more")
    root = _inner(audio, "").resolve()
    skipped = Counter[str]()
    files = [
        AudioFile(path, path.relative_to(root).as_posix(), path.parent.name if path.parent != root else None, *spoken)
        for folder, paths in _audio_by_folder(root, skipped)
        for path, spoken in transcribed(folder, paths)
    ]
    if not files:
        raise UserError(
            f"{audio}: no audio in it; give a folder with {', '.join(sorted(SUFFIXES))}, and convert what else there is"
        )
    return prepare({root.name: files}, out, max_duration, skipped, spell_numbers)


def examine(paths: Sequence[Path]) -> tuple[list[Cut], list[Refusal], dict[str, Sound]]:
    """Each audio file as one cut, whose id is its path; those that cannot be used, and why; and what each cut was."""
    files = [AudioFile(path, str(path), None, None) for path in paths]
    sounds = _decode_all(sorted(set(paths)))
    cuts, refused = _cuts(files, sounds, None)
    heard = {str(path): sound for path, sound in sounds.items() if isinstance(sound, Sound)}
    return cuts, refused, heard


def _inner(folder: Path, name: str) -> Path:
    """The folder, or the one called `name` inside it."""
    folder = Path(folder)
    if not folder.is_dir():
        fact = "a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {fact}; give the folder that the corpus was unpacked in")
    return folder / name if (folder / name).is_dir() else folder


def _utterances(folder: Path, skipped: Counter[str]) -> list[AudioFile]:
    """Audio below a folder that is named as in LibriSpeech: <speaker>-<chapter>-<utterance>."""
    return [
        AudioFile(path, path.stem, path.stem.split("-")[0], *spoken)
        for chapter, paths in _audio_by_folder(folder, skipped)
        for path, spoken in transcribed(chapter, paths)
    ]


def _audio_by_folder(root: Path, skipped: Counter[str]) -> Iterable[tuple[Path, list[Path]]]:
    """Each folder with audio in it; what is neither audio nor a transcript is counted by its suffix."""
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:  # a link to a folder around it would never end
            subfolders.clear()
            continue
        seen.add(place)
        subfolders.sort()
        visible = [name for name in names if not name.startswith(".")]  # others an operating system left there
        audio = sorted(name for name in visible if Path(name).suffix.lower() in SUFFIXES)
        count_skipped(skipped, map(Path, visible))
        if audio:
            yield Path(folder), [Path(folder, name) for name in audio]


def transcribed(folder: Path, paths: list[Path]) -> Iterable[tuple[Path, tuple[str | None, str | None]]]:
    """Each audio file of a folder, its transcript if it has one, and why that cannot be read if so.

    A transcript lies beside its audio as `<same name>.txt`, or in a `*.trans.txt` of the folder, as in LibriSpeech.
    """
    listed: dict[str, str] = {}
    broken = None
    for path in sorted(folder.glob("*.trans.txt")):
        try:
            lines = [line.split(maxsplit=1) for line in lines_of(path)]
        except ValueError:
            broken = f"its transcript is in {path.name}, which is not UTF-8: convert that"
            continue
        listed |= {composed(words[0]): " ".join(words[1].split()) for words in lines if len(words) == 2}
    for path in paths:
        beside = path.with_suffix(".txt")
        try:
            text = " ".join(word for line in lines_of(beside) for word in line.split()) if beside.is_file() else ""
        except ValueError:
            yield path, (None, f"its transcript, {beside.name}, is not UTF-8: convert it, or move it away")
            continue
        text = text or listed.get(composed(path.stem), "")
        yield path, (text or None, None if text else broken)


def prepare(
    files_of: dict[str, list[AudioFile]],
    out: Path,
    max_duration: float | None = None,
    skipped: Mapping[str, int] | None = None,
    number_language: str | None = None,
) -> list[Path]:
    """Write a manifest for each list of audio files, and report what was found.

    Args:
        files_of: Audio files of each manifest, by its name.
        out: Folder of the manifests.
        max_duration: Seconds; longer recordings are cut into equal pieces.
        skipped: Counts of other files by their suffix, for the report.
        number_language: Language in which numbers in transcripts are spelled out; they stay as they are if not given.

    Returns:
        Paths of the manifests.

    Raises:
        UserError: All files of a manifest are refused, or a manifest that lists other audio is there already.
    """
    out = Path(out)
    files_of, numbers = _spelled(files_of, number_language)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: no folder can be made there ({error.strerror}); choose another OUT") from error
    sounds = _decode_all(sorted({file.path for files in files_of.values() for file in files}))
    manifests: dict[Path, CutSet] = {}
    refusals: dict[Path, list[Refusal]] = {}
    remarks: dict[Path, list[Refusal]] = {}
    for name, files in files_of.items():
        path, listing = out / f"{name}.jsonl.gz", out / f"{name}.refused.tsv"
        cuts, refusals[listing] = _cuts(list(_usable_once(files, sounds)), sounds, max_duration)
        remarks[out / f"{name}.remarks.tsv"] = _remarks(files, sounds, {refused.path for refused in refusals[listing]})
        if not cuts:
            write_refusals(refusals[listing], listing)
            raise UserError(
                f"{name}: all {len(files)} audio files are refused, for reasons listed in {listing}, the first, "
                f"{printable(refusals[listing][0].path)[-300:]}: {refusals[listing][0].reason}"
            )
        if path.is_file() and fingerprint(read_manifest(path)) != fingerprint(cuts):
            raise UserError(
                f"{path}: is there already and lists other audio; remove it, or choose another folder for the manifests"
            )
        manifests[path] = CutSet(cuts)
    for path, listed in (refusals | remarks).items():
        write_refusals(listed, path)
    write_manifests(manifests)
    _report(manifests, _each_once(refusals), _each_once(remarks), skipped or {})
    if numbers:
        print(numbers)
    return list(manifests)


def _usable_once(files: Sequence[AudioFile], sounds: Mapping[Path, Sound | str]) -> Iterable[AudioFile]:
    """Refuse what is silent, and a file that is listed under several names, links among them, but once."""
    seen: dict[tuple[int, int], Path] = {}
    for file in sorted(files, key=lambda file: (file.id, file.path)):
        sound = sounds[file.path]
        if file.refused or isinstance(sound, str):
            yield file
        elif sound.silent:
            yield file._replace(refused=sound.remarks[0])
        elif (same := seen.setdefault(identity(file.path), file.path)) != file.path:
            yield file._replace(refused=f"the same file as {printable(same)}")
        else:
            yield file


def identity(path: Path) -> tuple[int, int]:
    """What two paths of one file share, whatever links, `..` and spellings lead to it."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _remarks(files: Iterable[AudioFile], sounds: Mapping[Path, Sound | str], refused: set[Path]) -> list[Refusal]:
    """What is unusual about files that are taken all the same."""
    taken = {file.path: sounds[file.path] for file in files if file.path not in refused}
    return [Refusal(path, one) for path, sound in taken.items() if isinstance(sound, Sound) for one in sound.remarks]


def _spelled(
    files_of: dict[str, list[AudioFile]], language: str | None
) -> tuple[dict[str, list[AudioFile]], str | None]:
    """The same files, with numbers spelled out if a language is given, and a sentence on them."""
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


def _decode_all(paths: list[Path]) -> dict[Path, Sound | str]:
    """Each file decoded to its end, or the reason why it is refused."""
    sizes = [os.path.getsize(path) if os.path.isfile(path) else 0 for path in paths]
    columns = [
        TextColumn("checking audio"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[hours]:.2f} h"),
        TimeRemainingColumn(),
    ]
    sounds: dict[Path, Sound | str] = {}
    hours = 0.0
    # Threads suffice: the decoders hold no interpreter lock while they read and decode.
    with (
        Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as progress,
        thread_pool() as pool,
    ):
        task = progress.add_task("checking audio", total=sum(sizes), hours=0.0)
        for path, size, sound in zip(paths, sizes, pool.map(probe, paths), strict=True):
            sounds[path] = sound
            if isinstance(sound, Sound):
                hours += sound.num_samples / sound.sampling_rate / 3600
            progress.update(task, advance=size, hours=hours)
    return sounds


def _cuts(
    files: list[AudioFile], sounds: dict[Path, Sound | str], max_duration: float | None
) -> tuple[list[Cut], list[Refusal]]:
    cuts: list[Cut] = []
    refusals: list[Refusal] = []
    by_id: dict[str, AudioFile] = {}
    for file in sorted(files, key=lambda file: (file.id, file.path)):
        sound = sounds[file.path]
        if reason := file.refused or (sound if isinstance(sound, str) else _wordless(file.text)):
            refusals.append(Refusal(file.path, reason))
            continue
        assert isinstance(sound, Sound)
        recording = _recording(file, sound)
        if recording.num_samples < WINDOW:
            reason = f"too short: {recording.num_samples} samples at 16 kHz, and one frame takes {WINDOW}"
            refusals.append(Refusal(file.path, reason))
        elif file.id in by_id:
            refusals.append(Refusal(file.path, f"named as another file, {by_id[file.id].path}"))
        else:
            by_id[file.id] = file
            cuts += _pieces(recording, file, max_duration)
    return cuts, refusals


def _wordless(text: str | None) -> str | None:
    if not text or has_words(text):
        return None
    return f"its transcript, {text[:40]!r}, has no words: write down what is said, or remove the transcript"


def _recording(file: AudioFile, sound: Sound) -> Recording:
    path = os.path.abspath(file.path)
    return Recording(
        id=file.id,
        sources=[AudioSource(type="file", channels=list(range(sound.num_channels)), source=path)],
        sampling_rate=sound.sampling_rate,
        num_samples=sound.num_samples,
        duration=sound.num_samples / sound.sampling_rate,
    ).resample(SAMPLE_RATE)


def _pieces(recording: Recording, file: AudioFile, max_duration: float | None) -> list[Cut]:
    """One cut, or as many equal ones (but for one sample) as keep each within `max_duration`."""
    whole = recording.to_cut()
    longest = seconds_to_samples(max_duration) if max_duration else recording.num_samples
    count = ceil(recording.num_samples / longest)
    bounds = [k * recording.num_samples // count for k in range(count + 1)]
    pieces = []
    for k, (begin, end) in enumerate(pairwise(bounds)):
        piece_id = file.id if count == 1 else f"{file.id}-{k:03d}"
        text = file.text if count == 1 else None
        duration = (end - begin) / SAMPLE_RATE
        supervision = SupervisionSegment(
            id=piece_id,
            recording_id=recording.id,
            start=0.0,
            duration=duration,
            channel=whole.channel,
            text=text,
            speaker=file.speaker,
        )
        supervisions = [supervision] if text or file.speaker else []
        pieces.append(
            replace(
                whole,
                id=piece_id,
                start=begin / SAMPLE_RATE,
                duration=duration,
                supervisions=supervisions,
                custom={"bytes": file.path.stat().st_size},
            )
        )
    return pieces


def write_refusals(refusals: Sequence[Refusal], path: Path) -> None:
    """Write a line for each file, its path, a tab and the reason; no file where there are none."""
    lines = [f"{printable(refusal.path)}\t{' '.join(refusal.reason.split())}\n" for refusal in refusals]
    if lines:
        write_whole(path, "".join(lines).encode())
    else:
        path.unlink(missing_ok=True)


def print_refusals(refusals: Sequence[Refusal], console: Console) -> None:
    """Print the first few files with their reasons, and how many more there are."""
    for refusal in refusals[:REFUSALS_SHOWN]:
        console.print(f"  {escape(printable(refusal.path))}: {escape(refusal.reason)}", soft_wrap=True)
    if len(refusals) > REFUSALS_SHOWN:
        console.print(f"  and {len(refusals) - REFUSALS_SHOWN} more")


def _each_once(listed: Mapping[Path, list[Refusal]]) -> list[Refusal]:
    return list(dict.fromkeys(refusal for refusals in listed.values() for refusal in refusals))


def count_skipped(skipped: Counter[str], paths: Iterable[Path]) -> None:
    """Count files that are neither audio nor transcripts, by the suffix of their names."""
    suffixes = (path.suffix.lower() for path in paths)
    skipped.update(suffix or "no suffix" for suffix in suffixes if suffix not in SUFFIXES and suffix != ".txt")


def skipped_sentence(skipped: Mapping[str, int]) -> str:
    """How many files were skipped, by suffix."""
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items()))
    return f"skipped, since their names have no suffix of audio: {counts}"


def _report(
    manifests: dict[Path, CutSet], refusals: list[Refusal], remarks: list[Refusal], skipped: Mapping[str, int]
) -> None:
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
    if refusals:
        console.print(f"{len(refusals)} audio files refused (all of them in *.refused.tsv beside the manifests):")
        print_refusals(refusals, console)
    if remarks:
        kinds: dict[str, list[Refusal]] = {}
        for remark in remarks:
            kinds.setdefault(remark.reason.partition(":")[0], []).append(remark)
        console.print("accepted, but listen to these (all of them in *.remarks.tsv beside the manifests):")
        for kind, of_kind in kinds.items():
            first = f"{printable(of_kind[0].path)}: {of_kind[0].reason.partition(': ')[2]}"
            console.print(f"  {len(of_kind)} {kind}, such as {escape(first)}", soft_wrap=True)
    if skipped:
        console.print(escape(skipped_sentence(skipped)), soft_wrap=True)
