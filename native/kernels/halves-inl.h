// Pooling of rows with codebooks of sixteen float16, where an instruction set looks levels up byte by byte
// (looks_halves_up). A row's levels stay float16 until they are added. They wait in memory meanwhile: from there the
// conversion is one operation, and a CPU that looks some sixty vector operations ahead need not wait for a row's codes,
// levels and shuffles.

template <size_t vectors, bool has_last>
struct Halves;   // of the instruction set, or of none

// Rows that have been looked up and not yet added: a power of two.
inline constexpr size_t halves_kept = 8;

inline constexpr float weight_of_one = 1.0f;

// As pool_tile, with or without weights.
template <bool is_clustered, size_t vectors, bool has_last, bool may_prefetch>
[[gnu::noinline]] bool pool_halves(const RowReader& reader, TileJob job) {
    const PackedRows rows = reader.rows;   // a copy, which no store can change
    const SpreadLast<4> last_codes(rows);
    const size_t after_codes = code_bytes(rows.embedding_dim, rows.grid) - job.first_code;
    const uint8_t* const bytes = rows.bytes + job.first_code;
    const uint64_t* const indices = reader.indices;
    const size_t* const starts = reader.starts;
    const size_t last = starts[job.end_bag];
    const bool prefetches = may_prefetch && prefetches_rows(reader, job);
    const uint64_t* const indices_ahead = prefetches ? indices + reader.rows_ahead : indices;
    const size_t last_ahead = prefetches ? reader.num_indices - reader.rows_ahead - 1 : 0;

    Halves<vectors, has_last> kept[halves_kept];
    const auto look_up_row = [&](size_t i) __attribute__((always_inline)) {
        const uint64_t index = indices[i];
        if (index >= rows.num_rows) [[unlikely]] return false;
        const uint8_t* const codes = bytes + index * rows.row_bytes;
        const uint8_t* codebook = codes + after_codes;
        if constexpr (is_clustered) {
            const size_t cluster = cluster_of(rows, index);
            if (cluster >= rows.num_codebooks) [[unlikely]] return false;
            codebook = rows.codebooks + cluster * codebook_bytes({4, true});
        }
        const typename Halves<vectors, has_last>::Levels levels(codebook);
        auto& halves = kept[i % halves_kept];
        halves.look_up(levels, codes);
        if constexpr (has_last) halves.look_last_up(levels, last_codes.read(codes + 8 * vectors));
        return true;
    };

    size_t i = starts[job.first_bag];
    for (size_t k = i, end = smaller(i + halves_kept, last); k < end; k++)
        if (!look_up_row(k)) return false;
    // A sum without weights is one with weights of 1, to the same bits: an addition would take the ports that the
    // conversion needs, a multiply-add takes others (Zen), and there is half as much to compile.
    const float* weight = reader.weights ? reader.weights + i : &weight_of_one;
    const size_t next_weight = reader.weights ? 1 : 0;
    for (size_t bag = job.first_bag; bag < job.end_bag; bag++) {
        Sums<vectors + has_last> sums;
        sums.change([&](size_t v, F32x16) { return load(job.start + 16 * v); });
        if (prefetches)   // as in pool_tile
            unrolled<vectors>([&](size_t v) { __builtin_prefetch(job.to + bags_ahead * job.stride + 16 * v, 1); });
        const size_t rows_of_bag = job.rows_before + starts[bag + 1] - i;
        for (const size_t end = starts[bag + 1]; i < end; i++) {
            if (prefetches) prefetch_row(rows, indices_ahead[smaller(i, last_ahead)]);
            const auto& halves = kept[i % halves_kept];
            const F32x16 factor = splat_at(weight);
            weight += next_weight;
            sums.change([&](size_t v, F32x16 sum) __attribute__((always_inline)) {
                return fma(factor, halves[v], sum);
            });
            // Its levels go where those just added were.
            if (i + halves_kept < last) [[likely]]
                if (!look_up_row(i + halves_kept)) [[unlikely]] return false;
        }
        if (job.ends_bags) [[likely]] sums.finish_bag(reader.bags.pooling, rows_of_bag);
        unrolled<vectors>([&](size_t v) { store(job.to + 16 * v, sums.vector[v]); });
        if constexpr (has_last) store_first(job.to + 16 * vectors, sums.vector[vectors], job.last_columns);
        job.to += job.stride;
    }
    return true;
}
