// From rows and their ranges to packed bytes: codes, then scale and bias.

// Codes of one row to `packed`, its squared errors and values to `error` and `norm`.
template <int bits>
inline void encode_row(const float* x, size_t d, GridParams p, F32x16 top, uint8_t* packed, F64x16& error,
                       F64x16& norm) {
    const auto encode = [&](F32x16 values) { return round_code(mul(sub(values, p.bias), p.inverse), top); };
    const auto level = [&](F32x16 codes) { return fma(p.scale, codes, p.bias); };
    size_t j = 0;
    for (; j + 16 <= d; j += 16) {
        const F32x16 values = load(x + j);
        const F32x16 codes = encode(values);
        store_codes<bits>(packed + j / 8 * bits, to_int(codes));
        error = add_square(error, sub(values, level(codes)));
        norm = add_square(norm, values);
    }
    if (j == d) return;
    const size_t rest = d - j;
    const Mask16 inside = first_lanes(rest);
    const F32x16 zero = splat(0.0f);
    const F32x16 values = load_first(x + j, rest);
    const F32x16 codes = select(inside, encode(values), zero);
    uint8_t last[2 * bits];
    store_codes<bits>(last, to_int(codes));
    std::memcpy(packed + j / 8 * bits, last, (rest * bits + 7) / 8);
    error = add_square(error, select(inside, sub(values, level(codes)), zero));
    norm = add_square(norm, values);
}

inline double sum_lanes(F64x16 x) {
    double lane[16];
    store_f64(lane, x);
    for (size_t width = 8; width > 0; width /= 2)
        for (size_t i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}

// What is stored of a block's ranges, and what its rows are encoded with.
struct BlockParams {
    float scale[block_rows], bias[block_rows], inverse[block_rows];
    uint16_t scale_f16[block_rows], bias_f16[block_rows];
    uint64_t overflows;   // a bit for every row
};

inline BlockParams make_block_params(const Ranges& ranges, Grid grid) {
    BlockParams out;
    out.overflows = 0;
    for (size_t i = 0; i < block_rows; i += lanes) {
        const GridParams p = make_grid(load(ranges.xmin + i), load(ranges.xmax + i), grid);
        store(out.scale + i, p.scale);
        store(out.bias + i, p.bias);
        store(out.inverse + i, p.inverse);
        store_f16(out.scale_f16 + i, p.scale);
        store_f16(out.bias_f16 + i, p.bias);
        const uint64_t whole = lane_bits(both(finite(p.scale), finite(p.bias)));
        out.overflows |= (~whole & 0xffff) << i;
    }
    return out;
}

template <int bits>
inline uint64_t encode_rows_of(const RowBlock& block, Grid grid, const Ranges& ranges, uint8_t* packed,
                               SquaredSums& sums) {
    const size_t d = block.embedding_dim;
    const size_t row_bytes = packed_row_bytes(d, grid);
    const size_t code_bytes = row_bytes - (grid.f16_params ? 4 : 8);
    const BlockParams params = make_block_params(ranges, grid);
    const F32x16 top = top_code(grid);
    F64x16 error = zero_f64(), norm = zero_f64();
    for (size_t row = 0; row < block.num_rows; row++) {
        uint8_t* out = packed + row * row_bytes;
        const GridParams p = {splat(params.scale[row]), splat(params.bias[row]), splat(params.inverse[row])};
        encode_row<bits>(block.rows + row * d, d, p, top, out, error, norm);
        if (grid.f16_params) {
            std::memcpy(out + code_bytes, params.scale_f16 + row, 2);
            std::memcpy(out + code_bytes + 2, params.bias_f16 + row, 2);
        } else {
            std::memcpy(out + code_bytes, params.scale + row, 4);
            std::memcpy(out + code_bytes + 4, params.bias + row, 4);
        }
    }
    sums = {sum_lanes(error), sum_lanes(norm)};
    return params.overflows & ((uint64_t{1} << block.num_rows) - 1);
}

uint64_t encode_rows(const RowBlock& block, Grid grid, const Ranges& ranges, uint8_t* packed,
                     SquaredSums& sums) noexcept {
    if (grid.bits == 2) return encode_rows_of<2>(block, grid, ranges, packed, sums);
    if (grid.bits == 4) return encode_rows_of<4>(block, grid, ranges, packed, sums);
    return encode_rows_of<8>(block, grid, ranges, packed, sums);
}
