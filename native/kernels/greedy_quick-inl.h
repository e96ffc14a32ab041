// GREEDY's walk at less than half the price.
//
// The walk of greedy_walk-inl.h needs losses only to compare them. Here the *square* of a loss comes from fewer
// operations, with a bound on how far it can be from the square of the loss that the walk computes, roundings included.
// Losses that are further apart than twice the bound compare as the walk's do; closer ones are computed as the walk
// does. So the path is the walk's, bit for bit.
//
// What is cheap: with t = (x - bias) / scale the error of a value inside the range is scale * (t - round(t)), whatever
// its code; three operations a value and range: t by fma, t - round(t), fma onto the sum. The order of the sum is free.
// Values outside the range are clipped to a range [low, high] whose ends have the end codes. With e = x - low < 0 and
// g = low - bias, the error of such a value squares to e^2 + 2 g e + g^2, and g^2 is what the clipped value contributes
// anyway; so the sums of e and of e^2, made when the values are clipped, put it right for every scale and bias until
// an end of the clipping leaves its code.
//
// The bound, with u = 2^-24, n = embedding_dim, x the row, e its errors, S the squared loss, P the sum of the absolute
// values of its parts, c = bias + (top + 1) / 2 * scale, which is what t is counted from:
// - The walk's levels round by u |level|, in all by u (||x|| + ||e||). Our t is off by u (2 |t| + 2 |c| / scale), and
//   scale * ||t|| <= ||x - c|| <= ||x|| + sqrt(n) |c|. Together e is off by at most D = u (3 ||x|| + 4 sqrt(n) |c|),
//   and S by 2 sqrt(P) D + D^2.
// - The walk's own t is off by at most w: u (top + 1/2) from the difference, as much from the inverse, u (top + 1) / 2
//   from the product. That may give a value near the middle of two levels the farther one: its error squares to at most
//   (1/2 + w)^2 instead of (1/2 - w)^2: 8 w relative.
// - Sums and what surrounds them: the walk's are off by (n + 8) u relative, ours by (n / 4 + 16) u inside the clipping
//   and by (n + 16) u outside.
// - Squares below the normal floats vanish, 2^-149 each.
// While the ends of the clipping have the end codes, they are at most half a step from the end levels. So scale is at
// most (high - low) / (top - 1), |c| at most |low + high| / 2 + scale, and |2 g e| at most scale |e|: what the bound
// needs is known when the values are clipped, but for S, which is held under a limit.

// Measuring a row as the walk does costs about what a quick move saves. A walk that has measured so many rows more than
// it has made moves is no longer quick: its steps are small, so that most losses are close.
inline constexpr int most_credit = 16;
// Past that the bound is wider than most differences are.
inline constexpr size_t widest_quick = 1024;
// How far a squared loss may rise before the slack is made anew.
inline constexpr float quick_rise = 1.1f;

// The factors of the bound, rounded up by a percent: its own arithmetic rounds, too.
struct Bound {
    float relative;       // of P
    float outside;        // of what is outside the clipping, in addition
    float norm, middle;   // D = norm * ||x|| + middle * |c|
    float smallest;       // more than all squares that vanish: a loss of less than that decides nothing

    Bound(float n, float top)
        : relative(u * (1.25f * n + 24.0f + 8.0f * (2.5f * top + 1.5f))),
          outside(u * 0.75f * n),
          norm(u * 3.0f),
          middle(u * 4.0f * __builtin_sqrtf(n)),
          smallest(0x1p-100f) {}

private:
    static constexpr float u = 1.01f * 0x1p-24f;
};

// The walk of one vector of rows; losses are squared.
struct QuickWalk {
    const float* columns;
    float* clipped;                            // the columns, clipped to [clip_low, clip_high]
    F32x16 clip_low, clip_high;
    F32x16 cut_squares, cut_below, cut_above;  // sums of e^2, and of 2 e on either side
    F32x16 norm_error;                         // the part of D that the row makes
    F32x16 limit;                              // of the losses that the slack is enough for
    F32x16 slack;                              // twice the bound
    F32x16 step, smallest, moves_since_best;
    Candidate current, local_minimum, best;
    GridParams left, right;                    // of the two candidates of a move
    Mask16 within_r, active;
    bool tracks_best;
    int credit;                                // one for each move, minus one for each row measured as the walk does
};

inline Mask16 surely_less(const QuickWalk& walk, const Candidate& a, const Candidate& b) {
    return less(add(a.loss, walk.slack), b.loss);
}

// Clips the columns well inside the current ranges, so that the ends keep their codes for as many moves as they can:
// from +3/8 to -1/2 of a step at the lower end.
inline void clip_inside(QuickWalk& walk, size_t d, F32x16 top) {
    const Candidate& current = walk.current;
    const F32x16 inwards = mul(div(sub(current.xmax, current.xmin), top), splat(0.375f));
    const F32x16 low = add(current.xmin, inwards), high = sub(current.xmax, inwards), zero = splat(0.0f);
    F32x16 squares = zero, below = zero, above = zero;
    for (size_t j = 0; j < d; j++) {
        const F32x16 x = load(walk.columns + lanes * j);
        const F32x16 inside = min(max(x, low), high);
        store(walk.clipped + lanes * j, inside);
        const F32x16 cut = sub(x, inside);
        squares = fma(cut, cut, squares);
        below = add(below, min(cut, zero));
        above = add(above, max(cut, zero));
    }
    walk.clip_low = low;
    walk.clip_high = high;
    walk.cut_squares = squares;
    walk.cut_below = add(below, below);
    walk.cut_above = add(above, above);
}

// Makes the slack enough for losses up to a limit somewhat above this one.
inline void set_slack(QuickWalk& walk, F32x16 loss, F32x16 top, const Bound& bound) {
    const F32x16 low = walk.clip_low, high = walk.clip_high, half = splat(0.5f), more = splat(1.01f);
    const F32x16 scale = mul(div(sub(high, low), sub(top, splat(1.0f))), more);
    const F32x16 c = fma(magnitude(add(low, high)), half, scale);
    const F32x16 products = mul(mul(scale, half), sub(walk.cut_above, walk.cut_below));
    const F32x16 outside = add(walk.cut_squares, products);
    const F32x16 parts = mul(fma(splat(2.0f), products, loss), splat(quick_rise));
    const F32x16 off = fma(c, splat(bound.middle), walk.norm_error);
    const F32x16 summed = fma(parts, splat(bound.relative), fma(outside, splat(bound.outside), splat(bound.smallest)));
    const F32x16 one_side = fma(off, fma(splat(2.0f), sqrt(parts), off), summed);
    walk.limit = fma(splat(-2.0f), products, parts);
    walk.slack = max(walk.slack, add(one_side, one_side));
}

// Sums (t - round(t))^2 for two candidates, four sums each: fewer roundings, and none waits for another. t is counted
// from c, which lies a whole number of levels from bias. One register of rows after the other: sums and what they are
// made with stay in sixteen registers.
inline void sum_fractions(const float* clipped, size_t d, const GridParams& left, const GridParams& right, F32x16 top,
                          F32x16& left_sum, F32x16& right_sum) {
    const F32x16 zero = splat(0.0f), middle_code = fma(top, splat(0.5f), splat(0.5f));
    const auto offset = [&](const GridParams& p) {
        return sub(zero, mul(fma(p.scale, middle_code, p.bias), p.inverse));
    };
    const F32x16 left_offsets = offset(left), right_offsets = offset(right);
    unrolled<parts>([&](size_t i) {
        const Part left_inverse = part_of(left.inverse, i), left_offset = part_of(left_offsets, i);
        const Part right_inverse = part_of(right.inverse, i), right_offset = part_of(right_offsets, i);
        const Part none = part_of(zero, i);
        Part to_left[4] = {none, none, none, none}, to_right[4] = {none, none, none, none};
        const float* x = clipped + lanes / parts * i;
        const auto add_column = [&](size_t k) {
            const Part column = load_part(x);
            const Part l = from_nearest(fma(column, left_inverse, left_offset));
            const Part r = from_nearest(fma(column, right_inverse, right_offset));
            to_left[k] = fma(l, l, to_left[k]);
            to_right[k] = fma(r, r, to_right[k]);
            x += lanes;
        };
        size_t j = 0;
        for (; j + 4 <= d; j += 4) unrolled<4>(add_column);
        for (; j < d; j++) add_column(0);
        part_of(left_sum, i) = add(add(to_left[0], to_left[1]), add(to_left[2], to_left[3]));
        part_of(right_sum, i) = add(add(to_right[0], to_right[1]), add(to_right[2], to_right[3]));
    });
}

inline F32x16 squared_loss(const QuickWalk& walk, const GridParams& p, F32x16 sum, F32x16 top) {
    const F32x16 inside = fma(mul(p.scale, p.scale), sum, walk.cut_squares);
    const F32x16 below = fma(sub(walk.clip_low, p.bias), walk.cut_below, inside);
    return fma(sub(walk.clip_high, fma(p.scale, top, p.bias)), walk.cut_above, below);
}

// False if the values of a row cannot be clipped.
inline bool start(QuickWalk& walk, const float* columns, float* clipped, size_t d, const Candidate& whole, Grid grid,
                  const SearchParams& params, const Bound& bound) {
    const F32x16 top = top_code(grid), zero = splat(0.0f);
    walk.columns = columns;
    walk.clipped = clipped;
    walk.step = step_of(whole.xmin, whole.xmax, params);
    walk.smallest = smallest_of(walk.step, params);
    walk.moves_since_best = walk.slack = zero;
    walk.tracks_best = false;
    walk.credit = most_credit;
    F32x16 squares = zero;
    for (size_t j = 0; j < d; j++) {
        const F32x16 x = load(columns + lanes * j);
        squares = fma(x, x, squares);
    }
    walk.norm_error = mul(sqrt(squares), splat(bound.norm));

    walk.current = whole;
    clip_inside(walk, d, top);
    const GridParams p = make_grid(whole.xmin, whole.xmax, grid);
    F32x16 sum, again;
    sum_fractions(clipped, d, p, p, top, sum, again);
    walk.current.loss = squared_loss(walk, p, sum, top);
    set_slack(walk, walk.current.loss, top, bound);
    walk.local_minimum = walk.best = walk.current;
    find_active(walk, params.local_minima_only);
    return lane_bits(except(walk.active, codes_fit(walk, p, top))) == 0;
}

// Finds the grids of both candidates; false if the values of a row cannot be clipped for them.
inline bool prepare_move(QuickWalk& walk, size_t d, Grid grid, F32x16 top, const Bound& bound) {
    const Candidate& current = walk.current;
    walk.left = make_grid(add(current.xmin, walk.step), current.xmax, grid);
    walk.right = make_grid(current.xmin, sub(current.xmax, walk.step), grid);
    if (active_codes_fit(walk, walk.left, walk.right, top)) return true;
    clip_inside(walk, d, top);
    set_slack(walk, walk.current.loss, top, bound);
    return active_codes_fit(walk, walk.left, walk.right, top);
}

// Computes the losses of two candidates in some rows as the walk does.
inline void measure_exactly(QuickWalk& walk, size_t d, Grid grid, Mask16 rows, Candidate& a, Candidate& b) {
    float xmin[2][lanes], xmax[2][lanes], loss[2][lanes] = {};
    const Candidate* candidates[] = {&a, &b};
    for (size_t i = 0; i < 2; i++) {
        store(xmin[i], candidates[i]->xmin);
        store(xmax[i], candidates[i]->xmax);
    }
    for (uint32_t left = lane_bits(rows); left != 0; left &= left - 1) {
        walk.credit--;
        const size_t lane = static_cast<size_t>(__builtin_ctz(left));
        const float ends[2][2] = {{xmin[0][lane], xmin[1][lane]}, {xmax[0][lane], xmax[1][lane]}};
        float losses[lanes];
        store(losses, measure_row(walk.columns, lane, d, grid, load_first(ends[0], 2), load_first(ends[1], 2)));
        for (size_t i = 0; i < 2; i++) loss[i][lane] = losses[i];
    }
    a.loss = load(loss[0]);
    b.loss = load(loss[1]);
}

// For rows whose slack leaves open which loss is the lesser: where that is a's, as the walk computes it.
[[gnu::noinline]] Mask16 is_less_exactly(QuickWalk& walk, size_t d, Grid grid, Mask16 rows, Candidate a, Candidate b) {
    measure_exactly(walk, d, grid, rows, a, b);
    return both(rows, less(a.loss, b.loss));
}

// In which of the rows a has the lesser loss.
inline Mask16 is_less(QuickWalk& walk, size_t d, Grid grid, Mask16 rows, const Candidate& a, const Candidate& b) {
    const Mask16 surely = surely_less(walk, a, b);
    const Mask16 open = except(rows, either(surely, surely_less(walk, b, a)));
    if (lane_bits(open) == 0) [[likely]] return both(rows, surely);
    return either(is_less_exactly(walk, d, grid, open, a, b), both(rows, except(surely, open)));
}

// Far from the limit that r sets, the best range so far is either the local minimum or the current one: a range that is
// better than the one after it is better than both its neighbours. Only how many moves ago that was, and only near the
// limit, decides anything. A move shortens a range by at most two steps.
inline void track_best_near_limit(QuickWalk& walk, size_t d, Grid grid, bool first) {
    const Candidate& current = walk.current;
    const F32x16 near = fma(splat(4.0f * greedy_patience), walk.step, walk.smallest);
    const Mask16 far = less(add(current.xmin, near), current.xmax);
    if (walk.tracks_best || lane_bits(except(walk.active, far)) == 0) return;
    walk.tracks_best = true;
    if (first) return;   // The whole range is the best, and now is when that was.
    const Mask16 better = is_less(walk, d, grid, walk.active, current, walk.local_minimum);
    walk.best = select_candidate(better, current, walk.local_minimum);
    walk.moves_since_best = splat(greedy_patience);
}

// The walk's move.
inline void move(QuickWalk& walk, size_t d, Grid grid, F32x16 top, const Bound& bound, bool first) {
    const Candidate current = walk.current;
    F32x16 left_sum, right_sum;
    sum_fractions(walk.clipped, d, walk.left, walk.right, top, left_sum, right_sum);
    const F32x16 left_loss = squared_loss(walk, walk.left, left_sum, top);
    const F32x16 right_loss = squared_loss(walk, walk.right, right_sum, top);
    const Candidate left = {add(current.xmin, walk.step), current.xmax, left_loss};
    const Candidate right = {current.xmin, sub(current.xmax, walk.step), right_loss};
    const F32x16 higher = max(left_loss, right_loss);
    if (lane_bits(except(walk.active, less(higher, walk.limit))) != 0) set_slack(walk, higher, top, bound);

    const Candidate moved = select_candidate(is_less(walk, d, grid, walk.active, left, right), left, right);
    // At first the current range is the local minimum, which it does not undercut.
    if (!first) {
        Mask16 lowest = except(walk.within_r, either(surely_less(walk, moved, current),
                                                     surely_less(walk, walk.local_minimum, current)));
        const Candidate* others[] = {&left, &right, &walk.local_minimum};
        for (const Candidate* other : others) {
            if (lane_bits(lowest) == 0) break;
            lowest = is_less(walk, d, grid, lowest, current, *other);
        }
        walk.local_minimum = select_candidate(lowest, current, walk.local_minimum);
    }
    if (walk.tracks_best) {
        const Mask16 better = is_less(walk, d, grid, walk.active, moved, walk.best);
        walk.best = select_candidate(better, moved, walk.best);
        walk.moves_since_best = select(better, splat(0.0f), add(walk.moves_since_best, splat(1.0f)));
    }
    walk.current = select_candidate(walk.active, moved, current);
    if (walk.credit < most_credit) walk.credit++;
}

// The plain walk from here on.
inline Walk resume_plainly(const QuickWalk& quick, size_t d, Grid grid, bool first) {
    Walk walk{};
    walk.columns = quick.columns;
    walk.clipped = quick.clipped;
    walk.step = quick.step;
    walk.smallest = quick.smallest;
    walk.moves_since_best = quick.moves_since_best;
    walk.current = quick.current;
    walk.local_minimum = quick.local_minimum;
    walk.best = quick.best;
    measure_anywhere(walk.columns, d, grid, walk.current, walk.local_minimum);
    if (quick.tracks_best || first) {
        Candidate again = walk.best;
        measure_anywhere(walk.columns, d, grid, walk.best, again);
    } else {   // Far from the limit, as in track_best_near_limit.
        const Mask16 better = less(walk.current.loss, walk.local_minimum.loss);
        walk.best = select_candidate(better, walk.current, walk.local_minimum);
        walk.moves_since_best = splat(greedy_patience);
    }
    clip_columns(walk, d);
    return walk;
}

inline Candidate choose(QuickWalk& walk, size_t d, Grid grid, bool local_minima_only) {
    const Candidate &best = walk.best, &other = walk.local_minimum;
    if (local_minima_only) return other;
    const F32x16 surely = splat(lower_for_sure(d));
    const Candidate limit = {other.xmin, other.xmax, mul(other.loss, mul(surely, surely))};
    const Mask16 differ = except(first_lanes(lanes), both(equal(best.xmin, other.xmin), equal(best.xmax, other.xmax)));
    const Mask16 lower = surely_less(walk, best, limit);
    const Mask16 open = except(differ, either(lower, surely_less(walk, limit, best)));
    Candidate exact_best = best, exact_other = other;
    measure_exactly(walk, d, grid, open, exact_best, exact_other);
    const Mask16 measured_lower = both(open, less(exact_best.loss, mul(exact_other.loss, surely)));
    return select_candidate(either(measured_lower, except(lower, open)), best, other);
}
