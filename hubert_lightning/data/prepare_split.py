"""Manifests divided into a part to train on and a part to validate on."""

from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

from lhotse import CutSet

from hubert_lightning.data.heldout import split
from hubert_lightning.data.manifest import read_manifests, write_manifests
from hubert_lightning.data.prepare import check_held_out, check_same_audio, make_folder, report
from hubert_lightning.data.sources import LARGEST_SHARE
from hubert_lightning.errors import UserError, within

ENDS = (".jsonl.gz", ".jsonl")


def prepare_split(manifests: Sequence[Path], out: Path, heldout: float = 0.05) -> list[Path]:
    """Hold a share of each manifest out for validation: `OUT/<its name>.jsonl.gz` and `OUT/<its name>-dev.jsonl.gz`.

    The choice depends on names alone, so the same utterances are held out each time. No audio is read.

    Args:
        manifests: Manifests of `hubert prepare`.
        out: Folder of the new manifests.
        heldout: Share of the audio of each manifest in its -dev manifest; at least one recording if there are two. With
            ten or more speakers, whole speakers are held out.

    Returns:
        Paths of the manifests.

    Raises:
        UserError: A manifest cannot be read, or one would be replaced.
    """
    within(0, LARGEST_SHARE, heldout=heldout)
    sources = [Path(path) for path in manifests]
    made: dict[Path, CutSet] = {}
    choices = []
    for name, cuts in zip(split_names(sources), read_manifests(sources), strict=True):
        train, dev, choice = split(cuts, heldout)
        choices.append(f"{name}: {choice}")
        for part, path in ((train, Path(out) / f"{name}.jsonl.gz"), (dev, Path(out) / f"{name}-dev.jsonl.gz")):
            if path.resolve() in [source.resolve() for source in sources]:
                raise UserError(f"{path}: would replace the manifest that is divided; choose another OUT")
            if part:
                check_same_audio(path, part, "choose another OUT")
                made[path] = CutSet(part)
        if not dev:
            check_held_out(Path(out) / f"{name}-dev.jsonl.gz", train, "choose another OUT")
    make_folder(Path(out), Path(out))
    write_manifests(made)
    report(made, [], [], {}, choices)
    return list(made)


def split_names(manifests: Sequence[Path]) -> list[str]:
    """Names of the manifests that `prepare_split` makes, without their endings.

    Args:
        manifests: Manifests, of which several may have the same name in different folders, or be called x and x-dev.
    """
    names: list[str] = []
    taken: set[str] = set()
    for path in manifests:
        stem = next((path.name.removesuffix(end) for end in ENDS if path.name.endswith(end)), path.name)
        candidates = chain(
            (stem, f"{path.resolve().parent.name}-{stem}"), (f"{stem}-{number}" for number in count(start=2))
        )
        name = next(name for name in candidates if taken.isdisjoint(_parts_of(name)))
        names.append(name)
        taken.update(_parts_of(name))
    return names


def _parts_of(name: str) -> tuple[str, str]:
    """Names of both parts of a manifest; that of x held out is also that of another manifest x-dev."""
    return name, f"{name}-dev"
