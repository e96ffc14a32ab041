// Lookups of full blocks of trellis-coded rows, of 64 columns or 32, by fours of rows (trellis_blocks-inl.h:
// Levels::Fours). Some rows are read one after the other, and then used one after the other: from a row's address to
// its values takes longer than a CPU looks ahead.

// Rows that are read before the first of them is used, a multiple of four. With 16, loops end so often that lookups at
// d = 64 take 1.07 times as long (Zen 3).
inline constexpr size_t most_rows_made = 32;

// What is found once for all rows of a window.
template <class Levels, size_t columns>
struct BlockOfRows {
    using Fours = typename Levels::template Fours<columns, ColumnBlock>;
    static constexpr size_t vectors = columns / trellis_lanes;

    const TrellisReader& reader;
    const Fours fours;
    const typename Fours::Tables tables;
    alignas(64) float means[columns];   // in the order of lanes that Fours have
    typename Fours::template Made<most_rows_made> made;
    float scales[most_rows_made];

    // The block from column `first` on.
    BlockOfRows(const TrellisReader& reader, size_t first)
        : reader(reader),
          fours(*reader.common.block_at(first), reader.common.shape, first / trellis_block),
          tables(reader.common.levels) {
        for (size_t j = 0; j < columns; j += trellis_lanes)
            store(means + j, Fours::in_own_order(load(reader.common.block_at(first)->mean + j)));
    }

    // Reads row i of the window and those after it up to `last`, as many as are made together, and returns how many.
    // None if the table has no such row.
    template <bool prefetches>
    [[gnu::always_inline]] size_t make(size_t i, size_t last) {
        const PackedRows& rows = reader.rows;
        const size_t row_bytes = rows.row_bytes, num_rows = rows.num_rows;
        const uint8_t* const all_scales = rows.codebooks + sizeof(float) * reader.common.shape.first_scale();
        const uint64_t* const indices = reader.indices;
        const size_t count = smaller(last - i, most_rows_made);
        const uint8_t* found[most_rows_made];
        size_t k = 0;
        for (; k < count; k++) {
            const uint64_t index = indices[i + k];
            if (index >= num_rows) [[unlikely]] return 0;
            const uint8_t* const row = rows.bytes + index * row_bytes;
            if (!prefetches) __builtin_prefetch(row);   // to the first-level cache, while those before it are read
            std::memcpy(scales + k, all_scales + sizeof(float) * row[row_bytes - 1], sizeof(float));
            found[k] = row;
        }
        for (; k % 4 != 0; k++) found[k] = found[k - 1];
        for (size_t at = 0; at < k; at += 4) {
            if (prefetches) unrolled<4>([&](size_t r) { prefetch(i + at + r + reader.rows_ahead); });
            fours.make({found[at], found[at + 1], found[at + 2], found[at + 3]}, made, at);
        }
        return count;
    }

    // Calls use(v, values) for each vector of the row that was read as the `at`-th of those that are made, in the order
    // of lanes that Fours have.
    template <bool are_wide_late, class Use>
    [[gnu::always_inline]] void use_values(size_t at, const Use& use) const {
        const F32x16 scale = splat_at(scales + at);
        const auto levels = fours.template look_up<are_wide_late>(tables, made, at);
        const float* from = means;
        asm("" : "+r"(from));   // They stay in memory, too.
        unrolled<vectors>([&](size_t v) __attribute__((always_inline)) {
            use(v, fma(scale, levels(v), load(from + trellis_lanes * v)));
        });
    }

private:
    // A row of the window, or the last one that is known.
    [[gnu::always_inline]] void prefetch(size_t i) const {
        prefetch_row(reader.rows, reader.indices[smaller(i, reader.num_indices - 1)]);
    }
};

// Stores the columns of one block, from column j on, of the rows at positions first .. stop - 1 of the window, all of
// which the table has.
template <class Levels, size_t columns, bool are_wide_late, bool prefetches>
[[gnu::noinline]] void store_block_by_fours(const TrellisReader& reader, size_t first, size_t stop, size_t j,
                                            const Output& out) {
    using Block = BlockOfRows<Levels, columns>;
    Block block(reader, j);
    uint8_t* to = out.values + first * out.row_bytes;
    for (size_t i = 0, num_rows = stop - first, num_made; i < num_rows; i += num_made) {
        num_made = block.template make<prefetches>(i, num_rows);
        if (num_made == 0) [[unlikely]] return;   // Another thread has changed an index since it was checked.
        for (size_t at = 0; at < num_made; at++, to += out.row_bytes) {
            block.template use_values<are_wide_late>(at, [&](size_t v, F32x16 values) __attribute__((always_inline)) {
                store_values(to, out.type, j + trellis_lanes * v, Block::Fours::in_column_order(values),
                             trellis_lanes);
            });
        }
    }
}
template <class Levels, size_t columns>
inline void store_by_fours(const TrellisReader& reader, size_t first, size_t stop, size_t j, const Output& out) {
    const bool are_late = reader.common.block_at(j)->wide_vectors > 2;
    const bool prefetches = reader.bags.prefetches && j == 0;
    if (are_late && prefetches) return store_block_by_fours<Levels, columns, true, true>(reader, first, stop, j, out);
    if (are_late) return store_block_by_fours<Levels, columns, true, false>(reader, first, stop, j, out);
    if (prefetches) return store_block_by_fours<Levels, columns, false, true>(reader, first, stop, j, out);
    store_block_by_fours<Levels, columns, false, false>(reader, first, stop, j, out);
}

// pool_trellis_tile for a tile of one block.
template <class Join, class Levels, size_t columns, bool are_wide_late, bool prefetches>
[[gnu::noinline]] bool pool_tile_by_fours(const TrellisReader& reader, const TileJob job) {
    using Block = BlockOfRows<Levels, columns>;
    constexpr size_t vectors = Block::vectors;
    Block block(reader, job.first_code);
    const size_t* const starts = reader.starts;
    const size_t last = starts[job.end_bag];
    size_t i = starts[job.first_bag], at = 0, num_made = 0;
    float* to = job.to;
    for (size_t bag = job.first_bag; bag < job.end_bag; bag++) {
        Sums<vectors> sums;
        sums.change([&](size_t v, F32x16) { return load(job.start + 16 * v); });
        if (prefetches)
            unrolled<vectors>([&](size_t v) { __builtin_prefetch(to + bags_ahead * job.stride + 16 * v, 1); });
        const size_t end = starts[bag + 1], rows_of_bag = job.rows_before + end - i;
        while (i < end) {
            if (at == num_made) {
                num_made = block.template make<prefetches>(i, last);
                if (num_made == 0) [[unlikely]] return false;
                at = 0;
            }
            const size_t stop = smaller(num_made, at + end - i), first_made = i - at;
            for (i += stop - at; at < stop; at++) {
                const Join join(reader.weights, first_made + at);
                Block::Fours::keep_in_registers(sums.vector);
                block.template use_values<are_wide_late>(at, [&](size_t v, F32x16 values)
                                                                 __attribute__((always_inline)) {
                    sums.vector[v] = join(sums.vector[v], values);
                });
            }
        }
        if (job.ends_bags) [[likely]] {
            sums.change([](size_t, F32x16 sum) { return Block::Fours::in_column_order(sum); });
            sums.finish_bag(reader.bags.pooling, rows_of_bag);
        }
        unrolled<vectors>([&](size_t v) { store(to + 16 * v, sums.vector[v]); });
        to += job.stride;
    }
    return true;
}
template <class Join, class Levels, size_t columns>
bool pool_by_fours(const TrellisReader& reader, TileJob job) {
    const bool are_late = reader.common.block_at(job.first_code)->wide_vectors > 2;
    const bool prefetches = prefetches_rows(reader, job);
    if (are_late && prefetches) return pool_tile_by_fours<Join, Levels, columns, true, true>(reader, job);
    if (are_late) return pool_tile_by_fours<Join, Levels, columns, true, false>(reader, job);
    if (prefetches) return pool_tile_by_fours<Join, Levels, columns, false, true>(reader, job);
    return pool_tile_by_fours<Join, Levels, columns, false, false>(reader, job);
}
