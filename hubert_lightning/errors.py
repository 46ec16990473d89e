"""Numbers that a user gives, refused by name where no run can have them."""

from collections.abc import Sequence

LARGE = 2.0**62
"""More than any run has of anything, where only negative values and infinity make no sense."""


def within(least: float, most: float = LARGE, **values: float | Sequence[float] | None) -> None:
    """Raise `ValueError` if one of these numbers is outside of a range, or no number (NaN).

    Args:
        least: Smallest value that is allowed.
        most: Largest.
        **values: Numbers by the name of their argument, one or several each; None is left alone.
    """
    for name, value in values.items():
        several = isinstance(value, Sequence)
        for number in value if isinstance(value, Sequence) else [value]:
            if number is not None and not least <= number <= most:
                which = f"{name} has {number}" if several else f"{name} is {number}"
                end = "on" if most == LARGE else f"to {most}"
                raise ValueError(f"{which}; it is a number from {least} {end}")
