// The kernels of embpack::embedding and embpack::embedding_bag. They run without Python's lock; what they leave, mistakes
// too, is for functions in Python.
#include <dlfcn.h>

#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "bindings.h"
#include "tensors.h"
#include "torch_abi.h"

// What pybind11, and PyTorch with it, lets an exception do that knows which error of Python it is. It is the same class
// by its name; were it not, the error would be a RuntimeError with the same message.
namespace pybind11 {

class __attribute__((visibility("default"))) builtin_exception : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
    virtual void set_error() const = 0;
};

}  // namespace pybind11

namespace embpack {
namespace {

using torch_abi::Handle, torch_abi::Value;

// PyTorch's functions, its numbers of the types of values, and what it makes Python's tensors of handles by, and handles
// of these; then the functions in Python that do what kernels leave. They are never unloaded.
struct Torch : torch_abi::Functions {
    int32_t u8, i32, i64, f16, bf16, f32, cpu;
    PyObject *tensor_of_handle, *handle_of_tensor, *embedding, *embedding_bag;
} torch;

// A Python exception on its way through PyTorch.
class PythonException : public pybind11::builtin_exception {
public:
    explicit PythonException(const nb::python_error& error)
        : builtin_exception(text_of(error).c_str()), error_(error) {}
    void set_error() const override { nb::python_error(error_).restore(); }

private:
    // Empty where its text is no UTF-8.
    static std::string text_of(const nb::python_error& error) {
        const nb::str text(error.value());
        const char* const bytes = PyUnicode_AsUTF8(text.ptr());
        if (!bytes) PyErr_Clear();
        return bytes ? bytes : "";
    }

    nb::python_error error_;
};

// What fails counts as refused: asked again from Python, PyTorch says why.
void demand(int32_t result) { require(result == 0, "a function of PyTorch's stable ABI failed"); }

// A tensor that an operator was given or returns; maybe none.
class StableTensor {
public:
    explicit StableTensor(Handle handle) : handle_(handle) {}
    ~StableTensor() {
        if (handle_) torch.aoti_torch_delete_tensor_object(handle_);
    }
    StableTensor(const StableTensor&) = delete;
    StableTensor& operator=(const StableTensor&) = delete;

    // A new one of these values, and where it is.
    StableTensor(const int64_t* shape, size_t ndim, ValueType type, Output& out)
        : StableTensor(make_handle(shape, ndim, type)) {
        void* values = nullptr;
        demand(torch.aoti_torch_get_data_ptr(handle_, &values));
        out = {static_cast<uint8_t*>(values), static_cast<size_t>(shape[ndim - 1]) * value_bytes(type), type};
    }

    static Handle make_handle(const int64_t* shape, size_t ndim, ValueType type) {
        std::array<int64_t, 8> few;
        std::vector<int64_t> many(ndim > few.size() ? ndim : 0);
        int64_t* const strides = ndim > few.size() ? many.data() : few.data();
        int64_t stride = 1;
        for (size_t i = ndim; i-- > 0; stride *= std::max<int64_t>(shape[i], 1)) strides[i] = stride;
        const int32_t dtype = type == ValueType::f32 ? torch.f32 : type == ValueType::f16 ? torch.f16 : torch.bf16;
        Handle handle = nullptr;
        const auto dims = static_cast<int64_t>(ndim);
        demand(torch.aoti_torch_empty_strided(dims, shape, strides, dtype, torch.cpu, 0, &handle));
        return handle;
    }

    explicit operator bool() const { return handle_ != nullptr; }

    Handle release() { return std::exchange(handle_, nullptr); }

    // Where it is, is not asked: PyTorch calls a kernel for the CPU only if no tensor is elsewhere.
    dlpack::Tensor view() const {
        int64_t ndim = 0;
        int32_t dtype = 0;
        dlpack::Tensor tensor{};
        demand(torch.aoti_torch_get_dim(handle_, &ndim) | torch.aoti_torch_get_sizes(handle_, &tensor.shape) |
               torch.aoti_torch_get_strides(handle_, &tensor.strides) | torch.aoti_torch_get_dtype(handle_, &dtype) |
               torch.aoti_torch_get_data_ptr(handle_, &tensor.data));
        tensor.device_type = dlpack::cpu;
        tensor.ndim = static_cast<int32_t>(ndim);
        tensor.type_lanes = 1;
        const bool is_byte = dtype == torch.u8;
        require(is_byte || dtype == torch.i32 || dtype == torch.i64, "tensors must be uint8, int32 or int64");
        tensor.type_code = is_byte ? dlpack::unsigned_integer : dlpack::integer;
        tensor.type_bits = is_byte ? 8 : dtype == torch.i32 ? 32 : 64;
        return tensor;
    }

    // As Python's tensor, with Python's lock; it is no longer this one's.
    nb::object take() {
        if (!handle_) return nb::none();
        return nb::handle(torch.tensor_of_handle)(nb::capsule(release()));
    }

private:
    Handle handle_ = nullptr;
};

class StableText {
public:
    explicit StableText(Handle handle) : handle_(handle) {}
    ~StableText() { torch.torch_delete_string(handle_); }
    StableText(const StableText&) = delete;
    StableText& operator=(const StableText&) = delete;

    operator std::string_view() const {
        const char* text = nullptr;
        size_t length = 0;
        demand(torch.torch_string_c_str(handle_, &text) | torch.torch_string_length(handle_, &length));
        return {text, length};
    }
    nb::object take() const {
        const std::string_view text = *this;
        return nb::str(text.data(), text.size());
    }

private:
    Handle handle_;
};

Handle as_handle(Value value) { return reinterpret_cast<Handle>(value); }

// What may be None. It is taken off the stack.
std::optional<Value> take_optional(Value given) {
    if (given == 0) return std::nullopt;
    Value* const at = reinterpret_cast<Value*>(given);
    const Value value = *at;
    torch.torch_delete_stable_ivalue(at);
    return value;
}

Handle take_optional_handle(Value given) { return as_handle(take_optional(given).value_or(0)); }

// The type of values that is asked for; as Python's, which has more of them.
class StableType {
public:
    explicit StableType(Value given) : number_(take_optional(given)) {}

    std::optional<ValueType> as_value_type() const {
        if (!number_) return ValueType::f32;
        const int32_t dtype = static_cast<int32_t>(*number_);
        if (dtype == torch.f32) return ValueType::f32;
        if (dtype == torch.f16) return ValueType::f16;
        if (dtype == torch.bf16) return ValueType::bf16;
        return std::nullopt;
    }
    nb::object take() const {
        if (!number_) return nb::none();
        Handle handle = nullptr;
        const int64_t none = 0, one = 1;
        demand(torch.aoti_torch_empty_strided(1, &none, &one, static_cast<int32_t>(*number_), torch.cpu, 0, &handle));
        return StableTensor(handle).take().attr("dtype");
    }

private:
    std::optional<Value> number_;
};

Beside view_stable_beside(const StableTensor& clusters, const StableTensor& codebooks) {
    const auto view = [](const StableTensor& array) { return array ? as_beside(array.view()) : Beside::Array{}; };
    return {view(clusters), view(codebooks)};
}

// Calls `find`, which returns a tensor, or none for what it leaves. That, and what is refused, is for `ask`, which calls
// a function in Python.
template <class Find, class Ask>
void answer(Value* stack, const Find& find, const Ask& ask) {
    try {
        Handle found = nullptr;
        try {
            found = find();
        } catch (const std::invalid_argument&) {
        }
        if (!found) {
            const WithPython python;
            try {
                const nb::object handle = nb::handle(torch.handle_of_tensor)(ask());
                found = PyCapsule_GetPointer(handle.ptr(), PyCapsule_GetName(handle.ptr()));
            } catch (const nb::python_error& error) {
                throw PythonException(error);
            }
        }
        stack[0] = reinterpret_cast<Value>(found);
    } catch (const nb::python_error& error) {   // of a signal, while rows were looked up
        const WithPython python;
        throw PythonException(error);
    }
}

void embedding_kernel(Value* stack, uint64_t, uint64_t) {
    StableTensor packed(as_handle(stack[0]));
    const StableText row_format(as_handle(stack[1]));
    StableTensor indices(as_handle(stack[2]));
    StableTensor clusters(take_optional_handle(stack[3])), codebooks(take_optional_handle(stack[4]));
    const StableType dtype(stack[5]);
    const auto find = [&]() -> Handle {
        const std::optional<ValueType> type = dtype.as_value_type();
        if (!type) return nullptr;
        const PackedRows rows =
            as_rows(packed.view(), parse_row_format(row_format), view_stable_beside(clusters, codebooks));
        const dlpack::Tensor tensor = as_integer_tensor(indices.view());
        const Integers from = as_integers(tensor);
        std::vector<int64_t> shape(tensor.shape, tensor.shape + tensor.ndim);
        shape.push_back(static_cast<int64_t>(rows.embedding_dim));
        Output to;
        StableTensor out(shape.data(), shape.size(), *type, to);
        return from.count == 0 || gather_without_python(rows, from, to) == -1 ? out.release() : nullptr;
    };
    answer(stack, find, [&] {
        return nb::handle(torch.embedding)(packed.take(), row_format.take(), indices.take(), clusters.take(),
                                           codebooks.take(), nb::arg("dtype") = dtype.take());
    });
}

void embedding_bag_kernel(Value* stack, uint64_t, uint64_t) {
    StableTensor packed(as_handle(stack[0]));
    const StableText row_format(as_handle(stack[1]));
    StableTensor indices(as_handle(stack[2])), offsets(take_optional_handle(stack[3]));
    const StableText mode(as_handle(stack[4]));
    StableTensor clusters(take_optional_handle(stack[5])), codebooks(take_optional_handle(stack[6]));
    const bool include_last_offset = static_cast<uint8_t>(stack[7]) != 0;
    const std::optional<Value> padding = take_optional(stack[8]);
    const StableType dtype(stack[9]);
    const auto find = [&]() -> Handle {
        const std::optional<ValueType> type = dtype.as_value_type();
        if (!type) return nullptr;
        const PackedRows rows =
            as_rows(packed.view(), parse_row_format(row_format), view_stable_beside(clusters, codebooks));
        std::optional<dlpack::Tensor> starts;
        if (offsets) starts = offsets.view();
        Bags bags = as_bags(indices.view(), starts ? &*starts : nullptr, include_last_offset);
        bags.pooling = parse_mode(mode);
        if (padding && *padding >= rows.num_rows) return nullptr;   // counted from the end, or a mistake
        if (padding) bags.padding_index = static_cast<int64_t>(*padding);
        const int64_t shape[] = {static_cast<int64_t>(bags.num_bags), static_cast<int64_t>(rows.embedding_dim)};
        Output to;
        StableTensor out(shape, 2, *type, to);
        return pool_without_python(rows, bags, to) == -1 ? out.release() : nullptr;
    };
    answer(stack, find, [&] {
        const nb::object padding_idx =
            padding ? nb::object(nb::int_(static_cast<int64_t>(*padding))) : nb::object(nb::none());
        return nb::handle(torch.embedding_bag)(
            packed.take(), row_format.take(), indices.take(), offsets.take(), mode.take(), clusters.take(),
            codebooks.take(), nb::arg("include_last_offset") = include_last_offset,
            nb::arg("padding_idx") = padding_idx, nb::arg("dtype") = dtype.take());
    });
}

template <class Function>
void load(void* library, const char* name, Function& function) {
    function = library ? reinterpret_cast<Function>(dlsym(library, name)) : nullptr;
    if (function) return;
    const std::string lacks = std::string("embpack.torch needs PyTorch 2.13, or a later one that still has ") + name;
    throw nb::import_error((lacks + " of its stable ABI; install another PyTorch").c_str());
}

void register_operators(const std::string& library_path, nb::handle tensor_of_handle, nb::handle handle_of_tensor,
                        nb::handle embedding, nb::handle embedding_bag) {
    void* const library = dlopen(library_path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    Torch found{};
#define EMBPACK_LOAD(name) load(library, #name, found.name)
    EMBPACK_LOAD(aoti_torch_library_init_impl);
    EMBPACK_LOAD(torch_library_impl);
    EMBPACK_LOAD(aoti_torch_empty_strided);
    EMBPACK_LOAD(aoti_torch_delete_tensor_object);
    EMBPACK_LOAD(aoti_torch_get_data_ptr);
    EMBPACK_LOAD(aoti_torch_get_dim);
    EMBPACK_LOAD(aoti_torch_get_sizes);
    EMBPACK_LOAD(aoti_torch_get_strides);
    EMBPACK_LOAD(aoti_torch_get_dtype);
    EMBPACK_LOAD(torch_string_c_str);
    EMBPACK_LOAD(torch_string_length);
    EMBPACK_LOAD(torch_delete_string);
    EMBPACK_LOAD(torch_delete_stable_ivalue);
    EMBPACK_LOAD(aoti_torch_device_type_cpu);
    EMBPACK_LOAD(aoti_torch_dtype_uint8);
    EMBPACK_LOAD(aoti_torch_dtype_int32);
    EMBPACK_LOAD(aoti_torch_dtype_int64);
    EMBPACK_LOAD(aoti_torch_dtype_float16);
    EMBPACK_LOAD(aoti_torch_dtype_bfloat16);
    EMBPACK_LOAD(aoti_torch_dtype_float32);
#undef EMBPACK_LOAD
    torch = found;
    torch.cpu = torch.aoti_torch_device_type_cpu();
    torch.u8 = torch.aoti_torch_dtype_uint8();
    torch.i32 = torch.aoti_torch_dtype_int32();
    torch.i64 = torch.aoti_torch_dtype_int64();
    torch.f16 = torch.aoti_torch_dtype_float16();
    torch.bf16 = torch.aoti_torch_dtype_bfloat16();
    torch.f32 = torch.aoti_torch_dtype_float32();
    torch.tensor_of_handle = tensor_of_handle.inc_ref().ptr();
    torch.handle_of_tensor = handle_of_tensor.inc_ref().ptr();
    torch.embedding = embedding.inc_ref().ptr();
    torch.embedding_bag = embedding_bag.inc_ref().ptr();
    Handle operators = nullptr;   // which stay registered as long as it is there: for ever
    demand(torch.aoti_torch_library_init_impl("embpack", "CPU", "native/bindings_operators.cpp", __LINE__, &operators));
    demand(torch.torch_library_impl(operators, "embedding", &embedding_kernel, torch_abi::version));
    demand(torch.torch_library_impl(operators, "embedding_bag", &embedding_bag_kernel, torch_abi::version));
}

}  // namespace

void bind_operators(nb::module_& m) {
    m.def("register_operators", &register_operators, nb::arg("library_path"), nb::arg("tensor_of_handle"),
          nb::arg("handle_of_tensor"), nb::arg("embedding"), nb::arg("embedding_bag"),
          "Register the kernels of embpack::embedding and embpack::embedding_bag with PyTorch, whose Python module is at "
          "library_path. The functions make tensors of handles and handles of tensors, and do what kernels leave.");
}

}  // namespace embpack
