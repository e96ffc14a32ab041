#include "linear.h"

#include <algorithm>
#include <mutex>
#include <vector>

#include "linear_panels.h"
#include "linear_words.h"
#include "threads.h"

namespace embpack {

namespace {

// With more vectors, unpacking rows once for all of them takes less time.
constexpr size_t most_by_words = 8;

template <class Multiplier>
LookupFault multiply(const PackedRows& rows, const LinearInput& input, float* out) {
    const Multiplier multiplier(rows, input);
    const int threads = threads_for(rows.num_rows * rows.embedding_dim * input.num_vectors);
    std::vector<Scratch> scratches(static_cast<size_t>(threads));
    const size_t at_a_time = multiplier.rows_at_a_time(), pieces = round_up(rows.num_rows, at_a_time) / at_a_time;
    LookupFault fault;
    std::mutex mutex;
    for_each_piece(pieces, 1, threads, [&](size_t piece, Turn& turn) {
        const size_t first = piece * at_a_time, count = std::min(at_a_time, rows.num_rows - first);
        LookupFault found;
        multiplier.multiply(first, count, scratches[static_cast<size_t>(turn.thread)], out, found);
        if (found.kind == LookupFault::none) return;
        const std::lock_guard lock(mutex);
        fault.note(found.position, found.kind);
    });
    return fault;
}

}  // namespace

LookupFault linear(const PackedRows& rows, LinearInput input, float* out) {
    const StandardFloats floats;
    std::vector<float> rotated;
    if (rows.is_rotated) {   // so are rows, by the same matrix, which is orthogonal
        rotated.assign(input.vectors, input.vectors + input.num_vectors * rows.embedding_dim);
        kernels().rotate_rows(rotated.data(), input.num_vectors, rows.embedding_dim);
        input.vectors = rotated.data();
    }
    if (input.num_vectors <= most_by_words) return multiply<ByWords>(rows, input, out);
    return multiply<ByPanels>(rows, input, out);
}

}  // namespace embpack
