// From rows and their ranges to packed bytes: codes, then scale and bias.

// Where float32 would do, a block's squares have been summed with its bounds.
struct NarrowSums {
    SquaredSum error;
    void expect(size_t additions) { error.expect(additions); }
    void add(F32x16, F32x16 difference) { error.even = fma(difference, difference, error.even); }
};

struct WideSums {
    F64x16 error = zero_f64(), norm = zero_f64();
    void expect(size_t) {}
    void add(F32x16 values, F32x16 difference) {
        error = add_square(error, difference);
        norm = add_square(norm, values);
    }
};

// Asks for the cache line `bytes` after p, which may lie past the end of the table: a prefetch never faults. Into the
// second-level cache: a block may be larger than the first.
inline void prefetch_after(const float* p, size_t bytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + bytes), 0, 2);
}

// Packs the codes of up to a row's values x[0 .. count), of which only the row's last may be no multiple of 16.
// Encoding leaves the memory idle, and the next block is most likely `next_bytes` away.
template <int bits, bool clips, class Sums>
inline void encode_values(const float* x, size_t count, size_t next_bytes, const GridParams& p, F32x16 top,
                          uint8_t* packed, Sums& sums) {
    const auto encode = [&](F32x16 values) {
        const F32x16 codes = mul(sub(values, p.bias), p.inverse);
        return clips ? round_code(codes, top) : round_nearest(codes);
    };
    const auto level = [&](F32x16 codes) { return fma(p.scale, codes, p.bias); };
    const auto encode_vector = [&](size_t at) {
        prefetch_after(x + at, next_bytes);
        const F32x16 values = load(x + at), codes = encode(values);
        sums.add(values, sub(values, level(codes)));
        return to_int(codes);
    };
    size_t j = 0;
    if constexpr (vectors_of_codes > 1)
        for (; j + 16 * vectors_of_codes <= count; j += 16 * vectors_of_codes) {
            I32x16 codes[vectors_of_codes];
            unrolled<vectors_of_codes>([&](size_t k) { codes[k] = encode_vector(j + 16 * k); });
            store_vectors<bits>(packed + j / 8 * bits, codes);
        }
    for (; j + 16 <= count; j += 16) store_codes<bits>(packed + j / 8 * bits, encode_vector(j));
    if (j == count) return;
    const size_t rest = count - j;
    const Mask16 inside = first_lanes(rest);
    const F32x16 zero = splat(0.0f);
    const F32x16 values = load_first(x + j, rest);
    const F32x16 codes = select(inside, encode(values), zero);
    uint8_t last[2 * bits];
    store_codes<bits>(last, to_int(codes));
    std::memcpy(packed + j / 8 * bits, last, (rest * bits + 7) / 8);
    sums.add(values, select(inside, sub(values, level(codes)), zero));
}

// What is stored of a block's ranges, and what its rows are encoded with.
struct BlockParams {
    float scale[block_rows], bias[block_rows], inverse[block_rows];
    uint16_t scale_f16[block_rows], bias_f16[block_rows];
    uint64_t overflows;   // a bit for every row
    uint64_t fits;        // a bit for every row whose values all get their codes by rounding alone
};

inline BlockParams make_block_params(const Ranges& bounds, const Ranges& ranges, Grid grid) {
    BlockParams out;
    out.overflows = 0;
    out.fits = 0;
    const F32x16 top = top_code(grid);
    for (size_t i = 0; i < block_rows; i += lanes) {
        const GridParams p = make_grid(load(ranges.xmin + i), load(ranges.xmax + i), grid);
        store(out.scale + i, p.scale);
        store(out.bias + i, p.bias);
        store(out.inverse + i, p.inverse);
        store_f16(out.scale_f16 + i, p.scale);
        store_f16(out.bias_f16 + i, p.bias);
        const uint64_t whole = lane_bits(both(finite(p.scale), finite(p.bias)));
        out.overflows |= (~whole & 0xffff) << i;
        // Rounding is monotone: what lies between the bounds gets a code between theirs.
        const F32x16 first = round_nearest(mul(sub(load(bounds.xmin + i), p.bias), p.inverse));
        const F32x16 last = round_nearest(mul(sub(load(bounds.xmax + i), p.bias), p.inverse));
        const uint64_t fit = lane_bits(both(equal(first, splat(0.0f)), equal(last, top)));
        out.fits |= fit << i;
    }
    return out;
}

// Whether no square of a value or an error can overflow float32, nor the squares of a row vanish in it. Float16
// parameters bound the values of rows that are not refused, and a row as wide as 2^-40 has a square of at least 2^-82.
inline bool squares_fit_float(const RowBlock& block, const Ranges& bounds, Grid grid) {
    if (!grid.f16_params) return false;
    for (size_t row = 0; row < block.num_rows; row++)
        if (!(bounds.xmax[row] - bounds.xmin[row] > 0x1p-40f)) return false;
    return true;
}

inline void store_params(const BlockParams& params, size_t row, bool f16_params, uint8_t* after_codes) {
    if (f16_params) {
        std::memcpy(after_codes, params.scale_f16 + row, 2);
        std::memcpy(after_codes + 2, params.bias_f16 + row, 2);
    } else {
        std::memcpy(after_codes, params.scale + row, 4);
        std::memcpy(after_codes + 4, params.bias + row, 4);
    }
}

template <int bits, bool clips, class Sums>
inline void encode_block(const RowBlock& block, Grid grid, const BlockParams& params, uint8_t* packed, Sums& sums) {
    const size_t d = block.embedding_dim;
    const size_t row_bytes = packed_row_bytes(d, grid);
    const size_t code_bytes = (d * bits + 7) / 8;
    const size_t next_bytes = block.num_rows * d * sizeof(float);
    const F32x16 top = top_code(grid);
    for (size_t row = 0; row < block.num_rows; row++) {
        const float* x = block.rows + row * d;
        uint8_t* out = packed + row * row_bytes;
        const GridParams p = {splat(params.scale[row]), splat(params.bias[row]), splat(params.inverse[row])};
        for (size_t j = 0; j < d; j += 16 * run_vectors) {
            const size_t count = d - j < 16 * run_vectors ? d - j : 16 * run_vectors;
            sums.expect((count + 15) / 16);
            encode_values<bits, clips>(x + j, count, next_bytes, p, top, out + j / 8 * bits, sums);
        }
        store_params(params, row, grid.f16_params, out + code_bytes);
    }
}

template <int bits, bool clips>
inline void encode_and_sum(const RowBlock& block, Grid grid, const BlockParams& params, bool narrow, uint8_t* packed,
                           SquaredSums& sums) {
    if (narrow) {
        NarrowSums run;
        encode_block<bits, clips>(block, grid, params, packed, run);
        sums.error = run.error.value();
    } else {
        WideSums wide;
        encode_block<bits, clips>(block, grid, params, packed, wide);
        sums = {sum_lanes(wide.error), sum_lanes(wide.norm)};
    }
}

template <int bits>
inline uint64_t encode_rows_of(const RowBlock& block, Grid grid, const Ranges& bounds, const Ranges& ranges,
                               uint8_t* packed, SquaredSums& sums) {
    const BlockParams params = make_block_params(bounds, ranges, grid);
    const bool narrow = squares_fit_float(block, bounds, grid);
    const uint64_t rows = (uint64_t{1} << block.num_rows) - 1;
    if ((params.fits & rows) == rows)
        encode_and_sum<bits, false>(block, grid, params, narrow, packed, sums);
    else
        encode_and_sum<bits, true>(block, grid, params, narrow, packed, sums);
    return params.overflows & rows;
}

uint64_t encode_rows(const RowBlock& block, Grid grid, const Ranges& bounds, const Ranges& ranges, uint8_t* packed,
                     SquaredSums& sums) noexcept {
    if (grid.bits == 2) return encode_rows_of<2>(block, grid, bounds, ranges, packed, sums);
    if (grid.bits == 4) return encode_rows_of<4>(block, grid, bounds, ranges, packed, sums);
    return encode_rows_of<8>(block, grid, bounds, ranges, packed, sums);
}
