// Lookups of trellis-coded rows: trellis_blocks-inl.h says how these lie, and what the words mean.

struct TrellisReader : RowReader {
    const TrellisCommon common;

    TrellisReader(const PackedRows& rows, size_t first_column, const Bags& bags, size_t first, size_t end,
                  bool are_read_once, LookupFault& fault)
        : RowReader(rows, bags, first, end, are_read_once, fault), common(rows, first_column) {}
};

#include "trellis_fours_lookup-inl.h"

// Stores the columns of one block, from column j on, of the rows at positions first .. stop - 1 of the window.
template <class Levels, bool is_full, size_t vectors>
inline void store_trellis_block(const TrellisReader& reader, const ColumnBlock& block, const Levels& levels,
                                size_t first, size_t stop, size_t j, const Output& out) {
    const PackedRows rows = reader.rows;
    const uint8_t* const scales = rows.codebooks + sizeof(float) * reader.common.shape.first_scale();
    const size_t row_bytes = rows.row_bytes, num_columns = smaller(rows.embedding_dim - j, trellis_block);
    const BlockLookup<slots_of(trellis_lanes * vectors)> block_lookup(block);
    const bool prefetches = reader.bags.prefetches && j == 0;
    for (size_t i = first; i < stop; i++) {
        const uint64_t index = reader.indices[i - first];
        const uint8_t* const bytes = rows.bytes + index * row_bytes;
        const TrellisRow<is_full> row(bytes, row_bytes);
        const F32x16 scale = read_trellis_scale(scales, bytes[row_bytes - 1]);
        if (prefetches)
            prefetch_row(rows, reader.indices[smaller(i - first + reader.rows_ahead, reader.num_indices - 1)]);
        uint8_t* const to = out.values + i * out.row_bytes;
        const auto numbers = find_trellis_numbers<is_full, vectors>(row.bytes, block, levels);
        const auto levels_of_vector = block_lookup.look_up(levels, block, numbers);
        unrolled<vectors>([&](size_t v) {
            const size_t column = trellis_lanes * v;
            if (!is_full && column >= num_columns) return;
            const size_t count = is_full ? trellis_lanes : smaller(num_columns - column, trellis_lanes);
            const F32x16 values = fma(scale, levels_of_vector(v), load(block.mean + column));
            store_values(to, out.type, j + column, values, count);
        });
    }
}

template <class Levels>
inline void store_trellis_rows(TrellisReader& reader, size_t first, const Output& out) {
    const PackedRows rows = reader.rows;
    const TrellisCommon& common = reader.common;
    const Levels levels(common.levels);
    for (size_t stop; first < reader.end; first = stop) {
        stop = reader.end_of_window(first, reader.end);
        reader.open(first, stop, 0);
        for (size_t i = first; i < stop; i++)
            if (reader.indices[i - first] >= rows.num_rows) [[unlikely]] return reader.note_fault(i);
        for (size_t j = common.first_column; j < common.end_column; j += trellis_block) {
            const ColumnBlock& block = *common.block_at(j);
            const size_t num_columns = rows.embedding_dim - j;
            if constexpr (are_made_by_fours<Levels>) {
                if (num_columns >= trellis_block)
                    store_by_fours<Levels, trellis_block>(reader, first, stop, j, out);
                if (num_columns == trellis_block / 2)
                    store_by_fours<Levels, trellis_block / 2>(reader, first, stop, j, out);
                if (num_columns >= trellis_block || num_columns == trellis_block / 2) continue;
            } else if (num_columns >= trellis_block) {
                store_trellis_block<Levels, true, trellis_vectors>(reader, block, levels, first, stop, j, out);
                continue;
            }
            if (slots_of(num_columns) == 1)
                store_trellis_block<Levels, false, 1>(reader, block, levels, first, stop, j, out);
            else if (slots_of(num_columns) == 2)
                store_trellis_block<Levels, false, 2>(reader, block, levels, first, stop, j, out);
            else
                store_trellis_block<Levels, false, trellis_vectors>(reader, block, levels, first, stop, j, out);
        }
    }
}

// pool_tile (lookup-inl.h) for rows of this layout. The job's first code is its first column. A tile is one or more
// full blocks, or the last block of a row.
template <class Join, class Levels, size_t vectors, bool is_full>
[[gnu::noinline]] bool pool_trellis_tile(const TrellisReader& reader, TileJob job) {
    constexpr size_t num_blocks = (vectors + trellis_vectors - 1) / trellis_vectors;
    constexpr size_t vectors_of_block = smaller(vectors, trellis_vectors);
    const ColumnBlock* const blocks = reader.common.block_at(job.first_code);
    PackedRows rows = reader.rows;
    rows.row_bytes = known_block<Levels>(*blocks).row_bytes;   // a constant, where it is known
    const Levels levels(reader.common.levels);
    const auto find_numbers = [&](const uint8_t* row, size_t k) __attribute__((always_inline)) {
        return find_trellis_numbers<is_full, vectors_of_block>(row, known_block<Levels>(blocks[k]), levels);
    };
    struct Row {
        F32x16 scale;
        decltype(find_numbers(nullptr, 0)) numbers[num_blocks];
    };
    const uint8_t* scales = rows.codebooks + sizeof(float) * reader.common.shape.first_scale();
    asm("" : "+r"(scales));   // Keeps GCC from computing this address anew for each row.
    const size_t row_bytes = rows.row_bytes;
    const uint64_t* const indices = reader.indices;
    const size_t* const starts = reader.starts;
    const size_t last = starts[job.end_bag];
    const bool prefetches = prefetches_rows(reader, job);
    const uint64_t* const indices_ahead = prefetches ? indices + reader.rows_ahead : indices;
    const size_t last_ahead = prefetches ? reader.num_indices - reader.rows_ahead - 1 : 0;
    // Up to the numbers; false if the table has no such row. Past the last row, the last one is read again.
    const auto read_row = [&](size_t i, Row& row) __attribute__((always_inline)) {
        const uint64_t index = indices[i < last ? i : last - 1];
        if (index >= rows.num_rows) [[unlikely]] return false;
        const uint8_t* const bytes = rows.bytes + index * row_bytes;
        const TrellisRow<is_full && (vectors > 1)> readable(bytes, row_bytes);
        row.scale = read_trellis_scale(scales, bytes[row_bytes - 1]);
        unrolled<num_blocks>(
            [&](size_t k) __attribute__((always_inline)) { row.numbers[k] = find_numbers(readable.bytes, k); });
        return true;
    };
    using Lookup = BlockLookup<slots_of(trellis_lanes * vectors_of_block)>;
    Lookup block_lookups[num_blocks];
    unrolled<num_blocks>([&](size_t k) __attribute__((always_inline)) { block_lookups[k] = Lookup(blocks[k]); });
    F32x16 means[vectors];
    unrolled<vectors>([&](size_t v) __attribute__((always_inline)) {
        means[v] = load(blocks[v / trellis_vectors].mean + trellis_lanes * (v % trellis_vectors));
        if constexpr (vectors <= most_means_kept) stay_in_register(means[v]);
    });
    // There are registers for the numbers of `trellis_rows_early` blocks.
    constexpr size_t most_early = vectors < trellis_vectors ? 1 : trellis_rows_early / num_blocks;
    constexpr size_t rows_early = smaller(trellis_rows_early, most_early);
    size_t i = starts[job.first_bag];
    Row ahead[rows_early + 1];   // row i and those after it
    bool are_found = true;
    if (i < last) unrolled<rows_early>([&](size_t k) { are_found = are_found && read_row(i + k, ahead[k]); });
    if (!are_found) return false;
    for (size_t bag = job.first_bag; bag < job.end_bag; bag++) {
        Sums<vectors> sums;
        sums.change([&](size_t v, F32x16) { return load(job.start + 16 * v); });
        if (prefetches)
            unrolled<vectors>([&](size_t v) { __builtin_prefetch(job.to + bags_ahead * job.stride + 16 * v, 1); });
        const size_t rows_of_bag = job.rows_before + starts[bag + 1] - i;
        for (const size_t end = starts[bag + 1]; i < end; i++) {
            if (!read_row(i + rows_early, ahead[rows_early])) [[unlikely]] return false;
            if (prefetches) prefetch_row(rows, indices_ahead[smaller(i, last_ahead)]);
            const Join join(reader.weights, i);
            const F32x16 scale = ahead[0].scale;
            unrolled<num_blocks>([&](size_t k) __attribute__((always_inline)) {
                const auto& block = known_block<Levels>(blocks[k]);
                const auto levels_of_vector = block_lookups[k].look_up(levels, block, ahead[0].numbers[k]);
                unrolled<vectors_of_block>([&](size_t v) __attribute__((always_inline)) {
                    const size_t at = trellis_vectors * k + v;
                    sums.vector[at] = join(sums.vector[at], fma(scale, levels_of_vector(v), means[at]));
                });
            });
            unrolled<rows_early>([&](size_t k) { ahead[k] = ahead[k + 1]; });
        }
        if (job.ends_bags) [[likely]] sums.finish_bag(reader.bags.pooling, rows_of_bag);
        constexpr size_t whole_vectors = is_full ? vectors : vectors - 1;
        unrolled<whole_vectors>([&](size_t v) { store(job.to + 16 * v, sums.vector[v]); });
        if constexpr (!is_full) {
            if (job.last_columns == 0)
                store(job.to + 16 * whole_vectors, sums.vector[whole_vectors]);
            else
                store_first(job.to + 16 * whole_vectors, sums.vector[whole_vectors], job.last_columns);
        }
        job.to += job.stride;
    }
    return true;
}

// The first tile of so many columns: as many full blocks as sums stay in registers, or a block that is not full.
inline TileShape first_trellis_tile(size_t num_columns) {
    const size_t most_blocks = most_trellis_sums / trellis_vectors;
    const size_t blocks = smaller(largest_power_within(num_columns / trellis_block), most_blocks);
    if (blocks > 0) return {blocks * trellis_vectors, 0};
    return {num_columns / trellis_lanes, num_columns % trellis_lanes};
}

inline size_t first_trellis_code(const PackedRows&, size_t column) { return column; }

// The function for a tile. `vectors` goes down from the most, by halves to one block and then one by one, until the
// tile needs them all.
template <class Join, class Levels, size_t vectors = most_trellis_sums>
Tiles<TrellisReader>::PoolFn find_pool_trellis_tile(TileShape tile, bool prefetches) {
    if constexpr (known_dim<Levels> > 0) {
        return pool_trellis_tile<Join, Levels, known_dim<Levels> / trellis_lanes, true>;
    } else {
        const size_t needed = tile.vectors + (tile.last_columns > 0);
        if constexpr (are_made_by_fours<Levels>) {
            if (tile.num_columns() == trellis_block) return pool_by_fours<Join, Levels, trellis_block>;
            if (tile.num_columns() == trellis_block / 2) return pool_by_fours<Join, Levels, trellis_block / 2>;
        }
        constexpr bool can_be_full = slots_of(trellis_lanes * vectors) == vectors;
        if constexpr (vectors > 1)
            if (needed < vectors)
                return find_pool_trellis_tile<Join, Levels, vectors <= trellis_vectors ? vectors - 1 : vectors / 2>(
                    tile, prefetches);
        if constexpr (vectors > trellis_vectors) return pool_trellis_tile<Join, Levels, vectors, true>;
        if constexpr (can_be_full && !are_made_by_fours<Levels>)
            if (tile.last_columns == 0) return pool_trellis_tile<Join, Levels, vectors, true>;
        if constexpr (vectors <= trellis_vectors) return pool_trellis_tile<Join, Levels, vectors, false>;
    }
}

template <class Join, class Levels>
inline constexpr Tiles<TrellisReader> trellis_tiles_of{first_trellis_tile, first_trellis_code,
                                                       find_pool_trellis_tile<Join, Levels>};

// Levels for a known shape, where an instruction set has them, are for sums without weights alone.
inline Tiles<TrellisReader> find_trellis_tiles(const TrellisReader& reader) {
    const TrellisShape& shape = reader.common.shape;
    Tiles<TrellisReader> tiles;
    // Sums of codes of 6 and 7 bits have weights, if only of 1: a loop less to compile.
    const auto add = [&]<class Levels>() {
        constexpr bool adds_alone = !std::is_same_v<Levels, ManyLevels> || !has_fast_fma;
        tiles = trellis_tiles_of<std::conditional_t<adds_alone, AddLevels, AddWeightedLevels>, Levels>;
    };
    const auto add_weighted = [&]<class Levels>() { tiles = trellis_tiles_of<AddWeightedLevels, Levels>; };
    if (reader.bags.per_sample_weights)
        with_trellis_levels(shape, add_weighted);
    else if (!with_known_levels(shape, reader.common.wide, add))
        with_trellis_levels(shape, add);
    return tiles;
}

// Calls use(first column, bags) for each stripe of the rows (trellis_blocks-inl.h).
template <class Use>
inline void for_stripes(const PackedRows& rows, Bags bags, const Use& use) {
    // Rows of several stripes are many lines one after the other, which a CPU prefetches itself.
    if (rows.embedding_dim > most_stripe_columns) bags.prefetches = false;
    for (size_t j = 0; j < rows.embedding_dim; j += most_stripe_columns) use(j, bags);
}

void gather_trellis_rows(const PackedRows& rows, const Integers& indices, bool prefetches, size_t first, size_t end,
                         const Output& out, LookupFault& fault) noexcept {
    const Bags bags{.indices = indices, .prefetches = prefetches};
    for_stripes(rows, bags, [&](size_t first_column, const Bags& bags) {
        TrellisReader reader(rows, first_column, bags, first, end, true, fault);
        write_clipped(out, [&](const Output& to) {
            with_trellis_levels(reader.common.shape,
                                [&]<class Levels>() { store_trellis_rows<Levels>(reader, first, to); });
        });
    });
}

void pool_trellis_bags(const PackedRows& rows, const Bags& bags, size_t first, size_t end, const Output& out,
                       LookupFault& fault) noexcept {
    const bool are_read_once = first_trellis_tile(rows.embedding_dim).num_columns() == rows.embedding_dim;
    for_stripes(rows, bags, [&](size_t first_column, const Bags& bags) {
        TrellisReader reader(rows, first_column, bags, bags.start(first), bags.start(end), are_read_once, fault);
        const Tiles<TrellisReader> tiles = find_trellis_tiles(reader);
        write_clipped(out, [&](const Output& to) {
            Pooler(reader, to, tiles, first_column, reader.common.end_column).pool(first, end);
        });
    });
}
