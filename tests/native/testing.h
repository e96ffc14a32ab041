// What native tests share: checks, random values, and memory that ends where the last value does.
//
// The address sanitizer watches every byte around buffers from the heap; it does not see masked loads and stores, so
// buffers are also made to end, then start, at a page that cannot be touched.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "dispatch.h"
#include "kernels.h"

namespace embpack::testing {

inline int failures = 0;
inline std::string where;   // what is being tested, for messages

#define CHECK(condition)                                                                             \
    do {                                                                                             \
        if (!(condition)) {                                                                          \
            std::printf("%s:%d: %s, in %s\n", __FILE__, __LINE__, #condition, where.c_str());        \
            failures++;                                                                              \
        }                                                                                            \
    } while (false)

// Small and fast, the same everywhere.
class Random {
public:
    explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}

    uint32_t bits() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return static_cast<uint32_t>(state_ >> 32);
    }
    float uniform() { return static_cast<float>(bits() >> 8) * 0x1p-24f; }
    // Roughly normal.
    float normal() { return uniform() + uniform() + uniform() + uniform() - 2.0f; }

private:
    uint64_t state_;
};

enum class Placement { heap, before_a_guard, after_a_guard };
inline constexpr Placement placements[] = {Placement::heap, Placement::before_a_guard, Placement::after_a_guard};

inline const char* name_of(Placement placement) {
    const char* names[] = {"heap", "before a guard page", "after a guard page"};
    return names[static_cast<int>(placement)];
}

// Memory between two pages that cannot be touched.
class Arena {
public:
    Arena() : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
        void* memory = mmap(nullptr, page_ + usable + page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) std::abort();
        start_ = static_cast<uint8_t*>(memory) + page_;
        if (mprotect(start_, usable, PROT_READ | PROT_WRITE) != 0) std::abort();
    }
    ~Arena() { munmap(start_ - page_, page_ + usable + page_); }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    uint8_t* place(size_t bytes, Placement placement) {
        if (bytes > usable) std::abort();
        return placement == Placement::before_a_guard ? start_ + usable - bytes : start_;
    }

private:
    static constexpr size_t usable = size_t{1} << 24;
    size_t page_;
    uint8_t* start_;
};

// `count` values and not a byte more. Buffers that live at the same time need arenas of their own.
template <class T>
class Buffer {
public:
    Buffer(size_t count, Placement placement, Arena& arena) : count_(count) {
        if (placement == Placement::heap) {
            owned_ = std::make_unique<T[]>(count);
            values_ = owned_.get();
        } else {
            values_ = reinterpret_cast<T*>(arena.place(count * sizeof(T), placement));
            std::memset(values_, 0, count * sizeof(T));
        }
    }
    Buffer(const std::vector<T>& from, Placement placement, Arena& arena) : Buffer(from.size(), placement, arena) {
        if (!from.empty()) std::memcpy(values_, from.data(), from.size() * sizeof(T));
    }

    T* get() { return values_; }
    std::vector<T> copy() const { return {values_, values_ + count_}; }

private:
    size_t count_;
    std::unique_ptr<T[]> owned_;
    T* values_;
};

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
inline bool same_bits(double a, double b) { return std::memcmp(&a, &b, sizeof a) == 0; }

// The kernels of each instruction set that this CPU runs, portable first.
inline std::vector<const Kernels*> all_kernels() {
    std::vector<const Kernels*> all;
    for (std::string_view name : available_isas()) {
        CHECK(use_isa(name));
        CHECK(name == kernels().isa);
        all.insert(all.begin(), &kernels());
    }
    return all;
}

}  // namespace embpack::testing
