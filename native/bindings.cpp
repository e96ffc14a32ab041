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
#include "tensors.h"
#include "threads.h"

namespace nb = nanobind;

namespace embpack {
namespace {

using RowsArray = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using PackedArray = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using PackedOut = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Starts = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ValuesOut = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
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
ValueType value_type(nb::dlpack::dtype dtype, const char* message) {
    if (dtype == nb::dtype<float>()) return ValueType::f32;
    const bool half = dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float);
    require(dtype.bits == 16 && (half || dtype == nb::dtype<uint16_t>()), message);
    return half ? ValueType::f16 : ValueType::bf16;
}

Rows view_rows(const RowsArray& rows) {
    require(rows.shape(1) > 0, "rows have no columns");
    const ValueType type = value_type(rows.dtype(), "rows must be float32, float16 or uint16 (bfloat16)");
    return {rows.data(), type, rows.shape(0), rows.shape(1)};
}

Layout parse_layout(const std::string& name) {
    if (name == "uniform") return Layout::uniform;
    if (name == "codebook") return Layout::codebook;
    require(name == "clustered", "layout must be uniform, codebook or clustered");
    return Layout::clustered;
}

// What rows of the clustered layout share: a number of a codebook each, and the codebooks.
struct Shared {
    const void* clusters = nullptr;
    size_t num_clusters = 0, cluster_bytes = 0;
    const void* codebooks = nullptr;
    size_t num_codebooks = 0, codebook_bytes = 0;
};

PackedRows make_rows(const void* packed, size_t num_rows, size_t row_bytes, size_t embedding_dim, Grid grid,
                     Layout layout, const Shared& shared) {
    PackedRows rows{static_cast<const uint8_t*>(packed), num_rows, embedding_dim, row_bytes, grid, layout};
    require(embedding_dim > 0 && embedding_dim <= 8 * row_bytes, "embedding_dim does not go with packed");
    require(row_bytes == packed_row_bytes(embedding_dim, grid, layout), "packed has the wrong row bytes");
    const bool is_clustered = layout == Layout::clustered;
    require(is_clustered == (shared.cluster_bytes > 0) && is_clustered == (shared.codebook_bytes > 0),
            "clusters and codebooks go with the clustered layout");
    if (!is_clustered) return rows;
    require(shared.cluster_bytes <= 2, "clusters must be uint8 or uint16");
    require(shared.num_clusters == num_rows, "clusters must have one number for each row");
    require(shared.codebook_bytes == codebook_bytes(grid), "codebooks have the wrong size");
    require(shared.num_codebooks > 0 || num_rows == 0, "codebooks are none");
    rows.codebooks = static_cast<const uint8_t*>(shared.codebooks);
    rows.clusters = static_cast<const uint8_t*>(shared.clusters);
    rows.cluster_bytes = shared.cluster_bytes;
    rows.num_codebooks = shared.num_codebooks;
    return rows;
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
        Shared shared;
        if (clusters) {
            const bool is_u8 = clusters->dtype() == nb::dtype<uint8_t>();
            require(is_u8 || clusters->dtype() == nb::dtype<uint16_t>(), "clusters must be uint8 or uint16");
            shared.clusters = clusters->data();
            shared.num_clusters = clusters->shape(0);
            shared.cluster_bytes = is_u8 ? 1 : 2;
        }
        if (codebooks) {
            shared.codebooks = codebooks->data();
            shared.num_codebooks = codebooks->shape(0);
            shared.codebook_bytes = codebooks->shape(1);
        }
        rows = make_rows(packed.data(), packed.shape(0), packed.shape(1), embedding_dim, make_grid(bits, f16_params),
                         parse_layout(layout), shared);
    }
};

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

Integers view_integers(const Indices& array) {
    const bool is_i64 = array.dtype() == nb::dtype<int64_t>();
    require(is_i64 || array.dtype() == nb::dtype<int32_t>(), "indices and offsets must be int32 or int64");
    return {array.data(), array.shape(0), is_i64};
}

Output view_output(const ValuesOut& out, size_t num_rows, size_t width) {
    require(out.shape(0) == num_rows && out.shape(1) == width, "out has the wrong shape");
    const ValueType type = value_type(out.dtype(), "out must be float32, float16 or uint16 (bfloat16)");
    return {static_cast<uint8_t*>(out.data()), width * value_bytes(type), type};
}

// What Python makes a message of: -1 for no fault, the position of an index that is outside, or -2 - position of one
// whose row has no codebook.
int64_t tell_fault(const LookupFault& fault) {
    const int64_t position = static_cast<int64_t>(fault.position);
    if (fault.kind == LookupFault::none) return -1;
    return fault.kind == LookupFault::outside ? position : -2 - position;
}
constexpr int64_t bad_offsets = INT64_MIN;

// Whether offsets start at 0, do not decrease, and stay within the indices.
bool are_offsets(const Integers& offsets, size_t num_indices) {
    int64_t before = 0;
    for (size_t i = 0; i < offsets.count; i++) {
        if (offsets[i] < before) return false;
        before = offsets[i];
    }
    return static_cast<size_t>(before) <= num_indices && (offsets.count == 0 || offsets[0] == 0);
}

Pooling parse_mode(const std::string& mode) {
    require(mode == "sum" || mode == "mean" || mode == "max", "mode must be sum, mean or max");
    return mode == "sum" ? Pooling::sum : mode == "mean" ? Pooling::mean : Pooling::max;
}

const float* view_weights(const std::optional<Floats>& weights, const Integers& indices) {
    require(!weights || weights->shape(0) == indices.count, "per_sample_weights must have one weight for each index");
    return weights ? weights->data() : nullptr;
}

int64_t gather_into(const PackedRows& rows, const Integers& indices, const Output& out) {
    if (rows.num_rows == 0) return indices.values ? 0 : -1;
    nb::gil_scoped_release release;
    return tell_fault(gather(rows, indices, out));
}

int64_t gather_rows(const PackedView& view, const std::optional<Indices>& indices, const ValuesOut& out) {
    const Integers from = indices ? view_integers(*indices) : Integers{};
    // An empty array may have no address, but no address means all rows.
    if (indices && from.count == 0) return -1;
    const size_t num_rows = indices ? from.count : view.rows.num_rows;
    return gather_into(view.rows, from, view_output(out, num_rows, view.rows.embedding_dim));
}

int64_t pool_into(const PackedRows& rows, const Bags& bags, const Output& out) {
    if (bags.offsets.values) {
        require(bags.num_bags <= bags.offsets.count && bags.num_bags + 1 >= bags.offsets.count,
                "out must have a row for each bag");
        if (!are_offsets(bags.offsets, bags.indices.count)) return bad_offsets;
    } else {
        require(bags.num_bags == 0 || bags.indices.count / bags.num_bags == bags.bag_size, "bags leave the indices");
    }
    if (rows.num_rows == 0 && bags.indices.count > 0) return 0;
    nb::gil_scoped_release release;
    size_t faulty_lookup;
    LookupFault fault = pool({{rows, bags, out}}, faulty_lookup);
    // An index after the last bag is never read, but a mistake all the same.
    for (size_t i = bags.start(bags.num_bags); i < bags.indices.count; i++)
        if (static_cast<uint64_t>(bags.indices[i]) >= rows.num_rows) fault.note(i, LookupFault::outside);
    return tell_fault(fault);
}

int64_t pool_rows(const PackedView& view, const Indices& indices, const std::optional<Indices>& offsets,
                  size_t bag_size, const std::optional<Floats>& per_sample_weights, int64_t padding_index,
                  const std::string& mode, const ValuesOut& out) {
    Bags bags{.indices = view_integers(indices), .bag_size = bag_size, .num_bags = out.shape(0),
              .padding_index = padding_index, .pooling = parse_mode(mode)};
    bags.per_sample_weights = view_weights(per_sample_weights, bags.indices);
    if (offsets) bags.offsets = view_integers(*offsets);
    return pool_into(view.rows, bags, view_output(out, bags.num_bags, view.rows.embedding_dim));
}

// PyTorch's functions. It is never unloaded.
const dlpack::ExchangeApi* exchange_api = nullptr;

void use_exchange_api(const nb::capsule& capsule) {
    auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw nb::python_error();
    while (api && api->major != dlpack::known_major) api = api->older;
    require(api, "the exchange API has an unknown version");
    exchange_api = api;
}

// A contiguous tensor on the CPU, which its object owns.
dlpack::Tensor view_tensor(nb::handle object, const char* complaint) {
    require(exchange_api, "use_exchange_api has not been called");
    dlpack::Tensor tensor;
    if (exchange_api->tensor_from_object(object.ptr(), &tensor) != 0) throw nb::python_error();
    bool is_contiguous = true;
    int64_t stride = 1;
    for (int32_t i = tensor.ndim; i-- > 0;) {
        if (tensor.strides && tensor.shape[i] > 1) is_contiguous &= tensor.strides[i] == stride;
        stride *= tensor.shape[i];
    }
    require(tensor.device_type == dlpack::cpu && tensor.type_lanes == 1 && (is_contiguous || stride == 0), complaint);
    if (tensor.data) tensor.data = static_cast<uint8_t*>(tensor.data) + tensor.byte_offset;
    return tensor;
}

dlpack::Tensor view_bytes(nb::handle object) {
    const char* complaint = "a table's tensors must be uint8 [rows, bytes], contiguous and on the CPU";
    const dlpack::Tensor tensor = view_tensor(object, complaint);
    require(tensor.ndim == 2 && tensor.type_code == dlpack::unsigned_integer && tensor.type_bits == 8, complaint);
    return tensor;
}

size_t count_values(const dlpack::Tensor& tensor) {
    size_t count = 1;
    for (int32_t i = 0; i < tensor.ndim; i++) count *= static_cast<size_t>(tensor.shape[i]);
    return count;
}

dlpack::Tensor view_integer_tensor(nb::handle object) {
    const char* complaint = "indices and offsets must be int32 or int64, contiguous and on the CPU";
    const dlpack::Tensor tensor = view_tensor(object, complaint);
    require(tensor.type_code == dlpack::integer && (tensor.type_bits == 32 || tensor.type_bits == 64), complaint);
    return tensor;
}

Integers as_integers(const dlpack::Tensor& tensor) {
    return {tensor.data, count_values(tensor), tensor.type_bits == 64};
}

// A new tensor of these values, and where it is.
nb::object make_tensor(std::vector<int64_t> shape, ValueType type, Output& out) {
    dlpack::Tensor prototype{nullptr, dlpack::cpu, 0, static_cast<int32_t>(shape.size()), dlpack::floating, 0, 1,
                             shape.data(), nullptr, 0};
    prototype.type_bits = static_cast<uint8_t>(8 * value_bytes(type));
    if (type == ValueType::bf16) prototype.type_code = dlpack::bfloat;
    const auto set_error = [](void*, const char*, const char* text) { PyErr_SetString(PyExc_RuntimeError, text); };
    dlpack::ManagedTensor* tensor;
    void* object;
    if (exchange_api->allocate(&prototype, &tensor, nullptr, set_error) != 0) throw nb::python_error();
    out = {static_cast<uint8_t*>(tensor->tensor.data) + tensor->tensor.byte_offset,
           static_cast<size_t>(shape.back()) * value_bytes(type), type};
    if (exchange_api->managed_tensor_to_object(tensor, &object) != 0) throw nb::python_error();
    return nb::steal(static_cast<PyObject*>(object));
}

ValueType parse_value_type(const std::string& name) {
    require(name == "float32" || name == "float16" || name == "bfloat16", "dtype must be float32, float16 or bfloat16");
    return name == "float32" ? ValueType::f32 : name == "float16" ? ValueType::f16 : ValueType::bf16;
}

// What was asked for, or the fault in its place.
nb::object found_or(int64_t fault, const nb::object& found) { return fault == -1 ? found : nb::int_(fault); }

// The tensors of a table: packed, and clusters uint8 [rows, bytes of a number] and codebooks uint8 [codebooks, bytes].
PackedRows view_table(nb::handle packed, nb::handle clusters, nb::handle codebooks, size_t embedding_dim, int bits,
                      const std::string& param_dtype, const std::string& layout) {
    Shared shared;
    if (!clusters.is_none()) {
        const dlpack::Tensor tensor = view_bytes(clusters);
        shared.clusters = tensor.data;
        shared.num_clusters = static_cast<size_t>(tensor.shape[0]);
        shared.cluster_bytes = static_cast<size_t>(tensor.shape[1]);
    }
    if (!codebooks.is_none()) {
        const dlpack::Tensor tensor = view_bytes(codebooks);
        shared.codebooks = tensor.data;
        shared.num_codebooks = static_cast<size_t>(tensor.shape[0]);
        shared.codebook_bytes = static_cast<size_t>(tensor.shape[1]);
    }
    require(param_dtype == "float16" || param_dtype == "float32", "param_dtype must be float16 or float32");
    const dlpack::Tensor rows = view_bytes(packed);
    return make_rows(rows.data, static_cast<size_t>(rows.shape[0]), static_cast<size_t>(rows.shape[1]), embedding_dim,
                     make_grid(bits, param_dtype == "float16"), parse_layout(layout), shared);
}

nb::object gather_tensors(nb::handle packed, nb::handle clusters, nb::handle codebooks, size_t embedding_dim, int bits,
                          const std::string& param_dtype, const std::string& layout, nb::handle indices,
                          const std::string& dtype) {
    const PackedRows rows = view_table(packed, clusters, codebooks, embedding_dim, bits, param_dtype, layout);
    const dlpack::Tensor tensor = view_integer_tensor(indices);
    const Integers from = as_integers(tensor);
    std::vector<int64_t> shape(tensor.shape, tensor.shape + tensor.ndim);
    shape.push_back(static_cast<int64_t>(embedding_dim));
    Output to;
    const nb::object out = make_tensor(std::move(shape), parse_value_type(dtype), to);
    return found_or(from.count == 0 ? -1 : gather_into(rows, from, to), out);
}

size_t count_bags(const dlpack::Tensor& indices, const dlpack::Tensor& offsets, bool include_last_offset) {
    require(indices.ndim == 1 && offsets.ndim == 1, "offsets go with 1-D indices, and are 1-D");
    require(indices.type_bits == offsets.type_bits, "indices and offsets must be of one type");
    require(offsets.shape[0] >= include_last_offset, "offsets must end with where the last bag ends");
    return static_cast<size_t>(offsets.shape[0]) - include_last_offset;
}

const float* view_weights(nb::handle object, const Bags& bags) {
    const char* complaint = "per_sample_weights must be float32, contiguous, and one for each index, for sums";
    const dlpack::Tensor tensor = view_tensor(object, complaint);
    const bool are_f32 = tensor.type_code == dlpack::floating && tensor.type_bits == 32;
    require(are_f32 && count_values(tensor) == bags.indices.count && bags.pooling == Pooling::sum, complaint);
    return static_cast<const float*>(tensor.data);
}

nb::object pool_tensors(nb::handle packed, nb::handle clusters, nb::handle codebooks, size_t embedding_dim, int bits,
                        const std::string& param_dtype, const std::string& layout, nb::handle indices,
                        nb::handle offsets, const std::string& mode, nb::handle per_sample_weights,
                        bool include_last_offset, int64_t padding_index, const std::string& dtype) {
    const PackedRows rows = view_table(packed, clusters, codebooks, embedding_dim, bits, param_dtype, layout);
    const dlpack::Tensor tensor = view_integer_tensor(indices);
    Bags bags{.indices = as_integers(tensor), .padding_index = padding_index, .pooling = parse_mode(mode)};
    if (offsets.is_none()) {
        require(tensor.ndim == 2, "indices without offsets must be 2-D");
        bags.num_bags = static_cast<size_t>(tensor.shape[0]);
        bags.bag_size = static_cast<size_t>(tensor.shape[1]);
    } else {
        const dlpack::Tensor starts = view_integer_tensor(offsets);
        bags.num_bags = count_bags(tensor, starts, include_last_offset);
        if (starts.shape[0] > 0) bags.offsets = as_integers(starts);
    }
    if (!per_sample_weights.is_none()) bags.per_sample_weights = view_weights(per_sample_weights, bags);
    Output to;
    const std::vector<int64_t> shape{static_cast<int64_t>(bags.num_bags), static_cast<int64_t>(embedding_dim)};
    const nb::object out = make_tensor(shape, parse_value_type(dtype), to);
    return found_or(pool_into(rows, bags, to), out);
}

// Several tables, and for each feature which one it reads and how it pools.
struct GroupView {
    std::vector<PackedView> tables;
    std::vector<size_t> table_of;
    std::vector<Pooling> poolings;
    size_t width = 0;   // values of all features together

    GroupView(const nb::list& views, const std::vector<size_t>& table_of, const std::vector<std::string>& modes)
        : table_of(table_of) {
        for (nb::handle view : views) {
            if (!nb::isinstance<PackedView>(view)) throw nb::type_error("tables must be PackedRows");
            tables.push_back(nb::cast<const PackedView&>(view));
        }
        require(modes.size() == table_of.size(), "modes must have one for each feature");
        for (const std::string& mode : modes) poolings.push_back(parse_mode(mode));
        for (size_t table : table_of) {
            require(table < tables.size(), "a feature has no table");
            width += tables[table].rows.embedding_dim;
        }
    }

    // Returns the feature with a fault and the fault, as pool does; a fault of offsets is of no feature.
    std::tuple<size_t, int64_t> pool_features(const Indices& indices, const Indices& offsets,
                                              const std::optional<Floats>& per_sample_weights, const ValuesOut& out) {
        const Integers values = view_integers(indices), starts = view_integers(offsets);
        const size_t batch = out.shape(0), features = table_of.size();
        require(starts.count == features * batch + 1, "offsets must have one entry more than there are bags");
        Output to = view_output(out, batch, width);
        const float* weights = view_weights(per_sample_weights, values);
        const size_t offset_bytes = starts.are_64_bits ? 8 : 4;
        nb::gil_scoped_release release;
        if (!are_offsets(starts, values.count)) return {0, bad_offsets};
        std::vector<Lookup> lookups;
        for (size_t feature = 0; feature < features; feature++) {
            const PackedRows& rows = tables[table_of[feature]].rows;
            Bags bags{.indices = values, .per_sample_weights = weights, .offsets = starts, .num_bags = batch,
                      .pooling = poolings[feature]};
            bags.offsets.values = static_cast<const uint8_t*>(starts.values) + feature * batch * offset_bytes;
            bags.offsets.count = batch + 1;
            if (rows.num_rows == 0 && bags.start(0) < bags.start(batch))
                return {feature, static_cast<int64_t>(bags.start(0))};
            lookups.push_back({rows, bags, to});
            to.values += rows.embedding_dim * value_bytes(to.type);
        }
        size_t faulty = 0;
        const LookupFault fault = pool(lookups, faulty);
        return {faulty, tell_fault(fault)};
    }
};

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
          nb::arg("f16_params"), nb::arg("span_rows"), nb::arg("packed").noconvert(),
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
          nb::arg("f16_params"), nb::arg("span_rows"), nb::arg("packed").noconvert(),
          nb::sig("def quantize_with_codebooks(rows: numpy.typing.NDArray[typing.Any], search: str, bits: int, "
                  "f16_params: bool, span_rows: int, packed: numpy.typing.NDArray[numpy.uint8]) "
                  "-> tuple[int, int, list[tuple[float, float]]]"),
          "Pack rows, each with a codebook of its own. Returns what quantize does.");
    m.def("quantize_with_clusters", &quantize_with_clusters, nb::arg("rows"), nb::arg("clusters"), nb::arg("values"),
          nb::arg("bits"), nb::arg("f16_params"), nb::arg("span_rows"), nb::arg("packed").noconvert(),
          nb::sig("def quantize_with_clusters(rows: numpy.typing.NDArray[typing.Any], "
                  "clusters: numpy.typing.NDArray[numpy.uint32], values: numpy.typing.NDArray[numpy.float32], "
                  "bits: int, f16_params: bool, span_rows: int, packed: numpy.typing.NDArray[numpy.uint8]) "
                  "-> tuple[int, int, list[tuple[float, float]]]"),
          "Pack rows by the codebooks of their clusters. Returns what quantize does.");

    m.def("fit_codebooks", &fit, nb::arg("values").noconvert(), nb::arg("starts"), nb::arg("bits"),
          nb::arg("codebooks").noconvert(),
          "Fill in a codebook for each group values[starts[g] : starts[g + 1]], putting the values in order.");

    nb::class_<PackedView>(m, "PackedRows", "Packed rows, as gather and pool take them.")
        .def(nb::init<const PackedArray&, size_t, int, bool, const std::string&, const std::optional<Clusters>&,
                      const std::optional<PackedArray>&>(),
             nb::arg("packed").noconvert(), nb::arg("embedding_dim"), nb::arg("bits"), nb::arg("f16_params"),
             nb::arg("layout"), nb::arg("clusters").none(), nb::arg("codebooks").none(),
             nb::sig("def __init__(self, packed: numpy.typing.NDArray[numpy.uint8], embedding_dim: int, bits: int, "
                     "f16_params: bool, layout: str, clusters: numpy.typing.NDArray[typing.Any] | None, "
                     "codebooks: numpy.typing.NDArray[numpy.uint8] | None) -> None"));
    m.def("gather", &gather_rows, nb::arg("rows"), nb::arg("indices").none(), nb::arg("out").noconvert(),
          nb::sig("def gather(rows: PackedRows, indices: numpy.typing.NDArray[typing.Any] | None, "
                  "out: numpy.typing.NDArray[typing.Any]) -> int"),
          "Decode the rows `indices` (None: all) into `out`. Returns the position of the first index out of range, "
          "-2 - the position of the first whose row has no codebook, or -1.");
    m.def("pool", &pool_rows, nb::arg("rows"), nb::arg("indices"), nb::arg("offsets").none(), nb::arg("bag_size"),
          nb::arg("per_sample_weights").none().noconvert(), nb::arg("padding_index"), nb::arg("mode"),
          nb::arg("out").noconvert(),
          nb::sig("def pool(rows: PackedRows, indices: numpy.typing.NDArray[typing.Any], "
                  "offsets: numpy.typing.NDArray[typing.Any] | None, bag_size: int, "
                  "per_sample_weights: numpy.typing.NDArray[numpy.float32] | None, padding_index: int, mode: str, "
                  "out: numpy.typing.NDArray[typing.Any]) -> int"),
          "Pool bags of rows into `out`, by offsets or, without them, of bag_size. Returns what gather does, or "
          "bad_offsets.");
    m.attr("bad_offsets") = bad_offsets;
    // The same of PyTorch's tensors. The table's are packed, clusters and codebooks.
    m.def("use_exchange_api", &use_exchange_api, nb::arg("api"), "Take torch.Tensor.__dlpack_c_exchange_api__.");
    m.def("gather_tensors", &gather_tensors, nb::arg("packed"), nb::arg("clusters").none(), nb::arg("codebooks").none(),
          nb::arg("embedding_dim"), nb::arg("bits"), nb::arg("param_dtype"), nb::arg("layout"), nb::arg("indices"),
          nb::arg("dtype"), "The rows `indices` as a new tensor, or what gather returns for a fault.");
    m.def("pool_tensors", &pool_tensors, nb::arg("packed"), nb::arg("clusters").none(), nb::arg("codebooks").none(),
          nb::arg("embedding_dim"), nb::arg("bits"), nb::arg("param_dtype"), nb::arg("layout"), nb::arg("indices"),
          nb::arg("offsets").none(), nb::arg("mode"), nb::arg("per_sample_weights").none(),
          nb::arg("include_last_offset"), nb::arg("padding_index"), nb::arg("dtype"),
          "Pooled bags as a new tensor, or what pool returns for a fault.");
    nb::class_<GroupView>(m, "TableGroup", "Packed rows of several tables, and the features that read them.")
        .def(nb::init<const nb::list&, const std::vector<size_t>&, const std::vector<std::string>&>(),
             nb::arg("tables"), nb::arg("table_of"), nb::arg("modes"),
             nb::sig("def __init__(self, tables: list[PackedRows], table_of: collections.abc.Sequence[int], "
                     "modes: collections.abc.Sequence[str]) -> None"))
        .def("pool", &GroupView::pool_features, nb::arg("indices"), nb::arg("offsets"),
             nb::arg("per_sample_weights").none().noconvert(), nb::arg("out").noconvert(),
             nb::sig("def pool(self, indices: numpy.typing.NDArray[typing.Any], "
                     "offsets: numpy.typing.NDArray[typing.Any], "
                     "per_sample_weights: numpy.typing.NDArray[numpy.float32] | None, "
                     "out: numpy.typing.NDArray[typing.Any]) -> tuple[int, int]"),
             "Pool the bags of all features. Returns a feature with a fault, and what the function pool does.");

    m.def("isa", [] { return std::string(kernels().isa); }, "Name of the instruction set in use.");
    m.def("available_isas", &list_isas, "Names of the instruction sets that this CPU runs, best first.");
    m.def("use_isa", [](const std::string& name) { return use_isa(name); }, nb::arg("name"),
          "Switch to an instruction set; False if this CPU lacks it.");
    m.def("searches", &list_searches, "Names of the searches that have a kernel.");
    m.def("num_threads", &num_threads, "Threads in use.");
    m.def("set_num_threads", &set_num_threads, nb::arg("count"), "Use this many threads.");
}

}  // namespace embpack
