"""What this process is doing and how far it is, for the sentence of an interrupt, a stall or a rank that ended."""

from dataclasses import dataclass


@dataclass
class Progress:
    """The current work of this process.

    Args:
        what: The work, as in "while {what}".
        count: Pieces of work begun since the process started; a count that stands still is a stall.
        in_steps: Whether the work is batches of training, validation or test, which take seconds; other work, such as
            K-means, takes hours.
    """

    what: str = "starting"
    count: int = 0
    in_steps: bool = False


now = Progress()


def note(what: str, in_steps: bool = False) -> None:
    """Say which piece of work begins."""
    now.what, now.in_steps = what, in_steps
    now.count += 1
