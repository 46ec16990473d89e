"""The record of a run's utterances in its checkpoints and logs, compared before the run resumes.

A batch is a list of indices of utterances, so their order in a manifest matters. The folder of a file does not matter,
nor does the order in which manifests are named: a resumed run takes them in the order of its checkpoint.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lhotse.cut import Cut

from hubert_lightning.data.corpora import Corpora, ids_and_samples
from hubert_lightning.data.manifest import speaker_of
from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE


class ManifestRecord(NamedTuple):
    """What a checkpoint stores about a manifest.

    Args:
        name: File name.
        fingerprint: Fingerprint of everything that batches depend on.
        weight: Share in an epoch, None if the data has no weights.
    """

    name: str
    fingerprint: str
    weight: float | None = None


def ordered_fingerprint(cuts: Iterable[Cut], transcript: Callable[[Cut], str] | None = None) -> str:
    """Compute a fingerprint that only manifests with the same batches share.

    Args:
        cuts: Utterances in their order.
        transcript: Function from an utterance to its transcript; if not given, transcripts do not matter.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for cut in cuts:
        files = [_stem(source.source) for source in cut.recording.sources if source.type == "file"]
        start = round(cut.start * cut.sampling_rate)
        identity = (cut.id, cut.num_samples, start, cut.channel, files, transcript(cut) if transcript else None)
        digest.update(repr(identity).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def match_manifests(
    recorded: object, paths: Sequence[Path], current: Sequence[ManifestRecord], part: str, checkpoint: Path | str
) -> list[int]:
    """Match the manifests of a run with those that its checkpoint was trained on.

    Args:
        recorded: Records of the checkpoint's manifests.
        paths: (manifests,), manifests of the run.
        current: (manifests,), their records.
        part: Argument of the data that names them: train or validation.
        checkpoint: Checkpoint that training resumes from.

    Returns:
        (manifests,), indices of the run's manifests in the order of the checkpoint.

    Raises:
        UserError: The manifests or their weights differ.
    """
    previous = _records(recorded, checkpoint)
    previous_prints = {manifest.fingerprint for manifest in previous}
    index = {manifest.fingerprint: number for number, manifest in enumerate(current)}
    missing = [manifest for manifest in previous if manifest.fingerprint not in index]
    added = [number for number, manifest in enumerate(current) if manifest.fingerprint not in previous_prints]
    restart = "start another run with another --output"
    if missing and added:
        names = [manifest.name for manifest in missing]
        number = next((number for number in added if current[number].name in names), added[0])
        raise UserError(
            f"{paths[number]}: its utterances, their order or their transcripts are not those that {checkpoint} was "
            f"trained with in data.{part}; restore the manifest as it was, or {restart}"
        )
    if added:
        raise UserError(
            f"{paths[added[0]]}: not among the manifests in data.{part} that {checkpoint} was trained with; remove it, "
            f"or {restart}"
        )
    if missing:
        raise UserError(
            f"{missing[0].name}: not in data.{part}, but {checkpoint} was trained with it; add it, or {restart}"
        )
    order = [index[manifest.fingerprint] for manifest in previous]
    for number, manifest in zip(order, previous, strict=True):
        if current[number].weight != manifest.weight:
            raise UserError(
                f"{paths[number]}: its weight in data.weights is {current[number].weight}, but {checkpoint} was "
                f"trained with {manifest.weight}; give the same weight, or {restart}"
            )
    return order


def _records(recorded: object, checkpoint: Path | str) -> list[ManifestRecord]:
    try:
        records = [ManifestRecord(*entry) for entry in recorded]  # type: ignore[attr-defined]  # others are refused
    except TypeError:
        records = [ManifestRecord("", "", None)]
    for record in records:
        texts = isinstance(record.name, str) and isinstance(record.fingerprint, str)
        if not (texts and record.fingerprint and isinstance(record.weight, (int, float, type(None)))):
            raise UserError(
                f"{checkpoint}: its record of the manifests that it was trained with is corrupt; resume from another "
                "checkpoint"
            )
    return records


def plain_records(records: Callable[[str], list[ManifestRecord]]) -> dict[str, Any]:
    """Convert the records of the training and validation manifests to lists, which open without our classes."""
    return {part: [list(record) for record in records(part)] for part in ("train", "validation")}


def describe_part(manifests: Sequence[Path] | None, cuts: Iterable[Cut], fingerprint: str) -> dict[str, Any]:
    """Describe the manifests of a part of the data and their audio, for the loggers."""
    return {"manifests": list(map(str, manifests or [])), **audio_counts(cuts), "fingerprint": fingerprint}


def audio_counts(cuts: Iterable[Cut]) -> dict[str, float]:
    """Count utterances, hours and, if all are known and the corpus is not on disk, speakers."""
    samples = [count for _, count in ids_and_samples(cuts)]
    counts = {"utterances": len(samples), "hours": round(sum(samples) / SAMPLE_RATE / 3600, 2)}
    if isinstance(cuts, Corpora) and cuts.on_disk:
        return counts
    speakers = {speaker_of(cut) for cut in cuts}
    return counts if "" in speakers else counts | {"speakers": len(speakers)}


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]
