#include "clusters.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "aligned.h"
#include "dispatch.h"
#include "threads.h"

namespace embpack {

namespace {

#include "kernels/lloyd-inl.h"

// Rows by their numbers, as float32.
class RowReader {
public:
    RowReader(const Rows& rows, const RowGroups& groups) : rows_(rows), order_(groups.order) {}

    // Some columns of the i-th row in order.
    void read(size_t i, size_t column, size_t count, float* out) const {
        const size_t row = order_ ? static_cast<size_t>(order_[i]) : i;
        const uint8_t* const from =
            static_cast<const uint8_t*>(rows_.values) + (row * rows_.embedding_dim + column) * value_bytes(rows_.type);
        if (rows_.type == ValueType::f32) {
            std::memcpy(out, from, count * sizeof(float));
        } else {
            kernels().widen_values(reinterpret_cast<const uint16_t*>(from), count, rows_.type, out);
        }
    }

private:
    const Rows& rows_;
    const int64_t* const order_;
};

size_t size_of(const RowGroups& groups, size_t group) {
    return static_cast<size_t>(groups.starts[group + 1] - groups.starts[group]);
}

int threads_for_all(const Rows& rows, const RowGroups& groups) {
    return threads_for(static_cast<size_t>(groups.starts[groups.count] - groups.starts[0]) * rows.embedding_dim);
}

constexpr size_t panel_lanes = 16;

// What a thread finds nearest centres in: those of the group that it was at last, in panels, and rows.
class NearestSearch {
public:
    NearestSearch(const float* centres, const int64_t* centre_starts, size_t embedding_dim)
        : centres_(centres), starts_(centre_starts), d_(embedding_dim), rows_(rows_at_a_time() * stride()) {}

    // Rows first .. end in order, which are of one group.
    void find(const Rows& rows, float factor, const RowGroups& groups, size_t group, size_t first, size_t end,
              uint32_t* numbers, Turn& turn) {
        if (group != group_) fill_panels(group);
        const RowReader reader(rows, groups);
        const uint32_t before = static_cast<uint32_t>(starts_[group]);
        for (size_t at = first; at < end; at += rows_at_a_time()) {
            const size_t count = std::min(rows_at_a_time(), end - at);
            for (size_t i = 0; i < count; i++) {
                float* const row = rows_.data() + i * stride();
                reader.read(at + i, 0, d_, row);
                for (size_t j = 0; j < d_; j++) row[j] *= factor;
            }
            uint32_t nearest[nearest_rows];
            kernels().find_nearest({rows_.data(), count, stride(), d_}, {panels_.data(), num_panels_}, nearest);
            for (size_t i = 0; i < count; i++)
                numbers[groups.order ? static_cast<size_t>(groups.order[at + i]) : at + i] = before + nearest[i];
            turn.check();
        }
    }

private:
    // Where rows are 4 KB apart, a column of them has few lines of the first-level cache, and drives itself out.
    size_t stride() const { return d_ + panel_lanes; }
    // They stay in the second-level cache.
    size_t rows_at_a_time() const { return std::clamp((size_t{1} << 15) / d_, size_t{12}, nearest_rows); }

    void fill_panels(size_t group) {
        const size_t first = static_cast<size_t>(starts_[group]), end = static_cast<size_t>(starts_[group + 1]);
        num_panels_ = (end - first + panel_lanes - 1) / panel_lanes;
        panels_.assign(num_panels_ * panel_lanes * (d_ + 1), 0.0f);
        for (size_t panel = 0; panel < num_panels_; panel++) {
            const float* const centre = centres_ + (first + panel * panel_lanes) * d_;
            const size_t count = std::min(panel_lanes, end - first - panel * panel_lanes);
            float* const to = panels_.data() + panel * panel_lanes * (d_ + 1);
            float squares[panel_lanes] = {};
            for (size_t j = 0; j < d_; j++) {
                float* const values = to + panel_lanes * (j + 1);
                for (size_t i = 0; i < count; i++) values[i] = centre[i * d_ + j];
                for (size_t i = 0; i < panel_lanes; i++) squares[i] += values[i] * values[i];
            }
            for (size_t i = 0; i < panel_lanes; i++)
                to[i] = i < count ? -0.5f * squares[i] : -std::numeric_limits<float>::infinity();
        }
        group_ = group;
    }

    const float* const centres_;
    const int64_t* const starts_;
    const size_t d_;
    Aligned<float> rows_;
    std::vector<float> panels_;
    size_t num_panels_ = 0, group_ = SIZE_MAX;
};

}  // namespace

void find_nearest(const Rows& rows, float factor, const RowGroups& groups, const float* centres,
                  const int64_t* centre_starts, uint32_t* numbers) {
    // Enough for putting centres into panels to be little beside it, few enough to share evenly.
    const size_t rows_at_a_time = std::max<size_t>(nearest_rows, (size_t{1} << 17) / rows.embedding_dim);
    struct Piece {
        size_t group, first, end;
    };
    std::vector<Piece> pieces;
    for (size_t group = 0; group < groups.count; group++) {
        const size_t first = static_cast<size_t>(groups.starts[group]), end = first + size_of(groups, group);
        for (size_t at = first; at < end; at += rows_at_a_time)
            pieces.push_back({group, at, std::min(end, at + rows_at_a_time)});
    }
    const int threads = threads_for_all(rows, groups);
    std::vector<NearestSearch> searches;
    for (int i = 0; i < threads; i++) searches.emplace_back(centres, centre_starts, rows.embedding_dim);
    for_each_piece(pieces.size(), 1, threads, [&](size_t i, Turn& turn) {
        const auto [group, first, end] = pieces[i];
        searches[static_cast<size_t>(turn.thread)].find(rows, factor, groups, group, first, end, numbers, turn);
    });
}

void sum_groups(const Rows& rows, const RowGroups& groups, double* sums) {
    constexpr size_t stripe = 32;   // columns, so that threads share the rows of a single group, too
    const RowReader reader(rows, groups);
    const size_t d = rows.embedding_dim, num_stripes = (d + stripe - 1) / stripe, pieces = groups.count * num_stripes;
    for_each_piece(pieces, std::clamp<size_t>(pieces / 256, 1, 64), threads_for_all(rows, groups),
                   [&](size_t piece, Turn&) {
        const size_t group = piece / num_stripes, column = piece % num_stripes * stripe;
        const size_t count = std::min(stripe, d - column), first = static_cast<size_t>(groups.starts[group]);
        float values[stripe] = {};
        double sum[stripe] = {};
        for (size_t i = first; i < first + size_of(groups, group); i++) {
            reader.read(i, column, count, values);
            for (size_t j = 0; j < stripe; j++) sum[j] += static_cast<double>(values[j]);
        }
        std::copy_n(sum, count, sums + group * d + column);
    });
}

Distances bound_distances(const Rows& rows, const float* mean) {
    constexpr size_t rows_of_a_piece = 1024;
    const size_t d = rows.embedding_dim, pieces = (rows.num_rows + rows_of_a_piece - 1) / rows_of_a_piece;
    const RowReader reader(rows, {nullptr, nullptr, 0});
    std::vector<Distances> found(pieces, {std::numeric_limits<float>::infinity(), 0.0f});
    for_each_piece(pieces, 1, threads_for(rows.num_rows * d), [&](size_t piece, Turn&) {
        std::vector<float> values(d);
        const size_t end = std::min((piece + 1) * rows_of_a_piece, rows.num_rows);
        for (size_t row = piece * rows_of_a_piece; row < end; row++) {
            reader.read(row, 0, d, values.data());
            float distance = 0.0f;
            for (size_t j = 0; j < d; j++) distance = std::max(distance, std::fabs(values[j] - mean[j]));
            found[piece].largest = std::max(found[piece].largest, distance);
            if (distance > 0.0f) found[piece].smallest = std::min(found[piece].smallest, distance);
        }
    });
    Distances all = {std::numeric_limits<float>::infinity(), 0.0f};
    for (const Distances& own : found) all = {std::min(all.smallest, own.smallest), std::max(all.largest, own.largest)};
    return all;
}

namespace {

// Sorts in runs that take a tenth of a second, and merges these, so that `turn` is checked in between.
void sort_values(std::vector<float>& values, Turn& turn) {
    constexpr size_t run = size_t{1} << 21;
    float* const first = values.data();
    const size_t count = values.size();
    for (size_t start = 0; start < count; start += run) {
        std::sort(first + start, first + std::min(count, start + run));
        turn.check();
    }
    for (size_t width = run; width < count; width *= 2)
        for (size_t start = 0; start + width < count; start += 2 * width) {
            std::inplace_merge(first + start, first + start + width, first + std::min(count, start + 2 * width));
            turn.check();
        }
}

}  // namespace

void assign_codebooks(const float* rows, size_t num_rows, size_t embedding_dim, const float* codebooks, size_t count,
                      int bits, uint32_t* numbers) {
    const size_t levels = size_t{1} << bits;
    std::vector<double> bounds(count * levels);   // above each level but the last
    for (size_t i = 0; i < count; i++)
        for (size_t k = 0; k + 1 < levels; k++) {
            const float* level = codebooks + i * levels + k;
            bounds[i * levels + k] = (double{level[0]} + double{level[1]}) * 0.5;
        }
    const auto find = [&](size_t row, Turn& turn) {
        std::vector<float> values(rows + row * embedding_dim, rows + (row + 1) * embedding_dim);
        numbers[row] = 0;
        for (float value : values)
            if (value != value) return;
        sort_values(values, turn);
        std::vector<double> sums(embedding_dim + 1);
        for (size_t j = 0; j < embedding_dim; j++) sums[j + 1] = sums[j] + double{values[j]};
        double least = std::numeric_limits<double>::infinity();
        for (size_t i = 0; i < count; i++) {
            double error = 0.0;   // less the row's squares, which are the same for all
            ptrdiff_t start = 0;
            for (size_t k = 0; k < levels; k++) {
                ptrdiff_t end = static_cast<ptrdiff_t>(embedding_dim);
                if (k + 1 < levels)
                    end = std::upper_bound(values.begin(), values.end(), bounds[i * levels + k]) - values.begin();
                const double level = codebooks[i * levels + k];
                const double sum = sums[static_cast<size_t>(end)] - sums[static_cast<size_t>(start)];
                if (end > start) error += level * (level * static_cast<double>(end - start) - 2.0 * sum);
                start = end;
            }
            if (error < least) {
                least = error;
                numbers[row] = static_cast<uint32_t>(i);
            }
        }
    };
    for_each_piece(num_rows, 1, threads_for(num_rows * count * levels), find);
}

void fit_codebooks(const Rows& rows, const RowGroups& groups, int bits, float* codebooks) {
    const size_t levels = size_t{1} << bits, d = rows.embedding_dim;
    const RowReader reader(rows, groups);
    for_each_piece(groups.count, 1, threads_for_all(rows, groups), [&](size_t group, Turn& turn) {
        float* codebook = codebooks + levels * group;
        std::fill_n(codebook, levels, 0.0f);
        const size_t num_rows = size_of(groups, group), count = num_rows * d;
        if (count == 0) return;
        std::vector<float> values(count);
        for (size_t i = 0; i < num_rows; i++)
            reader.read(static_cast<size_t>(groups.starts[group]) + i, 0, d, values.data() + i * d);
        sort_values(values, turn);
        const double middle = (static_cast<double>(values[0]) + static_cast<double>(values[count - 1])) * 0.5;
        std::vector<double> sums(count + 1);
        const SortedValues sorted = {values.data(), sums.data(), count, 1, middle};
        for (size_t j = 0; j < count; j++) sums[j + 1] = sums[j] + sorted.value(j);
        double centres[256];
        iterate_lloyd(sorted, levels, centres);
        for (size_t k = 0; k < levels; k++) codebook[k] = static_cast<float>(middle + centres[k]);
    });
}

}  // namespace embpack
