// HIST-APPRX: Caffe2's norm minimization, linear in the bins (Guan et al. 2019, section 3). The quantile bounds move by
// hundred-thousandths; they are kept as whole numbers, so that the steps that move no bin can be taken at once.

inline constexpr int64_t quantile_steps = 100000;

// Sums in the order of the bins: far outside, a loss may be too large to be exact.
inline double selection_loss(const double* counts, int b, int start, int k, int64_t top) {
    double loss = 0.0;
    for (int bin = 0; bin < b; bin++)
        if (counts[bin] > 0.0) loss += counts[bin] * bin_loss(bin - start, k, top);
    return loss;
}

inline void approximate_range(const double* counts, int b, int64_t d, int64_t top, float& xmin, float& xmax) {
    int64_t below[max_bins];   // values up to and including the bin
    int64_t sum = 0;
    for (int bin = 0; bin < b; bin++) below[bin] = sum += static_cast<int64_t>(counts[bin]);
    int start = 0, end = b - 1;
    int64_t alpha = 0, beta = quantile_steps;
    double best = __builtin_inf();
    while (alpha < beta && start < end) {
        int left = start, right = end;
        while (left < end && below[left] * quantile_steps < (alpha + 1) * d) left++;
        while (right > start && below[right] * quantile_steps > (beta - 1) * d) right--;
        if (left == start && right == end) {
            // Nothing moves but beta, until it passes the quantile of the last bin.
            const int64_t passing = (below[end] * quantile_steps + d - 1) / d;
            beta = passing < beta ? passing : beta - 1;
            continue;
        }
        int next_start = start, next_end = end;
        if (left - start > end - right) {
            next_start = left;
            alpha++;
        } else {
            next_end = right;
            beta--;
        }
        const double loss = selection_loss(counts, b, next_start, next_end - next_start + 1, top);
        if (loss > best) break;
        best = loss;
        start = next_start;
        end = next_end;
    }
    select_bins(start, end - start + 1, b, xmin, xmax);
}

void search_hist_apprx(const RowBlock& block, Grid grid, const SearchParams& params, Ranges& ranges,
                       float*) noexcept {
    const size_t d = block.embedding_dim;
    const int64_t top = (1 << grid.bits) - 1;
    for (size_t row = 0; row < block.num_rows; row++) {
        float &xmin = ranges.xmin[row], &xmax = ranges.xmax[row];
        if (xmin == xmax) continue;
        double counts[max_bins];
        count_bins(block.rows + row * d, d, xmin, xmax, params.b, counts);
        approximate_range(counts, params.b, static_cast<int64_t>(d), top, xmin, xmax);
    }
}
