// What kernels need of C++ itself.

// Not the standard library's: an instruction set's file must not have templates that another's has, too.
inline constexpr size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

// Calls use(0) .. use(n - 1), written out: GCC keeps the vectors of an array in registers only if no variable is ever
// its index.
template <size_t n, class Use>
[[gnu::always_inline]] inline void unrolled(const Use& use) {
    if constexpr (n > 0) {
        unrolled<n - 1>(use);
        use(n - 1);
    }
}

// Positions that a lane of a trellis-coded block has: of a part of a block fewer may be enough.
inline constexpr size_t slots_of(size_t num_columns) {
    size_t slots = least_slots;
    while (num_columns > trellis_lanes * slots && slots < trellis_vectors) slots *= 2;
    return slots;
}
