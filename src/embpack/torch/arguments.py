"""What modules are given: tensors, nested tensors, and what torch.fx has in their place while it traces."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from embpack.errors import kind_of


def check_tensors(**values: object) -> Any:
    """Return one of the proxies that torch.fx traces with, if one is given; None otherwise.

    Raises:
        TypeError: an argument is given and no tensor, nor stands for one; the first must be given.
    """
    proxy = None
    for position, (name, value) in enumerate(values.items()):
        if isinstance(value, Proxy):
            proxy = value
        elif not isinstance(value, Tensor) and (value is not None or not position):
            raise TypeError(f"{name} is {kind_of(value)}; it must be a tensor")
    return proxy


def call_as_leaf(proxy: Any, module: nn.Module, *arguments: Any) -> Tensor:
    """Trace a module's call as that of a leaf, as torch.fx does with the modules of torch.nn.

    So the traced model has the module itself: what is changed in it later counts, and its state dict is the same.
    """
    found: Tensor = proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(module), arguments, {})
    return found


def map_nested(look_up: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """Look up the rows of a nested tensor's indices: a nested tensor of the same layout and lengths.

    Raises:
        ValueError: it is transposed, or has gaps.
    """
    if input.layout != torch.jagged:
        return torch.nested.as_nested_tensor([look_up(part) for part in input.unbind()])
    jagged = _check_jagged(input)
    return torch.nested.nested_tensor_from_jagged(look_up(jagged.values()), jagged.offsets())


def flatten_nested(input: Any, offsets: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Make bags of a nested tensor: indices, offsets with the last, and weights.

    Raises:
        TypeError: the tensor is not of layout torch.jagged.
        ValueError: it is not 2-D, is transposed or has gaps; offsets are given, too; or weights are not nested alike.
    """
    if input.layout != torch.jagged:
        raise TypeError("input is a nested tensor of layout torch.strided; bags take layout torch.jagged")
    if offsets is not None:
        raise ValueError("offsets are for 1-D indices; each row of a nested tensor is a bag by itself")
    bags = _check_jagged(input)
    if input.dim() != 2:
        raise ValueError(f"input is a nested tensor of {input.dim()} dimensions; bags take 2")
    if weights is not None:
        if not weights.is_nested or weights.shape != input.shape:
            raise ValueError("per_sample_weights must be nested as input is, with the same offsets")
        weights = _check_jagged(weights).values()
    return bags.values(), bags.offsets(), weights


def _check_jagged(values: Tensor) -> Any:
    """Return a nested tensor as one with methods that PyTorch's types lack."""
    if not values.is_contiguous():
        raise ValueError("a nested tensor is transposed or has gaps; lookups take contiguous ones: tensor.contiguous()")
    return values
