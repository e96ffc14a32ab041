#include "linear.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>

#include "aligned.h"
#include "dispatch.h"
#include "threads.h"

namespace embpack {

namespace {

// Bytes of packed rows, and values of unpacked ones, that a thread multiplies at a time: they stay in the second-level
// cache while one group of vectors after the other reads them.
constexpr size_t packed_bytes_at_a_time = size_t{1} << 16;
constexpr size_t unpacked_values_at_a_time = size_t{1} << 15;

constexpr size_t lanes_of_window = window_bytes_of_product / sizeof(uint32_t);

// How the rows of a table are read by windows.
struct Windows {
    int bits;
    size_t row_bytes, count, last;
    size_t columns;   // of a window

    // Rows of float32 values, filled up to whole windows.
    static Windows of_values(size_t embedding_dim) {
        const size_t count = (embedding_dim + lanes_of_window - 1) / lanes_of_window;
        return {32, count * window_bytes_of_product, count, (count - 1) * window_bytes_of_product, lanes_of_window};
    }
    // Rows that begin with codes. The last window ends where the row does, unless the row is shorter than a window: then
    // it is copied to where there is room for one.
    static Windows of_codes(const PackedRows& rows) {
        const size_t columns = lanes_of_window * 32 / static_cast<size_t>(rows.grid.bits);
        const size_t count = (rows.embedding_dim + columns - 1) / columns;
        const size_t row_bytes = std::max(rows.row_bytes, window_bytes_of_product);
        const size_t last = std::min((count - 1) * window_bytes_of_product, row_bytes - window_bytes_of_product);
        return {rows.grid.bits, row_bytes, count, last, columns};
    }

    size_t codes_of_word() const { return 32 / static_cast<size_t>(bits); }
    size_t values() const { return count * columns; }
};

// Puts vectors in the order in which windows of rows are read (kernels.h), in groups.
Aligned<float> order_vectors(const Windows& windows, const float* vectors, size_t num_vectors, size_t d) {
    const size_t codes = windows.codes_of_word();
    Aligned<float> ordered((num_vectors + group_vectors - 1) / group_vectors * group_vectors * windows.values());
    float* to = ordered.data();
    for (size_t first = 0; first < num_vectors; first += group_vectors) {
        const size_t group = group_of(num_vectors - first);
        for (size_t window = 0; window < windows.count; window++) {
            const size_t byte = window + 1 < windows.count ? window * window_bytes_of_product : windows.last;
            const size_t first_column = byte * 8 / static_cast<size_t>(windows.bits);
            for (size_t k = 0; k < codes; k++) {
                const float weight = k + 1 < codes ? 1.0f / static_cast<float>(1u << (windows.bits * k)) : 1.0f;
                for (size_t v = first; v < first + group; v++)
                    for (size_t lane = 0; lane < lanes_of_window; lane++) {
                        const size_t column = first_column + lane * codes + k;
                        const bool counts = v < num_vectors && column < d && column >= window * windows.columns;
                        *to++ = counts ? vectors[v * d + column] * weight : 0.0f;
                    }
            }
        }
    }
    return ordered;
}

std::vector<float> sum_vectors(const float* vectors, size_t num_vectors, size_t d) {
    std::vector<float> sums;
    for (size_t v = 0; v < num_vectors; v++) {
        double sum = 0.0;
        for (size_t j = 0; j < d; j++) sum += double{vectors[v * d + j]};
        sums.push_back(static_cast<float>(sum));
    }
    return sums;
}

// What a thread works in.
struct Scratch {
    std::vector<uint8_t> rows;       // short ones, filled up to a window
    std::vector<uint16_t> halves;
    std::vector<float> params;       // scale and bias of each row
    Aligned<float> values{0};        // unpacked rows
    size_t num_values = 0;
    std::vector<float> products, others;
};

class Multiplier {
public:
    Multiplier(const PackedRows& rows, const float* vectors, size_t num_vectors)
        : rows_(rows),
          num_vectors_(num_vectors),
          values_(Windows::of_values(rows.embedding_dim)),
          has_codes_(rows.layout == Layout::uniform),
          codes_(has_codes_ ? Windows::of_codes(rows) : values_),
          of_values_(order_vectors(values_, vectors, num_vectors, rows.embedding_dim)),
          of_codes_(order_vectors(codes_, vectors, has_codes_ ? num_vectors : 0, rows.embedding_dim)),
          sums_(sum_vectors(vectors, num_vectors, rows.embedding_dim)) {}

    size_t rows_at_a_time() const {
        if (has_codes_) return std::max<size_t>(16, packed_bytes_at_a_time / rows_.row_bytes);
        return std::max<size_t>(16, unpacked_values_at_a_time / values_.values());
    }

    // scratch.products[count * v + i] of rows first .. first + count.
    void multiply(size_t first, size_t count, Scratch& scratch, LookupFault& fault) const {
        if (!has_codes_) return multiply_values(first, count, scratch, scratch.products, fault);
        multiply_codes(first, count, scratch);
        const auto is_finite = [](float x) { return x - x == 0.0f; };
        const auto begin = scratch.products.begin(), end = begin + static_cast<ptrdiff_t>(num_vectors_ * count);
        if (std::all_of(begin, end, is_finite)) return;
        // Values that are infinite, or nearly, come out as if rows had been unpacked: a code of 0 is not a value of 0.
        multiply_values(first, count, scratch, scratch.others, fault);
        for (size_t i = 0; i < num_vectors_ * count; i++)
            if (!is_finite(scratch.products[i])) scratch.products[i] = scratch.others[i];
    }

private:
    size_t room_for(size_t count) const {
        return (num_vectors_ + group_vectors - 1) / group_vectors * group_vectors * count;
    }

    // Codes are what they count for: scale times their products and bias times the vector's sum.
    void multiply_codes(size_t first, size_t count, Scratch& scratch) const {
        const uint8_t* bytes = rows_.bytes + first * rows_.row_bytes;
        scratch.products.resize(room_for(count));
        const WordRows words{fill_up(bytes, count, scratch), count, codes_.row_bytes, codes_.count, codes_.last,
                             codes_.bits};
        kernels().multiply(words, of_codes_.data(), num_vectors_, scratch.products.data(), count);
        read_params(bytes, count, scratch);
        for (size_t v = 0; v < num_vectors_; v++) {
            float* const products = scratch.products.data() + v * count;
            for (size_t i = 0; i < count; i++)
                products[i] = scratch.params[2 * i] * products[i] + scratch.params[2 * i + 1] * sums_[v];
        }
    }

    const uint8_t* fill_up(const uint8_t* bytes, size_t count, Scratch& scratch) const {
        if (rows_.row_bytes >= window_bytes_of_product) return bytes;
        scratch.rows.resize(count * window_bytes_of_product);
        for (size_t i = 0; i < count; i++)
            std::memcpy(scratch.rows.data() + i * window_bytes_of_product, bytes + i * rows_.row_bytes,
                        rows_.row_bytes);
        return scratch.rows.data();
    }

    void read_params(const uint8_t* bytes, size_t count, Scratch& scratch) const {
        scratch.params.resize(2 * count);
        const size_t param_bytes = rows_.grid.f16_params ? 2 : 4;
        if (rows_.grid.f16_params) scratch.halves.resize(2 * count);
        void* const to = rows_.grid.f16_params ? static_cast<void*>(scratch.halves.data()) : scratch.params.data();
        const uint8_t* from = bytes + rows_.row_bytes - 2 * param_bytes;
        for (size_t i = 0; i < count; i++, from += rows_.row_bytes)
            std::memcpy(static_cast<uint8_t*>(to) + 2 * param_bytes * i, from, 2 * param_bytes);
        if (rows_.grid.f16_params)
            kernels().widen_values(scratch.halves.data(), 2 * count, ValueType::f16, scratch.params.data());
    }

    void multiply_values(size_t first, size_t count, Scratch& scratch, std::vector<float>& products,
                         LookupFault& fault) const {
        const size_t stride = values_.values();
        if (scratch.num_values < count * stride) {
            scratch.values = Aligned<float>(count * stride);
            scratch.num_values = count * stride;
            std::fill_n(scratch.values.data(), count * stride, 0.0f);   // for good, where columns end
        }
        float* const values = scratch.values.data();
        // Row `first` of the output is the first of these.
        const uintptr_t start = reinterpret_cast<uintptr_t>(values) - first * values_.row_bytes;
        kernels().lookups_of(rows_).gather_rows(rows_, {}, false, first, first + count,
                                                {reinterpret_cast<uint8_t*>(start), values_.row_bytes}, fault);
        products.resize(room_for(count));
        const WordRows words{reinterpret_cast<const uint8_t*>(values), count, values_.row_bytes, values_.count,
                             values_.last, values_.bits};
        kernels().multiply(words, of_values_.data(), num_vectors_, products.data(), count);
    }

    const PackedRows& rows_;
    const size_t num_vectors_;
    const Windows values_;
    const bool has_codes_;
    const Windows codes_;
    const Aligned<float> of_values_, of_codes_;
    const std::vector<float> sums_;
};

}  // namespace

LookupFault linear(const PackedRows& rows, const LinearInput& input, float* out) {
    const StandardFloats floats;
    const size_t d = rows.embedding_dim;
    std::vector<float> rotated;
    if (rows.is_rotated) {   // rows are in the basis that the matrix brings vectors to
        rotated.assign(input.vectors, input.vectors + input.num_vectors * d);
        kernels().rotate_rows(rotated.data(), input.num_vectors, d);
    }
    const Multiplier multiplier(rows, rows.is_rotated ? rotated.data() : input.vectors, input.num_vectors);
    const int threads = threads_for(rows.num_rows * d);
    std::vector<Scratch> scratches(static_cast<size_t>(threads));
    const size_t at_a_time = multiplier.rows_at_a_time(), pieces = (rows.num_rows + at_a_time - 1) / at_a_time;
    LookupFault fault;
    std::mutex mutex;
    for_each_piece(pieces, 1, threads, [&](size_t piece, Turn& turn) {
        const size_t first = piece * at_a_time, count = std::min(at_a_time, rows.num_rows - first);
        Scratch& scratch = scratches[static_cast<size_t>(turn.thread)];
        LookupFault found;
        multiplier.multiply(first, count, scratch, found);
        for (size_t v = 0; v < input.num_vectors; v++)
            for (size_t i = 0; i < count; i++) {
                const float product = scratch.products[v * count + i];
                out[v * rows.num_rows + first + i] = input.bias ? product + input.bias[first + i] : product;
            }
        if (found.kind == LookupFault::none) return;
        const std::lock_guard lock(mutex);
        fault.note(found.position, found.kind);
    });
    return fault;
}

}  // namespace embpack
