// HIST-BRUTE: the best of all selections of consecutive bins (Guan et al. 2019, section 3), found without looking at
// most of them.
//
// What lies outside a selection costs the same however the inside is spent: on the left it depends on the start alone,
// on the right on the end alone. A selection whose outside costs as much as the best one so far is not looked into. For
// a given number of bins k the starts that are left follow each other, because the cost of the outside is convex.
//
// All sums are of whole numbers (histogram-inl.h). The smallest is that of the full range or less, below 2^53 for any
// row shorter than 5 million values, hence exact; a sum that is rounded is above 2^53 and no minimum. So neither the
// order of summation nor what is skipped changes the result.

// Rows that share a table of losses within a selection.
inline constexpr size_t hist_rows = 8;

struct BruteSearch {
    double counts[max_bins];
    double left[max_bins + 1];    // loss of the values before bin s
    double right[max_bins + 1];   // loss of the values from bin e on
    double best;
    int start, k;
    int last_start, first_end;    // beyond these one side of the outside alone costs too much
};

// Sums 3 m^2 - 3 m + 1 = m^3 - (m - 1)^3 over the values passed so far, m their distance in bins, rounded up.
struct OutsideLoss {
    double unit, values = 0.0, distances = 0.0, squares = 0.0;

    double loss() const { return unit * (3.0 * squares - 3.0 * distances + values); }
    void pass(double count) {
        squares += 2.0 * distances + values + count;
        distances += values + count;
        values += count;
    }
};

inline void start_brute(BruteSearch& search, int b, int64_t top) {
    const double unit = static_cast<double>(8 * top * top * top);
    OutsideLoss before{unit}, after{unit};
    for (int s = 0; s <= b; s++) {
        search.left[s] = before.loss();
        search.right[b - s] = after.loss();
        if (s == b) break;
        before.pass(search.counts[s]);
        after.pass(search.counts[b - 1 - s]);
    }
    search.best = __builtin_inf();
    search.last_start = b;
    search.first_end = 0;
}

// Finds the starts of the selections of k bins that may be better than the best so far; false if there are none.
inline bool find_starts(BruteSearch& search, int b, int k, int& low, int& high) {
    while (search.last_start > 0 && search.left[search.last_start] >= search.best) search.last_start--;
    while (search.first_end < b && search.right[search.first_end] >= search.best) search.first_end++;
    low = search.first_end > k ? search.first_end - k : 0;
    high = search.last_start < b - k ? search.last_start : b - k;
    while (low <= high && search.left[low] + search.right[low + k] >= search.best) low++;
    while (low <= high && search.left[high] + search.right[high + k] >= search.best) high--;
    return low <= high;
}

// losses[i] is the loss of bin i of a selection of k bins; the same from either end.
inline void try_starts(BruteSearch& search, int k, int low, int high, const double* losses) {
    double sums[max_bins];
    for (int s = low; s <= high; s++) sums[s] = search.left[s] + search.right[s + k];
    for (int bin = low; bin < high + k; bin++) {
        const double count = search.counts[bin];
        if (count == 0.0) continue;
        const int from = bin - k + 1 > low ? bin - k + 1 : low, to = bin < high ? bin : high;
        // Mirrored: the loss of bin - s is that of k - 1 - (bin - s).
        for (int s = from; s <= to; s++) sums[s] += count * losses[k - 1 - bin + s];
    }
    for (int s = low; s <= high; s++) {
        if (!(sums[s] < search.best)) continue;
        search.best = sums[s];
        search.start = s;
        search.k = k;
    }
}

// From the widest selection to the narrowest; of equal ones the first is taken.
inline void try_all(BruteSearch* searches, size_t count, int b, int64_t top) {
    double losses[max_bins];
    for (int k = b; k > 0; k--) {
        bool know_losses = false;
        for (size_t i = 0; i < count; i++) {
            int low, high;
            if (!find_starts(searches[i], b, k, low, high)) continue;
            if (!know_losses)
                for (int bin = 0; 2 * bin < k; bin++) losses[bin] = losses[k - 1 - bin] = bin_loss(bin, k, top);
            know_losses = true;
            try_starts(searches[i], k, low, high, losses);
        }
    }
}

void search_hist_brute(const RowBlock& block, Grid grid, const SearchParams& params, Ranges& ranges,
                       float* scratch) noexcept {
    static_assert(hist_rows * sizeof(BruteSearch) <= hist_brute_floats * sizeof(float));
    BruteSearch* const searches = reinterpret_cast<BruteSearch*>(scratch);
    const size_t d = block.embedding_dim;
    const int64_t top = (1 << grid.bits) - 1;
    for (size_t first = 0; first < block.num_rows; first += hist_rows) {
        const size_t rest = block.num_rows - first, count = rest < hist_rows ? rest : hist_rows;
        for (size_t i = 0; i < count; i++) {
            const float xmin = ranges.xmin[first + i], xmax = ranges.xmax[first + i];
            count_bins(block.rows + (first + i) * d, xmin < xmax ? d : 0, xmin, xmax, params.b, searches[i].counts);
            start_brute(searches[i], params.b, top);
        }
        try_all(searches, count, params.b, top);
        for (size_t i = 0; i < count; i++) {
            float &xmin = ranges.xmin[first + i], &xmax = ranges.xmax[first + i];
            if (xmin < xmax) select_bins(searches[i].start, searches[i].k, params.b, xmin, xmax);
        }
    }
}
