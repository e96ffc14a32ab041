// Trellis-coded rows with AVX-512: a word of bits is a mask.
#include "avx512_bits-inl.h"

namespace embpack::EMBPACK_ISA {
namespace {

constexpr size_t least_slots = 2, most_trellis_sums = 16, trellis_rows_early = 0, most_means_kept = 0;

#include "../kernels/trellis_slots-inl.h"

// For each position of a block the number of its level, in a byte; where a lane has two positions, in both bytes of a
// word, for masks of 32 bits take half the time of masks of 64.
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

    template <class Numbers, class Columns>
    F32x16 operator()(const Numbers& numbers, const Columns& of, size_t v) const {
        return of_numbers(numbers.of_vector(v), of.wide_lanes[v]);
    }

    template <bool is_full, class Numbers, class Columns, class Read>
    void finish(Numbers& numbers, const Columns& of, const uint8_t* row, const Read&) const {
        const __m512i weight = _mm512_set1_epi8(static_cast<char>(num_narrow));
        if (of.wide_vectors > 0) numbers.template add<false>(of.is_wide, of.top_bits(row), weight);
    }
};

// Where all bits are set, or none: it takes less to load them than to make a mask of bits.
inline F32x16 choose(const int32_t* where, F32x16 yes, F32x16 no) {
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_load_si512(where), _mm512_castps_si512(yes),
                                                         _mm512_castps_si512(no), 0xca));
}

// At most 32 levels of narrow codes, in registers, and 64 of wide ones. Of the latter only the upper half is there:
// where a top bit is not set, the number is one counted down from the middle, and the byte's highest bit is the level's
// sign.
struct FewLevels {
    static constexpr size_t most_planes = 3;
    BitWeights<most_planes + 2> weights;
    F32x16 narrow_low, narrow_high, wide_low, wide_high;
    I32x16 middle, sign = _mm512_set1_epi32(INT32_MIN);

    [[gnu::always_inline]] explicit FewLevels(const AllTrellisLevels& all)
        : middle(_mm512_set1_epi8(static_cast<char>(0x7f + all.num_narrow))) {
        float levels[64];
        write(all, levels);
        narrow_low = load(levels);
        narrow_high = load(levels + 16);
        wide_low = load(levels + 32);
        wide_high = load(levels + 48);
        stay_in_register(narrow_low);
        stay_in_register(narrow_high);
        stay_in_register(wide_low);
        stay_in_register(wide_high);
        stay_in_register(sign);
        stay_in_register(middle);
    }

    template <class Numbers, class Columns>
    [[gnu::always_inline]] F32x16 operator()(const Numbers& numbers, const Columns& of, size_t v) const {
        const __m512i number = numbers.of_vector(v);
        const auto of_wide = [&]() __attribute__((always_inline)) {
            const __m512i magnitude = _mm512_castps_si512(_mm512_permutex2var_ps(wide_low, number, wide_high));
            return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(magnitude, numbers.signs_of_vector(v), sign, 0x78));
        };
        if (v == 0 && of.starts_wide) return of_wide();
        const __m512 of_narrow = _mm512_permutex2var_ps(narrow_low, number, narrow_high);
        if (v >= of.wide_vectors) [[likely]] return of_narrow;
        return choose(of.wide_columns + 16 * v, of_wide(), of_narrow);
    }

    I32x16 weight(size_t k) const { return weights.of[k]; }

    template <bool is_full, class Numbers, class Columns, class Read>
    [[gnu::always_inline]] void finish(Numbers& numbers, const Columns& of, const uint8_t* row, const Read&) const {
        if (of.wide_vectors > 0) numbers.take_from(of.is_wide(~of.top_bits(row)), middle);
    }

private:
    // Not inlined: it is compiled once, not for every tile.
    [[gnu::noinline]] static void write(const AllTrellisLevels& all, float* levels) {
        const size_t num_narrow = all.num_narrow, num_upper = all.num_wide / 2;
        std::memset(levels, 0, sizeof(float) * 64);
        std::memcpy(levels, all.values, sizeof(float) * num_narrow);
        // As often as they fit: bits of a number that no level needs may be set.
        const float* const upper = all.values + num_narrow + num_upper;
        for (size_t i = 0; num_upper > 0 && i < 32; i++) levels[32 + i] = upper[i % num_upper];
    }
};

// 64 levels of narrow codes and 128 of wide ones, of both the upper half, by numbers that are counted from the middle:
// but for the sixth bit, which narrow codes do not have, these are made as if there were 32 levels above it.
struct SomeLevels {
    static constexpr size_t most_planes = 3;
    BitWeights<most_planes + 3> weights;
    I32x16 middle = _mm512_set1_epi8(static_cast<char>(0x80 + 31));
    F32x16 narrow[2], wide[4];
    I32x16 sign = _mm512_set1_epi32(INT32_MIN);

    [[gnu::always_inline]] explicit SomeLevels(const AllTrellisLevels& all) {
        float levels[96];
        write(all, levels);
        for (size_t i = 0; i < 2; i++) narrow[i] = load(levels + 16 * i);
        for (size_t i = 0; i < 4; i++) wide[i] = load(levels + 32 + 16 * i);
        for (F32x16& sixteen : narrow) stay_in_register(sixteen);
        for (F32x16& sixteen : wide) stay_in_register(sixteen);
        stay_in_register(sign);
        stay_in_register(middle);
    }

    template <class Numbers, class Columns>
    [[gnu::always_inline]] F32x16 operator()(const Numbers& numbers, const Columns& of, size_t v) const {
        const __m512i number = numbers.of_vector(v);
        __m512 levels = _mm512_permutex2var_ps(narrow[0], number, narrow[1]);
        if (v < of.wide_vectors) {
            const __mmask16 is_high = _mm512_test_epi32_mask(number, _mm512_set1_epi32(32));
            const __m512 low = _mm512_permutex2var_ps(wide[0], number, wide[1]);
            const __m512 high = _mm512_permutex2var_ps(wide[2], number, wide[3]);
            levels = choose(of.wide_columns + 16 * v, _mm512_mask_blend_ps(is_high, low, high), levels);
        }
        const __m512i magnitude = _mm512_castps_si512(levels);
        return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(magnitude, numbers.signs_of_vector(v), sign, 0x78));
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

private:
    [[gnu::noinline]] static void write(const AllTrellisLevels& all, float* levels) {
        std::memset(levels, 0, sizeof(float) * 96);
        std::memcpy(levels, all.values + 32, sizeof(float) * 32);
        std::memcpy(levels + 32, all.values + 64 + all.num_wide / 2, sizeof(float) * all.num_wide / 2);
    }
};

// What looks the levels up of narrow codes of so many bits, and of wide ones.
template <class Use>
inline void with_trellis_levels(const TrellisShape& shape, Use use) {
    if (shape.narrow_bits <= 4) return use.template operator()<FewLevels>();
    if (shape.narrow_bits == 5) return use.template operator()<SomeLevels>();
    use.template operator()<WrittenLevels>();
}

// Calls use<Levels>() where sums without weights have code of their own: about 4 bits a value, as most tables have.
template <class Use>
inline bool with_known_levels(const TrellisShape& shape, WideVectors, Use use) {
    if (shape.narrow_bits > 4) return false;
    use.template operator()<FewLevels>();
    return true;
}

#include "../kernels/trellis_numbers-inl.h"

}  // namespace
}  // namespace embpack::EMBPACK_ISA
