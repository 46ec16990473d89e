"""What fairseq, omegaconf and Python itself put into a file of torch.save opens as data, by whichever names."""

import argparse
import enum
import pickle
import sys
import types
import typing
import zipfile
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import AttributeDict
from torch.testing import assert_close

from hubert_lightning.pretrained.load import load_encoder
from hubert_lightning.units.kmeans_file import load_kmeans
from hubert_lightning.untrusted.torch_file import read_torch
from hubert_lightning.untrusted.torch_stand_ins import plain


@pytest.fixture
def fairseq() -> Iterator[types.ModuleType]:
    """A module of this name with an enumeration, while a file is written; not there when it is read."""
    module = types.ModuleType("fairseq")
    vars(module)["Choices"] = enum.Enum("Choices", {"legacy": "legacy_ddp"}, module="fairseq")
    sys.modules["fairseq"] = module
    yield module
    sys.modules.pop("fairseq", None)


def again(value: Any, path: Path, *, new_form: bool = True) -> Any:
    torch.save({"cfg": value, "model": {"a": torch.ones(1)}}, path, _use_new_zipfile_serialization=new_form)
    content = read_torch(path)
    assert_close(content["model"]["a"], torch.ones(1))
    return plain(content["cfg"])


TYPES = [int, float, complex, bool, str, bytes, list, dict, tuple, set, frozenset, range, slice, object, type]
NUMPY_TYPES = [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8, np.complex64, np.bool_, np.str_]


@pytest.mark.parametrize("new_form", [True, False])
@pytest.mark.parametrize("kind", [*TYPES, *NUMPY_TYPES, np.ndarray, np.dtype])
def test_a_type_is_read_as_its_name(tmp_path: Path, kind: type, new_form: bool) -> None:
    assert again(kind, tmp_path / "a.pt", new_form=new_form) == f"{kind.__module__}.{kind.__qualname__}"


PROTOCOLS = range(3, pickle.HIGHEST_PROTOCOL + 1)


@pytest.mark.parametrize("new_form", [True, False])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_file_of_a_higher_protocol_is_read_alike(tmp_path: Path, protocol: int, new_form: bool) -> None:
    both = torch.randn(7, 3)
    settings = {"rate": np.float64(0.25), "kind": int, "kinds": argparse.Namespace(a=int, b="argparse"), "name": "int"}
    content = {"model": {"a": both, "b": both[2:], "builtins": torch.zeros(1)}, "cfg": settings, "raw": b"\xff" * 300}
    content |= {"text": "é\ud800" * 200, "large": [2**70, -1], "empty": (b"", "", set())}
    torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=new_form)
    found = read_torch(tmp_path / "a.pt")
    assert plain(found.pop("cfg")) == plain(settings) | {
        "kind": "builtins.int",
        "kinds": {"a": "builtins.int", "b": "argparse"},
        "rate": 0.25,
    }
    model = found.pop("model")
    assert_close(model, content["model"])
    assert model["b"].data_ptr() == model["a"][2:].data_ptr()
    assert found == {name: content[name] for name in ("raw", "text", "large", "empty")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt"]


@pytest.mark.parametrize("value", [{1}, frozenset([1])], ids=str)
def test_an_operation_without_equivalent_in_protocol_2_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save({"more": value, "model": {"a": torch.zeros(1)}}, tmp_path / "a.pt", pickle_protocol=5)
    with pytest.raises(
        ValueError, match=r"a\.pt: written with pickle protocol \d, whose \w+ is not read here; save it"
    ):
        read_torch(tmp_path / "a.pt")


# hints of types, and the names that are left of them
HINTS = [
    (typing.Any, "typing.Any"),
    (list[int], "builtins.list"),
    (dict[str, int], "builtins.dict"),
    (type(None), None),
]
HINTS += [(type(...), "builtins.Ellipsis"), (..., "builtins.Ellipsis")]
HINTS += [(typing.Union[int, str], "typing.Union"), (typing.Optional[int], "typing.Union")]  # noqa: UP007, UP045
HINTS += [(typing.List[int], "typing.List"), (typing.Dict[str, int], "typing.Dict")]  # noqa: UP006


@pytest.mark.parametrize(("hint", "name"), HINTS, ids=str)
def test_a_type_hint_is_read_as_the_name_of_its_origin(tmp_path: Path, hint: Any, name: str | None) -> None:
    """omegaconf keeps a hint for every field of fairseq's dataclasses."""
    assert again({"ref_type": hint, "lr": 0.5}, tmp_path / "a.pt") == {"ref_type": name, "lr": 0.5}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.25), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(-3), -3),
        (np.bool_(True), True),
        (np.dtype(">f8").type(2), 2.0),
        (
            argparse.Namespace(layers=12, kind=int, more=argparse.Namespace(a=None)),
            {"layers": 12, "kind": "builtins.int"},
        ),
        (OrderedDict(a=1), {"a": 1}),
        (defaultdict(int, {"a": 1}), {"a": 1}),
        (defaultdict(list, {"a": [1]}), {"a": [1]}),
        (AttributeDict(lr=0.5, arch="base"), {"lr": 0.5, "arch": "base"}),
        (deque([1, 2], 3), [1, 2]),
        (Path("/data/dict.ltr.txt"), "/data/dict.ltr.txt"),
        (("a", 2**40, -1.5, None, True), ["a", 2**40, -1.5, None, True]),
    ],
    ids=str,
)
@pytest.mark.parametrize("new_form", [True, False])
def test_settings_have_their_values(tmp_path: Path, value: Any, expected: Any, new_form: bool) -> None:
    found = again(value, tmp_path / "a.pt", new_form=new_form)
    if isinstance(expected, dict):
        found = {key: found[key] for key in expected}
    assert found == expected
    assert type(found) is type(expected)


def test_a_choice_of_fairseq_is_its_value(tmp_path: Path, fairseq: types.ModuleType) -> None:
    torch.save({"cfg": {"backend": vars(fairseq)["Choices"].legacy}, "model": {}}, tmp_path / "a.pt")
    del sys.modules["fairseq"]
    assert plain(read_torch(tmp_path / "a.pt")["cfg"]) == {"backend": "legacy_ddp"}


class Counts(OrderedDict):
    """As fairseq's MetersDict: a dictionary with a state of its own."""

    def __init__(self, *items: Any) -> None:
        super().__init__(*items)
        self.priorities = [1, 2]


class Named(dict):
    """As fairseq's item classes: a dictionary made without arguments."""


class Several(list):
    """A class of lists."""


@pytest.mark.parametrize("new_form", [True, False])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_dictionaries_and_lists_of_fairseqs_classes_are_data(
    tmp_path: Path, fairseq: types.ModuleType, protocol: int, new_form: bool
) -> None:
    for kind in (Counts, Named, Several):
        setattr(fairseq, kind.__name__, kind)
    content: dict[str, Any] = {
        "meters": Counts({"loss": Counts({"sum": np.float32(0.5)}), "empty": Counts()}),
        "named": Named(a=Named(b=[1]), c=Named()),
        "several": Several([Several([1, 2]), 3]),
        "one": Several(["x"]),
        "model": {"a": torch.ones(1)},
    }
    content["again"] = content["several"]
    modules = {kind: kind.__module__ for kind in (Counts, Named, Several)}
    for kind in modules:
        kind.__module__ = "fairseq"
    try:
        torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=new_form)
    finally:
        for kind, module in modules.items():
            kind.__module__ = module
    del sys.modules["fairseq"]
    found = read_torch(tmp_path / "a.pt")
    assert_close(found.pop("model")["a"], torch.ones(1))
    assert plain(found) == {
        "meters": {"loss": {"sum": 0.5}, "empty": {}},
        "named": {"a": {"b": [1]}, "c": {}},
        "several": [[1, 2], 3],
        "one": ["x"],
        "again": [[1, 2], 3],
    }


def in_archive(body: bytes, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", body)
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", "little")
    return path


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("__builtin__ eval", "builtins.eval"),
        ("__builtin__ getattr", "builtins.getattr"),
        ("__builtin__ reduce", "functools.reduce"),
        ("__builtin__ bytearray", "builtins.bytearray"),
        ("__builtin__ unichr", "builtins.chr"),
        ("itertools imap", "builtins.map"),
        ("UserDict UserDict.fromkeys", "collections.UserDict.fromkeys"),
        ("commands getoutput", "subprocess.getoutput"),
        ("cPickle loads", "pickle.loads"),
        ("urllib urlretrieve", "urllib.request.urlretrieve"),
        ("os system", "os.system"),
        ("copy_reg __newobj__", "copyreg.__newobj__"),
        ("typing get_type_hints.__globals__", "typing.get_type_hints.__globals__"),
        ("pathlib os.system", "pathlib.os.system"),
        ("numpy load", "numpy.load"),
        ("torch load", "torch.load"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 3])
def test_functions_are_refused_under_names_of_python_2_too(
    tmp_path: Path, written: str, asked: str, protocol: int
) -> None:
    body = bytes([0x80, protocol]) + f"c{written}\n".replace(" ", "\n").encode() + b"X\x01\x00\x00\x001\x85R."
    with pytest.raises(ValueError, match=f"refused, the pickle would call {asked}; save the state_dict alone"):
        load_encoder(in_archive(body, tmp_path / "a.pt"))
    if protocol == 2:
        (tmp_path / "kmeans").write_bytes(body)
        with pytest.raises(ValueError, match=f"asks for {asked} while it is opened, which may run anything"):
            load_kmeans(tmp_path / "kmeans")


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        (text("os") + text("system"), "os.system"),
        (text("__builtin__") + text("eval"), "builtins.eval"),
        (text("os") + b"\x94" + b"0" + text("x") + text("y") + b"00h\x00" + text("system"), "os.system"),
        (text("os") + b"q\x05" + text("x") + b"\x930h\x05" + text("system"), "os.system"),
        (text("collections") + text("OrderedDict\nR."), "something without a name"),
        (text("builtins\neval\n") + text("x"), "something without a name"),
        (text("os.system ") + text("x"), "something without a name"),
        (text("o") + text("s") + b"\x86" + text("system"), "something without a name"),
        (b"N" + text("system"), "something without a name"),
    ],
)
def test_a_name_that_a_pickle_of_protocol_4_puts_together_is_refused(tmp_path: Path, body: bytes, asked: str) -> None:
    body = b"\x80\x04" + body + b"\x93" + text("touch x") + b"\x85R."
    with pytest.raises(ValueError, match=rf"a\.pt: refused, the pickle would call ({asked}|os\.x); save the state"):
        read_torch(in_archive(body, tmp_path / "a.pt"))


@pytest.mark.slow
def test_a_small_pickle_of_protocol_4_does_not_become_a_large_one(tmp_path: Path) -> None:
    """A name of 255 letters is asked for with five bytes each time."""
    body = b"\x80\x04" + text("c" * 255) + b"\x94" + (b"h\x00" + text("O") + b"\x930") * 10_000 + b"N."
    with pytest.raises(ValueError, match=r"a\.pt: uses the same names over and over; it is corrupt"):
        read_torch(in_archive(body, tmp_path / "a.pt"))


@pytest.mark.parametrize("name", ["__builtin__ type", "__builtin__ long", "_operator getitem", "typing Any"])
def test_arguments_of_a_type_are_kept_and_the_type_is_not_called(tmp_path: Path, name: str) -> None:
    body = b"\x80\x02" + f"c{name}\n".replace(" ", "\n").encode() + b"X\x05\x00\x00\x00touch}\x86R."
    held = read_torch(in_archive(body, tmp_path / "a.pt"))
    assert held.made_of == ("touch", {})


@pytest.mark.parametrize("place", ["key", "element of a set", "value"])
def test_a_tuple_that_no_time_suffices_to_hash_is_refused(tmp_path: Path, place: str) -> None:
    """A tuple of a tuple twice, and so on: 64 of them in 500 bytes, 2 ** 64 elements."""
    nested = b")q\x00" + b"".join(bytes([ord("h"), depth, 0x86, ord("q"), depth + 1]) for depth in range(64))
    body = {
        "key": b"\x80\x02}" + nested + b"K\x01s.",
        "element of a set": b"\x80\x02c__builtin__\nset\n]" + nested + b"a\x85R.",
        "value": b"\x80\x02}K\x01" + nested + b"s.",
    }
    with pytest.raises(ValueError, match=r"a\.pt: has a tuple of over 1000000 elements; it is corrupt"):
        read_torch(in_archive(body[place], tmp_path / "a.pt"))


def test_an_object_of_no_class_is_refused(tmp_path: Path) -> None:
    body = b"\x80\x02ccopy_reg\n_reconstructor\nccollections\nOrderedDict\nc__builtin__\nobject\nN\x87R."
    with pytest.raises(ValueError, match="makes an object of something that is not a class"):
        read_torch(in_archive(body, tmp_path / "a.pt"))


def test_an_object_of_protocol_0_opens(tmp_path: Path) -> None:
    body = (
        b"\x80\x02ccopy_reg\n_reconstructor\nc"
        + b"argparse\nNamespace\nc__builtin__\nobject\nN\x87R}X\x01\x00\x00\x00aK\x07sb."
    )
    assert plain(read_torch(in_archive(body, tmp_path / "a.pt"))) == {"a": 7}


@pytest.mark.parametrize("dtype", [("f8", b"1234"), ("O8", b""), ("V9", b"123456789"), (3, b"1"), ("f8", None)])
def test_a_corrupt_number_of_numpy_is_refused_in_one_sentence(tmp_path: Path, dtype: tuple[Any, Any]) -> None:
    code, content = dtype

    class Number:
        def __reduce__(self) -> Any:
            return np.float64(1).__reduce__()[0], (Dtype(), content)

    class Dtype:
        def __reduce__(self) -> Any:
            return np.dtype, (code, False, True), (3, "<", None, None, None, -1, -1, 0)

    torch.save({"cfg": {"model": {"dropout": Number()}}, "model": {"a": torch.ones(1)}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt (lacks weights|holds something that such a model never has)"):
        load_encoder(tmp_path / "a.pt")


def test_a_kmeans_of_python_2s_names_opens(tmp_path: Path) -> None:
    """scikit-learn's, with a type among its settings."""
    from sklearn.cluster import KMeans

    kmeans = KMeans(2, n_init=1).fit(np.arange(12.0).reshape(4, 3))
    kmeans.copy_x, kmeans.algorithm = int, str
    for protocol in range(6):
        (tmp_path / "kmeans").write_bytes(pickle.dumps(kmeans, protocol))
        [centroids], _ = load_kmeans(tmp_path / "kmeans")
        assert_close(centroids, torch.from_numpy(kmeans.cluster_centers_).float())
