// Sums of 4-bit rows with float16 parameters in integers. Most bags have rows whose parameters are of similar size. These
// are whole multiples of a unit, a power of two, and so are all levels and sums of them: if no sum can have more than 24
// bits, float32 holds each one exactly, whatever the order. Then sum(scale * code) is a product of integers, two rows to
// an operation, and what comes out has the bits that adding level by level gives. Other bags are added level by level.
//
// Exact is what an instruction set has for it, ExactTiles:
//
//     find_range(params, num_rows)                                the least and the largest parameters
//     split_params(params, num_rows, unit, multipliers, biases)   scales as multiples of the unit, biases as float32
//     add_biases(biases, count)                                   their sum
//     Wide, Narrow                                                tiles of 64 and 32 columns
//     sum<Tile>(rows, multipliers, num_rows, first_byte, exact, to, after_turn)   a tile's sums; it calls
//                                                                 after_turn(i) when rows from i on have been added

// A bag of more rows than any window is added level by level.
//
// Where rows are prefetched, windows are short, a bag if it has enough rows, and requests are spread over all that is
// done: those for the first tile of every other row over finding rows, all else over adding them. A CPU drops requests
// that come too close together, so each row is asked for again half as early (docs/kernels.md).
inline constexpr size_t least_exact_window = 128;

inline Reach reach_of_exact_sums(const PackedRows& rows, bool prefetches) {
    const size_t window_rows = within(window_bytes / rows.row_bytes, least_exact_window, most_window_rows);
    const size_t rows_ahead = within(bytes_ahead / rows.row_bytes, 2 * least_window_rows, most_rows_ahead / 2);
    return {prefetches ? least_window_rows : window_rows, most_window_rows, rows_ahead};
}

// Where a tile's codes are in a row; the last tile has the parameters, too.
struct TileBytes {
    size_t first, last;
};

// Of so many columns from column j on.
inline TileBytes bytes_of_tile(const PackedRows& rows, size_t j, size_t columns) {
    const bool is_last = j + columns >= rows.embedding_dim;
    return {j / 2, (is_last ? rows.row_bytes : (j + columns) / 2) - 1};
}

inline void prefetch_tile(uintptr_t row, TileBytes bytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(row + bytes.first), 0, 2);
    __builtin_prefetch(reinterpret_cast<const void*>(row + bytes.last), 0, 2);
}

// Rather than when rows are added.
inline bool is_prefetched_when_found(size_t place, TileBytes bytes) { return bytes.first == 0 && place % 2 == 0; }

// A bag of the window. Its rows have places, a multiple of four of them; those that are left over count nothing.
struct ExactBag {
    ExactSum sum;
    bool is_exact;
    size_t first_place, num_rows;
};

inline constexpr size_t places_together = 4;
inline constexpr size_t places_of(size_t num_rows) {
    return (num_rows + places_together - 1) / places_together * places_together;
}

// The window: where its rows are, their scales, as multiples of a unit, and their biases.
template <class Exact>
struct ExactWindow {
    // Some are read and written eight at a time.
    static constexpr size_t most_places = most_window_rows + (places_together - 1) * most_window_bags + 8;

    const RowReader& reader;
    const uint8_t* row[most_places];
    uintptr_t ahead[most_places];   // the row to be prefetched with each: by an index that has not been checked yet
    uint32_t params[most_places];
    int16_t multipliers[most_places];
    float biases[most_places];
    ExactBag bags[most_window_bags];
    size_t num_places = 0, num_exact = 0;   // the latter of bags

    explicit ExactWindow(const RowReader& reader) : reader(reader) {}

    // False if an index has no row.
    bool open(size_t num_bags) {
        if (!read_rows(num_bags)) [[unlikely]] return false;
        find_sums(num_bags);
        return true;
    }

    bool read_rows(size_t num_bags) {
        const PackedRows rows = reader.rows;   // a copy, which no store can change
        const uint64_t* index = reader.indices;
        const uint64_t* const last_index = index + reader.num_indices - 1;
        const size_t after_codes = code_bytes(rows.embedding_dim, rows.grid);
        const bool prefetches = reader.bags.prefetches;
        const size_t rows_ahead = reader.rows_ahead;
        const bool is_narrow = rows.embedding_dim < Exact::Wide::columns;
        const TileBytes first_tile = bytes_of_tile(rows, 0, is_narrow ? Exact::Narrow::columns : Exact::Wide::columns);
        size_t place = 0;
        for (size_t bag = 0; bag < num_bags; bag++) {
            const size_t num_rows = reader.starts[bag + 1] - reader.starts[bag];
            bags[bag].first_place = place;
            bags[bag].num_rows = num_rows;
            const uint64_t* const end = index + num_rows;
            for (; index < end; index++, place++) {
                const uint64_t found = *index;   // once: it may lie where another thread writes
                if (found >= rows.num_rows) [[unlikely]] return false;
                const uint8_t* const codes = rows.bytes + found * rows.row_bytes;
                row[place] = codes;
                std::memcpy(params + place, codes + after_codes, sizeof *params);
                if (prefetches) {
                    const auto index_ahead = [&](size_t num_rows_ahead) {
                        const uint64_t* const early = index + num_rows_ahead;
                        return *(early < last_index ? early : last_index);
                    };
                    ahead[place] = reinterpret_cast<uintptr_t>(rows.bytes) + index_ahead(rows_ahead) * rows.row_bytes;
                    if (is_prefetched_when_found(place, first_tile)) prefetch_tile(ahead[place], first_tile);
                    prefetch_row(rows, index_ahead(rows_ahead / 2));
                }
            }
            for (; place % places_together != 0; place++) {
                row[place] = rows.bytes;
                ahead[place] = reinterpret_cast<uintptr_t>(rows.bytes);
                params[place] = 0;
            }
        }
        num_places = place;
        std::memset(params + place, 0, places_together * sizeof *params);
        return true;
    }

    void find_sums(size_t num_bags) {
        size_t most_rows = 0;
        for (size_t bag = 0; bag < num_bags; bag++)
            if (bags[bag].num_rows > most_rows) most_rows = bags[bag].num_rows;
        const ExactUnits units = find_exact_units(Exact::find_range(params, num_places));
        const bool are_alike = most_rows <= units.most_rows;
        if (are_alike) Exact::split_params(params, num_places, units.unit, multipliers, biases);
        num_exact = 0;
        // Where rows of the window are too different, those of most bags may still be alike.
        for (size_t i = 0; i < num_bags; i++) {
            ExactBag& bag = bags[i];
            const size_t first = bag.first_place, places = places_of(bag.num_rows);
            const ExactUnits own = are_alike ? units : find_exact_units(Exact::find_range(params + first, places));
            bag.is_exact = bag.num_rows <= own.most_rows;
            if (!bag.is_exact) continue;
            if (!are_alike) Exact::split_params(params + first, places, own.unit, multipliers + first, biases + first);
            bag.sum = {own.unit, Exact::add_biases(biases + first, places)};
            num_exact++;
        }
    }
};

template <class Exact, class Tile, bool prefetches>
[[gnu::noinline]] void sum_tile(const ExactWindow<Exact>& window, const ExactBag& bag, TileBytes bytes, float* to) {
    const uintptr_t* const ahead = window.ahead + bag.first_place;
    Exact::template sum<Tile>(window.row + bag.first_place, window.multipliers + bag.first_place, bag.num_rows, bytes.first,
                              bag.sum, to, [&](size_t i) __attribute__((always_inline)) {
        if constexpr (prefetches)
            unrolled<Tile::rows_at_once>([&](size_t k) {
                if (!is_prefetched_when_found(k, bytes)) prefetch_tile(ahead[i + k], bytes);
            });
    });
}

// Sums or means of bags of rows of 4 bits, with float16 parameters, of at least a narrow tile.
template <class Exact>
struct ExactPooler {
    using WideTile = typename Exact::Wide;
    using NarrowTile = typename Exact::Narrow;

    const Output& out;
    const Tiles<RowReader> tiles;   // of bags that are added level by level
    LookupFault& fault;
    RowReader reader;
    ExactWindow<Exact> window{reader};
    alignas(64) float pooled[WideTile::columns];

    ExactPooler(const PackedRows& rows, const Bags& bags, size_t first, size_t end, const Output& out,
                const Tiles<RowReader>& tiles, LookupFault& fault)
        : out(out),
          tiles(tiles),
          fault(fault),
          reader(rows, bags, bags.start(first), bags.start(end), reach_of_exact_sums(rows, bags.prefetches), fault) {}

    void pool(size_t first, size_t end) {
        while (first < end) {
            const size_t num_bags = reader.open_bags(first, end);
            if (num_bags > 0 && !window.open(num_bags)) [[unlikely]]
                return reader.note_fault(reader.bags.start(first));
            // Where no sum of a window is exact, those after it are not looked at: it takes time.
            if (num_bags > 0 && window.num_exact == 0) return pool_levels(first, end);
            if (num_bags == 0) pool_levels(first, first + 1);
            for (size_t bag = 0, stop; bag < num_bags; bag = stop) {
                stop = bag + 1;
                if (window.bags[bag].is_exact) {
                    pool_bag(window.bags[bag], out.values + (first + bag) * out.row_bytes);
                } else {
                    while (stop < num_bags && !window.bags[stop].is_exact) stop++;
                    pool_levels(first + bag, first + stop);
                }
            }
            if (fault.kind != LookupFault::none) [[unlikely]] return;
            first += num_bags > 0 ? num_bags : 1;
        }
    }

private:
    void pool_levels(size_t first, size_t end) { pool_by(tiles, reader.rows, reader.bags, first, end, out, fault); }

    void pool_bag(const ExactBag& bag, uint8_t* to) {
        const size_t d = reader.rows.embedding_dim;
        if (reader.bags.prefetches)
            for (size_t at = 0; at < d * value_bytes(out.type); at += 64)
                __builtin_prefetch(to + bags_ahead * out.row_bytes + at, 1);
        // The last tile ends with the row: it may repeat columns of the one before it, and go on for one column behind
        // an odd number of them, which has a code, too.
        size_t j = 0;
        for (; j + WideTile::columns <= d; j += WideTile::columns) pool_tile_of<WideTile>(bag, j, to);
        if (d < WideTile::columns) pool_tile_of<NarrowTile>(bag, 0, to);
        const size_t done = d < WideTile::columns ? NarrowTile::columns : j;
        if (done == d) return;
        if (d - done <= NarrowTile::columns)
            pool_tile_of<NarrowTile>(bag, (d - NarrowTile::columns + 1) / 2 * 2, to);
        else
            pool_tile_of<WideTile>(bag, (d - WideTile::columns + 1) / 2 * 2, to);
    }

    template <class Tile>
    void pool_tile_of(const ExactBag& bag, size_t j, uint8_t* to) {
        const size_t num_columns = smaller(Tile::columns, reader.rows.embedding_dim - j);
        const bool goes_to_output = out.type == ValueType::f32 && num_columns == Tile::columns;
        float* const sums = goes_to_output ? reinterpret_cast<float*>(to) + j : pooled;
        const TileBytes bytes = bytes_of_tile(reader.rows, j, Tile::columns);
        if (reader.bags.prefetches)
            sum_tile<Exact, Tile, true>(window, bag, bytes, sums);
        else
            sum_tile<Exact, Tile, false>(window, bag, bytes, sums);
        if (reader.bags.pooling == Pooling::mean && bag.num_rows > 0) {
            const F32x16 divisor = splat(static_cast<float>(bag.num_rows));
            unrolled<Tile::columns / 16>([&](size_t v) { store(sums + 16 * v, div(load(sums + 16 * v), divisor)); });
        }
        if (goes_to_output) return;
        for (size_t at = 0; at < num_columns; at += 16)
            store_values(to, out.type, j + at, load(pooled + at), smaller(num_columns - at, 16));
    }
};

template <class Exact>
inline bool can_be_exact(const PackedRows& rows, const Bags& bags) {
    return rows.layout == Layout::uniform && rows.grid.bits == 4 && rows.grid.f16_params &&
           rows.embedding_dim >= Exact::Narrow::columns && !bags.per_sample_weights;
}
