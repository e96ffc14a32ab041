// PyTorch's operators without PyTorch: by the C functions of its stable ABI
// (https://docs.pytorch.org/docs/stable/notes/libtorch_stable_abi.html), a kernel is called without Python, and the core
// needs no PyTorch to be built.
#pragma once

#include <cstddef>
#include <cstdint>

namespace embpack::torch_abi {

// Of a tensor, a string or a library of operators.
using Handle = void*;

// An argument or a result: a number, a handle, or for what may be None the address of one, or 0.
using Value = uint64_t;
using Kernel = void (*)(Value* stack, uint64_t num_arguments, uint64_t num_results);

// The version that these declarations are of, 2.13: later ones read a kernel's arguments as that one does.
inline constexpr uint64_t version = uint64_t{2} << 56 | uint64_t{13} << 48;

// The functions, by the names that PyTorch has for them. Those that return a number return 0, or another for an error.
struct Functions {
    int32_t (*aoti_torch_library_init_impl)(const char* name_space, const char* key, const char* file, uint32_t line,
                                            Handle* library);
    int32_t (*torch_library_impl)(Handle library, const char* name, Kernel, uint64_t version);
    int32_t (*aoti_torch_empty_strided)(int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, Handle* tensor);
    int32_t (*aoti_torch_delete_tensor_object)(Handle tensor);
    int32_t (*aoti_torch_get_data_ptr)(Handle tensor, void**);
    int32_t (*aoti_torch_get_dim)(Handle tensor, int64_t*);
    int32_t (*aoti_torch_get_sizes)(Handle tensor, int64_t**);
    int32_t (*aoti_torch_get_strides)(Handle tensor, int64_t**);
    int32_t (*aoti_torch_get_dtype)(Handle tensor, int32_t*);
    int32_t (*torch_string_c_str)(Handle string, const char**);
    int32_t (*torch_string_length)(Handle string, size_t*);
    int32_t (*torch_delete_string)(Handle string);
    int32_t (*torch_delete_stable_ivalue)(Value*);
    int32_t (*aoti_torch_device_type_cpu)();
    int32_t (*aoti_torch_dtype_uint8)();
    int32_t (*aoti_torch_dtype_int32)();
    int32_t (*aoti_torch_dtype_int64)();
    int32_t (*aoti_torch_dtype_float16)();
    int32_t (*aoti_torch_dtype_bfloat16)();
    int32_t (*aoti_torch_dtype_float32)();
};

}  // namespace embpack::torch_abi
