// Which rows a lookup reads next: a window of some of them, checked, without padding, and prefetched.

// To the second-level cache, which takes many more lines at a time than the first. An index has not been checked when
// its row is prefetched, but an address that is only for the cache may be any.
inline void prefetch_row(const PackedRows& rows, uint64_t index) {
    const uintptr_t row = reinterpret_cast<uintptr_t>(rows.bytes) + index * rows.row_bytes;
    const auto prefetch = [row](size_t at) { __builtin_prefetch(reinterpret_cast<const void*>(row + at), 0, 2); };
    prefetch(0);
    for (size_t at = 64; at < rows.row_bytes; at += 64) [[unlikely]] prefetch(at);
    prefetch(rows.row_bytes - 1);
}

// Rows that are read more than once, tile by tile, are read a window at a time, which stays in the first-level cache.
// So are those whose indices are not there as they have to be. Otherwise a window has no end.
inline constexpr size_t most_window_rows = 256, least_window_rows = 16;
inline constexpr size_t window_bytes = size_t{1} << 15;
inline constexpr size_t most_window_bags = 256;

// Rows are prefetched so far ahead of those that are read: enough to be there in time, few enough to be there still.
inline constexpr size_t most_rows_ahead = 96, least_rows_ahead = 16;
inline constexpr size_t bytes_ahead = size_t{1} << 13;

// How far a reader looks: rows of a window, rows of a bag that is a window by itself, and rows to prefetch.
struct Reach {
    size_t window_rows, bag_rows, rows_ahead;
};

// Whether indices are read where they are, as they have to be.
inline bool can_read_in_place(const Bags& bags) {
    return bags.indices.values && bags.indices.are_64_bits && bags.padding_index == no_padding;
}

inline Reach reach_of_tiles(const PackedRows& rows, const Bags& bags, bool are_read_once) {
    const size_t window_rows = can_read_in_place(bags) && are_read_once
                                   ? SIZE_MAX
                                   : within(window_bytes / rows.row_bytes, least_window_rows, most_window_rows);
    return {window_rows, window_rows, within(bytes_ahead / rows.row_bytes, least_rows_ahead, most_rows_ahead)};
}

// Reads a run of rows, a window of some of them at a time.
struct RowReader {
    const PackedRows& rows;
    const Bags& bags;
    const size_t end;            // of the run
    LookupFault& fault;
    const bool reads_in_place;
    const size_t window_rows, bag_rows, rows_ahead;
    // The window: rows, without those that are padding, what they are multiplied by, and where bags start among them
    // and the last one ends.
    const uint64_t* indices = nullptr;
    const float* weights = nullptr;
    size_t starts[most_window_bags + 1];
    size_t num_indices = 0;      // with those after the window that are known already
    uint64_t own_indices[most_window_rows + most_rows_ahead];
    float own_weights[most_window_rows];

    RowReader(const PackedRows& rows, const Bags& bags, size_t first, size_t end, bool are_read_once,
              LookupFault& fault)
        : RowReader(rows, bags, first, end, reach_of_tiles(rows, bags, are_read_once), fault) {}

    RowReader(const PackedRows& rows, const Bags& bags, size_t first, size_t end, Reach reach, LookupFault& fault)
        : rows(rows),
          bags(bags),
          end(end),
          fault(fault),
          reads_in_place(can_read_in_place(bags)),
          window_rows(reach.window_rows),
          bag_rows(reach.bag_rows),
          rows_ahead(reach.rows_ahead) {
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
            if (starts[count + 1] > (count > 0 ? window_rows : bag_rows)) break;
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
