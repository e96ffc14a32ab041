#pragma once

#include <cstdint>

#include "kernels.h"

namespace embpack {

// float32 [count, embedding_dim]: row indices[i], or row i where indices is null.
void gather_rows(const PackedRows&, const int64_t* indices, size_t count, float* out);

struct Bags {
    const int64_t* indices;
    const float* per_sample_weights;   // may be null
    const int64_t* starts;             // num_bags + 1 positions in indices
    size_t num_bags;
    int64_t padding_index;             // -1 for none
    Pooling pooling;
};

// float32 [num_bags, embedding_dim].
void pool_bags(const PackedRows&, const Bags&, float* out);

}  // namespace embpack
