// Reading packed rows: gather and pool. A bag adds its rows' levels in index order, each column by itself.

inline constexpr size_t within(size_t x, size_t least, size_t most) { return smaller(x < least ? least : x, most); }
// The largest power of two that is not above x; 0 for 0.
inline constexpr size_t largest_power_within(size_t x) {
    size_t power = x > 0;
    while (power <= x / 2 && power > 0) power *= 2;
    return power;
}

// To the second-level cache, which takes many more lines at a time than the first. An index has not been checked when
// its row is prefetched, but an address that is only for the cache may be any.
inline void prefetch_row(const PackedRows& rows, uint64_t index) {
    const uintptr_t row = reinterpret_cast<uintptr_t>(rows.bytes) + index * rows.row_bytes;
    const auto prefetch = [row](size_t at) { __builtin_prefetch(reinterpret_cast<const void*>(row + at), 0, 2); };
    prefetch(0);
    for (size_t at = 64; at < rows.row_bytes; at += 64) [[unlikely]] prefetch(at);
    prefetch(rows.row_bytes - 1);
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
inline void store_values(uint8_t* to, ValueType type, size_t j, F32x16 values, size_t n) {
    if (type == ValueType::f32) {
        float* const wide = reinterpret_cast<float*>(to) + j;
        return n == 16 ? store(wide, values) : store_first(wide, values, n);
    }
    uint16_t narrow[16];
    if (type == ValueType::f16) {
        store_f16(narrow, values);
    } else {
        float wide[16];
        store(wide, values);
        store_bf16(narrow, wide, 16);
    }
    std::memcpy(to + 2 * j, narrow, 2 * n);
}

// Rows that are read more than once, tile by tile, are read a window at a time, which stays in the first-level cache.
// So are those whose indices are not there as they have to be. Otherwise a window has no end.
inline constexpr size_t most_window_rows = 256, least_window_rows = 16;
inline constexpr size_t window_bytes = size_t{1} << 15;
inline constexpr size_t most_window_bags = 256;

// Rows are prefetched so far ahead of those that are read: enough to be there in time, few enough to be there still.
inline constexpr size_t most_rows_ahead = 96, least_rows_ahead = 16;
inline constexpr size_t bytes_ahead = size_t{1} << 13;

struct TrellisLookup;

// Reads a run of rows, a window of some of them at a time.
struct RowReader {
    const PackedRows& rows;
    const Bags& bags;
    const size_t end;            // of the run
    LookupFault& fault;
    const bool reads_in_place;   // indices, which are as they have to be
    const size_t window_rows;    // at most
    const size_t rows_ahead;
    // The window: rows, without those that are padding, what they are multiplied by, and where bags start among them
    // and the last one ends.
    const uint64_t* indices = nullptr;
    const float* weights = nullptr;
    size_t starts[most_window_bags + 1];
    const TrellisLookup* trellis = nullptr;   // of trellis-coded rows
    size_t num_indices = 0;      // with those after the window that are known already
    uint64_t own_indices[most_window_rows + most_rows_ahead];
    float own_weights[most_window_rows];

    RowReader(const PackedRows& rows, const Bags& bags, size_t first, size_t end, bool are_read_once,
              LookupFault& fault)
        : rows(rows),
          bags(bags),
          end(end),
          fault(fault),
          reads_in_place(bags.indices.values && bags.indices.are_64_bits && bags.padding_index == no_padding),
          window_rows(reads_in_place && are_read_once
                          ? SIZE_MAX
                          : within(window_bytes / rows.row_bytes, least_window_rows, most_window_rows)),
          rows_ahead(within(bytes_ahead / rows.row_bytes, least_rows_ahead, most_rows_ahead)) {
        if (!bags.prefetches) return;
        const size_t first_ones = smaller(end - first, rows_ahead);
        for (size_t i = 0; i < first_ones; i++) prefetch_row(rows, index_at(first + i));
    }

    uint64_t index_at(size_t position) const {
        return bags.indices.values ? static_cast<uint64_t>(bags.indices[position]) : position;
    }
    bool is_padding(uint64_t index) const {
        return bags.padding_index != no_padding && index == static_cast<uint64_t>(bags.padding_index);
    }

    // The end of a window that starts at `first` and may not go further than `last`.
    size_t end_of_window(size_t first, size_t last) const {
        return last - first < window_rows ? last : first + window_rows;
    }

    // Opens a window on positions first .. last, which are bags that start where `starts` says.
    [[gnu::noinline]] void open(size_t first, size_t last, size_t num_bags) {
        weights = bags.per_sample_weights ? bags.per_sample_weights + first : nullptr;
        if (reads_in_place) {
            indices = static_cast<const uint64_t*>(bags.indices.values) + first;
            num_indices = end - first;
            return;
        }
        indices = own_indices;
        num_indices = last - first;
        for (size_t i = first; i < last; i++) own_indices[i - first] = index_at(i);
        if (bags.padding_index != no_padding) num_indices = leave_padding_out(num_bags);
        if (!bags.prefetches) return;
        const size_t known = smaller(end - last, rows_ahead);
        for (size_t i = 0; i < known; i++) own_indices[num_indices + i] = index_at(last + i);
        num_indices += known;
    }

    // Opens a window on bags from `first` on and returns how many; none, if the first has too many rows.
    size_t open_bags(size_t first, size_t last) {
        const size_t start = bags.start(first), most = smaller(last - first, most_window_bags);
        size_t count = 0;
        starts[0] = 0;
        for (; count < most; count++) {
            starts[count + 1] = bags.start(first + count + 1) - start;
            if (starts[count + 1] > window_rows) break;
        }
        if (count > 0) open(start, start + starts[count], count);
        return count;
    }

    size_t leave_padding_out(size_t num_bags) {
        size_t kept = 0, i = 0;
        for (size_t bag = 0; bag < num_bags; bag++) {
            for (; i < starts[bag + 1]; i++) {
                own_indices[kept] = own_indices[i];
                if (weights) own_weights[kept] = weights[i];
                kept += !is_padding(own_indices[i]);
            }
            starts[bag + 1] = kept;
        }
        if (weights) weights = own_weights;
        return kept;
    }

    // Notes the first fault of a run in which there is one.
    [[gnu::noinline]] void note_fault(size_t first) {
        for (size_t i = first; i < end; i++) {
            const uint64_t index = index_at(i);
            if (is_padding(index)) continue;
            if (index >= rows.num_rows) return fault.note(i, LookupFault::outside);
            if (!has_codebook(rows, index)) return fault.note(i, LookupFault::no_codebook);
        }
    }
};

template <int bits>
inline void store_rows(RowReader& reader, size_t first, const Output& out) {
    const PackedRows rows = reader.rows;
    const size_t d = rows.embedding_dim, rows_ahead = reader.rows_ahead;
    const bool prefetches = reader.bags.prefetches;
    const Spread<bits> spread;
    const SpreadLast<bits> spread_last(rows);
    with_levels<bits>(rows, [&]<class ReadLevels>(Type<ReadLevels>) {
        ReadLevels read_levels(rows, 0);
        for (size_t stop; first < reader.end; first = stop) {
            stop = reader.end_of_window(first, reader.end);
            reader.open(first, stop, 0);
            const uint64_t* const indices = reader.indices;
            for (size_t i = first; i < stop; i++) {
                const uint64_t index = indices[i - first];
                if (index >= rows.num_rows) [[unlikely]] return reader.note_fault(i);
                const uint8_t* codes = rows.bytes + index * rows.row_bytes;
                typename ReadLevels::Kept kept;
                if (!read_levels.read(codes, index, i, kept)) [[unlikely]] return reader.note_fault(i);
                const auto levels = kept.open();
                if (prefetches) prefetch_row(rows, indices[smaller(i - first + rows_ahead, reader.num_indices - 1)]);
                uint8_t* const to = out.values + i * out.row_bytes;
                size_t j = 0;
                for (; j + 16 <= d; j += 16, codes += 2 * bits)
                    store_values(to, out.type, j, in_column_order<bits>(levels(spread(codes))), 16);
                if (j < d) store_values(to, out.type, j, in_column_order<bits>(levels(spread_last(codes))), d - j);
            }
        }
    });
}

// So many sums, in vectors, are added up in registers: a tile of the columns.
inline constexpr size_t most_tile_values = 16 * (most_sums < most_trellis_sums ? most_trellis_sums : most_sums);

struct TileValues {
    float values[most_tile_values];
};
inline constexpr TileValues filled_with(float value) {
    TileValues filled{};
    for (float& each : filled.values) each = value;
    return filled;
}

// How a row's levels join those before.
struct AddLevels {
    static constexpr auto start = filled_with(0.0f);
    AddLevels(const float*, size_t) {}
    F32x16 operator()(F32x16 so_far, F32x16 levels) const { return add(so_far, levels); }
};
struct AddWeightedLevels {
    F32x16 weight;

    static constexpr auto start = filled_with(0.0f);
    AddWeightedLevels(const float* weights, size_t i) : weight(splat(weights[i])) {}
    F32x16 operator()(F32x16 so_far, F32x16 levels) const { return fma(weight, levels, so_far); }
};
struct KeepLargestLevels {
    static constexpr auto start = filled_with(-__builtin_inff());
    KeepLargestLevels(const float*, size_t) {}
    F32x16 operator()(F32x16 so_far, F32x16 levels) const { return max(levels, so_far); }
};

template <size_t vectors>
struct Sums {
    F32x16 vector[vectors];

    template <class Change>
    [[gnu::always_inline]] inline void change(const Change& change) {
        unrolled<vectors>([&](size_t v) { vector[v] = change(v, vector[v]); });
    }
    // Makes of what was added up what a bag of so many rows comes to.
    [[gnu::always_inline]] inline void finish_bag(Pooling pooling, size_t rows_of_bag) {
        if (pooling == Pooling::mean) {
            const F32x16 divisor = splat(static_cast<float>(rows_of_bag));
            change([&](size_t, F32x16 sum) { return div(sum, divisor); });
        }
        if (rows_of_bag == 0) [[unlikely]] change([](size_t, F32x16) { return splat(0.0f); });
    }
};

// Columns that are pooled together: `vectors` times sixteen, and the last ones of a row, fewer than sixteen.
struct TileShape {
    size_t vectors, last_columns;

    size_t num_columns() const { return 16 * vectors + last_columns; }
    size_t num_values() const { return 16 * (vectors + (last_columns > 0)); }
};

// The first tile of so many columns. The last ones are a tile of their own only where they do not fit in another.
inline TileShape first_tile(size_t num_columns) {
    const size_t vectors = smaller(largest_power_within(num_columns / 16), most_sums);
    const size_t left = num_columns - 16 * vectors;
    return {vectors, vectors < most_sums && left < 16 ? left : 0};
}

// The same for trellis-coded rows: whole blocks, or a block that is not full.
inline TileShape first_trellis_tile(size_t num_columns) {
    const size_t most_blocks = most_trellis_sums / trellis_vectors;
    const size_t blocks = smaller(largest_power_within(num_columns / trellis_block), most_blocks);
    if (blocks > 0) return {blocks * trellis_vectors, 0};
    return {num_columns / trellis_lanes, num_columns % trellis_lanes};
}

// What to pool of a tile: bags of the window, from the tile's first byte of a row on. Sums start from `start` and go to
// `to`, a bag's `stride` after the last one's; of the last columns, `last_columns`. Those of a bag that goes on are
// left as they are, in an order that is nobody else's.
struct TileJob {
    size_t first_code;
    size_t first_bag, end_bag;
    const float* start;
    float* to;
    size_t stride;
    size_t last_columns = 16;
    size_t rows_before = 0;
    bool ends_bags = true;
};

inline constexpr size_t bags_ahead = 4;

// Pools a tile in registers. False if an index has no row, or its row no codebook. Not inlined, and without all else
// that there is to do, so that the loop over rows has all registers.
using PoolTileFn = bool (*)(const RowReader&, TileJob);

template <int bits, class Join, class ReadLevels, size_t vectors, bool has_last, bool prefetches>
[[gnu::noinline]] bool pool_tile(const RowReader& reader, TileJob job) {
    ReadLevels read_levels(reader.rows, job.first_code);
    const Spread<bits> spread;
    const SpreadLast<bits> spread_last(reader.rows);
    struct Row {
        const uint8_t* codes;
        typename ReadLevels::Kept levels;
    };
    // Where codes are read as words, an instruction set makes levels of them by itself.
    using Levels = decltype(Row().levels.open());
    constexpr bool are_words = !has_last && vectors == vectors_of_words && std::is_same_v<Levels, GridLevels<4, true>>;
    const uint8_t* const bytes = reader.rows.bytes + job.first_code;
    const size_t row_bytes = reader.rows.row_bytes, num_rows = reader.rows.num_rows;
    const uint64_t* const indices = reader.indices;
    const float* const weights = reader.weights;
    const size_t* const starts = reader.starts;
    const size_t last = starts[job.end_bag];
    const size_t rows_ahead = reader.rows_ahead, num_indices = reader.num_indices;
    const auto read = [&](size_t i, Row& row) __attribute__((always_inline)) {
        const uint64_t index = indices[i < last ? i : last - 1];
        if (index >= num_rows) [[unlikely]] return false;
        row.codes = bytes + index * row_bytes;
        return read_levels.read(row.codes, index, i, row.levels);
    };
    // Levels are read some rows early: out of the cache and through their conversion, they take longer than a row does,
    // and the codes that wait for them would fill what the CPU has to look ahead.
    size_t i = starts[job.first_bag];
    Row ahead[rows_early + 1] = {};   // row i and those after it
    bool are_found = true;
    if (i < last) unrolled<rows_early>([&](size_t k) { are_found = are_found && read(i + k, ahead[k]); });
    if (!are_found) return false;
    for (size_t bag = job.first_bag; bag < job.end_bag; bag++) {
        Sums<vectors + has_last> sums;
        sums.change([&](size_t v, F32x16) { return load(job.start + 16 * v); });
        if constexpr (prefetches)   // Lines to be written compete with rows for the few that can be under way.
            unrolled<vectors>([&](size_t v) { __builtin_prefetch(job.to + bags_ahead * job.stride + 16 * v, 1); });
        const size_t rows_of_bag = job.rows_before + starts[bag + 1] - i;
        for (const size_t end = starts[bag + 1]; i < end; i++) {
            if (!read(i + rows_early, ahead[rows_early])) [[unlikely]] return false;
            if constexpr (prefetches)
                prefetch_row(reader.rows, indices[smaller(i + rows_ahead, num_indices - 1)]);
            const Join join(weights, i);
            const uint8_t* codes = ahead[0].codes;
            asm("" : "+r"(codes));   // One address and constant distances: GCC would keep a register for each vector.
            const auto levels = ahead[0].levels.open();
            sums.change([&](size_t v, F32x16 sum) __attribute__((always_inline)) {
                const uint8_t* const from = codes + 2 * bits * v;
                if constexpr (are_words)
                    return join(sum, levels_of_words(levels, codes, v));
                else
                    return join(sum, levels(v < vectors ? spread(from) : spread_last(from)));
            });
            unrolled<rows_early>([&](size_t k) { ahead[k] = ahead[k + 1]; });
        }
        if (job.ends_bags) [[likely]] {
            if constexpr (are_words)
                words_in_column_order(sums);
            else
                sums.change([](size_t, F32x16 sum) { return in_column_order<bits>(sum); });
            sums.finish_bag(reader.bags.pooling, rows_of_bag);
        }
        unrolled<vectors>([&](size_t v) { store(job.to + 16 * v, sums.vector[v]); });
        if constexpr (has_last) store_first(job.to + 16 * vectors, sums.vector[vectors], job.last_columns);
        job.to += job.stride;
    }
    return true;
}

// The function for a tile.
template <int bits, class Join, class ReadLevels, size_t vectors = most_sums>
PoolTileFn find_pool_tile(TileShape tile, bool prefetches) {
    if constexpr (vectors > 0)
        if (tile.vectors < vectors) return find_pool_tile<bits, Join, ReadLevels, vectors / 2>(tile, prefetches);
    if constexpr (vectors < most_sums)
        if (vectors == 0 || tile.last_columns > 0)
            return prefetches ? pool_tile<bits, Join, ReadLevels, vectors, true, true>
                              : pool_tile<bits, Join, ReadLevels, vectors, true, false>;
    if constexpr (vectors > 0)
        return prefetches ? pool_tile<bits, Join, ReadLevels, vectors, false, true>
                          : pool_tile<bits, Join, ReadLevels, vectors, false, false>;
}

// Pools bags, window by window and tile by tile.
struct Pooler {
    RowReader& reader;
    const Output& out;
    PoolTileFn (*find)(TileShape, bool prefetches);
    const float* start;   // most_tile_values
    alignas(64) float pooled[16 * most_tile_values];

    Pooler(RowReader& reader, const Output& out, PoolTileFn (*find)(TileShape, bool), const float* start)
        : reader(reader), out(out), find(find), start(start) {}

    // Calls use(tile, j, first_code) for the tiles of a row: where its columns and its codes start. False as soon as
    // that is.
    template <class Use>
    bool for_tiles(const Use& use) const {
        const size_t d = reader.rows.embedding_dim;
        for (size_t j = 0; j < d;) {
            const bool is_trellis = reader.rows.layout == Layout::trellis;
            const TileShape tile = is_trellis ? first_trellis_tile(d - j) : first_tile(d - j);
            const size_t first_code = is_trellis ? j : j / 8 * static_cast<size_t>(reader.rows.grid.bits);
            if (!use(tile, j, first_code)) return false;
            j += tile.num_columns();
        }
        return true;
    }

    // The first tile is the one to prefetch rows.
    bool prefetches_from(size_t j) const { return reader.bags.prefetches && j == 0; }

    // Brings what has been pooled of a bag to the output, from column j on.
    void put_out(TileShape tile, size_t j, const float* from, size_t bag) const {
        uint8_t* const to = out.values + bag * out.row_bytes;
        for (size_t at = 0; at < tile.num_columns(); at += 16)
            store_values(to, out.type, j + at, load(from + at), smaller(tile.num_columns() - at, 16));
    }

    // The bags of a window, the first of which is bag `first` of all.
    bool pool_window(size_t first, size_t num_bags) {
        return for_tiles([&](TileShape tile, size_t j, size_t first_code) {
            const PoolTileFn pool = find(tile, prefetches_from(j));
            if (out.type == ValueType::f32) {
                float* const to = reinterpret_cast<float*>(out.values + first * out.row_bytes) + j;
                const size_t stride = out.row_bytes / sizeof(float);
                return pool(reader, {first_code, 0, num_bags, start, to, stride, tile.last_columns});
            }
            const size_t bags_at_once = (sizeof pooled / sizeof *pooled) / tile.num_values();
            for (size_t bag = 0; bag < num_bags;) {
                const size_t stop = smaller(num_bags, bag + bags_at_once);
                if (!pool(reader, {first_code, bag, stop, start, pooled, tile.num_values()})) return false;
                for (const float* from = pooled; bag < stop; bag++, from += tile.num_values())
                    put_out(tile, j, from, first + bag);
            }
            return true;
        });
    }

    // A bag of more rows than a window has, part by part.
    bool pool_long_bag(size_t bag) {
        const size_t first = reader.bags.start(bag), last = reader.bags.start(bag + 1);
        return for_tiles([&](TileShape tile, size_t j, size_t first_code) {
            TileJob job{first_code, 0, 1, start, pooled, 0};
            for (size_t i = first, stop; i < last; i = stop) {
                stop = reader.end_of_window(i, last);
                reader.starts[0] = 0;
                reader.starts[1] = stop - i;
                reader.open(i, stop, 1);
                job.ends_bags = stop == last;
                if (!find(tile, prefetches_from(j))(reader, job)) return false;
                job.rows_before += reader.starts[1];
                job.start = pooled;
            }
            put_out(tile, j, pooled, bag);
            return true;
        });
    }

    void pool(size_t first, size_t end) {
        while (first < end) {
            const size_t num_bags = reader.open_bags(first, end);
            const bool are_found = num_bags > 0 ? pool_window(first, num_bags) : pool_long_bag(first);
            if (!are_found) [[unlikely]] return reader.note_fault(reader.bags.start(first));
            first += num_bags > 0 ? num_bags : 1;
        }
    }
};

template <int bits, class Join>
inline void pool_bags_by(RowReader& reader, size_t first, size_t end, const Output& out) {
    with_levels<bits>(reader.rows, [&]<class ReadLevels>(Type<ReadLevels>) {
        Pooler(reader, out, find_pool_tile<bits, Join, ReadLevels>, Join::start.values).pool(first, end);
    });
}

template <int bits>
inline void pool_bags_of(RowReader& reader, size_t first, size_t end, const Output& out) {
    if (reader.bags.pooling == Pooling::max) return pool_bags_by<bits, KeepLargestLevels>(reader, first, end, out);
    if (reader.bags.per_sample_weights) return pool_bags_by<bits, AddWeightedLevels>(reader, first, end, out);
    pool_bags_by<bits, AddLevels>(reader, first, end, out);
}
