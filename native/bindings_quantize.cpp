#include "quantize.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "rotation.h"
#include "scaled.h"
#include "trellis.h"

namespace embpack {
namespace {

using RowsArray = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using PackedOut = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ErrorWeights = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Starts = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using RowClusters = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using CodesArray = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
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
    {"optimal", &Kernels::search_optimal},
    {"gss", &Kernels::search_gss},
    {"aciq", &Kernels::search_aciq},
    {"hist-apprx", &Kernels::search_hist_apprx},
    {"hist-brute", &Kernels::search_hist_brute},
};

constexpr Named<CodebookFn> codebook_searches[] = {
    {"kmeans", &Kernels::search_kmeans},
    {"kmeans-lloyd", &Kernels::search_kmeans_lloyd},
};

template <class Fn, size_t count>
Fn Kernels::*find_named(const Named<Fn> (&searches)[count], const std::string& name) {
    for (const Named<Fn>& known : searches)
        if (name == known.name) return known.search;
    throw std::invalid_argument("no kernel for search '" + name + "'");
}

Rows view_rows(const RowsArray& rows) {
    require(rows.shape(1) > 0, "rows have no columns");
    const ValueType type = value_type(rows.dtype(), "rows must be float32, float16 or uint16 (bfloat16)");
    return {rows.data(), type, rows.shape(0), rows.shape(1)};
}

using QuantizeAnswer = std::tuple<int, size_t, std::vector<std::tuple<double, double, size_t, double>>>;

// Calls a function of Python with how many more rows are done; None is not called. The caller keeps it alive.
Progress make_progress(nb::handle on_rows) {
    if (on_rows.is_none()) return {};
    return [on_rows, told = size_t{0}](size_t done) mutable {
        const WithPython python;
        outlive_python([&] {
            if (done > told) on_rows(done - told);
        });
        told = done;
    };
}

// Calls pack(progress) without Python's lock.
template <class Pack>
QuantizeAnswer pack_rows(const Rows& rows, nb::handle on_rows, const Pack& pack) {
    const Progress progress = make_progress(on_rows);
    const WithoutPython without;
    const QuantizeResult result = pack(progress);
    if (progress && result.fault == RowFault::none) progress(rows.num_rows);
    std::vector<std::tuple<double, double, size_t, double>> sums;
    for (const SpanSums& span : result.sums)
        sums.emplace_back(span.all.error, span.all.norm, span.lost_rows, span.lost_norm);
    return {static_cast<int>(result.fault), result.faulty_row, sums};
}

// What every way of packing asks of its arguments.
void require_room(const Rows& rows, Grid grid, Layout layout, size_t span_rows, const PackedOut& packed) {
    require(packed.shape(0) == rows.num_rows && packed.shape(1) == packed_row_bytes(rows.embedding_dim, grid, layout),
            "packed has the wrong shape");
    require(span_rows > 0 && span_rows % block_rows == 0, "span_rows must be a multiple of the rows of a block");
}

QuantizeAnswer quantize(const RowsArray& rows, const std::string& search, const SearchParams& own_params, int bits,
                        bool f16_params, size_t span_rows, const PackedOut& packed, nb::handle on_rows,
                        const std::optional<ErrorWeights>& error_weights) {
    const Rows view = view_rows(rows);
    SearchParams params = own_params;
    if (error_weights) {
        const size_t count = error_weights->shape(0);
        require(error_weights->shape(1) == view.embedding_dim && (count == 1 || count == view.num_rows),
                "error_weights must be [1 or rows, columns]");
        params.error_weights = error_weights->data();
        params.are_of_columns = count == 1;
    }
    const Grid grid = make_grid(bits, f16_params);
    require(params.b > 0, "b must be positive");
    require(params.scale_step > 0 && params.quarter_step > 0, "steps must be positive");
    require(!params.is_exact || bits < 8, "effort 'exact' is for 2 and 4 bits: at 8 a row would take seconds");
    require(params.num_kept >= 0 && params.num_kept <= most_kept, "num_kept is more than is kept");
    require_room(view, grid, Layout::uniform, span_rows, packed);
    SearchFn Kernels::*fn = find_named(searches, search);
    const bool counts_bins = fn == &Kernels::search_hist_apprx || fn == &Kernels::search_hist_brute;
    require(!counts_bins || params.b <= max_bins, "b is more bins than a histogram holds");
    uint8_t* out = packed.data();
    return pack_rows(view, on_rows, [&](const Progress& progress) {
        return quantize_rows(view, fn, params, grid, span_rows, out, progress);
    });
}

QuantizeAnswer quantize_with_codebooks(const RowsArray& rows, const std::string& search, int bits, bool f16_params,
                                       size_t span_rows, const PackedOut& packed, nb::handle on_rows) {
    const Rows view = view_rows(rows);
    const Grid grid = make_grid(bits, f16_params);
    require_room(view, grid, Layout::codebook, span_rows, packed);
    CodebookFn Kernels::*fn = find_named(codebook_searches, search);
    uint8_t* out = packed.data();
    return pack_rows(view, on_rows, [&](const Progress& progress) {
        return quantize_by_codebooks(view, fn, grid, span_rows, out, progress);
    });
}

QuantizeAnswer quantize_with_clusters(const RowsArray& rows, const RowClusters& clusters, const CodebookValues& values,
                                      int bits, bool f16_params, size_t span_rows, const PackedOut& packed,
                                      nb::handle on_rows) {
    const Rows view = view_rows(rows);
    const Grid grid = make_grid(bits, f16_params);
    require_room(view, grid, Layout::clustered, span_rows, packed);
    require(values.shape(1) == size_t{1} << bits, "values must have 2^bits levels for each codebook");
    require(clusters.shape(0) == view.num_rows, "clusters must have one number for each row");
    for (size_t i = 0; i < view.num_rows; i++)
        require(clusters.data()[i] < values.shape(0), "a cluster has no codebook");
    uint8_t* out = packed.data();
    return pack_rows(view, on_rows, [&](const Progress& progress) {
        return quantize_by_clusters(view, values.data(), clusters.data(), grid, span_rows, out, progress);
    });
}

QuantizeAnswer encode_trellis(const RowsArray& rows, const Floats& narrow, const Floats& wide, const Floats& scales,
                              const Floats& mean, size_t span_rows, const PackedOut& packed, nb::handle on_rows) {
    const Rows view = view_rows(rows);
    require(packed.shape(0) == view.num_rows, "packed must have a row for each row");
    require(span_rows > 0 && span_rows % block_rows == 0, "span_rows must be a multiple of the rows of a block");
    require(packed.shape(1) > 0 && 8 * (packed.shape(1) - 1) >= 2 * view.embedding_dim, "packed rows are too short");
    require(scales.shape(0) == trellis_scales, "there must be 256 scales");
    require(mean.shape(0) == view.embedding_dim, "mean must have one value for each column");
    const TrellisSteps steps(view.embedding_dim, packed.shape(1));
    require(narrow.shape(0) == steps.shape.num_narrow_levels(), "narrow has the wrong number of levels");
    require(wide.shape(0) == steps.shape.num_wide_levels(), "wide has the wrong number of levels");
    const TrellisTable table = make_trellis_table(steps, narrow.data(), wide.data(), scales.data(), mean.data());
    uint8_t* out = packed.data();
    return pack_rows(view, on_rows, [&](const Progress& progress) {
        return quantize_by_trellis(view, table, span_rows, out, progress);
    });
}

void fit(const nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>& values, const Starts& starts, int bits,
         const FloatOut& codebooks) {
    make_grid(bits, false);
    require(starts.shape(0) > 0, "starts must have one entry more than there are groups");
    const size_t groups = starts.shape(0) - 1;
    const int64_t* start = starts.data();
    require(start[0] == 0 && start[groups] == static_cast<int64_t>(values.shape(0)), "starts leave the values");
    for (size_t group = 0; group < groups; group++) require(start[group] <= start[group + 1], "starts decrease");
    require(codebooks.shape(0) == groups && codebooks.shape(1) == size_t{1} << bits, "codebooks have the wrong shape");
    float* out = codebooks.data();
    const WithoutPython without;
    fit_codebooks(values.data(), start, groups, bits, out);
}

void assign(const CodebookValues& rows, const CodebookValues& codebooks, int bits,
            const nb::ndarray<uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& numbers) {
    make_grid(bits, false);
    require(rows.shape(1) > 0, "rows have no columns");
    require(codebooks.shape(1) == size_t{1} << bits, "codebooks must have 2^bits levels");
    require(numbers.shape(0) == rows.shape(0), "numbers must have one for each row");
    uint32_t* out = numbers.data();
    const WithoutPython without;
    assign_codebooks(rows.data(), rows.shape(0), rows.shape(1), codebooks.data(), codebooks.shape(0), bits, out);
}

std::tuple<int, size_t, float, float> bound(const RowsArray& rows) {
    const Rows view = view_rows(rows);
    require(view.num_rows > 0, "there are no rows");
    const WithoutPython without;
    const Bounds bounds = bound_table(view);
    return {static_cast<int>(bounds.fault), bounds.faulty_row, bounds.xmin, bounds.xmax};
}

void rotate_in_place(const FloatOut& rows, bool back) {
    require(rows.shape(1) > 0, "rows have no columns");
    float* values = rows.data();
    const WithoutPython without;
    rotate(values, rows.shape(0), rows.shape(1), back);
}

void multiply(const CodesArray& codes, const Floats& values, const CodebookValues& scales, const FloatOut& out) {
    require(values.shape(0) == 256, "there must be a value for each of 256 codes");
    require(scales.shape(0) == codes.shape(0), "scales must have a row for each row of codes");
    require(scales.shape(1) > 0 && codes.shape(1) % scales.shape(1) == 0, "scales must be for as many columns each");
    require(out.shape(0) == codes.shape(0) && out.shape(1) == codes.shape(1), "out must have the shape of the codes");
    float* to = out.data();
    const ScaledCodes scaled{codes.data(), values.data(), scales.data(), codes.shape(0), codes.shape(1), scales.shape(1)};
    const WithoutPython without;
    multiply_codes(scaled, to);
}

std::vector<std::string> list_searches() {
    std::vector<std::string> names;
    for (const Named<SearchFn>& known : searches) names.emplace_back(known.name);
    for (const Named<CodebookFn>& known : codebook_searches) names.emplace_back(known.name);
    return names;
}

}  // namespace

void bind_quantize(nb::module_& m) {
    nb::class_<SearchParams>(m, "SearchParams", "What a search may need beside the rows.")
        .def("__init__",
             [](SearchParams* self, int b, double r, bool local_minima_only, int scale_step, int quarter_step,
                int num_kept, int num_steps, bool is_exact, float xmin, float xmax) {
                 new (self) SearchParams{.b = b,
                                         .r = r,
                                         .local_minima_only = local_minima_only,
                                         .scale_step = scale_step,
                                         .quarter_step = quarter_step,
                                         .num_kept = num_kept,
                                         .num_steps = num_steps,
                                         .is_exact = is_exact,
                                         .xmin = xmin,
                                         .xmax = xmax};
             },
             nb::kw_only(), nb::arg("b") = SearchParams{}.b, nb::arg("r") = SearchParams{}.r,
             nb::arg("local_minima_only") = false, nb::arg("scale_step") = SearchParams{}.scale_step,
             nb::arg("quarter_step") = SearchParams{}.quarter_step, nb::arg("num_kept") = SearchParams{}.num_kept,
             nb::arg("num_steps") = SearchParams{}.num_steps, nb::arg("is_exact") = false,
             nb::arg("xmin") = 0.0f, nb::arg("xmax") = 0.0f);

    // Written out where the generated signature would not say what an array holds.
    m.def("quantize", &quantize, nb::arg("rows"), nb::arg("search"), nb::arg("params"), nb::arg("bits"),
          nb::arg("f16_params"), nb::arg("span_rows"), nb::arg("packed").noconvert(),
          nb::arg("on_rows") = nb::none(), nb::arg("error_weights") = nb::none(),
          nb::sig("def quantize(rows: numpy.typing.NDArray[typing.Any], search: str, params: SearchParams, bits: int, "
                  "f16_params: bool, span_rows: int, packed: numpy.typing.NDArray[numpy.uint8], "
                  "on_rows: collections.abc.Callable[[int], object] | None = None, "
                  "error_weights: numpy.typing.NDArray[numpy.float32] | None = None) "
                  "-> tuple[int, int, list[tuple[float, float, int, float]]]"),
          "Pack rows into `packed`. Calls on_rows now and then with how many more are done. Returns (fault, faulty row, "
          "sums): of each span the sums of squared errors and of squares, how many rows are lost, and the sum of their "
          "squares.");
    m.attr("block_rows") = block_rows;
    m.attr("max_bins") = max_bins;
    m.def("bound", &bound, nb::arg("rows"),
          nb::sig("def bound(rows: numpy.typing.NDArray[typing.Any]) -> tuple[int, int, float, float]"),
          "Bounds of all values: (fault, faulty row, smallest, largest).");
    m.def("quantize_with_codebooks", &quantize_with_codebooks, nb::arg("rows"), nb::arg("search"), nb::arg("bits"),
          nb::arg("f16_params"), nb::arg("span_rows"), nb::arg("packed").noconvert(), nb::arg("on_rows") = nb::none(),
          nb::sig("def quantize_with_codebooks(rows: numpy.typing.NDArray[typing.Any], search: str, bits: int, "
                  "f16_params: bool, span_rows: int, packed: numpy.typing.NDArray[numpy.uint8], "
                  "on_rows: collections.abc.Callable[[int], object] | None = None) "
                  "-> tuple[int, int, list[tuple[float, float, int, float]]]"),
          "Pack rows, each with a codebook of its own. Returns what quantize does.");
    m.def("quantize_with_clusters", &quantize_with_clusters, nb::arg("rows"), nb::arg("clusters"), nb::arg("values"),
          nb::arg("bits"), nb::arg("f16_params"), nb::arg("span_rows"), nb::arg("packed").noconvert(), nb::arg("on_rows") = nb::none(),
          nb::sig("def quantize_with_clusters(rows: numpy.typing.NDArray[typing.Any], "
                  "clusters: numpy.typing.NDArray[numpy.uint32], values: numpy.typing.NDArray[numpy.float32], "
                  "bits: int, f16_params: bool, span_rows: int, packed: numpy.typing.NDArray[numpy.uint8], "
                  "on_rows: collections.abc.Callable[[int], object] | None = None) "
                  "-> tuple[int, int, list[tuple[float, float, int, float]]]"),
          "Pack rows by the codebooks of their clusters. Returns what quantize does.");

    m.def("encode_trellis", &encode_trellis, nb::arg("rows"), nb::arg("narrow"), nb::arg("wide"), nb::arg("scales"),
          nb::arg("mean"), nb::arg("span_rows"), nb::arg("packed").noconvert(), nb::arg("on_rows") = nb::none(),
          nb::sig("def encode_trellis(rows: numpy.typing.NDArray[typing.Any], "
                  "narrow: numpy.typing.NDArray[numpy.float32], wide: numpy.typing.NDArray[numpy.float32], "
                  "scales: numpy.typing.NDArray[numpy.float32], mean: numpy.typing.NDArray[numpy.float32], "
                  "span_rows: int, packed: numpy.typing.NDArray[numpy.uint8], "
                  "on_rows: collections.abc.Callable[[int], object] | None = None) "
                  "-> tuple[int, int, list[tuple[float, float, int, float]]]"),
          "Pack rows as trellis-coded ones of as many bytes as `packed` has columns. Returns what quantize does.");

    m.def("fit_codebooks", &fit, nb::arg("values").noconvert(), nb::arg("starts"), nb::arg("bits"),
          nb::arg("codebooks").noconvert(),
          "Fill in a codebook for each group values[starts[g] : starts[g + 1]], putting the values in order.");
    m.def("assign_codebooks", &assign, nb::arg("rows"), nb::arg("codebooks"), nb::arg("bits"),
          nb::arg("numbers").noconvert(),
          nb::sig("def assign_codebooks(rows: numpy.typing.NDArray[numpy.float32], "
                  "codebooks: numpy.typing.NDArray[numpy.float32], bits: int, "
                  "numbers: numpy.typing.NDArray[numpy.uint32]) -> None"),
          "Fill in which codebook has the least squared error of each row, of equal ones the first.");
    m.def("rotate", &rotate_in_place, nb::arg("rows").noconvert(), nb::kw_only(), nb::arg("back"),
          nb::sig("def rotate(rows: numpy.typing.NDArray[numpy.float32], *, back: bool) -> None"),
          "Rotate rows in place, or back.");
    m.def("multiply_codes", &multiply, nb::arg("codes"), nb::arg("values"), nb::arg("scales"), nb::arg("out").noconvert(),
          nb::sig("def multiply_codes(codes: numpy.typing.NDArray[numpy.uint8], "
                  "values: numpy.typing.NDArray[numpy.float32], scales: numpy.typing.NDArray[numpy.float32], "
                  "out: numpy.typing.NDArray[numpy.float32]) -> None"),
          "Fill in values[codes] * scales, each scale for as many columns as the others.");
    m.def("searches", &list_searches, "Names of the searches that have a kernel.");
}

}  // namespace embpack
