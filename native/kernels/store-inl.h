// Values on their way out: to float32, float16 or bfloat16.

// To bfloat16, nearest, ties to even; NaN stays NaN.
inline void store_bf16(uint16_t* p, const float* values, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        std::memcpy(&bits, values + i, 4);
        const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
        const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
        p[i] = static_cast<uint16_t>((is_nan ? bits | 0x400000u : rounded) >> 16);
    }
}

// Columns j .. j + n of a row of the output.
inline void store_values(uint8_t* to, ValueType type, size_t j, F32x16 values, size_t n) {
    if (type == ValueType::f32) {
        float* const wide = reinterpret_cast<float*>(to) + j;
        return n == 16 ? store(wide, values) : store_first(wide, values, n);
    }
    uint16_t narrow[16];
    if (type == ValueType::f16) {
        store_f16(narrow, values);
    } else {
        float wide[16];
        store(wide, values);
        store_bf16(narrow, wide, 16);
    }
    std::memcpy(to + 2 * j, narrow, 2 * n);
}
