"""Mistakes that a user can correct, each in one sentence, and range checks of numbers."""

import errno
import re
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec

LARGE = 2.0**62
"""Default upper bound of numbers, larger than any real count."""

FROM_A_WORKER = "Caught UserError in DataLoader worker"
"""Beginning of torch's message for an error of a loader worker; the message holds the worker's traceback."""

WRITE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Error numbers that only writing causes: no room, a quota, a size limit, a read-only disk."""

ACCESS_ERRNOS = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
"""Error numbers of a file that could not be read, which do not prove that its content is corrupt."""

UNUSABLE_ERRNOS = (*ACCESS_ERRNOS, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
"""Error numbers that no bug of this package causes: permissions, a folder in place of a file, a failing disk."""

PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "flashlight": "flashlight-text"}
"""Packages by the names of their modules, where the names differ in more than underscores."""

BROKEN_CONNECTIONS = (ConnectionError, EOFError, FileNotFoundError)
"""Errors of a connection to a process that ended."""

Explanation = Callable[[BaseException], str | None]
"""A function from an error to the sentence that explains it, or None for an error that it does not know."""

_explanations: list[Explanation] = []


class UserError(ValueError):
    """A mistake that the user can correct: one sentence that names the thing, the fact and the way out.

    `hubert` prints it without a traceback. Any other error is a bug of this package and keeps its traceback.
    """


def counted(number: int, noun: str, several: str | None = None) -> str:
    """Write a number with its noun: "1 utterance", "2 utterances".

    Args:
        number: Number of things.
        noun: Singular of the noun.
        several: Its plural, if that does not end in s.
    """
    return f"{number} {noun if number == 1 else several or noun + 's'}"


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


def answer_to(error: Exception) -> tuple[str, int] | None:
    """Return what `hubert` prints for an error in place of a traceback.

    Args:
        error: The error that ended a command.

    Returns:
        The sentence and the exit status: 2 for a mistake of the user, a full disk or a package that was not installed;
        1 if another process of the run ended first. None for a bug, whose traceback is shown.
    """
    if mistake := user_error(error) if isinstance(error, ValueError) else None:
        return str(mistake), 2
    if isinstance(error, ModuleNotFoundError) and (sentence := not_installed(error.name or "")):
        return sentence, 2
    if isinstance(error, (RuntimeError, *BROKEN_CONNECTIONS)) and (sentence := _explained(error)):
        return sentence, 1
    if isinstance(error, OSError) and error.errno in WRITE_ERRNOS:
        return (
            f"{error.filename or 'a file'}: cannot be written ({error.strerror}); finished files are kept, so make "
            "room and run the same command again",
            2,
        )
    if isinstance(error, OSError) and error.errno in UNUSABLE_ERRNOS and error.filename is not None:
        return (
            f"{error.filename}: cannot be read or written ({error.strerror}); finished files are kept, so correct "
            "that and run the same command again",
            2,
        )
    if type(error).__module__.startswith("wandb"):
        return f"W&B: {error}; or set WANDB_MODE=offline, or choose another trainer.logger", 2
    return None


def not_installed(module: str) -> str | None:
    """Say which package of this package's requirements is missing, and how to install it.

    Args:
        module: Module that could not be imported, such as "sklearn.cluster".

    Returns:
        The sentence; None if the module is installed, or belongs to no package that this one names.
    """
    top = module.partition(".")[0]
    if not top or find_spec(top) is not None:
        return None
    package = PACKAGES.get(top, top.replace("_", "-"))
    try:
        requirements = requires("hubert-lightning") or []
    except PackageNotFoundError:  # the sources without an installation
        requirements = []
    for requirement in requirements:
        versions, _, condition = (part.strip() for part in requirement.partition(";"))
        if re.split(r"[^\w.-]", versions)[0] == package:
            extra = re.search(r"extra == ['\"](.+?)['\"]", condition)
            wanted = f"hubert-lightning[{extra[1]}]" if extra else versions
            return f"{package} is not installed; install it with: pip install '{wanted}'"
    return None


def check_installed(module: str, otherwise: str = "") -> None:
    """Check that a module of this package's requirements is installed, before work starts that imports it.

    Args:
        module: Module that will be imported.
        otherwise: What the user can do without it, such as "or add --report false".

    Raises:
        UserError: It is not installed.
    """
    if sentence := not_installed(module):
        raise UserError(f"{sentence}{otherwise and ', '}{otherwise}")


def explains_errors(function: Explanation) -> Explanation:
    """Register a function that explains errors which the end of another process caused.

    The modules that start processes register theirs when they are imported, so that this one needs none of them.
    """
    _explanations.append(function)
    return function


def _explained(error: Exception) -> str | None:
    return next((sentence for explanation in _explanations if (sentence := explanation(error))), None)


def within(least: float, most: float = LARGE, **values: float | Sequence[float] | None) -> None:
    """Check that numbers lie within a range and are not NaN.

    Args:
        least: Smallest allowed value.
        most: Largest allowed value.
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
