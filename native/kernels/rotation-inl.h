// Rotation of rows: signs, then the Hadamard matrix of each block of columns (src/embpack/reference.py).
//
// A block is a run of n = 2^k columns. Its matrix is applied in k stages: values h columns apart become their sum and
// their difference, for h = 1, 2, 4, .., n / 2. The first four stages stay in a vector.

// Whether a column's sign is negative: the Rudin-Shapiro sequence.
constexpr bool is_negative(size_t column) { return __builtin_parityll(column & (column >> 1)); }

// Numbers of the lanes, for all vectors of columns: these depend on the parity of the vector's sign and on its last bit.
struct LaneSigns {
    alignas(64) float of_columns[2][2][16];
    alignas(64) float of_stage[4][16];   // negative where a value is taken away

    constexpr LaneSigns() : of_columns(), of_stage() {
        for (size_t lane = 0; lane < 16; lane++) {
            for (size_t last_bit = 0; last_bit < 2; last_bit++) {
                const float sign = is_negative(16 * last_bit + lane) ? -1.0f : 1.0f;
                of_columns[0][last_bit][lane] = sign;
                of_columns[1][last_bit][lane] = -sign;
            }
            for (size_t stage = 0; stage < 4; stage++) of_stage[stage][lane] = lane >> stage & 1 ? -1.0f : 1.0f;
        }
    }
};
constexpr LaneSigns lane_signs;

// Signs of the sixteen columns from `first` on.
inline F32x16 signs_from(size_t first) {
    const size_t vector = first / 16;
    return load(lane_signs.of_columns[is_negative(vector)][vector & 1]);
}

// A stage of a vector.
template <size_t stage>
inline F32x16 transform_stage(F32x16 x) {
    return add(exchange<size_t{1} << stage>(x), mul(x, load(lane_signs.of_stage[stage])));
}

// The same of the last columns, as far as there are blocks of more than 2^stage columns.
template <size_t stage>
inline F32x16 transform_last(F32x16 x, size_t count) {
    constexpr size_t pair = size_t{2} << stage;
    return select(first_lanes(count & ~(pair - 1)), transform_stage<stage>(x), x);
}

inline F32x16 transform_vector(F32x16 x, size_t count) {
    if (count < 16) return transform_last<2>(transform_last<1>(transform_last<0>(x, count), count), count);
    return transform_stage<3>(transform_stage<2>(transform_stage<1>(transform_stage<0>(x))));
}

// Columns of a row, sixteen or fewer. A load has to wait for a masked store that it reads what is stored of.
inline F32x16 load_columns(const float* p, size_t n) { return n == 16 ? load(p) : load_first(p, n); }
inline void store_columns(float* p, F32x16 x, size_t n) { return n == 16 ? store(p, x) : store_first(p, x, n); }

inline void transform_block(float* block, size_t n) {
    for (size_t distance = 16; distance < n; distance *= 2)
        for (size_t start = 0; start < n; start += 2 * distance)
            for (size_t j = start; j < start + distance; j += 16) {
                const F32x16 a = load(block + j), b = load(block + j + distance);
                store(block + j, add(a, b));
                store(block + j + distance, sub(a, b));
            }
}

inline size_t largest_block(size_t num_columns) { return size_t{1} << (63 - __builtin_clzll(num_columns)); }

// 1 / sqrt(n), for a power of two.
inline float inverse_root(size_t n) {
    const int digits = __builtin_ctzll(n);
    const float root = 1.0f / static_cast<float>(size_t{1} << digits / 2);
    return digits % 2 ? root * 0.70710678f : root;
}

// Calls use(column, count, scale) for the vectors of a row, the last one of fewer columns, which may be several blocks.
template <class Use>
inline void for_vectors(size_t d, const Use& use) {
    size_t j = 0;
    while (d - j >= 16) {
        const size_t n = largest_block(d - j);
        const F32x16 scale = splat(inverse_root(n));
        for (const size_t end = j + n; j < end; j += 16) use(j, 16, scale);
    }
    if (j == d) return;
    float scales[16] = {};
    for (size_t i = j; i < d;) {
        const size_t n = largest_block(d - i);
        for (const size_t end = i + n; i < end; i++) scales[i - j] = inverse_root(n);
    }
    use(j, d - j, load(scales));
}

// All stages of a row whose vectors read(column, count) gives; the row is filled, and still to be scaled.
template <class Read>
inline void transform_row(float* row, size_t d, const Read& read) {
    for (size_t j = 0; j < d; j += 16) {
        const size_t count = smaller(d - j, 16);
        store_columns(row + j, transform_vector(read(j, count), count), count);
    }
    for (size_t j = 0; d - j > 16;) {
        const size_t n = largest_block(d - j);
        transform_block(row + j, n);
        j += n;
    }
}

void rotate_rows(float* rows, size_t num_rows, size_t d) noexcept {
    for (float* row = rows; row < rows + num_rows * d; row += d) {
        transform_row(row, d, [&](size_t j, size_t n) { return mul(load_columns(row + j, n), signs_from(j)); });
        for_vectors(d, [&](size_t j, size_t n, F32x16 scale) {
            store_columns(row + j, mul(load_columns(row + j, n), scale), n);
        });
    }
}

void rotate_rows_back(float* rows, size_t num_rows, size_t d) noexcept {
    for (float* row = rows; row < rows + num_rows * d; row += d) {
        transform_row(row, d, [&](size_t j, size_t n) { return load_columns(row + j, n); });
        for_vectors(d, [&](size_t j, size_t n, F32x16 scale) {
            const F32x16 values = mul(mul(load_columns(row + j, n), scale), signs_from(j));
            store_columns(row + j, add(values, splat(0.0f)), n);   // no zero is negative
        });
    }
}

// Columns of `rows` that are larger than those of `so_far` take their place.
void keep_largest(const float* rows, size_t num_rows, size_t d, float* so_far) noexcept {
    for (size_t j = 0; j < d; j += 16) {
        const size_t n = smaller(d - j, 16);
        F32x16 largest = load_columns(so_far + j, n);
        for (const float* row = rows; row < rows + num_rows * d; row += d) largest = max(load_columns(row + j, n), largest);
        store_columns(so_far + j, largest, n);
    }
}

void write_rows(const float* rows, size_t num_rows, size_t d, const Output& out) noexcept {
    write_clipped(out, [&](const Output& narrow) {
        uint8_t* to = narrow.values;
        for (const float* row = rows; row < rows + num_rows * d; row += d, to += narrow.row_bytes)
            for (size_t j = 0; j < d; j += 16) {
                const size_t n = smaller(d - j, 16);
                store_values(to, narrow.type, j, load_columns(row + j, n), n);
            }
    });
}
