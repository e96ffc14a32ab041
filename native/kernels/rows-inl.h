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

inline float min_lane(F32x16 x) {
    float lane[16];
    store(lane, x);
    for (size_t width = 8; width > 0; width /= 2)
        for (size_t i = 0; i < width; i++) lane[i] = lane[i + width] < lane[i] ? lane[i + width] : lane[i];
    return lane[0];
}

inline float max_lane(F32x16 x) {
    float lane[16];
    store(lane, x);
    for (size_t width = 8; width > 0; width /= 2)
        for (size_t i = 0; i < width; i++) lane[i] = lane[i] < lane[i + width] ? lane[i + width] : lane[i];
    return lane[0];
}

bool bound_rows(const RowBlock& block, Ranges& ranges) noexcept {
    const size_t d = block.embedding_dim;
    const F32x16 zero = splat(0.0f);
    F32x16 zeros_if_finite = zero;   // x * 0 is NaN for NaN and infinity
    for (size_t row = 0; row < block.num_rows; row++) {
        const float* x = block.rows + row * d;
        F32x16 low = splat(x[0]);
        F32x16 high = low;
        const auto take = [&](F32x16 values) {
            low = min(values, low);
            high = max(values, high);
            zeros_if_finite = fma(values, zero, zeros_if_finite);
        };
        size_t j = 0;
        for (; j + 16 <= d; j += 16) take(load(x + j));
        if (j < d) take(select(first_lanes(d - j), load_first(x + j, d - j), splat(x[0])));
        ranges.xmin[row] = min_lane(low);
        ranges.xmax[row] = max_lane(high);
    }
    return lane_bits(equal(zeros_if_finite, zero)) == 0xffff;
}
