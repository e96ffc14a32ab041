// What packs rows, for one instruction set: EMBPACK_ISA, whose vectors are in the file EMBPACK_VECTORS. Compiled once
// for each.
#include EMBPACK_VECTORS
#include "../trellis_rows.h"

namespace embpack::EMBPACK_ISA {
namespace {

#include "../isa/contract-inl.h"
#include "../kernels/basics-inl.h"
#include "../kernels/grid-inl.h"
#include "../kernels/rows-inl.h"
#include "../kernels/search_range-inl.h"
#include "../kernels/greedy_walk-inl.h"
#include "../kernels/greedy_quick-inl.h"
#include "../kernels/search_greedy-inl.h"
#include "../kernels/search_optimal-inl.h"
#include "../kernels/search_gss-inl.h"
#include "../kernels/search_aciq-inl.h"
#include "../kernels/histogram-inl.h"
#include "../kernels/search_hist_apprx-inl.h"
#include "../kernels/search_hist_brute-inl.h"
#include "../kernels/lloyd-inl.h"
#include "../kernels/search_kmeans-inl.h"
#include "../kernels/encode-inl.h"
#include "../kernels/encode_codebook-inl.h"
#include "../kernels/encode_trellis-inl.h"
#include "../kernels/nearest-inl.h"
#include "../kernels/store-inl.h"
#include "../kernels/rotation-inl.h"

}  // namespace

extern const PackingKernels packing;
const PackingKernels packing = {
    .widen_values = widen_values,
    .bound_rows = bound_rows,
    .search_asym = search_asym,
    .search_sym = search_sym,
    .search_table = search_table,
    .search_greedy = search_greedy,
    .search_optimal = search_optimal,
    .search_gss = search_gss,
    .search_aciq = search_aciq,
    .search_hist_apprx = search_hist_apprx,
    .search_hist_brute = search_hist_brute,
    .encode_rows = encode_rows,
    .search_kmeans = search_kmeans,
    .search_kmeans_lloyd = search_kmeans_lloyd,
    .encode_by_codebook = encode_by_codebook,
    .encode_trellis = encode_trellis,
    .find_nearest = find_nearest,
    .rotate_rows = rotate_rows,
    .rotate_rows_back = rotate_rows_back,
    .keep_largest = keep_largest,
    .write_rows = write_rows,
};

}  // namespace embpack::EMBPACK_ISA
