"""PackedWeight: packed rows as the weight tensor that a float module has, for code that reads it."""

from typing import Any

from torch import Tensor
from torch.nn import functional

from embpack.errors import kind_of
from embpack.torch.private import argument_names, as_plain_tensors, make_wrapper, map_tree, written_names

# What PyTorch does without its operators.
_OF_VALUES = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__deepcopy__)
_DATA: Any = Tensor.data


class PackedWeight(Tensor):
    """A packed module's rows as a tensor [num_embeddings, embedding_dim] of the module's dtype.

    Its shape, dtype and device cost nothing, and torch.nn.functional.linear multiplies by the packed rows. All else
    unpacks all rows anew, into memory of its own: to write to what comes of that, such as weight[3], does not reach
    the module. It has no gradients.

    Raises:
        TypeError: it is written to.

    Source: "Extending PyTorch", subclassing torch.Tensor, in PyTorch's documentation.
    """

    module: Any

    @staticmethod
    def __new__(cls: type["PackedWeight"], module: Any) -> "PackedWeight":
        """Make it of a PackedModule."""
        shape = (module.num_embeddings, module.row_format.embedding_dim)
        made: PackedWeight = make_wrapper(cls, shape, module.dtype, module.device)
        made.module = module
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight of {self.module}"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what does not unpack all rows, or is to be refused before they are."""
        kwargs = kwargs or {}
        if func is functional.linear:
            return _multiply(*args, **kwargs)
        if func == _DATA.__get__:
            return args[0]
        if func is Tensor.__setitem__ and isinstance(args[0], PackedWeight):
            raise explain_write(args[0].module)
        if func in _OF_VALUES:
            args = (_unpack(args[0]), *args[1:])
        with as_plain_tensors():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # whose types lack that it is a method of the class
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do all else with unpacked rows."""
        kwargs = kwargs or {}
        given = {**dict(zip(argument_names(func), args, strict=False)), **kwargs}
        for name in written_names(func):
            if isinstance(given.get(name), PackedWeight):
                raise explain_write(given[name].module)
        args, kwargs = map_tree(_unpack, (args, kwargs))
        return func(*args, **kwargs)


def _unpack(value: Any) -> Any:
    return value.module.unpack() if isinstance(value, PackedWeight) else value


def _multiply(input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(weight, PackedWeight):
        return weight.module.multiply(input, bias)
    return functional.linear(*map(_unpack, (input, weight, bias)))


def explain_write(module: Any) -> TypeError:
    """The error for writing to a packed module's weight."""
    return TypeError(
        f"the weight of {kind_of(module)} is packed rows, which cannot be written to: write to the float weight before "
        "it is packed, or to that of module.to_float()"
    )
