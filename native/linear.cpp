#include "linear.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <vector>

#include "linear_levels.h"
#include "linear_panels.h"
#include "linear_words.h"
#include "threads.h"
#include "updating.h"

namespace embpack {

namespace {

// With more vectors, unpacking rows once for all of them takes less time.
constexpr size_t most_few = 8;

// Few vectors. `Way` is what rows are multiplied by as they are packed, ByCodes or ByLevels.
template <class Way>
class Packed {
public:
    Packed(const PackedRows& rows, const LinearInput& input)
        : num_vectors_(input.num_vectors), way_(rows, input), by_values_(rows, input) {}

    size_t rows_at_a_time() const { return way_.rows_at_a_time(); }

    // Infinities come out as if rows had been unpacked: a code of 0 does not stand for a value of 0.
    void multiply(size_t first, size_t count, Scratch& scratch, std::vector<float>& products,
                  LookupFault& fault) const {
        way_.multiply(first, count, scratch, products);
        const size_t at_a_time = by_values_.rows_at_a_time();
        for (size_t from = 0; from < count; from += at_a_time) {
            const size_t some = std::min(at_a_time, count - from);
            const auto change = [&](const auto& use) {
                for (size_t v = 0; v < num_vectors_; v++)
                    for (size_t i = 0; i < some; i++) use(products[v * count + from + i], v * some + i);
            };
            bool are_finite = true;
            change([&](float product, size_t) { are_finite &= std::isfinite(product); });
            if (are_finite) continue;
            by_values_.multiply(first + from, some, scratch, scratch.others, fault);
            change([&](float& product, size_t at) {
                if (!std::isfinite(product)) product = scratch.others[at];
            });
        }
    }

private:
    const size_t num_vectors_;
    const Way way_;
    const ByValues by_values_;
};

// What a few vectors come to with some rows, on its way to the output.
template <class Way>
class Few {
public:
    Few(const PackedRows& rows, const LinearInput& input)
        : num_rows_(rows.num_rows), input_(input), way_(rows, input) {}

    size_t rows_at_a_time() const { return way_.rows_at_a_time(); }

    // Rows first .. first + count of the output's columns.
    void multiply(size_t first, size_t count, Scratch& scratch, float* out, LookupFault& fault) const {
        way_.multiply(first, count, scratch, scratch.products, fault);
        for (size_t v = 0; v < input_.num_vectors; v++) {
            float* const to = out + v * num_rows_ + first;
            for (size_t i = 0; i < count; i++) to[i] = input_.with_bias(scratch.products[v * count + i], first + i);
        }
    }

private:
    const size_t num_rows_;
    const LinearInput& input_;
    const Way way_;
};

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
        const Reading reading;
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
    if (input.num_vectors > most_few) return multiply<ByPanels>(rows, input, out);
    if (rows.layout == Layout::uniform) return multiply<Few<Packed<ByCodes>>>(rows, input, out);
    if (rows.layout == Layout::trellis) return multiply<Few<Packed<ByLevels>>>(rows, input, out);
    return multiply<Few<ByValues>>(rows, input, out);
}

}  // namespace embpack
