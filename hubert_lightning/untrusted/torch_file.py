"""Reader of untrusted files of `torch.save`, which never runs code in them.

torch's own unpickler (`weights_only=True`) makes tensors and plain containers, for the names that are listed in
`torch_stand_ins`. Other contents of such files, such as the settings of fairseq and their omegaconf, become stand-ins
that keep their state and do nothing; every other name is refused. Names are compared as Python 3 has them.
"""

import pickletools
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from pickle import PROTO, UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.serialization import DEFAULT_PROTOCOL, safe_globals

from hubert_lightning.errors import UserError
from hubert_lightning.files import check_regular
from hubert_lightning.untrusted.pickle_file import SAVE_STATE_DICT, RefusedPickle, StandIn, StandInFactory
from hubert_lightning.untrusted.pickle_rewriting import in_protocol_2
from hubert_lightning.untrusted.python_internals import forget_entry, python_3_name
from hubert_lightning.untrusted.torch_internals import storage_id, tensors_without_memory
from hubert_lightning.untrusted.torch_stand_ins import (
    ELEMENTS,
    ITEMS,
    MADE_BY_TORCH,
    REPLACED_BY_STAND_IN,
    stand_in_for,
)

MAX_TUPLE_SIZE = 10**6  # elements, those of tuples inside of it among them
CONTENTS_OF_FIRST = {
    **{"NEWOBJ": "", "REDUCE": "", "BUILD": ""},
    **dict.fromkeys(("APPEND", "APPENDS"), ELEMENTS),
    **dict.fromkeys(("SETITEM", "SETITEMS"), ITEMS),
}
"""Operations whose result on the stack is their first object, or is made of it → the contents that they put into it."""
NUM_OLD_PICKLES = 5  # in a file from before torch 1.6, ahead of its numbers
MapLocation = str | Callable[..., Any]  # as in `torch.load`
Result = TypeVar("Result")


def read_torch(
    path: Path, stand_ins: Mapping[str, StandInFactory] | None = None, map_location: MapLocation = "cpu"
) -> Any:
    """Read a file of `torch.save`.

    Args:
        path: File to read.
        stand_ins: Other stand-ins for some names: "module.name" → a function that does nothing but hold its arguments.
        map_location: Device of the tensors, as in `torch.load`.

    Returns:
        Plain containers and values, tensors mapped from the file, and objects of other packages as `StandIn`.

    Raises:
        UserError: The file is corrupt, would call something, unpacks to more than it holds, or points outside of it.
    """
    check_regular(path)
    is_archive = _tried(path, lambda: zipfile.is_zipfile(path))
    if is_archive:
        _check_archive(path)
    pickles = _tried(path, lambda: [_pickle_in_archive(path)] if is_archive else _pickles_in_old_file(path))
    protocol = max(map(_protocol, pickles))
    if protocol <= DEFAULT_PROTOCOL:
        return _read(path, path, pickles, is_archive, stand_ins or {}, map_location)
    pickles = _tried(path, lambda: [in_protocol_2(pickle) for pickle in pickles])
    with TemporaryDirectory() as folder:  # mapped memory stays valid after the file is removed
        copy = Path(folder) / "copy"
        try:
            _copy(path, copy, pickles, is_archive)
        except OSError as error:
            raise UserError(
                f"{path}: written with pickle protocol {protocol}, and no copy of it in another can be "
                f"made in {folder} ({error.strerror}); make room there, or save it with torch.save's default protocol"
            ) from error
        return _read(path, copy, pickles, is_archive, stand_ins or {}, map_location)


def _read(
    path: Path,
    file: Path,
    pickles: list[bytes],
    is_archive: bool,
    stand_ins: Mapping[str, StandInFactory],
    map_location: MapLocation,
) -> Any:
    """Read a file of protocol 2.

    Args:
        path: File that errors name.
        file: File that is read: the same file, or a rewritten copy.
        pickles: Pickles in it, all that torch's unpickler runs.
        is_archive: Whether it is a zip archive.
        stand_ins: Stand-ins of the caller.
        map_location: Device of the tensors.
    """
    names = _tried(path, lambda: dict(sorted(chain.from_iterable(map(_names_in, pickles)))))
    known = {
        name: stand_ins.get(name) or stand_in_for(name, contents)
        for name, contents in names.items()
        if name in stand_ins or REPLACED_BY_STAND_IN.fullmatch(name)
    }
    if foreign := [name for name in names if name not in known and not MADE_BY_TORCH.fullmatch(name)]:
        raise _would_call(path, foreign[0])
    with safe_globals([(stand_in, name) for name, stand_in in known.items()]):
        load = partial(torch.load, file, map_location=map_location, weights_only=True)
        if not is_archive:  # torch makes tensors before it finds their numbers missing
            with tensors_without_memory():
                _check_sizes(path, _tried(path, load))
        content = _tried(path, partial(load, mmap=is_archive))
    _check_sizes(path, content)
    return content


def _would_call(path: Path, name: str) -> UserError:
    return UserError(f"{path}: refused, the pickle would call {name}; {SAVE_STATE_DICT}")


def _tried(path: Path, read: Callable[[], Result]) -> Result:
    """Read something, and turn errors into sentences: bytes that are no file of torch may raise anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols that torch does not write; they are refused, or they open
            return read()
    except RefusedPickle as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        refused = re.search(r"Unsupported (?:global|class)[^\w]*(?:GLOBAL )?([\w.]+)", str(error))
        if isinstance(error, UnpicklingError) and refused:
            raise _would_call(path, refused[1]) from error
        raise UserError(f"{path} is corrupt, or no file of torch.save; copy or download it again") from error


def _pickle_in_archive(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(_pickle_entry(archive))


def _pickle_entry(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    [entry] = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
    return entry


def _pickles_in_old_file(path: Path) -> list[bytes]:
    pickles = []
    with path.open("rb") as file:
        for _ in range(NUM_OLD_PICKLES):
            start = file.tell()
            for _ in pickletools.genops(file):
                pass
            end = file.tell()
            file.seek(start)
            pickles.append(file.read(end - start))
    return pickles


def _protocol(pickle: bytes) -> int:
    return pickle[1] if pickle.startswith(PROTO) else 0


def _copy(path: Path, copy: Path, pickles: list[bytes], is_archive: bool) -> None:
    """Copy a file, and replace its pickles; an archive's tensors keep their positions."""
    if is_archive:
        shutil.copyfile(path, copy)
        with zipfile.ZipFile(copy, "a") as entries:
            entry = _pickle_entry(entries)
            forget_entry(entries, entry)
            entries.writestr(entry.filename, pickles[0])
        return
    with path.open("rb") as old, copy.open("wb") as new:
        for pickle in pickles:
            for _ in pickletools.genops(old):
                pass
            new.write(pickle)
        shutil.copyfileobj(old, new)


def _names_in(pickle: bytes) -> Iterator[tuple[str, str]]:
    """Find the names that a pickle would call, or has as values, and the contents that it puts into their objects.

    Yields:
        Name, and `ELEMENTS`, `ITEMS` or ""; a name that occurs several times may have several.

    Raises:
        RefusedPickle: Nested tuples hold each other twice, and would take forever to hash.
    """
    # For each object on the stack: elements of tuples, counted as often as they occur, and the name that makes it
    stack: list[tuple[int, str]] = []
    marks: list[int] = []
    memo: dict[Any, tuple[int, str]] = {}
    for operation, argument, _ in pickletools.genops(pickle):
        made_by = ""
        if operation.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            made_by = python_3_name(module, name)
            yield made_by, ""
        if operation.name == "MARK":
            marks.append(len(stack))
        elif operation.name.endswith("GET"):
            stack.append(memo[argument])
        elif operation.name.endswith("PUT"):
            memo[argument] = stack[-1]
        else:
            operands = operation.stack_before
            first = len(stack) - len(operands)
            if pickletools.markobject in operands:
                first = marks.pop() - operands.index(pickletools.markobject)
            size = 1 + sum(size for size, _ in stack[first:]) if operation.name.startswith("TUPLE") else 1
            if size > MAX_TUPLE_SIZE:
                raise RefusedPickle(f"has a tuple of over {MAX_TUPLE_SIZE} elements; it is corrupt, so copy it again")
            if operation.name in CONTENTS_OF_FIRST:
                made_by = stack[first][1]
                if made_by and CONTENTS_OF_FIRST[operation.name]:
                    yield made_by, CONTENTS_OF_FIRST[operation.name]
            stack[first:] = [(size, made_by)] * len(operation.stack_after)


def _check_archive(path: Path) -> None:
    with _tried(path, lambda: zipfile.ZipFile(path)) as archive:
        for entry in archive.infolist():
            name = PurePosixPath(entry.filename.replace("\\", "/"))
            if name.is_absolute() or ".." in name.parts:
                raise UserError(f"{path} has an entry {entry.filename!r}, outside of itself; get it elsewhere")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > entry.compress_size:
                raise UserError(
                    f"{path} has a compressed entry, {entry.filename!r}, of {entry.file_size} bytes, where torch.save "
                    "compresses none; open and save it with torch to use it"
                )


def _check_sizes(path: Path, content: Any) -> None:
    """Refuse tensors that are larger than their stored numbers, and more of them than the file can hold."""
    size, stored = path.stat().st_size, dict[int, int]()
    for tensor in _tensors(content):
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise UserError(f"{path} has a tensor that is sparse or quantized; save it dense")
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.itemsize > storage.nbytes():
            raise UserError(
                f"{path} has a tensor of shape {tuple(tensor.shape)}, of which it holds {storage.nbytes()} bytes; it "
                "is corrupt, so get it again"
            )
        stored[storage_id(tensor)] = storage.nbytes()
    if sum(stored.values()) > size:
        raise UserError(
            f"{path} has {size} bytes, and asks for {sum(stored.values())} of tensors; it is corrupt, so copy it again"
        )


def _tensors(content: Any) -> Iterator[Tensor]:
    waiting, seen = [content], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen:  # a pickle may hold a container in itself, or a thousand times
            seen.add(id(value))
            if isinstance(value, dict):
                waiting += value.values()
            elif isinstance(value, list | tuple | set):
                waiting += value
            elif isinstance(value, StandIn):
                waiting += [value.made_of, value.state]
