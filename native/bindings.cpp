// Python's view of the core: checks sizes and types, releases the GIL, calls. Messages for users are made in
// Python, which has checked everything that a user can get wrong before it calls; what is checked here keeps
// memory safe whoever calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "lookup.h"
#include "quantize.h"
#include "threads.h"

namespace nb = nanobind;

namespace embpack {
namespace {

using RowsArray = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using PackedArray = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using PackedOut = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// A method's search, by the name that src/embpack/methods gives it.
struct NamedSearch {
    const char* name;
    SearchFn Kernels::*search;
};
constexpr NamedSearch searches[] = {
    {"asym", &Kernels::search_asym},
    {"sym", &Kernels::search_sym},
    {"table", &Kernels::search_table},
    {"greedy", &Kernels::search_greedy},
    {"gss", &Kernels::search_gss},
    {"aciq", &Kernels::search_aciq},
    {"hist-apprx", &Kernels::search_hist_apprx},
    {"hist-brute", &Kernels::search_hist_brute},
};

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

SearchFn Kernels::*find_search(const std::string& name) {
    for (const NamedSearch& known : searches)
        if (name == known.name) return known.search;
    throw std::invalid_argument("no kernel for search '" + name + "'");
}

Grid make_grid(int bits, bool f16_params) {
    require(bits == 2 || bits == 4 || bits == 8, "bits must be 2, 4 or 8");
    return {bits, f16_params};
}

// float32, float16, or bfloat16 as uint16.
Rows view_rows(const RowsArray& rows) {
    require(rows.shape(1) > 0, "rows have no columns");
    Rows view{rows.data(), ValueType::f32, rows.shape(0), rows.shape(1)};
    if (rows.dtype() == nb::dtype<float>()) return view;
    const bool half = rows.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float);
    require(rows.dtype().bits == 16 && (half || rows.dtype() == nb::dtype<uint16_t>()),
            "rows must be float32, float16 or uint16 (bfloat16)");
    view.type = half ? ValueType::f16 : ValueType::bf16;
    return view;
}

PackedRows view_packed(const PackedArray& packed, size_t embedding_dim, int bits, bool f16_params) {
    const Grid grid = make_grid(bits, f16_params);
    require(embedding_dim > 0, "embedding_dim must be positive");
    require(packed.shape(1) == packed_row_bytes(embedding_dim, grid), "packed has the wrong number of bytes a row");
    return {packed.data(), packed.shape(0), embedding_dim, packed.shape(1), grid};
}

// Position of the first index outside [0, num_rows), or -1.
int64_t first_bad_index(const Indices& indices, size_t num_rows) {
    const int64_t* index = indices.data();
    for (size_t i = 0; i < indices.shape(0); i++)
        if (static_cast<uint64_t>(index[i]) >= num_rows) return static_cast<int64_t>(i);
    return -1;
}

std::tuple<int, size_t, std::vector<std::tuple<double, double>>> quantize(
    const RowsArray& rows, const std::string& search, const SearchParams& params, int bits, bool f16_params,
    size_t span_rows, const PackedOut& packed) {
    const Rows view = view_rows(rows);
    const Grid grid = make_grid(bits, f16_params);
    require(params.b > 0, "b must be positive");
    require(packed.shape(0) == view.num_rows && packed.shape(1) == packed_row_bytes(view.embedding_dim, grid),
            "packed has the wrong shape");
    require(span_rows > 0 && span_rows % block_rows == 0, "span_rows must be a multiple of the rows of a block");
    SearchFn Kernels::*fn = find_search(search);
    const bool counts_bins = fn == &Kernels::search_hist_apprx || fn == &Kernels::search_hist_brute;
    require(!counts_bins || params.b <= max_bins, "b is more bins than a histogram holds");
    uint8_t* out = packed.data();
    nb::gil_scoped_release release;
    const QuantizeResult result = quantize_rows(view, fn, params, grid, span_rows, out);
    std::vector<std::tuple<double, double>> sums;
    for (const SquaredSums& span : result.sums) sums.emplace_back(span.error, span.norm);
    return {static_cast<int>(result.fault), result.faulty_row, sums};
}

std::tuple<int, size_t, float, float> bound(const RowsArray& rows) {
    const Rows view = view_rows(rows);
    require(view.num_rows > 0, "there are no rows");
    nb::gil_scoped_release release;
    const Bounds bounds = bound_table(view);
    return {static_cast<int>(bounds.fault), bounds.faulty_row, bounds.xmin, bounds.xmax};
}

int64_t gather(const PackedArray& packed, size_t embedding_dim, int bits, bool f16_params,
               const std::optional<Indices>& indices, const FloatOut& out) {
    const PackedRows rows = view_packed(packed, embedding_dim, bits, f16_params);
    const size_t count = indices ? indices->shape(0) : rows.num_rows;
    require(out.shape(0) == count && out.shape(1) == embedding_dim, "out has the wrong shape");
    float* to = out.data();
    nb::gil_scoped_release release;
    if (indices) {
        const int64_t bad = first_bad_index(*indices, rows.num_rows);
        if (bad >= 0) return bad;
    }
    gather_rows(rows, indices ? indices->data() : nullptr, count, to);
    return -1;
}

int64_t pool(const PackedArray& packed, size_t embedding_dim, int bits, bool f16_params, const Indices& indices,
             const Indices& starts, const std::optional<Floats>& per_sample_weights, int64_t padding_index,
             const std::string& mode, const FloatOut& out) {
    const PackedRows rows = view_packed(packed, embedding_dim, bits, f16_params);
    require(mode == "sum" || mode == "mean" || mode == "max", "mode must be sum, mean or max");
    require(starts.shape(0) > 0, "starts must have num_bags + 1 entries");
    const size_t num_bags = starts.shape(0) - 1;
    require(out.shape(0) == num_bags && out.shape(1) == embedding_dim, "out has the wrong shape");
    require(!per_sample_weights || per_sample_weights->shape(0) == indices.shape(0),
            "per_sample_weights must have one weight for each index");
    const int64_t* start = starts.data();
    require(start[0] >= 0 && static_cast<uint64_t>(start[num_bags]) <= indices.shape(0), "starts leave the indices");
    for (size_t bag = 0; bag < num_bags; bag++) require(start[bag] <= start[bag + 1], "starts decrease");
    const Pooling pooling = mode == "sum" ? Pooling::sum : mode == "mean" ? Pooling::mean : Pooling::max;
    float* to = out.data();
    nb::gil_scoped_release release;
    const int64_t bad = first_bad_index(indices, rows.num_rows);
    if (bad >= 0) return bad;
    pool_bags(rows, {indices.data(), per_sample_weights ? per_sample_weights->data() : nullptr, start, num_bags,
                     padding_index, pooling}, to);
    return -1;
}

std::vector<std::string> list_isas() {
    std::vector<std::string> names;
    for (std::string_view name : available_isas()) names.emplace_back(name);
    return names;
}

std::vector<std::string> list_searches() {
    std::vector<std::string> names;
    for (const NamedSearch& known : searches) names.emplace_back(known.name);
    return names;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "The native core of embpack. Private: use the functions of the package.";

    nb::class_<SearchParams>(m, "SearchParams", "What a search may need beside the rows.")
        .def("__init__",
             [](SearchParams* self, int b, double r, bool local_minima_only, float xmin, float xmax) {
                 new (self) SearchParams{b, r, local_minima_only, xmin, xmax};
             },
             nb::kw_only(), nb::arg("b") = SearchParams{}.b, nb::arg("r") = SearchParams{}.r,
             nb::arg("local_minima_only") = false, nb::arg("xmin") = 0.0f, nb::arg("xmax") = 0.0f);

    // Written out where the generated signature would not say what an array holds.
    m.def("quantize", &quantize, nb::arg("rows"), nb::arg("search"), nb::arg("params"), nb::arg("bits"),
          nb::arg("f16_params"), nb::arg("span_rows"), nb::arg("packed"),
          nb::sig("def quantize(rows: numpy.typing.NDArray[typing.Any], search: str, params: SearchParams, bits: int, "
                  "f16_params: bool, span_rows: int, packed: numpy.typing.NDArray[numpy.uint8]) "
                  "-> tuple[int, int, list[tuple[float, float]]]"),
          "Pack rows into `packed`. Returns (fault, faulty row, sums of squared errors and of squares for each span).");
    m.attr("block_rows") = block_rows;
    m.attr("max_bins") = max_bins;
    m.def("bound", &bound, nb::arg("rows"),
          nb::sig("def bound(rows: numpy.typing.NDArray[typing.Any]) -> tuple[int, int, float, float]"),
          "Bounds of all values: (fault, faulty row, smallest, largest).");
    m.def("gather", &gather, nb::arg("packed"), nb::arg("embedding_dim"), nb::arg("bits"), nb::arg("f16_params"),
          nb::arg("indices").none(), nb::arg("out"),
          "Decode the rows `indices` (None: all) into `out`. Returns the position of the first index out of range, "
          "or -1.");
    m.def("pool", &pool, nb::arg("packed"), nb::arg("embedding_dim"), nb::arg("bits"), nb::arg("f16_params"),
          nb::arg("indices"), nb::arg("starts"), nb::arg("per_sample_weights").none(), nb::arg("padding_index"),
          nb::arg("mode"), nb::arg("out"),
          "Pool bags of rows into `out`. Returns the position of the first index out of range, or -1.");

    m.def("isa", [] { return std::string(kernels().isa); }, "Name of the instruction set in use.");
    m.def("available_isas", &list_isas, "Names of the instruction sets that this CPU runs, best first.");
    m.def("use_isa", [](const std::string& name) { return use_isa(name); }, nb::arg("name"),
          "Switch to an instruction set; False if this CPU lacks it.");
    m.def("searches", &list_searches, "Names of the searches that have a kernel.");
    m.def("num_threads", &num_threads, "Threads in use.");
    m.def("set_num_threads", &set_num_threads, nb::arg("count"), "Use this many threads.");
}

}  // namespace embpack
