"""The cuts of several manifests as one sequence."""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np
from lhotse.cut import Cut

from hubert_lightning.data.languages import corpus_of, language_of
from hubert_lightning.data.manifest import check_audio, fingerprint, read_manifests
from hubert_lightning.data.shar import SHAR_SUFFIX, SharCuts
from hubert_lightning.errors import UserError


class Corpora(Sequence[Cut]):
    """The cuts of one or several corpora: lists in memory, and tables of Shar corpora on disk.

    Args:
        parts: One sequence of cuts for each manifest.
        names: Name of each manifest, which is the corpus of its cuts that name none.
    """

    def __init__(self, parts: Sequence[Sequence[Cut]] = (), names: Sequence[str] = ()) -> None:
        self.parts = list(parts)
        self.names = list(names) or [""] * len(self.parts)
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
        parts = [_chosen(part, keep) for part, keep in zip(self.parts, keep_by_part, strict=True)]
        return Corpora(parts, self.names)

    def ordered(self, order: Sequence[int]) -> "Corpora":
        """The same manifests in another order."""
        return Corpora([self.parts[number] for number in order], [self.names[number] for number in order])

    def named(self) -> tuple[list[tuple[str, str]], np.ndarray]:
        """Find the languages and corpora of the cuts.

        Returns:
            Pairs of a language, "" where it is not known, and a corpus, in alphabetical order; and (cuts,) int32, the
            number of each cut's pair.
        """
        numbers: dict[tuple[str, str], int] = {}
        indices = [np.empty(0, np.int32)]
        for part, name in zip(self.parts, self.names, strict=True):
            if isinstance(part, SharCuts):
                pairs, index = part.named()
                codes = [numbers.setdefault((language, corpus or name), len(numbers)) for language, corpus in pairs]
                indices.append(np.array(codes, np.int32)[index])
            else:
                of_cuts = (numbers.setdefault((language_of(cut), corpus_of(cut) or name), len(numbers)) for cut in part)
                indices.append(np.fromiter(of_cuts, np.int32, len(part)))
        ordered = sorted(numbers)
        rank = np.empty(len(ordered), np.int32)
        rank[[numbers[pair] for pair in ordered]] = np.arange(len(ordered))
        return ordered, rank[np.concatenate(indices)]

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
            bounds = zip(self.parts, self.names, pairwise(self._starts), strict=True)
            parts = [
                (part[max(first - start, 0) : end - start], name)
                for part, name, (start, stop) in bounds
                if start < end and first < stop
            ]
            return Corpora([part for part, _ in parts], [name for _, name in parts])
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
    for path in map(Path, paths):
        if path.suffix == SHAR_SUFFIX:
            SharCuts(path).check()
    cuts = listed_corpora(paths)
    check_audio(cut for part in cuts.parts if not isinstance(part, SharCuts) for cut in part)
    return cuts


def listed_corpora(paths: Sequence[Path]) -> Corpora:
    """Read manifests and tables of Shar corpora without looking for their audio.

    Args:
        paths: Manifests, and folders of Shar tables.

    Raises:
        UserError: A file is no manifest, or an utterance occurs twice.
    """
    on_disk = {path: SharCuts(path) for path in map(Path, paths) if path.suffix == SHAR_SUFFIX}
    listed = [path for path in map(Path, paths) if path not in on_disk]
    in_memory = dict(zip(listed, read_manifests(listed), strict=True))
    parts = [on_disk[path] if path in on_disk else in_memory[path] for path in map(Path, paths)]
    return Corpora(parts, [manifest_name(path) for path in paths])


def manifest_name(path: Path | str) -> str:
    """Name of a manifest or of a table of a Shar corpus: that of its file without suffixes."""
    return re.sub(r"(\.jsonl(\.gz)?|\.shar)$", "", Path(path).name)


def _chosen(part: Sequence[Cut], keep: np.ndarray) -> Sequence[Cut]:
    if isinstance(part, SharCuts):
        return part if keep.all() else part.chosen(np.flatnonzero(keep))
    return [part[index] for index in np.flatnonzero(keep).tolist()]


def lengths_of(cuts: Sequence[Cut]) -> np.ndarray:
    """Lengths of cuts at 16 kHz: (cuts,) int64."""
    return cuts.num_samples if isinstance(cuts, Corpora) else np.array([cut.num_samples for cut in cuts], np.int64)
