// Reading packed rows: gather and pool. A level is fma(scale, code, bias); a bag adds levels in index order.

struct RowParams {
    F32x16 scale, bias;
};

inline RowParams read_row_params(const uint8_t* after_codes, bool f16_params) {
    if (f16_params) {
        uint16_t halves[16] = {};
        std::memcpy(halves, after_codes, 4);
        float wide[16];
        store(wide, load_f16(halves));
        return {splat(wide[0]), splat(wide[1])};
    }
    float params[2];
    std::memcpy(params, after_codes, 8);
    return {splat(params[0]), splat(params[1])};
}

// Calls take(j, count, levels) for each sixteen columns from j on; the last call may have fewer.
template <int bits, class Take>
inline void for_levels_of(const uint8_t* row, size_t d, bool f16_params, Take take) {
    const RowParams p = read_row_params(row + (d * bits + 7) / 8, f16_params);
    const auto levels = [&](I32x16 codes) { return fma(p.scale, to_float(codes), p.bias); };
    size_t j = 0;
    for (; j + 16 <= d; j += 16) take(j, size_t{16}, levels(load_codes<bits>(row + j / 8 * bits)));
    if (j == d) return;
    uint8_t last[2 * bits] = {};
    std::memcpy(last, row + j / 8 * bits, ((d - j) * bits + 7) / 8);
    take(j, d - j, levels(load_codes<bits>(last)));
}

template <class Take>
inline void for_levels(const PackedRows& rows, int64_t index, Take take) {
    const uint8_t* row = rows.bytes + static_cast<size_t>(index) * rows.row_bytes;
    const bool f16_params = rows.grid.f16_params;
    if (rows.grid.bits == 2) return for_levels_of<2>(row, rows.embedding_dim, f16_params, take);
    if (rows.grid.bits == 4) return for_levels_of<4>(row, rows.embedding_dim, f16_params, take);
    for_levels_of<8>(row, rows.embedding_dim, f16_params, take);
}

void decode_rows(const PackedRows& rows, const int64_t* indices, size_t count, float* out) noexcept {
    for (size_t i = 0; i < count; i++) {
        float* to = out + i * rows.embedding_dim;
        for_levels(rows, indices ? indices[i] : static_cast<int64_t>(i),
                   [to](size_t j, size_t n, F32x16 levels) { store_first(to + j, levels, n); });
    }
}

void pool_rows(const PackedRows& rows, const int64_t* indices, const float* weights, size_t count,
               int64_t padding_index, Pooling pooling, float* out) noexcept {
    const size_t d = rows.embedding_dim;
    std::memset(out, 0, d * sizeof(float));
    size_t pooled = 0;
    for (size_t i = 0; i < count; i++) {
        if (indices[i] == padding_index) continue;
        const F32x16 weight = splat(weights ? weights[i] : 1.0f);
        const bool first = pooled++ == 0;
        for_levels(rows, indices[i], [&](size_t j, size_t n, F32x16 levels) {
            const F32x16 so_far = load_first(out + j, n);
            F32x16 next;
            if (pooling == Pooling::max) {
                next = first ? levels : max(levels, so_far);
            } else {
                next = weights ? fma(weight, levels, so_far) : add(so_far, levels);
            }
            store_first(out + j, next, n);
        });
    }
    if (pooling != Pooling::mean || pooled == 0) return;
    const F32x16 number = splat(static_cast<float>(pooled));
    for (size_t j = 0; j < d; j += 16) {
        const size_t n = d - j < 16 ? d - j : 16;
        store_first(out + j, div(load_first(out + j, n), number), n);
    }
}
