// Products of trellis-coded rows with vectors (kernels.h: TrellisProducts). Each of the sixteen lanes adds up its
// columns' products, one multiply-add after the other, in ascending order of columns; then the lanes are added by
// halves. That order is the same with every instruction set, and however many vectors there are.

// Adds the products of one block's levels with the vectors of a group. Columns past the last one meet zeros.
template <class Levels, bool is_full, size_t vectors, size_t num_vectors>
[[gnu::always_inline]] inline void add_block_products(const uint8_t* row, const ColumnBlock& block,
                                                      const Levels& levels, const float* values, F32x16* sums) {
    const BlockLookup<slots_of(trellis_lanes * vectors)> block_lookup(block);
    const auto numbers = find_trellis_numbers<is_full, vectors>(row, block, levels);
    const auto levels_of_vector = block_lookup.look_up(levels, block, numbers);
    unrolled<vectors>([&](size_t v) __attribute__((always_inline)) {
        const F32x16 sixteen = levels_of_vector(v);
        unrolled<num_vectors>([&](size_t n) __attribute__((always_inline)) {
            sums[n] = fma(sixteen, load(values + trellis_lanes * (num_vectors * v + n)), sums[n]);
        });
    });
}

// Rows that go through their stripes together: their sums are kept from one to the next.
inline constexpr size_t rows_of_stripes = 128;

// Rows that are prefetched before they are read.
inline constexpr size_t product_rows_ahead = 4;

// Multiplies what follows the full blocks of a row, `left` columns, in the order of lanes that columns have.
template <class Levels, size_t num_vectors>
[[gnu::always_inline]] inline void add_last_products(const uint8_t* row, const ColumnBlock& block, size_t left,
                                                     const Levels& levels, const float* values, F32x16* sums) {
    if (left == 0) return;
    if (slots_of(left) == 1)
        add_block_products<Levels, false, 1, num_vectors>(row, block, levels, values, sums);
    else if (slots_of(left) == 2)
        add_block_products<Levels, false, 2, num_vectors>(row, block, levels, values, sums);
    else
        add_block_products<Levels, false, trellis_vectors, num_vectors>(row, block, levels, values, sums);
}

// The rows first .. end of a table, a stripe of them, and where their products go.
struct TrellisProductJob {
    const PackedRows& rows;
    const TrellisCommon& common;
    size_t first, end;
    const float* vectors;   // of a group, from the stripe's first column on
    float* products;
    size_t stride;
    float* sums;            // of each row and vector, from one stripe to the next

    const uint8_t* row(size_t i) const { return rows.bytes + i * rows.row_bytes; }
    void prefetch(size_t i) const {
        const uint8_t* const ahead = row(i + product_rows_ahead);
        const size_t from = common.is_first() ? 0 : common.blocks[0].first_byte;
        const size_t end = common.is_last() ? rows.row_bytes : common.end_column * common.shape.narrow_bits / 8;
        for (size_t at = from; at < end; at += 64) __builtin_prefetch(ahead + at);
    }
    // A row's sums, which are zeros to begin with.
    template <size_t num_vectors>
    [[gnu::always_inline]] void take(size_t i, F32x16* row_sums) const {
        unrolled<num_vectors>([&](size_t n) __attribute__((always_inline)) { row_sums[n] = splat(0.0f); });
        if (common.is_first()) [[likely]] return;
        const float* const from = sums + trellis_lanes * num_vectors * (i - first);
        unrolled<num_vectors>([&](size_t n) __attribute__((always_inline)) {
            row_sums[n] = load(from + trellis_lanes * n);
        });
    }
    // Keeps them for the next stripe.
    template <size_t num_vectors>
    [[gnu::always_inline]] void keep(size_t i, const F32x16* row_sums) const {
        float* const to = sums + trellis_lanes * num_vectors * (i - first);
        unrolled<num_vectors>([&](size_t n) { store(to + trellis_lanes * n, row_sums[n]); });
    }
    template <size_t num_vectors>
    [[gnu::always_inline]] void put(size_t i, const F32x16* row_sums) const {
        const uint8_t* const scales = rows.codebooks + sizeof(float) * common.shape.first_scale();
        float scale;
        std::memcpy(&scale, scales + sizeof(float) * row(i)[rows.row_bytes - 1], sizeof scale);
        unrolled<num_vectors>([&](size_t n) { products[stride * n + i - first] = scale * add_lanes(row_sums[n]); });
    }
};

template <class Levels, size_t num_vectors>
[[gnu::noinline]] void multiply_levels_by_group(const TrellisProductJob& job) {
    const Levels levels(job.common.levels);
    const size_t num_columns = job.common.end_column - job.common.first_column, row_bytes = job.rows.row_bytes;
    const size_t values_of_block = trellis_block * num_vectors;
    for (size_t i = job.first; i < job.end; i++) {
        const TrellisRow<false> row(job.row(i), row_bytes);
        job.prefetch(i);
        F32x16 sums[num_vectors];
        job.take<num_vectors>(i, sums);
        const ColumnBlock* block = job.common.blocks;
        const float* values = job.vectors;
        if constexpr (!are_made_by_fours<Levels>)   // Of those, rows come here that have no full block.
            for (size_t j = trellis_block; j <= num_columns; j += trellis_block, block++, values += values_of_block)
                add_block_products<Levels, true, trellis_vectors, num_vectors>(row.bytes, *block, levels, values, sums);
        if (!job.common.is_last()) [[unlikely]] {
            job.keep<num_vectors>(i, sums);
            continue;
        }
        add_last_products<Levels, num_vectors>(row.bytes, *block, num_columns % trellis_block, levels, values, sums);
        job.put<num_vectors>(i, sums);
    }
}

// The same where Levels are made by fours of rows, of at least one full block. The sums of some rows are added to in
// turns, or each multiply-add would wait for the one before.
template <class Levels, size_t num_vectors, bool are_wide_late>
[[gnu::noinline]] void multiply_by_fours(const TrellisProductJob& job) {
    using Fours = typename Levels::template Fours<trellis_block, ColumnBlock>;
    constexpr size_t most_blocks = most_stripe_columns / trellis_block, rows_together = group_vectors / num_vectors;
    constexpr size_t values_of_block = trellis_block * num_vectors;
    const TrellisCommon& common = job.common;
    const size_t num_columns = common.end_column - common.first_column;
    const size_t num_blocks = num_columns / trellis_block, left = num_columns % trellis_block;
    const Levels last_levels(common.levels);
    const typename Fours::Tables tables(common.levels);
    Fours fours[most_blocks];
    alignas(64) float own_values[most_blocks * values_of_block];   // in the order of lanes that Fours have
    for (size_t k = 0; k < num_blocks; k++)
        fours[k] = Fours(common.blocks[k], common.shape, common.first_column / trellis_block + k);
    for (size_t at = 0; at < num_blocks * values_of_block; at += trellis_lanes)
        store(own_values + at, Fours::in_own_order(load(job.vectors + at)));
    typename Fours::template Made<4> made[most_blocks];
    for (size_t i = job.first; i < job.end; i += 4) {
        const uint8_t* four[4];
        unrolled<4>([&](size_t r) {
            four[r] = job.row(smaller(i + r, job.end - 1));
            job.prefetch(i + r);
        });
        for (size_t k = 0; k < num_blocks; k++) fours[k].make(four, made[k], 0);
        for (size_t r = 0; r < smaller(4, job.end - i); r += rows_together) {
            F32x16 sums[rows_together][num_vectors];
            unrolled<rows_together>([&](size_t s) __attribute__((always_inline)) {
                job.take<num_vectors>(i + r + s, sums[s]);
            });
            const float* values = own_values;
            for (size_t k = 0; k < num_blocks; k++, values += values_of_block)
                unrolled<rows_together>([&](size_t s) __attribute__((always_inline)) {
                    const auto levels = fours[k].template look_up<are_wide_late>(tables, made[k], r + s);
                    unrolled<trellis_vectors>([&](size_t v) __attribute__((always_inline)) {
                        const F32x16 sixteen = levels(v);
                        unrolled<num_vectors>([&](size_t n) __attribute__((always_inline)) {
                            const float* const from = values + trellis_lanes * (num_vectors * v + n);
                            sums[s][n] = fma(sixteen, load(from), sums[s][n]);
                        });
                    });
                });
            unrolled<rows_together>([&](size_t s) __attribute__((always_inline)) {
                if (i + r + s >= job.end) return;
                if (!common.is_last()) [[unlikely]] return job.keep<num_vectors>(i + r + s, sums[s]);
                unrolled<num_vectors>([&](size_t n) { sums[s][n] = Fours::in_column_order(sums[s][n]); });
                if (left > 0)
                    add_last_products<Levels, num_vectors>(four[r + s], common.blocks[num_blocks], left, last_levels,
                                                           job.vectors + num_blocks * values_of_block, sums[s]);
                job.put<num_vectors>(i + r + s, sums[s]);
            });
        }
    }
}

template <class Levels, size_t num_vectors>
void multiply_group(const TrellisProductJob& job) {
    if constexpr (are_made_by_fours<Levels>) {
        bool are_wide_late = false;
        for (size_t j = job.common.first_column; j < job.common.end_column; j += trellis_block)
            are_wide_late = are_wide_late || job.common.block_at(j)->wide_vectors > 2;
        if (job.rows.embedding_dim >= trellis_block)
            return are_wide_late ? multiply_by_fours<Levels, num_vectors, true>(job)
                                 : multiply_by_fours<Levels, num_vectors, false>(job);
    }
    multiply_levels_by_group<Levels, num_vectors>(job);
}

void multiply_levels(const PackedRows& rows, size_t first, size_t end, const float* vectors, size_t num_vectors,
                     float* products, size_t stride) noexcept {
    const size_t d = rows.embedding_dim, values_of_vector = (d + trellis_block - 1) / trellis_block * trellis_block;
    const size_t rows_at_a_time = d > most_stripe_columns ? rows_of_stripes : end - first;
    alignas(64) float sums[trellis_lanes * group_vectors * rows_of_stripes];
    with_trellis_levels(TrellisShape(d, rows.row_bytes), [&]<class Levels>() {
        for (size_t i = first; i < end; i += rows_at_a_time)
            for (size_t n = 0; n < num_vectors; n += group_vectors)
                for (size_t j = 0; j < d; j += most_stripe_columns) {
                    const TrellisCommon common(rows, j);
                    const size_t group = group_of(num_vectors - n);
                    const float* const values = vectors + n * values_of_vector + j * group;
                    float* const to = products + n * stride + i - first;
                    const TrellisProductJob job{rows,   common, i, smaller(end, i + rows_at_a_time),
                                                values, to,     stride, sums};
                    if (group == 1) multiply_group<Levels, 1>(job);
                    if (group == 2) multiply_group<Levels, 2>(job);
                    if (group == group_vectors) multiply_group<Levels, group_vectors>(job);
                }
    });
}
