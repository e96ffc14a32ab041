// Reading trellis-coded rows, a block of 64 columns at a time: a bit of each column is a word, and which subsets their
// levels are of is told by shifts of one. What a block is, is found once for many rows.

// A row that words can be read from. One with a full block has them.
template <bool has_full_block>
struct TrellisRow {
    const uint8_t* bytes;
    uint8_t copy[trellis_word];

    [[gnu::always_inline]] TrellisRow(const uint8_t* row, size_t row_bytes) : bytes(row) {
        if (has_full_block || row_bytes >= trellis_word) [[likely]] return;
        std::memset(copy, 0, sizeof copy);
        for (size_t i = 0; i < row_bytes; i++) copy[i] = row[i];
        bytes = copy;
    }
    TrellisRow(const TrellisRow&) = delete;
};

// Up to 64 bits of a row; above them may be others.
struct TrellisBits {
    size_t at;
    uint32_t shift;
    bool crosses;   // a word

    TrellisBits() = default;
    TrellisBits(size_t first_bit, size_t count, size_t row_bytes) {
        const size_t last = (row_bytes < trellis_word ? trellis_word : row_bytes) - trellis_word;
        at = smaller(first_bit / 8, last);
        shift = static_cast<uint32_t>(first_bit - 8 * at);
        crosses = shift + count > 64;
    }
    [[gnu::always_inline]] uint64_t operator()(const uint8_t* row) const {
        uint64_t word = first_word(row);
        if (crosses) [[unlikely]] word |= static_cast<uint64_t>(row[at + 8]) << (64 - shift);
        return word;
    }
    // Those of the first word: all, if they are at most 57.
    [[gnu::always_inline]] uint64_t first_word(const uint8_t* row) const {
        uint64_t word;
        std::memcpy(&word, row + at, sizeof word);
        return word >> shift;
    }
};

// What rows have in common in a block.
struct TrellisColumns {
    alignas(64) float mean[trellis_block];
    alignas(64) int32_t wide_columns[trellis_block];   // all bits set of those that have the longer codes
    uint16_t wide_lanes[trellis_vectors];
    size_t wide_vectors;          // so many vectors have any
    bool starts_wide;             // whether the first has no others
    size_t planes;                // bits of an index, without the top bits
    BitPositions present, is_wide;
    TrellisBits bits[trellis_most_bits], top_bits;   // message bits, then the planes
    size_t first_byte, word_bytes;   // where words begin, and their bytes, if they are whole
    size_t before;                // byte of the message bits before the block
    size_t row_bytes;

    // The top bits, where they are at most 57.
    [[gnu::always_inline]] uint64_t first_top_bits(const uint8_t* row) const { return top_bits.first_word(row); }

    [[gnu::noinline]] void find(const PackedRows& rows, const TrellisShape& shape, size_t number) {
        const TrellisBlock block(shape, number, slots_of(shape.embedding_dim - trellis_block * number));
        std::memset(mean, 0, sizeof mean);
        std::memcpy(mean, rows.codebooks + sizeof(float) * (shape.first_mean() + trellis_block * number),
                    sizeof(float) * block.num_columns);
        wide_vectors = 0;
        for (size_t v = 0; v < trellis_vectors; v++) {
            wide_lanes[v] = block.wide_lanes[v];
            if (wide_lanes[v]) wide_vectors = v + 1;
            for (size_t i = 0; i < trellis_lanes; i++)
                wide_columns[trellis_lanes * v + i] = -static_cast<int32_t>(wide_lanes[v] >> i & 1u);
        }
        starts_wide = wide_lanes[0] == 0xffff;
        planes = shape.narrow_bits - 1;
        present = BitPositions(block.present);
        is_wide = BitPositions(block.is_wide);
        for (size_t k = 0; k <= planes; k++)
            bits[k] = TrellisBits(block.first_bit + block.num_columns * k, block.num_columns, rows.row_bytes);
        top_bits = TrellisBits(block.first_wide_bit, static_cast<size_t>(__builtin_popcountll(block.is_wide)),
                               rows.row_bytes);
        first_byte = block.first_bit / 8;
        word_bytes = block.num_columns % 8 == 0 ? block.num_columns / 8 : 0;
        row_bytes = rows.row_bytes;
        before = number == 0 ? rows.row_bytes - 1 : first_byte - trellis_block / 8 * planes - 1;
    }
};

// All that rows have in common, found once for a lookup.
struct TrellisCommon {
    TrellisShape shape;
    AllTrellisLevels levels;
    WideVectors wide;
    TrellisColumns columns[trellis_most_dim / trellis_block];

    explicit TrellisCommon(const PackedRows& rows)
        : shape(rows.embedding_dim, rows.row_bytes), levels(rows.codebooks, shape) {
        for (size_t j = 0; j < rows.embedding_dim; j += trellis_block) {
            TrellisColumns& of = columns[j / trellis_block];
            of.find(rows, shape, j / trellis_block);
            if (j == 0) wide.count = of.wide_vectors;
            if (of.wide_vectors != wide.count) wide.are_alike = false;
        }
    }
};

struct TrellisReader : RowReader {
    const TrellisCommon common;

    TrellisReader(const PackedRows& rows, const Bags& bags, size_t first, size_t end, bool are_read_once,
                  LookupFault& fault)
        : RowReader(rows, bags, first, end, are_read_once, fault), common(rows) {}
};

// Word k, of two bytes for each slot.
template <size_t slots>
[[gnu::always_inline]] inline uint64_t read_word(const uint8_t* words, size_t k) {
    uint64_t word = 0;
    std::memcpy(&word, words + 2 * slots * k, 2 * slots);
    return word;
}

// The numbers of a block's levels. Of a full one, and of a half or a quarter, all bits lie in words; where `is_full`,
// they lie where positions are.
template <bool is_full, size_t vectors, class Columns, class Levels>
[[gnu::always_inline]] inline auto find_trellis_numbers(const uint8_t* row, const Columns& of, const Levels& levels) {
    const auto read = [&](size_t k) __attribute__((always_inline)) {
        if constexpr (is_full) {
            return read_word<slots_of(trellis_lanes * vectors)>(row + of.first_byte, k);
        } else {
            if (of.word_bytes == 4) return read_word<2>(row + of.first_byte, k);
            if (of.word_bytes == 2) return read_word<1>(row + of.first_byte, k);
            return of.bits[k](row);
        }
    };
    return make_trellis_numbers<is_full, slots_of(trellis_lanes * vectors)>(row, of, levels, read);
}

// The number of a row's scale is its last byte.
inline F32x16 read_trellis_scale(const uint8_t* scales, uint8_t number) {
    float scale;
    std::memcpy(&scale, scales + sizeof(float) * number, sizeof scale);
    return splat(scale);
}

template <class Levels, bool is_full, size_t vectors>
inline void store_trellis_block(const TrellisReader& reader, const TrellisColumns& of, const Levels& levels, size_t first,
                                size_t stop, size_t j, const Output& out) {
    const PackedRows rows = reader.rows;
    const uint8_t* const scales = rows.codebooks + sizeof(float) * reader.common.shape.first_scale();
    const size_t row_bytes = rows.row_bytes, num_columns = smaller(rows.embedding_dim - j, trellis_block);
    const LevelsOfBlock<slots_of(trellis_lanes * vectors)> levels_of_block(of);
    const bool prefetches = reader.bags.prefetches && j == 0;
    for (size_t i = first; i < stop; i++) {
        const uint64_t index = reader.indices[i - first];
        const uint8_t* const bytes = rows.bytes + index * row_bytes;
        const TrellisRow<is_full> row(bytes, row_bytes);
        const F32x16 scale = read_trellis_scale(scales, bytes[row_bytes - 1]);
        if (prefetches)
            prefetch_row(rows, reader.indices[smaller(i - first + reader.rows_ahead, reader.num_indices - 1)]);
        uint8_t* const to = out.values + i * out.row_bytes;
        const auto numbers = find_trellis_numbers<is_full, vectors>(row.bytes, of, levels);
        const auto of_vector = levels_of_block.look_up(levels, of, numbers);
        unrolled<vectors>([&](size_t v) {
            const size_t column = trellis_lanes * v;
            if (!is_full && column >= num_columns) return;
            const size_t count = is_full ? trellis_lanes : smaller(num_columns - column, trellis_lanes);
            const F32x16 values = fma(scale, of_vector(v), load(of.mean + column));
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
        for (size_t j = 0; j < rows.embedding_dim; j += trellis_block) {
            const TrellisColumns& of = common.columns[j / trellis_block];
            const size_t num_columns = rows.embedding_dim - j;
            if (num_columns >= trellis_block)
                store_trellis_block<Levels, true, trellis_vectors>(reader, of, levels, first, stop, j, out);
            else if (slots_of(num_columns) == 1)
                store_trellis_block<Levels, false, 1>(reader, of, levels, first, stop, j, out);
            else if (slots_of(num_columns) == 2)
                store_trellis_block<Levels, false, 2>(reader, of, levels, first, stop, j, out);
            else
                store_trellis_block<Levels, false, trellis_vectors>(reader, of, levels, first, stop, j, out);
        }
    }
}

// pool_tile, for rows of this layout. The job's first code is its first column.
template <class Join, class Levels, size_t vectors, bool is_full>
[[gnu::noinline]] bool pool_trellis_tile(const TrellisReader& reader, TileJob job) {
    constexpr size_t blocks = (vectors + trellis_vectors - 1) / trellis_vectors;
    constexpr size_t vectors_of_block = smaller(vectors, trellis_vectors);
    const TrellisColumns* const columns = reader.common.columns + job.first_code / trellis_block;
    PackedRows rows = reader.rows;
    rows.row_bytes = known_columns<Levels>(*columns).row_bytes;   // a constant, where it is known
    const Levels levels(reader.common.levels);
    const auto find_numbers = [&](const uint8_t* row, size_t k) __attribute__((always_inline)) {
        return find_trellis_numbers<is_full, vectors_of_block>(row, known_columns<Levels>(columns[k]), levels);
    };
    struct Row {
        F32x16 scale;
        decltype(find_numbers(nullptr, 0)) numbers[blocks];
    };
    const uint8_t* scales = rows.codebooks + sizeof(float) * reader.common.shape.first_scale();
    asm("" : "+r"(scales));   // Or GCC adds both up for each row.
    const size_t row_bytes = rows.row_bytes;
    const uint64_t* const indices = reader.indices;
    const size_t* const starts = reader.starts;
    const size_t last = starts[job.end_bag];
    const bool prefetches = prefetches_rows(reader, job);
    const uint64_t* const indices_ahead = prefetches ? indices + reader.rows_ahead : indices;
    const size_t last_ahead = prefetches ? reader.num_indices - reader.rows_ahead - 1 : 0;
    const auto read = [&](size_t i, Row& row) __attribute__((always_inline)) {
        const uint64_t index = indices[i < last ? i : last - 1];
        if (index >= rows.num_rows) [[unlikely]] return false;
        const uint8_t* const bytes = rows.bytes + index * row_bytes;
        const TrellisRow<is_full && (vectors > 1)> whole(bytes, row_bytes);
        row.scale = read_trellis_scale(scales, bytes[row_bytes - 1]);
        unrolled<blocks>(
            [&](size_t k) __attribute__((always_inline)) { row.numbers[k] = find_numbers(whole.bytes, k); });
        return true;
    };
    using OfBlock = LevelsOfBlock<slots_of(trellis_lanes * vectors_of_block)>;
    OfBlock levels_of[blocks];
    unrolled<blocks>([&](size_t k) __attribute__((always_inline)) { levels_of[k] = OfBlock(columns[k]); });
    F32x16 means[vectors];
    unrolled<vectors>([&](size_t v) __attribute__((always_inline)) {
        means[v] = load(columns[v / trellis_vectors].mean + trellis_lanes * (v % trellis_vectors));
        if constexpr (vectors <= most_means_kept) stay_in_register(means[v]);
    });
    // As in pool_tile; there are registers for so many.
    constexpr size_t most_early = vectors < trellis_vectors ? 1 : trellis_rows_early / blocks;
    constexpr size_t rows_early = smaller(trellis_rows_early, most_early);
    size_t i = starts[job.first_bag];
    Row ahead[rows_early + 1];
    bool are_found = true;
    if (i < last) unrolled<rows_early>([&](size_t k) { are_found = are_found && read(i + k, ahead[k]); });
    if (!are_found) return false;
    for (size_t bag = job.first_bag; bag < job.end_bag; bag++) {
        Sums<vectors> sums;
        sums.change([&](size_t v, F32x16) { return load(job.start + 16 * v); });
        if (prefetches)
            unrolled<vectors>([&](size_t v) { __builtin_prefetch(job.to + bags_ahead * job.stride + 16 * v, 1); });
        const size_t rows_of_bag = job.rows_before + starts[bag + 1] - i;
        for (const size_t end = starts[bag + 1]; i < end; i++) {
            if (!read(i + rows_early, ahead[rows_early])) [[unlikely]] return false;
            if (prefetches) prefetch_row(rows, indices_ahead[smaller(i, last_ahead)]);
            const Join join(reader.weights, i);
            const F32x16 scale = ahead[0].scale;
            unrolled<blocks>([&](size_t k) __attribute__((always_inline)) {
                const auto& of = known_columns<Levels>(columns[k]);
                const auto of_vector = levels_of[k].look_up(levels, of, ahead[0].numbers[k]);
                unrolled<vectors_of_block>([&](size_t v) __attribute__((always_inline)) {
                    const size_t at = trellis_vectors * k + v;
                    sums.vector[at] = join(sums.vector[at], fma(scale, of_vector(v), means[at]));
                });
            });
            unrolled<rows_early>([&](size_t k) { ahead[k] = ahead[k + 1]; });
        }
        if (job.ends_bags) [[likely]] sums.finish_bag(reader.bags.pooling, rows_of_bag);
        constexpr size_t whole = is_full ? vectors : vectors - 1;
        unrolled<whole>([&](size_t v) { store(job.to + 16 * v, sums.vector[v]); });
        if constexpr (!is_full) {
            if (job.last_columns == 0)
                store(job.to + 16 * whole, sums.vector[whole]);
            else
                store_first(job.to + 16 * whole, sums.vector[whole], job.last_columns);
        }
        job.to += job.stride;
    }
    return true;
}

// The first tile of so many columns: whole blocks, or a block that is not full.
inline TileShape first_trellis_tile(size_t num_columns) {
    const size_t most_blocks = most_trellis_sums / trellis_vectors;
    const size_t blocks = smaller(largest_power_within(num_columns / trellis_block), most_blocks);
    if (blocks > 0) return {blocks * trellis_vectors, 0};
    return {num_columns / trellis_lanes, num_columns % trellis_lanes};
}

inline size_t first_trellis_code(const PackedRows&, size_t column) { return column; }

template <class Join, class Levels, size_t vectors = most_trellis_sums>
Tiles<TrellisReader>::PoolFn find_pool_trellis_tile(TileShape tile, bool prefetches) {
    if constexpr (known_dim<Levels> > 0) {
        return pool_trellis_tile<Join, Levels, known_dim<Levels> / trellis_lanes, true>;
    } else {
        const size_t needed = tile.vectors + (tile.last_columns > 0);
        constexpr bool can_be_full = slots_of(trellis_lanes * vectors) == vectors;
        if constexpr (vectors > 1)
            if (needed < vectors)
                return find_pool_trellis_tile<Join, Levels, vectors <= trellis_vectors ? vectors - 1 : vectors / 2>(
                    tile, prefetches);
        if constexpr (vectors > trellis_vectors) return pool_trellis_tile<Join, Levels, vectors, true>;
        if constexpr (can_be_full)
            if (tile.last_columns == 0) return pool_trellis_tile<Join, Levels, vectors, true>;
        if constexpr (vectors <= trellis_vectors) return pool_trellis_tile<Join, Levels, vectors, false>;
    }
}

template <class Join, class Levels>
inline constexpr Tiles<TrellisReader> trellis_tiles_of{first_trellis_tile, first_trellis_code,
                                                       find_pool_trellis_tile<Join, Levels>};

// Levels of which more is known have code of their own where all that is done is to add.
inline Tiles<TrellisReader> find_trellis_tiles(const TrellisReader& reader) {
    Tiles<TrellisReader> tiles;
    if (reader.bags.per_sample_weights ||
        !with_known_levels(reader.common.shape, reader.common.wide,
                           [&]<class Levels>() { tiles = trellis_tiles_of<AddLevels, Levels>; }))
        with_trellis_levels(reader.common.shape,
                            [&]<class Levels>() { tiles = trellis_tiles_of<AddWeightedLevels, Levels>; });
    return tiles;
}

void gather_trellis_rows(const PackedRows& rows, const Integers& indices, bool prefetches, size_t first, size_t end,
                         const Output& out, LookupFault& fault) noexcept {
    const Bags bags{.indices = indices, .prefetches = prefetches};
    TrellisReader reader(rows, bags, first, end, true, fault);
    with_trellis_levels(reader.common.shape, [&]<class Levels>() { store_trellis_rows<Levels>(reader, first, out); });
}

void pool_trellis_bags(const PackedRows& rows, const Bags& bags, size_t first, size_t end, const Output& out,
                       LookupFault& fault) noexcept {
    const bool are_read_once = first_trellis_tile(rows.embedding_dim).num_columns() == rows.embedding_dim;
    TrellisReader reader(rows, bags, bags.start(first), bags.start(end), are_read_once, fault);
    Pooler(reader, out, find_trellis_tiles(reader)).pool(first, end);
}
