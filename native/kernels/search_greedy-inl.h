// GREEDY (Guan et al. 2019, Algorithm 1), one row in each lane.
//
// Sixteen rows go in step, so every lane adds up its row's squared errors one after the other, which is the
// order of PyTorch's choose_qparams_optimized: with the same rounding at each operation the path through the
// ranges is PyTorch's, bit for bit, and so is what GREEDY-PAPER returns.
// Per value and range that is sub, mul, two clips, round, fma, sub, mul, add. Where the fma replaces
// PyTorch's mul and add nothing changes: with a float16 scale, scale * code is exact.

// After r has stopped the paper's search, the rows still falling go on; a row has fallen if its best range is
// among its last `patience` ones.
inline constexpr float greedy_patience = 4.0f;

// values of block row i, column j at columns[16 * j + i]; rows that the block lacks are zeros.
inline void transpose_block(const RowBlock& block, float* columns) {
    const size_t d = block.embedding_dim;
    size_t j = 0;
    if (block.num_rows == block_rows)
        for (; j + 16 <= d; j += 16) transpose_16x16(block.rows + j, d, columns + 16 * j);
    for (; j < d; j++)
        for (size_t i = 0; i < 16; i++) columns[16 * j + i] = i < block.num_rows ? block.rows[i * d + j] : 0.0f;
}

inline F32x16 squared_error(F32x16 x, GridParams p, F32x16 top) {
    const F32x16 codes = round_code(mul(sub(x, p.bias), p.inverse), top);
    const F32x16 error = sub(x, fma(codes, p.scale, p.bias));
    return mul(error, error);
}

struct Candidate {
    F32x16 xmin, xmax, loss;
};

inline Candidate select_candidate(Mask16 m, const Candidate& yes, const Candidate& no) {
    return {select(m, yes.xmin, no.xmin), select(m, yes.xmax, no.xmax), select(m, yes.loss, no.loss)};
}

// Fills in the losses of two candidates: ||X - Q(X, xmin, xmax)||_2 of each row. Two at a time share the loads
// and hide each other's chain of additions.
inline void measure(const float* columns, size_t d, Grid grid, Candidate& first, Candidate& second) {
    const F32x16 top = top_code(grid);
    const GridParams p = make_grid(first.xmin, first.xmax, grid);
    const GridParams q = make_grid(second.xmin, second.xmax, grid);
    F32x16 first_sum = splat(0.0f), second_sum = splat(0.0f);
    for (size_t j = 0; j < d; j++) {
        const F32x16 x = load(columns + 16 * j);
        first_sum = add(first_sum, squared_error(x, p, top));
        second_sum = add(second_sum, squared_error(x, q, top));
    }
    first.loss = sqrt(first_sum);
    second.loss = sqrt(second_sum);
}

void search_greedy(const RowBlock& block, Grid grid, const SearchParams& params, Ranges& ranges,
                   float* scratch) noexcept {
    const size_t d = block.embedding_dim;
    transpose_block(block, scratch);
    Candidate current = {load(ranges.xmin), load(ranges.xmax), splat(0.0f)};
    const F32x16 step = div(sub(current.xmax, current.xmin), splat(static_cast<float>(params.b)));
    const int smallest_steps = static_cast<int>(params.b * (1.0 - static_cast<double>(static_cast<float>(params.r))));
    const F32x16 smallest = mul(splat(static_cast<float>(smallest_steps)), step);
    Candidate left = current;
    measure(scratch, d, grid, current, left);
    Candidate local_minimum = current, best = current;
    F32x16 moves_since_best = splat(0.0f);

    // A range of a few float32 spacings has steps too small to move its ends; b moves are all there can be.
    for (int moves = 0; moves < params.b; moves++) {
        const Mask16 within_r = less(add(current.xmin, smallest), current.xmax);
        Mask16 active = within_r;
        if (!params.local_minima_only) {
            const Mask16 falling = both(less(moves_since_best, splat(greedy_patience)),
                                        less(add(current.xmin, step), current.xmax));
            active = either(active, falling);
        }
        if (lane_bits(active) == 0) break;
        left = {add(current.xmin, step), current.xmax, current.loss};
        Candidate right = {current.xmin, sub(current.xmax, step), current.loss};
        measure(scratch, d, grid, left, right);
        const Mask16 lowest = both(both(less(current.loss, left.loss), less(current.loss, right.loss)),
                                   both(less(current.loss, local_minimum.loss), within_r));
        local_minimum = select_candidate(lowest, current, local_minimum);
        const Candidate moved = select_candidate(less(left.loss, right.loss), left, right);
        current = select_candidate(active, moved, current);
        const Mask16 better = both(active, less(current.loss, best.loss));
        best = select_candidate(better, current, best);
        moves_since_best = select(better, splat(0.0f), add(moves_since_best, splat(1.0f)));
    }
    if (!params.local_minima_only) {
        // The sums carry up to (d + 8) / 2 roundings each. Leaving PyTorch's choice only for a loss lower by
        // more than that is what makes ours never the worse one.
        const F32x16 surely = splat(1.0f - static_cast<float>(d + 8) * 0x1p-24f);
        local_minimum = select_candidate(less(best.loss, mul(local_minimum.loss, surely)), best, local_minimum);
    }
    store(ranges.xmin, local_minimum.xmin);
    store(ranges.xmax, local_minimum.xmax);
}
