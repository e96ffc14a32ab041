// Values on their way out: to float32, float16 or bfloat16. A finite value that the type cannot hold becomes its largest:
// a level may lie a little outside the range of the weights, and those were finite. Infinities and NaN stay.

inline F32x16 clip_to_f16(F32x16 values) {
    const F32x16 clipped = max(min(values, splat(65504.0f)), splat(-65504.0f));
    return select(finite(values), clipped, values);
}

// To bfloat16, nearest, ties to even. From its largest value to infinity bits are cut off, so that finite values stay
// finite; NaN stays NaN.
inline void store_bf16(uint16_t* p, const float* values, size_t count) {
    constexpr int32_t largest = 0x7f7f0000, infinity = 0x7f800000, quiet = 0x400000;
    for (size_t i = 0; i < count; i++) {
        int32_t bits;
        std::memcpy(&bits, values + i, 4);
        const int32_t magnitude = bits & 0x7fffffff;
        const int32_t half = 0x7fff + ((bits >> 16) & 1);
        const int32_t step = magnitude < largest ? half : magnitude > infinity ? quiet & ~magnitude : 0;
        p[i] = static_cast<uint16_t>(static_cast<uint32_t>(bits + step) >> 16);
    }
}

// What is seldom asked for, kept out of the loops that store float32 and float16: it takes their registers. Values come
// in memory: a vector of several registers would be copied to be handed over, even where nobody asks for this.
[[gnu::noinline]] void store_narrow(uint16_t* narrow, ValueType type, const float* values) {
    if (type == ValueType::clipped_f16) return store_f16(narrow, clip_to_f16(load(values)));
    store_bf16(narrow, values, 16);
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
        store_narrow(narrow, type, wide);
    }
    std::memcpy(to + 2 * j, narrow, 2 * n);
}

// Calls write(out), which stores all of an output. Comparing each value would take a fifth of the time of gathering
// float16 from the cache, so they are stored as they come, and again if the CPU has noted that one became infinity.
// Loops run under StandardFloats (threads.h), so overflow is no trap, and what the caller had noted is not lost.
template <class Write>
inline void write_clipped(const Output& out, const Write& write) {
    if (out.type != ValueType::f16) return write(out);
    const Output clipped{out.values, out.row_bytes, ValueType::clipped_f16};
    if constexpr (notes_overflow) {
        forget_overflow();
        write(out);
        if (!has_noted_overflow()) [[likely]] return;
    }
    write(clipped);
}
