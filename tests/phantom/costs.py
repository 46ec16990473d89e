"""Operations and bytes of an aten call, from its tensors."""

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

# Calls that launch nothing, besides views
WITHOUT_KERNEL = {
    "_unsafe_view", "detach", "detach_", "lift_fresh", "alias", "unsafe_split", "unsafe_split_with_sizes",
    "unsafe_chunk",
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided",
    "set_", "resize_", "is_same_size", "is_pinned", "record_stream", "_reshape_alias", "squeeze_", "unsqueeze_", "t_",
    "transpose_", "as_strided_", "_version",
}  # fmt: skip
OVERWRITING = {"copy_", "zero_", "fill_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
"""In-place calls that do not read what they write."""


def launches_nothing(func: Any) -> bool:
    """Whether an operator only makes a view, or allocates."""
    return func.is_view or func.overloadpacket.__name__ in WITHOUT_KERNEL or func.overloadpacket.__name__[:4] == "sym_"


def bytes_of(tensor: Tensor) -> int:
    """Count the bytes of a tensor; dimensions that are expanded count once."""
    sizes = [size if stride or not size else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return prod(sizes) * tensor.element_size()


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Count operations as torch's counter does, but those of the gradients of grouped convolutions by their groups."""
    if func.overloadpacket is torch.ops.aten.convolution_backward:
        gradient, weight, mask = args[0], args[2], args[10]
        return 2 * gradient.shape[0] * prod(gradient.shape[2:]) * prod(weight.shape) * sum(mask[:2])
    count = flop_registry.get(func.overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


def argument(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an argument of a call by its name, its default if it is not given, None if there is none."""
    for index, parameter in enumerate(func._schema.arguments):
        if parameter.name == name:
            return kwargs.get(name, args[index] if index < len(args) else parameter.default_value)
    return None
