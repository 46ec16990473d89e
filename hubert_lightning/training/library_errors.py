"""Errors of Lightning and other libraries about mistakes in the config, turned into one sentence each."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException

from hubert_lightning.errors import UserError
from hubert_lightning.parsing import CLASS_PROBLEM

INSTALL = "install that package, or choose another class in the config (trainer.logger, trainer.callbacks)"


@contextmanager
def config_errors() -> Iterator[None]:
    """Turn errors that report a mistake in the config into `UserError`s; bugs keep their type."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"{one_line(error)}; correct the config") from error
    except RuntimeError as error:
        if not str(error).startswith("Early stopping conditioned on metric"):
            raise
        raise UserError(f"EarlyStopping: {one_line(error)}; correct its monitor") from error
    except ImportError as error:
        if str(error.name).startswith("hubert_lightning"):
            raise
        raise UserError(f"{one_line(error)}; {INSTALL}") from error
    except ValueError as error:
        if "val_check_interval" in str(error) and not str(error).startswith("trainer."):
            raise UserError(
                f"trainer.val_check_interval: {one_line(error)}; lower it, or set trainer.check_val_every_n_epoch to "
                "null to count batches over epochs"
            ) from error
        chain = [error, *_causes(error)]
        problem = next((cause for cause in chain if str(cause).startswith(CLASS_PROBLEM)), None)
        if problem is None or isinstance(chain[-1], UserError):
            raise
        way = INSTALL if isinstance(chain[-1], ImportError) else "correct the config"
        raise UserError(f"{one_line(problem)}; {way}") from error


def one_line(error: BaseException) -> str:
    """The message of an error on one line, without addresses of objects."""
    message = re.sub(r"<(?:[\w.]+\.)?(\w+) object at 0x[0-9a-f]+>", r"\1", str(error))
    return " ".join(message.split()).rstrip(".") or type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The errors behind an error, the first cause last."""
    while cause := error.__cause__ or error.__context__:
        yield cause
        error = cause
