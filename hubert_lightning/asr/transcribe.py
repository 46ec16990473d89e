"""Words with times from recordings of any format and length: transcribed, or aligned with a known text."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.asr.ctc_model import CTCModel, load_ctc, log_probabilities
from hubert_lightning.asr.decoder_settings import settings_identity
from hubert_lightning.asr.decoding import BeamSearch, search_with
from hubert_lightning.asr.flashlight import Hypothesis
from hubert_lightning.asr.pauses import Segment, allow_skipped_boundaries, insert_pause_boundaries, split_in_pauses
from hubert_lightning.asr.transcript_files import journal_of, remaining, write_all
from hubert_lightning.asr.transcript_formats import Transcript, TranscriptFormat
from hubert_lightning.asr.word_times import (
    TimedToken,
    Word,
    align_tokens,
    best_tokens,
    word_of,
    word_times,
    words_of,
)
from hubert_lightning.data.audio_folder import transcribed
from hubert_lightning.data.refusals import RefusedFile
from hubert_lightning.errors import UserError
from hubert_lightning.features.recordings import autocast, listed, of_each
from hubert_lightning.model.devices import choose_device
from hubert_lightning.vocabulary import Vocabulary

Precision = Literal["float32", "bfloat16"]
MAX_LOG_PROBS = 5_000_000
"""Log-probabilities of short files that are in memory together: an hour of 28 tokens."""


def transcribe(
    model: Path,
    files: Sequence[Path],
    format: TranscriptFormat = "text",
    output: Path | None = None,
    decoder: Path | None = None,
    batch_duration: float | None = None,
    precision: Precision = "float32",
    num_workers: int = 0,
) -> int:
    """Transcribe recordings to text, JSON, subtitles or CTM.

    Args:
        model: Fine-tuned checkpoint, or a transformers directory of a HubertForCTC with its tokenizer.
        files: Audio of any format, rate, number of channels and length, or folders of audio.
        format: Format of the transcripts: text; json with the time and confidence of every word; srt subtitles; ctm,
            which NIST's tools read.
        output: Folder for one file per recording; standard output if not given. Finished recordings are skipped. A
            recording is transcribed again if its audio, the model or the settings have changed (the folder's
            .made-FORMAT.jsonl records them).
        decoder: Settings of a beam search, a file of `hubert tune-decoder`; greedy decoding if not given.
        batch_duration: Seconds of audio that are encoded at once; chosen for the device if not given.
        precision: Numeric precision of the encoder.
        num_workers: Number of processes that read audio, besides this one.

    Returns:
        Number of files that failed.
    """
    recogniser = load_ctc(model)
    search = search_with(decoder, recogniser.vocabulary) if decoder else None
    timed = format != "text"

    def transcript_of(cut: Cut, log_probs: Tensor) -> Transcript:
        return Transcript(cut.id, cut.duration, *words_in(log_probs, recogniser.vocabulary, search, timed))

    paths = listed(files)
    decoder_identity = settings_identity(search.settings) if search else None
    settings = {
        "verb": "transcribe",
        "model": recogniser.fingerprint(),
        "precision": precision,
        "decoder": decoder_identity,
    }
    journal = journal_of(output, format, settings)
    try:
        with nullcontext() if journal is None else journal:
            missing = remaining(paths, format, output, journal)
            results = _results(recogniser, missing, transcript_of, batch_duration, precision, num_workers)
            return write_all(results, format, output, len(paths), journal)
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
    precision: Precision = "float32",
    num_workers: int = 0,
) -> int:
    """Find the time of each word of a known text.

    Args:
        model: Fine-tuned checkpoint, or a transformers directory of a HubertForCTC with its tokenizer.
        files: Audio, with the text of each file beside it in `<same name>.txt` or, as in LibriSpeech, a `*.trans.txt`.
        text: Text of the recording, if there is one file only.
        format: Format of the times: ctm, which NIST's tools read; json with confidences; srt subtitles.
        output: Folder for one file per recording; standard output if not given. Finished recordings are skipped. A
            recording is aligned again if its audio, its text, the model or the settings have changed (the folder's
            .made-FORMAT.jsonl records them).
        batch_duration: Seconds of audio that are encoded at once; chosen for the device if not given.
        precision: Numeric precision of the encoder.
        num_workers: Number of processes that read audio, besides this one.

    Returns:
        Number of files that failed.
    """
    paths = listed(files)
    if text is not None and len(paths) != 1:
        raise UserError(f"one text for {len(paths)} files; leave text out, and put each file's beside it")
    recogniser = load_ctc(model)
    vocabulary = replace(recogniser.vocabulary, punctuation="space")  # punctuation has no sound
    texts = {str(paths[0]): (text, None)} if text is not None else _texts_beside(paths)

    def transcript_of(cut: Cut, log_probs: Tensor) -> Transcript:
        written, reason = texts.get(cut.id, (None, None))
        if reason:
            raise UserError(reason)
        words = vocabulary.normalise(written or "")
        if not words:
            raise UserError("no words: put them, in letters, beside it in a .txt file of the same name, or in --text")
        if unknown := vocabulary.unknown_characters(words):
            raise UserError(f"its text has {sorted(unknown)}, which are not tokens of the model: write them in letters")
        times = word_times(allow_skipped_boundaries(log_probs, vocabulary), words, vocabulary)
        return Transcript(cut.id, cut.duration, words, times)

    settings = {"verb": "align", "precision": precision, "model": recogniser.fingerprint()}
    digests = {path: hashlib.sha256(repr(content).encode()).hexdigest()[:16] for path, content in texts.items()}
    journal = journal_of(output, format, settings, digests)
    with nullcontext() if journal is None else journal:
        missing = remaining(paths, format, output, journal)
        results = _results(recogniser, missing, transcript_of, batch_duration, precision, num_workers)
        return write_all(results, format, output, len(paths), journal)


def words_in(
    log_probs: Tensor, vocabulary: Vocabulary, search: BeamSearch | None = None, timed: bool = True
) -> tuple[str, list[Word]]:
    """Decode a recording of any length.

    Args:
        log_probs: (frames, tokens), float32.
        vocabulary: Vocabulary of the tokens.
        search: Beam search; greedy decoding if not given.
        timed: Whether the words with their times are needed.

    Returns:
        The text, and its words; no words unless `timed`.
    """
    if search is None:
        return _text_and_words(best_tokens(log_probs), vocabulary, timed)
    # Longer than the windows of the encoder: a language model needs the words before a pause
    segments = split_in_pauses(log_probs, vocabulary)
    rows = [log_probs[segment.start : segment.end] for segment in segments]
    hypotheses = [nbest[0] if nbest else Hypothesis("", 0.0) for nbest in search.nbest(rows)]

    def align_segment(segment: Segment, row: Tensor, hypothesis: Hypothesis) -> list[TimedToken]:
        return align_tokens(allow_skipped_boundaries(row, vocabulary), hypothesis.tokens, vocabulary, segment.start)

    if search.settings.lexicon is not None:
        words = list[Word]()
        for segment, row, hypothesis in zip(segments, rows, hypotheses, strict=True) if timed else ():
            tokens = align_segment(segment, row, hypothesis)
            words += [
                word_of(word, tokens[indices.start : indices.stop], vocabulary)
                for word, indices in search.word_tokens(hypothesis)
                if indices
            ]
        return vocabulary.printed(" ".join(best.text for best in hypotheses if best.text)), words
    tokens = []
    for segment, row, hypothesis in zip(segments, rows, hypotheses, strict=True):
        if segment.new_word and tokens and vocabulary.boundary is not None:
            tokens.append(TimedToken(vocabulary.boundary, segment.start, segment.start, 0.0))
        tokens += align_segment(segment, row, hypothesis)
    return _text_and_words(tokens, vocabulary, timed)


def _text_and_words(tokens: Sequence[TimedToken], vocabulary: Vocabulary, timed: bool) -> tuple[str, list[Word]]:
    tokens = insert_pause_boundaries(tokens, vocabulary)
    return vocabulary.text_of([token.token for token in tokens]), words_of(tokens, vocabulary) if timed else []


def _results(
    model: CTCModel,
    paths: Sequence[Path],
    transcript_of: Callable[[Cut, Tensor], Transcript],
    batch_duration: float | None,
    precision: Precision,
    num_workers: int,
) -> Iterator[Transcript | RefusedFile]:
    """Encode recordings; yields each transcript, or why there is none, in the order in which they are ready."""
    device = choose_device()
    encode = partial(
        log_probabilities,
        model.to(device),
        batch_duration=batch_duration,
        progress="encoding",
        num_workers=num_workers,
        precision=autocast(device, precision),
    )
    return of_each(paths, encode, transcript_of, MAX_LOG_PROBS // len(model.vocabulary))


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
