"""Files of `torch.save` that somebody else wrote, read without running anything that is in them.

torch's own unpickler (`weights_only=True`) makes tensors and plain containers. What else such files hold, the settings
of fairseq and their omegaconf, becomes a stand-in that keeps its state and does nothing; any other name is refused.
"""

import re
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

STANDS_FOR = re.compile(
    r"(fairseq|omegaconf)\.[\w.]+|argparse\.Namespace|typing\.(Any|Union|Optional|Dict|List|Tuple)"
    r"|enum\.\w+|pathlib\.\w+|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)|numpy\.(dtype|ndarray|float64)"
    r"|builtins\.(int|float|str|bool|list|dict|tuple)"
)
"""Names in a file that a stand-in takes the place of: data, whatever it is called."""

IN_OLD_FILES = (
    "argparse.Namespace",
    "fairseq.data.dictionary.Dictionary",
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    "typing.Any",
)
"""The same for files from before torch 1.6, which do not list their names."""


class StandIn:
    """Takes the place of an object of a class that is not imported: what it was made of, and the state it was given."""

    made_of: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *made_of: Any) -> "StandIn":  # which is all that an unpickler may call
        made = super().__new__(cls)
        made.made_of = made_of
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote, its tensors mapped from the file, objects of other packages as `StandIn`.

    Raises:
        ValueError: The file is damaged, asks for code, unpacks to more than it holds, or reaches outside of itself.
    """
    archive = zipfile.is_zipfile(path)
    names: set[str] = set(IN_OLD_FILES)
    if archive:
        _check_archive(path)
        names = set(_sound(path, lambda: get_unsafe_globals_in_checkpoint(path)))
    if foreign := sorted(name for name in names if not STANDS_FOR.fullmatch(name)):
        raise ValueError(f"{path} asks for {foreign[0]}, which is no data; take its weights alone")
    with safe_globals([(StandIn, name) for name in names]):
        load = partial(torch.load, path, map_location="cpu", weights_only=True)
        if not archive:  # its tensors would be made before they are found to be missing
            with FakeTensorMode():
                _check_sizes(path, _sound(path, load))
        content = _sound(path, partial(load, mmap=archive))
    _check_sizes(path, content)
    return content


def _sound(path: Path, read: Callable[[], Any]) -> Any:
    """What torch reads, or a sentence: bytes that are no file of its own make it raise whatever there is."""
    try:
        return read()
    except Exception as error:
        asked = re.search(r"Unsupported (?:global|class)[^\w]*(?:GLOBAL )?([\w.]+)", str(error))
        if isinstance(error, UnpicklingError) and asked:
            raise ValueError(f"{path} asks for {asked[1]}, which is no data; take its weights alone") from error
        raise ValueError(f"{path} is damaged, or no file of torch.save; copy or download it again") from error


def plain(value: Any) -> Any:
    """Settings as plain dicts, lists and values, whichever of fairseq's classes they were kept in."""
    if isinstance(value, StandIn):
        state = value.state
        if isinstance(state, dict):
            for inner in ("_content", "_val"):  # omegaconf's containers and values
                if inner in state:
                    return plain(state[inner])
            return plain(state)  # a Namespace, a dataclass, a dictionary of symbols
        return plain(value.made_of[0]) if value.made_of else None  # an enumeration's value
    if isinstance(value, dict):
        return {str(plain(key)): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def _check_archive(path: Path) -> None:
    with _sound(path, lambda: zipfile.ZipFile(path)) as archive:
        for entry in archive.infolist():
            place = PurePosixPath(entry.filename.replace("\\", "/"))
            if place.is_absolute() or ".." in place.parts:
                raise ValueError(f"{path} has an entry {entry.filename!r}, outside of itself; get it elsewhere")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > entry.compress_size:
                raise ValueError(
                    f"{path} has a compressed entry, {entry.filename!r}, of {entry.file_size} bytes, where torch.save "
                    "compresses none; open and save it with torch to use it"
                )


def _check_sizes(path: Path, content: Any) -> None:
    """Refuse tensors that are larger than what is stored of them, and more of them than the file can hold."""
    size, stored = path.stat().st_size, dict[int, int]()
    for tensor in _tensors(content, set()):
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.itemsize > storage.nbytes():
            raise ValueError(
                f"{path} has a tensor of shape {tuple(tensor.shape)}, of which it holds {storage.nbytes()} bytes; it "
                "is damaged, so get it again"
            )
        stored[storage._cdata] = storage.nbytes()
    if sum(stored.values()) > size:
        raise ValueError(
            f"{path} has {size} bytes, and asks for {sum(stored.values())} of tensors; it is damaged, so get it again"
        )


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = [*value.values()]
    elif isinstance(value, list | tuple | set):
        inner = [*value]
    elif isinstance(value, StandIn):
        inner = [value.made_of, value.state]
    if inner and id(value) not in seen:  # a pickle may hold a thing in itself, or a thousand times
        seen.add(id(value))
        for one in inner:
            yield from _tensors(one, seen)
