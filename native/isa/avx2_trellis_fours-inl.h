// Blocks of 64 columns, or 32, of trellis-coded rows with AVX2, for rows with narrow codes of up to 4 bits. A block is
// read in two steps. First the words of four rows' blocks at once, a row in each quarter of a register: from planes to
// nibbles. What comes out goes to memory. Some rows later the nibbles of one block become its levels, by bytes.
//
// THE FIRST STEP. H is the highest plane of the index, top a word with the top bits at their positions, wide a word
// with the positions of wide codes. A level is above the middle of its codebook where
//
//     is_positive = (H & ~wide) | top
//
// and the other bits of its number say how far. Levels below the middle mirror those above it, so all bits that lie
// below H are turned over where it is set: v = (c0, c1, bit 0 of the index, bit 1) ^ H has four bits for narrow codes
// and wide ones alike. With it alone a narrow level is found; of a wide one, H and top have to say whether it is in the
// farther half of its side:
//
//     is_near = H ^ top      of wide codes: among the sixteen levels next to the middle
//
// The four words of v are a matrix of bits whose columns are to come together. Two rounds of exchanges between pairs of
// words do it: word w then has the nibbles of vector w, lane after lane. For 32 columns, in whose planes a lane has two
// bits, words 0 and 2 have those of vector 0, of even and of odd lanes, words 1 and 3 those of vector 1.
//
// THE SECOND STEP. Sixteen bytes of nibbles, loaded to both halves of a register and shifted in one of them, are 32
// bytes, of two vectors. Each byte of a level's upper half has a table of sixteen: vpshufb looks up 32 at once. A sign,
// and whether a level is near, are the highest bit of a byte; as a word has eight of them side by side, a shift by
// another count in each quarter of the register brings them there. The order of lanes is what comes of all this, the
// same for all vectors: sums stay in it until the end of a bag.

// What the first step makes of a block of some rows: of row r, nibbles[0][r] has vectors 0 and 1, nibbles[1][r] has
// vectors 2 and 3.
template <size_t rows>
struct MadeBlocks {
    alignas(32) uint8_t nibbles[2][rows][16];
    uint64_t is_positive[rows], is_near[rows];
};

// Upper halves of floats by v, a table for each of their bytes: of the negatives of levels.
struct LevelTables {
    struct Table {
        __m256i high, low;
    };
    Table narrow, wide_near, wide_far;

    [[gnu::noinline]] explicit LevelTables(const AllTrellisLevels& all) {
        const size_t half = all.num_narrow / 2;   // of the narrow levels: as many as v has values
        const float* const upper = all.values + half;
        const float* const upper_wide = all.values + 4 * half;
        const bool has_wide = all.num_wide > 0;
        narrow = make_table(half, [&](size_t v) { return upper[half - 1 - v]; });
        wide_near = make_table(has_wide ? half : 0, [&](size_t v) { return upper_wide[v]; });
        wide_far = make_table(has_wide ? half : 0, [&](size_t v) { return upper_wide[2 * half - 1 - v]; });
    }

private:
    template <class Level>
    static Table make_table(size_t count, const Level& level) {
        alignas(16) uint8_t bytes[2][16] = {};
        for (size_t v = 0; v < count; v++) {
            const float negative = -level(v);
            uint32_t bits;
            std::memcpy(&bits, &negative, sizeof bits);
            bytes[0][v] = static_cast<uint8_t>(bits >> 24);
            bytes[1][v] = static_cast<uint8_t>(bits >> 16);
        }
        const auto spread = [](const uint8_t* sixteen) {
            return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(sixteen)));
        };
        return {spread(bytes[0]), spread(bytes[1])};
    }
};

// A block of 64 columns or 32, as it lies in every row of a table.
template <size_t columns, class Block>
struct TrellisFours {
    static_assert(columns == 64 || columns == 32);
    static constexpr size_t vectors = columns / trellis_lanes;
    using Tables = LevelTables;
    template <size_t rows>
    using Made = MadeBlocks<rows>;

    TrellisFours() = default;
    // Block `number`, which is `block`.
    TrellisFours(const Block& block, const TrellisShape& shape, size_t number)
        : planes(block.first_byte),
          highest(block.first_byte + plane_bytes * block.index_planes),
          byte_before(block.byte_before),
          top_bits(block.top_bits),
          has_wide(block.wide_vectors > 0),
          has_second(block.index_planes > 1 ? -1 : 0),
          has_third(block.index_planes > 2 ? -1 : 0) {
        if constexpr (columns == trellis_block)
            wide = &block.is_wide;
        else
            wide = BitPositions(TrellisBlock(shape, number, vectors).is_wide);
        const Bits bits = at_bits(wide_positions().mask);
        for (size_t pair = 0; pair < vectors / 2; pair++) is_wide[pair] = bits_to_signs(bits, pair);
    }

    // Reads four rows, of which the first becomes row `first`.
    template <size_t num_rows>
    [[gnu::always_inline]] void make(const uint8_t* const (&rows)[4], MadeBlocks<num_rows>& to, size_t first) const {
        const BitPositions& positions = wide_positions();
        const uint64_t wide_bits = positions.mask;
        uint64_t top[4] = {};
        if (has_wide) [[likely]] {
            unrolled<4>([&](size_t r) __attribute__((always_inline)) { top[r] = top_bits(rows[r]); });
            positions.spread_four(top);
        }
        unrolled<4>([&](size_t r) __attribute__((always_inline)) {
            uint64_t h = 0;
            std::memcpy(&h, rows[r] + highest, plane_bytes);
            to.is_positive[first + r] = (h & ~wide_bits) | top[r];
            to.is_near[first + r] = h ^ top[r];
        });
        const auto [messages, second] = load_two_planes(rows, planes);
        const auto [third, h] = load_two_planes(rows, highest - plane_bytes);
        const __m256i before = load_before(rows);
        const auto left = [&](int by) { return _mm256_slli_epi64(messages, by); };
        const auto moved_in = [&](int by) { return _mm256_srli_epi64(before, 64 - by); };
        const auto differ = [](__m256i a, __m256i b) { return _mm256_xor_si256(a, b); };
        const __m256i c0 = differ(left(3), moved_in(3));
        const __m256i c1 = differ(differ(messages, left(2)), differ(left(5), differ(moved_in(2), moved_in(5))));
        __m256i w0 = differ(c0, h), w1 = differ(c1, h);
        // A plane that there is not comes out as 0.
        __m256i w2 = _mm256_and_si256(differ(second, h), _mm256_set1_epi64x(has_second));
        __m256i w3 = _mm256_and_si256(differ(third, h), _mm256_set1_epi64x(has_third));
        exchange_bits<1>(w0, w1, 0x5555555555555555);
        exchange_bits<1>(w2, w3, 0x5555555555555555);
        exchange_bits<2>(w0, w2, 0x3333333333333333);
        exchange_bits<2>(w1, w3, 0x3333333333333333);
        if constexpr (columns == 64) {
            store_two_rows(to.nibbles[0][first], _mm256_unpacklo_epi64(w0, w1));
            store_two_rows(to.nibbles[0][first + 2], _mm256_unpackhi_epi64(w0, w1));
            store_two_rows(to.nibbles[1][first], _mm256_unpacklo_epi64(w2, w3));
            store_two_rows(to.nibbles[1][first + 2], _mm256_unpackhi_epi64(w2, w3));
        } else {
            const __m256i w02 = _mm256_blend_epi32(w0, _mm256_slli_epi64(w2, 32), 0xaa);
            const __m256i w13 = _mm256_blend_epi32(w1, _mm256_slli_epi64(w3, 32), 0xaa);
            store_two_rows(to.nibbles[0][first], _mm256_unpacklo_epi64(w02, w13));
            store_two_rows(to.nibbles[0][first + 2], _mm256_unpackhi_epi64(w02, w13));
        }
    }

    // A call makes the levels of vector v floats, in the order of lanes that is our own.
    struct Levels {
        __m256i words[vectors];   // of each vector, two in a lane

        [[gnu::always_inline]] F32x16 operator()(size_t v) const {
            return {_mm256_castsi256_ps(_mm256_slli_epi32(words[v], 16)),
                    _mm256_castsi256_ps(_mm256_and_si256(words[v], _mm256_set1_epi32(-65536)))};
        }
    };
    // Of row r. Vectors from 2 on have wide codes only if `are_wide_late`.
    template <bool are_wide_late, size_t num_rows>
    [[gnu::always_inline]] Levels look_up(const LevelTables& tables, const MadeBlocks<num_rows>& made,
                                          size_t r) const {
        Levels levels;
        const Bits is_positive = at_bits(made.is_positive[r]), is_near = at_bits(made.is_near[r]);
        unrolled<vectors / 2>([&](size_t pair) __attribute__((always_inline)) {
            const LevelTables* from = &tables;
            asm("" : "+r"(from));   // Tables stay in memory: GCC would keep them in registers, and sums in memory.
            const __m128i* const nibbles = reinterpret_cast<const __m128i*>(made.nibbles[pair][r]);
            const __m256i both = _mm256_broadcastsi128_si256(_mm_load_si128(nibbles));
            const __m256i v = _mm256_and_si256(_mm256_srlv_epi64(both, _mm256_setr_epi64x(0, 0, 4, 4)),
                                               _mm256_set1_epi8(0x0f));
            const __m256i near = shift_to_signs(is_near, pair);
            const auto find = [&](__m256i LevelTables::Table::*byte) __attribute__((always_inline)) {
                const __m256i of_narrow = _mm256_shuffle_epi8(from->narrow.*byte, v);
                if (pair > 0 && !are_wide_late) return of_narrow;
                const __m256i of_wide = choose(near, _mm256_shuffle_epi8(from->wide_near.*byte, v),
                                               _mm256_shuffle_epi8(from->wide_far.*byte, v));
                return choose(is_wide[pair], of_wide, of_narrow);
            };
            const __m256i low = find(&LevelTables::Table::low);
            const __m256i high = _mm256_xor_si256(find(&LevelTables::Table::high), bits_to_signs(is_positive, pair));
            levels.words[2 * pair] = _mm256_unpacklo_epi8(low, high);
            levels.words[2 * pair + 1] = _mm256_unpackhi_epi8(low, high);
        });
        return levels;
    }

    // A vector from our own order of lanes to that of columns, and back.
    [[gnu::always_inline]] static F32x16 in_column_order(F32x16 x) {
        const __m256 first = _mm256_unpacklo_ps(x.low, x.high), second = _mm256_unpackhi_ps(x.low, x.high);
        if constexpr (columns == 64) {
            const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            return {_mm256_permutevar8x32_ps(first, order), _mm256_permutevar8x32_ps(second, order)};
        } else {
            return {exchange_middle(_mm256_unpacklo_ps(first, second)),
                    exchange_middle(_mm256_unpackhi_ps(first, second))};
        }
    }
    [[gnu::always_inline]] static F32x16 in_own_order(F32x16 x) {
        // A lane of every two, from the first of two registers and then from the second.
        const auto split = [](__m256 first, __m256 second) {
            return F32x16{_mm256_shuffle_ps(first, second, 0x88), _mm256_shuffle_ps(first, second, 0xdd)};
        };
        if constexpr (columns == 64) {
            const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
            return split(_mm256_permutevar8x32_ps(x.low, order), _mm256_permutevar8x32_ps(x.high, order));
        } else {
            const F32x16 lanes = split(exchange_middle(x.low), exchange_middle(x.high));
            return split(lanes.low, lanes.high);
        }
    }
    // Keeps GCC from summing in memory.
    [[gnu::always_inline]] static void keep_in_registers(F32x16* sums) {
        if constexpr (vectors == 4)
            asm("" : "+x"(sums[0].low), "+x"(sums[0].high), "+x"(sums[1].low), "+x"(sums[1].high), "+x"(sums[2].low),
                     "+x"(sums[2].high), "+x"(sums[3].low), "+x"(sums[3].high));
    }

private:
    static constexpr size_t plane_bytes = columns / 8;

    size_t planes, highest, byte_before;   // bytes of a row: where planes begin, where H does, and the one before
    decltype(Block::top_bits) top_bits;
    // With two positions to a lane, a block of 32 columns has others than ColumnBlock.
    std::conditional_t<columns == trellis_block, const BitPositions*, BitPositions> wide;
    bool has_wide;
    int64_t has_second, has_third;   // index planes, below the highest: -1 or 0
    __m256i is_wide[vectors / 2];    // 0x80 in the bytes of wide codes, of two vectors

    // The second quarter of a register and the third.
    [[gnu::always_inline]] static __m256 exchange_middle(__m256 x) {
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
    }
    [[gnu::always_inline]] const BitPositions& wide_positions() const {
        if constexpr (columns == trellis_block)
            return *wide;
        else
            return wide;
    }

    struct TwoPlanes {
        __m256i first, second;
    };
    // Of rows 0, 2, 1 and 3.
    [[gnu::always_inline]] static TwoPlanes load_two_planes(const uint8_t* const (&rows)[4], size_t at) {
        const auto load_row = [&](size_t r) {
            const __m128i* const from = reinterpret_cast<const __m128i*>(rows[r] + at);
            return columns == 64 ? _mm_loadu_si128(from) : _mm_cvtepu32_epi64(_mm_loadl_epi64(from));
        };
        const auto load_two = [&](size_t r) {
            return _mm256_inserti128_si256(_mm256_castsi128_si256(load_row(r)), load_row(r + 1), 1);
        };
        const __m256i first = load_two(0), second = load_two(2);
        return {_mm256_unpacklo_epi64(first, second), _mm256_unpackhi_epi64(first, second)};
    }
    // Eight bytes of the same rows, the last of them the one before the messages.
    [[gnu::always_inline]] __m256i load_before(const uint8_t* const (&rows)[4]) const {
        const auto at = [&](size_t r) { return rows[r] + byte_before - 7; };
        const auto load_two = [&](size_t r) {
            const __m128i lower = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at(r)));
            const double* const upper = reinterpret_cast<const double*>(at(r + 2));
            return _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(lower), upper));
        };
        return _mm256_inserti128_si256(_mm256_castsi128_si256(load_two(0)), load_two(1), 1);
    }
    // Rows 0 and 1, or 2 and 3: which two lie together, the order of the quarters above sees to.
    [[gnu::always_inline]] static void store_two_rows(uint8_t* to, __m256i rows) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), rows);
    }
    // The bits of `second` under the mask change places with those of `first` that are `by` above them.
    template <int by>
    [[gnu::always_inline]] static void exchange_bits(__m256i& first, __m256i& second, uint64_t mask) {
        const __m256i shifted = _mm256_srli_epi64(first, by);
        const __m256i change = _mm256_and_si256(_mm256_xor_si256(shifted, second),
                                                _mm256_set1_epi64x(static_cast<int64_t>(mask)));
        second = _mm256_xor_si256(second, change);
        first = _mm256_xor_si256(first, _mm256_slli_epi64(change, by));
    }

    // By the highest bit of each byte.
    [[gnu::always_inline]] static __m256i choose(__m256i by, __m256i yes, __m256i no) {
        asm volatile("" : "+x"(by));   // Keeps GCC from comparing it with 0 first.
        return _mm256_blendv_epi8(no, yes, by);
    }

    // A word, in all quarters of a register or in all of its lanes of 32 bits.
    struct Bits {
        __m256i words;
    };
    [[gnu::always_inline]] static Bits at_bits(const uint64_t& word) {
        if constexpr (columns == 64) return {_mm256_set1_epi64x(static_cast<int64_t>(word))};
        return {_mm256_set1_epi32(static_cast<int32_t>(word))};
    }
    // The bits of vectors 2 pair and 2 pair + 1, as the highest of bytes whose other bits are anything.
    [[gnu::always_inline]] static __m256i shift_to_signs(Bits bits, size_t pair) {
        if constexpr (columns == 64)
            return _mm256_sllv_epi64(bits.words, pair == 0 ? _mm256_setr_epi64x(7, 6, 3, 2)
                                                           : _mm256_setr_epi64x(5, 4, 1, 0));
        return _mm256_sllv_epi32(bits.words, _mm256_setr_epi32(7, 5, 6, 4, 3, 1, 2, 0));
    }
    [[gnu::always_inline]] static __m256i bits_to_signs(Bits bits, size_t pair) {
        return _mm256_and_si256(shift_to_signs(bits, pair), _mm256_set1_epi8(static_cast<char>(0x80)));
    }
};
