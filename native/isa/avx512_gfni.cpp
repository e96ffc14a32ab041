// AVX-512 with bit matrices and permutations of bytes (GFNI and VBMI: Ice Lake and later, Zen 4 and later). Lookups of
// trellis-coded rows are what gains from these; all other kernels are those of AVX-512.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../kernels.h"
#include "../trellis_rows.h"

namespace embpack {

namespace avx512 {
extern const Kernels kernels;
}

namespace avx512_gfni {
namespace {

constexpr size_t most_trellis_sums = 8, trellis_rows_early = 2;

#include "avx512-inl.h"
#include "../kernels/basics-inl.h"

// For each position of a block the number of its level; lane i has those at positions slots i + v, the first in the
// highest of so many bytes.
constexpr size_t least_slots = 1;
template <size_t slots>
struct TrellisNumbers {
    __m512i bytes;

    // The number in the lowest byte, others above it. Shifts share their ports with permutations, products do not.
    __m512i of_vector(size_t v) const {
        const size_t byte = slots - 1 - v;
        if (byte == 0) return bytes;
        if (byte == 1) return _mm512_mulhi_epu16(bytes, _mm512_set1_epi16(1 << 8));
        if (byte == 2) return _mm512_madd_epi16(bytes, _mm512_set1_epi32(1 << 16));
        return _mm512_srli_epi32(bytes, 24);
    }
    // The number's highest bit in the lane's.
    __m512i signs_of_vector(size_t v) const {
        const size_t byte = slots - 1 - v;
        if (byte == 3) return bytes;
        if (byte == 2) return _mm512_mullo_epi16(bytes, _mm512_set1_epi16(1 << 8));
        return _mm512_slli_epi32(bytes, 24 - 8 * static_cast<unsigned>(byte));
    }
};

// Eight words of 16 slots bits: message bits, up to four planes of indices, as they lie in memory, and words 5 to 7,
// which are bits 7, 0 and 1 of the numbers. Of eight positions, the bytes of all words are brought together, and these
// 64 bits transposed: a bit matrix by the eight bytes that have one bit each. Message bits become bit 6, which levels
// in registers are not looked up by; where numbers have such a bit, the words are brought here one by one.
template <size_t slots>
struct WordOrder {
    alignas(64) uint8_t of_byte[16 * slots];

    constexpr WordOrder() : of_byte() {
        for (size_t j = 0; j < 2 * slots; j++)
            for (size_t k = 0; k < 8; k++) of_byte[8 * j + 7 - k] = static_cast<uint8_t>(2 * slots * word_of(k) + j);
    }
    static constexpr size_t word_of(size_t bit) {
        constexpr size_t words[] = {6, 7, 1, 2, 3, 4, 0, 5};
        return words[bit];
    }
};
template <size_t slots>
inline constexpr WordOrder<slots> word_order;

// Which of eight positions each byte of their product is of.
template <size_t slots>
constexpr long long one_bit_each() {
    uint64_t bits = 0;
    for (unsigned k = 0; k < 8; k++) bits |= uint64_t{1} << (8 * k + (k ^ (slots - 1)));
    return static_cast<long long>(bits);
}

// All bits of the numbers of levels of which there is the upper half, and that of their sign: in the lower half, they
// are the other way round.
constexpr uint8_t mirrored_words = 0xfe;

template <size_t slots>
struct Words;

template <>
struct Words<4> {
    using Word = uint64_t;
    __m512i all;

    // The first four of memory, or those of them that are chosen.
    [[gnu::always_inline]] void load(const uint8_t* p) {
        all = _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    [[gnu::always_inline]] void load(const uint8_t* p, uint8_t chosen) {
        all = _mm512_zextsi256_si512(_mm256_maskz_loadu_epi64(chosen, p));
    }
    template <size_t word>
    [[gnu::always_inline]] void set(uint64_t bits) {
        all = _mm512_mask_set1_epi64(all, 1 << word, static_cast<long long>(bits));
    }
    [[gnu::always_inline]] void set_subsets(uint64_t c0, uint64_t c1) {
        const __m128i both = _mm_set_epi64x(static_cast<long long>(c1), static_cast<long long>(c0));
        all = _mm512_inserti64x2(all, both, 3);
    }
    [[gnu::always_inline]] void flip(uint8_t chosen, uint64_t bits) {
        all = _mm512_xor_si512(all, _mm512_maskz_set1_epi64(chosen, static_cast<long long>(bits)));
    }
    [[gnu::always_inline]] TrellisNumbers<4> transpose() const {
        const __m512i together = _mm512_permutexvar_epi8(_mm512_load_si512(word_order<4>.of_byte), all);
        return {_mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(one_bit_each<4>()), together, 0)};
    }
};

template <>
struct Words<2> {
    using Word = uint32_t;
    __m256i all;

    [[gnu::always_inline]] void load(const uint8_t* p) {
        all = _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    [[gnu::always_inline]] void load(const uint8_t* p, uint8_t chosen) {
        all = _mm256_zextsi128_si256(_mm_maskz_loadu_epi32(chosen, p));
    }
    template <size_t word>
    [[gnu::always_inline]] void set(uint64_t bits) {
        all = _mm256_mask_set1_epi32(all, 1 << word, static_cast<int>(bits));
    }
    [[gnu::always_inline]] void set_subsets(uint64_t c0, uint64_t c1) {
        all = _mm256_mask_set1_epi64(all, 8, static_cast<long long>(c1 << 32 | (c0 & 0xffffffff)));
    }
    [[gnu::always_inline]] void flip(uint8_t chosen, uint64_t bits) {
        all = _mm256_xor_si256(all, _mm256_maskz_set1_epi32(chosen, static_cast<int>(bits)));
    }
    [[gnu::always_inline]] TrellisNumbers<2> transpose() const {
        const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(word_order<2>.of_byte));
        const __m256i together = _mm256_permutexvar_epi8(order, all);
        const __m256i one_bits = _mm256_set1_epi64x(one_bit_each<2>());
        return {_mm512_cvtepu16_epi32(_mm256_gf2p8affine_epi64_epi8(one_bits, together, 0))};
    }
};

template <>
struct Words<1> {
    using Word = uint16_t;
    __m128i all;

    [[gnu::always_inline]] void load(const uint8_t* p) { all = _mm_loadu_si64(p); }
    [[gnu::always_inline]] void load(const uint8_t* p, uint8_t chosen) { all = _mm_maskz_loadu_epi16(chosen, p); }
    template <size_t word>
    [[gnu::always_inline]] void set(uint64_t bits) {
        all = _mm_insert_epi16(all, static_cast<int>(bits), word);
    }
    [[gnu::always_inline]] void set_subsets(uint64_t c0, uint64_t c1) {
        all = _mm_mask_set1_epi32(all, 8, static_cast<int>(c1 << 16 | (c0 & 0xffff)));
    }
    [[gnu::always_inline]] void flip(uint8_t chosen, uint64_t bits) {
        all = _mm_xor_si128(all, _mm_maskz_set1_epi16(chosen, static_cast<int16_t>(bits)));
    }
    [[gnu::always_inline]] TrellisNumbers<1> transpose() const {
        const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(word_order<1>.of_byte));
        const __m128i together = _mm_shuffle_epi8(all, order);
        return {_mm512_cvtepu8_epi32(_mm_gf2p8affine_epi64_epi8(_mm_set1_epi64x(one_bit_each<1>()), together, 0))};
    }
};

template <bool is_full, size_t slots, class Columns, class Levels, class Read>
[[gnu::always_inline]] inline TrellisNumbers<slots> make_trellis_numbers(const uint8_t* row, const Columns& of,
                                                                         const Levels& levels, uint64_t c0,
                                                                         uint64_t c1, const Read& read) {
    const size_t planes = levels.planes(of);
    Words<slots> words;
    if constexpr (is_full && Levels::are_in_place) {
        if (planes >= 3)
            words.load(row + of.first_byte);
        else
            words.load(row + of.first_byte, static_cast<uint8_t>((2u << planes) - 1));
        if (planes == 4) words.template set<4>(read(4));
        words.set_subsets(c0, c1);
    } else {
        using Word = typename Words<slots>::Word;
        Word packed[8] = {};
        const auto put = [&](size_t bit, uint64_t word) __attribute__((always_inline)) {
            packed[WordOrder<slots>::word_of(bit)] = static_cast<Word>(is_full ? word : of.present(word));
        };
        put(0, c0);
        put(1, c1);
        for (size_t k = 0; k < planes; k++) put(k + 2, read(k + 1));
        std::memcpy(&words.all, packed, sizeof packed);
    }
    levels.template finish<is_full>(words, of, row, read);
    return words.transpose();
}

// The wide codes of all blocks.
template <size_t count, bool at_start>
struct Wide {
    static_assert(count < trellis_vectors, "all top bits are in one word");
    template <class Columns>
    static constexpr size_t wide_vectors(const Columns&) { return count; }
    template <class Columns>
    static constexpr bool starts_wide(const Columns&) { return at_start; }
};

template <class Wide>
struct FewLevels : FewLevelsInRegisters<Wide> {
    static constexpr bool are_in_place = true;

    // Blocks that are all alike have codes of 4 bits.
    template <class Columns>
    static size_t planes(const Columns& of) { return std::is_same_v<Wide, AnyWide> ? of.planes : 3; }

    [[gnu::always_inline]] explicit FewLevels(const AllTrellisLevels& all) : FewLevelsInRegisters<Wide>(all) {}

    template <bool is_full, class Words, class Columns, class Read>
    [[gnu::always_inline]] void finish(Words& words, const Columns& of, const uint8_t* row, const Read&) const {
        if (Wide::wide_vectors(of) == 0) return;
        const uint64_t top = std::is_same_v<Wide, AnyWide> ? of.top_bits(row) : of.top_bits.first_word(row);
        words.flip(mirrored_words, of.is_wide(~top));
    }
};

struct SomeLevels : SomeLevelsInRegisters {
    static constexpr bool are_in_place = true;

    template <class Columns>
    static constexpr size_t planes(const Columns&) { return 4; }

    [[gnu::always_inline]] explicit SomeLevels(const AllTrellisLevels& all) : SomeLevelsInRegisters(all) {}

    template <bool is_full, class Words, class Columns, class Read>
    [[gnu::always_inline]] void finish(Words& words, const Columns& of, const uint8_t* row, const Read& read) const {
        const uint64_t last = is_full ? read(4) : of.present(read(4));
        const uint64_t top = of.wide_vectors > 0 ? of.is_wide(of.top_bits(row)) : 0, is_wide = of.is_wide.mask;
        words.flip(mirrored_words, ~((top & is_wide) | (last & ~is_wide)));
    }
};

struct WrittenLevels : LevelsInMemory {
    static constexpr bool are_in_place = false;
    using LevelsInMemory::LevelsInMemory;

    template <class Columns>
    static size_t planes(const Columns& of) { return of.planes; }

    template <bool is_full, class Words, class Columns, class Read>
    void finish(Words& words, const Columns& of, const uint8_t* row, const Read&) const {
        if (of.wide_vectors > 0) words.flip(1 << 5, of.is_wide(of.top_bits(row)));
    }
};

// What looks the levels up of narrow codes of so many bits, and of wide ones.
template <class Use>
inline void with_trellis_levels(size_t narrow_bits, WideVectors wide, Use use) {
    // At 4 bits: d = 64, and from 128 on.
    if (narrow_bits == 4 && wide.are_alike) {
        if (wide.count == 2 && wide.starts_wide) return use.template operator()<FewLevels<Wide<2, true>>>();
        if (wide.count == 1 && !wide.starts_wide) return use.template operator()<FewLevels<Wide<1, false>>>();
    }
    if (narrow_bits <= 4) return use.template operator()<FewLevels<AnyWide>>();
    if (narrow_bits == 5) return use.template operator()<SomeLevels>();
    use.template operator()<WrittenLevels>();
}

#include "../kernels/levels-inl.h"
#include "../kernels/lookup-inl.h"
#include "../kernels/trellis_lookup-inl.h"

void gather_rows(const PackedRows& rows, const Integers& indices, bool prefetches, size_t first, size_t end,
                 const Output& out, LookupFault& fault) noexcept {
    const auto gather = rows.layout == Layout::trellis ? gather_trellis_rows : avx512::kernels.gather_rows;
    gather(rows, indices, prefetches, first, end, out, fault);
}

void pool_bags(const PackedRows& rows, const Bags& bags, size_t first, size_t end, const Output& out,
               LookupFault& fault) noexcept {
    const auto pool = rows.layout == Layout::trellis ? pool_trellis_bags : avx512::kernels.pool_bags;
    pool(rows, bags, first, end, out, fault);
}

}  // namespace

extern const Lookups lookups;
const Lookups lookups = {gather_rows, pool_bags};

}  // namespace avx512_gfni
}  // namespace embpack
