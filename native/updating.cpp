#include "updating.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <thread>

namespace embpack {

namespace {

// Written together: in some 50 microseconds, for which lookups wait.
constexpr size_t rows_at_a_time = 1024;

// Threads count themselves in places of their own, on lines of the cache of their own, as far as there are enough.
constexpr size_t num_places = 64;
struct alignas(64) Place {
    std::atomic<uint32_t> readers{0};
};
Place places[num_places];

// Found from what the thread is, for which no memory has to be there: a thread_local of a module is allocated when a
// thread first comes to it, and where that cannot be the process ends.
Place& own_place() { return places[(uint64_t{pthread_self()} >> 12) * 0x9E3779B97F4A7C15u >> 58]; }
static_assert(num_places == 64, "own_place takes the six highest bits");

std::atomic<uint32_t> is_writing{0}, num_waiting{0};
std::mutex one_writer;

// Of a thread that waits for a piece of a lookup to end.
void wait_a_little(int& times) {
    if (++times < 100)
        std::this_thread::yield();
    else
        std::this_thread::sleep_for(std::chrono::microseconds(50));
}

class Writing {
public:
    Writing() {
        one_writer.lock();
        int times = 0;
        // Lookups that waited for the rows before come first, or they might wait for all there are.
        while (num_waiting.load() > 0) wait_a_little(times);
        is_writing.store(1);
        for (Place& place : places)
            while (place.readers.load() > 0) wait_a_little(times);
    }
    ~Writing() {
        is_writing.store(0);
        is_writing.notify_all();
        one_writer.unlock();
    }
    Writing(const Writing&) = delete;
    Writing& operator=(const Writing&) = delete;
};

// A fork waits until rows are whole. The child has none of the threads that were reading.
[[maybe_unused]] const int registered = pthread_atfork(
    [] { one_writer.lock(); }, [] { one_writer.unlock(); },
    [] {
        for (Place& place : places) place.readers.store(0);
        num_waiting.store(0);
        one_writer.unlock();
    });

std::atomic<uint32_t>& count_reader() {
    std::atomic<uint32_t>& readers = own_place().readers;
    // Of a thread that counts itself and then looks for writers, and one that says that it writes and then counts
    // readers, one sees the other: all four are sequentially consistent.
    readers.fetch_add(1);
    if (is_writing.load() == 0) [[likely]]
        return readers;
    num_waiting.fetch_add(1);
    do {
        readers.fetch_sub(1);
        is_writing.wait(1);
        readers.fetch_add(1);
    } while (is_writing.load() != 0);
    num_waiting.fetch_sub(1);
    return readers;
}

}  // namespace

Reading::Reading() : readers_(count_reader()) {}

void write_rows(std::span<const int64_t> rows, std::span<const ChangedRows> arrays) {
    for (size_t first = 0; first < rows.size(); first += rows_at_a_time) {
        const Writing writing;
        const size_t end = std::min(rows.size(), first + rows_at_a_time);
        for (const ChangedRows& each : arrays)
            for (size_t i = first; i < end; i++)
                std::memcpy(each.array + static_cast<size_t>(rows[i]) * each.entry_bytes,
                            each.changed + i * each.entry_bytes, each.entry_bytes);
    }
}

}  // namespace embpack
