"""What embpack.torch uses of PyTorch that PyTorch does not document, and that it uses nothing else of that kind.

PyTorch 2.13 has all of it. A failure here says what another release does not have, or has otherwise.
"""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import embpack
from embpack.torch import private

KNOWN_VERSIONS = ("2.13",)
CHANGED = (
    f"PyTorch {torch.__version__} does this otherwise than {', '.join(KNOWN_VERSIONS)}: see embpack/torch/private.py"
)
MODULES = sorted(Path(embpack.__file__).parent.rglob("*.py"))


def test_a_pytorch_that_lacks_something_is_refused(monkeypatch):
    private.check_pytorch()
    monkeypatch.setitem(private.USED, "torch.nn.Module._gone", (nn.Module, "_gone"))
    with pytest.raises(ImportError) as caught:
        private.check_pytorch()
    assert str(caught.value) == (
        f"embpack.torch needs PyTorch 2.13, or a later one that still has torch.nn.Module._gone; this is "
        f"{torch.__version__}"
    )


def test_the_exchange_api_is_a_capsule():
    assert 'object "dlpack_exchange_api" at' in repr(private.EXCHANGE_API), CHANGED


def test_a_tensor_goes_through_its_handle_which_is_deleted():
    tensor = torch.arange(6).reshape(2, 3)
    owners = tensor._use_count()
    assert private.tensor_of_handle(private.handle_of_tensor(tensor)) is tensor, CHANGED
    assert tensor._use_count() == owners, CHANGED


def test_forward_mode_is_seen():
    seen = []

    def look(values):
        seen.append(private.in_forward_mode())
        return values

    look(torch.ones(3))
    with torch.autograd.forward_ad.dual_level():
        look(torch.ones(3))
    torch.func.jvp(look, (torch.ones(3),), (torch.ones(3),))
    torch.func.vjp(look, torch.ones(3))
    assert seen == [False, True, True, False], CHANGED


def test_buffers_are_those_of_the_module():
    module = nn.Module()
    module.register_buffer("there", torch.zeros(3))
    module.register_buffer("none", None)
    assert private.buffers_of(module) == {"there": module.there, "none": None}, CHANGED
    module.there = torch.ones(2)
    assert private.buffers_of(module)["there"] is module.there, CHANGED


HOOKS = [name for name in dir(nn.Module) if name.startswith("register_") and name.endswith("_hook")]


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_any_kind_are_seen(kind):
    module = nn.Embedding(3, 4)
    assert not private.has_hooks(module), CHANGED
    getattr(module, kind)(lambda *arguments: None)
    assert private.has_hooks(module), CHANGED


def test_there_are_hooks():
    assert {"register_forward_hook", "register_full_backward_hook", "register_load_state_dict_pre_hook"} < set(HOOKS)


def test_arguments_of_an_operator_have_names():
    found = private.argument_names(torch.ops.embpack.embedding.default)
    assert found == ["packed", "row_format", "indices", "clusters", "codebooks", "dtype"], CHANGED


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (nn.Module.half, torch.float16),
        (nn.Module.double, torch.float64),
        (lambda module: module.to(torch.bfloat16), torch.bfloat16),
        (lambda module: module.type(torch.float64), torch.float64),
        (lambda module: module.to(torch.zeros(1).half()), torch.float16),
        (lambda module: module.to("meta"), torch.float32),
        (lambda module: module.requires_grad_(requires_grad=False), torch.float32),
    ],
)
def test_casts_reach_a_module_through_its_parent(cast, dtype):
    module = private.CastModule()
    module.dtype = torch.float32
    cast(nn.Sequential(nn.Sequential(module)))
    assert module.dtype == dtype, CHANGED


def find_underscored(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Names with an underscore in front that are attributes of something, and those that are defined."""
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in attributes if isinstance(node.ctx, ast.Load)}
    defined = {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    defined |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return tuple({name for name in names if name.startswith("_")} for names in (used, defined))


def test_nothing_else_private_is_used():
    owners = (torch, torch.Tensor, nn.Module, nn.Module(), torch.library, torch.onnx, torch.func, torch.compiler)
    theirs = {name for owner in owners for name in dir(owner) if name.startswith("_") and not name.startswith("__")}
    theirs |= {attribute for _, attribute in private.USED.values()}
    assert {"_buffers", "_schema", "_current_level"} <= find_underscored(ast.parse(inspect.getsource(private)))[0]
    found = [find_underscored(ast.parse(path.read_text())) for path in MODULES if path.name != "private.py"]
    assert len(found) > 50
    ours = set.union(*(defined for _, defined in found))
    assert set.union(*(used for used, _ in found)) & theirs - ours == set()
