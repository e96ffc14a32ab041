// Bits of trellis-coded rows and levels in memory, with AVX-512.
#include "../trellis_rows.h"

namespace embpack::EMBPACK_ISA {
namespace {

// Positions of a block's bits. What is packed goes to them in ascending order.
struct BitPositions {
    uint64_t mask;

    BitPositions() = default;
    explicit BitPositions(uint64_t positions) : mask(positions) {}
    uint64_t operator()(uint64_t bits) const { return _pdep_u64(bits, mask); }
};

// The levels of trellis-coded columns, in memory.
struct LevelsInMemory {
    const AllTrellisLevels& levels;
    size_t num_narrow;

    explicit LevelsInMemory(const AllTrellisLevels& levels) : levels(levels), num_narrow(levels.num_narrow) {}

    // Numbers are the lowest bytes of lanes.
    F32x16 of_numbers(__m512i numbers, uint16_t wide_lanes) const {
        const __m512i number = _mm512_and_si512(numbers, _mm512_set1_epi32(0xff));
        const __m512i first_wide = _mm512_set1_epi32(static_cast<int>(num_narrow));
        const __m512i at = _mm512_mask_add_epi32(number, wide_lanes, number, first_wide);
        return _mm512_i32gather_ps(at, levels.values, 4);
    }
};

}  // namespace
}  // namespace embpack::EMBPACK_ISA
