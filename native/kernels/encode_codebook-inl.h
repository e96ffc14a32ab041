// From rows and their codebooks to packed bytes: codes, then the codebook, or the codes alone.

// The codebook as it is stored, and what lies half way between its entries.
struct StoredCodebook {
    float levels[256], boundaries[256];
    uint16_t halves[256];
    bool is_finite;
};

// The levels ascend, so that rounded to float16 they still do.
inline void store_codebook(const float* codebook, Grid grid, StoredCodebook& out) {
    const size_t count = size_t{1} << grid.bits;
    out.is_finite = true;
    for (size_t k = 0; k < count; k += 16) {
        const size_t n = count - k < 16 ? count - k : 16;
        F32x16 levels = load_first(codebook + k, n);
        if (grid.f16_params) {
            store_f16(out.halves + k, levels);
            levels = round_f16(levels);
        }
        store(out.levels + k, levels);
        out.is_finite &= lane_bits(finite(levels)) == 0xffff;
    }
    for (size_t k = 0; k + 1 < count; k++) out.boundaries[k] = (out.levels[k] + out.levels[k + 1]) * 0.5f;
}

// The entry nearest to each value; the lower one of two.
template <int bits>
inline I32x16 nearest_codes(F32x16 values, const StoredCodebook& codebook) {
    const F32x16 one = splat(1.0f), zero = splat(0.0f);
    F32x16 codes = zero;
    for (int k = 0; k + 1 < 1 << bits; k++)
        codes = add(codes, select(less(splat(codebook.boundaries[k]), values), one, zero));
    return to_int(codes);
}

template <int bits>
inline F32x16 levels_of(I32x16 codes, const StoredCodebook& codebook) {
    if constexpr (bits <= 4) return look_up(load(codebook.levels), codes);
    uint8_t bytes[16];
    store_codes<8>(bytes, codes);
    float levels[16];
    for (size_t i = 0; i < 16; i++) levels[i] = codebook.levels[bytes[i]];
    return load(levels);
}

template <int bits>
inline void encode_row_by_codebook(const float* x, size_t d, const StoredCodebook& codebook, uint8_t* packed,
                                   WideSums& sums) {
    for (size_t j = 0; j < d; j += 16) {
        const size_t count = d - j < 16 ? d - j : 16;
        const F32x16 zero = splat(0.0f), values = load_first(x + j, count);
        const Mask16 inside = first_lanes(count);
        const I32x16 codes = nearest_codes<bits>(values, codebook);
        const F32x16 difference = select(inside, sub(values, levels_of<bits>(codes, codebook)), zero);
        sums.add(values, difference);
        const I32x16 kept = to_int(select(inside, to_float(codes), zero));
        uint8_t bytes[2 * bits];
        store_codes<bits>(bytes, kept);
        std::memcpy(packed + j / 8 * bits, bytes, (count * bits + 7) / 8);
    }
}

template <int bits>
inline uint64_t encode_by_codebook_of(const RowBlock& block, Grid grid, const Codebooks& codebooks, uint8_t* packed,
                                      SquaredSums& sums) {
    const size_t d = block.embedding_dim, levels = size_t{1} << bits;
    const size_t code_bytes = (d * bits + 7) / 8, level_bytes = grid.f16_params ? 2 : 4;
    const size_t row_bytes = code_bytes + (codebooks.stored_in_rows ? levels * level_bytes : 0);
    WideSums wide;
    uint64_t overflows = 0;
    StoredCodebook stored;
    for (size_t row = 0; row < block.num_rows; row++) {
        const size_t which = codebooks.of_row ? codebooks.of_row[row] : row;
        store_codebook(codebooks.values + levels * which, grid, stored);
        if (!stored.is_finite) overflows |= uint64_t{1} << row;
        uint8_t* out = packed + row * row_bytes;
        encode_row_by_codebook<bits>(block.rows + row * d, d, stored, out, wide);
        if (!codebooks.stored_in_rows) continue;
        const void* from = grid.f16_params ? static_cast<const void*>(stored.halves) : stored.levels;
        std::memcpy(out + code_bytes, from, levels * level_bytes);
    }
    sums = {sum_lanes(wide.error), sum_lanes(wide.norm)};
    return overflows;
}

uint64_t encode_by_codebook(const RowBlock& block, Grid grid, const Codebooks& codebooks, uint8_t* packed,
                            SquaredSums& sums) noexcept {
    if (grid.bits == 2) return encode_by_codebook_of<2>(block, grid, codebooks, packed, sums);
    if (grid.bits == 4) return encode_by_codebook_of<4>(block, grid, codebooks, packed, sums);
    return encode_by_codebook_of<8>(block, grid, codebooks, packed, sums);
}
