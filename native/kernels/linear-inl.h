// Products of rows with vectors (kernels.h: WordRows). Each of the sixteen lanes adds up its products, one multiply-add
// after the other in the order in which a row's words and their codes come; then the lanes are added by halves. That
// order is the same however many rows and vectors there are at a time, which only registers decide.

// Sixteen codes, the k-th of each word, times 2^(bits * k).
template <int bits>
[[gnu::always_inline]] inline F32x16 take_codes(I32x16 words, size_t k) {
    constexpr int top = 32 - bits;
    if (k == 32 / bits - 1) return to_float(shift_right(words, top));
    return to_float(and_int(words, splat_int(((1 << bits) - 1) << (static_cast<size_t>(bits) * k))));
}

// Groups of rows that are prefetched before they are read.
inline constexpr size_t groups_ahead = 2;

// Products of a few rows with a group of vectors.
template <int bits, size_t num_rows, size_t num_vectors>
[[gnu::noinline]] void multiply_few(const WordRows& rows, const uint8_t* const* row, const float* values,
                                    float* const* to, size_t stride) {
    // Rows are read once, from first to last. The CPU prefetches such a run by itself, but stops where a page ends.
    const size_t ahead = groups_ahead * num_rows * rows.row_bytes;
    F32x16 sums[num_rows][num_vectors];
    unrolled<num_rows>([&](size_t r) { unrolled<num_vectors>([&](size_t v) { sums[r][v] = splat(0.0f); }); });
    for (size_t window = 0; window < rows.num_windows; window++) {
        const size_t at = window + 1 < rows.num_windows ? window_bytes_of_product * window : rows.last_window;
        const auto add_products = [&](const auto& factor) __attribute__((always_inline)) {
            F32x16 of_vectors[num_vectors];
            unrolled<num_vectors>([&](size_t v) { of_vectors[v] = load(values + 16 * v); });
            values += 16 * num_vectors;
            unrolled<num_rows>([&](size_t r) __attribute__((always_inline)) {
                const F32x16 of_row = factor(r);
                unrolled<num_vectors>([&](size_t v) { sums[r][v] = fma(of_row, of_vectors[v], sums[r][v]); });
            });
        };
        if constexpr (bits == 32) {
            add_products([&](size_t r) { return load(reinterpret_cast<const float*>(row[r] + at)); });
        } else {
            I32x16 words[num_rows];
            unrolled<num_rows>([&](size_t r) {
                words[r] = load_words(row[r] + at);
                __builtin_prefetch(row[r] + at + ahead);
            });
            unrolled<32 / bits>([&](size_t k) __attribute__((always_inline)) {
                add_products([&](size_t r) { return take_codes<bits>(words[r], k); });
            });
        }
    }
    unrolled<num_rows>([&](size_t r) {
        unrolled<num_vectors>([&](size_t v) { to[r][stride * v] = add_lanes(sums[r][v]); });
    });
}

template <int bits, size_t num_vectors>
void multiply_by_group(const WordRows& rows, const float* values, float* products, size_t stride) {
    constexpr size_t at_a_time = product_sums > num_vectors ? product_sums / num_vectors : 1;
    for (size_t first = 0; first < rows.num_rows; first += at_a_time) {
        const uint8_t* row[at_a_time];
        float* to[at_a_time];
        for (size_t r = 0; r < at_a_time; r++) {   // past the last row, it is computed again
            const size_t i = smaller(first + r, rows.num_rows - 1);
            row[r] = rows.bytes + i * rows.row_bytes;
            to[r] = products + i;
        }
        multiply_few<bits, at_a_time, num_vectors>(rows, row, values, to, stride);
    }
}

template <int bits>
void multiply_by_groups(const WordRows& rows, const float* vectors, size_t num_vectors, float* products,
                        size_t stride) {
    const size_t values_of_vector = rows.num_windows * (32 / bits) * 16;
    for (size_t first = 0; first < num_vectors; first += group_vectors) {
        const size_t group = group_of(num_vectors - first);
        if (group == 1) multiply_by_group<bits, 1>(rows, vectors, products, stride);
        if (group == 2) multiply_by_group<bits, 2>(rows, vectors, products, stride);
        if (group == group_vectors) multiply_by_group<bits, group_vectors>(rows, vectors, products, stride);
        vectors += group * values_of_vector;
        products += group * stride;
    }
}

void multiply_words(const WordRows& rows, const float* vectors, size_t num_vectors, float* products,
                    size_t stride) noexcept {
    if (rows.bits == 2) return multiply_by_groups<2>(rows, vectors, num_vectors, products, stride);
    if (rows.bits == 4) return multiply_by_groups<4>(rows, vectors, num_vectors, products, stride);
    if (rows.bits == 8) return multiply_by_groups<8>(rows, vectors, num_vectors, products, stride);
    multiply_by_groups<32>(rows, vectors, num_vectors, products, stride);
}

// Rows whose sums, and a column of the panel, fill the registers.
inline constexpr size_t panel_rows = product_sums * 3 / 2;

void multiply_panel(const ValueRows& rows, const float* panel, float* sums) noexcept {
    for (size_t first = 0; first < rows.num_rows; first += panel_rows) {
        const float* row[panel_rows];
        float* to[panel_rows];
        F32x16 sum[panel_rows];
        unrolled<panel_rows>([&](size_t r) {   // past the last row, it is computed again
            const size_t i = smaller(first + r, rows.num_rows - 1);
            row[r] = rows.values + i * rows.stride;
            to[r] = sums + 16 * i;
            sum[r] = load(to[r]);
        });
        const size_t num_columns = rows.num_columns;
        for (size_t j = 0; j < num_columns; j++) {
            const F32x16 of_vectors = load(panel + 16 * j);
            unrolled<panel_rows>([&](size_t r) { sum[r] = fma(splat_at(row[r] + j), of_vectors, sum[r]); });
        }
        unrolled<panel_rows>([&](size_t r) { store(to[r], sum[r]); });
    }
}
