"""Files of `torch.save` that somebody else wrote, read without running anything that is in them.

torch's own unpickler (`weights_only=True`) makes tensors and plain containers, for the names that are listed here. What
else such files hold, the settings of fairseq and their omegaconf, becomes a stand-in that keeps its state and does
nothing; any other name is refused. Names are compared as Python 3 has them (`name_of`), whoever wrote the file.
"""

import pickletools
import re
import shutil
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from pickle import PROTO, UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import DEFAULT_PROTOCOL, safe_globals

from hubert_lightning.errors import UserError
from hubert_lightning.files import check_regular
from hubert_lightning.untrusted.pickle_file import NUMBERS, STATE_ALONE, Refusal, in_protocol_2, name_of

MADE_BY_TORCH = re.compile(
    r"collections\.(OrderedDict|Counter)|builtins\.set|_codecs\.encode"
    r"|torch\.(Size|device|bool|(b?float|u?int|complex)\w*|\w*Storage|storage\.\w*Storage)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
)
"""Names that torch's unpickler may call: none of them makes more than the file holds."""

STANDS_FOR = re.compile(
    r"(fairseq|omegaconf|pytorch_lightning|lightning|lightning_fabric)\.[\w.]+"
    r"|argparse\.Namespace|types\.(GenericAlias|SimpleNamespace|UnionType)|_?operator\.getitem|copyreg\._reconstructor"
    r"|typing\.\w+|enum\.\w+|pathlib\.\w+|uuid\.UUID|decimal\.Decimal|datetime\.\w+"
    r"|numpy\.(core|_core)\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)|numpy\.random\.[\w.]+"
    r"|numpy\.(dtype|dtypes\.\w+|ndarray|bool_?|str_?|bytes_|object_|void|(int|uint|float|complex)\d+)"
    r"|builtins\.(int|float|complex|bool|str|bytes|list|dict|tuple|frozenset|range|slice|object|type|Ellipsis)"
    r"|collections\.(defaultdict|deque|UserDict|UserList|UserString)"
)
"""Names that a stand-in takes the place of: data, and types that are said to be what data is of."""

LARGEST_TUPLE = 10**6  # elements, those of tuples inside of it among them
ELEMENTS, ITEMS = "elements", "items"
"""What a pickle puts into an object that it made of a class: into a list's, and into a dictionary's."""
KEEP_FIRST = {"NEWOBJ": "", "REDUCE": "", "BUILD": ""} | dict.fromkeys(("APPEND", "APPENDS"), ELEMENTS)
KEEP_FIRST |= dict.fromkeys(("SETITEM", "SETITEMS"), ITEMS)
"""Operations that leave on the stack what they make of its first object, or that object, and what they put into it."""
PICKLES = 5  # in a file from before torch 1.6, ahead of its numbers


class StandIn:
    """Takes the place of an object of a class that is not imported: what it was made of, and the state it was given.

    `read_torch` makes a class of this for every name, so that one which is given as a value says what it stands for.
    """

    name: str
    made_of: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *made_of: Any) -> Any:  # which is all that an unpickler may call
        made = super().__new__(cls)
        made.made_of = made_of
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class StandInDict(StandIn):
    """Takes the place of a class of dictionaries: torch's unpickler puts items into plain ones alone."""

    def __new__(cls, *made_of: Any) -> Any:
        return OrderedDict()  # of which it also changes the state


class StandInList(StandIn):
    """Takes the place of a class of lists, for the same reason."""

    def __new__(cls, *made_of: Any) -> Any:
        return []


def _reconstructed(kind: Any, *base_and_state: Any) -> StandIn:
    """Takes the place of `copyreg._reconstructor`, by which protocols 0 and 1 make any object."""
    if not (isinstance(kind, type) and issubclass(kind, StandIn)):
        raise Refusal("makes an object of something that is no class; it is damaged, so get it again")
    return kind()


def _no_items(*made_of: Any) -> list[Any]:
    return []


DICTIONARIES = ("collections.defaultdict", "AttributeDict", "DotDict")  # the ends of names of their classes


def _stand_in(name: str, filled: str) -> Callable:
    """What takes the place of a name; `filled` says what a pickle puts into what that makes, as of `_names_in`."""
    if name == "copyreg._reconstructor":
        return _reconstructed
    if name == "collections.deque":
        return _no_items  # they follow
    kind = StandInDict if filled == ITEMS or name.endswith(DICTIONARIES) else StandInList if filled else StandIn
    return type("StandIn", (kind,), {"name": name})


def read_torch(
    path: Path, stand_ins: Mapping[str, Callable] | None = None, map_location: str | Callable = "cpu"
) -> Any:
    """What `torch.save` wrote, its tensors mapped from the file, objects of other packages as `StandIn`.

    Args:
        path: File to read.
        stand_ins: Other stand-ins for some names: "module.name" → a function that does nothing but hold its arguments.
        map_location: As of `torch.load`.

    Raises:
        UserError: The file is damaged, would call something, unpacks to more than it holds, or points outside of it.
    """
    check_regular(path)
    archive = _sound(path, lambda: zipfile.is_zipfile(path))
    if archive:
        _check_archive(path)
    pickles = _sound(path, lambda: [_pickle_in_archive(path)] if archive else _pickles_in_old_file(path))
    protocol = max(map(_protocol, pickles))
    if protocol <= DEFAULT_PROTOCOL:
        return _read(path, path, pickles, archive, stand_ins or {}, map_location)
    pickles = _sound(path, lambda: [in_protocol_2(pickle) for pickle in pickles])
    with TemporaryDirectory() as folder:  # what is mapped from a file there stays when its name goes
        copy = Path(folder) / "copy"
        try:
            _copy(path, copy, pickles, archive)
        except OSError as error:
            raise UserError(
                f"{path}: written with pickle protocol {protocol}, and no copy of it in another can be "
                f"made in {folder} ({error.strerror}); make room there, or save it with torch.save's default protocol"
            ) from error
        return _read(path, copy, pickles, archive, stand_ins or {}, map_location)


def _read(
    path: Path,
    file: Path,
    pickles: list[bytes],
    archive: bool,
    stand_ins: Mapping[str, Callable],
    map_location: str | Callable,
) -> Any:
    """What a file of protocol 2 holds.

    Args:
        path: File that errors name.
        file: File that is read: that one, or its copy.
        pickles: Pickles in it, all that torch's unpickler runs.
        archive: Whether it is a zip archive.
        stand_ins: As of `read_torch`.
        map_location: As of `torch.load`.
    """
    names = _sound(path, lambda: dict(sorted(chain.from_iterable(map(_names_in, pickles)))))
    known = {
        name: stand_ins.get(name) or _stand_in(name, filled)
        for name, filled in names.items()
        if name in stand_ins or STANDS_FOR.fullmatch(name)
    }
    if foreign := [name for name in names if name not in known and not MADE_BY_TORCH.fullmatch(name)]:
        raise _would_call(path, foreign[0])
    with safe_globals([(stand_in, name) for name, stand_in in known.items()]):
        load = partial(torch.load, file, map_location=map_location, weights_only=True)
        if not archive:  # its tensors would be made before they are found to be missing
            with FakeTensorMode():
                _check_sizes(path, _sound(path, load))
        content = _sound(path, partial(load, mmap=archive))
    _check_sizes(path, content)
    return content


def _would_call(path: Path, name: str) -> UserError:
    return UserError(f"{path}: refused, the pickle would call {name}; {STATE_ALONE}")


def plain(value: Any) -> Any:
    """Settings as plain dicts, lists and values, whichever of fairseq's classes they were kept in.

    Raises:
        UserError: Something holds itself.
    """
    return _plain(value, {})


def _plain(value: Any, done: dict[int, Any]) -> Any:
    if isinstance(value, type):  # int, where settings say of which type something is
        return value.name if issubclass(value, StandIn) else f"{value.__module__}.{value.__qualname__}"
    if not isinstance(value, StandIn | dict | list | tuple):
        return value
    if id(value) in done:
        if done[id(value)] is done:
            raise UserError("settings that hold themselves; the file is damaged, so get it again")
        return done[id(value)]
    done[id(value)] = done  # until it is known: a pickle may hold a thing a thousand times, or in itself
    made: Any
    if isinstance(value, StandIn) and value.name.endswith(".multiarray.scalar"):
        made = _number(*value.made_of)
    elif isinstance(value, StandIn) and value.name.startswith("pathlib."):
        made = str(PurePosixPath(*value.made_of))
    elif isinstance(value, StandIn):
        inner = value.state if value.state is not None else (value.made_of or (None,))[0]  # an enumeration's value
        if isinstance(value.state, dict):  # a Namespace, a dictionary of symbols, omegaconf's containers and values
            inner = next((inner[key] for key in ("_content", "_val") if key in inner), inner)
        made = _plain(inner, done)
    elif isinstance(value, dict):
        made = {str(key): _plain(inner, done) for key, inner in value.items()}
    else:
        made = [_plain(inner, done) for inner in value]
    done[id(value)] = made
    return made


def _number(dtype: Any, content: Any) -> Any:
    """A scalar of numpy as one of Python; of what is no number, its dtype's code.

    Raises:
        TypeError: It has no dtype, or not as many bytes as that.
    """
    code, order = dtype.made_of[0], dtype.state[1] if dtype.state else "="
    if not NUMBERS.fullmatch(code):
        return code
    if order not in ("<", ">", "=", "|") or len(content) != int(code[1]):
        raise TypeError(f"a number of dtype {code} that has {len(content)} bytes")
    return np.frombuffer(content, order.replace("|", "=") + code)[0].item()


def _sound(path: Path, read: Callable[[], Any]) -> Any:
    """What is read, or a sentence: bytes that are no file of torch make it raise whatever there is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols that torch does not write; they are refused or they open
            return read()
    except Refusal as error:  # of a stand-in
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        asked = re.search(r"Unsupported (?:global|class)[^\w]*(?:GLOBAL )?([\w.]+)", str(error))
        if isinstance(error, UnpicklingError) and asked:
            raise _would_call(path, asked[1]) from error
        raise UserError(f"{path} is damaged, or no file of torch.save; copy or download it again") from error


def _pickle_in_archive(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(_pickle_entry(archive))


def _pickle_entry(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    [entry] = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
    return entry


def _pickles_in_old_file(path: Path) -> list[bytes]:
    pickles = []
    with path.open("rb") as file:
        for _ in range(PICKLES):
            start = file.tell()
            for _ in pickletools.genops(file):
                pass
            end = file.tell()
            file.seek(start)
            pickles.append(file.read(end - start))
    return pickles


def _protocol(pickle: bytes) -> int:
    return pickle[1] if pickle.startswith(PROTO) else 0


def _copy(path: Path, copy: Path, pickles: list[bytes], archive: bool) -> None:
    """Copy a file with other pickles in the place of its own; an archive's tensors stay where they are in it."""
    if archive:
        shutil.copyfile(path, copy)
        with zipfile.ZipFile(copy, "a") as entries:
            entry = _pickle_entry(entries)
            entries.filelist.remove(entry)
            del entries.NameToInfo[entry.filename]
            entries.writestr(entry.filename, pickles[0])
        return
    with path.open("rb") as old, copy.open("wb") as new:
        for pickle in pickles:
            for _ in pickletools.genops(old):
                pass
            new.write(pickle)
        shutil.copyfileobj(old, new)


def _names_in(pickle: bytes) -> Iterator[tuple[str, str]]:
    """The names of all that a pickle would call, or has as values, and what it puts into what they make.

    Yields:
        Name, and `ELEMENTS`, `ITEMS` or "" for nothing; a name that occurs several times may have several.

    Raises:
        Refusal: It has nested tuples that would take forever to hash, each of which holds another twice.
    """
    # Of what would lie on the stack: elements of tuples, counted as often as they occur; and the name it is made by
    stack: list[tuple[int, str]] = []
    marks: list[int] = []
    memo: dict[Any, tuple[int, str]] = {}
    for operation, argument, _ in pickletools.genops(pickle):
        made_by = ""
        if operation.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            made_by = name_of(module, name)
            yield made_by, ""
        if operation.name == "MARK":
            marks.append(len(stack))
        elif operation.name.endswith("GET"):
            stack.append(memo[argument])
        elif operation.name.endswith("PUT"):
            memo[argument] = stack[-1]
        else:
            taken = operation.stack_before
            first = len(stack) - len(taken)
            if pickletools.markobject in taken:
                first = marks.pop() - taken.index(pickletools.markobject)
            size = 1 + sum(size for size, _ in stack[first:]) if operation.name.startswith("TUPLE") else 1
            if size > LARGEST_TUPLE:
                raise Refusal(f"has a tuple of more than {LARGEST_TUPLE} elements; it is damaged, so get it again")
            if operation.name in KEEP_FIRST:
                made_by = stack[first][1]
                if made_by and KEEP_FIRST[operation.name]:
                    yield made_by, KEEP_FIRST[operation.name]
            stack[first:] = [(size, made_by)] * len(operation.stack_after)


def _check_archive(path: Path) -> None:
    with _sound(path, lambda: zipfile.ZipFile(path)) as archive:
        for entry in archive.infolist():
            place = PurePosixPath(entry.filename.replace("\\", "/"))
            if place.is_absolute() or ".." in place.parts:
                raise UserError(f"{path} has an entry {entry.filename!r}, outside of itself; get it elsewhere")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > entry.compress_size:
                raise UserError(
                    f"{path} has a compressed entry, {entry.filename!r}, of {entry.file_size} bytes, where torch.save "
                    "compresses none; open and save it with torch to use it"
                )


def _check_sizes(path: Path, content: Any) -> None:
    """Refuse tensors that are larger than what is stored of them, and more of them than the file can hold."""
    size, stored = path.stat().st_size, dict[int, int]()
    for tensor in _tensors(content):
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise UserError(f"{path} has a tensor that is sparse or quantized; save it dense")
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.itemsize > storage.nbytes():
            raise UserError(
                f"{path} has a tensor of shape {tuple(tensor.shape)}, of which it holds {storage.nbytes()} bytes; it "
                "is damaged, so get it again"
            )
        stored[storage._cdata] = storage.nbytes()
    if sum(stored.values()) > size:
        raise UserError(
            f"{path} has {size} bytes, and asks for {sum(stored.values())} of tensors; it is damaged, so get it again"
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    waiting, seen = [value], set[int]()
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            yield one
        elif id(one) not in seen:  # a pickle may hold a thing in itself, or a thousand times
            seen.add(id(one))
            if isinstance(one, dict):
                waiting += one.values()
            elif isinstance(one, list | tuple | set):
                waiting += one
            elif isinstance(one, StandIn):
                waiting += [one.made_of, one.state]
