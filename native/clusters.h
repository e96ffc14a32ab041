#pragma once

#include <cstdint>

#include "quantize.h"

namespace embpack {

// Rows in groups: group g has rows order[starts[g]] to order[starts[g + 1]], in this order; where there is no order, the
// rows from starts[g] on.
struct RowGroups {
    const int64_t* order;
    const int64_t* starts;
    size_t count;
};

// Of each row, times factor, the number of the nearest of its group's centres, of equally near ones the first (kernels/
// nearest-inl.h). Group g has centres starts[g] to starts[g + 1], of as many values as rows; one that has rows has some.
void find_nearest(const Rows&, float factor, const RowGroups&, const float* centres, const int64_t* centre_starts,
                  uint32_t* numbers);

// The sum of the rows of each group, one after the other.
void sum_groups(const Rows&, const RowGroups&, double* sums);

// Of the rows' largest distances from a mean, by columns: the least that is not 0, infinite if all are, and the largest.
struct Distances {
    float smallest, largest;
};
Distances bound_distances(const Rows&, const float* mean);

// Finds a codebook of 2^bits levels for the values of each group by Lloyd's iteration. An empty group gets zeros.
void fit_codebooks(const Rows&, const RowGroups&, int bits, float* codebooks);

// Finds for each row of float32 values which of `count` codebooks of 2^bits levels, each ascending, has the least squared
// error, of equal ones the first. A row with NaN gets the first.
void assign_codebooks(const float* rows, size_t num_rows, size_t embedding_dim, const float* codebooks, size_t count,
                      int bits, uint32_t* numbers);

}  // namespace embpack
