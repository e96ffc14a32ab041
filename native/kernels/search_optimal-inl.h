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
// Quarters of a code that a start is off the middle: from -2 on.
inline constexpr int num_quarters = 4;

struct RangeOfRows {
    F32x16 xmin, xmax;
};

// Sums over the codes c and the rounding errors r = z - c of the unrounded codes z.
struct RegressionSums {
    F32x16 c, cc, r, rc, rr;
};

// Fills in what is asked for of each of some ranges: the sums of the regression, and that of the squared errors.
template <bool regresses, bool measures, bool weighted, size_t count>
inline void sum_by_weights(const ColumnsOfRows& rows, const GridParams* params, F32x16 top,
                           RegressionSums* all_sums) {
    const F32x16 zero = splat(0.0f);
    RegressionSums own[count];
    unrolled<count>([&](size_t k) { own[k] = {zero, zero, zero, zero, zero}; });
    for (size_t j = 0; j < rows.d; j++) {
        const F32x16 x = load(rows.values + lanes * j);
        unrolled<count>([&](size_t k) __attribute__((always_inline)) {
            RegressionSums& sums = own[k];
            const F32x16 z = unrounded_codes(x, params[k]);
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
            } else {
                if constexpr (regresses) {
                    sums.c = add(sums.c, c);
                    sums.cc = fma(c, c, sums.cc);   // the product is exact: no rounding is saved
                    sums.r = add(sums.r, r);
                    sums.rc = add(sums.rc, mul(r, c));
                }
                if constexpr (measures) sums.rr = add(sums.rr, mul(r, r));
            }
        });
    }
    unrolled<count>([&](size_t k) { all_sums[k] = own[k]; });
}

// The sums of as many ranges at a time as stay in registers.
template <bool regresses, bool measures, size_t count>
inline void sum_for_regression(const ColumnsOfRows& rows, const GridParams (&params)[count], F32x16 top,
                               RegressionSums (&sums)[count]) {
    constexpr size_t together = smaller(sums_at_once, count);
    unrolled<count / together>([&](size_t i) {
        const size_t k = together * i;
        rows.weights ? sum_by_weights<regresses, measures, true, together>(rows, params + k, top, sums + k)
                     : sum_by_weights<regresses, measures, false, together>(rows, params + k, top, sums + k);
    });
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

// Calls use<n>(i) for n starts from i on: for some at a time, so that one does not wait for another's divisions, and for
// fewer at the end.
template <size_t most, class Use>
inline void in_groups(size_t first, size_t count, const Use& use) {
    for (; first + most <= count; first += most) use.template operator()<most>(first);
    if constexpr (most > 1) in_groups<most / 2>(first, count, use);
}

// The starts with one scale, to which they are added.
inline size_t make_starts(int hundredths, const RangeOfRows& whole, Grid grid, int quarter_step, RangeOfRows* starts) {
    const F32x16 top = top_code(grid), half = splat(0.5f);
    const F32x16 unit = div(sub(whole.xmax, whole.xmin), top);
    const F32x16 scale = mul(splat(static_cast<float>(hundredths) / 100.0f), unit);
    const F32x16 middle = add(mul(whole.xmin, half), mul(whole.xmax, half));
    const F32x16 low = sub(middle, mul(mul(half, top), scale));
    size_t count = 0;
    for (int quarters = -2; quarters < num_quarters - 2; quarters += quarter_step) {
        RangeOfRows& start = starts[count++];
        start.xmin = add(low, mul(splat(static_cast<float>(quarters) / 4.0f), scale));
        start.xmax = add(start.xmin, mul(top, scale));
    }
    return count;
}

template <size_t count>
inline void try_starts(const RangeOfRows* from, const ColumnsOfRows& rows, Grid grid, KeptStarts& kept) {
    const F32x16 top = top_code(grid);
    RangeOfRows ranges[count];
    GridParams grids[count];
    RegressionSums sums[count];
    unrolled<count>([&](size_t k) {
        ranges[k] = from[k];
        grids[k] = make_grid(ranges[k].xmin, ranges[k].xmax, grid);
    });
    sum_for_regression<true, false>(rows, grids, top, sums);
    unrolled<count>([&](size_t k) {
        step_range(ranges[k], grids[k], sums[k], rows.total_weight, grid);
        grids[k] = make_grid(ranges[k].xmin, ranges[k].xmax, grid);
    });
    sum_for_regression<false, true>(rows, grids, top, sums);
    unrolled<count>(
        [&](size_t k) { kept.insert({ranges[k].xmin, ranges[k].xmax, measured_error(grids[k], sums[k])}); });
}

template <size_t count>
inline void try_scales(const int (&scales)[count], const RangeOfRows& whole, const ColumnsOfRows& rows, Grid grid,
                       const SearchParams& params, KeptStarts& kept) {
    RangeOfRows starts[num_quarters * count];
    size_t num_starts = 0;
    for (size_t i = 0; i < count; i += static_cast<size_t>(params.scale_step))
        num_starts += make_starts(scales[i], whole, grid, params.quarter_step, starts + num_starts);
    in_groups<starts_at_once>(
        0, num_starts, [&]<size_t n>(size_t i) { try_starts<n>(starts + i, rows, grid, kept); });
}

// Steps on from some ranges. The best one of all becomes the best, if it is better; of equal ones the first.
template <size_t count>
inline void refine_ranges(const RangeOfRows* from, const ColumnsOfRows& rows, Grid grid, int num_steps,
                          Candidate& best) {
    RangeOfRows ranges[count];
    Candidate best_of[count];
    unrolled<count>([&](size_t k) {
        ranges[k] = from[k];
        best_of[k] = {from[k].xmin, from[k].xmax, splat(__builtin_inff())};
    });
    for (int step = 0; step <= num_steps; step++) {
        GridParams grids[count];
        RegressionSums sums[count];
        unrolled<count>([&](size_t k) { grids[k] = make_grid(ranges[k].xmin, ranges[k].xmax, grid); });
        sum_for_regression<true, true>(rows, grids, top_code(grid), sums);
        unrolled<count>([&](size_t k) {
            const Candidate found = {ranges[k].xmin, ranges[k].xmax, measured_error(grids[k], sums[k])};
            best_of[k] = select_candidate(less(found.loss, best_of[k].loss), found, best_of[k]);
            step_range(ranges[k], grids[k], sums[k], rows.total_weight, grid);
        });
    }
    unrolled<count>([&](size_t k) { best = select_candidate(less(best_of[k].loss, best.loss), best_of[k], best); });
}

inline Candidate find_optimal(const RangeOfRows& whole, const RangeOfRows& greedy, const RangeOfRows* exact,
                              const ColumnsOfRows& rows, Grid grid, const SearchParams& params) {
    KeptStarts kept(greedy, params.num_kept);
    try_scales(usual_scales, whole, rows, grid, params, kept);
    if (rows.d <= size_t{3} << grid.bits) try_scales(wide_scales, whole, rows, grid, params, kept);
    Candidate best = {greedy.xmin, greedy.xmax, splat(__builtin_inff())};
    RangeOfRows starts[most_kept + 2] = {greedy};
    size_t count = 1;
    for (int i = 0; i < kept.count; i++) starts[count++] = {kept.of[i].xmin, kept.of[i].xmax};
    if (exact) starts[count++] = *exact;
    in_groups<starts_at_once>(
        0, count, [&]<size_t n>(size_t i) { refine_ranges<n>(starts + i, rows, grid, params.num_steps, best); });
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

// The range of a row of zeros in place of one that loses more: parameters as float16 may be too coarse for a row. Only
// for rows as small as that, or such columns of weighted ones.
inline Candidate choose_or_zeros(const ColumnsOfRows& rows, const RangeOfRows& whole, Grid grid, F32x16 surely,
                                 const Candidate& chosen) {
    const F32x16 zero = splat(0.0f);
    const F32x16 largest = max(magnitude(whole.xmin), magnitude(whole.xmax));
    if (!rows.weights && lane_bits(less(largest, splat(0x1p-10f))) == 0) return chosen;
    Candidate zeros = {zero, zero, zero}, again = zeros;
    if (rows.weights)
        measure_by_weights(rows, grid, zeros);
    else
        measure_anywhere(rows.values, rows.d, grid, zeros, again);
    return select_candidate(less(zeros.loss, mul(chosen.loss, surely)), zeros, chosen);
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
        const Candidate chosen = select_candidate(is_better, found, known);
        store_ranges(choose_or_zeros(rows, whole, grid, surely, chosen), ranges, v);
    }
}
