"""Bit rates of units: of all frames, of runs, and of the tokens of an encoding."""

from collections import Counter
from collections.abc import Sequence
from math import log2


class BitRates:
    """Counts of the symbols of recordings.

    The bit rate is the number of symbols per second times the entropy of their distribution (ZeroSpeech 2019, §4.3).
    Durations are not counted.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._counts: dict[str, Counter[int]] = {}

    def add(
        self,
        seconds: float,
        units: Sequence[int],
        durations: Sequence[int] | None,
        tokens: Sequence[int] | None = None,
    ) -> None:
        """Count a recording.

        Args:
            seconds: Duration of the recording.
            units: Unit of each frame, or of each run.
            durations: Frames of each run; None if `units` are those of frames.
            tokens: Tokens of the runs.
        """
        self._seconds += seconds
        if durations is None:
            self._count("units").update(units)
            return
        frames = self._count("units")
        for unit, duration in zip(units, durations, strict=True):
            frames[unit] += duration
        self._count("runs").update(units)
        if tokens is not None:
            self._count("tokens").update(tokens)

    def _count(self, name: str) -> Counter[int]:
        return self._counts.setdefault(name, Counter())

    def rates(self) -> dict[str, tuple[float, float]]:
        """Symbols per second and bits per second of "units", "runs" and "tokens", as far as they were counted."""
        if not self._seconds:
            return {}
        return {
            name: (counts.total() / self._seconds, counts.total() / self._seconds * _entropy(counts))
            for name, counts in self._counts.items()
        }

    def sentence(self) -> str:
        """Both rates of every kind of symbol in one line."""
        names = {"units": "units", "runs": "without repetitions", "tokens": "BPE"}
        parts = [f"{names[name]} {rate:.1f} per s, {bits:.0f} bit/s" for name, (rate, bits) in self.rates().items()]
        return "; ".join(parts)


def _entropy(counts: Counter[int]) -> float:
    """Entropy in bits."""
    total = counts.total()
    return sum(count / total * log2(total / count) for count in counts.values() if count)
