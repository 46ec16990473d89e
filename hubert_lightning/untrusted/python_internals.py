"""Private parts of Python for reading pickles; a test explains what to correct if a new Python moves them."""

import _compat_pickle
import pickle
import zipfile
from typing import Any

PythonUnpickler: Any = pickle._Unpickler
"""pickle's unpickler in Python, whose operations a subclass can replace. The one in C also reads beyond the end of a
pickle, where arrays of joblib begin."""


def python_3_name(module: str, name: str) -> str:
    """Translate the name of a global in a pickle of protocol 2 or before.

    Python 3 writes such pickles, as torch.save does, with the names of Python 2: `int` as `__builtin__ long`.

    Args:
        module: Module in the pickle, such as `copy_reg`.
        name: Name in that module, such as `_reconstructor`.

    Returns:
        "module.name" in Python 3; unchanged where the names are the same.
    """
    renamed = _compat_pickle.IMPORT_MAPPING.get(module, module), name
    return ".".join(_compat_pickle.NAME_MAPPING.get((module, name), renamed))


def forget_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Remove an entry from the directory of a zip archive that is open to append; its bytes stay."""
    archive.filelist.remove(entry)
    del archive.NameToInfo[entry.filename]
