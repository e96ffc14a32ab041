// The best uniform grid of a row over all scales and biases, in real arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "threads.h"

namespace embpack {

class ExactSearch {
public:
    explicit ExactSearch(int bits) : top_((1 << bits) - 1) {}

    // Puts the range with the least squared error of all in place of the one that is there; leaves that where no codes
    // differ. `weights` of the errors may be null: all are 1. A wide row takes minutes, so `turn` is checked on the way.
    void find(const float* x, const float* weights, size_t d, float& xmin, float& xmax, Turn& turn);

private:
    // x_j's code changes where scale = (x_j - x_i) / q; by one from q up, or down if q is negative.
    struct Change {
        double scale;
        uint32_t j;
        int32_t q;
    };
    // Sums over the codes of a line, counted from its threshold: weighted by one, by the codes, and by the values.
    struct Sums {
        double c, cc, cx;
    };

    void read_row(const float* x, const float* weights, size_t d);
    void list_changes(size_t i);
    void walk(int k, const Sums& start, float& xmin, float& xmax);

    int top_;
    double total_weight_ = 0, mean_ = 0, best_gain_ = 0;
    // In ascending order, without those that weigh nothing; less the mean.
    std::vector<uint32_t> order_;
    std::vector<double> values_, weights_;
    std::vector<Change> changes_;
};

}  // namespace embpack
