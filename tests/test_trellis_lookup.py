"""Lookup of trellis-coded rows: to the bit what the reference decodes, whatever the width, bits and instruction set."""

import ctypes
import mmap
import pickle

import numpy as np
import pytest
from test_lookup import as_bfloat16, check_lookups, make_table, pool_in_order

import embpack
from embpack.layouts import RowFormat, trellis
from embpack.methods import trellis_search

DIMS = (4, 5, 16, 17, 31, 32, 33, 64, 100, 128, 130, 384)
BITS = (2, 2.5, 3, 3.5, 4, 5, 6, 7)


def make_random(rng, embedding_dim, bits, num_embeddings=40):
    """A table of random bytes: each is a row of some value."""
    row_format = RowFormat(embedding_dim, bits, "float32", "trellis")
    packed = rng.integers(0, 256, (num_embeddings, row_format.row_bytes), np.uint8)
    return embpack.PackedTable(packed, row_format, codebooks=make_parameters(rng, row_format).join())


def make_scales(largest, count):
    return trellis_search.make_scales(largest, (float(largest.min()), float(largest.max())), count)


def make_parameters(rng, row_format):
    form = row_format.form.trellis
    halves = (form.round_levels(np.sort(np.abs(rng.standard_normal(n // 2)))) for n in form.num_levels)
    narrow, wide = (np.concatenate([-half[::-1], half]) for half in halves)
    mean = rng.standard_normal(row_format.embedding_dim).astype(np.float32)
    return trellis.TrellisParameters(narrow, wide, make_scales(rng.uniform(0.01, 2.0, 50), 128), mean)


def make_encoded(rng, embedding_dim, bits, num_embeddings=40):
    """A table as an encoder makes it."""
    rows = rng.standard_normal((num_embeddings, embedding_dim)).astype(np.float32)
    row_format = RowFormat(embedding_dim, bits, "float32", "trellis")
    mean = rows.mean(axis=0)
    scales = make_scales(np.abs(rows - mean).max(axis=1), 16)
    form = row_format.form.trellis
    narrow, wide = (form.round_levels(np.linspace(-1, 1, count)) for count in form.num_levels)
    parameters = trellis.TrellisParameters(narrow, wide, scales, mean)
    packed = trellis_search.encode(rows, row_format.form.trellis, parameters)
    return rows, embpack.PackedTable(packed, row_format, codebooks=parameters.join())


def decode(table):
    form = table.row_format.form.trellis
    return trellis.decode(table.packed, form, trellis.TrellisParameters.split(table.codebooks, form))


@pytest.mark.parametrize("embedding_dim", DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_lookups_are_the_references(trellis_isa, rng, embedding_dim, bits):
    table = make_random(rng, embedding_dim, bits)
    rows = decode(table)
    np.testing.assert_array_equal(table.dequantize(), rows)
    check_lookups(table, rows, rng.integers(0, len(table), 600))


# Rows of more than 4,096 values are looked up stripe by stripe; the last one may have no whole block, or one of 32.
@pytest.mark.parametrize("embedding_dim", [1000, 4096, 4097, 4128, 4160, 5120, 8192, 10752, 65535, 65536])
@pytest.mark.parametrize("bits", [3.3, 4, 6.5])
def test_wide_rows_are_the_references(trellis_isa, rng, embedding_dim, bits):
    table = make_random(rng, embedding_dim, bits, 40 if embedding_dim < 20_000 else 5)
    rows = decode(table)
    np.testing.assert_array_equal(table.dequantize(), rows)
    indices, offsets = rng.integers(0, len(table), 90), np.array([0, 40])
    np.testing.assert_array_equal(table[indices], rows[indices])
    for mode in ("sum", "mean"):
        np.testing.assert_array_equal(
            table.embedding_bag(indices, offsets, mode), pool_in_order(rows, indices, offsets, mode=mode)
        )
    np.testing.assert_array_equal(table.embedding_bag(indices, offsets, "max")[1], rows[indices[40:]].max(axis=0))


def test_instruction_sets_agree_on_wide_rows(trellis_isa, rng):
    table = make_random(rng, 5130, 3.6, 20)
    indices, offsets = rng.integers(0, len(table), 300), np.array([0, 7, 7, 290])
    weights, vectors = rng.standard_normal(300, dtype=np.float32), rng.standard_normal((3, 5130), dtype=np.float32)

    def look_up():
        return [
            table.embedding_bag(indices, offsets, "sum", weights),
            table.embedding_bag(indices.astype(np.int32), offsets.astype(np.int32), "mean", padding_idx=3),
            table.gather(indices[:9], "float16"),
            table.linear(vectors),
        ]

    found = look_up()
    embpack._native.use_isa("portable")
    for one, other in zip(found, look_up(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_wrong_indices_of_wide_rows_are_named(trellis_isa, rng):
    table = make_random(rng, 4200, 4, 20)
    with pytest.raises(IndexError, match=r"indices\[2\] is 20, but the table has 20 rows"):
        table.gather(np.array([1, 19, 20, 21]))


def guard(array, *, at_end):
    """A copy of an array that ends, or starts, at a page that cannot be touched; and what keeps it there."""
    page = mmap.PAGESIZE
    pages = -(-array.nbytes // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for at in (0, (pages + 1) * page):
        assert protect(ctypes.c_void_p(start + at), ctypes.c_size_t(page), 0) == 0
    offset = page + (pages * page - array.nbytes if at_end else 0)
    copy = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
    copy[:] = array
    return copy, (memory, start, protect, page, pages)


def release(memory, start, protect, page, pages):
    for at in (0, (pages + 1) * page):
        assert protect(ctypes.c_void_p(start + at), ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE) == 0


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("embedding_dim", DIMS)
def test_nothing_beside_the_rows_is_read(trellis_isa, rng, embedding_dim, at_end):
    for bits in BITS:
        table = make_random(rng, embedding_dim, bits, 5)
        packed, pages = guard(table.packed, at_end=at_end)
        codebooks, other_pages = guard(table.codebooks, at_end=at_end)
        guarded = embpack.PackedTable(packed, table.row_format, codebooks=codebooks)
        np.testing.assert_array_equal(guarded.dequantize(), table.dequantize())
        indices = np.array([[0, 4, 4, 0]])
        for mode in ("sum", "max"):
            np.testing.assert_array_equal(
                guarded.embedding_bag(indices, mode=mode), table.embedding_bag(indices, mode=mode)
            )
        release(*pages)
        release(*other_pages)


def test_every_width_of_few_columns(trellis_isa, rng):
    for embedding_dim in range(4, 140):
        table = make_random(rng, embedding_dim, float(rng.uniform(2, 7)), 7)
        rows = decode(table)
        np.testing.assert_array_equal(table.dequantize(), rows)
        indices = rng.integers(0, 7, 12)
        wanted = pool_in_order(rows, indices, np.array([0, 5]), mode="sum")
        np.testing.assert_array_equal(table.embedding_bag(indices, np.array([0, 5]), "sum"), wanted)


@pytest.mark.parametrize("embedding_dim", [33, 64, 300])
@pytest.mark.parametrize("bits", [3, 4, 5.5])
def test_instruction_sets_agree_on_weighted_bags(trellis_isa, rng, embedding_dim, bits):
    table = make_random(rng, embedding_dim, bits)
    indices, weights = rng.integers(0, len(table), 150), rng.standard_normal(150).astype(np.float32)
    offsets = np.array([0, 3, 100])
    found = table.embedding_bag(indices, offsets, "sum", weights)
    # n fused multiply-adds round n times, each by at most half a unit of the partial sum.
    rows = decode(table)
    magnitude = pool_in_order(np.abs(rows), indices, offsets, np.abs(weights))
    bound = 150 * 2.0**-24 * magnitude
    assert (np.abs(found - pool_in_order(rows, indices, offsets, weights)) <= bound).all()
    embpack._native.use_isa("portable")
    np.testing.assert_array_equal(found, table.embedding_bag(indices, offsets, "sum", weights))


@pytest.mark.parametrize("embedding_dim", [17, 64])
def test_narrow_outputs_are_the_rounded_rows(trellis_isa, rng, embedding_dim):
    table = make_random(rng, embedding_dim, 4)
    rows, indices = decode(table), rng.integers(0, len(table), 30)
    np.testing.assert_array_equal(table.gather(indices, "float16"), rows[indices].astype(np.float16))
    np.testing.assert_array_equal(table.gather(indices, "bfloat16"), as_bfloat16(rows[indices]))
    sums = table.embedding_bag(indices.reshape(3, 10), mode="sum")
    halves = table.embedding_bag(indices.reshape(3, 10), mode="sum", dtype="float16")
    np.testing.assert_array_equal(halves, sums.astype(np.float16))


def test_what_was_encoded_is_near(trellis_isa, rng):
    rows, table = make_encoded(rng, 64, 4)
    np.testing.assert_array_equal(table.dequantize(), decode(table))
    assert np.square(table.dequantize() - rows).sum() < 0.01 * np.square(rows).sum()


def test_a_group_has_tables_of_all_layouts(trellis_isa, rng):
    tables = [
        make_random(rng, 64, 4),
        make_table(rng, 32),
        make_table(rng, 20, "clustered"),
        make_random(rng, 33, 2.5),
        make_table(rng, 16, "codebook"),
    ]
    group = embpack.TableGroup(tables)
    offsets = np.arange(0, 5 * 3 * 4 + 1, 4)
    indices = rng.integers(0, 40, offsets[-1])
    found = group.embedding_bag(indices, offsets)
    of_tables = [
        table.embedding_bag(part.reshape(3, 4), mode="sum")
        for table, part in zip(tables, np.split(indices, 5), strict=True)
    ]
    np.testing.assert_array_equal(found, np.concatenate(of_tables, axis=1))


def test_row_formats_round_trip():
    for text in ("trellis:64:4:float32", "trellis:64:3.5:float32"):
        assert str(RowFormat.parse(text)) == text
    assert RowFormat.parse("trellis:64:4.0:float32") == RowFormat(64, 4, "float32", "trellis")
    for bits in (2, 4):
        assert RowFormat(64, bits, "float32", "trellis").row_bytes == RowFormat(64, bits).row_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, 1.9), "bits is 1.9; the trellis layout has 2 to 7"),
        ((64, 8), "bits is 8; the trellis layout has 2 to 7"),
        ((64, float("nan")), "bits is nan"),
        ((3, 4), "embedding_dim is 3; a row of the trellis layout has 4 to 65536 values"),
        ((65537, 4), "embedding_dim is 65537; a row of the trellis layout has 4 to 65536 values"),
    ],
)
def test_row_formats_have_limits(arguments, message):
    with pytest.raises(ValueError, match=message):
        RowFormat(*arguments, "float32", "trellis")


def test_parameters_are_float32():
    with pytest.raises(ValueError, match="param_dtype is 'float16'; the trellis layout has 'float32'"):
        RowFormat(64, 4, "float16", "trellis")


def test_only_shared_values_allow_a_fraction():
    with pytest.raises(ValueError, match=r"row format is 'uniform:64:3\.5:float16'"):
        RowFormat.parse("uniform:64:3.5:float16")
    with pytest.raises(TypeError):
        RowFormat(64, 3.5)


def test_tables_check_what_rows_share(rng):
    table = make_random(rng, 64, 4)
    assert table.nbytes == table.packed.nbytes + table.codebooks.nbytes
    with pytest.raises(ValueError, match="needs codebooks"):
        embpack.PackedTable(table.packed, table.row_format)
    with pytest.raises(ValueError, match=r"they must be float32 \[1, 368\]"):
        embpack.PackedTable(table.packed, table.row_format, codebooks=table.codebooks[:, 1:])
    with pytest.raises(ValueError, match="they must be float32"):
        embpack.PackedTable(table.packed, table.row_format, codebooks=table.codebooks.astype(np.float64))
    with pytest.raises(ValueError, match="clusters are given, which the trellis layout lacks"):
        embpack.PackedTable(table.packed, table.row_format, clusters=np.zeros(40, np.uint8), codebooks=table.codebooks)


@pytest.mark.parametrize(("bits", "at"), [(4, 5), (2.5, 0)])
def test_levels_that_are_not_bfloat16_are_refused(tmp_path, rng, bits, at):
    table = make_random(rng, 16, bits)
    damaged = table.codebooks.copy()
    damaged[0, at] = np.nextafter(damaged[0, at], np.float32(9))
    with pytest.raises(ValueError, match=f"^level {at} of the codebook is not a bfloat16 value.*pack the table again"):
        embpack.PackedTable(table.packed, table.row_format, codebooks=damaged)
    path = tmp_path / "t.safetensors"
    embpack.save(path, {"a": table})
    path.write_bytes(path.read_bytes().replace(table.codebooks.tobytes(), damaged.tobytes()))
    with pytest.raises(embpack.FormatError, match=f"t.safetensors: table 'a': level {at} of the codebook"):
        embpack.load(path)


def test_levels_of_more_bits_are_any(rng):
    table = make_random(rng, 16, 6)
    assert (table.codebooks.view(np.uint32)[0, : sum(table.row_format.form.trellis.num_levels) // 2] & 0xFFFF).any()


def test_the_core_refuses_a_codebook_that_is_too_short(rng):
    table = make_random(rng, 64, 4)
    short = np.ascontiguousarray(table.codebooks[:, 1:]).view(np.uint8)
    with pytest.raises(ValueError, match="codebooks have the wrong size"):
        embpack._native.TableView(table.packed, str(table.row_format), None, short)
    with pytest.raises(ValueError, match="clusters and codebooks go with the layouts"):
        embpack._native.TableView(table.packed, str(table.row_format))


def test_wrong_indices_are_named(trellis_isa, rng):
    table = make_random(rng, 64, 4)
    with pytest.raises(IndexError, match=r"indices\[1\] is 40, but the table has 40 rows"):
        table[[3, 40]]
    with pytest.raises(IndexError, match=r"indices\[2\] is -1"):
        table.embedding_bag(np.array([[1, 2, -1]]), mode="sum")


def test_copies_and_pickles_are_the_same(rng):
    table = make_random(rng, 64, 3.5)
    for other in (table.copy(), pickle.loads(pickle.dumps(table))):
        np.testing.assert_array_equal(other.dequantize(), table.dequantize())


@pytest.mark.parametrize("bits", [4, 3.5])
def test_files_keep_tables(tmp_path, rng, bits):
    tables = {"a": make_random(rng, 33, bits), "b": make_table(rng, 16, "clustered"), "c": make_table(rng, 16)}
    path = tmp_path / "tables.safetensors"
    embpack.save(path, tables)
    loaded = embpack.load(path, verify=True)
    assert loaded["a"].row_format == tables["a"].row_format
    assert loaded["a"].clusters is None
    for name, table in tables.items():
        np.testing.assert_array_equal(loaded[name].dequantize(), table.dequantize())


def test_files_without_the_codebook_are_refused(tmp_path, rng):
    safetensors = pytest.importorskip("safetensors.numpy")
    from safetensors import safe_open

    path = tmp_path / "tables.safetensors"
    embpack.save(path, {"a": make_random(rng, 33, 4)})
    with safe_open(path, "numpy") as file:
        metadata, packed = file.metadata(), file.get_tensor("a")
        assert set(file.keys()) == {"a", "a.codebook"}
    safetensors.save_file({"a": packed}, path, metadata)
    with pytest.raises(embpack.FormatError, match="its codebooks must be F32"):
        embpack.load(path)


def test_torch_modules_look_up(trellis_isa, rng):
    torch = pytest.importorskip("torch")
    import embpack.torch

    table = make_random(rng, 33, 3.5)
    rows = torch.from_numpy(decode(table))
    indices = torch.from_numpy(rng.integers(0, 40, (5, 6)))
    module = embpack.torch.PackedEmbedding.from_table(table)
    assert torch.equal(module(indices), rows[indices])
    np.testing.assert_array_equal(module.table.codebooks, table.codebooks)
    bag = embpack.torch.PackedEmbeddingBag.from_table(table, mode="sum")
    assert torch.equal(bag(indices), torch.from_numpy(table.embedding_bag(indices.numpy(), mode="sum")))
    again = embpack.torch.PackedEmbeddingBag(40, 33, bits=3.5, param_dtype="float32", layout="trellis", mode="sum")
    again.load_state_dict(bag.state_dict())
    assert torch.equal(again(indices), bag(indices))
    weights = torch.randn(5, 6, requires_grad=True)
    again(indices, per_sample_weights=weights).sum().backward()
    torch.testing.assert_close(weights.grad, rows[indices].sum(-1))
    with pytest.raises(IndexError, match="is 40"):
        bag(torch.tensor([[40]]))


def test_torch_operators_are_well_made(rng):
    torch = pytest.importorskip("torch")
    import embpack.torch  # noqa: F401

    table = make_random(rng, 33, 3.5)
    shared = torch.from_numpy(table.codebooks.view(np.uint8))
    arguments = (torch.from_numpy(table.packed), str(table.row_format), torch.tensor([1, 2, 3]), None, shared)
    torch.library.opcheck(torch.ops.embpack.embedding.default, arguments)
    with pytest.raises(ValueError, match="packed has"):
        torch.ops.embpack.embedding(arguments[0], "trellis:33:4:float32", *arguments[2:])


def test_collections_mix_layouts(trellis_isa, rng):
    torch = pytest.importorskip("torch")
    import embpack.torch

    tables = {"a": make_random(rng, 33, 3.5), "b": make_table(rng, 20, "clustered"), "c": make_table(rng, 16)}
    make_bag = embpack.torch.PackedEmbeddingBag.from_table
    collection = embpack.torch.PackedEmbeddingBagCollection(
        {name: make_bag(table, mode="sum") for name, table in tables.items()}
    )
    indices = torch.from_numpy(rng.integers(0, 40, 3 * 2 * 4))
    found = collection(indices, torch.arange(0, 24, 4))
    parts = [
        table.embedding_bag(part.reshape(2, 4), mode="sum")
        for table, part in zip(tables.values(), np.split(indices.numpy(), 3), strict=True)
    ]
    np.testing.assert_array_equal(found.numpy(), np.concatenate(parts, axis=1))


def test_onnx_refuses(rng):
    pytest.importorskip("onnx")
    from embpack.onnx import build_gather

    with pytest.raises(ValueError, match="trellis layout, which has no ONNX operators"):
        build_gather(make_random(rng, 33, 4))
