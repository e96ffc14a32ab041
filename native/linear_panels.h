// Many vectors, multiplied by rows that are unpacked some at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "linear.h"
#include "linear_rows.h"

namespace embpack {

class ByPanels {
public:
    ByPanels(const PackedRows& rows, const LinearInput& input)
        : rows_(rows),
          input_(input),
          num_panels_(round_up(input.num_vectors, vector_lanes) / vector_lanes),
          panels_(num_panels_ * rows.embedding_dim * vector_lanes) {
        const size_t d = rows.embedding_dim;
        float* to = panels_.data();
        for (size_t first = 0; first < input.num_vectors; first += vector_lanes)
            for (size_t j = 0; j < d; j++)
                for (size_t v = first; v < first + vector_lanes; v++)
                    *to++ = v < input.num_vectors ? input.vectors[v * d + j] : 0.0f;
    }

    size_t rows_at_a_time() const { return std::max<size_t>(24, values_at_a_time / rows_.embedding_dim / 12 * 12); }

    // Rows first .. first + count of the output's columns.
    void multiply(size_t first, size_t count, Scratch& scratch, float* out, LookupFault& fault) const {
        const size_t d = rows_.embedding_dim, stride = unpacked_stride(rows_);
        const float* const values = unpack_rows(rows_, first, count, scratch.values, fault);
        scratch.products.assign(num_panels_ * count * vector_lanes, 0.0f);
        for (size_t j = 0; j < d; j += columns_at_a_time)
            for (size_t panel = 0; panel < num_panels_; panel++)
                kernels().products.multiply_panel({values + j, count, stride, std::min(d - j, columns_at_a_time)},
                                                  panels_.data() + (panel * d + j) * vector_lanes,
                                                  scratch.products.data() + panel * count * vector_lanes);
        for (size_t v = 0; v < input_.num_vectors; v++) {
            const float* const products =
                scratch.products.data() + v / vector_lanes * count * vector_lanes + v % vector_lanes;
            float* const to = out + v * rows_.num_rows + first;
            for (size_t i = 0; i < count; i++) to[i] = input_.with_bias(products[i * vector_lanes], first + i);
        }
    }

private:
    // Of unpacked rows, which stay in the second-level cache; and columns of a panel, which stay in the first.
    static constexpr size_t values_at_a_time = size_t{1} << 16, columns_at_a_time = 256;

    const PackedRows& rows_;
    const LinearInput& input_;
    const size_t num_panels_;
    Aligned<float> panels_;
};

}  // namespace embpack
