"""Arrays of numpy that lie in files, mapped from the disk; of numbers and bytes alone, whatever a file says."""

from pathlib import Path

import numpy as np

from hubert_lightning.errors import UserError
from hubert_lightning.files import kind_of

MAGIC = b"\x93NUMPY"


def mapped(path: Path) -> np.memmap:
    """The array in a `.npy` file, read-only.

    Raises:
        UserError: The file is missing, cut short, or no such array. The message is a reason for a sentence.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError(2, f"it is {kind_of(path)}")
        with path.open("rb") as file:
            begins = file.read(len(MAGIC)) == MAGIC
        if begins:  # of others, numpy would open archives and pickles
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(error.strerror or "it cannot be read") from error
    except Exception as error:  # the header is a line of Python, in which anything may be wrong
        raise UserError("it is cut short or damaged, or no array of numbers") from error
    raise UserError("it does not begin as an array of numpy")
