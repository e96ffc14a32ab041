// A tile: columns of bags of rows that are pooled together, whose sums stay in registers.

// A tile has at most so many vectors of sums: as many as the registers hold while rows go by.
inline constexpr size_t most_tile_values = 16 * most_tile_vectors;

alignas(64) inline constexpr float zeros[most_tile_values] = {};

// How a row's levels join those before.
struct AddLevels {
    AddLevels(const float*, size_t) {}
    F32x16 operator()(F32x16 so_far, F32x16 levels) const { return add(so_far, levels); }
};
// A weight of 1, where there are none, gives the same sums.
struct AddWeightedLevels {
    F32x16 weight;

    AddWeightedLevels(const float* weights, size_t i) : weight(splat(weights ? weights[i] : 1.0f)) {}
    F32x16 operator()(F32x16 so_far, F32x16 levels) const { return fma(weight, levels, so_far); }
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

// Lines of the output are asked for so many bags early.
inline constexpr size_t bags_ahead = 4;

// The first tile of a row prefetches those after it. The first rows of all have been prefetched by then.
inline bool prefetches_rows(const RowReader& reader, const TileJob& job) {
    return reader.bags.prefetches && job.first_code == 0 && reader.num_indices > reader.rows_ahead;
}

// How the rows of a layout are cut into tiles.
template <class Reader>
struct Tiles {
    // Pools a tile in registers. False if an index has no row, or its row no codebook.
    using PoolFn = bool (*)(const Reader&, TileJob);

    TileShape (*first)(size_t num_columns);                              // of so many columns that are left
    size_t (*first_code)(const PackedRows&, size_t column);              // byte of a row where a tile starts
    PoolFn (*find)(TileShape, bool prefetches);
};
