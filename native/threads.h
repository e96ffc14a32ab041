#pragma once

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#if !defined(__x86_64__)
#include <cfenv>
#endif

#include "kernels.h"

namespace embpack {

// Threads that a parallel loop uses when there is work for all of them: OMP_NUM_THREADS or the CPUs available,
// until set_num_threads. Survives fork: a child starts threads of its own.
int num_threads();
void set_num_threads(int count);

// num_threads(), or fewer where starting them would cost more than the work of `values` values.
int threads_for(size_t values);

// What long loops call now and then in the thread that they were called in; what it throws ends the loop. The bindings
// let Python handle signals there. The core alone has nothing to call.
void set_interruption(void (*check)());

// Told of the rows that are done, now and then, in the thread that the loop was called in; what it throws ends the loop.
using Progress = std::function<void(size_t rows_done)>;

// Floats as the standard has them, while it lives: rounded to nearest, the smallest are no zeros, infinity and NaN no
// trap. torch.set_flush_denormal and <cfenv> change that for a thread and for those that it starts later, and what a row
// is packed to would depend on the thread that packs it. The caller gets back what it had, flags that were raised too.
class StandardFloats {
public:
    StandardFloats();
    ~StandardFloats();
    StandardFloats(const StandardFloats&) = delete;
    StandardFloats& operator=(const StandardFloats&) = delete;

private:
#if defined(__x86_64__)
    unsigned before_;   // fegetenv asks for the old unit's, too, and takes as long as looking up a row
#else
    std::fenv_t before_;
#endif
};

// What the threads of a loop share.
class Loop {
public:
    Loop(size_t count, size_t at_a_time, const Progress& progress)
        : count_(count), at_a_time_(at_a_time), progress_(progress) {}

    // The first of the next pieces, at_a_time of them; `count` or more when there are none, or the loop is to end.
    size_t take() { return is_stopped() ? count_ : next_.fetch_add(at_a_time_, std::memory_order_relaxed); }
    // Adds to the rows that are done. Where nobody is told of them, threads are spared the traffic.
    void advance(size_t rows) {
        if (progress_) rows_done_.fetch_add(rows, std::memory_order_relaxed);
    }
    bool is_stopped() const { return is_stopped_.load(std::memory_order_relaxed); }
    // Only in the thread that the loop was called in.
    void look();
    // Ends the loop for the exception that is being handled, of several the first.
    void fail() noexcept;
    void rethrow() const {
        if (fault_) std::rethrow_exception(fault_);
    }

private:
    size_t count_, at_a_time_;
    const Progress& progress_;
    std::atomic<bool> is_stopped_{false};
    // Each thread writes these all the time: on lines of the cache of their own, others can be read in peace.
    alignas(64) std::atomic<size_t> next_{0};
    alignas(64) std::atomic<size_t> rows_done_{0};
    alignas(64) std::mutex mutex_;
    std::exception_ptr fault_;
};

// A thread's part in a loop.
class Turn {
public:
    // How often a loop looks for signals, and tells of its progress.
    static constexpr std::chrono::milliseconds interval{100};

    Turn(Loop& loop, int thread) : thread(thread), loop_(loop) {}

    // To be called between pieces, and within one that takes long: throws if the loop is to end.
    void check() {
        if (fault_) std::rethrow_exception(fault_);
        if (loop_.is_stopped()) throw Stopped();
        if (thread == 0) look_in_time();
    }
    // The same for a kernel, which throws nothing: where it is told to stop, the next check() throws.
    Stop as_stop() {
        return {[](void* self) noexcept { return static_cast<Turn*>(self)->is_over(); }, this};
    }
    void advance(size_t rows) { loop_.advance(rows); }

    struct Stopped {};
    const int thread;   // 0 is the one that the loop was called in

private:
    void look_in_time();
    bool is_over() noexcept {
        try {
            check();
        } catch (...) {
            fault_ = std::current_exception();
        }
        return fault_ != nullptr;
    }

    Loop& loop_;
    std::exception_ptr fault_;
    int64_t next_look_ = 0;   // in milliseconds
};

// Starts a thread with a small stack, which no signals are sent to. Throws std::system_error.
pthread_t start_thread(void* (*live)(void*), void* argument);

// Calls work(0) here and work(1), work(2), .. in as many other threads as there are to be had, at most `threads` in
// all. `wait` is called here, while others work on.
void work_together(int threads, const std::function<void(int)>& work, const std::function<void()>& wait);

// Calls run(i, turn) for each i below `count`, at_a_time of them in one go, by up to that many threads. What it throws
// in one of them ends the loop and is thrown here. One thread needs no others, whose start costs as much as pooling a
// hundred rows.
template <class Run>
void for_each_piece(size_t count, size_t at_a_time, int threads, const Run& run, const Progress& progress = {}) {
    Loop loop(count, at_a_time, progress);
    const auto work = [&](int thread) {
        const StandardFloats floats;
        Turn turn(loop, thread);
        for (size_t first; (first = loop.take()) < count;) {
            const size_t end = count - first < at_a_time ? count : first + at_a_time;
            for (size_t i = first; i < end; i++) {
                run(i, turn);
                if (i + 1 < count) turn.check();
            }
        }
    };
    if (threads == 1 || count <= at_a_time) return work(0);
    const auto keep_exception = [&](const auto& call) {
        try {
            call();
        } catch (const Turn::Stopped&) {   // by another thread, whose exception is kept
        } catch (...) {
            loop.fail();
        }
    };
    const auto work_safely = [&](int thread) { keep_exception([&] { work(thread); }); };
    const auto wait = [&] {   // A loop that ends for one exception asks for no other, which would be lost.
        if (!loop.is_stopped()) keep_exception([&] { loop.look(); });
    };
    work_together(threads, std::ref(work_safely), std::ref(wait));
    loop.rethrow();
}

}  // namespace embpack
