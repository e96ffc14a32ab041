// From the codes of a row to their levels: fma(scale, code, bias), or the code's entry in a codebook.
//
// Sixteen codes at a time are spread over the lanes as the instruction set does it best (Spread), in which
// bits above a code may be set, and lanes may be in an order of its own; in_column_order puts them right, once for the
// sum of many rows.

// The code that a lane of a level table stands for.
template <int bits>
alignas(64) inline constexpr float numbers_of_levels[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
template <>
alignas(64) inline constexpr float numbers_of_levels<2>[16] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};

// Up to sixteen levels in a register, from which codes choose: one operation where it is wide enough.
struct LevelTable {
    F32x16 levels;

    F32x16 operator()(I32x16 codes) const { return look_up(levels, codes); }
};

template <int bits>
inline constexpr bool has_level_table = bits < 8 && looks_up_in_one;

// Levels on a grid.
template <int bits>
struct GridLevels {
    F32x16 scale, bias;

    F32x16 operator()(I32x16 codes) const { return fma(scale, to_float(only_code<bits>(codes)), bias); }
};

// Makes levels of a row's scale and bias.
template <int bits>
struct GridReader {
    F32x16 numbers = load(numbers_of_levels<bits>);

    GridReader() { stay_in_register(numbers); }
    auto operator()(const float* scale_and_bias) const {
        const F32x16 scale = splat(scale_and_bias[0]), bias = splat(scale_and_bias[1]);
        if constexpr (has_level_table<bits>) {
            return LevelTable{fma(scale, numbers, bias)};
        } else {
            return GridLevels<bits>{scale, bias};
        }
    }
};

// One of 256 levels, where it lies.
struct LongCodebook {
    const uint8_t* codebook;
    bool f16_params;

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

template <int bits>
inline auto codebook_levels(const uint8_t* codebook, bool f16_params) {
    if constexpr (bits == 8) {
        return LongCodebook{codebook, f16_params};
    } else {
        uint16_t halves[16];
        float wide[16];
        for (size_t repeat = 0; repeat < 16; repeat += 1 << bits) {
            if (f16_params)
                std::memcpy(halves + repeat, codebook, 2 << bits);
            else
                std::memcpy(wide + repeat, codebook, 4 << bits);
        }
        return LevelTable{f16_params ? load_f16(halves) : load(wide)};
    }
}

// The codes of the last columns, fewer than sixteen, without reading past the row.
template <int bits>
struct SpreadLast {
    Spread<bits> spread;
    size_t code_bytes;
    size_t bytes_before;   // that a load of eight bytes must start before them, if it is to end with the row
    bool fits_eight;

    SpreadLast(const PackedRows& rows) : code_bytes((rows.embedding_dim % 16 * bits + 7) / 8) {
        const size_t left = rows.row_bytes - rows.embedding_dim / 16 * 2 * bits;
        bytes_before = left < 8 ? 8 - left : 0;
        fits_eight = bits < 8 && rows.row_bytes >= 8;
    }

    I32x16 operator()(const uint8_t* from) const {
        uint8_t codes[16] = {};
        if (fits_eight) {   // One load is quicker than a loop.
            uint64_t word;
            std::memcpy(&word, from - bytes_before, 8);
            word >>= 8 * bytes_before;
            std::memcpy(codes, &word, 8);
        } else {
            std::memcpy(codes, from, code_bytes);
        }
        return spread(codes);
    }
};
