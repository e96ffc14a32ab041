// What the lookups of trellis-coded rows with AVX-512 and with GFNI share: bits spread to positions, levels in memory.
#include "../trellis_rows.h"

namespace embpack::EMBPACK_ISA {
namespace {

// Positions of a block. A call spreads packed bits to these: the lowest bit to the lowest position, and so on. Other
// positions get 0.
struct BitPositions {
    uint64_t mask;

    BitPositions() = default;
    explicit BitPositions(uint64_t positions) : mask(positions) {}
    uint64_t operator()(uint64_t bits) const { return _pdep_u64(bits, mask); }
};

// All levels, in memory, and sixteen of them by a gather: of narrow codes first, those of wide ones from num_narrow on.
struct LevelsInMemory {
    const AllTrellisLevels& levels;
    size_t num_narrow;

    explicit LevelsInMemory(const AllTrellisLevels& levels) : levels(levels), num_narrow(levels.num_narrow) {}

    // The numbers are the lowest bytes of the lanes.
    F32x16 of_numbers(__m512i numbers, uint16_t wide_lanes) const {
        const __m512i number = _mm512_and_si512(numbers, _mm512_set1_epi32(0xff));
        const __m512i first_wide = _mm512_set1_epi32(static_cast<int>(num_narrow));
        const __m512i at = _mm512_mask_add_epi32(number, wide_lanes, number, first_wide);
        return _mm512_i32gather_ps(at, levels.values, 4);
    }
};

}  // namespace
}  // namespace embpack::EMBPACK_ISA
