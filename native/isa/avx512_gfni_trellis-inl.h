// Trellis-coded rows with bit matrices, permutations of bytes and shifts of two words at once (GFNI, VBMI, VBMI2: Ice
// Lake and later, Zen 4 and later). All other kernels of such a CPU are those of AVX-512.
#include "avx512_bits-inl.h"

namespace embpack::EMBPACK_ISA {
namespace {

constexpr size_t least_slots = 1, most_trellis_sums = 8, trellis_rows_early = 2, most_means_kept = 4;

#include "../kernels/trellis_slots-inl.h"

// For each position of a block the number of its level, in a byte. A word has in its lower byte that of a value, and
// in the upper one, of a full block, that of another: lane i's first word is of vectors 1 and 3, its second word of
// vectors 0 and 2. Where there is but one vector, it has the first words.
template <size_t slots>
struct TrellisNumbers {
    __m512i words;
};

// Whether vector v has the second words of lanes, which are their upper halves.
template <size_t slots>
constexpr bool is_upper(size_t v) { return slots > 1 && v % 2 == 0; }

// Eight positions are eight bits of every byte here, and byte k of their product is of one of them.
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

// A block's bits, in words of 16 slots bits: `planes`, of which word k is bit k + 1 of the numbers, and word 4 bit 7,
// and `others`, which are bits 0, 1, 5 and 6. Of eight positions, the bytes of all words are brought together, and
// these 64 bits transposed: a bit matrix by the eight bytes that have one bit each.
template <size_t slots>
struct WordOrder {
    alignas(64) uint8_t of_byte[16 * slots];

    constexpr WordOrder() : of_byte() {
        constexpr size_t others = 8, words[] = {others, others + 1, 1, 2, 3, others + 2, others + 3, 4};
        for (size_t j = 0; j < 2 * slots; j++)
            for (size_t k = 0; k < 8; k++) of_byte[8 * j + 7 - k] = static_cast<uint8_t>(2 * slots * words[k] + j);
    }
};
template <size_t slots>
inline constexpr WordOrder<slots> word_order;

// Which subsets the levels of a block's steps are of, words of c0 and c1: both are the messages, each shifted by some
// steps, with those before moving in from below. Shifted by none, they are what they are xored with.
template <size_t slots>
[[gnu::always_inline]] inline __m128i find_subsets(const uint8_t* messages, const uint8_t* last_before) {
    asm("" : "+r"(last_before));   // Or GCC takes what it has loaded to another kind of register.
    if constexpr (slots == 4) {
        const __m128i m = _mm_broadcastq_epi64(_mm_loadu_si64(messages));
        const __m128i before = _mm_broadcastq_epi64(_mm_loadu_si64(last_before - 7));
        const __m128i first = _mm_shldv_epi64(m, before, _mm_set_epi64x(2, 3));
        return _mm_ternarylogic_epi64(m, first, _mm_shldv_epi64(m, before, _mm_set_epi64x(5, 0)), 0x96);
    } else if constexpr (slots == 2) {
        const __m128i m = _mm_broadcastd_epi32(_mm_loadu_si32(messages));
        const __m128i before = _mm_broadcastd_epi32(_mm_loadu_si32(last_before - 3));
        const __m128i first = _mm_shldv_epi32(m, before, _mm_setr_epi32(3, 2, 0, 0));
        return _mm_ternarylogic_epi32(m, first, _mm_shldv_epi32(m, before, _mm_setr_epi32(0, 5, 0, 0)), 0x96);
    } else {
        const __m128i m = _mm_broadcastw_epi16(_mm_loadu_si16(messages));
        const __m128i before = _mm_broadcastw_epi16(_mm_loadu_si16(last_before - 1));
        const __m128i first = _mm_shldv_epi16(m, before, _mm_setr_epi16(3, 2, 0, 0, 0, 0, 0, 0));
        const __m128i second = _mm_shldv_epi16(m, before, _mm_setr_epi16(0, 5, 0, 0, 0, 0, 0, 0));
        return _mm_ternarylogic_epi32(m, first, second, 0x96);
    }
}

template <size_t slots>
struct Words;

template <>
struct Words<4> {
    using Word = uint64_t;
    __m512i planes, others;

    // The first four of memory, or those of them that are chosen.
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
        const __m512i order = _mm512_load_si512(word_order<4>.of_byte);
        const __m512i together = _mm512_permutex2var_epi8(planes, order, others);
        return {_mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(one_bit_each<4>()), together, 0)};
    }
};

template <>
struct Words<2> {
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
        const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(word_order<2>.of_byte));
        const __m256i together = _mm256_permutex2var_epi8(planes, order, others);
        const __m256i one_bits = _mm256_set1_epi64x(one_bit_each<2>());
        return {_mm512_cvtepu8_epi16(_mm256_gf2p8affine_epi64_epi8(one_bits, together, 0))};
    }
};

template <>
struct Words<1> {
    using Word = uint16_t;
    __m128i planes, others;

    [[gnu::always_inline]] void load(const uint8_t* p) { planes = _mm_loadu_si64(p); }
    [[gnu::always_inline]] void load(const uint8_t* p, uint8_t chosen) { planes = _mm_maskz_loadu_epi16(chosen, p); }
    [[gnu::always_inline]] void set_others(__m128i subsets, uint64_t bit_5, uint64_t bit_6) {
        subsets = _mm_insert_epi16(subsets, static_cast<int>(bit_5), 2);
        others = _mm_insert_epi16(subsets, static_cast<int>(bit_6), 3);
    }
    [[gnu::always_inline]] TrellisNumbers<1> transpose() const {
        const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(word_order<1>.of_byte));
        const __m128i together = _mm_permutex2var_epi8(planes, order, others);
        return {_mm512_cvtepu8_epi32(_mm_gf2p8affine_epi64_epi8(_mm_set1_epi64x(one_bit_each<1>()), together, 0))};
    }
};

// What is known of a row's blocks when this is compiled: nothing; or that codes have 4 bits, and those that have 5 are
// in the first two vectors.
struct Nothing {
    static constexpr size_t embedding_dim = 0;
};
struct WideFirst : Nothing {};

// Or everything: rows of one full block, in the bytes of uniform ones of 4 bits.
template <size_t d>
struct OnlyBlock {
    static constexpr size_t embedding_dim = d, row_bytes = d / 2 + 4;
    static constexpr TrellisShape shape{d, row_bytes};
    static constexpr TrellisBlock block{shape, 0, slots_of(d)};
    static constexpr size_t first_byte = 0, before = row_bytes - 1, planes = shape.narrow_bits - 1, wide_vectors = 2;
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

template <class Known, class Columns>
[[gnu::always_inline]] inline uint64_t find_top_bits(const uint8_t* row, const Columns& of) {
    if constexpr (std::is_same_v<Known, Nothing>)
        return of.wide_vectors > 0 ? of.is_wide(of.top_bits(row)) : 0;
    else
        return of.is_wide(of.first_top_bits(row));
}

template <bool is_full, size_t slots, class Columns, class Levels, class Read>
[[gnu::always_inline]] inline TrellisNumbers<slots> make_trellis_numbers(const uint8_t* row, const Columns& of,
                                                                         const Levels& levels, const Read& read) {
    Words<slots> words;
    const size_t planes = levels.planes(of);
    if constexpr (is_full && Levels::are_in_place) {
        const uint8_t* const messages = row + of.first_byte;
        if (planes >= 3)
            words.load(messages);
        else
            words.load(messages, static_cast<uint8_t>((2u << planes) - 1));
        const __m128i subsets = find_subsets<slots>(messages, row + of.before);
        const uint64_t top = find_top_bits<typename Levels::Known>(row, of);
        words.set_others(subsets, planes == 4 ? read(4) : top, planes == 4 ? top : 0);
    } else {
        using Word = typename Words<slots>::Word;
        uint64_t bits[8] = {};
        const Subsets subsets(read(0), row[of.before]);
        bits[0] = subsets.c0;
        bits[1] = subsets.c1;
        for (size_t k = 0; k < planes; k++) bits[k + 2] = read(k + 1);
        if constexpr (!is_full)
            for (uint64_t& word : bits) word = of.present(word);
        if (const uint64_t top = find_top_bits<typename Levels::Known>(row, of)) bits[Levels::top_bit(of)] |= top;
        const Word in_order[8] = {0, static_cast<Word>(bits[2]), static_cast<Word>(bits[3]),
                                  static_cast<Word>(bits[4]), static_cast<Word>(bits[7])};
        const Word first[16 / sizeof(Word)] = {static_cast<Word>(bits[0]), static_cast<Word>(bits[1])};
        std::memcpy(&words.planes, in_order, sizeof in_order);
        words.set_others(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first)), bits[5], bits[6]);
    }
    return words.transpose();
}

// The upper halves of floats.
inline void shorten(const float* values, size_t count, uint16_t* upper) {
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        upper[i] = static_cast<uint16_t>(bits >> 16);
    }
}

// Levels in 16 bits each, two of a lane; those of vector v make a vector of floats.
template <size_t slots>
struct LevelWords {
    __m512i of_first, of_others;   // vectors 0 and 1, vectors 2 and 3

    [[gnu::always_inline]] F32x16 operator()(size_t v) const {
        const __m512i words = v < 2 ? of_first : of_others;
        const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
        return _mm512_castsi512_ps(is_upper<slots>(v) ? _mm512_and_si512(words, upper) : _mm512_slli_epi32(words, 16));
    }
};

// Up to 32 levels of narrow codes, and up to 64 of wide ones, whose top bit is bit 5.
template <class Known_>
struct FewLevels {
    using Known = Known_;
    static constexpr bool are_in_place = true;
    __m512i narrow, wide[2];

    [[gnu::always_inline]] explicit FewLevels(const AllTrellisLevels& all) {
        uint16_t levels[32 * 3];
        write(all, levels);
        narrow = _mm512_loadu_si512(levels);
        for (size_t i = 0; i < 2; i++) wide[i] = _mm512_loadu_si512(levels + 32 * (i + 1));
        stay_in_register(narrow);
        for (__m512i& words : wide) stay_in_register(words);
    }

    template <class Columns>
    static size_t planes(const Columns& of) { return std::is_same_v<Known, WideFirst> ? 3 : of.planes; }
    template <class Columns>
    static size_t top_bit(const Columns&) { return 5; }

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

// 64 levels of narrow codes and 128 of wide ones, whose top bit is bit 6.
template <class Known_>
struct SomeLevels {
    using Known = Known_;
    static constexpr bool are_in_place = true;
    __m512i narrow[2], wide[4];

    [[gnu::always_inline]] explicit SomeLevels(const AllTrellisLevels& all) {
        uint16_t levels[32 * 6];
        write(all, levels);
        for (size_t i = 0; i < 2; i++) narrow[i] = _mm512_loadu_si512(levels + 32 * i);
        for (size_t i = 0; i < 4; i++) wide[i] = _mm512_loadu_si512(levels + 32 * (i + 2));
        for (__m512i& words : narrow) stay_in_register(words);
        for (__m512i& words : wide) stay_in_register(words);
    }

    template <class Columns>
    static size_t planes(const Columns&) { return 4; }
    template <class Columns>
    static size_t top_bit(const Columns&) { return 6; }

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

// More levels, in memory: floats, of which some do not fit in 16 bits.
struct WrittenLevels : LevelsInMemory {
    using Known = Nothing;
    static constexpr bool are_in_place = false;
    using LevelsInMemory::LevelsInMemory;

    template <class Columns>
    static size_t planes(const Columns& of) { return of.planes; }
    template <class Columns>
    static size_t top_bit(const Columns& of) { return of.planes + 2; }
};

// The values of a row whose block is known, 0 if it is not; and what is known or was found of it.
template <class Levels>
inline constexpr size_t known_dim = Levels::Known::embedding_dim;
template <class Levels, class Columns>
[[gnu::always_inline]] inline const auto& known_columns(const Columns& of) {
    if constexpr (known_dim<Levels> > 0)
        return only_block<known_dim<Levels>>;
    else
        return of;
}

// Which words are of narrow codes in one block.
template <size_t slots>
struct LevelsOfBlock {
    __mmask32 are_narrow[2] = {};

    LevelsOfBlock() = default;
    template <class Columns>
    [[gnu::always_inline]] explicit LevelsOfBlock(const Columns& of) {
        for (size_t v = 0; v < slots; v++) {
            const uint32_t wide = of.wide_lanes[v];
            are_narrow[v / 2] |= _pdep_u32(~wide, is_upper<slots>(v) ? 0xaaaaaaaa : 0x55555555);
        }
        for (__mmask32& words : are_narrow) asm("" : "+Yk"(words));
    }

    template <class Levels, class Columns>
    [[gnu::always_inline]] auto look_up(const Levels& levels, const Columns& of, TrellisNumbers<slots> numbers) const {
        const __m512i others = slots == 4 ? _mm512_srli_epi16(numbers.words, 8) : numbers.words;
        if constexpr (Levels::are_in_place)
            return LevelWords<slots>{look_up_words(levels, of, numbers.words, 0),
                                     look_up_words(levels, of, others, slots == 4)};
        else
            return [&levels, &of, numbers, others](size_t v) __attribute__((always_inline)) {
                const __m512i words = v < 2 ? numbers.words : others;
                return levels.of_numbers(is_upper<slots>(v) ? _mm512_srli_epi32(words, 16) : words, of.wide_lanes[v]);
            };
    }

private:
    template <class Levels, class Columns>
    [[gnu::always_inline]] __m512i look_up_words(const Levels& levels, const Columns& of, __m512i words,
                                                 size_t pair) const {
        const size_t wide_vectors = std::is_same_v<typename Levels::Known, WideFirst> ? 2 : of.wide_vectors;
        if (wide_vectors <= 2 * pair) return levels.of_narrow(words);
        return levels.of_both(words, are_narrow[pair]);
    }
};

// What looks the levels up of narrow codes of so many bits, and of wide ones.
template <class Use>
inline void with_trellis_levels(const TrellisShape& shape, Use use) {
    if (shape.narrow_bits <= 4) return use.template operator()<FewLevels<Nothing>>();
    if (shape.narrow_bits == 5) return use.template operator()<SomeLevels<Nothing>>();
    use.template operator()<WrittenLevels>();
}

// Calls use<Levels>() where sums without weights have code of their own: rows in the bytes of 4 bits.
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
