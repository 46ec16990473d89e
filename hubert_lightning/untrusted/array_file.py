"""Arrays of numpy in files, mapped from the disk: numbers and bytes alone, whatever the file says."""

from pathlib import Path
from typing import Any

import numpy as np

from hubert_lightning.errors import UserError
from hubert_lightning.files import kind_of

MAGIC = b"\x93NUMPY"


def mapped(path: Path) -> np.memmap[Any, np.dtype[Any]]:
    """Map the array in a `.npy` file, read-only.

    Args:
        path: Path of the file.

    Raises:
        UserError: The file is missing, truncated, or no such array. The message is a reason for a sentence.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError(2, f"it is {kind_of(path)}")
        with path.open("rb") as file:
            is_array = file.read(len(MAGIC)) == MAGIC
        if is_array:  # numpy would open other files as archives and pickles
            array: np.memmap[Any, np.dtype[Any]] = np.load(path, mmap_mode="r", allow_pickle=False)
            return array
    except OSError as error:
        raise UserError(error.strerror or "it cannot be read") from error
    except Exception as error:  # the header is a line of Python, in which anything may be wrong
        raise UserError("it is truncated or corrupt, or no array of numbers") from error
    raise UserError("it does not begin as an array of numpy")
