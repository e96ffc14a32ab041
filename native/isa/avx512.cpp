// AVX-512 (F, BW, DQ, VL: Skylake-X and later, Zen 4 and later).
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../kernels.h"
#include "../trellis_rows.h"

namespace embpack::avx512 {
namespace {

constexpr const char* isa_name = "avx512";

constexpr size_t most_trellis_sums = 16, trellis_rows_early = 0;

#include "avx512-inl.h"

// For each position of a block the number of its level, in a byte; where a lane has two positions, in both bytes of a
// word, for masks of 32 bits take half the time of masks of 64.
constexpr size_t least_slots = 2;
template <size_t slots>
struct TrellisNumbers {
    static constexpr unsigned slot_bits = 32 / slots;
    __m512i bytes = _mm512_setzero_si512();

    TrellisNumbers() = default;
    explicit TrellisNumbers(const BitPositions&) {}

    // Adds `added`, all of whose bytes are the same, where bits are set, or takes from it. Bits are packed unless the
    // block is full.
    template <bool is_full>
    [[gnu::always_inline]] void add(const BitPositions& present, uint64_t bits, I32x16 added) {
        add_at(is_full ? bits : present(bits), added);
    }
    [[gnu::always_inline]] void add_at(uint64_t positions, I32x16 added) {
        if constexpr (slots == 2)
            bytes = _mm512_mask_add_epi16(bytes, static_cast<__mmask32>(positions), bytes, added);
        else
            bytes = _mm512_mask_add_epi8(bytes, positions, bytes, added);
    }
    [[gnu::always_inline]] void take_from(uint64_t positions, I32x16 from) {
        if constexpr (slots == 2)
            bytes = _mm512_mask_sub_epi16(bytes, static_cast<__mmask32>(positions), from, bytes);
        else
            bytes = _mm512_mask_sub_epi8(bytes, positions, from, bytes);
    }
    // Lane i: the number at position slots i + v in the lowest byte, others above it; and its highest bit in the
    // lane's.
    __m512i of_vector(size_t v) const {
        return v == 0 ? bytes : _mm512_srli_epi32(bytes, slot_bits * static_cast<unsigned>(v));
    }
    __m512i signs_of_vector(size_t v) const {
        return v + 1 == slots ? bytes : _mm512_slli_epi32(bytes, 32 - slot_bits * static_cast<unsigned>(v + 1));
    }
};

// Weights of the bits of a number, a byte for each position.
template <size_t count>
struct BitWeights {
    I32x16 of[count];

    [[gnu::always_inline]] BitWeights() {
        for (size_t k = 0; k < count; k++) {
            of[k] = _mm512_set1_epi8(static_cast<char>(1 << k));
            stay_in_register(of[k]);
        }
    }
};

struct WrittenLevels : LevelsInMemory {
    static constexpr size_t most_planes = 6;
    using LevelsInMemory::LevelsInMemory;

    static I32x16 weight(size_t k) { return _mm512_set1_epi8(static_cast<char>(1 << k)); }

    template <bool is_full, class Numbers, class Columns, class Read>
    void finish(Numbers& numbers, const Columns& of, const uint8_t* row, const Read&) const {
        const __m512i weight = _mm512_set1_epi8(static_cast<char>(num_narrow));
        if (of.wide_vectors > 0) numbers.template add<false>(of.is_wide, of.top_bits(row), weight);
    }
};

struct FewLevels : FewLevelsInRegisters<AnyWide> {
    static constexpr size_t most_planes = 3;
    BitWeights<most_planes + 2> weights;
    I32x16 middle;

    [[gnu::always_inline]] explicit FewLevels(const AllTrellisLevels& all)
        : FewLevelsInRegisters(all), middle(_mm512_set1_epi8(static_cast<char>(0x7f + all.num_narrow))) {
        stay_in_register(middle);
    }

    I32x16 weight(size_t k) const { return weights.of[k]; }

    template <bool is_full, class Numbers, class Columns, class Read>
    [[gnu::always_inline]] void finish(Numbers& numbers, const Columns& of, const uint8_t* row, const Read&) const {
        if (of.wide_vectors > 0) numbers.take_from(of.is_wide(~of.top_bits(row)), middle);
    }
};

// But for the sixth bit, which narrow codes do not have, numbers are made as if there were 32 levels above the middle.
struct SomeLevels : SomeLevelsInRegisters {
    static constexpr size_t most_planes = 3;
    BitWeights<most_planes + 3> weights;
    I32x16 middle = _mm512_set1_epi8(static_cast<char>(0x80 + 31));

    [[gnu::always_inline]] explicit SomeLevels(const AllTrellisLevels& all) : SomeLevelsInRegisters(all) {
        stay_in_register(middle);
    }

    I32x16 weight(size_t k) const { return weights.of[k]; }

    template <bool is_full, class Numbers, class Columns, class Read>
    [[gnu::always_inline]] void finish(Numbers& numbers, const Columns& of, const uint8_t* row,
                                       const Read& read) const {
        const uint64_t last = is_full ? read(most_planes + 1) : of.present(read(most_planes + 1));
        const uint64_t top = of.wide_vectors > 0 ? of.is_wide(of.top_bits(row)) : 0, is_wide = of.is_wide.mask;
        const uint64_t is_below = ~((top & is_wide) | (last & ~is_wide));
        numbers.take_from(is_below, middle);
        numbers.add_at(is_wide & ~(last ^ top), weights.of[most_planes + 2]);
    }
};

// What looks the levels up of narrow codes of so many bits, and of wide ones.
template <class Use>
inline void with_trellis_levels(size_t narrow_bits, WideVectors, Use use) {
    if (narrow_bits <= 4) return use.template operator()<FewLevels>();
    if (narrow_bits == 5) return use.template operator()<SomeLevels>();
    use.template operator()<WrittenLevels>();
}

#include "../kernels/all-inl.h"

}  // namespace

extern const Kernels kernels;
const Kernels kernels = make_kernels();

}  // namespace embpack::avx512
