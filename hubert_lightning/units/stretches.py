"""A bounded sample of speech in stretches of consecutive frames, in two halves of different speakers."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from lhotse.cut import Cut

from hubert_lightning.data.alignments import check_alignment, phones_of
from hubert_lightning.data.manifest import speaker_of
from hubert_lightning.errors import UserError, counted, within
from hubert_lightning.frames import CLOCK, SAMPLE_RATE, Clock, in_frames, num_frames, num_samples
from hubert_lightning.units.label_shards import check_clusters
from hubert_lightning.units.quality import phones_by_frame

STRETCH_FRAMES = 500
"""Frames of 20 ms, 10 s, that are drawn together, so that runs of units can be measured."""
WHOLE_FRAMES = 3_000
"""Frames of 20 ms, a minute, of the longest recording that is encoded whole; of a longer one, only what is drawn is."""


class SpeechSample(NamedTuple):
    """Speech by which layers and numbers of clusters are judged.

    Args:
        cuts: Utterances, or parts of long ones.
        frames: Frames of each of them.
        phone: (frames of all cuts,), phone of each frame, "" where none is known.
        speaker: (frames of all cuts,), number of the speaker; of the recording if speakers are not known.
        stretch: (frames of all cuts,), number of the stretch of consecutive frames.
        fit: (frames of all cuts,) bool, whether K-means is fitted on the frame; otherwise it is judged by it.
        num_speakers: Number of speakers; 0 if they are not known.
        split: What the two halves do not share: "speakers", "recordings" or "stretches".
        clock: Clock of the frames.
    """

    cuts: list[Cut]
    frames: list[np.ndarray]
    phone: np.ndarray
    speaker: np.ndarray
    stretch: np.ndarray
    fit: np.ndarray
    num_speakers: int
    split: str
    clock: Clock = CLOCK

    @property
    def least(self) -> int:
        """Frames of the smaller half."""
        return int(min(self.fit.sum(), (~self.fit).sum()))


class _Drawn(NamedTuple):
    """Consecutive frames of a cut.

    Args:
        cut_index: Index of the cut.
        start: First frame.
        end: Frame after the last.
    """

    cut_index: int
    start: int
    end: int


def draw_speech(
    cuts: Sequence[Cut],
    clusters: Sequence[int],
    max_frames: int,
    seed: int,
    with_phones: bool = True,
    clock: Clock = CLOCK,
) -> SpeechSample:
    """Draw stretches of speech.

    Args:
        cuts: Utterances; if some have phones, the others are left out.
        clusters: Numbers of clusters that will be fitted.
        max_frames: Number of frames to draw.
        seed: Seed of the draw.
        with_phones: Whether phones are used where some are known.
        clock: Clock of the features.

    Returns:
        The sample.

    Raises:
        UserError: There are too few frames, or phones extend beyond their audio.
    """
    check_clusters(clusters)
    within(max(clusters), max_frames=max_frames)
    within(0, 2**32 - 2, seed=seed)
    aligned = [cut for cut in cuts if phones_of(cut)] if with_phones else []
    for cut in aligned:
        check_alignment(cut)
    cuts = sorted(aligned or cuts, key=lambda cut: cut.id)
    sample = _sample(cuts, _drawn(cuts, max_frames, seed, clock), seed, clock)
    if sample.least < max(clusters):
        raise UserError(
            f"too little audio for {max(clusters)} clusters ({counted(len(cuts), 'utterance')}): K-means is fitted on "
            f"one half and judged on the other, and one half has {counted(sample.least, 'frame')}; give more audio (or "
            "max_frames), or ask for fewer clusters"
        )
    return sample


def _drawn(cuts: Sequence[Cut], max_frames: int, seed: int, clock: Clock) -> list[_Drawn]:
    """Draw stretches in a random order until there are enough frames; those of a cut follow each other."""
    frames = num_frames(np.array([cut.num_samples for cut in cuts], np.int64), clock)
    pieces = -(-frames // in_frames(STRETCH_FRAMES, clock))  # of each cut
    firsts = np.cumsum([0, *pieces])
    drawn, total = [], 0
    for number in np.random.default_rng(seed).permutation(int(firsts[-1])).tolist():
        index = int(np.searchsorted(firsts, number, side="right")) - 1
        edges = np.linspace(0, frames[index], pieces[index] + 1).astype(int)
        start, end = edges[number - firsts[index]], edges[number - firsts[index] + 1]
        end = min(end, start + max_frames - total)
        drawn.append(_Drawn(index, int(start), int(end)))
        total += int(end - start)
        if total >= max_frames:
            break
    return sorted(drawn)


def _sample(cuts: Sequence[Cut], drawn: Sequence[_Drawn], seed: int, clock: Clock) -> SpeechSample:
    parts = list(_parts(cuts, drawn, clock))
    names = [speaker_of(cut) for cut in cuts]
    known = all(names[piece.cut_index] for piece in drawn)
    group = [names[piece.cut_index] if known else cuts[piece.cut_index].id for piece in drawn]
    split = "speakers" if known else "recordings"
    num_speakers = len(set(group)) if known else 0
    of_halves = group
    if num_speakers == 1:
        of_halves, split = [cuts[piece.cut_index].id for piece in drawn], "recordings"
    if len(set(of_halves)) == 1:
        of_halves, split = [str(number) for number in range(len(drawn))], "stretches"
    sizes = np.array([piece.end - piece.start for piece in drawn])
    first = _first_half(of_halves, sizes, seed)
    phones = {index: phones_by_frame(cuts[index], clock) for index in {piece.cut_index for piece in drawn}}
    return SpeechSample(
        [cut for cut, _ in parts],
        [frames for _, frames in parts],
        phone=np.concatenate([phones[piece.cut_index][piece.start : piece.end] for piece in drawn]),
        speaker=np.repeat(np.unique(group, return_inverse=True)[1], sizes),
        stretch=np.repeat(np.arange(len(drawn)), sizes),
        fit=np.repeat([name in first for name in of_halves], sizes),
        num_speakers=num_speakers,
        split=split,
        clock=clock,
    )


def _first_half(groups: Sequence[str], sizes: np.ndarray, seed: int) -> set[str]:
    """Choose groups with about half of the frames: the largest ones first, each goes to the smaller half."""
    names, number = np.unique(groups, return_inverse=True)
    totals = np.bincount(number, weights=sizes)
    order = np.random.default_rng(seed).permutation(len(names))
    halves: tuple[set[str], set[str]] = (set(), set())
    frames = [0.0, 0.0]
    for index in order[np.argsort(-totals[order], kind="stable")].tolist():
        half = int(frames[1] < frames[0])
        halves[half].add(str(names[index]))
        frames[half] += totals[index]
    return halves[0]


def _parts(cuts: Sequence[Cut], drawn: Sequence[_Drawn], clock: Clock) -> Iterator[tuple[Cut, np.ndarray]]:
    """Yield what is encoded together, and its frames that are drawn: a cut, or one stretch of a long cut."""
    bounds = [
        0,
        *(place for place, (a, b) in enumerate(pairwise(drawn), start=1) if a.cut_index != b.cut_index),
        len(drawn),
    ]
    for first, last in pairwise(bounds):
        cut = cuts[drawn[first].cut_index]
        pieces = drawn[first:last]
        if num_frames(cut.num_samples, clock) <= in_frames(WHOLE_FRAMES, clock):
            yield cut, np.concatenate([np.arange(piece.start, piece.end) for piece in pieces])
            continue
        for piece in pieces:
            frames = piece.end - piece.start
            duration = num_samples(frames, clock) / SAMPLE_RATE
            part = cut.truncate(offset=clock.duration(piece.start), duration=duration, preserve_id=True)
            yield part.with_id(f"{cut.id}-{piece.start}"), np.arange(frames)
