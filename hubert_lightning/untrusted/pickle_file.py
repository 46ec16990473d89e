"""Pickles that somebody else wrote, read without running anything of theirs.

A pickle is a program that names functions of any module and calls them. Here it may name only what a table allows, and
what it then gets is never the thing itself but a stand-in that holds what it was given: numbers of numpy, arrays as
pickle and joblib store them, and whatever classes the reader asks for. All else is refused by name.
"""

import _compat_pickle
import bz2
import io
import lzma
import math
import pickle
import pickletools
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hubert_lightning.errors import UserError

LZMA_MEMORY = 2**27  # bytes; the highest preset of xz takes half of it
COMPRESSED: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),  # gzip
    b"\x78": zlib.decompressobj,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\x00": lambda: lzma.LZMADecompressor(memlimit=LZMA_MEMORY),
    b"\x5d\x00": lambda: lzma.LZMADecompressor(memlimit=LZMA_MEMORY),
}
"""What a compressed file begins with → what unpacks it: the formats of joblib, but lz4."""
OBJECTS = "holds an array of Python objects, where only numbers can be opened safely; save those alone"
STATE_ALONE = "save the state_dict alone: torch.save(model.state_dict(), ...)"
NUMBERS = re.compile(r"[fiu][1248]|b1")
DOTTED = re.compile(r"(?=.{1,255}$)\w+(\.\w+)*", re.ASCII)
GROWTH = 32  # times that a pickle may be as large in protocol 2; one of short bytes is 12 times as large


class Refusal(UserError):
    """Of a file that could be read, but asks for what it may not have."""


def name_of(module: str, name: str) -> str:
    """The name that Python 3 has for what a pickle of protocol 2 or before would call, by Python's own tables.

    Python 3 writes such pickles, as torch.save does, with the names of Python 2: `int` as `__builtin__ long`.

    Args:
        module: Module in the pickle, such as `copy_reg`.
        name: Name in that module, such as `_reconstructor`.

    Returns:
        "module.name"; unchanged where Python 3 has the same.
    """
    renamed = _compat_pickle.IMPORT_MAPPING.get(module, module), name
    return ".".join(_compat_pickle.NAME_MAPPING.get((module, name), renamed))


class _Text(NamedTuple):
    """A text on a pickle's stack: where the operations that put it there begin, and its numbers in the memo."""

    text: str
    start: int
    numbers: set[int]


def in_protocol_2(content: bytes) -> bytes:
    """A pickle of any protocol as one of protocol 2, which torch's unpickler reads; it is rewritten, and never run.

    Names that a pickle puts together on its stack (protocol 4) are written out, so that they can be checked.

    Args:
        content: Pickle, from its first operation to its last.

    Returns:
        Pickle of the same objects, but for bytearrays, of which it has the bytes.

    Raises:
        Refusal: It has an operation that protocol 2 has no other for, such as that of a frozenset, asks for what is no
            name, or would become far larger.
    """
    operations: list[tuple[pickletools.OpcodeInfo, Any, Any]] = list(pickletools.genops(content))
    ends = [start for *_, start in operations[1:]] + [len(content)]
    written: list[bytes] = []
    top: list[_Text] = []  # texts that lie on top of the stack
    memo: dict[int, str | None] = {}  # texts, and none of other objects
    size = 0  # of all that was written
    gone: set[int] = set()  # numbers in the memo of texts that were parts of a name

    def write(piece: bytes) -> None:
        nonlocal size
        size += len(piece)
        if size > GROWTH * len(content):
            raise Refusal("uses the same names over and over; it is damaged, so get it again")
        written.append(piece)

    def write_text(text: str) -> None:
        encoded = text.encode("utf-8", "surrogatepass")
        write(pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded)

    def remember(number: int) -> None:
        memo[number] = top[-1].text if top else None
        gone.discard(number)
        if top:
            top[-1].numbers.add(number)
        write(pickle.LONG_BINPUT + struct.pack("<I", number))

    for (operation, argument, start), end in zip(operations, ends, strict=True):
        name = operation.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "MEMOIZE":
            remember(len(memo))
        elif name.endswith("PUT"):
            remember(int(argument))
        elif "UNICODE" in name:
            top.append(_Text(argument, len(written), set()))
            write_text(argument)
        elif name.endswith("GET") and (text := memo.get(int(argument))) is not None:
            top.append(_Text(text, len(written), set()))
            if argument in gone:
                write_text(text)
                remember(int(argument))
            else:
                write(content[start:end])
        elif name == "STACK_GLOBAL":
            if len(top) < 2 or not all(DOTTED.fullmatch(one.text) for one in top[-2:]):
                raise Refusal(f"refused, the pickle would call what has no name; {STATE_ALONE}")
            module, called = top[-2:]
            del written[module.start :]
            gone |= module.numbers | called.numbers
            write(f"c{module.text}\n{called.text}\n".encode())
            top.clear()
        else:
            top.clear()
            if "BYTE" in name:  # a bytearray's, too; as Python writes bytes in protocol 2
                write(b"c_codecs\nencode\n")
                write_text(argument.decode("latin1"))
                write_text("latin1")
                write(pickle.TUPLE2 + pickle.REDUCE)
            elif operation.proto <= 2 or name == "EMPTY_SET":  # torch's unpickler knows it
                write(content[start:end])
            else:
                raise Refusal(
                    f"written with pickle protocol {operation.proto}, whose {name} is not read here; save it with "
                    "torch.save's default protocol"
                )
    return pickle.PROTO + b"\x02" + b"".join(written)


def read_at_most(path: Path, limit: int) -> bytes:
    """The content of a file.

    Raises:
        UserError: There is none, or it has more bytes than the limit.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; correct the path")
    if path.stat().st_size > limit:
        raise UserError(f"{path}: more than {limit} bytes, and none is needed that is so large; correct the path")
    return path.read_bytes()


def unpacked(content: bytes, path: Path, limit: int) -> bytes:
    """What a compressed file holds, or the content itself if it is not compressed; never more than `limit` bytes.

    Raises:
        UserError: There would be more, or the file is damaged.
    """
    if content.startswith((b"\x04\x22\x4d\x18", b"ZF")):
        raise UserError(
            f"{path}: compressed with lz4, or by joblib before 0.10; open it with joblib where you trust it, and dump "
            "it again without compression"
        )
    new = next((new for start, new in COMPRESSED.items() if content.startswith(start)), None)
    if new is None:
        return content
    try:
        decompressor = new()
        whole = decompressor.decompress(content, limit + 1)
    except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); it is damaged, so copy it again") from error
    if len(whole) > limit:
        raise UserError(f"{path}: unpacks to more than {limit} bytes, and none is needed that is so large; remove it")
    if not decompressor.eof:
        raise UserError(f"{path}: ends before what it packs does; copy it again")
    return whole


def unpickle(content: bytes, path: Path, stand_ins: Mapping[str, Callable] | None = None) -> Any:
    """What a pickle, or an uncompressed file of joblib, holds, in terms of the stand-ins of this module.

    path:      that errors name
    stand_ins: more of them: "module.name" → a class or function that does nothing but hold its arguments

    Raises:
        UserError: It names anything else, holds Python objects in arrays, or is damaged.
    """
    try:
        return _Unpickler(content, {**NUMPY, **JOBLIB, **(stand_ins or {})}).load()
    except Refusal as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # whatever bytes that are no pickle happen to ask for
        said = _shown(f"{type(error).__name__}: {error}")
        raise UserError(f"{path}: damaged, or no pickle ({said}); copy it again, or correct the path") from error


class Held:
    """Stands in for a class whose objects are data to us: holds the state of one, and has no methods."""

    state: Any = None

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class HeldDtype:
    """Stands in for `numpy.dtype`: a number's kind, bytes and byte order, and nothing with fields or objects."""

    def __init__(self, code: str | bytes, *flags: Any) -> None:
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if not NUMBERS.fullmatch(code):
            raise Refusal(
                OBJECTS if code.startswith("O") else f"holds an array of dtype {_shown(code)}; save numbers alone"
            )
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise Refusal("holds an array whose dtype has no byte order; it is damaged, so copy it again")
        self.order = state[1]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class HeldArray:
    """Stands in for `numpy.ndarray`: shape, dtype and bytes, of which `array_of` makes an array when it is asked to, so
    that what nobody asks for takes no memory."""

    shape: Any = None
    dtype: Any = None
    column_major: Any = False
    content: Any = b""

    def __init__(self, *empty: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.shape, self.dtype, self.column_major, self.content = state[-4:]


class HeldJoblibArray(HeldArray):
    """Stands in for joblib's `NumpyArrayWrapper`: the bytes follow the pickle that describes them."""

    def __setstate__(self, state: Any) -> None:
        if state["subclass"] is not Held:
            raise Refusal("holds an array of a class that is not numpy's own; save it as a plain array")
        self.shape, self.dtype, self.column_major = state["shape"], state["dtype"], state["order"] == "F"
        self.aligned = state.get("numpy_array_alignment_bytes") is not None

    def read(self, file: io.BytesIO) -> None:
        """Take the bytes from where the file is read."""
        if self.aligned:
            file.seek(int.from_bytes(file.read(1), "little"), io.SEEK_CUR)
        size = _size(self)
        if size > len(file.getbuffer()) - file.tell():
            raise Refusal(f"ends before the last number of an array of shape {_shown(str(self.shape))}; copy it again")
        self.content = file.read(size)


def array_of(held: Any, path: Path) -> np.ndarray:
    """The array that `unpickle` found.

    path: that errors name

    Raises:
        UserError: It is none, or its shape and its bytes disagree.
    """
    try:
        if not isinstance(held, HeldArray):
            raise Refusal("holds something else where an array of numbers is wanted; it is a file of another kind")
        content = held.content.encode("latin1") if isinstance(held.content, str) else held.content
        if not isinstance(content, bytes | bytearray):
            raise Refusal(OBJECTS)
        if _size(held) != len(content):
            raise Refusal(f"has {len(content)} bytes for an array of shape {_shown(str(held.shape))}; copy it again")
        flat = np.frombuffer(content, held.dtype.dtype)
        return flat.reshape(held.shape, order="F" if held.column_major else "C")
    except Refusal as error:
        raise UserError(f"{path}: {error}") from error


def _of_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> HeldArray:
    held = HeldArray()
    held.__setstate__((shape, dtype, order == "F", content))
    return held


def _scalar(dtype: Any, content: Any) -> HeldArray:
    return _of_buffer(content, dtype, (), "C")


def _encoded(text: Any, encoding: Any) -> str:
    """Bytes as protocols 0 to 2 have them; `array_of` makes them of the text."""
    if encoding != "latin1" or not isinstance(text, str):
        raise Refusal("encodes text in another way than numpy does; save its arrays alone as .npy")
    return text


def _reconstructed(kind: type, base: Any, state: Any) -> Any:
    return kind()


NUMPY: dict[str, Callable] = {
    "numpy.ndarray": Held,
    "numpy.dtype": HeldDtype,
    **{
        f"{core}.{name}": of
        for core in ("numpy.core", "numpy._core")
        for name, of in (
            ("multiarray._reconstruct", HeldArray),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _of_buffer),
        )
    },
    **{
        f"numpy.random.{name}": Held
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
    **{f"builtins.{kind}": Held for kind in ("object", "int", "float", "bool", "str", "list", "tuple", "dict")},
    **{f"numpy.{kind}{bits}": Held for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)},
}
"""Arrays, scalars, random states and types of every numpy, in every protocol, by their names in Python 3."""
JOBLIB: dict[str, Callable] = {
    "joblib.numpy_pickle.NumpyArrayWrapper": HeldJoblibArray,
    "sklearn.externals.joblib.numpy_pickle.NumpyArrayWrapper": HeldJoblibArray,
}


PythonUnpickler: Any = pickle._Unpickler  # as in joblib: the one in C reads beyond where an array begins


class _Unpickler(PythonUnpickler):
    dispatch = PythonUnpickler.dispatch.copy()

    def __init__(self, content: bytes, stand_ins: Mapping[str, Callable]) -> None:
        self.file = io.BytesIO(content)
        super().__init__(self.file, encoding="latin1")  # of Python 2, whose arrays are text
        self.stand_ins = stand_ins

    def find_class(self, module: str, name: str) -> Any:
        asked = name_of(module, name) if self.proto < 3 else f"{module}.{name}"
        if asked in self.stand_ins:
            return self.stand_ins[asked]
        if name in ("NDArrayWrapper", "ZNDArrayWrapper"):
            raise Refusal(
                "keeps its arrays in other files, as joblib before 0.10 did, and those are not followed; open it with "
                "joblib where you trust it, and dump it again"
            )
        raise Refusal(
            f"asks for {_shown(asked)} while it is opened, which may run anything; take the file from "
            "somebody you trust, or save its arrays alone as .npy"
        )

    def get_extension(self, code: int) -> None:
        raise Refusal(f"asks for extension {code} of pickle, which may be anything; save its arrays alone as .npy")

    def load_build(self) -> None:
        """Give an object its state; here only to stand-ins, since others would be changed by it."""
        state, held = self.stack.pop(), self.stack[-1]
        if type(held) not in self.stand_ins.values():
            raise Refusal(f"sets the state of a {type(held).__name__}, which has none; it is damaged, so copy it again")
        held.__setstate__(state)
        if isinstance(held, HeldJoblibArray):
            held.read(self.file)

    def load_bytearray8(self) -> None:
        """Python makes as many bytes as the file says before it looks whether there are any."""
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

    def _check_keys(self, keys: list[Any]) -> None:
        if not all(isinstance(key, str | int) for key in keys):  # a tuple of itself twice, 99 times, is never hashed
            raise Refusal("has keys that are neither text nor numbers; save its arrays alone as .npy")

    for code in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):
        del dispatch[code[0]]
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def _size(of: HeldArray) -> int:
    if not isinstance(of.dtype, HeldDtype) or not isinstance(of.shape, tuple) or len(of.shape) > 8:
        raise Refusal("has an array without dtype or shape; it is damaged, so copy it again")
    if not all(type(length) is int and 0 <= length < 2**63 for length in of.shape):
        raise Refusal("has an array whose shape is no shape; it is damaged, so copy it again")
    return math.prod(of.shape) * of.dtype.dtype.itemsize


def _shown(said: str) -> str:
    """What a file says, for a sentence: printable and short."""
    text = ascii(said)[1:-1]
    return text if len(text) <= 100 else text[:97] + "..."
