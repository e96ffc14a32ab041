#pragma once

#include <cstddef>

namespace embpack {

// Rotates rows of embedding_dim float32 values, in place, or back.
void rotate(float* rows, size_t num_rows, size_t embedding_dim, bool back);

}  // namespace embpack
