// What kernels need of C++ itself.

// Not the standard library's: an instruction set's file must not have templates that another's has, too.
inline constexpr size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
inline constexpr size_t within(size_t x, size_t least, size_t most) { return smaller(x < least ? least : x, most); }
// The largest power of two that is not above x; 0 for 0.
inline constexpr size_t largest_power_within(size_t x) {
    size_t power = x > 0;
    while (power <= x / 2 && power > 0) power *= 2;
    return power;
}

// Calls use(0) .. use(n - 1), written out: GCC keeps the vectors of an array in registers only if no variable is ever
// its index.
template <size_t n, class Use>
[[gnu::always_inline]] inline void unrolled(const Use& use) {
    if constexpr (n > 0) {
        unrolled<n - 1>(use);
        use(n - 1);
    }
}

template <class T>
struct Type {};
