// OPTIMAL: rounding and least squares in turns, from greedy's range and from many others. One row in each lane, and
// every sum in the order of the columns, a product and an addition at a time: the reference does the same with whole
// arrays.

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
template <bool regresses, bool measures>
inline RegressionSums sum_for_regression(const float* columns, size_t d, const GridParams& p, F32x16 top) {
    const F32x16 zero = splat(0.0f);
    RegressionSums sums = {zero, zero, zero, zero, zero};
    for (size_t j = 0; j < d; j++) {
        const F32x16 z = unrounded_codes(load(columns + lanes * j), p);
        const F32x16 c = round_code(z, top), r = sub(z, c);
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

inline F32x16 measured_error(const GridParams& p, const RegressionSums& s) {
    return mul(mul(p.scale, p.scale), s.rr);
}

// Puts the least-squares range for the codes that a range gives in its place.
inline void step_range(RangeOfRows& range, const GridParams& p, const RegressionSums& s, size_t d, Grid grid) {
    const F32x16 n = splat(static_cast<float>(d)), zero = splat(0.0f);
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
    void insert(Candidate candidate) {
        for (int i = 0; i < count; i++) {
            Candidate& kept = of[i];
            const Mask16 is_better = less(candidate.loss, kept.loss);
            const Candidate worse = select_candidate(is_better, kept, candidate);
            kept = select_candidate(is_better, candidate, kept);
            candidate = worse;
        }
    }
};

inline void try_scale(int hundredths, const RangeOfRows& whole, const float* columns, size_t d, Grid grid,
                      int quarter_step, KeptStarts& kept) {
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
        step_range(start, before, sum_for_regression<true, false>(columns, d, before, top), d, grid);
        const GridParams after = make_grid(start.xmin, start.xmax, grid);
        const RegressionSums sums = sum_for_regression<false, true>(columns, d, after, top);
        kept.insert({start.xmin, start.xmax, measured_error(after, sums)});
    }
}

template <size_t count>
inline void try_scales(const int (&scales)[count], const RangeOfRows& whole, const float* columns, size_t d, Grid grid,
                       const SearchParams& params, KeptStarts& kept) {
    for (size_t i = 0; i < count; i += static_cast<size_t>(params.scale_step))
        try_scale(scales[i], whole, columns, d, grid, params.quarter_step, kept);
}

inline void refine_range(RangeOfRows range, const float* columns, size_t d, Grid grid, int num_steps,
                         Candidate& best) {
    for (int step = 0; step <= num_steps; step++) {
        const GridParams p = make_grid(range.xmin, range.xmax, grid);
        const RegressionSums sums = sum_for_regression<true, true>(columns, d, p, top_code(grid));
        const Candidate found = {range.xmin, range.xmax, measured_error(p, sums)};
        best = select_candidate(less(found.loss, best.loss), found, best);
        step_range(range, p, sums, d, grid);
    }
}

inline Candidate find_optimal(const RangeOfRows& whole, const RangeOfRows& greedy, const float* columns, size_t d,
                              Grid grid, const SearchParams& params) {
    KeptStarts kept(greedy, params.num_kept);
    try_scales(usual_scales, whole, columns, d, grid, params, kept);
    if (d <= size_t{3} << grid.bits) try_scales(wide_scales, whole, columns, d, grid, params, kept);
    Candidate best = {greedy.xmin, greedy.xmax, splat(__builtin_inff())};
    refine_range(greedy, columns, d, grid, params.num_steps, best);
    for (int i = 0; i < kept.count; i++)
        refine_range({kept.of[i].xmin, kept.of[i].xmax}, columns, d, grid, params.num_steps, best);
    return best;
}

void search_optimal(const RowBlock& block, Grid grid, const SearchParams& params, Ranges& ranges,
                    float* scratch) noexcept {
    const size_t d = block.embedding_dim;
    const Ranges bounds = ranges;
    search_greedy(block, grid, SearchParams{}, ranges, scratch);
    const F32x16 surely = splat(lower_for_sure(d));
    for (size_t v = 0; v < vectors && lanes * v < block.num_rows; v++) {
        transpose_rows(block, lanes * v, scratch);
        const RangeOfRows whole = {load(bounds.xmin + lanes * v), load(bounds.xmax + lanes * v)};
        const RangeOfRows greedy = {load(ranges.xmin + lanes * v), load(ranges.xmax + lanes * v)};
        Candidate found = find_optimal(whole, greedy, scratch, d, grid, params);
        Candidate known = {greedy.xmin, greedy.xmax, splat(0.0f)};
        measure_anywhere(scratch, d, grid, found, known);
        const Mask16 is_better = less(found.loss, mul(known.loss, surely));
        store_ranges(select_candidate(is_better, found, known), ranges, v);
    }
}
