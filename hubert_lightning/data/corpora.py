"""What a fit reads: the cuts of several manifests, numbered on from one to the next."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np
from lhotse.cut import Cut

from hubert_lightning.data.manifest import check_audio, fingerprint, read_manifests
from hubert_lightning.data.shar import SUFFIX, SharCuts
from hubert_lightning.errors import UserError


class Corpora(Sequence[Cut]):
    """The cuts of one or several corpora: lists, and tables of Shar corpora, which stay on disk.

    Args:
        parts: One sequence of cuts for each corpus.
    """

    def __init__(self, parts: Sequence[Sequence[Cut]] = ()) -> None:
        self.parts = list(parts)
        self.sizes = [len(part) for part in self.parts]
        self._starts = np.cumsum([0, *self.sizes]).tolist()

    @property
    def on_disk(self) -> bool:
        """Whether there may be too many cuts to hold them all in memory."""
        return any(isinstance(part, SharCuts) for part in self.parts)

    @property
    def num_samples(self) -> np.ndarray:
        """Of each cut, at 16 kHz, (cuts,) int64."""
        counts = [
            part.num_samples if isinstance(part, SharCuts) else np.array([cut.num_samples for cut in part], np.int64)
            for part in self.parts
        ]
        return np.concatenate([np.empty(0, np.int64), *counts])

    @property
    def fingerprint(self) -> str:
        """Which audio this is about, in whatever order the corpora are named."""
        listed = fingerprint(cut for part in self.parts if not isinstance(part, SharCuts) for cut in part)
        if not self.on_disk:
            return listed
        tables = sorted(part.fingerprint for part in self.parts if isinstance(part, SharCuts))
        return hashlib.sha256(" ".join([listed, *tables]).encode()).hexdigest()[:16]

    def ids(self) -> Iterator[str]:
        for part in self.parts:
            yield from part.ids() if isinstance(part, SharCuts) else (cut.id for cut in part)

    def chosen(self, keep: np.ndarray) -> "Corpora":
        """The cuts for which `keep` (cuts,) bool is true."""
        return Corpora([_chosen(part, of) for part, of in zip(self.parts, self._by_part(keep), strict=True)])

    def by_id(self) -> "Corpora":
        """The same cuts in the order of their ids, in whatever order the corpora are named; as they lie on disk, if
        that is where they are."""
        return self if self.on_disk else Corpora([sorted(self, key=lambda cut: cut.id)])

    def _by_part(self, values: np.ndarray) -> list[np.ndarray]:
        return np.split(values, self._starts[1:-1])

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, place: int) -> Cut: ...
    @overload
    def __getitem__(self, place: slice) -> "Corpora": ...
    def __getitem__(self, place: int | slice) -> "Cut | Corpora":
        if isinstance(place, slice):
            first, end, _ = place.indices(len(self))
            reached = zip(self.parts, pairwise(self._starts), strict=True)
            return Corpora(
                [
                    part[max(first - start, 0) : end - start]
                    for part, (start, stop) in reached
                    if start < end and first < stop
                ]
            )
        if not 0 <= place < len(self):
            raise IndexError(place)
        part = bisect_right(self._starts, place) - 1
        return self.parts[part][place - self._starts[part]]


def ids_and_samples(cuts: Iterable[Cut]) -> Iterator[tuple[str, int]]:
    """Of every cut; without making the cuts of a corpus on disk."""
    if isinstance(cuts, Corpora):
        return zip(cuts.ids(), cuts.num_samples.tolist(), strict=True)
    return ((cut.id, cut.num_samples) for cut in cuts)


def read_corpora(paths: Sequence[Path]) -> Corpora:
    """Every corpus of these manifests, whose audio is there.

    Raises:
        UserError: A manifest is none, two have an utterance in common, or audio is missing.
    """
    if not paths:
        raise UserError("no manifest is named; make one with `hubert prepare` and give its path")
    on_disk = {path: SharCuts(path) for path in map(Path, paths) if path.suffix == SUFFIX}
    listed = [path for path in map(Path, paths) if path not in on_disk]
    for table in on_disk.values():
        table.check()
    in_memory = dict(zip(listed, read_manifests(listed), strict=True))
    check_audio(cut for part in in_memory.values() for cut in part)
    return Corpora([on_disk[path] if path in on_disk else in_memory[path] for path in map(Path, paths)])


def _chosen(part: Sequence[Cut], keep: np.ndarray) -> Sequence[Cut]:
    if isinstance(part, SharCuts):
        return part if keep.all() else part.chosen(np.flatnonzero(keep))
    return [part[place] for place in np.flatnonzero(keep).tolist()]


def lengths_of(cuts: Sequence[Cut]) -> np.ndarray:
    return cuts.num_samples if isinstance(cuts, Corpora) else np.array([cut.num_samples for cut in cuts], np.int64)
