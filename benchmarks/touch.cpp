// The bare loop that lookups from memory are measured by: what the memory gives to whoever wants these rows.
//
// It asks for the rows `prefetch_rows` ahead, all cache lines of each, to the second-level cache, as lookups do, and reads
// one byte of every line in order: every 64th of a row and its last, so that no branch depends on where a row lies.

#include <cstddef>
#include <cstdint>

namespace {

constexpr std::int64_t prefetch_rows = 64;
constexpr std::int64_t line_bytes = 64;
constexpr int second_level = 2;

}  // namespace

extern "C" std::uint64_t touch(const std::uint8_t* rows, std::int64_t row_bytes, const std::int64_t* indices,
                               std::int64_t count) {
    std::uint64_t sum = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        if (i + prefetch_rows < count) {
            const std::uint8_t* ahead = rows + indices[i + prefetch_rows] * row_bytes;
            for (std::int64_t at = 0; at < row_bytes; at += line_bytes) __builtin_prefetch(ahead + at, 0, second_level);
            __builtin_prefetch(ahead + row_bytes - 1, 0, second_level);
        }
        const std::uint8_t* row = rows + indices[i] * row_bytes;
        for (std::int64_t at = 0; at < row_bytes; at += line_bytes) sum += row[at];
        sum += row[row_bytes - 1];
    }
    return sum;
}
