"""Checks of the arguments of data modules, of the order of manifests and of transcripts."""

import logging
import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from itertools import pairwise
from pathlib import Path
from typing import Any

from lhotse import CutSet
from lhotse.cut import Cut
from lightning import Trainer

from hubert_lightning.data.manifest import transcript
from hubert_lightning.errors import UserError, counted
from hubert_lightning.frames import CLOCK, Clock, num_frames, seconds_to_samples
from hubert_lightning.vocabulary import Vocabulary

log = logging.getLogger(__name__)


def check_durations(clock: Clock = CLOCK, **seconds: float) -> None:
    """Refuse durations under two frames, by the names of their arguments."""
    for name, value in seconds.items():
        if not -math.inf < value <= 2**40:
            raise UserError(f"data.{name} is {value} s; it is a duration in seconds")
        if num_frames(seconds_to_samples(value), clock) < 2:
            raise UserError(f"data.{name} is {value} s, too short for two frames; it is a duration in seconds")


def check_masks(prob: float, length: int, prefix: str = "") -> None:
    """Refuse a probability or a length of mask spans that is out of range.

    Args:
        prob: Fraction of frames or channels that the spans would cover if they did not overlap.
        length: Frames or channels in a span.
        prefix: Beginning of the names of both arguments.
    """
    if not 0 <= prob <= 1 or not 1 <= length <= 2**30:
        raise UserError(
            f"{prefix}mask_prob {prob} and {prefix}mask_length {length}: a probability is from 0 to 1, a length 1 or "
            "more"
        )


def check_order(trainer: Trainer, order: Sequence[int], paths: Sequence[Path]) -> None:
    """Refuse the manifests of a checkpoint in another order if the Trainer has planned its batches already.

    It has if a strategy reads checkpoints late, as LayerwiseFSDP does, and `max_epochs` counts the steps.

    Args:
        trainer: Trainer that resumes.
        order: (manifests,), indices of the run's manifests in the order of the checkpoint.
        paths: (manifests,), training manifests of the run.
    """
    if list(order) != sorted(order) and trainer.train_dataloader is not None:
        names = ", ".join(str(paths[number]) for number in order)
        raise UserError(
            f"data.train names the manifests of {trainer.ckpt_path} in another order, and this strategy has "
            f"planned its batches already; give data.train as [{names}]"
        )


def warn_of_common(train: Set[str], validation: Set[str]) -> None:
    """Warn of utterances that a model both trains on and is validated on.

    Args:
        train: Ids of the training utterances.
        validation: Ids of the validation utterances.
    """
    if common := sorted(train & validation):
        verb = "are" if len(common) > 1 else "is"
        log.warning(
            "%s, such as %s, %s among the training and the validation utterances, so the WER of validation does not "
            "tell how well unseen speech is transcribed; give other utterances in data.validation",
            counted(len(common), "utterance"),
            common[0],
            verb,
        )


def kept_plan(trainer: Trainer, state: Mapping[str, Any], newest: int) -> int:
    """Return the version of the plan of batches that a checkpoint's data has, by which training resumes.

    Args:
        trainer: Trainer that resumes.
        state: State of the data in the checkpoint.
        newest: Version that a new run has.

    Raises:
        UserError: The version is unknown, or the Trainer has planned its batches already, as in `check_order`.
    """
    plan = state.get("plan", 1)
    if type(plan) is not int or not 1 <= plan <= newest:
        raise UserError(
            f"{trainer.ckpt_path}: its batches are planned by version {plan!r:.40}, and this package knows 1 to "
            f"{newest}; resume with the version of the package that saved it, or from another checkpoint"
        )
    if plan != newest and trainer.train_dataloader is not None:
        raise UserError(
            f"{trainer.ckpt_path}: an earlier version planned its batches, and this strategy has planned its batches "
            "already; give trainer.max_steps instead of max_epochs"
        )
    return plan


def check_transcripts(cuts: CutSet, vocabulary: Vocabulary, training: bool = True, clock: Clock = CLOCK) -> None:
    """Refuse transcripts that CTC cannot learn.

    Args:
        cuts: Utterances with their transcripts.
        vocabulary: Vocabulary of the model.
        training: Whether the model learns from them. If not, unknown characters are logged as a warning; they count as
            errors.
        clock: Clock of the encoder.

    Raises:
        UserError: A cut has no words, characters that are not in the vocabulary, or more tokens than frames.
    """
    texts = [(cut, transcript(cut, vocabulary)) for cut in cuts]
    if wordless := [(cut.id, text) for cut, words in texts if not words and (text := _as_written(cut))]:
        raise UserError(
            f"{wordless[0][0]}: the transcript {wordless[0][1][:40]!r} contains only punctuation or symbols"
            f"{_and_others(wordless)}; write the spoken words, or remove the utterance"
        )
    if untranscribed := [cut.id for cut, text in texts if not text]:
        raise UserError(
            f"{untranscribed[0]}: no transcript in the manifest{_and_others(untranscribed)}; prepare it with its "
            "transcripts, or remove the utterance"
        )
    _check_characters([(cut.id, text) for cut, text in texts], vocabulary, training)
    for cut, text in texts:
        _check_length(cut, text, vocabulary, clock)


def _check_characters(texts: Sequence[tuple[str, str]], vocabulary: Vocabulary, training: bool) -> None:
    affected = [(cut_id, text) for cut_id, text in texts if vocabulary.unknown_characters(text)]
    if not affected:
        return
    unknown = set[str]().union(*(vocabulary.unknown_characters(text) for _, text in affected))
    written = Counter(character for _, text in affected for character in text)
    counts = ", ".join(f"{character!r} {written[character]} times" for character in sorted(unknown))
    cut_id, text = affected[0]
    if not training:
        log.warning(
            "%s: the transcript has characters that are not in the model's vocabulary%s, in all %s; they count as "
            "errors",
            cut_id,
            _and_others(affected),
            counts,
        )
        return
    raise UserError(
        f"{cut_id}: the transcript {text[:40]!r} has characters that are not in the model's vocabulary"
        f"{_and_others(affected)}, in all {counts}; spell them out (numbers: `hubert prepare` with --spell_numbers "
        "LANGUAGE) or remove them and prepare the manifest again, or train a model with a vocabulary of its own "
        "(`hubert vocabulary`)"
    )


def _check_length(cut: Cut, text: str, vocabulary: Vocabulary, clock: Clock) -> None:
    frames = num_frames(cut.num_samples, clock)
    # At most one token for each character and one for the end, with a blank between any two
    if 2 * len(unicodedata.normalize("NFD", text)) + 1 <= frames:
        return
    tokens = vocabulary.targets(text)
    needed = len(tokens) + sum(token == following for token, following in pairwise(tokens))  # a blank parts equal ones
    if needed > frames:
        faster = "" if clock == CLOCK else f" (or train a model of 50 Hz: this one has {clock.described})"
        raise UserError(
            f"{cut.id}: {len(text)} letters for {frames} frames of audio, more than CTC can align; the transcript "
            f"belongs to other audio, correct or remove it{faster}"
        )


def _as_written(cut: Cut) -> str:
    return " ".join(segment.text or "" for segment in cut.supervisions).strip()


def _and_others(cases: Sequence[object]) -> str:
    number = len(cases) - 1
    return f" (and {number} other{'s' * (number > 1)})" if number else ""
