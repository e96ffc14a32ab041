// Trellis-coded rows with AVX-512: a plane is a mask. trellis_blocks-inl.h says how a row lies and what the words mean.
//
// FROM PLANES TO NUMBERS. A word of bits goes from memory to a mask register as it is. Bit p of it then stands for byte
// p of a register that has the numbers of 64 positions, four to a lane:
//
//     mask      bit     63  62  61  60 | .. |  7   6   5   4 |  3   2   1   0
//     numbers   byte    63  62  61  60 | .. |  7   6   5   4 |  3   2   1   0
//               vector   3   2   1   0 | .. |  3   2   1   0 |  3   2   1   0
//               lane          15       | .. |       1        |       0
//
// An addition of 2^k to all bytes under the mask of bit k adds this bit to 64 numbers at once. c0, c1 and the index
// planes take one each. Words on their way to mask registers are what bounds it.
//
// FROM NUMBERS TO LEVELS. Shifted right by 8 v, the lanes have the numbers of vector v in their lowest bytes. vpermi2ps
// looks levels up among the 32 of two registers by the lowest five bits of each lane. It ignores all above them, so the
// other vectors' numbers may stay there.
#include "avx512_bits-inl.h"

namespace embpack::EMBPACK_ISA {
namespace {

constexpr size_t least_slots = 2, most_trellis_sums = 16, trellis_rows_early = 0, most_means_kept = 0;

#include "../kernels/trellis_slots-inl.h"

// The number of each position of a block. With slots = 4 byte p has that of position p. With slots = 2 both bytes of
// 16-bit word p have it: a mask has a bit for each word, and masks of 32 bits take half the time of masks of 64.
template <size_t slots>
struct TrellisNumbers {
    static constexpr unsigned slot_bits = 32 / slots;
    __m512i bytes = _mm512_setzero_si512();

    TrellisNumbers() = default;
    explicit TrellisNumbers(const BitPositions&) {}

    // Adds `added`, whose bytes are all the same, to the numbers of the positions whose bits are set. If the block is
    // not full, `bits` has those of positions that are present, without gaps.
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
    // Makes of these numbers `from` less the number. No byte of `from` may be less than the number.
    [[gnu::always_inline]] void take_from(uint64_t positions, I32x16 from) {
        if constexpr (slots == 2)
            bytes = _mm512_mask_sub_epi16(bytes, static_cast<__mmask32>(positions), from, bytes);
        else
            bytes = _mm512_mask_sub_epi8(bytes, positions, from, bytes);
    }
    // Lane i: the number at position slots * i + v, in the lowest byte, with other numbers above it.
    __m512i of_vector(size_t v) const {
        return v == 0 ? bytes : _mm512_srli_epi32(bytes, slot_bits * static_cast<unsigned>(v));
    }
    // Lane i: the highest bit of the same number, as the lane's highest, with other bits below it.
    __m512i signs_of_vector(size_t v) const {
        return v + 1 == slots ? bytes : _mm512_slli_epi32(bytes, 32 - slot_bits * static_cast<unsigned>(v + 1));
    }
};

// What bits of a number count: 2^k in all bytes, for bit k.
template <size_t count>
struct BitWeights {
    I32x16 of_bit[count];

    [[gnu::always_inline]] BitWeights() {
        for (size_t k = 0; k < count; k++) {
            of_bit[k] = _mm512_set1_epi8(static_cast<char>(1 << k));
            stay_in_register(of_bit[k]);
        }
    }
};

// Levels of narrow codes of 6 or 7 bits. A number has all its bits, of which a wide one's top bit is the highest.
struct ManyLevels : LevelsInMemory {
    static constexpr size_t most_index_planes = 6;
    using LevelsInMemory::LevelsInMemory;

    static I32x16 weight(size_t k) { return _mm512_set1_epi8(static_cast<char>(1 << k)); }

    template <class Numbers, class Block>
    F32x16 operator()(const Numbers& numbers, const Block& block, size_t v) const {
        return of_numbers(numbers.of_vector(v), block.wide_lanes[v]);
    }

    template <bool is_full, class Numbers, class Block, class Read>
    void finish(Numbers& numbers, const Block& block, const uint8_t* row, const Read&) const {
        const __m512i weight = _mm512_set1_epi8(static_cast<char>(num_narrow));
        if (block.wide_vectors > 0) numbers.template add<false>(block.is_wide, block.top_bits(row), weight);
    }
};

// Lane by lane `yes` where `where` has -1, and `no` where it has 0. To load all bits of the lanes takes less than to
// bring a mask to a mask register. 0xca is a ? b : c, bit by bit.
inline F32x16 choose(const int32_t* where, F32x16 yes, F32x16 no) {
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_load_si512(where), _mm512_castps_si512(yes),
                                                         _mm512_castps_si512(no), 0xca));
}

// Levels in registers: up to 32 of narrow codes, and of up to 64 of wide codes the upper half. The lower half are the
// negatives of these, in reverse: for n < num_upper, level n is -upper[num_upper - 1 - n]. A wide number's top bit says
// which half, and is not added to the number:
//
//     top bit 1    the other bits n    = the place in the upper half
//     top bit 0    `middle` - n        = 0x80 + (num_upper - 1 - n): the place, and the sign as the byte's highest bit
//
// So wide numbers whose top bit is 0 are taken from `middle`. The sign bit goes to the lane's highest bit, which is the
// sign of a float. Narrow numbers stay as they are.
struct FewLevels {
    static constexpr size_t most_index_planes = 3;
    BitWeights<most_index_planes + 2> weights;
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

    template <class Numbers, class Block>
    [[gnu::always_inline]] F32x16 operator()(const Numbers& numbers, const Block& block, size_t v) const {
        const __m512i number = numbers.of_vector(v);
        const auto of_wide = [&]() __attribute__((always_inline)) {   // magnitude ^ (signs & sign)
            const __m512i magnitude = _mm512_castps_si512(_mm512_permutex2var_ps(wide_low, number, wide_high));
            return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(magnitude, numbers.signs_of_vector(v), sign, 0x78));
        };
        if (v == 0 && block.starts_wide) return of_wide();
        const __m512 of_narrow = _mm512_permutex2var_ps(narrow_low, number, narrow_high);
        if (v >= block.wide_vectors) [[likely]] return of_narrow;
        return choose(block.wide_columns + 16 * v, of_wide(), of_narrow);
    }

    I32x16 weight(size_t k) const { return weights.of_bit[k]; }

    template <bool is_full, class Numbers, class Block, class Read>
    [[gnu::always_inline]] void finish(Numbers& numbers, const Block& block, const uint8_t* row, const Read&) const {
        if (block.wide_vectors > 0) numbers.take_from(block.is_wide(~block.top_bits(row)), middle);
    }

private:
    // Not inlined: it is compiled once, not for every tile.
    [[gnu::noinline]] static void write(const AllTrellisLevels& all, float* levels) {
        const size_t num_narrow = all.num_narrow, num_upper = all.num_wide / 2;
        std::memset(levels, 0, sizeof(float) * 64);
        std::memcpy(levels, all.values, sizeof(float) * num_narrow);
        // Repeated until both registers are full.
        const float* const upper = all.values + num_narrow + num_upper;
        for (size_t i = 0; num_upper > 0 && i < 32; i++) levels[32 + i] = upper[i % num_upper];
    }
};

// Levels in registers: of 64 of narrow codes and of 128 of wide codes the upper halves, 32 and 64. All numbers become a
// sign and a place in the upper half, as wide ones do in FewLevels. The sign is from a number's highest bit, which is
// bit 5 of a narrow number, and bit 6, the top bit, of a wide one. With n bits 0 to 4 of the number:
//
//     highest bit 1    n                               wide: + 32 if bit 5 is 1
//     highest bit 0    `middle` - n = 0x80 + 31 - n    wide: + 32 if bit 5 is 0
//
// So n is added up first, of c0, c1 and three index planes. `finish` does the rest.
struct SomeLevels {
    static constexpr size_t most_index_planes = 3;
    BitWeights<most_index_planes + 3> weights;
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

    template <class Numbers, class Block>
    [[gnu::always_inline]] F32x16 operator()(const Numbers& numbers, const Block& block, size_t v) const {
        const __m512i number = numbers.of_vector(v);
        __m512 levels = _mm512_permutex2var_ps(narrow[0], number, narrow[1]);
        if (v < block.wide_vectors) {
            const __mmask16 is_high = _mm512_test_epi32_mask(number, _mm512_set1_epi32(32));
            const __m512 low = _mm512_permutex2var_ps(wide[0], number, wide[1]);
            const __m512 high = _mm512_permutex2var_ps(wide[2], number, wide[3]);
            levels = choose(block.wide_columns + 16 * v, _mm512_mask_blend_ps(is_high, low, high), levels);
        }
        const __m512i magnitude = _mm512_castps_si512(levels);   // magnitude ^ (signs & sign)
        return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(magnitude, numbers.signs_of_vector(v), sign, 0x78));
    }

    I32x16 weight(size_t k) const { return weights.of_bit[k]; }

    template <bool is_full, class Numbers, class Block, class Read>
    [[gnu::always_inline]] void finish(Numbers& numbers, const Block& block, const uint8_t* row,
                                       const Read& read_plane) const {
        const uint64_t plane = read_plane(most_index_planes + 1), bit_5 = is_full ? plane : block.present(plane);
        const uint64_t top = block.wide_vectors > 0 ? block.is_wide(block.top_bits(row)) : 0;
        const uint64_t is_wide = block.is_wide.mask;
        const uint64_t is_upper = (top & is_wide) | (bit_5 & ~is_wide);
        numbers.take_from(~is_upper, middle);
        numbers.add_at(is_wide & ~(bit_5 ^ top), weights.of_bit[most_index_planes + 2]);
    }

private:
    [[gnu::noinline]] static void write(const AllTrellisLevels& all, float* levels) {
        std::memset(levels, 0, sizeof(float) * 96);
        std::memcpy(levels, all.values + 32, sizeof(float) * 32);
        std::memcpy(levels + 32, all.values + 64 + all.num_wide / 2, sizeof(float) * all.num_wide / 2);
    }
};

template <class Use>
inline void with_trellis_levels(const TrellisShape& shape, Use use) {
    if (shape.narrow_bits <= 4) return use.template operator()<FewLevels>();
    if (shape.narrow_bits == 5) return use.template operator()<SomeLevels>();
    use.template operator()<ManyLevels>();
}

#include "../kernels/trellis_numbers-inl.h"

}  // namespace
}  // namespace embpack::EMBPACK_ISA
