"""Names that pickles of torch may have: those that torch's unpickler calls itself, and those that get a stand-in."""

import re
from collections import OrderedDict
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from hubert_lightning.errors import UserError
from hubert_lightning.untrusted.pickle_file import NUMBER_CODES, RefusedPickle, StandIn, StandInFactory

MADE_BY_TORCH = re.compile(
    r"collections\.(OrderedDict|Counter)|builtins\.set|_codecs\.encode"
    r"|torch\.(Size|device|bool|(b?float|u?int|complex)\w*|\w*Storage|storage\.\w*Storage)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
)
"""Names that torch's unpickler may call; none of them makes more than the file holds."""

REPLACED_BY_STAND_IN = re.compile(
    r"(fairseq|omegaconf|pytorch_lightning|lightning|lightning_fabric)\.[\w.]+"
    r"|argparse\.Namespace|types\.(GenericAlias|SimpleNamespace|UnionType)|_?operator\.getitem|copyreg\._reconstructor"
    r"|typing\.\w+|enum\.\w+|pathlib\.\w+|uuid\.UUID|decimal\.Decimal|datetime\.\w+"
    r"|numpy\.(core|_core)\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)|numpy\.random\.[\w.]+"
    r"|numpy\.(dtype|dtypes\.\w+|ndarray|bool_?|str_?|bytes_|object_|void|(int|uint|float|complex)\d+)"
    r"|builtins\.(int|float|complex|bool|str|bytes|list|dict|tuple|frozenset|range|slice|object|type|Ellipsis)"
    r"|collections\.(defaultdict|deque|UserDict|UserList|UserString)"
)
"""Names that a stand-in takes the place of: classes of data, and types that settings name."""

ELEMENTS, ITEMS = "elements", "items"
"""Contents that a pickle puts into an object: into a list's, or into a dictionary's."""
DICTIONARIES = ("collections.defaultdict", "AttributeDict", "DotDict")
"""Ends of the names of classes of dictionaries."""


class DictStandIn(StandIn):
    """Stands in for a class of dictionaries: torch's unpickler puts items into plain ones alone."""

    def __new__(cls, *made_of: Any) -> Any:
        return OrderedDict()  # torch's unpickler also changes its state


class ListStandIn(StandIn):
    """Stands in for a class of lists: torch's unpickler puts elements into plain ones alone."""

    def __new__(cls, *made_of: Any) -> Any:
        return []


def stand_in_for(name: str, contents: str) -> StandInFactory:
    """Make the stand-in for a name.

    Args:
        name: "module.name" in Python 3.
        contents: Contents that the pickle puts into the objects: `ELEMENTS`, `ITEMS`, or "" for none.

    Returns:
        Function, or a class with the name, for settings that have a class as a value.
    """
    if name == "copyreg._reconstructor":
        return _reconstructed
    if name == "collections.deque":
        return _empty_list
    kind = DictStandIn if contents == ITEMS or name.endswith(DICTIONARIES) else ListStandIn if contents else StandIn
    return type("StandIn", (kind,), {"name": name})


def _reconstructed(kind: Any, *base_and_state: Any) -> StandIn:
    """Stand in for `copyreg._reconstructor`, by which protocols 0 and 1 make any object."""
    if not (isinstance(kind, type) and issubclass(kind, StandIn)):
        raise RefusedPickle("makes an object of something that is not a class; it is corrupt, so copy it again")
    made: StandIn = kind()
    return made


def _empty_list(*made_of: Any) -> list[Any]:
    return []


def plain(value: Any) -> Any:
    """Convert settings in any of fairseq's classes to plain dicts, lists and values.

    Args:
        value: Content of a file, with stand-ins.

    Raises:
        UserError: A container contains itself.
    """
    return _plain(value, {})


def _plain(value: Any, done: dict[int, Any]) -> Any:
    if isinstance(value, type):  # such as int, where settings state the type of a value
        return value.name if issubclass(value, StandIn) else f"{value.__module__}.{value.__qualname__}"
    if not isinstance(value, StandIn | dict | list | tuple):
        return value
    if id(value) in done:
        if done[id(value)] is done:
            raise UserError("settings that hold themselves; the file is corrupt, so copy it again")
        return done[id(value)]
    done[id(value)] = done  # until the result is known: a pickle may hold a container a thousand times, or in itself
    result: Any
    if isinstance(value, StandIn) and value.name.endswith(".multiarray.scalar"):
        result = _number(*value.made_of)
    elif isinstance(value, StandIn) and value.name.startswith("pathlib."):
        result = str(PurePosixPath(*value.made_of))
    elif isinstance(value, StandIn):
        inner = value.state if value.state is not None else (value.made_of or (None,))[0]  # an enumeration's value
        if isinstance(value.state, dict):  # a Namespace, a dictionary of symbols, omegaconf's containers and values
            inner = next((inner[key] for key in ("_content", "_val") if key in inner), inner)
        result = _plain(inner, done)
    elif isinstance(value, dict):
        result = {str(key): _plain(inner, done) for key, inner in value.items()}
    else:
        result = [_plain(inner, done) for inner in value]
    done[id(value)] = result
    return result


def _number(dtype: Any, content: Any) -> Any:
    """Convert a scalar of numpy; return the code of its dtype if it is no number.

    Raises:
        TypeError: The number of bytes does not fit the dtype.
    """
    code, order = dtype.made_of[0], dtype.state[1] if dtype.state else "="
    if not NUMBER_CODES.fullmatch(code):
        return code
    if order not in ("<", ">", "=", "|") or len(content) != int(code[1]):
        raise TypeError(f"a number of dtype {code} that has {len(content)} bytes")
    return np.frombuffer(content, order.replace("|", "=") + code)[0].item()
