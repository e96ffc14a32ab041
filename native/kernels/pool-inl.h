// Bags, window by window and tile by tile.

template <class Reader>
struct Pooler {
    Reader& reader;
    const Output& out;
    const Tiles<Reader> tiles;
    const size_t first_column, end_column;   // of those that are pooled
    alignas(64) float pooled[16 * most_tile_values];

    Pooler(Reader& reader, const Output& out, const Tiles<Reader>& tiles, size_t first_column, size_t end_column)
        : reader(reader), out(out), tiles(tiles), first_column(first_column), end_column(end_column) {}

    // Calls use(tile, j, first_code) for the tiles of a row: where its columns and its codes start. False as soon as
    // that is.
    template <class Use>
    bool for_tiles(const Use& use) const {
        for (size_t j = first_column; j < end_column;) {
            const TileShape tile = tiles.first(end_column - j);
            if (!use(tile, j, tiles.first_code(reader.rows, j))) return false;
            j += tile.num_columns();
        }
        return true;
    }

    // Brings what has been pooled of a bag to the output, from column j on.
    void put_out(TileShape tile, size_t j, const float* from, size_t bag) const {
        uint8_t* const to = out.values + bag * out.row_bytes;
        for (size_t at = 0; at < tile.num_columns(); at += 16)
            store_values(to, out.type, j + at, load(from + at), smaller(tile.num_columns() - at, 16));
    }

    // The bags of a window, the first of which is bag `first` of all.
    bool pool_window(size_t first, size_t num_bags) {
        return for_tiles([&](TileShape tile, size_t j, size_t first_code) {
            const auto pool = tiles.find(tile, reader.bags.prefetches);
            if (out.type == ValueType::f32) {
                float* const to = reinterpret_cast<float*>(out.values + first * out.row_bytes) + j;
                const size_t stride = out.row_bytes / sizeof(float);
                return pool(reader, {first_code, 0, num_bags, zeros, to, stride, tile.last_columns});
            }
            const size_t bags_at_once = (sizeof pooled / sizeof *pooled) / tile.num_values();
            for (size_t bag = 0; bag < num_bags;) {
                const size_t stop = smaller(num_bags, bag + bags_at_once);
                if (!pool(reader, {first_code, bag, stop, zeros, pooled, tile.num_values()})) return false;
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
            const auto pool = tiles.find(tile, reader.bags.prefetches);
            TileJob job{first_code, 0, 1, zeros, pooled, 0};
            for (size_t i = first, stop; i < last; i = stop) {
                stop = reader.end_of_window(i, last);
                reader.starts[0] = 0;
                reader.starts[1] = stop - i;
                reader.open(i, stop, 1);
                job.ends_bags = stop == last;
                if (!pool(reader, job)) return false;
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
