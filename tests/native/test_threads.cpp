// Tests of the threads: every piece once, exceptions, signals, forks, callers that get in each other's way, and rows that
// change while they are looked up. They say most under the thread sanitizer, -DEMBPACK_SANITIZERS=thread.

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <cmath>
#include <stdexcept>
#include <thread>

#include "linear.h"
#include "lookup.h"
#include "quantize.h"
#include "testing.h"
#include "threads.h"
#include "updating.h"

// A child of a process with several threads starts some of its own; the thread sanitizer would end it for that.
extern "C" [[gnu::visibility("default")]] const char* __tsan_default_options() { return "die_after_fork=0"; }

using namespace embpack;
using namespace embpack::testing;

namespace {

using namespace std::chrono_literals;

// Threads of a caller, started together and waited for.
template <class Call>
void at_once(int count, const Call& call) {
    std::vector<std::thread> callers;
    for (int i = 0; i < count; i++) callers.emplace_back([&call, i] { call(i); });
    for (std::thread& caller : callers) caller.join();
}

// Whether a loop calls each piece once.
bool is_whole(size_t count, size_t at_a_time, int threads) {
    std::vector<std::atomic<int>> calls(count);
    for_each_piece(count, at_a_time, threads, [&](size_t i, Turn&) { calls[i]++; });
    for (const std::atomic<int>& times : calls)
        if (times != 1) return false;
    return true;
}

// Whether a loop throws what one of its pieces throws.
bool throws(size_t count, int threads, size_t faulty) {
    try {
        for_each_piece(count, 1, threads, [&](size_t i, Turn&) {
            if (i % faulty == faulty - 1) throw std::runtime_error(std::to_string(i));
        });
    } catch (const std::runtime_error& error) {
        return std::stoul(error.what()) % faulty == faulty - 1;
    }
    return false;
}

void test_pieces() {
    where = "pieces";
    for (int threads : {1, 2, 3, 9})
        for (size_t at_a_time : {1, 4, 64})
            for (size_t count : {0, 1, 3, 4, 5, 63, 64, 65, 500}) CHECK(is_whole(count, at_a_time, threads));
}

// Loops so short that another thread often has not begun when all is done: its part is taken back, and it must not begin
// when the loop has returned. Some sleep by then, others still spin.
void test_taken_back() {
    where = "taken back";
    for (int i = 0; i < 20000; i++) {
        CHECK(is_whole(2 + i % 3, 1, 2 + i % 2));
        if (i % 100 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

void test_exceptions() {
    where = "exceptions";
    for (int threads : {1, 2, 5})
        for (size_t faulty : {1, 2, 40, 100}) {
            CHECK(throws(100, threads, faulty));
            CHECK(is_whole(100, 1, threads));
        }
    CHECK(!throws(100, 3, 101));
}

// A piece that takes long ends soon after another has thrown.
void test_stop() {
    where = "stop";
    for (size_t endless : {0, 1}) {
        std::atomic<bool> has_begun{false}, was_stopped{false};
        try {
            for_each_piece(2, 1, 2, [&](size_t i, Turn& turn) {
                if (i != endless) {
                    while (!has_begun) std::this_thread::yield();
                    throw std::runtime_error("enough");
                }
                has_begun = true;
                try {
                    while (true) turn.check();
                } catch (const Turn::Stopped&) {
                    was_stopped = true;
                    throw;
                }
            });
            CHECK(false);
        } catch (const std::runtime_error&) {
        }
        CHECK(was_stopped);
    }
}

// Progress is told in the caller's thread, grows, and is told no more once it has thrown.
void test_progress() {
    where = "progress";
    const pthread_t caller = pthread_self();
    size_t told = 0;
    int times = 0;
    const Progress tell = [&](size_t rows) {
        CHECK(pthread_equal(pthread_self(), caller));
        CHECK(rows >= told);
        told = rows;
        times++;
    };
    const auto slow = [](size_t, Turn& turn) {
        std::this_thread::sleep_for(60ms);
        turn.advance(1);
    };
    for (int threads : {1, 2}) {
        told = 0, times = 0;
        for_each_piece(8, 1, threads, slow, tell);
        CHECK(times > 0 && told <= 8);
    }
    int thrown = 0;
    const Progress refuse = [&](size_t) {
        thrown++;
        throw std::logic_error("enough");
    };
    try {
        for_each_piece(2, 1, 2, [](size_t, Turn& turn) {
            const auto end = std::chrono::steady_clock::now() + (turn.thread == 0 ? 150ms : 500ms);
            while (std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(1ms);
        }, refuse);
        CHECK(false);
    } catch (const std::logic_error&) {
    }
    CHECK(thrown == 1);
}

// Callers at once, loops within loops, exceptions, and another number of threads at any time.
void test_callers() {
    where = "callers";
    std::atomic<bool> is_done{false};
    std::thread changer([&] {
        for (int i = 0; !is_done; i++) {
            set_num_threads(1 + i % 5);
            std::this_thread::yield();
        }
    });
    std::atomic<int> wrong{0};
    at_once(6, [&](int caller) {
        for (int i = 0; i < 60; i++) {
            const int threads = 1 + (caller + i) % 4;
            wrong += !is_whole(200, 1 + static_cast<size_t>(i % 3), threads);
            wrong += !throws(50, threads, 7);
            for_each_piece(4, 1, threads, [&](size_t, Turn&) { wrong += !is_whole(30, 1, 2); });
        }
    });
    is_done = true;
    changer.join();
    CHECK(wrong == 0);
}

// Whether a forked child does what its parent does.
bool works_in_child() {
    const pid_t child = fork();
    if (child == 0) alarm(60);   // which ends one that hangs
    if (child == 0) _exit(is_whole(100, 1, 3) && throws(100, 3, 9) && is_whole(100, 1, 3) ? 0 : 1);
    int status = -1;
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

void test_fork() {
    where = "fork while idle";
    CHECK(is_whole(100, 1, 4));
    for (int i = 0; i < 5; i++) {
        CHECK(works_in_child());
        CHECK(is_whole(100, 1, 4));
    }
#if !defined(__SANITIZE_ADDRESS__)   // whose allocator a child cannot use if another thread was in it
    where = "fork while busy";
    std::atomic<bool> is_done{false};
    std::atomic<int> wrong{0};
    std::thread forker([&] {
        for (int i = 0; i < 20; i++) wrong += !works_in_child();
        is_done = true;
    });
    at_once(3, [&](int) {
        while (!is_done) wrong += !is_whole(100, 1, 3);
    });
    forker.join();
    CHECK(wrong == 0);
    where = "fork within a loop";
    for_each_piece(4, 1, 2, [&](size_t, Turn&) { wrong += !works_in_child(); });
    CHECK(wrong == 0);
#endif
}

// A worker hears of what it did itself, and of nothing that is for the program.
void test_signals() {
    where = "signals";
    std::atomic<int> looked{0};
    for_each_piece(2, 1, 2, [&](size_t, Turn& turn) {
        sigset_t blocked;
        pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
        if (turn.thread == 1) {
            for (int own : {SIGBUS, SIGFPE, SIGILL, SIGSEGV}) CHECK(!sigismember(&blocked, own));
            for (int other : {SIGINT, SIGTERM, SIGCHLD, SIGALRM, SIGUSR1}) CHECK(sigismember(&blocked, other));
        }
        looked++;
        while (looked < 2) std::this_thread::yield();
    });
}

// Every thread rounds to nearest and keeps what is small, whatever the caller set, and the caller has its own back.
void test_floats() {
    where = "floats";
    const auto are_standard = [](int threads) {
        std::atomic<int> here{0}, wrong{0};
        for_each_piece(static_cast<size_t>(threads), 1, threads, [&](size_t, Turn&) {
            volatile float smallest = 0x1p-149f, one = 1.0f, zero = 0.0f, largest = 0x1.fffffep127f;
            wrong += smallest * one != 0x1p-149f || one + 0x1p-30f != 1.0f || one / zero != INFINITY;
            largest = largest * 2.0f;
            here++;
            while (here < threads) std::this_thread::yield();
        });
        return wrong == 0;
    };
    std::fenv_t before;
    std::fegetenv(&before);
    CHECK(are_standard(3));
    CHECK(!std::fetestexcept(FE_OVERFLOW));
    std::feraiseexcept(FE_UNDERFLOW);
    std::fesetround(FE_UPWARD);
#if defined(__x86_64__)
    constexpr unsigned flush_to_zero = 0x8040, all_masked = 0x1f80;
    __builtin_ia32_ldmxcsr((__builtin_ia32_stmxcsr() | flush_to_zero) & ~all_masked);
    const unsigned own = __builtin_ia32_stmxcsr();
    for (int threads : {1, 3, 5}) CHECK(are_standard(threads));
    CHECK(__builtin_ia32_stmxcsr() == own);
#endif
    CHECK(are_standard(3));
    CHECK(std::fegetround() == FE_UPWARD);
    CHECK(std::fetestexcept(FE_ALL_EXCEPT) == FE_UNDERFLOW);
    std::fesetenv(&before);
    CHECK(are_standard(7));   // of which some were started with other floats
}

// Packing and pooling by several callers, with the bytes of one.
void test_core() {
    where = "core";
    constexpr size_t num_rows = 3000, d = 40, num_bags = 400, bag_size = 20;
    Random random(1);
    std::vector<float> values(num_rows * d);
    for (float& value : values) value = random.normal();
    std::vector<int64_t> indices(num_bags * bag_size);
    for (int64_t& index : indices) index = static_cast<int64_t>(random.bits() % num_rows);
    const Grid grid{4, true};
    const size_t row_bytes = packed_row_bytes(d, grid);

    const auto pack_and_pool = [&](const Progress& progress) {
        std::vector<uint8_t> bytes(num_rows * row_bytes + num_bags * d * 2);
        const Rows rows{values.data(), ValueType::f32, num_rows, d};
        SearchParams params;
        quantize_rows(rows, &Kernels::search_greedy, params, grid, block_rows, bytes.data(), progress);
        const PackedRows packed{bytes.data(), num_rows, d, row_bytes, grid};
        Bags bags{.indices = {indices.data(), indices.size(), true}};
        bags.num_bags = num_bags, bags.bag_size = bag_size;
        size_t faulty;
        const Output out{bytes.data() + num_rows * row_bytes, d * 2, ValueType::f16};
        Lookup lookup{packed, bags, out};
        const LookupFault fault = pool({&lookup, 1}, faulty);
        if (fault.kind != LookupFault::none) bytes.clear();
        return bytes;
    };
    set_num_threads(1);
    const std::vector<uint8_t> wanted = pack_and_pool({});
    std::atomic<bool> is_done{false};
    std::thread changer([&] {
        for (int i = 0; !is_done; i++) {
            set_num_threads(1 + i % 3);
            std::this_thread::sleep_for(100us);
        }
    });
    std::atomic<int> wrong{0};
    at_once(4, [&](int) {
        for (int i = 0; i < 4; i++) {
            size_t told = 0;
            wrong += !same_bits(wanted, pack_and_pool([&](size_t rows) { told = rows; }));
            wrong += told > num_rows;
        }
    });
    is_done = true;
    changer.join();
    CHECK(wrong == 0);
}

// Rows that are written while others look them up: each is read whole, as it was before or as it is after, wherever it
// is read, and in a forked child too.
void test_updates() {
    where = "updates";
    constexpr size_t num_rows = 1500, d = 40;
    const Grid grid{4, true};
    const size_t row_bytes = packed_row_bytes(d, grid);
    std::vector<float> values(num_rows * d), ones(d, 1.0f);
    std::vector<uint8_t> versions[2] = {std::vector<uint8_t>(num_rows * row_bytes), std::vector<uint8_t>(num_rows * row_bytes)};
    std::vector<float> wanted[2] = {std::vector<float>(num_rows * d), std::vector<float>(num_rows * d)};
    std::vector<float> products[2] = {std::vector<float>(num_rows), std::vector<float>(num_rows)};
    Random random(2);
    set_num_threads(1);
    for (size_t version : {0, 1}) {
        for (float& value : values) value = random.normal();
        quantize_rows({values.data(), ValueType::f32, num_rows, d}, &Kernels::search_asym, {}, grid, block_rows,
                      versions[version].data(), {});
        const PackedRows rows{versions[version].data(), num_rows, d, row_bytes, grid};
        gather(rows, {}, {reinterpret_cast<uint8_t*>(wanted[version].data()), d * sizeof(float)});
        linear(rows, {ones.data(), 1, nullptr}, products[version].data());
    }
    std::vector<uint8_t> bytes = versions[0];
    const PackedRows packed{bytes.data(), num_rows, d, row_bytes, grid};
    std::vector<int64_t> numbers(num_rows);
    for (size_t i = 0; i < num_rows; i++) numbers[i] = static_cast<int64_t>(i);
    const auto update = [&](size_t version) {
        const ChangedRows changed{bytes.data(), versions[version].data(), row_bytes};
        write_rows(numbers, {&changed, 1});
    };
    const auto is_one_of = [](const float* found, const std::vector<float>* each, size_t first, size_t count) {
        const size_t size = count * sizeof(float);
        return std::memcmp(found, &each[0][first], size) == 0 || std::memcmp(found, &each[1][first], size) == 0;
    };
    const auto are_whole = [&] {
        std::vector<float> out(num_rows * d);
        gather(packed, {}, {reinterpret_cast<uint8_t*>(out.data()), d * sizeof(float)});
        Bags bags{.indices = {numbers.data(), num_rows, true}};
        bags.num_bags = num_rows, bags.bag_size = 1;
        std::vector<float> pooled(num_rows * d), multiplied(num_rows);
        Lookup lookup{packed, bags, {reinterpret_cast<uint8_t*>(pooled.data()), d * sizeof(float)}};
        size_t faulty;
        pool({&lookup, 1}, faulty);
        linear(packed, {ones.data(), 1, nullptr}, multiplied.data());
        bool are = true;
        for (size_t i = 0; i < num_rows; i++) {
            are &= is_one_of(&out[i * d], wanted, i * d, d) && is_one_of(&pooled[i * d], wanted, i * d, d);
            are &= is_one_of(&multiplied[i], products, i, 1);
        }
        return are;
    };
    set_num_threads(2);
    CHECK(are_whole());
    std::atomic<bool> is_done{false};
    std::atomic<int> wrong{0};
    std::thread reader([&] {
        while (!is_done) wrong += !are_whole();
    });
    std::thread other([&] {
        while (!is_done) wrong += !are_whole();
    });
    at_once(2, [&](int) {
        for (size_t i = 0; i < 100; i++) update(i % 2);
    });
#if !defined(__SANITIZE_ADDRESS__)   // as in test_fork
    std::thread writer([&] {
        for (size_t i = 0; !is_done; i++) update(i % 2);
    });
    for (int i = 0; i < 10; i++) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(60);
            const bool were_whole = are_whole();
            update(1);
            _exit(were_whole && bytes == versions[1] && are_whole() ? 0 : 1);
        }
        int status = -1;
        CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
    }
    is_done = true;
    writer.join();
#endif
    is_done = true;
    reader.join();
    other.join();
    CHECK(wrong == 0);
    update(1);
    CHECK(bytes == versions[1]);
}

}  // namespace

int main() {
    alarm(600);   // which ends the process if it hangs
    test_pieces();
    test_taken_back();
    test_exceptions();
    test_stop();
    test_progress();
    test_callers();
    test_fork();
    test_signals();
    test_floats();
    for (const Kernels* isa : all_kernels()) {
        use_isa(isa->isa);
        test_core();
        test_updates();
    }
    if (failures == 0) std::printf("threads work\n");
    return failures == 0 ? 0 : 1;
}
