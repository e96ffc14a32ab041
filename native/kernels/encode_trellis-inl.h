// Packs trellis-coded rows (src/embpack/methods/trellis_search.py is the specification), one row in each lane:
// Viterbi's algorithm over 32 states, once for each scale that is tried and once more for the codes. What the reference
// does with whole arrays is done here with vectors of sixteen rows, rounding by rounding.
//
// A state is the last five message bits: before step t, bit 4 is m[t-1] and bit 0 m[t-5]. With a message bit m, state s
// goes on to state s / 2 + 16 m.
//
// Sixteen rows go through these steps:
//
//     encode_trellis_rows   x: the rows less the mean, in the order of the path
//     search_scales         for each scale that is tried, walk<false> finds the least cost; the best scale is kept
//     walk<true>            with the best scale, keeps for each step and state which way was the better one
//     trace_back            from the best last state back to the first: numbers of levels, message bits
//     pack_codes            bits of one row to their places; the first state and the scale make the last byte
//
// In a walk, the nearest level of each subset does not depend on the states, and is found by tables that would push
// their costs out of the registers. So levels are found for some steps first (find_levels), then paths go along these
// (walk_steps).

inline constexpr size_t steps_at_once = 16;

// Of some steps the level of each subset that is nearest, by row in the lanes.
struct NearestLevels {
    alignas(64) float level[steps_at_once][trellis_subsets][lanes];
};

// Where the indices of these levels in their subsets go, a byte for each subset and lane of a step; or nowhere.
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

// Some steps of sixteen rows less the mean, in units of their scales: `inverse` is 1 / scale.
struct ScaledSteps {
    const float* x;
    F32x16 inverse;

    F32x16 operator[](size_t step) const { return mul(load(x + lanes * step), inverse); }
};

// Finds the level of each subset that is nearest to y. In subset 0 by bisection: the last one whose boundary is below
// y. Levels are dealt out in ascending order, so boundary k of another subset lies between boundaries k and k + 1 of
// subset 0. That leaves two levels there, of this index and of the one before it: one comparison.
template <int bits, class Indices>
inline void find_nearest(F32x16 y, const TrellisLevels& levels, size_t step, NearestLevels& out,
                         const Indices& indices) {
    I32x16 first = splat_int(0);
    for (int stride = 1 << (bits - 1); stride > 0; stride /= 2) {
        const I32x16 higher = add_int(first, splat_int(stride));
        first = select_int(less(look_up_in<bits>(levels.before[0], higher), y), higher, first);
    }
    const I32x16 below = add_int(first, splat_int(-1));
    for (size_t subset = 0; subset < trellis_subsets; subset++) {
        I32x16 index = first;
        if (subset > 0) index = select_int(less(look_up_in<bits>(levels.before[subset], first), y), first, below);
        store(out.level[step][subset], look_up_in<bits>(levels.of_subset[subset], index));
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
        store(out.level[step][subset], level);
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

// The squared errors of the best paths to each state, by row in the lanes.
struct TrellisPaths {
    alignas(64) float cost[trellis_states][lanes];

    // Of paths that may begin in those states whose bits are set.
    explicit TrellisPaths(const int32_t (&starts)[lanes]) {
        const I32x16 bits = load_int(starts);
        for (size_t s = 0; s < trellis_states; s++)
            store(cost[s], select(has_bit(bits, s), splat(0.0f), splat(__builtin_inff())));
    }
};

// One step further. Into states k and k + 16 paths come from states 2k and 2k + 1. A step's subset is 2 c1 + c0. All
// four steps have the same c0 = m[t-3], bit 1 of k, and the same m[t-2], bit 2 of k. m[t] is 0 into state k and 1 into
// k + 16, m[t-5] is 0 from state 2k and 1 from 2k + 1: each of them changes c1 = m[t] ^ m[t-2] ^ m[t-5], and so subset
// s to s ^ 2. Of two paths that are as good, the one from state 2k stays. `choices` gets, for each state, a bit for
// each row whose path came from 2k + 1.
template <bool keeps_choices>
[[gnu::always_inline]] inline void walk_step(F32x16 value, const float (&levels)[trellis_subsets][lanes],
                                               const TrellisPaths& before, TrellisPaths& after, uint16_t* choices) {
    F32x16 error[trellis_subsets];
    for (size_t s = 0; s < trellis_subsets; s++) {
        const F32x16 difference = sub(value, load(levels[s]));
        error[s] = mul(difference, difference);
    }
    unrolled<trellis_states / 2>([&](size_t k) __attribute__((always_inline)) {
        const size_t subset = 2 * (k >> 2 & 1) + (k >> 1 & 1);
        const F32x16 even = load(before.cost[2 * k]), odd = load(before.cost[2 * k + 1]);
        const auto enter = [&](size_t to, size_t subset_from_even) __attribute__((always_inline)) {
            const F32x16 first = add(even, error[subset_from_even]);
            const F32x16 second = add(odd, error[subset_from_even ^ 2]);
            store(after.cost[to], min(second, first));
            if constexpr (keeps_choices) choices[to] = static_cast<uint16_t>(lane_bits(less(second, first)));
        };
        enter(k, subset);
        enter(k + trellis_states / 2, subset ^ 2);
    });
}

// Goes count steps, from one array of costs to another and back.
template <bool keeps_choices>
inline void walk_steps(const ScaledSteps& y, size_t count, const NearestLevels& levels, TrellisPaths& paths,
                         uint16_t* choices) {
    TrellisPaths others = paths;
    for (size_t step = 0; step < count; step++) {
        uint16_t* own_choices = keeps_choices ? choices + trellis_states * step : nullptr;
        if (step % 2 == 0)
            walk_step<keeps_choices>(y[step], levels.level[step], paths, others, own_choices);
        else
            walk_step<keeps_choices>(y[step], levels.level[step], others, paths, own_choices);
    }
    if (count % 2 == 1) paths = others;
}

// Sixteen rows and the memory for them.
struct TrellisRows {
    float* values;       // [column][lane]
    float* x;            // the same less the mean, [step][lane]
    uint16_t* choices;   // of walk_step, [step][state], a bit for each lane
    uint8_t* indices;    // of the nearest levels in their subsets, [step][subset][lane]
    uint8_t* numbers;    // of the levels that are chosen, 4 index + subset, [step][lane]
    uint64_t* messages;  // bit t is that of the block's step t, [block][lane]
    size_t d, num_rows;
    F32x16 largest;      // magnitude of x in each row

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
template <bool keeps_choices>
inline void walk(const TrellisRows& rows, F32x16 inverse, const TrellisTable& table, TrellisPaths& paths) {
    const bool boundaries_hold = do_boundaries_hold(mul(rows.largest, inverse), table);
    NearestLevels levels;
    for (size_t t = 0; t < rows.d; t += steps_at_once) {
        const size_t count = rows.d - t < steps_at_once ? rows.d - t : steps_at_once;
        const ScaledSteps y = {rows.x + lanes * t, inverse};
        if constexpr (keeps_choices) {
            const KeepsIndices indices = {rows.indices + trellis_subsets * lanes * t};
            find_levels(y, count, table, table.is_wide + t, boundaries_hold, levels, indices);
            walk_steps<keeps_choices>(y, count, levels, paths, rows.choices + trellis_states * t);
        } else {
            find_levels(y, count, table, table.is_wide + t, boundaries_hold, levels, KeepsNone());
            walk_steps<keeps_choices>(y, count, levels, paths, nullptr);
        }
    }
}

// The scales to try with a row, by their places in the table's: `count` of them, evenly from low to low + span.
struct TriedScales {
    size_t low = 0, span = 0, count = 1;

    TriedScales() = default;
    TriedScales(float largest, const TrellisTable& table) {
        constexpr size_t most_tries = 12;
        const float lowest = largest * 0.8f, highest = largest * 1.3f;
        size_t end = 0;
        for (size_t i = 0; i < table.num_scales; i++) {
            low += table.scales[i] < lowest;
            end += table.scales[i] <= highest;
        }
        low = smaller(low, table.num_scales - 1);
        span = end > low ? end - 1 - low : 0;
        count = smaller(span + 1, most_tries);
    }
    size_t operator()(size_t i) const { return i < count ? low + i * span / (count > 1 ? count - 1 : 1) : low + span; }
};

// A scale for each row, by its place in the table's.
struct ChosenScales {
    size_t place[lanes];

    // The scales, and the states that paths may begin in with them.
    F32x16 find(const TrellisTable& table, int32_t (&starts)[lanes]) const {
        float scale[lanes];
        for (size_t i = 0; i < lanes; i++) {
            scale[i] = table.scales[place[i]];
            starts[i] = static_cast<int32_t>(table.starts[place[i]]);
        }
        return load(scale);
    }
};

// Tries scales. Returns which rows have a best one.
inline Mask16 search_scales(const TrellisRows& rows, const TrellisTable& table, ChosenScales& best) {
    float largest[lanes];
    store(largest, rows.largest);
    TriedScales tried[lanes];
    size_t num_tries = 0;
    for (size_t i = 0; i < lanes; i++) {
        tried[i] = TriedScales(largest[i], table);
        if (i < rows.num_rows && tried[i].count > num_tries) num_tries = tried[i].count;
        best.place[i] = 0;
    }
    F32x16 least = splat(__builtin_inff());
    for (size_t k = 0; k < num_tries; k++) {
        ChosenScales chosen;
        for (size_t i = 0; i < lanes; i++) chosen.place[i] = tried[i](k);
        int32_t starts[lanes];
        const F32x16 scale = chosen.find(table, starts);
        TrellisPaths paths(starts);
        walk<false>(rows, div(splat(1.0f), scale), table, paths);
        F32x16 cost = load(paths.cost[0]);
        for (size_t s = 1; s < trellis_states; s++) cost = min(load(paths.cost[s]), cost);
        const F32x16 error = mul(mul(scale, scale), cost);
        const Mask16 is_better = less(error, least);
        least = select(is_better, error, least);
        const uint32_t better = lane_bits(is_better);
        for (size_t i = 0; i < lanes; i++) best.place[i] = (better >> i) & 1u ? chosen.place[i] : best.place[i];
    }
    return except(less(least, splat(__builtin_inff())), equal(rows.largest, splat(0.0f)));
}

// From the ends of the best paths to their starts, which become `state`: the numbers of their levels, and of each row
// and block the message bits.
inline void trace_back(const TrellisRows& rows, const TrellisPaths& paths, uint32_t (&state)[lanes]) {
    uint64_t messages[lanes] = {};
    F32x16 cost = load(paths.cost[0]);
    for (uint32_t& one : state) one = 0;
    for (uint32_t s = 1; s < trellis_states; s++) {
        const Mask16 is_less = less(load(paths.cost[s]), cost);
        cost = select(is_less, load(paths.cost[s]), cost);
        for (size_t i = 0; i < lanes; i++) state[i] = (lane_bits(is_less) >> i) & 1u ? s : state[i];
    }
    for (size_t t = rows.d; t-- > 0;) {
        const uint16_t* choices = rows.choices + trellis_states * t;
        const uint8_t* indices = rows.indices + trellis_subsets * lanes * t;
        for (size_t i = 0; i < lanes; i++) {
            const uint32_t message = state[i] >> 4;
            const uint32_t source = ((state[i] & 15u) << 1) + ((choices[state[i]] >> i) & 1u);
            const uint32_t subset = 2 * (message ^ (source >> 3 & 1u) ^ (source & 1u)) + (source >> 2 & 1u);
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
    const size_t index_planes = static_cast<size_t>(table.narrow.index_bits);
    size_t top_bit = rows.d * (index_planes + 1);
    for (size_t start = 0; start < rows.d; start += trellis_block) {
        const size_t count = smaller(rows.d - start, trellis_block);
        uint64_t plane[trellis_most_bits] = {}, top = 0;
        size_t num_top = 0;
        for (size_t t = 0; t < count; t++) {
            const uint64_t index = rows.numbers[lanes * (start + t) + row] / trellis_subsets;
            for (size_t k = 0; k < index_planes; k++) plane[k] |= (index >> k & 1) << t;
            top |= (index >> index_planes) << num_top;
            num_top += table.is_wide[start + t];
        }
        size_t at = start * (index_planes + 1);
        put_bits(packed, at, rows.messages[lanes * (start / trellis_block) + row], count);
        for (size_t k = 0; k < index_planes; k++) put_bits(packed, at += count, plane[k], count);
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
    std::memset(packed, 0, rows.num_rows * table.row_bytes);
    ChosenScales best;
    F32x16 scale = zero;
    uint32_t is_coded = 0;
    if (table.num_scales > 0) {
        const Mask16 has_best = search_scales(rows, table, best);
        int32_t starts[lanes];
        scale = best.find(table, starts);
        TrellisPaths paths(starts);
        walk<true>(rows, div(splat(1.0f), scale), table, paths);
        scale = select(has_best, scale, zero);
        is_coded = lane_bits(has_best);
        uint32_t first_state[lanes];
        trace_back(rows, paths, first_state);
        for (size_t i = 0; i < rows.num_rows; i++) {
            if (!(is_coded >> i & 1u)) continue;
            uint8_t* row = packed + i * table.row_bytes;
            pack_codes(rows, i, table, row);
            row[table.row_bytes - 1] = table.numbers[best.place[i]][first_state[i]];
        }
    }
    for (size_t t = 0; t < rows.d; t++) {
        const TrellisLevels& levels = table.is_wide[t] ? table.wide : table.narrow;
        float level[lanes];
        for (size_t i = 0; i < lanes; i++) {
            const uint8_t number = is_coded >> i & 1u ? rows.numbers[lanes * t + i] : 0;
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
