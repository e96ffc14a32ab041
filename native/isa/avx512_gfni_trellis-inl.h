// Trellis-coded rows with bit matrices, permutations of bytes and shifts of two words at once (GFNI, VBMI, VBMI2: Ice
// Lake and later, Zen 4 and later). All other kernels of such a CPU are those of AVX-512. trellis_blocks-inl.h says how
// a row lies and what the words mean.
//
// FROM PLANES TO NUMBERS, for slots = 4: words have 64 bits, registers eight words, and bit p of a word is position p.
// With slots = 2 or 1 words and registers have a half or a quarter of that. There is one word for each bit of the
// numbers, in two registers:
//
//     word        0         1         2         3         4
//     planes   plane 0   plane 1   plane 2   plane 3    bit 7
//     others     c0        c1       bit 5     bit 6
//
// One load of the row fills words 0 to 3 of `planes`. Bit 0 of the numbers is c0, bit 1 is c1, bits 2 to 4 are planes 1
// to 3; plane 0, the messages, is none of them. Bits 5 to 7 depend on how many levels there are: more planes, the top
// bits, or 0.
//
// 1. vpermi2b brings byte j of each of these eight words together, as 64-bit word j. This is a bit matrix: the eight
//    bits (rows) of the eight numbers (columns) at positions 8 j to 8 j + 7:
//
//        byte 7    bit 0 of the numbers: bit q of this byte is that of position 8 j + q
//        byte 6    bit 1 of the numbers
//         ..
//        byte 0    bit 7 of the numbers
//
// 2. vgf2p8affineqb multiplies a matrix and the bytes of a vector: bit i of byte k of the product is the parity of
//    (byte 7 - i of the matrix) & (byte k of the vector). The row's bits are the matrix here, and the vector is a
//    constant, one_bit_each, whose byte k has one bit set, bit q. So bit i of the product's byte k is bit q of the
//    matrix's byte 7 - i: bit i of the number at position 8 j + q. Byte k is that number: bits have become bytes.
//
// FROM NUMBERS TO LEVELS. Which q each byte k takes is free, so the order of the bytes costs nothing. A 64-bit word has
// two lanes of four positions, and the bytes of a lane are put in this order:
//
//        byte of the lane     3   2     1   0
//        vector               2   0     3   1
//        16-bit word          upper     lower
//
// vpermw and vpermi2w look 32 levels of 16 bits up, by the lowest bits of each 16-bit word; they do not read its upper
// byte. So one lookup is for vectors 0 and 1, and after a shift right by 8 another one is for vectors 2 and 3. As wide
// codes come first in a block, the second one often is of narrow codes alone. A level is the upper half of a float.
// That of vector 0 lies in the upper half of its lane, and is a float once the lower half is cleared; that of vector 1
// is one once it is shifted left by 16.
#include "avx512_bits-inl.h"

namespace embpack::EMBPACK_ISA {
namespace {

constexpr size_t least_slots = 1, most_trellis_sums = 8, trellis_rows_early = 2, most_means_kept = 4;

#include "../kernels/trellis_slots-inl.h"

// The numbers of a block's levels, in the bytes of each lane. With slots = 4 these are of vectors 1, 3, 0, 2, from the
// lowest byte on; with 2, of vector 1 in the lower 16-bit word and of vector 0 in the upper one; with 1, of vector 0 in
// the lower word.
template <size_t slots>
struct TrellisNumbers {
    __m512i words;
};

// Whether the numbers of vector v, and then its levels, lie in the upper 16-bit words of the lanes.
template <size_t slots>
constexpr bool is_upper_word(size_t v) { return slots > 1 && v % 2 == 0; }

// Byte k has bit q set, where 8 j + q is the position whose number byte k of the product is to be: that of vector v in
// lane k / slots of the 64-bit word.
template <size_t slots>
constexpr long long one_bit_each() {
    constexpr size_t vectors[] = {1, 3, 0, 2};
    uint64_t bits = 0;
    for (size_t k = 0; k < 8; k++) {
        const size_t v = slots == 4 ? vectors[k % 4] : slots == 2 ? 1 - k % 2 : 0;
        bits |= uint64_t{1} << (8 * k + k / slots * slots + v);
    }
    return static_cast<long long>(bits);
}

// Which byte of `planes` and `others`, counted through both, goes to each byte of the matrices. words[k] is the word of
// bit k of the numbers; words of `others` count from 8 on, and a word has 2 * slots bytes.
template <size_t slots>
struct MatrixBytes {
    alignas(64) uint8_t from[16 * slots];

    constexpr MatrixBytes() : from() {
        constexpr size_t others = 8, words[] = {others, others + 1, 1, 2, 3, others + 2, others + 3, 4};
        for (size_t j = 0; j < 2 * slots; j++)
            for (size_t k = 0; k < 8; k++) from[8 * j + 7 - k] = static_cast<uint8_t>(2 * slots * words[k] + j);
    }
};
template <size_t slots>
inline constexpr MatrixBytes<slots> matrix_bytes;

// The words of c0 and c1 in one register, c0 first, with m the messages of a block:
//
//     word 0   c0 = m ^ (m shifted by 3) ^ (m shifted by 0), of which the first and the last cancel out
//     word 1   c1 = m ^ (m shifted by 2) ^ (m shifted by 5)
//
// vpshldv shifts each word by its own count and brings the highest bits of a second word in from below: those of the
// bytes that end with `last_before`, which are the messages before the block. 0x96 is the exclusive or of three.
template <size_t slots>
[[gnu::always_inline]] inline __m128i find_subsets(const uint8_t* messages, const uint8_t* last_before) {
    // Otherwise GCC loads these bytes to a general register and moves them to a vector register.
    asm("" : "+r"(last_before));
    if constexpr (slots == 4) {
        const __m128i m = _mm_broadcastq_epi64(_mm_loadu_si64(messages));
        const __m128i before = _mm_broadcastq_epi64(_mm_loadu_si64(last_before - 7));
        const __m128i by_3_2 = _mm_shldv_epi64(m, before, _mm_set_epi64x(2, 3));
        const __m128i by_0_5 = _mm_shldv_epi64(m, before, _mm_set_epi64x(5, 0));
        return _mm_ternarylogic_epi64(m, by_3_2, by_0_5, 0x96);
    } else if constexpr (slots == 2) {
        const __m128i m = _mm_broadcastd_epi32(_mm_loadu_si32(messages));
        const __m128i before = _mm_broadcastd_epi32(_mm_loadu_si32(last_before - 3));
        const __m128i by_3_2 = _mm_shldv_epi32(m, before, _mm_setr_epi32(3, 2, 0, 0));
        const __m128i by_0_5 = _mm_shldv_epi32(m, before, _mm_setr_epi32(0, 5, 0, 0));
        return _mm_ternarylogic_epi32(m, by_3_2, by_0_5, 0x96);
    } else {
        const __m128i m = _mm_broadcastw_epi16(_mm_loadu_si16(messages));
        const __m128i before = _mm_broadcastw_epi16(_mm_loadu_si16(last_before - 1));
        const __m128i by_3_2 = _mm_shldv_epi16(m, before, _mm_setr_epi16(3, 2, 0, 0, 0, 0, 0, 0));
        const __m128i by_0_5 = _mm_shldv_epi16(m, before, _mm_setr_epi16(0, 5, 0, 0, 0, 0, 0, 0));
        return _mm_ternarylogic_epi32(m, by_3_2, by_0_5, 0x96);
    }
}

// The words of a block, in two registers as above, and their transposition. The three do the same by other intrinsics:
// a word has 16 * slots bits, and a register eight words.
template <size_t slots>
struct BlockWords;

template <>
struct BlockWords<4> {
    using Word = uint64_t;
    __m512i planes, others;

    // Loads planes 0 to 3, or those of them whose bits are set in `chosen`. All other words become 0.
    [[gnu::always_inline]] void load(const uint8_t* p) {
        planes = _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    [[gnu::always_inline]] void load(const uint8_t* p, uint8_t chosen) {
        planes = _mm512_zextsi256_si512(_mm256_maskz_loadu_epi64(chosen, p));
    }
    [[gnu::always_inline]] void set_others(__m128i subsets, uint64_t bit_5, uint64_t bit_6) {
        const __m128i bits = _mm_set_epi64x(static_cast<long long>(bit_6), static_cast<long long>(bit_5));
        others = _mm512_zextsi256_si512(_mm256_inserti128_si256(_mm256_castsi128_si256(subsets), bits, 1));
    }
    [[gnu::always_inline]] TrellisNumbers<4> transpose() const {
        const __m512i order = _mm512_load_si512(matrix_bytes<4>.from);
        const __m512i matrices = _mm512_permutex2var_epi8(planes, order, others);
        return {_mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(one_bit_each<4>()), matrices, 0)};
    }
};

template <>
struct BlockWords<2> {
    using Word = uint32_t;
    __m256i planes, others;

    [[gnu::always_inline]] void load(const uint8_t* p) {
        planes = _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    [[gnu::always_inline]] void load(const uint8_t* p, uint8_t chosen) {
        planes = _mm256_zextsi128_si256(_mm_maskz_loadu_epi32(chosen, p));
    }
    [[gnu::always_inline]] void set_others(__m128i subsets, uint64_t bit_5, uint64_t bit_6) {
        subsets = _mm_insert_epi32(subsets, static_cast<int>(bit_5), 2);
        others = _mm256_zextsi128_si256(_mm_insert_epi32(subsets, static_cast<int>(bit_6), 3));
    }
    [[gnu::always_inline]] TrellisNumbers<2> transpose() const {
        const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(matrix_bytes<2>.from));
        const __m256i matrices = _mm256_permutex2var_epi8(planes, order, others);
        const __m256i one_bits = _mm256_set1_epi64x(one_bit_each<2>());
        // From a byte for each position to a 16-bit word.
        return {_mm512_cvtepu8_epi16(_mm256_gf2p8affine_epi64_epi8(one_bits, matrices, 0))};
    }
};

template <>
struct BlockWords<1> {
    using Word = uint16_t;
    __m128i planes, others;

    [[gnu::always_inline]] void load(const uint8_t* p) { planes = _mm_loadu_si64(p); }
    [[gnu::always_inline]] void load(const uint8_t* p, uint8_t chosen) { planes = _mm_maskz_loadu_epi16(chosen, p); }
    [[gnu::always_inline]] void set_others(__m128i subsets, uint64_t bit_5, uint64_t bit_6) {
        subsets = _mm_insert_epi16(subsets, static_cast<int>(bit_5), 2);
        others = _mm_insert_epi16(subsets, static_cast<int>(bit_6), 3);
    }
    [[gnu::always_inline]] TrellisNumbers<1> transpose() const {
        const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(matrix_bytes<1>.from));
        const __m128i matrices = _mm_permutex2var_epi8(planes, order, others);
        // From a byte for each position to a lane.
        return {_mm512_cvtepu8_epi32(_mm_gf2p8affine_epi64_epi8(_mm_set1_epi64x(one_bit_each<1>()), matrices, 0))};
    }
};

// Known, a parameter of FewLevels and SomeLevels, says which rows a function is compiled for: what is the same in all
// of these is a constant there. AnyRows are all that there are.
struct AnyRows {
    static constexpr size_t embedding_dim = 0;
};
// Narrow codes have 4 bits, and in every block wide codes are in vectors 0 and 1 alone.
struct WideFirst : AnyRows {};
// Rows of one full block of d columns, in the bytes of uniform rows of 4 bits. Where bits lie in these is known: the
// members of ColumnBlock that are used for it are constants.
template <size_t d>
struct OnlyBlock {
    static constexpr size_t embedding_dim = d, row_bytes = d / 2 + 4;
    static constexpr TrellisShape shape{d, row_bytes};
    static constexpr TrellisBlock block{shape, 0, slots_of(d)};
    static constexpr size_t first_byte = 0, byte_before = row_bytes - 1;
    static constexpr size_t index_planes = shape.narrow_bits - 1, wide_vectors = 2;
    static_assert(shape.num_wide <= 2 * trellis_lanes);

    static uint64_t is_wide(uint64_t bits) { return _pdep_u64(bits, block.is_wide); }
    static uint64_t first_top_bits(const uint8_t* row) {
        constexpr size_t at = row_bytes - trellis_word;
        uint64_t word;
        std::memcpy(&word, row + at, sizeof word);
        return word >> (block.first_wide_bit - 8 * at);
    }
};
template <size_t d>
inline constexpr OnlyBlock<d> only_block;

// The top bits of a block's numbers, spread to their positions. Of rows that are known, they are at most 32.
template <class Known, class Block>
[[gnu::always_inline]] inline uint64_t find_top_bits(const uint8_t* row, const Block& block) {
    if constexpr (std::is_same_v<Known, AnyRows>)
        return block.wide_vectors > 0 ? block.is_wide(block.top_bits(row)) : 0;
    else
        return block.is_wide(block.first_top_bits(row));
}

// Where bit p of a plane is position p, and levels are so few that there are at most five planes, one load reads the
// first four. Otherwise each plane is read, spread to its positions, and brought to the registers through memory.
template <bool is_full, size_t slots, class Block, class Levels, class Read>
[[gnu::always_inline]] inline TrellisNumbers<slots> make_trellis_numbers(const uint8_t* row, const Block& block,
                                                                         const Levels& levels, const Read& read_plane) {
    BlockWords<slots> words;
    const size_t index_planes = levels.index_planes(block);
    if constexpr (is_full && Levels::are_in_registers) {
        const uint8_t* const messages = row + block.first_byte;
        if (index_planes >= 3)
            words.load(messages);
        else
            words.load(messages, static_cast<uint8_t>((2u << index_planes) - 1));
        const __m128i subsets = find_subsets<slots>(messages, row + block.byte_before);
        const uint64_t top = find_top_bits<typename Levels::Known>(row, block);
        words.set_others(subsets, index_planes == 4 ? read_plane(4) : top, index_planes == 4 ? top : 0);
    } else {
        using Word = typename BlockWords<slots>::Word;
        uint64_t bits[8] = {};   // of the numbers
        const Subsets subsets(read_plane(0), row[block.byte_before]);
        bits[0] = subsets.c0;
        bits[1] = subsets.c1;
        for (size_t k = 0; k < index_planes; k++) bits[k + 2] = read_plane(k + 1);
        if constexpr (!is_full)
            for (uint64_t& bit : bits) bit = block.present(bit);
        if (const uint64_t top = find_top_bits<typename Levels::Known>(row, block)) bits[Levels::top_bit(block)] |= top;
        const Word planes[8] = {0, static_cast<Word>(bits[2]), static_cast<Word>(bits[3]),
                                static_cast<Word>(bits[4]), static_cast<Word>(bits[7])};
        const Word c0_c1[16 / sizeof(Word)] = {static_cast<Word>(bits[0]), static_cast<Word>(bits[1])};
        std::memcpy(&words.planes, planes, sizeof planes);
        words.set_others(_mm_loadu_si128(reinterpret_cast<const __m128i*>(c0_c1)), bits[5], bits[6]);
    }
    return words.transpose();
}

// The upper halves of floats whose lower halves are 0.
inline void shorten(const float* values, size_t count, uint16_t* upper) {
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        upper[i] = static_cast<uint16_t>(bits >> 16);
    }
}

// Levels of 16 bits, where the numbers' 16-bit words were. A call makes those of vector v floats.
template <size_t slots>
struct LevelWords {
    __m512i first_pair, second_pair;   // vectors 0 and 1, vectors 2 and 3

    [[gnu::always_inline]] F32x16 operator()(size_t v) const {
        const __m512i words = v < 2 ? first_pair : second_pair;
        const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
        return _mm512_castsi512_ps(is_upper_word<slots>(v) ? _mm512_and_si512(words, upper)
                                                           : _mm512_slli_epi32(words, 16));
    }
};

// Levels in registers, 32 of 16 bits in each: up to 32 of narrow codes, and up to 64 of wide ones. However short codes
// are, their top bit is bit 5: it chooses between wide[0], the lower half of the wide levels, and wide[1], the upper.
template <class Known_>
struct FewLevels {
    using Known = Known_;
    static constexpr bool are_in_registers = true;
    __m512i narrow, wide[2];

    [[gnu::always_inline]] explicit FewLevels(const AllTrellisLevels& all) {
        uint16_t levels[32 * 3];
        write(all, levels);
        narrow = _mm512_loadu_si512(levels);
        for (size_t i = 0; i < 2; i++) wide[i] = _mm512_loadu_si512(levels + 32 * (i + 1));
        stay_in_register(narrow);
        for (__m512i& words : wide) stay_in_register(words);
    }

    template <class Block>
    static size_t index_planes(const Block& block) { return std::is_same_v<Known, WideFirst> ? 3 : block.index_planes; }
    template <class Block>
    static size_t top_bit(const Block&) { return 5; }

    // The levels of 32 numbers: all of narrow codes; or of narrow ones where `are_narrow` says so. Then all are looked
    // up among the wide levels first, and a permutation under the mask replaces those of narrow codes.
    [[gnu::always_inline]] __m512i of_narrow(__m512i words) const { return _mm512_permutexvar_epi16(words, narrow); }
    [[gnu::always_inline]] __m512i of_both(__m512i words, __mmask32 are_narrow) const {
        const __m512i of_wide = _mm512_permutex2var_epi16(wide[0], words, wide[1]);
        return _mm512_mask_permutexvar_epi16(of_wide, are_narrow, words, narrow);
    }

private:
    // Not inlined: it is compiled once, not for every tile.
    [[gnu::noinline]] static void write(const AllTrellisLevels& all, uint16_t* levels) {
        const size_t count = all.num_narrow;
        std::memset(levels, 0, sizeof(uint16_t) * 32 * 3);
        shorten(all.values, count, levels);
        if (all.num_wide == 0) return;
        shorten(all.values + count, count, levels + 32);
        shorten(all.values + 2 * count, count, levels + 64);
    }
};

// Levels in registers, too: 64 of narrow codes and 128 of wide ones, whose top bit is bit 6. vpermi2w reads six bits of
// a number, and the top bit chooses between what two pairs of registers have.
template <class Known_>
struct SomeLevels {
    using Known = Known_;
    static constexpr bool are_in_registers = true;
    __m512i narrow[2], wide[4];

    [[gnu::always_inline]] explicit SomeLevels(const AllTrellisLevels& all) {
        uint16_t levels[32 * 6];
        write(all, levels);
        for (size_t i = 0; i < 2; i++) narrow[i] = _mm512_loadu_si512(levels + 32 * i);
        for (size_t i = 0; i < 4; i++) wide[i] = _mm512_loadu_si512(levels + 32 * (i + 2));
        for (__m512i& words : narrow) stay_in_register(words);
        for (__m512i& words : wide) stay_in_register(words);
    }

    template <class Block>
    static size_t index_planes(const Block&) { return 4; }
    template <class Block>
    static size_t top_bit(const Block&) { return 6; }

    [[gnu::always_inline]] __m512i of_narrow(__m512i words) const {
        return _mm512_permutex2var_epi16(narrow[0], words, narrow[1]);
    }
    [[gnu::always_inline]] __m512i of_both(__m512i words, __mmask32 are_narrow) const {
        const __mmask32 are_high = _mm512_test_epi16_mask(words, _mm512_set1_epi16(1 << 6));
        const __m512i low = _mm512_permutex2var_epi16(wide[0], words, wide[1]);
        const __m512i high = _mm512_permutex2var_epi16(wide[2], words, wide[3]);
        return _mm512_mask_blend_epi16(are_narrow, _mm512_mask_blend_epi16(are_high, low, high), of_narrow(words));
    }

private:
    [[gnu::noinline]] static void write(const AllTrellisLevels& all, uint16_t* levels) {
        std::memset(levels, 0, sizeof(uint16_t) * 32 * 6);
        shorten(all.values, all.num_narrow + all.num_wide, levels);
    }
};

// More levels, in memory: these are whole float32.
struct ManyLevels : LevelsInMemory {
    using Known = AnyRows;
    static constexpr bool are_in_registers = false;
    using LevelsInMemory::LevelsInMemory;

    template <class Block>
    static size_t index_planes(const Block& block) { return block.index_planes; }
    template <class Block>
    static size_t top_bit(const Block& block) { return block.index_planes + 2; }
};

template <class Levels>
inline constexpr size_t known_dim = Levels::Known::embedding_dim;
template <class Levels, class Block>
[[gnu::always_inline]] inline const auto& known_block(const Block& block) {
    if constexpr (known_dim<Levels> > 0)
        return only_block<known_dim<Levels>>;
    else
        return block;
}

// Looks a block's levels up, two vectors at a time.
template <size_t slots>
struct BlockLookup {
    __mmask32 are_narrow[2] = {};   // the 16-bit words of narrow codes, of vectors 0 and 1, and of vectors 2 and 3

    BlockLookup() = default;
    template <class Block>
    [[gnu::always_inline]] explicit BlockLookup(const Block& block) {
        for (size_t v = 0; v < slots; v++) {
            const uint32_t wide = block.wide_lanes[v];
            // Bit i of the lanes goes to bit 2 i + 1 or 2 i of the words.
            are_narrow[v / 2] |= _pdep_u32(~wide, is_upper_word<slots>(v) ? 0xaaaaaaaa : 0x55555555);
        }
        for (__mmask32& words : are_narrow) asm("" : "+Yk"(words));   // Keeps them in mask registers.
    }

    template <class Levels, class Block>
    [[gnu::always_inline]] auto look_up(const Levels& levels, const Block& block, TrellisNumbers<slots> numbers) const {
        const __m512i second_pair = slots == 4 ? _mm512_srli_epi16(numbers.words, 8) : numbers.words;
        if constexpr (Levels::are_in_registers)
            return LevelWords<slots>{look_up_words(levels, block, numbers.words, 0),
                                     look_up_words(levels, block, second_pair, slots == 4)};
        else
            return [&levels, &block, numbers, second_pair](size_t v) __attribute__((always_inline)) {
                const __m512i words = v < 2 ? numbers.words : second_pair;
                const __m512i number = is_upper_word<slots>(v) ? _mm512_srli_epi32(words, 16) : words;
                return levels.of_numbers(number, block.wide_lanes[v]);
            };
    }

private:
    template <class Levels, class Block>
    [[gnu::always_inline]] __m512i look_up_words(const Levels& levels, const Block& block, __m512i words,
                                                 size_t pair) const {
        const size_t wide_vectors = std::is_same_v<typename Levels::Known, WideFirst> ? 2 : block.wide_vectors;
        if (wide_vectors <= 2 * pair) return levels.of_narrow(words);
        return levels.of_both(words, are_narrow[pair]);
    }
};

template <class Use>
inline void with_trellis_levels(const TrellisShape& shape, Use use) {
    if (shape.narrow_bits <= 4) return use.template operator()<FewLevels<AnyRows>>();
    if (shape.narrow_bits == 5) return use.template operator()<SomeLevels<AnyRows>>();
    use.template operator()<ManyLevels>();
}

// Rows in the bytes of 4 bits a value, as most tables have, have code of their own: those of one block of 16, 32 or 64
// columns, and those of several blocks that are alike.
template <class Use>
inline bool with_known_levels(const TrellisShape& shape, WideVectors wide, Use use) {
    const auto is = [&](const TrellisShape& known) {
        return shape.embedding_dim == known.embedding_dim && shape.narrow_bits == known.narrow_bits &&
               shape.num_wide == known.num_wide;
    };
    if (is(OnlyBlock<16>::shape))
        use.template operator()<SomeLevels<OnlyBlock<16>>>();
    else if (is(OnlyBlock<32>::shape))
        use.template operator()<FewLevels<OnlyBlock<32>>>();
    else if (is(OnlyBlock<64>::shape))
        use.template operator()<FewLevels<OnlyBlock<64>>>();
    else if (shape.narrow_bits == 4 && wide.are_alike && wide.count > 0 && wide.count <= 2)   // d >= 128
        use.template operator()<FewLevels<WideFirst>>();
    else
        return false;
    return true;
}

}  // namespace
}  // namespace embpack::EMBPACK_ISA
