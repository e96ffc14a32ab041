#include "lookup.h"

#include <algorithm>

#include "dispatch.h"
#include "threads.h"

namespace embpack {

namespace {
constexpr size_t rows_at_a_time = 256;
constexpr int bags_at_a_time = 16;
}  // namespace

void gather_rows(const PackedRows& rows, const int64_t* indices, size_t count, float* out) {
    const Kernels& k = kernels();
    const size_t d = rows.embedding_dim;
    const size_t pieces = (count + rows_at_a_time - 1) / rows_at_a_time;
#pragma omp parallel for num_threads(threads_for(count * d)) schedule(dynamic)
    for (size_t piece = 0; piece < pieces; piece++) {
        const size_t first = piece * rows_at_a_time;
        const size_t n = std::min(rows_at_a_time, count - first);
        if (indices) {
            k.decode_rows(rows, indices + first, n, out + first * d);
        } else {
            PackedRows part = rows;
            part.bytes += first * rows.row_bytes;
            part.clusters += first * rows.cluster_bytes;
            k.decode_rows(part, nullptr, n, out + first * d);
        }
    }
}

void pool_bags(const PackedRows& rows, const Bags& bags, float* out) {
    const Kernels& k = kernels();
    const size_t num_indices = static_cast<size_t>(bags.starts[bags.num_bags]);
#pragma omp parallel for num_threads(threads_for(num_indices * rows.embedding_dim)) schedule(dynamic, bags_at_a_time)
    for (size_t bag = 0; bag < bags.num_bags; bag++) {
        const int64_t start = bags.starts[bag];
        k.pool_rows(rows, bags.indices + start, bags.per_sample_weights ? bags.per_sample_weights + start : nullptr,
                    static_cast<size_t>(bags.starts[bag + 1] - start), bags.padding_index, bags.pooling,
                    out + bag * rows.embedding_dim);
    }
}

}  // namespace embpack
