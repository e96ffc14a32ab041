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

// Rows that are prefetched before they are read.
inline constexpr size_t product_rows_ahead = 4;

template <class Levels, size_t num_vectors>
[[gnu::noinline]] void multiply_levels_by_group(const PackedRows& rows, const TrellisCommon& common, size_t first,
                                                size_t end, const float* vectors, float* products, size_t stride) {
    const Levels levels(common.levels);
    const size_t d = rows.embedding_dim, row_bytes = rows.row_bytes, values_of_block = trellis_block * num_vectors;
    const uint8_t* const scales = rows.codebooks + sizeof(float) * common.shape.first_scale();
    for (size_t i = first; i < end; i++) {
        const uint8_t* const bytes = rows.bytes + i * row_bytes;
        const TrellisRow<false> row(bytes, row_bytes);
        for (size_t at = 0; at < row_bytes; at += 64) __builtin_prefetch(bytes + row_bytes * product_rows_ahead + at);
        F32x16 sums[num_vectors];
        unrolled<num_vectors>([&](size_t n) { sums[n] = splat(0.0f); });
        const ColumnBlock* block = common.blocks;
        const float* values = vectors;
        for (size_t j = trellis_block; j <= d; j += trellis_block, block++, values += values_of_block)
            add_block_products<Levels, true, trellis_vectors, num_vectors>(row.bytes, *block, levels, values, sums);
        const size_t left = d % trellis_block;
        if (left > 0 && slots_of(left) == 1)
            add_block_products<Levels, false, 1, num_vectors>(row.bytes, *block, levels, values, sums);
        else if (left > 0 && slots_of(left) == 2)
            add_block_products<Levels, false, 2, num_vectors>(row.bytes, *block, levels, values, sums);
        else if (left > 0)
            add_block_products<Levels, false, trellis_vectors, num_vectors>(row.bytes, *block, levels, values, sums);
        float scale;
        std::memcpy(&scale, scales + sizeof(float) * bytes[row_bytes - 1], sizeof scale);
        unrolled<num_vectors>([&](size_t n) { products[stride * n + i - first] = scale * add_lanes(sums[n]); });
    }
}

void multiply_levels(const PackedRows& rows, size_t first, size_t end, const float* vectors, size_t num_vectors,
                     float* products, size_t stride) noexcept {
    const TrellisCommon common(rows);
    const size_t values_of_vector = (rows.embedding_dim + trellis_block - 1) / trellis_block * trellis_block;
    with_trellis_levels(common.shape, [&]<class Levels>() {
        for (size_t n = 0; n < num_vectors; n += group_vectors) {
            const size_t group = group_of(num_vectors - n);
            const float* const values = vectors + n * values_of_vector;
            float* const to = products + n * stride;
            if (group == 1) multiply_levels_by_group<Levels, 1>(rows, common, first, end, values, to, stride);
            if (group == 2) multiply_levels_by_group<Levels, 2>(rows, common, first, end, values, to, stride);
            if (group == group_vectors)
                multiply_levels_by_group<Levels, group_vectors>(rows, common, first, end, values, to, stride);
        }
    });
}
