// Lloyd's iteration on sorted numbers, plain C++: the same wherever it is included.

// Lloyd's iteration ends by itself; the limit only bounds what it can cost.
inline constexpr int most_lloyd_iterations = 300;

// Sorted values, every `stride`-th of an array, and the sums in double of the first j of them, counted from a middle.
struct SortedValues {
    const float* values;
    const double* sums;
    size_t count, stride;
    double middle;

    double value(size_t j) const { return static_cast<double>(values[stride * j]) - middle; }
    double mean(size_t first, size_t end) const {
        return (sums[stride * end] - sums[stride * first]) / static_cast<double>(end - first);
    }
};

// From the grid of ASYM to `levels` centres, counted from the middle. A value half way between two centres belongs to
// the lower one, as when it is encoded; a cluster without values keeps its centre.
inline void iterate_lloyd(const SortedValues& sorted, size_t levels, double* centres) {
    const double low = sorted.value(0);
    const double step = (sorted.value(sorted.count - 1) - low) / static_cast<double>(levels - 1);
    for (size_t k = 0; k < levels; k++) centres[k] = low + static_cast<double>(k) * step;
    for (int iteration = 0; iteration < most_lloyd_iterations; iteration++) {
        bool moved = false;
        size_t first = 0;
        double centre = centres[0];   // of this iteration; centres[k] may be of the next one already
        for (size_t k = 0; k < levels; k++) {
            size_t end = sorted.count;
            const double next = k + 1 < levels ? centres[k + 1] : 0.0;
            if (k + 1 < levels) {
                const double boundary = (centre + next) * 0.5;
                for (end = first; end < sorted.count && sorted.value(end) <= boundary;) end++;
            }
            if (end > first) {
                const double mean = sorted.mean(first, end);
                moved |= mean != centre;
                centres[k] = mean;
            }
            first = end;
            centre = next;
        }
        if (!moved) return;
    }
}
