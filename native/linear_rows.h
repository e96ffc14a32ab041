// Rows that are unpacked to be multiplied, and what a thread works in.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "aligned.h"
#include "dispatch.h"

namespace embpack {

inline constexpr size_t vector_lanes = 16;

inline size_t round_up(size_t count, size_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Memory that grows to what is asked for; it begins as zeros.
class Zeros {
public:
    float* of(size_t count) {
        if (count > count_) {
            values_ = Aligned<float>(count);
            count_ = count;
            std::fill_n(values_.data(), count, 0.0f);
        }
        return values_.data();
    }

private:
    Aligned<float> values_{0};
    size_t count_ = 0;
};

struct Scratch {
    Zeros values;                   // unpacked rows
    std::vector<uint8_t> rows;      // short ones, filled up to a window
    std::vector<uint16_t> halves;
    std::vector<float> params;      // scale and bias of each row
    std::vector<float> products, others;
};

// Values of a row as it is unpacked: zeros follow to the end of a vector, and a cache line. Where rows are 4 KB apart, a
// column of them has few lines of the first-level cache, and drives itself out.
inline size_t unpacked_stride(const PackedRows& rows) {
    return round_up(rows.embedding_dim, vector_lanes) + vector_lanes;
}

// Rows first .. first + count, as float32, in the basis that they were packed in.
inline const float* unpack_rows(const PackedRows& rows, size_t first, size_t count, Zeros& values, LookupFault& fault) {
    const size_t row_bytes = unpacked_stride(rows) * sizeof(float);
    float* const to = values.of(count * unpacked_stride(rows));
    // Row `first` of the output is the first of these.
    const uintptr_t start = reinterpret_cast<uintptr_t>(to) - first * row_bytes;
    kernels().lookups_of(rows).gather_rows(rows, {}, false, first, first + count,
                                           {reinterpret_cast<uint8_t*>(start), row_bytes}, fault);
    return to;
}

}  // namespace embpack
