// PyTorch's tensors without PyTorch: by the table of functions that it offers for this, DLPack's exchange API
// (https://dmlc.github.io/dlpack/latest/c_api.html), a view of a tensor takes some nanoseconds, and the core needs no
// PyTorch to be built.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "layouts.h"

namespace embpack {

// The structs of DLPack 1.3 that are used, field for field.
namespace dlpack {

enum TypeCode : uint8_t { integer = 0, unsigned_integer = 1, floating = 2, bfloat = 4 };
inline constexpr int32_t cpu = 1;

struct Tensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

struct ManagedTensor {
    uint32_t major, minor;
    void* context;
    void (*deleter)(ManagedTensor*);
    uint64_t flags;
    Tensor tensor;
};

using SetError = void (*)(void* context, const char* kind, const char* message);

struct ExchangeApi {
    uint32_t major, minor;
    ExchangeApi* older;
    // These return 0, or -1 with an error set.
    int (*allocate)(Tensor* prototype, ManagedTensor** out, void* error_context, SetError);
    int (*managed_tensor_from_object)(void* object, ManagedTensor** out);
    int (*managed_tensor_to_object)(ManagedTensor*, void** object);
    int (*tensor_from_object)(void* object, Tensor* out);   // which the object goes on to own
    void* current_work_stream;
};

inline constexpr uint32_t known_major = 1;

// That they are DLPack's, where pointers have 8 bytes.
static_assert(sizeof(void*) == 8 && sizeof(TypeCode) == 1);
static_assert(std::is_standard_layout_v<Tensor> && std::is_trivially_copyable_v<Tensor>);
static_assert(sizeof(Tensor) == 48 && offsetof(Tensor, device_type) == 8 && offsetof(Tensor, device_id) == 12);
static_assert(offsetof(Tensor, ndim) == 16 && offsetof(Tensor, type_code) == 20 && offsetof(Tensor, type_bits) == 21);
static_assert(offsetof(Tensor, type_lanes) == 22 && offsetof(Tensor, shape) == 24 && offsetof(Tensor, strides) == 32);
static_assert(offsetof(Tensor, byte_offset) == 40);
static_assert(sizeof(ManagedTensor) == 80 && offsetof(ManagedTensor, minor) == 4);
static_assert(offsetof(ManagedTensor, context) == 8 && offsetof(ManagedTensor, deleter) == 16);
static_assert(offsetof(ManagedTensor, flags) == 24 && offsetof(ManagedTensor, tensor) == 32);
static_assert(sizeof(ExchangeApi) == 56 && offsetof(ExchangeApi, older) == 8 && offsetof(ExchangeApi, allocate) == 16);
static_assert(offsetof(ExchangeApi, managed_tensor_from_object) == 24);
static_assert(offsetof(ExchangeApi, managed_tensor_to_object) == 32);
static_assert(offsetof(ExchangeApi, tensor_from_object) == 40 && offsetof(ExchangeApi, current_work_stream) == 48);

}  // namespace dlpack

// Tensors as what they are given for. These throw std::invalid_argument if they are not that.
dlpack::Tensor as_contiguous(dlpack::Tensor, const char* complaint);   // and on the CPU
dlpack::Tensor as_bytes(const dlpack::Tensor&);
dlpack::Tensor as_integer_tensor(const dlpack::Tensor&);
Beside::Array as_beside(const dlpack::Tensor&);
PackedRows as_rows(const dlpack::Tensor&, const RowFormat&, const Beside&);
Bags as_bags(const dlpack::Tensor& indices, const dlpack::Tensor* offsets, bool include_last_offset);

Integers as_integers(const dlpack::Tensor&);

}  // namespace embpack
