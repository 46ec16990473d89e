"""Arguments of the classes that a config of `hubert fit` names, read from their source: none of them is imported."""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).parent
CLASSES = ("HubertPretraining", "CTCFinetuning", "PretrainingData", "TranscribedData")
"""Classes of this package that a config names below `model` and `data`."""


def trainer_arguments() -> tuple[str, ...]:
    """Names of the arguments of Lightning's Trainer; none without Lightning."""
    trainer = find_spec("lightning")
    if trainer is None or trainer.origin is None:
        return ()
    return _arguments(Path(trainer.origin).parent / "pytorch" / "trainer" / "trainer.py", "Trainer")


def arguments_of(name: str) -> tuple[str, ...]:
    """Names of the arguments of a class of the room `training`."""
    return _arguments(_file_of(name), name)


def fields_of(name: str) -> tuple[str, ...]:
    """Names of the fields of a dataclass of the room `training`."""
    fields = [node.target for node in _class(_file_of(name), name).body if isinstance(node, ast.AnnAssign)]
    return tuple(field.id for field in fields if isinstance(field, ast.Name))


@cache
def _arguments(path: Path, name: str) -> tuple[str, ...]:
    [method] = [
        node for node in _class(path, name).body if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    ]
    return tuple(argument.arg for argument in [*method.args.args[1:], *method.args.kwonlyargs])


@cache
def _file_of(name: str) -> Path:
    files = sorted((PACKAGE / "training").glob("*.py"))
    return next(path for path in files if f"\nclass {name}" in path.read_text())


def _class(path: Path, name: str) -> ast.ClassDef:
    [definition] = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef) and node.name == name
    ]
    return definition
