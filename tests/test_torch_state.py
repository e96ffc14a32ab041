"""State dicts of packed modules: they say what their bytes mean, and a module takes what it reads and nothing else."""

import copy
import io
import pickle
import warnings
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

import embpack
from embpack.layouts import LAYOUTS, PARAM_BYTES, RowFormat
from embpack.torch import PackedEmbedding, PackedEmbeddingBag, PackedEmbeddingBagCollection, quantize_
from embpack.torch.state import FORMAT, read_format

ROWS = 40
ALL = torch.arange(ROWS)
HADAMARD = {"rotation": "hadamard"}
CLUSTERED = {"layout": "clustered", "num_codebooks": 3}
TRELLIS = {"layout": "trellis", "bits": 4, "param_dtype": "float32"}


def pack(dim: int = 64, method: str = "asym", seed: int = 0, **options: object) -> PackedEmbedding:
    weight = np.random.default_rng(seed).standard_normal((ROWS, dim), dtype=np.float32)
    return PackedEmbedding.from_table(embpack.quantize(weight, method, **options))


def make_older(module: nn.Module) -> dict[str, torch.Tensor]:
    """What the module's state dict was before it said what its bytes mean."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items() if not name.endswith(FORMAT)}


def copy_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_unchanged(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name


# Rows that were packed, and a module of the same sizes that reads others.
FOREIGN = {
    "rotated": (pack(rotate="hadamard"), {}, "uniform:64:4:float16:hadamard", "uniform:64:4:float16"),
    "not rotated": (pack(), HADAMARD, "uniform:64:4:float16", "uniform:64:4:float16:hadamard"),
    "trellis": (pack(method="trellis", rotate="hadamard"), TRELLIS, "trellis:64:4:float32:hadamard", "trellis:64:4:f"),
    "trellis, not rotated": (pack(method="trellis"), TRELLIS | HADAMARD, "trellis:64:4:float32", "trellis:64:4:float3"),
    "kmeans-cls": (pack(method="kmeans-cls:K=3", rotate="hadamard"), CLUSTERED, "clustered:64:4:float16:h", "clust"),
    "kmeans-cls, not rotated": (pack(method="kmeans-cls:K=3"), CLUSTERED | HADAMARD, "clustered:64:4:float16", "clus"),
    "kmeans": (pack(method="kmeans", bits=2), {"bits": 2, "param_dtype": "float32"}, "codebook:64:2:float16", "unifo"),
    "wider": (pack(bits=2, param_dtype="float32"), {"dim": 40}, "uniform:64:2:float32", "uniform:40:4:float16"),
}


@pytest.mark.parametrize("way", [{}, {"strict": False}, {"assign": True}, {"strict": False, "assign": True}])
@pytest.mark.parametrize("case", FOREIGN)
def test_rows_of_another_format_are_refused(case, way):
    saved, options, theirs, ours = FOREIGN[case]
    module = PackedEmbedding(ROWS, options.get("dim", 64), **{k: v for k, v in options.items() if k != "dim"})
    module.packed.random_()
    model, before = nn.ModuleDict({"user": module}), copy_buffers(nn.ModuleDict({"user": module}))
    assert [tensor.shape for tensor in saved.buffers()] == [tensor.shape for tensor in module.buffers()]
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(nn.ModuleDict({"user": saved}).state_dict(), **way)
    message = str(caught.value)
    assert f"user: the rows are '{theirs}" in message and f"but the module reads '{ours}" in message
    assert "Make the module like the one that was saved: " in message and "Missing" not in message
    assert_unchanged(model, before)


def test_the_message_says_what_to_do():
    with pytest.raises(RuntimeError) as caught:
        pack(method="asym", bits=2, param_dtype="float32").load_state_dict(pack(method="kmeans", bits=2).state_dict())
    assert str(caught.value) == (
        "Error(s) in loading state_dict for PackedEmbedding:\n\tPackedEmbedding: the rows are 'codebook:64:2:float16', "
        "but the module reads 'uniform:64:2:float32'. Make the module like the one that was saved: "
        "param_dtype='float16', layout='codebook'"
    )


def test_models_that_were_packed_in_two_ways_do_not_take_each_others_rows():
    """The report that this is from: cosine .02 to the rows that were saved."""
    rotated, plain = nn.Sequential(nn.Embedding(1000, 64)), nn.Sequential(nn.Embedding(1000, 64))
    quantize_(rotated, rotate="hadamard"), quantize_(plain)
    with pytest.raises(RuntimeError, match="0: the rows are 'uniform:64:4:float16:hadamard', but"):
        plain.load_state_dict(rotated.state_dict())
    again = nn.Sequential(nn.Embedding(1000, 64))
    quantize_(again, rotate="hadamard")
    assert again.load_state_dict(rotated.state_dict()) == ([], [])
    assert torch.equal(again(ALL), rotated(ALL))


def test_a_format_that_is_not_known_is_refused():
    state = pack().state_dict()
    for text, shown in ((b"wavelet:64:4:float16", "wavelet:64:4:float16"), (b"\xff\0\n", r"ÿ\\x00\\n"), (b"", "")):
        state[FORMAT] = torch.tensor(list(text.ljust(64, b"\0")), dtype=torch.uint8)
        with pytest.raises(RuntimeError, match=f"the rows are '{shown}', but .*by an embpack that knows this format"):
            pack().load_state_dict(state)


def test_collections_take_what_their_tables_read():
    def make(rotate: str | None) -> PackedEmbeddingBagCollection:
        bags = {name: PackedEmbeddingBag.from_table(pack(seed=3, rotate=rotate).table) for name in ("user", "item")}
        return PackedEmbeddingBagCollection(bags)

    saved, plain = make("hadamard"), make(None)
    before = copy_buffers(plain)
    with pytest.raises(RuntimeError) as caught:
        plain.load_state_dict(saved.state_dict(), strict=False)
    for name in ("user", "item"):
        assert f"embedding_bags.{name}: the rows are 'uniform:64:4:float16:hadamard', but" in str(caught.value)
    assert_unchanged(plain, before)
    assert make("hadamard").load_state_dict(saved.state_dict()) == ([], [])


# Where the format goes


def save_and_load(state, folder):
    save_file(state, folder / "a.safetensors")
    return load_file(folder / "a.safetensors")


def pickle_state(state, folder):
    torch.save(state, folder / "a.pt")
    return torch.load(folder / "a.pt", weights_only=True)


def go_through_dcp(state, folder):
    dcp.save(state, checkpoint_id=folder / "dcp")
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(loaded, checkpoint_id=folder / "dcp")
    return loaded


@pytest.mark.filterwarnings("ignore:torch.distributed")
@pytest.mark.parametrize("way", [save_and_load, pickle_state, go_through_dcp])
@pytest.mark.parametrize("method", ["asym", "trellis", "kmeans-cls:K=3"])
def test_it_goes_with_the_state_dict(tmp_path, way, method):
    saved = pack(method=method, rotate="hadamard")
    state = way(saved.state_dict(), tmp_path)
    other = pack(method=method, seed=1, rotate="hadamard")
    assert other.load_state_dict(state) == ([], [])
    assert torch.equal(other(ALL), saved(ALL))
    with pytest.raises(RuntimeError, match=r"the rows are .*:hadamard', but the module reads"):
        pack(method=method).load_state_dict(state)


def export(module):
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (ALL,)), file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize(
    "way",
    [
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: copy.deepcopy(module).half(),
        lambda module: copy.deepcopy(module).to(torch.bfloat16),
        lambda module: copy.deepcopy(module).share_memory(),
        export,
    ],
    ids=["deepcopy", "pickle", "half", "to", "share_memory", "export"],
)
@pytest.mark.parametrize("method", ["asym", "trellis", "kmeans-cls:K=3"])
def test_it_goes_with_copies(way, method):
    saved = pack(method=method, rotate="hadamard")
    state = way(saved).state_dict()
    assert read_format(state[FORMAT]) == str(saved.row_format)
    assert state[FORMAT].dtype == torch.uint8 and state[FORMAT].shape == (64,)
    assert pack(method=method, seed=1, rotate="hadamard").load_state_dict(state) == ([], [])


def test_modules_on_the_meta_device_take_what_they_read():
    saved = pack(method="trellis", rotate="hadamard")
    with torch.device("meta"):
        own, other = PackedEmbedding(ROWS, 64, **TRELLIS | HADAMARD), PackedEmbedding(ROWS, 64, **TRELLIS)
    emptied = copy.deepcopy(own).to_empty(device="cpu")
    for module, way in ((own, {"assign": True}), (emptied, {})):
        assert module.load_state_dict(saved.state_dict(), **way) == ([], [])
        assert torch.equal(module(ALL), saved(ALL))
    with pytest.raises(RuntimeError, match="but the module reads 'trellis:64:4:float32'"):
        other.load_state_dict(saved.state_dict(), assign=True)
    on_meta = copy.deepcopy(saved).to("meta").state_dict()
    assert other.load_state_dict(on_meta, assign=True) == ([], [])  # nothing has values there


@pytest.mark.filterwarnings("ignore:torch.distributed")
def test_what_writes_to_buffers_in_place_is_noticed_afterwards(tmp_path):
    dcp.save(pack(rotate="hadamard").state_dict(), checkpoint_id=tmp_path / "dcp")
    module = pack(seed=1)
    state = module.state_dict()  # the module's own memory
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    with pytest.raises(RuntimeError, match="the rows are 'uniform:64:4:float16:hadamard', but the module reads"):
        module.load_state_dict(state)
    for use in (lambda: module.table, module.to_float, lambda: PackedEmbeddingBag.from_table(module.table)):
        with pytest.raises(ValueError, match="the rows are 'uniform:64:4:float16:hadamard', but the module reads"):
            use()


def test_modules_that_were_pickled_before_say_it_too():
    module = pack(rotate="hadamard")
    state = copy.deepcopy(module.__dict__)
    del state["_buffers"][FORMAT]
    older = PackedEmbedding.__new__(PackedEmbedding)
    older.__setstate__(state)
    assert read_format(older.state_dict()[FORMAT]) == "uniform:64:4:float16:hadamard"
    assert torch.equal(older(ALL), module(ALL))


# Older state dicts


@pytest.mark.parametrize("way", [{}, {"assign": True}])
@pytest.mark.parametrize("method", ["asym", "trellis", "kmeans-cls:K=3", "kmeans"])
@pytest.mark.parametrize("rotate", [None, "hadamard"])
def test_older_state_dicts_load_with_a_warning(method, rotate, way):
    saved, module = (nn.Sequential(pack(method=method, seed=seed, rotate=rotate)) for seed in (0, 1))
    older = make_older(saved)
    keys = list(older)
    row_format = str(saved[0].row_format)
    with pytest.warns(
        UserWarning, match=f"does not say whether its rows were rotated; they are read as '{row_format}',"
    ):
        assert module.load_state_dict(older, **way) == ([], [])
    assert torch.equal(module(ALL), saved(ALL)) and list(older) == keys
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved.load_state_dict(module.state_dict())


def test_older_state_dicts_load_into_the_meta_device():
    saved = pack()
    with torch.device("meta"):
        module = PackedEmbedding(ROWS, 64)
    with pytest.warns(UserWarning, match="of an earlier version"):
        module.load_state_dict(make_older(saved), assign=True)
    assert not any(buffer.is_meta for buffer in module.buffers()) and torch.equal(module(ALL), saved(ALL))


@pytest.mark.parametrize("way", [{}, {"strict": False}, {"assign": True}])
def test_older_state_dicts_that_mean_one_of_two_things_are_refused(way):
    saved, module = (nn.Sequential(pack(bits=2, param_dtype="float32", seed=seed)) for seed in (0, 1))
    before, older = copy_buffers(module), make_older(saved)
    with pytest.raises(RuntimeError) as caught:
        module.load_state_dict(older, **way)
    assert (
        "0: the state dict lacks 0.row_format_ascii, as those of earlier versions do, and its sizes are those of both "
        "'uniform:64:2:float32' and 'codebook:64:2:float16'; the module reads the first. If you know that the rows are "
        "that, say so: state['0.row_format_ascii'] = module.state_dict()['0.row_format_ascii']"
    ) in str(caught.value)
    assert_unchanged(module, before)
    older["0.row_format_ascii"] = module.state_dict()["0.row_format_ascii"]
    assert module.load_state_dict(older, **way) == ([], [])
    assert torch.equal(module(ALL), saved(ALL))


def test_a_state_dict_without_the_module_leaves_it_alone():
    model = nn.ModuleDict({"user": pack(), "over": nn.Linear(2, 2)})
    before = copy_buffers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        missing = model.load_state_dict(nn.ModuleDict({"over": nn.Linear(2, 2)}).state_dict(), strict=False)
    assert missing == (["user.packed", "user.row_format_ascii"], [])
    assert_unchanged(model, before)


def test_sizes_that_differ_leave_all_of_a_module_alone():
    module = PackedEmbedding(ROWS, 64, layout="clustered", num_codebooks=4)
    before = copy_buffers(module)
    for state in (pack(method="kmeans-cls:K=3").state_dict(), make_older(pack(method="kmeans-cls:K=3"))):
        with pytest.raises(RuntimeError, match=r"size mismatch for codebooks: .* torch.Size\(\[3, 32\]\)"):
            module.load_state_dict(state, strict=False)
        assert_unchanged(module, before)


def list_formats(embedding_dim: int) -> list[RowFormat]:
    formats = []
    for layout, bits, param_dtype in product(LAYOUTS, (2, 4, 8), PARAM_BYTES):
        try:
            formats.append(RowFormat(embedding_dim, bits, param_dtype, layout))
        except ValueError:  # the layout has no such rows
            continue
    return formats


@pytest.mark.parametrize("embedding_dim", [1, 2, 3, 4, 7, 16, 20, 32, 64, 128, 255, 300])
def test_formats_of_the_same_sizes_are_known(embedding_dim):
    def sizes_of(row_format: RowFormat) -> dict[str, torch.Size]:
        options = {name: getattr(row_format, name) for name in ("bits", "param_dtype", "layout")}
        module = PackedEmbedding(ROWS, embedding_dim, num_codebooks=1, **options)
        return {name: buffer.shape for name, buffer in module.named_buffers()}

    formats = list_formats(embedding_dim)
    for row_format in formats:
        same = [other for other in formats if other != row_format and sizes_of(other) == sizes_of(row_format)]
        assert row_format.find_others_of_size() == same


def test_what_sizes_do_not_tell():
    assert RowFormat(64).find_others_of_size() == []
    assert RowFormat(64, 3.5, "float32", "trellis").find_others_of_size() == []
    assert RowFormat(8, 3.5, "float32", "trellis", "hadamard").find_others_of_size() == []
    (other,) = RowFormat(64, 2, "float32", rotation="hadamard").find_others_of_size()
    assert str(other) == "codebook:64:2:float16:hadamard"
    assert [str(each) for each in RowFormat(1).find_others_of_size()] == ["uniform:1:2:float16", "uniform:1:8:float16"]
