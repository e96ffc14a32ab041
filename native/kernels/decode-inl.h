// Reading packed rows: gather and pool. A level is fma(scale, code, bias), or the code's entry in a codebook; a bag
// adds levels in index order.

// Scale and bias of a row, spread over all lanes.
struct UniformLevels {
    F32x16 scale, bias;

    UniformLevels(const uint8_t* after_codes, bool f16_params) {
        float params[16];
        if (f16_params) {
            uint16_t halves[16] = {};
            std::memcpy(halves, after_codes, 4);
            store(params, load_f16(halves));
        } else {
            std::memcpy(params, after_codes, 8);
        }
        scale = splat(params[0]);
        bias = splat(params[1]);
    }
    F32x16 operator()(I32x16 codes) const { return fma(scale, to_float(codes), bias); }
};

// A codebook of up to sixteen levels, in registers.
template <int bits>
struct CodebookLevels {
    F32x16 levels;

    CodebookLevels(const uint8_t* codebook, bool f16_params) {
        if (f16_params) {
            uint16_t halves[16] = {};
            std::memcpy(halves, codebook, 2 << bits);
            levels = load_f16(halves);
        } else {
            float wide[16] = {};
            std::memcpy(wide, codebook, 4 << bits);
            levels = load(wide);
        }
    }
    F32x16 operator()(I32x16 codes) const { return look_up(levels, codes); }
};

// One of 256, where it lies.
template <>
struct CodebookLevels<8> {
    const uint8_t* codebook;
    bool f16_params;

    CodebookLevels(const uint8_t* codebook, bool f16_params) : codebook(codebook), f16_params(f16_params) {}
    F32x16 operator()(I32x16 codes) const {
        uint8_t bytes[16];
        store_codes<8>(bytes, codes);
        uint16_t halves[16];
        float wide[16];
        for (size_t i = 0; i < 16; i++) {
            if (f16_params)
                std::memcpy(halves + i, codebook + 2 * bytes[i], 2);
            else
                std::memcpy(wide + i, codebook + 4 * bytes[i], 4);
        }
        return f16_params ? load_f16(halves) : load(wide);
    }
};

// Calls take(j, count, levels) for each sixteen columns from j on; the last call may have fewer.
template <int bits, class Levels, class Take>
inline void for_levels_of(const uint8_t* row, size_t d, const Levels& levels, Take take) {
    size_t j = 0;
    for (; j + 16 <= d; j += 16) take(j, size_t{16}, levels(load_codes<bits>(row + j / 8 * bits)));
    if (j == d) return;
    uint8_t last[2 * bits] = {};
    std::memcpy(last, row + j / 8 * bits, ((d - j) * bits + 7) / 8);
    take(j, d - j, levels(load_codes<bits>(last)));
}

template <int bits, class Take>
inline void for_levels_at(const PackedRows& rows, size_t index, Take take) {
    const uint8_t* row = rows.bytes + index * rows.row_bytes;
    const uint8_t* after_codes = row + (rows.embedding_dim * bits + 7) / 8;
    const bool f16_params = rows.grid.f16_params;
    if (rows.layout == Layout::uniform) {
        for_levels_of<bits>(row, rows.embedding_dim, UniformLevels(after_codes, f16_params), take);
    } else {
        const size_t codebook_bytes = (f16_params ? 2 : 4) << bits;
        const uint8_t* codebook =
            rows.layout == Layout::codebook ? after_codes : rows.codebooks + cluster_of(rows, index) * codebook_bytes;
        for_levels_of<bits>(row, rows.embedding_dim, CodebookLevels<bits>(codebook, f16_params), take);
    }
}

template <class Take>
inline void for_levels(const PackedRows& rows, int64_t index, Take take) {
    const size_t row = static_cast<size_t>(index);
    if (rows.grid.bits == 2) return for_levels_at<2>(rows, row, take);
    if (rows.grid.bits == 4) return for_levels_at<4>(rows, row, take);
    for_levels_at<8>(rows, row, take);
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
