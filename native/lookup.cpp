#include "lookup.h"

#include <unistd.h>

#include <algorithm>
#include <limits>
#include <mutex>

#include "dispatch.h"
#include "threads.h"
#include "updating.h"

namespace embpack {

namespace {

constexpr size_t rows_at_a_time = 1024;

// Bytes of the second-level cache. Tables that fit stay there, and prefetching would only cost.
const size_t second_level_bytes = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const long known = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (known > 0) return static_cast<size_t>(known);
#endif
    return size_t{1} << 20;
}();

size_t table_bytes(const PackedRows& rows) { return rows.num_rows * rows.row_bytes; }

// Pieces of a lookup: few enough for prefetching to run ahead in each, enough that threads end together.
constexpr size_t pieces_a_thread = 8;

// Values that are pooled in some milliseconds: between pieces rows may be written, for which others wait, and a loop looks
// for signals.
constexpr size_t most_piece_values = size_t{1} << 22;

size_t count_values(const Lookup& lookup) {
    const Bags& bags = lookup.bags;
    return (bags.start(bags.num_bags) - bags.start(0)) * lookup.rows.embedding_dim;
}

// How lookups are cut into few pieces, table after table. While a table is read, the second-level cache has its rows, or
// the pages that they lie on; to come back to it after all the others, a megabyte of output at a time, took up to twice
// as long.
class Cut {
public:
    Cut(std::span<const Lookup> lookups, size_t total_values, int threads) {
        for (const Lookup& lookup : lookups) num_bags_ = std::max(num_bags_, lookup.bags.num_bags);
        bags_at_a_time_ = num_bags_ / (total_values / most_piece_values + 1) + 1;
        if (threads > 1) {
            const size_t pieces = static_cast<size_t>(threads) * pieces_a_thread / lookups.size() + 1;
            bags_at_a_time_ = std::min(bags_at_a_time_, num_bags_ / pieces + 1);
        }
        pieces_a_lookup_ = (num_bags_ + bags_at_a_time_ - 1) / bags_at_a_time_;
    }

    size_t count_pieces(size_t num_lookups) const { return num_lookups * pieces_a_lookup_; }
    size_t lookup_of(size_t piece) const { return piece / pieces_a_lookup_; }
    // Of a lookup with fewer bags than another, some pieces have none.
    size_t first_bag(size_t piece) const { return piece % pieces_a_lookup_ * bags_at_a_time_; }
    size_t end_bag(size_t piece, const Lookup& lookup) const {
        return std::min(lookup.bags.num_bags, first_bag(piece) + bags_at_a_time_);
    }

private:
    size_t num_bags_ = 0, bags_at_a_time_, pieces_a_lookup_;
};

// Values that are rotated back together: they stay in the first-level cache.
constexpr size_t rotated_at_a_time = size_t{1} << 13;

// An output whose row `row` is the first of these values.
Output output_at(float* values, size_t embedding_dim, size_t row) {
    const size_t row_bytes = embedding_dim * sizeof(float);
    return {reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(values) - row * row_bytes), row_bytes};
}

// Rows first .. end of the output, some at a time: look_up(first, end, to, fault) makes rotated ones, as float32.
template <class LookUp>
void rotate_back(const Kernels& k, const PackedRows& rows, size_t first, size_t end, const Output& out,
                 LookupFault& fault, const LookUp& look_up) {
    const size_t d = rows.embedding_dim;
    const size_t at_a_time = std::clamp<size_t>(rotated_at_a_time / d, 1, end - first);
    std::vector<float> values(at_a_time * d);
    for (size_t stop; first < end; first = stop) {
        stop = std::min(end, first + at_a_time);
        look_up(first, stop, output_at(values.data(), d, first), fault);
        if (fault.kind != LookupFault::none) return;
        k.rotate_rows_back(values.data(), stop - first, d);
        k.write_rows(values.data(), stop - first, d, {out.values + first * out.row_bytes, out.row_bytes, out.type});
    }
}

// Indices of a bag without those of padding, and where they were.
struct KeptIndices {
    std::vector<int64_t> values;
    std::vector<size_t> positions;

    void fill(const Bags& bags, size_t first, size_t end) {
        values.clear();
        positions.clear();
        for (size_t i = first; i < end; i++) {
            if (bags.padding_index != no_padding && bags.indices[i] == bags.padding_index) continue;
            values.push_back(bags.indices[i]);
            positions.push_back(i);
        }
    }
};

// The largest values of bags: seldom asked for, so made of rows that are looked up (and rotated back) before.
void pool_largest(const Kernels& k, const PackedRows& rows, const Bags& bags, size_t first, size_t end,
                  const Output& out, LookupFault& fault) {
    const auto gather_rows = k.lookups_of(rows).gather_rows;
    const size_t d = rows.embedding_dim, at_a_time = std::max<size_t>(1, rotated_at_a_time / d);
    std::vector<float> values(at_a_time * d), largest(d);
    KeptIndices kept;
    for (size_t bag = first; bag < end; bag++) {
        std::fill(largest.begin(), largest.end(), -std::numeric_limits<float>::infinity());
        bool is_empty = true;
        const size_t last = bags.start(bag + 1);
        for (size_t i = bags.start(bag), stop; i < last; i = stop) {
            stop = std::min(last, i + at_a_time);
            kept.fill(bags, i, stop);
            const size_t count = kept.values.size();
            LookupFault found;
            gather_rows(rows, {kept.values.data(), count}, bags.prefetches, 0, count, output_at(values.data(), d, 0),
                        found);
            if (found.kind != LookupFault::none) return fault.note(kept.positions[found.position], found.kind);
            if (rows.is_rotated) k.rotate_rows_back(values.data(), count, d);
            k.keep_largest(values.data(), count, d, largest.data());
            is_empty = is_empty && count == 0;
        }
        if (is_empty) std::fill(largest.begin(), largest.end(), 0.0f);
        k.write_rows(largest.data(), 1, d, {out.values + bag * out.row_bytes, out.row_bytes, out.type});
    }
}

}  // namespace

void pool_bags(const Kernels& k, const Lookup& lookup, size_t first, size_t end, LookupFault& fault) {
    const PackedRows& rows = lookup.rows;
    const Bags& bags = lookup.bags;
    if (bags.pooling == Pooling::max) return pool_largest(k, rows, bags, first, end, lookup.out, fault);
    const auto pool = k.lookups_of(rows).pool_bags;
    if (!rows.is_rotated) return pool(rows, bags, first, end, lookup.out, fault);
    rotate_back(k, rows, first, end, lookup.out, fault,
                [&](size_t from, size_t stop, const Output& to, LookupFault& found) {
                    pool(rows, bags, from, stop, to, found);
                });
}

LookupFault gather(const PackedRows& rows, const Integers& indices, const Output& out) {
    const Kernels& k = kernels();
    const auto gather_rows = k.lookups_of(rows).gather_rows;
    const size_t count = indices.values ? indices.count : rows.num_rows;
    const int threads = threads_for(count * rows.embedding_dim);
    const bool prefetches = table_bytes(rows) > second_level_bytes;
    const size_t pieces = (count + rows_at_a_time - 1) / rows_at_a_time;
    LookupFault fault;
    std::mutex mutex;
    for_each_piece(pieces, 1, threads, [&](size_t piece, Turn&) {
        const size_t first = piece * rows_at_a_time, end = std::min(count, first + rows_at_a_time);
        const auto look_up = [&](size_t from, size_t stop, const Output& to, LookupFault& found) {
            gather_rows(rows, indices, prefetches, from, stop, to, found);
        };
        LookupFault found;
        const Reading reading;
        if (rows.is_rotated)
            rotate_back(k, rows, first, end, out, found, look_up);
        else
            look_up(first, end, out, found);
        if (found.kind == LookupFault::none) return;
        const std::lock_guard lock(mutex);
        fault.note(found.position, found.kind);
    });
    return fault;
}

LookupFault pool(std::span<Lookup> lookups, size_t& faulty_lookup) {
    size_t total_values = 0, total_bytes = 0;
    for (const Lookup& lookup : lookups) {
        total_values += count_values(lookup);
        total_bytes += table_bytes(lookup.rows);
    }
    for (Lookup& lookup : lookups) lookup.bags.prefetches = total_bytes > second_level_bytes;
    const Kernels& k = kernels();
    const int threads = threads_for(total_values);
    const Cut cut(lookups, total_values, threads);
    LookupFault fault;
    faulty_lookup = lookups.size();
    std::mutex mutex;
    for_each_piece(cut.count_pieces(lookups.size()), 1, threads, [&](size_t piece, Turn&) {
        const size_t number = cut.lookup_of(piece);
        const size_t first = cut.first_bag(piece), end = cut.end_bag(piece, lookups[number]);
        if (first >= end) return;
        LookupFault found;
        const Reading reading;
        pool_bags(k, lookups[number], first, end, found);
        if (found.kind == LookupFault::none) return;
        const std::lock_guard lock(mutex);
        if (number <= faulty_lookup) {
            if (number < faulty_lookup) fault = {};
            faulty_lookup = number;
            fault.note(found.position, found.kind);
        }
    });
    return fault;
}

}  // namespace embpack
