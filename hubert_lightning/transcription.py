"""Recordings of any format and length → their words, as text, JSON, subtitles or CTM."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.data.preparation import Refusal, transcribed
from hubert_lightning.data.text import Vocabulary
from hubert_lightning.decoding import BeamSearch, greedy, search_with
from hubert_lightning.recognition import CTCModel, load_ctc, log_probabilities
from hubert_lightning.recordings import autocast, listed, of_each
from hubert_lightning.transcripts import Format, Transcript, write_all
from hubert_lightning.word_times import Word, parts, word_times

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

    paths = listed(files)
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
    paths = listed(files)
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
        precision=autocast(device, precision),
    )
    return of_each(paths, spelled, what, GROUP // len(model.vocabulary))


def _texts_beside(paths: Sequence[Path]) -> dict[str, str]:
    found = {}
    for folder in sorted({path.parent for path in paths}):
        for path, (text, _) in transcribed(folder, [path for path in paths if path.parent == folder]):
            found[str(path)] = text or ""
    return found
