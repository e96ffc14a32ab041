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

// A sum of squares: in float32, which is twice as fast, for runs of at most run_vectors additions, then in double. Two
// runs at a time, as additions to one wait for each other.
inline constexpr size_t run_vectors = 16;

struct SquaredSum {
    F32x16 even = splat(0.0f), odd = splat(0.0f);
    F64x16 total = zero_f64();
    size_t vectors = 0;

    void end_runs() {
        total = add_f32(add_f32(total, even), odd);
        even = odd = splat(0.0f);
        vectors = 0;
    }
    // To be called before up to run_vectors additions.
    void expect(size_t additions) {
        if (vectors + additions > run_vectors) end_runs();
        vectors += additions;
    }
    double value() {
        end_runs();
        return sum_lanes(total);
    }
};

// Bounds of one row, still spread over the lanes.
struct LaneBounds {
    F32x16 low, high;
};

inline LaneBounds bound_row(const float* x, size_t d, SquaredSum& squares) {
    const F32x16 any = splat(x[0]);
    F32x16 low = any, high = any, other_low = any, other_high = any;
    for (size_t start = 0; start < d; start += 16 * run_vectors) {
        const size_t end = d - start < 16 * run_vectors ? d : start + 16 * run_vectors;
        squares.expect((end - start + 15) / 16);
        F32x16 even = squares.even, odd = squares.odd;
        size_t j = start;
        for (; j + 32 <= end; j += 32) {
            const F32x16 values = load(x + j);
            low = min(values, low);
            high = max(values, high);
            even = fma(values, values, even);
            if constexpr (parts > 1) asm("" : : : "memory");   // no load for the other half before: there is no register
            const F32x16 others = load(x + j + 16);
            other_low = min(others, other_low);
            other_high = max(others, other_high);
            odd = fma(others, others, odd);
        }
        for (; j < end; j += 16) {
            const size_t count = end - j < 16 ? end - j : 16;
            const F32x16 values = load_first(x + j, count);
            const F32x16 padded = select(first_lanes(count), values, any);
            low = min(padded, low);
            high = max(padded, high);
            even = fma(values, values, even);
        }
        squares.even = even;
        squares.odd = odd;
    }
    return {min(other_low, low), max(other_high, high)};
}

inline bool all_finite(const RowBlock& block) {
    const size_t count = block.num_rows * block.embedding_dim;
    for (size_t i = 0; i < count; i += 16)
        if (lane_bits(finite(load_first(block.rows + i, count - i < 16 ? count - i : 16))) != 0xffff) return false;
    return true;
}

// Lane i: what remains of the sixteen floats at rows + 16 i when `pick` takes one of two, of equal ones the second.
template <class Pick>
inline F32x16 pick_of_rows(const float* rows, const Pick& pick) {
    if constexpr (picks_of_rows) return pick_of_rows_in_parts(rows, pick);
    // Turned over, the sixteen lanes of a row lie in one lane of sixteen vectors.
    float turned[lanes * lanes];
    transpose_16x16(rows, lanes, turned);
    F32x16 picked = load(turned);
    for (size_t k = 1; k < lanes; k++) picked = pick(load(turned + lanes * k), picked);
    return picked;
}

bool bound_rows(const RowBlock& block, Ranges& ranges, double& norm) noexcept {
    SquaredSum squares;
    for (size_t first = 0; first < block.num_rows; first += lanes) {
        float low[lanes * lanes], high[lanes * lanes];
        for (size_t i = 0; i < lanes; i++) {
            LaneBounds bounds = {splat(0.0f), splat(0.0f)};
            if (first + i < block.num_rows)
                bounds = bound_row(block.rows + (first + i) * block.embedding_dim, block.embedding_dim, squares);
            store(low + lanes * i, bounds.low);
            store(high + lanes * i, bounds.high);
        }
        store(ranges.xmin + first, pick_of_rows(low, [](auto a, auto b) { return min(a, b); }));
        store(ranges.xmax + first, pick_of_rows(high, [](auto a, auto b) { return max(a, b); }));
    }
    norm = squares.value();
    // A finite sum has nothing but finite values in it; an infinite one may come from large values.
    return norm - norm == 0.0 || all_finite(block);
}
