// Trellis-coded rows in plain C++.
#include "../trellis_rows.h"

namespace embpack::EMBPACK_ISA {
namespace {

constexpr size_t least_slots = 4, most_trellis_sums = 4, trellis_rows_early = 0, most_means_kept = 0;

#include "../kernels/trellis_slots-inl.h"

// Positions of a block's bits, what is packed in ascending order.
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

// For each position of a block the number of its level.
template <size_t slots>
struct TrellisNumbers {
    uint8_t byte[64] = {};

    TrellisNumbers() = default;
    explicit TrellisNumbers(const BitPositions&) {}

    // Adds `weight` where bits are set.
    template <bool is_full>
    void add(const BitPositions& present, uint64_t bits, size_t weight) {
        if constexpr (!is_full) {
            for (size_t i = 0; i < present.count; i++)
                byte[present.position[i]] = static_cast<uint8_t>(byte[present.position[i]] + (bits >> i & 1) * weight);
            return;
        }
        for (size_t p = 0; p < 64; p += 8) {   // Eight bits, one in each byte of a word.
            const uint64_t copies = (bits >> p & 0xff) * 0x0101010101010101;
            const uint64_t own = copies & 0x8040201008040201, ones = (own + 0x7f7f7f7f7f7f7f7f) >> 7 & 0x0101010101010101;
            uint64_t eight;
            std::memcpy(&eight, byte + p, sizeof eight);
            eight += ones * weight;
            std::memcpy(byte + p, &eight, sizeof eight);
        }
    }
};

// The levels of trellis-coded columns.
struct WrittenLevels {
    static constexpr size_t most_planes = 6;
    const AllTrellisLevels& levels;
    size_t num_narrow;

    explicit WrittenLevels(const AllTrellisLevels& levels) : levels(levels), num_narrow(levels.num_narrow) {}

    static size_t weight(size_t k) { return size_t{1} << k; }

    template <bool is_full, class Numbers, class Columns, class Read>
    void finish(Numbers& numbers, const Columns& of, const uint8_t* row, const Read&) const {
        if (of.wide_vectors > 0) numbers.template add<false>(of.is_wide, of.top_bits(row), num_narrow);
    }
    template <class Numbers, class Columns>
    F32x16 operator()(const Numbers& numbers, const Columns& of, size_t v) const {
        return each_lane([&](size_t i) {
            const size_t p = trellis_vectors * i + v;
            return levels.values[numbers.byte[p] + (of.is_wide.is_inside[p] ? num_narrow : 0)];
        });
    }
};

using FewLevels = WrittenLevels;

using SomeLevels = WrittenLevels;

// What looks the levels up of narrow codes of so many bits, and of wide ones.
template <class Use>
inline void with_trellis_levels(const TrellisShape&, Use use) { use.template operator()<WrittenLevels>(); }

// Calls use<Levels>() where sums without weights have code of their own: a multiply-add is a function's work here.
template <class Use>
inline bool with_known_levels(const TrellisShape&, WideVectors, Use use) {
    use.template operator()<WrittenLevels>();
    return true;
}

#include "../kernels/trellis_numbers-inl.h"

}  // namespace
}  // namespace embpack::EMBPACK_ISA
