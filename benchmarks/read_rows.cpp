// The bare loop that lookups from a disk are measured by: what the disk gives to whoever wants these rows. 64 threads,
// which are there already, each ask for the next row and wait for it.

#include <unistd.h>

#include <atomic>
#include <barrier>
#include <cstddef>
#include <cstdint>
#include <thread>

namespace {

constexpr int num_readers = 64;

struct Call {
    int descriptor;
    const std::int64_t* offsets;
    std::int64_t count, row_bytes;
    std::uint8_t* out;
};

Call call;
std::atomic<std::int64_t> next, failed;

// Never deleted: threads may outlive what is static.
std::barrier<>& edge = *new std::barrier<>(num_readers + 1);

void read() {
    while (true) {
        edge.arrive_and_wait();
        const std::size_t num_bytes = static_cast<std::size_t>(call.row_bytes);
        for (std::int64_t i; (i = next.fetch_add(1)) < call.count;) {
            const ssize_t got = pread(call.descriptor, call.out + i * call.row_bytes, num_bytes, call.offsets[i]);
            failed += got != call.row_bytes;
        }
        edge.arrive_and_wait();
    }
}

const bool are_started = [] {
    for (int i = 0; i < num_readers; i++) std::thread(read).detach();
    return true;
}();

}  // namespace

// Reads rows from offsets of a file into `out`, one after the other; returns how many could not be read.
extern "C" std::int64_t read_rows(int descriptor, const std::int64_t* offsets, std::int64_t count,
                                  std::int64_t row_bytes, std::uint8_t* out) {
    call = {descriptor, offsets, count, row_bytes, out};
    next = failed = 0;
    edge.arrive_and_wait();
    edge.arrive_and_wait();
    return failed;
}
