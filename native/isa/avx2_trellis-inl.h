// Trellis-coded rows with AVX2: there are no masks of bits, so each byte of a register tests a bit of its own. Position
// p is byte p of 64, in two registers: `half[0]` has lanes 0 to 7 of all vectors, `half[1]` lanes 8 to 15, and byte v
// of a lane is vector v's. trellis_blocks-inl.h says how a row lies and what the words mean.
#include "../trellis_rows.h"

namespace embpack::EMBPACK_ISA {
namespace {

constexpr size_t least_slots = 4, most_trellis_sums = 4, trellis_rows_early = 0, most_means_kept = 0;

#include "../kernels/trellis_slots-inl.h"

// A byte for each position of a block.
struct TrellisBytes {
    __m256i half[2];

    static TrellisBytes load(const uint8_t* p) {
        const __m256i* const halves = reinterpret_cast<const __m256i*>(p);
        return {_mm256_load_si256(halves), _mm256_load_si256(halves + 1)};
    }
    static TrellisBytes splat(size_t value) {
        const __m256i byte = _mm256_set1_epi8(static_cast<char>(value));
        return {byte, byte};
    }
    template <class Fn>
    [[gnu::always_inline]] static TrellisBytes each(const Fn& fn) {
        return {fn(0), fn(1)};
    }
};

// PDEP spreads bits in one operation, but on AMD's CPUs before Zen 3 it takes up to 290 cycles.
inline bool has_fast_pdep() {
#ifdef EMBPACK_WITHOUT_PDEP
    return false;
#endif
    return __builtin_cpu_supports("bmi2") &&
           (__builtin_cpu_is("intel") || (__builtin_cpu_is("amd") && !__builtin_cpu_is("amdfam15h") &&
                                          !__builtin_cpu_is("amdfam17h")));
}

// Positions that packed bits belong to. For each position: which byte of the eight has its bit, 0x80 for none (vpshufb
// makes 0 of that); that bit, alone; and 0xff if it has one, 0 if it has none.
struct BitPositions {
    alignas(32) uint8_t byte[64], bit[64], inside[64];
    uint64_t mask;
    bool by_pdep = has_fast_pdep();

    BitPositions() = default;
    explicit BitPositions(uint64_t positions) : mask(positions) {
        size_t number = 0;
        for (size_t p = 0; p < 64; p++) {
            const bool is_inside = positions >> p & 1;
            byte[p] = static_cast<uint8_t>(is_inside ? number / 8 : 0x80);
            bit[p] = static_cast<uint8_t>(1u << number % 8);
            inside[p] = is_inside ? 0xff : 0;
            number += is_inside;
        }
    }

    // Four times packed bits, each bit at its position.
    [[gnu::always_inline]] void spread_four(uint64_t (&bits)[4]) const {
        if (by_pdep) [[likely]]   // which as an intrinsic is for -mbmi2 alone
            unrolled<4>([&](size_t i) { asm("pdepq %1, %0, %0" : "+r"(bits[i]) : "rm"(mask)); });
        else
            unrolled<4>([&](size_t i) { bits[i] = spread_by_bytes(bits[i]); });
    }

private:
    [[gnu::noinline]] uint64_t spread_by_bytes(uint64_t bits) const {
        const __m256i all_bits = _mm256_set1_epi64x(static_cast<int64_t>(bits));
        const auto find_half = [&](size_t h) __attribute__((always_inline)) {
            const __m256i own_bit = _mm256_load_si256(reinterpret_cast<const __m256i*>(bit) + h);
            const __m256i from = _mm256_load_si256(reinterpret_cast<const __m256i*>(byte) + h);
            const __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(all_bits, from), own_bit);
            return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(own, own_bit)));
        };
        return find_half(0) | uint64_t{find_half(1)} << 32;
    }
};

// The number of each position of a block, and where the bits of a plane are.
template <size_t slots>
struct TrellisNumbers {
    TrellisBytes bytes = TrellisBytes::splat(0), byte, bit;

    TrellisNumbers() = default;
    [[gnu::always_inline]] explicit TrellisNumbers(const BitPositions& present)
        : byte(TrellisBytes::load(present.byte)), bit(TrellisBytes::load(present.bit)) {}

    // Adds `weight` to the numbers of the positions whose bits are set.
    template <bool is_full>
    [[gnu::always_inline]] void add(const BitPositions&, uint64_t bits, size_t weight) {
        add_at(byte, bit, bits, weight);
    }
    // Each byte gets the byte of `bits` that has its bit, and keeps that bit alone. Where it is set, a comparison makes
    // 0xff of it.
    [[gnu::always_inline]] void add_at(const TrellisBytes& byte, const TrellisBytes& bit, uint64_t bits,
                                       size_t weight) {
        const __m256i all_bits = _mm256_set1_epi64x(static_cast<int64_t>(bits));
        const __m256i added = _mm256_set1_epi8(static_cast<char>(weight));
        bytes = TrellisBytes::each([&](size_t h) __attribute__((always_inline)) {
            const __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(all_bits, byte.half[h]), bit.half[h]);
            const __m256i is_set = _mm256_cmpeq_epi8(own, bit.half[h]);
            return _mm256_or_si256(bytes.half[h], _mm256_and_si256(is_set, added));
        });
    }
    [[gnu::always_inline]] void add_top_bits(const BitPositions& is_wide, uint64_t bits, size_t weight) {
        add_at(TrellisBytes::load(is_wide.byte), TrellisBytes::load(is_wide.bit), bits, weight);
    }
};

// All levels, in memory, by gathers.
struct ManyLevels {
    static constexpr size_t most_index_planes = 6;
    const AllTrellisLevels& levels;
    size_t num_narrow;

    explicit ManyLevels(const AllTrellisLevels& levels) : levels(levels), num_narrow(levels.num_narrow) {}

    static size_t weight(size_t k) { return size_t{1} << k; }

    template <bool is_full, class Numbers, class Block, class Read>
    void finish(Numbers& numbers, const Block& block, const uint8_t* row, const Read&) const {
        if (block.wide_vectors > 0) numbers.add_top_bits(block.is_wide, block.top_bits(row), num_narrow);
    }
    template <class Numbers, class Block>
    F32x16 operator()(const Numbers& numbers, const Block& block, size_t v) const {
        const TrellisBytes inside = TrellisBytes::load(block.is_wide.inside);
        const int shift = 8 * static_cast<int>(v);
        const auto look_up_eight = [&](size_t h) {
            const __m256i number = _mm256_srli_epi32(numbers.bytes.half[h], shift);
            const __m256i is_wide = _mm256_srai_epi32(_mm256_slli_epi32(inside.half[h], 24 - shift), 31);
            const __m256i first = _mm256_and_si256(is_wide, _mm256_set1_epi32(static_cast<int>(num_narrow)));
            const __m256i at = _mm256_add_epi32(_mm256_and_si256(number, _mm256_set1_epi32(0xff)), first);
            return _mm256_i32gather_ps(levels.values, at, 4);
        };
        return {look_up_eight(0), look_up_eight(1)};
    }
};

#include "avx2_trellis_fours-inl.h"

// Of up to 32 levels of narrow codes and 64 of wide ones the upper halves, by permutations of eight. The lower halves
// are the negatives of these, in reverse: `finish` makes a number its place in the upper half, and sets bit 7 where the
// level is negative.
struct FewLevels {
    template <size_t columns, class Block>
    using Fours = TrellisFours<columns, Block>;
    static constexpr size_t most_index_planes = 3;
    alignas(32) float narrow[16] = {}, wide[32] = {};
    size_t narrow_top, num_narrow;

    explicit FewLevels(const AllTrellisLevels& all)
        : narrow_top(all.num_narrow / 2),
          num_narrow(all.num_narrow) {
        std::memcpy(narrow, all.values + narrow_top, sizeof(float) * narrow_top);
        std::memcpy(wide, all.values + num_narrow + all.num_wide / 2, sizeof(float) * all.num_wide / 2);
    }

    static size_t weight(size_t k) { return size_t{1} << k; }

    template <bool is_full, class Numbers, class Block, class Read>
    [[gnu::always_inline]] void finish(Numbers& numbers, const Block& block, const uint8_t* row,
                                       const Read&) const {
        if (block.wide_vectors > 0) numbers.add_top_bits(block.is_wide, block.top_bits(row), num_narrow);
        const TrellisBytes inside = TrellisBytes::load(block.is_wide.inside);
        const __m256i narrow_bit = _mm256_set1_epi8(static_cast<char>(narrow_top));
        numbers.bytes = TrellisBytes::each([&](size_t h) {
            const __m256i number = numbers.bytes.half[h];
            // The highest bit of a number, 2 narrow_top for wide ones: as many levels are below the middle.
            const __m256i top = _mm256_add_epi8(narrow_bit, _mm256_and_si256(inside.half[h], narrow_bit));
            const __m256i is_below = _mm256_cmpeq_epi8(_mm256_and_si256(number, top), _mm256_setzero_si256());
            // From n < top to 0x80 + (top - 1 - n), from others to n - top. Both are exclusive ors.
            const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x80));
            const __m256i flipped = _mm256_or_si256(_mm256_add_epi8(top, top), sign);
            const __m256i change = _mm256_and_si256(is_below, _mm256_sub_epi8(flipped, _mm256_set1_epi8(1)));
            return _mm256_xor_si256(_mm256_xor_si256(number, top), change);
        });
    }
    template <class Numbers, class Block>
    [[gnu::always_inline]] F32x16 operator()(const Numbers& numbers, const Block& block, size_t v) const {
        const int shift = 8 * static_cast<int>(v);
        const auto look_up_eight = [&](size_t h) __attribute__((always_inline)) {
            const __m256i bytes = numbers.bytes.half[h], number = _mm256_srli_epi32(bytes, shift);
            // A bit of vector v's bytes, as the lane's highest, which is what blendv and signs of floats read.
            const auto bit_to_sign = [&](int bit) {
                return _mm256_castsi256_ps(_mm256_slli_epi32(bytes, 31 - bit - shift));
            };
            // By the lowest three bits of the lane; bits 3 and 4 choose between the eights that are found.
            const auto of_eight = [&](const float* table) {
                return _mm256_permutevar8x32_ps(_mm256_load_ps(table), number);
            };
            const auto of_sixteen = [&](const float* table) {
                return _mm256_blendv_ps(of_eight(table), of_eight(table + 8), bit_to_sign(3));
            };
            __m256 magnitude = of_sixteen(narrow);
            if (v < block.wide_vectors) {
                const __m256 of_wide = _mm256_blendv_ps(of_sixteen(wide), of_sixteen(wide + 16), bit_to_sign(4));
                const __m256i inside = _mm256_load_si256(reinterpret_cast<const __m256i*>(block.is_wide.inside) + h);
                magnitude = _mm256_blendv_ps(magnitude, of_wide,
                                             _mm256_castsi256_ps(_mm256_slli_epi32(inside, 24 - shift)));
            }
            return _mm256_xor_ps(magnitude, _mm256_and_ps(bit_to_sign(7), _mm256_set1_ps(-0.0f)));
        };
        return {look_up_eight(0), look_up_eight(1)};
    }
};

template <class Use>
inline void with_trellis_levels(const TrellisShape& shape, Use use) {
    if (shape.narrow_bits <= 4) return use.template operator()<FewLevels>();
    use.template operator()<ManyLevels>();
}

#include "../kernels/trellis_numbers-inl.h"

}  // namespace
}  // namespace embpack::EMBPACK_ISA
