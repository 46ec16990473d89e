"""The work that this process does now, which messages about stalls, signals and lost ranks name."""

from dataclasses import dataclass


@dataclass
class CurrentWork:
    """The current work of this process.

    Args:
        what: The work, as in "while {what}".
        count: Pieces of work begun since the process started; a count that does not grow is a stall.
        in_steps: Whether the work is batches of training, validation or test, which take seconds; other work, such as
            K-means, takes hours.
    """

    what: str = "starting"
    count: int = 0
    in_steps: bool = False


now = CurrentWork()


def note(what: str, in_steps: bool = False) -> None:
    """Record the piece of work that begins."""
    now.what, now.in_steps = what, in_steps
    now.count += 1
