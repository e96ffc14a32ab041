// Every kernel, for the vector types of the file that includes this one. No include guard: each isa/*.cpp
// includes it once, inside its own anonymous namespace.

#include "basics-inl.h"
#include "grid-inl.h"
#include "rows-inl.h"
#include "search_range-inl.h"
#include "greedy_walk-inl.h"
#include "greedy_quick-inl.h"
#include "search_greedy-inl.h"
#include "search_optimal-inl.h"
#include "search_gss-inl.h"
#include "search_aciq-inl.h"
#include "histogram-inl.h"
#include "search_hist_apprx-inl.h"
#include "search_hist_brute-inl.h"
#include "lloyd-inl.h"
#include "search_kmeans-inl.h"
#include "encode-inl.h"
#include "encode_codebook-inl.h"
#include "encode_trellis-inl.h"
#include "levels-inl.h"
#include "lookup-inl.h"
#include "trellis_numbers-inl.h"
#include "trellis_lookup-inl.h"
#include "any_lookup-inl.h"
#include "rotation-inl.h"

constexpr Kernels make_kernels() {
    return {
        .isa = isa_name,
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
        .gather_rows = gather_rows,
        .pool_bags = pool_bags,
        .rotate_rows = rotate_rows,
        .rotate_rows_back = rotate_rows_back,
        .write_rows = write_rows,
    };
}
