// Positions of a lane in a block of so many columns: one for each vector, rounded up to a power of two and to
// `least_slots`, at most four.
inline constexpr size_t slots_of(size_t num_columns) {
    size_t slots = least_slots;
    while (num_columns > trellis_lanes * slots && slots < trellis_vectors) slots *= 2;
    return slots;
}
