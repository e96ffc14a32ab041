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

    LevelTable open() const { return *this; }
    [[gnu::always_inline]] F32x16 operator()(const SpreadCodes& codes) const { return look_up(levels, codes); }
};

template <int bits>
inline constexpr bool has_level_table = bits < 8 && looks_up_in_one;

// Levels on a grid.
template <int bits, bool f16_params>
struct GridLevels {
    F32x16 scale, bias;

    F32x16 operator()(const SpreadCodes& codes) const { return fma(scale, to_float(only_code<bits>(codes)), bias); }
};
template <int bits, bool f16_params>
struct KeptGrid {
    const float* params;

    GridLevels<bits, f16_params> open() const { return {splat_at(params), splat_at(params + 1)}; }
};

// What reads the levels of row `index`, given the address of its byte `first_code`; false if it has none. They are
// opened to be used, up to rows_early rows later: scale and bias are kept in memory, since a load can splat them.
inline constexpr size_t kept_rows = 4;
static_assert(kept_rows > rows_early);

// Levels are made of the scale and bias after the codes.
template <int bits, bool f16_params>
struct GridReader {
    using Kept = std::conditional_t<has_level_table<bits>, LevelTable, KeptGrid<bits, f16_params>>;

    size_t after_codes;
    F32x16 numbers = load(numbers_of_levels<bits>);
    float kept[kept_rows][4];

    GridReader(const PackedRows& rows, size_t first_code)
        : after_codes(code_bytes(rows.embedding_dim, rows.grid) - first_code) {
        if constexpr (has_level_table<bits>) stay_in_register(numbers);
    }

    bool read(const uint8_t* codes, uint64_t, size_t position, Kept& levels) {
        if constexpr (has_level_table<bits>) {
            GridLevels<bits, f16_params> grid;
            if constexpr (f16_params) {
                splat_two_f16(codes + after_codes, grid.scale, grid.bias);
            } else {
                float params[2];
                std::memcpy(params, codes + after_codes, sizeof params);
                grid = {splat(params[0]), splat(params[1])};
            }
            levels = {fma(grid.scale, numbers, grid.bias)};
        } else {
            float* const params = kept[position % kept_rows];
            if constexpr (f16_params)
                widen_two_f16(codes + after_codes, params);
            else
                std::memcpy(params, codes + after_codes, 2 * sizeof(float));
            levels = {params};
        }
        return true;
    }
};

// One of 256 levels, where it lies.
struct LongCodebook {
    const uint8_t* codebook;
    bool f16_params;

    LongCodebook open() const { return *this; }
    F32x16 operator()(const SpreadCodes& codes) const {
        uint8_t bytes[16];
        store_codes<8>(bytes, only_code<8>(codes));
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

// Levels are those of the codebook after the codes, or of that of the row's cluster.
template <int bits>
struct CodebookReader {
    using Kept = std::conditional_t<bits == 8, LongCodebook, LevelTable>;

    const PackedRows rows;   // a copy, which no store can change
    size_t after_codes;

    CodebookReader(const PackedRows& rows, size_t first_code)
        : rows(rows), after_codes(code_bytes(rows.embedding_dim, rows.grid) - first_code) {}

    bool read(const uint8_t* codes, uint64_t index, size_t, Kept& levels) const {
        const uint8_t* codebook = codes + after_codes;
        if (rows.layout == Layout::clustered) {
            const size_t cluster = cluster_of(rows, index);
            if (cluster >= rows.num_codebooks) [[unlikely]] return false;
            codebook = rows.codebooks + cluster * codebook_bytes({bits, rows.grid.f16_params});
        }
        const bool f16_params = rows.grid.f16_params;
        if constexpr (bits == 8) {
            levels = {codebook, f16_params};
        } else {
            uint16_t halves[16];
            float wide[16];
            for (size_t repeat = 0; repeat < 16; repeat += 1 << bits) {
                if (f16_params)
                    std::memcpy(halves + repeat, codebook, 2 << bits);
                else
                    std::memcpy(wide + repeat, codebook, 4 << bits);
            }
            levels = {f16_params ? load_f16(halves) : load(wide)};
        }
        return true;
    }
};

// Calls use(Type<reader>()) with the reader for those rows.
template <int bits, class Use>
inline auto with_levels(const PackedRows& rows, Use use) {
    switch (rows.layout) {
        case Layout::codebook:
        case Layout::clustered: return use(Type<CodebookReader<bits>>());
        case Layout::uniform:
        case Layout::trellis: break;   // the latter has lookups of its own
    }
    if (rows.grid.f16_params) return use(Type<GridReader<bits, true>>());
    return use(Type<GridReader<bits, false>>());
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

    SpreadCodes operator()(const uint8_t* from) const {
        uint8_t codes[16] = {};
        if constexpr (bits < 8) {
            const uint64_t word = read(from);
            std::memcpy(codes, &word, 8);
        } else {
            std::memcpy(codes, from, code_bytes);
        }
        return spread(codes);
    }
    // Codes of up to four bits, the first in the lowest.
    uint64_t read(const uint8_t* from) const {
        uint64_t word = 0;
        if (fits_eight) {   // One load is quicker than a loop.
            std::memcpy(&word, from - bytes_before, 8);
            return word >> 8 * bytes_before;
        }
        std::memcpy(&word, from, code_bytes);
        return word;
    }
};
