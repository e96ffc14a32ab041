#pragma once

#include <cstddef>

#include "kernels.h"

namespace embpack {

// float32 vectors [num_vectors, embedding_dim], contiguous, and what is added to their products with each row: one for
// each row, or null.
struct LinearInput {
    const float* vectors;
    size_t num_vectors;
    const float* bias;

    float with_bias(float product, size_t row) const { return bias ? product + bias[row] : product; }
};

// out[v * num_rows + i]: the product of row i with vector v, and bias[i]. A fault is that of a row without a codebook,
// and all products are then anything.
LookupFault linear(const PackedRows&, LinearInput, float* out);

}  // namespace embpack
