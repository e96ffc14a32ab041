// What the rows of a trellis-coded table share, made ready for the kernel that packs them.
// src/embpack/layouts/trellis.py is the specification.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "trellis_rows.h"

namespace embpack {

// How a path goes over a row, step by step. Rows have at least 2 embedding_dim bits for codes.
struct TrellisSteps {
    size_t row_bytes;
    TrellisShape shape;
    std::vector<uint16_t> columns;   // of each step
    std::vector<uint8_t> is_wide;    // whether the step's code is one of the longer ones

    TrellisSteps(size_t embedding_dim, size_t row_bytes);
};

// All levels of narrow and of wide codes, ascending; 256 scales; the mean by column. `steps` and `mean` must outlive
// the table; `wide` may be null where no codes are wide.
TrellisTable make_trellis_table(const TrellisSteps& steps, const float* narrow, const float* wide,
                                const float* scales, const float* mean);

}  // namespace embpack
