// GSS: golden-section search for the threshold of a symmetric range (Guan et al. 2019, section 3). One row in each
// lane; squares are summed in double, so that they neither overflow nor vanish.

inline constexpr int gss_steps = 20;             // leaves 0.618^20, a fifteen-thousandth of (0, max |X|]
inline constexpr float golden_ratio = 0.618034f;

// The interval that is left in each lane, its two inner points with their losses, and the best threshold measured.
struct Section {
    float low[lanes], high[lanes], left[lanes], right[lanes], best[lanes];
    double left_loss[lanes], right_loss[lanes], best_loss[lanes];
};

// Sums the squared errors of each row under [-threshold, threshold].
inline void measure_thresholds(const float* columns, size_t d, const float* thresholds, Grid grid, double* losses) {
    const F32x16 top = top_code(grid), xmax = load(thresholds);
    const GridParams p = make_grid(sub(splat(0.0f), xmax), xmax, grid);
    F64x16 sum = zero_f64();
    for (size_t j = 0; j < d; j++) {
        const F32x16 x = load(columns + lanes * j);
        const F32x16 codes = round_code(unrounded_codes(x, p), top);
        sum = add_square(sum, sub(x, fma(codes, p.scale, p.bias)));
    }
    store_f64(losses, sum);
}

inline float left_point(float low, float high) { return high - golden_ratio * (high - low); }
inline float right_point(float low, float high) { return low + golden_ratio * (high - low); }

inline void remember_best(Section& s, const float* thresholds, const double* losses) {
    for (size_t i = 0; i < lanes; i++) {
        if (!(losses[i] < s.best_loss[i])) continue;
        s.best[i] = thresholds[i];
        s.best_loss[i] = losses[i];
    }
}

inline void start_section(Section& s, const float* largest, const float* columns, size_t d, Grid grid) {
    for (size_t i = 0; i < lanes; i++) {
        s.low[i] = 0.0f;
        s.high[i] = s.best[i] = largest[i];
        s.left[i] = left_point(s.low[i], s.high[i]);
        s.right[i] = right_point(s.low[i], s.high[i]);
    }
    measure_thresholds(columns, d, s.best, grid, s.best_loss);
    measure_thresholds(columns, d, s.left, grid, s.left_loss);
    measure_thresholds(columns, d, s.right, grid, s.right_loss);
    remember_best(s, s.left, s.left_loss);
    remember_best(s, s.right, s.right_loss);
}

// Drops the part of the interval beyond the worse inner point, and measures the point that is new.
inline void narrow_section(Section& s, const float* columns, size_t d, Grid grid) {
    float fresh[lanes];
    double losses[lanes];
    bool leftwards[lanes];
    for (size_t i = 0; i < lanes; i++) {
        leftwards[i] = s.left_loss[i] < s.right_loss[i];
        if (leftwards[i]) {
            s.high[i] = s.right[i];
            s.right[i] = s.left[i];
            s.right_loss[i] = s.left_loss[i];
            fresh[i] = s.left[i] = left_point(s.low[i], s.high[i]);
        } else {
            s.low[i] = s.left[i];
            s.left[i] = s.right[i];
            s.left_loss[i] = s.right_loss[i];
            fresh[i] = s.right[i] = right_point(s.low[i], s.high[i]);
        }
    }
    measure_thresholds(columns, d, fresh, grid, losses);
    for (size_t i = 0; i < lanes; i++) (leftwards[i] ? s.left_loss : s.right_loss)[i] = losses[i];
    remember_best(s, fresh, losses);
}

void search_gss(const RowBlock& block, Grid grid, const SearchParams&, Ranges& ranges, float* scratch) noexcept {
    for (size_t first = 0; first < block.num_rows; first += lanes) {
        const size_t rows = block.num_rows - first < lanes ? block.num_rows - first : lanes;
        transpose_rows(block, first, scratch);
        float largest[lanes] = {};
        for (size_t i = 0; i < rows; i++) {
            const float low = __builtin_fabsf(ranges.xmin[first + i]), high = __builtin_fabsf(ranges.xmax[first + i]);
            largest[i] = low < high ? high : low;
        }
        Section section;
        start_section(section, largest, scratch, block.embedding_dim, grid);
        for (int step = 0; step < gss_steps; step++) narrow_section(section, scratch, block.embedding_dim, grid);
        for (size_t i = 0; i < rows; i++) {
            ranges.xmin[first + i] = -section.best[i];
            ranges.xmax[first + i] = section.best[i];
        }
    }
}
