#include "threads.h"

#include <sched.h>
#include <signal.h>
#include <time.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

namespace embpack {

namespace {

// A thread is woken for no less work than this: about what one core reads in the time that waking takes.
constexpr size_t values_worth_a_thread = size_t{1} << 14;

// A thread that waits spins before it sleeps, so that calls in a row find it awake; waking it takes longer than many
// calls do. But where another process has taken a CPU, a thread that spins keeps one that works from running: it sleeps
// after less than a millisecond. Pauses of the CPU, of 15 to 50 ns each.
constexpr int pauses_before_sleep = 20000;

// Of our threads. No kernel needs a quarter of it, and limits (ulimit -s, ulimit -v) do not shrink or multiply it.
constexpr size_t stack_bytes = size_t{1} << 21;

int count_cpus() {
    cpu_set_t cpus;
    if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) return CPU_COUNT(&cpus);
    return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

int choose_num_threads() {
    const char* wanted = std::getenv("OMP_NUM_THREADS");
    const long count = wanted ? std::strtol(wanted, nullptr, 10) : 0;
    return count > 0 ? static_cast<int>(std::min(count, 4096l)) : count_cpus();
}

// Set before any thread is there, as what else lives as long: where one forks while another thread makes a value that is
// static in a function, the child waits for ever for that thread.
std::atomic<int> thread_count{choose_num_threads()};

std::atomic<void (*)()> interruption{nullptr};

inline void pause_cpu() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A thread that does what it is told and then waits for the next call.
class Worker {
public:
    // Starts the thread.
    Worker() : thread_(start_thread(&Worker::live, this)) {}
    // Ends it; it has to be idle.
    ~Worker() {
        start(nullptr, 0);
        pthread_join(thread_, nullptr);
    }

    // Calls (*work)(number) there.
    void start(const std::function<void(int)>* work, int number) {
        {
            const std::lock_guard lock(mutex_);
            work_ = work;
            number_ = number;
            state_.store(State::called, std::memory_order_release);
        }
        changed_.notify_one();
    }

    // Waits until it is idle, and meanwhile calls `wait` now and then. A call that it has not begun is taken back: what
    // there was to do is done, and where other programs have the CPUs it may take long until it finds that out.
    void finish(int pauses, const std::function<void()>& wait) {
        if (replace(State::called, State::idle)) return;
        const auto is_idle = [&] { return state_.load(std::memory_order_acquire) == State::idle; };
        for (int i = 0; i < pauses; i++) {
            if (is_idle()) return;
            pause_cpu();
        }
        while (true) {
            {
                std::unique_lock lock(mutex_);
                if (changed_.wait_for(lock, Turn::interval, is_idle)) return;
            }
            wait();
        }
    }

private:
    static void* live(void* self) {
        // What the C++ library keeps of a thread's exceptions is made when it is first asked for. Later there may be no
        // memory for it, and to throw the exception that says so would end the process.
        [[maybe_unused]] const volatile int asked = std::uncaught_exceptions();
        static_cast<Worker*>(self)->obey();
        return nullptr;
    }

    void obey() {
        const auto is_called = [&] { return state_.load(std::memory_order_acquire) == State::called; };
        while (true) {
            for (int i = 0; i < pauses.load(std::memory_order_relaxed) && !is_called(); i++) pause_cpu();
            {
                std::unique_lock lock(mutex_);
                changed_.wait(lock, is_called);
            }
            if (!replace(State::called, State::working)) continue;   // taken back
            if (!work_) return;
            (*work_)(number_);
            {
                const std::lock_guard lock(mutex_);
                state_.store(State::idle, std::memory_order_release);
            }
            changed_.notify_one();
        }
    }

public:
    // How long threads spin: not at all where there are more than CPUs, of which one that spins would take one.
    static inline std::atomic<int> pauses{pauses_before_sleep};

private:
    enum class State { idle, called, working };

    bool replace(State before, State after) {
        return state_.compare_exchange_strong(before, after, std::memory_order_acq_rel);
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::atomic<State> state_{State::idle};
    const std::function<void(int)>* work_ = nullptr;
    int number_ = 0;
    pthread_t thread_;
};

using Workers = std::vector<std::unique_ptr<Worker>>;

// The workers that nobody has called. There are as many in all as were ever at work at the same time.
class Crew {
public:
    // Up to `count` workers: fewer where no more threads can be started.
    Workers hire(size_t count) {
        Workers hired;
        hired.reserve(count);
        const std::lock_guard lock(mutex_);
        idle_.reserve(num_workers_ + count);   // so that giving workers back takes no memory
        while (hired.size() < count && !idle_.empty()) {
            hired.push_back(std::move(idle_.back()));
            idle_.pop_back();
        }
        try {
            while (hired.size() < count) {
                hired.push_back(std::make_unique<Worker>());
                num_workers_++;
            }
        } catch (const std::exception&) {   // no memory, or no more threads are allowed: those that there are will do
        }
        Worker::pauses.store(num_workers_ < num_cpus_ ? pauses_before_sleep : 0, std::memory_order_relaxed);
        return hired;
    }

    void give_back(Workers& hired) {
        const std::lock_guard lock(mutex_);
        for (std::unique_ptr<Worker>& worker : hired) idle_.push_back(std::move(worker));
    }

    void dismiss() {
        const std::lock_guard lock(mutex_);
        num_workers_ -= idle_.size();
        idle_.clear();
    }

private:
    const size_t num_cpus_ = static_cast<size_t>(count_cpus());
    std::mutex mutex_;
    Workers idle_;
    size_t num_workers_ = 0;
};

// Never deleted: threads may outlive what is static.
std::atomic<Crew*> crew{new Crew};

// A forked child has only the thread that forked. Threads that are idle end before the fork, as what has but one thread
// is forked safely (Python warns of others); those that work for another caller are the parent's alone, and the child
// forgets them.
[[maybe_unused]] const int registered = pthread_atfork([] { crew.load()->dismiss(); }, nullptr, [] { crew = new Crew; });

}  // namespace

int num_threads() { return thread_count.load(std::memory_order_relaxed); }

void set_num_threads(int count) { thread_count.store(count, std::memory_order_relaxed); }

int threads_for(size_t values) {
    const size_t worth = std::max<size_t>(1, values / values_worth_a_thread);
    return static_cast<int>(std::min<size_t>(worth, static_cast<size_t>(num_threads())));
}

void set_interruption(void (*check)()) { interruption.store(check); }

#if defined(__x86_64__)
StandardFloats::StandardFloats() : before_(_mm_getcsr()) {
    constexpr unsigned flags = _MM_EXCEPT_MASK, standard = _MM_MASK_MASK;
    if ((before_ & ~flags) != standard) _mm_setcsr(standard);
}
StandardFloats::~StandardFloats() {
    if (_mm_getcsr() != before_) _mm_setcsr(before_);
}
#else
StandardFloats::StandardFloats() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
}
StandardFloats::~StandardFloats() { std::fesetenv(&before_); }
#endif

void Loop::look() {
    if (const auto check = interruption.load()) check();
    if (progress_) progress_(rows_done_.load(std::memory_order_relaxed));
}

void Loop::fail() noexcept {
    const std::lock_guard lock(mutex_);
    if (!fault_) fault_ = std::current_exception();
    is_stopped_.store(true, std::memory_order_relaxed);
}

void Turn::look_in_time() {
    // The coarse clock takes a few nanoseconds, a tenth of what the fine one does: there are short pieces.
    timespec now_is;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now_is);
    const int64_t now = int64_t{now_is.tv_sec} * 1000 + now_is.tv_nsec / 1000000;
    if (next_look_ == 0) next_look_ = now + interval.count();
    if (now < next_look_) return;
    next_look_ = now + interval.count();
    loop_.look();
}

pthread_t start_thread(void* (*live)(void*), void* argument) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, stack_bytes);
    // Signals are for the threads of the program, but for those that tell of what a thread did itself: blocked, they
    // would end the process unheard by faulthandler.
    sigset_t others, before;
    sigfillset(&others);
    for (int own : {SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGTRAP}) sigdelset(&others, own);
    pthread_sigmask(SIG_SETMASK, &others, &before);
    pthread_t thread;
    const int error = pthread_create(&thread, &attributes, live, argument);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    if (error != 0) throw std::system_error(error, std::generic_category());
    return thread;
}

void work_together(int threads, const std::function<void(int)>& work, const std::function<void()>& wait) {
    Crew& own_crew = *crew.load();
    Workers hired = own_crew.hire(static_cast<size_t>(threads) - 1);
    for (size_t i = 0; i < hired.size(); i++) hired[i]->start(&work, static_cast<int>(i) + 1);
    work(0);
    const int pauses = Worker::pauses.load(std::memory_order_relaxed);
    for (const std::unique_ptr<Worker>& worker : hired) worker->finish(pauses, wait);
    own_crew.give_back(hired);
}

}  // namespace embpack
