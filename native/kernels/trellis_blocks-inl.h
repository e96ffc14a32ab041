// Trellis-coded rows, from bytes to levels, block by block. docs/trellis.md says what the codes mean,
// src/embpack/layouts/trellis.py is the specification. This file has what all instruction sets share;
// isa/*_trellis-inl.h have the steps that differ, trellis_lookup-inl.h and trellis_linear-inl.h what becomes of levels.
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
// lookup: TrellisCommon, and ColumnBlock for each block of a stripe, 64 of them at most.
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
//     Levels::Fours<columns, Block>       in place of the last two, where an instruction set reads full blocks, of 64
//                                         columns or 32, of four rows at a time (avx2_trellis_fours-inl.h)
//     known_dim<Levels>                   embedding_dim, if Levels are for rows of one full block alone; otherwise 0
//     known_block<Levels>(block)          the block as `Block`, see above
//
// trellis_numbers-inl.h supplies with_known_levels, make_trellis_numbers, BlockLookup and the last two for those that add
// up the bits of numbers one after the other: all but GFNI. It says what it needs for that.

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

// Columns of a stripe at most. What is known of its blocks lies on the stack, so wider rows are read stripe by stripe.
inline constexpr size_t most_stripe_columns = 4096;

// What all rows of a table have in common in a stripe, found once for a lookup.
struct TrellisCommon {
    const size_t first_column, end_column;
    TrellisShape shape;
    AllTrellisLevels levels;
    WideVectors wide;
    ColumnBlock blocks[most_stripe_columns / trellis_block];

    explicit TrellisCommon(const PackedRows& rows, size_t first_column)
        : first_column(first_column),
          end_column(smaller(rows.embedding_dim, first_column + most_stripe_columns)),
          shape(rows.embedding_dim, rows.row_bytes),
          levels(rows.codebooks, shape) {
        for (size_t j = first_column; j < end_column; j += trellis_block) {
            ColumnBlock& block = blocks[(j - first_column) / trellis_block];
            block.find(rows, shape, j / trellis_block);
            if (j == first_column) wide.count = block.wide_vectors;
            if (block.wide_vectors != wide.count) wide.are_alike = false;
        }
    }

    const ColumnBlock* block_at(size_t column) const { return blocks + (column - first_column) / trellis_block; }
    bool is_first() const { return first_column == 0; }
    bool is_last() const { return end_column == shape.embedding_dim; }
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

// Whether an instruction set reads full blocks of rows with these levels by fours.
template <class Levels>
inline constexpr bool are_made_by_fours = requires { typename Levels::template Fours<trellis_block, ColumnBlock>; };
