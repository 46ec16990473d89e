"""Recordings of any format and length → their words, as text, JSON, subtitles or CTM."""

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import audioread
import numpy as np
import soundfile
import torch
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.data.preparation import SUFFIXES, Refusal, Sound, examine, transcribed
from hubert_lightning.data.text import Vocabulary
from hubert_lightning.decoding import BeamSearch, greedy, search_with
from hubert_lightning.frames import SAMPLE_RATE, num_frames
from hubert_lightning.recognition import CTCModel, load_ctc, log_probabilities
from hubert_lightning.transcripts import Format, Transcript, write_all
from hubert_lightning.word_times import Word, parts, word_times

GROUP = 5_000_000
"""Numbers, of log-probabilities, of files that are in memory together: an hour of 28 letters."""
ONLY_FFMPEG = {".m4a", ".mp4", ".aac", ".wma", ".webm", ".mkv", ".mov", ".avi", ".amr", ".3gp", ".wv", ".ape"}


def transcribe(
    model: Path,
    files: Sequence[Path],
    format: Format = "text",
    output: Path | None = None,
    decoder: Path | None = None,
    batch_duration: float | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    num_workers: int = 0,
) -> int:
    """Write down what is said in recordings.

    Args:
        model: a fine-tuned checkpoint, or a transformers directory of a HubertForCTC with its tokenizer
        files: audio of any format, rate, number of channels and length, or folders of it
        format: text; json with the time and confidence of every word; srt subtitles; ctm, as NIST's tools read it
        output: folder for one file for each recording; standard output if not given
        decoder: how to search for words, a file of `hubert tune-decoder`; each frame's best letter if not given
        batch_duration: seconds of audio that are encoded at once; as fits the device if not given
        precision: that the encoder computes in
        num_workers: processes that read audio, besides this one
    returns: how many files failed
    """
    recogniser = load_ctc(model)
    search = search_with(decoder, recogniser.vocabulary) if decoder else None
    timed = format != "text"

    def write_down(cut: Cut, log_probs: Tensor) -> Transcript:
        return Transcript(cut.id, cut.duration, *_words(log_probs, recogniser.vocabulary, search, timed))

    paths = _listed(files)
    results = _for_each(recogniser, paths, write_down, batch_duration, precision, num_workers)
    try:
        return write_all(results, format, output, paths)
    finally:
        if search:
            search.close()


def align(
    model: Path,
    files: Sequence[Path],
    text: str | None = None,
    format: Literal["json", "srt", "ctm"] = "ctm",
    output: Path | None = None,
    batch_duration: float | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    num_workers: int = 0,
) -> int:
    """Find when each word of a known text was said.

    Args:
        model: a fine-tuned checkpoint, or a transformers directory of a HubertForCTC with its tokenizer
        files: audio, each with its words beside it in `<same name>.txt` or in a `*.trans.txt` as in LibriSpeech
        text: the words, if there is one file only
        format: ctm, as NIST's tools read it; json with confidences; srt subtitles
        output: folder for one file for each recording; standard output if not given
        batch_duration: seconds of audio that are encoded at once; as fits the device if not given
        precision: that the encoder computes in
        num_workers: processes that read audio, besides this one
    returns: how many files failed
    """
    paths = _listed(files)
    if text is not None and len(paths) != 1:
        raise ValueError(f"one text for {len(paths)} files; leave text out, and put each file's beside it")
    recogniser = load_ctc(model)
    vocabulary = replace(recogniser.vocabulary, punctuation="space")  # which nobody says
    said = {str(paths[0]): text} if text is not None else _texts_beside(paths)

    def find(cut: Cut, log_probs: Tensor) -> Transcript:
        words = vocabulary.normalise(said.get(cut.id) or "")
        if not words:
            raise ValueError("no words: put them, in letters, beside it in a .txt file of the same name, or in --text")
        if unknown := vocabulary.unknown_characters(words):
            raise ValueError(f"its words have {sorted(unknown)}, which the model cannot spell: spell them out")
        return Transcript(cut.id, cut.duration, words, word_times(log_probs, words, vocabulary))

    results = _for_each(recogniser, paths, find, batch_duration, precision, num_workers)
    return write_all(results, format, output, paths)


def _words(log_probs: Tensor, vocabulary: Vocabulary, search: BeamSearch | None, timed: bool) -> tuple[str, list[Word]]:
    """The text of a recording of any length, and its words with their times if they are asked for."""
    # A search with a language model should not forget in every pause what was said before
    pieces = parts(log_probs, vocabulary, every_pause=search is None)
    rows = [log_probs[piece.start : piece.end] for piece in pieces]
    if search is None:
        texts = [text for row in rows for text in greedy(row[None], torch.tensor([len(row)]), vocabulary)]
    else:
        texts = [few[0].text if few else "" for few in search.nbest_of(rows)]
    joined, words = "", list[Word]()
    for piece, row, text in zip(pieces, rows, texts, strict=True):
        whole_words = piece.new_word or (search is not None and search.settings.lexicon is not None)
        found = word_times(row, text, vocabulary, piece.start) if timed else []
        if not whole_words and joined and text and found:  # a word that lasts on
            before, after = words.pop(), found.pop(0)
            confidence = min(before.confidence, after.confidence)
            words.append(Word(before.text + after.text, before.start, after.end, confidence))
        joined = " ".join(filter(None, [joined, text])) if whole_words else joined + text
        words += found
    return joined, words


def _listed(files: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as the audio in them; each once."""
    found: dict[Path, None] = {}
    for file in map(Path, files):
        if file.is_dir():
            known = SUFFIXES | ONLY_FFMPEG
            inside = [path for path in sorted(file.rglob("*")) if path.suffix.lower() in known and path.is_file()]
            # a leading dot marks what an operating system left there, not audio
            inside = [path for path in inside if not path.name.startswith(".")]
            if not inside:
                raise ValueError(f"{file}: no audio in this folder; name files, or another folder")
            found |= dict.fromkeys(inside)
        else:
            found[file] = None
    return list(found)


def _for_each(
    model: CTCModel,
    paths: Sequence[Path],
    what: Callable[[Cut, Tensor], Transcript],
    batch_duration: float | None,
    precision: str,
    num_workers: int,
) -> Iterator[Transcript | Refusal]:
    """What is made of each recording's log-probabilities, or why nothing was, in whatever order they are ready."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    spelled = partial(
        log_probabilities,
        model,
        batch_duration=batch_duration,
        what="encoding",
        num_workers=num_workers,
        precision=partial(_autocast, device, precision),
    )
    cuts, refused, heard = examine(paths)
    _tell(cuts, heard)
    yield from _of_groups(spelled, _grouped(cuts, len(model.vocabulary)), what)
    for refusal in refused:
        if refusal.reason.startswith("unreadable"):  # by libsndfile; one at a time, so that they do not fill the disk
            with TemporaryDirectory() as folder:
                yield from _of_converted(refusal, Path(folder) / "audio.w64", spelled, what)
        else:
            yield refusal


def _of_groups(
    spelled: Callable[..., Iterator[list[Tensor]]],
    remaining: list[list[Cut]],
    what: Callable[[Cut, Tensor], Transcript],
) -> Iterator[Transcript | Refusal]:
    while remaining:
        done, results = 0, spelled(remaining)
        try:
            for log_probs in results:
                for cut, rows in zip(remaining[done], log_probs, strict=True):
                    yield _made(what, cut, rows)
                done += 1
            remaining = []
        except ValueError as error:  # a file that was sound when it was examined; the others of its group are
            group, *others = remaining[done:]
            if len(group) == 1:
                yield Refusal(Path(group[0].id), str(error))
                remaining = others
            else:
                remaining = [*([cut] for cut in group), *others]


def _of_converted(
    refusal: Refusal,
    converted: Path,
    spelled: Callable[..., Iterator[list[Tensor]]],
    what: Callable[[Cut, Tensor], Transcript],
) -> Iterator[Transcript | Refusal]:
    """The same of a file that libsndfile cannot read, decoded by ffmpeg or the system."""
    if reason := _decoded(refusal.path, converted):
        yield Refusal(refusal.path, f"{refusal.reason}; {reason}")
        return
    cuts, broken, heard = examine([converted])
    if broken:
        yield Refusal(refusal.path, broken[0].reason)
        return
    name = str(refusal.path)
    cut = cuts[0].with_id(name)
    _tell([cut], {name: heard[str(converted)]})
    yield from _of_groups(spelled, [[cut]], what)


def _made(what: Callable[[Cut, Tensor], Transcript], cut: Cut, log_probs: Tensor) -> Transcript | Refusal:
    try:
        return what(cut, log_probs)
    except ValueError as error:
        return Refusal(Path(cut.id), str(error))


def _autocast(device: torch.device, precision: str) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def _grouped(cuts: Sequence[Cut], tokens: int) -> list[list[Cut]]:
    """Files whose log-probabilities fit in memory together, so that short ones can fill a batch."""
    groups: list[list[Cut]] = []
    numbers = 0
    for cut in cuts:
        of_cut = num_frames(cut.num_samples) * tokens
        if not groups or numbers + of_cut > GROUP:
            groups.append([])
            numbers = 0
        groups[-1].append(cut)
        numbers += of_cut
    return groups


def _tell(cuts: Sequence[Cut], heard: Mapping[str, Sound]) -> None:
    for cut in cuts:
        sound = heard[cut.id]
        if sound.silent:
            print(f"hubert: {cut.id}: silent, every sample is 0; its transcript is empty", file=sys.stderr)
        elif sound.sampling_rate < SAMPLE_RATE:
            print(
                f"hubert: {cut.id}: recorded at {sound.sampling_rate} Hz; a model that learnt from 16 kHz errs more",
                file=sys.stderr,
            )


def _decoded(path: Path, converted: Path) -> str | None:
    """Write audio that ffmpeg or the system decodes as a file that libsndfile reads; what is missing if that fails."""
    try:
        with (
            audioread.audio_open(path) as audio,
            soundfile.SoundFile(converted, "w", audio.samplerate, audio.channels, "PCM_16", format="W64") as file,
        ):
            for block in audio:
                file.write(np.frombuffer(block, dtype="<i2").reshape(-1, audio.channels))
    except audioread.DecodeError:
        if shutil.which("ffmpeg"):
            return "ffmpeg cannot read it either; record or copy it again"
        return "install ffmpeg, which reads other formats, or convert it to wav or flac"
    except (OSError, EOFError, soundfile.SoundFileError) as error:
        return f"it could not be converted to {converted} ({error}); make room there"
    return None


def _texts_beside(paths: Sequence[Path]) -> dict[str, str]:
    found = {}
    for folder in sorted({path.parent for path in paths}):
        for path, (text, _) in transcribed(folder, [path for path in paths if path.parent == folder]):
            found[str(path)] = text or ""
    return found
