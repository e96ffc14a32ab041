// Histograms of rows, and what it costs to spend all levels on some consecutive bins: shared by HIST-APPRX and
// HIST-BRUTE.
//
// Lengths are counted in units of w / (2 top), with w the width of a bin and top = 2^bits - 1: then the edges of the
// bins, the levels and the points half way between them are whole numbers for every selection, and so are three times
// the integrals of squared distances. Sums of them in double are exact below 2^53.

inline void count_bins(const float* x, size_t d, float xmin, float xmax, int b, double* counts) {
    for (int bin = 0; bin < b; bin++) counts[bin] = 0.0;
    const double low = xmin, bins_by_length = b / (xmax - low);
    for (size_t j = 0; j < d; j++) {
        const int bin = static_cast<int>((x[j] - low) * bins_by_length);
        counts[bin < b ? bin : b - 1] += 1.0;
    }
}

// The level that is nearest to a position, both counted from the start of a selection of k bins.
inline int64_t nearest_level(int64_t position, int64_t k, int64_t top) {
    const int64_t level = position < -k ? 0 : (position + k) / (2 * k);
    return level < top ? level : top;
}

// Three times the integral of squared distances to the nearest level, over the bin `offset` bins after the start of a
// selection of k bins: up to the middle between two levels, whole levels, and from the last middle on.
inline double bin_loss(int64_t offset, int64_t k, int64_t top) {
    const int64_t begin = 2 * top * offset, end = begin + 2 * top;
    const int64_t first = nearest_level(begin, k, top), last = nearest_level(end, k, top);
    const int64_t from = begin - 2 * k * first, to = end - 2 * k * last;
    return static_cast<double>(to * to * to - from * from * from + 2 * k * k * k * (last - first));
}

// The range of bins [start, start + k); what ends where the row ends is exactly the row's.
inline void select_bins(int start, int k, int b, float& xmin, float& xmax) {
    const double low = xmin, width = (xmax - low) / b;
    if (start > 0) xmin = static_cast<float>(low + width * start);
    if (start + k < b) xmax = static_cast<float>(low + width * (start + k));
}
