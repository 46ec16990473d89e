"""Mistakes that a user can correct, each in one sentence, and checks of the numbers that a user gives."""

from collections.abc import Sequence

LARGE = 2.0**62
"""More than any run has of anything: the default upper bound, which refuses infinity."""

FROM_A_WORKER = "Caught UserError in DataLoader worker"
"""How torch begins the message of an error that it raises again from a loader worker, with its traceback inside."""


class UserError(ValueError):
    """A mistake that the user can correct: one sentence that names the thing, the fact and the way out.

    `hubert` prints it without a traceback. Any other error is a bug of this package and keeps its traceback.
    """


def user_error(error: BaseException | None) -> UserError | None:
    """Find the user's mistake behind an error.

    Args:
        error: The error that ended a command. jsonargparse and Lightning wrap errors of the classes that they build;
            torch repeats those of loader workers with the worker's traceback in the message.

    Returns:
        The `UserError` that caused it, or None if it is a bug.
    """
    while error is not None:
        if isinstance(error, UserError):
            message = str(error)
            if message.startswith(FROM_A_WORKER):
                return UserError(message.rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].strip())
            return error
        error = error.__cause__ or error.__context__
    return None


def within(least: float, most: float = LARGE, **values: float | Sequence[float] | None) -> None:
    """Check that numbers lie in a range and are not NaN.

    Args:
        least: Smallest value that is allowed.
        most: Largest value that is allowed.
        **values: Numbers by the name of their argument, one or several each; None is allowed.

    Raises:
        UserError: A number lies outside the range.
    """
    for name, value in values.items():
        several = isinstance(value, Sequence)
        for number in value if isinstance(value, Sequence) else [value]:
            if number is not None and not least <= number <= most:
                which = f"{name} has {number}" if several else f"{name} is {number}"
                end = "on" if most == LARGE else f"to {most}"
                raise UserError(f"{which}; it is a number from {least} {end}")
