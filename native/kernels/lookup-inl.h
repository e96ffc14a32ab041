// Reading packed rows: gather and pool. A bag adds its rows' levels in index order, each column by itself.

// What a few dozen rows need before their codes are read: all that costs the same for a row of any width, in loops that
// keep many cache misses in flight and work on many rows at once.
inline constexpr size_t prepared_rows = 64;

struct Prepared {
    alignas(64) float params[2 * prepared_rows];   // uniform: scale and bias of each row
    alignas(64) uint16_t half_params[2 * prepared_rows] = {};
    const uint8_t* codes[prepared_rows];
    const uint8_t* codebooks[prepared_rows] = {};
    float weights[prepared_rows] = {};
};

// Where rows come from: indices[i], of either width, or i itself.
struct OwnNumbers {
    int64_t at(size_t i) const { return static_cast<int64_t>(i); }
};
template <class Index>
struct GivenNumbers {
    const Index* indices;
    int64_t at(size_t i) const { return indices[i]; }
};

template <class Use>
inline void with_numbers(const Integers& indices, Use use) {
    if (!indices.values) return use(OwnNumbers{});
    if (indices.are_64_bits) return use(GivenNumbers<int64_t>{static_cast<const int64_t*>(indices.values)});
    use(GivenNumbers<int32_t>{static_cast<const int32_t*>(indices.values)});
}

// An address for the cache, never for a load: the index has not been checked yet.
inline uintptr_t address_of_row(const PackedRows& rows, int64_t index) {
    return reinterpret_cast<uintptr_t>(rows.bytes) + static_cast<uint64_t>(index) * rows.row_bytes;
}

// Into the second-level cache: the first has little room for what is not needed yet.
inline void prefetch_row(uintptr_t row, size_t row_bytes) {
    for (size_t at = 0; at < row_bytes; at += 64) __builtin_prefetch(reinterpret_cast<const void*>(row + at), 0, 2);
    __builtin_prefetch(reinterpret_cast<const void*>(row + row_bytes - 1), 0, 2);
}

// Lines to be written compete with rows for the few that can be under way; asked for late, they wait longest.
inline void prefetch_output(const Output& out, size_t row, size_t d) {
    const uintptr_t values = reinterpret_cast<uintptr_t>(out.values) + row * out.row_bytes;
    const size_t width = d * value_bytes(out.type);
    for (size_t at = 0; at < width; at += 64) __builtin_prefetch(reinterpret_cast<const void*>(values + at), 1);
}
inline constexpr size_t bags_ahead = 4;

// Finds `count` rows from position `first` on. Faults are noted; a row at fault is replaced by row 0.
template <class Numbers>
[[gnu::always_inline]] inline void find_rows(const PackedRows& rows, Numbers numbers, size_t first, size_t count,
                                             const uint8_t** __restrict found, LookupFault& fault) {
    const uint64_t num_rows = rows.num_rows;
    const PackedRows local = rows;   // which no store to `found` can change
    uint64_t highest = 0;            // Without a branch, the loop works on many at once.
    for (size_t i = 0; i < count; i++) {
        const int64_t index = numbers.at(first + i);
        highest = static_cast<uint64_t>(index) > highest ? static_cast<uint64_t>(index) : highest;
        found[i] = reinterpret_cast<const uint8_t*>(address_of_row(local, index));
    }
    if (highest < num_rows) [[likely]] return;
    for (size_t i = 0; i < count; i++) {
        if (static_cast<uint64_t>(numbers.at(first + i)) < num_rows) continue;
        fault.note(first + i, LookupFault::outside);
        found[i] = rows.bytes;
    }
}

// The codebook of a row by its cluster; the first one, and a fault, if there is none.
inline const uint8_t* find_codebook(const PackedRows& rows, int64_t index, size_t position, LookupFault& fault) {
    const size_t row = static_cast<uint64_t>(index) < rows.num_rows ? static_cast<size_t>(index) : 0;
    size_t cluster = cluster_of(rows, row);
    if (cluster >= rows.num_codebooks) [[unlikely]] {
        fault.note(position, LookupFault::no_codebook);
        cluster = 0;
    }
    return rows.codebooks + cluster * codebook_bytes(rows.grid);
}

// Finds scale and bias, or the codebook, of the rows whose codes have been found.
template <class Numbers>
[[gnu::always_inline]] inline void find_levels(const PackedRows& rows, Numbers numbers, size_t first, size_t count,
                                               Prepared& prepared, LookupFault& fault) {
    const size_t after_codes = code_bytes(rows.embedding_dim, rows.grid);
    if (rows.layout == Layout::codebook) {
        for (size_t i = 0; i < count; i++) prepared.codebooks[i] = prepared.codes[i] + after_codes;
    } else if (rows.layout == Layout::clustered) {
        for (size_t i = 0; i < count; i++)
            prepared.codebooks[i] = find_codebook(rows, numbers.at(first + i), first + i, fault);
    } else if (rows.grid.f16_params) {
#pragma GCC unroll 8
        for (size_t i = 0; i < count; i++) std::memcpy(prepared.half_params + 2 * i, prepared.codes[i] + after_codes, 4);
        for (size_t i = 0; i < 2 * count; i += 16) store(prepared.params + i, load_f16(prepared.half_params + i));
    } else {
        for (size_t i = 0; i < count; i++) std::memcpy(prepared.params + 2 * i, prepared.codes[i] + after_codes, 8);
    }
}

struct Bag {
    size_t start, end;    // of its indices
    size_t number;        // row of the output
    Pooling pooling;
};

// Some of the prepared rows.
struct Span {
    size_t first, end;
};

// Calls use(i, levels) for each prepared row of a span.
template <int bits, class Use>
[[gnu::always_inline]] inline void for_prepared(const PackedRows& rows, const Prepared& prepared, Span span, Use use) {
    if (rows.layout == Layout::uniform) {
        const GridReader<bits> read_grid;
        for (size_t i = span.first; i < span.end; i++) use(i, read_grid(prepared.params + 2 * i));
    } else if (rows.grid.f16_params) {
        for (size_t i = span.first; i < span.end; i++) use(i, codebook_levels<bits>(prepared.codebooks[i], true));
    } else {
        for (size_t i = span.first; i < span.end; i++) use(i, codebook_levels<bits>(prepared.codebooks[i], false));
    }
}

// To bfloat16, nearest, ties to even; NaN stays NaN.
inline void store_bf16(uint16_t* p, const float* values, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        std::memcpy(&bits, values + i, 4);
        const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
        const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
        p[i] = static_cast<uint16_t>((is_nan ? bits | 0x400000u : rounded) >> 16);
    }
}

// Columns j .. j + n of a row of the output.
inline void store_values(const Output& out, size_t row, size_t j, F32x16 values, size_t n) {
    uint8_t* const to = out.values + row * out.row_bytes;
    if (out.type == ValueType::f32) {
        float* const wide = reinterpret_cast<float*>(to) + j;
        return n == 16 ? store(wide, values) : store_first(wide, values, n);
    }
    uint16_t narrow[16];
    if (out.type == ValueType::f16) {
        store_f16(narrow, values);
    } else {
        float wide[16];
        store(wide, values);
        store_bf16(narrow, wide, 16);
    }
    std::memcpy(to + 2 * j, narrow, 2 * n);
}

// Reads a run of rows, some of them at a time.
struct RowReader {
    const PackedRows& rows;
    const Integers& indices;
    const float* weights;
    const int64_t padding_index;
    const size_t end;          // of the run
    const bool prefetches;
    LookupFault& fault;
    size_t prefetched;         // rows up to this position
    // The positions that have been prepared. Rows that are padding are left out; without padding, the row at position i
    // is prepared as number i - start.
    size_t start = 0, stop = 0, count = 0;
    Prepared prepared;

    RowReader(const PackedRows& rows, const Integers& indices, const float* weights, int64_t padding_index,
              bool prefetches, size_t first, size_t end, LookupFault& fault)
        : rows(rows),
          indices(indices),
          weights(weights),
          padding_index(padding_index),
          end(end),
          prefetches(prefetches),
          fault(fault),
          prefetched(first) {}

    // Prepares rows from position `from` on, up to `until` at most.
    [[gnu::noinline]] void prepare(size_t from, size_t until) {
        start = from;
        stop = until - from < prepared_rows ? until : from + prepared_rows;
        with_numbers(indices, [&](auto numbers) {
            if (prefetches) {   // The rows after these, which arrive while these are read.
                const size_t last = end - stop < prepared_rows ? end : stop + prepared_rows;
                for (; prefetched < last; prefetched++)
                    prefetch_row(address_of_row(rows, numbers.at(prefetched)), rows.row_bytes);
            }
            // Mostly there are as many as can be. Loops that then always run as often cost no mispredicted branch.
            if (stop - start == prepared_rows) {
                find_rows(rows, numbers, start, prepared_rows, prepared.codes, fault);
                find_levels(rows, numbers, start, prepared_rows, prepared, fault);
            } else {
                find_rows(rows, numbers, start, stop - start, prepared.codes, fault);
                find_levels(rows, numbers, start, stop - start, prepared, fault);
            }
        });
        count = stop - start;
        if (weights) std::memcpy(prepared.weights, weights + start, count * sizeof(float));
        if (padding_index != no_padding) leave_padding_out();
    }

    // The rows of a bag of at most prepared_rows indices.
    Span hold(const Bag& bag) {
        if (padding_index != no_padding) {
            if (start != bag.start || stop != bag.end) prepare(bag.start, bag.end);
            return {0, count};
        }
        // Those of the next bags are prepared along with them.
        if (bag.start < start || bag.end > stop) prepare(bag.start, end);
        return {bag.start - start, bag.end - start};
    }

    void leave_padding_out() {
        size_t kept = 0;
        for (size_t i = 0; i < count; i++) {
            prepared.codes[kept] = prepared.codes[i];
            prepared.codebooks[kept] = prepared.codebooks[i];
            std::memmove(prepared.params + 2 * kept, prepared.params + 2 * i, 2 * sizeof(float));
            prepared.weights[kept] = prepared.weights[i];
            kept += indices[start + i] != padding_index;
        }
        count = kept;
    }
};

template <int bits>
inline void store_prepared(const RowReader& reader, const Output& out) {
    const size_t d = reader.rows.embedding_dim;
    const Spread<bits> spread;
    const SpreadLast<bits> spread_last(reader.rows);
    for_prepared<bits>(reader.rows, reader.prepared, {0, reader.count}, [&](size_t i, const auto& levels) {
        const uint8_t* codes = reader.prepared.codes[i];
        size_t j = 0;
        for (; j + 16 <= d; j += 16, codes += 2 * bits)
            store_values(out, reader.start + i, j, in_column_order<bits>(levels(spread(codes))), 16);
        if (j < d) store_values(out, reader.start + i, j, in_column_order<bits>(levels(spread_last(codes))), d - j);
    });
}

void gather_rows(const PackedRows& rows, const Integers& indices, bool prefetches, size_t first, size_t end,
                 const Output& out, LookupFault& fault) noexcept {
    RowReader reader(rows, indices, nullptr, no_padding, prefetches, first, end, fault);
    for (size_t i = first; i < end; i = reader.stop) {
        reader.prepare(i, end);
        if (rows.grid.bits == 2)
            store_prepared<2>(reader, out);
        else if (rows.grid.bits == 4)
            store_prepared<4>(reader, out);
        else
            store_prepared<8>(reader, out);
    }
}

// How a row's levels join those before.
struct AddLevels {
    static F32x16 start() { return splat(0.0f); }
    AddLevels(const Prepared&, size_t) {}
    F32x16 operator()(F32x16 so_far, F32x16 levels) const { return add(so_far, levels); }
};
struct AddWeightedLevels {
    F32x16 weight;

    static F32x16 start() { return splat(0.0f); }
    AddWeightedLevels(const Prepared& prepared, size_t i) : weight(splat(prepared.weights[i])) {}
    F32x16 operator()(F32x16 so_far, F32x16 levels) const { return fma(weight, levels, so_far); }
};
struct KeepLargestLevels {
    static F32x16 start() { return splat(-__builtin_inff()); }
    KeepLargestLevels(const Prepared&, size_t) {}
    F32x16 operator()(F32x16 so_far, F32x16 levels) const { return max(levels, so_far); }
};

// Calls use(0) .. use(n - 1), written out: GCC keeps the vectors of an array in registers only if no variable is ever
// its index.
template <size_t n, class Use>
[[gnu::always_inline]] inline void unrolled(const Use& use) {
    if constexpr (n > 0) {
        unrolled<n - 1>(use);
        use(n - 1);
    }
}

template <size_t vectors>
struct Sums {
    F32x16 vector[vectors];

    template <class Change>
    [[gnu::always_inline]] inline void change(const Change& change) {
        unrolled<vectors>([&](size_t v) { vector[v] = change(v, vector[v]); });
    }
    // One by one: as one piece, they would be kept in memory.
    [[gnu::always_inline]] inline void copy_from(const Sums& other) {
        unrolled<vectors>([&](size_t v) { vector[v] = other.vector[v]; });
    }
};

template <int bits, class Join, size_t vectors, class SpreadCodes>
[[gnu::always_inline]] inline void add_prepared(const RowReader& reader, Span span, size_t first_code,
                                                const SpreadCodes& spread, Sums<vectors>& sums) {
    const auto add_row = [&](size_t i, const auto& levels) __attribute__((always_inline)) {
        const Join join(reader.prepared, i);
        const uint8_t* codes = reader.prepared.codes[i] + first_code;
        asm("" : "+r"(codes));   // One address and constant distances: GCC would keep a register for each vector.
        sums.change([&](size_t v, F32x16 sum) __attribute__((always_inline)) {
            return join(sum, levels(spread(codes + 2 * bits * v)));
        });
    };
    for_prepared<bits>(reader.rows, reader.prepared, span, add_row);
}

// For bags of more rows than can be prepared at once; returns how many count.
template <int bits, class Join, size_t vectors, class SpreadCodes>
[[gnu::noinline]] size_t add_long_bag(RowReader& reader, const Bag& bag, size_t first_code, const SpreadCodes& spread,
                                      Sums<vectors>& all) {
    size_t count = 0;
    for (size_t i = bag.start; i < bag.end; i = reader.stop) {
        reader.prepare(i, bag.end);
        Sums<vectors> sums;
        sums.copy_from(all);
        add_prepared<bits, Join>(reader, {0, reader.count}, first_code, spread, sums);
        all.copy_from(sums);
        count += reader.count;
    }
    return count;
}

// Pools `vectors` times sixteen columns from column j on, in registers; the last vector may have fewer.
template <int bits, class Join, size_t vectors, class SpreadCodes>
inline void pool_columns(RowReader& reader, const Bag& bag, size_t j, const Output& out, const SpreadCodes& spread) {
    const size_t first_code = j / 8 * bits;
    size_t count;
    Sums<vectors> sums;
    sums.change([](size_t, F32x16) { return Join::start(); });
    if (bag.end - bag.start <= prepared_rows) [[likely]] {
        const Span span = reader.hold(bag);
        add_prepared<bits, Join>(reader, span, first_code, spread, sums);
        count = span.end - span.first;
    } else {
        Sums<vectors> in_memory;
        in_memory.copy_from(sums);
        count = add_long_bag<bits, Join>(reader, bag, first_code, spread, in_memory);
        sums.copy_from(in_memory);
    }
    sums.change([](size_t, F32x16 sum) { return in_column_order<bits>(sum); });
    if (bag.pooling == Pooling::mean) {
        const F32x16 divisor = splat(static_cast<float>(count));
        sums.change([&](size_t, F32x16 sum) { return div(sum, divisor); });
    }
    if (count == 0) sums.change([](size_t, F32x16) { return splat(0.0f); });
    const size_t left = reader.rows.embedding_dim - j;
    if (out.type == ValueType::f32 && left >= 16) [[likely]] {
        float* const to = reinterpret_cast<float*>(out.values + bag.number * out.row_bytes) + j;
        unrolled<vectors>([&](size_t v) { store(to + 16 * v, sums.vector[v]); });
    } else {
        Sums<vectors> in_memory;
        in_memory.copy_from(sums);
        for (size_t v = 0; v < vectors; v++)
            store_values(out, bag.number, j + 16 * v, in_memory.vector[v], left < 16 ? left : 16);
    }
}

// Pools from column j on, in tiles of that many vectors, then of half as many, and so on.
template <int bits, class Join, size_t vectors>
inline void pool_tiles(RowReader& reader, const Bag& bag, size_t j, const Output& out) {
    const size_t d = reader.rows.embedding_dim;
    for (; j + 16 * vectors <= d; j += 16 * vectors)
        pool_columns<bits, Join, vectors>(reader, bag, j, out, Spread<bits>());
    if constexpr (vectors > 1) {
        pool_tiles<bits, Join, vectors / 2>(reader, bag, j, out);
    } else if (j < d) {
        pool_columns<bits, Join, 1>(reader, bag, j, out, SpreadLast<bits>(reader.rows));
    }
}

template <int bits, class Join>
inline void pool_bags_by(RowReader& reader, const Bags& bags, size_t first, size_t end, const Output& out) {
    Bag bag{0, bags.start(first), first, bags.pooling};
    for (; bag.number < end; bag.number++) {
        bag.start = bag.end;
        bag.end = bags.start(bag.number + 1);
        if (reader.prefetches) prefetch_output(out, bag.number + bags_ahead, reader.rows.embedding_dim);
        pool_tiles<bits, Join, most_sums>(reader, bag, 0, out);
    }
}

template <int bits>
inline void pool_bags_of(RowReader& reader, const Bags& bags, size_t first, size_t end, const Output& out) {
    if (bags.pooling == Pooling::max) return pool_bags_by<bits, KeepLargestLevels>(reader, bags, first, end, out);
    if (bags.per_sample_weights) return pool_bags_by<bits, AddWeightedLevels>(reader, bags, first, end, out);
    pool_bags_by<bits, AddLevels>(reader, bags, first, end, out);
}

void pool_bags(const PackedRows& rows, const Bags& bags, size_t first, size_t end, const Output& out,
               LookupFault& fault) noexcept {
    RowReader reader(rows, bags.indices, bags.per_sample_weights, bags.padding_index, bags.prefetches,
                     bags.start(first), bags.start(end), fault);
    if (rows.grid.bits == 2) return pool_bags_of<2>(reader, bags, first, end, out);
    if (rows.grid.bits == 4) return pool_bags_of<4>(reader, bags, first, end, out);
    pool_bags_of<8>(reader, bags, first, end, out);
}
