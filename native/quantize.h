#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace embpack {

// Rows as the user has them: contiguous, float32 or one of the 16-bit types.
struct Rows {
    const void* values;
    ValueType type;
    size_t num_rows;
    size_t embedding_dim;
};

enum class RowFault : uint8_t { none, not_finite, params_overflow };

struct SpanSums {
    SquaredSums all;
    // Rows that come back no better than zeros would, because their parameters are too small for float16; and the sum
    // of the squares of their values.
    size_t lost_rows = 0;
    double lost_norm = 0.0;
};

struct QuantizeResult {
    RowFault fault = RowFault::none;   // of the first faulty row
    size_t faulty_row = 0;
    std::vector<SpanSums> sums;        // of each span of rows; the same for any number of threads
};

// Searches each row's range, encodes it and writes packed_row_bytes(...) bytes a row. A span is span_rows rows, a
// multiple of block_rows, but the last one.
QuantizeResult quantize_rows(const Rows&, SearchFn Kernels::*search, const SearchParams&, Grid, size_t span_rows,
                             uint8_t* packed, const Progress& = {});

// Finds a codebook for each row, encodes the row by it and writes both.
QuantizeResult quantize_by_codebooks(const Rows&, CodebookFn Kernels::*search, Grid, size_t span_rows, uint8_t* packed,
                                     const Progress& = {});

// Finds a codebook of 2^bits levels for each of several groups of values by Lloyd's iteration; group g is
// values[starts[g]] to values[starts[g + 1]], which are put in order. An empty group gets zeros.
void fit_codebooks(float* values, const int64_t* starts, size_t groups, int bits, float* codebooks);

// Finds for each row of float32 values which of `count` codebooks of 2^bits levels, each ascending, has the least squared
// error, of equal ones the first. A row with NaN gets the first.
void assign_codebooks(const float* rows, size_t num_rows, size_t embedding_dim, const float* codebooks, size_t count,
                      int bits, uint32_t* numbers);

// Encodes each row by the codebook of its cluster and writes the codes. values: 2^bits levels of each codebook,
// ascending; clusters: a number for each row.
QuantizeResult quantize_by_clusters(const Rows&, const float* values, const uint32_t* clusters, Grid, size_t span_rows,
                                    uint8_t* packed, const Progress& = {});

// Encodes rows as trellis-coded ones, of table.row_bytes.
QuantizeResult quantize_by_trellis(const Rows&, const TrellisTable&, size_t span_rows, uint8_t* packed,
                                   const Progress& = {});

struct Bounds {
    RowFault fault = RowFault::none;
    size_t faulty_row = 0;
    float xmin = 0.0f, xmax = 0.0f;
};

// The smallest and the largest value of all rows.
Bounds bound_table(const Rows&);

}  // namespace embpack
