#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>

#include "bindings.h"
#include "updating.h"

namespace embpack {

ValueType value_type(nb::dlpack::dtype dtype, const char* message) {
    if (dtype == nb::dtype<float>()) return ValueType::f32;
    const bool half = dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float);
    require(dtype.bits == 16 && (half || dtype == nb::dtype<uint16_t>()), message);
    return half ? ValueType::f16 : ValueType::bf16;
}

Pooling parse_mode(std::string_view mode) {
    require(mode == "sum" || mode == "mean" || mode == "max", "mode must be sum, mean or max");
    return mode == "sum" ? Pooling::sum : mode == "mean" ? Pooling::mean : Pooling::max;
}

namespace {

using PackedArray = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Vectors = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ProductsOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ValuesOut = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Clusters = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

int64_t tell_fault(const LookupFault& fault) {
    const int64_t position = static_cast<int64_t>(fault.position);
    if (fault.kind == LookupFault::none) return -1;
    return fault.kind == LookupFault::outside ? position : -2 - position;
}

// Whether every index is in one of the bags: offsets start at 0, do not decrease, stay within the indices, and end with
// them if they have the end of the last bag. Without bags there can be no index.
bool are_offsets(const Integers& offsets, size_t num_bags, size_t num_indices) {
    int64_t before = 0;
    for (size_t i = 0; i < offsets.count; i++) {
        if (offsets[i] < before) return false;
        before = offsets[i];
    }
    if (offsets.count > 0 && offsets[0] != 0) return false;
    const size_t last = static_cast<size_t>(before);
    return num_bags == 0 || offsets.count > num_bags ? last == num_indices : last <= num_indices;
}

// Values that are looked up in as long as it takes to give up Python's lock and get it back.
constexpr size_t few_values = 4096;

}  // namespace

int64_t gather_into(const PackedRows& rows, const Integers& indices, const Output& out) {
    const size_t count = indices.values ? indices.count : rows.num_rows;
    std::optional<WithoutPython> without;
    if (count * rows.embedding_dim > few_values) without.emplace();
    return gather_without_python(rows, indices, out);
}

int64_t gather_without_python(const PackedRows& rows, const Integers& indices, const Output& out) {
    if (rows.num_rows == 0) return indices.values ? 0 : -1;
    return tell_fault(gather(rows, indices, out));
}

int64_t pool_into(const PackedRows& rows, const Bags& bags, const Output& out) {
    std::optional<WithoutPython> without;
    if ((bags.indices.count + bags.num_bags) * rows.embedding_dim > few_values) without.emplace();
    return pool_without_python(rows, bags, out);
}

int64_t pool_without_python(const PackedRows& rows, const Bags& bags, const Output& out) {
    if (bags.offsets.values) {
        require(bags.num_bags <= bags.offsets.count && bags.num_bags + 1 >= bags.offsets.count,
                "out must have a row for each bag");
        if (!are_offsets(bags.offsets, bags.num_bags, bags.indices.count)) return bad_offsets;
    } else {
        require(bags.num_bags == 0 || bags.indices.count / bags.num_bags == bags.bag_size, "bags leave the indices");
        if (bags.num_bags == 0 && bags.indices.count > 0) return bad_offsets;
    }
    if (rows.num_rows == 0 && bags.indices.count > 0) return 0;
    Lookup lookup{rows, bags, out};
    size_t faulty_lookup;
    return tell_fault(pool({&lookup, 1}, faulty_lookup));
}

size_t group_width(const std::vector<PackedRows>& tables, const std::vector<FeatureLookup>& lookups,
                   size_t num_features) {
    size_t width = 0;
    for (const FeatureLookup& lookup : lookups) {
        require(lookup.table < tables.size(), "a lookup has no table");
        require(lookup.feature < num_features, "a lookup has no feature");
        width += lookup.columns_before + tables[lookup.table].embedding_dim;
    }
    return width;
}

std::tuple<size_t, int64_t> pool_group_into(const std::vector<PackedRows>& tables,
                                            const std::vector<FeatureLookup>& lookups, const Bags& of_features,
                                            size_t batch, Output to) {
    size_t width = 0;
    for (const FeatureLookup& lookup : lookups) width += tables[lookup.table].embedding_dim;
    const size_t indices_of_each = of_features.indices.count / std::max<size_t>(1, lookups.size());
    std::optional<WithoutPython> without;
    if ((indices_of_each + batch) * width > few_values) without.emplace();
    const Integers& starts = of_features.offsets;
    if (!are_offsets(starts, of_features.num_bags, of_features.indices.count)) return {0, bad_offsets};
    const size_t offset_bytes = starts.are_64_bits ? 8 : 4;
    std::vector<Lookup> cut;
    for (size_t i = 0; i < lookups.size(); i++) {
        const PackedRows& rows = tables[lookups[i].table];
        const size_t first = lookups[i].feature * batch;
        Bags bags = of_features;
        bags.offsets.values = static_cast<const uint8_t*>(starts.values) + first * offset_bytes;
        bags.offsets.count = std::min(batch + 1, starts.count - first);
        bags.num_bags = batch;
        bags.pooling = lookups[i].pooling;
        bags.padding_index = lookups[i].padding_index;
        if (rows.num_rows == 0 && bags.start(0) < bags.start(batch)) return {i, static_cast<int64_t>(bags.start(0))};
        to.values += lookups[i].columns_before * value_bytes(to.type);
        cut.push_back({rows, bags, to});
        to.values += rows.embedding_dim * value_bytes(to.type);
    }
    size_t faulty = 0;
    const LookupFault fault = pool(cut, faulty);
    return {faulty, tell_fault(fault)};
}

namespace {

// Rows of a table, and the arrays that they and what is beside them lie in.
struct TableView {
    PackedArray packed;
    std::optional<Clusters> clusters;
    std::optional<PackedArray> codebooks;
    PackedRows rows;

    TableView(const PackedArray& packed, const std::string& row_format, const std::optional<Clusters>& clusters,
              const std::optional<PackedArray>& codebooks)
        : packed(packed), clusters(clusters), codebooks(codebooks) {
        Beside beside;
        if (clusters) {
            const bool is_u8 = clusters->dtype() == nb::dtype<uint8_t>();
            require(is_u8 || clusters->dtype() == nb::dtype<uint16_t>(), "clusters must be uint8 or uint16");
            beside.by_row = {clusters->data(), clusters->shape(0), size_t{is_u8 ? 1u : 2u}};
        }
        if (codebooks) beside.shared = {codebooks->data(), codebooks->shape(0), codebooks->shape(1)};
        rows = make_rows(packed.data(), packed.shape(0), packed.shape(1), parse_row_format(row_format), beside);
    }
};

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

const float* view_weights(const std::optional<Floats>& weights, const Integers& indices) {
    require(!weights || weights->shape(0) == indices.count, "per_sample_weights must have one weight for each index");
    return weights ? weights->data() : nullptr;
}

int64_t gather_rows(const TableView& view, const std::optional<Indices>& indices, const ValuesOut& out) {
    const Integers from = indices ? view_integers(*indices) : Integers{};
    // An empty array may have no address, but no address means all rows.
    if (indices && from.count == 0) return -1;
    const size_t num_rows = indices ? from.count : view.rows.num_rows;
    return gather_into(view.rows, from, view_output(out, num_rows, view.rows.embedding_dim));
}

int64_t pool_rows(const TableView& view, const Indices& indices, const std::optional<Indices>& offsets,
                  size_t bag_size, const std::optional<Floats>& per_sample_weights, int64_t padding_index,
                  const std::string& mode, const ValuesOut& out) {
    Bags bags{.indices = view_integers(indices), .bag_size = bag_size, .num_bags = out.shape(0),
              .padding_index = padding_index, .pooling = parse_mode(mode)};
    bags.per_sample_weights = view_weights(per_sample_weights, bags.indices);
    if (offsets) bags.offsets = view_integers(*offsets);
    return pool_into(view.rows, bags, view_output(out, bags.num_bags, view.rows.embedding_dim));
}

int64_t multiply_rows(const TableView& view, const Vectors& input, const std::optional<Floats>& bias,
                      const ProductsOut& out) {
    const PackedRows& rows = view.rows;
    require(input.shape(1) == rows.embedding_dim, "input must have embedding_dim columns");
    require(!bias || bias->shape(0) == rows.num_rows, "bias must have one value for each row");
    require(out.shape(0) == input.shape(0) && out.shape(1) == rows.num_rows, "out has the wrong shape");
    if (input.shape(0) == 0 || rows.num_rows == 0) return -1;
    const WithoutPython without;
    return tell_fault(linear(rows, {input.data(), input.shape(0), bias ? bias->data() : nullptr}, out.data()));
}

using RowNumbers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using EntriesOut = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void write(const RowNumbers& rows, const nb::list& arrays) {
    std::vector<ChangedRows> changed;
    size_t num_rows = SIZE_MAX;
    for (nb::handle each : arrays) {
        const auto [array, entries] = nb::cast<std::tuple<EntriesOut, PackedArray>>(each, false);
        require(entries.shape(0) == rows.shape(0) && entries.shape(1) == array.shape(1), "entries have the wrong shape");
        changed.push_back({array.data(), entries.data(), array.shape(1)});
        num_rows = std::min(num_rows, array.shape(0));
    }
    for (size_t i = 0; i < rows.shape(0); i++)
        require(rows.data()[i] >= 0 && static_cast<size_t>(rows.data()[i]) < num_rows, "there are no such rows");
    const WithoutPython without;
    write_rows({rows.data(), rows.shape(0)}, changed);
}

// Several tables, and for each feature which one it reads and how it pools.
class GroupView {
public:
    GroupView(const nb::list& views, const std::vector<size_t>& table_of, const std::vector<std::string>& modes) {
        for (nb::handle view : views) {
            if (!nb::isinstance<TableView>(view)) throw nb::type_error("tables must be TableView");
            views_.push_back(nb::cast<const TableView&>(view));
            tables_.push_back(views_.back().rows);
        }
        require(modes.size() == table_of.size(), "modes must have one for each feature");
        for (size_t i = 0; i < modes.size(); i++) lookups_.push_back({table_of[i], i, parse_mode(modes[i])});
        width_ = group_width(tables_, lookups_, lookups_.size());
    }

    std::tuple<size_t, int64_t> pool(const Indices& indices, const Indices& offsets,
                                     const std::optional<Floats>& per_sample_weights, const ValuesOut& out) const {
        Bags bags{.indices = view_integers(indices), .offsets = view_integers(offsets)};
        bags.per_sample_weights = view_weights(per_sample_weights, bags.indices);
        const size_t batch = out.shape(0);
        bags.num_bags = lookups_.size() * batch;
        require(bags.offsets.count == bags.num_bags + 1, "offsets must have one more than there are bags");
        return pool_group_into(tables_, lookups_, bags, batch, view_output(out, batch, width_));
    }

private:
    std::vector<TableView> views_;
    std::vector<PackedRows> tables_;
    std::vector<FeatureLookup> lookups_;
    size_t width_ = 0;
};

}  // namespace

void bind_lookup(nb::module_& m) {
    nb::class_<TableView>(m, "TableView", "Packed rows and what is beside them, which lookups read.")
        .def(nb::init<const PackedArray&, const std::string&, const std::optional<Clusters>&,
                      const std::optional<PackedArray>&>(),
             nb::arg("packed").noconvert(), nb::arg("row_format"), nb::arg("clusters") = nb::none(),
             nb::arg("codebooks") = nb::none(),
             nb::sig("def __init__(self, packed: numpy.typing.NDArray[numpy.uint8], row_format: str, "
                     "clusters: numpy.typing.NDArray[typing.Any] | None = None, "
                     "codebooks: numpy.typing.NDArray[numpy.uint8] | None = None) -> None"))
        .def("gather", &gather_rows, nb::arg("indices").none(), nb::arg("out").noconvert(),
             nb::sig("def gather(self, indices: numpy.typing.NDArray[typing.Any] | None, "
                     "out: numpy.typing.NDArray[typing.Any]) -> int"),
             "Decode the rows `indices` (None: all) into `out`. Returns the position of the first index out of range, "
             "-2 - the position of the first whose row has no codebook, or -1.")
        .def("pool", &pool_rows, nb::arg("indices"), nb::arg("offsets").none(), nb::arg("bag_size"),
             nb::arg("per_sample_weights").none().noconvert(), nb::arg("padding_index"), nb::arg("mode"),
             nb::arg("out").noconvert(),
             nb::sig("def pool(self, indices: numpy.typing.NDArray[typing.Any], "
                     "offsets: numpy.typing.NDArray[typing.Any] | None, bag_size: int, "
                     "per_sample_weights: numpy.typing.NDArray[numpy.float32] | None, padding_index: int, mode: str, "
                     "out: numpy.typing.NDArray[typing.Any]) -> int"),
             "Pool bags of rows into `out`, by offsets or, without them, of bag_size. Returns what gather does, or "
             "bad_offsets.");
    m.def("layouts", [] {
              std::vector<std::string> names;
              for (std::string_view name : layout_names()) names.emplace_back(name);
              return names;
          },
          "Names of the layouts that lookups know.");
    m.def("row_bytes", [](const std::string& row_format) { return parse_row_format(row_format).row_bytes; },
          nb::arg("row_format"), "Bytes of a row of that format.");
    m.def("linear", &multiply_rows, nb::arg("rows"), nb::arg("input").noconvert(), nb::arg("bias").none().noconvert(),
          nb::arg("out").noconvert(),
          nb::sig("def linear(rows: TableView, input: numpy.typing.NDArray[numpy.float32], "
                  "bias: numpy.typing.NDArray[numpy.float32] | None, out: numpy.typing.NDArray[numpy.float32]) -> int"),
          "Multiply the vectors of `input` by all rows into `out`, and add `bias`. Returns what a view's gather does.");
    m.def("write_rows", &write, nb::arg("rows"), nb::arg("arrays"),
          nb::sig("def write_rows(rows: numpy.typing.NDArray[numpy.int64], arrays: list[tuple["
                  "numpy.typing.NDArray[numpy.uint8], numpy.typing.NDArray[numpy.uint8]]]) -> None"),
          "Write rows of arrays, each [all rows, bytes] with the entries that it gets, while other threads look rows up.");
    m.attr("bad_offsets") = bad_offsets;
    nb::class_<GroupView>(m, "TableGroup", "Packed rows of several tables, and the features that read them.")
        .def(nb::init<const nb::list&, const std::vector<size_t>&, const std::vector<std::string>&>(),
             nb::arg("tables"), nb::arg("table_of"), nb::arg("modes"),
             nb::sig("def __init__(self, tables: list[TableView], table_of: collections.abc.Sequence[int], "
                     "modes: collections.abc.Sequence[str]) -> None"))
        .def("pool", &GroupView::pool, nb::arg("indices"), nb::arg("offsets"),
             nb::arg("per_sample_weights").none().noconvert(), nb::arg("out").noconvert(),
             nb::sig("def pool(self, indices: numpy.typing.NDArray[typing.Any], "
                     "offsets: numpy.typing.NDArray[typing.Any], "
                     "per_sample_weights: numpy.typing.NDArray[numpy.float32] | None, "
                     "out: numpy.typing.NDArray[typing.Any]) -> tuple[int, int]"),
             "Pool the bags of all features. Returns a feature with a fault, and what TableView.pool does.");
}

}  // namespace embpack
