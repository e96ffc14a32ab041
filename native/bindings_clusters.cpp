#include "clusters.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include "bindings.h"

namespace embpack {
namespace {

using Integers64 = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using CentresArray = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using NumbersOut = nb::ndarray<uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using SumsOut = nb::ndarray<double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using CodebooksOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Checks that these are runs of `count` things.
size_t count_runs(const Integers64& starts, size_t count) {
    require(starts.shape(0) > 0, "starts must have one entry more than there are groups");
    const size_t groups = starts.shape(0) - 1;
    const int64_t* const start = starts.data();
    require(start[0] == 0 && start[groups] == static_cast<int64_t>(count), "starts leave what is in groups");
    for (size_t group = 0; group < groups; group++) require(start[group] <= start[group + 1], "starts decrease");
    return groups;
}

RowGroups view_groups(const Rows& rows, const std::optional<Integers64>& order, const Integers64& starts) {
    const size_t count = order ? order->shape(0) : rows.num_rows;
    for (size_t i = 0; order && i < count; i++)
        require(order->data()[i] >= 0 && static_cast<size_t>(order->data()[i]) < rows.num_rows, "order leaves the rows");
    return {order ? order->data() : nullptr, starts.data(), count_runs(starts, count)};
}

void find(const RowsArray& rows, float factor, const std::optional<Integers64>& order, const Integers64& starts,
          const CentresArray& centres, const Integers64& centre_starts, const NumbersOut& numbers) {
    const Rows view = view_rows(rows);
    const RowGroups groups = view_groups(view, order, starts);
    require(centres.shape(1) == view.embedding_dim, "centres must have the columns of rows");
    require(centres.shape(0) <= UINT32_MAX, "there are too many centres");
    require(count_runs(centre_starts, centres.shape(0)) == groups.count, "centres must be of as many groups as rows");
    for (size_t g = 0; g < groups.count; g++)
        require(groups.starts[g] == groups.starts[g + 1] || centre_starts.data()[g] < centre_starts.data()[g + 1],
                "a group with rows has no centres");
    require(numbers.shape(0) == view.num_rows, "numbers must have one for each row");
    uint32_t* const out = numbers.data();
    const WithoutPython without;
    find_nearest(view, factor, groups, centres.data(), centre_starts.data(), out);
}

void sum(const RowsArray& rows, const std::optional<Integers64>& order, const Integers64& starts, const SumsOut& sums) {
    const Rows view = view_rows(rows);
    const RowGroups groups = view_groups(view, order, starts);
    require(sums.shape(0) == groups.count && sums.shape(1) == view.embedding_dim, "sums have the wrong shape");
    double* const out = sums.data();
    const WithoutPython without;
    sum_groups(view, groups, out);
}

std::tuple<float, float> bound_from(const RowsArray& rows,
                                    const nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>& mean) {
    const Rows view = view_rows(rows);
    require(mean.shape(0) == view.embedding_dim, "the mean must have the columns of rows");
    const float* const of_columns = mean.data();
    const WithoutPython without;
    const Distances found = bound_distances(view, of_columns);
    return {found.smallest, found.largest};
}

void fit(const RowsArray& rows, const std::optional<Integers64>& order, const Integers64& starts, int bits,
         const CodebooksOut& codebooks) {
    make_grid(bits, false);
    const Rows view = view_rows(rows);
    const RowGroups groups = view_groups(view, order, starts);
    require(codebooks.shape(0) == groups.count && codebooks.shape(1) == size_t{1} << bits,
            "codebooks have the wrong shape");
    float* const out = codebooks.data();
    const WithoutPython without;
    fit_codebooks(view, groups, bits, out);
}

void assign(const CentresArray& rows, const CentresArray& codebooks, int bits,
            const NumbersOut& numbers) {
    make_grid(bits, false);
    require(rows.shape(1) > 0, "rows have no columns");
    require(codebooks.shape(1) == size_t{1} << bits, "codebooks must have 2^bits levels");
    require(numbers.shape(0) == rows.shape(0), "numbers must have one for each row");
    uint32_t* out = numbers.data();
    const WithoutPython without;
    assign_codebooks(rows.data(), rows.shape(0), rows.shape(1), codebooks.data(), codebooks.shape(0), bits, out);
}

}  // namespace

void bind_clusters(nb::module_& m) {
    m.def("find_nearest", &find, nb::arg("rows"), nb::arg("factor"), nb::arg("order").none(), nb::arg("starts"),
          nb::arg("centres"), nb::arg("centre_starts"), nb::arg("numbers").noconvert(),
          nb::sig("def find_nearest(rows: numpy.typing.NDArray[typing.Any], factor: float, "
                  "order: numpy.typing.NDArray[numpy.int64] | None, starts: numpy.typing.NDArray[numpy.int64], "
                  "centres: numpy.typing.NDArray[numpy.float32], centre_starts: numpy.typing.NDArray[numpy.int64], "
                  "numbers: numpy.typing.NDArray[numpy.uint32]) -> None"),
          "Fill in the number of the centre nearest to each row, times factor, among those of its group: group g has "
          "rows order[starts[g] : starts[g + 1]] and centres centre_starts[g] to centre_starts[g + 1].");
    m.def("sum_groups", &sum, nb::arg("rows"), nb::arg("order").none(), nb::arg("starts"), nb::arg("sums").noconvert(),
          nb::sig("def sum_groups(rows: numpy.typing.NDArray[typing.Any], "
                  "order: numpy.typing.NDArray[numpy.int64] | None, starts: numpy.typing.NDArray[numpy.int64], "
                  "sums: numpy.typing.NDArray[numpy.float64]) -> None"),
          "Fill in the sum of each group's rows, one row added after the other.");
    m.def("bound_distances", &bound_from, nb::arg("rows"), nb::arg("mean"),
          nb::sig("def bound_distances(rows: numpy.typing.NDArray[typing.Any], mean: numpy.typing.NDArray[numpy.float32]) "
                  "-> tuple[float, float]"),
          "Of the rows' largest distances from a mean: (the least that is not 0, the largest).");
    m.def("fit_codebooks", &fit, nb::arg("rows"), nb::arg("order").none(), nb::arg("starts"), nb::arg("bits"),
          nb::arg("codebooks").noconvert(),
          nb::sig("def fit_codebooks(rows: numpy.typing.NDArray[typing.Any], "
                  "order: numpy.typing.NDArray[numpy.int64] | None, starts: numpy.typing.NDArray[numpy.int64], "
                  "bits: int, codebooks: numpy.typing.NDArray[numpy.float32]) -> None"),
          "Fill in a codebook for the values of each group's rows.");
    m.def("assign_codebooks", &assign, nb::arg("rows"), nb::arg("codebooks"), nb::arg("bits"),
          nb::arg("numbers").noconvert(),
          nb::sig("def assign_codebooks(rows: numpy.typing.NDArray[numpy.float32], "
                  "codebooks: numpy.typing.NDArray[numpy.float32], bits: int, "
                  "numbers: numpy.typing.NDArray[numpy.uint32]) -> None"),
          "Fill in which codebook has the least squared error of each row, of equal ones the first.");
}

}  // namespace embpack
