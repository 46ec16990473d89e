"""Reader of untrusted pickles, which never runs code in them.

A pickle is a program that names functions of any module and calls them. Here it may only name functions of a table:
numbers of numpy, arrays as pickle and joblib store them, and classes that the caller adds. Each of them is replaced by
a stand-in, which only stores its arguments. Every other name is refused.
"""

import bz2
import io
import lzma
import math
import pickle
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hubert_lightning.errors import UserError
from hubert_lightning.untrusted.python_internals import PythonUnpickler, python_3_name

StandInFactory = Callable[..., Any]
"""A class or function that takes the place of a name in a pickle, and does nothing but hold its arguments."""

LZMA_MEMORY = 2**27  # bytes; the highest preset of xz takes half of it
MAX_DIMENSIONS = 8  # of an array


class Decompressor(Protocol):
    """The interface that the decompressors of zlib, bz2 and lzma share."""

    @property
    def eof(self) -> bool:
        """Whether the end of the compressed data was reached."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Decompress data, up to a number of bytes."""


DECOMPRESSORS: dict[bytes, Callable[[], Decompressor]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),  # gzip
    b"\x78": zlib.decompressobj,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\x00": lambda: lzma.LZMADecompressor(memlimit=LZMA_MEMORY),
    b"\x5d\x00": lambda: lzma.LZMADecompressor(memlimit=LZMA_MEMORY),
}
"""First bytes of a compressed file → decompressor: the formats of joblib, but lz4."""
OBJECT_ARRAY = "holds an array of Python objects, where only numbers can be opened safely; save those alone"
SAVE_STATE_DICT = "save the state_dict alone: torch.save(model.state_dict(), ...)"
NUMBER_CODES = re.compile(r"[fiu][1248]|b1")
"""Codes of dtypes of numbers."""


class RefusedPickle(UserError):
    """A readable pickle that asks for something forbidden."""


def read_at_most(path: Path, limit: int) -> bytes:
    """Read a file of limited size.

    Args:
        path: Path of the file.
        limit: Bytes that the file may have.

    Raises:
        UserError: The file is missing, or larger.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; correct the path")
    if path.stat().st_size > limit:
        raise UserError(f"{path}: more than {limit} bytes, and no such file is that large; correct the path")
    return path.read_bytes()


def unpacked(content: bytes, path: Path, limit: int) -> bytes:
    """Decompress the content of a file.

    Args:
        content: Content of the file.
        path: File that errors name.
        limit: Bytes that the decompressed content may have.

    Returns:
        The decompressed content; the content itself if it is not compressed.

    Raises:
        UserError: There would be more bytes, or the file is corrupt.
    """
    if content.startswith((b"\x04\x22\x4d\x18", b"ZF")):
        raise UserError(
            f"{path}: compressed with lz4, or by joblib before 0.10; open it with joblib where you trust it, and dump "
            "it again without compression"
        )
    new = next((new for start, new in DECOMPRESSORS.items() if content.startswith(start)), None)
    if new is None:
        return content
    try:
        decompressor = new()
        whole = decompressor.decompress(content, limit + 1)
    except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be decompressed ({error}); it is corrupt, so copy it again") from error
    if len(whole) > limit:
        raise UserError(f"{path}: decompresses to more than {limit} bytes, and no such file is that large; remove it")
    if not decompressor.eof:
        raise UserError(f"{path}: ends before its compressed data does; copy it again")
    return whole


def unpickle(content: bytes, path: Path, stand_ins: Mapping[str, StandInFactory] | None = None) -> Any:
    """Read a pickle, or an uncompressed file of joblib.

    Args:
        content: Content of the file.
        path: File that errors name.
        stand_ins: Additional stand-ins: "module.name" → class or function.

    Returns:
        Plain containers and values, and stand-ins.

    Raises:
        UserError: The pickle asks for anything else, holds Python objects in arrays, or is corrupt.
    """
    try:
        return _Unpickler(content, {**NUMPY, **JOBLIB, **(stand_ins or {})}).load()
    except RefusedPickle as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # bytes that are no pickle may raise anything
        reason = _printable(f"{type(error).__name__}: {error}")
        raise UserError(f"{path}: corrupt, or no pickle ({reason}); copy it again, or correct the path") from error


class StandIn:
    """Stands in for an object of a class that is not imported: holds its arguments and its state."""

    name = ""
    made_of: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *made_of: Any) -> Any:  # an unpickler may call only this; a subclass may make something else
        made = super().__new__(cls)
        made.made_of = made_of
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class DtypeStandIn:
    """Stands in for `numpy.dtype`: a number's kind, bytes and byte order, without fields or objects."""

    def __init__(self, code: str | bytes, *flags: Any) -> None:
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if not NUMBER_CODES.fullmatch(code):
            raise RefusedPickle(
                OBJECT_ARRAY
                if code.startswith("O")
                else f"holds an array of dtype {_printable(code)}; save numbers alone"
            )
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise RefusedPickle("holds an array whose dtype has no byte order; it is corrupt, so copy it again")
        self.order = state[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of numpy."""
        return np.dtype(self.order + self.code)


class ArrayStandIn:
    """Stands in for `numpy.ndarray`: shape, dtype and bytes. `array_of` makes the array, so that unused arrays take no
    memory."""

    shape: Any = None
    dtype: Any = None
    column_major: Any = False
    content: Any = b""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.shape, self.dtype, self.column_major, self.content = state[-4:]


class JoblibArrayStandIn(ArrayStandIn):
    """Stands in for joblib's `NumpyArrayWrapper`: the bytes follow the pickle that describes them."""

    def __setstate__(self, state: Any) -> None:
        if state["subclass"] is not StandIn:
            raise RefusedPickle("holds an array of a class that is not numpy's own; save it as a plain array")
        self.shape, self.dtype, self.column_major = state["shape"], state["dtype"], state["order"] == "F"
        self.is_aligned = state.get("numpy_array_alignment_bytes") is not None

    def read(self, file: io.BytesIO) -> None:
        """Read the bytes from the position of the file."""
        if self.is_aligned:
            file.seek(int.from_bytes(file.read(1), "little"), io.SEEK_CUR)
        size = _num_bytes(self)
        if size > len(file.getbuffer()) - file.tell():
            shape = _printable(str(self.shape))
            raise RefusedPickle(f"ends before the last number of an array of shape {shape}; copy it again")
        self.content = file.read(size)


def array_of(stand_in: object, path: Path) -> np.ndarray[Any, np.dtype[Any]]:
    """Make the array of a stand-in.

    Args:
        stand_in: Value that `unpickle` returned.
        path: File that errors name.

    Raises:
        UserError: The value is no array, or its shape does not fit its bytes.
    """
    try:
        if not isinstance(stand_in, ArrayStandIn):
            raise RefusedPickle("holds something else than the expected array of numbers; it is a file of another kind")
        content = stand_in.content.encode("latin1") if isinstance(stand_in.content, str) else stand_in.content
        if not isinstance(content, bytes | bytearray):
            raise RefusedPickle(OBJECT_ARRAY)
        if _num_bytes(stand_in) != len(content):
            shape = _printable(str(stand_in.shape))
            raise RefusedPickle(f"has {len(content)} bytes for an array of shape {shape}; copy it again")
        flat = np.frombuffer(content, stand_in.dtype.dtype)
        return flat.reshape(stand_in.shape, order="F" if stand_in.column_major else "C")
    except RefusedPickle as error:
        raise UserError(f"{path}: {error}") from error


def _num_bytes(array: ArrayStandIn) -> int:
    shape = array.shape
    if not isinstance(array.dtype, DtypeStandIn) or not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS:
        raise RefusedPickle("has an array without dtype or shape; it is corrupt, so copy it again")
    if not all(type(length) is int and 0 <= length < 2**63 for length in shape):
        raise RefusedPickle("has an array with an impossible shape; it is corrupt, so copy it again")
    return math.prod(shape) * array.dtype.dtype.itemsize


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> ArrayStandIn:
    array = ArrayStandIn()
    array.__setstate__((shape, dtype, order == "F", content))
    return array


def _scalar(dtype: Any, content: Any) -> ArrayStandIn:
    return _from_buffer(content, dtype, (), "C")


def _encoded(text: Any, encoding: Any) -> str:
    """Stand in for `_codecs.encode`, by which protocols 0 to 2 make bytes; `array_of` encodes the text."""
    if encoding != "latin1" or not isinstance(text, str):
        raise RefusedPickle("encodes text in another way than numpy does; save its arrays alone as .npy")
    return text


def _reconstructed(kind: type, base: Any, state: Any) -> Any:
    return kind()


NUMPY: dict[str, StandInFactory] = {
    "numpy.ndarray": StandIn,
    "numpy.dtype": DtypeStandIn,
    **{
        f"{core}.{name}": stand_in
        for core in ("numpy.core", "numpy._core")
        for name, stand_in in (
            ("multiarray._reconstruct", ArrayStandIn),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _from_buffer),
        )
    },
    **{
        f"numpy.random.{name}": StandIn
        for name in (
            "__RandomState_ctor",
            "_pickle.__randomstate_ctor",
            "_pickle.__bit_generator_ctor",
            "_mt19937.MT19937",
            "mtrand.RandomState",
            "bit_generator.SeedSequence",
        )
    },
    "_codecs.encode": _encoded,
    "copyreg._reconstructor": _reconstructed,
    **{f"builtins.{kind}": StandIn for kind in ("object", "int", "float", "bool", "str", "list", "tuple", "dict")},
    **{f"numpy.{kind}{bits}": StandIn for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)},
}
"""Names in Python 3 → stand-ins for arrays, scalars, random states and types of every numpy, in every protocol."""
JOBLIB: dict[str, StandInFactory] = {
    "joblib.numpy_pickle.NumpyArrayWrapper": JoblibArrayStandIn,
    "sklearn.externals.joblib.numpy_pickle.NumpyArrayWrapper": JoblibArrayStandIn,
}


class _Unpickler(PythonUnpickler):  # type: ignore[misc, unused-ignore]  # without types
    """An unpickler that finds stand-ins in place of classes, and changes nothing but them and plain containers."""

    dispatch = PythonUnpickler.dispatch.copy()

    def __init__(self, content: bytes, stand_ins: Mapping[str, StandInFactory]) -> None:
        self.file = io.BytesIO(content)
        super().__init__(self.file, encoding="latin1")  # arrays of Python 2 are text
        self.stand_ins = stand_ins

    def find_class(self, module: str, name: str) -> StandInFactory:
        full_name = python_3_name(module, name) if self.proto < 3 else f"{module}.{name}"
        if full_name in self.stand_ins:
            return self.stand_ins[full_name]
        if name in ("NDArrayWrapper", "ZNDArrayWrapper"):
            raise RefusedPickle(
                "keeps its arrays in other files, as joblib before 0.10 did, and those are not followed; open it with "
                "joblib where you trust it, and dump it again"
            )
        raise RefusedPickle(
            f"asks for {_printable(full_name)} while it is opened, which may run anything; take the file from "
            "a source that you trust, or save its arrays alone as .npy"
        )

    def get_extension(self, code: int) -> None:
        raise RefusedPickle(
            f"asks for extension {code} of pickle, which may be anything; save its arrays alone as .npy"
        )

    def load_build(self) -> None:
        """Set the state of a stand-in; other objects would be changed by it."""
        state, built = self.stack.pop(), self.stack[-1]
        if type(built) not in self.stand_ins.values():
            kind = type(built).__name__
            raise RefusedPickle(f"sets the state of a {kind}, which has none; it is corrupt, so copy it again")
        built.__setstate__(state)
        if isinstance(built, JoblibArrayStandIn):
            built.read(self.file)

    def load_bytearray8(self) -> None:
        """Read a bytearray. Python makes as many bytes as the file states before it looks whether there are any."""
        size = int.from_bytes(self.read(8), "little")
        content = self.read(min(size, len(self.file.getbuffer())))
        if len(content) < size:
            raise EOFError
        self.append(bytearray(content))

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_dict()

    def _check_keys(self, keys: Sequence[object]) -> None:
        if not all(isinstance(key, str | int) for key in keys):  # a tuple of itself twice, 99 times, is never hashed
            raise RefusedPickle("has keys that are neither text nor numbers; save its arrays alone as .npy")

    for code in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):
        del dispatch[code[0]]
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def _printable(text: str) -> str:
    """Shorten a text of a file for a sentence, and escape what cannot be printed."""
    escaped = ascii(text)[1:-1]
    return escaped if len(escaped) <= 100 else escaped[:97] + "..."
