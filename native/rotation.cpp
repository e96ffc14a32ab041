#include "rotation.h"

#include <algorithm>

#include "dispatch.h"
#include "threads.h"

namespace embpack {

namespace {

constexpr size_t rows_at_a_time = 256;

}  // namespace

void rotate(float* rows, size_t num_rows, size_t embedding_dim, bool back) {
    const Kernels& k = kernels();
    const auto rotate_rows = back ? k.rotate_rows_back : k.rotate_rows;
    const size_t pieces = (num_rows + rows_at_a_time - 1) / rows_at_a_time;
    for_each_piece(pieces, 1, threads_for(num_rows * embedding_dim), [&](size_t piece, Turn&) {
        const size_t first = piece * rows_at_a_time;
        rotate_rows(rows + first * embedding_dim, std::min(rows_at_a_time, num_rows - first), embedding_dim);
    });
}

}  // namespace embpack
