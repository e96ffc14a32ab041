"""All that embpack uses of PyTorch though PyTorch does not document it, so that what a release changes is seen here.

PyTorch 2.13 has everything; where a release lacks something, importing embpack.torch says what.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree

# Owner and name of each.
USED: dict[str, tuple[object, str]] = {
    "torch.Tensor.__dlpack_c_exchange_api__": (torch.Tensor, "__dlpack_c_exchange_api__"),
    "torch.autograd.forward_ad._current_level": (forward_ad, "_current_level"),
    "torch.nn.Module._buffers": (nn.Module(), "_buffers"),
    "torch.nn.Module._forward_hooks": (nn.Module(), "_forward_hooks"),
    "torch.nn.Module._forward_pre_hooks": (nn.Module(), "_forward_pre_hooks"),
    "torch.nn.modules.module._has_any_global_hook": (nn.modules.module, "_has_any_global_hook"),
    "torch.nn.Module._apply": (nn.Module, "_apply"),
    "torch.nn.Module._load_from_state_dict": (nn.Module, "_load_from_state_dict"),
    "torch.Tensor._make_wrapper_subclass": (torch.Tensor, "_make_wrapper_subclass"),
    "the _schema of operators": (torch.ops.aten.add.Tensor, "_schema"),
    "torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs": (
        torch._C._aoti,
        "alloc_tensors_by_stealing_from_void_ptrs",
    ),
    "torch._C._aoti.unsafe_alloc_void_ptr_from_tensor": (torch._C._aoti, "unsafe_alloc_void_ptr_from_tensor"),
    "torch._C.DisableTorchFunctionSubclass": (torch._C, "DisableTorchFunctionSubclass"),
    "torch.utils._pytree.tree_map": (_pytree, "tree_map"),
    "DistributedDataParallel._set_params_and_buffers_to_ignore_for_model": (
        DistributedDataParallel,
        "_set_params_and_buffers_to_ignore_for_model",
    ),
}


def check_pytorch() -> None:
    """Raise ImportError if PyTorch lacks something."""
    lacking = [name for name, (owner, attribute) in USED.items() if not hasattr(owner, attribute)]
    if lacking:
        raise ImportError(
            f"embpack.torch needs PyTorch 2.13, or a later one that still has {', '.join(lacking)}; "
            f"this is {torch.__version__}"
        )


check_pytorch()

# DLPack's C functions for PyTorch's tensors, a capsule: what the core reads and makes tensors with. They have this name
# since December 2025, in DLPack 1.3. Tensor.__dlpack__, which PyTorch documents, makes an object of each tensor at each
# call.
EXCHANGE_API: Any = getattr(torch.Tensor, "__dlpack_c_exchange_api__")  # noqa: B009  (PyTorch's types lack it)

# Where PyTorch's C functions for operators are found, which are documented (its stable ABI).
PYTHON_LIBRARY: str = torch._C.__file__

# A new handle of a tensor, a capsule, as these functions take them. TorchInductor's code has it, since 2.6.
handle_of_tensor: Any = torch._C._aoti.unsafe_alloc_void_ptr_from_tensor


def tensor_of_handle(handle: Any) -> Tensor:
    """Return the tensor of a handle, and delete the handle.

    TorchInductor's code has this, since 2.6, for lists; the function for one handle leaves it undeleted.
    """
    tensor: Tensor = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([handle])[0]
    return tensor


def in_forward_mode() -> bool:
    """Whether derivatives in forward mode are being taken, by torch.func.jvp or by dual_level.

    Since before 2.0. The public way, unpack_dual, sees nothing of it within an operator, which would silently lose
    them.
    """
    return forward_ad._current_level >= 0


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's buffers by name, also those that are None.

    Since before 2.0. The public way, a module's attributes, takes a third of a microsecond more for each.
    """
    return module._buffers


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of any kind are registered with a module.

    Each kind has an attribute, such as _forward_hooks or _state_dict_pre_hooks, since before 2.0. There is no public
    way, and a module that takes another's place would silently lose them.
    """
    return any(value for name, value in vars(module).items() if name.startswith("_") and name.endswith("_hooks"))


def is_only_forward(module: nn.Module) -> bool:
    """Whether calling an nn.EmbeddingBag, where nothing has gradients, does what PyTorch's own forward does, no more.

    nn.Module.__call__ asks the same, by these names, since before 2.0.
    """
    run_for_all: Any = nn.modules.module._has_any_global_hook  # which has no types
    runs_hooks = module._forward_hooks or module._forward_pre_hooks or run_for_all()
    return type(module) is nn.EmbeddingBag and not runs_hooks and "forward" not in vars(module)


def leave_out_of_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Let DistributedDataParallel leave parameters and buffers of a model alone, beside those that it does already.

    It reads the names from the model that it wraps, since 1.6; the function that sets them says that it stands in for
    what is to come. The only public way, broadcast_buffers=False, is for all buffers.
    """
    already = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    leave_out: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model  # which has no types
    leave_out(model, {*already, *names})


def argument_names(operator: Any) -> list[str]:
    """Names of an operator's arguments, in order.

    Since before 2.0. There is no public way; the exporter to ONNX gives them by position.
    """
    return [argument.name for argument in operator._schema.arguments]


def written_names(operator: Any) -> list[str]:
    """Names of the arguments that an operator writes to.

    Its schema has them, since before 2.0. There is no public way.
    """
    arguments = operator._schema.arguments
    return [each.name for each in arguments if each.alias_info is not None and each.alias_info.is_write]


def make_wrapper(kind: type[Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """Make a tensor of a subclass that has a shape and a type but no values.

    Since 1.10; PyTorch's documentation of subclasses shows it without listing it. There is no public way.
    """
    return torch.Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device)


def as_plain_tensors() -> Any:
    """Make a context in which what a function returns is not of the subclasses of tensors that it was given.

    Since 1.13 of this name; PyTorch's documentation of subclasses uses it. There is no public way.
    """
    return torch._C.DisableTorchFunctionSubclass()


def map_tree(function: Any, values: Any) -> Any:
    """Call a function with each value in nested tuples, lists and dicts, and return what it makes, nested alike.

    Since 1.9; subclasses of tensors in PyTorch's own code use it. There is no public way.
    """
    return _pytree.tree_map(function, values)


class GuardedModule(nn.Module):
    """A module that sees what load_state_dict brings for it before anything of it is changed.

    load_state_dict calls nn.Module._load_from_state_dict of each module, since before 2.0; nn.BatchNorm2d, too, has one
    of its own to take older states. A hook, which would be public, can refuse nothing without PyTorch's saying also
    that what it refused is missing.
    """

    def _receive(self, state: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        """Return the state to load, or raise ValueError, whose message load_state_dict then has among its errors."""
        raise NotImplementedError

    def _received(self, names: Collection[str]) -> None:
        """Look at the module's tensors of these names, which were loaded."""
        raise NotImplementedError

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            state_dict = self._receive(state_dict, prefix)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._received([name for name in buffers_of(self) if prefix + name in state_dict])


class CastModule(nn.Module):
    """A module with a dtype that .half(), .to(dtype) and the like change, its own and those of a module that has it.

    All of them call nn.Module._apply with what they do to each tensor, since before 2.0. The only public way is a
    tensor of that type, which would be saved and exported.

    Attributes:
        dtype: a floating-point type.
    """

    dtype: torch.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self
