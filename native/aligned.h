#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace embpack {

// Numbers on cache lines of their own, not set to anything: a vector across two lines costs two loads, and some loops
// are that tight.
template <class T>
class Aligned {
public:
    explicit Aligned(size_t count) : values_(static_cast<T*>(operator new(count * sizeof(T), line))) {}

    T* data() { return values_.get(); }
    const T* data() const { return values_.get(); }

private:
    static constexpr std::align_val_t line{64};
    struct Free {
        void operator()(T* p) const { operator delete(p, line); }
    };
    std::unique_ptr<T, Free> values_;
};

}  // namespace embpack
