#include "lookup.h"

#include <unistd.h>

#include <algorithm>

#include "dispatch.h"
#include "threads.h"

namespace embpack {

namespace {

constexpr size_t rows_at_a_time = 1024;

// Bytes of the second-level cache. Tables that fit stay there, and prefetching would only cost.
size_t second_level_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
    static const long known = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (known > 0) return static_cast<size_t>(known);
#endif
    return size_t{1} << 20;
}

size_t table_bytes(const PackedRows& rows) { return rows.num_rows * rows.row_bytes; }

// Pieces of a lookup: few enough for prefetching to run ahead in each, enough that threads end together.
constexpr size_t pieces_a_thread = 8;

constexpr size_t output_at_a_time = size_t{1} << 20;

struct Piece {
    size_t lookup, first_bag, end_bag;
};

size_t count_values(const Lookup& lookup) {
    const Bags& bags = lookup.bags;
    return (bags.start(bags.num_bags) - bags.start(0)) * lookup.rows.embedding_dim;
}

// Bags of one table in few pieces; those of several in turns, so that what is written of the output together lies
// together: its rows are wide, and each would be on a page of its own.
std::vector<Piece> cut(const std::vector<Lookup>& lookups, int threads) {
    size_t most_bags = 0;
    for (const Lookup& lookup : lookups) most_bags = std::max(most_bags, lookup.bags.num_bags);
    size_t bags_at_a_time = most_bags;
    if (lookups.size() > 1) bags_at_a_time = std::max<size_t>(1, output_at_a_time / lookups[0].out.row_bytes);
    if (threads > 1) {
        const size_t bags_a_piece = most_bags / (static_cast<size_t>(threads) * pieces_a_thread / lookups.size() + 1);
        bags_at_a_time = std::min(bags_at_a_time, bags_a_piece + 1);
    }
    std::vector<Piece> pieces;
    for (size_t first = 0; first < most_bags; first += bags_at_a_time)
        for (size_t i = 0; i < lookups.size(); i++)
            if (first < lookups[i].bags.num_bags)
                pieces.push_back({i, first, std::min(lookups[i].bags.num_bags, first + bags_at_a_time)});
    return pieces;
}

}  // namespace

LookupFault gather(const PackedRows& rows, const Integers& indices, const Output& out) {
    const Kernels& k = kernels();
    const size_t count = indices.values ? indices.count : rows.num_rows;
    const int threads = threads_for(count * rows.embedding_dim);
    const bool prefetches = table_bytes(rows) > second_level_bytes();
    const size_t pieces = (count + rows_at_a_time - 1) / rows_at_a_time;
    LookupFault fault;
    for_each_piece(pieces, threads, [&](size_t piece) {
        const size_t first = piece * rows_at_a_time;
        LookupFault found;
        k.gather_rows(rows, indices, prefetches, first, std::min(count, first + rows_at_a_time), out, found);
        if (found.kind == LookupFault::none) return;
#pragma omp critical(embpack_gather_fault)
        fault.note(found.position, found.kind);
    });
    return fault;
}

LookupFault pool(std::vector<Lookup> lookups, size_t& faulty_lookup) {
    const Kernels& k = kernels();
    size_t total_values = 0, total_bytes = 0;
    for (const Lookup& lookup : lookups) {
        total_values += count_values(lookup);
        total_bytes += table_bytes(lookup.rows);
    }
    for (Lookup& lookup : lookups) lookup.bags.prefetches = total_bytes > second_level_bytes();
    const int threads = threads_for(total_values);
    const std::vector<Piece> pieces = cut(lookups, threads);
    LookupFault fault;
    faulty_lookup = lookups.size();
    for_each_piece(pieces.size(), threads, [&](size_t i) {
        const size_t number = pieces[i].lookup;
        const Lookup& lookup = lookups[number];
        LookupFault found;
        k.pool_bags(lookup.rows, lookup.bags, pieces[i].first_bag, pieces[i].end_bag, lookup.out, found);
        if (found.kind == LookupFault::none) return;
#pragma omp critical(embpack_pool_fault)
        if (number <= faulty_lookup) {
            if (number < faulty_lookup) fault = {};
            faulty_lookup = number;
            fault.note(found.position, found.kind);
        }
    });
    return fault;
}

}  // namespace embpack
