// Lookup of PyTorch's tensors.
#include "tensors.h"

#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string_view>

#include "bindings.h"

namespace embpack {

dlpack::Tensor as_contiguous(dlpack::Tensor tensor, const char* complaint) {
    bool is_contiguous = true;
    int64_t stride = 1;
    for (int32_t i = tensor.ndim; i-- > 0;) {
        if (tensor.strides && tensor.shape[i] > 1) is_contiguous &= tensor.strides[i] == stride;
        stride *= tensor.shape[i];
    }
    require(tensor.device_type == dlpack::cpu && tensor.type_lanes == 1 && (is_contiguous || stride == 0), complaint);
    if (tensor.data) tensor.data = static_cast<uint8_t*>(tensor.data) + tensor.byte_offset;
    tensor.byte_offset = 0;
    return tensor;
}

dlpack::Tensor as_bytes(const dlpack::Tensor& given) {
    const char* complaint = "a table's tensors must be uint8 [rows, bytes], contiguous and on the CPU";
    const dlpack::Tensor tensor = as_contiguous(given, complaint);
    require(tensor.ndim == 2 && tensor.type_code == dlpack::unsigned_integer && tensor.type_bits == 8, complaint);
    return tensor;
}

Beside::Array as_beside(const dlpack::Tensor& given) {
    const dlpack::Tensor tensor = as_bytes(given);
    return {tensor.data, static_cast<size_t>(tensor.shape[0]), static_cast<size_t>(tensor.shape[1])};
}

PackedRows as_rows(const dlpack::Tensor& given, const RowFormat& format, const Beside& beside) {
    const dlpack::Tensor bytes = as_bytes(given);
    return make_rows(bytes.data, static_cast<size_t>(bytes.shape[0]), static_cast<size_t>(bytes.shape[1]), format,
                     beside);
}

size_t count_values(const dlpack::Tensor& tensor) {
    size_t count = 1;
    for (int32_t i = 0; i < tensor.ndim; i++) count *= static_cast<size_t>(tensor.shape[i]);
    return count;
}

dlpack::Tensor as_integer_tensor(const dlpack::Tensor& given) {
    const char* complaint = "indices and offsets must be int32 or int64, contiguous and on the CPU";
    const dlpack::Tensor tensor = as_contiguous(given, complaint);
    require(tensor.type_code == dlpack::integer && (tensor.type_bits == 32 || tensor.type_bits == 64), complaint);
    return tensor;
}

Integers as_integers(const dlpack::Tensor& tensor) {
    return {tensor.data, count_values(tensor), tensor.type_bits == 64};
}

Bags as_bags(const dlpack::Tensor& given_indices, const dlpack::Tensor* given_offsets, bool include_last_offset) {
    const dlpack::Tensor indices = as_integer_tensor(given_indices);
    Bags bags{.indices = as_integers(indices)};
    if (!given_offsets) {
        require(indices.ndim == 2, "indices without offsets must be 2-D");
        bags.num_bags = static_cast<size_t>(indices.shape[0]);
        bags.bag_size = static_cast<size_t>(indices.shape[1]);
        return bags;
    }
    const dlpack::Tensor offsets = as_integer_tensor(*given_offsets);
    require(indices.ndim == 1 && offsets.ndim == 1, "offsets go with 1-D indices, and are 1-D");
    require(indices.type_bits == offsets.type_bits, "indices and offsets must be of one type");
    require(offsets.shape[0] >= include_last_offset, "offsets must end with where the last bag ends");
    bags.num_bags = static_cast<size_t>(offsets.shape[0]) - include_last_offset;
    if (offsets.shape[0] > 0) bags.offsets = as_integers(offsets);
    return bags;
}

namespace {

// PyTorch's functions. They are never unloaded.
const dlpack::ExchangeApi* exchange_api = nullptr;

void use_exchange_api(const nb::capsule& capsule) {
    auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw nb::python_error();
    while (api && api->major != dlpack::known_major) api = api->older;
    require(api && api->allocate && api->managed_tensor_to_object && api->tensor_from_object,
            "the exchange API has an unknown version, or lacks a function");
    exchange_api = api;
}

// A tensor, which its object owns.
dlpack::Tensor view_tensor(nb::handle object) {
    require(exchange_api, "use_exchange_api has not been called");
    dlpack::Tensor tensor;
    if (exchange_api->tensor_from_object(object.ptr(), &tensor) != 0) throw nb::python_error();
    return tensor;
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

ValueType parse_value_type(std::string_view name) {
    require(name == "float32" || name == "float16" || name == "bfloat16", "dtype must be float32, float16 or bfloat16");
    return name == "float32" ? ValueType::f32 : name == "float16" ? ValueType::f16 : ValueType::bf16;
}

// What was asked for, or the fault in its place.
nb::object found_or(int64_t fault, const nb::object& found) { return fault == -1 ? found : nb::int_(fault); }

// Clusters uint8 [rows, bytes of a number] and codebooks uint8 [codebooks, bytes].
Beside view_beside(nb::handle clusters, nb::handle codebooks) {
    const auto view = [](nb::handle array) { return array.is_none() ? Beside::Array{} : as_beside(view_tensor(array)); };
    return {view(clusters), view(codebooks)};
}

nb::object gather_tensors(nb::handle packed, nb::handle clusters, nb::handle codebooks, std::string_view row_format,
                          nb::handle indices, std::string_view dtype) {
    const PackedRows rows = as_rows(view_tensor(packed), parse_row_format(row_format), view_beside(clusters, codebooks));
    const dlpack::Tensor tensor = as_integer_tensor(view_tensor(indices));
    const Integers from = as_integers(tensor);
    std::vector<int64_t> shape(tensor.shape, tensor.shape + tensor.ndim);
    shape.push_back(static_cast<int64_t>(rows.embedding_dim));
    Output to;
    const nb::object out = make_tensor(std::move(shape), parse_value_type(dtype), to);
    return found_or(from.count == 0 ? -1 : gather_into(rows, from, to), out);
}

const float* view_weights(nb::handle object, const Bags& bags) {
    const char* complaint = "per_sample_weights must be float32, contiguous, and one for each index, for sums";
    const dlpack::Tensor tensor = as_contiguous(view_tensor(object), complaint);
    const bool are_f32 = tensor.type_code == dlpack::floating && tensor.type_bits == 32;
    require(are_f32 && count_values(tensor) == bags.indices.count && bags.pooling == Pooling::sum, complaint);
    return static_cast<const float*>(tensor.data);
}

nb::object pool_tensors(nb::handle packed, nb::handle clusters, nb::handle codebooks, std::string_view row_format,
                        nb::handle indices, nb::handle offsets, std::string_view mode, nb::handle per_sample_weights,
                        bool include_last_offset, int64_t padding_index, std::string_view dtype) {
    const PackedRows rows = as_rows(view_tensor(packed), parse_row_format(row_format), view_beside(clusters, codebooks));
    std::optional<dlpack::Tensor> starts;
    if (!offsets.is_none()) starts = view_tensor(offsets);
    Bags bags = as_bags(view_tensor(indices), starts ? &*starts : nullptr, include_last_offset);
    bags.padding_index = padding_index;
    bags.pooling = parse_mode(mode);
    if (!per_sample_weights.is_none()) bags.per_sample_weights = view_weights(per_sample_weights, bags);
    Output to;
    const std::vector<int64_t> shape{static_cast<int64_t>(bags.num_bags), static_cast<int64_t>(rows.embedding_dim)};
    const nb::object out = make_tensor(shape, parse_value_type(dtype), to);
    return found_or(pool_into(rows, bags, to), out);
}

// Tables, how often each is read and how pooled, and columns of the output that are left for others to write; the
// tables' tensors come with each call.
class TensorGroup {
public:
    void add(std::string_view row_format, std::string_view mode, int64_t padding_index, size_t num_lookups) {
        formats_.push_back(parse_row_format(row_format));
        for (size_t i = 0; i < num_lookups; i++) {
            lookups_.push_back({formats_.size() - 1, 0, parse_mode(mode), padding_index, columns_left_});
            columns_left_ = 0;
        }
    }

    void leave(size_t columns) { columns_left_ += columns; }

    nb::object pool(const nb::list& packed, const nb::list& clusters, const nb::list& codebooks,
                    const std::vector<size_t>& feature_of, size_t num_features, nb::handle indices, nb::handle offsets,
                    nb::handle per_sample_weights, bool include_last_offset, std::string_view dtype) const {
        const std::vector<PackedRows> tables = view_tables(packed, clusters, codebooks);
        std::vector<FeatureLookup> lookups = lookups_;
        require(feature_of.size() == lookups.size(), "feature_of must have one for each lookup");
        for (size_t i = 0; i < lookups.size(); i++) lookups[i].feature = feature_of[i];
        const size_t width = group_width(tables, lookups, num_features) + columns_left_;

        const dlpack::Tensor values = as_integer_tensor(view_tensor(indices));
        const dlpack::Tensor starts = as_integer_tensor(view_tensor(offsets));
        require(values.ndim == 1 && starts.ndim == 1, "indices and offsets must be 1-D");
        Bags bags{.indices = as_integers(values), .offsets = as_integers(starts)};
        if (!per_sample_weights.is_none()) bags.per_sample_weights = view_weights(per_sample_weights, bags);
        for (const FeatureLookup& lookup : lookups)
            require(!bags.per_sample_weights || lookup.pooling == Pooling::sum, "per_sample_weights are for sums");
        require(num_features > 0 && bags.offsets.count >= include_last_offset,
                "offsets must end with where the last bag ends");
        bags.num_bags = bags.offsets.count - include_last_offset;
        require(bags.num_bags % num_features == 0, "offsets must have as many bags for each feature");
        const size_t batch = bags.num_bags / num_features;
        Output to;
        const std::vector<int64_t> shape{static_cast<int64_t>(batch), static_cast<int64_t>(width)};
        const nb::object out = make_tensor(shape, parse_value_type(dtype), to);
        const auto [lookup, fault] = pool_group_into(tables, lookups, bags, batch, to);
        if (fault != -1) return nb::make_tuple(lookup, fault);
        return out;
    }

private:
    // Clusters and codebooks are those of the tables that have them, in their order.
    std::vector<PackedRows> view_tables(const nb::list& packed, const nb::list& clusters,
                                        const nb::list& codebooks) const {
        require(packed.size() == formats_.size(), "packed must have one tensor for each table");
        size_t clusters_taken = 0, codebooks_taken = 0;
        const auto take = [](bool has_one, const nb::list& tensors, size_t& taken) {
            if (!has_one) return nb::object(nb::none());
            require(taken < tensors.size(), "clusters and codebooks must have one tensor for each table that has them");
            return nb::object(tensors[taken++]);
        };
        std::vector<PackedRows> tables;
        for (size_t i = 0; i < formats_.size(); i++) {
            const Layout layout = formats_[i].layout;
            const nb::object by_row = take(has_array_by_row(layout), clusters, clusters_taken);
            const nb::object shared = take(has_shared_array(layout), codebooks, codebooks_taken);
            tables.push_back(as_rows(view_tensor(packed[i]), formats_[i], view_beside(by_row, shared)));
        }
        require(clusters_taken == clusters.size() && codebooks_taken == codebooks.size(),
                "clusters and codebooks go with the layouts that have them");
        return tables;
    }

    std::vector<RowFormat> formats_;
    std::vector<FeatureLookup> lookups_;
    size_t columns_left_ = 0;  // after the last lookup
};

}  // namespace

void bind_tensors(nb::module_& m) {
    // A table's tensors are packed, clusters and codebooks.
    m.def("use_exchange_api", &use_exchange_api, nb::arg("api"), "Take torch.Tensor.__dlpack_c_exchange_api__.");
    m.def("gather_tensors", &gather_tensors, nb::arg("packed"), nb::arg("clusters").none(), nb::arg("codebooks").none(),
          nb::arg("row_format"), nb::arg("indices"), nb::arg("dtype"),
          "The rows `indices` as a new tensor, or what gather returns for a fault.");
    m.def("pool_tensors", &pool_tensors, nb::arg("packed"), nb::arg("clusters").none(), nb::arg("codebooks").none(),
          nb::arg("row_format"), nb::arg("indices"), nb::arg("offsets").none(), nb::arg("mode"),
          nb::arg("per_sample_weights").none(), nb::arg("include_last_offset"), nb::arg("padding_index"),
          nb::arg("dtype"),
          "Pooled bags as a new tensor, or what pool returns for a fault.");
    nb::class_<TensorGroup>(m, "TensorGroup", "What is known of several tables but their tensors, and who reads them.")
        .def(nb::init<>())
        .def("add", &TensorGroup::add, nb::arg("row_format"), nb::arg("mode"), nb::arg("padding_index"),
             nb::arg("num_lookups"), "Add a table.")
        .def("leave", &TensorGroup::leave, nb::arg("columns"), "Leave columns of the output to be written by others.")
        .def("pool", &TensorGroup::pool, nb::arg("packed"), nb::arg("clusters"), nb::arg("codebooks"),
             nb::arg("feature_of"), nb::arg("num_features"), nb::arg("indices"), nb::arg("offsets"),
             nb::arg("per_sample_weights").none(), nb::arg("include_last_offset"), nb::arg("dtype"),
             nb::sig("def pool(self, packed: list[typing.Any], clusters: list[typing.Any], "
                     "codebooks: list[typing.Any], feature_of: collections.abc.Sequence[int], num_features: int, "
                     "indices: object, offsets: object, "
                     "per_sample_weights: object | None, include_last_offset: bool, dtype: str) -> object"),
             "Pool the bags of all features into one new tensor, or return what TableGroup.pool does for a fault. "
             "Lookups go from table to table; lookup i is of the bags of feature feature_of[i].");
}

}  // namespace embpack
