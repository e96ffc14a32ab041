// KMEANS (Guan et al. 2019): a codebook for each row, one row in each lane.
//
// In one dimension the clusters of the best codebook are runs of the sorted row, so dynamic programming finds it: the
// least error of the first j values in k clusters is the least, over where the last cluster starts, of the error of the
// values before it in k - 1 clusters and its own. A cluster's own error comes from prefix sums in double, counted from
// the middle of the row's range, where little cancels. A last cluster that costs more than the best found cannot get
// better by starting earlier, which ends most of the inner loops after a few values.

// Sixteen sorted rows; value j of row i at [16 * j + i].
struct SortedRows {
    size_t d;
    const double* sums;       // of the first j values, counted from the middle; d + 1 of them
    const double* squares;    // and of their squares
    const double* inverses;   // 1 / m at [m], the same for all rows
    F64x16 middle;
};

inline F64x16 cluster_error(const SortedRows& rows, size_t first, size_t last) {
    const F64x16 sum = sub(load_f64(rows.sums + lanes * (last + 1)), load_f64(rows.sums + lanes * first));
    const F64x16 squares = sub(load_f64(rows.squares + lanes * (last + 1)), load_f64(rows.squares + lanes * first));
    return sub(squares, mul(mul(sum, sum), splat_f64(rows.inverses[last + 1 - first])));
}

// Batcher's odd-even merge sort of the columns, for any number of them.
inline void sort_columns(float* columns, size_t d) {
    size_t power = 1;
    while (power < d) power *= 2;
    for (size_t p = 1; p < power; p *= 2)
        for (size_t k = p; k >= 1; k /= 2)
            for (size_t j = k % p; j + k < d; j += 2 * k)
                for (size_t i = j; i < j + k && i + k < d; i++) {
                    if (i / (2 * p) != (i + k) / (2 * p)) continue;
                    const F32x16 a = load(columns + lanes * i), b = load(columns + lanes * (i + k));
                    store(columns + lanes * i, min(a, b));
                    store(columns + lanes * (i + k), max(a, b));
                }
}

inline SortedRows sort_and_sum(float* columns, size_t d, double* room) {
    sort_columns(columns, d);
    double *inverses = room, *sums = room + d + 1, *squares = sums + (d + 1) * lanes;
    for (size_t m = 1; m <= d; m++) inverses[m] = 1.0 / static_cast<double>(m);
    const F64x16 ends = add(widen_f32(load(columns)), widen_f32(load(columns + lanes * (d - 1))));
    const F64x16 middle = mul(ends, splat_f64(0.5));
    F64x16 sum = zero_f64(), square = zero_f64();
    store_f64(sums, sum);
    store_f64(squares, square);
    for (size_t j = 0; j < d; j++) {
        const F64x16 x = sub(widen_f32(load(columns + lanes * j)), middle);
        sum = add(sum, x);
        square = add(square, mul(x, x));
        store_f64(sums + lanes * (j + 1), sum);
        store_f64(squares + lanes * (j + 1), square);
    }
    return {d, sums, squares, inverses, middle};
}

// What rounding may add to or take from an error: prefix sums of n values carry n roundings each.
inline F64x16 error_slack(const SortedRows& rows, const float* columns) {
    const F64x16 range = sub(widen_f32(load(columns + lanes * (rows.d - 1))), widen_f32(load(columns)));
    const double n = static_cast<double>(rows.d);
    return mul(mul(range, range), splat_f64(n * n * 1e-15));
}

// Where the last of k + 1 clusters starts if they end with value j, at splits[d * 16 * k + 16 * j]; the clusters' ends
// are found backwards from there. False if it was stopped.
inline bool find_splits(const SortedRows& rows, size_t clusters, F64x16 slack, double* errors, float* splits,
                        const Stop& stop) {
    constexpr size_t few_steps = size_t{1} << 18;   // a millisecond or two
    const size_t d = rows.d;
    size_t steps = 0;
    double *before = errors, *now = errors + d * lanes;
    for (size_t j = 0; j < d; j++) store_f64(before + lanes * j, cluster_error(rows, 0, j));
    for (size_t k = 1; k < clusters; k++) {
        // What is left must do for the clusters that follow, and of the last one only the whole is asked for.
        const size_t last = d - (clusters - k);
        for (size_t j = k + 1 == clusters ? last : k; j <= last; j++) {
            F64x16 best = splat_f64(__builtin_inf());
            F32x16 split = splat(0.0f);
            size_t first = j;
            for (; first >= k; first--) {
                const F64x16 own = cluster_error(rows, first, j);
                const F64x16 error = add(load_f64(before + lanes * (first - 1)), own);
                const Mask16 better = less(error, best);
                best = select(better, error, best);
                split = select(better, splat(static_cast<float>(first)), split);
                if (lane_bits(less(add(best, slack), own)) == 0xffff) break;
            }
            store_f64(now + lanes * j, best);
            store(splits + lanes * (d * k + j), split);
            steps += j - first + 1;
            if (steps > few_steps) {
                if (stop()) return false;
                steps = 0;
            }
        }
        double* other = before;
        before = now;
        now = other;
    }
    return true;
}

// The best centres of one row, counted from the middle.
inline void read_centres(const SortedValues& row, size_t clusters, const float* splits, size_t lane, double* centres) {
    size_t end = row.count;
    for (size_t k = clusters; k-- > 0;) {
        const size_t first = k == 0 ? 0 : static_cast<size_t>(splits[lanes * (row.count * k + end - 1) + lane]);
        centres[k] = row.mean(first, end);
        end = first;
    }
}

template <bool is_exact>
inline void search_kmeans_of(const RowBlock& block, Grid grid, float* codebooks, double* room, const Stop& stop) {
    constexpr size_t wide = size_t{1} << 14;   // a row of so many columns takes milliseconds
    const size_t d = block.embedding_dim, levels = size_t{1} << grid.bits;
    const size_t clusters = is_exact && d < levels ? d : levels;
    float* columns = reinterpret_cast<float*>(room);
    room += lanes * d / 2;
    for (size_t start = 0; start < block.num_rows; start += lanes) {
        transpose_rows(block, start, columns);
        const SortedRows rows = sort_and_sum(columns, d, room);
        double* errors = room + (d + 1) + 2 * (d + 1) * lanes;
        float* splits = reinterpret_cast<float*>(errors + 2 * d * lanes);
        if (is_exact && !find_splits(rows, clusters, error_slack(rows, columns), errors, splits, stop)) return;
        double middle[lanes];
        store_f64(middle, rows.middle);
        for (size_t lane = 0; lane < lanes && start + lane < block.num_rows; lane++) {
            if (d > wide && stop()) return;
            double centres[256];
            const SortedValues row = {columns + lane, rows.sums + lane, d, lanes, middle[lane]};
            if (is_exact)
                read_centres(row, clusters, splits, lane, centres);
            else
                iterate_lloyd(row, levels, centres);
            float* codebook = codebooks + levels * (start + lane);
            for (size_t k = 0; k < levels; k++)
                codebook[k] = static_cast<float>(middle[lane] + centres[k < clusters ? k : clusters - 1]);
        }
    }
}

void search_kmeans(const RowBlock& block, Grid grid, float* codebooks, double* room, const Stop& stop) noexcept {
    search_kmeans_of<true>(block, grid, codebooks, room, stop);
}

void search_kmeans_lloyd(const RowBlock& block, Grid grid, float* codebooks, double* room, const Stop& stop) noexcept {
    search_kmeans_of<false>(block, grid, codebooks, room, stop);
}
