// Lookups of rows that end with their parameters, or whose codebooks lie beside them: gather and pool. A bag adds its
// rows' levels in index order, each column by itself.

template <int bits>
inline void store_rows(RowReader& reader, size_t first, const Output& out) {
    const PackedRows rows = reader.rows;
    const size_t d = rows.embedding_dim, rows_ahead = reader.rows_ahead;
    const bool prefetches = reader.bags.prefetches;
    const Spread<bits> spread;
    const SpreadLast<bits> spread_last(rows);
    with_levels<bits>(rows, [&]<class ReadLevels>(Type<ReadLevels>) {
        ReadLevels read_levels(rows, 0);
        for (size_t stop; first < reader.end; first = stop) {
            stop = reader.end_of_window(first, reader.end);
            reader.open(first, stop, 0);
            const uint64_t* const indices = reader.indices;
            for (size_t i = first; i < stop; i++) {
                const uint64_t index = indices[i - first];
                if (index >= rows.num_rows) [[unlikely]] return reader.note_fault(i);
                const uint8_t* codes = rows.bytes + index * rows.row_bytes;
                typename ReadLevels::Kept kept;
                if (!read_levels.read(codes, index, i, kept)) [[unlikely]] return reader.note_fault(i);
                const auto levels = kept.open();
                if (prefetches) prefetch_row(rows, indices[smaller(i - first + rows_ahead, reader.num_indices - 1)]);
                uint8_t* const to = out.values + i * out.row_bytes;
                size_t j = 0;
                for (; j + 16 <= d; j += 16, codes += 2 * bits)
                    store_values(to, out.type, j, in_column_order<bits>(levels(spread(codes))), 16);
                if (j < d) store_values(to, out.type, j, in_column_order<bits>(levels(spread_last(codes))), d - j);
            }
        }
    });
}

// Not inlined, and without all else that there is to do, so that the loop over rows has all registers.
template <int bits, class Join, class ReadLevels, size_t vectors, bool has_last, bool may_prefetch>
[[gnu::noinline]] bool pool_tile(const RowReader& reader, TileJob job) {
    ReadLevels read_levels(reader.rows, job.first_code);
    const Spread<bits> spread;
    const SpreadLast<bits> spread_last(reader.rows);
    struct Row {
        const uint8_t* codes;
        typename ReadLevels::Kept levels;
    };
    // Where codes are read as words, an instruction set makes levels of them by itself.
    using Levels = decltype(Row().levels.open());
    constexpr bool are_words = !has_last && vectors == vectors_of_words && std::is_same_v<Levels, GridLevels<4, true>>;
    const uint8_t* const bytes = reader.rows.bytes + job.first_code;
    const size_t row_bytes = reader.rows.row_bytes, num_rows = reader.rows.num_rows;
    const uint64_t* const indices = reader.indices;
    const float* const weights = reader.weights;
    const size_t* const starts = reader.starts;
    const size_t last = starts[job.end_bag];
    const bool prefetches = may_prefetch && prefetches_rows(reader, job);
    const uint64_t* const indices_ahead = prefetches ? indices + reader.rows_ahead : indices;
    const size_t last_ahead = prefetches ? reader.num_indices - reader.rows_ahead - 1 : 0;
    const auto read = [&](size_t i, Row& row) __attribute__((always_inline)) {
        const uint64_t index = indices[i < last ? i : last - 1];
        if (index >= num_rows) [[unlikely]] return false;
        row.codes = bytes + index * row_bytes;
        return read_levels.read(row.codes, index, i, row.levels);
    };
    // Levels are read some rows early: out of the cache and through their conversion, they take longer than a row does,
    // and the codes that wait for them would fill what the CPU has to look ahead.
    size_t i = starts[job.first_bag];
    Row ahead[rows_early + 1] = {};   // row i and those after it
    bool are_found = true;
    if (i < last) unrolled<rows_early>([&](size_t k) { are_found = are_found && read(i + k, ahead[k]); });
    if (!are_found) return false;
    for (size_t bag = job.first_bag; bag < job.end_bag; bag++) {
        Sums<vectors + has_last> sums;
        sums.change([&](size_t v, F32x16) { return load(job.start + 16 * v); });
        if (prefetches)   // Lines to be written compete with rows for the few that can be under way.
            unrolled<vectors>([&](size_t v) { __builtin_prefetch(job.to + bags_ahead * job.stride + 16 * v, 1); });
        const size_t rows_of_bag = job.rows_before + starts[bag + 1] - i;
        for (const size_t end = starts[bag + 1]; i < end; i++) {
            if (!read(i + rows_early, ahead[rows_early])) [[unlikely]] return false;
            if (prefetches) prefetch_row(reader.rows, indices_ahead[smaller(i, last_ahead)]);
            const Join join(weights, i);
            const uint8_t* codes = ahead[0].codes;
            asm("" : "+r"(codes));   // One address and constant distances: GCC would keep a register for each vector.
            const auto levels = ahead[0].levels.open();
            sums.change([&](size_t v, F32x16 sum) __attribute__((always_inline)) {
                const uint8_t* const from = codes + 2 * bits * v;
                if constexpr (are_words)
                    return join(sum, levels_of_words(levels, codes, v));
                else
                    return join(sum, levels(v < vectors ? spread(from) : spread_last(from)));
            });
            unrolled<rows_early>([&](size_t k) { ahead[k] = ahead[k + 1]; });
        }
        if (job.ends_bags) [[likely]] {
            if constexpr (are_words)
                words_in_column_order(sums);
            else
                sums.change([](size_t, F32x16 sum) { return in_column_order<bits>(sum); });
            sums.finish_bag(reader.bags.pooling, rows_of_bag);
        }
        unrolled<vectors>([&](size_t v) { store(job.to + 16 * v, sums.vector[v]); });
        if constexpr (has_last) store_first(job.to + 16 * vectors, sums.vector[vectors], job.last_columns);
        job.to += job.stride;
    }
    return true;
}

// Compiling a loop for everything that it may meet takes minutes, so there are as many as common tables need:
// - Rows of default parameters, and of codebooks at 4 bits, have sums without weights; all others have weights, if only
//   of 1, where a multiply-add is an instruction.
// - The former, and weighted rows of default parameters at 4 and 8 bits, have every shape of a tile. Others take more
//   tiles to a row, of shapes that differ by a factor of 4.
// - Of the common sums without weights, one loop prefetches and one does not: asking each time would take a tenth of
//   the time of narrow rows, and a third at 2 bits.
template <int bits, class ReadLevels>
inline constexpr bool has_default_params = std::is_same_v<ReadLevels, GridReader<bits, bits != 8>>;
template <int bits, class ReadLevels>
inline constexpr bool is_common = has_default_params<bits, ReadLevels> || std::is_same_v<ReadLevels, CodebookReader<4>>;
template <int bits, class ReadLevels>
inline constexpr bool adds_alone = is_common<bits, ReadLevels> || !has_fast_fma;
template <int bits, class Join, class ReadLevels>
inline constexpr bool has_all_shapes = std::is_same_v<Join, AddLevels>
                                           ? is_common<bits, ReadLevels>
                                           : has_default_params<bits, ReadLevels> && bits != 2;
template <int bits, class Join, class ReadLevels>
inline constexpr bool always_asks = !std::is_same_v<Join, AddLevels> || !is_common<bits, ReadLevels>;

inline constexpr size_t next_shape(size_t vectors, bool all_shapes) {
    return all_shapes || vectors < 4 ? vectors / 2 : vectors / 4;
}

// The first tile of so many columns. The last ones are a tile of their own only where they do not fit in another.
template <bool all_shapes>
inline TileShape first_tile(size_t num_columns) {
    size_t vectors = most_sums;
    while (16 * vectors > num_columns) vectors = next_shape(vectors, all_shapes);
    const size_t left = num_columns - 16 * vectors;
    const bool fits = vectors == 0 || (all_shapes && vectors < most_sums);
    return {vectors, fits && left < 16 ? left : 0};
}

inline size_t first_code(const PackedRows& rows, size_t column) {
    return column / 8 * static_cast<size_t>(rows.grid.bits);
}

template <int bits, class Join, class ReadLevels, size_t vectors = most_sums>
Tiles<RowReader>::PoolFn find_pool_tile(TileShape tile, bool prefetches) {
    constexpr bool all_shapes = has_all_shapes<bits, Join, ReadLevels>;
    constexpr bool asks = always_asks<bits, Join, ReadLevels>;
    if constexpr (vectors > 0)
        if (tile.vectors < vectors)
            return find_pool_tile<bits, Join, ReadLevels, next_shape(vectors, all_shapes)>(tile, prefetches);
    if constexpr (vectors == 0 || (all_shapes && vectors < most_sums))
        if (vectors == 0 || tile.last_columns > 0)
            return prefetches ? pool_tile<bits, Join, ReadLevels, vectors, true, true>
                              : pool_tile<bits, Join, ReadLevels, vectors, true, asks>;
    if constexpr (vectors > 0)
        return prefetches ? pool_tile<bits, Join, ReadLevels, vectors, false, true>
                          : pool_tile<bits, Join, ReadLevels, vectors, false, asks>;
}

template <bool is_clustered, size_t vectors = most_sums>
Tiles<RowReader>::PoolFn find_halves_tile(TileShape tile, bool prefetches) {
    if constexpr (vectors > 0)
        if (tile.vectors < vectors)
            return find_halves_tile<is_clustered, next_shape(vectors, true)>(tile, prefetches);
    if constexpr (vectors < most_sums)
        if (vectors == 0 || tile.last_columns > 0)
            return prefetches ? pool_halves<is_clustered, vectors, true, true>
                              : pool_halves<is_clustered, vectors, true, false>;
    if constexpr (vectors > 0)
        return prefetches ? pool_halves<is_clustered, vectors, false, true>
                          : pool_halves<is_clustered, vectors, false, false>;
}
template <bool is_clustered>
inline constexpr Tiles<RowReader> halves_tiles{first_tile<true>, first_code, find_halves_tile<is_clustered>};

[[gnu::noinline]] void pool_by(const Tiles<RowReader>& tiles, const PackedRows& rows, const Bags& bags, size_t first,
                               size_t end, const Output& out, LookupFault& fault) {
    const bool are_read_once = tiles.first(rows.embedding_dim).num_columns() == rows.embedding_dim;
    RowReader reader(rows, bags, bags.start(first), bags.start(end), are_read_once, fault);
    Pooler(reader, out, tiles, 0, rows.embedding_dim).pool(first, end);
}

template <int bits, class Join, class ReadLevels>
inline constexpr Tiles<RowReader> tiles_of{first_tile<has_all_shapes<bits, Join, ReadLevels>>, first_code,
                                           find_pool_tile<bits, Join, ReadLevels>};

template <int bits>
inline Tiles<RowReader> find_tiles(const PackedRows& rows, const Bags& bags) {
    if constexpr (looks_halves_up && bits == 4)
        if (rows.grid.f16_params && rows.layout != Layout::uniform)
            return rows.layout == Layout::clustered ? halves_tiles<true> : halves_tiles<false>;
    return with_levels<bits>(rows, [&]<class ReadLevels>(Type<ReadLevels>) {
        if constexpr (adds_alone<bits, ReadLevels>)
            if (!bags.per_sample_weights) return tiles_of<bits, AddLevels, ReadLevels>;
        return tiles_of<bits, AddWeightedLevels, ReadLevels>;
    });
}

[[gnu::noinline]] void gather_by(const PackedRows& rows, const Bags& bags, size_t first, size_t end, const Output& out,
                                 LookupFault& fault) {
    RowReader reader(rows, bags, first, end, true, fault);
    if (rows.grid.bits == 2) return store_rows<2>(reader, first, out);
    if (rows.grid.bits == 4) return store_rows<4>(reader, first, out);
    store_rows<8>(reader, first, out);
}

void gather_rows(const PackedRows& rows, const Integers& indices, bool prefetches, size_t first, size_t end,
                 const Output& out, LookupFault& fault) noexcept {
    const Bags bags{.indices = indices, .prefetches = prefetches};
    write_clipped(out, [&](const Output& to) { gather_by(rows, bags, first, end, to, fault); });
}

#include "exact_sums-inl.h"

void pool_bags(const PackedRows& rows, const Bags& bags, size_t first, size_t end, const Output& out,
               LookupFault& fault) noexcept {
    const Tiles<RowReader> tiles = rows.grid.bits == 2   ? find_tiles<2>(rows, bags)
                                   : rows.grid.bits == 4 ? find_tiles<4>(rows, bags)
                                                         : find_tiles<8>(rows, bags);
    write_clipped(out, [&](const Output& to) {
        const bool is_done = [&]<class Exact>(Type<Exact>) {
            if constexpr (!std::is_void_v<Exact>)
                if (can_be_exact<Exact>(rows, bags)) {
                    ExactPooler<Exact>(rows, bags, first, end, to, tiles, fault).pool(first, end);
                    return true;
                }
            return false;
        }(Type<ExactTiles>());
        if (!is_done) pool_by(tiles, rows, bags, first, end, to, fault);
    });
}
