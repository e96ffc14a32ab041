// What the bindings of quantizing, of lookup and of PyTorch's tensors have in common. They check sizes and types,
// release the GIL and call. Messages for users are made in Python, which has checked everything that a user can get
// wrong before it calls; what is checked here keeps memory safe whoever calls.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cxxabi.h>
#include <unistd.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "layouts.h"
#include "linear.h"
#include "lookup.h"
#include "quantize.h"

namespace nb = nanobind;

namespace embpack {

// Calls what needs Python's lock. When the interpreter has ended, Python before 3.14 ends a thread that asks for the lock
// (a daemon, within a call) by unwinding its stack, and destructors in the way end the process instead. The thread sleeps
// until the process is gone, as Python 3.14 has it.
template <class Call>
void outlive_python(const Call& call) {
    try {
        call();
    } catch (const abi::__forced_unwind&) {
        while (true) pause();
    }
}

// Takes Python's lock while it lives.
class WithPython {
public:
    WithPython() {
        outlive_python([&] { state_ = PyGILState_Ensure(); });
    }
    ~WithPython() { PyGILState_Release(state_); }
    WithPython(const WithPython&) = delete;
    WithPython& operator=(const WithPython&) = delete;

private:
    PyGILState_STATE state_;
};

// Gives Python's lock up while it lives.
class WithoutPython {
public:
    WithoutPython() : state_(PyEval_SaveThread()) {}
    ~WithoutPython() {
        outlive_python([&] { PyEval_RestoreThread(state_); });
    }
    WithoutPython(const WithoutPython&) = delete;
    WithoutPython& operator=(const WithoutPython&) = delete;

private:
    PyThreadState* state_;
};

// Each adds its functions to the module.
void bind_quantize(nb::module_&);
void bind_clusters(nb::module_&);
void bind_lookup(nb::module_&);
void bind_tensors(nb::module_&);
void bind_operators(nb::module_&);
void bind_disk(nb::module_&);

// float32, float16, or bfloat16 as uint16.
ValueType value_type(nb::dlpack::dtype, const char* complaint);

// Weights, rows of at least one value.
using RowsArray = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
inline Rows view_rows(const RowsArray& rows) {
    require(rows.shape(1) > 0, "rows have no columns");
    const ValueType type = value_type(rows.dtype(), "rows must be float32, float16 or uint16 (bfloat16)");
    return {rows.data(), type, rows.shape(0), rows.shape(1)};
}

Pooling parse_mode(std::string_view mode);

// A fault as Python makes a message of it: -1 for none, the position of an index that is outside, or -2 - position of
// one whose row has no codebook.
inline constexpr int64_t bad_offsets = INT64_MIN;

// With Python's lock, which they give up for as long as it is worth that.
int64_t gather_into(const PackedRows&, const Integers& indices, const Output&);
int64_t pool_into(const PackedRows&, const Bags&, const Output&);
// Without it, or with it for all the time.
int64_t gather_without_python(const PackedRows&, const Integers& indices, const Output&);
int64_t pool_without_python(const PackedRows&, const Bags&, const Output&);

// The bags of a feature, pooled from a table, for some columns of a group's output.
struct FeatureLookup {
    size_t table, feature;
    Pooling pooling;
    int64_t padding_index = no_padding;
    size_t columns_before = 0;  // that are left, between those of the lookup before and its own
};

// Values of a row of the output of several lookups, up to those of the last. Their tables and features must be there.
size_t group_width(const std::vector<PackedRows>& tables, const std::vector<FeatureLookup>&, size_t num_features);

// Pools bags of all features, `batch` of each, feature after feature. Returns a lookup with a fault, and the fault; a
// fault of offsets is of no lookup.
std::tuple<size_t, int64_t> pool_group_into(const std::vector<PackedRows>& tables, const std::vector<FeatureLookup>&,
                                            const Bags& of_features, size_t batch, Output);

}  // namespace embpack
