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

// Positions that packed bits belong to. For each position: which byte of the eight has its bit, 0x80 for none (vpshufb
// makes 0 of that); that bit, alone; and 0xff if it has one, 0 if it has none.
struct BitPositions {
    alignas(32) uint8_t byte[64], bit[64], inside[64];
    uint64_t mask;
    uint64_t packed_mask = 0, factor = 0;   // of few positions, see spread_few; 0 if there is no such factor

    BitPositions() = default;
    explicit BitPositions(uint64_t positions) : mask(positions) {
        uint8_t at[64];
        size_t number = 0;
        for (size_t p = 0; p < 64; p++) {
            const bool is_inside = positions >> p & 1;
            byte[p] = static_cast<uint8_t>(is_inside ? number / 8 : 0x80);
            bit[p] = static_cast<uint8_t>(1u << number % 8);
            inside[p] = is_inside ? 0xff : 0;
            at[number] = static_cast<uint8_t>(p);
            number += is_inside;
        }
        if (number <= most_few) find_factor(at, number);
    }

    // Packed bits, each at its position. A product has bit t moved by what moves bit s to its position, for all s and
    // t. Where no two of these fall together, nothing is carried, and the mask keeps each bit where it belongs.
    [[gnu::always_inline]] uint64_t spread_few(uint64_t bits) const { return (bits & packed_mask) * factor & mask; }

private:
    static constexpr size_t most_few = 8;

    void find_factor(const uint8_t* at, size_t count) {
        uint64_t taken = 0, sum = 0;
        for (size_t s = 0; s < count; s++) {
            sum += uint64_t{1} << (at[s] - s);
            for (size_t t = 0; t < count && at[s] - s + t < 64; t++) {
                const uint64_t bit_moved = uint64_t{1} << (at[s] - s + t);
                if (taken & bit_moved) return;
                taken |= bit_moved;
            }
        }
        packed_mask = (uint64_t{1} << count) - 1;
        factor = sum;
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

// The levels of a full block, by the upper halves of floats: a vector, of vectors 0 and 1 or of 2 and 3, has that of the
// even one in the lower half of its lane and that of the odd one in the upper half. No array, which GCC would copy
// through memory by eight bytes at a time, and each load of it would wait.
struct HalvesOfLevels {
    I32x16 first_two, last_two;
};

// Two tables of sixteen bytes, looked up by the low four bits of a byte.
struct ByteTables {
    __m256i high, low;   // bytes of the upper half of a float

    // Of `count` floats, at most sixteen.
    ByteTables(const float* levels, size_t count) {
        alignas(16) uint8_t bytes[2][16] = {};
        for (size_t i = 0; i < count; i++) {
            uint32_t bits;
            std::memcpy(&bits, levels + i, sizeof bits);
            bytes[0][i] = static_cast<uint8_t>(bits >> 24);
            bytes[1][i] = static_cast<uint8_t>(bits >> 16);
        }
        high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[0])));
        low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[1])));
    }
};

// A byte for each position of a full block, in the order that HalvesOfLevels needs: one register has vectors 0 and 1 of
// each lane, the other vectors 2 and 3. Eight bytes are four lanes: 0 .. 3, 8 .. 11, 4 .. 7, 12 .. 15.
struct OrderedBytes {
    __m256i half[2];

    // Of four planes the four bits of each position. Bytes j of the planes come together as one word of 32 bits; in it,
    // bit 8 r + c is that of plane r and position 8 j + c. Two exchanges of bits bring the four of a position together:
    // bits 4 and 1 of a bit's number change places, then bits 3 and 0.
    [[gnu::always_inline]] static OrderedBytes of_planes(uint64_t p0, uint64_t p1, uint64_t p2, uint64_t p3) {
        const auto plane = [](uint64_t bits) { return _mm_cvtsi64_si128(static_cast<int64_t>(bits)); };
        const __m128i first = _mm_unpacklo_epi8(plane(p0), plane(p1)), second = _mm_unpacklo_epi8(plane(p2), plane(p3));
        const __m256i in_order = _mm256_set_m128i(_mm_unpackhi_epi16(first, second), _mm_unpacklo_epi16(first, second));
        __m256i words = _mm256_permute4x64_epi64(in_order, 0xd8);   // lanes 0 .. 3, 8 .. 11, 4 .. 7, 12 .. 15
        const auto exchange_bits = [&](int distance, int mask) __attribute__((always_inline)) {
            const __m256i shifted = _mm256_srli_epi32(words, distance);
            const __m256i change = _mm256_and_si256(_mm256_xor_si256(shifted, words), _mm256_set1_epi32(mask));
            words = _mm256_xor_si256(words, _mm256_xor_si256(change, _mm256_slli_epi32(change, distance)));
        };
        exchange_bits(14, 0x0000cccc);
        exchange_bits(7, 0x00aa00aa);
        // A word has in byte v, below and above, vector v of an even lane and of the odd one after it.
        const __m256i pairs = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
        words = _mm256_shuffle_epi8(words, pairs);
        const __m256i nibble = _mm256_set1_epi8(0x0f);
        const __m256i even = _mm256_and_si256(words, nibble), odd = _mm256_and_si256(_mm256_srli_epi32(words, 4), nibble);
        return {_mm256_unpacklo_epi16(even, odd), _mm256_unpackhi_epi16(even, odd)};
    }
};

// A bit for each position of a full block, in the same order.
struct OrderedBits {
    __m256i own_byte;   // of the eight, the one that has the position's bit

    [[gnu::always_inline]] explicit OrderedBits(uint64_t plane) {
        const __m256i byte = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 4, 4, 4, 4, 5, 5, 5, 5,
                                              2, 2, 2, 2, 3, 3, 3, 3, 6, 6, 6, 6, 7, 7, 7, 7);
        own_byte = _mm256_shuffle_epi8(_mm256_set1_epi64x(static_cast<int64_t>(plane)), byte);
    }
    // 0xff where a bit is set, of the vectors of a half.
    [[gnu::always_inline]] __m256i of_half(size_t h) const {
        const __m256i bit = _mm256_set1_epi32(h == 0 ? 0x20100201 : static_cast<int>(0x80400804));
        __m256i are_set = _mm256_cmpeq_epi8(_mm256_and_si256(own_byte, bit), bit);
        asm("" : "+x"(are_set));   // Keeps GCC from comparing it with 0 before it chooses by it.
        return are_set;
    }
};

// Of up to 32 levels of narrow codes and 64 of wide ones the upper halves, by permutations of eight. The lower halves
// are the negatives of these, in reverse: `finish` makes a number its place in the upper half, and sets bit 7 where the
// level is negative.
struct FewLevels {
    static constexpr size_t most_index_planes = 3;
    alignas(32) float narrow[16] = {}, wide[32] = {};
    size_t narrow_top, num_narrow;
    ByteTables narrow_bytes, wide_bytes, upper_wide_bytes;

    explicit FewLevels(const AllTrellisLevels& all)
        : narrow_top(all.num_narrow / 2),
          num_narrow(all.num_narrow),
          narrow_bytes(all.values + narrow_top, narrow_top),
          wide_bytes(all.values + num_narrow + all.num_wide / 2, smaller(all.num_wide / 2, 16)),
          upper_wide_bytes(all.values + num_narrow + all.num_wide / 2 + 16, all.num_wide == 64 ? 16 : 0) {
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
    // Of a full block all at once, by bytes: levels have nothing in the lower halves of their floats.
    [[gnu::always_inline]] HalvesOfLevels look_up(const OrderedBytes& magnitudes, OrderedBits are_upper,
                                                  OrderedBits are_wide, OrderedBits are_negative,
                                                  size_t wide_vectors) const {
        const auto look_up_half = [&](size_t h) __attribute__((always_inline)) {
            const __m256i magnitude = magnitudes.half[h];
            const bool has_wide = wide_vectors > 2 * h;
            const __m256i upper = has_wide ? are_upper.of_half(h) : magnitude;
            const __m256i inside = has_wide ? are_wide.of_half(h) : magnitude;
            const auto find = [&](__m256i ByteTables::*byte) __attribute__((always_inline)) {
                const __m256i narrow = _mm256_shuffle_epi8(narrow_bytes.*byte, magnitude);
                if (!has_wide) return narrow;
                const __m256i wide = _mm256_blendv_epi8(_mm256_shuffle_epi8(wide_bytes.*byte, magnitude),
                                                        _mm256_shuffle_epi8(upper_wide_bytes.*byte, magnitude),
                                                        upper);
                return _mm256_blendv_epi8(narrow, wide, inside);
            };
            const __m256i sign = _mm256_and_si256(are_negative.of_half(h), _mm256_set1_epi8(static_cast<char>(0x80)));
            const __m256i high = _mm256_xor_si256(find(&ByteTables::high), sign), low = find(&ByteTables::low);
            return I32x16{_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
        };
        return {look_up_half(0), look_up_half(1)};
    }
    template <class Block>
    [[gnu::always_inline]] F32x16 operator()(const HalvesOfLevels& levels, const Block&, size_t v) const {
        const auto widen = [v](__m256i two) __attribute__((always_inline)) {
            return _mm256_castsi256_ps(v % 2 == 0 ? _mm256_slli_epi32(two, 16)
                                                  : _mm256_and_si256(two, _mm256_set1_epi32(-65536)));
        };
        if (v < 2) return {widen(levels.first_two.low), widen(levels.first_two.high)};
        return {widen(levels.last_two.low), widen(levels.last_two.high)};
    }
};

template <class Use>
inline void with_trellis_levels(const TrellisShape& shape, Use use) {
    if (shape.narrow_bits <= 4) return use.template operator()<FewLevels>();
    use.template operator()<ManyLevels>();
}

#include "../kernels/trellis_numbers-inl.h"

// The levels of a full block. The planes of a number n are c0, c1 and the bits of the index; the topmost says whether a
// level is above the middle, and where it is not, the others are turned over: of n < top, top - 1 - n levels lie between
// it and the middle.
template <bool is_full, size_t slots, class Block, class Read>
    requires is_full
[[gnu::always_inline]] inline HalvesOfLevels make_trellis_numbers(const uint8_t* row, const Block& block,
                                                                  const FewLevels& levels, const Read& read) {
    const Subsets subsets(read(0), row[block.byte_before]);
    const bool has_wide = block.wide_vectors > 0;
    const uint64_t is_wide = block.is_wide.mask, none = 0;
    uint64_t top = 0;   // of wide codes
    if (block.is_wide.factor) {
        top = block.is_wide.spread_few(block.first_top_bits(row));
    } else if (has_wide) {
        TrellisNumbers<slots> bits;
        bits.add_top_bits(block.is_wide, block.top_bits(row), 0x80);
        top = static_cast<uint32_t>(_mm256_movemask_epi8(bits.bytes.half[0])) |
              uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(bits.bytes.half[1]))} << 32;
    }
    const uint64_t u0 = read(1), u1 = block.index_planes > 1 ? read(2) : none;
    const uint64_t u2 = block.index_planes > 2 ? read(3) : none;
    const uint64_t narrow_top = block.index_planes > 2 ? u2 : block.index_planes > 1 ? u1 : u0;
    const uint64_t is_negative = ~((narrow_top & ~is_wide) | top);
    // Bits that only wide codes have beside the topmost.
    const auto of_magnitude = [&](uint64_t plane, size_t index_plane) __attribute__((always_inline)) {
        if (block.index_planes > index_plane) return plane ^ is_negative;
        return block.index_planes == index_plane ? (plane ^ is_negative) & is_wide : none;
    };
    const OrderedBytes magnitudes = OrderedBytes::of_planes(subsets.c0 ^ is_negative, subsets.c1 ^ is_negative,
                                                            of_magnitude(u0, 1), of_magnitude(u1, 2));
    return levels.look_up(magnitudes, OrderedBits(of_magnitude(u2, 3)), OrderedBits(is_wide), OrderedBits(is_negative),
                          block.wide_vectors);
}

}  // namespace
}  // namespace embpack::EMBPACK_ISA
