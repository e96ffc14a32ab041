// Rows that change while other threads look rows up.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>

namespace embpack {

// While one lives, this process writes no rows: a lookup that reads a row within it has the row as it was before an
// update, or as it is after. A piece of a loop has one for as long as it reads rows. It is not for longer, as an update
// waits for it and others for the update, and has none of its own within: for the same reason it would wait for ever.
// Nor may Python's lock be asked for, which may be held by a thread that waits.
class Reading {
public:
    Reading();
    ~Reading() { readers_.fetch_sub(1, std::memory_order_release); }
    Reading(const Reading&) = delete;
    Reading& operator=(const Reading&) = delete;

private:
    std::atomic<uint32_t>& readers_;
};

// Rows of an array with an entry for each row of a table.
struct ChangedRows {
    uint8_t* array;
    const uint8_t* changed;   // entries, one after the other
    size_t entry_bytes;
};

// Writes rows of arrays, those of one row at the same time as lookups see it.
void write_rows(std::span<const int64_t> rows, std::span<const ChangedRows> arrays);

}  // namespace embpack
