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
using Clusters = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using RowClusters = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using CodebookValues = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A method's search, by the name that src/embpack/methods gives it.
template <class Fn>
struct Named {
    const char* name;
    Fn Kernels::*search;
};
constexpr Named<SearchFn> searches[] = {
    {"asym", &Kernels::search_asym},
    {"sym", &Kernels::search_sym},
    {"table", &Kernels::search_table},
    {"greedy", &Kernels::search_greedy},
    {"gss", &Kernels::search_gss},
    {"aciq", &Kernels::search_aciq},
    {"hist-apprx", &Kernels::search_hist_apprx},
    {"hist-brute", &Kernels::search_hist_brute},
};

constexpr Named<CodebookFn> codebook_searches[] = {
    {"kmeans", &Kernels::search_kmeans},
    {"kmeans-lloyd", &Kernels::search_kmeans_lloyd},
};

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

template <class Fn, size_t count>
Fn Kernels::*find_named(const Named<Fn> (&searches)[count], const std::string& name) {
    for (const Named<Fn>& known : searches)
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

Layout parse_layout(const std::string& name) {
    if (name == "uniform") return Layout::uniform;
    if (name == "codebook") return Layout::codebook;
    require(name == "clustered", "layout must be uniform, codebook or clustered");
    return Layout::clustered;
}

// Packed rows, and the arrays that they lie in.
struct PackedView {
    PackedArray packed;
    std::optional<Clusters> clusters;
    std::optional<PackedArray> codebooks;
    PackedRows rows;

    PackedView(const PackedArray& packed, size_t embedding_dim, int bits, bool f16_params, const std::string& layout,
               const std::optional<Clusters>& clusters, const std::optional<PackedArray>& codebooks)
        : packed(packed), clusters(clusters), codebooks(codebooks) {
        const Grid grid = make_grid(bits, f16_params);
        rows = {packed.data(), packed.shape(0), embedding_dim, packed.shape(1), grid, parse_layout(layout)};
        require(embedding_dim > 0, "embedding_dim must be positive");
        require(rows.row_bytes == packed_row_bytes(embedding_dim, grid, rows.layout), "packed has the wrong row bytes");
        const bool is_clustered = rows.layout == Layout::clustered;
        require(is_clustered == clusters.has_value() && is_clustered == codebooks.has_value(),
                "clusters and codebooks go with the clustered layout");
        if (!is_clustered) return;
        const bool is_u8 = clusters->dtype() == nb::dtype<uint8_t>();
        require(is_u8 || clusters->dtype() == nb::dtype<uint16_t>(), "clusters must be uint8 or uint16");
        require(clusters->shape(0) == rows.num_rows, "clusters must have one number for each row");
        require(codebooks->shape(1) == (size_t{1} << bits) * (f16_params ? 2 : 4), "codebooks have the wrong size");
        rows.codebooks = codebooks->data();
        rows.clusters = static_cast<const uint8_t*>(clusters->data());
        rows.cluster_bytes = is_u8 ? 1 : 2;
        rows.num_codebooks = codebooks->shape(0);
    }
};

bool has_codebook(const PackedRows& rows, size_t row) {
    return rows.layout != Layout::clustered || cluster_of(rows, row) < rows.num_codebooks;
}

// The first index that cannot be looked up: its position if it is outside [0, num_rows), -2 - position if its row has
// no codebook; -1 if all can. Null indices are all rows.
int64_t first_bad_index(const int64_t* indices, size_t count, const PackedRows& rows) {
    for (size_t i = 0; indices && i < count; i++)
        if (static_cast<uint64_t>(indices[i]) >= rows.num_rows) return static_cast<int64_t>(i);
    if (rows.layout != Layout::clustered) return -1;
    for (size_t i = 0; i < count; i++)
        if (!has_codebook(rows, indices ? static_cast<size_t>(indices[i]) : i)) return -2 - static_cast<int64_t>(i);
    return -1;
}

using QuantizeAnswer = std::tuple<int, size_t, std::vector<std::tuple<double, double>>>;

QuantizeAnswer make_answer(const QuantizeResult& result) {
    std::vector<std::tuple<double, double>> sums;
    for (const SquaredSums& span : result.sums) sums.emplace_back(span.error, span.norm);
    return {static_cast<int>(result.fault), result.faulty_row, sums};
}

// What every way of packing asks of its arguments.
void require_room(const Rows& rows, Grid grid, Layout layout, size_t span_rows, const PackedOut& packed) {
    require(packed.shape(0) == rows.num_rows && packed.shape(1) == packed_row_bytes(rows.embedding_dim, grid, layout),
            "packed has the wrong shape");
    require(span_rows > 0 && span_rows % block_rows == 0, "span_rows must be a multiple of the rows of a block");
}

QuantizeAnswer quantize(const RowsArray& rows, const std::string& search, const SearchParams& params, int bits,
                        bool f16_params, size_t span_rows, const PackedOut& packed) {
    const Rows view = view_rows(rows);
    const Grid grid = make_grid(bits, f16_params);
    require(params.b > 0, "b must be positive");
    require_room(view, grid, Layout::uniform, span_rows, packed);
    SearchFn Kernels::*fn = find_named(searches, search);
    const bool counts_bins = fn == &Kernels::search_hist_apprx || fn == &Kernels::search_hist_brute;
    require(!counts_bins || params.b <= max_bins, "b is more bins than a histogram holds");
    uint8_t* out = packed.data();
    nb::gil_scoped_release release;
    return make_answer(quantize_rows(view, fn, params, grid, span_rows, out));
}

QuantizeAnswer quantize_with_codebooks(const RowsArray& rows, const std::string& search, int bits, bool f16_params,
                                       size_t span_rows, const PackedOut& packed) {
    const Rows view = view_rows(rows);
    const Grid grid = make_grid(bits, f16_params);
    require_room(view, grid, Layout::codebook, span_rows, packed);
    CodebookFn Kernels::*fn = find_named(codebook_searches, search);
    uint8_t* out = packed.data();
    nb::gil_scoped_release release;
    return make_answer(quantize_by_codebooks(view, fn, grid, span_rows, out));
}

QuantizeAnswer quantize_with_clusters(const RowsArray& rows, const RowClusters& clusters, const CodebookValues& values,
                                      int bits, bool f16_params, size_t span_rows, const PackedOut& packed) {
    const Rows view = view_rows(rows);
    const Grid grid = make_grid(bits, f16_params);
    require_room(view, grid, Layout::clustered, span_rows, packed);
    require(values.shape(1) == size_t{1} << bits, "values must have 2^bits levels for each codebook");
    require(clusters.shape(0) == view.num_rows, "clusters must have one number for each row");
    for (size_t i = 0; i < view.num_rows; i++)
        require(clusters.data()[i] < values.shape(0), "a cluster has no codebook");
    uint8_t* out = packed.data();
    nb::gil_scoped_release release;
    return make_answer(quantize_by_clusters(view, values.data(), clusters.data(), grid, span_rows, out));
}

void fit(const nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>& values, const Indices& starts, int bits,
         const FloatOut& codebooks) {
    make_grid(bits, false);
    require(starts.shape(0) > 0, "starts must have one entry more than there are groups");
    const size_t groups = starts.shape(0) - 1;
    const int64_t* start = starts.data();
    require(start[0] == 0 && start[groups] == static_cast<int64_t>(values.shape(0)), "starts leave the values");
    for (size_t group = 0; group < groups; group++) require(start[group] <= start[group + 1], "starts decrease");
    require(codebooks.shape(0) == groups && codebooks.shape(1) == size_t{1} << bits, "codebooks have the wrong shape");
    float* out = codebooks.data();
    nb::gil_scoped_release release;
    fit_codebooks(values.data(), start, groups, bits, out);
}

std::tuple<int, size_t, float, float> bound(const RowsArray& rows) {
    const Rows view = view_rows(rows);
    require(view.num_rows > 0, "there are no rows");
    nb::gil_scoped_release release;
    const Bounds bounds = bound_table(view);
    return {static_cast<int>(bounds.fault), bounds.faulty_row, bounds.xmin, bounds.xmax};
}

int64_t gather(const PackedView& view, const std::optional<Indices>& indices, const FloatOut& out) {
    const PackedRows& rows = view.rows;
    const size_t count = indices ? indices->shape(0) : rows.num_rows;
    require(out.shape(0) == count && out.shape(1) == rows.embedding_dim, "out has the wrong shape");
    const int64_t* from = indices ? indices->data() : nullptr;
    float* to = out.data();
    nb::gil_scoped_release release;
    const int64_t bad = first_bad_index(from, count, rows);
    if (bad == -1) gather_rows(rows, from, count, to);
    return bad;
}

int64_t pool(const PackedView& view, const Indices& indices, const Indices& starts,
             const std::optional<Floats>& per_sample_weights, int64_t padding_index, const std::string& mode,
             const FloatOut& out) {
    const PackedRows& rows = view.rows;
    require(mode == "sum" || mode == "mean" || mode == "max", "mode must be sum, mean or max");
    require(starts.shape(0) > 0, "starts must have num_bags + 1 entries");
    const size_t num_bags = starts.shape(0) - 1;
    require(out.shape(0) == num_bags && out.shape(1) == rows.embedding_dim, "out has the wrong shape");
    require(!per_sample_weights || per_sample_weights->shape(0) == indices.shape(0),
            "per_sample_weights must have one weight for each index");
    const int64_t* start = starts.data();
    require(start[0] >= 0 && static_cast<uint64_t>(start[num_bags]) <= indices.shape(0), "starts leave the indices");
    for (size_t bag = 0; bag < num_bags; bag++) require(start[bag] <= start[bag + 1], "starts decrease");
    const Pooling pooling = mode == "sum" ? Pooling::sum : mode == "mean" ? Pooling::mean : Pooling::max;
    float* to = out.data();
    nb::gil_scoped_release release;
    const int64_t bad = first_bad_index(indices.data(), indices.shape(0), rows);
    if (bad != -1) return bad;
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
    for (const Named<SearchFn>& known : searches) names.emplace_back(known.name);
    for (const Named<CodebookFn>& known : codebook_searches) names.emplace_back(known.name);
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
    m.def("quantize_with_codebooks", &quantize_with_codebooks, nb::arg("rows"), nb::arg("search"), nb::arg("bits"),
          nb::arg("f16_params"), nb::arg("span_rows"), nb::arg("packed"),
          nb::sig("def quantize_with_codebooks(rows: numpy.typing.NDArray[typing.Any], search: str, bits: int, "
                  "f16_params: bool, span_rows: int, packed: numpy.typing.NDArray[numpy.uint8]) "
                  "-> tuple[int, int, list[tuple[float, float]]]"),
          "Pack rows, each with a codebook of its own. Returns what quantize does.");
    m.def("quantize_with_clusters", &quantize_with_clusters, nb::arg("rows"), nb::arg("clusters"), nb::arg("values"),
          nb::arg("bits"), nb::arg("f16_params"), nb::arg("span_rows"), nb::arg("packed"),
          nb::sig("def quantize_with_clusters(rows: numpy.typing.NDArray[typing.Any], "
                  "clusters: numpy.typing.NDArray[numpy.uint32], values: numpy.typing.NDArray[numpy.float32], "
                  "bits: int, f16_params: bool, span_rows: int, packed: numpy.typing.NDArray[numpy.uint8]) "
                  "-> tuple[int, int, list[tuple[float, float]]]"),
          "Pack rows by the codebooks of their clusters. Returns what quantize does.");

    m.def("fit_codebooks", &fit, nb::arg("values"), nb::arg("starts"), nb::arg("bits"), nb::arg("codebooks"),
          "Fill in a codebook for each group values[starts[g] : starts[g + 1]], putting the values in order.");

    nb::class_<PackedView>(m, "PackedRows", "Packed rows, as gather and pool take them.")
        .def(nb::init<const PackedArray&, size_t, int, bool, const std::string&, const std::optional<Clusters>&,
                      const std::optional<PackedArray>&>(),
             nb::arg("packed"), nb::arg("embedding_dim"), nb::arg("bits"), nb::arg("f16_params"), nb::arg("layout"),
             nb::arg("clusters").none(), nb::arg("codebooks").none(),
             nb::sig("def __init__(self, packed: numpy.typing.NDArray[numpy.uint8], embedding_dim: int, bits: int, "
                     "f16_params: bool, layout: str, clusters: numpy.typing.NDArray[typing.Any] | None, "
                     "codebooks: numpy.typing.NDArray[numpy.uint8] | None) -> None"));
    m.def("gather", &gather, nb::arg("rows"), nb::arg("indices").none(), nb::arg("out"),
          "Decode the rows `indices` (None: all) into `out`. Returns the position of the first index out of range, "
          "-2 - the position of the first whose row has no codebook, or -1.");
    m.def("pool", &pool, nb::arg("rows"), nb::arg("indices"), nb::arg("starts"), nb::arg("per_sample_weights").none(),
          nb::arg("padding_index"), nb::arg("mode"), nb::arg("out"),
          "Pool bags of rows into `out`. Returns what gather does.");

    m.def("isa", [] { return std::string(kernels().isa); }, "Name of the instruction set in use.");
    m.def("available_isas", &list_isas, "Names of the instruction sets that this CPU runs, best first.");
    m.def("use_isa", [](const std::string& name) { return use_isa(name); }, nb::arg("name"),
          "Switch to an instruction set; False if this CPU lacks it.");
    m.def("searches", &list_searches, "Names of the searches that have a kernel.");
    m.def("num_threads", &num_threads, "Threads in use.");
    m.def("set_num_threads", &set_num_threads, nb::arg("count"), "Use this many threads.");
}

}  // namespace embpack
