"""The verbs `transcribe` and `align`: words with times from recordings of any format and length."""

import hashlib
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.asr.decoder_settings import settings_identity
from hubert_lightning.asr.listen import check_listening, listen
from hubert_lightning.asr.speakers import read_rttm, turns_of
from hubert_lightning.asr.subtitles import SubtitleStyle
from hubert_lightning.asr.transcriber import Precision, Transcriber
from hubert_lightning.asr.transcript_files import (
    check_names,
    check_replaced,
    journal_of,
    remaining,
    transcript_paths,
    write_all,
)
from hubert_lightning.asr.transcript_formats import Transcript, TranscriptFormat
from hubert_lightning.data.audio_folder import skipped_sentence, transcribed
from hubert_lightning.data.refusals import RefusedFile
from hubert_lightning.errors import UserError
from hubert_lightning.features.recordings import find_recordings
from hubert_lightning.model.devices import choose_device

CONTENT_OF_FORMATS = {"json": 2, "srt": 2}
"""Number of changes of what a format holds, beginning with 1: files with an earlier content are made again."""


def transcribe(
    model: Path,
    files: Sequence[Path],
    format: TranscriptFormat = "text",
    output: Path | None = None,
    decoder: Path | None = None,
    speakers: Path | None = None,
    hot_words: str | None = None,
    hot_words_weight: float = 10.0,
    subtitles: SubtitleStyle = SubtitleStyle(),
    resume: bool = True,
    batch_duration: float | None = None,
    precision: Precision = "float32",
    num_workers: int = 0,
    step: float | None = None,
    lookahead: float | None = None,
    history: float | None = None,
) -> int:
    """Transcribe recordings, or live audio on standard input, to text, JSON, subtitles, tables or CTM.

    Args:
        model: Fine-tuned checkpoint, or a transformers directory of a HubertForCTC with its tokenizer.
        files: Audio of any format, rate, number of channels and length, or folders of audio; - for raw 16 kHz mono
            samples of 16 bits, little-endian, from standard input, whose words are printed as they become stable.
        format: Format of the transcripts: text; json with the time and confidence of every word; srt and vtt subtitles;
            tsv, a table with a row for each word; ctm, which NIST's tools read.
        output: Folder for one file per recording; standard output if not given. Finished recordings are skipped, see
            resume. For standard input, the final transcript is written there.
        decoder: Settings of a beam search, a file of `hubert tune-decoder`; greedy decoding if not given.
        speakers: RTTM file with the speakers' turns of the recordings, from a diarisation tool.
        hot_words: Names and terms that the beam search prefers and adds to its lexicon: words or phrases with commas
            between them, or a file with one on each line. In a file, a number after a tab is the weight of the word,
            and other text after a tab is its spelling in tokens, as in a lexicon.
        hot_words_weight: Score that is added for each time that a hot word occurs, in natural logarithms.
        subtitles: Limits of srt and vtt subtitles.
        resume: Whether recordings that are finished in the output folder are skipped. A recording is transcribed again
            if its audio, the model or the settings have changed (the folder's .made-FORMAT.jsonl records them).
        batch_duration: Seconds of audio that are encoded at once; chosen for the device if not given.
        precision: Numeric precision of the encoder.
        num_workers: Number of processes that read audio, besides this one.
        step: Seconds from one output of words to the next, for standard input; 1 if not given.
        lookahead: Seconds after a letter that the encoder sees before it is decided, for standard input; 1 if not
            given.
        history: Seconds before a step that the encoder sees, for standard input; 5 if not given.

    Returns:
        Number of files that failed.
    """
    stream_values = {"step": step, "lookahead": lookahead, "history": history}
    stream_options = {name: seconds for name, seconds in stream_values.items() if seconds is not None}
    is_live = _is_live(files, stream_options)
    if is_live:
        check_listening(format, output, decoder, speakers)
    paths, refused = ([], []) if is_live else _recordings(files)
    turns = read_rttm(speakers) if speakers is not None else None
    with Transcriber.from_pretrained(
        model,
        decoder,
        choose_device(),
        precision,
        batch_duration,
        num_workers,
        hot_words,
        hot_words_weight,
        on_refused_word=lambda sentence: print(f"hubert: {sentence}", file=sys.stderr),
    ) as transcriber:
        if is_live:
            listen(transcriber, transcriber.live(**stream_options), format, output, subtitles)
            return 0
        search = transcriber.search
        settings: dict[str, Any] = {
            "verb": "transcribe",
            "model": transcriber.model.fingerprint(),
            "precision": precision,
            "decoder": settings_identity(search.settings) if search else None,
        }
        if search and search.hot_words:
            settings["hot_words"] = search.hot_words
        turns_of_files = None if turns is None else {str(path): _digest(turns_of(turns, path)) for path in paths}
        journal = journal_of(output, format, settings | _of_format(format, subtitles), turns_of_files)
        with nullcontext() if journal is None else journal:
            names = transcript_paths(paths, files, format, output)
            check_names(paths, names, format, output)
            missing = remaining(paths, names, journal) if resume else paths
            check_replaced(missing, names, journal)
            results = transcriber.each(
                missing, speakers=speakers, progress=True, on_remark=_print_remark, timed=format != "text"
            )
            return write_all([*refused], results, format, names, len(paths) + len(refused), journal, subtitles)


def align(
    model: Path,
    files: Sequence[Path],
    text: str | None = None,
    format: Literal["json", "srt", "vtt", "tsv", "ctm"] = "ctm",
    output: Path | None = None,
    subtitles: SubtitleStyle = SubtitleStyle(),
    resume: bool = True,
    batch_duration: float | None = None,
    precision: Precision = "float32",
    num_workers: int = 0,
) -> int:
    """Find the time of each word of a known text.

    Args:
        model: Fine-tuned checkpoint, or a transformers directory of a HubertForCTC with its tokenizer.
        files: Audio, with the text of each file beside it in `<same name>.txt` or, as in LibriSpeech, a `*.trans.txt`.
        text: Text of the recording, if there is one file only.
        format: Format of the times: ctm, which NIST's tools read; json with confidences; srt and vtt subtitles; tsv, a
            table with a row for each word.
        output: Folder for one file per recording; standard output if not given. Finished recordings are skipped, see
            resume.
        subtitles: Limits of srt and vtt subtitles.
        resume: Whether recordings that are finished in the output folder are skipped. A recording is aligned again if
            its audio, its text, the model or the settings have changed (the folder's .made-FORMAT.jsonl records them).
        batch_duration: Seconds of audio that are encoded at once; chosen for the device if not given.
        precision: Numeric precision of the encoder.
        num_workers: Number of processes that read audio, besides this one.

    Returns:
        Number of files that failed.
    """
    paths, refused = _recordings(files)
    if text is not None and len(paths) != 1:
        raise UserError(f"one text for {len(paths)} files; leave text out, and put each file's beside it")
    transcriber = Transcriber.from_pretrained(model, None, choose_device(), precision, batch_duration, num_workers)
    texts = {str(paths[0]): (text, None)} if text is not None else _texts_beside(paths)

    def transcript_of(cut: Cut, log_probs: Tensor) -> Transcript:
        written, reason = texts.get(cut.id, (None, None))
        if reason:
            raise UserError(reason)
        if not written or not written.strip():
            raise UserError("no words: put them, in letters, beside it in a .txt file of the same name, or in --text")
        return transcriber.aligned(cut, log_probs, written)

    settings = {"verb": "align", "precision": precision, "model": transcriber.model.fingerprint()}
    digests = {path: _digest(content) for path, content in texts.items()}
    journal = journal_of(output, format, settings | _of_format(format, subtitles), digests)
    with nullcontext() if journal is None else journal:
        names = transcript_paths(paths, files, format, output)
        check_names(paths, names, format, output)
        missing = remaining(paths, names, journal) if resume else paths
        check_replaced(missing, names, journal)
        results = transcriber.of_files(missing, transcript_of, progress=True, on_remark=_print_remark)
        return write_all([*refused], results, format, names, len(paths) + len(refused), journal, subtitles)


def _is_live(files: Sequence[Path], stream_options: dict[str, float]) -> bool:
    """Whether standard input is transcribed."""
    if Path("-") not in map(Path, files):
        if stream_options:
            raise UserError("step, lookahead and history are options for standard input, not for files; leave them out")
        return False
    if len(files) > 1:
        raise UserError("standard input and files: give - alone, or files alone")
    return True


def _recordings(files: Sequence[Path]) -> tuple[list[Path], list[RefusedFile]]:
    """Find the audio files of a verb, and the folders without audio; raises `UserError` if there is no other file."""
    recordings = find_recordings(files)
    if recordings.refused and not recordings.paths:
        raise UserError(f"{recordings.refused[0].path}: {recordings.refused[0].reason}")
    if recordings.skipped:
        print(f"hubert: {skipped_sentence(recordings.skipped)}", file=sys.stderr)
    return recordings.paths, recordings.refused


def _of_format(format: TranscriptFormat, style: SubtitleStyle) -> dict[str, Any]:  # JSON values
    """Settings that only some formats depend on."""
    settings: dict[str, Any] = {"content": CONTENT_OF_FORMATS[format]} if format in CONTENT_OF_FORMATS else {}
    return settings | {"subtitles": asdict(style)} if format in ("srt", "vtt") else settings


def _digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _print_remark(path: str, remark: str) -> None:
    print(f"hubert: {path}: {remark}", file=sys.stderr)


def _texts_beside(paths: Sequence[Path]) -> dict[str, tuple[str | None, str | None]]:
    """Read the text beside each file; if it cannot be read, None and the reason."""
    texts = {}
    by_folder: dict[Path, list[Path]] = {}
    for path in paths:
        by_folder.setdefault(path.parent, []).append(path)
    for folder in sorted(by_folder):
        for path, text_and_reason in transcribed(folder, by_folder[folder]):
            texts[str(path)] = text_and_reason
    return texts
