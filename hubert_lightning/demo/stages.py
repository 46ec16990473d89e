"""The stages of a long command, announced with the time that is left."""

from collections.abc import Mapping
from time import monotonic

from hubert_lightning.console import say


class Stages:
    """Announces the stages of a long command, with the time left of all of them.

    Args:
        seconds: Expected duration of each stage by its name, in order. The measured durations of finished stages
            correct the estimates of the others.
    """

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self._seconds = dict(seconds)
        self._names = list(seconds)
        self._began: dict[str, float] = {}

    def begin(self, name: str) -> None:
        """Print that a stage begins, such as "stage 3 of 8: iteration 1, about 2 minutes (6 minutes left of all)".

        Args:
            name: Name of the stage.
        """
        number = self._names.index(name)
        self._began[name] = monotonic()
        following = self._names[number:]
        factor = self._factor(number)
        stage, left = factor * self._seconds[name], factor * sum(self._seconds[later] for later in following)
        say(f"stage {number + 1} of {len(self._names)}: {name}, about {minutes(stage)} ({minutes(left)} left of all)")

    def _factor(self, number: int) -> float:
        """Measured time of the stages before this one, relative to the expected time; 1 if too little is measured."""
        expected = sum(self._seconds[name] for name in self._names[:number])
        if expected < 0.05 * sum(self._seconds.values()) or not self._began:
            return 1.0
        return (monotonic() - min(self._began.values())) / expected


def minutes(seconds: float) -> str:
    """Format a duration for a reader: "40 seconds", "1 minute", "12 minutes", "3 h 5 min"."""
    if seconds < 45:
        return f"{max(round(seconds / 5) * 5, 5)} seconds"
    rounded = max(round(seconds / 60), 1)
    if rounded < 120:
        return f"{rounded} minute{'s' * (rounded > 1)}"
    return f"{rounded // 60} h {rounded % 60} min"
