// Where the parts of a trellis-coded row lie (src/embpack/trellis.py: TrellisFormat).
#pragma once

#include <cstddef>
#include <cstdint>

namespace embpack {

inline constexpr size_t trellis_least_dim = 4, trellis_most_dim = 4096;
inline constexpr size_t trellis_least_bits = 2, trellis_most_bits = 7;

struct TrellisShape {
    size_t embedding_dim, narrow_bits, num_wide;

    constexpr TrellisShape(size_t embedding_dim, size_t row_bytes) : embedding_dim(embedding_dim) {
        const size_t code_bits = 8 * (row_bytes - 1), each = code_bits / embedding_dim;
        narrow_bits = each < trellis_most_bits ? each : trellis_most_bits;
        num_wide = narrow_bits < trellis_most_bits ? code_bits - narrow_bits * embedding_dim : 0;
    }

    constexpr size_t num_narrow_levels() const { return size_t{2} << narrow_bits; }
    constexpr size_t num_levels() const {
        return num_narrow_levels() + (num_wide > 0 ? 2 * num_narrow_levels() : 0);
    }
    // Floats that the rows share: the levels of narrow and of wide codes, the scales, the mean.
    constexpr size_t num_shared() const { return num_levels() + trellis_scales + embedding_dim; }
};

// How sixteen columns' levels are found. An index is in at most two bytes of the sixteen from `window` on. With these
// in bytes 1 and 2 of a lane, a shift brings it to bit 2, above the two bits of its subset.
struct alignas(64) TrellisColumns {
    uint8_t shuffle[64];   // for each lane four bytes, of the window or none; in each 16 lanes' bytes the same window
    int32_t shifts[16];
    int32_t keep[16];      // the bits of the index
    int32_t first[16];     // level of the lane's codebook
    float mean[16];
    uint32_t is_wide;      // a bit for each lane
    uint32_t window;       // byte of the row
};

}  // namespace embpack
