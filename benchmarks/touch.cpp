// The bare loop that lookups from memory are measured by: what the memory gives to whoever wants these rows.
//
// It asks for the rows `prefetch_rows` ahead, all cache lines of each, and reads one byte of every line in order.

#include <cstddef>
#include <cstdint>

namespace {

constexpr std::ptrdiff_t prefetch_rows = 64;
constexpr std::uintptr_t line_bytes = 64;

const std::uint8_t* next_line(const std::uint8_t* byte) {
    const auto address = reinterpret_cast<std::uintptr_t>(byte);
    return byte + (line_bytes - address % line_bytes);
}

}  // namespace

extern "C" std::uint64_t touch(const std::uint8_t* rows, std::int64_t row_bytes, const std::int64_t* indices,
                               std::int64_t count) {
    std::uint64_t sum = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        if (i + prefetch_rows < count) {
            const std::uint8_t* ahead = rows + indices[i + prefetch_rows] * row_bytes;
            for (const std::uint8_t* byte = ahead; byte < ahead + row_bytes; byte = next_line(byte))
                __builtin_prefetch(byte);
        }
        const std::uint8_t* row = rows + indices[i] * row_bytes;
        for (const std::uint8_t* byte = row; byte < row + row_bytes; byte = next_line(byte)) sum += *byte;
    }
    return sum;
}
