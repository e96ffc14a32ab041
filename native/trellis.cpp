#include "trellis.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace embpack {

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// Floats as integers in the same order, and back.
int64_t rank_of(float x) {
    const int32_t bits = std::bit_cast<int32_t>(x);
    return bits >= 0 ? bits : int64_t{std::numeric_limits<int32_t>::min()} - bits;
}
float float_of(int64_t rank) {
    const int64_t bits = rank >= 0 ? rank : std::numeric_limits<int32_t>::min() - rank;
    return std::bit_cast<float>(static_cast<int32_t>(bits));
}

bool is_as_near(float y, float low, float high) {
    const float to_low = y - low, to_high = y - high;
    return to_low * to_low <= to_high * to_high;
}

// The largest value that float32 finds as near to the lower of two levels as to the higher one. Between them the
// squared errors grow and fall with the value, so there is one.
float find_boundary(float low, float high) {
    int64_t near = rank_of(low), far = rank_of(high);
    while (far - near > 1) {
        const int64_t middle = near + (far - near) / 2;
        (is_as_near(float_of(middle), low, high) ? near : far) = middle;
    }
    return float_of(near);
}

// Up to which magnitude the boundaries tell the nearest level. A value beyond two levels of a subset that are `gap`
// apart, the nearer one `distance` away, has different squared errors from them as long as distance <= 2^22 gap: the
// squares differ by a factor of 1 + 2^-21 at least, and are rounded three times, by a factor of 1 + 2^-24 each. The
// other bounds keep squares from vanishing and from overflowing.
float find_limit(const float* levels, size_t count) {
    double gap = std::numeric_limits<double>::infinity(), largest = 0.0;
    for (size_t i = 0; i < count; i++) {
        if (!std::isfinite(levels[i])) return -1.0f;
        largest = std::max(largest, std::abs(static_cast<double>(levels[i])));
        if (i >= trellis_subsets) gap = std::min(gap, static_cast<double>(levels[i]) - levels[i - trellis_subsets]);
        if (i > 0 && levels[i] < levels[i - 1]) return -1.0f;
    }
    if (!(gap >= 0x1p-60) || largest > 0x1p60) return -1.0f;
    return static_cast<float>(std::min(0x1p60, 0.999 * (0x1p22 * gap - largest)));
}

// Deals the levels out to the subsets in turn, and finds the boundaries between those of each.
void deal_out(const float* levels, int index_bits, TrellisLevels& out) {
    const size_t count = size_t{1} << index_bits;
    out.index_bits = index_bits;
    out.limit = find_limit(levels, trellis_subsets * count);
    for (size_t s = 0; s < trellis_subsets; s++) {
        std::fill_n(out.of_subset[s], most_subset_levels, 0.0f);
        std::fill_n(out.before[s], most_subset_levels, infinity);
        out.before[s][0] = -infinity;
        for (size_t k = 0; k < count; k++) out.of_subset[s][k] = levels[trellis_subsets * k + s];
        if (out.limit < 0.0f) continue;
        for (size_t k = 1; k < count; k++)
            out.before[s][k] = find_boundary(out.of_subset[s][k - 1], out.of_subset[s][k]);
    }
}

// Sorts the scales that are not 0, each once. The upper five bits of a scale's number are the state that a path begins
// in: notes for each scale which states it has, and the lowest number of each.
void collect_scales(const float* scales, TrellisTable& out) {
    const auto is_one = [](float scale) { return scale > 0.0f; };
    float* const end = std::copy_if(scales, scales + trellis_scales, out.scales, is_one);
    std::sort(out.scales, end);
    out.num_scales = static_cast<size_t>(std::unique(out.scales, end) - out.scales);
    std::fill_n(out.starts, trellis_scales, 0u);
    for (size_t number = trellis_scales; number-- > 1;) {
        if (!is_one(scales[number])) continue;
        const float* at = std::lower_bound(out.scales, out.scales + out.num_scales, scales[number]);
        const size_t place = static_cast<size_t>(at - out.scales), state = number * trellis_states / trellis_scales;
        out.starts[place] |= uint32_t{1} << state;
        out.numbers[place][state] = static_cast<uint8_t>(number);   // From the highest on: the lowest one stays.
    }
}

}  // namespace

TrellisSteps::TrellisSteps(size_t embedding_dim, size_t row_bytes)
    : row_bytes(row_bytes), shape(embedding_dim, row_bytes) {
    for (size_t start = 0; start < embedding_dim; start += trellis_block) {
        const TrellisBlock block(shape, start / trellis_block);
        for (size_t position = 0; position < trellis_block; position++) {
            if (!(block.present >> position & 1)) continue;
            columns.push_back(static_cast<uint16_t>(start + TrellisBlock::column_at(position)));
            is_wide.push_back(static_cast<uint8_t>(block.is_wide >> position & 1));
        }
    }
}

TrellisTable make_trellis_table(const TrellisSteps& steps, const float* narrow, const float* wide,
                                const float* scales, const float* mean) {
    TrellisTable table;
    const int narrow_bits = static_cast<int>(steps.shape.narrow_bits);
    deal_out(narrow, narrow_bits - 1, table.narrow);
    if (steps.shape.num_wide > 0) deal_out(wide, narrow_bits, table.wide);
    table.columns = steps.columns.data();
    table.is_wide = steps.is_wide.data();
    table.mean = mean;
    table.row_bytes = steps.row_bytes;
    collect_scales(scales, table);
    return table;
}

}  // namespace embpack
