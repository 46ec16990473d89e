"""From log-probabilities of a recording of any length to its text and its words with times."""

from collections.abc import Sequence

from torch import Tensor

from hubert_lightning.asr.decoding import BeamSearch
from hubert_lightning.asr.flashlight import Hypothesis
from hubert_lightning.asr.pauses import Segment, allow_skipped_boundaries, insert_pause_boundaries, split_in_pauses
from hubert_lightning.asr.word_times import TimedToken, Word, align_tokens, best_tokens, word_of, words_of
from hubert_lightning.frames import CLOCK, Clock
from hubert_lightning.vocabulary import Vocabulary


def words_in(
    log_probs: Tensor,
    vocabulary: Vocabulary,
    search: BeamSearch | None = None,
    timed: bool = True,
    clock: Clock = CLOCK,
) -> tuple[str, list[Word]]:
    """Decode a recording of any length.

    Args:
        log_probs: (frames, tokens), float32.
        vocabulary: Vocabulary of the tokens.
        search: Beam search; greedy decoding if not given.
        timed: Whether the words with their times are needed.
        clock: Clock of the frames.

    Returns:
        The text, and its words; no words unless `timed`.
    """
    if search is None:
        return _text_and_words(best_tokens(log_probs), vocabulary, timed, clock)
    # Longer than the windows of the encoder: a language model needs the words before a pause
    segments = split_in_pauses(log_probs, vocabulary, clock=clock)
    rows = [log_probs[segment.start : segment.end] for segment in segments]
    hypotheses = [nbest[0] if nbest else Hypothesis("", 0.0) for nbest in search.nbest(rows)]

    def align_segment(segment: Segment, row: Tensor, hypothesis: Hypothesis) -> list[TimedToken]:
        allowed = allow_skipped_boundaries(row, vocabulary)
        return align_tokens(allowed, hypothesis.tokens, vocabulary, segment.start, clock)

    if search.settings.lexicon is not None:
        words = list[Word]()
        for segment, row, hypothesis in zip(segments, rows, hypotheses, strict=True) if timed else ():
            tokens = align_segment(segment, row, hypothesis)
            words += [
                word_of(word, tokens[indices.start : indices.stop], vocabulary, clock)
                for word, indices in search.word_tokens(hypothesis)
                if indices
            ]
        return vocabulary.printed(" ".join(best.text for best in hypotheses if best.text)), words
    tokens = []
    for segment, row, hypothesis in zip(segments, rows, hypotheses, strict=True):
        if segment.new_word and tokens and vocabulary.boundary is not None:
            tokens.append(TimedToken(vocabulary.boundary, segment.start, segment.start, 0.0))
        tokens += align_segment(segment, row, hypothesis)
    return _text_and_words(tokens, vocabulary, timed, clock)


def _text_and_words(
    tokens: Sequence[TimedToken], vocabulary: Vocabulary, timed: bool, clock: Clock
) -> tuple[str, list[Word]]:
    tokens = insert_pause_boundaries(tokens, vocabulary, clock)
    return vocabulary.text_of([token.token for token in tokens]), words_of(tokens, vocabulary, clock) if timed else []
