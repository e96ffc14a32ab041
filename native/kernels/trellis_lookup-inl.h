// Lookups of trellis-coded rows. docs/trellis.md says what the codes mean, src/embpack/layouts/trellis.py is the
// specification. This file has what all instruction sets share; isa/*_trellis-inl.h have the steps that differ.
//
// HOW A ROW LIES. Its columns are cut into blocks of 64. Column c of a block belongs to vector v = c / 16, lane
// i = c % 16, and has position p = 4 i + v. So four neighbouring positions are one lane of four vectors:
//
//     position    0   1   2   3 |  4   5   6   7 | .. | 60  61  62  63
//     column      0  16  32  48 |  1  17  33  49 | .. | 15  31  47  63
//     lane              0       |       1        | .. |       15
//
// A *plane* is one bit of every column of a block, in ascending positions. A row of 64 columns in 36 bytes, where
// narrow codes have 4 bits (a message bit and a 3-bit index u) and 24 columns have wide codes, of 5 bits:
//
//     bytes  0 ..  7   plane 0: bit p is the message bit m of position p
//            8 .. 15   plane 1: bit p is bit 0 of the index u of position p
//           16 .. 23   plane 2: bit 1 of the indices
//           24 .. 31   plane 3: bit 2 of the indices
//           32 .. 34   top bits: bit 3 of the 24 wide indices, in ascending positions, without gaps
//           35         the number of the scale; its bits 3 .. 7 are the messages before the first, m[-5] .. m[-1]
//
// Wider rows have the planes of one block after those of the other, then the top bits of all blocks. A block of n < 64
// columns has planes of n bits without gaps, which may begin and end inside a byte.
//
// THE LIFE OF A ROW, for each of its blocks. A number has one byte, and byte p of a register is that of position p:
//
//     bytes   -> planes    one word each: read_word, BitRun
//     plane 0 -> subsets   2 c1 + c0, bit p of each a bit of position p: two more words, by shifts of plane 0: Subsets
//                          (GFNI: find_subsets)
//     planes  -> numbers   number = c0 + 2 c1 + 4 u, which of its codebook's levels a column has: make_trellis_numbers
//     numbers -> levels    a vector of 16 floats at a time: BlockLookup::look_up
//     levels  -> values    fma(scale, level, mean)
//     values  -> output    added to a bag's sums (pool_trellis_tile), or stored (store_trellis_block)
//
// From a row's address to its sum each step waits for the one before, and a row takes longer that way than the CPU
// looks ahead. Where there are registers for it, pool_trellis_tile therefore makes the numbers of a row
// `trellis_rows_early` rows before it adds the values. What is the same in all rows of a table is found once for a
// lookup: TrellisCommon, and ColumnBlock for each block.
//
// TEMPLATE PARAMETERS, of many functions here and in isa/:
//
//     vectors   vectors of 16 columns that a tile, or a block, has
//     slots     positions of a lane. 4 as above; blocks of at most 32 or 16 columns have 2 or 1 where the instruction
//               set gains by it. Then p = slots * i + v, and a full plane has 16 * slots bits.
//     is_full   whether the block is known to have a column at each of its 16 * slots positions. Then bit p of a plane
//               is position p; otherwise bits have to be spread to the positions that there are (BitPositions).
//     Levels    how levels are looked up, by how many there are: FewLevels (narrow codes have up to 4 bits), SomeLevels
//               (5 bits), ManyLevels (6 and 7 bits, and whatever an instruction set has no better way for)
//     Block     ColumnBlock, or a type with the members of it that are known when this is compiled (GFNI: OnlyBlock)
//     Join      how values join a bag's sums (tile-inl.h)
//
// WHAT AN INSTRUCTION SET SUPPLIES, in isa/*_trellis-inl.h:
//
//     least_slots            the fewest positions of a lane that it has code for: 1, 2 or 4
//     most_trellis_sums      vectors of sums that stay in registers: the widest tile
//     trellis_rows_early     rows whose numbers are made before they are needed
//     most_means_kept        tiles of at most so many vectors keep the mean in registers, too
//     BitPositions(mask)     positions that a packed run of bits belongs to
//     TrellisNumbers<slots>  the number of each position of a block
//     FewLevels, SomeLevels, ManyLevels   as many of them as it needs; each is made of AllTrellisLevels
//     with_trellis_levels(shape, use)     calls use<Levels>() with the Levels for rows of this shape
//     with_known_levels(shape, wide, use) the same for sums without weights, by Levels that are compiled for this shape
//                                         or few others; false if there are none
//     make_trellis_numbers<is_full, slots>(row, block, levels, read) -> TrellisNumbers<slots>; read(k) is plane k
//     BlockLookup<slots>(block)           what look_up needs of a block beside the numbers, found once for many rows
//         .look_up(levels, block, numbers) -> a function of v: the levels of vector v
//     known_dim<Levels>                   embedding_dim, if Levels are for rows of one full block alone; otherwise 0
//     known_block<Levels>(block)          the block as `Block`, see above
//
// trellis_numbers-inl.h supplies with_known_levels and the last four for those that add up the bits of numbers one after the other: all but
// GFNI. It says what it needs for that.

// A row of which words can be read: one shorter than a word is copied, with zeros after it. `is_long`: whether rows are
// known to have the bytes of a word.
template <bool is_long>
struct TrellisRow {
    const uint8_t* bytes;
    uint8_t copy[trellis_word];

    [[gnu::always_inline]] TrellisRow(const uint8_t* row, size_t row_bytes) : bytes(row) {
        if (is_long || row_bytes >= trellis_word) [[likely]] return;
        std::memset(copy, 0, sizeof copy);
        for (size_t i = 0; i < row_bytes; i++) copy[i] = row[i];
        bytes = copy;
    }
    TrellisRow(const TrellisRow&) = delete;
};

// Where up to 64 bits lie in a row: from bit `shift` on of the eight bytes at byte `at`, and, if the run crosses their
// end, in the byte after them. The word that is read may have other bits of the row above the run's.
struct BitRun {
    size_t at;
    uint32_t shift;
    bool crosses;

    BitRun() = default;
    BitRun(size_t first_bit, size_t count, size_t row_bytes) {
        const size_t last_at = (row_bytes < trellis_word ? trellis_word : row_bytes) - trellis_word;
        at = smaller(first_bit / 8, last_at);
        shift = static_cast<uint32_t>(first_bit - 8 * at);
        crosses = shift + count > 64;
    }
    [[gnu::always_inline]] uint64_t operator()(const uint8_t* row) const {
        uint64_t word = first_word(row);
        if (crosses) [[unlikely]] word |= static_cast<uint64_t>(row[at + 8]) << (64 - shift);
        return word;
    }
    // Without the byte after the word, which a run of at most 57 bits never reaches.
    [[gnu::always_inline]] uint64_t first_word(const uint8_t* row) const {
        uint64_t word;
        std::memcpy(&word, row + at, sizeof word);
        return word >> shift;
    }
};

// A block of columns, as it lies in every row of the table.
struct ColumnBlock {
    // By column, 0 after the last one.
    alignas(64) float mean[trellis_block];
    alignas(64) int32_t wide_columns[trellis_block];   // -1, all bits set, where the code is wide; 0 elsewhere
    uint16_t wide_lanes[trellis_vectors];              // the same, as a mask of the lanes of each vector
    size_t wide_vectors;             // vectors before this one may have wide codes, those from it on have none
    bool starts_wide;                // whether all codes of vector 0 are wide
    size_t index_planes;             // planes without plane 0: bits of a narrow code's index
    BitPositions present, is_wide;   // positions that have a column, and that have a wide code
    BitRun planes[trellis_most_bits], top_bits;
    size_t first_byte;               // where plane 0 begins: after full blocks, so it is a whole byte
    size_t word_bytes;               // bytes of a plane, if they are whole; otherwise 0
    size_t byte_before;              // byte of the row whose bits 3 .. 7 are the five messages before the block
    size_t row_bytes;

    // The top bits, if they are known to be at most 57.
    [[gnu::always_inline]] uint64_t first_top_bits(const uint8_t* row) const { return top_bits.first_word(row); }

    [[gnu::noinline]] void find(const PackedRows& rows, const TrellisShape& shape, size_t number) {
        const TrellisBlock geometry(shape, number, slots_of(shape.embedding_dim - trellis_block * number));
        std::memset(mean, 0, sizeof mean);
        std::memcpy(mean, rows.codebooks + sizeof(float) * (shape.first_mean() + trellis_block * number),
                    sizeof(float) * geometry.num_columns);
        wide_vectors = 0;
        for (size_t v = 0; v < trellis_vectors; v++) {
            wide_lanes[v] = geometry.wide_lanes[v];
            if (wide_lanes[v]) wide_vectors = v + 1;
            for (size_t i = 0; i < trellis_lanes; i++)
                wide_columns[trellis_lanes * v + i] = -static_cast<int32_t>(wide_lanes[v] >> i & 1u);
        }
        starts_wide = wide_lanes[0] == 0xffff;
        index_planes = shape.narrow_bits - 1;
        present = BitPositions(geometry.present);
        is_wide = BitPositions(geometry.is_wide);
        for (size_t k = 0; k <= index_planes; k++)
            planes[k] = BitRun(geometry.first_bit + geometry.num_columns * k, geometry.num_columns, rows.row_bytes);
        top_bits = BitRun(geometry.first_wide_bit, static_cast<size_t>(__builtin_popcountll(geometry.is_wide)),
                          rows.row_bytes);
        first_byte = geometry.first_bit / 8;
        word_bytes = geometry.num_columns % 8 == 0 ? geometry.num_columns / 8 : 0;
        row_bytes = rows.row_bytes;
        // The scale's number; or the last byte of plane 0 of the block before, which is full and ends at first_byte.
        byte_before = number == 0 ? rows.row_bytes - 1 : first_byte - trellis_block / 8 * index_planes - 1;
    }
};

// What all rows of a table have in common, found once for a lookup.
struct TrellisCommon {
    TrellisShape shape;
    AllTrellisLevels levels;
    WideVectors wide;
    ColumnBlock blocks[trellis_most_dim / trellis_block];

    explicit TrellisCommon(const PackedRows& rows)
        : shape(rows.embedding_dim, rows.row_bytes), levels(rows.codebooks, shape) {
        for (size_t j = 0; j < rows.embedding_dim; j += trellis_block) {
            ColumnBlock& block = blocks[j / trellis_block];
            block.find(rows, shape, j / trellis_block);
            if (j == 0) wide.count = block.wide_vectors;
            if (block.wide_vectors != wide.count) wide.are_alike = false;
        }
    }
};

struct TrellisReader : RowReader {
    const TrellisCommon common;

    TrellisReader(const PackedRows& rows, const Bags& bags, size_t first, size_t end, bool are_read_once,
                  LookupFault& fault)
        : RowReader(rows, bags, first, end, are_read_once, fault), common(rows) {}
};

// Plane k of full planes, of 16 * slots bits each.
template <size_t slots>
[[gnu::always_inline]] inline uint64_t read_word(const uint8_t* planes, size_t k) {
    uint64_t word = 0;
    std::memcpy(&word, planes + 2 * slots * k, 2 * slots);
    return word;
}

// The numbers of a block's levels. Planes of 64, 32 and 16 columns are whole words; others begin anywhere.
template <bool is_full, size_t vectors, class Block, class Levels>
[[gnu::always_inline]] inline auto find_trellis_numbers(const uint8_t* row, const Block& block, const Levels& levels) {
    const auto read_plane = [&](size_t k) __attribute__((always_inline)) {
        if constexpr (is_full) {
            return read_word<slots_of(trellis_lanes * vectors)>(row + block.first_byte, k);
        } else {
            if (block.word_bytes == 4) return read_word<2>(row + block.first_byte, k);
            if (block.word_bytes == 2) return read_word<1>(row + block.first_byte, k);
            return block.planes[k](row);
        }
    };
    return make_trellis_numbers<is_full, slots_of(trellis_lanes * vectors)>(row, block, levels, read_plane);
}

inline F32x16 read_trellis_scale(const uint8_t* scales, uint8_t number) {
    float scale;
    std::memcpy(&scale, scales + sizeof(float) * number, sizeof scale);
    return splat(scale);
}

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
        for (size_t j = 0; j < rows.embedding_dim; j += trellis_block) {
            const ColumnBlock& block = common.blocks[j / trellis_block];
            const size_t num_columns = rows.embedding_dim - j;
            if (num_columns >= trellis_block)
                store_trellis_block<Levels, true, trellis_vectors>(reader, block, levels, first, stop, j, out);
            else if (slots_of(num_columns) == 1)
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
    const ColumnBlock* const blocks = reader.common.blocks + job.first_code / trellis_block;
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

void gather_trellis_rows(const PackedRows& rows, const Integers& indices, bool prefetches, size_t first, size_t end,
                         const Output& out, LookupFault& fault) noexcept {
    const Bags bags{.indices = indices, .prefetches = prefetches};
    TrellisReader reader(rows, bags, first, end, true, fault);
    write_clipped(out, [&](const Output& to) {
        with_trellis_levels(reader.common.shape, [&]<class Levels>() { store_trellis_rows<Levels>(reader, first, to); });
    });
}

void pool_trellis_bags(const PackedRows& rows, const Bags& bags, size_t first, size_t end, const Output& out,
                       LookupFault& fault) noexcept {
    const bool are_read_once = first_trellis_tile(rows.embedding_dim).num_columns() == rows.embedding_dim;
    TrellisReader reader(rows, bags, bags.start(first), bags.start(end), are_read_once, fault);
    const Tiles<TrellisReader> tiles = find_trellis_tiles(reader);
    write_clipped(out, [&](const Output& to) { Pooler(reader, to, tiles).pool(first, end); });
}
