#pragma once

#include <cstddef>
#include <cstdint>

namespace embpack {

// Codes of a byte, rows [num_rows, num_columns], with scales [num_rows, num_scales], each for as many columns as others.
struct ScaledCodes {
    const uint8_t* codes;
    const float* values;   // of each of the 256 codes
    const float* scales;
    size_t num_rows, num_columns, num_scales;
};

// out = values[codes] * scales, float32 [num_rows, num_columns].
void multiply_codes(const ScaledCodes&, float* out);

}  // namespace embpack
