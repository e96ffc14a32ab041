"""KMEANS and KMEANS-CLS: exact where they promise to be, and the layouts that they need."""

import itertools

import numpy as np
import pytest

import embpack
from embpack import _native, reference
from embpack.layouts import RowFormat
from embpack.methods import KMeans, KMeansCls, KMeansLloyd
from embpack.methods.kmeans import SortedRow, find_best_centres
from embpack.methods.kmeans_cls import choose_num_codebooks, fit_codebooks, fit_codebooks_reference
from embpack.methods.row_clusters import Groups, RowClusters, find_nearest, find_nearest_reference
from embpack.rows import narrow, widen


def squared_errors(table, rows):
    return np.square(table.dequantize().astype(np.float64) - rows).sum(axis=1)


def least_error_by_trying(x, num_clusters):
    """Over all ways to cut the sorted row into runs."""
    x = np.sort(x).astype(np.float64)
    cuts = itertools.combinations(range(1, len(x)), num_clusters - 1)
    runs = (np.split(x, cut) for cut in cuts)
    return min(sum(np.square(run - run.mean()).sum() for run in parts) for parts in runs)


@pytest.mark.parametrize("embedding_dim", [5, 8, 11])
def test_no_way_to_cluster_a_row_is_better(rng, embedding_dim):
    rows = np.concatenate([rng.standard_normal((20, embedding_dim)), rng.integers(-3, 4, (10, embedding_dim))])
    rows = rows.astype(np.float32)
    errors = squared_errors(embpack.quantize(rows, "kmeans", 2, "float32"), rows)
    for x, error in zip(rows, errors, strict=True):
        # The centres are rounded to float32, half a spacing each at most.
        slack = embedding_dim * (np.abs(x).max() * 2.0**-24) ** 2
        assert error <= least_error_by_trying(x, 4) * (1 + 1e-12) + slack


DISTRIBUTIONS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "student t": lambda rng, shape: rng.standard_t(2, shape).clip(-1e4, 1e4),
    "uniform": lambda rng, shape: rng.uniform(-0.05, 0.05, shape),
    "few values": lambda rng, shape: rng.choice([-1.5, -1, -0.25, 0.125, 1, 2], shape),
    "off centre": lambda rng, shape: 40 + rng.standard_normal(shape),
}


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("embedding_dim", [3, 16, 17, 40, 64, 130, 400])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_never_worse_than_lloyd_on_any_row(rng, distribution, embedding_dim, bits):
    rows = DISTRIBUTIONS[distribution](rng, (200, embedding_dim)).astype(np.float32)
    exact, lloyd = (
        squared_errors(embpack.quantize(rows, m, bits, "float32"), rows) for m in ("kmeans", "kmeans-lloyd")
    )
    # As above: moving a centre away from the mean of m values by s costs m s^2.
    slack = embedding_dim * (np.abs(rows).max(axis=1).astype(np.float64) * 2.0**-24) ** 2
    assert np.all(exact <= lloyd * (1 + 1e-12) + slack)


def test_the_search_is_exact_in_double():
    x = np.random.default_rng(3).standard_normal(12).astype(np.float32)
    row = SortedRow.make(x)
    centres = row.middle + find_best_centres(row, 4)
    error = np.square(x[:, None] - centres).min(axis=1).sum()
    assert error == pytest.approx(least_error_by_trying(x, 4), rel=1e-12)


@pytest.mark.parametrize("method", ["kmeans", "kmeans-lloyd"])
def test_rows_of_few_values_lose_nothing_but_roundings(rng, method):
    """Guan et al. 2019: KMEANS has loss 0 at d = 8 and 16; with Lloyd's iteration only if no cluster stays empty."""
    rows = rng.standard_normal((50, 16), np.float32)
    table = embpack.quantize(rows, "kmeans", param_dtype="float32")
    np.testing.assert_array_equal(table.dequantize(), rows)
    assert embpack.quantize(rows, method, param_dtype="float16").loss < (1e-3 if method == "kmeans" else 0.1)


def test_a_codebook_beyond_float16_is_refused():
    rows = np.ones((40, 8), np.float32)
    rows[33, 2] = 70000
    with pytest.raises(ValueError, match=r"^weight\[33\] has values from 1 to 70000: its codebook overflows float16"):
        embpack.quantize(rows, "kmeans")
    assert embpack.quantize(rows, "kmeans", param_dtype="float32").loss == 0
    rows[3, 1] = np.nan
    for method in ("kmeans", "kmeans-cls"):
        with pytest.raises(ValueError, match=r"^weight\[3, 1\] is nan"):
            embpack.quantize(rows, method, param_dtype="float32")


def test_a_file_whose_shared_codebook_overflows_is_refused_without_a_warning(tmp_path):
    """Warnings are errors here: rounding codebooks to float16 before rows are packed must not make one."""
    np.save(tmp_path / "v.npy", np.full((40, 8), 70000, np.float32))
    with pytest.raises(ValueError, match="codebook overflows float16"):
        embpack.quantize_file(tmp_path / "v.npy", tmp_path / "v.safetensors", method="kmeans-cls")
    assert not (tmp_path / "v.safetensors").exists()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_bytes_are_codes_then_the_codebook(dtype):
    rows = np.array([[0, 1, 2, 3, 1, 0]], dtype)
    table = embpack.quantize(rows, "kmeans", 2)
    assert table.packed.tolist() == [[0b11100100, 0b0001, 0, 0, 0, 0x3C, 0, 0x40, 0, 0x42]]
    assert (table.layout, table.row_bytes, table.nbytes) == ("codebook", 10, 10)


@pytest.mark.parametrize(
    ("num_embeddings", "bits", "param_dtype", "wanted"),
    [
        (1000, 4, "float16", 93),  # 3 bytes a row are left beside a number of 8 bits, 32 a codebook
        (3000, 4, "float16", 256),
        (100_000, 4, "float16", 6250),  # 2 bytes a row beside a number of 16 bits
        (10_000_000, 4, "float16", 65536),
        (5, 4, "float16", 1),
        (100_000, 4, "float32", 9375),
        (100_000, 8, "float16", 390),
    ],
)
def test_codebooks_take_the_bytes_of_scale_and_bias(num_embeddings, bits, param_dtype, wanted):
    row_format = RowFormat(64, bits, param_dtype, "clustered")
    assert choose_num_codebooks(num_embeddings, row_format) == wanted


@pytest.mark.parametrize("param_dtype", ["float16", "float32"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_clustered_table_takes_no_more_bytes_than_a_uniform_one(rng, bits, param_dtype):
    rows = rng.standard_normal((12_000, 24), np.float32)
    table = embpack.quantize(rows, "kmeans-cls", bits, param_dtype)
    uniform = embpack.quantize(rows, "asym", bits, param_dtype)
    assert 0.995 * uniform.nbytes < table.nbytes <= uniform.nbytes


@pytest.mark.parametrize("method", ["kmeans-cls:K=1", "kmeans-cls:K=7", "kmeans-cls:K=300", "kmeans-cls"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_clustered_rows_are_the_reference_s(isa, rng, method, bits):
    rows = rng.standard_normal((700, 19), np.float32) + rng.integers(0, 5, (700, 1)).astype(np.float32)
    table = embpack.quantize(rows, method, bits)
    levels = table.codebooks.astype(np.float32)
    wanted = [
        reference.pack_codebook_row(x, levels[cluster], table.row_format)
        for x, cluster in zip(rows, table.clusters, strict=True)
    ]
    np.testing.assert_array_equal(table.packed, wanted)
    dequantized = reference.dequantize(table.packed, table.row_format, table.clusters, table.codebooks)
    np.testing.assert_array_equal(table.dequantize(), dequantized)
    assert table.loss == pytest.approx(reference.normalized_l2_loss(rows, dequantized), rel=1e-9)
    assert table.clusters.dtype == (np.uint16 if len(table.codebooks) > 256 else np.uint8)
    indices = rng.integers(0, 700, (50, 6))
    bags = table.embedding_bag(indices, mode="sum")
    np.testing.assert_array_equal(bags, reference.embedding_bag(dequantized, list(indices), "sum"))


def test_codebooks_of_clusters_are_the_reference_s(rng):
    rows = rng.standard_normal((500, 12), np.float32)
    numbers = rng.integers(0, 20, 500)
    numbers[numbers == 7] = 8
    for bits in (2, 4, 8):
        got = fit_codebooks(rows, Groups.sort(numbers, 20), bits)
        np.testing.assert_array_equal(got, fit_codebooks_reference(rows, numbers, 20, bits))


def find(rows, centres, factor=1.0):
    """Find the nearest centres of rows of one group."""
    return find_nearest(rows, np.float32(factor), Groups.single(len(rows)), centres, np.array([0, len(centres)]))


@pytest.mark.parametrize("num_centres", [1, 15, 16, 17, 300])
@pytest.mark.parametrize("dim", [1, 8, 65, 1000])
def test_rows_go_to_the_nearest_centre(isa, rng, dim, num_centres):
    """To the last bit: which of two that are about as near it is counts as well."""
    rows = rng.standard_normal((203, dim), np.float32)
    centres = rng.standard_normal((num_centres, dim), np.float32)
    rows[7] = 0
    centres[num_centres // 2 :] = centres[: (num_centres + 1) // 2]
    numbers = find(rows, centres)
    np.testing.assert_array_equal(numbers, find_nearest_reference(rows, centres))
    distances = np.square(rows[:, None].astype(np.float64) - centres).sum(axis=2)
    assert np.all(distances[np.arange(203), numbers] <= distances.min(axis=1) * (1 + 1e-5) + 1e-5)


@pytest.mark.parametrize("count", [1, 5, 6, 7, 11, 12, 13, 95, 96, 97, 2050])
def test_any_number_of_rows_finds_its_centres(isa, rng, count):
    rows, centres = rng.standard_normal((count, 20), np.float32), rng.standard_normal((40, 20), np.float32)
    np.testing.assert_array_equal(find(rows, centres), find_nearest_reference(rows, centres))


@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
def test_rows_of_16_bits_find_their_centres(rng, dtype):
    rows, centres = rng.standard_normal((100, 20), np.float32), rng.standard_normal((40, 20), np.float32)
    short = narrow(rows, "float16" if dtype == np.float16 else "bfloat16")
    assert short.dtype == dtype
    np.testing.assert_array_equal(find(short, centres, 0.5), find_nearest_reference(widen(short) * 0.5, centres))


def test_rows_in_groups_have_the_centres_of_their_own(rng):
    """One group is large, one is empty, and one has no centres either."""
    rows, centres = rng.standard_normal((500, 12), np.float32), rng.standard_normal((50, 12), np.float32)
    group_of = rng.choice([0, 1, 3, 4], 500, p=[0.1, 0.6, 0.1, 0.2]).astype(np.uint32)
    starts = np.array([0, 20, 21, 21, 49, 50, 50])
    numbers = find_nearest(rows, np.float32(1), Groups.sort(group_of, 6), centres, starts)
    for group, (start, end) in enumerate(itertools.pairwise(starts)):
        own = group_of == group
        wanted = start + find_nearest_reference(rows[own], centres[start:end]) if own.any() else []
        np.testing.assert_array_equal(numbers[own], wanted)


@pytest.mark.parametrize("dim", [1, 31, 32, 33, 200])
def test_sums_of_groups_are_made_row_by_row(rng, dim):
    rows, numbers = rng.standard_normal((3000, dim), np.float32), rng.integers(0, 7, 3000)
    numbers[numbers == 3] = 4
    groups, sums = Groups.sort(numbers, 7), np.empty((7, dim))
    _native.sum_groups(rows, groups.order, groups.starts, sums)
    for number in range(7):
        own = rows[numbers == number].astype(np.float64)
        wanted = np.add.accumulate(own, axis=0)[-1] if len(own) else np.zeros(dim)
        np.testing.assert_array_equal(sums[number], wanted)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1.0, 1e30, 3e37])
def test_rows_of_any_size_are_clustered(rng, scale):
    """Their squares neither overflow nor vanish."""
    rows = np.repeat(np.eye(8, dtype=np.float32), 50, axis=0) * np.float32(scale)
    numbers = RowClusters.train(rows, 100).assign(rows).reshape(8, 50)
    assert np.all(numbers == numbers[:, :1]) and len(np.unique(numbers)) == 8


@pytest.mark.parametrize("num_centres", [1, 30, 257, 900, 1500])
def test_similar_rows_share_a_cluster(rng, num_centres):
    rows = rng.standard_normal((1500, 8), np.float32)
    clusters = RowClusters.train(rows, num_centres)
    assert clusters.centres.shape == (num_centres, 8)
    numbers = clusters.assign(rows)
    assert 0 <= numbers.min() and numbers.max() < num_centres
    error = (
        np.square(rows * clusters.factor - clusters.centres[numbers]).sum() / np.square(rows * clusters.factor).sum()
    )
    # What 1500 rows in 8 dimensions leave: all of it with one centre, next to nothing with one each.
    most = {1: 1.0, 30: 0.7, 257: 0.35, 900: 0.15, 1500: 0.05}
    assert error <= most[num_centres]
    again = RowClusters.train(rows, num_centres)
    np.testing.assert_array_equal(again.assign(rows), numbers)


@pytest.mark.parametrize("K", [-1, 65537])
def test_an_impossible_number_of_clusters_is_refused(K):
    with pytest.raises(ValueError, match=f"^kmeans-cls: K is {K}; give a number of clusters from 1 to 65536"):
        KMeansCls(K)


@pytest.mark.parametrize("method", [KMeans(), KMeansLloyd(), KMeansCls(5)])
def test_tables_survive_a_file(tmp_path, rng, method):
    rows = rng.standard_normal((90, 21), np.float32)
    table = embpack.quantize(rows, method)
    embpack.save(tmp_path / "t.safetensors", {"a": table, "b": embpack.quantize(rows)})
    loaded = embpack.load(tmp_path / "t.safetensors", verify=True)["a"]
    assert (loaded.row_format, loaded.method, loaded.loss) == (table.row_format, table.method, table.loss)
    np.testing.assert_array_equal(loaded.dequantize(), table.dequantize())
    assert loaded.nbytes == table.nbytes


def test_clusters_without_a_codebook_are_refused(rng):
    table = embpack.quantize(rng.standard_normal((90, 21), np.float32), "kmeans-cls:K=5")
    clusters = table.clusters.copy()
    clusters[17] = 5
    damaged = embpack.PackedTable(table.packed, table.row_format, clusters=clusters, codebooks=table.codebooks)
    assert damaged[[16, 18]].shape == (2, 21)
    message = "^row 17 is of cluster 5, but the table has 5 codebooks"
    for look_up in (damaged.dequantize, lambda: damaged[[3, 17]], lambda: damaged.embedding_bag([[1, 17]])):
        with pytest.raises(embpack.FormatError, match=message):
            look_up()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clusters": None}, "the clustered layout needs clusters and codebooks"),
        (
            {"clusters": np.zeros(3, np.uint8)},
            r"clusters are uint8 of shape \[3\]; they must be uint8 or uint16 \[90\]",
        ),
        ({"clusters": np.zeros(90, np.int64)}, "clusters are int64"),
        ({"codebooks": np.zeros((5, 4), np.float16)}, r"codebooks are float16 of shape \[5, 4\]; they must be float16"),
        ({"codebooks": np.zeros((5, 16), np.float32)}, "codebooks are float32"),
    ],
)
def test_parts_that_do_not_fit_are_refused(rng, change, message):
    table = embpack.quantize(rng.standard_normal((90, 21), np.float32), "kmeans-cls:K=5")
    parts = {"clusters": table.clusters, "codebooks": table.codebooks} | change
    with pytest.raises(ValueError, match=f"^{message}"):
        embpack.PackedTable(table.packed, table.row_format, **parts)
    with pytest.raises(ValueError, match=r"^clusters are given, which the uniform layout lacks; leave them out"):
        embpack.PackedTable(np.zeros((90, 15), np.uint8), RowFormat(21), clusters=table.clusters)
