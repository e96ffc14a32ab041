// Few vectors, multiplied by the levels of trellis-coded rows (kernels.h: TrellisProducts): scale times the product of
// a row's levels, and the vector's product with the mean.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "linear.h"
#include "linear_rows.h"
#include "trellis_rows.h"

namespace embpack {

// Vectors in groups: of each sixteen columns in turn those of each vector of the group, and zeros to the end of
// a block.
inline Aligned<float> order_by_blocks(const LinearInput& input, size_t d) {
    const size_t num_values = round_up(d, trellis_block);
    Aligned<float> ordered(round_up(input.num_vectors, group_vectors) * num_values);
    float* to = ordered.data();
    for (size_t first = 0; first < input.num_vectors; first += group_vectors) {
        const size_t group = group_of(input.num_vectors - first);
        for (size_t j = 0; j < num_values; j += vector_lanes)
            for (size_t v = first; v < first + group; v++)
                for (size_t column = j; column < j + vector_lanes; column++)
                    *to++ = v < input.num_vectors && column < d ? input.vectors[v * d + column] : 0.0f;
    }
    return ordered;
}

class ByLevels {
public:
    ByLevels(const PackedRows& rows, const LinearInput& input)
        : rows_(rows), num_vectors_(input.num_vectors), vectors_(order_by_blocks(input, rows.embedding_dim)) {
        const size_t d = rows.embedding_dim;
        std::vector<float> mean(d);
        std::memcpy(mean.data(), rows.codebooks + sizeof(float) * TrellisShape(d, rows.row_bytes).first_mean(),
                    sizeof(float) * d);
        for (const float* vector = input.vectors; of_mean_.size() < num_vectors_; vector += d) {
            double sum = 0.0;
            for (size_t j = 0; j < d; j++) sum += double{mean[j]} * double{vector[j]};
            of_mean_.push_back(static_cast<float>(sum));
        }
    }

    // Enough for what the kernel finds of a table first to take little of its time.
    size_t rows_at_a_time() const { return 1024; }

    void multiply(size_t first, size_t count, Scratch&, std::vector<float>& products) const {
        products.resize(round_up(num_vectors_, group_vectors) * count);
        kernels().trellis_products.multiply_levels(rows_, first, first + count, vectors_.data(), num_vectors_,
                                                   products.data(), count);
        for (size_t v = 0; v < num_vectors_; v++)
            for (size_t i = 0; i < count; i++) products[v * count + i] += of_mean_[v];
    }

private:
    const PackedRows& rows_;
    const size_t num_vectors_;
    const Aligned<float> vectors_;
    std::vector<float> of_mean_;
};

}  // namespace embpack
