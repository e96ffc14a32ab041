#include "quantize.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "aligned.h"
#include "dispatch.h"
#include "exact.h"
#include "threads.h"

namespace embpack {

namespace {

#include "kernels/lloyd-inl.h"

// Values that a thread takes at a time: enough to make asking for more cheap, few enough to share evenly.
constexpr size_t values_at_a_time = size_t{1} << 15;

// Hands out blocks of float32 rows, widening 16-bit ones into the calling thread's part of a buffer.
class BlockReader {
public:
    BlockReader(const Rows& rows, int threads) : rows_(rows) {
        if (rows.type != ValueType::f32) widened_.resize(static_cast<size_t>(threads) * block_values());
    }

    size_t num_blocks() const { return (rows_.num_rows + block_rows - 1) / block_rows; }
    size_t block_values() const { return block_rows * rows_.embedding_dim; }
    size_t blocks_at_a_time() const { return std::max<size_t>(1, values_at_a_time / block_values()); }

    RowBlock read(size_t block, int thread, const Kernels& k) {
        const size_t d = rows_.embedding_dim;
        const size_t first = block * block_rows;
        const size_t count = std::min(block_rows, rows_.num_rows - first);
        if (rows_.type == ValueType::f32) return {static_cast<const float*>(rows_.values) + first * d, count, d};
        float* out = widened_.data() + static_cast<size_t>(thread) * block_values();
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
        if (!k.bound_rows({block.rows + row * block.embedding_dim, 1, block.embedding_dim}, unused, unused_norm))
            return row;
    return 0;
}

// Keeps the fault of the lowest row, whichever thread meets it first.
template <class Result>
void note_fault(Result& result, std::mutex& mutex, RowFault fault, size_t row) {
    const std::lock_guard lock(mutex);
    if (result.fault == RowFault::none || row < result.faulty_row) {
        result.fault = fault;
        result.faulty_row = row;
    }
}

std::vector<SpanSums> sum_spans(const std::vector<SpanSums>& of_blocks, size_t span_rows) {
    const size_t span_blocks = span_rows / block_rows;
    std::vector<SpanSums> of_spans((of_blocks.size() + span_blocks - 1) / span_blocks);
    for (size_t i = 0; i < of_blocks.size(); i++) {
        SpanSums& span = of_spans[i / span_blocks];
        span.all.error += of_blocks[i].all.error;
        span.all.norm += of_blocks[i].all.norm;
        span.lost_rows += of_blocks[i].lost_rows;
        span.lost_norm += of_blocks[i].lost_norm;
    }
    return of_spans;
}

// Counts the rows of a block that come back no better than zeros would, because the steps of their parameters' float16
// are as large as those of their codes. Only the smallest rows are looked at.
void count_lost(const RowBlock& block, const Ranges& bounds, const Ranges& chosen, PackedRows packed, SpanSums& sums) {
    if (!packed.grid.f16_params) return;
    const float few_steps = static_cast<float>((1 << packed.grid.bits) - 1) * 0x1p-22f;
    bool any_small = false;
    for (size_t row = 0; row < block_rows; row++)
        any_small |= std::max(-bounds.xmin[row], bounds.xmax[row]) <= few_steps;
    if (!any_small) return;
    std::vector<float> levels;
    packed.num_rows = 1;
    for (size_t row = 0; row < block.num_rows; row++, packed.bytes += packed.row_bytes) {
        const float largest = std::max(-bounds.xmin[row], bounds.xmax[row]);
        if (largest > few_steps || chosen.xmax[row] - chosen.xmin[row] > 2 * few_steps) continue;
        const float* x = block.rows + row * block.embedding_dim;
        levels.resize(block.embedding_dim);
        LookupFault none;
        const Output out = {reinterpret_cast<uint8_t*>(levels.data()), levels.size() * sizeof(float)};
        kernels().lookups_of(packed).gather_rows(packed, {}, false, 0, 1, out, none);
        double error = 0.0, norm = 0.0;
        for (size_t j = 0; j < levels.size(); j++) {
            const double value = x[j], difference = value - static_cast<double>(levels[j]);
            error += difference * difference;
            norm += value * value;
        }
        if (norm == 0.0 || error < norm) continue;
        sums.lost_rows++;
        sums.lost_norm += norm;
    }
}

// Bounds each block and calls encode(block, its number, its bounds, its sums, room, turn), which returns a bit for every
// row that overflows, and tells the turn of its rows; room is the thread's own.
template <class T, class Encode>
QuantizeResult encode_blocks(const Rows& rows, size_t span_rows, const Progress& progress, size_t room_of_thread,
                             Encode encode) {
    const Kernels& k = kernels();
    const int threads = threads_for(rows.num_rows * rows.embedding_dim);
    BlockReader reader(rows, threads);
    Aligned<T> room(static_cast<size_t>(threads) * room_of_thread);
    std::vector<SpanSums> sums(reader.num_blocks());
    QuantizeResult result;
    std::mutex mutex;

    const auto encode_block = [&](size_t i, Turn& turn) {
        const RowBlock block = reader.read(i, turn.thread, k);
        Ranges bounds{};
        if (!k.bound_rows(block, bounds, sums[i].all.norm)) {
            note_fault(result, mutex, RowFault::not_finite, i * block_rows + first_not_finite_row(block, k));
            return;
        }
        T* own_room = room.data() + static_cast<size_t>(turn.thread) * room_of_thread;
        const uint64_t overflows = encode(block, i, bounds, sums[i], own_room, turn);
        if (overflows != 0) {
            const size_t row = static_cast<size_t>(std::countr_zero(overflows));
            note_fault(result, mutex, RowFault::params_overflow, i * block_rows + row);
        }
    };
    for_each_piece(reader.num_blocks(), reader.blocks_at_a_time(), threads, encode_block, progress);
    result.sums = sum_spans(sums, span_rows);
    return result;
}

void find_exact_ranges(const RowBlock& block, Grid grid, const SearchParams& params, Ranges& ranges, Turn& turn) {
    const size_t d = block.embedding_dim;
    ExactSearch search(grid.bits);
    for (size_t row = 0; row < block.num_rows; row++) {
        const float* weights = params.error_weights;
        if (weights && !params.are_of_columns) weights += row * d;
        search.find(block.rows + row * d, weights, d, ranges.xmin[row], ranges.xmax[row], turn);
        turn.advance(1);
    }
}

}  // namespace

QuantizeResult quantize_rows(const Rows& rows, SearchFn Kernels::*search, const SearchParams& params, Grid grid,
                             size_t span_rows, uint8_t* packed, const Progress& progress) {
    const Kernels& k = kernels();
    const size_t d = rows.embedding_dim, block_bytes = block_rows * packed_row_bytes(d, grid);
    const auto encode = [&](const RowBlock& block, size_t i, const Ranges& bounds, SpanSums& sums, float* scratch,
                            Turn& turn) {
        Ranges ranges = bounds, exact = bounds;
        SearchParams own = params;
        if (own.error_weights && !own.are_of_columns) own.error_weights += i * block_rows * d;
        if (own.is_exact) {
            find_exact_ranges(block, grid, own, exact, turn);
            own.exact = &exact;
        } else {
            turn.advance(block.num_rows);
        }
        (k.*search)(block, grid, own, ranges, scratch);
        uint8_t* const out = packed + i * block_bytes;
        const uint64_t overflows = k.encode_rows(block, grid, bounds, ranges, out, sums.all);
        count_lost(block, bounds, ranges, {out, block.num_rows, d, packed_row_bytes(d, grid), grid}, sums);
        return overflows;
    };
    return encode_blocks<float>(rows, span_rows, progress, search_floats(d), encode);
}

QuantizeResult quantize_by_codebooks(const Rows& rows, CodebookFn Kernels::*search, Grid grid, size_t span_rows,
                                     uint8_t* packed, const Progress& progress) {
    const Kernels& k = kernels();
    const size_t d = rows.embedding_dim, block_bytes = block_rows * packed_row_bytes(d, grid, Layout::codebook);
    const size_t codebook_doubles = (block_rows << grid.bits) / 2;
    const auto encode = [&](const RowBlock& block, size_t i, const Ranges& bounds, SpanSums& sums, double* room,
                            Turn& turn) {
        turn.advance(block.num_rows);
        float* codebooks = reinterpret_cast<float*>(room);
        (k.*search)(block, grid, codebooks, room + codebook_doubles, turn.as_stop());
        turn.check();
        uint8_t* const out = packed + i * block_bytes;
        const uint64_t overflows = k.encode_by_codebook(block, grid, {codebooks, nullptr, true}, out, sums.all);
        const size_t row_bytes = packed_row_bytes(d, grid, Layout::codebook);
        count_lost(block, bounds, bounds, {out, block.num_rows, d, row_bytes, grid, Layout::codebook}, sums);
        return overflows;
    };
    return encode_blocks<double>(rows, span_rows, progress, codebook_doubles + kmeans_doubles(d, grid.bits), encode);
}

namespace {

// Sorts in runs that take a tenth of a second, and merges these, so that `turn` is checked in between.
void sort_values(float* first, size_t count, Turn& turn) {
    constexpr size_t run = size_t{1} << 21;
    for (size_t start = 0; start < count; start += run) {
        std::sort(first + start, first + std::min(count, start + run));
        turn.check();
    }
    for (size_t width = run; width < count; width *= 2)
        for (size_t start = 0; start + width < count; start += 2 * width) {
            std::inplace_merge(first + start, first + start + width, first + std::min(count, start + 2 * width));
            turn.check();
        }
}

}  // namespace

void assign_codebooks(const float* rows, size_t num_rows, size_t embedding_dim, const float* codebooks, size_t count,
                      int bits, uint32_t* numbers) {
    const size_t levels = size_t{1} << bits;
    std::vector<double> bounds(count * levels);   // above each level but the last
    for (size_t i = 0; i < count; i++)
        for (size_t k = 0; k + 1 < levels; k++) {
            const float* level = codebooks + i * levels + k;
            bounds[i * levels + k] = (double{level[0]} + double{level[1]}) * 0.5;
        }
    const auto find = [&](size_t row, Turn& turn) {
        std::vector<float> values(rows + row * embedding_dim, rows + (row + 1) * embedding_dim);
        numbers[row] = 0;
        for (float value : values)
            if (value != value) return;
        sort_values(values.data(), embedding_dim, turn);
        std::vector<double> sums(embedding_dim + 1);
        for (size_t j = 0; j < embedding_dim; j++) sums[j + 1] = sums[j] + double{values[j]};
        double least = std::numeric_limits<double>::infinity();
        for (size_t i = 0; i < count; i++) {
            double error = 0.0;   // less the row's squares, which are the same for all
            ptrdiff_t start = 0;
            for (size_t k = 0; k < levels; k++) {
                ptrdiff_t end = static_cast<ptrdiff_t>(embedding_dim);
                if (k + 1 < levels)
                    end = std::upper_bound(values.begin(), values.end(), bounds[i * levels + k]) - values.begin();
                const double level = codebooks[i * levels + k];
                const double sum = sums[static_cast<size_t>(end)] - sums[static_cast<size_t>(start)];
                if (end > start) error += level * (level * static_cast<double>(end - start) - 2.0 * sum);
                start = end;
            }
            if (error < least) {
                least = error;
                numbers[row] = static_cast<uint32_t>(i);
            }
        }
    };
    for_each_piece(num_rows, 1, threads_for(num_rows * count * levels), find);
}

void fit_codebooks(float* values, const int64_t* starts, size_t groups, int bits, float* codebooks) {
    const size_t levels = size_t{1} << bits;
    const auto fit_codebook = [&](size_t group, Turn& turn) {
        float* first = values + starts[group];
        const size_t count = static_cast<size_t>(starts[group + 1] - starts[group]);
        float* codebook = codebooks + levels * group;
        std::fill_n(codebook, levels, 0.0f);
        if (count == 0) return;
        sort_values(first, count, turn);
        const double middle = (static_cast<double>(first[0]) + static_cast<double>(first[count - 1])) * 0.5;
        std::vector<double> sums(count + 1);
        const SortedValues sorted = {first, sums.data(), count, 1, middle};
        for (size_t j = 0; j < count; j++) sums[j + 1] = sums[j] + sorted.value(j);
        double centres[256];
        iterate_lloyd(sorted, levels, centres);
        for (size_t k = 0; k < levels; k++) codebook[k] = static_cast<float>(middle + centres[k]);
    };
    for_each_piece(groups, 1, threads_for(static_cast<size_t>(starts[groups])), fit_codebook);
}

QuantizeResult quantize_by_clusters(const Rows& rows, const float* values, const uint32_t* clusters, Grid grid,
                                    size_t span_rows, uint8_t* packed, const Progress& progress) {
    const Kernels& k = kernels();
    const size_t block_bytes = block_rows * packed_row_bytes(rows.embedding_dim, grid, Layout::clustered);
    const auto encode = [&](const RowBlock& block, size_t i, const Ranges&, SpanSums& sums, float*, Turn& turn) {
        turn.advance(block.num_rows);
        const Codebooks codebooks{values, clusters + i * block_rows, false};
        return k.encode_by_codebook(block, grid, codebooks, packed + i * block_bytes, sums.all);
    };
    return encode_blocks<float>(rows, span_rows, progress, 0, encode);
}

QuantizeResult quantize_by_trellis(const Rows& rows, const TrellisTable& table, size_t span_rows, uint8_t* packed,
                                   const Progress& progress) {
    const Kernels& k = kernels();
    const size_t block_bytes = block_rows * table.row_bytes;
    const auto encode = [&](const RowBlock& block, size_t i, const Ranges&, SpanSums& sums, float* scratch,
                            Turn& turn) {
        turn.advance(block.num_rows);
        k.encode_trellis(block, table, scratch, packed + i * block_bytes, sums.all);
        return uint64_t{0};
    };
    return encode_blocks<float>(rows, span_rows, progress, trellis_floats(rows.embedding_dim), encode);
}

Bounds bound_table(const Rows& rows) {
    const Kernels& k = kernels();
    const int threads = threads_for(rows.num_rows * rows.embedding_dim);
    BlockReader reader(rows, threads);
    std::vector<Ranges> ranges(reader.num_blocks());
    Bounds bounds;
    std::mutex mutex;

    const auto bound_block = [&](size_t i, Turn& turn) {
        const RowBlock block = reader.read(i, turn.thread, k);
        double unused_norm;
        if (!k.bound_rows(block, ranges[i], unused_norm))
            note_fault(bounds, mutex, RowFault::not_finite, i * block_rows + first_not_finite_row(block, k));
    };
    for_each_piece(reader.num_blocks(), reader.blocks_at_a_time(), threads, bound_block);
    bounds.xmin = ranges[0].xmin[0];
    bounds.xmax = ranges[0].xmax[0];
    for (size_t row = 0; row < rows.num_rows; row++) {
        bounds.xmin = std::min(bounds.xmin, ranges[row / block_rows].xmin[row % block_rows]);
        bounds.xmax = std::max(bounds.xmax, ranges[row / block_rows].xmax[row % block_rows]);
    }
    return bounds;
}

}  // namespace embpack
