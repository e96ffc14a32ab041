#include "quantize.h"

#include <omp.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <new>
#include <vector>

#include "dispatch.h"
#include "threads.h"

namespace embpack {

namespace {

// Values that a thread takes at a time: enough to make asking for more cheap, few enough to share evenly.
constexpr size_t values_at_a_time = size_t{1} << 15;

// Floats on cache lines of their own: a vector across two lines costs two loads, and the search is that tight.
class AlignedFloats {
public:
    explicit AlignedFloats(size_t count)
        : floats_(static_cast<float*>(operator new(count * sizeof(float), line))) {}

    float* data() { return floats_.get(); }

private:
    static constexpr std::align_val_t line{64};
    struct Free {
        void operator()(float* p) const { operator delete(p, line); }
    };
    std::unique_ptr<float, Free> floats_;
};

// Hands out blocks of float32 rows, widening 16-bit ones into the calling thread's part of a buffer.
class BlockReader {
public:
    BlockReader(const Rows& rows, int threads) : rows_(rows) {
        if (rows.type != ValueType::f32) widened_.resize(static_cast<size_t>(threads) * block_values());
    }

    size_t num_blocks() const { return (rows_.num_rows + block_rows - 1) / block_rows; }
    size_t block_values() const { return block_rows * rows_.embedding_dim; }
    int blocks_at_a_time() const { return static_cast<int>(std::max<size_t>(1, values_at_a_time / block_values())); }

    RowBlock read(size_t block, const Kernels& k) {
        const size_t d = rows_.embedding_dim;
        const size_t first = block * block_rows;
        const size_t count = std::min(block_rows, rows_.num_rows - first);
        if (rows_.type == ValueType::f32) return {static_cast<const float*>(rows_.values) + first * d, count, d};
        float* out = widened_.data() + static_cast<size_t>(omp_get_thread_num()) * block_values();
        k.widen_values(static_cast<const uint16_t*>(rows_.values) + first * d, count * d, rows_.type, out);
        return {out, count, d};
    }

private:
    const Rows& rows_;
    std::vector<float> widened_;
};

size_t first_not_finite_row(const RowBlock& block, const Kernels& k) {
    Ranges unused{};
    double unused_norm;
    for (size_t row = 0; row < block.num_rows; row++)
        if (!k.bound_rows({block.rows + row * block.embedding_dim, 1, block.embedding_dim}, unused, unused_norm)) return row;
    return 0;
}

// Keeps the fault of the lowest row, whichever thread meets it first.
template <class Result>
void note_fault(Result& result, RowFault fault, size_t row) {
#pragma omp critical(embpack_fault)
    if (result.fault == RowFault::none || row < result.faulty_row) {
        result.fault = fault;
        result.faulty_row = row;
    }
}

}  // namespace

QuantizeResult quantize_rows(const Rows& rows, SearchFn Kernels::*search, const SearchParams& params, Grid grid,
                             size_t span_rows, uint8_t* packed) {
    const Kernels& k = kernels();
    const int threads = threads_for(rows.num_rows * rows.embedding_dim);
    BlockReader reader(rows, threads);
    const size_t block_bytes = block_rows * packed_row_bytes(rows.embedding_dim, grid);
    const size_t scratch_values = 2 * reader.block_values();
    AlignedFloats scratch(static_cast<size_t>(threads) * scratch_values);
    std::vector<SquaredSums> sums(reader.num_blocks());
    QuantizeResult result;

#pragma omp parallel for num_threads(threads) schedule(dynamic, reader.blocks_at_a_time())
    for (size_t i = 0; i < reader.num_blocks(); i++) {
        const RowBlock block = reader.read(i, k);
        Ranges bounds{};
        if (!k.bound_rows(block, bounds, sums[i].norm)) {
            note_fault(result, RowFault::not_finite, i * block_rows + first_not_finite_row(block, k));
            continue;
        }
        float* own_scratch = scratch.data() + static_cast<size_t>(omp_get_thread_num()) * scratch_values;
        Ranges ranges = bounds;
        (k.*search)(block, grid, params, ranges, own_scratch);
        const uint64_t overflows = k.encode_rows(block, grid, bounds, ranges, packed + i * block_bytes, sums[i]);
        if (overflows != 0) {
            const size_t row = static_cast<size_t>(std::countr_zero(overflows));
            note_fault(result, RowFault::params_overflow, i * block_rows + row);
        }
    }
    const size_t span_blocks = span_rows / block_rows;
    result.sums.resize((sums.size() + span_blocks - 1) / span_blocks);
    for (size_t i = 0; i < sums.size(); i++) {
        result.sums[i / span_blocks].error += sums[i].error;
        result.sums[i / span_blocks].norm += sums[i].norm;
    }
    return result;
}

Bounds bound_table(const Rows& rows) {
    const Kernels& k = kernels();
    const int threads = threads_for(rows.num_rows * rows.embedding_dim);
    BlockReader reader(rows, threads);
    std::vector<Ranges> ranges(reader.num_blocks());
    Bounds bounds;

#pragma omp parallel for num_threads(threads) schedule(dynamic, reader.blocks_at_a_time())
    for (size_t i = 0; i < reader.num_blocks(); i++) {
        const RowBlock block = reader.read(i, k);
        double unused_norm;
        if (!k.bound_rows(block, ranges[i], unused_norm))
            note_fault(bounds, RowFault::not_finite, i * block_rows + first_not_finite_row(block, k));
    }
    bounds.xmin = ranges[0].xmin[0];
    bounds.xmax = ranges[0].xmax[0];
    for (size_t row = 0; row < rows.num_rows; row++) {
        bounds.xmin = std::min(bounds.xmin, ranges[row / block_rows].xmin[row % block_rows]);
        bounds.xmax = std::max(bounds.xmax, ranges[row / block_rows].xmax[row % block_rows]);
    }
    return bounds;
}

}  // namespace embpack
