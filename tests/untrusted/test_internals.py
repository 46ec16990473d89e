"""The private parts of Python and torch that reading others' files uses: each is where we look for it."""

import zipfile
from pathlib import Path

import pytest
import torch

from hubert_lightning.untrusted import python_internals, torch_internals


def test_pickle_has_an_unpickler_in_python() -> None:
    sentence = "pickle._Unpickler has other operations; look how pickle.py of this Python replaces them, and adapt "
    operations = {"find_class", "get_extension", "load_build", "load_setitem", "load_setitems", "load_dict"}
    assert operations <= set(dir(python_internals.PythonUnpickler)), sentence + "untrusted/pickle_file.py"
    assert isinstance(python_internals.PythonUnpickler.dispatch, dict), sentence + "untrusted/pickle_file.py"


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        ("__builtin__", "long", "builtins.int"),
        ("copy_reg", "_reconstructor", "copyreg._reconstructor"),
        ("numpy", "dtype", "numpy.dtype"),
    ],
)
def test_names_of_python_2_are_translated(module: str, name: str, expected: str) -> None:
    sentence = "_compat_pickle has no such table; copy the two tables of an earlier Python into python_internals.py"
    assert python_internals.python_3_name(module, name) == expected, sentence


def test_an_entry_of_a_zip_archive_can_be_replaced(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", "old")
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        python_internals.forget_entry(archive, archive.getinfo("a"))
        archive.writestr("a", "new")
    sentence = "zipfile keeps its directory elsewhere; adapt python_internals.forget_entry"
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert [entry.filename for entry in archive.infolist()] == ["a"], sentence
        assert archive.read("a") == b"new", sentence


def test_torch_loads_tensors_without_memory(tmp_path: Path) -> None:
    torch.save([torch.ones(3), torch.zeros(2)], tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with torch_internals.tensors_without_memory():
        first, second = torch.load(tmp_path / "a.pt", weights_only=True)
    sentence = "FakeTensorMode or Storage._cdata of torch changed; adapt untrusted/torch_internals.py"
    assert (first.shape, second.untyped_storage().nbytes()) == ((3,), 8), sentence
    assert torch_internals.storage_id(first) != torch_internals.storage_id(second), sentence
    assert torch_internals.storage_id(first) == torch_internals.storage_id(first[1:]), sentence
