#include "threads.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>

namespace embpack {

namespace {

// A thread is woken for no less work than this: about what one core reads in the time that waking takes.
constexpr size_t values_worth_a_thread = size_t{1} << 14;

std::atomic<int>& thread_count() {
    static std::atomic<int> count{omp_get_max_threads()};
    return count;
}

// A forked child has only the thread that forked, but libgomp would still wait for the others of its pool.
// Giving the pool up before the fork makes both sides start a new one when they next need it.
void release_threads() { omp_pause_resource_all(omp_pause_soft); }
[[maybe_unused]] const int registered = pthread_atfork(release_threads, nullptr, nullptr);

}  // namespace

int num_threads() { return thread_count().load(std::memory_order_relaxed); }

void set_num_threads(int count) { thread_count().store(count, std::memory_order_relaxed); }

int threads_for(size_t values) {
    const size_t worth = std::max<size_t>(1, values / values_worth_a_thread);
    return static_cast<int>(std::min<size_t>(worth, static_cast<size_t>(num_threads())));
}

}  // namespace embpack
