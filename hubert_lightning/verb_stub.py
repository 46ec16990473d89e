"""The function of a verb without its body: what help and checks of a command line need, without the heavy imports.

Annotations and defaults are found in the sources of this package, through the modules that import them.
"""

import ast
import copy
import importlib
import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, get_args

PACKAGE = Path(__file__).parent
LIGHT = {"collections", "dataclasses", "enum", "pathlib", "typing", "math", "re", "os"}
"""Packages that sources are evaluated with; what comes from others makes the real function necessary."""


class NeedsImport(Exception):
    """An annotation or default that is not found without a heavy import."""


def stub_of(target: str) -> Callable[..., Any] | None:
    """Make a function with the signature and the docstring of a verb's function, which does nothing.

    Args:
        target: "room.module:function".

    Returns:
        The function, with `Any` for each class that needs a heavy import; None if the module must be imported to know
        the rest of its signature.
    """
    module, _, name = target.partition(":")
    try:
        function: Callable[..., Any] = _Source(module).value(name)
    except NeedsImport:
        return None
    return function


def unchecked_options(stub: Callable[..., Any]) -> set[str]:
    """Names of the options of a stub whose values are classes that need a heavy import."""
    parameters = inspect.signature(stub).parameters.values()
    return {one.name for one in parameters if Any in (one.annotation, *get_args(one.annotation))}


class _Source:
    """Names of a module that are evaluated one by one.

    Args:
        module: Module without the package's name.
    """

    def __init__(self, module: str) -> None:
        path = PACKAGE / (module.replace(".", "/") + ".py")
        if not path.is_file():
            path = PACKAGE / module.replace(".", "/") / "__init__.py"
        self.module, self.names = module, _definitions(path)

    def value(self, name: str) -> Any:
        """Evaluate what a name of the module stands for.

        Raises:
            NeedsImport: It comes from a heavy package, or is computed.
        """
        if name not in self.names:
            raise NeedsImport(name)
        node = self.names[name]
        if isinstance(node, ast.ImportFrom):
            return self._imported(node, name)
        if isinstance(node, ast.Import):
            return self._light(node.names[0].name)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            return self._evaluated(node.value)
        if isinstance(node, ast.FunctionDef):
            return self._executed(_without_body(node), name)
        if isinstance(node, ast.ClassDef):
            try:
                return self._executed(node, name)
            except NeedsImport:
                return Any
        raise NeedsImport(name)

    def _imported(self, node: ast.ImportFrom, name: str) -> Any:
        source = node.module or ""
        original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        if source.startswith("hubert_lightning."):
            return _Source(source.removeprefix("hubert_lightning.")).value(original)
        return getattr(self._light(source), original)

    def _light(self, module: str) -> Any:
        if module.split(".")[0] not in LIGHT:
            raise NeedsImport(module)
        return importlib.import_module(module)

    def _evaluated(self, node: ast.expr) -> Any:
        if any(isinstance(inner, ast.Call) for inner in ast.walk(node)):
            raise NeedsImport(ast.unparse(node))
        return eval(compile(ast.Expression(node), self.module, "eval"), self._namespace(node))

    def _executed(self, node: ast.FunctionDef | ast.ClassDef, name: str) -> Any:
        namespace = self._namespace(node)
        namespace["__name__"] = "types"  # jsonargparse would import the module, and look for the class in the package
        exec(compile(ast.Module([node], []), self.module, "exec"), namespace)
        return namespace[name]

    def _namespace(self, node: ast.AST) -> dict[str, Any]:
        """Values of the names that an expression, or the head of a function or class, reads.

        Methods of a class find those of their names that need no heavy import.
        """
        heads = _names_read(node)
        namespace = {name: self.value(name) for name in sorted(heads) if name in self.names}
        if isinstance(node, ast.ClassDef):
            inner = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            for name in sorted((inner - heads - {node.name}) & self.names.keys()):
                with suppress(NeedsImport):
                    namespace[name] = self.value(name)
        return namespace


@cache
def _definitions(path: Path) -> dict[str, ast.stmt]:
    """Statements that define the names of a module."""
    names: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
        elif isinstance(node, ast.Assign):
            names |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return names


def _without_body(function: ast.FunctionDef) -> ast.FunctionDef:
    stub = copy.copy(function)
    stub.body = function.body[:1] if ast.get_docstring(function) is not None else [ast.Pass()]
    stub.decorator_list, stub.returns = [], None
    return ast.fix_missing_locations(stub)


def _names_read(node: ast.AST) -> set[str]:
    """Names that are evaluated when an expression is, or when a function or class is defined."""
    if isinstance(node, ast.FunctionDef):
        arguments = node.args
        heads: list[ast.AST | None] = [*node.decorator_list, *arguments.defaults, *arguments.kw_defaults, node.returns]
        heads += [argument.annotation for argument in [*arguments.args, *arguments.kwonlyargs]]
        return set().union(*(_names_read(head) for head in heads if head is not None))
    if isinstance(node, ast.ClassDef):
        return set().union(*(_names_read(part) for part in [*node.decorator_list, *node.bases, *node.body]))
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
