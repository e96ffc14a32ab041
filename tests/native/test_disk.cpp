// Tests of reads from the disk: every row, by several callers at once, with forks, faults and signals. They say most
// under the thread sanitizer, -DEMBPACK_SANITIZERS=thread.

#include "disk.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "testing.h"
#include "threads.h"

// A child of a process with several threads starts some of its own; the thread sanitizer would end it for that.
extern "C" [[gnu::visibility("default")]] const char* __tsan_default_options() { return "die_after_fork=0"; }

using namespace embpack;
using namespace embpack::testing;

namespace {

constexpr size_t num_rows = 100000, row_bytes = 36, pieces = 3;

uint8_t byte_at(size_t i) { return static_cast<uint8_t>(i * 31 + i / 251); }

// A file of random bytes that has no name, and the rows in it, in pieces.
class File {
public:
    File() {
        char name[] = "/tmp/embpack-test-XXXXXX";
        descriptor_ = mkstemp(name);
        unlink(name);
        std::vector<uint8_t> bytes(num_rows * row_bytes);
        for (size_t i = 0; i < bytes.size(); i++) bytes[i] = byte_at(i);
        if (write(descriptor_, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size())) std::abort();
        fsync(descriptor_);
        const auto file = std::make_shared<DiskFile>(descriptor_);
        array_.row_bytes = row_bytes;
        for (size_t i = 0; i < pieces; i++) {
            const size_t first = num_rows * i / pieces, end = num_rows * (i + 1) / pieces;
            array_.pieces.push_back({file, first * row_bytes, first, end - first});
        }
    }
    ~File() { close(descriptor_); }

    const DiskRows& array() const { return array_; }
    void evict() const { posix_fadvise(descriptor_, 0, 0, POSIX_FADV_DONTNEED); }
    void cut(size_t rows) const {
        if (ftruncate(descriptor_, static_cast<off_t>(rows * row_bytes)) != 0) std::abort();
    }

private:
    int descriptor_;
    DiskRows array_;
};

std::vector<int64_t> draw(Random& random, size_t count) {
    std::vector<int64_t> rows(count);
    for (int64_t& row : rows) row = random.bits() % num_rows;
    std::sort(rows.begin(), rows.end());
    rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
    return rows;
}

// Whether rows of an array are read, some of them from the disk.
bool are_read(const File& file, Random& random, size_t count) {
    const std::vector<int64_t> rows = draw(random, count), others = draw(random, count);
    std::vector<uint8_t> out(rows.size() * row_bytes), of_others(others.size() * row_bytes);
    prefetch_rows(file.array(), draw(random, 10));
    file.evict();
    const DiskRead reads[] = {{file.array(), rows, out.data()}, {file.array(), others, of_others.data()}};
    if (read_rows(reads)) return false;
    for (const DiskRead& read : reads)
        for (size_t i = 0; i < read.rows.size(); i++)
            for (size_t k = 0; k < row_bytes; k++) {
                const uint8_t expected = byte_at(static_cast<size_t>(read.rows[i]) * row_bytes + k);
                if (read.out[i * row_bytes + k] != expected) return false;
            }
    return true;
}

void test_reads() {
    where = "reads";
    const File file;
    Random random(1);
    for (size_t count : {0, 1, 2, 63, 64, 65, 1000, 20000}) CHECK(are_read(file, random, count));
}

void test_callers() {
    where = "callers";
    const File file;
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (uint64_t i = 0; i < 6; i++)
        callers.emplace_back([&, i] {
            Random random(i);
            for (int k = 0; k < 10; k++) wrong += !are_read(file, random, 500);
        });
    for (std::thread& caller : callers) caller.join();
    CHECK(wrong == 0);
}

void test_faults() {
    where = "faults";
    const File file;
    file.cut(num_rows / 2);
    Random random(3);
    std::vector<int64_t> rows = draw(random, 5000);
    std::vector<uint8_t> out(rows.size() * row_bytes);
    const DiskRead reads[] = {{file.array(), {}, nullptr}, {file.array(), rows, out.data()}};
    const std::optional<DiskFault> fault = read_rows(reads);
    CHECK(fault && fault->read == 1 && fault->error == 0 && fault->offset >= num_rows / 2 * row_bytes - 4096);
    CHECK(fault && fault->piece >= 1 && fault->piece < pieces);
    try {
        const DiskFile none(-1);
        CHECK(false);
    } catch (const std::system_error& error) {
        CHECK(error.code().value() == EBADF);
    }
}

// A read that takes long ends with what looking for signals throws, and nothing is written afterwards.
void test_interruption() {
    where = "interruption";
    const File file;
    std::vector<int64_t> rows(num_rows / 3);
    for (size_t i = 0; i < rows.size(); i++) rows[i] = static_cast<int64_t>(i * 3);
    set_interruption([] { throw std::runtime_error("interrupted"); });
    bool was_interrupted = false;
    for (int i = 0; i < 1000 && !was_interrupted; i++) {
        std::vector<uint8_t> out(rows.size() * row_bytes);
        std::vector<DiskRead> reads(50, DiskRead{file.array(), rows, out.data()});
        try {
            CHECK(!read_rows({reads.data(), 1}));
            for (const DiskRead& read : reads) prefetch_rows(read.array, {});
            std::vector<std::vector<uint8_t>> rooms(reads.size(), out);
            for (size_t k = 0; k < reads.size(); k++) reads[k].out = rooms[k].data();
            file.evict();
            CHECK(!read_rows(reads));
        } catch (const std::runtime_error&) {
            was_interrupted = true;
        }
    }
    CHECK(was_interrupted);
    set_interruption(nullptr);
}

bool works_in_child(const File& file, uint64_t seed) {
    const pid_t child = fork();
    if (child == 0) alarm(60);   // which ends one that hangs
    Random random(seed);
    if (child == 0) _exit(are_read(file, random, 300) ? 0 : 1);
    int status = -1;
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

void test_fork() {
    where = "fork while idle";
    const File file;
    Random random(5);
    for (uint64_t i = 0; i < 5; i++) {
        CHECK(are_read(file, random, 300));
        CHECK(works_in_child(file, i));
    }
#if !defined(__SANITIZE_ADDRESS__)   // whose allocator a child cannot use if another thread was in it
    where = "fork while busy";
    std::atomic<bool> is_done{false};
    std::atomic<int> wrong{0};
    std::thread forker([&] {
        for (uint64_t i = 0; i < 10; i++) wrong += !works_in_child(file, i);
        is_done = true;
    });
    while (!is_done) wrong += !are_read(file, random, 300);
    forker.join();
    CHECK(wrong == 0);
#endif
}

}  // namespace

int main() {
    test_reads();
    test_callers();
    test_faults();
    test_interruption();
    test_fork();
    if (failures) std::printf("%d checks failed\n", failures);
    return failures != 0;
}
