// Trellis-coded rows in plain C++: byte p of an array is position p. trellis_blocks-inl.h says how a row lies and what
// the words mean.
#include "../trellis_rows.h"

namespace embpack::EMBPACK_ISA {
namespace {

constexpr size_t least_slots = 4, most_trellis_sums = 4, trellis_rows_early = 0, most_means_kept = 0;

#include "../kernels/trellis_slots-inl.h"

// Positions that packed bits belong to: bit i to position[i]. And for each position whether it is one of them.
struct BitPositions {
    uint8_t position[64];
    uint8_t is_inside[64];
    size_t count;

    BitPositions() = default;
    explicit BitPositions(uint64_t positions) : count(0) {
        for (size_t p = 0; p < 64; p++) {
            is_inside[p] = static_cast<uint8_t>(positions >> p & 1);
            if (is_inside[p]) position[count++] = static_cast<uint8_t>(p);
        }
    }
};

// The number of each position of a block.
template <size_t slots>
struct TrellisNumbers {
    uint8_t byte[64] = {};

    TrellisNumbers() = default;
    explicit TrellisNumbers(const BitPositions&) {}

    // Adds `weight` to the numbers of the positions whose bits are set.
    template <bool is_full>
    void add(const BitPositions& present, uint64_t bits, size_t weight) {
        if constexpr (!is_full) {
            for (size_t i = 0; i < present.count; i++)
                byte[present.position[i]] = static_cast<uint8_t>(byte[present.position[i]] + (bits >> i & 1) * weight);
            return;
        }
        // Eight bits at a time: all of them in each byte of a word, then bit q alone in byte q. Where it is set, adding
        // 0x7f sets bit 7, which is shifted to bit 0.
        for (size_t p = 0; p < 64; p += 8) {
            const uint64_t copies = (bits >> p & 0xff) * 0x0101010101010101;
            const uint64_t own = copies & 0x8040201008040201;
            const uint64_t ones = (own + 0x7f7f7f7f7f7f7f7f) >> 7 & 0x0101010101010101;
            uint64_t eight;
            std::memcpy(&eight, byte + p, sizeof eight);
            eight += ones * weight;
            std::memcpy(byte + p, &eight, sizeof eight);
        }
    }
};

// All levels, in memory.
struct ManyLevels {
    static constexpr size_t most_index_planes = 6;
    const AllTrellisLevels& levels;
    size_t num_narrow;

    explicit ManyLevels(const AllTrellisLevels& levels) : levels(levels), num_narrow(levels.num_narrow) {}

    static size_t weight(size_t k) { return size_t{1} << k; }

    template <bool is_full, class Numbers, class Block, class Read>
    void finish(Numbers& numbers, const Block& block, const uint8_t* row, const Read&) const {
        if (block.wide_vectors > 0) numbers.template add<false>(block.is_wide, block.top_bits(row), num_narrow);
    }
    template <class Numbers, class Block>
    F32x16 operator()(const Numbers& numbers, const Block& block, size_t v) const {
        float lane[16];
        for (size_t i = 0; i < 16; i++) {
            const size_t p = trellis_vectors * i + v;
            lane[i] = levels.values[numbers.byte[p] + (block.is_wide.is_inside[p] ? num_narrow : 0)];
        }
        return load(lane);
    }
};

template <class Use>
inline void with_trellis_levels(const TrellisShape&, Use use) { use.template operator()<ManyLevels>(); }

#include "../kernels/trellis_numbers-inl.h"

}  // namespace
}  // namespace embpack::EMBPACK_ISA
