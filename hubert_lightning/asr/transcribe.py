"""Recordings of any format and length → their words, as text, JSON, subtitles or CTM."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.asr.ctc_model import CTCModel, load_ctc, log_probabilities
from hubert_lightning.asr.decoder_settings import settings_identity
from hubert_lightning.asr.decoding import BeamSearch, search_with
from hubert_lightning.asr.flashlight import Hypothesis
from hubert_lightning.asr.transcript_formats import Format, Transcript, journal_of, remaining, write_all
from hubert_lightning.asr.word_times import (
    Letter,
    Part,
    Word,
    aligned,
    best_letters,
    one_word,
    parted_in_pauses,
    parts,
    with_boundaries_as_blanks,
    word_times,
    words_of,
)
from hubert_lightning.data.prepare import Refusal, transcribed
from hubert_lightning.errors import UserError
from hubert_lightning.features.recordings import autocast, listed, of_each
from hubert_lightning.vocabulary import Vocabulary

GROUP = 5_000_000
"""Numbers, of log-probabilities, of files that are in memory together: an hour of 28 letters."""


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
        output: folder for one file for each recording; standard output if not given. Recordings that are done are
            skipped, and their files left as they are; a recording is done again if its audio, the model or the settings
            changed (.made-FORMAT.jsonl in the folder records them)
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
        return Transcript(cut.id, cut.duration, *words_in(log_probs, recogniser.vocabulary, search, timed))

    paths = listed(files)
    found_by = settings_identity(search.settings) if search else None
    settings = {"verb": "transcribe", "model": recogniser.fingerprint(), "precision": precision, "decoder": found_by}
    journal = journal_of(output, format, settings)
    try:
        with nullcontext() if journal is None else journal:
            left = remaining(paths, format, output, journal)
            results = _for_each(recogniser, left, write_down, batch_duration, precision, num_workers)
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
    precision: Literal["float32", "bfloat16"] = "float32",
    num_workers: int = 0,
) -> int:
    """Find when each word of a known text was said.

    Args:
        model: a fine-tuned checkpoint, or a transformers directory of a HubertForCTC with its tokenizer
        files: audio, each with its words beside it in `<same name>.txt` or in a `*.trans.txt` as in LibriSpeech
        text: the words, if there is one file only
        format: ctm, as NIST's tools read it; json with confidences; srt subtitles
        output: folder for one file for each recording; standard output if not given. Recordings that are done are
            skipped; a recording is done again if its audio, its text, the model or the settings changed
            (.made-FORMAT.jsonl in the folder records them)
        batch_duration: seconds of audio that are encoded at once; as fits the device if not given
        precision: that the encoder computes in
        num_workers: processes that read audio, besides this one
    returns: how many files failed
    """
    paths = listed(files)
    if text is not None and len(paths) != 1:
        raise UserError(f"one text for {len(paths)} files; leave text out, and put each file's beside it")
    recogniser = load_ctc(model)
    vocabulary = replace(recogniser.vocabulary, punctuation="space")  # which nobody says
    said = {str(paths[0]): (text, None)} if text is not None else _texts_beside(paths)

    def find(cut: Cut, log_probs: Tensor) -> Transcript:
        written, unreadable = said.get(cut.id, (None, None))
        if unreadable:
            raise UserError(unreadable)
        words = vocabulary.normalise(written or "")
        if not words:
            raise UserError("no words: put them, in letters, beside it in a .txt file of the same name, or in --text")
        if unknown := vocabulary.unknown_characters(words):
            raise UserError(f"its words have {sorted(unknown)}, which the model cannot spell: spell them out")
        quiet = with_boundaries_as_blanks(log_probs, vocabulary)
        return Transcript(cut.id, cut.duration, words, word_times(quiet, words, vocabulary))

    settings = {"verb": "align", "precision": precision, "model": recogniser.fingerprint()}
    texts = {path: hashlib.sha256(repr(of).encode()).hexdigest()[:16] for path, of in said.items()}
    journal = journal_of(output, format, settings, texts)
    with nullcontext() if journal is None else journal:
        left = remaining(paths, format, output, journal)
        results = _for_each(recogniser, left, find, batch_duration, precision, num_workers)
        return write_all(results, format, output, len(paths), journal)


def words_in(
    log_probs: Tensor, vocabulary: Vocabulary, search: BeamSearch | None = None, timed: bool = True
) -> tuple[str, list[Word]]:
    """The text of a recording of any length, and its words.

    Args:
        log_probs: (frames, tokens), float32.
        vocabulary: Vocabulary of the tokens.
        search: Beam search; each frame's best token if not given.
        timed: Whether the words, with their times, are needed.

    Returns:
        The text, and its words; none unless `timed`.
    """
    if search is None:
        letters = parted_in_pauses(best_letters(log_probs), vocabulary)
        return vocabulary.text_of([letter.token for letter in letters]), words_of(letters, vocabulary) if timed else []
    # A search with a language model should not forget in every pause what was said before
    pieces = parts(log_probs, vocabulary)
    rows = [log_probs[piece.start : piece.end] for piece in pieces]
    best = [few[0] if few else Hypothesis("", 0.0) for few in search.nbest(rows)]

    def letters_of(piece: Part, row: Tensor, found: Hypothesis) -> list[Letter]:
        return aligned(with_boundaries_as_blanks(row, vocabulary), found.tokens, vocabulary, piece.start)

    if search.settings.lexicon is not None:
        words = list[Word]()
        for piece, row, found in zip(pieces, rows, best, strict=True) if timed else ():
            letters = letters_of(piece, row, found)
            words += [
                one_word(word, letters[of.start : of.stop], vocabulary) for word, of in search.word_tokens(found) if of
            ]
        return vocabulary.printed(" ".join(found.text for found in best if found.text)), words
    letters = []
    for piece, row, found in zip(pieces, rows, best, strict=True):
        if piece.new_word and letters and vocabulary.boundary is not None:
            letters.append(Letter(vocabulary.boundary, piece.start, piece.start, 0.0))
        letters += letters_of(piece, row, found)
    letters = parted_in_pauses(letters, vocabulary)
    return vocabulary.text_of([letter.token for letter in letters]), words_of(letters, vocabulary) if timed else []


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
        progress="encoding",
        num_workers=num_workers,
        precision=autocast(device, precision),
    )
    return of_each(paths, spelled, what, GROUP // len(model.vocabulary))


def _texts_beside(paths: Sequence[Path]) -> dict[str, tuple[str | None, str | None]]:
    """The text beside each file, or why it cannot be read."""
    found = {}
    of_folder: dict[Path, list[Path]] = {}
    for path in paths:
        of_folder.setdefault(path.parent, []).append(path)
    for folder in sorted(of_folder):
        for path, text_or_reason in transcribed(folder, of_folder[folder]):
            found[str(path)] = text_or_reason
    return found
