// Where the parts of a trellis-coded row lie (src/embpack/layouts/trellis.py: TrellisFormat).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace embpack {

inline constexpr size_t trellis_least_dim = 4, trellis_most_dim = 65536;
inline constexpr size_t trellis_least_bits = 2, trellis_most_bits = 7;
// Bits are read by words of eight bytes, none of which reaches past the row; a row shorter than a word is copied first.
inline constexpr size_t trellis_word = 8;
// Where narrow codes have at most so many bits, levels are bfloat16: the lower halves of the floats are taken as 0.
inline constexpr size_t trellis_most_short_bits = 5;
// Columns of a block; how many of them are a vector, a column to a lane; and so the vectors of a block.
inline constexpr size_t trellis_block = 64, trellis_lanes = 16, trellis_vectors = trellis_block / trellis_lanes;

// The bits of a row's codes: `num_wide` columns have wide codes, of narrow_bits + 1 bits, all others narrow ones.
struct TrellisShape {
    size_t embedding_dim, narrow_bits, num_wide;

    constexpr TrellisShape(size_t embedding_dim, size_t row_bytes) : embedding_dim(embedding_dim) {
        const size_t code_bits = 8 * (row_bytes - 1), each = code_bits / embedding_dim;
        narrow_bits = each < trellis_most_bits ? each : trellis_most_bits;
        num_wide = narrow_bits < trellis_most_bits ? code_bits - narrow_bits * embedding_dim : 0;
    }

    constexpr size_t num_narrow_levels() const { return size_t{2} << narrow_bits; }
    constexpr size_t num_wide_levels() const { return num_wide > 0 ? 2 * num_narrow_levels() : 0; }
    // Floats that the rows share: the upper halves of the levels of narrow and of wide codes, the scales, the mean.
    constexpr size_t first_scale() const { return (num_narrow_levels() + num_wide_levels()) / 2; }
    constexpr size_t first_mean() const { return first_scale() + trellis_scales; }
    constexpr size_t num_shared() const { return first_mean() + embedding_dim; }
};

// Where a block lies in a row. Its columns have positions from 0 to 63, that of column c of the block is
// 4 (c mod 16) + c / 16: a register with a byte for each position has in lane i, one byte above the other, what is of
// columns i, 16 + i, 32 + i and 48 + i. A row's path takes the positions in ascending order, those that there are.
// `slots`, 4 here, is the number of positions of a lane. If a block has at most 32 columns, or 16, two slots or one are
// enough: the position is 2 (c mod 16) + c / 16, or c. The order stays the same.
struct TrellisBlock {
    size_t num_columns;
    uint64_t present = 0, is_wide = 0;           // masks of positions: those with a column, those with a wide code
    uint16_t wide_lanes[trellis_vectors] = {};   // masks of the lanes of each vector: those with a wide code
    // Bits of the row: the first of the block's messages, after which its indices come, and the first of its top bits.
    size_t first_bit, first_wide_bit;

    [[gnu::always_inline]] constexpr TrellisBlock(const TrellisShape& shape, size_t number,
                                                 size_t slots = trellis_vectors) {
        const size_t d = shape.embedding_dim, start = number * trellis_block;
        const size_t end = d - start < trellis_block ? d : start + trellis_block;
        const size_t wide_before = start * shape.num_wide / d;
        num_columns = end - start;
        first_bit = start * shape.narrow_bits;
        first_wide_bit = d * shape.narrow_bits + wide_before;
        size_t left = end * shape.num_wide / d - wide_before;
        for (size_t v = 0; v < trellis_vectors && trellis_lanes * v < num_columns; v++) {
            const size_t inside = num_columns - trellis_lanes * v;
            const size_t lanes = inside < trellis_lanes ? inside : trellis_lanes, wide = left < lanes ? left : lanes;
            // Spreads `wide` codes evenly over `lanes`: the next one is where `part` reaches the number of lanes.
            size_t part = 0;
            for (size_t i = 0; i < lanes; i++) {
                const uint64_t position = uint64_t{1} << (slots * i + v);
                present |= position;
                part += wide;
                if (part < lanes) continue;
                part -= lanes;
                is_wide |= position;
                wide_lanes[v] = static_cast<uint16_t>(wide_lanes[v] | 1u << i);
            }
            left -= wide;
        }
    }

    // The column of a position, with four slots.
    static constexpr size_t column_at(size_t position) {
        return trellis_lanes * (position % trellis_vectors) + position / trellis_vectors;
    }
};

// Which subsets a block's levels are of, c0 and c1 of docs/trellis.md: bit t of a word is step t of the path. A shift
// to the left by k brings m[t - k] to bit t, and `before`, a byte whose highest bit is m[-1], has what moves in.
struct Subsets {
    uint64_t c0, c1;

    [[gnu::always_inline]] Subsets(uint64_t messages, uint64_t before)
        : c0(messages << 3 ^ before >> 5),
          c1(messages ^ messages << 2 ^ messages << 5 ^ before >> 6 ^ before >> 3) {}
};

// How many vectors of a block have wide codes, and whether it is the same in all blocks of a row.
struct WideVectors {
    size_t count = 0;
    bool are_alike = true;
};

// All levels of narrow codes, then all of wide ones, each in ascending order. Of both the upper half is given, in
// `halves` one after the other; the lower half are its negatives, in reverse.
struct AllTrellisLevels {
    static constexpr size_t most = 384;   // 128 of narrow codes of 6 bits, and 256 of wide ones
    size_t num_narrow, num_wide;
    float values[most];

    [[gnu::always_inline]] AllTrellisLevels(const uint8_t* halves, const TrellisShape& shape)
        : num_narrow(shape.num_narrow_levels()), num_wide(shape.num_wide_levels()) {
        const uint32_t kept_bits = shape.narrow_bits <= trellis_most_short_bits ? 0xffff0000 : 0xffffffff;
        unfold(halves, num_narrow / 2, kept_bits, values);
        unfold(halves + sizeof(float) * num_narrow / 2, num_wide / 2, kept_bits, values + num_narrow);
    }

private:
    [[gnu::always_inline]] static void unfold(const uint8_t* upper, size_t count, uint32_t kept_bits, float* to) {
        for (size_t i = 0; i < count; i++) {
            uint32_t bits;
            std::memcpy(&bits, upper + sizeof bits * i, sizeof bits);
            bits &= kept_bits;
            std::memcpy(to + count + i, &bits, sizeof bits);
        }
        for (size_t i = 0; i < count; i++) to[count - 1 - i] = -to[count + i];
    }
};

}  // namespace embpack
