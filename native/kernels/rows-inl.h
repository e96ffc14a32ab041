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

// Bounds of one row, still spread over the lanes.
struct LaneBounds {
    F32x16 low, high;
};

// Takes the largest magnitude of any value into `largest`. As integers: a minimum or maximum of floats would lose NaN,
// and a sum would wait for itself.
inline LaneBounds bound_row(const float* x, size_t d, I32x16& largest) {
    F32x16 low = splat(x[0]);
    F32x16 high = low;
    const auto take = [&](F32x16 values) {
        low = min(values, low);
        high = max(values, high);
        largest = max_magnitude(largest, values);
    };
    size_t j = 0;
    for (; j + 16 <= d; j += 16) take(load(x + j));
    if (j < d) take(select(first_lanes(d - j), load_first(x + j, d - j), splat(x[0])));
    return {low, high};
}

bool bound_rows(const RowBlock& block, Ranges& ranges) noexcept {
    I32x16 largest = zero_i32();
    for (size_t first = 0; first < block.num_rows; first += lanes) {
        float low[lanes * lanes] = {}, high[lanes * lanes] = {};
        const size_t rows = block.num_rows - first < lanes ? block.num_rows - first : lanes;
        for (size_t i = 0; i < rows; i++) {
            const float* x = block.rows + (first + i) * block.embedding_dim;
            const LaneBounds bounds = bound_row(x, block.embedding_dim, largest);
            store(low + lanes * i, bounds.low);
            store(high + lanes * i, bounds.high);
        }
        // Turned over, the sixteen lanes of a row lie in one lane of sixteen vectors.
        float turned_low[lanes * lanes], turned_high[lanes * lanes];
        transpose_16x16(low, lanes, turned_low);
        transpose_16x16(high, lanes, turned_high);
        F32x16 xmin = load(turned_low), xmax = load(turned_high);
        for (size_t k = 1; k < lanes; k++) {
            xmin = min(load(turned_low + lanes * k), xmin);
            xmax = max(load(turned_high + lanes * k), xmax);
        }
        store(ranges.xmin + first, xmin);
        store(ranges.xmax + first, xmax);
    }
    return lane_bits(finite(as_float(largest))) == 0xffff;
}
