// Few vectors, multiplied by the words of rows (kernels.h: WordRows): by codes in place where a row has them, or by rows
// that are unpacked some at a time.
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

class ByWords {
public:
    ByWords(const PackedRows& rows, const LinearInput& input)
        : rows_(rows),
          input_(input),
          has_codes_(rows.layout == Layout::uniform),
          values_(Windows::of_values(rows)),
          codes_(has_codes_ ? Windows::of_codes(rows) : values_),
          of_values_(order_vectors(values_, input, rows.embedding_dim)),
          of_codes_(has_codes_ ? order_vectors(codes_, input, rows.embedding_dim) : Aligned<float>(0)),
          sums_(sum_vectors(input, rows.embedding_dim)) {}

    size_t rows_at_a_time() const {
        if (has_codes_) return std::max<size_t>(16, packed_bytes_at_a_time / rows_.row_bytes);
        return std::max<size_t>(16, unpacked_values_at_a_time / values_.num_values());
    }

    // Rows first .. first + count of the output's columns.
    void multiply(size_t first, size_t count, Scratch& scratch, float* out, LookupFault& fault) const {
        if (has_codes_)
            multiply_codes(first, count, scratch, fault);
        else
            multiply_values(first, count, scratch, scratch.products, fault);
        for (size_t v = 0; v < input_.num_vectors; v++) {
            float* const to = out + v * rows_.num_rows + first;
            for (size_t i = 0; i < count; i++) to[i] = input_.with_bias(scratch.products[v * count + i], first + i);
        }
    }

private:
    // Rows that stay in the second-level cache while one group of vectors after the other reads them.
    static constexpr size_t packed_bytes_at_a_time = size_t{1} << 16, unpacked_values_at_a_time = size_t{1} << 16;

    void multiply_codes(size_t first, size_t count, Scratch& scratch, LookupFault& fault) const {
        multiply_finite_codes(first, count, scratch);
        const auto is_finite = [](float x) { return x - x == 0.0f; };
        const auto begin = scratch.products.begin();
        const size_t num_products = input_.num_vectors * count;
        if (std::all_of(begin, begin + static_cast<ptrdiff_t>(num_products), is_finite)) return;
        // Infinities come out as if rows had been unpacked: a code of 0 does not stand for a value of 0.
        multiply_values(first, count, scratch, scratch.others, fault);
        for (size_t i = 0; i < num_products; i++)
            if (!is_finite(scratch.products[i])) scratch.products[i] = scratch.others[i];
    }

    // scale times the product of a row's codes, and bias times the vector's sum.
    void multiply_finite_codes(size_t first, size_t count, Scratch& scratch) const {
        const uint8_t* const bytes = rows_.bytes + first * rows_.row_bytes;
        multiply({fill_up(bytes, count, scratch), count, codes_.row_bytes, codes_.count, codes_.last, codes_.bits},
                 of_codes_, scratch.products);
        read_params(bytes, count, scratch);
        for (size_t v = 0; v < input_.num_vectors; v++) {
            float* const products = scratch.products.data() + v * count;
            for (size_t i = 0; i < count; i++)
                products[i] = scratch.params[2 * i] * products[i] + scratch.params[2 * i + 1] * sums_[v];
        }
    }

    void multiply_values(size_t first, size_t count, Scratch& scratch, std::vector<float>& products,
                         LookupFault& fault) const {
        const float* const values = unpack_rows(rows_, first, count, scratch.values, fault);
        multiply({reinterpret_cast<const uint8_t*>(values), count, values_.row_bytes, values_.count, values_.last,
                  values_.bits},
                 of_values_, products);
    }

    void multiply(const WordRows& rows, const Aligned<float>& vectors, std::vector<float>& products) const {
        products.resize(round_up(input_.num_vectors, group_vectors) * rows.num_rows);
        kernels().products.multiply_words(rows, vectors.data(), input_.num_vectors, products.data(), rows.num_rows);
    }

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
    const LinearInput& input_;
    const bool has_codes_;
    const Windows values_, codes_;
    const Aligned<float> of_values_, of_codes_;
    const std::vector<float> sums_;
};

}  // namespace embpack
