"""Which utterances a run trains on, in which order: recorded in its checkpoints, compared before it goes on.

Batches are drawn by an utterance's place among all, so the order in a manifest counts. Where files lie does not, nor
does the order in which manifests are named: a run goes on with theirs as they were.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lhotse.cut import Cut

from hubert_lightning.errors import UserError


class Manifest(NamedTuple):
    """What a checkpoint says of a manifest.

    Args:
        name: Name of its file.
        fingerprint: Fingerprint of all that batches depend on.
        weight: Its share of an epoch, if one was given.
    """

    name: str
    fingerprint: str
    weight: float | None = None


def ordered_fingerprint(cuts: Iterable[Cut], transcript: Callable[[Cut], str] | None = None) -> str:
    """A short name that only manifests share of which the same batches are made.

    Args:
        cuts: Utterances in their order.
        transcript: What an utterance is to be spelled as; nothing if its words do not count.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for cut in cuts:
        files = [_stem(source.source) for source in cut.recording.sources if source.type == "file"]
        first = round(cut.start * cut.sampling_rate)
        about = (cut.id, cut.num_samples, first, cut.channel, files, transcript(cut) if transcript else None)
        digest.update(repr(about).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def compared(
    recorded: Any, paths: Sequence[Path], here: Sequence[Manifest], part: str, checkpoint: Path | str
) -> list[int]:
    """Compare the manifests of a run with those that a checkpoint of it was trained on.

    Args:
        recorded: What the checkpoint says of its manifests.
        paths: Manifests of the run.
        here: What is to be said of them.
        part: Argument of the data that names them.
        checkpoint: Checkpoint that training resumes from.

    Returns:
        Places of the run's manifests in the checkpoint's order.

    Raises:
        UserError: They are others, or have other weights.
    """
    kept = _manifests(recorded, checkpoint)
    before = {manifest.fingerprint: manifest for manifest in kept}
    place = {manifest.fingerprint: number for number, manifest in enumerate(here)}
    gone = [manifest for manifest in kept if manifest.fingerprint not in place]
    changed = [number for number, manifest in enumerate(here) if manifest.fingerprint not in before]
    way = "start another run with another --output"
    if gone and changed:
        names = [manifest.name for manifest in gone]
        number = next((number for number in changed if here[number].name in names), changed[0])
        raise UserError(
            f"{paths[number]}: its utterances, their order or their transcripts are not those that {checkpoint} was "
            f"trained with in data.{part}; restore the manifest as it was, or {way}"
        )
    if changed:
        raise UserError(
            f"{paths[changed[0]]}: not among the manifests in data.{part} that {checkpoint} was trained with; leave it "
            f"out, or {way}"
        )
    if gone:
        raise UserError(
            f"{gone[0].name}: not in data.{part}, where {checkpoint} was trained with it; name it there, or {way}"
        )
    for manifest in kept:
        weight = here[place[manifest.fingerprint]].weight
        if weight != manifest.weight:
            raise UserError(
                f"{paths[place[manifest.fingerprint]]}: its weight in data.weights is {weight}, where {checkpoint} was "
                f"trained with {manifest.weight}; give the same weight, or {way}"
            )
    return [place[manifest.fingerprint] for manifest in kept]


def _manifests(recorded: Any, checkpoint: Path | str) -> list[Manifest]:
    try:
        manifests = [Manifest(*entry) for entry in recorded]
    except TypeError:
        manifests = [Manifest("", "", None)]
    for manifest in manifests:
        texts = isinstance(manifest.name, str) and isinstance(manifest.fingerprint, str)
        if not (texts and manifest.fingerprint and isinstance(manifest.weight, (int, float, type(None)))):
            raise UserError(
                f"{checkpoint}: does not say which manifests it was trained with as we write it; go on from another"
            )
    return manifests


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]
