#include "disk.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <system_error>

#include "threads.h"

namespace embpack {

namespace {

// Reads under way. 16 gave .72 of the rows of 64 a second, 32 .87, 128 1.05 (a virtual disk of NVMe).
constexpr size_t most_readers = 64;

constexpr uint64_t page_bytes = 4096;

// Of rows that are read together, with what lies between them.
constexpr uint64_t most_span_bytes = uint64_t{1} << 14;

// Spans that wait for being prefetched, at most: 32 bytes each.
constexpr size_t most_prefetches = size_t{1} << 20;

// Spans that are looked for in the cache of pages by a thread in one go, and how many of the first are not there before
// it stops looking.
constexpr size_t spans_at_a_time = 64, few_misses = 4;

// What looking for one there takes, in values that are looked up from memory meanwhile.
constexpr size_t values_of_a_span = 512;

// Rows that are read together: some of a read's, in one piece.
struct Span {
    const DiskRead* read;
    const DiskPiece* piece;
    size_t first, end;   // of the read's rows

    uint64_t offset_of(size_t i) const {
        const uint64_t row = static_cast<uint64_t>(read->rows[i]) - piece->first_row;
        return piece->offset + row * read->array.row_bytes;
    }
    uint64_t offset() const { return offset_of(first); }
    uint64_t num_bytes() const { return offset_of(end - 1) + read->array.row_bytes - offset(); }
    // Of the first row that is not there, where fewer than all bytes are.
    uint64_t offset_of_missing(uint64_t num_bytes_there) const {
        size_t i = first;
        while (offset_of(i) + read->array.row_bytes <= offset() + num_bytes_there) i++;
        return offset_of(i);
    }

    // Whether the row after the last lies on the same page, or right behind it, and is read along.
    bool takes_next() const {
        if (end == read->rows.size() || static_cast<uint64_t>(read->rows[end]) >= piece->first_row + piece->num_rows)
            return false;
        const uint64_t next = offset_of(end), stop = offset() + num_bytes();
        const bool is_near = next <= stop || next / page_bytes == (stop - 1) / page_bytes;
        return is_near && next + read->array.row_bytes - offset() <= most_span_bytes;
    }
};

// Cuts the rows of a read into spans, which are added to others.
void cut(const DiskRead& read, std::vector<Span>& spans) {
    const DiskPiece* piece = read.array.pieces.data();
    for (size_t first = 0; first < read.rows.size(); first = spans.back().end) {
        while (static_cast<uint64_t>(read.rows[first]) >= piece->first_row + piece->num_rows) piece++;
        Span& span = spans.emplace_back(&read, piece, first, first + 1);
        while (span.takes_next()) span.end++;
    }
}

using Scratch = std::array<uint8_t, most_span_bytes>;

// Reads the bytes of a span, to its read's rows if all are there, and returns how many are. errno says why there are no
// more; it is 0 where the file ends.
size_t read_span(const Span& span, Scratch& scratch, int flags) {
    const size_t row_bytes = span.read->array.row_bytes, count = span.end - span.first;
    uint8_t* const out = span.read->out + span.first * row_bytes;
    const size_t num_bytes = span.num_bytes();
    const bool has_gaps = num_bytes != count * row_bytes;
    uint8_t* const to = has_gaps ? scratch.data() : out;
    size_t done = 0;
    while (done < num_bytes) {
        const iovec rest{to + done, num_bytes - done};
        const off_t offset = static_cast<off_t>(span.offset() + done);
        const ssize_t got = preadv2(span.piece->file->descriptor, &rest, 1, offset, flags);
        if (got < 0 && errno == EINTR && flags == 0) continue;
        if (got == 0) errno = 0;
        if (got <= 0) return done;
        done += static_cast<size_t>(got);
    }
    if (has_gaps)
        for (size_t i = 0; i < count; i++)
            std::memcpy(out + i * row_bytes, to + (span.offset_of(span.first + i) - span.offset()), row_bytes);
    return done;
}

// Spans that a caller waits for, while readers read them. All of it is guarded by their lock.
struct Wanted {
    explicit Wanted(std::span<const DiskRead> reads) : reads(reads) {}

    const std::span<const DiskRead> reads;
    std::deque<Span> waiting;
    size_t under_way = 0;
    std::optional<DiskFault> fault;
    std::condition_variable changed;

    bool is_over() const { return under_way == 0 && waiting.empty(); }
};

// What is to be read before anybody waits for it.
struct Prefetch {
    std::shared_ptr<const DiskFile> file;   // none for bytes that are mapped
    uint64_t offset;                        // or their address
    uint64_t num_bytes;

    void start() const {
        const off_t first = static_cast<off_t>(offset), length = static_cast<off_t>(num_bytes);
        if (file)
            posix_fadvise(file->descriptor, first, length, POSIX_FADV_WILLNEED);
        else   // whatever is mapped there by now, this changes nothing of it
            madvise(reinterpret_cast<void*>(offset), num_bytes, MADV_WILLNEED);
    }
};

// Threads that wait for the disk. There are none before the first read that has to.
class Readers {
public:
    // Adds to what a caller waits for.
    void add(Wanted& wanted, const std::vector<Span>& spans) {
        {
            const std::lock_guard lock(mutex_);
            if (spans.empty() || wanted.fault) return;
            const bool is_new = wanted.waiting.empty();
            wanted.waiting.insert(wanted.waiting.end(), spans.begin(), spans.end());
            if (is_new) callers_.push_back(&wanted);   // last: readers take it that something waits there
            start_for(spans.size());
        }
        wake(spans.size());
    }

    void add(std::vector<Prefetch>& prefetches) {
        {
            const std::lock_guard lock(mutex_);
            for (Prefetch& prefetch : prefetches) {
                if (prefetches_.size() == most_prefetches) prefetches_.pop_front();
                prefetches_.push_back(std::move(prefetch));
            }
            start_for(prefetches.size());
        }
        wake(prefetches.size());
    }

    // Reads along with the others until all is read, or a fault is found.
    void finish(Wanted& wanted) {
        Loop loop(1, 1, no_progress);
        Turn turn(loop, 0);
        std::unique_lock lock(mutex_);
        while (!wanted.is_over()) {
            if (!wanted.waiting.empty())
                read_next(wanted, lock);
            else
                wanted.changed.wait_for(lock, Turn::interval);
            lock.unlock();
            turn.check();
            lock.lock();
        }
    }

    // Waits for what is under way, and leaves the rest.
    void give_up(Wanted& wanted) {
        std::unique_lock lock(mutex_);
        drop(wanted);
        wanted.changed.wait(lock, [&] { return wanted.is_over(); });
    }

    // Ends all threads, if they have nothing to do.
    void dismiss() {
        std::unique_lock lock(mutex_);
        if (is_dismissed_ || num_busy_ > 0 || !callers_.empty() || !prefetches_.empty()) return;
        is_dismissed_ = true;
        lock.unlock();
        changed_.notify_all();
        for (pthread_t thread : threads_) pthread_join(thread, nullptr);
        lock.lock();
        threads_.clear();
        is_dismissed_ = false;
    }

private:
    // Starts threads for so many more spans, with the lock, if those that are idle do not do.
    void start_for(size_t count) {
        if (is_dismissed_) return;   // who waits reads, too
        try {
            threads_.reserve(most_readers);
            for (size_t i = threads_.size() - num_busy_; i < count && threads_.size() < most_readers; i++)
                threads_.push_back(start_thread(&Readers::live, this));
        } catch (const std::exception&) {   // no memory, or no more threads are allowed: those that there are will do
        }
    }

    // Wakes threads for so many more spans, without the lock, for which they would wait.
    void wake(size_t count) {
        if (count >= most_readers / 2) return changed_.notify_all();
        for (size_t i = 0; i < count; i++) changed_.notify_one();
    }

    static void* live(void* self) {
        static_cast<Readers*>(self)->obey();
        return nullptr;
    }

    void obey() {
        std::unique_lock lock(mutex_);
        while (true) {
            changed_.wait(lock, [&] { return !callers_.empty() || !prefetches_.empty() || is_dismissed_; });
            if (is_dismissed_) return;
            num_busy_++;
            if (!callers_.empty()) {
                read_next(*callers_.front(), lock);
            } else {
                const Prefetch prefetch = std::move(prefetches_.front());
                prefetches_.pop_front();
                lock.unlock();
                prefetch.start();
                lock.lock();
            }
            num_busy_--;
        }
    }

    // Reads the next span that a caller waits for, meanwhile without the lock.
    void read_next(Wanted& wanted, std::unique_lock<std::mutex>& lock) {
        const Span span = wanted.waiting.front();
        wanted.waiting.pop_front();
        if (wanted.waiting.empty()) drop(wanted);
        wanted.under_way++;
        lock.unlock();
        Scratch scratch;
        const size_t num_bytes_there = read_span(span, scratch, 0);
        const int error = errno;
        lock.lock();
        wanted.under_way--;
        if (num_bytes_there < span.num_bytes() && !wanted.fault) {
            const size_t read = static_cast<size_t>(span.read - wanted.reads.data());
            const size_t piece = static_cast<size_t>(span.piece - span.read->array.pieces.data());
            wanted.fault = {read, piece, span.offset_of_missing(num_bytes_there), error};
            drop(wanted);
        }
        if (wanted.is_over()) wanted.changed.notify_all();
    }

    void drop(Wanted& wanted) {
        wanted.waiting.clear();
        std::erase(callers_, &wanted);
    }

    static inline const Progress no_progress;

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Wanted*> callers_;   // those with spans that wait
    std::deque<Prefetch> prefetches_;
    std::vector<pthread_t> threads_;
    size_t num_busy_ = 0;
    bool is_dismissed_ = false;
};

// Never deleted: threads may outlive what is static.
std::atomic<Readers*> readers{new Readers};

// As of the threads that look rows up: threads that are idle end before a fork, and a child starts some of its own.
[[maybe_unused]] const int registered =
    pthread_atfork([] { readers.load()->dismiss(); }, nullptr, [] { readers = new Readers; });

}  // namespace

DiskFile::DiskFile(int descriptor) : descriptor(fcntl(descriptor, F_DUPFD_CLOEXEC, 0)) {
    if (this->descriptor < 0) throw std::system_error(errno, std::generic_category());
    posix_fadvise(this->descriptor, 0, 0, POSIX_FADV_RANDOM);
}

DiskFile::~DiskFile() { close(descriptor); }

std::optional<DiskFault> read_rows(std::span<const DiskRead> reads) {
    std::vector<Span> spans;
    for (const DiskRead& read : reads) cut(read, spans);
    Readers& own = *readers.load();
    Wanted wanted(reads);
    try {
        // What is in the cache of pages is read here: that takes less than waking a thread. But where most is not, it is
        // quicker not to look.
        const size_t count = (spans.size() + spans_at_a_time - 1) / spans_at_a_time;
        std::atomic<bool> is_cold{false};
        for_each_piece(count, 1, threads_for(spans.size() * values_of_a_span), [&](size_t i, Turn&) {
            Scratch scratch;
            std::vector<Span> missed;
            const size_t first = i * spans_at_a_time, end = std::min(spans.size(), first + spans_at_a_time);
            for (size_t k = first; k < end; k++) {
                if (!is_cold && read_span(spans[k], scratch, RWF_NOWAIT) == spans[k].num_bytes()) continue;
                missed.push_back(spans[k]);
                if (missed.size() >= few_misses + (k - first) / 2) is_cold = true;
            }
            own.add(wanted, missed);
        });
        own.finish(wanted);
    } catch (...) {
        own.give_up(wanted);
        throw;
    }
    return wanted.fault;
}

int write_file_rows(int descriptor, uint64_t offset, size_t row_bytes, std::span<const int64_t> rows, const uint8_t* bytes) {
    for (size_t first = 0, end; first < rows.size(); first = end) {
        for (end = first + 1; end < rows.size() && rows[end] == rows[end - 1] + 1; end++) {}
        uint64_t at = offset + static_cast<uint64_t>(rows[first]) * row_bytes;
        for (size_t left = (end - first) * row_bytes; left > 0;) {
            const ssize_t written = pwrite(descriptor, bytes, left, static_cast<off_t>(at));
            if (written < 0 && errno == EINTR) continue;
            if (written < 0) return errno;
            bytes += written;
            at += static_cast<size_t>(written);
            left -= static_cast<size_t>(written);
        }
    }
    return 0;
}

void prefetch_rows(const DiskRows& array, std::span<const int64_t> rows) {
    const DiskRead read{array, rows, nullptr};
    std::vector<Span> spans;
    cut(read, spans);
    std::vector<Prefetch> prefetches;
    for (const Span& span : spans) prefetches.push_back({span.piece->file, span.offset(), span.num_bytes()});
    readers.load()->add(prefetches);
}

void prefetch_mapped_rows(const uint8_t* first_row, size_t row_bytes, std::span<const int64_t> rows) {
    std::vector<Prefetch> prefetches;
    for (int64_t row : rows) {
        const uint64_t start = reinterpret_cast<uintptr_t>(first_row) + static_cast<uint64_t>(row) * row_bytes;
        const uint64_t first_page = start / page_bytes * page_bytes;
        const uint64_t end_page = (start + row_bytes + page_bytes - 1) / page_bytes * page_bytes;
        if (!prefetches.empty() && end_page <= prefetches.back().offset + prefetches.back().num_bytes) continue;
        prefetches.push_back({nullptr, first_page, end_page - first_page});
    }
    readers.load()->add(prefetches);
}

}  // namespace embpack
