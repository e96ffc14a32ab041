#include "scaled.h"

#include <algorithm>

#include "threads.h"

namespace embpack {

namespace {

// That a thread takes at a time: enough to make asking for more cheap, few enough to share evenly.
constexpr size_t values_at_a_time = size_t{1} << 15;

}  // namespace

void multiply_codes(const ScaledCodes& of, float* out) {
    if (of.num_rows == 0 || of.num_columns == 0) return;
    const size_t rows_at_a_time = std::max<size_t>(1, values_at_a_time / of.num_columns);
    const size_t pieces = (of.num_rows + rows_at_a_time - 1) / rows_at_a_time;
    const size_t width = of.num_columns / of.num_scales;
    for_each_piece(pieces, 1, threads_for(of.num_rows * of.num_columns), [&](size_t piece, Turn&) {
        const size_t first = piece * rows_at_a_time;
        const size_t count = std::min(rows_at_a_time, of.num_rows - first);
        const uint8_t* codes = of.codes + first * of.num_columns;
        const float* scales = of.scales + first * of.num_scales;
        float* to = out + first * of.num_columns;
        for (size_t block = 0; block < count * of.num_scales; block++, codes += width, to += width)
            for (size_t i = 0; i < width; i++) to[i] = of.values[codes[i]] * scales[block];
    });
}

}  // namespace embpack
