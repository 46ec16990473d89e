"""Methods that torch compiles, in a number of graphs that does not grow with the shapes of batches.

A method has one graph for batches of several rows and, if there are any, one for batches of a single row: torch
compiles sizes of 1 apart. Evaluation and padded batches have graphs of their own.
"""

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

BACKEND = "inductor"
"""torch's compiler of what has been traced."""
GRAPHS = 64
"""Graphs of one method before torch runs it uncompiled: several models, each in training and evaluation, with and
without padding."""

Module = TypeVar("Module", bound=nn.Module)
Inputs = ParamSpec("Inputs")
Result = TypeVar("Result")
Method = Callable[Concatenate[Module, Inputs], Result]


def compilable(*dynamic: Sequence[int]) -> Callable[[Method[Module, Inputs, Result]], Method[Module, Inputs, Result]]:
    """Make a method of a module compilable: `compile_methods` then compiles it, without a break and for all sizes.

    Modules of one class share the graph. The method calls no code that torch cannot trace, and takes positional
    arguments alone.

    Args:
        dynamic: Dimensions of each argument whose size differs between batches; arguments may be None.
    """

    def decorate(method: Method[Module, Inputs, Result]) -> Method[Module, Inputs, Result]:
        @wraps(method)
        def call(self: Module, /, *args: Inputs.args, **kwargs: Inputs.kwargs) -> Result:
            if not getattr(self, "compiles", False) or torch.compiler.is_exporting():
                return method(self, *args, **kwargs)
            result: Result = call_compiled(method, ((), *dynamic), self, *args, **kwargs)
            return result

        return call

    return decorate


def compile_methods(*modules: nn.Module) -> None:
    """Compile the compilable methods of modules at their next call; their parts stay as they are.

    Args:
        modules: Modules, whose copies are compiled as well.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for module in modules:
        module.compiles = True  # type: ignore[assignment]


def call_compiled(
    function: Callable[..., Result], dynamic: Sequence[Sequence[int]], *args: object, **kwargs: object
) -> Result:
    """Call a function, compiled at its first call.

    Args:
        function: Function that torch can trace as a whole.
        dynamic: Dimensions of each positional argument whose size differs between batches.
        *args: Arguments of the function.
        **kwargs: Named arguments of the function.
    """
    for argument, dimensions in zip(args, dynamic, strict=True):
        if isinstance(argument, Tensor):
            torch._dynamo.maybe_mark_dynamic(argument, list(dimensions))
    compiled: Callable[..., Result] = _compiled(function, BACKEND)
    return compiled(*args, **kwargs)


@cache
def _compiled(method: Callable[..., Result], backend: str) -> Callable[..., Result]:
    return torch.compile(method, fullgraph=True, backend=backend)
