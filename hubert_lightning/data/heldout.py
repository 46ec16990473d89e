"""Recordings held out for validation: a choice that depends on their names alone, not on their order."""

from collections.abc import Mapping, Sequence
from zlib import crc32

from lhotse.cut import Cut

from hubert_lightning.data.manifest import speaker_of

MANY_SPEAKERS = 10
"""Number of speakers from which on whole speakers are held out."""
FEWEST = 2
"""Smallest number of recordings or speakers to hold out, as long as their share of the audio is at most `MOST`."""
MOST = 0.2
"""Largest share of the audio to hold out in order to reach `FEWEST` groups and half of the requested share."""
LONG_ENOUGH, SHORTEST = 2.0, 0.1
"""Seconds of a recording that is worth holding out, and of the shortest one that is held out if all are short."""


def chosen_groups(sizes: Mapping[str, float], limit: float) -> set[str]:
    """Choose groups by a hash of their names, as many as fit into a limit, at least one of several.

    Args:
        sizes: Size of each group, such as the utterances of a speaker, by its name.
        limit: Largest sum of the sizes; a group that is larger alone is not chosen, unless it is the smallest one and
            no other fits.

    Returns:
        Names of the groups, never of all; none if the limit is 0.
    """
    chosen: set[str] = set()
    total = 0.0
    names = sorted(sizes, key=lambda name: (crc32(name.encode()), name))
    for name in names:
        if total + sizes[name] <= limit and len(chosen) + 1 < len(sizes):  # one is left to train on
            chosen.add(name)
            total += sizes[name]
    if not chosen and limit > 0 and len(sizes) > 1:
        chosen.add(min(names, key=lambda name: sizes[name]))
    return chosen


def _enough_groups(sizes: Mapping[str, float], share: float, whole: float) -> set[str]:
    """Choose groups as `chosen_groups` does, and more of them until `FEWEST` groups and half of the share are reached.

    Args:
        sizes: Seconds of each group by its name.
        share: Share of the audio to hold out.
        whole: Seconds of all the audio.
    """
    most = max(share, MOST) * whole
    chosen = chosen_groups({name: size for name, size in sizes.items() if size <= most}, share * whole)
    chosen = chosen or chosen_groups(sizes, share * whole)
    for name in sorted(sizes, key=lambda name: (crc32(name.encode()), name)):
        total = sum(sizes[name] for name in chosen)
        if len(chosen) >= FEWEST and total >= share * whole / 2:
            break
        if name not in chosen and total + sizes[name] <= most and len(chosen) + 1 < len(sizes):
            chosen.add(name)
    return chosen


def split(cuts: Sequence[Cut], share: float) -> tuple[list[Cut], list[Cut], str]:
    """Hold out a share of the audio: whole speakers if ten or more are known, else whole recordings.

    Args:
        cuts: Cuts, in any order.
        share: Share of the audio to hold out, from 0 to below 1. At least one recording is held out if there are two,
            and at least two if they are no more than a fifth of the audio.

    Returns:
        Cuts to train on, those held out, and a sentence on the choice.
    """
    speakers = {speaker for cut in cuts if (speaker := speaker_of(cut))}
    whole_speakers = len(speakers) >= MANY_SPEAKERS
    group_of = {cut.id: (whole_speakers and speaker_of(cut)) or cut.recording.id for cut in cuts}
    sizes: dict[str, float] = {}
    for cut in cuts:
        sizes[group_of[cut.id]] = sizes.get(group_of[cut.id], 0.0) + cut.duration
    if not share:
        return list(cuts), [], "no recordings are held out for validation"
    if len(sizes) < 2:
        return list(cuts), [], "one recording, so none is held out for validation"
    for least in (LONG_ENOUGH, SHORTEST):
        candidates = {name: size for name, size in sizes.items() if size >= least}
        if len(candidates) > 1:
            break
    names = _enough_groups(candidates, share, sum(sizes.values()))
    heldout = [cut for cut in cuts if group_of[cut.id] in names and cut.duration >= SHORTEST]
    if not heldout:
        return list(cuts), [], f"all recordings but one are shorter than {SHORTEST} s, so none is held out"
    ids = {cut.id for cut in heldout}
    train = [cut for cut in cuts if cut.id not in ids]
    recordings = len({cut.recording.id for cut in heldout})
    of_speakers = f", all of {len(names)} of {len(speakers)} speakers" if whole_speakers else ""
    seconds = sum(cut.duration for cut in heldout)
    return train, heldout, (
        f"held out for validation: {recordings} recording{'s' * (recordings > 1)}{of_speakers}, "
        f"{100 * seconds / sum(sizes.values()):.1f} % of the audio (--heldout 0 holds out none)"
    )  # fmt: skip
