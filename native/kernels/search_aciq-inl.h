// ACIQ: a closed form for the clipping threshold (Banner, Nahshan, Hoffer and Soudry 2018; Guan et al. 2019, section 3).
// Plain double in a fixed order, the same on every instruction set: it costs little beside packing the row.

// alpha / sigma for a Gaussian and alpha / E|X - E X| for a Laplacian; src/embpack/methods/aciq.py says of what these
// are the minima.
struct ClippingFactors {
    double gaussian, laplacian;
};

inline ClippingFactors clipping_factors(Grid grid) {
    if (grid.bits == 2) return {1.710635, 2.830683};
    if (grid.bits == 4) return {2.559136, 5.028640};
    return {3.924035, 9.896760};
}

// E|X - E X| / sigma above which a row is likelier under its Gaussian than under its Laplacian: sqrt(pi / (2 e)).
inline constexpr double likelier_gaussian = 0.7601734505331404;

inline double clipping_threshold(const float* x, size_t d, double mean, ClippingFactors factors) {
    double magnitudes = 0.0, squares = 0.0;
    for (size_t j = 0; j < d; j++) {
        const double deviation = x[j] - mean;
        magnitudes += __builtin_fabs(deviation);
        squares += deviation * deviation;
    }
    const double spread = magnitudes / static_cast<double>(d);
    const double sigma = __builtin_sqrt(squares / static_cast<double>(d));
    return spread > likelier_gaussian * sigma ? factors.gaussian * sigma : factors.laplacian * spread;
}

void search_aciq(const RowBlock& block, Grid grid, const SearchParams&, Ranges& ranges, float*) noexcept {
    const size_t d = block.embedding_dim;
    const ClippingFactors factors = clipping_factors(grid);
    for (size_t row = 0; row < block.num_rows; row++) {
        const float* x = block.rows + row * d;
        double sum = 0.0;
        for (size_t j = 0; j < d; j++) sum += x[j];
        const double mean = sum / static_cast<double>(d);
        const double alpha = clipping_threshold(x, d, mean, factors);
        if (mean - alpha > ranges.xmin[row]) ranges.xmin[row] = static_cast<float>(mean - alpha);
        if (mean + alpha < ranges.xmax[row]) ranges.xmax[row] = static_cast<float>(mean + alpha);
    }
}
