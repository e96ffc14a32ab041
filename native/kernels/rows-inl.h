// Reading rows: half precision to float32, and each row's bounds.

void widen_values(const uint16_t* values, size_t count, ValueType type, float* out) noexcept {
    const auto widen_sixteen = [type](const uint16_t* from) {
        return type == ValueType::f16 ? load_f16(from) : load_bf16(from);
    };
    size_t i = 0;
    for (; i + 16 <= count; i += 16) store(out + i, widen_sixteen(values + i));
    if (i == count) return;
    uint16_t last[16] = {};
    std::memcpy(last, values + i, (count - i) * sizeof(uint16_t));
    store_first(out + i, widen_sixteen(last), count - i);
}

inline double sum_lanes(F64x16 x) {
    double lane[16];
    store_f64(lane, x);
    for (size_t width = 8; width > 0; width /= 2)
        for (size_t i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}

// Sums of squares are made in float32, which is twice as fast, for runs of at most run_vectors additions, then in
// double.
inline constexpr size_t run_vectors = 16;

// Cuts a block into runs: as many rows as have run_vectors vectors, or a piece of a longer row. Calls
// use(row, start, count) for the columns start .. start + count of each row of a run, then end_run(). What a run sums
// up stays in registers only if nothing else is done in its loop.
template <class Use, class EndRun>
[[gnu::always_inline]] inline void in_runs(const RowBlock& block, const Use& use, const EndRun& end_run) {
    const size_t d = block.embedding_dim, most = 16 * run_vectors;
    const size_t run_rows = d <= most ? run_vectors / ((d + 15) / 16) : 1;
    for (size_t first = 0; first < block.num_rows; first += run_rows) {
        const size_t end = smaller(first + run_rows, block.num_rows);
        for (size_t start = 0; start < d; start += most) {
            const size_t count = smaller(d - start, most);
            for (size_t row = first; row < end; row++) use(row, start, count);
            end_run();
        }
    }
}

// Lane i: what remains of the `width` floats at rows + width * i when `pick` takes one of two; of sixteen that are
// equal, the first.
template <size_t width, class Pick>
inline F32x16 pick_of_rows(const float* rows, const Pick& pick) {
    if constexpr (picks_of_rows) return pick_of_rows_in_parts<width>(rows, pick);
    static_assert(picks_of_rows || width == lanes);
    // Turned over, the sixteen lanes of a row lie in one lane of sixteen vectors.
    float turned[lanes * lanes];
    transpose_16x16(rows, lanes, turned);
    F32x16 picked = load(turned);
    for (size_t k = 1; k < lanes; k++) picked = pick(load(turned + lanes * k), picked);
    return picked;
}

// Bounds of one row, still spread over the lanes. Which of equal zeros they have decides the sign of a bias.
struct LaneBounds {
    static constexpr size_t width = lanes;
    F32x16 low, high, other_low, other_high;

    explicit LaneBounds(F32x16 any) : low(any), high(any), other_low(any), other_high(any) {}
    void add(F32x16 values) {
        low = min(values, low);
        high = max(values, high);
    }
    void add_other(F32x16 values) {
        other_low = min(values, other_low);
        other_high = max(values, other_high);
    }
    void store_lanes(float* lows, float* highs) const {
        store(lows, min(other_low, low));
        store(highs, max(other_high, high));
    }
};

// The same in one register each, but for which of equal zeros it is. There are too few for whole vectors and the sums.
struct PartBounds {
    static constexpr size_t width = lanes / parts;
    Part low, high;

    explicit PartBounds(F32x16 any) : low(part_of(any, 0)), high(low) {}
    void add(F32x16 values) {
        unrolled<parts>([&](size_t i) {
            low = min(part_of(values, i), low);
            high = max(part_of(values, i), high);
        });
    }
    void add_other(F32x16 values) { add(values); }
    void store_lanes(float* lows, float* highs) const {
        store_part(lows, low);
        store_part(highs, high);
    }
};

inline bool all_finite(const RowBlock& block) {
    const size_t count = block.num_rows * block.embedding_dim;
    for (size_t i = 0; i < count; i += 16)
        if (lane_bits(finite(load_first(block.rows + i, count - i < 16 ? count - i : 16))) != 0xffff) return false;
    return true;
}

// Bounds of all rows of a block, and the sum of their squares.
template <class Bounds>
[[gnu::always_inline]] inline double bound_block(const RowBlock& block, Ranges& ranges) {
    const size_t d = block.embedding_dim;
    alignas(64) float low[block_rows * Bounds::width], high[block_rows * Bounds::width];
    for (size_t i = block.num_rows * Bounds::width; i < block_rows * Bounds::width; i++) low[i] = high[i] = 0.0f;
    F64x16 total = zero_f64();
    // Two sums, as additions to one wait for each other.
    F32x16 even = splat(0.0f), odd = even;
    Bounds bounds(even);
    const auto bound_values = [&](size_t row, size_t start, size_t count) __attribute__((always_inline)) {
        const float* x = block.rows + row * d;
        const F32x16 any = splat(x[0]);
        if (start == 0) bounds = Bounds(any);
        size_t j = start;
        const size_t end = start + count;
        for (; j + 32 <= end; j += 32) {
            const F32x16 values = load(x + j);
            bounds.add(values);
            even = fma(values, values, even);
            const F32x16 others = load(x + j + 16);
            bounds.add_other(others);
            odd = fma(others, others, odd);
        }
        for (; j < end; j += 16) {
            const size_t rest = smaller(end - j, 16);
            const F32x16 values = load_first(x + j, rest);
            bounds.add(select(first_lanes(rest), values, any));
            even = fma(values, values, even);
        }
        if (end == d) bounds.store_lanes(low + row * Bounds::width, high + row * Bounds::width);
    };
    in_runs(block, bound_values, [&] {
        total = add_f32(add_f32(total, even), odd);
        even = odd = splat(0.0f);
    });
    for (size_t i = 0; i < block_rows; i += lanes) {
        const auto lesser = [](auto a, auto b) { return min(a, b); };
        const auto larger = [](auto a, auto b) { return max(a, b); };
        store(ranges.xmin + i, pick_of_rows<Bounds::width>(low + i * Bounds::width, lesser));
        store(ranges.xmax + i, pick_of_rows<Bounds::width>(high + i * Bounds::width, larger));
    }
    return sum_lanes(total);
}

inline bool has_zero_bound(const Ranges& ranges, size_t num_rows) {
    const F32x16 zero = splat(0.0f);
    uint32_t found = 0;
    for (size_t i = 0; i < num_rows; i += lanes) {
        const Mask16 is_zero = either(equal(load(ranges.xmin + i), zero), equal(load(ranges.xmax + i), zero));
        found |= lane_bits(both(is_zero, first_lanes(smaller(num_rows - i, lanes))));
    }
    return found != 0;
}

bool bound_rows(const RowBlock& block, Ranges& ranges, double& norm) noexcept {
    if constexpr (parts == 1) {
        norm = bound_block<LaneBounds>(block, ranges);
    } else {
        norm = bound_block<PartBounds>(block, ranges);
        if (has_zero_bound(ranges, block.num_rows)) [[unlikely]] bound_block<LaneBounds>(block, ranges);
    }
    // A finite sum has nothing but finite values in it; an infinite one may come from large values.
    return norm - norm == 0.0 || all_finite(block);
}
