// The walk along the lines on which codes change (src/embpack/methods/optimal.py, find_exact): sum by sum what the
// reference does.
#include "exact.h"

#include <algorithm>

namespace embpack {

void ExactSearch::read_row(const float* x, const float* weights, size_t d) {
    order_.clear();
    for (size_t j = 0; j < d; j++)
        if (!weights || weights[j] > 0) order_.push_back(static_cast<uint32_t>(j));
    std::stable_sort(order_.begin(), order_.end(), [x](uint32_t a, uint32_t b) { return x[a] < x[b]; });
    values_.clear();
    weights_.clear();
    total_weight_ = 0;
    double total = 0;
    for (const uint32_t j : order_) {
        values_.push_back(x[j]);
        weights_.push_back(weights ? weights[j] : 1.0);
        total_weight_ += weights_.back();
        total += weights_.back() * values_.back();
    }
    mean_ = total / total_weight_;
    for (double& value : values_) value -= mean_;
}

// Those of all lines of value i, as the scale falls.
void ExactSearch::list_changes(size_t i) {
    changes_.clear();
    for (size_t j = 0; j < values_.size(); j++) {
        const double difference = values_[j] - values_[i];
        if (difference == 0) continue;
        for (int32_t count = 1; count < top_; count++) {
            const int32_t q = difference > 0 ? count : -count;
            changes_.push_back({difference / q, static_cast<uint32_t>(j), q});
        }
    }
    std::sort(changes_.begin(), changes_.end(), [](const Change& a, const Change& b) {
        if (a.scale != b.scale) return a.scale > b.scale;
        if (a.j != b.j) return a.j < b.j;
        return (a.q < 0 ? -a.q : a.q) < (b.q < 0 ? -b.q : b.q);
    });
}

// Along the line of threshold k.
void ExactSearch::walk(int k, const Sums& start, float& xmin, float& xmax) {
    Sums moved = {0, 0, 0}, best = {0, 0, 0};
    double best_gain = best_gain_, best_spread = 0;
    const auto look = [&] {
        const Sums sums = {start.c + moved.c, start.cc + moved.cc, start.cx + moved.cx};
        const double square = total_weight_ * sums.cc, spread = square - sums.c * sums.c;
        if (!(spread > 1e-10 * square)) return;
        const double gain = total_weight_ * sums.cx * sums.cx / spread;
        if (!(gain > best_gain)) return;
        best_gain = gain;
        best_spread = spread;
        best = sums;
    };
    look();
    for (const Change& change : changes_) {
        if (change.q < -k || change.q >= top_ - k) continue;
        const double sign = change.q < 0 ? -1 : 1, weight = weights_[change.j];
        moved.c += sign * weight;
        moved.cc += sign * (2 * change.q + 1) * weight;
        moved.cx += sign * (weight * values_[change.j]);
        look();
    }
    if (best_spread == 0) return;
    best_gain_ = best_gain;
    const double scale = total_weight_ * best.cx / best_spread;
    const double bias = mean_ - scale * (k + best.c / total_weight_);
    xmin = static_cast<float>(bias);
    xmax = static_cast<float>(bias + top_ * scale);
}

void ExactSearch::find(const float* x, const float* weights, size_t d, float& xmin, float& xmax, Turn& turn) {
    read_row(x, weights, d);
    best_gain_ = 0;
    for (size_t i = 0; i < values_.size(); i++) {
        if (i > 0 && values_[i] == values_[i - 1]) continue;
        turn.check();
        list_changes(i);
        Sums above = {0, 0, 0}, own = {0, 0, 0};
        for (size_t j = 0; j < values_.size(); j++) {
            if (values_[j] < values_[i]) continue;
            Sums& sums = values_[j] > values_[i] ? above : own;
            sums.c += weights_[j];
            sums.cx += weights_[j] * values_[j];
        }
        above.cc = above.c;
        own.cc = own.c;
        for (int k = 0; k < top_; k++) {
            walk(k, above, xmin, xmax);
            walk(k, {above.c + own.c, above.cc + own.cc, above.cx + own.cx}, xmin, xmax);
        }
    }
}

}  // namespace embpack
