// Reading trellis-coded rows. What only the columns say is found once for many rows (TrellisColumns); of a row, the
// message bits of 64 columns are read together, and sixteen indices with one load, shuffle and shift.

// A window of 16 bytes is read of a row, and the last ones end with it; a shorter row is copied first.
inline constexpr size_t trellis_window = 16;

inline void find_columns(const PackedRows& rows, size_t first_column, size_t count, TrellisColumns* columns) {
    const TrellisShape shape(rows.embedding_dim, rows.row_bytes);
    const size_t d = rows.embedding_dim, wide_before = first_column * shape.num_wide / d;
    const uint8_t* const mean = rows.codebooks + sizeof(float) * (shape.num_levels() + trellis_scales + first_column);
    size_t part = first_column * shape.num_wide - wide_before * d;   // of d, until the next wide one
    size_t bit = d + first_column * (shape.narrow_bits - 1) + wide_before;
    const size_t last_window = rows.row_bytes < trellis_window ? 0 : rows.row_bytes - trellis_window;
    for (size_t j = 0; j < count; j += 16, columns++) {
        const size_t n = smaller(count - j, 16);
        std::memset(columns, 0, sizeof *columns);
        std::memset(columns->shuffle, 0x80, sizeof columns->shuffle);
        std::memcpy(columns->mean, mean + sizeof(float) * j, sizeof(float) * n);
        columns->window = static_cast<uint32_t>(smaller(bit / 8, last_window));
        for (size_t lane = 0; lane < n; lane++) {
            part += shape.num_wide;
            const bool is_wide = part >= d;
            if (is_wide) part -= d;
            const size_t bits = shape.narrow_bits - 1 + is_wide, byte = bit / 8 - columns->window, shift = bit % 8;
            columns->shuffle[4 * lane + 1] = static_cast<uint8_t>(byte);
            if (shift + bits > 8) columns->shuffle[4 * lane + 2] = static_cast<uint8_t>(byte + 1);
            columns->shifts[lane] = static_cast<int32_t>(shift + 6);
            columns->keep[lane] = ((1 << bits) - 1) << 2;
            columns->first[lane] = is_wide ? static_cast<int32_t>(shape.num_narrow_levels()) : 0;
            columns->is_wide |= static_cast<uint32_t>(is_wide) << lane;
            bit += bits;
        }
    }
}

// Which subsets 64 levels are of.
struct TrellisSubsets {
    uint64_t c1, c0;

    // From byte `at` of a row's message bits on, of which `room` can be read.
    [[gnu::always_inline]] TrellisSubsets(const uint8_t* row, size_t at, size_t room) {
        const size_t from = smaller(at, room - 8);
        uint64_t messages;
        std::memcpy(&messages, row + from, 8);
        messages >>= 8 * (at - from);
        const uint64_t before = at > 0 ? row[at - 1] : 0;
        c1 = messages ^ (messages << 1 | before >> 7) ^ (messages << 3 | before >> 5);
        c0 = messages << 2 | before >> 6;
    }
};

// A row that windows can be read from.
struct TrellisRow {
    const uint8_t* bytes;
    uint8_t copy[trellis_window];

    [[gnu::always_inline]] TrellisRow(const uint8_t* row, size_t row_bytes) : bytes(row) {
        if (row_bytes >= trellis_window) [[likely]] return;
        std::memset(copy, 0, sizeof copy);
        for (size_t i = 0; i < row_bytes; i++) copy[i] = row[i];
        bytes = copy;
    }
    TrellisRow(const TrellisRow&) = delete;
};

inline size_t trellis_room(size_t row_bytes) { return row_bytes < trellis_window ? trellis_window : row_bytes; }

// What looks levels up. Where an instruction set has registers for the levels of few bits, there is another.
template <class Use>
inline void with_trellis_levels(const PackedRows& rows, Use use) {
    if constexpr (has_few_trellis_levels)
        if (TrellisShape(rows.embedding_dim, rows.row_bytes).narrow_bits <= 4) return use(Type<FewLevels>());
    use(Type<WrittenLevels>());
}

// The number of a row's scale is its last byte.
inline F32x16 read_trellis_scale(const uint8_t* scales, uint8_t number) {
    float scale;
    std::memcpy(&scale, scales + sizeof(float) * number, sizeof scale);
    return splat(scale);
}

// Columns whose constants are found together.
inline constexpr size_t trellis_vectors = 16;

template <class Levels>
inline void store_trellis_rows(RowReader& reader, size_t first, const Output& out) {
    const PackedRows rows = reader.rows;
    const TrellisShape shape(rows.embedding_dim, rows.row_bytes);
    const size_t d = rows.embedding_dim, row_bytes = rows.row_bytes, room = trellis_room(row_bytes);
    const uint8_t* const scales = rows.codebooks + sizeof(float) * shape.num_levels();
    const Levels levels(rows.codebooks, shape);
    TrellisColumns columns[trellis_vectors];
    for (size_t stop; first < reader.end; first = stop) {
        stop = reader.end_of_window(first, reader.end);
        reader.open(first, stop, 0);
        const uint64_t* const indices = reader.indices;
        for (size_t start = 0; start < d; start += 16 * trellis_vectors) {
            const size_t count = smaller(d - start, 16 * trellis_vectors);
            find_columns(rows, start, count, columns);
            const bool prefetches = reader.bags.prefetches && start == 0;
            for (size_t i = first; i < stop; i++) {
                const uint64_t index = indices[i - first];
                if (index >= rows.num_rows) [[unlikely]] return reader.note_fault(i);
                const TrellisRow row(rows.bytes + index * row_bytes, row_bytes);
                const F32x16 scale = read_trellis_scale(scales, rows.bytes[(index + 1) * row_bytes - 1]);
                if (prefetches)
                    prefetch_row(rows, indices[smaller(i - first + reader.rows_ahead, reader.num_indices - 1)]);
                uint8_t* const to = out.values + i * out.row_bytes;
                for (size_t block = 0; block < count; block += 64) {
                    TrellisSubsets subsets(row.bytes, (start + block) / 8, room);
                    for (size_t j = block; j < smaller(count, block + 64); j += 16) {
                        const TrellisColumns& of = columns[j / 16];
                        const F32x16 found =
                            levels(row.bytes + of.window, of, static_cast<uint32_t>(subsets.c1 & 0xffff),
                                   static_cast<uint32_t>(subsets.c0 & 0xffff));
                        store_values(to, out.type, start + j, fma(scale, found, load(of.mean)), smaller(count - j, 16));
                        subsets.c1 >>= 16;
                        subsets.c0 >>= 16;
                    }
                }
            }
        }
    }
}

// pool_tile, for rows of this layout. The job's first code is its first column.
template <class Join, class Levels, size_t vectors, bool has_last, bool prefetches>
[[gnu::noinline]] bool pool_trellis_tile(const RowReader& reader, TileJob job) {
    constexpr size_t all_vectors = vectors + has_last;
    const PackedRows rows = reader.rows;
    const TrellisShape shape(rows.embedding_dim, rows.row_bytes);
    TrellisColumns columns[all_vectors];
    find_columns(rows, job.first_code, smaller(16 * all_vectors, rows.embedding_dim - job.first_code), columns);
    const Levels levels(rows.codebooks, shape);
    const uint8_t* const scales = rows.codebooks + sizeof(float) * shape.num_levels();
    const size_t row_bytes = rows.row_bytes, room = trellis_room(row_bytes), first_message = job.first_code / 8;
    const uint64_t* const indices = reader.indices;
    const size_t rows_ahead = reader.rows_ahead, num_indices = reader.num_indices;
    size_t i = reader.starts[job.first_bag];
    for (size_t bag = job.first_bag; bag < job.end_bag; bag++) {
        Sums<all_vectors> sums;
        sums.change([&](size_t v, F32x16) { return load(job.start + 16 * v); });
        const size_t rows_of_bag = job.rows_before + reader.starts[bag + 1] - i;
        for (const size_t end = reader.starts[bag + 1]; i < end; i++) {
            const uint64_t index = indices[i];
            if (index >= rows.num_rows) [[unlikely]] return false;
            if constexpr (prefetches) prefetch_row(rows, indices[smaller(i + rows_ahead, num_indices - 1)]);
            const Join join(reader.weights, i);
            const uint8_t* const bytes = rows.bytes + index * row_bytes;
            const TrellisRow row(bytes, row_bytes);
            const F32x16 scale = read_trellis_scale(scales, bytes[row_bytes - 1]);
            unrolled<(all_vectors + 3) / 4>([&](size_t block) __attribute__((always_inline)) {
                const TrellisSubsets subsets(row.bytes, first_message + 8 * block, room);
                unrolled<4>([&](size_t k) __attribute__((always_inline)) {
                    const size_t v = 4 * block + k;
                    if (v >= all_vectors) return;
                    const TrellisColumns& of = columns[v];
                    const F32x16 found = levels(row.bytes + of.window, of,
                                                static_cast<uint32_t>(subsets.c1 >> 16 * k & 0xffff),
                                                static_cast<uint32_t>(subsets.c0 >> 16 * k & 0xffff));
                    sums.vector[v] = join(sums.vector[v], fma(scale, found, load(of.mean)));
                });
            });
        }
        if (job.ends_bags) [[likely]] {
            if (reader.bags.pooling == Pooling::mean) {
                const F32x16 divisor = splat(static_cast<float>(rows_of_bag));
                sums.change([&](size_t, F32x16 sum) { return div(sum, divisor); });
            }
            if (rows_of_bag == 0) [[unlikely]] sums.change([](size_t, F32x16) { return splat(0.0f); });
        }
        unrolled<vectors>([&](size_t v) { store(job.to + 16 * v, sums.vector[v]); });
        if constexpr (has_last) store_first(job.to + 16 * vectors, sums.vector[vectors], job.last_columns);
        job.to += job.stride;
    }
    return true;
}

template <class Join, class Levels, size_t vectors = most_sums>
PoolTileFn find_pool_trellis_tile(TileShape tile, bool prefetches) {
    if constexpr (vectors > 0)
        if (tile.vectors < vectors) return find_pool_trellis_tile<Join, Levels, vectors / 2>(tile, prefetches);
    if constexpr (vectors < most_sums)
        if (vectors == 0 || tile.last_columns > 0)
            return prefetches ? pool_trellis_tile<Join, Levels, vectors, true, true>
                              : pool_trellis_tile<Join, Levels, vectors, true, false>;
    if constexpr (vectors > 0)
        return prefetches ? pool_trellis_tile<Join, Levels, vectors, false, true>
                          : pool_trellis_tile<Join, Levels, vectors, false, false>;
}

template <class Join>
inline void pool_trellis_bags_by(RowReader& reader, size_t first, size_t end, const Output& out) {
    with_trellis_levels(reader.rows, [&]<class Levels>(Type<Levels>) {
        Pooler(reader, out, find_pool_trellis_tile<Join, Levels>, Join::start.values).pool(first, end);
    });
}

inline void pool_trellis_bags(RowReader& reader, size_t first, size_t end, const Output& out) {
    if (reader.bags.pooling == Pooling::max) return pool_trellis_bags_by<KeepLargestLevels>(reader, first, end, out);
    if (reader.bags.per_sample_weights) return pool_trellis_bags_by<AddWeightedLevels>(reader, first, end, out);
    pool_trellis_bags_by<AddLevels>(reader, first, end, out);
}
