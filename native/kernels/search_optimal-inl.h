// OPTIMAL: rounding and least squares in turns, from greedy's range and from many others. One row in each lane, and
// every sum in the order of the columns, a product and an addition at a time: the reference does the same with whole
// arrays.

// Sixteen rows, a column after the other, and the weights of their squared errors, or null: all are 1.
struct ColumnsOfRows {
    const float* values;
    const float* weights;
    size_t d;
    F32x16 total_weight;
};

// Scales in hundredths of the full range's; the second are for rows of few values.
inline constexpr int usual_scales[] = {35, 40, 45, 50, 55, 60, 65, 70, 75, 80, 85, 90, 95, 100, 105};
inline constexpr int wide_scales[] = {110, 125, 140, 160, 180, 200, 225, 250, 280, 320, 360, 400};

struct RangeOfRows {
    F32x16 xmin, xmax;
};

// Sums over the codes c and the rounding errors r = z - c of the unrounded codes z.
struct RegressionSums {
    F32x16 c, cc, r, rc, rr;
};

// Fills in what is asked for: the sums of the regression, and that of the squared errors.
template <bool regresses, bool measures, bool weighted>
inline RegressionSums sum_by_weights(const ColumnsOfRows& rows, const GridParams& p, F32x16 top) {
    const F32x16 zero = splat(0.0f);
    RegressionSums sums = {zero, zero, zero, zero, zero};
    for (size_t j = 0; j < rows.d; j++) {
        const F32x16 z = unrounded_codes(load(rows.values + lanes * j), p);
        const F32x16 c = round_code(z, top), r = sub(z, c);
        if constexpr (weighted) {
            const F32x16 w = load(rows.weights + lanes * j), wc = mul(w, c), wr = mul(w, r);
            if constexpr (regresses) {
                sums.c = add(sums.c, wc);
                sums.cc = add(sums.cc, mul(wc, c));
                sums.r = add(sums.r, wr);
                sums.rc = add(sums.rc, mul(wr, c));
            }
            if constexpr (measures) sums.rr = add(sums.rr, mul(wr, r));
            continue;
        }
        if constexpr (regresses) {
            sums.c = add(sums.c, c);
            sums.cc = fma(c, c, sums.cc);   // the product is exact: no rounding is saved
            sums.r = add(sums.r, r);
            sums.rc = add(sums.rc, mul(r, c));
        }
        if constexpr (measures) sums.rr = add(sums.rr, mul(r, r));
    }
    return sums;
}

template <bool regresses, bool measures>
inline RegressionSums sum_for_regression(const ColumnsOfRows& rows, const GridParams& p, F32x16 top) {
    return rows.weights ? sum_by_weights<regresses, measures, true>(rows, p, top)
                        : sum_by_weights<regresses, measures, false>(rows, p, top);
}

inline F32x16 measured_error(const GridParams& p, const RegressionSums& s) {
    return mul(mul(p.scale, p.scale), s.rr);
}

// Puts the least-squares range for the codes that a range gives in its place.
inline void step_range(RangeOfRows& range, const GridParams& p, const RegressionSums& s, F32x16 n, Grid grid) {
    const F32x16 zero = splat(0.0f);
    const F32x16 spread = sub(mul(n, s.cc), mul(s.c, s.c));
    const F32x16 slope = div(sub(mul(n, s.rc), mul(s.c, s.r)), spread);
    const F32x16 bias = add(p.bias, mul(p.scale, div(sub(s.r, mul(slope, s.c)), n)));
    const F32x16 stored = grid.f16_params ? round_f16(bias) : bias;
    // The best scale for the bias as it is stored.
    const F32x16 scale = div(add(mul(p.scale, add(s.rc, s.cc)), mul(sub(p.bias, stored), s.c)), s.cc);
    const Mask16 usable = both(both(less(zero, spread), less(zero, scale)), finite(scale));
    range.xmin = select(usable, bias, range.xmin);
    range.xmax = select(usable, add(stored, mul(top_code(grid), scale)), range.xmax);
}

// The best starts so far, the best first.
struct KeptStarts {
    Candidate of[most_kept];
    int count;

    KeptStarts(const RangeOfRows& fallback, int count) : count(count) {
        for (Candidate& kept : of) kept = {fallback.xmin, fallback.xmax, splat(__builtin_inff())};
    }
    // Behind those of equal loss; the worse ones move down.
    void insert(Candidate candidate) {
        Mask16 is_better = first_lanes(0);
        for (int i = 0; i < count; i++) {
            Candidate& kept = of[i];
            is_better = either(is_better, less(candidate.loss, kept.loss));
            const Candidate worse = select_candidate(is_better, kept, candidate);
            kept = select_candidate(is_better, candidate, kept);
            candidate = worse;
        }
    }
};

inline void try_scale(int hundredths, const RangeOfRows& whole, const ColumnsOfRows& rows, Grid grid, int quarter_step,
                      KeptStarts& kept) {
    const F32x16 top = top_code(grid), half = splat(0.5f);
    const F32x16 unit = div(sub(whole.xmax, whole.xmin), top);
    const F32x16 scale = mul(splat(static_cast<float>(hundredths) / 100.0f), unit);
    const F32x16 middle = add(mul(whole.xmin, half), mul(whole.xmax, half));
    const F32x16 low = sub(middle, mul(mul(half, top), scale));
    for (int quarters = -2; quarters <= 1; quarters += quarter_step) {
        RangeOfRows start;
        start.xmin = add(low, mul(splat(static_cast<float>(quarters) / 4.0f), scale));
        start.xmax = add(start.xmin, mul(top, scale));
        const GridParams before = make_grid(start.xmin, start.xmax, grid);
        step_range(start, before, sum_for_regression<true, false>(rows, before, top), rows.total_weight, grid);
        const GridParams after = make_grid(start.xmin, start.xmax, grid);
        const RegressionSums sums = sum_for_regression<false, true>(rows, after, top);
        kept.insert({start.xmin, start.xmax, measured_error(after, sums)});
    }
}

template <size_t count>
inline void try_scales(const int (&scales)[count], const RangeOfRows& whole, const ColumnsOfRows& rows, Grid grid,
                       const SearchParams& params, KeptStarts& kept) {
    for (size_t i = 0; i < count; i += static_cast<size_t>(params.scale_step))
        try_scale(scales[i], whole, rows, grid, params.quarter_step, kept);
}

inline void refine_range(RangeOfRows range, const ColumnsOfRows& rows, Grid grid, int num_steps, Candidate& best) {
    for (int step = 0; step <= num_steps; step++) {
        const GridParams p = make_grid(range.xmin, range.xmax, grid);
        const RegressionSums sums = sum_for_regression<true, true>(rows, p, top_code(grid));
        const Candidate found = {range.xmin, range.xmax, measured_error(p, sums)};
        best = select_candidate(less(found.loss, best.loss), found, best);
        step_range(range, p, sums, rows.total_weight, grid);
    }
}

inline Candidate find_optimal(const RangeOfRows& whole, const RangeOfRows& greedy, const RangeOfRows* exact,
                              const ColumnsOfRows& rows, Grid grid, const SearchParams& params) {
    KeptStarts kept(greedy, params.num_kept);
    try_scales(usual_scales, whole, rows, grid, params, kept);
    if (rows.d <= size_t{3} << grid.bits) try_scales(wide_scales, whole, rows, grid, params, kept);
    Candidate best = {greedy.xmin, greedy.xmax, splat(__builtin_inff())};
    refine_range(greedy, rows, grid, params.num_steps, best);
    for (int i = 0; i < kept.count; i++)
        refine_range({kept.of[i].xmin, kept.of[i].xmax}, rows, grid, params.num_steps, best);
    if (exact) refine_range(*exact, rows, grid, params.num_steps, best);
    return best;
}

inline void measure_by_weights(const ColumnsOfRows& rows, Grid grid, Candidate& candidate) {
    const GridParams p = make_grid(candidate.xmin, candidate.xmax, grid);
    F32x16 sum = splat(0.0f);
    for (size_t j = 0; j < rows.d; j++) {
        const F32x16 x = load(rows.values + lanes * j);
        const F32x16 square = squared_error(x, round_code(unrounded_codes(x, p), top_code(grid)), p);
        sum = add(sum, mul(square, load(rows.weights + lanes * j)));
    }
    candidate.loss = sqrt(sum);
}

// The weights of 16 rows from `first` on, a column after the other.
inline void transpose_weights(const RowBlock& block, size_t first, const SearchParams& params, float* columns) {
    if (!params.are_of_columns)
        return transpose_rows({params.error_weights, block.num_rows, block.embedding_dim}, first, columns);
    for (size_t j = 0; j < block.embedding_dim; j++) store(columns + lanes * j, splat(params.error_weights[j]));
}

inline ColumnsOfRows read_columns(const RowBlock& block, size_t first, const SearchParams& params, float* scratch) {
    const size_t d = block.embedding_dim;
    transpose_rows(block, first, scratch);
    if (!params.error_weights) return {scratch, nullptr, d, splat(static_cast<float>(d))};
    float* weights = scratch + lanes * d;
    transpose_weights(block, first, params, weights);
    F32x16 total = splat(0.0f);
    for (size_t j = 0; j < d; j++) total = add(total, load(weights + lanes * j));
    return {scratch, weights, d, total};
}

inline RangeOfRows load_range(const Ranges& ranges, size_t first) {
    return {load(ranges.xmin + first), load(ranges.xmax + first)};
}

void search_optimal(const RowBlock& block, Grid grid, const SearchParams& params, Ranges& ranges,
                    float* scratch) noexcept {
    const size_t d = block.embedding_dim;
    const Ranges bounds = ranges;
    search_greedy(block, grid, SearchParams{}, ranges, scratch);
    // A weighted square is rounded once more.
    const F32x16 surely = splat(lower_for_sure(params.error_weights ? d + 2 : d));
    for (size_t v = 0; v < vectors && lanes * v < block.num_rows; v++) {
        const ColumnsOfRows rows = read_columns(block, lanes * v, params, scratch);
        const RangeOfRows whole = load_range(bounds, lanes * v), greedy = load_range(ranges, lanes * v);
        RangeOfRows exact = greedy;
        if (params.exact) exact = load_range(*params.exact, lanes * v);
        Candidate found = find_optimal(whole, greedy, params.exact ? &exact : nullptr, rows, grid, params);
        Candidate known = {greedy.xmin, greedy.xmax, splat(0.0f)};
        if (rows.weights) {
            measure_by_weights(rows, grid, found);
            measure_by_weights(rows, grid, known);
        } else {
            measure_anywhere(scratch, d, grid, found, known);
        }
        const Mask16 is_better = less(found.loss, mul(known.loss, surely));
        store_ranges(select_candidate(is_better, found, known), ranges, v);
    }
}
