// GREEDY: the quick walk as long as it can be taken, then the plain one. The vectors of a block take turns at each
// move: one alone would wait for its divisions and square roots.

inline constexpr size_t vectors = block_rows / lanes;

inline Candidate whole_range(const Ranges& ranges, size_t v) {
    return {load(ranges.xmin + lanes * v), load(ranges.xmax + lanes * v), splat(0.0f)};
}

inline void store_ranges(const Candidate& candidate, Ranges& ranges, size_t v) {
    store(ranges.xmin + lanes * v, candidate.xmin);
    store(ranges.xmax + lanes * v, candidate.xmax);
}

template <class AnyWalk>
inline bool any_active(AnyWalk (&walks)[vectors], bool local_minima_only) {
    bool any = false;
    for (AnyWalk& walk : walks) any |= find_active(walk, local_minima_only);
    return any;
}

// With 256 levels, or many values, the bound is wider than most differences between losses.
inline bool may_walk_quickly(size_t d, Grid grid) { return has_fast_fma && grid.bits != 8 && d <= widest_quick; }

// Counts the moves. False if the plain walk has to go on from there.
inline bool walk_quickly(QuickWalk (&walks)[vectors], float* scratch, size_t d, Grid grid, const SearchParams& params,
                         const Ranges& ranges, int& moves) {
    const F32x16 top = top_code(grid);
    const Bound bound(static_cast<float>(d), static_cast<float>((1 << grid.bits) - 1));
    bool can = true;
    for (size_t v = 0; v < vectors; v++) {
        float* columns = scratch + 2 * lanes * d * v;
        can &= start(walks[v], columns, columns + lanes * d, d, whole_range(ranges, v), grid, params, bound);
    }
    for (; can && moves < params.b && any_active(walks, params.local_minima_only); moves++) {
        for (QuickWalk& walk : walks) can &= walk.credit >= 0 && prepare_move(walk, d, grid, top, bound);
        if (!can) break;
        for (QuickWalk& walk : walks) {
            if (!params.local_minima_only) track_best_near_limit(walk, d, grid, moves == 0);
            move(walk, d, grid, top, bound, moves == 0);
        }
    }
    return can;
}

void search_greedy(const RowBlock& block, Grid grid, const SearchParams& params, Ranges& ranges,
                   float* scratch) noexcept {
    const size_t d = block.embedding_dim;
    for (size_t v = 0; v < vectors; v++) transpose_rows(block, lanes * v, scratch + 2 * lanes * d * v);
    // A range of a few float32 spacings has steps too small to move its ends; b moves are all there can be.
    int moves = 0;
    Walk walks[vectors];
    if (may_walk_quickly(d, grid)) {
        QuickWalk quick[vectors];
        if (walk_quickly(quick, scratch, d, grid, params, ranges, moves)) {
            for (size_t v = 0; v < vectors; v++)
                store_ranges(choose(quick[v], d, grid, params.local_minima_only), ranges, v);
            return;
        }
        for (size_t v = 0; v < vectors; v++) walks[v] = resume_plainly(quick[v], d, grid, moves == 0);
    } else {
        for (size_t v = 0; v < vectors; v++) {
            float* columns = scratch + 2 * lanes * d * v;
            walks[v] = start_walk(columns, columns + lanes * d, d, whole_range(ranges, v), grid, params);
        }
    }
    for (; moves < params.b && any_active(walks, params.local_minima_only); moves++)
        for (Walk& walk : walks) move(walk, d, grid);
    for (size_t v = 0; v < vectors; v++) store_ranges(choose(walks[v], d, params.local_minima_only), ranges, v);
}
