// Trellis-coded rows (src/embpack/trellis.py), one row in each lane: Viterbi's algorithm over eight states, once for
// each scale that is tried and once more for the codes. What the reference does with whole arrays is done here with
// vectors of sixteen rows, rounding by rounding.
//
// Which levels are nearest does not wait for the states, and takes tables that would push these out of the registers.
// So a few steps at a time are looked up first, then walked along.

inline constexpr size_t steps_at_once = 16;

// Of some steps the level of each subset that is nearest.
struct NearestLevels {
    alignas(64) float of[steps_at_once][trellis_subsets][lanes];
};

// Where the indices of these levels go, a byte for each subset and lane of a step; or nowhere.
struct KeepsIndices {
    static constexpr bool keeps = true;
    uint8_t* to;
    void keep(size_t step, size_t subset, I32x16 index) const {
        store_codes<8>(to + (step * trellis_subsets + subset) * lanes, index);
    }
};
struct KeepsNone {
    static constexpr bool keeps = false;
    void keep(size_t, size_t, I32x16) const {}
};

// Sixteen rows less the mean, a step after the other, and what makes them multiples of their scales.
struct ScaledSteps {
    const float* x;
    F32x16 inverse;

    F32x16 operator[](size_t step) const { return mul(load(x + lanes * step), inverse); }
};

// Finds the nearest levels by bisection among the boundaries of the first subset. As levels ascend across the subsets,
// and boundaries with them, that leaves two levels of each of the others: one comparison.
template <int bits, class Indices>
inline void find_nearest(F32x16 y, const TrellisLevels& levels, size_t step, NearestLevels& out,
                         const Indices& indices) {
    I32x16 first = splat_int(0);
    for (int step = 1 << (bits - 1); step > 0; step /= 2) {
        const I32x16 higher = add_int(first, splat_int(step));
        first = select_int(less(look_up_in<bits>(levels.before[0], higher), y), higher, first);
    }
    const I32x16 below = add_int(first, splat_int(-1));
    for (size_t subset = 0; subset < trellis_subsets; subset++) {
        I32x16 index = first;
        if (subset > 0) index = select_int(less(look_up_in<bits>(levels.before[subset], first), y), first, below);
        store(out.of[step][subset], look_up_in<bits>(levels.of_subset[subset], index));
        indices.keep(step, subset, index);
    }
}

// The same by trying every level, for values so far from the levels, or levels so close, that errors round alike.
template <class Indices>
inline void try_all_levels(F32x16 y, const TrellisLevels& levels, size_t step, NearestLevels& out,
                           const Indices& indices) {
    for (size_t subset = 0; subset < trellis_subsets; subset++) {
        const float* of_subset = levels.of_subset[subset];
        F32x16 level = splat(of_subset[0]);
        F32x16 error = mul(sub(y, level), sub(y, level));
        I32x16 index = splat_int(0);
        for (int k = 1; k < 1 << levels.index_bits; k++) {
            const F32x16 other = splat(of_subset[k]);
            const F32x16 other_error = mul(sub(y, other), sub(y, other));
            const Mask16 is_nearer = less(other_error, error);
            level = select(is_nearer, other, level);
            error = select(is_nearer, other_error, error);
            index = select_int(is_nearer, splat_int(k), index);
        }
        store(out.of[step][subset], level);
        indices.keep(step, subset, index);
    }
}

template <int narrow_bits, class Indices>
inline void find_all_nearest(const ScaledSteps& y, size_t count, const TrellisTable& table, const uint8_t* is_wide,
                             NearestLevels& out, const Indices& indices) {
    for (size_t step = 0; step < count; step++) {
        if (is_wide[step])
            find_nearest<narrow_bits + 1>(y[step], table.wide, step, out, indices);
        else
            find_nearest<narrow_bits>(y[step], table.narrow, step, out, indices);
    }
}

template <class Indices>
inline void find_levels(const ScaledSteps& y, size_t count, const TrellisTable& table, const uint8_t* is_wide,
                        bool boundaries_hold, NearestLevels& out, const Indices& indices) {
    if (!boundaries_hold) {
        for (size_t step = 0; step < count; step++)
            try_all_levels(y[step], is_wide[step] ? table.wide : table.narrow, step, out, indices);
        return;
    }
    switch (table.narrow.index_bits) {
        case 1: return find_all_nearest<1>(y, count, table, is_wide, out, indices);
        case 2: return find_all_nearest<2>(y, count, table, is_wide, out, indices);
        case 3: return find_all_nearest<3>(y, count, table, is_wide, out, indices);
        case 4: return find_all_nearest<4>(y, count, table, is_wide, out, indices);
        case 5: return find_all_nearest<5>(y, count, table, is_wide, out, indices);
    }
    for (size_t step = 0; step < count; step++)
        find_nearest<6>(y[step], table.narrow, step, out, indices);
}

// The best paths to each state, and what the levels on them sum up to.
struct TrellisPaths {
    F32x16 cost[trellis_states], level_square[trellis_states], level_product[trellis_states];

    TrellisPaths() {
        for (size_t s = 0; s < trellis_states; s++) {
            cost[s] = splat(s == 0 ? 0.0f : __builtin_inff());
            level_square[s] = level_product[s] = splat(0.0f);
        }
    }
};

// What is kept of a walk beside the costs of its paths: nothing, sums over their levels, or the paths themselves.
enum class Keep : uint8_t { costs, sums, choices };

// One step further. Into states k and k + 4 paths come from states 2k and 2k + 1, with levels of subsets k and k ^ 2
// or the other way round.
template <Keep keep>
[[gnu::always_inline]] inline void walk_step(F32x16 value, const float (&levels)[trellis_subsets][lanes],
                                               const TrellisPaths& before, TrellisPaths& after, uint16_t* choices) {
    F32x16 error[trellis_subsets], square[trellis_subsets], product[trellis_subsets];
    for (size_t s = 0; s < trellis_subsets; s++) {
        const F32x16 level = load(levels[s]), difference = sub(value, level);
        error[s] = mul(difference, difference);
        square[s] = mul(level, level);
        product[s] = mul(value, level);
    }
    const auto enter = [&](size_t to, size_t from, size_t a, size_t b) {
        const F32x16 first = add(before.cost[from], error[a]), second = add(before.cost[from + 1], error[b]);
        const Mask16 takes_second = less(second, first);
        after.cost[to] = min(second, first);
        if constexpr (keep == Keep::choices) choices[to] = static_cast<uint16_t>(lane_bits(takes_second));
        if constexpr (keep != Keep::sums) return;
        after.level_square[to] = select(takes_second, add(before.level_square[from + 1], square[b]),
                                        add(before.level_square[from], square[a]));
        after.level_product[to] = select(takes_second, add(before.level_product[from + 1], product[b]),
                                         add(before.level_product[from], product[a]));
    };
    for (size_t k = 0; k < trellis_states / 2; k++) {
        enter(k, 2 * k, k, k ^ 2);
        enter(k + 4, 2 * k, k ^ 2, k);
    }
}

// There and back again: where there are not enough registers, copying paths takes a fifth of the time.
template <Keep keep>
inline void walk_steps(const ScaledSteps& y, size_t count, const NearestLevels& levels, TrellisPaths& all_paths,
                         uint16_t* choices) {
    TrellisPaths paths = all_paths, others;
    const auto take = [&](size_t step, const TrellisPaths& before, TrellisPaths& after) {
        uint16_t* own_choices = keep == Keep::choices ? choices + trellis_states * step : nullptr;
        walk_step<keep>(y[step], levels.of[step], before, after, own_choices);
    };
    size_t step = 0;
    for (; step + 2 <= count; step += 2) {
        take(step, paths, others);
        take(step + 1, others, paths);
    }
    if (step < count) {
        take(step, paths, others);
        paths = others;
    }
    all_paths = paths;
}

// Sixteen rows and the memory for them.
struct TrellisRows {
    float* values;       // a column after the other
    float* x;            // the same less the mean, a step after the other
    uint16_t* choices;   // of each step and state
    uint8_t* indices;    // of each step, subset and lane
    uint8_t* numbers;    // of each step and lane the level that was chosen
    uint64_t* messages;  // of each block and lane
    size_t d, num_rows;
    F32x16 largest;      // magnitude of x

    TrellisRows(float* scratch, size_t d, size_t num_rows)
        : values(scratch),
          x(values + lanes * d),
          choices(reinterpret_cast<uint16_t*>(x + lanes * d)),
          indices(reinterpret_cast<uint8_t*>(choices + trellis_states * d)),
          numbers(indices + trellis_subsets * lanes * d),
          messages(reinterpret_cast<uint64_t*>(numbers + lanes * d)),
          d(d),
          num_rows(num_rows) {}
};

// Whether values so large have their nearest levels told by the boundaries. False if any is NaN.
inline bool do_boundaries_hold(F32x16 largest, const TrellisTable& table) {
    const float narrow = table.narrow.limit, wide = table.wide.index_bits ? table.wide.limit : narrow;
    return lane_bits(less(largest, splat(narrow < wide ? narrow : wide))) == 0xffff;
}

// Walks along all steps of rows in units of their scales.
template <Keep keep>
inline void walk(const TrellisRows& rows, F32x16 inverse, const TrellisTable& table, TrellisPaths& paths) {
    const bool boundaries_hold = do_boundaries_hold(mul(rows.largest, inverse), table);
    NearestLevels levels;
    for (size_t t = 0; t < rows.d; t += steps_at_once) {
        const size_t count = rows.d - t < steps_at_once ? rows.d - t : steps_at_once;
        const ScaledSteps y = {rows.x + lanes * t, inverse};
        if constexpr (keep == Keep::choices) {
            const KeepsIndices indices = {rows.indices + trellis_subsets * lanes * t};
            find_levels(y, count, table, table.is_wide + t, boundaries_hold, levels, indices);
            walk_steps<keep>(y, count, levels, paths, rows.choices + trellis_states * t);
        } else {
            find_levels(y, count, table, table.is_wide + t, boundaries_hold, levels, KeepsNone());
            walk_steps<keep>(y, count, levels, paths, nullptr);
        }
    }
}

// The scales of sixteen rows.
struct ChosenScales {
    F32x16 scale;
    int32_t number[lanes];
};

// The nearest scale to each that is wanted, never number 0; the last for NaN.
inline void find_scales(F32x16 wanted, const TrellisTable& table, ChosenScales& out) {
    float value[lanes], scale[lanes];
    store(value, wanted);
    for (int32_t& number : out.number) number = 0;
    for (int32_t step = trellis_scales / 2; step > 0; step /= 2)
        for (size_t i = 0; i < lanes; i++) {
            const int32_t higher = out.number[i] + step;
            out.number[i] = value[i] <= table.boundaries[higher - 1] ? out.number[i] : higher;
        }
    for (size_t i = 0; i < lanes; i++) {
        const int32_t most = trellis_scales - 1, number = out.number[i] + 1;
        out.number[i] = number < most ? number : most;
        scale[i] = table.scales[out.number[i]];
    }
    out.scale = load(scale);
}

// The numbers of the best scales; 0 for rows that are the mean.
inline void search_scales(const TrellisRows& rows, const TrellisTable& table, int32_t (&best)[lanes]) {
    constexpr int num_refits = 2;
    constexpr float factors[] = {0.7f, 0.75f, 0.8f, 0.85f, 0.9f, 0.95f, 1.0f, 1.05f};
    F32x16 least = splat(__builtin_inff());
    for (int32_t& number : best) number = 0;
    for (float factor : factors) {
        ChosenScales tried;
        find_scales(mul(rows.largest, splat(factor)), table, tried);
        for (int refit = 0; refit <= num_refits; refit++) {
            TrellisPaths paths;
            const F32x16 inverse = div(splat(1.0f), tried.scale);
            if (refit < num_refits)
                walk<Keep::sums>(rows, inverse, table, paths);
            else
                walk<Keep::costs>(rows, inverse, table, paths);
            F32x16 cost = paths.cost[0], square = paths.level_square[0], product = paths.level_product[0];
            for (size_t s = 1; s < trellis_states; s++) {
                const Mask16 is_less = less(paths.cost[s], cost);
                cost = select(is_less, paths.cost[s], cost);
                square = select(is_less, paths.level_square[s], square);
                product = select(is_less, paths.level_product[s], product);
            }
            const F32x16 error = mul(mul(tried.scale, tried.scale), cost);
            const Mask16 is_better = less(error, least);
            least = select(is_better, error, least);
            const uint32_t better = lane_bits(is_better);
            for (size_t i = 0; i < lanes; i++) best[i] = (better >> i) & 1u ? tried.number[i] : best[i];
            if (refit < num_refits) find_scales(mul(tried.scale, div(product, square)), table, tried);
        }
    }
    const uint32_t is_mean = lane_bits(equal(rows.largest, splat(0.0f)));
    for (size_t i = 0; i < lanes; i++) best[i] = (is_mean >> i) & 1u ? 0 : best[i];
}

// From the ends of the best paths to their starts: the numbers of their levels, and of each row and block the message
// bits.
inline void trace_back(const TrellisRows& rows, const TrellisPaths& paths) {
    uint32_t state[lanes] = {};
    uint64_t messages[lanes] = {};
    F32x16 cost = paths.cost[0];
    for (uint32_t s = 1; s < trellis_states; s++) {
        const Mask16 is_less = less(paths.cost[s], cost);
        cost = select(is_less, paths.cost[s], cost);
        for (size_t i = 0; i < lanes; i++) state[i] = (lane_bits(is_less) >> i) & 1u ? s : state[i];
    }
    for (size_t t = rows.d; t-- > 0;) {
        const uint16_t* choices = rows.choices + trellis_states * t;
        const uint8_t* indices = rows.indices + trellis_subsets * lanes * t;
        for (size_t i = 0; i < lanes; i++) {
            const uint32_t message = state[i] >> 2;
            const uint32_t source = ((state[i] & 3u) << 1) + ((choices[state[i]] >> i) & 1u);
            const uint32_t subset = 2 * (message ^ (source >> 2) ^ (source & 1u)) + ((source >> 1) & 1u);
            rows.numbers[lanes * t + i] = static_cast<uint8_t>(4 * indices[lanes * subset + i] + subset);
            messages[i] = messages[i] << 1 | message;
            state[i] = source;
        }
        if (t % trellis_block == 0) std::memcpy(rows.messages + lanes * (t / trellis_block), messages, sizeof messages);
    }
}

// Adds `count` bits to a row that has zeros there, those above them being zeros, too.
inline void put_bits(uint8_t* row, size_t first_bit, uint64_t bits, size_t count) {
    for (uint8_t* to = row + first_bit / 8; count > 0; to++) {
        const size_t shift = first_bit % 8, taken = smaller(8 - shift, count);
        *to = static_cast<uint8_t>(*to | bits << shift);
        bits >>= taken;
        first_bit += taken;
        count -= taken;
    }
}

// Packs the message bits and the indices of one row.
inline void pack_codes(const TrellisRows& rows, size_t row, const TrellisTable& table, uint8_t* packed) {
    const size_t planes = static_cast<size_t>(table.narrow.index_bits);
    size_t top_bit = rows.d * (planes + 1);
    for (size_t start = 0; start < rows.d; start += trellis_block) {
        const size_t count = smaller(rows.d - start, trellis_block);
        uint64_t plane[trellis_most_bits] = {}, top = 0;
        size_t num_top = 0;
        for (size_t t = 0; t < count; t++) {
            const uint64_t index = rows.numbers[lanes * (start + t) + row] / trellis_subsets;
            for (size_t k = 0; k < planes; k++) plane[k] |= (index >> k & 1) << t;
            top |= (index >> planes) << num_top;
            num_top += table.is_wide[start + t];
        }
        size_t at = start * (planes + 1);
        put_bits(packed, at, rows.messages[lanes * (start / trellis_block) + row], count);
        for (size_t k = 0; k < planes; k++) put_bits(packed, at += count, plane[k], count);
        put_bits(packed, top_bit, top, num_top);
        top_bit += num_top;
    }
}

// Encodes sixteen rows. Adds up their errors as decoding rounds them.
inline void encode_trellis_rows(TrellisRows& rows, const TrellisTable& table, uint8_t* packed, WideSums& sums) {
    const Mask16 inside = first_lanes(rows.num_rows);
    const F32x16 zero = splat(0.0f);
    rows.largest = zero;
    for (size_t t = 0; t < rows.d; t++) {
        const size_t column = table.columns[t];
        const F32x16 x = select(inside, sub(load(rows.values + lanes * column), splat(table.mean[column])), zero);
        store(rows.x + lanes * t, x);
        rows.largest = max(magnitude(x), rows.largest);
    }
    int32_t best[lanes];
    search_scales(rows, table, best);
    float scales[lanes];
    for (size_t i = 0; i < lanes; i++) scales[i] = best[i] ? table.scales[best[i]] : 0.0f;
    const F32x16 scale = load(scales);
    TrellisPaths paths;
    walk<Keep::choices>(rows, select(equal(scale, zero), zero, div(splat(1.0f), scale)), table, paths);
    std::memset(packed, 0, rows.num_rows * table.row_bytes);
    trace_back(rows, paths);
    for (size_t i = 0; i < rows.num_rows; i++) {
        uint8_t* row = packed + i * table.row_bytes;
        if (best[i]) pack_codes(rows, i, table, row);
        row[table.row_bytes - 1] = static_cast<uint8_t>(best[i]);
    }
    for (size_t t = 0; t < rows.d; t++) {
        const TrellisLevels& levels = table.is_wide[t] ? table.wide : table.narrow;
        float level[lanes];
        for (size_t i = 0; i < lanes; i++) {
            const uint8_t number = best[i] ? rows.numbers[lanes * t + i] : 0;
            level[i] = levels.of_subset[number % trellis_subsets][number / trellis_subsets];
        }
        const size_t column = table.columns[t];
        const F32x16 value = load(rows.values + lanes * column);
        const F32x16 decoded = fma(scale, load(level), splat(table.mean[column]));
        sums.add(value, select(inside, sub(value, decoded), zero));
    }
}

void encode_trellis(const RowBlock& block, const TrellisTable& table, float* scratch, uint8_t* packed,
                    SquaredSums& sums) noexcept {
    WideSums wide;
    for (size_t first = 0; first < block.num_rows; first += lanes) {
        const size_t left = block.num_rows - first;
        TrellisRows rows(scratch, block.embedding_dim, left < lanes ? left : lanes);
        transpose_rows(block, first, rows.values);
        encode_trellis_rows(rows, table, packed + first * table.row_bytes, wide);
    }
    sums = {sum_lanes(wide.error), sum_lanes(wide.norm)};
}
