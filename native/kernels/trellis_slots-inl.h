// Positions that a lane of a block has: of a part of a block fewer may be enough.
inline constexpr size_t slots_of(size_t num_columns) {
    size_t slots = least_slots;
    while (num_columns > trellis_lanes * slots && slots < trellis_vectors) slots *= 2;
    return slots;
}
