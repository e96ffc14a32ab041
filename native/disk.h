#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

namespace embpack {

// An open file of which a few bytes here and there are read: the system reads nothing around them. It is closed when
// nobody holds it any more.
class DiskFile {
public:
    // Of an open descriptor, which stays the caller's. Throws std::system_error.
    explicit DiskFile(int descriptor);
    ~DiskFile();
    DiskFile(const DiskFile&) = delete;
    DiskFile& operator=(const DiskFile&) = delete;

    const int descriptor;
};

// Some rows of an array, which lie one after the other in a file.
struct DiskPiece {
    std::shared_ptr<const DiskFile> file;
    uint64_t offset;   // of the first
    size_t first_row, num_rows;
};

// An array on the disk: its pieces in the order of their rows, without gaps.
struct DiskRows {
    std::vector<DiskPiece> pieces;
    size_t row_bytes;
};

// Rows of an array, ascending and each once, and where their bytes go, one after the other.
struct DiskRead {
    const DiskRows& array;
    std::span<const int64_t> rows;
    uint8_t* out;
};

// Bytes that could not be read.
struct DiskFault {
    size_t read, piece;
    uint64_t offset;   // of the row that is not there
    int error;   // errno; 0 where the file ends before
};

// Reads rows, many at a time: a disk answers 64 threads 10 to 50 times as fast as one. Rows that lie on one page or next
// to each other are read together. Looks for signals now and then, and what that throws ends it.
std::optional<DiskFault> read_rows(std::span<const DiskRead>);

// Writes rows, ascending and each once, into an array that lies in an open file from an offset on: those that lie next to
// each other together. Returns errno, 0 if all are written.
int write_file_rows(int descriptor, uint64_t offset, size_t row_bytes, std::span<const int64_t> rows, const uint8_t* bytes);

// Has rows, ascending, read into the system's cache of pages, and returns at once. Rows that are waited for are read
// first; of rows that nobody waits for the oldest are forgotten when there are too many.
void prefetch_rows(const DiskRows&, std::span<const int64_t> rows);

// The same for rows of a mapped file, from an address on.
void prefetch_mapped_rows(const uint8_t* first, size_t row_bytes, std::span<const int64_t> rows);

}  // namespace embpack
