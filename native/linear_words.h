// Few vectors, multiplied by the words of rows (kernels.h: WordRows): by codes in place, or by rows that are unpacked
// some at a time.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "linear.h"
#include "linear_rows.h"

namespace embpack {

// How the rows of a table are read by windows.
struct Windows {
    int bits;
    size_t row_bytes, count, last;
    size_t columns;   // of a window

    static Windows of_values(const PackedRows& rows) {
        const size_t count = round_up(rows.embedding_dim, vector_lanes) / vector_lanes;
        return {32, unpacked_stride(rows) * sizeof(float), count, (count - 1) * window_bytes_of_product, vector_lanes};
    }
    // Rows that begin with codes. The last window ends where the row does, unless the row is shorter than a window: then
    // it is copied to where there is room for one.
    static Windows of_codes(const PackedRows& rows) {
        const size_t columns = vector_lanes * 32 / static_cast<size_t>(rows.grid.bits);
        const size_t count = round_up(rows.embedding_dim, columns) / columns;
        const size_t row_bytes = std::max(rows.row_bytes, window_bytes_of_product);
        const size_t last = std::min((count - 1) * window_bytes_of_product, row_bytes - window_bytes_of_product);
        return {rows.grid.bits, row_bytes, count, last, columns};
    }

    size_t codes_of_word() const { return 32 / static_cast<size_t>(bits); }
    size_t num_values() const { return count * columns; }
};

// Vectors in the order in which windows of rows are read, in groups.
inline Aligned<float> order_vectors(const Windows& windows, const LinearInput& input, size_t d) {
    const size_t codes = windows.codes_of_word();
    Aligned<float> ordered(round_up(input.num_vectors, group_vectors) * windows.num_values());
    float* to = ordered.data();
    for (size_t first = 0; first < input.num_vectors; first += group_vectors) {
        const size_t group = group_of(input.num_vectors - first);
        for (size_t window = 0; window < windows.count; window++) {
            const size_t byte = window + 1 < windows.count ? window * window_bytes_of_product : windows.last;
            const size_t first_column = byte * 8 / static_cast<size_t>(windows.bits);
            for (size_t k = 0; k < codes; k++) {
                const float weight = k + 1 < codes ? 1.0f / static_cast<float>(1u << (windows.bits * k)) : 1.0f;
                for (size_t v = first; v < first + group; v++)
                    for (size_t lane = 0; lane < vector_lanes; lane++) {
                        const size_t column = first_column + lane * codes + k;
                        const bool counts = v < input.num_vectors && column < d && column >= window * windows.columns;
                        *to++ = counts ? input.vectors[v * d + column] * weight : 0.0f;
                    }
            }
        }
    }
    return ordered;
}

inline std::vector<float> sum_vectors(const LinearInput& input, size_t d) {
    std::vector<float> sums;
    for (const float* vector = input.vectors; sums.size() < input.num_vectors; vector += d) {
        double sum = 0.0;
        for (size_t j = 0; j < d; j++) sum += double{vector[j]};
        sums.push_back(static_cast<float>(sum));
    }
    return sums;
}

// Rows that are unpacked, of any layout.
class ByValues {
public:
    ByValues(const PackedRows& rows, const LinearInput& input)
        : rows_(rows),
          num_vectors_(input.num_vectors),
          windows_(Windows::of_values(rows)),
          vectors_(order_vectors(windows_, input, rows.embedding_dim)) {}

    // So many stay in the second-level cache while one group of vectors after the other reads them.
    size_t rows_at_a_time() const { return std::max<size_t>(16, (size_t{1} << 16) / windows_.num_values()); }

    // Of vector v and row first + i products[v * count + i].
    void multiply(size_t first, size_t count, Scratch& scratch, std::vector<float>& products,
                  LookupFault& fault) const {
        const float* const values = unpack_rows(rows_, first, count, scratch.values, fault);
        products.resize(round_up(num_vectors_, group_vectors) * count);
        kernels().products.multiply_words({reinterpret_cast<const uint8_t*>(values), count, windows_.row_bytes,
                                           windows_.count, windows_.last, windows_.bits},
                                          vectors_.data(), num_vectors_, products.data(), count);
    }

private:
    const PackedRows& rows_;
    const size_t num_vectors_;
    const Windows windows_;
    const Aligned<float> vectors_;
};

// Rows of the uniform layout, from their codes: scale times the product of a row's codes, and bias times the vector's
// sum.
class ByCodes {
public:
    ByCodes(const PackedRows& rows, const LinearInput& input)
        : rows_(rows),
          num_vectors_(input.num_vectors),
          windows_(Windows::of_codes(rows)),
          vectors_(order_vectors(windows_, input, rows.embedding_dim)),
          sums_(sum_vectors(input, rows.embedding_dim)) {}

    size_t rows_at_a_time() const { return std::max<size_t>(16, (size_t{1} << 16) / rows_.row_bytes); }

    void multiply(size_t first, size_t count, Scratch& scratch, std::vector<float>& products) const {
        const uint8_t* const bytes = rows_.bytes + first * rows_.row_bytes;
        products.resize(round_up(num_vectors_, group_vectors) * count);
        kernels().products.multiply_words({fill_up(bytes, count, scratch), count, windows_.row_bytes, windows_.count,
                                           windows_.last, windows_.bits},
                                          vectors_.data(), num_vectors_, products.data(), count);
        read_params(bytes, count, scratch);
        for (size_t v = 0; v < num_vectors_; v++) {
            float* const of_vector = products.data() + v * count;
            for (size_t i = 0; i < count; i++)
                of_vector[i] = scratch.params[2 * i] * of_vector[i] + scratch.params[2 * i + 1] * sums_[v];
        }
    }

private:
    const uint8_t* fill_up(const uint8_t* bytes, size_t count, Scratch& scratch) const {
        if (rows_.row_bytes >= window_bytes_of_product) return bytes;
        scratch.rows.resize(count * window_bytes_of_product);
        for (size_t i = 0; i < count; i++)
            std::memcpy(scratch.rows.data() + i * window_bytes_of_product, bytes + i * rows_.row_bytes,
                        rows_.row_bytes);
        return scratch.rows.data();
    }

    void read_params(const uint8_t* bytes, size_t count, Scratch& scratch) const {
        const bool are_halves = rows_.grid.f16_params;
        const size_t param_bytes = are_halves ? 2 : 4;
        scratch.params.resize(2 * count);
        scratch.halves.resize(are_halves ? 2 * count : 0);
        void* const to = are_halves ? static_cast<void*>(scratch.halves.data()) : scratch.params.data();
        const uint8_t* from = bytes + rows_.row_bytes - 2 * param_bytes;
        for (size_t i = 0; i < count; i++, from += rows_.row_bytes)
            std::memcpy(static_cast<uint8_t*>(to) + 2 * param_bytes * i, from, 2 * param_bytes);
        if (are_halves)
            kernels().widen_values(scratch.halves.data(), 2 * count, ValueType::f16, scratch.params.data());
    }

    const PackedRows& rows_;
    const size_t num_vectors_;
    const Windows windows_;
    const Aligned<float> vectors_;
    const std::vector<float> sums_;
};

}  // namespace embpack
