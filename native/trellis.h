// What a table of trellis-coded rows shares, made ready for the kernel. src/embpack/trellis.py is the specification.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace embpack {

// Where the parts of a row lie: TrellisFormat of the specification. Rows have at least 2 embedding_dim bits for codes.
struct TrellisFormat {
    size_t row_bytes;
    int narrow_bits;                 // of the shorter codes
    std::vector<uint8_t> is_wide;    // which columns have the longer ones

    TrellisFormat(size_t embedding_dim, size_t row_bytes);

    bool has_wide() const;
    size_t num_narrow_levels() const { return size_t{2} << narrow_bits; }
    size_t num_wide_levels() const { return has_wide() ? size_t{4} << narrow_bits : 0; }
};

// `format` and `mean` must outlive the table; wide may be null where no codes are.
TrellisTable make_trellis_table(const TrellisFormat& format, const float* narrow, const float* wide,
                                const float* scales, const float* mean);

}  // namespace embpack
