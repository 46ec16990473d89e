"""Pickles of any protocol, rewritten in protocol 2, which torch's unpickler reads; nothing in them is run."""

import pickle
import pickletools
import re
import struct
from typing import NamedTuple

from hubert_lightning.untrusted.pickle_file import SAVE_STATE_DICT, RefusedPickle

DOTTED_NAME = re.compile(r"(?=.{1,255}$)\w+(\.\w+)*", re.ASCII)
MAX_GROWTH = 32
"""Largest ratio of a pickle in protocol 2 to the original; one of short bytes has 12."""


class _Text(NamedTuple):
    """A text on a pickle's stack.

    Args:
        text: Text.
        start: Index of the first written operation that puts it there.
        numbers: Its numbers in the memo.
    """

    text: str
    start: int
    numbers: set[int]


def in_protocol_2(content: bytes) -> bytes:
    """Rewrite a pickle of any protocol in protocol 2.

    Names that a pickle puts together on its stack (protocol 4) are written out, so that they can be checked.

    Args:
        content: Pickle, from its first operation to its last.

    Returns:
        Pickle of the same objects, with bytes in place of bytearrays.

    Raises:
        RefusedPickle: The pickle has an operation without an equivalent in protocol 2, such as that of a frozenset,
            asks for something that is no name, or would grow too much.
    """
    return _Rewriter(content).rewritten()


class _Rewriter:
    """The state of a rewritten pickle.

    Attributes:
        written: Operations that were written.
        top: Texts on top of the stack.
        memo: Texts by their number in the memo; None for other objects.
        erased: Numbers in the memo of texts that became parts of a name, whose operations are gone.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = 0
        self.written: list[bytes] = []
        self.top: list[_Text] = []
        self.memo: dict[int, str | None] = {}
        self.erased: set[int] = set()

    def rewritten(self) -> bytes:
        operations = list(pickletools.genops(self.content))
        starts = [start or 0 for *_, start in operations]
        for (operation, argument, _), start, end in zip(
            operations, starts, [*starts[1:], len(self.content)], strict=True
        ):
            self._rewrite(operation, argument, self.content[start:end])
        return pickle.PROTO + b"\x02" + b"".join(self.written)

    def _rewrite(self, operation: pickletools.OpcodeInfo, argument: object, original: bytes) -> None:
        name = operation.name
        if name in ("PROTO", "FRAME"):
            return
        if name == "MEMOIZE":
            self._remember(len(self.memo))
        elif name.endswith("PUT"):
            self._remember(_number(argument))
        elif "UNICODE" in name:
            self._push_text(str(argument))
        elif name.endswith("GET") and (text := self.memo.get(_number(argument))) is not None:
            if argument in self.erased:
                self._push_text(text)
                self._remember(_number(argument))
            else:
                self.top.append(_Text(text, len(self.written), set()))
                self._write(original)
        elif name == "STACK_GLOBAL":
            self._write_global()
        else:
            self.top.clear()
            if isinstance(argument, (bytes, bytearray)):  # as Python writes bytes in protocol 2
                self._write(b"c_codecs\nencode\n")
                self._write_text(argument.decode("latin1"))
                self._write_text("latin1")
                self._write(pickle.TUPLE2 + pickle.REDUCE)
            elif operation.proto <= 2 or name == "EMPTY_SET":  # torch's unpickler knows it
                self._write(original)
            else:
                raise RefusedPickle(
                    f"written with pickle protocol {operation.proto}, whose {name} is not read here; save it with "
                    "torch.save's default protocol"
                )

    def _write_global(self) -> None:
        """Write out the name whose module and name are the two texts on top of the stack."""
        if len(self.top) < 2 or not all(DOTTED_NAME.fullmatch(text.text) for text in self.top[-2:]):
            raise RefusedPickle(f"refused, the pickle would call something without a name; {SAVE_STATE_DICT}")
        module, called = self.top[-2:]
        del self.written[module.start :]
        self.erased |= module.numbers | called.numbers
        self._write(f"c{module.text}\n{called.text}\n".encode())
        self.top.clear()

    def _push_text(self, text: str) -> None:
        self.top.append(_Text(text, len(self.written), set()))
        self._write_text(text)

    def _write_text(self, text: str) -> None:
        encoded = text.encode("utf-8", "surrogatepass")
        self._write(pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded)

    def _remember(self, number: int) -> None:
        self.memo[number] = self.top[-1].text if self.top else None
        self.erased.discard(number)
        if self.top:
            self.top[-1].numbers.add(number)
        self._write(pickle.LONG_BINPUT + struct.pack("<I", number))

    def _write(self, piece: bytes) -> None:
        self.size += len(piece)
        if self.size > MAX_GROWTH * len(self.content):
            raise RefusedPickle("uses the same names over and over; it is corrupt, so copy it again")
        self.written.append(piece)


def _number(argument: object) -> int:
    """Return the argument of an operation on the memo, which is a number."""
    assert isinstance(argument, int)
    return int(argument)  # pickletools reads 00 and 01 as booleans
