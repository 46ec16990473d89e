"""The cuts of several manifests as one sequence."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np
from lhotse.cut import Cut

from hubert_lightning.data.manifest import check_audio, fingerprint, read_manifests
from hubert_lightning.data.shar import SHAR_SUFFIX, SharCuts
from hubert_lightning.errors import UserError


class Corpora(Sequence[Cut]):
    """The cuts of one or several corpora: lists in memory, and tables of Shar corpora on disk.

    Args:
        parts: One sequence of cuts for each corpus.
    """

    def __init__(self, parts: Sequence[Sequence[Cut]] = ()) -> None:
        self.parts = list(parts)
        self.sizes = [len(part) for part in self.parts]
        self._starts: list[int] = np.cumsum([0, *self.sizes]).tolist()

    @property
    def on_disk(self) -> bool:
        """Whether a corpus stays on disk because its cuts may not fit in memory."""
        return any(isinstance(part, SharCuts) for part in self.parts)

    @property
    def num_samples(self) -> np.ndarray:
        """Lengths of the cuts at 16 kHz: (cuts,) int64."""
        counts = [
            part.num_samples if isinstance(part, SharCuts) else np.array([cut.num_samples for cut in part], np.int64)
            for part in self.parts
        ]
        return np.concatenate([np.empty(0, np.int64), *counts])

    @property
    def fingerprint(self) -> str:
        """Identity of the audio, whatever the order of the corpora."""
        listed = fingerprint(cut for part in self.parts if not isinstance(part, SharCuts) for cut in part)
        if not self.on_disk:
            return listed
        tables = sorted(part.fingerprint for part in self.parts if isinstance(part, SharCuts))
        return hashlib.sha256(" ".join([listed, *tables]).encode()).hexdigest()[:16]

    def ids(self) -> Iterator[str]:
        """Ids of the cuts."""
        for part in self.parts:
            yield from part.ids() if isinstance(part, SharCuts) else (cut.id for cut in part)

    def chosen(self, keep: np.ndarray) -> "Corpora":
        """Choose some of the cuts.

        Args:
            keep: (cuts,) bool, true for the cuts to keep.
        """
        keep_by_part = self._by_part(keep)
        return Corpora([_chosen(part, keep) for part, keep in zip(self.parts, keep_by_part, strict=True)])

    def by_id(self) -> "Corpora":
        """The same cuts in the order of their ids; cuts of a corpus on disk keep the order on disk."""
        return self if self.on_disk else Corpora([sorted(self, key=lambda cut: cut.id)])

    def _by_part(self, values: np.ndarray) -> list[np.ndarray]:
        return np.split(values, self._starts[1:-1])

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Cut: ...
    @overload
    def __getitem__(self, index: slice) -> "Corpora": ...
    def __getitem__(self, index: int | slice) -> "Cut | Corpora":
        if isinstance(index, slice):
            first, end, _ = index.indices(len(self))
            bounds = zip(self.parts, pairwise(self._starts), strict=True)
            return Corpora(
                [
                    part[max(first - start, 0) : end - start]
                    for part, (start, stop) in bounds
                    if start < end and first < stop
                ]
            )
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._starts, index) - 1
        return self.parts[part][index - self._starts[part]]


def ids_and_samples(cuts: Iterable[Cut]) -> Iterator[tuple[str, int]]:
    """Id and number of samples of each cut, without making the cuts of a corpus on disk."""
    if isinstance(cuts, Corpora):
        return zip(cuts.ids(), cuts.num_samples.tolist(), strict=True)
    return ((cut.id, cut.num_samples) for cut in cuts)


def read_corpora(paths: Sequence[Path]) -> Corpora:
    """Read manifests and tables of Shar corpora, and check that their audio exists.

    Args:
        paths: Manifests, and folders of Shar tables.

    Returns:
        The cuts, in the order of the paths.

    Raises:
        UserError: A file is no manifest, an utterance occurs twice, or audio is missing.
    """
    if not paths:
        raise UserError("no manifest is named; make one with `hubert prepare` and give its path")
    on_disk = {path: SharCuts(path) for path in map(Path, paths) if path.suffix == SHAR_SUFFIX}
    listed = [path for path in map(Path, paths) if path not in on_disk]
    for table in on_disk.values():
        table.check()
    in_memory = dict(zip(listed, read_manifests(listed), strict=True))
    check_audio(cut for part in in_memory.values() for cut in part)
    return Corpora([on_disk[path] if path in on_disk else in_memory[path] for path in map(Path, paths)])


def _chosen(part: Sequence[Cut], keep: np.ndarray) -> Sequence[Cut]:
    if isinstance(part, SharCuts):
        return part if keep.all() else part.chosen(np.flatnonzero(keep))
    return [part[index] for index in np.flatnonzero(keep).tolist()]


def lengths_of(cuts: Sequence[Cut]) -> np.ndarray:
    """Lengths of cuts at 16 kHz: (cuts,) int64."""
    return cuts.num_samples if isinstance(cuts, Corpora) else np.array([cut.num_samples for cut in cuts], np.int64)
