// GREEDY's walk (Guan et al. 2019, Algorithm 1), one row in each lane.
//
// Sixteen rows go in step, so every lane adds up its row's squared errors one after the other, which is the
// order of PyTorch's choose_qparams_optimized: with the same rounding at each operation the path through the
// ranges is PyTorch's, bit for bit, and so is what GREEDY-PAPER returns.
// Per value and range that is sub, mul, round, fma, sub, mul, add, and two clips of the code, which are mostly
// saved: a move is a small part of a code, so that values clipped to an earlier range on the walk still get the
// right codes by rounding alone. That is checked, not assumed (codes_fit), and the values are clipped anew
// when it no longer holds. Where the fma replaces PyTorch's mul and add nothing changes: with a float16 scale,
// scale * code is exact.
// On Zen 4 the loop is bound by its four floating-point pipes, at 1.9 of the 2 vectors a cycle they can take.
// Summing fma(e, e, sum) would save one operation more, but then the last bits, and with them the path through
// near ties, would not be PyTorch's.

// After r has stopped the paper's search, the rows still falling go on; a row has fallen if its best range is
// among its last `patience` ones.
inline constexpr float greedy_patience = 4.0f;

// The value of row `first` + i in column j at columns[16 * j + i]; rows that the block lacks are zeros.
inline void transpose_rows(const RowBlock& block, size_t first, float* columns) {
    const size_t d = block.embedding_dim;
    size_t j = 0;
    if (first + lanes <= block.num_rows)
        for (; j + 16 <= d; j += 16) transpose_16x16(block.rows + first * d + j, d, columns + lanes * j);
    for (; j < d; j++)
        for (size_t i = 0; i < lanes; i++)
            columns[lanes * j + i] = first + i < block.num_rows ? block.rows[(first + i) * d + j] : 0.0f;
}

template <class Vector, class Params>
inline Vector unrounded_codes(Vector x, const Params& p) {
    return mul(sub(x, p.bias), p.inverse);
}

template <class Vector, class Params>
inline Vector squared_error(Vector x, Vector codes, const Params& p) {
    const Vector error = sub(x, fma(codes, p.scale, p.bias));
    return mul(error, error);
}

// A range for each row of one vector, and its loss ||X - Q(X, xmin, xmax)||_2.
struct Candidate {
    F32x16 xmin, xmax, loss;
};

inline Candidate select_candidate(Mask16 m, const Candidate& yes, const Candidate& no) {
    return {select(m, yes.xmin, no.xmin), select(m, yes.xmax, no.xmax), select(m, yes.loss, no.loss)};
}

// The walk of one vector of rows.
struct Walk {
    const float* columns;
    float* clipped;               // the columns, clipped to [clip_low, clip_high]
    F32x16 clip_low, clip_high;
    F32x16 step, smallest, moves_since_best;
    Candidate current, local_minimum, best;
    Mask16 within_r, active;
};

// Clips the columns to the current ranges.
inline void clip_columns(Walk& walk, size_t d) {
    walk.clip_low = walk.current.xmin;
    walk.clip_high = walk.current.xmax;
    for (size_t j = 0; j < d; j++) {
        const F32x16 x = load(walk.columns + lanes * j);
        store(walk.clipped + lanes * j, min(max(x, walk.clip_low), walk.clip_high));
    }
}

// In which rows the clipped values get their codes by rounding alone: the lower end of the clipping must round to
// code 0 and the upper one to the top code. What is between them is then between those codes, and what was
// clipped to an end has its code.
template <class AnyWalk>
inline Mask16 codes_fit(const AnyWalk& walk, const GridParams& p, F32x16 top) {
    return both(equal(round_nearest(unrounded_codes(walk.clip_low, p)), splat(0.0f)),
                equal(round_nearest(unrounded_codes(walk.clip_high, p)), top));
}

template <class AnyWalk>
inline bool active_codes_fit(const AnyWalk& walk, const GridParams& left, const GridParams& right, F32x16 top) {
    const Mask16 fit = both(codes_fit(walk, left, top), codes_fit(walk, right, top));
    return lane_bits(except(walk.active, fit)) == 0;
}

// Two losses at a time share the loads and hide each other's chain of additions. If clipped, codes come from there.
template <bool is_clipped>
inline void add_squared_errors(const float* columns, const float* clipped, size_t d, const GridParams& left,
                               const GridParams& right, F32x16 top, F32x16& left_sum, F32x16& right_sum) {
    const auto codes_of = [top](F32x16 x, const GridParams& p) {
        const F32x16 codes = unrounded_codes(x, p);
        return is_clipped ? round_nearest(codes) : round_code(codes, top);
    };
    for (size_t j = 0; j < d; j++) {
        const F32x16 x = load(columns + lanes * j);
        const F32x16 to_code = is_clipped ? load(clipped + lanes * j) : x;
        left_sum = add(left_sum, squared_error(x, codes_of(to_code, left), left));
        right_sum = add(right_sum, squared_error(x, codes_of(to_code, right), right));
    }
}

// Fills in the losses of two candidates, whatever the values have been clipped to.
inline void measure_anywhere(const float* columns, size_t d, Grid grid, Candidate& a, Candidate& b) {
    const GridParams p = make_grid(a.xmin, a.xmax, grid), q = make_grid(b.xmin, b.xmax, grid);
    F32x16 a_sum = splat(0.0f), b_sum = splat(0.0f);
    add_squared_errors<false>(columns, nullptr, d, p, q, top_code(grid), a_sum, b_sum);
    a.loss = sqrt(a_sum);
    b.loss = sqrt(b_sum);
}

// Fills in the losses of two candidates, from clipped values where they fit.
inline void measure(Walk& walk, size_t d, Grid grid, Candidate& left, Candidate& right) {
    const F32x16 top = top_code(grid);
    const GridParams p = make_grid(left.xmin, left.xmax, grid);
    const GridParams q = make_grid(right.xmin, right.xmax, grid);
    if (!active_codes_fit(walk, p, q, top)) {
        clip_columns(walk, d);
        if (!active_codes_fit(walk, p, q, top)) return measure_anywhere(walk.columns, d, grid, left, right);
    }
    F32x16 left_sum = splat(0.0f), right_sum = splat(0.0f);
    add_squared_errors<true>(walk.columns, walk.clipped, d, p, q, top, left_sum, right_sum);
    left.loss = sqrt(left_sum);
    right.loss = sqrt(right_sum);
}

// The losses of one row under as many ranges as a register has, those in the first lanes.
inline F32x16 measure_row(const float* columns, size_t lane, size_t d, Grid grid, F32x16 xmin, F32x16 xmax) {
    const Part top = part_of(top_code(grid), 0);
    const PartParams p(make_grid(xmin, xmax, grid), 0);
    F32x16 sums = splat(0.0f);
    Part sum = part_of(sums, 0);
    for (size_t j = 0; j < d; j++) {
        const Part x = splat_part(columns[lanes * j + lane]);
        sum = add(sum, squared_error(x, round_code(unrounded_codes(x, p), top), p));
    }
    part_of(sums, 0) = sum;
    return sqrt(sums);
}

// The full range over b.
inline F32x16 step_of(F32x16 xmin, F32x16 xmax, const SearchParams& params) {
    return div(sub(xmax, xmin), splat(static_cast<float>(params.b)));
}

// The length down to which r lets a range shrink.
inline F32x16 smallest_of(F32x16 step, const SearchParams& params) {
    const double share = 1.0 - static_cast<double>(static_cast<float>(params.r));
    return mul(splat(static_cast<float>(static_cast<int>(params.b * share))), step);
}

// Which ranges move once more.
inline Mask16 may_move(Mask16 within_r, F32x16 moves_since_best, F32x16 xmin, F32x16 xmax, F32x16 step,
                       bool local_minima_only) {
    if (local_minima_only) return within_r;
    const Mask16 falling = both(less(moves_since_best, splat(greedy_patience)), less(add(xmin, step), xmax));
    return either(within_r, falling);
}

// The sums carry up to (d + 8) / 2 roundings each. Leaving PyTorch's choice only for a loss lower by more than this
// factor is what makes ours never the worse one.
inline float lower_for_sure(size_t d) { return 1.0f - static_cast<float>(d + 8) * 0x1p-24f; }

inline Walk start_walk(const float* columns, float* clipped, size_t d, Candidate whole, Grid grid,
                       const SearchParams& params) {
    const F32x16 step = step_of(whole.xmin, whole.xmax, params);
    const F32x16 smallest = smallest_of(step, params);
    const Mask16 all = first_lanes(lanes);
    Walk walk = {columns, clipped, whole.xmin, whole.xmax, step, smallest, splat(0.0f), whole, whole, whole, all, all};
    clip_columns(walk, d);
    Candidate again = whole;
    measure(walk, d, grid, whole, again);
    walk.current = walk.local_minimum = walk.best = whole;
    return walk;
}

// Finds which rows move once more; false if none does.
template <class AnyWalk>
inline bool find_active(AnyWalk& walk, bool local_minima_only) {
    walk.within_r = less(add(walk.current.xmin, walk.smallest), walk.current.xmax);
    walk.active = may_move(walk.within_r, walk.moves_since_best, walk.current.xmin, walk.current.xmax, walk.step,
                           local_minima_only);
    return lane_bits(walk.active) != 0;
}

inline void move(Walk& walk, size_t d, Grid grid) {
    const Candidate& current = walk.current;
    Candidate left = {add(current.xmin, walk.step), current.xmax, current.loss};
    Candidate right = {current.xmin, sub(current.xmax, walk.step), current.loss};
    measure(walk, d, grid, left, right);
    const Mask16 lowest = both(both(less(current.loss, left.loss), less(current.loss, right.loss)),
                               both(less(current.loss, walk.local_minimum.loss), walk.within_r));
    walk.local_minimum = select_candidate(lowest, current, walk.local_minimum);
    const Candidate moved = select_candidate(less(left.loss, right.loss), left, right);
    walk.current = select_candidate(walk.active, moved, current);
    const Mask16 better = both(walk.active, less(walk.current.loss, walk.best.loss));
    walk.best = select_candidate(better, walk.current, walk.best);
    walk.moves_since_best = select(better, splat(0.0f), add(walk.moves_since_best, splat(1.0f)));
}

// What a row takes: the range that PyTorch takes, unless another is surely better.
inline Candidate choose(const Walk& walk, size_t d, bool local_minima_only) {
    if (local_minima_only) return walk.local_minimum;
    const F32x16 limit = mul(walk.local_minimum.loss, splat(lower_for_sure(d)));
    return select_candidate(less(walk.best.loss, limit), walk.best, walk.local_minimum);
}
