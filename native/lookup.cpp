#include "lookup.h"

#include <algorithm>

#include "dispatch.h"
#include "threads.h"

namespace embpack {

namespace {

constexpr size_t rows_at_a_time = 1024;

// Tables of this size in all stay in the second-level cache, and prefetching would only cost.
constexpr size_t small_tables_bytes = size_t{1} << 19;

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
    const bool prefetches = table_bytes(rows) > small_tables_bytes;
    const size_t pieces = (count + rows_at_a_time - 1) / rows_at_a_time;
    LookupFault fault;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (size_t piece = 0; piece < pieces; piece++) {
        const size_t first = piece * rows_at_a_time;
        LookupFault found;
        k.gather_rows(rows, indices, prefetches, first, std::min(count, first + rows_at_a_time), out, found);
        if (found.kind == LookupFault::none) continue;
#pragma omp critical(embpack_gather_fault)
        fault.note(found.position, found.kind);
    }
    return fault;
}

LookupFault pool(std::vector<Lookup> lookups, size_t& faulty_lookup) {
    const Kernels& k = kernels();
    size_t total_values = 0, total_bytes = 0;
    for (const Lookup& lookup : lookups) {
        total_values += count_values(lookup);
        total_bytes += table_bytes(lookup.rows);
    }
    for (Lookup& lookup : lookups) lookup.bags.prefetches = total_bytes > small_tables_bytes;
    const int threads = threads_for(total_values);
    const std::vector<Piece> pieces = cut(lookups, threads);
    LookupFault fault;
    faulty_lookup = lookups.size();
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (size_t i = 0; i < pieces.size(); i++) {
        const auto [number, first, end] = pieces[i];
        const Lookup& lookup = lookups[number];
        LookupFault found;
        k.pool_bags(lookup.rows, lookup.bags, first, end, lookup.out, found);
        if (found.kind == LookupFault::none) continue;
#pragma omp critical(embpack_pool_fault)
        if (number <= faulty_lookup) {
            if (number < faulty_lookup) fault = {};
            faulty_lookup = number;
            fault.note(found.position, found.kind);
        }
    }
    return fault;
}

}  // namespace embpack
